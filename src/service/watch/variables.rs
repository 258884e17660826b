//! The ledger: claims and progress.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::Instant;

use chrono::{TimeDelta, Utc};
use futures_util::future::join_all;
use futures_util::{StreamExt as _, stream};

use super::{Highest, Pause, READS, State, WAIT, Watcher, quiet};
use crate::job::{JobId, Phase};
use crate::ledger::{self, Entry, LedgerError, Page};
use crate::nomad::{Error, Indexed, Variable, VariableStub};
use crate::service::cleanup;
use crate::service::freshness::Part;
use crate::service::store::Decided;
use crate::telemetry::chain;

/// How long ago a job was made or ended whose ledger is written to no more. A phase that was killed still says how it ended.
const SETTLED: TimeDelta = TimeDelta::minutes(10);

/// How often a Variable is tried to be read, before the others are believed without it.
const TRIES: u32 = 5;

/// What was read of the ledger.
#[derive(Default)]
struct Seen {
    /// The Variables that were read, with their indexes.
    indexes: BTreeMap<String, u64>,
    /// The jobs whose claims went, and those of which there should be one.
    lost: HashSet<JobId>,
    /// Those that Nomad did not give, though it lists them: how often it was tried.
    unread: HashMap<(String, u64), u32>,
    /// Until when it is not listed as a whole.
    settled: Option<Instant>,
}

impl Seen {
    /// Takes in that a Variable was not read. One that Nomad never gives must not keep all others from being heard of: after
    /// some attempts that is no error, but said.
    fn could_not_read(&mut self, stub: VariableStub, error: Error) -> Result<(), Error> {
        let path = stub.path.clone();
        let tried = self.unread.entry((stub.path, stub.modify_index)).or_default();
        *tried = tried.saturating_add(1);
        if *tried < TRIES {
            return Err(error);
        }
        if *tried == TRIES {
            let error = chain(&error);
            tracing::error!(
                variable = path,
                error,
                "Nomad lists this Variable and does not give it: what it says is not known"
            );
        }
        Ok(())
    }

    /// Takes in a list of one entry's Variables, from a job's on: those that have changed since they were read. What is gone
    /// is forgotten.
    fn take(&mut self, entry: Entry, first: Option<&JobId>, listed: Vec<VariableStub>) -> Vec<VariableStub> {
        // Something else may lie beside.
        let ours = listed.into_iter().filter(|stub| ledger::parse_path(&stub.path).is_some());
        let mut there: HashMap<_, _> = ours.map(|stub| (stub.path.clone(), stub)).collect();
        let begin = first.map_or_else(|| entry.prefix().to_owned(), |job| entry.path(job));
        let known = self.indexes.range(begin..).map(|(path, _)| path);
        let known = known.take_while(|path| path.starts_with(entry.prefix()));
        let gone: Vec<_> = known.filter(|path| !there.contains_key(*path)).cloned().collect();
        for path in gone {
            self.indexes.remove(&path);
            if let Some((job, Entry::Claim)) = ledger::parse_path(&path) {
                self.lost.insert(job);
            }
        }
        there.retain(|path, stub| self.indexes.get(path) != Some(&stub.modify_index));
        there.into_values().collect()
    }
}

impl Watcher {
    pub(super) async fn follow_ledger(&self) {
        let mut pause = Pause::new();
        let mut highest = Highest::default();
        let mut seen = Seen::default();
        let mut index = 0;
        loop {
            let began = Instant::now();
            let read = self.read_ledger(&mut seen, index).await;
            match read.map(|index| (index, highest.listed(index, Instant::now()))) {
                Ok((next, state @ (State::Newer | State::Restored))) => {
                    index = next;
                    if state == State::Restored {
                        seen.indexes.clear();
                        index = 0;
                    }
                    self.freshness.current(Part::Ledger);
                }
                Ok((older, State::Doubtful)) => {
                    index = 0;
                    let error = Error::older("listing the ledger", older, highest.index);
                    self.freshness.broken(Part::Ledger, &error);
                    pause.after(began).await;
                }
                Err(error) => {
                    index = 0;
                    highest.failed(&error);
                    self.freshness.broken(Part::Ledger, &error);
                    self.telemetry.all().watch_broken("ledger", &error);
                    pause.after(began).await;
                }
            }
            self.write_again(&mut seen.lost).await;
        }
    }

    /// Writes down what was decided, where its Variable went though its job did not and nobody cleans it up: Nomad was
    /// restored to an older state, in which the job would be decided again.
    async fn write_again(&self, lost: &mut HashSet<JobId>) {
        let decided: Vec<_> = lost.drain().filter_map(|id| self.store.decided(&id)).collect();
        let written = stream::iter(decided).map(async |decided| {
            let written = self.write_decision(&decided).await;
            (decided.job, written)
        });
        let mut written = std::pin::pin!(written.buffer_unordered(READS));
        while let Some((id, written)) = written.next().await {
            if let Err(error) = written {
                let error = chain(&error);
                tracing::warn!(job = %id, error, "what was decided is not written again yet; will be tried again");
                lost.insert(id);
            }
        }
    }

