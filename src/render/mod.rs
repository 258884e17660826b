//! From a specification to a Nomad job: the operator's template, filled in and held against our own rules.
//!
//! Invariant: pure. Nothing a user sent stands in the job but inside the payload, which is base64, and in the meta,
//! which is percent-encoded; paths in Vault stand in templates, and their grammar is narrow.

mod rules;
mod template;

use std::borrow::Cow;
use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use minijinja::context;
use minijinja::value::Serde;
use serde::Serialize;
use serde_json::{Value, json};

use crate::job::{JobId, Payload, Phase, Task};

pub use rules::BrokenRule;
pub use template::Template;

/// Where the service serves the runner for a node's platform: Nomad fills in the node's attributes.
const ARTIFACT: &str = "/runner/${attr.kernel.name}/${attr.cpu.arch}/nomad-build";

/// Where it serves the checksums of all platforms.
const CHECKSUMS: &str = "/runner/${attr.kernel.name}/${attr.cpu.arch}/sha256sums";

/// The name of the one task group.
const GROUP: &str = "job";

/// The tasks that get copies of credentials: the build may begin with a base image from the job's registry, and finish may
/// have to end a publish.
pub const TASKS_WITH_CREDENTIALS: [Task; 3] =
    [Task::Phase(Phase::Build), Task::Phase(Phase::Publish), Task::Finish];

/// The Nomad Variable that Nomad lets one task of a job read, and no other.
pub fn task_variable(job: &JobId, task: Task) -> String {
    format!("nomad/jobs/{job}/{GROUP}/{}", task.as_str())
}

/// The job whose task a Variable is for; none where it is for none of this service's.
pub fn job_of_task_variable(path: &str) -> Option<JobId> {
    path.strip_prefix("nomad/jobs/")?.split_once('/')?.0.parse().ok()
}

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
    /// What is filled in.
    pub template: Template,
    /// How the runner gets onto a node.
    pub runner: Runner,
    /// The engine's socket on a node.
    pub engine_socket: String,
    /// What of a node the template may mount into a task beside that and the archive, with what lies below.
    pub mounts: Vec<String>,
    /// Nomad's datacenters; `*` is all.
    pub datacenters: Vec<String>,
    /// Nomad's node pool.
    pub node_pool: String,
    /// What the checkout and the runner's files may take, in MiB, beside the logs.
    pub disk_mb: u32,
    /// The role by which tasks log in to Vault; without it, that of Nomad's own configuration.
    pub vault_role: Option<String>,
    /// What `finish` is told of the archive, if there is one.
    pub archive: Option<Archive>,
}

/// How `finish` finds the archive.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Archive {
    /// Variables; nothing secret.
    pub environment: BTreeMap<String, String>,
    /// The directory on the node, where the archive is one.
    pub directory: Option<String>,
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
    /// Files that Nomad writes before the task starts.
    templates: Vec<TemplateContext<'a>>,
    /// How the task is known to Vault, where it reads anything there.
    vault: Option<VaultContext<'a>>,
    env: BTreeMap<&'a str, &'a str>,
    /// A directory of the node that the task writes to.
    archive_dir: Option<&'a str>,
    log_files: u32,
    log_file_mb: u32,
    kill_timeout_ns: u64,
    cpu: u32,
    memory_mb: u32,
}

/// A file that Nomad writes.
#[derive(Serialize)]
struct TemplateContext<'a> {
    text: Cow<'a, str>,
    destination: String,
}

/// A task's way to Vault.
#[derive(Serialize)]
struct VaultContext<'a> {
    role: Option<&'a str>,
}

/// Where the payload is, for the job's tasks.
const PAYLOAD: &str = "${NOMAD_ALLOC_DIR}/payload";

/// The file with a secret of Vault's in the directory of a task's secrets, by the secret's place among the task's.
pub fn vault_file(place: usize) -> String {
    format!("vault-{place}.json")
}

/// Whether a file in that directory is one of these.
pub fn is_vault_file(name: &str) -> bool {
    let place = name.strip_prefix("vault-").and_then(|rest| rest.strip_suffix(".json"));
    place.is_some_and(|place| place.parse::<usize>().is_ok_and(|place| vault_file(place) == name))
}

