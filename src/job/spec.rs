//! A job's specification: what was asked for, checked and with every default filled in.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::names::{GitRef, ImageName, Name, RegistryUrl, RelativePath, RepoUrl, Scheme, Tag};
use super::paths::{CredentialsPath, VaultPath};
use super::secrets::Kind;
use super::{Allowed, Labels, Phase, SecretItem, StepItem, Task};

/// A submission that passed every check.
///
/// Invariant: only made by [`Spec::from_json`], which reports every bad field at once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spec {
    /// Who the job is for; also the scope of build caches.
    pub owner: Name,
    /// Where the source is.
    pub repo_url: RepoUrl,
    /// What to check out; none is the repository's default branch.
    pub git_ref: Option<GitRef>,
    /// Where the repository's credentials are.
    pub git_credentials_path: Option<CredentialsPath>,
    /// The Dockerfile, relative to the repository's root.
    pub dockerfile_path: RelativePath,
    /// The build context, relative to the repository's root.
    pub context_path: RelativePath,
    /// The tags to publish under.
    pub image_tags: Vec<Tag>,
    /// The registry, host and port only: its path has become a part of the image's name.
    pub registry_url: RegistryUrl,
    /// Where the registry's credentials are.
    pub registry_credentials_path: Option<CredentialsPath>,
    /// The repository in the registry, without its host.
    pub image_name: ImageName,
    /// Commands that must each end with 0, in a fresh container each.
    pub test_commands: Vec<String>,
    /// Whether the image's own entry point must end with 0.
    pub test_entry_point: bool,
    /// The environment of the tests.
    pub test_env: BTreeMap<String, String>,
    /// Build arguments.
    pub build_args: BTreeMap<String, String>,
    /// Secrets of the build's steps, by ID.
    pub build_secrets: BTreeMap<String, SecretItem>,
    /// Private keys that the build's steps sign with, by ID.
    pub ssh: BTreeMap<String, SecretItem>,
    /// The stage to build; none is the last.
    pub target: Option<String>,
    /// Labels of the image.
    pub labels: BTreeMap<String, String>,
    /// How long each phase may take.
    pub timeouts: Limits<Duration>,
    /// What each phase reserves.
    pub resources: Limits<Resources>,
    /// Whether the build may use no cache.
    pub no_cache: bool,
    /// Nomad's job priority.
    pub priority: u8,
}

/// One value for each phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits<T> {
    /// For the build.
    pub build: T,
    /// For the tests.
    pub test: T,
    /// For publishing.
    pub publish: T,
}

impl<T> Limits<T> {
    /// The value of one phase.
    pub fn of(&self, phase: Phase) -> &T {
        match phase {
            Phase::Build => &self.build,
            Phase::Test => &self.test,
            Phase::Publish => &self.publish,
        }
    }

    /// Other values, made of each.
    pub fn map<U>(self, of: impl Fn(T) -> U) -> Limits<U> {
        Limits { build: of(self.build), test: of(self.test), publish: of(self.publish) }
    }
}

impl Limits<u64> {
    /// The largest of them.
    pub fn longest(&self) -> u64 {
        self.build.max(self.test).max(self.publish)
    }
}

/// The least memory a phase may reserve, in MiB.
pub const LEAST_MEMORY_MB: u32 = 16;

/// What a phase reserves on its node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Resources {
    /// CPU in MHz, as Nomad counts it.
    pub cpu: u32,
    /// Memory in MiB.
    pub memory_mb: u32,
}

/// What the operator allows, and what a submission gets that does not ask.
///
/// A runner that does not know a restriction refuses it, as it would not keep it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Policy {
    /// Transports that repositories may be reached by.
    pub schemes: Vec<Scheme>,
    /// The longest timeout a phase may ask for.
    pub max_timeout: Duration,
    /// The most a phase may reserve.
    pub max_resources: Resources,
    /// What a phase reserves that does not say.
    pub default_resources: Limits<Resources>,
    /// What submissions may name.
    #[serde(default)]
    pub allowed: Allowed,
    /// How user code is kept apart.
    #[serde(default)]
    pub isolation: Isolation,
}

/// How user code is kept apart, beyond what is always so.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Isolation {
    /// Whether the steps of a build have a network.
    pub build_network: bool,
    /// Whether tests have one.
    pub test_network: bool,
    /// The most processes and threads of a test.
    pub max_pids: u32,
    /// The most of a node's disk that a checkout takes, in MiB.
    pub max_checkout_mb: u32,
    /// The most files of a checkout, with git's own.
    pub max_checkout_files: u32,
}

impl Default for Isolation {
    fn default() -> Self {
        Self {
            build_network: true,
            test_network: true,
            max_pids: 4096,
            max_checkout_mb: 10 << 10,
            max_checkout_files: 1_000_000,
        }
    }
}

impl Default for Policy {
    fn default() -> Self {
        let usual = Resources { cpu: 500, memory_mb: 512 };
        Self {
            schemes: vec![Scheme::Https, Scheme::Ssh],
            max_timeout: Duration::from_hours(4),
            max_resources: Resources { cpu: 64_000, memory_mb: 131_072 },
            default_resources: Limits {
                build: usual,
                test: usual,
                publish: Resources { cpu: 100, memory_mb: 128 },
            },
            allowed: Allowed::default(),
            isolation: Isolation::default(),
        }
    }
}

