//! From a specification to a Nomad job: the operator's template, filled in and held against our own rules.
//!
//! Invariant: pure. Nothing a user sent stands in the job but inside the payload, which is base64, and in the meta,
//! which is percent-encoded.

mod rules;

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use minijinja::value::Serde;
use minijinja::{Environment, UndefinedBehavior, context};
use serde::Serialize;
use serde_json::Value;

use crate::job::{JobId, Payload, Phase, Task};

pub use rules::BrokenRule;

/// Where the service serves the runner for a node's platform: Nomad fills in the node's attributes.
const ARTIFACT: &str = "/runner/${attr.kernel.name}/${attr.cpu.arch}/nomad-build";

/// Where it serves the checksums of all platforms.
const CHECKSUMS: &str = "/runner/${attr.kernel.name}/${attr.cpu.arch}/sha256sums";

/// The name of the one task group.
pub const GROUP: &str = "job";

/// The job templates that come with the program, by name.
pub const TEMPLATES: [(&str, &str); 2] = [
    ("raw_exec", include_str!("../../templates/raw_exec.json")),
    ("docker", include_str!("../../templates/docker.json")),
];

/// How the runner gets onto a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Runner {
    /// It is there, at this path (raw_exec).
    Path(String),
    /// Nomad downloads it from the service (raw_exec).
    Artifact {
        /// Where nodes reach the service, without a slash at the end.
        base: String,
    },
    /// It is an image (docker).
    Image(String),
}

/// What the operator decides about every job.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The template's text.
    pub template: String,
    /// How the runner gets onto a node.
    pub runner: Runner,
    /// The engine's socket on a node.
    pub engine_socket: String,
    /// Nomad's datacenters; `*` is all.
    pub datacenters: Vec<String>,
    /// Nomad's node pool.
    pub node_pool: String,
    /// What the checkout and the runner's files may take, in MiB, beside the logs.
    pub disk_mb: u32,
}

/// Why a job could not be rendered. It is the operator's to mend, never the user's.
#[derive(Debug, thiserror::Error)]
pub enum RenderError {
    /// The template is wrong.
    #[error("the job template cannot be filled in")]
    Template(#[from] minijinja::Error),
    /// The template's result is not JSON.
    #[error("the job template does not give JSON")]
    Json(#[from] serde_json::Error),
    /// The job breaks a rule.
    #[error("the job template breaks a rule")]
    Rule(#[from] BrokenRule),
}

/// One task, as the template sees it.
#[derive(Serialize)]
struct TaskContext<'a> {
    name: &'static str,
    hook: Option<&'static str>,
    payload: Option<&'a str>,
    env: BTreeMap<&'a str, &'a str>,
    log_files: u32,
    log_file_mb: u32,
    kill_timeout_ns: u64,
    cpu: u32,
    memory_mb: u32,
}

/// A log of 100 MB is kept for each phase, in files that Nomad rotates.
const LOG_FILES: u32 = 10;
const LOG_FILE_MB: u32 = 10;

/// How long a runner has to stop what it started. A client caps it, at 30 s where nothing else is configured.
const KILL_TIMEOUT_NS: u64 = 25_000_000_000;

/// A node that comes back within this time finds its job as it was.
const LOST_AFTER_NS: u64 = 30 * 24 * 3600 * 1_000_000_000;

fn task<'a>(task: Task, payload: &'a Payload, encoded: &'a str, settings: &'a Settings) -> TaskContext<'a> {
    let env = BTreeMap::from([("NOMAD_BUILD_ENGINE_SOCKET", settings.engine_socket.as_str())]);
    let (hook, resources) = match task {
        Task::Phase(phase) => {
            let hook = (phase == Phase::Build).then_some("prestart");
            let resources = payload.spec.resources.of(phase);
            (hook, (resources.cpu, resources.memory_mb))
        }
        Task::Finish => (Some("poststop"), (50, 64)),
    };
    TaskContext {
        name: task.as_str(),
        hook,
        // The prestart task puts it where every later task finds it.
        payload: (task == Task::Phase(Phase::Build)).then_some(encoded),
        env,
        log_files: if task == Task::Finish { 1 } else { LOG_FILES },
        log_file_mb: LOG_FILE_MB,
        kill_timeout_ns: KILL_TIMEOUT_NS,
        cpu: resources.0,
        memory_mb: resources.1,
    }
}

