//! Submit: check, copy credentials, register. A job that is not accepted publishes nothing, and its copies of credentials
//! are removed, at the latest when Nomad answers again.

use chrono::{DateTime, Utc};
use secrecy::SecretString;
use serde_json::Value;
use uuid::Uuid;

use super::credentials::{Copies, Unreadable, remove_copies};
use super::{FOR_EVER, PATIENCE, Service};
use crate::job::{Claim, Invalid, JobFacts, JobId, Payload, Reason, Spec, Status, Verdict};
use crate::ledger::Ledger;
use crate::nomad::{Client, Error, Kind, patiently};
use crate::render::{self, RenderError};
use crate::telemetry::chain;

/// Why a submission was not accepted.
#[derive(Debug, thiserror::Error)]
pub enum SubmitError {
    /// The caller's to mend.
    #[error(transparent)]
    Invalid(#[from] Invalid),
    /// The operator's to mend.
    #[error("the job could not be rendered")]
    Render(#[from] RenderError),
    /// Nomad's fault.
    #[error("the job could not be registered")]
    Nomad(#[from] Error),
    /// Nobody can know yet whether it is registered.
    #[error(
        "Nomad did not confirm job {0} in time: it is being withdrawn; submit again, or see whether it exists"
    )]
    Unconfirmed(JobId, #[source] Error),
}

impl Service {
    /// Checks a submission and does nothing else.
    pub fn validate(&self, body: Value) -> Result<Spec, Invalid> {
        Spec::from_json(body, &self.config.policy)
    }

    /// Accepts a submission: once this returns, the job is in Nomad.
    pub async fn submit(&self, body: Value, caller: Option<SecretString>) -> Result<JobId, SubmitError> {
        let spec = self.validate(body)?;
        let id = JobId::from_uuid(Uuid::now_v7());
        let now = Utc::now();
        let payload = Payload {
            job: id.clone(),
            spec,
            policy: self.config.policy.clone(),
            insecure_registries: self.config.insecure_registries.clone(),
        };
        let job = render::render(&payload, &self.config.namespace, now, &self.config.render)?;
        let copies =
            self.read_credentials(&id, &payload.spec, caller).await.map_err(|error| match error {
                Unreadable::Fields(fields) => SubmitError::Invalid(Invalid(fields)),
                Unreadable::Nomad(error) => SubmitError::Nomad(error),
            })?;
        let index = self.register(&id, &job, copies).await?;
        let facts = JobFacts {
            index,
            namespace: self.config.namespace.clone(),
            labels: payload.spec.labels_for_lists(),
            submitted_at: to_milliseconds(now),
            stopped: false,
            gone: false,
        };
        // Of a job whose index could not be read, the watcher tells: a list that was begun before would miss it.
        if index > 0 {
            self.store.see(&id, |known| known.see_job(facts));
        }
        tracing::info!(job = %id, owner = %payload.spec.owner, image = payload.spec.image(), "job submitted");
        Ok(id)
    }

    /// Registers create-only, so that an attempt after a lost answer makes no second job.
    async fn register(&self, id: &JobId, job: &Value, copies: Copies) -> Result<u64, SubmitError> {
        let namespace = &self.config.namespace;
        self.write_credentials(&copies).await?;
        let mut attempts = 0;
        let registered = patiently(PATIENCE, || {
            attempts += 1;
            self.nomad.register(namespace, id.as_str(), job)
        });
        let registered = registered.await;
        match registered {
            Ok(registration) => Ok(registration.job_modify_index),
            // The ID is fresh: who else has registered it than an attempt whose answer was lost?
            Err(Error { kind: Kind::Conflict, .. }) => {
                let found = patiently(PATIENCE, || self.nomad.job(namespace, id.as_str())).await;
                // It is there. Where it cannot be read now, the watcher brings the index.
                Ok(found.map_or(0, |job| job.modify_index))
            }
            // Refused at once, and for good: no attempt can have registered it.
            Err(error) if attempts == 1 && error.is_refusal() => {
                self.remove_copies(&copies).await;
                Err(error.into())
            }
            Err(error) => self.withdraw(id, copies, error).await,
        }
    }

    /// Withdraws a job that may or may not be registered, and goes on with that where its caller has waited long enough.
    async fn withdraw(&self, id: &JobId, copies: Copies, error: Error) -> Result<u64, SubmitError> {
        let paths = copies.into_iter().map(|(path, _)| path).collect();
        let withdrawal = withdraw(self.nomad.clone(), self.config.namespace.clone(), id.clone(), paths);
        match tokio::time::timeout(PATIENCE, tokio::spawn(withdrawal)).await {
            // Decided already, so it is registered, and stands.
            Ok(Ok(false)) => Ok(0),
            _ => Err(SubmitError::Unconfirmed(id.clone(), error)),
        }
    }
}

/// Revokes a job's right to publish, and removes its copies of credentials; whether it was not decided before.
///
/// A job that is registered finds that at its gate, and is stopped by whichever replica sees it.
async fn withdraw(nomad: Client, namespace: String, id: JobId, copies: Vec<String>) -> bool {
    let why = "withdrawn: Nomad did not confirm its registration in time";
    let claim = Claim::revoked(Verdict::new(Status::Killed, None, Reason::Killed, why, Utc::now()));
    match Ledger::new(nomad.clone(), &namespace, FOR_EVER).decide(&id, &claim).await {
        // Its own tasks remove the copies.
        Ok(decision) if !decision.ours => return false,
        Ok(_) => remove_copies(nomad, namespace, copies).await,
        Err(error) => tracing::error!(job = %id, error = chain(&error), "a job could not be withdrawn"),
    }
    true
}

/// The time as the job's meta has it, so that every replica shows the same.
fn to_milliseconds(time: DateTime<Utc>) -> DateTime<Utc> {
    DateTime::from_timestamp_millis(time.timestamp_millis()).unwrap_or(time)
}
