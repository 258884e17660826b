//! Container engines: build an image, run it, push it, and remove what was made for a job.
//!
//! Invariant: knows nothing of Nomad or of jobs; what belongs together bears a label.
//! Invariant: dropping a build stops it in the engine. A container outlives its future: whoever drops a run removes
//! the containers of its label.

mod context;
mod docker;
mod dockerfile;
mod dockerignore;
mod progress;
mod sources;

use std::collections::BTreeMap;
use std::future::Future;
use std::path::PathBuf;

use secrecy::SecretString;
use tokio::sync::mpsc::Sender;

pub use docker::{About, DockerEngine};
#[cfg(feature = "fuzz")]
pub(crate) use progress::fuzz_progress;
pub use sources::Source;

/// An image to build.
pub struct BuildRequest {
    /// The build context's folder.
    pub context: PathBuf,
    /// The Dockerfile; it may be outside the context.
    pub dockerfile: PathBuf,
    /// A local tag that nobody else uses.
    pub tag: String,
    /// Build arguments.
    pub build_args: BTreeMap<String, String>,
    /// The stage to build; none is the last.
    pub target: Option<String>,
    /// Labels of the image.
    pub labels: BTreeMap<String, String>,
    /// Whether the cache is left alone.
    pub no_cache: bool,
    /// Credentials for base images.
    pub registry_auth: Vec<RegistryAuth>,
    /// What steps may mount by `RUN --mount=type=secret,id=…`.
    pub secrets: BTreeMap<String, SecretString>,
    /// What steps may mount by `RUN --mount=type=ssh,id=…`: sockets of agents.
    pub agents: BTreeMap<String, PathBuf>,
    /// Builds share the contents of cache mounts only within one namespace.
    pub cache_namespace: String,
    /// Whether its steps have a network.
    pub network: bool,
    /// Whether it may take something; the reason where it may not.
    pub may_take: MayTake,
    /// What separates its steps in the cache from those of builds with another one.
    pub cache_key: Option<String>,
}

/// Judges what a build takes.
pub type MayTake = Box<dyn Fn(Source<'_>) -> Result<(), String> + Send + Sync>;

/// Credentials for one registry.
pub struct RegistryAuth {
    /// Its host, and port if it has one.
    pub host: String,
    /// The user.
    pub username: String,
    /// The password.
    pub password: SecretString,
}

/// A container to run to its end.
pub struct RunRequest {
    /// Its name, which no other container has.
    pub name: String,
    /// The image's ID.
    pub image: String,
    /// What to run.
    pub command: RunCommand,
    /// Its environment, beside the image's own.
    pub env: BTreeMap<String, String>,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// The memory it may use, in bytes.
    pub memory_bytes: i64,
    /// Its weight where the processors are all busy, as Docker counts it.
    pub cpu_shares: i64,
    /// The most processes and threads it may have.
    pub pids: i64,
    /// Whether it has a network.
    pub network: bool,
}

/// What a container runs.
pub enum RunCommand {
    /// `/bin/sh -c` with this text as its one argument.
    Shell(String),
    /// The image's own entry point and command.
    EntryPoint,
}

/// How a container ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// Its exit code.
    pub code: i64,
    /// Whether the kernel killed something in it for lack of memory, as far as the engine heard.
    pub out_of_memory: bool,
}

/// Which output bytes came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// Some bytes that a build, a container or a push said.
#[derive(Debug, PartialEq, Eq)]
pub struct Output {
    /// Where they came from.
    pub stream: Stream,
    /// The bytes.
    pub bytes: Vec<u8>,
}

/// Why an engine did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// It does not answer.
    #[error("the container engine at {socket} does not answer: is it running, and may this user reach it?")]
    Unreachable {
        /// Its socket.
        socket: String,
        /// The cause.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The context could not be read.
    #[error("the build context could not be read")]
    Context(#[from] context::ContextError),
    /// It built, and a step failed.
    #[error("the build failed: {message}")]
    BuildFailed {
        /// The exit code of the step, if it was a command's.
        exit_code: Option<i64>,
        /// The engine's words.
        message: String,
    },
    /// A registry did not give it a base image.
    #[error("a registry refused a base image: name its credentials in registry_credentials_path ({message})")]
    Unauthorized {
        /// The engine's words.
        message: String,
    },
    /// It was stopped, because of an image that it was to take.
    #[error("the build was stopped: it takes {reference}, which {why}")]
    NotAllowed {
        /// The image.
        reference: String,
        /// Why it may not be taken.
        why: String,
    },
    /// It was not begun, or was stopped, because of what it was to download.
    #[error("the build was not made: it downloads {address}, which {why}")]
    DownloadNotAllowed {
        /// What stands in its `ADD`.
        address: String,
        /// Why it may not be downloaded.
        why: String,
    },
    /// It does not have the image.
    #[error("the container engine has no image {0}: somebody removed it")]
    ImageMissing(String),
    /// It cannot even be asked.
    #[error(
        "the build arguments and labels are too long: the engine takes 64 KiB of them, as JSON encoded for a URL"
    )]
    TooLong,
    /// Anything else it answered.
    #[error("{doing}: the container engine answered: {message}")]
    Refused {
        /// What was being done.
        doing: String,
        /// The engine's words.
        message: String,
    },
}

/// A container engine.
pub trait Engine {
    /// Builds an image, bases pulled afresh; returns its ID.
    fn build(
        &self,
        request: BuildRequest,
        output: Sender<Output>,
    ) -> impl Future<Output = Result<String, EngineError>> + Send;

    /// Runs a fresh container to its end and removes it.
    fn run(
        &self,
        request: RunRequest,
        output: Sender<Output>,
    ) -> impl Future<Output = Result<Exit, EngineError>> + Send;

    /// Pushes an image to a registry that wants no credentials, by a local tag that exists while it is pushed.
    fn push(
        &self,
        image: &str,
        reference: &str,
        output: Sender<Output>,
    ) -> impl Future<Output = Result<(), EngineError>> + Send;

    /// Kills and removes the containers with a label and a name that is `ours`, as an image gives its labels to whatever is run
    /// from it; returns how many.
    fn remove_containers(
        &self,
        label: (&str, &str),
        ours: fn(&str) -> bool,
    ) -> impl Future<Output = Result<usize, EngineError>> + Send;

    /// The values of a label: one for each container that has it, and a name that is `ours`.
    fn containers_by(
        &self,
        label: &str,
        ours: fn(&str) -> bool,
    ) -> impl Future<Output = Result<Vec<String>, EngineError>> + Send;

    /// The values of a label: one for each image that has it, and a name that is `ours`.
    fn images_by(
        &self,
        label: &str,
        ours: fn(&str) -> bool,
    ) -> impl Future<Output = Result<Vec<String>, EngineError>> + Send;

    /// Removes the names that are `ours` from the images with a label, and the images that have no other name; returns
    /// how many names.
    fn remove_images(
        &self,
        label: (&str, &str),
        ours: fn(&str) -> bool,
    ) -> impl Future<Output = Result<usize, EngineError>> + Send;
}
