//! The archivist: archives what `finish` could not, and lets go of what was kept long enough.
//!
//! `finish` does not run for a job that was never placed or whose node was lost, and may fail to reach the archive. A job
//! whose runner died is decided after its `finish` has ended.
//!
//! Invariant: only what has ended is archived, and nothing of a job that Nomad still has is removed.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use chrono::{DateTime, TimeDelta, Utc};
use futures_util::{StreamExt as _, stream};
use tokio::sync::watch;

use super::{Tenant, translate};
use crate::archive::{self, Archive, Index, Log, LogWriter};
use crate::job::{JobId, Phase, Record};
use crate::nomad::{self, Kind, Origin};
use crate::telemetry::{Archived, chain};

/// How often the ended jobs are looked through.
const EVERY: Duration = Duration::from_secs(5);

/// How long after a job's end its own `finish` has the first word.
const FINISHES: TimeDelta = TimeDelta::seconds(30);

/// How long after an attempt that failed the next one is made.
const AGAIN: Duration = Duration::from_mins(1);

/// How long after a job's end its log may still come to be whole.
const COMES: TimeDelta = TimeDelta::minutes(10);

/// How many jobs are archived at once.
const AT_ONCE: usize = 4;

/// How many jobs are looked after before it is looked which ended meanwhile.
const AT_A_PASS: usize = 100;

/// How often what was kept long enough is removed.
const EXPIRES: Duration = Duration::from_hours(1);

pub(super) struct Archivist<'a> {
    pub(super) tenant: &'a Tenant,
    pub(super) on_duty: watch::Receiver<bool>,
}

/// What is known of an ended job's archive.
#[derive(Clone, Copy)]
enum State {
    /// All there is to archive is archived.
    Done,
    /// Not before this time.
    Later(Instant),
}

/// What became of a phase's log.
enum Copied {
    Log(Log),
    /// The phase has none.
    Nothing,
    /// It may be whole later.
    NotYet,
}