/// What Nomad writes for a task. Of what a user sent, a template names a path in Vault, whose grammar has nothing that a template
/// or Nomad would take for its own.
fn templates<'a>(task: Task, payload: &'a Payload, encoded: &'a str) -> Vec<TemplateContext<'a>> {
    // The prestart task puts it where every later task finds it.
    let own = (task == Task::Phase(Phase::Build))
        .then(|| TemplateContext { text: encoded.into(), destination: PAYLOAD.to_owned() });
    let secrets = payload.spec.vault_paths(task).into_iter().enumerate().map(|(place, path)| {
        let path = path.as_str();
        let text = format!("{{{{ with secret \"{path}\" }}}}{{{{ .Data | toJSON }}}}{{{{ end }}}}");
        TemplateContext { text: text.into(), destination: format!("secrets/{}", vault_file(place)) }
    });
    own.into_iter().chain(secrets).collect()
}

/// A log of 100 MB is kept for each phase, in files that Nomad rotates.
const LOG_FILES: u32 = 10;
const LOG_FILE_MB: u32 = 10;

/// How long a runner has to stop what it started. A client caps it, at 30 s where nothing else is configured.
const KILL_TIMEOUT_NS: u64 = 25_000_000_000;

/// A node that comes back within this time finds its allocation as it was. Whether the job still goes on then is the service's
/// to say: see `Facts::due`.
const LOST_AFTER_NS: u64 = 30 * 24 * 3600 * 1_000_000_000;

/// The node's name, which Nomad fills in.
const NODE: &str = "${node.unique.name}";

/// The node's ID.
const NODE_ID: &str = "${node.unique.id}";

/// What archiving takes: parts of a log on their way, and the store's client.
const ARCHIVING_MB: u32 = 64;

fn task<'a>(task: Task, payload: &'a Payload, encoded: &'a str, settings: &'a Settings) -> TaskContext<'a> {
    let mut env = BTreeMap::from([("NOMAD_BUILD_ENGINE_SOCKET", settings.engine_socket.as_str())]);
    let archive = settings.archive.as_ref().filter(|_| task == Task::Finish);
    if let Some(archive) = archive {
        env.extend(archive.environment.iter().map(|(name, value)| (name.as_str(), value.as_str())));
        env.insert("NOMAD_BUILD_NODE", NODE);
    }
    let (hook, resources) = match task {
        Task::Phase(phase) => {
            let hook = (phase == Phase::Build).then_some("prestart");
            let resources = payload.spec.resources.of(phase);
            (hook, (resources.cpu, resources.memory_mb))
        }
        Task::Finish => (Some("poststop"), (50, 64 + archive.map_or(0, |_| ARCHIVING_MB))),
    };
    TaskContext {
        name: task.as_str(),
        hook,
        templates: templates(task, payload, encoded),
        vault: (!payload.spec.vault_paths(task).is_empty())
            .then_some(VaultContext { role: settings.vault_role.as_deref() }),
        env,
        archive_dir: archive.and_then(|archive| archive.directory.as_deref()),
        log_files: if task == Task::Finish { 1 } else { LOG_FILES },
        log_file_mb: LOG_FILE_MB,
        kill_timeout_ns: KILL_TIMEOUT_NS,
        cpu: resources.0,
        memory_mb: resources.1,
    }
}

/// What the template is told of a job beside its tasks.
#[derive(Serialize)]
struct JobContext<'a> {
    id: &'a str,
    namespace: &'a str,
    priority: u8,
    datacenters: &'a [String],
    node_pool: &'a str,
    meta: BTreeMap<String, String>,
    disk_mb: u32,
    lost_after_ns: u64,
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
    let job = JobContext {
        id: payload.job.as_str(),
        namespace,
        priority: payload.spec.priority,
        datacenters: &settings.datacenters,
        node_pool: &settings.node_pool,
        meta: payload.spec.labels_for_lists(submitted_at).to_meta(),
        disk_mb: settings.disk_mb + logs,
        lost_after_ns: LOST_AFTER_NS,
    };
    let filled = fill(&job, &contexts, settings)?;
    rules::check(&filled, &job, &contexts, settings)?;
    Ok(filled)
}

fn fill(job: &JobContext<'_>, tasks: &[TaskContext<'_>], settings: &Settings) -> Result<Value, RenderError> {
    let (path, image, artifact) = match &settings.runner {
        Runner::Path(path) => (Some(path), None, None),
        Runner::Image(image) => (None, Some(image), None),
        Runner::Artifact { base } => {
            let url = format!("{base}{ARTIFACT}");
            (None, None, Some(context! { url, checksum => format!("file:{base}{CHECKSUMS}") }))
        }
    };
    let text = settings.template.fill(context! {
        job => minijinja::Value::from(Serde(job)),
        runner => context! { path, image, artifact, engine_socket => settings.engine_socket.as_str() },
        tasks => minijinja::Value::from(Serde(tasks)),
    })?;
    Ok(serde_json::from_str(&text)?)
}

