//! A registry's or a bucket's front: passes everything on to the real one, but for the requests that a test holds or refuses.

use std::time::Duration;

use axum::Router;
use axum::extract::Request;
use axum::http::{Method, StatusCode};
use axum::response::IntoResponse as _;
use tokio::sync::watch;

use super::upstream::{Upstream, serve};

/// Which requests do not get through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum At {
    /// Every request of a publish.
    Everything,
    /// Whatever is put.
    Put,
    /// The begin of an upload.
    Upload,
    /// The end of an upload that nobody goes on with.
    Ending,
    /// A manifest put, under whatever name.
    Manifest,
    /// A manifest put under its digest: the last request before the claim.
    Digest,
    /// A manifest put under a tag: the first request after the claim.
    Tag,
    /// A tag read back, after it was put.
    ReadBack,
}

impl At {
    pub(crate) fn is(self, method: &Method, path: &str) -> bool {
        let manifest = path.split_once("/manifests/").map(|(_, reference)| reference);
        let by_tag = manifest.is_some_and(|reference| !reference.starts_with("sha256:"));
        match self {
            Self::Everything => true,
            Self::Put => method == Method::PUT,
            Self::Upload => method == Method::POST && path.contains("/blobs/uploads"),
            Self::Ending => method == Method::DELETE && path.contains("/blobs/uploads"),
            Self::Manifest => method == Method::PUT && manifest.is_some(),
            Self::Digest => method == Method::PUT && manifest.is_some() && !by_tag,
            Self::Tag => method == Method::PUT && by_tag,
            Self::ReadBack => method == Method::HEAD && by_tag,
        }
    }
}

/// A registry's front on a port of its own.
pub(crate) struct Front {
    /// `host:port`.
    pub(crate) host: String,
    open: watch::Sender<bool>,
    held: watch::Receiver<usize>,
}

/// What the front does with the requests that do not get through.
#[derive(Clone)]
enum Deed {
    Hold { open: watch::Receiver<bool>, held: watch::Sender<usize> },
    Refuse(StatusCode),
}

impl Front {
    /// Holds the requests `at` until they are let go.
    pub(crate) async fn holding(registry: &str, at: At) -> Self {
        let (open, opened) = watch::channel(false);
        let (counter, held) = watch::channel(0);
        let host = front(registry, at, Deed::Hold { open: opened, held: counter }).await;
        Self { host, open, held }
    }

    /// Refuses the requests `at`, as a registry that may only be read from does.
    pub(crate) async fn refusing(registry: &str, at: At, status: StatusCode) -> String {
        front(registry, at, Deed::Refuse(status)).await
    }

    /// Waits until a request is held.
    pub(crate) async fn holds(&self) {
        assert!(self.holds_within(Duration::from_mins(1)).await, "nothing came to be held within a minute");
    }

    /// Waits until a request is held, or for so long; whether one is.
    pub(crate) async fn holds_within(&self, most: Duration) -> bool {
        let mut held = self.held.clone();
        let held = tokio::time::timeout(most, held.wait_for(|held| *held > 0)).await;
        held.is_ok_and(|held| held.is_ok())
    }

    /// Lets what is held go on, and all that comes.
    pub(crate) fn let_go(&self) {
        self.open.send_replace(true);
    }
}

async fn front(registry: &str, at: At, deed: Deed) -> String {
    let registry = Upstream::new(&format!("http://{registry}"));
    let router = Router::new().fallback(move |request: Request| {
        let (registry, deed) = (registry.clone(), deed.clone());
        async move {
            if at.is(request.method(), request.uri().path()) {
                match deed {
                    Deed::Hold { mut open, held } => {
                        held.send_modify(|held| *held += 1);
                        open.wait_for(|open| *open).await.ok();
                    }
                    Deed::Refuse(status) => return status.into_response(),
                }
            }
            registry.pass(request).await
        }
    });
    serve(router).await.to_string()
}
