//! Clean up: what a finished job left in Nomad and on its nodes.
//!
//! The nodes' part is done by a small Nomad job with a group pinned to each. That job stays in Nomad until it is collected,
//! which is how a repeated cleanup is known to be one, on any replica.

use std::collections::BTreeMap;
use std::time::Duration;

use super::archivist::Unkept;
use super::{FindError, Tenant, translate};
use crate::job::JobId;
use crate::ledger::LedgerError;
use crate::nomad::{Allocation, Client, Error, Job, Kind};
use crate::render;

/// How long a cleanup waits for the node.
const WAIT: Duration = Duration::from_secs(30);

/// How many are made at once; the others wait for their turn.
pub(super) const AT_ONCE: usize = 12;

/// Why a job was not cleaned up.
#[derive(Debug, thiserror::Error)]
pub enum CleanupError {
    /// No such job.
    #[error(transparent)]
    Find(#[from] FindError),
    /// It has not ended.
    #[error("job {0} has not ended: kill it first, or wait for its end")]
    Live(JobId),
    /// Its tasks have not ended.
    #[error("job {0} has ended, but its tasks still run: clean up again when they are done")]
    Running(JobId),
    /// The operator's to mend.
    #[error("the job that cleans up on nodes could not be rendered")]
    Render(#[from] render::RenderError),
    /// Nomad could not be asked.
    #[error("job {0} could not be cleaned up")]
    Nomad(JobId, #[source] Error),
    /// Its ledger could not be removed.
    #[error("job {0} could not be cleaned up")]
    Ledger(JobId, #[source] LedgerError),
    /// What is left of it was not archived.
    #[error(
        "job {0} is not cleaned up, as it could not be archived before; clean up again when the archive is well"
    )]
    Archive(JobId, #[source] Unkept),
    /// The node did not do its part.
    #[error("what job {0} left on node {1} could not be removed: {2}; clean up again when the node is well")]
    Node(JobId, String, String),
}

fn sweep_id(id: &JobId) -> String {
    format!("nomad-build-sweep-{id}")
}

/// The sweep of a job: there is one once its cleanup was begun, until Nomad collects it.
pub(super) async fn sweep_of(nomad: &Client, namespace: &str, id: &JobId) -> Result<Option<Job>, Error> {
    match nomad.job(namespace, &sweep_id(id)).await {
        Ok(sweep) => Ok(Some(sweep)),
        Err(Error { kind: Kind::NotFound, .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

impl Tenant {
    /// Removes the Nomad job, its Variables and what it left on its nodes. Again is harmless.
    pub async fn clean_up(&self, id: &JobId) -> Result<(), CleanupError> {
        let failed = |error| CleanupError::Nomad(id.clone(), error);
        // Each waits at Nomad, which takes only so many connections.
        let _turn = self.shared.cleanups.acquire().await;
        let earlier = sweep_of(&self.nomad, &self.namespace, id).await.map_err(failed)?;
        let record = match self.record(id).await {
            Ok(record) if !record.status.is_final() => return Err(CleanupError::Live(id.clone())),
            // Nomad has forgotten where it ran. Its ledger stays until it is swept: a node may come back with its tasks.
            Ok(_) if earlier.is_none() && self.is_forgotten(id).await.map_err(failed)? => {
                return self.remove_credentials(id).await.map_err(failed);
            }
            Ok(record) => Some(record),
            // A job that Nomad no longer has, but that a cleanup was begun for: that one is brought to its end.
            Err(FindError::Unknown(_)) if earlier.is_some() => None,
            Err(error) => return Err(error.into()),
        };
        let namespace = &self.namespace;
        self.nomad.stop(namespace, id.as_str(), false).await.map_err(failed)?;
        // First: no phase of an ended job needs them, and a node that is gone must not keep them.
        self.remove_credentials_of_phases(id).await.map_err(failed)?;
        let allocations = self.ended_allocations(id).await?;
        self.remove_credentials(id).await.map_err(failed)?;
        self.sweep(id, earlier, &allocations).await?;
        // Nobody could do it later.
        if let (Some(archive), Some(record)) = (&self.archive, &record) {
            self.archive_job(archive, record)
                .await
                .map_err(|error| CleanupError::Archive(id.clone(), error))?;
        }
        // Only behind the sweep. A node that was lost may come back with the job's tasks, and it is the claim that keeps
        // these from publishing: it stays until each node has answered.
        self.ledger.remove(id).await.map_err(|error| CleanupError::Ledger(id.clone(), error))?;
        self.nomad.stop(namespace, id.as_str(), true).await.map_err(failed)?;
        self.store.remove(id);
        tracing::info!(job = %id, "job cleaned up");
        Ok(())
    }

    /// Whether nobody can say where a job ran.
    async fn is_forgotten(&self, id: &JobId) -> Result<bool, Error> {
        if self.store.record(id).is_none_or(|known| known.remembered) {
            return Ok(true);
        }
        // Those that are still listed say it. Nomad (1.11) forgets them with a job that is purged.
        Ok(self.store.is_gone(id)
            && self.nomad.job_allocations(&self.namespace, id.as_str()).await?.is_empty())
    }

    /// Waits until every task of the job has ended, so that none of them leaves anything behind the removal.
    async fn ended_allocations(&self, id: &JobId) -> Result<Vec<Allocation>, CleanupError> {
        let deadline = tokio::time::Instant::now() + WAIT;
        let (mut index, mut away) = (0, None);
        loop {
            let listed = self.nomad.job_allocations_after(&self.namespace, id.as_str(), index, WAIT);
            let listed = match tokio::time::timeout_at(deadline, listed).await {
                Ok(listed) => listed.map_err(|error| CleanupError::Nomad(id.clone(), error))?,
                Err(_) => return Err(away.unwrap_or_else(|| CleanupError::Running(id.clone()))),
            };
            let Some(open) = listed.value.iter().find(|each| translate::may_still_work(each)) else {
                return Ok(listed.value);
            };
            let is_away = open.client_status == "unknown";
            away = is_away
                .then(|| CleanupError::Node(id.clone(), open.node_name.clone(), "it is away".to_owned()));
            index = listed.index.max(1);
        }
    }

    /// Has each node that the job ran on remove what carries the job's label, and waits for it.
    async fn sweep(
        &self,
        id: &JobId,
        earlier: Option<Job>,
        allocations: &[Allocation],
    ) -> Result<(), CleanupError> {
        let failed = |error| CleanupError::Nomad(id.clone(), error);
        let namespace = &self.namespace;
        let sweep = sweep_id(id);
        let mut nodes = BTreeMap::new();
        let mut since = None;
        nodes.extend(allocations.iter().map(|each| (each.node_id.as_str(), each.node_name.as_str())));
        if let Some(earlier) = &earlier {
            let all = self.nomad.job_allocations(namespace, &sweep).await.map_err(failed)?;
            let named: Vec<_> = render::swept_nodes(&earlier.meta).collect();
            if swept(earlier.create_index, named.len(), &all) == Some(true) {
                return Ok(());
            }
            let is_for_all = nodes.keys().all(|node| named.contains(node));
            // One that still runs, as on a busy engine, is waited for.
            since = Some(earlier.create_index).filter(|since| is_for_all && runs(*since, &all));
            // Nomad may have forgotten the job's own allocations.
            for node in named {
                nodes.entry(node).or_insert(node);
            }
        }
        let since = match since {
            Some(since) => since,
            None => self.begin_sweep(id, &sweep, &nodes.keys().copied().collect::<Vec<_>>()).await?,
        };
        let names: Vec<_> = nodes.values().copied().collect();
        let undone = |why: &str| CleanupError::Node(id.clone(), names.join(", "), why.to_owned());
        match tokio::time::timeout(WAIT, self.wait_for_sweep(&sweep, since, nodes.len())).await {
            Ok(Ok(true)) => Ok(()),
            Ok(Ok(false)) => Err(undone("the sweep failed there")),
            Ok(Err(error)) => Err(failed(error)),
            Err(_) => {
                let stands = self.stands(&sweep, since).await.map_err(failed)?;
                Err(undone(&format!(
                    "the sweep did not end there within {} seconds: {stands}",
                    WAIT.as_secs()
                )))
            }
        }
    }

    /// Begins a sweep of some nodes, in place of one that failed or was never placed; the index of its registration.
    async fn begin_sweep(&self, id: &JobId, sweep: &str, nodes: &[&str]) -> Result<u64, CleanupError> {
        let failed = |error| CleanupError::Nomad(id.clone(), error);
        let namespace = &self.namespace;
        let job = render::render_sweep(id, sweep, namespace, nodes, &self.config.render)?;
        self.nomad.stop(namespace, sweep, true).await.map_err(failed)?;
        match self.nomad.register(namespace, sweep, &job).await {
            Ok(registration) => Ok(registration.job_modify_index),
            // Another caller cleans up too; either's sweep will do.
            Err(Error { kind: Kind::Conflict, .. }) => {
                Ok(self.nomad.job(namespace, sweep).await.map_err(failed)?.create_index)
            }
            Err(error) => Err(failed(error)),
        }
    }

    /// How far a sweep got that has not ended, in words.
    async fn stands(&self, sweep: &str, since: u64) -> Result<String, Error> {
        let namespace = &self.namespace;
        let all = self.nomad.job_allocations(namespace, sweep).await?;
        if let Some(ours) = all.iter().find(|each| counts(since, each)) {
            return Ok(format!("its task is {}", ours.client_status));
        }
        let evaluations = self.nomad.job_evaluations(namespace, sweep).await?;
        let why = evaluations.iter().max_by_key(|each| each.modify_index).and_then(translate::placement);
        Ok(why.unwrap_or_else(|| "Nomad has not placed it yet".to_owned()))
    }

    /// Waits for the end of a sweep; whether it succeeded.
    async fn wait_for_sweep(&self, sweep: &str, since: u64, nodes: usize) -> Result<bool, Error> {
        let mut index = 0;
        loop {
            let listed = self.nomad.job_allocations_after(&self.namespace, sweep, index, WAIT).await?;
            if let Some(ended) = swept(since, nodes, &listed.value) {
                return Ok(ended);
            }
            index = listed.index.max(1);
        }
    }
}

/// How a sweep that was registered at an index ended on its nodes; none while it has not.
///
/// Nomad goes on listing the allocations of sweeps that were replaced. Those made before do not count, nor do those that
/// were stopped: they may call themselves complete.
fn swept(since: u64, nodes: usize, allocations: &[Allocation]) -> Option<bool> {
    let ours = allocations.iter().filter(|each| counts(since, each));
    let ours: Vec<_> = ours.map(|each| each.client_status.as_str()).collect();
    if ours.iter().any(|status| matches!(*status, "failed" | "lost")) {
        return Some(false);
    }
    (ours.iter().filter(|status| **status == "complete").count() >= nodes).then_some(true)
}

/// Whether a sweep that was registered at an index is at work.
fn runs(since: u64, allocations: &[Allocation]) -> bool {
    let mut ours =
        allocations.iter().filter(|each| counts(since, each)).map(|each| each.client_status.as_str());
    let (ended, live) = (["failed", "lost"], ["pending", "running"]);
    !ours.clone().any(|status| ended.contains(&status)) && ours.any(|status| live.contains(&status))
}

fn counts(since: u64, allocation: &Allocation) -> bool {
    allocation.create_index > since && allocation.desired_status == "run"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sweep_is_judged_by_its_own_allocations_on_every_node() {
        let allocation = |create_index, client: &str, desired: &str| Allocation {
            create_index,
            client_status: client.to_owned(),
            desired_status: desired.to_owned(),
            ..Allocation::default()
        };
        for (nodes, allocations, want) in [
            (0, &[][..], Some(true)),
            (1, &[], None),
            (1, &[allocation(11, "running", "run")], None),
            (1, &[allocation(11, "complete", "run")], Some(true)),
            (1, &[allocation(11, "failed", "run")], Some(false)),
            // Of sweeps that were replaced.
            (1, &[allocation(9, "failed", "stop"), allocation(11, "complete", "run")], Some(true)),
            (1, &[allocation(9, "failed", "run")], None),
            (1, &[allocation(9, "complete", "run")], None),
            (1, &[allocation(11, "complete", "stop")], None),
            (2, &[allocation(11, "complete", "run"), allocation(12, "running", "run")], None),
            (2, &[allocation(11, "complete", "run"), allocation(12, "complete", "run")], Some(true)),
            (2, &[allocation(11, "complete", "run"), allocation(12, "failed", "run")], Some(false)),
        ] {
            assert_eq!(swept(10, nodes, allocations), want, "{nodes} {allocations:?}");
            let is_live = allocations.iter().any(|each| each.client_status == "running");
            assert_eq!(runs(10, allocations), is_live && want.is_none(), "{nodes} {allocations:?}");
        }
    }
}
