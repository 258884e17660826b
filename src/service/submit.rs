//! Submit: check, copy credentials, register.
//!
//! A job that is not accepted publishes nothing, and its copies of credentials are removed, at the latest when Nomad answers
//! again. Of one with a key of which Nomad did not say whether it is registered, whoever has the key decides by sending it again;
//! copies that are left then are swept.
//!
//! Invariant: a submission with a key that is refused at its first attempt leaves nothing in Nomad. So its credentials are read before
//! its key is reserved.

use std::time::Duration;

use backon::{BackoffBuilder as _, ExponentialBuilder};
use chrono::{DateTime, Utc};
use secrecy::SecretString;
use serde_json::Value;

use super::credentials::{Copies, Unreadable, remove_copies};
use super::keys::{Held, KeyError, Reservation, Reserved};
use super::logins::Caller;
use super::{FOR_EVER, FindError, PATIENCE, Tenant, translate};
use crate::job::{
    Claim, FieldError, IdempotencyKey, Invalid, JobFacts, JobId, Payload, Reason, Spec, Status, Verdict,
};
use crate::ledger::{Ledger, LedgerError};
use crate::nomad::{Client, Error, Job, Kind, patiently};
use crate::render::{self, RenderError};
use crate::telemetry::chain;

/// How often an attempt looks for the job of an earlier one with the same key: for about 3 s.
const FIRST_ATTEMPT: usize = 7;