/// The item of a sweep's meta that names its nodes.
const SWEPT_NODES: &str = "nb_nodes";

/// The nodes that a sweep is for, from its meta.
pub fn swept_nodes(meta: &BTreeMap<String, String>) -> impl Iterator<Item = &str> {
    meta.get(SWEPT_NODES).into_iter().flat_map(|nodes| nodes.split(',')).filter(|node| !node.is_empty())
}

/// The job that removes what a job left on its nodes: the template's group for each node, or one that is placed nowhere.
///
/// It stays in Nomad until it is collected, which is how a repeated cleanup is known to be one.
pub fn render_sweep(
    job: &JobId,
    sweep_id: &str,
    namespace: &str,
    nodes: &[&str],
    settings: &Settings,
) -> Result<Value, RenderError> {
    let env = BTreeMap::from([
        ("NOMAD_BUILD_ENGINE_SOCKET", settings.engine_socket.as_str()),
        ("NOMAD_BUILD_SWEEP", job.as_str()),
    ]);
    let meta = BTreeMap::from([(SWEPT_NODES.to_owned(), nodes.join(","))]);
    let mut rendered = fill_sweep(sweep_id, namespace, env, meta, settings)?;
    let group = rendered["TaskGroups"][0].take();
    let groups: Vec<_> = match nodes {
        [] => vec![pinned(group, "sweep", None)],
        nodes => (1..)
            .zip(nodes)
            .map(|(place, node)| pinned(group.clone(), &format!("sweep-{place}"), Some(node)))
            .collect(),
    };
    rendered["TaskGroups"] = groups.into();
    Ok(rendered)
}

/// The job that removes what ended jobs left, on every node that the template's tasks may run on.
pub fn render_node_sweep(
    sweep_id: &str,
    namespace: &str,
    ended_s: u64,
    dry_run: bool,
    settings: &Settings,
) -> Result<Value, RenderError> {
    let ended_s = ended_s.to_string();
    let mut env = BTreeMap::from([
        ("NOMAD_BUILD_ENGINE_SOCKET", settings.engine_socket.as_str()),
        ("NOMAD_BUILD_NODE_ID", NODE_ID),
        ("NOMAD_BUILD_SWEEP_ENDED_S", ended_s.as_str()),
    ]);
    if dry_run {
        env.insert("NOMAD_BUILD_SWEEP_DRY_RUN", "1");
    }
    let mut rendered = fill_sweep(sweep_id, namespace, env, BTreeMap::new(), settings)?;
    rendered["Type"] = "sysbatch".into();
    // Nomad takes neither for a job of this type.
    if let Some(group) = rendered["TaskGroups"][0].as_object_mut() {
        group.remove("ReschedulePolicy");
        group.remove("Disconnect");
    }
    Ok(rendered)
}

fn fill_sweep(
    sweep_id: &str,
    namespace: &str,
    env: BTreeMap<&str, &str>,
    meta: BTreeMap<String, String>,
    settings: &Settings,
) -> Result<Value, RenderError> {
    let sweep = TaskContext {
        name: "sweep",
        hook: None,
        templates: Vec::new(),
        vault: None,
        env,
        archive_dir: None,
        log_files: 1,
        log_file_mb: LOG_FILE_MB,
        kill_timeout_ns: KILL_TIMEOUT_NS,
        cpu: 50,
        memory_mb: 64,
    };
    let context = JobContext {
        id: sweep_id,
        namespace,
        priority: 50,
        datacenters: &settings.datacenters,
        node_pool: &settings.node_pool,
        meta,
        disk_mb: 2 * LOG_FILE_MB,
        lost_after_ns: LOST_AFTER_NS,
    };
    let rendered = fill(&context, std::slice::from_ref(&sweep), settings)?;
    rules::check_sweep(&rendered, &context, &sweep, settings)?;
    Ok(rendered)
}

/// A group for one node beside what the template demands of nodes, or for none.
fn pinned(mut group: Value, name: &str, node: Option<&str>) -> Value {
    group["Name"] = name.into();
    group["Count"] = u8::from(node.is_some()).into();
    if let Some(node) = node {
        let mut constraints = group["Constraints"].as_array().cloned().unwrap_or_default();
        constraints.push(json!({"LTarget": "${node.unique.id}", "Operand": "=", "RTarget": node}));
        group["Constraints"] = constraints.into();
    }
    group
}

#[cfg(test)]
mod tests;
