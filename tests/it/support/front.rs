//! A registry front: passes everything on to the real registry, but for the requests that a test holds or refuses.

use std::sync::Arc;

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::Request;
use axum::http::{Method, StatusCode};
use axum::response::{IntoResponse, Response};
use tokio::net::TcpListener;
use tokio::sync::watch;

/// Which requests do not get through.
#[derive(Clone, Copy, Debug)]
pub(crate) enum At {
    /// Every request of a publish.
    Everything,
    /// The begin of an upload.
    Upload,
    /// A manifest put under its digest: the last request before the claim.
    Digest,
    /// A manifest put under a tag: the first request after the claim.
    Tag,
    /// A tag read back, after it was put.
    ReadBack,
}

impl At {
    fn is(self, method: &Method, path: &str) -> bool {
        let manifest = path.split_once("/manifests/").map(|(_, reference)| reference);
        let by_tag = manifest.is_some_and(|reference| !reference.starts_with("sha256:"));
        match self {
            Self::Everything => true,
            Self::Upload => method == Method::POST && path.contains("/blobs/uploads"),
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
        let host = serve(registry, at, Deed::Hold { open: opened, held: counter }).await;
        Self { host, open, held }
    }

    /// Refuses the requests `at`, as a registry that may only be read from does.
    pub(crate) async fn refusing(registry: &str, at: At, status: StatusCode) -> String {
        serve(registry, at, Deed::Refuse(status)).await
    }

    /// Waits until a request is held.
    pub(crate) async fn holds(&self) {
        let mut held = self.held.clone();
        let waits = held.wait_for(|held| *held > 0);
        tokio::time::timeout(std::time::Duration::from_mins(1), waits).await.unwrap().unwrap();
    }

    /// Lets what is held go on, and all that comes.
    pub(crate) fn let_go(&self) {
        self.open.send_replace(true);
    }
}

async fn serve(registry: &str, at: At, deed: Deed) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let host = listener.local_addr().unwrap().to_string();
    let http = reqwest::Client::builder().no_proxy().tls_certs_only([]).build().unwrap();
    let registry: Arc<str> = registry.into();
    let router = Router::new().fallback(move |request: Request| {
        let (http, registry, deed) = (http.clone(), Arc::clone(&registry), deed.clone());
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
            pass_on(&http, &registry, request).await
        }
    });
    tokio::spawn(async move { axum::serve(listener, router).await });
    host
}

/// With the front's own `Host`, so that the registry sends whoever uploads back to the front.
async fn pass_on(http: &reqwest::Client, registry: &str, request: Request) -> Response {
    let (head, body) = request.into_parts();
    let url = format!("http://{registry}{}", head.uri);
    let Ok(body) = to_bytes(body, 256 << 20).await else { return StatusCode::BAD_REQUEST.into_response() };
    let mut headers = head.headers;
    headers.remove("transfer-encoding");
    let answer = http.request(head.method, url).headers(headers).body(body).send().await;
    let Ok(answer) = answer else { return StatusCode::BAD_GATEWAY.into_response() };
    let (status, headers) = (answer.status(), answer.headers().clone());
    let mut response = Response::new(Body::from_stream(answer.bytes_stream()));
    *response.status_mut() = status;
    *response.headers_mut() = headers;
    response
}
