//! Tickets: how a page opens a job's log. It cannot send a token with a `WebSocket` or an event source, and a token in an address ends up in
//! histories and logs.
//!
//! A ticket is a secret, made up at random. The token waits for it in a Variable, sealed by a key that only the ticket yields: so
//! any replica takes it, and who reads the Variable learns nothing.
//!
//! Invariant: a ticket opens one stream, of one job, within 30 s.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use aws_lc_rs::rand;
use base64::prelude::{BASE64_STANDARD, BASE64_URL_SAFE_NO_PAD, Engine as _};
use chrono::{DateTime, TimeDelta, Utc};
use secrecy::{ExposeSecret as _, SecretString};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::tokens::{Hash, hash_of, lock};
use super::{Caller, Tenant};
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

/// How many may wait to be used on a replica, and of one caller: each is a Variable in Nomad.
const MOST: usize = 1000;
const MOST_OF_ONE: usize = 20;

/// Why a ticket could not be made or used.
#[derive(Debug, thiserror::Error)]
pub enum TicketError {
    /// It opens nothing.
    #[error("the ticket does not open this job's log, was used, or is older than 30 s: ask for another one")]
    Unknown,
    /// Too many are in use.
    #[error("too many tickets were asked for: use those, or ask again in a minute")]
    TooMany,
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
struct Key {
    /// The Variable's path.
    path: String,
    bytes: [u8; 32],
}

impl Key {
    fn of(secret: &[u8]) -> Self {
        // Two hashes, so that the path tells nothing of the key.
        let hash = |of: &[u8]| Sha256::new().chain_update(of).chain_update(secret).finalize();
        let name: String = hash(b"path").iter().take(16).map(|byte| format!("{byte:02x}")).collect();
        Self { path: format!("{TICKETS}{name}"), bytes: hash(b"key").into() }
    }

    fn key(&self) -> Result<LessSafeKey, TicketError> {
        UnboundKey::new(&AES_256_GCM, &self.bytes).map(LessSafeKey::new).map_err(|_| TicketError::Unmade)
    }

    /// Each key seals once, so the nonce may be any.
    fn nonce() -> Nonce {
        Nonce::assume_unique_for_key([0; NONCE_LEN])
    }

    /// The items of a ticket's Variable. What it is good for is sealed with the rest, so that nobody changes it.
    fn seal(
        &self,
        job: &JobId,
        holder: &Holder,
        until: DateTime<Utc>,
    ) -> Result<BTreeMap<String, String>, TicketError> {
        let mut text = serde_json::to_vec(holder).map_err(|_| TicketError::Unmade)?;
        let expires = until.to_rfc3339();
        let scope = Aad::from(format!("{job} {expires}"));
        let sealed = self.key()?.seal_in_place_append_tag(Self::nonce(), scope, &mut text);
        sealed.map_err(|_| TicketError::Unmade)?;
        let sealed = BASE64_STANDARD.encode(text);
        Ok(BTreeMap::from([(SEALED.to_owned(), sealed), (EXPIRES.to_owned(), expires)]))
    }

    /// Who asked for the ticket, while it is good.
    fn open(
        &self,
        job: &JobId,
        items: &BTreeMap<String, String>,
        now: DateTime<Utc>,
    ) -> Result<Holder, TicketError> {
        let (Some(sealed), Some(expires)) = (items.get(SEALED), items.get(EXPIRES)) else {
            return Err(TicketError::Unknown);
        };
        let until = DateTime::parse_from_rfc3339(expires).map_err(|_| TicketError::Unknown)?;
        if until <= now {
            return Err(TicketError::Unknown);
        }
        let mut text = BASE64_STANDARD.decode(sealed).map_err(|_| TicketError::Unknown)?;
        let scope = Aad::from(format!("{job} {expires}"));
        let opened = self.key()?.open_in_place(Self::nonce(), scope, &mut text);
        serde_json::from_slice(opened.map_err(|_| TicketError::Unknown)?).map_err(|_| TicketError::Unknown)
    }
}

/// Tickets that this replica made and that may still be used, by who asked for them. Cheap to clone.
#[derive(Clone, Default)]
pub(super) struct Outstanding(Arc<Mutex<HashMap<Option<Hash>, usize>>>);

impl Outstanding {
    /// Counts one more of a caller; none where there are too many.
    fn add(&self, of: Option<Hash>) -> Option<Counted> {
        let mut all = lock(&self.0);
        let total: usize = all.values().sum();
        let count = all.get(&of).copied().unwrap_or_default();
        if total >= MOST || count >= MOST_OF_ONE {
            return None;
        }
        all.insert(of, count + 1);
        Some(Counted { all: self.clone(), of })
    }
}

/// One of them.
struct Counted {
    all: Outstanding,
    of: Option<Hash>,
}

impl Drop for Counted {
    fn drop(&mut self) {
        let mut all = lock(&self.all.0);
        if let Some(count) = all.get_mut(&self.of) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                all.remove(&self.of);
            }
        }
    }
}

