//! What every replica knows: the facts of each job, and the record made of them.
//!
//! Invariant: a read takes no call to Nomad and copies nothing but a pointer. A record changes only by facts.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Bound;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

use chrono::{DateTime, TimeDelta, Utc};
use tokio::sync::{Notify, watch};

use super::freshness::Freshness;
use crate::job::{Claim, Due, Facts, JobId, Labels, Outcome, Record};
use crate::telemetry::{JobEnded, Share};

/// How long a job that was forgotten stays so: a list of jobs that was read before is applied long before.
const FORGOTTEN: Duration = Duration::from_mins(10);

struct Entry {
    facts: Facts,
    /// When anything new was heard of it last.
    heard: Instant,
    /// None until the Nomad job itself was heard of.
    record: Option<watch::Sender<Arc<Record>>>,
}

impl Entry {
    fn due(&self, now: DateTime<Utc>) -> Option<Due> {
        let silent = TimeDelta::from_std(self.heard.elapsed()).unwrap_or(TimeDelta::MAX);
        self.facts.due(now, silent)
    }
}

#[derive(Default)]
struct Jobs {
    /// In the order of their submission, which an ID begins with.
    known: BTreeMap<JobId, Entry>,
    /// Those removed lately. An ID is never used again, so nothing that is still heard of one counts.
    forgotten: HashMap<JobId, Instant>,
}

/// What was decided of a job, and how it was published.
pub(super) struct Decided {
    pub(super) job: JobId,
    pub(super) labels: Labels,
    pub(super) claim: Claim,
    pub(super) published: Option<Outcome>,
}

/// The records of one namespace.
pub(super) struct Store {
    jobs: RwLock<Jobs>,
    freshness: Arc<Freshness>,
    telemetry: Arc<Share>,
    /// Rung when something may have become due.
    due: Notify,
}

impl Store {
    /// An empty store.
    pub(super) fn new(freshness: Arc<Freshness>, telemetry: Arc<Share>) -> Self {
        Self { jobs: RwLock::default(), freshness, telemetry, due: Notify::new() }
    }

