//! Finish: the poststop task. It ends what was claimed, archives the job and removes what the job made here.
//!
//! Nomad runs it however the other tasks ended. It does not run, or not to its end, where the node is lost, where the
//! allocation never came to start a task, or where it cannot be started itself: the service's undertaker ends such a job,
//! and a cleanup or a sweep removes what it left.

use std::path::Path;

use chrono::Utc;

use super::archiving::Keeper;
use super::log::{self, Log};
use super::publish::Target;
use super::surroundings::Surroundings;
use super::{Ended, Fatal, end, removal};
use crate::engine::DockerEngine;
use crate::environment::BadConfiguration;
use crate::job::{Claim, Outcome, Payload, Phase, Progress, Task};
use crate::telemetry::chain;

/// The task after all others.
pub(super) async fn finish(
    around: Surroundings,
    payload: Option<Payload>,
    keeper: Result<Option<Keeper>, BadConfiguration>,
) -> Result<Ended, Fatal> {
    let (log, writer) = log::open(log::is_torn(&around.shared("logs"), "finish")).map_err(Fatal::Log)?;
    let known = known(&around).await;
    let is_untold = known.as_ref().is_ok_and(is_nothing);
    let ended = match (payload, known) {
        (_, Err(error)) => Err(error),
        (Some(payload), Ok(known)) => repair(&around, &payload, known, &log).await,
        // The build's task never got its payload, so nothing was claimed.
        (None, Ok(_)) => Ok(Ended::Well),
    };
    match keeper {
        Ok(Some(keeper)) => keeper.keep(&around, &log).await,
        Ok(None) => {}
        Err(error) => log.say(&format!("the job is not archived here: {error}")).await,
    }
    // After the repair and the archive, which log in. No task of this job is left that could need them, unless nothing of it ran
    // here: then Nomad may have another place for it, and where it has none the service removes them.
    let may_go_on = is_untold && self::known(&around).await.is_ok_and(|known| is_nothing(&known));
    if !may_go_on && let Err(error) = around.remove_credentials().await {
        let left = "copies of credentials stay behind until the job is cleaned up";
        log.say(&format!("{left}: {}", chain(&error))).await;
    }
    if let Err(error) = remove_folder(&around.checkout()).await {
        let left = "the checkout stays behind until Nomad collects the job";
        log.say(&format!("{left}: {}", chain(&error))).await;
    }
    // Last, as it may take long.
    let removed =
        removal::everything(&DockerEngine::new(&around.engine_socket), &around.job, removal::MOST).await;
    drop(log);
    // That the log's thread had a fault changes nothing of what was done.
    writer.finish().await.ok();
    let ended = ended?;
    removed?;
    Ok(ended)
}

/// What was decided of the job, and what its phases told.
async fn known(around: &Surroundings) -> Result<(Option<Claim>, Progress), Fatal> {
    let (claim, progress) =
        tokio::join!(around.ledger.claim(&around.job), around.ledger.progress(&around.job));
    Ok((claim?.map(|(_, claim)| claim), progress?.1))
}

/// Whether that is nothing.
fn is_nothing((claim, progress): &(Option<Claim>, Progress)) -> bool {
    claim.is_none() && progress.latest().is_none()
}

/// A publish task that claimed and then died left tags undone: nothing but the claimed digest can be put.
async fn repair(
    around: &Surroundings,
    payload: &Payload,
    (claim, progress): (Option<Claim>, Progress),
    log: &Log,
) -> Result<Ended, Fatal> {
    let Some(Claim::Claimed { digest, .. }) = claim else { return Ok(Ended::Well) };
    // Where what the build told is gone, the job was cleaned up.
    if progress.of(Phase::Publish).is_some_and(Outcome::is_over) || progress.of(Phase::Build).is_none() {
        return Ok(Ended::Well);
    }
    let begun = progress.of(Phase::Publish).cloned();
    let begun = begun.unwrap_or_else(|| Outcome::begun(&around.allocation, Utc::now()));
    let work = match Target::of(around, payload, Task::Finish, log).await {
        Ok(target) => target.repair(log, begun, &digest).await,
        Err(failure) => super::Work::FailedAfterClaim(begun, failure),
    };
    end(Phase::Publish, around, work.masked(log), None).await
}

async fn remove_folder(path: &Path) -> std::io::Result<()> {
    match tokio::fs::remove_dir_all(path).await {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
