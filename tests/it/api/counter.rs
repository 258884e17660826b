//! A proxy in front of Nomad that counts the requests that pass it, and may lose the answers to registrations.

use std::sync::{Arc, Mutex};

use axum::body::to_bytes;
use axum::extract::{Request, State};
use axum::http::{Method, StatusCode};
use axum::response::{IntoResponse as _, Response};
use nomad_build::job::Claim;

use crate::support::{Upstream, serve};

struct Counting {
    nomad: Upstream,
    seen: Mutex<Vec<String>>,
    fault: Mutex<Option<Fault>>,
}

/// What becomes of a registration, which Nomad always gets.
#[derive(Clone, Copy)]
pub(super) enum Fault {
    /// Its answer is lost.
    Lost,
    /// The first answer is lost, and then the service may register no more.
    LostThenForbidden,
    /// The job has claimed the right to publish before the answer is lost.
    LostBehindTheClaim,
}

/// A running proxy; it ends with the test.
pub(super) struct Counter {
    pub(super) url: String,
    counting: Arc<Counting>,
}

impl Counter {
    pub(super) async fn start(nomad: &str) -> Self {
        let counting = Arc::new(Counting {
            nomad: Upstream::new(nomad),
            seen: Mutex::default(),
            fault: Mutex::default(),
        });
        let router = axum::Router::new().fallback(pass).with_state(Arc::clone(&counting));
        let url = format!("http://{}", serve(router).await);
        Self { url, counting }
    }

    /// From now on nobody learns whether a job was registered. All of them are.
    pub(super) fn lose_registrations(&self, fault: Fault) {
        *self.counting.fault.lock().unwrap() = Some(fault);
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
    counting.seen.lock().unwrap().push(format!("{} {}", request.method(), request.uri()));
    let registers = request.method() == Method::POST && request.uri().path() == "/v1/jobs";
    let fault = counting.fault.lock().unwrap().filter(|_| registers);
    let Some(fault) = fault else { return counting.nomad.pass(request).await };
    let (head, body) = request.into_parts();
    let body = to_bytes(body, 1 << 20).await.unwrap();
    if let Fault::LostBehindTheClaim = fault {
        claim(&counting.nomad, &body).await;
    }
    counting.nomad.pass(Request::from_parts(head, body.into())).await;
    let attempts = counting.seen.lock().unwrap().iter().filter(|seen| *seen == "POST /v1/jobs").count();
    match fault {
        Fault::LostThenForbidden if attempts > 1 => (StatusCode::FORBIDDEN, "Permission denied"),
        _ => (StatusCode::INTERNAL_SERVER_ERROR, "No cluster leader"),
    }
    .into_response()
}

/// Writes the claim of the job that is being registered, as its publish task would.
async fn claim(nomad: &Upstream, registration: &[u8]) {
    let body: serde_json::Value = serde_json::from_slice(registration).unwrap();
    let id = body["Job"]["ID"].as_str().unwrap();
    let digest = format!("sha256:{}", "0".repeat(64));
    let items = Claim::claimed("allocation", &digest, chrono::Utc::now()).to_items().unwrap();
    let path = format!("nomad-build/claims/{id}");
    let url = format!("{}/v1/var/{path}?cas=0", nomad.url);
    let variable = serde_json::json!({"Path": path, "Items": items});
    // Refused where an attempt before this one wrote it.
    nomad.http.put(url).json(&variable).send().await.unwrap();
}
