//! Publish: everything to the registry under no tag, then the claim, then the tags.
//!
//! The engine pushes to a relay in this process, which holds the manifest back. So the digest is known, and compared
//! with what was tested, before any tag exists; a kill up to the claim leaves no tag behind.

use std::sync::Arc;

use chrono::Utc;

use super::build::engine_failure;
use super::surroundings::Surroundings;
use super::{Failure, Runner, Work};
use crate::engine::Engine as _;
use crate::job::{Claim, Outcome, Payload, Phase, Published, Reason, Task};
use crate::registry::{
    self, CapturedManifest, Client, Digest, Endpoint, Manifest, PlainHttp, Reference, Relay,
};
use crate::registry::{RelayError, Repository};

/// The repository in the registry that a job publishes to.
pub(super) struct Target {
    client: Arc<Client>,
    repository: Repository,
    tags: Vec<Reference>,
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
    pub(super) async fn of(around: &Surroundings, payload: &Payload, task: Task) -> Result<Self, Failure> {
        let spec = &payload.spec;
        let internal = |error: &dyn std::error::Error| Failure::of(Reason::Internal, error);
        let credentials = around.credentials(task).await.map_err(|error| internal(&error))?.registry();
        let plain = PlainHttp::hosts(payload.insecure_registries.iter().cloned());
        let endpoint = Endpoint::new(spec.registry_url.host(), &plain).map_err(|error| internal(&error))?;
        let client = Client::new(endpoint, credentials).map_err(|error| internal(&error))?;
        let repository =
            spec.image_name.as_str().parse().map_err(|error: registry::NameError| internal(&error))?;
        let tags = spec.image_tags.iter().map(|tag| tag.as_str().parse());
        let tags = tags.collect::<Result<_, registry::NameError>>().map_err(|error| internal(&error))?;
        Ok(Self { client: Arc::new(client), repository, tags })
    }

    /// Puts a manifest under every tag and reads each of them back.
    ///
    /// A tag that cannot be put does not keep the others from being tried: the job has claimed all of them.
    async fn put_tags(&self, manifest: &Manifest) -> (Vec<Published>, Option<Failure>) {
        let mut failure = None;
        for tag in &self.tags {
            if let Err(error) = self.client.put_manifest(&self.repository, tag, manifest).await {
                failure.get_or_insert_with(|| registry_failure(&error));
            }
        }
        let mut published = Vec::new();
        for tag in &self.tags {
            let served = self.served(tag, manifest.digest()).await;
            if let Served::Nothing | Served::Unreadable = served {
                let message = format!("the registry took tag {tag}, and does not serve it");
                failure.get_or_insert_with(|| Failure::new(Reason::PushFailed, message));
            }
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
    pub(super) async fn repair(&self, mut outcome: Outcome, digest: &str) -> Work {
        outcome.digest = Some(digest.to_owned());
        match self.claimed_manifest(digest).await {
            Ok(manifest) => self.tag(outcome, &manifest).await,
            Err(failure) => {
                outcome.published = vec![Published::Unknown; self.tags.len()];
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

    async fn tag(&self, mut outcome: Outcome, manifest: &Manifest) -> Work {
        let (published, failure) = self.put_tags(manifest).await;
        outcome.published = published;
        match failure {
            None => Work::Done(outcome),
            Some(failure) => Work::FailedAfterClaim(outcome, failure),
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
        let claim = Claim::claimed(&self.around.allocation, &digest, Utc::now());
        let decision = match self.around.ledger.decide(&self.around.job, &claim).await {
            Ok(decision) => decision,
            Err(error) => return Work::Failed(begun, Failure::of(Reason::ClaimFailed, &error)),
        };
        match decision.claim {
            Claim::Revoked { verdict, .. } => return Work::Stopped(begun, verdict.message),
            Claim::Claimed { digest, .. } if !decision.ours => return target.repair(begun, &digest).await,
            Claim::Claimed { .. } => {}
        }
        // From here on nothing stops this job but its own end: signals are not listened to.
        self.log.say(&format!("==> claimed {digest}; tagging")).await;
        let work = target.tag(Outcome { digest: Some(digest), ..begun }, &manifest).await;
        self.say_tags(&work).await;
        work
    }

    pub(super) async fn repair(&self, begun: Outcome, digest: &str) -> Work {
        self.log.say(&format!("==> this job has claimed {digest} before: bringing every tag to it")).await;
        match Target::of(&self.around, &self.payload, Task::Phase(Phase::Publish)).await {
            Ok(target) => target.repair(begun, digest).await,
            Err(failure) => Work::FailedAfterClaim(begun, failure),
        }
    }

    async fn say_tags(&self, work: &Work) {
        let (Work::Done(outcome) | Work::FailedAfterClaim(outcome, _)) = work else { return };
        let spec = &self.payload.spec;
        for (tag, published) in spec.image_tags.iter().zip(&outcome.published) {
            let published = match published {
                Published::Yes => "published",
                Published::No => "is not this digest",
                Published::Unknown => "cannot be read back",
            };
            self.log.say(&format!("{}:{tag} {published}", spec.image())).await;
        }
    }

    /// Has the engine push to the registry under no tag, and makes sure that it pushed what was tested.
    async fn push(&self) -> Result<(Target, Manifest), Failure> {
        let target = Target::of(&self.around, &self.payload, Task::Phase(Phase::Publish)).await?;
        let image = self.tested_image().await?;
        self.log.say(&format!("==> pushing to {}", self.payload.spec.image())).await;
        target.knock(&image).await?;
        let relay = Relay::start(Arc::clone(&target.client), target.repository.clone()).await;
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
        check(&captured, &image)?;
        let put = captured.put_by_digest(&target.client, &target.repository).await;
        put.map_err(|error| registry_failure(&error))?;
        Ok((target, captured.manifest().clone()))
    }
}

/// What the engine pushed must be what was tested.
fn check(captured: &CapturedManifest, image: &str) -> Result<(), Failure> {
    let tested: Digest = image.parse().map_err(|error| Failure::of(Reason::Internal, &error))?;
    if captured.is_image(tested) {
        return Ok(());
    }
    let message =
        format!("the engine pushed {}, which is not the tested image {image}", captured.manifest().digest());
    Err(Failure::new(Reason::DigestMismatch, message))
}

fn registry_failure(error: &registry::Error) -> Failure {
    let reason = match error {
        registry::Error::Unauthorized { .. } => Reason::Unauthorized,
        _ => Reason::PushFailed,
    };
    Failure::of(reason, error)
}