/// The build argument by which BuildKit keeps git's folder in a context that it gets from a repository.
///
/// Source: Docker's documentation of build variables.
pub(super) const KEEP_GIT_DIR: &str = "BUILDKIT_CONTEXT_KEEP_GIT_DIR";

/// What BuildKit takes for true: Go's `strconv.ParseBool`.
const TRUE: [&str; 6] = ["1", "t", "T", "true", "TRUE", "True"];

impl Spec {
    /// Whether git's own folder is a part of the build's context.
    pub fn keeps_git_dir(&self) -> bool {
        self.build_args.get(KEEP_GIT_DIR).is_some_and(|keep| TRUE.contains(&keep.as_str()))
    }

    /// Whether the job has a test phase.
    pub fn has_tests(&self) -> bool {
        self.test_entry_point || !self.test_commands.is_empty()
    }

    /// Registry and repository: what a tag is put behind.
    pub fn image(&self) -> String {
        format!("{}/{}", self.registry_url.host(), self.image_name)
    }

    /// The tasks of the Nomad job, in order.
    pub fn tasks(&self) -> Vec<Task> {
        let phases = Phase::ALL.into_iter().filter(|phase| *phase != Phase::Test || self.has_tests());
        phases.map(Task::Phase).chain([Task::Finish]).collect()
    }

    /// What the steps of the build are given by an ID.
    pub fn step_items(&self) -> impl Iterator<Item = StepItem<'_>> {
        let of = |kind, items| {
            let items: &BTreeMap<String, SecretItem> = items;
            items.iter().map(move |(id, item)| StepItem::new(kind, id, item))
        };
        of(Kind::Secret, &self.build_secrets).chain(of(Kind::Key, &self.ssh))
    }

    /// The secrets in Vault that a task reads, each once. A task finds each of them by its place in this order.
    pub fn vault_paths(&self, task: Task) -> BTreeSet<&VaultPath> {
        let registry = self.registry_credentials_path.as_ref();
        let of_build = || {
            let items = self.step_items().map(|item| item.path());
            self.git_credentials_path.as_ref().into_iter().chain(items)
        };
        let paths: Vec<_> = match task {
            Task::Phase(Phase::Build) => registry.into_iter().chain(of_build()).collect(),
            Task::Phase(Phase::Publish) | Task::Finish => registry.into_iter().collect(),
            Task::Phase(Phase::Test) => Vec::new(),
        };
        paths.into_iter().filter_map(CredentialsPath::vault).collect()
    }

    /// The labels a list shows.
    pub fn labels_for_lists(&self, submitted_at: DateTime<Utc>) -> Labels {
        Labels {
            owner: self.owner.to_string(),
            repo_url: self.repo_url.to_string(),
            git_ref: self.git_ref.as_ref().map(ToString::to_string),
            image: self.image(),
            tags: self.image_tags.iter().map(ToString::to_string).collect(),
            has_tests: self.has_tests(),
            submitted_at,
            timeouts: Some(self.timeouts.map(|timeout| timeout.as_secs())),
        }
    }

    /// The specification as a submission with every default filled in: what [`Spec::from_json`] reads back.
    pub fn to_json(&self) -> Value {
        let timeout = |value: Duration| format!("PT{}S", value.as_secs());
        let items = |items: &BTreeMap<String, SecretItem>| {
            items.iter().map(|(id, item)| (id.clone(), item.to_string())).collect::<BTreeMap<_, _>>()
        };
        let mut json = json!({
            "owner": self.owner.as_str(),
            "repo_url": self.repo_url.as_str(),
            "git_ref": self.git_ref.as_ref().map(GitRef::as_str),
            "git_credentials_path": self.git_credentials_path.as_ref().map(ToString::to_string),
            "dockerfile_path": self.dockerfile_path.as_str(),
            "context_path": self.context_path.as_str(),
            "image_tags": self.image_tags.iter().map(Tag::as_str).collect::<Vec<_>>(),
            "registry_url": self.registry_url.host(),
            "registry_credentials_path": self.registry_credentials_path.as_ref().map(ToString::to_string),
            "image_name": self.image_name.as_str(),
            "test_commands": self.test_commands,
            "test_entry_point": self.test_entry_point,
            "test_env": self.test_env,
            "build_args": self.build_args,
            "build_secrets": items(&self.build_secrets),
            "target": self.target,
            "labels": self.labels,
            "timeouts": {
                "build": timeout(self.timeouts.build),
                "test": timeout(self.timeouts.test),
                "publish": timeout(self.timeouts.publish),
            },
            "resources": self.resources,
            "no_cache": self.no_cache,
            "priority": self.priority,
        });
        // A runner that is older refuses what it does not know.
        if !self.ssh.is_empty() {
            json["ssh"] = json!(items(&self.ssh));
        }
        json
    }
}
