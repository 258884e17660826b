//! What a rendered job has to be, whatever the template says.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Component, Path};

use serde_json::Value;

use super::{GROUP, JobContext, Settings, TaskContext};

/// A rule that a job template breaks.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{at} {rule}")]
pub struct BrokenRule {
    /// Where in the job.
    pub at: String,
    /// What it must be.
    pub rule: Cow<'static, str>,
}

fn broken(at: &str, rule: impl Into<Cow<'static, str>>) -> BrokenRule {
    BrokenRule { at: at.to_owned(), rule: rule.into() }
}

fn must(holds: bool, at: &str, rule: &'static str) -> Result<(), BrokenRule> {
    if holds { Ok(()) } else { Err(broken(at, rule)) }
}

/// The drivers, and what the `Config` of their tasks may have: what gives a runner a right, a namespace or a file of the
/// node that it is not to have is in neither, nor what takes a log from Nomad.
const DRIVERS: [(&str, &[&str]); 2] = [
    (
        "docker",
        &[
            "args",
            "auth",
            "auth_soft_fail",
            "cap_drop",
            "command",
            "cpu_hard_limit",
            "cpuset_cpus",
            "dns_options",
            "dns_search_domains",
            "dns_servers",
            "entrypoint",
            "extra_hosts",
            "force_pull",
            "group_add",
            "image",
            "image_pull_timeout",
            "init",
            "labels",
            "load",
            "memory_hard_limit",
            "mounts",
            "network_mode",
            "oom_score_adj",
            "pids_limit",
            "readonly_rootfs",
            "security_opt",
            "storage_opt",
            "ulimit",
            "work_dir",
        ],
    ),
    (
        "raw_exec",
        &[
            "args",
            "cgroup_v1_override",
            "cgroup_v2_override",
            "command",
            "denied_envvars",
            "oom_score_adj",
            "work_dir",
        ],
    ),
];

/// Our own meta begins so.
const OWN_META: &str = "nb_";

const NO_VOLUMES: &str = "must not be there: what a task may reach of its node is in Config.mounts";