    async fn write_decision(&self, decided: &Decided) -> Result<(), LedgerError> {
        let Decided { job: id, labels, claim, published } = decided;
        let labels = Some(labels);
        let unread = |error| LedgerError::Nomad(id.clone(), error);
        if cleanup::sweep_of(&self.nomad, &self.namespace, id).await.map_err(unread)?.is_some() {
            return Ok(());
        }
        let decision = self.ledger.decide(id, labels, claim).await?;
        if !decision.ours {
            tracing::error!(job = %id, "a restored Nomad decided this job otherwise than it was told before");
            return Ok(());
        }
        if let Some(outcome) = published {
            self.ledger.record(id, labels, Phase::Publish, outcome).await?;
        }
        Ok(())
    }

    /// Waits for a change of the Variables, and reads those that changed; the index then.
    ///
    /// Nomad tells of a change and not of what changed, and ledgers stay for weeks. So all of them are listed only from time
    /// to time, and in between those of jobs that may still be written to.
    async fn read_ledger(&self, seen: &mut Seen, index: u64) -> Result<u64, Error> {
        let is_due = |seen: &Seen| seen.settled.is_none_or(|until| until <= Instant::now());
        if index > 0 {
            let changed = self.nomad.variables_changed(&self.namespace, ledger::PREFIX, index, WAIT).await?;
            if changed == index && !is_due(seen) {
                return Ok(index);
            }
        }
        let (is_whole, began) = (index == 0 || is_due(seen), Instant::now());
        let first = (!is_whole).then(|| self.store.first_open(Utc::now() - SETTLED));
        // Progress first: a phase that failed revokes before it tells so, and is not to be heard of without its claim.
        let progress = self.list_ledger(Entry::Progress, first.as_ref()).await?;
        let claims = self.list_ledger(Entry::Claim, first.as_ref()).await?;
        if is_whole {
            seen.unread.retain(|(path, index), _| seen.indexes.get(path).is_none_or(|read| read < index));
            seen.settled = Some(Instant::now() + quiet(began.elapsed()));
        }
        let mut changed = seen.take(Entry::Claim, first.as_ref(), claims.value);
        changed.extend(seen.take(Entry::Progress, first.as_ref(), progress.value));
        self.read_variables(seen, changed).await?;
        if is_whole {
            // Whenever its claim went: of a restored Nomad the ledger may be heard of before its jobs.
            let is_missing = |id: &JobId| !seen.indexes.contains_key(&Entry::Claim.path(id));
            seen.lost.extend(self.store.decided_jobs().into_iter().filter(is_missing));
            self.telemetry.all().listed("ledger", began.elapsed());
        }
        Ok(claims.index.min(progress.index))
    }

    async fn list_ledger(
        &self,
        entry: Entry,
        first: Option<&JobId>,
    ) -> Result<Indexed<Vec<VariableStub>>, Error> {
        match first {
            Some(job) => self.nomad.variables_from(&self.namespace, entry.prefix(), &entry.path(job)).await,
            None => self.nomad.variables(&self.namespace, entry.prefix()).await,
        }
    }

    /// Reads Variables, and takes them in job by job, in the order they were written.
    async fn read_variables(&self, seen: &mut Seen, changed: Vec<VariableStub>) -> Result<(), Error> {
        let read = stream::iter(by_job(changed)).map(|(job, stubs)| async move {
            let read = stubs.into_iter().map(async |stub| {
                let variable = self.nomad.variable(&self.namespace, &stub.path).await;
                (stub, variable)
            });
            (job, join_all(read).await)
        });
        let mut read = std::pin::pin!(read.buffered(READS));
        let mut done = Ok(());
        while let Some((job, variables)) = read.next().await {
            done = done.and(self.take_variables(seen, &job, variables));
        }
        done
    }

    /// Takes in what was read of a job, all of it or nothing.
    fn take_variables(
        &self,
        seen: &mut Seen,
        job: &JobId,
        read: Vec<(VariableStub, Result<Option<Variable>, Error>)>,
    ) -> Result<(), Error> {
        let (mut variables, mut done) = (Vec::new(), Ok(()));
        for (stub, variable) in read {
            match variable {
                // None where it was removed since it was listed.
                Ok(variable) => variables.extend(variable),
                Err(error) => done = done.and(seen.could_not_read(stub, error)),
            }
        }
        done?;
        let pages: Vec<_> = variables.iter().filter_map(understood).collect();
        seen.indexes.extend(variables.into_iter().map(|variable| (variable.path, variable.modify_index)));
        // Of a job of which nothing is understood nothing is remembered.
        if pages.is_empty() {
            return Ok(());
        }
        self.store.see(job, |known| {
            // Each of them, whether one before was news or not.
            let news: Vec<_> = pages.into_iter().map(|page| page.tell(&self.namespace, known)).collect();
            news.contains(&true)
        });
        Ok(())
    }
}

