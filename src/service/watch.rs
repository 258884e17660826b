//! The reflector: list, then stream, then list again.
//!
//! Two loops, because Nomad has two ways to push: the event stream for jobs, allocations and evaluations, and a
//! blocking query for Variables, which have no events. A list is the truth; a stream is a hint in between.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::stream;
use futures_util::{StreamExt as _, TryStreamExt as _};

use super::freshness::{Freshness, Part};
use super::store::Store;
use super::translate;
use crate::job::{Claim, JobId, Progress};
use crate::ledger::{self, Entry};
use crate::nomad::{Client, Error, Event, EventStream, Variable};
use crate::telemetry::Telemetry;

/// How long the stream is believed before everything is listed again.
const RELIST: Duration = Duration::from_mins(5);

/// How long a blocking query waits at Nomad.
const WAIT: Duration = Duration::from_mins(1);

/// How many Variables are read at once.
const READS: usize = 16;

/// Follows one namespace into a store.
pub(super) struct Watcher {
    pub(super) nomad: Client,
    pub(super) namespace: String,
    pub(super) store: Arc<Store>,
    pub(super) freshness: Arc<Freshness>,
    pub(super) telemetry: Arc<Telemetry>,
}

impl Watcher {
    /// Follows for ever; ends only by being dropped.
    pub(super) async fn run(self) {
        tokio::join!(self.follow_jobs(), self.follow_ledger());
    }

    async fn follow_jobs(&self) {
        let mut pause = Pause::new();
        loop {
            let began = Instant::now();
            let Err(error) = self.list_and_listen().await else { continue };
            self.freshness.broken(Part::Jobs, &error);
            self.telemetry.watch_broken("jobs", &error);
            pause.after(began).await;
        }
    }

    /// One list, and the stream behind it until it is time to list again.
    async fn list_and_listen(&self) -> Result<(), Error> {
        let jobs = self.nomad.jobs(&self.namespace, JobId::PREFIX).await?;
        let mut events = self.nomad.events(&self.namespace, jobs.index).await?;
        let allocations = self.nomad.allocations(&self.namespace).await?;
        let mut listed: HashSet<JobId> = HashSet::new();
        for (id, facts) in jobs.value.into_iter().filter_map(translate::stub) {
            self.store.see(&id, |known| known.see_job(facts));
            listed.insert(id);
        }
        for (id, facts) in allocations.value.iter().filter_map(translate::allocation) {
            if listed.contains(&id) {
                self.store.see(&id, |known| known.see_allocation(facts));
            }
        }
        let absent: Vec<_> = self.store.ids().into_iter().filter(|id| !listed.contains(id)).collect();
        for id in &absent {
            // Absent, if the list is at least as new as what is known; a later registration is not undone.
            self.store.see(id, |known| known.see_gone(jobs.index));
        }
        self.forget(absent).await?;
        self.freshness.current(Part::Jobs);
        self.telemetry.listed("jobs");
        self.ask_why_they_wait().await;
        self.listen(&mut events).await
    }

    /// Forgets which of the jobs that Nomad no longer has were cleaned up, here or by another replica: those that ended
    /// and of which the ledger has nothing.
    async fn forget(&self, mut absent: Vec<JobId>) -> Result<(), Error> {
        if absent.is_empty() {
            return Ok(());
        }
        let left = self.nomad.variables_after(&self.namespace, ledger::PREFIX, 0, WAIT).await?.value;
        let left: HashSet<_> = left.iter().filter_map(|stub| ledger::parse_path(&stub.path)).collect();
        let has = |id: &JobId, entry| left.contains(&(id.clone(), entry));
        absent.retain(|id| !has(id, Entry::Claim) && !has(id, Entry::Progress));
        self.store.remove_ended(&absent);
        Ok(())
    }

    async fn listen(&self, events: &mut EventStream) -> Result<(), Error> {
        let relist = tokio::time::sleep(RELIST);
        tokio::pin!(relist);
        loop {
            let heard = tokio::select! {
                () = &mut relist => return Ok(()),
                heard = events.next() => heard?,
            };
            self.freshness.current(Part::Jobs);
            for event in heard.events {
                self.take(event, heard.index);
            }
        }
    }

    fn take(&self, event: Event, index: u64) {
        match event {
            Event::Job(job) => match translate::job(&job) {
                // The last word on a job that was cleaned up comes after it was forgotten.
                Some((id, facts)) if facts.stopped => self.known(&id, |known| known.see_job(facts)),
                Some((id, facts)) => self.store.see(&id, |known| known.see_job(facts)),
                None => {}
            },
            Event::JobGone { id } => {
                if let Ok(id) = id.parse() {
                    self.known(&id, |known| known.see_gone(index));
                }
            }
            Event::Allocation(allocation) => {
                if let Some((id, facts)) = translate::allocation(&allocation) {
                    self.known(&id, |known| known.see_allocation(facts));
                }
            }
            Event::Evaluation(evaluation) => {
                if let Ok(id) = evaluation.job_id.parse() {
                    let placement = translate::placement(&evaluation);
                    self.known(&id, |known| known.see_placement(evaluation.modify_index, placement));
                }
            }
        }
    }

