//! A build by the engine's BuildKit, bound to a session of ours.
//!
//! Invariant: dropping it stops it in the engine.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::io::Error as IoError;
use std::time::Duration;

use bollard::moby::buildkit::v1::StatusResponse;
use bollard::models::{BuildInfo, BuildInfoAux};
use bollard::query_parameters::{BuildImageOptions, BuildImageOptionsBuilder, BuilderVersion};
use futures_util::stream::BoxStream;
use futures_util::{StreamExt as _, TryStreamExt as _};
use reqwest::Client;
use serde::Deserialize;
use tokio::sync::mpsc::Sender;
use tokio_util::codec::{FramedRead, LinesCodec};
use tokio_util::io::StreamReader;

use super::super::context::Context;
use super::super::dockerfile::Named;
use super::super::progress::{Progress, exit_code};
use super::super::sources::complete;
use super::super::{BuildRequest, EngineError, MayTake, Output, Source};
use super::DockerEngine;
use super::files::Files;
use super::session::{Session, Unopened};

/// How long a build may pause before what it said last is shown though its line has no end.
const PAUSE: Duration = Duration::from_secs(1);

/// The longest address that is sent: a client's limit, below the engine's own.
const MOST_IN_URL: usize = 65_534;

/// The longest message of a build, in bytes: what all its steps said within 200 ms.
const MESSAGE: usize = 64 << 20;

/// The host of a request's address; what is sent to a socket has none.
const HOST: &str = "http://docker";

/// What the engine answers that refuses.
#[derive(Deserialize)]
struct Refusal {
    message: String,
}

impl DockerEngine {
    /// Builds an image; returns its ID.
    pub(super) async fn build_image(
        &self,
        request: &BuildRequest,
        output: &Sender<Output>,
    ) -> Result<String, EngineError> {
        let (context, dockerfile) = (request.context.clone(), request.dockerfile.clone());
        let context = tokio::task::spawn_blocking(move || Context::open(&context, &dockerfile)).await;
        let context = context.map_err(|error| refused(&error.to_string()))??;
        judge_named(&Named::by(context.dockerfile_text()), &request.may_take)?;
        // A name that the engine's API, which speaks UTF-8, cannot say gets one that it can.
        let name = request.dockerfile.file_name().and_then(OsStr::to_str).unwrap_or("Dockerfile");
        let (files, mut failure) = Files::new(context, name);
        let engine = self.client()?;
        let session = Session::open(&engine, HOST, request, files).await.map_err(|error| match error {
            Unopened::Unreachable(error) => self.unreachable(error.without_url()),
            Unopened::Refused(_) => refused(&error.to_string()),
        })?;
        let options = options(request, name, session.id());
        let built = async {
            let messages = self.begin(&engine, &options).await?;
            self.follow(messages, &request.may_take, output).await
        };
        // The engine can only tell that the context broke off.
        built.await.map_err(|error| failure.try_recv().map_or(error, EngineError::Context))
    }

    /// A client for the requests that the engine's library does not make; it keeps no connection.
    fn client(&self) -> Result<Client, EngineError> {
        let socket = self.socket.strip_prefix("unix://").unwrap_or(&self.socket);
        let client = Client::builder()
            .unix_socket(socket)
            .tls_certs_only([])
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .pool_max_idle_per_host(0)
            .build();
        client.map_err(|error| self.unreachable(error))
    }

    /// Has the engine begin; what it says of the build.
    async fn begin(
        &self,
        engine: &Client,
        options: &BuildImageOptions,
    ) -> Result<BoxStream<'static, Result<BuildInfo, EngineError>>, EngineError> {
        let request = engine
            .post(format!("{HOST}/build"))
            .query(options)
            .build()
            .map_err(|error| refused(&error.to_string()))?;
        if request.url().as_str().len() > MOST_IN_URL {
            return Err(EngineError::TooLong);
        }
        let unreachable = |error: reqwest::Error| self.unreachable(error.without_url());
        let answer = engine.execute(request).await.map_err(unreachable)?;
        if !answer.status().is_success() {
            let (status, text) = (answer.status(), answer.text().await.map_err(unreachable)?);
            let said = serde_json::from_str(&text).map(|Refusal { message }| message);
            return Err(refused(&said.unwrap_or_else(|_| format!("status {status}"))));
        }
        let (engine, bytes) = (self.clone(), answer.bytes_stream().map_err(IoError::other));
        let lines = FramedRead::new(StreamReader::new(bytes), LinesCodec::new_with_max_length(MESSAGE));
        let messages = lines
            .map(move |line| {
                let line = line.map_err(|error| engine.unreachable(error))?;
                if line.is_empty() {
                    return Ok(None);
                }
                serde_json::from_str(&line).map(Some).map_err(|error| engine.unreachable(error))
            })
            .try_filter_map(|message| std::future::ready(Ok(message)));
        Ok(messages.boxed())
    }

    /// Passes on what a build says; returns its image's ID.
    async fn follow(
        &self,
        mut messages: BoxStream<'static, Result<BuildInfo, EngineError>>,
        may_take: &MayTake,
        output: &Sender<Output>,
    ) -> Result<String, EngineError> {
        let (mut progress, mut image) = (Progress::default(), None);
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
            let info = message.map_err(|error| match error {
                EngineError::Refused { message, .. } => build_failed(&progress, message),
                other => other,
            })?;
            if let Some(message) = info.error_detail.and_then(|detail| detail.message) {
                return Err(build_failed(&progress, message));
            }
            match info.aux {
                Some(BuildInfoAux::BuildKit(status)) => {
                    let judged = judge(&status, may_take);
                    if judged.is_err() {
                        // The engine stops what nobody listens to, before anybody has read what it said.
                        messages = futures_util::stream::empty().boxed();
                    }
                    pass_on(progress.take(&status), output).await;
                    judged?;
                }
                Some(BuildInfoAux::Default(id)) => image = id.id.or(image),
                None => {}
            }
        }
        image.ok_or_else(|| EngineError::Refused {
            doing: "building".to_owned(),
            message: "no image: is BuildKit switched off in the engine?".to_owned(),
        })
    }
}

