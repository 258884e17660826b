//! Kill: revoke the right to publish, then stop the Nomad job.

use chrono::Utc;

use super::{FindError, PATIENCE, Tenant, cleanup};
use crate::job::{Claim, JobId, Reason, Record, Status, Verdict};
use crate::ledger::LedgerError;
use crate::nomad::{Error, patiently};

/// Why a job was not killed, or not wholly.
#[derive(Debug, thiserror::Error)]
pub enum KillError {
    /// No such job, or it could not be looked up.
    #[error(transparent)]
    Find(#[from] FindError),
    /// Its right to publish could not be revoked.
    #[error(
        "job {0} may not be killed: that its right to publish is revoked was not confirmed; kill it again"
    )]
    Undecided(JobId, #[source] LedgerError),
    /// It is killed, but Nomad still runs it.
    #[error(
        "job {0} is killed and will publish nothing, but its tasks could not be stopped; kill it again to stop them"
    )]
    Running(JobId, #[source] Error),
    /// It is killed and stopped.
    #[error(
        "job {0} is killed and will publish nothing, but its copies of credentials could not be removed; kill it \
         again to remove them"
    )]
    Credentials(JobId, #[source] Error),
}

/// What became of a kill.
#[derive(Debug, PartialEq, Eq)]
pub enum Killed {
    /// The job is killed, now or by an earlier call.
    Yes,
    /// It is not, for this reason.
    No(String),
}

impl Tenant {
    /// Kills a job that has not claimed the right to publish. Again is harmless.
    pub async fn kill(&self, id: &JobId) -> Result<Killed, KillError> {
        let record = self.record(id).await?;
        if record.status.is_final() && record.status != Status::Killed {
            return Ok(Killed::No(format!("the job has ended: {}", record.status)));
        }
        if record.status.is_final() && self.store.record(id).is_none() {
            // Known from the archive only: there is nothing left to stop.
            return Ok(Killed::Yes);
        }
        // What is decided is not decided again: where a cleanup removed the claim, nobody would remove the next one.
        let killed =
            if record.status.is_final() { Killed::Yes } else { self.revoke_by_caller(id, &record).await? };
        if killed == Killed::Yes {
            self.stop(id).await.map_err(|error| KillError::Running(id.clone(), error))?;
            // Where no task ever ran, none removes what the job was given.
            let removed = if self.store.has_no_place(id) {
                self.remove_credentials(id).await
            } else {
                self.remove_credentials_of_phases(id).await
            };
            removed.map_err(|error| KillError::Credentials(id.clone(), error))?;
        }
        Ok(killed)
    }

    async fn revoke_by_caller(&self, id: &JobId, record: &Record) -> Result<Killed, KillError> {
        let unknown = |error| KillError::Undecided(id.clone(), LedgerError::Nomad(id.clone(), error));
        // Another replica cleaned it up, and this one has yet to hear of that: nobody would remove what is decided now.
        if cleanup::sweep_of(&self.nomad, &self.namespace, id).await.map_err(unknown)?.is_some()
            && self.ledger.claim(id).await.map_err(|error| KillError::Undecided(id.clone(), error))?.is_none()
        {
            self.store.remove(id);
            return Err(FindError::Unknown(id.clone()).into());
        }
        let verdict =
            Verdict::new(Status::Killed, record.phase, Reason::Killed, "killed by a caller", Utc::now());
        let decision = self
            .ledger
            .decide(id, Some(&record.labels), &Claim::revoked(verdict))
            .await
            .map_err(|error| KillError::Undecided(id.clone(), error))?;
        let killed = match &decision.claim {
            Claim::Revoked { verdict, .. } if verdict.status == Status::Killed => Killed::Yes,
            Claim::Revoked { verdict, .. } => Killed::No(format!("the job has ended: {}", verdict.status)),
            Claim::Claimed { .. } => {
                Killed::No("the job has claimed the right to publish, and ends by itself".to_owned())
            }
        };
        self.store.see(id, |facts| facts.see_claim(decision.index, decision.claim));
        Ok(killed)
    }

    async fn stop(&self, id: &JobId) -> Result<(), Error> {
        patiently(PATIENCE, || self.nomad.stop(&self.namespace, id.as_str(), false)).await
    }
}
