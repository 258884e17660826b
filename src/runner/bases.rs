//! The repositories of the job's own registry that its build took images from: what those hold is there already, and
//! need not be sent again when the image is published.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

use super::surroundings::Surroundings;
use crate::engine::Source;
use crate::registry::Repository;

/// More are not asked for a layer: each takes the registry a request.
const MOST: usize = 4;

/// What a build takes, while it does.
#[derive(Clone, Debug, Default)]
pub(super) struct Bases(Arc<Mutex<BTreeSet<String>>>);

impl Bases {
    pub(super) fn note(&self, source: Source<'_>) {
        if let Source::Base(_) = source {
            self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(source.name().to_owned());
        }
    }

    /// Leaves them to the publish task. It works without, so that they are no reason to fail.
    pub(super) async fn keep(&self, around: &Surroundings) {
        let names: Vec<_> = self.0.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect();
        tokio::fs::write(around.shared("bases"), names.join("\n")).await.ok();
    }
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
    fn what_reads_the_dockerfile_is_no_base() {
        let bases = Bases::default();
        for source in [Source::Base("h/a:1"), Source::Frontend("h/b:1"), Source::Base("h/a@sha256:aa")] {
            bases.note(source);
        }
        assert_eq!(bases.0.lock().unwrap().iter().collect::<Vec<_>>(), ["h/a"]);
    }
}
