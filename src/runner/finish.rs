//! Finish: the poststop task. It ends what was claimed and removes what the job made here.
//!
//! Nomad runs it however the other tasks ended. It does not run, or not to its end, where the node is lost, where the
//! allocation never came to start a task, or where it cannot be started itself: the service's undertaker ends such a job,
//! and a cleanup removes what it left.
//!
//! Sweep: the same removal from outside, for a job whose own tasks could not do it.

use std::path::Path;
use std::time::Duration;

use backon::{ExponentialBuilder, Retryable as _};
use chrono::Utc;

use super::log::{self, Log};
use super::publish::Target;
use super::surroundings::{CONTAINER_LABEL, IMAGE_LABEL, Surroundings, engine_socket};
use super::{Ended, Fatal, end};
use crate::engine::{DockerEngine, Engine, EngineError};
use crate::environment::{Reader, Source};
use crate::job::{Claim, JobId, Outcome, Payload, Phase, Task};
use crate::telemetry::chain;

/// The most that the removal may take. An engine may be slow to kill containers; one that hangs never answers.
const REMOVAL: Duration = Duration::from_mins(1);

/// Whether a name is one that the runner gives images in an engine: its work tag, or what it pushed to a relay, whose
/// repository begins with a secret of 64 digits. What somebody pulled from a registry of this machine is not.
fn is_ours(name: &str) -> bool {
    let is_secret = |part: &str| part.len() == 64 && part.bytes().all(|b| b.is_ascii_hexdigit());
    let relayed = name.strip_prefix("127.0.0.1:").and_then(|rest| rest.split('/').nth(1));
    name.starts_with("nomad-build/") || relayed.is_some_and(is_secret)
}

/// Removes what carries a job's labels.
///
/// A stopped phase, finish and a sweep may do so at once; what one of them is removing, the engine refuses the others.
async fn remove(engine: &DockerEngine, job: &JobId, most: Duration) -> Result<(usize, usize), EngineError> {
    let backoff = ExponentialBuilder::default()
        .with_min_delay(Duration::from_millis(50))
        .without_max_times()
        .with_total_delay(Some(Duration::from_secs(5)));
    let refused = |error: &EngineError| matches!(error, EngineError::Refused { .. });
    let removed = (|| remove_once(engine, job)).retry(backoff).when(refused);
    engine.within(most, removed).await
}

async fn remove_once(engine: &impl Engine, job: &JobId) -> Result<(usize, usize), EngineError> {
    let containers = engine.remove_containers((CONTAINER_LABEL, job.as_str())).await?;
    Ok((containers, engine.remove_images((IMAGE_LABEL, job.as_str()), is_ours).await?))
}

/// The task after all others.
pub(super) async fn finish(around: Surroundings, payload: Option<Payload>) -> Result<Ended, Fatal> {
    let (log, writer) = log::open().map_err(Fatal::Log)?;
    let ended = match payload {
        Some(payload) => repair(&around, &payload, &log).await,
        // The build's task never got its payload, so nothing was claimed.
        None => Ok(Ended::Well),
    };
    // After the repair, which logs in. No task of this job is left that could need them.
    if let Err(error) = around.remove_credentials().await {
        let left = "copies of credentials stay behind until the job is cleaned up";
        log.say(&format!("{left}: {}", chain(&error))).await;
    }
    if let Err(error) = remove_folder(&around.checkout()).await {
        let left = "the checkout stays behind until Nomad collects the job";
        log.say(&format!("{left}: {}", chain(&error))).await;
    }
    // Last, as it may take long.
    let removed = remove(&DockerEngine::new(&around.engine_socket), &around.job, REMOVAL).await;
    drop(log);
    // A log that nobody takes any more changes nothing of what was done.
    writer.finish().await.ok();
    let ended = ended?;
    removed?;
    Ok(ended)
}

/// A publish task that claimed and then died left tags undone: nothing but the claimed digest can be put.
async fn repair(around: &Surroundings, payload: &Payload, log: &Log) -> Result<Ended, Fatal> {
    let (claim, progress) =
        tokio::join!(around.ledger.claim(&around.job), around.ledger.progress(&around.job));
    let (claim, (_, progress)) = (claim?, progress?);
    let Some((_, Claim::Claimed { digest, .. })) = claim else { return Ok(Ended::Well) };
    if progress.of(Phase::Publish).is_some_and(Outcome::is_over) {
        return Ok(Ended::Well);
    }
    let begun = progress.of(Phase::Publish).cloned();
    let begun = begun.unwrap_or_else(|| Outcome::begun(&around.allocation, Utc::now()));
    let work = match Target::of(around, payload, Task::Finish).await {
        Ok(target) => target.repair(log, begun, &digest).await,
        Err(failure) => super::Work::FailedAfterClaim(begun, failure),
    };
    end(Phase::Publish, around, work, None).await
}

async fn remove_folder(path: &Path) -> std::io::Result<()> {
    match tokio::fs::remove_dir_all(path).await {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Removes what another job left in this node's engine.
pub(super) async fn sweep(source: Source<'_>) -> Result<Ended, Fatal> {
    let mut reader = Reader::new(source);
    let job = reader.parsed::<JobId>("NOMAD_BUILD_SWEEP", "a job ID");
    let socket = engine_socket(&mut reader);
    let Some(job) = reader.finish(job).map_err(super::Lost::from)? else {
        return Err(Fatal::Task("sweep without a job".to_owned()));
    };
    remove(&DockerEngine::new(&socket), &job, REMOVAL).await?;
    Ok(Ended::Well)
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
        let removed = remove(&engine, &job, Duration::from_millis(100)).await;
        assert!(matches!(removed, Err(EngineError::Unreachable { .. })), "{removed:?}");
        drop(listener);
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
