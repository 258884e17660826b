//! The ledger: claims and progress.

use std::collections::{HashMap, HashSet};
use std::time::Instant;

use futures_util::{StreamExt as _, TryStreamExt as _, stream};

use super::{Highest, Pause, READS, State, WAIT, Watcher};
use crate::job::{JobId, Phase};
use crate::ledger::{self, Entry, LedgerError, Page};
use crate::nomad::{Error, Variable};
use crate::service::cleanup;
use crate::service::freshness::Part;
use crate::service::store::Decided;
use crate::telemetry::chain;

/// What was read of the ledger.
#[derive(Default)]
struct Seen {
    /// The Variables that were read, with their indexes.
    indexes: HashMap<String, u64>,
    /// The jobs whose claims went.
    lost: HashSet<JobId>,
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
                    self.telemetry.watch_broken("ledger", &error);
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

    /// Waits for a change of the Variables, and reads those that changed.
    async fn read_ledger(&self, seen: &mut Seen, index: u64) -> Result<u64, Error> {
        let listed = self.nomad.variables_after(&self.namespace, ledger::PREFIX, index, WAIT).await?;
        let changed: Vec<_> = listed
            .value
            .iter()
            // Locks and keys lie beside.
            .filter(|stub| ledger::parse_path(&stub.path).is_some())
            .filter(|stub| seen.indexes.get(&stub.path).is_none_or(|&known| known != stub.modify_index))
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
            seen.indexes.insert(variable.path.clone(), variable.modify_index);
            self.take_variable(&variable);
        }
        if seen.indexes.len()
            > listed.value.iter().filter(|stub| seen.indexes.contains_key(&stub.path)).count()
        {
            let there: HashSet<_> = listed.value.iter().map(|stub| stub.path.as_str()).collect();
            let gone: Vec<_> = seen.indexes.extract_if(|path, _| !there.contains(path.as_str())).collect();
            let claims = gone.iter().filter_map(|(path, _)| match ledger::parse_path(path)? {
                (id, Entry::Claim) => Some(id),
                (_, Entry::Progress) => None,
            });
            seen.lost.extend(claims);
        }
        Ok(listed.index)
    }

    /// Takes a Variable of the ledger in. What cannot be read is told once and changes nothing.
    fn take_variable(&self, variable: &Variable) {
        match Page::read(variable) {
            None => {}
            Some(Ok((id, page))) => {
                self.store.see(&id, |known| page.tell(&self.namespace, known));
            }
            Some(Err(why)) => {
                tracing::warn!(
                    variable = variable.path,
                    why,
                    "a Variable of the ledger cannot be understood"
                );
            }
        }
    }
}
