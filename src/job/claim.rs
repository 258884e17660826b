//! The fence: one Nomad Variable for each job, created once, which decides whether the job may publish.
//!
//! Invariant: whoever creates it first decides. A job whose claim is revoked tags nothing, ever; a job whose claim
//! names a digest can only bring the registry to that digest.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use super::outcome::shorten;
use super::{Phase, Reason, Status};

const ITEM: &str = "claim";

/// Who was first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Claim {
    /// The publish task: from here on the job ends by itself.
    Claimed {
        /// The format's version.
        v: u32,
        /// The allocation that claimed.
        allocation: String,
        /// The digest of the manifest that was tested and is already in the registry, under no tag.
        digest: String,
        /// When, by the node's clock.
        at: DateTime<Utc>,
    },
    /// A kill, a failed phase, or a verdict of the service.
    Revoked {
        /// The format's version.
        v: u32,
        /// How the job ended.
        verdict: Verdict,
    },
}

/// How a job ended that did not publish.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// The final status: FAILED, KILLED or LOST.
    pub status: Status,
    /// The phase it ended in: the one that failed, begun or not, or else the one that had begun last, if any.
    pub phase: Option<Phase>,
    /// Why.
    pub reason: Reason,
    /// The exit code of what failed, if it had one.
    pub exit_code: Option<i64>,
    /// What happened, for a person.
    pub message: String,
    /// When.
    pub at: DateTime<Utc>,
}

impl Verdict {
    /// A verdict; its message is cut to what a Variable should hold.
    pub fn new(
        status: Status,
        phase: Option<Phase>,
        reason: Reason,
        message: &str,
        at: DateTime<Utc>,
    ) -> Self {
        Self { status, phase, reason, exit_code: None, message: shorten(message), at }
    }
}

impl Claim {
    /// The claim of an allocation.
    pub fn claimed(allocation: &str, digest: &str, at: DateTime<Utc>) -> Self {
        Self::Claimed { v: 1, allocation: allocation.to_owned(), digest: digest.to_owned(), at }
    }

    /// The revocation that a verdict begins with.
    pub fn revoked(verdict: Verdict) -> Self {
        Self::Revoked { v: 1, verdict }
    }

    /// Reads a Variable's items.
    pub fn from_items(items: &BTreeMap<String, String>) -> Result<Self, String> {
        let text = items.get(ITEM).ok_or_else(|| format!("the Variable has no item {ITEM:?}"))?;
        serde_json::from_str(text).map_err(|error| format!("claim: {error}"))
    }

    /// The Variable's items.
    pub fn to_items(&self) -> Result<BTreeMap<String, String>, serde_json::Error> {
        Ok(BTreeMap::from([(ITEM.to_owned(), serde_json::to_string(self)?)]))
    }

    /// The verdict of a revoked claim.
    pub fn verdict(&self) -> Option<&Verdict> {
        match self {
            Self::Claimed { .. } => None,
            Self::Revoked { verdict, .. } => Some(verdict),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn claims_survive_the_way_through_a_variable() {
        let at = DateTime::from_timestamp(1, 0).unwrap();
        let verdict = Verdict::new(Status::Killed, Some(Phase::Test), Reason::Killed, "killed by acme", at);
        for claim in [Claim::claimed("alloc", "sha256:00", at), Claim::revoked(verdict)] {
            assert_eq!(Claim::from_items(&claim.to_items().unwrap()).unwrap(), claim);
        }
        assert!(Claim::from_items(&BTreeMap::new()).is_err());
    }
}
