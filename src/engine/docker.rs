//! The Docker Engine, by its own API, with BuildKit.
//!
//! Invariant: a container that was asked for is known: its creation goes on when its run is dropped, and removal waits
//! for it.

mod run;

use std::collections::HashMap;
use std::time::Duration;

use bollard::Docker;
use bollard::auth::DockerCredentials;
use bollard::errors::Error as DockerError;
use bollard::models::{BuildInfo, BuildInfoAux, ContainerSummary, ImageSummary};
use bollard::query_parameters::{
    BuildImageOptions, BuildImageOptionsBuilder, BuilderVersion, ListContainersOptionsBuilder,
    ListImagesOptionsBuilder, PushImageOptionsBuilder, RemoveImageOptionsBuilder, TagImageOptionsBuilder,
};
use futures_util::StreamExt as _;
use secrecy::ExposeSecret as _;
use tokio::sync::mpsc::Sender;
use tokio_util::task::TaskTracker;

use super::progress::{Progress, exit_code};
use super::{BuildRequest, Engine, EngineError, Exit, Output, RunRequest, Stream, context};

/// The longest silence before an answer begins, in seconds. What is asked has bounds of its own.
const ANSWER: u64 = 6 * 3600;

/// How long a build may pause before what it said last is shown though its line has no end.
const PAUSE: Duration = Duration::from_secs(1);

/// How long a removal waits for containers that are still being created.
const CREATION: Duration = Duration::from_mins(1);

/// A Docker Engine behind a Unix socket.
#[derive(Clone)]
pub struct DockerEngine {
    socket: String,
    /// What goes on though nobody waits for it: the creation of containers.
    creations: TaskTracker,
}

impl DockerEngine {
    /// The engine at a socket, which need not be there yet: the first call that needs it says so.
    pub fn new(socket: &str) -> Self {
        let creations = TaskTracker::new();
        // It still takes tasks; only when closed does it tell that there are none.
        creations.close();
        Self { socket: socket.to_owned(), creations }
    }

    /// A connection for one call; the client keeps none open in any case.
    fn docker(&self) -> Result<Docker, EngineError> {
        let docker = Docker::connect_with_socket(&self.socket, ANSWER, bollard::API_DEFAULT_VERSION);
        docker.map_err(|error| self.unreachable(error))
    }

    /// The containers with a label, running or not.
    async fn containers(&self, label: String) -> Result<Vec<ContainerSummary>, EngineError> {
        let filters = HashMap::from([("label", vec![label])]);
        let options = ListContainersOptionsBuilder::new().all(true).filters(&filters).build();
        let listed = self.docker()?.list_containers(Some(options)).await;
        listed.map_err(|error| self.failed("listing containers", error))
    }

    /// The images with a label.
    async fn images(&self, label: String) -> Result<Vec<ImageSummary>, EngineError> {
        let filters = HashMap::from([("label", vec![label])]);
        let options = ListImagesOptionsBuilder::new().all(true).filters(&filters).build();
        let listed = self.docker()?.list_images(Some(options)).await;
        listed.map_err(|error| self.failed("listing images", error))
    }