    /// Takes in facts of a job that is already known: its other traces outlive it in the stream.
    fn known(&self, id: &JobId, see: impl FnOnce(&mut crate::job::Facts) -> bool) {
        if self.store.record(id).is_some() {
            self.store.see(id, see);
        }
    }

    /// Jobs without an allocation: the evaluations that say why may be older than the stream.
    async fn ask_why_they_wait(&self) {
        let waits = |id: &JobId| {
            self.store.record(id).is_some_and(|r| !r.status.is_final() && r.nomad.allocation.is_none())
        };
        let waiting: Vec<_> = self.store.ids().into_iter().filter(waits).collect();
        stream::iter(waiting)
            .for_each_concurrent(READS, async |id| {
                // A job that went meanwhile has no reason to wait.
                let evaluations =
                    self.nomad.job_evaluations(&self.namespace, id.as_str()).await.unwrap_or_default();
                for evaluation in evaluations {
                    let placement = translate::placement(&evaluation);
                    self.store.see(&id, |known| known.see_placement(evaluation.modify_index, placement));
                }
            })
            .await;
    }

    async fn follow_ledger(&self) {
        let mut pause = Pause::new();
        let mut seen = HashMap::new();
        let mut index = 0;
        loop {
            let began = Instant::now();
            match self.read_ledger(&mut seen, index).await {
                Ok(next) => {
                    // An index that goes backwards is another cluster, or an older state of this one.
                    if next < index {
                        seen.clear();
                    }
                    index = if next < index { 0 } else { next };
                    self.freshness.current(Part::Ledger);
                }
                Err(error) => {
                    index = 0;
                    self.freshness.broken(Part::Ledger, &error);
                    self.telemetry.watch_broken("ledger", &error);
                    pause.after(began).await;
                }
            }
        }
    }

    /// Waits for a change of the Variables, and reads those that changed.
    async fn read_ledger(&self, seen: &mut HashMap<String, u64>, index: u64) -> Result<u64, Error> {
        let listed = self.nomad.variables_after(&self.namespace, ledger::PREFIX, index, WAIT).await?;
        let changed: Vec<_> = listed
            .value
            .iter()
            .filter(|stub| seen.get(&stub.path).is_none_or(|&known| known < stub.modify_index))
            .map(|stub| stub.path.clone())
            .collect();
        let mut read = stream::iter(changed)
            .map(|path| async move { self.nomad.variable(&self.namespace, &path).await })
            .buffer_unordered(READS)
            .filter_map(|read| std::future::ready(read.transpose()))
            .try_collect::<Vec<_>>()
            .await?;
        // In the order they were written: a phase that failed revokes before it tells its outcome.
        read.sort_by_key(|variable| variable.modify_index);
        for variable in read {
            seen.insert(variable.path.clone(), variable.modify_index);
            take_variable(&self.store, &variable);
        }
        if seen.len() > listed.value.len() {
            let there: HashSet<_> = listed.value.iter().map(|stub| stub.path.as_str()).collect();
            seen.retain(|path, _| there.contains(path.as_str()));
        }
        Ok(listed.index)
    }
}

/// Takes a Variable of the ledger in. What cannot be read is told once and changes nothing.
pub(super) fn take_variable(store: &Store, variable: &Variable) {
    let Some((id, entry)) = ledger::parse_path(&variable.path) else { return };
    let index = variable.modify_index;
    let taken = match entry {
        Entry::Claim => Claim::from_items(&variable.items)
            .map(|claim| store.see(&id, |known| known.see_claim(index, claim))),
        Entry::Progress => Progress::from_items(&variable.items)
            .map(|progress| store.see(&id, |known| known.see_progress(index, progress))),
    };
    if let Err(why) = taken {
        tracing::warn!(variable = variable.path, why, "a Variable of the ledger cannot be understood");
    }
}

/// Waits longer after each failure, and short again after some quiet time.
struct Pause {
    next: Duration,
}

impl Pause {
    const LEAST: Duration = Duration::from_millis(100);
    const MOST: Duration = Duration::from_secs(5);

    fn new() -> Self {
        Self { next: Self::LEAST }
    }

    async fn after(&mut self, began: Instant) {
        if began.elapsed() > Self::MOST * 2 {
            self.next = Self::LEAST;
        }
        tokio::time::sleep(self.next).await;
        self.next = (self.next * 2).min(Self::MOST);
    }
}
