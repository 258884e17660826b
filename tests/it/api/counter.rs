//! A proxy in front of Nomad that counts the requests that pass it, and may lose the answers to registrations.

use std::sync::{Arc, Mutex};

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use nomad_build::job::Claim;

struct Counting {
    nomad: String,
    http: reqwest::Client,
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
        let http = reqwest::Client::builder().tls_certs_only([]).build().unwrap();
        let counting = Arc::new(Counting {
            nomad: nomad.to_owned(),
            http,
            seen: Mutex::default(),
            fault: Mutex::default(),
        });
        let router = axum::Router::new().fallback(pass).with_state(Arc::clone(&counting));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(async move { axum::serve(listener, router).await });
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
    let (head, body) = request.into_parts();
    counting.seen.lock().unwrap().push(format!("{} {}", head.method, head.uri));
    let registers = head.method == "POST" && head.uri.path() == "/v1/jobs";
    let fault = counting.fault.lock().unwrap().filter(|_| registers);
    let body = axum::body::to_bytes(body, usize::MAX).await.unwrap();
    if let Some(Fault::LostBehindTheClaim) = fault {
        claim(&counting, &body).await;
    }
    let asked = counting.http.request(head.method, format!("{}{}", counting.nomad, head.uri));
    let mut answer = asked.headers(without_host(head.headers)).body(body).send().await.unwrap();
    if let Some(fault) = fault {
        let before = counting.seen.lock().unwrap().iter().filter(|seen| *seen == "POST /v1/jobs").count();
        return match fault {
            Fault::LostThenForbidden if before > 1 => (StatusCode::FORBIDDEN, "Permission denied"),
            _ => (StatusCode::INTERNAL_SERVER_ERROR, "No cluster leader"),
        }
        .into_response();
    }
    let mut response = Response::builder().status(answer.status());
    std::mem::swap(response.headers_mut().unwrap(), answer.headers_mut());
    response.body(Body::from_stream(answer.bytes_stream())).unwrap()
}

/// Writes the claim of the job that is being registered, as its publish task would.
async fn claim(counting: &Counting, registration: &[u8]) {
    let body: serde_json::Value = serde_json::from_slice(registration).unwrap();
    let id = body["Job"]["ID"].as_str().unwrap();
    let digest = format!("sha256:{}", "0".repeat(64));
    let items = Claim::claimed("allocation", &digest, chrono::Utc::now()).to_items().unwrap();
    let path = format!("nomad-build/claims/{id}");
    let url = format!("{}/v1/var/{path}?cas=0", counting.nomad);
    let variable = serde_json::json!({"Path": path, "Items": items});
    // Refused where an attempt before this one wrote it.
    counting.http.put(url).json(&variable).send().await.unwrap();
}

fn without_host(mut headers: axum::http::HeaderMap) -> axum::http::HeaderMap {
    headers.remove("host");
    headers
}
