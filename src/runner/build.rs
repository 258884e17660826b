//! Build: check out, build, keep the image under a tag of the job's own.

use std::path::{Path, PathBuf};

use chrono::{SecondsFormat, Utc};
use serde_json::json;
use sha2::{Digest as _, Sha256};

use super::agents::Agents;
use super::bases::Bases;
use super::credentials::Credentials;
use super::log::Log;
use super::surroundings::Surroundings;
use super::{Failure, Runner, Work};
use crate::engine::{BuildRequest, Engine as _, EngineError, RegistryAuth, Source};
use crate::git::{self, GitError};
use crate::job::{GitRef, Outcome, Phase, Policy, Reason, Scheme, Spec, Stream, Task, image_labels};
use crate::telemetry::chain;

/// The most memory of each of git's programs, in MiB: enough for the largest repositories there are, in full.
const GIT_MEMORY: u64 = 4096;

impl git::Output for Log {
    async fn bytes(&self, bytes: Vec<u8>) {
        self.output(Stream::Stderr, bytes).await;
    }
}

impl Runner {
    pub(super) async fn build(&self, begun: Outcome) -> Work {
        match self.within_limits(Phase::Build, self.check_out_and_build(begun.clone())).await {
            Ok(outcome) => Work::Done(outcome),
            Err(interrupted) => interrupted.into_work(begun),
        }
    }

    async fn check_out_and_build(&self, mut outcome: Outcome) -> Result<Outcome, Failure> {
        let (around, spec) = (&self.around, &self.payload.spec);
        let credentials = around.credentials(Task::Phase(Phase::Build), spec, &self.log).await;
        let credentials = credentials.map_err(|error| Failure::of(Reason::CheckoutFailed, &error))?;
        let checked_out = self.check_out(&credentials).await?;
        outcome.git_ref.clone_from(&checked_out.reference);
        outcome.commit = Some(checked_out.commit.clone());
        let checkout = around.checkout();
        let context = inside(&checkout, spec.context_path.as_str(), "context_path").await?;
        let dockerfile = inside(&checkout, spec.dockerfile_path.as_str(), "dockerfile_path").await?;
        let created = Utc::now().to_rfc3339_opts(SecondsFormat::Secs, true);
        let labels = image_labels(spec, &checked_out.commit, &created, around.job.as_str());
        let (files, bases) = ((context, dockerfile), Bases::default());
        let mut request = build_request(spec, around, &credentials, files, &self.payload.policy, labels);
        let agents =
            Agents::start(&credentials.build_keys(), &around.secret("agents"), &around.git_environment).await;
        let agents = agents.map_err(|error| Failure::of(Reason::BuildFailed, &error))?;
        request.agents.clone_from(&agents.sockets);
        let (may_take, noted) = (request.may_take, bases.clone());
        request.may_take = Box::new(move |source| {
            noted.note(source);
            may_take(source)
        });
        // The commit is told while it is built, so that it is known of a build that fails or is killed, too.
        let told = around.tell(Phase::Build, &outcome);
        let built = self.log.with_output(|output| self.engine.build(request, output));
        let (built, told) = tokio::join!(built, told);
        if let Err(error) = told {
            self.log.say(&format!("the commit could not be told: {}", chain(&error))).await;
        }
        outcome.image_id = Some(built.map_err(|error| engine_failure(&error, Reason::BuildFailed))?);
        bases.may_be_had(&credentials, &self.payload, &self.log).await?;
        bases.keep(around).await;
        // The context has been sent; the next phases need the image alone.
        tokio::fs::remove_dir_all(&checkout).await.ok();
        Ok(outcome)
    }

    async fn check_out(&self, credentials: &Credentials) -> Result<git::CheckedOut, Failure> {
        let (around, spec) = (&self.around, &self.payload.spec);
        let checkout = around.checkout();
        // A task that runs again finds the remains of the first run.
        tokio::fs::remove_dir_all(&checkout).await.ok();
        let what = spec.git_ref.as_ref().map_or("the default branch", GitRef::as_str);
        self.log.say(&format!("==> checking out {what} of {}", spec.repo_url)).await;
        let transports: Vec<_> =
            self.payload.policy.schemes.iter().map(|scheme: &Scheme| scheme.as_str()).collect();
        let (login, isolation) = (credentials.git(), self.payload.policy.isolation);
        let source = git::Source {
            url: spec.repo_url.as_str(),
            reference: spec.git_ref.as_ref().map(GitRef::as_str),
            transports: &transports,
            credentials: login.as_ref(),
            allows: &|address| self.payload.policy.allowed.submodule(address),
            keep_git: spec.keeps_git_dir(),
            most: git::Most {
                mebibytes: isolation.max_checkout_mb.into(),
                files: isolation.max_checkout_files.into(),
                memory: GIT_MEMORY,
            },
            environment: &around.git_environment,
        };
        let checked_out = git::check_out(&source, &checkout, &around.secret("git"), &self.log).await;
        let checked_out = checked_out.map_err(|error| git_failure(&error))?;
        self.log.say(&format!("==> building commit {}", checked_out.commit)).await;
        Ok(checked_out)
    }
}

