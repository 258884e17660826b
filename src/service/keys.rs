//! Idempotency keys: which job a key names.
//!
//! A key's Variable is written once, before anything else is written for it, and once more when its job is in Nomad. An attempt
//! that goes on for an earlier one writes it, too; the first one takes it back where Nomad refuses the job for good.
//!
//! Invariant: for as long as its Variable is kept, a key names one job, which was made for one body. A job's ID is never
//! used again, be it after a cleanup. What is taken back named a job that never was.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest as _, Sha256};
use uuid::Uuid;

use super::PATIENCE;
use crate::job::{IdempotencyKey, JobId};
use crate::nomad::{Client, Error, Put, patiently};

/// Below the ledger's prefix, so that one policy covers both.
const KEYS: &str = "nomad-build/keys/";
const ITEM: &str = "reservation";

/// What a key stands for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Reservation {
    v: u32,
    body_sha256: String,
    /// The job.
    pub(super) job: JobId,
    /// When it was first submitted.
    pub(super) submitted_at: DateTime<Utc>,
    /// Whether it is in Nomad, or was.
    pub(super) accepted: bool,
}

impl Reservation {
    /// A reservation of a fresh job.
    pub(super) fn new(body: &Value, now: DateTime<Utc>) -> Self {
        // Its JSON with sorted keys and without spaces, so that how it was written does not count.
        let body_sha256 = Sha256::digest(body.to_string()).iter().map(|byte| format!("{byte:02x}")).collect();
        Self { v: 1, body_sha256, job: JobId::from_uuid(Uuid::now_v7()), submitted_at: now, accepted: false }
    }

    fn to_items(&self) -> Result<BTreeMap<String, String>, KeyError> {
        let text = serde_json::to_string(self).map_err(|error| KeyError::Malformed(error.to_string()))?;
        Ok(BTreeMap::from([(ITEM.to_owned(), text)]))
    }

    fn from_items(items: &BTreeMap<String, String>) -> Result<Self, KeyError> {
        let text = items.get(ITEM).map(String::as_str).unwrap_or_default();
        serde_json::from_str(text).map_err(|error| KeyError::Malformed(error.to_string()))
    }
}

/// What became of an attempt to reserve.
#[derive(Debug)]
pub(super) enum Reserved {
    /// Nobody had used the key before.
    First(Held),
    /// The same body was submitted with it before.
    Again(Held),
    /// Another body was.
    Taken,
}

/// A reservation that stands.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) reservation: Reservation,
    path: String,
    index: u64,
}

/// Why a key could not be looked up.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// Nomad could not be asked.
    #[error("its Variable could not be reached")]
    Nomad(#[from] Error),
    /// Somebody wrote something else there.
    #[error("its Variable cannot be understood: {0}")]
    Malformed(String),
}

/// The keys of one namespace.
#[derive(Clone)]
pub(super) struct Keys {
    pub(super) nomad: Client,
    pub(super) namespace: String,
}

impl Keys {
    /// Reserves a caller's key, unless it is reserved.
    pub(super) async fn reserve(
        &self,
        accessor: &str,
        key: &IdempotencyKey,
        wanted: &Reservation,
    ) -> Result<Reserved, KeyError> {
        let path = self.path(accessor, key);
        let items = wanted.to_items()?;
        loop {
            let put = patiently(PATIENCE, || self.nomad.put_variable(&self.namespace, &path, &items, 0));
            if let Put::Written(index) = put.await? {
                return Ok(Reserved::First(Held { reservation: wanted.clone(), path, index }));
            }
            // None: swept, or taken back, between the two calls.
            if let Some(standing) = self.standing(accessor, key, wanted).await? {
                return Ok(standing);
            }
        }
    }

