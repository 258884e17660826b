//! Nomad's objects, as far as they are read. Unknown fields are passed over; null lists are empty.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize};

/// A value and the state of Nomad that it shows.
#[derive(Clone, Debug)]
pub struct Indexed<T> {
    /// The value.
    pub value: T,
    /// `X-Nomad-Index`; 0 where Nomad gave none.
    pub index: u64,
    /// Where the next page begins, if there is one.
    pub next: Option<String>,
}

/// Nomad, written in Go, sends null for an empty list or map.
fn null_as_default<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(from: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or_default())
}

/// A job, from `GET /v1/job/ID` or an event.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Job {
    /// The ID.
    #[serde(rename = "ID")]
    pub id: String,
    /// The namespace.
    pub namespace: String,
    /// Whether it was stopped.
    pub stop: bool,
    /// pending, running or dead.
    pub status: String,
    /// Meta.
    #[serde(deserialize_with = "null_as_default")]
    pub meta: BTreeMap<String, String>,
    /// The index of its registration.
    pub create_index: u64,
    /// The index of the last change.
    pub modify_index: u64,
}

/// A job in a list.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct JobStub {
    /// The ID.
    #[serde(rename = "ID")]
    pub id: String,
    /// The namespace.
    pub namespace: String,
    /// Whether it was stopped.
    pub stop: bool,
    /// Meta, where the list was asked for it.
    #[serde(deserialize_with = "null_as_default")]
    pub meta: BTreeMap<String, String>,
    /// The index of the last change.
    pub modify_index: u64,
}

/// An allocation, in full, in a list or in an event.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Allocation {
    /// The ID.
    #[serde(rename = "ID")]
    pub id: String,
    /// The job's ID.
    #[serde(rename = "JobID")]
    pub job_id: String,
    /// The namespace.
    pub namespace: String,
    /// The node's ID.
    #[serde(rename = "NodeID")]
    pub node_id: String,
    /// The node's name.
    pub node_name: String,
    /// pending, running, complete, failed, lost or unknown.
    pub client_status: String,
    /// run, stop or evict.
    pub desired_status: String,
    /// The tasks; empty where a list was asked without them.
    #[serde(deserialize_with = "null_as_default")]
    pub task_states: BTreeMap<String, TaskState>,
    /// The index of its creation.
    pub create_index: u64,
    /// The index of the last change.
    pub modify_index: u64,
    /// When it was last changed, in nanoseconds of Unix time, by the servers' clock.
    pub modify_time: i64,
}

/// One task of an allocation.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct TaskState {
    /// pending, running or dead.
    pub state: String,
    /// Whether it failed.
    pub failed: bool,
    /// When it started; none where it never did.
    pub started_at: Option<chrono::DateTime<chrono::Utc>>,
    /// When it ended; none while it has not.
    pub finished_at: Option<chrono::DateTime<chrono::Utc>>,
    /// What happened to it; the last ten.
    #[serde(deserialize_with = "null_as_default")]
    pub events: Vec<TaskEvent>,
}

/// Something that happened to a task.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct TaskEvent {
    /// "Started", "Driver Failure", "Setup Failure", "Terminated", ...
    #[serde(rename = "Type")]
    pub kind: String,
    /// Nomad's text.
    pub display_message: String,
    /// Whether it failed the task.
    pub fails_task: bool,
    /// When it happened, in nanoseconds of Unix time.
    pub time: i64,
}

/// An evaluation, as far as it says why a job waits.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Evaluation {
    /// The job's ID.
    #[serde(rename = "JobID")]
    pub job_id: String,
    /// The namespace.
    pub namespace: String,
    /// blocked, pending, complete, failed or canceled.
    pub status: String,
    /// For each task group, why it could not be placed.
    #[serde(rename = "FailedTGAllocs", deserialize_with = "null_as_default")]
    pub failed_groups: BTreeMap<String, PlacementFailure>,
    /// The index of the last change.
    pub modify_index: u64,
}

/// Why a task group could not be placed.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct PlacementFailure {
    /// How many nodes were looked at.
    pub nodes_evaluated: u64,
    /// How many nodes each constraint ruled out.
    #[serde(deserialize_with = "null_as_default")]
    pub constraint_filtered: BTreeMap<String, u64>,
    /// How many nodes lack each resource.
    #[serde(deserialize_with = "null_as_default")]
    pub dimension_exhausted: BTreeMap<String, u64>,
}

/// A Variable.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Variable {
    /// The namespace.
    pub namespace: String,
    /// The path.
    pub path: String,
    /// What it holds.
    pub items: BTreeMap<String, String>,
    /// The index of the last change.
    pub modify_index: u64,
}

/// A Variable in a list: never its items.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct VariableStub {
    /// The namespace.
    pub namespace: String,
    /// The path.
    pub path: String,
    /// The index of the last change.
    pub modify_index: u64,
    /// When it was last changed, in nanoseconds of Unix time.
    pub modify_time: i64,
}
