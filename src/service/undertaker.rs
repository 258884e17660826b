//! Ends what nobody else ends: jobs that were stopped or purged behind our back, runners that died, nodes that are
//! gone.
//!
//! Every replica does this. The ledger decides, so it does not matter which one is first, or how often it is tried.

use std::sync::Arc;
use std::time::Duration;

use chrono::Utc;

use super::store::Store;
use super::translate;
use crate::job::{Claim, Due, JobId, Phase};
use crate::ledger::{Ledger, LedgerError};
use crate::nomad::Client;

/// What is due by time alone is found by looking this often.
const TICK: Duration = Duration::from_secs(5);

pub(super) struct Undertaker {
    pub(super) nomad: Client,
    pub(super) namespace: String,
    pub(super) ledger: Ledger,
    pub(super) store: Arc<Store>,
}

/// Why something due could not be done.
#[derive(Debug, thiserror::Error)]
enum Undone {
    #[error("the job could not be ended")]
    Ledger(#[from] LedgerError),
    #[error("the job could not be ended")]
    Nomad(#[from] crate::nomad::Error),
}

impl Undertaker {
    /// Works for ever; ends only by being dropped.
    pub(super) async fn run(self) {
        loop {
            for (id, due) in self.store.due(Utc::now()) {
                if let Err(error) = self.perform(&id, due).await {
                    let error = crate::telemetry::chain(&error);
                    tracing::warn!(job = %id, error, "will be tried again");
                }
            }
            tokio::select! {
                () = tokio::time::sleep(TICK) => {}
                () = self.store.wait_for_due() => {}
            }
        }
    }

    async fn perform(&self, id: &JobId, due: Due) -> Result<(), Undone> {
        match due {
            Due::Revoke(verdict) => {
                let decision = self.ledger.decide(id, &Claim::revoked(verdict)).await?;
                self.store.see(id, |facts| facts.see_claim(decision.index, decision.claim));
            }
            Due::Conclude(outcome) => {
                let (index, progress) = self.ledger.record(id, Phase::Publish, &outcome).await?;
                self.store.see(id, |facts| facts.see_progress(index, progress));
            }
            Due::Stop => self.nomad.stop(&self.namespace, id.as_str(), false).await?,
            Due::Look => {
                let allocations = self.nomad.job_allocations(&self.namespace, id.as_str()).await?;
                for (_, facts) in allocations.iter().filter_map(translate::allocation) {
                    self.store.see(id, |known| known.see_allocation(facts));
                }
            }
        }
        Ok(())
    }
}