    fn unreachable(&self, why: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> EngineError {
        EngineError::Unreachable { socket: self.socket.clone(), source: why.into() }
    }

    /// Gives a call so much time and no more: an engine that hangs answers nothing, and closes nothing.
    pub async fn within<T>(
        &self,
        most: Duration,
        call: impl Future<Output = Result<T, EngineError>>,
    ) -> Result<T, EngineError> {
        let silent = |_| self.unreachable(format!("no answer within {} s", most.as_secs()));
        tokio::time::timeout(most, call).await.map_err(silent)?
    }

    fn failed(&self, doing: &str, error: DockerError) -> EngineError {
        let refused = |message: String| EngineError::Refused { doing: doing.to_owned(), message };
        match error {
            DockerError::DockerResponseServerError { message, .. }
            | DockerError::DockerStreamError { error: message }
            | DockerError::JsonDataError { message, .. } => refused(message),
            // What the client calls so is a query that is longer than its URIs may be.
            DockerError::InvalidURIError { .. } | DockerError::InvalidURIPartsError { .. } => {
                EngineError::TooLong
            }
            other => self.unreachable(other),
        }
    }

    /// The same, for what an engine refuses where it does not have an image.
    fn without(&self, image: &str, doing: &str, error: DockerError) -> EngineError {
        match error {
            DockerError::DockerResponseServerError { status_code: 404, .. } => {
                EngineError::ImageMissing(image.to_owned())
            }
            other => self.failed(doing, other),
        }
    }

    async fn untag(&self, name: &str) -> Result<bool, EngineError> {
        let options = RemoveImageOptionsBuilder::new().build();
        match self.docker()?.remove_image(name, Some(options), None).await {
            Ok(_) => Ok(true),
            Err(DockerError::DockerResponseServerError { status_code: 404, .. }) => Ok(false),
            Err(error) => Err(self.failed("removing an image's name", error)),
        }
    }

    /// Passes on what a build says; returns its image's ID.
    async fn follow_build(
        &self,
        messages: impl futures_util::Stream<Item = Result<BuildInfo, DockerError>>,
        output: &Sender<Output>,
    ) -> Result<String, EngineError> {
        let mut messages = std::pin::pin!(messages);
        let (mut progress, mut image, mut torn) = (Progress::default(), None, None);
        loop {
            let next = match tokio::time::timeout(PAUSE, messages.next()).await {
                Ok(Some(message)) if says_more(&message) => Some(message),
                Ok(next) => {
                    pass_on(progress.take_open(), output).await;
                    next
                }
                Err(_) => {
                    pass_on(progress.take_open(), output).await;
                    continue;
                }
            };
            let Some(message) = next else { break };
            if let Err(error) = &message
                && is_torn_end(error)
            {
                torn = message.err();
                break;
            }
            let info = message.map_err(|error| match self.failed("building", error) {
                EngineError::Refused { message, .. } => build_failed(&progress, message),
                other => other,
            })?;
            if let Some(message) = info.error_detail.and_then(|detail| detail.message) {
                return Err(build_failed(&progress, message));
            }
            match info.aux {
                Some(BuildInfoAux::BuildKit(status)) => {
                    pass_on(progress.take(&status), output).await;
                }
                Some(BuildInfoAux::Default(id)) => image = id.id.or(image),
                None => {}
            }
        }
        let without_image = || match torn {
            Some(error) => self.unreachable(error),
            None => EngineError::Refused {
                doing: "building".to_owned(),
                message: "no image: is BuildKit switched off in the engine?".to_owned(),
            },
        };
        image.ok_or_else(without_image)
    }

    async fn push_tagged(&self, reference: &str, output: &Sender<Output>) -> Result<(), EngineError> {
        const DOING: &str = "pushing the image";
        let (repository, tag) = split(reference);
        let options = PushImageOptionsBuilder::new().tag(tag).build();
        let docker = self.docker()?;
        let mut pushed = docker.push_image(repository, Some(options), Some(DockerCredentials::default()));
        let mut last = None;
        while let Some(info) = pushed.next().await {
            let info = match info {
                // Whether the push is whole, the registry's side knows.
                Err(error) if is_torn_end(&error) => break,
                info => info.map_err(|error| self.failed(DOING, error))?,
            };
            if let Some(message) = info.error_detail.and_then(|detail| detail.message) {
                return Err(EngineError::Refused { doing: DOING.to_owned(), message });
            }
            // The engine's library drops which layer a message is of: each state once is what is left to tell.
            // What names the reference stays out: it lets whoever reads it push along.
            let news = |status: &String| last.as_ref() != Some(status) && !status.contains(repository);
            if let Some(status) = info.status.filter(news) {
                let bytes = format!("{status}\n").into_bytes();
                output.send(Output { stream: Stream::Stdout, bytes }).await.ok();
                last = Some(status);
            }
        }
        Ok(())
    }
}

async fn pass_on(said: Vec<Output>, output: &Sender<Output>) {
    for said in said {
        // Who listened has given up, and so will this.
        output.send(said).await.ok();
    }
}

/// Whether a build goes on behind a message.
fn says_more(message: &Result<BuildInfo, DockerError>) -> bool {
    message.as_ref().is_ok_and(|info| info.error_detail.is_none())
}

/// Whether an answer ended with the carriage return of its last line, which the client takes for half a message where it
/// arrives behind the message (bollard 0.21, its pull request 733). An answer that is cut looks the same, so what it should
/// have said has to be there.
fn is_torn_end(error: &DockerError) -> bool {
    matches!(error, DockerError::IOError { err } if err.to_string() == "bytes remaining on stream")
}

fn split(reference: &str) -> (&str, &str) {
    match reference.rsplit_once(':') {
        Some((repository, tag)) if !tag.contains('/') => (repository, tag),
        _ => (reference, "latest"),
    }
}

fn build_options(request: &BuildRequest, dockerfile: &str) -> BuildImageOptions {
    // BuildKit joins it with a mount's ID by a slash: with one of its own, a namespace could reach into another.
    let namespace = request.cache_namespace.replace('%', "%25").replace('/', "%2F");
    let own = ("BUILDKIT_CACHE_MOUNT_NS".to_owned(), namespace);
    let build_args: HashMap<_, _> = request.build_args.clone().into_iter().chain([own]).collect();
    let labels: HashMap<_, _> = request.labels.clone().into_iter().collect();
    BuildImageOptionsBuilder::new()
        .t(&request.tag)
        .dockerfile(dockerfile)
        .buildargs(&build_args)
        .labels(&labels)
        .target(request.target.as_deref().unwrap_or_default())
        .nocache(request.no_cache)
        .networkmode(if request.network { "" } else { "none" })
        .pull("true")
        .version(BuilderVersion::BuilderBuildKit)
        .session(&uuid::Uuid::new_v4().simple().to_string())
        .build()
}

fn credentials(request: &BuildRequest) -> HashMap<String, DockerCredentials> {
    let entries = request.registry_auth.iter().map(|auth| {
        let host = hub_or(&auth.host);
        let credentials = DockerCredentials {
            username: Some(auth.username.clone()),
            password: Some(auth.password.expose_secret().to_owned()),
            serveraddress: Some(host.to_owned()),
            ..DockerCredentials::default()
        };
        (host.to_owned(), credentials)
    });
    entries.collect()
}

/// The name under which BuildKit's client keeps a registry's credentials: for Docker Hub, that of its API's host.
fn hub_or(host: &str) -> &str {
    match host {
        "docker.io" | "index.docker.io" | "registry-1.docker.io" => "registry-1.docker.io",
        host => host,
    }
}

impl Engine for DockerEngine {
    async fn build(&self, request: BuildRequest, output: Sender<Output>) -> Result<String, EngineError> {
        let context = context::open(request.context.clone(), request.dockerfile.clone())?;
        let options = build_options(&request, &context.dockerfile);
        let body = bollard::body_try_stream(context.body);
        let docker = self.docker()?;
        let messages = docker.build_image(options, Some(credentials(&request)), Some(body));
        let mut failure = context.failure;
        // The engine can only tell that the context broke off.
        let built = self.follow_build(messages, &output).await;
        built.map_err(|error| failure.try_recv().map_or(error, EngineError::Context))
    }