/// Whether a Variable is a ticket's.
pub(super) fn is_ticket(path: &str) -> bool {
    let name = path.strip_prefix(TICKETS).unwrap_or_default();
    name.len() == 32 && name.bytes().all(|byte| byte.is_ascii_hexdigit())
}

impl Tenant {
    /// Makes a ticket for the log of a job, which opens what its caller may open.
    ///
    /// # Errors
    /// Where Nomad does not take it, or there are too many.
    pub async fn ticket(&self, job: &JobId, caller: &Caller) -> Result<Ticket, TicketError> {
        let counted =
            self.shared.tickets.add(caller.token.as_ref().map(hash_of)).ok_or(TicketError::TooMany)?;
        let mut secret = [0; 32];
        rand::fill(&mut secret).map_err(|_| TicketError::Unmade)?;
        let key = Key::of(&secret);
        let token = caller.token.as_ref().map(|token| token.expose_secret().to_owned());
        let expires = Utc::now() + LIVES;
        let items = key.seal(job, &Holder { token, subject: caller.subject.clone() }, expires)?;
        self.nomad.set_variable(&self.namespace, &key.path, &items).await?;
        let (nomad, namespace) = (self.nomad.clone(), self.namespace.clone());
        #[expect(
            clippy::disallowed_methods,
            reason = "a ticket is forgotten in its time, whoever asked for it"
        )]
        tokio::spawn(async move {
            let _counted = counted;
            tokio::time::sleep(FORGOTTEN).await;
            // Where that fails, the sweeper does it.
            if let Err(error) = nomad.delete_variable(&namespace, &key.path).await {
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
    pub(super) async fn redeem(&self, job: &JobId, ticket: &str) -> Result<Caller, TicketError> {
        let secret = ticket.strip_prefix(BEGIN).and_then(|text| BASE64_URL_SAFE_NO_PAD.decode(text).ok());
        let key = Key::of(&secret.ok_or(TicketError::Unknown)?);
        // Whoever makes up tickets takes nothing of what jobs need.
        let (nomad, namespace) = (self.shared.holders.strangers(), &self.namespace);
        let found = nomad.variable(namespace, &key.path).await?.ok_or(TicketError::Unknown)?;
        let holder = key.open(job, &found.items, Utc::now())?;
        // Of those who come with it at one moment, one is the first.
        let used = BTreeMap::from([("used".to_owned(), Utc::now().to_rfc3339())]);
        match nomad.put_variable(namespace, &key.path, &used, found.modify_index).await? {
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
    fn a_ticket_alone_opens_what_it_seals_for_its_job_and_its_time() {
        let jobs = [1, 2].map(|number| JobId::from_uuid(Uuid::from_u128(number)));
        let (key, other) = (Key::of(&[1; 32]), Key::of(&[2; 32]));
        assert!(is_ticket(&key.path) && key.path != other.path);
        assert!(!is_ticket("nomad-build/tickets/other") && !is_ticket("nomad-build/keys/x"));
        let holder = Holder { token: Some("s3cret".to_owned()), subject: None };
        let made = DateTime::from_timestamp(1000, 0).unwrap();
        let at = |seconds| made + TimeDelta::seconds(seconds);
        let good = key.seal(&jobs[0], &holder, made + LIVES).unwrap();
        for seconds in [0, 29] {
            let holder = key.open(&jobs[0], &good, at(seconds)).unwrap();
            assert_eq!(holder.token.as_deref(), Some("s3cret"));
        }
        let with = |name: &str, text: &str| {
            let mut items = good.clone();
            items.insert(name.to_owned(), text.to_owned());
            items
        };
        for (what, key, job, items, now) in [
            ("used", &key, 0, BTreeMap::new(), at(0)),
            ("old", &key, 0, good.clone(), at(30)),
            ("made to last longer", &key, 0, with(EXPIRES, &at(90).to_rfc3339()), at(0)),
            ("another job's", &key, 1, good.clone(), at(0)),
            ("another ticket's", &other, 0, good.clone(), at(0)),
            ("torn", &key, 0, with(SEALED, &good[SEALED][4..]), at(0)),
            ("none", &key, 0, with(SEALED, "%"), at(0)),
        ] {
            assert!(matches!(key.open(&jobs[job], &items, now), Err(TicketError::Unknown)), "{what}");
        }
    }

    #[test]
    fn a_caller_has_so_many_tickets_at_once_and_gets_them_back() {
        let outstanding = Outstanding::default();
        let mut held: Vec<_> = (0..MOST_OF_ONE).filter_map(|_| outstanding.add(None)).collect();
        assert_eq!(held.len(), MOST_OF_ONE);
        assert!(outstanding.add(None).is_none() && outstanding.add(Some([1; 32])).is_some());
        held.pop();
        assert!(outstanding.add(None).is_some());
        drop(held);
        assert!(lock(&outstanding.0).is_empty());
    }
}
