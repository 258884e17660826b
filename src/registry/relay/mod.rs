//! A registry front for an engine's push: blobs go on to one repository of the real registry, the manifest stays here.
//!
//! An engine can only push a tag, and a tag that is pushed is public at once. So the engine pushes to a front on
//! loopback, which every Docker Engine speaks to over plain HTTP. The front adds the credentials, which the engine
//! never sees, and holds the manifest: its digest is known, and can be compared with what was tested, before any tag
//! names it. The caller then puts the manifest by digest, and under its tags.
//!
//! Invariant: nothing that comes through here creates or moves a tag.
//! Invariant: no blob is held in memory; what is held is bounded.
//! Invariant: only who knows the unguessable path can use the front, so another user of the machine can not push
//! with our credentials.

mod captured;
mod reply;
mod route;
mod serve;

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

use tokio::net::TcpListener;
use tokio_util::sync::{CancellationToken, DropGuard};
use uuid::Uuid;

pub use captured::CapturedManifest;
use route::Door;
use serve::{Elsewhere, Front};

use super::client::Client;
use super::digest::Digest;
use super::error::Error;
use super::name::Repository;

/// The tag that the engine pushes. It exists in the engine only.
const TAG: &str = "push";

/// A running front. Dropping it stops it, and breaks off what it is still forwarding.
#[derive(Debug)]
pub struct Relay {
    address: SocketAddr,
    front: Arc<Front>,
    _running: DropGuard,
}

/// Nothing was captured that could be published.
#[derive(Debug, thiserror::Error)]
pub enum RelayError {
    /// The front could not be opened.
    #[error("opening a registry front on 127.0.0.1")]
    Listen(#[source] std::io::Error),
    /// The real registry failed the push: this, not the engine's message, is why.
    #[error("pushing the image's content")]
    Upstream(#[source] Error),
    /// The engine did not push a manifest, and the real registry is not why.
    #[error("the engine ended its push without sending the image's manifest")]
    NothingPushed,
}

impl Relay {
    /// Opens a front on a free port of 127.0.0.1 that forwards to `repository` of the client's registry.
    pub async fn start(client: Arc<Client>, repository: Repository) -> Result<Self, RelayError> {
        Self::open(client, repository, Elsewhere::default()).await
    }

    /// The same for the image with this ID. What `others` of that registry's repositories hold of it is taken over from there,
    /// where the registry does that and the client's user may read them: an engine compresses a layer anew, and sends it,
    /// for every repository.
    pub async fn of_image(
        image_id: Digest,
        others: Vec<Repository>,
        client: Arc<Client>,
        repository: Repository,
    ) -> Result<Self, RelayError> {
        // Its configuration, where that is what its ID says, is in no other image.
        Self::open(client, repository, Elsewhere::except(image_id, others)).await
    }

    async fn open(
        client: Arc<Client>,
        repository: Repository,
        elsewhere: Elsewhere,
    ) -> Result<Self, RelayError> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.map_err(RelayError::Listen)?;
        let address = listener.local_addr().map_err(RelayError::Listen)?;
        // Each has 122 random bits; together they are well over 128.
        let secret = format!("{}{}", Uuid::new_v4().simple(), Uuid::new_v4().simple());
        let stop = CancellationToken::new();
        let front = Arc::new(Front::new(client, (repository, elsewhere), Door::new(&secret), stop.clone()));
        let router = serve::router(Arc::clone(&front));
        let stopped = stop.clone().cancelled_owned();
        #[expect(clippy::disallowed_methods, reason = "the relay holds what ends it")]
        tokio::spawn(async move {
            // It ends by `stop` only: axum waits out errors of accepting.
            axum::serve(listener, router).with_graceful_shutdown(stopped).await.ok();
        });
        Ok(Self { address, front, _running: stop.drop_guard() })
    }

    /// The reference to tag the image with in the engine, and to push. Whoever knows it can push while the relay runs.
    pub fn reference(&self) -> String {
        format!("{}/{}:{TAG}", self.address, self.front.door().repository())
    }

    /// Ends the relay after the engine's push, whatever came of it; gives what was captured.
    ///
    /// Failures of the registry that the engine got over by trying again are no error.
    pub fn finish(self) -> Result<CapturedManifest, RelayError> {
        match (self.front.take_captured(), self.front.take_failure()) {
            (Some(captured), _) => Ok(captured),
            (None, Some(error)) => Err(RelayError::Upstream(error)),
            (None, None) => Err(RelayError::NothingPushed),
        }
    }
}