    async fn run(&self, request: RunRequest, output: Sender<Output>) -> Result<Exit, EngineError> {
        self.run_container(&request, &output).await
    }

    async fn push(&self, image: &str, reference: &str, output: Sender<Output>) -> Result<(), EngineError> {
        let (repository, tag) = split(reference);
        let options = TagImageOptionsBuilder::new().repo(repository).tag(tag).build();
        let tagged = self.docker()?.tag_image(image, Some(options)).await;
        tagged.map_err(|error| self.without(image, "tagging the image", error))?;
        let pushed = self.push_tagged(reference, &output).await;
        let untagged = self.untag(reference).await;
        pushed?;
        untagged.map(drop)
    }

    async fn remove_containers(&self, label: (&str, &str)) -> Result<usize, EngineError> {
        // One that hangs does not keep from removing what is there, where the caller waits for longer.
        tokio::time::timeout(CREATION, self.creations.wait()).await.ok();
        let listed = self.containers(format!("{}={}", label.0, label.1)).await?;
        let mut removed = 0;
        for id in listed.into_iter().filter_map(|container| container.id) {
            self.remove_container(&id).await?;
            removed += 1;
        }
        Ok(removed)
    }

    async fn containers_by(&self, label: &str) -> Result<Vec<String>, EngineError> {
        let listed = self.containers(label.to_owned()).await?;
        Ok(listed.into_iter().filter_map(|container| container.labels?.remove(label)).collect())
    }

