//! The identity of a job, which is also the ID of its Nomad job.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

const PREFIX: &str = "nb-";

/// `nb-` and a UUID, made by us: registering it create-only makes a retried submission safe.
///
/// Ordered by time where the UUID is a version 7.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct JobId(String);

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
