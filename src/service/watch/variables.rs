//! The ledger: claims and progress.

use std::collections::{HashMap, HashSet};
use std::time::Instant;

use futures_util::{StreamExt as _, TryStreamExt as _, stream};

use super::{Highest, Pause, READS, State, WAIT, Watcher};
use crate::job::{Claim, Phase, Progress};
use crate::ledger::{self, Entry};
use crate::nomad::{Error, Variable};
use crate::service::freshness::Part;
use crate::service::store::Store;
use crate::telemetry::chain;

impl Watcher {
    pub(super) async fn follow_ledger(&self) {
        let mut pause = Pause::new();
        let mut highest = Highest::default();
        let mut seen = HashMap::new();
        let mut index = 0;
        loop {
            let began = Instant::now();
            let read = self.read_ledger(&mut seen, index).await;
            match read.map(|index| (index, highest.listed(index, Instant::now()))) {
                Ok((next, State::Newer)) => {
                    index = next;
                    self.freshness.current(Part::Ledger);
                }
                Ok((next, State::Restored)) => {
                    index = next;
                    seen.clear();
                    self.write_again().await;
                }
                Ok((older, State::Doubtful)) => {
                    index = 0;
                    let error = Error::older("listing the ledger", older, highest.index);
                    self.freshness.broken(Part::Ledger, &error);
                    pause.after(began).await;
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

    /// Writes down what was decided before Nomad went back to an older state, so that it is not decided otherwise.
    async fn write_again(&self) {
        for (id, claim, published) in self.store.decided() {
            let claimed = self.ledger.decide(&id, &claim).await.map(drop);
            let written = match (claimed, &published) {
                (Ok(()), Some(outcome)) => self.ledger.record(&id, Phase::Publish, outcome).await.map(drop),
                (done, _) => done,
            };
            if let Err(error) = written {
                tracing::error!(job = %id, error = chain(&error), "what was decided could not be written again");
            }
        }
    }

    /// Waits for a change of the Variables, and reads those that changed.
    async fn read_ledger(&self, seen: &mut HashMap<String, u64>, index: u64) -> Result<u64, Error> {
        let listed = self.nomad.variables_after(&self.namespace, ledger::PREFIX, index, WAIT).await?;
        let changed: Vec<_> = listed
            .value
            .iter()
            // Locks and keys lie beside.
            .filter(|stub| ledger::parse_path(&stub.path).is_some())
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
fn take_variable(store: &Store, variable: &Variable) {
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