/// Why a job is not archived.
#[derive(Debug, thiserror::Error)]
pub enum Unkept {
    #[error(transparent)]
    Archive(#[from] archive::Error),
    #[error(transparent)]
    Nomad(#[from] nomad::Error),
}

impl Archivist<'_> {
    /// Archives while this replica is on duty; ends only by being dropped.
    pub(super) async fn run(mut self) {
        let Some(archive) = self.tenant.archive.clone() else { return };
        let mut states = HashMap::new();
        let mut expired: Option<Instant> = None;
        while self.on_duty.wait_for(|on| *on).await.is_ok() {
            // Half of what is to be known makes records that are wrong.
            if self.tenant.freshness.is_complete() {
                self.pass(&archive, &mut states).await;
                if expired.is_none_or(|at| at.elapsed() > EXPIRES) {
                    expired = Some(Instant::now());
                    self.expire(&archive).await;
                }
            }
            tokio::time::sleep(EVERY).await;
        }
    }

    /// Looks through the ended jobs.
    async fn pass(&self, archive: &Archive, states: &mut HashMap<JobId, State>) {
        let store = &self.tenant.store;
        let now = Utc::now();
        let ids = store.ids();
        let records: HashMap<JobId, Arc<Record>> =
            ids.into_iter().filter_map(|id| Some((id.clone(), store.record(&id)?))).collect();
        states.retain(|id, _| records.contains_key(id));
        let is_due = |id: &JobId| match states.get(id) {
            None => true,
            Some(State::Done) => false,
            Some(State::Later(when)) => *when <= Instant::now(),
        };
        let has_ended = |record: &Record| {
            let end = record.timestamps.job_end.filter(|_| record.status.is_final());
            // Without an allocation there is no `finish` to wait for.
            let waits = record.nomad.allocation.as_ref().map_or(TimeDelta::zero(), |_| FINISHES);
            end.is_some_and(|end| now - end > waits)
        };
        let mut due: Vec<_> =
            records.values().filter(|record| has_ended(record) && is_due(&record.id)).cloned().collect();
        // What ended last may still be lost; what Nomad has forgotten can wait for another pass.
        due.sort_unstable_by_key(|record| (record.remembered, std::cmp::Reverse(record.timestamps.job_end)));
        due.truncate(AT_A_PASS);
        let mut looked = stream::iter(due)
            .map(async |record| (record.id.clone(), self.look_after(archive, &record).await))
            .buffer_unordered(AT_ONCE);
        while let Some((id, state)) = looked.next().await {
            match state {
                Ok(state) => drop(states.insert(id, state)),
                // It is not this job's fault: the others are not tried in vain.
                Err(error) => {
                    let error = chain(&error);
                    tracing::warn!(job = %id, error, "jobs cannot be archived now; will be tried again");
                    self.tenant.telemetry.all().archived(Archived::Failed);
                    states.insert(id, State::Later(Instant::now() + AGAIN));
                    break;
                }
            }
        }
        let pending = |id: &JobId| matches!(states.get(id), Some(State::Later(_)));
        let pending = records.keys().filter(|id| pending(id)).count();
        self.tenant.telemetry.archive_pending(pending);
    }

    async fn look_after(&self, archive: &Archive, record: &Record) -> Result<State, archive::Error> {
        let done = match self.tenant.archive_job(archive, record).await {
            Ok(done) => done,
            Err(Unkept::Archive(error)) => return Err(error),
            Err(Unkept::Nomad(error)) => {
                let error = chain(&error);
                tracing::warn!(job = %record.id, error, "a job's log cannot be archived now; will be tried again");
                self.tenant.telemetry.all().archived(Archived::Failed);
                false
            }
        };
        Ok(if done { State::Done } else { State::Later(Instant::now() + AGAIN) })
    }

    /// Removes what was kept long enough.
    async fn expire(&self, archive: &Archive) {
        let config = &self.tenant.config;
        let expire = async || {
            let old =
                expired(archive.jobs().await?, config.keep_archive, config.keep_archive_jobs, Utc::now());
            // What the store still knows would be archived again.
            for id in old.into_iter().filter(|id| self.tenant.store.record(id).is_none()) {
                archive.remove(&id).await?;
                tracing::info!(job = %id, "an archived job was kept long enough and is removed");
                self.tenant.telemetry.all().archived(Archived::Expired);
            }
            Ok::<_, archive::Error>(())
        };
        if let Err(error) = expire().await {
            tracing::warn!(error = chain(&error), "the archive could not be looked through for old jobs");
        }
    }
}

impl Tenant {
    /// Archives what is not archived of a job; whether that is all there will be.
    pub(super) async fn archive_job(&self, archive: &Archive, record: &Record) -> Result<bool, Unkept> {
        let mut written = false;
        let archived = archive.record(&record.id).await?;
        // Nomad has nothing more of it.
        if record.remembered && archived.is_some() {
            return Ok(true);
        }
        if says_more(record, archived.as_ref()) {
            archive.put_record(record).await?;
            written = true;
        }
        let mut whole = true;
        for (allocation, phases) in logs_of(record) {
            if archive.index(&record.id, allocation).await?.is_some() {
                continue;
            }
            whole &= match self.nomad.allocation(&record.nomad.namespace, allocation).await {
                // Its finish may be at it.
                Ok(found) if translate::may_still_work(&found) => false,
                Ok(_) => {
                    let copied = self.copy_logs(archive, record, allocation, &phases).await?;
                    written |= copied;
                    copied
                }
                // Nobody has them any more.
                Err(error) if error.kind == Kind::NotFound => true,
                Err(error) => return Err(error.into()),
            };
        }
        if written {
            tracing::info!(job = %record.id, "a job is archived");
            self.telemetry.all().archived(Archived::Written);
        }
        Ok(whole)
    }

    /// Copies logs of an allocation from Nomad; whether they were whole, or as whole as they will ever be.
    async fn copy_logs(
        &self,
        archive: &Archive,
        record: &Record,
        allocation: &str,
        phases: &[Phase],
    ) -> Result<bool, Unkept> {
        let mut logs = Index::new();
        for &phase in phases {
            match self.copy_log(archive, record, allocation, phase).await? {
                Copied::Log(log) => drop(logs.insert(phase, log)),
                Copied::Nothing => {}
                Copied::NotYet => return Ok(false),
            }
        }
        archive.put_index(&record.id, allocation, logs).await?;
        Ok(true)
    }

