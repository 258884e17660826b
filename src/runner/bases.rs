//! The repositories that a build took images from.
//!
//! What those of the job's own registry hold is there already, and need not be sent again when the image is published. And an engine
//! that has an image takes it by its digest without asking the registry for whom: that is asked here.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::Failure;
use super::credentials::Credentials;
use super::log::Log;
use super::publish::registry_failure;
use super::surroundings::Surroundings;
use crate::engine::Source;
use crate::job::{Payload, Reason};
use crate::registry::{Client, Endpoint, PlainHttp, Reference, Repository};
use crate::telemetry::chain;

/// More are not asked for a layer: each takes the registry a request.
const MOST: usize = 4;

/// How long a registry may take to say whether a build may have an image.
const ANSWER: Duration = Duration::from_secs(20);

/// What a build takes, while it does: the names of images, each with its digest where no registry was asked for it.
#[derive(Clone, Debug, Default)]
pub(super) struct Bases(Arc<Mutex<BTreeMap<String, Option<String>>>>);

impl Bases {
    pub(super) fn note(&self, source: Source<'_>) {
        let Source::Base(reference) = source else { return };
        let digest = reference.split_once('@').map(|(_, digest)| digest.to_owned());
        let mut taken = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // What a tag stands for, the registry has told with the build's credentials; the digest that it told comes behind that.
        let known = taken.entry(source.name().to_owned()).or_insert_with(|| digest.clone());
        if digest.is_none() {
            *known = None;
        }
    }

    fn taken(&self) -> BTreeMap<String, Option<String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Leaves them to the publish task. It works without, so that they are no reason to fail.
    pub(super) async fn keep(&self, around: &Surroundings) {
        let names: Vec<_> = self.taken().into_keys().collect();
        tokio::fs::write(around.shared("bases"), names.join("\n")).await.ok();
    }

    /// Whether the build may have what it took by a digest. A registry that does not answer is none that refuses: the engine may have
    /// a way to it, or to a mirror, that this node's programs have not.
    pub(super) async fn may_be_had(
        &self,
        credentials: &Credentials,
        payload: &Payload,
        log: &Log,
    ) -> Result<(), Failure> {
        for (name, digest) in self.taken() {
            let Some(digest) = digest else { continue };
            match tokio::time::timeout(ANSWER, may_be_had(&name, &digest, credentials, payload)).await {
                Ok(Ok(true)) => {}
                Ok(Ok(false)) => {
                    let message =
                        format!("{name}@{digest}: the registry has no such image, though the engine has");
                    return Err(Failure::new(Reason::Unauthorized, message));
                }
                Ok(Err(failure)) if failure.reason == Reason::Unauthorized => return Err(failure),
                Ok(Err(failure)) => {
                    log.say(&format!("taken unasked: {name}@{digest}: {}", failure.message)).await;
                }
                Err(_) => {
                    let waited = format!("its registry did not answer within {} s", ANSWER.as_secs());
                    log.say(&format!("taken unasked: {name}@{digest}: {waited}")).await;
                }
            }
        }
        Ok(())
    }
}

async fn may_be_had(
    name: &str,
    digest: &str,
    credentials: &Credentials,
    payload: &Payload,
) -> Result<bool, Failure> {
    let unusable = |error: &dyn std::error::Error| Failure::new(Reason::BuildFailed, chain(error));
    let (host, path) = name.split_once('/').unwrap_or(("docker.io", name));
    let plain = PlainHttp::hosts(payload.insecure_registries.iter().cloned());
    let endpoint = Endpoint::new(host, &plain).map_err(|error| unusable(&error))?;
    let login = credentials.of_registry(host, payload.spec.registry_url.host());
    let client = Client::new(endpoint, login).map_err(|error| unusable(&error))?;
    let repository: Repository = path.parse().map_err(|error| unusable(&error))?;
    let reference = Reference::Digest(digest.parse().map_err(|error| unusable(&error))?);
    let found = client.head_manifest(&repository, &reference).await;
    found.map(|found| found.is_some()).map_err(|error| registry_failure(&error))
}

/// Those that the build left, as far as they are in this registry.
pub(super) async fn kept(around: &Surroundings, host: &str) -> Vec<Repository> {
    in_registry(&tokio::fs::read_to_string(around.shared("bases")).await.unwrap_or_default(), host)
}

fn in_registry(names: &str, host: &str) -> Vec<Repository> {
    let paths = names.lines().filter_map(|name| name.strip_prefix(host)?.strip_prefix('/'));
    paths.filter_map(|path| path.parse().ok()).take(MOST).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_repositories_of_the_registry_are_asked() {
        let names = "127.0.0.1:5000/base/busybox\n127.0.0.1:50001/x\ndocker.io/library/alpine\n127.0.0.1:5000/../x\n127.0.0.1:5000";
        let found = |host| in_registry(names, host).iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(found("127.0.0.1:5000"), ["base/busybox"]);
        assert_eq!(found("docker.io"), ["library/alpine"]);
        assert_eq!(found("ghcr.io"), [""; 0]);
        let many: Vec<_> = (0..9).map(|n| format!("h/{n}")).collect();
        assert_eq!(in_registry(&many.join("\n"), "h").len(), MOST);
    }

    #[test]
    fn an_image_is_known_by_its_digest_where_no_tag_was_asked_for() {
        let bases = Bases::default();
        for source in [
            Source::Base("h/a:1"),
            Source::Frontend("h/b:1"),
            Source::Base("h/a:1@sha256:aa"),
            Source::Base("h/c@sha256:bb"),
            Source::Base("h/c@sha256:bb"),
        ] {
            bases.note(source);
        }
        let taken = [("h/a".to_owned(), None), ("h/c".to_owned(), Some("sha256:bb".to_owned()))];
        assert_eq!(bases.taken(), BTreeMap::from(taken));
    }
}
