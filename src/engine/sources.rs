//! What a build takes from elsewhere, by BuildKit's own word.
//!
//! BuildKit tells of every image that a build takes, by a step of its own, with arguments put in. What stands in a Dockerfile is not
//! read here (`dockerfile` does that, before): a frontend may read it otherwise.

/// An image that a build takes: its reference as BuildKit completed it, `docker.io/library/alpine:3` for example.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source<'a> {
    /// What a stage begins with, copies from or mounts.
    Base(&'a str),
    /// What reads the Dockerfile, by its `# syntax=`.
    Frontend(&'a str),
    /// What the engine downloads in place of a step, from its own network: an address, or a word with a variable that may be one.
    Download(&'a str),
}

impl<'a> Source<'a> {
    /// What a step of BuildKit's takes; none where it takes nothing. The commands of a Dockerfile are steps `[STAGE N/M] …`, so none
    /// of them can be taken for one of these.
    pub(super) fn of(step: &'a str) -> Option<Self> {
        let resolved = step.strip_prefix("resolve image config for ");
        let resolved = resolved.map(|of| of.strip_prefix("docker-image://").unwrap_or(of));
        if let Some(reference) = resolved.or_else(|| step.strip_prefix("docker-image://")) {
            return Some(Self::Frontend(reference));
        }
        if step.starts_with("http://") || step.starts_with("https://") || step.starts_with("git://") {
            return Some(Self::Download(step));
        }
        // What is only copied from or mounted has no stage of its own. Where several platforms are built, each is named before
        // `internal`. No command of a Dockerfile begins like this.
        let (_, command) =
            step.strip_prefix('[').and_then(|step| step.split_once("] ")).unwrap_or(("", step));
        let base = command.strip_prefix("load metadata for ").or_else(|| command.strip_prefix("FROM "));
        base.map(Self::Base)
    }

    /// What it is called, in full.
    pub(super) fn reference(&self) -> &'a str {
        let (Self::Base(reference) | Self::Frontend(reference) | Self::Download(reference)) = self;
        reference
    }

    /// An image's name, without tag and digest.
    pub fn name(&self) -> &'a str {
        let (Self::Base(reference) | Self::Frontend(reference) | Self::Download(reference)) = self;
        let name = reference.split_once('@').map_or(*reference, |(name, _)| name);
        match name.rsplit_once(':') {
            // A port's number is followed by a path.
            Some((before, tag)) if !tag.contains('/') => before,
            _ => name,
        }
    }
}

/// An image's reference as BuildKit completes it: without a registry, it is Docker Hub's.
pub(super) fn complete(reference: &str) -> String {
    match reference.split_once('/') {
        Some((host, _)) if host.contains(['.', ':']) || host == "localhost" => reference.to_owned(),
        Some(_) => format!("docker.io/{reference}"),
        None => format!("docker.io/library/{reference}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_that_takes_an_image_is_told_from_one_that_runs() {
        use Source::{Base, Download, Frontend};
        for (step, source) in [
            (
                "[internal] load metadata for docker.io/library/alpine:3",
                Some(Base("docker.io/library/alpine:3")),
            ),
            (
                "[build 1/4] FROM docker.io/library/golang:1@sha256:aa",
                Some(Base("docker.io/library/golang:1@sha256:aa")),
            ),
            (
                "resolve image config for docker.io/docker/dockerfile:1",
                Some(Frontend("docker.io/docker/dockerfile:1")),
            ),
            (
                "resolve image config for docker-image://docker.io/docker/dockerfile:1",
                Some(Frontend("docker.io/docker/dockerfile:1")),
            ),
            (
                "docker-image://docker.io/docker/dockerfile:1@sha256:aa",
                Some(Frontend("docker.io/docker/dockerfile:1@sha256:aa")),
            ),
            ("[internal] load build definition from Dockerfile", None),
            ("FROM docker.io/eve/tools:latest", Some(Base("docker.io/eve/tools:latest"))),
            ("[linux/amd64 internal] load metadata for h/a:1", Some(Base("h/a:1"))),
            ("[context base] load metadata for h/a:1", Some(Base("h/a:1"))),
            ("https://h/a@b:c?d", Some(Download("https://h/a@b:c?d"))),
            ("[2/3] ADD https://h/a /x", None),
            ("[internal] load build context", None),
            ("[2/3] RUN echo [internal] load metadata for evil", None),
            ("[2/3] COPY . .", None),
            ("exporting to image", None),
        ] {
            assert_eq!(Source::of(step), source, "{step}");
        }
    }

    #[test]
    fn a_reference_without_a_registry_is_docker_hub_s() {
        for (reference, whole) in [
            ("alpine:3", "docker.io/library/alpine:3"),
            ("docker/dockerfile:1", "docker.io/docker/dockerfile:1"),
            ("docker.io/docker/dockerfile", "docker.io/docker/dockerfile"),
            ("localhost/a", "localhost/a"),
            ("h:5000/a:1", "h:5000/a:1"),
        ] {
            assert_eq!(complete(reference), whole);
        }
    }

    #[test]
    fn a_name_has_neither_tag_nor_digest() {
        for (reference, name) in [
            ("docker.io/library/alpine:3.19", "docker.io/library/alpine"),
            ("docker.io/library/alpine:3@sha256:aa", "docker.io/library/alpine"),
            ("127.0.0.1:5000/base@sha256:aa", "127.0.0.1:5000/base"),
            ("127.0.0.1:5000/base", "127.0.0.1:5000/base"),
            ("h:1/a/b:2", "h:1/a/b"),
        ] {
            assert_eq!(Source::Base(reference).name(), name);
        }
    }
}
