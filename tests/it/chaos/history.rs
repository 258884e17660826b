//! What was asked, done and seen of each job.

use serde::Serialize;
use serde_json::Value;

/// What a job is made to do by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(super) enum Plan {
    Succeeds,
    FailsItsTest,
    FailsItsBuild,
    TakesLong,
}

/// What somebody does to a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(super) enum Harm {
    /// Through the API.
    Kill,
    /// `nomad job stop`.
    Stop,
    /// `nomad job stop -purge`.
    Purge,
    /// `nomad job stop`, and then registers it again as it is, as `nomad job start` does.
    StopAndStart,
    /// Through the API, and then `nomad job start`.
    KillAndStart,
    /// `nomad alloc restart`.
    Restart,
    /// SIGKILL to the runner of the phase that runs.
    Crash,
    /// Its node is rebooted.
    Reboot,
    /// Its node's agent reaches no server, and is reached again.
    CutOff,
}

/// A status that was read.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Seen {
    /// Since the start, in milliseconds.
    pub(super) at: u128,
    /// Which replica told it, and how often that had been started.
    pub(super) by: (usize, usize),
    pub(super) status: Value,
}

/// Everything of one job.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Job {
    pub(super) id: String,
    /// Every ID that the submission's key was answered with.
    pub(super) ids: Vec<String>,
    pub(super) plan: Plan,
    /// The tag that no other job asks for.
    pub(super) tag: String,
    pub(super) harms: Vec<(u128, Harm, String)>,
    /// Whether its node was rebooted meanwhile, which runs a phase again.
    pub(super) rebooted: bool,
    /// Whether its node was cut off meanwhile: Nomad replaces what it takes for pending there.
    pub(super) away: bool,
    /// What kills were answered.
    pub(super) kills: Vec<bool>,
    pub(super) seen: Vec<Seen>,
    /// Replicas that did not know it.
    pub(super) unknown: Vec<(u128, usize)>,
    /// The messages of a reader that resumed wherever it was cut off; none where nobody read.
    pub(super) read: Option<Vec<Value>>,
    /// In the end, by every replica: status and log.
    pub(super) told: Vec<(Value, Value)>,
    /// In the end, what its runners said of their own end, where one of them died.
    pub(super) died: Vec<String>,
    /// In the end, what the registry serves under the job's own tag: the digest, and the job that the image says it is of.
    pub(super) served: Option<(String, String)>,
}

impl Job {
    pub(super) fn new(id: &str, plan: Plan, tag: &str) -> Self {
        Self {
            id: id.to_owned(),
            ids: vec![id.to_owned()],
            plan,
            tag: tag.to_owned(),
            harms: Vec::new(),
            rebooted: false,
            away: false,
            kills: Vec::new(),
            seen: Vec::new(),
            unknown: Vec::new(),
            read: None,
            told: Vec::new(),
            died: Vec::new(),
            served: None,
        }
    }
}

/// A whole run.
#[derive(Clone, Debug, Serialize)]
pub(super) struct History {
    pub(super) jobs: Vec<Job>,
    /// What was made to fail, and when.
    pub(super) troubles: Vec<(u128, String)>,
    /// In the end, what the registry serves under the tag that every job asks for.
    pub(super) shared: Option<(String, String)>,
    /// Allocations that Nomad still runs, minutes after every job has ended.
    pub(super) running: Vec<serde_json::Value>,
}
