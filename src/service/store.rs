//! What every replica knows: the facts of each job, and the record made of them.
//!
//! Invariant: a read takes no call to Nomad and copies nothing but a pointer. A record changes only by facts.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};

use chrono::{DateTime, Utc};
use tokio::sync::{Notify, watch};

use crate::job::{Due, Facts, JobId, Record};
use crate::telemetry::{JobEnded, Telemetry};

struct Entry {
    facts: Facts,
    /// None until the Nomad job itself was heard of.
    record: Option<watch::Sender<Arc<Record>>>,
}

/// The records of one namespace.
pub(super) struct Store {
    entries: RwLock<HashMap<JobId, Entry>>,
    telemetry: Arc<Telemetry>,
    /// Rung when something may have become due.
    due: Notify,
}

impl Store {
    /// An empty store.
    pub(super) fn new(telemetry: Arc<Telemetry>) -> Self {
        Self { entries: RwLock::default(), telemetry, due: Notify::new() }
    }

    /// A job's record, as it stands.
    pub(super) fn record(&self, id: &JobId) -> Option<Arc<Record>> {
        let entries = self.entries.read().unwrap_or_else(PoisonError::into_inner);
        entries.get(id)?.record.as_ref().map(|record| record.borrow().clone())
    }

    /// A job's record, as it changes.
    pub(super) fn follow(&self, id: &JobId) -> Option<watch::Receiver<Arc<Record>>> {
        let entries = self.entries.read().unwrap_or_else(PoisonError::into_inner);
        entries.get(id)?.record.as_ref().map(watch::Sender::subscribe)
    }

    /// How many jobs have not ended.
    pub(super) fn live(&self) -> i64 {
        self.telemetry.live()
    }

    /// The jobs that are known.
    pub(super) fn ids(&self) -> Vec<JobId> {
        self.entries.read().unwrap_or_else(PoisonError::into_inner).keys().cloned().collect()
    }

    /// Takes in facts of a job. `see` says whether they were news.
    pub(super) fn see(&self, id: &JobId, see: impl FnOnce(&mut Facts) -> bool) {
        let mut entries = self.entries.write().unwrap_or_else(PoisonError::into_inner);
        let entry = entries
            .entry(id.clone())
            .or_insert_with(|| Entry { facts: Facts::new(id.clone()), record: None });
        if see(&mut entry.facts) {
            self.fold(entry);
        }
    }

    fn fold(&self, entry: &mut Entry) {
        let Some(record) = Record::of(&entry.facts) else { return };
        if entry.facts.due(Utc::now()).is_some() {
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
        self.telemetry.job_changed(&before, &record);
        if record.status.is_final() && !before.status.is_final() {
            JobEnded { record: &record }.emit();
        }
        sender.send_replace(Arc::new(record));
    }

    /// Forgets a job.
    pub(super) fn remove(&self, id: &JobId) {
        let removed = self.entries.write().unwrap_or_else(PoisonError::into_inner).remove(id);
        if let Some(record) = removed.and_then(|entry| entry.record) {
            self.telemetry.job_forgotten(&record.borrow());
        }
    }

    /// Everything that is due now.
    pub(super) fn due(&self, now: DateTime<Utc>) -> Vec<(JobId, Due)> {
        let entries = self.entries.read().unwrap_or_else(PoisonError::into_inner);
        entries.iter().filter_map(|(id, entry)| Some((id.clone(), entry.facts.due(now)?))).collect()
    }

    /// Waits until something may have become due.
    pub(super) async fn wait_for_due(&self) {
        self.due.notified().await;
    }
}
