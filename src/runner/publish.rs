//! Publish: everything to the registry under no tag, then the claim, then the tags.
//!
//! The engine pushes to a relay in this process, which holds the manifest back. So the digest is known, and compared
//! with what was tested, before any tag exists; a kill up to the claim leaves no tag behind.

use std::sync::Arc;
use std::time::{Duration, Instant};

use chrono::Utc;

use super::build::engine_failure;
use super::log::Log;
use super::surroundings::Surroundings;
use super::{Failure, Runner, Work, bases, removal};
use crate::engine::{DockerEngine, Engine as _};
use crate::job::{Claim, JobId, Outcome, Payload, Phase, Published, Reason, Task};
use crate::registry::{
    self, CapturedManifest, Client, Digest, Endpoint, Manifest, PlainHttp, Reference, Relay,
};
use crate::registry::{RelayError, Repository};
use crate::telemetry::chain;

/// How long, behind the claim, a registry is waited for that is away or asks for time, for all tags together: no later run does
/// what was not done now. Counted on where a publish is said to hang.
const PATIENCE: Duration = Duration::from_mins(5);

/// How long it is for one tag, whatever the others took.
const LEAST_PATIENCE: Duration = Duration::from_mins(1);

/// The repository in the registry that a job publishes to, and where its image is until then.
pub(super) struct Target {
    client: Arc<Client>,
    repository: Repository,
    tags: Vec<Reference>,
    /// What people call it: `host[:port]/path`.
    image: String,
    /// The engine that has the job's image until it is published.
    engine: DockerEngine,
    job: JobId,
}

/// What the registry has under a tag after it took ours.
enum Served {
    This,
    /// Somebody pushed it after us, which is no failure of ours: the digest is there all the same.
    Another,
    Nothing,
    Unreadable,
}

impl From<Served> for Published {
    fn from(served: Served) -> Self {
        match served {
            Served::This => Self::Yes,
            Served::Another | Served::Nothing => Self::No,
            Served::Unreadable => Self::Unknown,
        }
    }
}

impl Target {
    pub(super) async fn of(
        around: &Surroundings,
        payload: &Payload,
        task: Task,
        log: &Log,
    ) -> Result<Self, Failure> {
        let spec = &payload.spec;
        let internal = |error: &dyn std::error::Error| Failure::of(Reason::Internal, error);
        let credentials = around.credentials(task, spec, log).await.map_err(|error| internal(&error))?;
        let credentials = credentials.registry();
        let plain = PlainHttp::hosts(payload.insecure_registries.iter().cloned());
        let endpoint = Endpoint::new(spec.registry_url.host(), &plain).map_err(|error| internal(&error))?;
        let client = Client::new(endpoint, credentials).map_err(|error| internal(&error))?;
        let repository =
            spec.image_name.as_str().parse().map_err(|error: registry::NameError| internal(&error))?;
        let tags = spec.image_tags.iter().map(|tag| tag.as_str().parse());
        let tags = tags.collect::<Result<_, registry::NameError>>().map_err(|error| internal(&error))?;
        let engine = DockerEngine::new(&around.engine_socket);
        let (client, image, job) = (Arc::new(client), spec.image(), around.job.clone());
        Ok(Self { client, repository, tags, image, engine, job })
    }

    /// Puts a manifest under every tag and reads each of them back.
    ///
    /// A tag that cannot be put does not keep the others from being tried: the job has claimed all of them. What is read back is
    /// what counts: an answer may be lost, and a registry whose tags stay what they are then refuses to be told again.
    async fn put_tags(&self, manifest: &Manifest) -> (Vec<Published>, Option<Failure>) {
        let until = Instant::now() + PATIENCE;
        let mut put = Vec::new();
        for tag in &self.tags {
            let patience = until.saturating_duration_since(Instant::now()).max(LEAST_PATIENCE);
            put.push(self.client.put_manifest_within(patience, &self.repository, tag, manifest).await.err());
        }
        let (mut published, mut failure) = (Vec::new(), None);
        for (tag, refused) in self.tags.iter().zip(put) {
            let served = self.served(tag, manifest.digest()).await;
            let failed = match (&served, refused) {
                (Served::This, _) | (Served::Another, None) => None,
                (_, Some(error)) => Some(registry_failure(&error)),
                (Served::Nothing | Served::Unreadable, None) => {
                    let message = format!("the registry took tag {tag}, and does not serve it");
                    Some(Failure::new(Reason::PushFailed, message))
                }
            };
            failure = failure.or(failed);
            published.push(served.into());
        }
        (published, failure)
    }

