//! What the integration tests stand on: one stack for the whole run, the real service, git repositories, the registry.

pub(crate) mod agent;
mod api;
mod authority;
mod bucket;
mod canaries;
mod cluster;
mod engine;
mod engine_front;
mod faults;
mod front;
mod guarded;
mod issuer;
mod lossy;
mod namespace;
mod nomad;
mod nomad_front;
pub(crate) mod openapi;
pub(crate) mod ports;
pub(crate) mod provider;
pub(crate) mod proxy;
mod random;
mod registry;
mod repository;
mod service;
mod sleeper;
mod ssh;
mod torn;
mod upstream;
pub(crate) mod vault;
mod ways;

use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::Instant;

pub(crate) use api::Api;
pub(crate) use authority::Authority;
pub(crate) use bucket::Bucket;
pub(crate) use canaries::{Canaries, Recorders, Watch};
pub(crate) use cluster::{Cluster, Lent};
pub(crate) use engine::{
    base_archive, containers_of, crash, crash_log, docker, end_at_once, end_container, engine_is_rid_of,
    engine_socket, environment_of, hang, images_of, is_alone, kilobytes, leave_behind, most_kilobytes,
    processes_with, runner_of, unique_seconds,
};
pub(crate) use engine_front::EngineFront;
pub(crate) use faults::{Fault, Faults};
pub(crate) use front::{At, Front};
pub(crate) use guarded::{Guarded, NAMESPACE};
pub(crate) use issuer::Issuer;
pub(crate) use lossy::{Passes, lossy};
pub(crate) use namespace::Namespace;
pub(crate) use nomad::Nomad;
pub(crate) use nomad_front::{Instead, nomad_front, numbered, registering_only};
pub(crate) use random::Random;
pub(crate) use registry::tags_of;
pub(crate) use repository::Repository;
pub(crate) use service::Service;
pub(crate) use sleeper::{Hold, Sleeper};
pub(crate) use ssh::Ssh;
pub(crate) use torn::Torn;
pub(crate) use upstream::{Upstream, serve};

use crate::stack::{Stack, environment};

/// The phases, in the order they run.
pub(crate) const PHASES: [&str; 3] = ["build", "test", "publish"];

/// The times of a status, in the order they come.
pub(crate) const TIMES: [&str; 8] = [
    "job_start",
    "build_start",
    "build_end",
    "test_start",
    "test_end",
    "publish_start",
    "publish_end",
    "job_end",
];

/// Everything that is started once.
pub(crate) struct World {
    /// Nomad's address.
    pub(crate) nomad: String,
    /// The registry, `host:port`.
    pub(crate) registry: String,
    /// A base image with a shell and busybox' programs, in that registry.
    pub(crate) base: String,
    /// The service that most tests speak to.
    pub(crate) service: Service,
    stack: Stack,
}

/// The world; the first test that asks starts it. It ends with this process, as the stack's stdin closes with it.
pub(crate) fn world() -> &'static World {
    static WORLD: OnceLock<World> = OnceLock::new();
    WORLD.get_or_init(|| {
        let stack = Stack::start(&[]);
        let base = stack.base_image();
        let service = Service::start(&stack.nomad, &stack.registry, &[]);
        World { nomad: stack.nomad.clone(), registry: stack.registry.clone(), base, service, stack }
    })
}

impl World {
    /// A client of the service.
    pub(crate) fn api(&self) -> Api {
        Api::new(&self.service.url)
    }

    /// A client of Nomad itself.
    pub(crate) fn nomad_api(&self) -> Nomad {
        Nomad::new(&self.nomad)
    }

    /// A submission of a repository, under an image name that no other test uses.
    pub(crate) fn job(&self, repository: &Repository) -> Value {
        json!({
            "owner": "it",
            "repo_url": repository.url(),
            "image_tags": ["one"],
            "registry_url": self.registry,
            "image_name": format!("it/{}", uuid::Uuid::new_v4().simple()),
            "build_args": {"BASE": self.base},
            // Room for all tests at once: one that waits for a place would wait for others to end.
            "resources": {"build": {"cpu": 100}, "test": {"cpu": 100}},
        })
    }

    /// A repository whose image is the submission's base and these further lines of its Dockerfile.
    #[expect(clippy::unused_self, reason = "only a submission of the world gives it its base")]
    pub(crate) fn repository(&self, lines: &str) -> Repository {
        Repository::new().file("Dockerfile", &format!("ARG BASE\nFROM $BASE\n{lines}\n")).commit()
    }

