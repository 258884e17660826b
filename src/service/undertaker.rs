//! Ends what nobody else ends: jobs that were stopped or purged behind our back, runners that died or hang, nodes that
//! are gone.
//!
//! Every replica does this. The ledger decides, so it does not matter which one is first, or how often it is tried.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use chrono::{TimeDelta, Utc};

use super::{Tenant, cleanup, translate};
use crate::job::{Claim, Due, JobId, Phase, Reason, Verdict};
use crate::ledger::LedgerError;
use crate::nomad::{Error, Kind};

/// What is due by time alone is found by looking this often.
const TICK: Duration = Duration::from_secs(5);

/// How long a publish that claimed may still tell how it ended, after Nomad has forgotten its job: it is given 25 s to end, and
/// `finish` brings its tags to what was claimed then.
const UNHEARD: Duration = Duration::from_mins(1);

/// How often Nomad is asked whether it still looks for another place for a job. That it has one is heard.
const ASK_AGAIN: Duration = Duration::from_secs(30);

pub(super) struct Undertaker<'a> {
    tenant: &'a Tenant,
    /// Since when Nomad was seen to have forgotten a job that has claimed and not ended.
    unheard: HashMap<JobId, Instant>,
    /// When Nomad was asked last whether it is done with a job that has lost its place.
    asked: HashMap<JobId, Instant>,
}

