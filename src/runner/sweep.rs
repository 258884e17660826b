//! Sweep: what jobs left in this node's engine is removed from outside, where their own tasks could not do it.
//!
//! Invariant: only what carries the label of a job is touched, and of a job that nobody named only where its ledger, in this
//! namespace, says that it has ended.

use std::collections::BTreeMap;
use std::time::Duration;

use chrono::{DateTime, SecondsFormat, TimeDelta, Utc};

use super::log::{self, Log};
use super::removal::{self, is_our_container, is_ours};
use super::surroundings::{CONTAINER_LABEL, IMAGE_LABEL, Visitor, engine_socket};
use super::{Ended, Fatal, Lost};
use crate::engine::{DockerEngine, Engine as _};
use crate::environment::{Reader, Source};
use crate::job::{Facts, JobId, SweepReport};
use crate::ledger::LedgerError;
use crate::telemetry::chain;

/// How long the engine may take to list what it has.
const LISTS: Duration = Duration::from_mins(1);

/// What a sweep is for.
enum Purpose {
    /// One job, which is being cleaned up.
    Job(JobId),
    /// Every job that ended so long ago.
    Ended { since: TimeDelta, dry_run: bool },
}

/// Removes what others left.
pub(super) async fn sweep(source: Source<'_>) -> Result<Ended, Fatal> {
    let mut reader = Reader::new(source);
    let job = reader.parsed::<JobId>("NOMAD_BUILD_SWEEP", "a job ID");
    let since = reader.parsed::<u32>("NOMAD_BUILD_SWEEP_ENDED_S", "a number of seconds");
    let dry_run = reader.text("NOMAD_BUILD_SWEEP_DRY_RUN").is_some();
    let engine = DockerEngine::new(&engine_socket(&mut reader));
    let purpose = match (job, since) {
        (Some(job), _) => Some(Purpose::Job(job)),
        (None, Some(since)) => Some(Purpose::Ended { since: TimeDelta::seconds(since.into()), dry_run }),
        (None, None) => None,
    };
    match reader.finish(purpose).map_err(Lost::from)? {
        Some(Purpose::Job(job)) => removal::everything(&engine, &job, removal::MOST).await?,
        Some(Purpose::Ended { since, dry_run }) => {
            let (log, writer) = log::open(false).map_err(Fatal::Log)?;
            let swept = sweep_ended(&Visitor::read(source)?, &engine, since, dry_run, &log).await;
            drop(log);
            // What was done is done, whoever reads of it.
            writer.finish().await.ok();
            swept?;
        }
        None => return Err(Fatal::Task("sweep, of nothing".to_owned())),
    }
    Ok(Ended::Well)
}

/// Finds what ended jobs left, removes it unless this is a dry run, and reports it.
async fn sweep_ended(
    visitor: &Visitor,
    engine: &DockerEngine,
    since: TimeDelta,
    dry_run: bool,
    log: &Log,
) -> Result<(), Fatal> {
    let containers = engine.within(LISTS, engine.containers_by(CONTAINER_LABEL, is_our_container)).await?;
    let images = engine.within(LISTS, engine.images_by(IMAGE_LABEL, is_ours)).await?;
    let mut left = BTreeMap::<JobId, SweepReport>::new();
    let of = |label: &String| label.parse::<JobId>().ok();
    for job in containers.iter().filter_map(of) {
        left.entry(job).or_default().containers += 1;
    }
    for job in images.iter().filter_map(of) {
        left.entry(job).or_default().images += 1;
    }
    let mut report = SweepReport::default();
    for (job, found) in left {
        let end = match end_of(visitor, &job).await {
            Ok(Some(end)) if Utc::now() - end >= since => end,
            Ok(_) => continue,
            Err(error @ LedgerError::Malformed(..)) => {
                log.say(&format!("left alone: {}", chain(&error))).await;
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        report.containers += found.containers;
        report.images += found.images;
        let end = end.to_rfc3339_opts(SecondsFormat::Secs, true);
        let SweepReport { containers, images, .. } = found;
        let what = format!("{containers} containers and {images} images of {job}, which ended at {end}");
        if dry_run {
            log.say(&format!("would be removed: {what}")).await;
            continue;
        }
        match removal::everything(engine, &job, removal::MOST).await {
            Ok(()) => {
                report.removed_containers += containers;
                report.removed_images += images;
                log.say(&format!("removed: {what}")).await;
            }
            Err(error) => log.say(&format!("could not be removed: {what}: {}", chain(&error))).await,
        }
    }
    visitor.report(&report).await.map_err(Fatal::Report)
}

/// When a job ended; none while it has not, and where this namespace has no ledger of it: then it is somebody else's.
async fn end_of(visitor: &Visitor, job: &JobId) -> Result<Option<DateTime<Utc>>, LedgerError> {
    let mut facts = Facts::new(job.clone());
    for page in visitor.ledger.pages(job).await? {
        page.tell(&visitor.namespace, &mut facts);
    }
    Ok(facts.ended_at())
}
