//! A proxy in front of Nomad that counts the requests that pass it, and may lose the answers to registrations.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};

struct Counting {
    nomad: String,
    http: reqwest::Client,
    seen: Mutex<Vec<String>>,
    losing: AtomicBool,
}

/// A running proxy; it ends with the test.
pub(super) struct Counter {
    pub(super) url: String,
    counting: Arc<Counting>,
}

impl Counter {
    pub(super) async fn start(nomad: &str) -> Self {
        let http = reqwest::Client::builder().tls_certs_only([]).build().unwrap();
        let counting = Arc::new(Counting {
            nomad: nomad.to_owned(),
            http,
            seen: Mutex::default(),
            losing: AtomicBool::default(),
        });
        let router = axum::Router::new().fallback(pass).with_state(Arc::clone(&counting));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(async move { axum::serve(listener, router).await });
        Self { url, counting }
    }

    /// From now on nobody learns whether a job was registered. All of them are.
    pub(super) fn lose_registrations(&self) {
        self.counting.losing.store(true, Ordering::Relaxed);
    }

    /// How many requests came so far.
    pub(super) fn requests(&self) -> usize {
        self.counting.seen.lock().unwrap().len()
    }

    /// The requests that came after so many.
    pub(super) fn since(&self, count: usize) -> Vec<String> {
        self.counting.seen.lock().unwrap()[count..].to_vec()
    }
}

async fn pass(State(counting): State<Arc<Counting>>, request: Request) -> Response {
    let (head, body) = request.into_parts();
    counting.seen.lock().unwrap().push(format!("{} {}", head.method, head.uri));
    let lost =
        head.method == "POST" && head.uri.path() == "/v1/jobs" && counting.losing.load(Ordering::Relaxed);
    let body = axum::body::to_bytes(body, usize::MAX).await.unwrap();
    let asked = counting.http.request(head.method, format!("{}{}", counting.nomad, head.uri));
    let mut answer = asked.headers(without_host(head.headers)).body(body).send().await.unwrap();
    if lost {
        return (StatusCode::INTERNAL_SERVER_ERROR, "No cluster leader").into_response();
    }
    let mut response = Response::builder().status(answer.status());
    std::mem::swap(response.headers_mut().unwrap(), answer.headers_mut());
    response.body(Body::from_stream(answer.bytes_stream())).unwrap()
}

fn without_host(mut headers: axum::http::HeaderMap) -> axum::http::HeaderMap {
    headers.remove("host");
    headers
}