    /// Whether the registry is there and lets us in: an engine would try a dead one for minutes.
    async fn knock(&self, image: &str) -> Result<(), Failure> {
        let config: Digest = image.parse().map_err(|error| Failure::of(Reason::Internal, &error))?;
        let found = self.client.blob_exists(&self.repository, config).await;
        found.map(drop).map_err(|error| registry_failure(&error))
    }

    async fn served(&self, tag: &Reference, digest: Digest) -> Served {
        match self.client.head_manifest(&self.repository, tag).await {
            Ok(Some(served)) if served.digest == digest => Served::This,
            Ok(Some(_)) => Served::Another,
            Ok(None) => Served::Nothing,
            Err(_) => Served::Unreadable,
        }
    }

    /// Brings every tag to a digest that the registry already has.
    pub(super) async fn repair(&self, log: &Log, mut outcome: Outcome, digest: &str) -> Work {
        log.say(&format!("==> this job has claimed {digest} before: bringing every tag to it")).await;
        outcome.digest = Some(digest.to_owned());
        match self.claimed_manifest(digest).await {
            Ok(manifest) => self.tag(log, outcome, &manifest).await,
            Err(failure) => {
                outcome.published = vec![Published::Unknown; self.tags.len()];
                self.say_tags(log, &outcome).await;
                Work::FailedAfterClaim(outcome, failure)
            }
        }
    }

    async fn claimed_manifest(&self, digest: &str) -> Result<Manifest, Failure> {
        let digest: Digest = digest.parse().map_err(|error| Failure::of(Reason::Internal, &error))?;
        let manifest = self.client.get_manifest(&self.repository, &Reference::Digest(digest)).await;
        let manifest = manifest.map_err(|error| registry_failure(&error))?;
        let gone =
            || Failure::new(Reason::PushFailed, format!("the registry no longer has the claimed {digest}"));
        manifest.ok_or_else(gone)
    }

    /// Publishes what was claimed. The registry has it, and no run after this one needs the engine's image.
    async fn tag(&self, log: &Log, mut outcome: Outcome, manifest: &Manifest) -> Work {
        let ((published, failure), ()) = tokio::join!(self.put_tags(manifest), self.forget_image(log));
        outcome.published = published;
        self.say_tags(log, &outcome).await;
        match failure {
            None => Work::Done(outcome),
            Some(failure) => Work::FailedAfterClaim(outcome, failure),
        }
    }

    /// Who hears of a success and pulls the image on this node must not meet its removal: an engine that does both at once
    /// says that there is no such image.
    async fn forget_image(&self, log: &Log) {
        if let Err(error) = removal::images(&self.engine, &self.job, super::REMOVAL).await {
            let left = "names of the image may be left in the engine, for finish or a cleanup to remove";
            log.say(&format!("{left}: {}", chain(&error))).await;
        }
    }

    async fn say_tags(&self, log: &Log, outcome: &Outcome) {
        for (tag, published) in self.tags.iter().zip(&outcome.published) {
            let published = match published {
                Published::Yes => "published",
                Published::No => "is not this digest",
                Published::Unknown => "cannot be read back",
            };
            log.say(&format!("{}:{tag} {published}", self.image)).await;
        }
    }
}

