//! The custodian: removes what ended jobs were given, where their `finish` could not.
//!
//! A `finish` removes it where it can. It cannot where a task has failed and Nomad has ACLs: Nomad (1.11) takes an allocation for
//! ended then, and refuses the identity of the tasks that still run. Nor does it where it knew of no end of the job.
//!
//! Invariant: nothing is removed that a task of the job may still need.

use std::collections::HashSet;
use std::time::Duration;

use chrono::Utc;
use tokio::sync::watch;

use super::Tenant;
use crate::job::JobId;
use crate::nomad::Error;
use crate::render;
use crate::telemetry::chain;

/// How often is looked which jobs have ended. Nomad is asked only where some have.
const EVERY: Duration = Duration::from_secs(2);

/// How long after an attempt that failed the next one is made.
const AGAIN: Duration = Duration::from_secs(30);

pub(super) struct Custodian<'a> {
    pub(super) tenant: &'a Tenant,
    pub(super) on_duty: watch::Receiver<bool>,
}

impl Custodian<'_> {
    /// Works while this replica is on duty; ends only by being dropped.
    pub(super) async fn run(mut self) {
        let mut done = HashSet::new();
        while self.on_duty.wait_for(|on| *on).await.is_ok() {
            let mut pause = EVERY;
            if self.tenant.freshness.is_complete()
                && let Err(error) = self.pass(&mut done).await
            {
                let error = chain(&error);
                tracing::warn!(error, "what ended jobs were given could not be removed; will be tried again");
                pause = AGAIN;
            }
            tokio::time::sleep(pause).await;
        }
    }

    /// Removes what the jobs were given that have ended since the pass before.
    async fn pass(&self, done: &mut HashSet<JobId>) -> Result<(), Error> {
        let Tenant { nomad, namespace, store, .. } = self.tenant;
        let ended = store.finished(Utc::now());
        done.retain(|id| ended.contains(id));
        if ended.is_subset(done) {
            return Ok(());
        }
        let left = nomad.variables(namespace, &format!("nomad/jobs/{}", JobId::PREFIX)).await?.value;
        for variable in left {
            let job = render::job_of_task_variable(&variable.path);
            if job.is_some_and(|job| ended.contains(&job)) {
                nomad.delete_variable(namespace, &variable.path).await?;
                tracing::debug!(variable = variable.path, "a copy of credentials is removed");
            }
        }
        *done = ended;
        Ok(())
    }
}
