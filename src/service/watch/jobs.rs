//! Jobs, allocations and evaluations.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use futures_util::{StreamExt as _, stream};

use super::{Highest, Pause, READS, State, Watcher, quiet};
use crate::job::{AllocationFacts, Facts, JobId, Record};
use crate::ledger::{self, Entry};
use crate::nomad::{Allocation, Error, Event, EventStream, Heard, Indexed, JobStub};
use crate::service::freshness::Part;
use crate::service::translate;
use crate::telemetry::chain;

/// How long the first list waits for the stream to begin.
const OPENED: Duration = Duration::from_secs(2);

/// How many times as long as a list took nothing is listed after the stream broke.
const REST: u32 = 3;

/// How many lines of the stream are kept while the first list is made.
const EARLY: usize = 2000;

/// Everything, as it was listed.
struct Lists {
    jobs: Indexed<Vec<JobStub>>,
    allocations: Indexed<Vec<Allocation>>,
    took: Duration,
}

impl Watcher {
    pub(super) async fn follow_jobs(&self) {
        let mut pause = Pause::new();
        let mut highest = Highest::default();
        loop {
            let (began, mut took) = (Instant::now(), Duration::ZERO);
            let Err(error) = self.list_and_listen(&mut highest, &mut took).await;
            highest.failed(&error);
            self.freshness.broken(Part::Jobs, &error);
            self.telemetry.all().watch_broken("jobs", &error);
            // All is listed again: a stream that breaks again and again must not keep Nomad busy with that.
            tokio::time::sleep(took * REST).await;
            pause.after(began).await;
        }
    }

    /// Listens, and lists from time to time, until something breaks.
    async fn list_and_listen(
        &self,
        highest: &mut Highest,
        took: &mut Duration,
    ) -> Result<std::convert::Infallible, Error> {
        // Before the list, and from the oldest event that Nomad still has: what happens meanwhile is heard twice rather
        // than missed. A stream that does not begin holds no list up, nor does one that cannot or that breaks.
        let mut events = self.nomad.events(&self.namespace, 0);
        let opened = tokio::time::timeout(OPENED, events.opened()).await;
        let (mut listed, early, broke) = match opened {
            Ok(Err(error)) => (self.list().await?, Vec::new(), Err(error)),
            Ok(Ok(())) | Err(_) => self.list_while_events_wait(&mut events).await?,
        };
        *took = listed.took;
        self.take_lists(&listed, highest).await?;
        for Heard { index, events } in early {
            for event in events {
                self.take(event, index, listed.jobs.index, highest);
            }
        }
        broke?;
        self.began.notify_one();
        loop {
            let until = tokio::time::sleep(quiet(listed.took));
            self.listen_during(&mut events, listed.jobs.index, highest, until).await?;
            let list = self.list();
            listed = self.listen_during(&mut events, listed.jobs.index, highest, list).await??;
            let corrected = self.take_lists(&listed, highest).await?;
            self.telemetry.all().corrected("jobs", corrected);
            *took = listed.took;
            self.began.notify_one();
        }
    }

    /// Lists, and reads what the stream says meanwhile, or until it breaks: Nomad drops who does not.
    async fn list_while_events_wait(
        &self,
        events: &mut EventStream,
    ) -> Result<(Lists, Vec<Heard>, Result<(), Error>), Error> {
        let (mut early, mut broke) = (Vec::new(), Ok(()));
        let list = self.list();
        tokio::pin!(list);
        loop {
            tokio::select! {
                listed = &mut list => return Ok((listed?, early, broke)),
                heard = events.next(), if broke.is_ok() && early.len() < EARLY => match heard {
                    Ok(heard) => early.push(heard),
                    Err(error) => broke = Err(error),
                },
            }
        }
    }

    async fn list(&self) -> Result<Lists, Error> {
        let began = Instant::now();
        let jobs = self.nomad.jobs(&self.namespace, JobId::PREFIX);
        let (jobs, allocations) = tokio::try_join!(jobs, self.nomad.allocations(&self.namespace))?;
        Ok(Lists { jobs, allocations, took: began.elapsed() })
    }