    /// Such a submission, to a front of the registry.
    pub(crate) fn job_by(&self, front: &Front, repository: &Repository) -> Value {
        let mut job = self.job(repository);
        job["registry_url"] = json!(front.host);
        job
    }

    /// Runs a command of the Nomad program; whether it succeeded, and what it said.
    pub(crate) fn nomad_program(&self, arguments: &[&str]) -> (bool, String) {
        self.stack.try_nomad(arguments)
    }

    /// Reads from Nomad's API; none where there is nothing.
    pub(crate) async fn nomad(&self, path: &str) -> Option<Value> {
        let (status, body) = Api::new(&self.nomad).call(reqwest::Method::GET, path, None).await;
        assert!(status.is_success() || status == reqwest::StatusCode::NOT_FOUND, "{path}: {status} {body}");
        status.is_success().then_some(body)
    }

    /// What there is to know of a job whose log is not what it should be, for the message of a failed test.
    pub(crate) async fn known_of(&self, id: &str, messages: &[Value]) -> String {
        let status = self.api().status(id).await;
        let allocation = status["nomad"]["allocation"].as_str().unwrap_or_default();
        let found = self.nomad(&format!("/v1/allocation/{allocation}")).await;
        let files = self.nomad(&format!("/v1/client/fs/ls/{allocation}?path=alloc/logs")).await;
        let said = std::fs::read_to_string(self.stack.data_dir.join("nomad.log")).unwrap_or_default();
        let said: Vec<_> = said.lines().filter(|line| line.contains(allocation)).collect();
        let few = &messages[..messages.len().min(40)];
        let tasks = found.map(|found| found["TaskStates"].clone());
        format!(
            "messages: {few:?}\nstatus: {status}\ntasks: {tasks:?}\nfiles: {files:?}\nNomad said: {said:?}"
        )
    }

    /// Every tag of the repository that a submission publishes to, sorted.
    pub(crate) async fn tags(&self, job: &Value) -> Vec<String> {
        let mut tags = tags_of(&self.registry, image_of(job)).await;
        tags.sort();
        tags
    }

    /// The label of the image that the registry serves under a tag; none where it serves nothing.
    pub(crate) async fn label(&self, image: &str, tag: &str, label: &str) -> Option<String> {
        registry::label_of(&self.registry, image, tag, label).await
    }

    /// The digest that the registry serves under a reference of a status; none where it serves nothing.
    pub(crate) async fn served(&self, image: &str, tag: &str) -> Option<String> {
        registry::digest_of(&self.registry, image, tag).await
    }
}

/// A program that only tests run: where set-up puts it, or where it is installed.
pub(crate) fn tool(name: &str) -> PathBuf {
    let installed = environment("PATH").unwrap_or_default() + ":/usr/sbin";
    let fetched = environment("NOMAD_BUILD_TOOLS").into_iter().map(PathBuf::from);
    let mut paths = fetched.chain(std::env::split_paths(&installed)).map(|folder| folder.join(name));
    paths.find(|path| path.exists()).unwrap_or_else(|| panic!("there is no {name}: run tools/setup tests"))
}

/// How often a test does something: a number that a long run sets.
pub(crate) fn scale(variable: &str, default: usize) -> usize {
    environment(variable).map_or(default, |text| text.parse().unwrap())
}

/// The image name of a submission.
pub(crate) fn image_of(job: &Value) -> &str {
    job["image_name"].as_str().unwrap()
}

/// Waits for a value, asking often, and fails with `what` after a minute and a half.
pub(crate) async fn eventually<T>(what: &str, ask: impl AsyncFnMut() -> Option<T>) -> T {
    eventually_within(Duration::from_secs(90), what, ask).await
}

/// The same within another time.
pub(crate) async fn eventually_within<T>(
    most: Duration,
    what: &str,
    ask: impl AsyncFnMut() -> Option<T>,
) -> T {
    asking_every(Duration::from_millis(100), most, what, ask).await
}

/// The same, asking less and less often until it is every `pause`.
pub(crate) async fn asking_every<T>(
    pause: Duration,
    most: Duration,
    what: &str,
    mut ask: impl AsyncFnMut() -> Option<T>,
) -> T {
    let deadline = Instant::now() + most;
    let mut next = Duration::from_millis(20);
    loop {
        if let Some(value) = ask().await {
            return value;
        }
        assert!(Instant::now() < deadline, "not within {} s: {what}", most.as_secs());
        tokio::time::sleep(next).await;
        next = (next * 3 / 2).min(pause);
    }
}