    /// What a caller's key stands for already; none where it is not reserved.
    pub(super) async fn standing(
        &self,
        accessor: &str,
        key: &IdempotencyKey,
        wanted: &Reservation,
    ) -> Result<Option<Reserved>, KeyError> {
        let Some(held) = self.held(self.path(accessor, key)).await? else { return Ok(None) };
        Ok(Some(if held.reservation.body_sha256 != wanted.body_sha256 {
            Reserved::Taken
        } else if held.reservation.job == wanted.job {
            // An attempt whose answer was lost finds its own.
            Reserved::First(held)
        } else {
            Reserved::Again(held)
        }))
    }

    /// Says that another attempt goes on where an earlier one broke off, which then takes nothing back; none where the
    /// reservation was changed meanwhile.
    pub(super) async fn take_over(&self, held: Held) -> Result<Option<Held>, KeyError> {
        Ok(match self.put(&held, &held.reservation).await? {
            Put::Written(index) => Some(Held { index, ..held }),
            Put::Conflict => None,
        })
    }

    /// Writes down that a key's job is in Nomad. Whoever is told the job's ID is told behind this.
    pub(super) async fn accept(&self, mut held: Held) -> Result<(), KeyError> {
        let accepted = Reservation { accepted: true, ..held.reservation.clone() };
        while let Put::Conflict = self.put(&held, &accepted).await? {
            match self.held(held.path).await? {
                // Another attempt took it over, and has not written this.
                Some(standing) if standing.reservation == held.reservation => held = standing,
                _ => break,
            }
        }
        Ok(())
    }

    /// Takes a reservation back, unless another attempt has taken it over; whether it did.
    pub(super) async fn take_back(&self, held: &Held) -> Result<bool, KeyError> {
        let removal =
            patiently(PATIENCE, || self.nomad.delete_variable_at(&self.namespace, &held.path, held.index));
        Ok(matches!(removal.await?, Put::Written(_)))
    }

    fn path(&self, accessor: &str, key: &IdempotencyKey) -> String {
        format!("{KEYS}{}", key.name(&self.namespace, accessor))
    }

    async fn held(&self, path: String) -> Result<Option<Held>, KeyError> {
        let Some(standing) = patiently(PATIENCE, || self.nomad.variable(&self.namespace, &path)).await?
        else {
            return Ok(None);
        };
        let reservation = Reservation::from_items(&standing.items)?;
        Ok(Some(Held { reservation, path, index: standing.modify_index }))
    }

    async fn put(&self, held: &Held, reservation: &Reservation) -> Result<Put, KeyError> {
        let items = reservation.to_items()?;
        let put =
            patiently(PATIENCE, || self.nomad.put_variable(&self.namespace, &held.path, &items, held.index));
        Ok(put.await?)
    }
}

/// Whether a path is that of a key.
pub(super) fn is_key(path: &str) -> bool {
    path.strip_prefix(KEYS).is_some_and(|name| Uuid::try_parse(name).is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reservation_survives_the_way_through_a_variable_and_knows_its_body_however_it_is_written() {
        let at = DateTime::from_timestamp_millis(1_700_000_000_123).unwrap();
        let body = |text: &str| serde_json::from_str::<Value>(text).unwrap();
        let one = Reservation::new(&body(r#"{"a": 1, "b": [2]}"#), at);
        assert_eq!(Reservation::from_items(&one.to_items().unwrap()).unwrap(), one);
        assert_eq!(one.body_sha256, Reservation::new(&body("{\"b\":[2],\n\"a\":1}"), at).body_sha256);
        assert_ne!(one.body_sha256, Reservation::new(&body(r#"{"a": 1, "b": [3]}"#), at).body_sha256);
        assert!(Reservation::from_items(&BTreeMap::new()).is_err());
    }

    #[test]
    fn a_path_is_a_keys_or_not() {
        assert!(is_key("nomad-build/keys/28900495-0bfd-50db-bc3b-c039a851cba0"));
        assert!(!is_key("nomad-build/keys/other"));
        assert!(!is_key("nomad-build/claims/28900495-0bfd-50db-bc3b-c039a851cba0"));
    }
}