/// What of each job is to be read: what changed, and of one that was decided its progress too. That was listed before, so its last
/// phase may have begun since; and a job is not to be heard to have ended in a phase that never began.
fn by_job(mut changed: Vec<VariableStub>) -> Vec<(JobId, Vec<VariableStub>)> {
    changed.sort_unstable_by_key(|stub| stub.modify_index);
    let mut jobs: Vec<(JobId, Vec<VariableStub>)> = Vec::new();
    let mut places = HashMap::new();
    for stub in changed {
        let Some((job, _)) = ledger::parse_path(&stub.path) else { continue };
        let place = *places.entry(job.clone()).or_insert_with(|| {
            jobs.push((job, Vec::new()));
            jobs.len() - 1
        });
        jobs[place].1.push(stub);
    }
    for (job, stubs) in &mut jobs {
        let path = Entry::Progress.path(job);
        if stubs.iter().all(|stub| stub.path != path) {
            stubs.push(VariableStub { path, ..stubs[0].clone() });
        }
    }
    jobs
}

/// What a Variable of the ledger says. One that cannot be understood is told of, and changes nothing.
fn understood(variable: &Variable) -> Option<Page> {
    match Page::read(variable)? {
        Ok((_, page)) => Some(page),
        Err(why) => {
            tracing::warn!(variable = variable.path, why, "a Variable of the ledger cannot be understood");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    #[test]
    fn a_job_that_was_decided_is_read_with_its_progress_and_once() {
        let id = |number| JobId::from_uuid(Uuid::from_u128(number));
        let stub = |entry: Entry, number, modify_index| VariableStub {
            path: entry.path(&id(number)),
            modify_index,
            ..VariableStub::default()
        };
        let changed = vec![
            stub(Entry::Claim, 2, 9),
            stub(Entry::Claim, 1, 7),
            stub(Entry::Progress, 3, 5),
            stub(Entry::Progress, 1, 8),
        ];
        let read = by_job(changed).into_iter().map(|(job, stubs)| {
            (job, stubs.into_iter().map(|stub| (stub.path, stub.modify_index)).collect::<Vec<_>>())
        });
        let of = |number, entries: &[(Entry, u64)]| {
            let paths = entries.iter().map(|(entry, index)| (entry.path(&id(number)), *index)).collect();
            (id(number), paths)
        };
        let want = [
            of(3, &[(Entry::Progress, 5)]),
            of(1, &[(Entry::Claim, 7), (Entry::Progress, 8)]),
            of(2, &[(Entry::Claim, 9), (Entry::Progress, 9)]),
        ];
        assert_eq!(read.collect::<Vec<_>>(), want);
    }

    #[test]
    fn a_list_from_a_job_on_says_nothing_of_those_before_it() {
        let id = |number| JobId::from_uuid(Uuid::from_u128(number));
        let stubs = |numbers: &[(u128, u64)]| -> Vec<_> {
            let stub = |&(number, modify_index): &(u128, u64)| VariableStub {
                path: Entry::Claim.path(&id(number)),
                modify_index,
                ..VariableStub::default()
            };
            numbers.iter().map(stub).collect()
        };
        let other = VariableStub { path: "nomad-build/claims/other".to_owned(), ..VariableStub::default() };
        let all = [stubs(&[(1, 5), (2, 6), (3, 7)]), vec![other]].concat();
        let mut seen = Seen::default();
        assert_eq!(seen.take(Entry::Claim, None, all.clone()).len(), 3);
        for stub in &all[..3] {
            seen.indexes.insert(stub.path.clone(), stub.modify_index);
        }
        seen.indexes.insert(Entry::Progress.path(&id(9)), 8);
        assert!(seen.take(Entry::Claim, None, all).is_empty());
        let later = stubs(&[(3, 9)]);
        assert_eq!(seen.take(Entry::Claim, Some(&id(2)), later.clone())[0].path, later[0].path);
        assert_eq!(seen.lost, HashSet::from([id(2)]));
        assert_eq!(seen.take(Entry::Claim, None, later).len(), 1);
        assert_eq!(seen.lost, HashSet::from([id(1), id(2)]));
        assert_eq!(seen.indexes.len(), 2, "the other entry's stay");
    }
}
