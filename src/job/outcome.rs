//! What a phase says of itself: written by the runner, read by every replica.
//!
//! Invariant: this is the only ground for calling a job a success; Nomad's own task states never are.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use super::{Phase, Reason};

/// The longest message kept, in bytes: a job's outcomes stay far below the 64 KiB of a Nomad Variable.
const MESSAGE: usize = 1024;

/// Where a phase stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Begun.
    Running,
    /// Done.
    Succeeded,
    /// Ended otherwise; the reason says how.
    Failed,
}

/// Whether a tag serves the job's digest, as read from the registry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Published {
    /// The registry was read, and it does.
    Yes,
    /// The registry was read, and it does not; or nothing was sent.
    No,
    /// The registry could not be read.
    Unknown,
}

/// One phase's outcome, versioned.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// The format's version.
    pub v: u32,
    /// The allocation whose runner wrote it.
    pub allocation: String,
    /// When the phase's work began, by the node's clock.
    pub started_at: DateTime<Utc>,
    /// When it ended; none while it runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_at: Option<DateTime<Utc>>,
    /// Where it stands.
    pub state: State,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<Reason>,
    /// The exit code of what failed, if it had one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i64>,
    /// What failed, for a person.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// The ref that was checked out (build).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub git_ref: Option<String>,
    /// The commit that was checked out (build).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub commit: Option<String>,
    /// The engine's ID of the image (build).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_id: Option<String>,
    /// The manifest's digest (publish).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
    /// For each tag, in the order asked for, whether it serves the digest (publish).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub published: Vec<Published>,
    /// How many lines the phase's log has; none where the runner could not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lines: Option<u64>,
}

impl Outcome {
    /// The outcome of a phase that begins.
    pub fn begun(allocation: &str, at: DateTime<Utc>) -> Self {
        Self {
            v: 1,
            allocation: allocation.to_owned(),
            started_at: at,
            ended_at: None,
            state: State::Running,
            reason: None,
            exit_code: None,
            message: None,
            git_ref: None,
            commit: None,
            image_id: None,
            digest: None,
            published: Vec::new(),
            lines: None,
        }
    }

    /// The same phase, done.
    #[must_use]
    pub fn succeeded(mut self, at: DateTime<Utc>) -> Self {
        self.state = State::Succeeded;
        self.ended_at = Some(at);
        self
    }

    /// The same phase, failed.
    #[must_use]
    pub fn failed(
        mut self,
        at: DateTime<Utc>,
        reason: Reason,
        exit_code: Option<i64>,
        message: &str,
    ) -> Self {
        self.state = State::Failed;
        self.ended_at = Some(at);
        self.reason = Some(reason);
        self.exit_code = exit_code;
        self.message = Some(shorten(message));
        self
    }

    /// Whether the phase is over.
    pub fn is_over(&self) -> bool {
        self.state != State::Running
    }
}

/// Cuts a message at a character's edge, and says so.
pub(super) fn shorten(message: &str) -> String {
    if message.len() <= MESSAGE {
        return message.to_owned();
    }
    let mut end = MESSAGE;
    while !message.is_char_boundary(end) {
        end -= 1;
    }
    format!("{} [cut]", &message[..end])
}

/// The outcomes of a job's phases: one Nomad Variable with an item for each phase that has begun.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    outcomes: BTreeMap<Phase, Outcome>,
}

impl Progress {
    /// Reads a Variable's items; an item that is not an outcome is an error that names it.
    pub fn from_items(items: &BTreeMap<String, String>) -> Result<Self, String> {
        let mut progress = Self::default();
        for (name, text) in items {
            let Ok(phase) = name.parse() else { continue };
            let outcome =
                serde_json::from_str(text).map_err(|error| format!("outcome of {name}: {error}"))?;
            progress.outcomes.insert(phase, outcome);
        }
        Ok(progress)
    }

    /// The Variable's items.
    pub fn to_items(&self) -> Result<BTreeMap<String, String>, serde_json::Error> {
        self.outcomes
            .iter()
            .map(|(phase, outcome)| Ok((phase.to_string(), serde_json::to_string(outcome)?)))
            .collect()
    }

