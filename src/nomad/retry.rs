//! Trying again while Nomad gives passing errors.

use std::time::Duration;

use backon::{ExponentialBuilder, Retryable as _};

use super::error::Error;

/// Makes a call until it succeeds, fails for good, or `patience` is over. Only for calls that may be made twice.
pub async fn patiently<T, F: Future<Output = Result<T, Error>>>(
    patience: Duration,
    call: impl FnMut() -> F,
) -> Result<T, Error> {
    let backoff = ExponentialBuilder::default()
        .with_jitter()
        .with_min_delay(Duration::from_millis(50))
        .with_max_delay(Duration::from_secs(3))
        .without_max_times()
        .with_total_delay(Some(patience));
    call.retry(backoff).when(Error::is_passing).await
}