    /// Takes lists in; how many facts of them were news.
    async fn take_lists(&self, lists: &Lists, highest: &mut Highest) -> Result<u64, Error> {
        let Lists { jobs, allocations, took } = lists;
        let began = Instant::now();
        match highest.listed(jobs.index, began) {
            State::Newer => {}
            State::Doubtful => return Err(Error::older("listing the jobs", jobs.index, highest.index)),
            State::Restored => {
                tracing::warn!(
                    index = jobs.index,
                    "Nomad is in an older state than before, as after a restore"
                );
                self.store.begin_anew();
                // By another list: a job that was submitted here since this one was begun is not in it.
                return Err(Error::older("listing the jobs", jobs.index, highest.index));
            }
        }
        let mut news = 0;
        let mut listed: HashSet<JobId> = HashSet::new();
        let mut by_job: HashMap<JobId, Vec<AllocationFacts>> = HashMap::new();
        for (id, facts) in allocations.value.iter().filter_map(translate::allocation) {
            by_job.entry(id).or_default().push(facts);
        }
        for (id, facts) in jobs.value.iter().filter_map(translate::stub) {
            // All of a job at once: half of its allocations tell another tale.
            let its = by_job.remove(&id).unwrap_or_default();
            let see = |known: &mut Facts| {
                let news = known.see_listed_job(facts, jobs.index);
                known.see_listed_allocations(its, allocations.index) || news
            };
            news += u64::from(self.store.see(&id, see));
            listed.insert(id);
        }
        let absent: Vec<_> = self.store.ids().into_iter().filter(|id| !listed.contains(id)).collect();
        for id in &absent {
            // Absent, if the list is at least as new as what is known; a later registration is not undone.
            news += u64::from(self.store.see(id, |known| known.see_gone(jobs.index)));
        }
        self.forget(absent).await?;
        self.freshness.current(Part::Jobs);
        self.telemetry.all().listed("jobs", *took + began.elapsed());
        Ok(news)
    }

    /// Forgets which of the jobs that Nomad no longer has were cleaned up, here or by another replica: those that ended
    /// and of which the ledger has nothing.
    async fn forget(&self, mut absent: Vec<JobId>) -> Result<(), Error> {
        if absent.is_empty() {
            return Ok(());
        }
        let left = self.nomad.variables(&self.namespace, ledger::PREFIX).await?.value;
        let left: HashSet<_> = left.iter().filter_map(|stub| ledger::parse_path(&stub.path)).collect();
        let has = |id: &JobId, entry| left.contains(&(id.clone(), entry));
        absent.retain(|id| !has(id, Entry::Claim) && !has(id, Entry::Progress));
        self.store.remove_ended(&absent);
        Ok(())
    }

    /// Listens until `other` is done.
    async fn listen_during<T>(
        &self,
        events: &mut EventStream,
        listed: u64,
        highest: &mut Highest,
        other: impl Future<Output = T>,
    ) -> Result<T, Error> {
        tokio::pin!(other);
        loop {
            let Heard { index, events } = tokio::select! {
                done = &mut other => return Ok(done),
                heard = events.next() => heard?,
            };
            self.freshness.current(Part::Jobs);
            for event in events {
                self.take(event, index, listed, highest);
            }
        }
    }

    /// Takes in an event, of which the list of jobs at `listed` may know more.
    fn take(&self, event: Event, index: u64, listed: u64, highest: &mut Highest) {
        match event {
            // Of a job that was removed since, nobody would hear that it is gone.
            Event::Job(_) | Event::JobGone { .. } if index <= listed => {}
            Event::Job(job) => {
                highest.heard(index);
                match translate::job(&job) {
                    // The last word on a job that was cleaned up comes after it was forgotten.
                    Some((id, facts)) if facts.stopped => self.known(&id, |known| known.see_job(facts)),
                    Some((id, facts)) => {
                        self.store.see(&id, |known| known.see_job(facts));
                    }
                    None => {}
                }
            }
            Event::JobGone { id } => {
                highest.heard(index);
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
    fn known(&self, id: &JobId, see: impl FnOnce(&mut Facts) -> bool) {
        if self.store.record(id).is_some() {
            self.store.see(id, see);
        }
    }

    /// Asks, whenever jobs were listed, why some wait; beside the listening, as there may be many.
    pub(super) async fn explain_waiting(&self) {
        loop {
            self.began.notified().await;
            // Before that, jobs that have ended look as if they waited.
            self.freshness.completed().await;
            self.ask_why_they_wait().await;
        }
    }

    /// Jobs without an allocation: the evaluations that say why may be older than the stream.
    async fn ask_why_they_wait(&self) {
        let waits = |id: &JobId| {
            let waits =
                |r: &Record| !r.status.is_final() && r.nomad.allocation.is_none() && r.placement.is_none();
            self.store.record(id).is_some_and(|record| waits(&record))
        };
        let waiting: Vec<_> = self.store.ids().into_iter().filter(waits).collect();
        stream::iter(waiting)
            .for_each_concurrent(READS, async |id| {
                // A job that went meanwhile has no reason to wait.
                let evaluations = match self.nomad.job_evaluations(&self.namespace, id.as_str()).await {
                    Ok(evaluations) => evaluations,
                    // After the next list it is asked again.
                    Err(error) => {
                        tracing::debug!(job = %id, error = chain(&error), "why the job waits is not known");
                        return;
                    }
                };
                for evaluation in evaluations {
                    let placement = translate::placement(&evaluation);
                    self.store.see(&id, |known| known.see_placement(evaluation.modify_index, placement));
                }
            })
            .await;
    }
}
