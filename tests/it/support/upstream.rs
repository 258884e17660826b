//! What a front stands before: everything that a test does not take itself is passed on to it.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::Request;
use axum::http::StatusCode;
use axum::http::header::TRANSFER_ENCODING;
use axum::response::{IntoResponse, Response};
use tokio::net::TcpListener;

/// A server behind a front.
#[derive(Clone)]
pub(crate) struct Upstream {
    pub(crate) url: Arc<str>,
    pub(crate) http: reqwest::Client,
}

impl Upstream {
    pub(crate) fn new(url: &str) -> Self {
        let http = reqwest::Client::builder().no_proxy().tls_certs_only([]).build().unwrap();
        Self { url: url.into(), http }
    }

    /// A server that listens on a Unix socket.
    pub(crate) fn on_socket(path: &'static str) -> Self {
        let http =
            reqwest::Client::builder().no_proxy().tls_certs_only([]).unix_socket(path).build().unwrap();
        Self { url: "http://localhost".into(), http }
    }

    /// Passes a request on, whole, and its answer back as it comes. The `Host` stays the front's: a registry tells it as
    /// the place where uploads go on.
    pub(crate) async fn pass(&self, request: Request) -> Response {
        let (head, body) = request.into_parts();
        let Ok(body) = to_bytes(body, 256 << 20).await else {
            return StatusCode::BAD_REQUEST.into_response();
        };
        let mut headers = head.headers;
        headers.remove(TRANSFER_ENCODING);
        let asked = self.http.request(head.method, format!("{}{}", self.url, head.uri));
        let Ok(mut answer) = asked.headers(headers).body(body).send().await else {
            return StatusCode::BAD_GATEWAY.into_response();
        };
        let mut response = Response::builder().status(answer.status());
        std::mem::swap(response.headers_mut().unwrap(), answer.headers_mut());
        response.body(Body::from_stream(answer.bytes_stream())).unwrap()
    }
}

/// Serves a front on a port of its own, which ends with the test.
pub(crate) async fn serve(router: Router) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, router).await });
    address
}
