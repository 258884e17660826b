//! Trying again while Nomad gives passing errors.

use std::time::Duration;

use backon::{BackoffBuilder as _, ExponentialBuilder};
use tokio::time::Instant;

use super::error::Error;

/// Makes a call until it succeeds, fails for good, or `patience` is over; then as long as the last call takes, which has a
/// bound of its own. Only for calls that may be made twice.
pub async fn patiently<T, F: Future<Output = Result<T, Error>>>(
    patience: Duration,
    mut call: impl FnMut() -> F,
) -> Result<T, Error> {
    let end = Instant::now() + patience;
    let mut delays = ExponentialBuilder::default()
        .with_jitter()
        .with_min_delay(Duration::from_millis(50))
        .with_max_delay(Duration::from_secs(3))
        .without_max_times()
        .build();
    loop {
        let error = match call().await {
            Err(error) if error.is_passing() => error,
            done => return done,
        };
        // Calls that hang count as much as the pauses between them.
        match delays.next() {
            Some(delay) if Instant::now() < end => {
                tokio::time::sleep_until(end.min(Instant::now() + delay)).await;
            }
            _ => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn attempts(patience: Duration, each: Duration) -> (u32, Duration) {
        let (began, mut count) = (Instant::now(), 0);
        let done: Result<(), _> = patiently(patience, || {
            count += 1;
            async move {
                tokio::time::sleep(each).await;
                Err(Error::unreachable("asking", "no answer"))
            }
        })
        .await;
        assert!(done.is_err());
        (count, began.elapsed())
    }

    #[tokio::test]
    async fn patience_is_a_time_however_long_each_call_takes() {
        let patience = Duration::from_millis(200);
        let (count, took) = attempts(patience, Duration::ZERO).await;
        assert!(count > 1 && took >= patience, "{count} {took:?}");
        assert_eq!(attempts(patience, 2 * patience).await.0, 1);
    }
}
