//! Manifests, as bytes and as what they say (pure).
//!
//! Invariant: the bytes are kept exactly as they came, so the digest stays true.

use bytes::Bytes;
use serde::Deserialize;

use super::digest::Digest;

/// The largest manifest that is read or held, in bytes: what registries themselves accept.
pub const LARGEST_MANIFEST: usize = 4 * 1024 * 1024;

const DOCKER_IMAGE: &str = "application/vnd.docker.distribution.manifest.v2+json";
const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
const OCI_IMAGE: &str = "application/vnd.oci.image.manifest.v1+json";
const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";

/// The `Accept` header that asks for every kind of manifest known here.
pub(super) const ACCEPT: &str = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, application/vnd.docker.distribution.manifest.v2+json";

/// Points at content by its digest (OCI image spec, "Content Descriptors").
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// What the content is.
    pub media_type: String,
    /// The content's digest.
    pub digest: Digest,
    /// The content's length in bytes.
    pub size: u64,
}

/// A manifest of one image, or an index of several.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    bytes: Bytes,
    media_type: String,
    digest: Digest,
    contents: Contents,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Contents {
    Image { config: Digest },
    Index { children: Vec<Descriptor> },
}

/// Bytes are not a manifest that can be published.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// Not JSON of the right shape.
    #[error("reading a manifest of type {media_type:?}")]
    Json {
        /// The type that it was sent as.
        media_type: String,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// A type that is neither an image's nor an index's.
    #[error("a manifest of type {0:?} is not supported")]
    MediaType(String),
    /// What it is sent as and what it says of itself differ.
    #[error("a manifest was sent as {sent:?}, but says that it is {said:?}")]
    Disagreement {
        /// The type that it was sent as.
        sent: String,
        /// The type inside.
        said: String,
    },
    /// Has the fields of an image and of an index, or of neither (CVE-2021-41190).
    #[error("a manifest of type {0:?} has not the fields of exactly that type")]
    Shape(String),
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Wire {
    media_type: Option<String>,
    config: Option<Descriptor>,
    layers: Option<Vec<Descriptor>>,
    manifests: Option<Vec<Descriptor>>,
}

impl Manifest {
    /// Reads `bytes` that were sent as `content_type` (its parameters are ignored).
    pub fn new(content_type: &str, bytes: Bytes) -> Result<Self, ManifestError> {
        let media_type = content_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
        let is_index = match media_type.as_str() {
            DOCKER_LIST | OCI_INDEX => true,
            DOCKER_IMAGE | OCI_IMAGE => false,
            _ => return Err(ManifestError::MediaType(media_type)),
        };
        let wire: Wire = serde_json::from_slice(&bytes)
            .map_err(|source| ManifestError::Json { media_type: media_type.clone(), source })?;
        if let Some(said) = wire.media_type.filter(|said| *said != media_type) {
            return Err(ManifestError::Disagreement { sent: media_type, said });
        }
        let contents = match (is_index, wire.config, wire.layers, wire.manifests) {
            (false, Some(config), Some(_), None) => Contents::Image { config: config.digest },
            (true, None, None, Some(children)) => Contents::Index { children },
            _ => return Err(ManifestError::Shape(media_type)),
        };
        Ok(Self { digest: Digest::of(&bytes), bytes, media_type, contents })
    }

    /// The manifest, byte for byte.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// What kind of manifest it is.
    pub fn media_type(&self) -> &str {
        &self.media_type
    }

    /// The digest of its bytes.
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// The digest of the image's configuration, which a Docker Engine calls the image's ID; an index has none.
    pub fn config_digest(&self) -> Option<Digest> {
        match self.contents {
            Contents::Image { config } => Some(config),
            Contents::Index { .. } => None,
        }
    }

    /// Whether it lists other manifests.
    pub fn is_index(&self) -> bool {
        matches!(self.contents, Contents::Index { .. })
    }

    /// The manifests that an index lists, in its order; an image has none.
    pub fn children(&self) -> &[Descriptor] {
        match &self.contents {
            Contents::Image { .. } => &[],
            Contents::Index { children } => children,
        }
    }

    /// What a registry answers to a HEAD of it.
    pub fn descriptor(&self) -> Descriptor {
        Descriptor { media_type: self.media_type.clone(), digest: self.digest, size: self.bytes.len() as u64 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn descriptor(content: &[u8]) -> String {
        format!(r#"{{"mediaType":"x/y","digest":"{}","size":{}}}"#, Digest::of(content), content.len())
    }

    #[test]
    fn an_image_names_its_configuration() {
        for kind in [DOCKER_IMAGE, OCI_IMAGE] {
            let json = format!(
                r#"{{"schemaVersion":2,"mediaType":"{kind}","config":{},"layers":[]}}"#,
                descriptor(b"c")
            );
            let manifest = Manifest::new(kind, json.clone().into()).unwrap();
            assert_eq!(manifest.config_digest(), Some(Digest::of(b"c")));
            assert_eq!(manifest.digest(), Digest::of(json.as_bytes()));
            assert!(!manifest.is_index());
        }
    }

    #[test]
    fn an_index_names_its_children() {
        for kind in [DOCKER_LIST, OCI_INDEX] {
            let json = format!(r#"{{"manifests":[{},{}]}}"#, descriptor(b"1"), descriptor(b"2"));
            let manifest = Manifest::new(&format!("{kind}; charset=utf-8"), json.into()).unwrap();
            assert!(manifest.is_index());
            assert_eq!(manifest.config_digest(), None);
            let children: Vec<Digest> = manifest.children().iter().map(|child| child.digest).collect();
            assert_eq!(children, [Digest::of(b"1"), Digest::of(b"2")]);
        }
    }

    #[test]
    fn what_could_be_read_in_two_ways_is_refused() {
        let config = descriptor(b"c");
        let cases = [
            (OCI_IMAGE, "{".to_owned()),
            (OCI_IMAGE, "{}".to_owned()),
            (OCI_IMAGE, r#"{"manifests":[]}"#.to_owned()),
            (OCI_INDEX, format!(r#"{{"config":{config},"layers":[]}}"#)),
            (OCI_IMAGE, format!(r#"{{"config":{config},"layers":[],"manifests":[]}}"#)),
            (OCI_IMAGE, format!(r#"{{"config":{config},"config":{config},"layers":[]}}"#)),
            (OCI_IMAGE, format!(r#"{{"mediaType":"{OCI_INDEX}","config":{config},"layers":[]}}"#)),
            (OCI_IMAGE, r#"{"config":{"mediaType":"a","digest":"md5:1","size":1},"layers":[]}"#.to_owned()),
            ("application/vnd.docker.distribution.manifest.v1+prettyjws", "{}".to_owned()),
            ("", "{}".to_owned()),
        ];
        for (kind, json) in cases {
            assert!(Manifest::new(kind, json.clone().into()).is_err(), "{kind} {json}");
        }
    }
}
