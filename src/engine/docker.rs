//! The Docker Engine, by its own API, with BuildKit.
//!
//! Invariant: a container that was asked for is known: its creation goes on when its run is dropped, and removal waits
//! for it.

mod about;
mod agents;
mod build;
mod files;
mod run;
mod session;

use std::collections::HashMap;
use std::time::Duration;

use bollard::Docker;
use bollard::auth::DockerCredentials;
use bollard::errors::Error as DockerError;
use bollard::models::{ContainerSummary, ImageSummary};
use bollard::query_parameters::{
    ListContainersOptionsBuilder, ListImagesOptionsBuilder, PushImageOptionsBuilder,
    RemoveImageOptionsBuilder, TagImageOptionsBuilder,
};
use futures_util::StreamExt as _;
use tokio::sync::mpsc::Sender;
use tokio_util::task::TaskTracker;

pub use about::About;

use super::{BuildRequest, Engine, EngineError, Exit, Output, RunRequest, Stream};

/// The longest silence before an answer begins, in seconds. What is asked has bounds of its own.
const ANSWER: u64 = 6 * 3600;

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

    /// The containers with a label and a name that is `ours`, running or not.
    async fn containers(
        &self,
        label: String,
        ours: fn(&str) -> bool,
    ) -> Result<Vec<ContainerSummary>, EngineError> {
        let filters = HashMap::from([("label", vec![label])]);
        let options = ListContainersOptionsBuilder::new().all(true).filters(&filters).build();
        let listed = self.docker()?.list_containers(Some(options)).await;
        let mut listed = listed.map_err(|error| self.failed("listing containers", error))?;
        // The engine writes a name as a path.
        let is_ours = |name: &String| ours(name.trim_start_matches('/'));
        listed.retain(|container| container.names.iter().flatten().any(is_ours));
        Ok(listed)
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

impl Engine for DockerEngine {
    async fn build(&self, request: BuildRequest, output: Sender<Output>) -> Result<String, EngineError> {
        self.build_image(&request, &output).await
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

    async fn remove_containers(
        &self,
        label: (&str, &str),
        ours: fn(&str) -> bool,
    ) -> Result<usize, EngineError> {
        // One that hangs does not keep from removing what is there, where the caller waits for longer.
        tokio::time::timeout(CREATION, self.creations.wait()).await.ok();
        let listed = self.containers(format!("{}={}", label.0, label.1), ours).await?;
        let mut removed = 0;
        for id in listed.into_iter().filter_map(|container| container.id) {
            self.remove_container(&id).await?;
            removed += 1;
        }
        Ok(removed)
    }

    async fn containers_by(&self, label: &str, ours: fn(&str) -> bool) -> Result<Vec<String>, EngineError> {
        let listed = self.containers(label.to_owned(), ours).await?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reference_is_split_at_its_tag_and_not_at_its_port() {
        assert_eq!(split("127.0.0.1:5000/a/b:push"), ("127.0.0.1:5000/a/b", "push"));
        assert_eq!(split("127.0.0.1:5000/a/b"), ("127.0.0.1:5000/a/b", "latest"));
    }
}
