//! The identity of a job, which is also the ID of its Nomad job.

use std::fmt;
use std::str::FromStr;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

const PREFIX: &str = "nb-";

/// `nb-` and a UUID, made by us: registering it create-only makes a retried submission safe.
///
/// Ordered by time where the UUID is a version 7.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct JobId(String);

/// What makes a name of a key: any UUID would do, as long as it never changes.
const OF_KEYS: Uuid = Uuid::from_u128(0x6b0e_9f6c_53a1_4f0e_9d0b_7a52_c1d8_34ee);

/// What a caller calls a submission, so that sending it again makes no second job: `Idempotency-Key`, 1 to 255 visible
/// ASCII characters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdempotencyKey(String);

impl IdempotencyKey {
    /// The key's name: the same on every replica, and another one for each caller and namespace.
    pub fn name(&self, namespace: &str, accessor: &str) -> Uuid {
        // None of them holds a line's end, so no two triples give one name.
        Uuid::new_v5(&OF_KEYS, [namespace, accessor, &self.0].join("\n").as_bytes())
    }
}

/// A text that is no key.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("must be 1 to 255 visible ASCII characters, without spaces")]
pub struct InvalidKey;

impl FromStr for IdempotencyKey {
    type Err = InvalidKey;

    fn from_str(text: &str) -> Result<Self, InvalidKey> {
        let fits = (1..=255).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic());
        if fits { Ok(Self(text.to_owned())) } else { Err(InvalidKey) }
    }
}

/// A text that is not a job ID.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("not a job ID: a job ID is \"nb-\" and a lower-case UUID")]
pub struct InvalidId;

impl JobId {
    /// The prefix that tells this service's Nomad jobs from all others.
    pub const PREFIX: &'static str = PREFIX;

    /// The job ID of a UUID.
    pub fn from_uuid(uuid: Uuid) -> Self {
        Self(format!("{PREFIX}{}", uuid.hyphenated()))
    }

    /// The least ID that is made at a time, to the millisecond.
    pub fn first_of(time: DateTime<Utc>) -> Self {
        let milliseconds = u128::try_from(time.timestamp_millis()).unwrap_or(0);
        // RFC 9562, section 5.7: the first 48 of 128 bits.
        Self::from_uuid(Uuid::from_u128(milliseconds << 80))
    }

    /// When the ID was made, to the millisecond, which is when its job was submitted; none where it does not say.
    pub fn made_at(&self) -> Option<DateTime<Utc>> {
        let uuid = Uuid::try_parse(self.0.strip_prefix(PREFIX)?).ok()?;
        let (seconds, nanos) = uuid.get_timestamp().filter(|_| uuid.get_version_num() == 7)?.to_unix();
        DateTime::from_timestamp(seconds.try_into().ok()?, nanos)
    }

    /// The ID as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for JobId {
    type Err = InvalidId;

    fn from_str(text: &str) -> Result<Self, InvalidId> {
        let uuid = text.strip_prefix(PREFIX).and_then(|rest| Uuid::try_parse(rest).ok()).ok_or(InvalidId)?;
        // One spelling only: braces, upper case and missing hyphens parse as UUIDs too.
        let id = Self::from_uuid(uuid);
        if id.0 == text { Ok(id) } else { Err(InvalidId) }
    }
}

impl TryFrom<String> for JobId {
    type Error = InvalidId;

    fn try_from(text: String) -> Result<Self, InvalidId> {
        text.parse()
    }
}

impl From<JobId> for String {
    fn from(id: JobId) -> Self {
        id.0
    }
}

impl fmt::Display for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_reads_back_as_it_was_written() {
        let id = JobId::from_uuid(Uuid::from_u128(0x0190_0000_0000_7000_8000_0000_0000_0001));
        assert_eq!(id.to_string().parse(), Ok(id));
    }

    #[test]
    fn an_id_says_when_it_was_made_where_it_has_a_time() {
        let made_at = |text: &str| text.parse::<JobId>().unwrap().made_at();
        let at = DateTime::from_timestamp_millis(1_700_000_000_123);
        assert_eq!(made_at("nb-018bcfe5-687b-7000-8000-000000000001"), at);
        assert_eq!(made_at("nb-28900495-0bfd-50db-bc3b-c039a851cba0"), None);
    }

    #[test]
    fn ids_are_in_the_order_in_which_they_were_made() {
        let id = |text: &str| text.parse::<JobId>().unwrap();
        let first = JobId::first_of(DateTime::from_timestamp_millis(1_700_000_000_123).unwrap());
        assert_eq!(first, id("nb-018bcfe5-687b-0000-0000-000000000000"));
        assert!(id("nb-018bcfe5-687a-7fff-bfff-ffffffffffff") < first);
        assert!(first < id("nb-018bcfe5-687b-7000-8000-000000000000"));
        assert_eq!(
            JobId::first_of(DateTime::from_timestamp_millis(-1).unwrap()),
            JobId::from_uuid(Uuid::nil())
        );
    }

    #[test]
    fn a_key_has_one_name_for_each_caller_and_namespace() {
        let name = |namespace: &str, accessor: &str, key: &str| {
            key.parse::<IdempotencyKey>().unwrap().name(namespace, accessor)
        };
        // It must never change: a retry may meet a newer version.
        assert_eq!(name("ci", "", "a").to_string(), "28900495-0bfd-50db-bc3b-c039a851cba0");
        let names = [name("ci", "", "a"), name("ci", "", "b"), name("ci", "b", "a"), name("cib", "", "a")];
        assert_eq!(names.iter().collect::<std::collections::HashSet<_>>().len(), names.len());
    }

    #[test]
    fn a_key_is_short_and_visible() {
        for key in ["", " ", "a b", "é", "a\n", &"k".repeat(256)] {
            assert_eq!(key.parse::<IdempotencyKey>(), Err(InvalidKey), "{key:?}");
        }
        for key in ["a", "\"8e03978e\"", &"k".repeat(255)] {
            assert!(key.parse::<IdempotencyKey>().is_ok(), "{key:?}");
        }
    }

    #[test]
    fn only_one_spelling_is_an_id() {
        for text in [
            "",
            "nb-",
            "01900000-0000-7000-8000-000000000001",
            "nb-{01900000-0000-7000-8000-000000000001}",
            "nb-0190000000007000800000000000000A",
            "nb-01900000-0000-7000-8000-00000000000A",
            "nb-01900000-0000-7000-8000-000000000001/../x",
            " nb-01900000-0000-7000-8000-000000000001",
        ] {
            assert_eq!(text.parse::<JobId>(), Err(InvalidId), "{text:?}");
        }
    }
}