    /// The outcome of one phase.
    pub fn of(&self, phase: Phase) -> Option<&Outcome> {
        self.outcomes.get(&phase)
    }

    /// Sets the outcome of one phase, unless that phase is over already: what is over stays as it is, and what one
    /// outcome told of the source, the next one of that phase does not take back.
    ///
    /// Returns whether anything changed.
    pub fn set(&mut self, phase: Phase, mut outcome: Outcome) -> bool {
        if let Some(known) = self.of(phase) {
            outcome.commit = outcome.commit.or_else(|| known.commit.clone());
            outcome.git_ref = outcome.git_ref.or_else(|| known.git_ref.clone());
            // Of two allocations of a job, the one that was replaced is told to stop. That ends nothing of what the other one does.
            let is_anothers_stop =
                outcome.reason == Some(Reason::Killed) && outcome.allocation != known.allocation;
            if known.is_over() || *known == outcome || is_anothers_stop {
                return false;
            }
        }
        self.outcomes.insert(phase, outcome);
        true
    }

    /// Takes over what another state knew and this one does not: phases, that they were over, and how they first ended.
    /// Returns whether there was any.
    pub(super) fn keep(&mut self, earlier: &Self) -> bool {
        let mut kept = false;
        for (&phase, known) in &earlier.outcomes {
            let newer = self.of(phase);
            let was_first = |newer: &Outcome| !newer.is_over() || known.ended_at < newer.ended_at;
            if newer.is_none_or(|newer| known.is_over() && was_first(newer)) {
                self.outcomes.insert(phase, known.clone());
                kept = true;
            }
        }
        kept
    }

    /// The last phase that has begun.
    pub fn latest(&self) -> Option<(Phase, &Outcome)> {
        self.outcomes.iter().next_back().map(|(phase, outcome)| (*phase, outcome))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: i64) -> DateTime<Utc> {
        DateTime::from_timestamp(seconds, 0).unwrap()
    }

    #[test]
    fn outcomes_survive_the_way_through_a_variable() {
        let mut progress = Progress::default();
        progress.set(Phase::Build, Outcome::begun("a", at(1)).succeeded(at(2)));
        progress
            .set(Phase::Test, Outcome::begun("a", at(3)).failed(at(4), Reason::TestFailed, Some(7), "no"));
        assert_eq!(Progress::from_items(&progress.to_items().unwrap()).unwrap(), progress);
        assert_eq!(progress.latest().unwrap().0, Phase::Test);
    }

    #[test]
    fn a_phase_that_is_over_stays_as_it_is() {
        let mut progress = Progress::default();
        assert!(
            progress
                .set(Phase::Build, Outcome::begun("a", at(1)).failed(at(2), Reason::BuildFailed, None, "x"))
        );
        assert!(!progress.set(Phase::Build, Outcome::begun("b", at(3)).succeeded(at(4))));
        assert_eq!(progress.of(Phase::Build).unwrap().allocation, "a");
    }

    #[test]
    fn a_commit_that_was_told_is_not_taken_back() {
        let begun = Outcome::begun("a", at(1));
        let mut progress = Progress::default();
        assert!(progress.set(Phase::Build, Outcome { commit: Some("c".to_owned()), ..begun.clone() }));
        // The start's own record, late.
        assert!(!progress.set(Phase::Build, begun.clone()));
        assert!(progress.set(Phase::Build, begun.failed(at(2), Reason::Killed, None, "told to stop")));
        assert_eq!(progress.of(Phase::Build).unwrap().commit.as_deref(), Some("c"));
    }

    #[test]
    fn a_field_of_a_newer_version_is_passed_over() {
        let text =
            r#"{"v":2,"allocation":"a","started_at":"2026-01-01T00:00:00Z","state":"running","new":1}"#;
        let items =
            BTreeMap::from([("build".to_owned(), text.to_owned()), ("later".to_owned(), "x".to_owned())]);
        assert!(Progress::from_items(&items).unwrap().of(Phase::Build).is_some());
    }

    #[test]
    fn a_long_message_is_cut_at_a_character() {
        let message = "\u{e4}".repeat(2000);
        assert!(shorten(&message).len() <= MESSAGE + 6);
    }
}