/// Fills in the template for a job, and checks the result.
pub fn render(
    payload: &Payload,
    namespace: &str,
    submitted_at: DateTime<Utc>,
    settings: &Settings,
) -> Result<Value, RenderError> {
    let encoded = payload.encode()?;
    let tasks = payload.spec.tasks();
    let logs = LOG_FILES * LOG_FILE_MB * u32::try_from(tasks.len()).unwrap_or(4);
    let contexts: Vec<_> = tasks.iter().map(|&each| task(each, payload, &encoded, settings)).collect();
    let (path, image, artifact) = match &settings.runner {
        Runner::Path(path) => (Some(path), None, None),
        Runner::Image(image) => (None, Some(image), None),
        Runner::Artifact { base } => {
            let url = format!("{base}{ARTIFACT}");
            (None, None, Some(context! { url, checksum => format!("file:{base}{CHECKSUMS}") }))
        }
    };
    let mut environment = Environment::new();
    environment.set_undefined_behavior(UndefinedBehavior::Strict);
    environment.set_fuel(Some(1_000_000));
    environment.add_template("job.json", &settings.template)?;
    let text = environment.get_template("job.json")?.render(context! {
        job => context! {
            id => payload.job.as_str(),
            namespace,
            priority => payload.spec.priority,
            datacenters => settings.datacenters.clone(),
            node_pool => settings.node_pool.as_str(),
            meta => minijinja::Value::from(Serde(payload.spec.labels_for_lists().to_meta(submitted_at))),
            disk_mb => settings.disk_mb + logs,
            lost_after_ns => LOST_AFTER_NS,
        },
        runner => context! { path, image, artifact, engine_socket => settings.engine_socket.as_str() },
        tasks => minijinja::Value::from(Serde(&contexts)),
    })?;
    let job = serde_json::from_str(&text)?;
    rules::check(&job, &payload.job, namespace, &tasks)?;
    Ok(job)
}

/// The item of a sweep's meta that names its nodes.
const SWEPT_NODES: &str = "nb_nodes";

/// The nodes that a sweep is for, from its meta.
pub fn swept_nodes(meta: &BTreeMap<String, String>) -> impl Iterator<Item = &str> {
    meta.get(SWEPT_NODES).into_iter().flat_map(|nodes| nodes.split(',')).filter(|node| !node.is_empty())
}

/// The job that removes what a job left on its nodes: a group for each node, or one that is placed nowhere.
///
/// It stays in Nomad until it is collected, which is how a repeated cleanup is known to be one.
pub fn render_sweep(
    job: &JobId,
    sweep_id: &str,
    namespace: &str,
    nodes: &[&str],
    settings: &Settings,
) -> Value {
    let env = serde_json::json!({"NOMAD_BUILD_ENGINE_SOCKET": settings.engine_socket, "NOMAD_BUILD_SWEEP": job.as_str()});
    let args = serde_json::json!(["phase", "sweep"]);
    let (driver, config, artifacts) = match &settings.runner {
        Runner::Path(path) => ("raw_exec", serde_json::json!({"command": path, "args": args}), Value::Null),
        Runner::Artifact { base } => (
            "raw_exec",
            serde_json::json!({"command": "local/nomad-build", "args": args}),
            serde_json::json!([{
                "GetterSource": format!("{base}{ARTIFACT}"), "GetterMode": "file", "RelativeDest": "local/nomad-build",
                "GetterOptions": {"checksum": format!("file:{base}{CHECKSUMS}")},
            }]),
        ),
        Runner::Image(image) => (
            "docker",
            serde_json::json!({
                "image": image, "args": args, "network_mode": "host",
                "mounts": [{"type": "bind", "source": settings.engine_socket, "target": settings.engine_socket}],
            }),
            Value::Null,
        ),
    };
    let group = |name: String, node: Option<&str>| {
        serde_json::json!({
            "Name": name,
            "Count": u8::from(node.is_some()),
            "Constraints": node.map(|id| serde_json::json!([{"LTarget": "${node.unique.id}", "Operand": "=", "RTarget": id}])),
            "RestartPolicy": {"Attempts": 0, "Interval": 5_000_000_000_u64, "Delay": 0, "Mode": "fail"},
            "ReschedulePolicy": {"Attempts": 0, "Unlimited": false},
            "EphemeralDisk": {"SizeMB": 20},
            "Tasks": [{
                "Name": "sweep", "Driver": driver, "Config": config, "Env": env, "Artifacts": artifacts,
                "LogConfig": {"MaxFiles": 1, "MaxFileSizeMB": 10},
                "Resources": {"CPU": 50, "MemoryMB": 64},
            }],
        })
    };
    let groups: Vec<_> = match nodes {
        [] => vec![group("sweep".to_owned(), None)],
        nodes => (1..).zip(nodes).map(|(place, node)| group(format!("sweep-{place}"), Some(node))).collect(),
    };
    serde_json::json!({
        "ID": sweep_id, "Name": sweep_id, "Namespace": namespace, "Type": "batch", "Priority": 50,
        "Datacenters": settings.datacenters, "NodePool": settings.node_pool,
        "Meta": {SWEPT_NODES: nodes.join(",")},
        "TaskGroups": groups,
    })
}

#[cfg(test)]
mod tests;
