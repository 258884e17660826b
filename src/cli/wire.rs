//! What the service says, as far as the command line reads it.
//!
//! Invariant: fields and values that it does not know are passed over, so that it may be older than the service.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Deserializer};
use serde_json::Value;
use serde_json::value::RawValue;

/// Around every JSON answer.
#[derive(Debug, Deserialize)]
pub(super) struct Envelope {
    pub(super) data: Option<Box<RawValue>>,
    pub(super) error: Option<Refusal>,
}

/// Why the service did not do it.
#[derive(Debug, Deserialize, thiserror::Error)]
#[error("{message} ({code})")]
pub(super) struct Refusal {
    pub(super) code: String,
    #[serde(default)]
    message: String,
    #[serde(default, deserialize_with = "or_default")]
    pub(super) details: Vec<Detail>,
}

/// What is wrong with one field.
#[derive(Debug, Deserialize)]
pub(super) struct Detail {
    pub(super) field: String,
    pub(super) message: String,
}

/// The answer to a submission.
#[derive(Debug, Deserialize)]
pub(super) struct Submitted {
    pub(super) job_id: String,
}

/// The answer to a kill or a clean-up.
#[derive(Debug, Deserialize)]
pub(super) struct Done {
    pub(super) success: bool,
    pub(super) reason: Option<String>,
}

/// A job's log, by phase.
#[derive(Debug, Deserialize)]
pub(super) struct Logs {
    pub(super) build: Option<String>,
    pub(super) test: Option<String>,
    pub(super) publish: Option<String>,
}

/// Where a job stands.
#[derive(Debug, Default, Deserialize)]
#[expect(clippy::struct_field_names, reason = "the names are the service's")]
pub(super) struct Status {
    pub(super) job_id: String,
    pub(super) status: String,
    #[serde(default, deserialize_with = "or_default")]
    metrics: BTreeMap<String, Value>,
    #[serde(default, deserialize_with = "or_default")]
    phase_timestamps: BTreeMap<String, Option<String>>,
    #[serde(default, deserialize_with = "or_default")]
    pub(super) git: Git,
    #[serde(default, deserialize_with = "or_default")]
    pub(super) image: Image,
    pub(super) failure: Option<Failure>,
    pub(super) placement: Option<String>,
    #[serde(default, deserialize_with = "or_default")]
    pub(super) nomad: Nomad,
}

/// Some of the jobs there are.
#[derive(Debug, Deserialize)]
pub(super) struct Listed {
    pub(super) jobs: Vec<ListedJob>,
    pub(super) next: Option<String>,
}

/// A job, in few words.
#[derive(Debug, Deserialize)]
pub(super) struct ListedJob {
    pub(super) job_id: String,
    pub(super) status: String,
    #[serde(default)]
    pub(super) owner: String,
    #[serde(default)]
    pub(super) repo_url: String,
    pub(super) git_ref: Option<String>,
    pub(super) reason: Option<String>,
    pub(super) job_start: Option<String>,
}

/// What is built.
#[derive(Debug, Default, Deserialize)]
pub(super) struct Git {
    #[serde(rename = "ref")]
    pub(super) reference: Option<String>,
    pub(super) commit: Option<String>,
}

/// What came of it.
#[derive(Debug, Default, Deserialize)]
pub(super) struct Image {
    pub(super) digest: Option<String>,
    #[serde(default, deserialize_with = "or_default")]
    pub(super) references: Vec<Reference>,
}

/// One name of the image.
#[derive(Debug, Deserialize)]
pub(super) struct Reference {
    pub(super) reference: String,
    pub(super) published: Option<String>,
}

/// Why a job did not succeed.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Failure {
    pub(super) phase: Option<String>,
    pub(super) reason: Option<String>,
    pub(super) exit_code: Option<i64>,
    pub(super) message: Option<String>,
}

/// Where it runs.
#[derive(Debug, Default, Deserialize)]
pub(super) struct Nomad {
    pub(super) namespace: Option<String>,
    pub(super) allocation: Option<String>,
    pub(super) node: Option<String>,
}

impl Status {
    /// A status of which no more is known.
    pub(super) fn told(job: &str, status: String, failure: Option<Failure>) -> Self {
        Self { job_id: job.to_owned(), status, failure, ..Self::default() }
    }

    /// The moment of that name, `build_start` for example.
    pub(super) fn time(&self, name: &str) -> Option<DateTime<Utc>> {
        let text = self.phase_timestamps.get(name)?.as_deref()?;
        DateTime::parse_from_rfc3339(text).ok().map(|time| time.to_utc())
    }

    /// How long the phase took, where it has ended.
    pub(super) fn seconds(&self, phase: &str) -> Option<f64> {
        self.metrics.get(&format!("{phase}_duration_seconds"))?.as_f64()
    }

    /// Whether this status never changes again.
    pub(super) fn is_final(&self) -> bool {
        matches!(self.status.as_str(), "SUCCEEDED" | "FAILED" | "KILLED" | "LOST")
    }
}

/// One message of a followed log.
#[derive(Debug, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
pub(super) enum Message {
    /// The job has come to another status.
    Status { status: String, phase: Option<String> },
    /// A line, or a part of one.
    Log(LogLine),
    /// The connection lives.
    Heartbeat {},
    /// Lines are missing, and why.
    Gap { phase: Option<String>, message: Option<String>, cursor: Option<String> },
    /// Nothing comes after this.
    End { status: String, failure: Option<Failure> },
    /// A type of tomorrow.
    #[serde(other)]
    Unknown,
}

impl Message {
    /// Where the log goes on behind this message, where it says.
    pub(super) fn cursor(&self) -> Option<&str> {
        match self {
            Self::Log(LogLine { cursor, .. }) | Self::Gap { cursor, .. } => cursor.as_deref(),
            Self::Status { .. } | Self::Heartbeat {} | Self::End { .. } | Self::Unknown => None,
        }
    }
}

/// A line of a log, or a part of one.
#[derive(Debug, Deserialize)]
pub(super) struct LogLine {
    pub(super) phase: String,
    #[serde(default)]
    pub(super) stream: String,
    pub(super) line: String,
    pub(super) cursor: Option<String>,
    /// The line goes on in the next message of the same phase and stream.
    #[serde(default)]
    pub(super) partial: bool,
}

fn or_default<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(input: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(input)?.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_of_tomorrow_and_one_without_anything_optional_are_both_read() {
        let status: Status = serde_json::from_str(
            r#"{"job_id":"nb-1","status":"DREAMING","dream":{},"metrics":null,"git":null,"image":{"references":null},
                "phase_timestamps":{"build_start":"not a time","nap_start":null}}"#,
        )
        .unwrap();
        assert!(!status.is_final());
        assert_eq!(status.time("build_start"), None);
        assert_eq!(status.seconds("build"), None);
    }

    #[test]
    fn a_message_of_tomorrow_is_read_as_unknown() {
        let message: Message = serde_json::from_str(r#"{"type":"weather","sky":"blue"}"#).unwrap();
        assert!(matches!(message, Message::Unknown));
    }
}
