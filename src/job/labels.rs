//! What is known of a job without its specification: kept in the Nomad job's meta, so that a list of jobs is enough, and
//! in the job's ledger, so that it outlives the job in Nomad.
//!
//! Invariant: Nomad expands `${…}` and `%{…}` in meta, so every value is percent-encoded down to characters that
//! mean nothing to it.

use std::collections::BTreeMap;

use chrono::{DateTime, SecondsFormat, Utc};
use serde::{Deserialize, Serialize};

use super::Limits;

const SAFE: &[u8] = b"._~:/@+=-";

/// A job's labels.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Labels {
    /// The owner.
    pub owner: String,
    /// The repository's address.
    pub repo_url: String,
    /// The ref asked for.
    pub git_ref: Option<String>,
    /// Registry and repository, `host[:port]/path`.
    pub image: String,
    /// The tags asked for, in order.
    pub tags: Vec<String>,
    /// Whether there is a test phase.
    pub has_tests: bool,
    /// When the submission was accepted.
    pub submitted_at: DateTime<Utc>,
    /// How long each phase may take, in seconds; none of a job that an older version submitted.
    #[serde(default)]
    pub timeouts: Option<Limits<u64>>,
}

impl Labels {
    /// The keys of the meta.
    pub const KEYS: [&'static str; 8] =
        ["nb_owner", "nb_repo", "nb_ref", "nb_image", "nb_tags", "nb_tests", "nb_submitted", "nb_timeouts"];

    /// The meta of the Nomad job.
    pub fn to_meta(&self) -> BTreeMap<String, String> {
        let tags: Vec<_> = self.tags.iter().map(|tag| encode(tag)).collect();
        let mut meta = BTreeMap::from([
            ("nb_owner".to_owned(), encode(&self.owner)),
            ("nb_repo".to_owned(), encode(&self.repo_url)),
            ("nb_image".to_owned(), encode(&self.image)),
            ("nb_tags".to_owned(), tags.join(",")),
            ("nb_tests".to_owned(), self.has_tests.to_string()),
            ("nb_submitted".to_owned(), self.submitted_at.to_rfc3339_opts(SecondsFormat::Millis, true)),
        ]);
        if let Some(git_ref) = &self.git_ref {
            meta.insert("nb_ref".to_owned(), encode(git_ref));
        }
        if let Some(Limits { build, test, publish }) = self.timeouts {
            meta.insert("nb_timeouts".to_owned(), format!("{build},{test},{publish}"));
        }
        meta
    }

    /// Reads the meta of a Nomad job; none where it is not one of this service's.
    pub fn from_meta(meta: &BTreeMap<String, String>) -> Option<Self> {
        let text = |name: &str| meta.get(name).and_then(|value| decode(value));
        let submitted_at = DateTime::parse_from_rfc3339(meta.get("nb_submitted")?).ok()?.with_timezone(&Utc);
        Some(Self {
            owner: text("nb_owner")?,
            repo_url: text("nb_repo")?,
            git_ref: text("nb_ref"),
            image: text("nb_image")?,
            tags: meta.get("nb_tags")?.split(',').map(decode).collect::<Option<_>>()?,
            has_tests: meta.get("nb_tests")? == "true",
            submitted_at,
            timeouts: meta.get("nb_timeouts").and_then(|text| read_timeouts(text)),
        })
    }
}

fn read_timeouts(text: &str) -> Option<Limits<u64>> {
    let mut seconds = text.split(',').map(|number| number.parse().ok());
    Some(Limits { build: seconds.next()??, test: seconds.next()??, publish: seconds.next()?? })
}

fn encode(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || SAFE.contains(&byte) {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

fn decode(text: &str) -> Option<String> {
    let mut bytes = text.bytes();
    let mut out = Vec::with_capacity(text.len());
    while let Some(byte) = bytes.next() {
        if byte != b'%' {
            out.push(byte);
            continue;
        }
        let digit =
            |byte: Option<u8>| char::from(byte?).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
        let high = digit(bytes.next())?;
        out.push(high * 16 + digit(bytes.next())?);
    }
    String::from_utf8(out).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn labels_survive_the_way_through_meta_and_give_nomad_nothing_to_expand(
            owner in "\\PC{0,30}", git_ref in proptest::option::of("\\PC{0,30}"), tag in "[a-z]{1,5}",
            seconds in proptest::option::of(any::<(u64, u64, u64)>()),
        ) {
            let submitted_at = DateTime::from_timestamp_millis(1_700_000_000_123).unwrap();
            let labels = Labels {
                owner, git_ref, repo_url: "https://e/${NOMAD_TOKEN}".to_owned(), image: "r:1/a".to_owned(),
                tags: vec![tag, "b,c".to_owned()], has_tests: true, submitted_at,
                timeouts: seconds.map(|(build, test, publish)| Limits { build, test, publish }),
            };
            let meta = labels.to_meta();
            prop_assert!(meta.keys().all(|key| Labels::KEYS.contains(&key.as_str())));
            let expandable = ['{', '}', '$', '"', '\\', '\n'];
            prop_assert!(meta.values().all(|value| !value.contains(expandable)));
            prop_assert_eq!(Labels::from_meta(&meta), Some(labels));
        }
    }

    #[test]
    fn meta_of_other_jobs_is_not_read() {
        assert_eq!(Labels::from_meta(&BTreeMap::new()), None);
        assert_eq!(decode("%4"), None);
        assert_eq!(decode("%zz"), None);
    }
}
