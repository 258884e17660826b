//! Submit: check, copy credentials, register. Nothing is left behind when any of them fails.

use backon::{ExponentialBuilder, Retryable};
use chrono::{DateTime, Utc};
use secrecy::SecretString;
use serde_json::Value;
use uuid::Uuid;

use super::credentials::{Copies, Unreadable};
use super::{PATIENCE, Service};
use crate::job::{Invalid, JobFacts, JobId, Payload, Spec};
use crate::nomad::{Error, Kind};
use crate::render::{self, RenderError};

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
        let index = self.register(&id, &job, &copies).await?;
        let facts = JobFacts {
            index,
            namespace: self.config.namespace.clone(),
            labels: payload.spec.labels_for_lists(),
            submitted_at: to_milliseconds(now),
            stopped: false,
            gone: false,
        };
        self.store.see(&id, |known| known.see_job(facts));
        tracing::info!(job = %id, owner = %payload.spec.owner, image = payload.spec.image(), "job submitted");
        Ok(id)
    }

    /// Registers create-only, so that a retry after a lost answer is safe.
    async fn register(&self, id: &JobId, job: &Value, copies: &Copies) -> Result<u64, Error> {
        self.write_credentials(copies).await?;
        let backoff = ExponentialBuilder::default().with_jitter().with_total_delay(Some(PATIENCE));
        let register = || self.nomad.register(&self.config.namespace, id.as_str(), job);
        match register.retry(backoff).when(Error::is_passing).await {
            Ok(registration) => Ok(registration.job_modify_index),
            // The ID is fresh: who else has registered it than an attempt whose answer was lost?
            Err(Error { kind: Kind::Conflict, .. }) => {
                Ok(self.nomad.job(&self.config.namespace, id.as_str()).await?.modify_index)
            }
            Err(error) => {
                self.remove_copies(copies).await;
                Err(error)
            }
        }
    }
}

/// The time as the job's meta has it, so that every replica shows the same.
fn to_milliseconds(time: DateTime<Utc>) -> DateTime<Utc> {
    DateTime::from_timestamp_millis(time.timestamp_millis()).unwrap_or(time)
}