    async fn images_by(&self, label: &str, ours: fn(&str) -> bool) -> Result<Vec<String>, EngineError> {
        let listed = self.images(label.to_owned()).await?;
        let named =
            |image: &ImageSummary| image.repo_digests.iter().chain(&image.repo_tags).any(|name| ours(name));
        Ok(listed.into_iter().filter(named).filter_map(|mut image| image.labels.remove(label)).collect())
    }

    async fn remove_images(&self, label: (&str, &str), ours: fn(&str) -> bool) -> Result<usize, EngineError> {
        let listed = self.images(format!("{}={}", label.0, label.1)).await?;
        let mut removed = 0;
        for image in listed {
            // Digests first: the last tag takes the image with it.
            let names = image.repo_digests.into_iter().chain(image.repo_tags);
            for name in names.filter(|name| ours(name)) {
                removed += usize::from(self.untag(&name).await?);
            }
        }
        Ok(removed)
    }
}

/// What the failed step said of itself tells more than what the engine says of it.
fn build_failed(progress: &Progress, message: String) -> EngineError {
    if is_unauthorized(&message) {
        return EngineError::Unauthorized { message };
    }
    let exit_code = exit_code(&message).or_else(|| progress.error().and_then(exit_code));
    EngineError::BuildFailed { exit_code, message }
}

/// Whether a registry wanted other credentials for a base image; the engine tells it in words only.
///
/// What a step printed is not in the message, so a step cannot pass for a registry.
fn is_unauthorized(message: &str) -> bool {
    // BuildKit's own words, and those of containerd's resolver and token client.
    ["401 Unauthorized", "403 Forbidden", "insufficient_scope", "authorization failed", "unauthorized:"]
        .iter()
        .any(|words| message.contains(words))
        && !message.contains("executor failed running")
        && !message.contains("did not complete successfully")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_base_image_is_told_from_a_failed_step() {
        for (message, want) in [
            (
                "failed to solve: pulling from host 127.0.0.1:5000 failed with status code [manifests latest]: 401 Unauthorized",
                true,
            ),
            (
                "pull access denied, repository does not exist or may require authorization: server message: insufficient_scope: authorization failed",
                true,
            ),
            ("executor failed running [/bin/sh -c echo 401 Unauthorized; false]: exit code: 1", false),
            (
                "process \"/bin/sh -c echo 401 Unauthorized\" did not complete successfully: exit code: 1",
                false,
            ),
            ("failed to solve: base/none:latest: not found", false),
        ] {
            assert_eq!(is_unauthorized(message), want, "{message}");
        }
    }

    #[test]
    fn a_reference_is_split_at_its_tag_and_not_at_its_port() {
        assert_eq!(split("127.0.0.1:5000/a/b:push"), ("127.0.0.1:5000/a/b", "push"));
        assert_eq!(split("127.0.0.1:5000/a/b"), ("127.0.0.1:5000/a/b", "latest"));
    }

    #[test]
    fn docker_hub_is_known_by_the_host_of_its_api() {
        for (host, expected) in [
            ("docker.io", "registry-1.docker.io"),
            ("index.docker.io", "registry-1.docker.io"),
            ("ghcr.io", "ghcr.io"),
            ("localhost:5000", "localhost:5000"),
        ] {
            assert_eq!(hub_or(host), expected);
        }
    }
}
