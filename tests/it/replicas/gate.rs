//! A proxy in front of a registry that takes no manifest until it is opened.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::Method;
use axum::response::Response;
use tokio::sync::watch;

struct Gated {
    registry: String,
    http: reqwest::Client,
    open: watch::Sender<bool>,
}

/// A running proxy; it ends with the test.
pub(super) struct Gate {
    pub(super) host: String,
    gated: Arc<Gated>,
}

impl Gate {
    pub(super) async fn start(registry: &str) -> Self {
        let http = reqwest::Client::builder().tls_certs_only([]).build().unwrap();
        let gated = Arc::new(Gated { registry: registry.to_owned(), http, open: watch::Sender::new(false) });
        let router = axum::Router::new().fallback(pass).with_state(Arc::clone(&gated));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let host = listener.local_addr().unwrap().to_string();
        tokio::spawn(async move { axum::serve(listener, router).await });
        Self { host, gated }
    }

    pub(super) fn open(&self) {
        self.gated.open.send_replace(true);
    }
}

async fn pass(State(gated): State<Arc<Gated>>, request: Request) -> Response {
    let (head, body) = request.into_parts();
    let body = axum::body::to_bytes(body, usize::MAX).await.unwrap();
    if head.method == Method::PUT && head.uri.path().contains("/manifests/") {
        gated.open.subscribe().wait_for(|open| *open).await.unwrap();
    }
    // The host stays the proxy's: the registry tells it as the place where uploads go on.
    let asked = gated.http.request(head.method, format!("http://{}{}", gated.registry, head.uri));
    let mut answer = asked.headers(head.headers).body(body).send().await.unwrap();
    let mut response = Response::builder().status(answer.status());
    std::mem::swap(response.headers_mut().unwrap(), answer.headers_mut());
    response.body(Body::from_stream(answer.bytes_stream())).unwrap()
}
