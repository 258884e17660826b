//! What a rendered job has to be, whatever the template says.

use serde_json::Value;

use crate::job::{JobId, Task};

use super::GROUP;

/// A rule that a job template breaks.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{at} {rule}")]
pub struct BrokenRule {
    /// Where in the job.
    pub at: String,
    /// What it must be.
    pub rule: &'static str,
}

fn broken(at: &str, rule: &'static str) -> BrokenRule {
    BrokenRule { at: at.to_owned(), rule }
}

fn must(holds: bool, at: &str, rule: &'static str) -> Result<(), BrokenRule> {
    if holds { Ok(()) } else { Err(broken(at, rule)) }
}

pub(super) fn check(job: &Value, id: &JobId, namespace: &str, tasks: &[Task]) -> Result<(), BrokenRule> {
    must(job["ID"] == id.as_str(), "ID", "must be the job's ID")?;
    must(job["Namespace"] == namespace, "Namespace", "must be the submission's namespace")?;
    must(job["Type"] == "batch", "Type", "must be batch: the job runs once")?;
    for name in ["Periodic", "ParameterizedJob", "Multiregion"] {
        must(job[name].is_null(), name, "must not be there: a job is one submission")?;
    }
    let groups = job["TaskGroups"].as_array().map_or(&[][..], Vec::as_slice);
    let [group] = groups else {
        return Err(broken("TaskGroups", "must be one: the image never leaves its node untested"));
    };
    must(
        group["Name"] == GROUP,
        "TaskGroups[0].Name",
        "must be \"job\": the tasks' Variables are found by it",
    )?;
    must(group["Count"] == 1, "TaskGroups[0].Count", "must be 1")?;
    must(group["RestartPolicy"]["Attempts"] == 0, "RestartPolicy.Attempts", "must be 0: a phase runs once")?;
    must(
        group["ReschedulePolicy"]["Attempts"] == 0,
        "ReschedulePolicy.Attempts",
        "must be 0: a job runs once",
    )?;
    must(group["Disconnect"]["Replace"] == false, "Disconnect.Replace", "must be false: a job runs once")?;
    let listed = group["Tasks"].as_array().map_or(&[][..], Vec::as_slice);
    let names: Vec<_> = listed.iter().map(|task| task["Name"].as_str().unwrap_or_default()).collect();
    let wanted: Vec<_> = tasks.iter().map(|task| task.as_str()).collect();
    must(
        names == wanted,
        "Tasks",
        "must be build, test (where there are tests), publish and finish, in this order",
    )?;
    listed.iter().zip(&wanted).try_for_each(|(task, name)| check_task(task, name))?;
    check_logs_fit(group, listed)
}

/// What Nomad is to write for a task is there, and the task's token for Vault is nowhere where it could be read.
pub(super) fn check_given(
    job: &Value,
    place: usize,
    templates: usize,
    vault: bool,
) -> Result<(), BrokenRule> {
    let task = &job["TaskGroups"][0]["Tasks"][place];
    let name = task["Name"].as_str().unwrap_or_default();
    let has = task["Templates"].as_array().map_or(0, Vec::len);
    must(has >= templates, name, "must have the templates that it is given")?;
    let is_hidden = task["Vault"]["Env"] == false && task["Vault"]["DisableFile"] == true;
    must(!vault || is_hidden, name, "must have a Vault block with Env false and DisableFile true")
}

/// A sweep is of the same making, and has one task.
pub(super) fn check_sweep(job: &Value) -> Result<(), BrokenRule> {
    let groups = job["TaskGroups"].as_array().map_or(&[][..], Vec::as_slice);
    let tasks = groups.first().and_then(|group| group["Tasks"].as_array()).map_or(&[][..], Vec::as_slice);
    let is_sweep = groups.len() == 1 && tasks.len() == 1 && tasks[0]["Name"] == "sweep";
    must(is_sweep, "Tasks", "must be the tasks that the template is given, and no others")
}

fn check_task(task: &Value, name: &str) -> Result<(), BrokenRule> {
    let hook = match name {
        "build" => Value::from("prestart"),
        "finish" => Value::from("poststop"),
        _ => Value::Null,
    };
    must(task["Lifecycle"]["Hook"] == hook, name, "must have the lifecycle hook of its name")?;
    must(task["Lifecycle"]["Sidecar"] != true, name, "must not be a sidecar")?;
    must(task["RestartPolicy"].is_null(), name, "must have no restart policy of its own")?;
    must(
        task["Identity"]["File"] == true,
        name,
        "must have its identity in a file: the claim is made with it",
    )?;
    must(task["Identity"]["Env"] != true, name, "must not have its identity in the environment")?;
    let config = &task["Config"];
    must(
        !has_null(config),
        name,
        "must have no null in its Config: this template does not fit this runner (raw_exec takes a path or a download, docker an image)",
    )?;
    for right in ["privileged", "cap_add", "devices", "pid_mode", "ipc_mode", "userns_mode"] {
        let has = !matches!(&config[right], Value::Null | Value::Bool(false));
        must(
            !has,
            name,
            "must not be privileged: no privileged, cap_add, devices, pid_mode, ipc_mode or userns_mode",
        )?;
    }
    Ok(())
}

fn has_null(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Array(values) => values.iter().any(has_null),
        Value::Object(map) => map.values().any(has_null),
        _ => false,
    }
}

/// Nomad refuses a job whose logs may take more than its disk; here the operator is told by name.
fn check_logs_fit(group: &Value, tasks: &[Value]) -> Result<(), BrokenRule> {
    let number = |value: &Value| value.as_u64().unwrap_or(0);
    let logs: u64 = tasks
        .iter()
        .map(|t| number(&t["LogConfig"]["MaxFiles"]) * number(&t["LogConfig"]["MaxFileSizeMB"]))
        .sum();
    must(
        logs > 0 && logs < number(&group["EphemeralDisk"]["SizeMB"]),
        "EphemeralDisk.SizeMB",
        "must be larger than all tasks' logs together",
    )
}
