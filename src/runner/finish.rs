//! Finish: the poststop task. It ends what was claimed, archives the job and removes what the job made here, and was given.
//!
//! Nomad runs it however the other tasks ended. It does not run, or not to its end, where the node is lost, where the
//! allocation never came to start a task, or where it cannot be started itself: the service's undertaker ends such a job,
//! and a cleanup or a sweep removes what it left.

use std::time::Duration;

use chrono::Utc;

use super::archiving::Keeper;
use super::log::{self, Log};
use super::publish::Target;
use super::surroundings::{Surroundings, remove_folder};
use super::{Ended, Fatal, end, removal};
use crate::engine::DockerEngine;
use crate::environment::BadConfiguration;
use crate::job::{Claim, Outcome, Payload, Phase, Progress, State, Task};
use crate::telemetry::chain;

/// How long Nomad is asked where a publish may have claimed and died, and where there is nothing to repair.
const PATIENCE: Duration = Duration::from_mins(1);
const IMPATIENCE: Duration = Duration::from_secs(3);

/// Nomad (1.11) takes an allocation for ended as soon as one of its tasks failed. Where it has ACLs it refuses what its other tasks
/// are from then on, with the words that it has for a missing leader.
const UNHEARD: &str = "Nomad does not hear this task, as it does where a task has failed: the service archives the job, and removes \
                       what it was given";

/// The task after all others.
pub(super) async fn finish(
    around: Surroundings,
    payload: Option<Payload>,
    keeper: Result<Option<Keeper>, BadConfiguration>,
) -> Result<Ended, Fatal> {
    let (log, writer) = log::open(log::is_torn(&around.shared("logs"), "finish")).map_err(Fatal::Log)?;
    let has_tests = payload.as_ref().is_none_or(|payload| payload.spec.has_tests());
    let patience = if may_have_claimed(&around, has_tests).await { PATIENCE } else { IMPATIENCE };
    let known = match tokio::time::timeout(patience, known(&around)).await {
        Ok(known) => known.map_err(|error| chain(&error)),
        Err(_) => Err("it does not answer".to_owned()),
    };
    let ended = match known {
        Ok(known) => {
            let is_over = is_over_here(&known, &around.allocation);
            let ended = match &payload {
                Some(payload) => repair(&around, payload, known, &log).await,
                // The build's task never got its payload, so nothing was claimed.
                None => Ok(Ended::Well),
            };
            let_go(&around, keeper, is_over, &log).await;
            ended
        }
        Err(why) => {
            log.say(&format!("{UNHEARD}: {why}")).await;
            Ok(Ended::Badly)
        }
    };
    if let Err(error) = remove_folder(&around.checkout()).await {
        let left = "the checkout stays behind until Nomad collects the job";
        log.say(&format!("{left}: {}", chain(&error))).await;
    }
    // Whatever became of its tasks: one that was killed could not, and its credentials outlive no job.
    around.put_away_all(&log).await;
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

/// Archives the job, and removes what it was given, where it ends here.
async fn let_go(
    around: &Surroundings,
    keeper: Result<Option<Keeper>, BadConfiguration>,
    is_over: bool,
    log: &Log,
) {
    match keeper {
        Ok(Some(keeper)) => keeper.keep(around, log).await,
        Ok(None) => {}
        Err(error) => log.say(&format!("the job is not archived here: {error}")).await,
    }
    // After the repair and the archive, which log in. No task of this job is left that could need them, unless it does not end
    // here: Nomad may have another place for it. Where it has none, the service removes them.
    let is_over = is_over || known(around).await.is_ok_and(|known| is_over_here(&known, &around.allocation));
    if is_over && let Err(error) = around.remove_credentials().await {
        let left = "copies of credentials stay behind, for the service to remove";
        log.say(&format!("{left}: {}", chain(&error))).await;
    }
}

/// What was decided of the job, and what its phases told.
type Known = (Option<Claim>, Progress);

async fn known(around: &Surroundings) -> Result<Known, Fatal> {
    let (claim, progress) =
        tokio::join!(around.ledger.claim(&around.job), around.ledger.progress(&around.job));
    Ok((claim?.map(|(_, claim)| claim), progress?.1))
}

/// Whether the publish task may have claimed and not told how it ended, by the signs of the phases.
async fn may_have_claimed(around: &Surroundings, has_tests: bool) -> bool {
    let before = if has_tests { Phase::Test } else { Phase::Build };
    around.signed(before).await == Some(State::Succeeded) && around.signed(Phase::Publish).await.is_none()
}

/// Whether the job ends in this allocation: not where nothing was told, or another allocation has it.
fn is_over_here((claim, progress): &Known, allocation: &str) -> bool {
    let is_here = |phase| progress.of(phase).is_some_and(|outcome| outcome.allocation == allocation);
    let is_told_here = Phase::ALL.into_iter().any(is_here);
    match claim {
        Some(Claim::Revoked { .. }) => true,
        Some(Claim::Claimed { allocation: claimer, .. }) => claimer == allocation || is_told_here,
        None => is_told_here,
    }
}

/// A publish task that claimed and then died left tags undone: nothing but the claimed digest can be put.
async fn repair(
    around: &Surroundings,
    payload: &Payload,
    (claim, progress): Known,
    log: &Log,
) -> Result<Ended, Fatal> {
    let Some(Claim::Claimed { digest, allocation: claimer, .. }) = claim else { return Ok(Ended::Well) };
    // Another allocation publishes.
    let of_publish = progress.of(Phase::Publish).map(|outcome| outcome.allocation.as_str());
    if ![Some(claimer.as_str()), of_publish].contains(&Some(around.allocation.as_str())) {
        return Ok(Ended::Well);
    }
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
