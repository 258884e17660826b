//! Tickets: how a page opens a job's log. It cannot send a token with a `WebSocket` or an event source, and a token in an address ends up in
//! histories and logs.
//!
//! A ticket is a secret, made up at random. The token waits for it in a Variable, sealed by a key that only the ticket yields: so
//! any replica takes it, and who reads the Variable learns nothing.
//!
//! Invariant: a ticket opens one stream, of one job, within 30 s.

use std::collections::BTreeMap;
use std::time::Duration;

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use aws_lc_rs::rand;
use base64::prelude::{BASE64_STANDARD, BASE64_URL_SAFE_NO_PAD, Engine as _};
use chrono::{DateTime, TimeDelta, Utc};
use secrecy::{ExposeSecret as _, SecretString};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::{Caller, Service};
use crate::job::JobId;
use crate::nomad::{Error, Put};

/// Below the ledger's prefix, so that one policy covers both.
const TICKETS: &str = "nomad-build/tickets/";

/// What a ticket begins with, so that scanners for secrets know one.
const BEGIN: &str = "nbt_";

const SEALED: &str = "sealed";
const EXPIRES: &str = "expires";

/// How long a ticket is good for.
const LIVES: TimeDelta = TimeDelta::seconds(30);

/// When the Variable of one that nobody used is removed.
const FORGOTTEN: Duration = Duration::from_secs(40);

/// Why a ticket could not be made or used.
#[derive(Debug, thiserror::Error)]
pub enum TicketError {
    /// It opens nothing.
    #[error("the ticket does not open this job's log, was used, or is older than 30 s: ask for another one")]
    Unknown,
    /// Nomad could not be asked.
    #[error("tickets could not be written or read")]
    Nomad(#[from] Error),
    /// Of the cryptographic library, which does not say why.
    #[error("a ticket could not be made")]
    Unmade,
}

/// A ticket.
pub struct Ticket {
    /// What opens the stream.
    pub secret: SecretString,
    /// Until when.
    pub expires: DateTime<Utc>,
}

/// Who asked for a ticket.
#[derive(Serialize, Deserialize)]
struct Holder {
    token: Option<String>,
    subject: Option<String>,
}

/// What a ticket yields.
struct Lock {
    /// The Variable's path.
    path: String,
    key: [u8; 32],
}

impl Lock {
    fn of(secret: &[u8]) -> Self {
        // Two hashes, so that the path tells nothing of the key.
        let hash = |of: &[u8]| Sha256::new().chain_update(of).chain_update(secret).finalize();
        let name: String = hash(b"path").iter().take(16).map(|byte| format!("{byte:02x}")).collect();
        Self { path: format!("{TICKETS}{name}"), key: hash(b"key").into() }
    }

    fn key(&self) -> Result<LessSafeKey, TicketError> {
        UnboundKey::new(&AES_256_GCM, &self.key).map(LessSafeKey::new).map_err(|_| TicketError::Unmade)
    }

    /// Each key seals once, so the nonce may be any.
    fn nonce() -> Nonce {
        Nonce::assume_unique_for_key([0; NONCE_LEN])
    }

    fn seal(&self, job: &JobId, holder: &Holder) -> Result<String, TicketError> {
        let mut text = serde_json::to_vec(holder).map_err(|_| TicketError::Unmade)?;
        let sealed = self.key()?.seal_in_place_append_tag(Self::nonce(), Aad::from(job.as_str()), &mut text);
        sealed.map(|()| BASE64_STANDARD.encode(text)).map_err(|_| TicketError::Unmade)
    }

