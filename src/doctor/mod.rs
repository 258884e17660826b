//! The doctor: what keeps the service, its Nomad or a node from working, said before a build finds out.
//!
//! Invariant: nothing is changed for longer than a check takes, and nothing that others made is touched.

mod cluster;
mod node;
mod steps;

use serde::Serialize;

pub use cluster::examine as examine_cluster;
pub use node::{Node, examine as examine_node};

/// How a check went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// As it should be.
    Good,
    /// It works, and somebody should know.
    Warning,
    /// It keeps builds from working.
    Bad,
    /// It could not be looked at.
    Unknown,
}

/// What a check found.
#[derive(Debug, Serialize)]
pub struct Finding {
    /// What was looked at.
    pub check: &'static str,
    /// How it is.
    pub verdict: Verdict,
    /// In words.
    pub message: String,
    /// What to do, where there is something to do.
    pub remedy: Option<String>,
}

/// The findings, in the order of the checks.
#[derive(Debug, Default, Serialize)]
#[serde(transparent)]
pub struct Report(pub Vec<Finding>);

impl Report {
    /// Whether anything keeps builds from working.
    pub fn is_bad(&self) -> bool {
        self.0.iter().any(|finding| finding.verdict == Verdict::Bad)
    }

    fn add(&mut self, check: &'static str, verdict: Verdict, message: String, remedy: Option<String>) {
        self.0.push(Finding { check, verdict, message, remedy });
    }

    fn good(&mut self, check: &'static str, message: impl Into<String>) {
        self.add(check, Verdict::Good, message.into(), None);
    }

    fn warn(&mut self, check: &'static str, message: impl Into<String>, remedy: impl Into<String>) {
        self.add(check, Verdict::Warning, message.into(), Some(remedy.into()));
    }

    fn bad(&mut self, check: &'static str, message: impl Into<String>, remedy: impl Into<String>) {
        self.add(check, Verdict::Bad, message.into(), Some(remedy.into()));
    }

    fn unknown(&mut self, check: &'static str, message: impl Into<String>, remedy: impl Into<String>) {
        self.add(check, Verdict::Unknown, message.into(), Some(remedy.into()));
    }
}
