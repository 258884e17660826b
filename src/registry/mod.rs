//! Speaks to image registries: the OCI Distribution API, and a front for engines that push.
//!
//! Invariant: a manifest is what its digest says; nothing is believed because a registry says so.
//! Invariant: credentials go to the registry's own origin and to its token realm, nowhere else; they stand in no
//! URL, error or `Debug`.
//! Knows nothing of Nomad, jobs or engines.

mod auth;
mod challenge;
mod client;
mod digest;
mod endpoint;
mod error;
mod manifest;
mod name;
mod relay;
mod transport;
mod upload;

pub use auth::Credentials;
pub use client::Client;
pub use digest::{Digest, ParseDigestError};
pub use endpoint::{Endpoint, EndpointError, PlainHttp};
pub use error::Error;
pub use manifest::{Descriptor, LARGEST_MANIFEST, Manifest, ManifestError};
pub use name::{NameError, Reference, Repository};
pub use relay::{CapturedManifest, Relay, RelayError};
pub use transport::Limits;