    fn open(&self, job: &JobId, sealed: &str) -> Result<Holder, TicketError> {
        let mut text = BASE64_STANDARD.decode(sealed).map_err(|_| TicketError::Unknown)?;
        let opened = self.key()?.open_in_place(Self::nonce(), Aad::from(job.as_str()), &mut text);
        let opened = opened.map_err(|_| TicketError::Unknown)?;
        serde_json::from_slice(opened).map_err(|_| TicketError::Unknown)
    }
}

/// Whether a Variable is a ticket's.
pub(super) fn is_ticket(path: &str) -> bool {
    let name = path.strip_prefix(TICKETS).unwrap_or_default();
    name.len() == 32 && name.bytes().all(|byte| byte.is_ascii_hexdigit())
}

impl Service {
    /// Makes a ticket for the log of a job, which opens what its caller may open.
    ///
    /// # Errors
    /// Where Nomad does not take it.
    pub async fn ticket(&self, job: &JobId, caller: &Caller) -> Result<Ticket, TicketError> {
        let mut secret = [0; 32];
        rand::fill(&mut secret).map_err(|_| TicketError::Unmade)?;
        let lock = Lock::of(&secret);
        let token = caller.token.as_ref().map(|token| token.expose_secret().to_owned());
        let sealed = lock.seal(job, &Holder { token, subject: caller.subject.clone() })?;
        let expires = Utc::now() + LIVES;
        let items = BTreeMap::from([(SEALED.to_owned(), sealed), (EXPIRES.to_owned(), expires.to_rfc3339())]);
        self.nomad.set_variable(&self.config.namespace, &lock.path, &items).await?;
        let (nomad, namespace) = (self.nomad.clone(), self.config.namespace.clone());
        tokio::spawn(async move {
            tokio::time::sleep(FORGOTTEN).await;
            // Where that fails, the sweeper does it.
            if let Err(error) = nomad.delete_variable(&namespace, &lock.path).await {
                tracing::debug!(%error, "a ticket's Variable is left");
            }
        });
        let secret = format!("{BEGIN}{}", BASE64_URL_SAFE_NO_PAD.encode(secret)).into();
        Ok(Ticket { secret, expires })
    }

    /// Takes a ticket for the log of a job: who asked for it.
    ///
    /// # Errors
    /// Where it is not good, or Nomad does not say.
    pub async fn redeem(&self, job: &JobId, ticket: &str) -> Result<Caller, TicketError> {
        let secret = ticket.strip_prefix(BEGIN).and_then(|text| BASE64_URL_SAFE_NO_PAD.decode(text).ok());
        let lock = Lock::of(&secret.ok_or(TicketError::Unknown)?);
        let (nomad, namespace) = (&self.nomad, &self.config.namespace);
        let found = nomad.variable(namespace, &lock.path).await?.ok_or(TicketError::Unknown)?;
        let expires = found.items.get(EXPIRES).and_then(|text| DateTime::parse_from_rfc3339(text).ok());
        let sealed = found.items.get(SEALED).filter(|_| expires.is_some_and(|until| Utc::now() < until));
        let holder = lock.open(job, sealed.ok_or(TicketError::Unknown)?)?;
        // Of those who come with it at one moment, one is the first.
        let used = BTreeMap::from([("used".to_owned(), Utc::now().to_rfc3339())]);
        match nomad.put_variable(namespace, &lock.path, &used, found.modify_index).await? {
            Put::Written(_) => {
                Ok(Caller { token: holder.token.map(SecretString::from), subject: holder.subject })
            }
            Put::Conflict => Err(TicketError::Unknown),
        }
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    #[test]
    fn what_a_ticket_seals_it_alone_opens_for_its_own_job() {
        let jobs = [1, 2].map(|number| JobId::from_uuid(Uuid::from_u128(number)));
        let (lock, other) = (Lock::of(&[1; 32]), Lock::of(&[2; 32]));
        assert!(is_ticket(&lock.path) && lock.path != other.path);
        assert!(!is_ticket("nomad-build/tickets/other") && !is_ticket("nomad-build/keys/x"));
        let holder = Holder { token: Some("s3cret".to_owned()), subject: None };
        let sealed = lock.seal(&jobs[0], &holder).unwrap();
        assert_eq!(lock.open(&jobs[0], &sealed).unwrap().token.as_deref(), Some("s3cret"));
        assert!(matches!(lock.open(&jobs[1], &sealed), Err(TicketError::Unknown)));
        assert!(matches!(other.open(&jobs[0], &sealed), Err(TicketError::Unknown)));
        for broken in ["", "%", &sealed[4..]] {
            assert!(matches!(lock.open(&jobs[0], broken), Err(TicketError::Unknown)));
        }
    }
}