    fn read(&self) -> RwLockReadGuard<'_, Jobs> {
        self.jobs.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Jobs> {
        self.jobs.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// A job's record, as it stands.
    pub(super) fn record(&self, id: &JobId) -> Option<Arc<Record>> {
        self.read().known.get(id)?.record.as_ref().map(|record| record.borrow().clone())
    }

    /// A job's record, as it changes.
    pub(super) fn follow(&self, id: &JobId) -> Option<watch::Receiver<Arc<Record>>> {
        self.read().known.get(id)?.record.as_ref().map(watch::Sender::subscribe)
    }

    /// How many jobs have not ended.
    pub(super) fn live(&self) -> i64 {
        self.telemetry.live()
    }

    /// The latest records that fit, of jobs before one, at most so many, the newest first.
    pub(super) fn latest(
        &self,
        before: Option<&JobId>,
        most: usize,
        fits: impl Fn(&Record) -> bool,
    ) -> Vec<Arc<Record>> {
        let jobs = self.read();
        let until = before.map_or(Bound::Unbounded, Bound::Excluded);
        let records = jobs.known.range::<JobId, _>((Bound::Unbounded, until)).rev();
        let records = records.filter_map(|(_, entry)| entry.record.as_ref());
        let fitting = records.map(|record| Arc::clone(&record.borrow())).filter(|record| fits(record));
        fitting.take(most).collect()
    }

    /// Whether anything is known of a job.
    pub(super) fn knows(&self, id: &JobId) -> bool {
        self.read().known.contains_key(id)
    }

    /// Whether no task of a job ran or will, as far as it is known.
    pub(super) fn has_no_place(&self, id: &JobId) -> bool {
        self.read().known.get(id).is_none_or(|entry| entry.facts.has_no_place())
    }

    /// The jobs that have ended, and whose `finish` is over.
    pub(super) fn finished(&self, now: DateTime<Utc>) -> HashSet<JobId> {
        let jobs = self.read();
        let is_final =
            |entry: &Entry| entry.record.as_ref().is_some_and(|record| record.borrow().status.is_final());
        let finished = |entry: &Entry| is_final(entry) && entry.facts.is_finished(now);
        jobs.known.iter().filter(|(_, entry)| finished(entry)).map(|(id, _)| id.clone()).collect()
    }

    /// The jobs that are known.
    pub(super) fn ids(&self) -> Vec<JobId> {
        self.read().known.keys().cloned().collect()
    }

    /// The least ID of a job whose ledger may still be written to: it has not ended or did so after a time, or it was made
    /// after that time and may not have been heard of.
    pub(super) fn first_open(&self, since: DateTime<Utc>) -> JobId {
        let is_open = |record: &Record| {
            !record.status.is_final() || record.timestamps.job_end.is_some_and(|end| end > since)
        };
        let jobs = self.read();
        let open = jobs
            .known
            .iter()
            .filter(|(_, entry)| entry.record.as_ref().is_some_and(|record| is_open(&record.borrow())));
        let new = JobId::first_of(since);
        open.map(|(id, _)| id).min().filter(|open| **open < new).cloned().unwrap_or(new)
    }

    /// Takes in facts of a job, unless it was forgotten. `see` says whether they were news; so does this.
    pub(super) fn see(&self, id: &JobId, see: impl FnOnce(&mut Facts) -> bool) -> bool {
        let mut jobs = self.write();
        if jobs.forgotten.contains_key(id) {
            return false;
        }
        let entry = jobs.known.entry(id.clone()).or_insert_with(|| Entry {
            facts: Facts::new(id.clone()),
            heard: Instant::now(),
            record: None,
        });
        let news = see(&mut entry.facts);
        if news {
            entry.heard = Instant::now();
            self.fold(entry);
        }
        news
    }

    /// Nomad is in an older state than what is known: see [`Facts::begin_anew`]. Records stay until it is listed.
    pub(super) fn begin_anew(&self) {
        self.write().known.values_mut().for_each(|entry| entry.facts.begin_anew());
    }

    /// What was decided of a job that Nomad has, and how it was published.
    pub(super) fn decided(&self, id: &JobId) -> Option<Decided> {
        let jobs = self.read();
        let facts = &jobs.known.get(id)?.facts;
        let labels = facts.job.as_ref().filter(|job| !job.gone && !job.remembered)?.labels.clone();
        let published = facts.published().cloned();
        Some(Decided { job: id.clone(), labels, claim: facts.claim.1.clone()?, published })
    }

    /// Whether Nomad no longer has a job, as far as is known.
    pub(super) fn is_gone(&self, id: &JobId) -> bool {
        let jobs = self.read();
        let job = jobs.known.get(id).and_then(|entry| entry.facts.job.as_ref());
        job.is_none_or(|job| job.gone || job.remembered)
    }

    /// The jobs that Nomad has and of which it is known how they were decided.
    pub(super) fn decided_jobs(&self) -> Vec<JobId> {
        let is_decided = |facts: &Facts| {
            facts.claim.1.is_some() && facts.job.as_ref().is_some_and(|job| !job.gone && !job.remembered)
        };
        let jobs = self.read();
        jobs.known.iter().filter(|(_, entry)| is_decided(&entry.facts)).map(|(id, _)| id.clone()).collect()
    }

    /// What is due of one job now.
    pub(super) fn due_of(&self, id: &JobId, now: DateTime<Utc>) -> Option<Due> {
        self.read().known.get(id)?.due(now)
    }

    fn fold(&self, entry: &mut Entry) {
        let Some(record) = Record::of(&entry.facts) else { return };
        if entry.due(Utc::now()).is_some() {
            self.due.notify_one();
        }
        let Some(sender) = &entry.record else {
            self.telemetry.job_seen(&record);
            entry.record = Some(watch::Sender::new(Arc::new(record)));
            return;
        };
        let before = sender.borrow().clone();
        if *before == record {
            return;
        }
        // What the first lists tell piece by piece has happened before.
        let is_news = self.freshness.is_complete();
        self.telemetry.job_changed(&before, &record, &entry.facts.progress.1, is_news);
        if is_news && record.status.is_final() && !before.status.is_final() {
            JobEnded { record: &record }.emit();
        }
        sender.send_replace(Arc::new(record));
    }

    /// Forgets a job that is nowhere any more.
    pub(super) fn remove(&self, id: &JobId) {
        let mut jobs = self.write();
        jobs.forgotten.retain(|_, since| since.elapsed() < FORGOTTEN);
        jobs.forgotten.insert(id.clone(), Instant::now());
        if let Some(record) = jobs.known.remove(id).and_then(|entry| entry.record) {
            self.telemetry.job_forgotten(&record.borrow());
        }
    }

    /// Forgets those of some jobs that have ended, or of which nothing but their ledger was ever known, and that is gone.
    pub(super) fn remove_ended(&self, ids: &[JobId]) {
        for id in ids {
            if self.record(id).is_none_or(|record| record.status.is_final() || record.remembered) {
                self.remove(id);
            }
        }
    }

    /// Everything that is due now.
    pub(super) fn due(&self, now: DateTime<Utc>) -> Vec<(JobId, Due)> {
        self.read().known.iter().filter_map(|(id, entry)| Some((id.clone(), entry.due(now)?))).collect()
    }

    /// Waits until something may have become due.
    pub(super) async fn wait_for_due(&self) {
        self.due.notified().await;
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::job::{JobFacts, Reason, Status, Verdict};
    use crate::service::freshness::Part;
    use crate::telemetry::Telemetry;

    fn id(number: u128) -> JobId {
        JobId::from_uuid(Uuid::from_u128(number))
    }

    fn submitted(store: &Store, id: &JobId) {
        store.see(id, |facts| facts.see_job(JobFacts::new(5, "ci", Labels::default())));
    }

    fn killed(store: &Store, id: &JobId) {
        let verdict = Verdict::new(Status::Killed, None, Reason::Killed, "", DateTime::UNIX_EPOCH);
        store.see(id, |facts| facts.see_claim(6, Claim::revoked(verdict)));
    }

    fn share() -> Arc<Share> {
        Arc::new(Share::new(Arc::new(Telemetry::new().unwrap())))
    }

    fn store() -> Store {
        Store::new(Arc::default(), share())
    }

    #[test]
    fn a_job_that_was_cleaned_up_is_not_brought_back_by_a_list_that_was_read_before() {
        let store = store();
        submitted(&store, &id(1));
        killed(&store, &id(1));
        store.remove(&id(1));
        submitted(&store, &id(1));
        assert!(store.record(&id(1)).is_none());
        store.see(&id(1), |facts| facts.see_gone(9));
        // Nothing of it is due: a claim that was written now would stay for ever.
        assert_eq!(store.due(Utc::now()), []);
        assert_eq!(store.ids(), []);
    }

    #[test]
    fn what_was_before_this_replica_began_is_no_news() {
        let (freshness, telemetry) = (Arc::<Freshness>::default(), share());
        telemetry.set_reports(true);
        let store = Store::new(Arc::clone(&freshness), Arc::clone(&telemetry));
        let ended =
            || telemetry.all().text().unwrap().contains("nomad_build_jobs_total{status=\"KILLED\"} 1");
        submitted(&store, &id(1));
        submitted(&store, &id(2));
        assert_eq!(store.live(), 2);
        killed(&store, &id(1));
        assert_eq!((store.live(), ended()), (1, false));
        freshness.current(Part::Jobs);
        freshness.current(Part::Ledger);
        killed(&store, &id(2));
        assert_eq!((store.live(), ended()), (0, true));
    }

    #[test]
    fn the_first_open_job_is_the_oldest_that_may_still_write() {
        let (store, since) = (store(), DateTime::from_timestamp(1000, 0).unwrap());
        let at = |seconds| JobId::first_of(DateTime::from_timestamp(seconds, 0).unwrap());
        let ended = |id: &JobId, at: i64| {
            submitted(&store, id);
            let at = DateTime::from_timestamp(at, 0).unwrap();
            let verdict = Verdict::new(Status::Killed, None, Reason::Killed, "", at);
            store.see(id, |facts| facts.see_claim(6, Claim::revoked(verdict)));
        };
        assert_eq!(store.first_open(since), at(1000));
        submitted(&store, &at(1001));
        ended(&at(1), 999);
        // Its Nomad job was never heard of.
        store.see(&at(2), |facts| facts.see_progress(5, crate::job::Progress::default()));
        assert_eq!(store.first_open(since), at(1000));
        submitted(&store, &at(500));
        assert_eq!(store.first_open(since), at(500));
        ended(&at(400), 1001);
        assert_eq!(store.first_open(since), at(400));
    }

    #[test]
    fn of_jobs_that_are_nowhere_any_more_only_those_that_ended_are_forgotten() {
        let store = store();
        for number in 1..=3 {
            submitted(&store, &id(number));
        }
        killed(&store, &id(1));
        killed(&store, &id(2));
        store.remove_ended(&[id(1), id(3)]);
        let known = |number| store.record(&id(number)).is_some();
        assert_eq!([known(1), known(2), known(3)], [false, true, true]);
    }
}