    async fn copy_log(
        &self,
        archive: &Archive,
        record: &Record,
        allocation: &str,
        phase: Phase,
    ) -> Result<Copied, Unkept> {
        let lines = record.lines[phase as usize];
        let began = lines.is_some() || record.timestamps.of(phase).0.is_some();
        // A node that starts may not know its allocations yet, and lines may be on their way.
        let may_come = record.timestamps.job_end.is_none_or(|end| Utc::now() - end < COMES);
        let namespace = &record.nomad.namespace;
        let nomad = &self.nomad;
        let opened = nomad.task_log(namespace, allocation, phase.as_str(), Origin::Start(0), false).await;
        let mut frames = match opened {
            Ok(frames) => frames,
            Err(error) if error.has_no_log() => {
                return Ok(if began && may_come { Copied::NotYet } else { Copied::Nothing });
            }
            Err(error) => return Err(error.into()),
        };
        let mut writer = None;
        while let Some(frame) = frames.next().await? {
            if !frame.data.is_empty() {
                let is_first = frame.file.ends_with(".0");
                let open = || archive.write_log(&record.id, allocation, phase, !is_first);
                writer.get_or_insert_with(open).put(Bytes::from(frame.data)).await?;
            }
        }
        // A run before the one that counted its lines may have had more of them.
        let is_short = |writer: &LogWriter| {
            let is_old = !record.wrote_since_it_began(phase, writer.time());
            lines.is_some_and(|lines| (writer.runs() <= 1 && writer.seq() < lines) || (lines > 0 && is_old))
        };
        match writer {
            None if began && may_come => Ok(Copied::NotYet),
            None => Ok(Copied::Nothing),
            Some(writer) if may_come && is_short(&writer) => {
                writer.abort().await;
                Ok(Copied::NotYet)
            }
            Some(writer) => Ok(Copied::Log(writer.finish().await?)),
        }
    }
}

/// The allocations that have a job's logs, and whose each one has.
fn logs_of(record: &Record) -> BTreeMap<&str, Vec<Phase>> {
    let mut logs = BTreeMap::<_, Vec<_>>::new();
    for phase in Phase::ALL {
        if let Some(allocation) = record.allocation_of(phase) {
            logs.entry(allocation).or_default().push(phase);
        }
    }
    logs
}

/// Whether a record says more than what is archived: `finish` knew less, and of a job that Nomad forgot less is known now.
/// What it ended as does not change.
fn says_more(record: &Record, archived: Option<&Record>) -> bool {
    archived
        .is_none_or(|archived| !record.remembered && archived.status == record.status && archived != record)
}

/// The jobs that are older than what is kept, or more than that.
fn expired(mut jobs: Vec<JobId>, keep: Duration, most: Option<usize>, now: DateTime<Utc>) -> Vec<JobId> {
    // An ID begins with the time of its submission.
    jobs.sort_unstable();
    let keep = TimeDelta::from_std(keep).unwrap_or(TimeDelta::MAX);
    let is_old = |id: &JobId| id.made_at().is_some_and(|at| now.signed_duration_since(at) > keep);
    let too_many = most.map_or(0, |most| jobs.len().saturating_sub(most));
    let mut at = 0;
    jobs.retain(|id| {
        at += 1;
        at <= too_many || is_old(id)
    });
    jobs
}

#[cfg(test)]
mod tests {
    use uuid::{ContextV7, Timestamp, Uuid};

    use super::*;
    use crate::job::{Claim, Facts, Labels, Reason, Status, Verdict};

    #[test]
    fn what_was_archived_gives_way_to_what_says_more() {
        let record = |end: i64, remembered: bool| {
            let id = JobId::from_uuid(Uuid::from_u128(1));
            let mut facts = Facts::new(id);
            facts.see_labels(1, "ci", Labels::default());
            let at = DateTime::from_timestamp(end, 0).unwrap();
            let verdict = Verdict::new(Status::Killed, None, Reason::Killed, "", at);
            facts.see_claim(2, Claim::revoked(verdict));
            Record { remembered, ..Record::of(&facts).unwrap() }
        };
        for (known, archived, more) in [
            (record(1, false), None, true),
            (record(1, true), None, true),
            (record(1, false), Some(record(1, false)), false),
            (record(1, false), Some(record(2, false)), true),
            (record(1, true), Some(record(2, false)), false),
            (record(1, false), Some(Record { status: Status::Succeeded, ..record(2, false) }), false),
        ] {
            assert_eq!(says_more(&known, archived.as_ref()), more, "{known:?} {archived:?}");
        }
    }

    #[test]
    fn the_newest_jobs_are_kept_and_none_that_is_too_old() {
        let id =
            |seconds: u64| JobId::from_uuid(Uuid::new_v7(Timestamp::from_unix(ContextV7::new(), seconds, 0)));
        let all: Vec<_> = [10, 20, 30, 40].map(id).into();
        let now = DateTime::from_timestamp(50, 0).unwrap();
        for (keep, most, want) in [
            (1000, None, &all[..0]),
            (25, None, &all[..2]),
            (1000, Some(3), &all[..1]),
            (25, Some(3), &all[..2]),
            (25, Some(1), &all[..3]),
            (1000, Some(9), &all[..0]),
        ] {
            let mut jobs = all.clone();
            jobs.reverse();
            assert_eq!(expired(jobs, Duration::from_secs(keep), most, now), want, "{keep} {most:?}");
        }
        // Of another making: its age is not known.
        let other = JobId::from_uuid(Uuid::from_u128(1));
        assert_eq!(expired(vec![other], Duration::from_secs(1), None, now), []);
    }
}