/// Holds a build's job against the rules, and against what the template was given for it.
pub(super) fn check(
    job: &Value,
    given: &JobContext<'_>,
    tasks: &[TaskContext<'_>],
    settings: &Settings,
) -> Result<(), BrokenRule> {
    let group = check_job(job, given)?;
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
    let disconnect = &group["Disconnect"];
    must(disconnect["Replace"] == false, "Disconnect.Replace", "must be false: a job runs once")?;
    must(
        disconnect["LostAfter"].as_u64() >= Some(given.lost_after_ns),
        "Disconnect.LostAfter",
        "must be job.lost_after_ns at least: the service says when a job whose node is away is lost",
    )?;
    let listed = group["Tasks"].as_array().map_or(&[][..], Vec::as_slice);
    must(
        listed.len() == tasks.len()
            && listed.iter().zip(tasks).all(|(task, given)| task["Name"] == given.name),
        "Tasks",
        "must be build, test (where there are tests), publish and finish, in this order",
    )?;
    listed.iter().zip(tasks).try_for_each(|(task, given)| check_task(task, given, settings))?;
    check_logs_fit(group, listed)
}

/// A sweep is of the same making, and has one task.
pub(super) fn check_sweep(
    job: &Value,
    given: &JobContext<'_>,
    task: &TaskContext<'_>,
    settings: &Settings,
) -> Result<(), BrokenRule> {
    let group = check_job(job, given)?;
    match group["Tasks"].as_array().map(Vec::as_slice) {
        Some([only]) if only["Name"] == task.name => check_task(only, task, settings),
        _ => Err(broken("Tasks", "must be the tasks that the template is given, and no others")),
    }
}

/// What a build and a sweep have in common; the one group of the job.
fn check_job<'a>(job: &'a Value, given: &JobContext<'_>) -> Result<&'a Value, BrokenRule> {
    must(job["ID"] == given.id, "ID", "must be the job's ID")?;
    must(job["Namespace"] == given.namespace, "Namespace", "must be the submission's namespace")?;
    must(job["Type"] == "batch", "Type", "must be batch: the job runs once")?;
    must(
        own_meta(job) == given.meta,
        "Meta",
        "must have all of job.meta, and nothing else that begins with nb_: the service knows its jobs by it",
    )?;
    for name in ["Periodic", "ParameterizedJob", "Multiregion"] {
        must(job[name].is_null(), name, "must not be there: a job is one submission")?;
    }
    let [group] = job["TaskGroups"].as_array().map_or(&[][..], Vec::as_slice) else {
        return Err(broken("TaskGroups", "must be one: the image never leaves its node untested"));
    };
    must(is_empty(&group["Volumes"]), "TaskGroups[0].Volumes", NO_VOLUMES)?;
    Ok(group)
}

fn own_meta(job: &Value) -> BTreeMap<String, String> {
    let meta = job["Meta"].as_object().into_iter().flatten();
    let own = meta.filter(|(name, _)| name.starts_with(OWN_META));
    own.filter_map(|(name, value)| Some((name.clone(), value.as_str()?.to_owned()))).collect()
}

fn check_task(task: &Value, given: &TaskContext<'_>, settings: &Settings) -> Result<(), BrokenRule> {
    let name = given.name;
    must(task["Lifecycle"]["Hook"].as_str() == given.hook, name, "must have the lifecycle hook of its name")?;
    must(task["Lifecycle"]["Sidecar"] != true, name, "must not be a sidecar")?;
    must(task["Leader"] != true, name, "must not be a leader: the other tasks would be killed at its end")?;
    must(task["RestartPolicy"].is_null(), name, "must have no restart policy of its own")?;
    must(
        task["KillTimeout"].as_u64() >= Some(given.kill_timeout_ns),
        &format!("{name}.KillTimeout"),
        "must be task.kill_timeout_ns at least: a runner stops what it started, and says how it ended",
    )?;
    must(
        matches!(task["KillSignal"].as_str(), None | Some("" | "SIGINT" | "SIGTERM")),
        &format!("{name}.KillSignal"),
        "must be SIGINT or SIGTERM: a runner stops at these",
    )?;
    must(
        task["LogConfig"]["Disabled"] != true,
        &format!("{name}.LogConfig.Disabled"),
        "must not be true: the job's log is the one that Nomad keeps",
    )?;
    must(
        task["Identity"]["File"] == true,
        name,
        "must have its identity in a file: the claim is made with it",
    )?;
    must(task["Identity"]["Env"] != true, name, "must not have its identity in the environment")?;
    let templates = task["Templates"].as_array().map_or(0, Vec::len);
    must(templates >= given.templates.len(), name, "must have the templates that it is given")?;
    let is_hidden = task["Vault"]["Env"] == false && task["Vault"]["DisableFile"] == true;
    must(
        given.vault.is_none() || is_hidden,
        name,
        "must have a Vault block with Env false and DisableFile true",
    )?;
    must(is_empty(&task["VolumeMounts"]), &format!("{name}.VolumeMounts"), NO_VOLUMES)?;
    check_config(task, given, settings)
}

fn check_config(task: &Value, given: &TaskContext<'_>, settings: &Settings) -> Result<(), BrokenRule> {
    let (name, config) = (given.name, &task["Config"]);
    let Some((driver, keys)) = DRIVERS.iter().find(|(driver, _)| task["Driver"] == *driver) else {
        let rule = "must be docker or raw_exec: of other drivers it is not known what a task can reach";
        return Err(broken(&format!("{name}.Driver"), rule));
    };
    must(
        !has_null(config),
        name,
        "must have no null in its Config: this template does not fit this runner (raw_exec takes a path or a download, docker an image)",
    )?;
    for key in config.as_object().into_iter().flat_map(|config| config.keys()) {
        if !keys.contains(&key.as_str()) {
            let rule = format!("must not be there: a Config of {driver} may have {}", keys.join(", "));
            return Err(broken(&format!("{name}.Config.{key}"), rule));
        }
    }
    must(
        *driver != "docker" || config["network_mode"] == "host",
        &format!("{name}.Config.network_mode"),
        "must be host: the engine pushes to the runner's loopback interface",
    )?;
    must(
        all(&config["security_opt"], |option| option.as_str().is_some_and(narrows)),
        &format!("{name}.Config.security_opt"),
        "must be SELinux labels (label=…) or no-new-privileges only",
    )?;
    must(
        all(&config["mounts"], |mount| may_mount(mount, given, settings)),
        &format!("{name}.Config.mounts"),
        "must be tmpfs, or bind the engine's socket, finish's archive_dir or what NOMAD_BUILD_ALLOW_MOUNTS lists",
    )
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Array(values) => values.is_empty(),
        Value::Object(map) => map.is_empty(),
        _ => false,
    }
}

/// Whether something holds for all of a list; what is not there is an empty one.
fn all(list: &Value, holds: impl Fn(&Value) -> bool) -> bool {
    list.is_null() || list.as_array().is_some_and(|list| list.iter().all(holds))
}

fn narrows(option: &str) -> bool {
    option.starts_with("label") || option.starts_with("no-new-privileges")
}

fn may_mount(mount: &Value, given: &TaskContext<'_>, settings: &Settings) -> bool {
    match (mount["type"].as_str(), mount["source"].as_str()) {
        (Some("tmpfs"), None) => true,
        (Some("bind"), Some(source)) => {
            let below = |path: &String| Path::new(source).starts_with(path);
            let climbs = Path::new(source).components().any(|part| part == Component::ParentDir);
            source == settings.engine_socket
                || Some(source) == given.archive_dir
                || !climbs && settings.mounts.iter().any(below)
        }
        _ => false,
    }
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
