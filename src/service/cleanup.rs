//! Clean up: what a finished job left in Nomad and on its node.
//!
//! The node's part is done by a small Nomad job pinned to it. That job stays in Nomad until it is collected, which is
//! how a repeated cleanup is known to be one, on any replica.

use std::time::Duration;

use super::{FindError, Service};
use crate::job::JobId;
use crate::ledger::LedgerError;
use crate::nomad::{Allocation, Error, Kind};
use crate::render;

/// How long a cleanup waits for the node.
const WAIT: Duration = Duration::from_secs(30);

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
    /// Nomad could not be asked.
    #[error("job {0} could not be cleaned up")]
    Nomad(JobId, #[source] Error),
    /// Its ledger could not be removed.
    #[error("job {0} could not be cleaned up")]
    Ledger(JobId, #[source] LedgerError),
    /// The node did not do its part.
    #[error("what job {0} left on node {1} could not be removed: {2}; clean up again when the node is well")]
    Node(JobId, String, String),
}

fn sweep_id(id: &JobId) -> String {
    format!("nomad-build-sweep-{id}")
}

impl Service {
    /// Removes the Nomad job, its Variables and what it left on its node. Again is harmless.
    pub async fn clean_up(&self, id: &JobId) -> Result<(), CleanupError> {
        let record = match self.record(id).await {
            Ok(record) => record,
            Err(FindError::Unknown(_)) if self.was_cleaned_up(id).await? => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        if !record.status.is_final() {
            return Err(CleanupError::Live(id.clone()));
        }
        let failed = |error| CleanupError::Nomad(id.clone(), error);
        let namespace = &self.config.namespace;
        ignore_missing(self.nomad.stop(namespace, id.as_str(), false).await).map_err(failed)?;
        let allocations = self.ended_allocations(id).await?;
        self.sweep(id, &allocations).await?;
        self.remove_credentials(id).await.map_err(failed)?;
        self.ledger.remove(id).await.map_err(|error| CleanupError::Ledger(id.clone(), error))?;
        ignore_missing(self.nomad.stop(namespace, id.as_str(), true).await).map_err(failed)?;
        self.store.remove(id);
        tracing::info!(job = %id, "job cleaned up");
        Ok(())
    }

    /// Waits until every task of the job has ended, so that none of them leaves anything behind the removal.
    async fn ended_allocations(&self, id: &JobId) -> Result<Vec<Allocation>, CleanupError> {
        let deadline = tokio::time::Instant::now() + WAIT;
        let mut index = 1;
        loop {
            let listed = self.nomad.job_allocations_after(&self.config.namespace, id.as_str(), index, WAIT);
            let listed = match tokio::time::timeout_at(deadline, listed).await {
                Ok(listed) => listed.map_err(|error| CleanupError::Nomad(id.clone(), error))?,
                Err(_) => return Err(CleanupError::Running(id.clone())),
            };
            let running = |allocation: &Allocation| {
                let tasks = &allocation.task_states;
                !matches!(allocation.client_status.as_str(), "complete" | "failed" | "lost")
                    || (allocation.client_status != "lost"
                        && tasks.values().any(|task| task.state == "running"))
            };
            if !listed.value.iter().any(running) {
                return Ok(listed.value);
            }
            index = listed.index.max(1);
        }
    }

    async fn was_cleaned_up(&self, id: &JobId) -> Result<bool, CleanupError> {
        match self.nomad.job(&self.config.namespace, &sweep_id(id)).await {
            Ok(_) => Ok(true),
            Err(Error { kind: Kind::NotFound, .. }) => Ok(false),
            Err(error) => Err(CleanupError::Nomad(id.clone(), error)),
        }
    }

    /// Has each node that the job ran on remove what carries the job's label, and waits for it.
    async fn sweep(&self, id: &JobId, allocations: &[Allocation]) -> Result<(), CleanupError> {
        let failed = |error| CleanupError::Nomad(id.clone(), error);
        let namespace = &self.config.namespace;
        let sweep = sweep_id(id);
        // A sweep that failed before is replaced.
        ignore_missing(self.nomad.stop(namespace, &sweep, true).await).map_err(failed)?;
        let last = allocations.iter().max_by_key(|allocation| allocation.create_index);
        let node = last.map(|allocation| allocation.node_id.as_str());
        let job = render::render_sweep(id, &sweep, namespace, node, &self.config.render);
        match self.nomad.register(namespace, &sweep, &job).await {
            Ok(_) | Err(Error { kind: Kind::Conflict, .. }) => {}
            Err(error) => return Err(failed(error)),
        }
        let Some(last) = last else { return Ok(()) };
        let gone = |why: &str| CleanupError::Node(id.clone(), last.node_name.clone(), why.to_owned());
        match tokio::time::timeout(WAIT, self.swept(&sweep)).await {
            Ok(Ok(true)) => Ok(()),
            Ok(Ok(false)) => Err(gone("the sweep failed there")),
            Ok(Err(error)) => Err(failed(error)),
            Err(_) => Err(gone("the sweep did not end there within 30 seconds")),
        }
    }

    /// Waits for the end of a sweep; whether it succeeded.
    async fn swept(&self, sweep: &str) -> Result<bool, Error> {
        let mut index = 1;
        loop {
            let listed = self.nomad.job_allocations_after(&self.config.namespace, sweep, index, WAIT).await?;
            match listed.value.iter().map(|allocation| allocation.client_status.as_str()).next() {
                Some("complete") => return Ok(true),
                Some("failed" | "lost") => return Ok(false),
                _ => index = listed.index.max(1),
            }
        }
    }
}

fn ignore_missing(done: Result<(), Error>) -> Result<(), Error> {
    match done {
        Err(Error { kind: Kind::NotFound, .. }) => Ok(()),
        done => done,
    }
}