fn build_request(
    spec: &Spec,
    around: &Surroundings,
    credentials: &Credentials,
    (context, dockerfile): (PathBuf, PathBuf),
    policy: &Policy,
    labels: std::collections::BTreeMap<String, String>,
) -> BuildRequest {
    let (allowed, network) = (policy.allowed.clone(), policy.isolation.build_network);
    let host = spec.registry_url.host().to_owned();
    let own =
        credentials.registry_login().map(|(username, password)| RegistryAuth { host, username, password });
    BuildRequest {
        context,
        dockerfile,
        tag: around.work_tag(),
        build_args: spec.build_args.clone(),
        target: spec.target.clone(),
        labels,
        no_cache: spec.no_cache,
        registry_auth: own.into_iter().chain(credentials.base_logins()).collect(),
        secrets: credentials.build_secrets(),
        agents: std::collections::BTreeMap::new(),
        // Caches are shared by the builds that one owner has in one namespace, and by no others.
        cache_namespace: format!("nomad-build-{}/{}", around.namespace, spec.owner),
        network,
        may_take: Box::new(move |source| match source {
            Source::Base(_) => allowed.base_image(source.name()),
            Source::Frontend(_) => allowed.frontend(source.name()),
            Source::Download(_) if !network => Err("needs a network, and builds have none here".to_owned()),
            Source::Download(address) => allowed.download(address),
        }),
        cache_key: cache_key(spec, &around.namespace),
    }
}

/// By what its steps are apart in the cache, where they are given secrets or sign with keys: those of who may name the same ones, as
/// what they leave in a layer may be as secret.
fn cache_key(spec: &Spec, namespace: &str) -> Option<String> {
    if spec.build_secrets.is_empty() && spec.ssh.is_empty() {
        return None;
    }
    let spec = spec.to_json();
    let named = json!([namespace, spec["build_secrets"], spec["ssh"]]).to_string();
    let digest = Sha256::digest(named.as_bytes());
    // A label of a host's name has at most 63 characters.
    Some(digest[..16].iter().map(|byte| format!("{byte:02x}")).collect())
}

/// A path of the checkout, with every link followed, that is still inside the checkout.
async fn inside(checkout: &Path, path: &str, field: &str) -> Result<PathBuf, Failure> {
    let missing = |_| Failure::new(Reason::InputMissing, format!("{field}: the repository has no {path:?}"));
    let root = tokio::fs::canonicalize(checkout).await.map_err(missing)?;
    let found = tokio::fs::canonicalize(root.join(path)).await.map_err(missing)?;
    if !found.starts_with(&root) {
        let message = format!("{field}: {path:?} is a link that leads out of the repository");
        return Err(Failure::new(Reason::InputMissing, message));
    }
    let git = root.join(".git");
    if found.starts_with(&git) {
        return Err(Failure::new(Reason::InputMissing, format!("{field}: {path:?} is git's own")));
    }
    Ok(found)
}

fn git_failure(error: &GitError) -> Failure {
    let reason = match error {
        GitError::NoSuchRef(_) | GitError::Ambiguous(_) => Reason::RefNotFound,
        GitError::Unauthorized(_) => Reason::Unauthorized,
        GitError::Missing(_)
        | GitError::File(..)
        | GitError::Pipe(_)
        | GitError::TooMuch { .. }
        | GitError::UnknownHost(_)
        | GitError::NotAllowed(..)
        | GitError::TooLarge(_)
        | GitError::Failed { .. } => Reason::CheckoutFailed,
    };
    let exit_code = match error {
        GitError::Failed { code, .. } => code.map(i64::from),
        _ => None,
    };
    Failure { exit_code, ..Failure::of(reason, error) }
}

/// What an engine's error means for a phase.
pub(super) fn engine_failure(error: &EngineError, otherwise: Reason) -> Failure {
    let (reason, exit_code) = match error {
        EngineError::Unreachable { .. } => (Reason::EngineUnavailable, None),
        EngineError::Unauthorized { .. } => (Reason::Unauthorized, None),
        EngineError::ImageMissing(_) => (Reason::ImageMissing, None),
        EngineError::NotAllowed { .. } => (Reason::ImageNotAllowed, None),
        EngineError::DownloadNotAllowed { .. } => (Reason::DownloadNotAllowed, None),
        EngineError::BuildFailed { exit_code, .. } => (Reason::BuildFailed, *exit_code),
        _ => (otherwise, None),
    };
    Failure { exit_code, ..Failure::of(reason, error) }
}