/// Why something due could not be done.
#[derive(Debug, thiserror::Error)]
enum Undone {
    #[error("the job could not be ended")]
    Ledger(#[from] LedgerError),
    #[error("the job could not be ended")]
    Nomad(#[from] Error),
}

impl<'a> Undertaker<'a> {
    pub(super) fn new(tenant: &'a Tenant) -> Self {
        Self { tenant, unheard: HashMap::new(), asked: HashMap::new() }
    }

    /// Works for ever; ends only by being dropped.
    pub(super) async fn run(mut self) {
        let store = &self.tenant.store;
        // Of half of what is to be known, jobs that ended long ago look as if nobody had ended them.
        self.tenant.freshness.completed().await;
        loop {
            let all = store.due(Utc::now());
            for known in [&mut self.unheard, &mut self.asked] {
                known.retain(|id, _| all.iter().any(|(due, _)| due == id));
            }
            for (id, due) in all {
                let has_time = match due {
                    Due::Conclude(_) => self.may_be_heard_of(&id),
                    Due::RevokeUnlessPlaced(_) => self.was_just_asked_for(&id),
                    _ => false,
                };
                if has_time || self.is_being_swept(&id) {
                    continue;
                }
                if let Err(error) = self.perform(&id, due).await {
                    let error = crate::telemetry::chain(&error);
                    tracing::warn!(job = %id, error, "will be tried again");
                }
            }
            tokio::select! {
                () = tokio::time::sleep(TICK) => {}
                () = store.wait_for_due() => {}
            }
        }
    }

    /// Whether half of a job's ledger may be gone, because it is as old as what is swept: what is left says nothing.
    fn is_being_swept(&self, id: &JobId) -> bool {
        let keep = TimeDelta::from_std(self.tenant.config.sweep.keep_ledger).unwrap_or(TimeDelta::MAX);
        let record = self.tenant.store.record(id).filter(|record| record.remembered);
        record.is_some_and(|record| Utc::now().signed_duration_since(record.labels.submitted_at) > keep)
    }

    /// Whether a job that Nomad has forgotten, with all its allocations, may still tell how its publish ended.
    fn may_be_heard_of(&mut self, id: &JobId) -> bool {
        self.tenant.store.is_gone(id)
            && self.unheard.entry(id.clone()).or_insert_with(Instant::now).elapsed() < UNHEARD
    }

    /// Whether Nomad was asked for a job a moment ago; if not, it is now.
    fn was_just_asked_for(&mut self, id: &JobId) -> bool {
        if self.asked.get(id).is_some_and(|at| at.elapsed() < ASK_AGAIN) {
            return true;
        }
        self.asked.insert(id.clone(), Instant::now());
        false
    }

    async fn perform(&self, id: &JobId, due: Due) -> Result<(), Undone> {
        let Tenant { nomad, namespace, ledger, store, .. } = self.tenant;
        let record = store.record(id);
        let labels = record.as_ref().map(|record| &record.labels);
        // Nomad forgets a job that is purged at once, while its tasks are still being stopped: they may tell how it ended.
        if record.as_ref().is_some_and(|record| record.remembered) {
            let allocations = nomad.job_allocations(namespace, id.as_str()).await?;
            if allocations.iter().any(translate::may_still_work) {
                return Ok(());
            }
        }
        match due {
            Due::Silent(_) => self.perform_silent(id).await?,
            Due::Revoke(Verdict { reason: Reason::NodeLost, .. }) => {
                // The allocation that takes the place of a lost one is made at the same moment, and heard of apart from it.
                self.look(id).await?;
                if let Some(Due::Revoke(verdict)) = store.due_of(id, Utc::now()) {
                    self.revoke(id, verdict).await?;
                }
            }
            Due::Revoke(verdict) => {
                self.revoke(id, verdict).await?;
            }
            Due::RevokeUnlessPlaced(_) => self.revoke_unless_placed(id).await?,
            // A cleanup was begun: what is left of the ledger says nothing, and whoever cleans up again needs none of it.
            Due::Conclude(_) if cleanup::sweep_of(nomad, namespace, id).await?.is_some() => {
                store.remove(id);
            }
            Due::Conclude(_) if ledger.claim(id).await?.is_none() => {}
            Due::Conclude(outcome) => {
                let (index, progress) = ledger.record(id, labels, Phase::Publish, &outcome).await?;
                store.see(id, |facts| facts.see_progress(index, progress));
            }
            Due::Stop => nomad.stop(namespace, id.as_str(), false).await?,
            Due::Look => self.look(id).await?,
        }
        Ok(())
    }

    /// Ends a job that has lost its place, unless Nomad has another one for it, or looks for one: where there is no room it waits,
    /// as every job does.
    async fn revoke_unless_placed(&self, id: &JobId) -> Result<(), Undone> {
        let Tenant { nomad, namespace, store, .. } = self.tenant;
        let job = match nomad.job(namespace, id.as_str()).await {
            // The next list tells that.
            Err(Error { kind: Kind::NotFound, .. }) => return Ok(()),
            job => job?,
        };
        self.look(id).await?;
        match store.due_of(id, Utc::now()) {
            Some(Due::RevokeUnlessPlaced(verdict)) if job.status == "dead" => {
                self.revoke(id, verdict).await.map(drop)
            }
            _ => Ok(()),
        }
    }

    /// Ends a job of which nothing new was heard for too long. What was not heard may have happened all the same, where it is
    /// this replica that hears nothing.
    async fn perform_silent(&self, id: &JobId) -> Result<(), Undone> {
        let Tenant { nomad, namespace, freshness, store, .. } = self.tenant;
        if freshness.doubt().is_some() || !self.ask(id).await? {
            return Ok(());
        }
        let Some(Due::Silent(due)) = store.due_of(id, Utc::now()) else { return Ok(()) };
        match *due {
            // It does not end by itself.
            Due::Revoke(verdict) => {
                if self.revoke(id, verdict).await? {
                    nomad.stop(namespace, id.as_str(), false).await?;
                }
                Ok(())
            }
            due => Box::pin(self.perform(id, due)).await,
        }
    }

    /// Asks Nomad for all that there is of a job; whether it has the job.
    async fn ask(&self, id: &JobId) -> Result<bool, Undone> {
        let Tenant { nomad, namespace, ledger, store, .. } = self.tenant;
        let job = match nomad.job(namespace, id.as_str()).await {
            // The next list tells that.
            Err(Error { kind: Kind::NotFound, .. }) => return Ok(false),
            job => job?,
        };
        let pages = ledger.pages(id).await?;
        self.look(id).await?;
        store.see(id, |known| {
            let of_job = translate::job(&job).is_some_and(|(_, facts)| known.see_job(facts));
            pages.into_iter().fold(of_job, |news, page| page.tell(namespace, known) || news)
        });
        Ok(true)
    }

    async fn look(&self, id: &JobId) -> Result<(), Undone> {
        let Tenant { nomad, namespace, store, .. } = self.tenant;
        let allocations = nomad.job_allocations(namespace, id.as_str()).await?;
        store.see(id, |known| {
            let facts = allocations.iter().filter_map(translate::allocation_in_full);
            facts.fold(false, |news, (_, facts)| known.see_allocation(facts) || news)
        });
        Ok(())
    }

    /// Revokes a job's right to publish; whether it is revoked then, by this or before.
    async fn revoke(&self, id: &JobId, verdict: Verdict) -> Result<bool, Undone> {
        let Tenant { nomad, namespace, ledger, store, .. } = self.tenant;
        // A job that was cleaned up while it was being listed has a verdict already, and no ledger to read it from.
        if matches!(verdict.reason, Reason::Stopped | Reason::NodeLost | Reason::Timeout)
            && cleanup::sweep_of(nomad, namespace, id).await?.is_some()
            && ledger.claim(id).await?.is_none()
        {
            store.remove(id);
            return Ok(false);
        }
        // Where no task ever ran, none removes what the job was given. First, as nobody comes back once it is revoked.
        let record = store.record(id);
        let never_ran = store.has_no_place(id);
        if never_ran {
            self.tenant.remove_credentials(id).await?;
        }
        let labels = record.as_ref().map(|record| &record.labels);
        let decision = ledger.decide(id, labels, &Claim::revoked(verdict)).await?;
        match &decision.claim {
            // A job that has claimed meanwhile still needs them.
            Claim::Claimed { .. } => {}
            Claim::Revoked { .. } if never_ran => {}
            Claim::Revoked { verdict, .. } if verdict.reason == Reason::NodeLost => {
                self.tenant.remove_credentials(id).await?;
            }
            Claim::Revoked { .. } => self.tenant.remove_credentials_of_phases(id).await?,
        }
        let revoked = matches!(decision.claim, Claim::Revoked { .. });
        store.see(id, |facts| facts.see_claim(decision.index, decision.claim));
        Ok(revoked)
    }
}
