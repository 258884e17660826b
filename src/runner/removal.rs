//! What a job has in its node's engine, and its removal: containers, and names of its images.

use std::time::Duration;

use backon::{ExponentialBuilder, Retryable as _};
use uuid::Uuid;

use super::surroundings::{CONTAINER_LABEL, IMAGE_LABEL};
use crate::engine::{DockerEngine, Engine, EngineError};
use crate::job::JobId;

/// The most that a removal may take. An engine may be slow to kill containers; one that hangs never answers.
pub(super) const MOST: Duration = Duration::from_mins(1);

/// Removes everything that carries a job's labels.
///
/// A phase, finish and a sweep may do so at once; what one of them is removing, the engine refuses the others.
pub(super) async fn everything(
    engine: &DockerEngine,
    job: &JobId,
    most: Duration,
) -> Result<(), EngineError> {
    let removed = while_refused(async || {
        engine.remove_containers((CONTAINER_LABEL, job.as_str()), is_our_container).await?;
        engine.remove_images((IMAGE_LABEL, job.as_str()), is_ours).await.map(drop)
    });
    engine.within(most, removed).await
}

/// Removes the names of a job's images, and the images where nobody else has given them one.
pub(super) async fn images(engine: &DockerEngine, job: &JobId, most: Duration) -> Result<(), EngineError> {
    let removed =
        while_refused(async || engine.remove_images((IMAGE_LABEL, job.as_str()), is_ours).await.map(drop));
    engine.within(most, removed).await
}

/// Tries again for 5 s while the engine refuses.
async fn while_refused(remove: impl AsyncFn() -> Result<(), EngineError>) -> Result<(), EngineError> {
    let backoff = ExponentialBuilder::default()
        .with_min_delay(Duration::from_millis(50))
        .without_max_times()
        .with_total_delay(Some(Duration::from_secs(5)));
    let refused = |error: &EngineError| matches!(error, EngineError::Refused { .. });
    (|| remove()).retry(backoff).when(refused).await
}

/// How the name of every container begins that the runner makes.
const CONTAINER: &str = "nomad-build-test-nb-";

/// A name for a container of a job's tests.
pub(super) fn container_name(job: &JobId) -> String {
    format!("nomad-build-test-{job}-{}", Uuid::new_v4().simple())
}

/// Whether a container's name is one that the runner gives: what somebody runs from an image that says the label has another.
pub(super) fn is_our_container(name: &str) -> bool {
    name.starts_with(CONTAINER)
}

/// Whether a name is one that the runner gives images in an engine: its work tag, or what it pushed to a relay, whose
/// repository begins with a secret of 64 digits. What somebody pulled from a registry of this machine is not.
pub(super) fn is_ours(name: &str) -> bool {
    let is_secret = |part: &str| part.len() == 64 && part.bytes().all(|b| b.is_ascii_hexdigit());
    let relayed = name.strip_prefix("127.0.0.1:").and_then(|rest| rest.split('/').nth(1));
    name.starts_with("nomad-build/") || relayed.is_some_and(is_secret)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_removal_ends_though_the_engine_never_answers() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("engine.sock");
        let listener = tokio::net::UnixListener::bind(&socket).unwrap();
        let job = JobId::from_uuid(uuid::Uuid::from_u128(1));
        let engine = DockerEngine::new(socket.to_str().unwrap());
        let removed = everything(&engine, &job, Duration::from_millis(100)).await;
        assert!(matches!(removed, Err(EngineError::Unreachable { .. })), "{removed:?}");
        drop(listener);
    }

    #[test]
    fn a_container_of_a_jobs_tests_is_known_by_its_name() {
        let job = JobId::from_uuid(Uuid::from_u128(1));
        assert!(is_our_container(&container_name(&job)));
        assert!(!is_our_container("elegant_lovelace"));
    }

    #[test]
    fn only_names_that_the_runner_gave_are_removed() {
        let secret = "90c32fddf419433eb2d613fd711dc5ae53dd7705006d418aa13429e3ef8813dd";
        assert!(is_ours("nomad-build/nb-01900000-0000-7000-8000-000000000001:work"));
        assert!(is_ours(&format!("127.0.0.1:42909/{secret}/image:push")));
        assert!(is_ours(&format!("127.0.0.1:42909/{secret}/image@sha256:00")));
        for name in
            ["127.0.0.1:5000/acme/hello:v1", "acme/nomad-build/x:1", "localhost:5000/a:b", "127.0.0.1:5000"]
        {
            assert!(!is_ours(name), "{name}");
        }
    }
}