/// Holds what a build is about to take against what it may.
fn judge(status: &StatusResponse, may_take: &MayTake) -> Result<(), EngineError> {
    for source in status.vertexes.iter().filter_map(|step| Source::of(&step.name)) {
        take(source, may_take)?;
    }
    Ok(())
}

/// Holds what a Dockerfile names against what it may take, before anything of it is built.
fn judge_named(named: &Named, may_take: &MayTake) -> Result<(), EngineError> {
    for frontend in &named.frontends {
        take(Source::Frontend(&complete(frontend)), may_take)?;
    }
    named.downloads.iter().try_for_each(|address| take(Source::Download(address), may_take))
}

fn take(source: Source<'_>, may_take: &MayTake) -> Result<(), EngineError> {
    may_take(source).map_err(|why| match source {
        Source::Download(address) => EngineError::DownloadNotAllowed { address: address.to_owned(), why },
        _ => EngineError::NotAllowed { reference: source.reference().to_owned(), why },
    })
}

fn refused(message: &str) -> EngineError {
    EngineError::Refused { doing: "building".to_owned(), message: message.to_owned() }
}

async fn pass_on(said: Vec<Output>, output: &Sender<Output>) {
    for said in said {
        // Who listened has given up, and so will this.
        output.send(said).await.ok();
    }
}

/// Whether a build goes on behind a message.
fn says_more(message: &Result<BuildInfo, EngineError>) -> bool {
    message.as_ref().is_ok_and(|info| info.error_detail.is_none())
}

fn options(request: &BuildRequest, dockerfile: &str, session: &str) -> BuildImageOptions {
    // BuildKit joins it with a mount's ID by a slash: with one of its own, a namespace could reach into another.
    let namespace = request.cache_namespace.replace('%', "%25").replace('/', "%2F");
    let own = ("BUILDKIT_CACHE_MOUNT_NS".to_owned(), namespace);
    let build_args: HashMap<_, _> = request.build_args.clone().into_iter().chain([own]).collect();
    let labels: HashMap<_, _> = request.labels.clone().into_iter().collect();
    let options = BuildImageOptionsBuilder::new()
        .t(&request.tag)
        .remote("client-session")
        .dockerfile(dockerfile)
        .buildargs(&build_args)
        .labels(&labels)
        .target(request.target.as_deref().unwrap_or_default())
        .nocache(request.no_cache)
        .networkmode(if request.network { "" } else { "none" })
        .pull("true")
        .version(BuilderVersion::BuilderBuildKit)
        .session(session);
    match &request.cache_key {
        Some(key) => options.extrahosts(&cache_host(key)).build(),
        None => options.build(),
    }
}

/// A name that steps find in their `/etc/hosts`: BuildKit counts those among what a step is cached by, and the secrets that it is given
/// not.
fn cache_host(key: &str) -> String {
    format!("{key}.cache.nomad-build.invalid:127.0.0.1")
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
    use std::collections::BTreeMap;
    use std::path::PathBuf;
    use std::sync::LazyLock;

    use proptest::prelude::*;

    use super::*;

    const ANYTHING: &str = "([-+$(){}`;&|'\"\\\\ \n%=#?]|\\PC){0,12}";

    static CLIENT: LazyLock<Client> = LazyLock::new(|| Client::builder().tls_certs_only([]).build().unwrap());

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(10_000))]
        #[test]
        fn what_a_build_is_given_stands_in_its_request_as_it_is(
            build_args in proptest::collection::btree_map("[A-Z]{1,4}", ANYTHING, 0..3),
            labels in proptest::collection::btree_map("[a-z]{1,4}", ANYTHING, 0..3),
            dockerfile in ANYTHING,
            target in proptest::option::of(ANYTHING),
        ) {
            let request = BuildRequest {
                context: PathBuf::new(),
                dockerfile: PathBuf::new(),
                tag: "nomad-build/x:work".to_owned(),
                build_args: build_args.clone(),
                target: target.clone(),
                labels: labels.clone(),
                no_cache: false,
                registry_auth: Vec::new(),
                secrets: BTreeMap::new(),
                agents: BTreeMap::new(),
                cache_namespace: "n".to_owned(),
                network: true,
                may_take: Box::new(|_| Ok(())),
                cache_key: Some("a1".to_owned()),
            };
            let options = options(&request, &dockerfile, "session");
            let url = CLIENT.post(format!("{HOST}/build")).query(&options).build().unwrap().url().clone();
            let query: BTreeMap<String, String> = url.query_pairs().into_owned().collect();
            let mut sent: BTreeMap<String, String> = serde_json::from_str(&query["buildargs"]).unwrap();
            prop_assert!(sent.remove("BUILDKIT_CACHE_MOUNT_NS").is_some());
            prop_assert_eq!(sent, build_args);
            prop_assert_eq!(serde_json::from_str::<BTreeMap<String, String>>(&query["labels"]).unwrap(), labels);
            prop_assert_eq!(&query["dockerfile"], &dockerfile);
            prop_assert_eq!(query.get("target").cloned().unwrap_or_default(), target.unwrap_or_default());
            prop_assert_eq!(&query["extrahosts"], "a1.cache.nomad-build.invalid:127.0.0.1");
            prop_assert_eq!(url.path(), "/build");
        }
    }

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
}
