//! Waiting for a value, with a bound.

use std::time::Duration;

use tokio::time::Instant;

const INTERVAL: Duration = Duration::from_millis(50);

/// Asks again until there is an answer; `None` when there was none within `limit`.
pub(super) async fn wait_for<T>(limit: Duration, mut ask: impl AsyncFnMut() -> Option<T>) -> Option<T> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(answer) = ask().await {
            return Some(answer);
        }
        if Instant::now() >= deadline {
            return None;
        }
        tokio::time::sleep(INTERVAL).await;
    }
}