/// Why a submission was not accepted.
#[derive(Debug, thiserror::Error)]
pub enum SubmitError {
    /// The caller's to mend.
    #[error(transparent)]
    Invalid(#[from] Invalid),
    /// Somebody else's secrets.
    #[error("the submission names Variables that the caller may not read")]
    Forbidden(Vec<FieldError>),
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
    /// The same, of a submission with a key: its caller finds out by sending it again.
    #[error("Nomad did not confirm job {0} in time: submit again with the same Idempotency-Key")]
    Unanswered(JobId, #[source] Error),
    /// The key was used for something else.
    #[error("another submission was made with this Idempotency-Key: use a new key for each build")]
    KeyTaken,
    /// The caller's token is none.
    #[error("the caller's token is no ACL token that Nomad knows")]
    Token,
    /// The key's Variable could not be read or written.
    #[error("the submission's Idempotency-Key could not be looked up; submit again with it")]
    Key(#[from] KeyError),
    /// The job of the key could not be looked up.
    #[error("the job of the submission's Idempotency-Key could not be looked up; submit again with it")]
    Ledger(#[from] LedgerError),
    /// Nor could it be found in the archive.
    #[error(transparent)]
    Find(#[from] FindError),
}

/// What becomes of a job of which Nomad does not say whether it is registered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Doubt {
    /// Its caller is told that it is refused, so it must not run.
    Withdraw,
    /// Its caller sends it again.
    Retry,
}

/// A job that is about to be registered.
struct Prepared {
    payload: Payload,
    /// As Nomad is told of it.
    job: Value,
    copies: Copies,
    /// When it was first submitted.
    now: DateTime<Utc>,
}

/// How a job came to be in Nomad.
enum Registered {
    /// By this attempt, at this index.
    Now(u64),
    /// By another one.
    Before(Box<Job>),
    /// By another one, and it cannot be read now.
    Somehow,
}

impl Tenant {
    /// Accepts a submission: once this returns, the job is in Nomad. With a key it is the job that the key's first
    /// submission made, on whatever replica.
    pub async fn submit(
        &self,
        body: Value,
        key: Option<&IdempotencyKey>,
        caller: Caller,
    ) -> Result<JobId, SubmitError> {
        let now = to_milliseconds(Utc::now());
        let reservation = Reservation::new(&body, now);
        let spec = Spec::from_json(body, &self.config.policy)?;
        let Some(key) = key else {
            let prepared = self.prepare(reservation.job, spec, now, caller.token).await?;
            return self.accept(&prepared, Doubt::Withdraw).await;
        };
        let whose = match &caller.subject {
            // The next JWT of the same subject is traded for another token.
            Some(subject) => subject.clone(),
            None => self.accessor(caller.token.clone()).await?,
        };
        loop {
            let token = caller.token.clone();
            let prepared = self.prepare(reservation.job.clone(), spec.clone(), now, token.clone()).await;
            let (reserved, prepared) = match prepared {
                Ok(prepared) => (self.keys.reserve(&whose, key, &reservation).await?, Some(prepared)),
                // Whatever became of its credentials, a job that was made with the key is told.
                Err(refused) => match self.keys.standing(&whose, key, &reservation).await? {
                    Some(standing) => (standing, None),
                    None => return Err(refused),
                },
            };
            match (reserved, prepared) {
                (Reserved::Taken, _) => return Err(SubmitError::KeyTaken),
                (Reserved::First(held), Some(prepared)) => return self.accept_first(held, &prepared).await,
                (Reserved::First(held) | Reserved::Again(held), _) => {
                    if let Some(job) = self.accept_again(held, spec.clone(), token).await? {
                        return Ok(job);
                    }
                }
            }
        }
    }

    /// Accepts the job that a key was reserved for just now. Where Nomad refuses it for good, nothing of it stays.
    async fn accept_first(&self, held: Held, prepared: &Prepared) -> Result<JobId, SubmitError> {
        match self.accept(prepared, Doubt::Retry).await {
            Ok(job) => {
                self.keys.accept(held).await?;
                Ok(job)
            }
            Err(refused) => {
                if let SubmitError::Nomad(error) = &refused
                    && !error.is_passing()
                    && let Err(error) = self.take_back(&held, prepared).await
                {
                    let job = &prepared.payload.job;
                    tracing::warn!(%job, error = chain(&error), "what a refused job left is left to the sweeper");
                }
                Err(refused)
            }
        }
    }

    /// Accepts the job that a key was reserved for by another attempt; none where that changed it meanwhile.
    async fn accept_again(
        &self,
        held: Held,
        spec: Spec,
        caller: Option<SecretString>,
    ) -> Result<Option<JobId>, SubmitError> {
        let Reservation { job, submitted_at, accepted, .. } = held.reservation.clone();
        if accepted {
            return Ok(Some(job));
        }
        if self.is_there_soon(&job).await? {
            self.keys.accept(held).await?;
            return Ok(Some(job));
        }
        // Where the attempt that reserved it broke off. Nomad does not keep two registrations apart that come at the
        // same moment, so all of them are alike, down to their time.
        let prepared = self.prepare(job.clone(), spec, submitted_at, caller).await?;
        let Some(held) = self.keys.take_over(held).await? else { return Ok(None) };
        self.accept(&prepared, Doubt::Retry).await?;
        self.keys.accept(held).await?;
        Ok(Some(job))
    }

    /// Removes what was written for a job that Nomad refused for good: the reservation of its key, and the copies of its
    /// credentials, which no other attempt needs where none has taken the key over.
    async fn take_back(&self, held: &Held, prepared: &Prepared) -> Result<(), SubmitError> {
        // It answers 500 to most of what it refuses, which alone does not say that nothing was written.
        let id = prepared.payload.job.as_str();
        match patiently(PATIENCE, || self.nomad.job(&self.namespace, id)).await {
            Err(Error { kind: Kind::NotFound, .. }) => {}
            other => return other.map(drop).map_err(SubmitError::Nomad),
        }
        if self.keys.take_back(held).await? {
            self.remove_copies(&prepared.copies).await;
        }
        Ok(())
    }

    /// Whether a job is in Nomad, or is within a few seconds: the first attempt may go on beside this one.
    async fn is_there_soon(&self, id: &JobId) -> Result<bool, SubmitError> {
        let mut delays = ExponentialBuilder::default()
            .with_min_delay(Duration::from_millis(20))
            .with_max_times(FIRST_ATTEMPT)
            .with_jitter()
            .build();
        loop {
            match (self.is_there(id).await?, delays.next()) {
                (true, _) => return Ok(true),
                (false, None) => return Ok(false),
                (false, Some(delay)) => tokio::time::sleep(delay).await,
            }
        }
    }

    async fn accessor(&self, caller: Option<SecretString>) -> Result<String, SubmitError> {
        let nomad = self.nomad.with_token(caller);
        patiently(PATIENCE, || nomad.accessor()).await.map_err(|error| match error.kind {
            // A workload identity has no accessor.
            Kind::Forbidden | Kind::NotFound => SubmitError::Token,
            _ => error.into(),
        })
    }

    /// Whether a job is in Nomad, or was: its claim outlives it.
    async fn is_there(&self, id: &JobId) -> Result<bool, SubmitError> {
        if self.store.record(id).is_some() {
            return Ok(true);
        }
        match patiently(PATIENCE, || self.nomad.job(&self.namespace, id.as_str())).await {
            Ok(_) => Ok(true),
            Err(Error { kind: Kind::NotFound, .. }) => {
                Ok(self.ledger.claim(id).await?.is_some() || self.archived(id).await?.is_some())
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Renders a job and reads what it names, with the caller's token. Nothing is written.
    async fn prepare(
        &self,
        id: JobId,
        spec: Spec,
        now: DateTime<Utc>,
        caller: Option<SecretString>,
    ) -> Result<Prepared, SubmitError> {
        let payload = Payload {
            job: id,
            spec,
            policy: self.config.policy.clone(),
            insecure_registries: self.config.insecure_registries.clone(),
        };
        let job = render::render(&payload, &self.namespace, now, &self.config.render)?;
        let copies = self.read_credentials(&payload.job, &payload.spec, caller).await;
        let copies = copies.map_err(|error| match error {
            Unreadable::Fields(fields) => SubmitError::Invalid(Invalid(fields)),
            Unreadable::Forbidden(fields) => SubmitError::Forbidden(fields),
            Unreadable::Nomad(error) => SubmitError::Nomad(error),
        })?;
        Ok(Prepared { payload, job, copies, now })
    }

    async fn accept(&self, prepared: &Prepared, doubt: Doubt) -> Result<JobId, SubmitError> {
        let Prepared { payload, job, copies, now } = prepared;
        let id = &payload.job;
        let registered = self.register(id, job, copies, doubt).await?;
        let facts = |index| JobFacts::new(index, &self.namespace, payload.spec.labels_for_lists(*now));
        let facts = match registered {
            Registered::Now(index) => Some(facts(index)),
            Registered::Before(job) => translate::job(&job).map(|(_, facts)| facts),
            Registered::Somehow => None,
        };
        if let Some(facts) = facts {
            // It runs already, so it is accepted, whatever becomes of this: its first phase writes the same.
            if let Err(error) = self.ledger.open(id, &facts.labels).await {
                tracing::warn!(job = %id, error = chain(&error), "a job's ledger could not be opened");
            }
            self.store.see(id, |known| known.see_job(facts));
        }
        tracing::info!(job = %id, owner = %payload.spec.owner, image = payload.spec.image(), "job submitted");
        Ok(id.clone())
    }

    /// Registers create-only, so that an attempt after a lost answer makes no second job.
    async fn register(
        &self,
        id: &JobId,
        job: &Value,
        copies: &Copies,
        doubt: Doubt,
    ) -> Result<Registered, SubmitError> {
        let namespace = &self.namespace;
        self.write_credentials(copies, doubt).await?;
        let mut attempts = 0;
        let registered = patiently(PATIENCE, || {
            attempts += 1;
            self.nomad.register(namespace, id.as_str(), job)
        });
        let registered = registered.await;
        match (registered, doubt) {
            (Ok(registration), _) => Ok(Registered::Now(registration.job_modify_index)),
            // Only who submits the same has this ID: an attempt whose answer was lost, or one with the same key.
            (Err(Error { kind: Kind::Conflict, .. }), _) => {
                let found = patiently(PATIENCE, || self.nomad.job(namespace, id.as_str())).await;
                // It is there. Where it cannot be read now, the watcher brings it.
                Ok(found.map_or(Registered::Somehow, |job| Registered::Before(Box::new(job))))
            }
            // Refused at once, and for good: no attempt can have registered it.
            (Err(error), Doubt::Withdraw) if attempts == 1 && error.is_refusal() => {
                self.remove_copies(copies).await;
                Err(error.into())
            }
            // The copies may be those of an attempt beside this one.
            (Err(error), Doubt::Retry) if attempts == 1 && !error.is_passing() => Err(error.into()),
            (Err(error), Doubt::Withdraw) => self.withdraw(id, copies, error).await,
            (Err(error), Doubt::Retry) => Err(SubmitError::Unanswered(id.clone(), error)),
        }
    }

    /// Withdraws a job that may or may not be registered, and goes on with that where its caller has waited long enough.
    async fn withdraw(&self, id: &JobId, copies: &Copies, error: Error) -> Result<Registered, SubmitError> {
        let paths = copies.iter().map(|(path, _)| path.clone()).collect();
        let withdrawal = withdraw(self.nomad.clone(), self.namespace.clone(), id.clone(), paths);
        #[expect(clippy::disallowed_methods, reason = "it goes on where its caller has waited long enough")]
        let withdrawn = tokio::time::timeout(PATIENCE, tokio::spawn(withdrawal)).await;
        match withdrawn {
            // Decided already, so it is registered, and stands.
            Ok(Ok(false)) => Ok(Registered::Somehow),
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
    match Ledger::new(nomad.clone(), &namespace, FOR_EVER).decide(&id, None, &claim).await {
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