impl Runner {
    pub(super) async fn publish(&self, begun: Outcome) -> Work {
        let pushed = match self.within_limits(Phase::Publish, self.push()).await {
            Ok(pushed) => pushed,
            Err(interrupted) => return interrupted.into_work(begun),
        };
        let (target, manifest) = pushed;
        let digest = manifest.digest().to_string();
        let ours = Claim::claimed(&self.around.allocation, &digest, Utc::now());
        match self.claim(&ours).await {
            Ok(standing) if standing == ours => match self.around.ledger.progress(&self.around.job).await {
                Ok((_, progress)) if progress.of(Phase::Build).is_some() => {}
                // Won behind a cleanup: the job was decided otherwise before.
                Ok(_) => return Work::Removed,
                // Nor is it revoked now, so finish asks once more.
                Err(error) => return Work::Failed(begun, Failure::of(Reason::ClaimFailed, &error)),
            },
            // An earlier run of this task claimed.
            Ok(Claim::Claimed { digest, .. }) => return target.repair(&self.log, begun, &digest).await,
            Ok(Claim::Revoked { verdict, .. }) => return Work::Stopped(begun, verdict.message),
            Err(failure) => return Work::Failed(begun, failure),
        }
        // From here on nothing stops this job but its own end: signals are not listened to.
        self.log.say(&format!("==> claimed {digest}; tagging")).await;
        target.tag(&self.log, Outcome { digest: Some(digest), ..begun }, &manifest).await
    }

    /// Claims the right to publish; the claim that stands then.
    async fn claim(&self, ours: &Claim) -> Result<Claim, Failure> {
        let error = match self.around.decide(ours).await {
            Ok(decision) => return Ok(decision.claim),
            Err(error) => error,
        };
        // It may have been written, and only the answer lost.
        match self.around.ledger.claim(&self.around.job).await {
            Ok(Some((_, standing))) => Ok(standing),
            // Should it be written all the same, whoever tells of this failure finds it.
            Ok(None) | Err(_) => Err(Failure::of(Reason::ClaimFailed, &error)),
        }
    }

    pub(super) async fn repair(&self, begun: Outcome, digest: &str) -> Work {
        match Target::of(&self.around, &self.payload, Task::Phase(Phase::Publish), &self.log).await {
            Ok(target) => target.repair(&self.log, begun, digest).await,
            Err(failure) => Work::FailedAfterClaim(begun, failure),
        }
    }

    /// Has the engine push to the registry under no tag, and makes sure that it pushed what was tested.
    async fn push(&self) -> Result<(Target, Manifest), Failure> {
        let target = Target::of(&self.around, &self.payload, Task::Phase(Phase::Publish), &self.log).await?;
        let image = self.tested_image().await?;
        self.log.say(&format!("==> pushing to {}", self.payload.spec.image())).await;
        target.knock(&image).await?;
        let id: Digest = image.parse().map_err(|error| Failure::of(Reason::Internal, &error))?;
        let bases = bases::kept(&self.around, target.client.host()).await;
        let (client, repository) = (Arc::clone(&target.client), target.repository.clone());
        let relay = Relay::of_image(id, bases, client, repository).await;
        let relay = relay.map_err(|error| Failure::of(Reason::Internal, &error))?;
        let reference = relay.reference();
        let pushed = self.log.with_output(|output| self.engine.push(&image, &reference, output)).await;
        let captured = match (relay.finish(), pushed) {
            (Ok(captured), Ok(())) => captured,
            // What the registry said tells more than what the engine made of it.
            (Err(RelayError::Upstream(error)), _) => return Err(registry_failure(&error)),
            (_, Err(error)) => return Err(engine_failure(&error, Reason::PushFailed)),
            (Err(error), Ok(())) => return Err(Failure::of(Reason::PushFailed, &error)),
        };
        check(&captured, id)?;
        let put = captured.put_by_digest(&target.client, &target.repository).await;
        put.map_err(|error| registry_failure(&error))?;
        Ok((target, captured.manifest().clone()))
    }
}

/// What the engine pushed must be what was tested.
fn check(captured: &CapturedManifest, tested: Digest) -> Result<(), Failure> {
    if captured.is_image(tested) {
        return Ok(());
    }
    let message =
        format!("the engine pushed {}, which is not the tested image {tested}", captured.manifest().digest());
    Err(Failure::new(Reason::DigestMismatch, message))
}

pub(super) fn registry_failure(error: &registry::Error) -> Failure {
    let reason = match error {
        registry::Error::Unauthorized { .. } => Reason::Unauthorized,
        _ => Reason::PushFailed,
    };
    Failure::of(reason, error)
}
