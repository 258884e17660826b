//! The manifests that an engine pushed (pure).

use std::sync::Arc;

use super::super::client::Client;
use super::super::digest::Digest;
use super::super::error::Error;
use super::super::manifest::Manifest;
use super::super::name::{Reference, Repository};
use super::TAG;

/// Together the manifests of one push are at most this long, in bytes.
const MOST_BYTES: usize = 16 * 1024 * 1024;

/// What an engine pushed: one image, or an index and the manifests under it.
#[derive(Debug, Clone)]
pub struct CapturedManifest {
    manifest: Manifest,
    children: Vec<Manifest>,
}

impl CapturedManifest {
    /// The manifest that is to be tagged.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The manifests below it, in an order in which they can be put.
    pub fn children(&self) -> &[Manifest] {
        &self.children
    }

    /// Whether an engine that calls its image `image_id` pushed that image: the classic image store names an image by
    /// its configuration, the containerd store by its manifest or index.
    pub fn is_image(&self, image_id: Digest) -> bool {
        self.manifest.config_digest() == Some(image_id) || self.manifest.digest() == image_id
    }

    /// Puts all of it under its digests, and under no tag.
    pub async fn put_by_digest(&self, client: &Client, repository: &Repository) -> Result<(), Error> {
        for manifest in self.children.iter().chain([&self.manifest]) {
            client.put_manifest(repository, &manifest.digest().into(), manifest).await?;
        }
        Ok(())
    }
}

/// What has been pushed so far, in the order in which it came.
#[derive(Debug, Default)]
pub(super) struct Captured {
    manifests: Vec<Arc<Manifest>>,
    top: Option<Digest>,
}

/// The manifest is not held.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum NotHeld {
    /// It is not what its name says.
    WrongDigest,
    /// It stands under a tag other than the one that was given out.
    WrongTag,
    /// There are too many.
    TooMuch,
}

impl Captured {
    pub(super) fn hold(&mut self, reference: &Reference, manifest: Manifest) -> Result<(), NotHeld> {
        let digest = manifest.digest();
        match reference {
            Reference::Digest(expected) if *expected != digest => return Err(NotHeld::WrongDigest),
            Reference::Tag(tag) if tag != TAG => return Err(NotHeld::WrongTag),
            _ => {}
        }
        if self.by_digest(digest).is_none() {
            let held: usize = self.manifests.iter().map(|manifest| manifest.bytes().len()).sum();
            if held + manifest.bytes().len() > MOST_BYTES {
                return Err(NotHeld::TooMuch);
            }
            self.manifests.push(Arc::new(manifest));
        }
        if matches!(reference, Reference::Tag(_)) {
            self.top = Some(digest);
        }
        Ok(())
    }

    pub(super) fn find(&self, reference: &Reference) -> Option<Arc<Manifest>> {
        match reference {
            Reference::Digest(digest) => self.by_digest(*digest),
            Reference::Tag(tag) if tag == TAG => self.by_digest(self.top?),
            Reference::Tag(_) => None,
        }
    }

    fn by_digest(&self, digest: Digest) -> Option<Arc<Manifest>> {
        self.manifests.iter().find(|manifest| manifest.digest() == digest).cloned()
    }

    /// The tagged manifest and all that it leads to; what it does not lead to is left out.
    pub(super) fn complete(&self) -> Option<CapturedManifest> {
        let manifest = self.by_digest(self.top?)?;
        let mut wanted = vec![Arc::clone(&manifest)];
        let mut next = 0;
        while let Some(parent) = wanted.get(next).cloned() {
            let children = parent.children().iter().filter_map(|child| self.by_digest(child.digest));
            for child in children {
                if !wanted.contains(&child) {
                    wanted.push(child);
                }
            }
            next += 1;
        }
        // Deepest first: a registry takes an index only after what it lists.
        let children = wanted.iter().skip(1).rev().map(|child| Manifest::clone(child)).collect();
        Some(CapturedManifest { manifest: Manifest::clone(&manifest), children })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INDEX: &str = "application/vnd.oci.image.index.v1+json";
    const IMAGE: &str = "application/vnd.oci.image.manifest.v1+json";

    fn descriptor(digest: Digest) -> String {
        format!(r#"{{"mediaType":"x","digest":"{digest}","size":1}}"#)
    }

    fn image(config: &[u8]) -> Manifest {
        let json = format!(r#"{{"config":{},"layers":[]}}"#, descriptor(Digest::of(config)));
        Manifest::new(IMAGE, json.into()).unwrap()
    }

    fn index(children: &[&Manifest]) -> Manifest {
        let list: Vec<String> = children.iter().map(|child| descriptor(child.digest())).collect();
        Manifest::new(INDEX, format!(r#"{{"manifests":[{}]}}"#, list.join(",")).into()).unwrap()
    }

    fn tag(name: &str) -> Reference {
        Reference::Tag(name.to_owned())
    }

    #[test]
    fn the_tagged_manifest_is_what_is_captured() {
        let mut captured = Captured::default();
        captured.hold(&tag(TAG), image(b"1")).unwrap();
        let complete = captured.complete().unwrap();
        assert_eq!(complete.manifest(), &image(b"1"));
        assert!(complete.children().is_empty());
        assert!(complete.is_image(Digest::of(b"1")) && complete.is_image(image(b"1").digest()));
        assert!(!complete.is_image(Digest::of(b"2")));
    }

    #[test]
    fn the_manifests_below_an_index_come_before_it() {
        let (one, two, stray) = (image(b"1"), image(b"2"), image(b"3"));
        let inner = index(&[&one]);
        let outer = index(&[&inner, &two, &one]);
        let mut captured = Captured::default();
        for manifest in [&one, &two, &stray, &inner] {
            captured.hold(&manifest.digest().into(), manifest.clone()).unwrap();
        }
        assert!(captured.complete().is_none());
        captured.hold(&tag(TAG), outer.clone()).unwrap();
        let complete = captured.complete().unwrap();
        assert_eq!(complete.manifest(), &outer);
        let at = |manifest| complete.children().iter().position(|child| child == manifest);
        assert!(at(&one) < at(&inner) && at(&one).is_some() && at(&two).is_some());
        assert_eq!(at(&stray), None);
    }

    #[test]
    fn what_is_not_what_it_is_called_is_not_held() {
        let mut captured = Captured::default();
        let wrong = captured.hold(&Digest::of(b"other").into(), image(b"1"));
        assert_eq!(wrong, Err(NotHeld::WrongDigest));
        assert_eq!(captured.hold(&tag("latest"), image(b"1")), Err(NotHeld::WrongTag));
        assert!(captured.find(&tag("latest")).is_none() && captured.complete().is_none());
    }

    #[test]
    fn what_is_held_is_bounded() {
        let mut captured = Captured::default();
        let padding = " ".repeat(4 * 1024 * 1024 - 1024);
        let results: Vec<_> = (0..8_u8)
            .map(|n| {
                let json = format!(r#"{{"config":{},"layers":[]}}{padding}"#, descriptor(Digest::of(&[n])));
                let manifest = Manifest::new(IMAGE, json.into()).unwrap();
                captured.hold(&manifest.digest().into(), manifest)
            })
            .collect();
        assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 4);
        assert_eq!(results.last(), Some(&Err(NotHeld::TooMuch)));
    }
}
