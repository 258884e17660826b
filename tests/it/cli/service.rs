//! A service that says what a test wrote down, where the real one could not be made to: cuts, odd ends, silence.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::{Json, RequestExt, Router};
use serde_json::{Value, json};

/// What the service does on one connection of the log's stream, in order.
#[derive(Clone)]
pub(super) enum Step {
    /// Sends one message.
    Say(Value),
    /// Sends log lines for as long as somebody reads.
    Flood,
    /// Says nothing more, and stays.
    Hang,
    /// Does not even open the connection.
    Refuse(u16, Value),
}

/// A request as it came.
#[derive(Clone, Debug)]
pub(super) struct Seen {
    /// Method, path and query.
    pub(super) line: String,
    pub(super) token: Option<String>,
    pub(super) key: Option<String>,
    pub(super) body: Value,
}

/// What the service says. Each list is used up in order; its last entry answers from then on.
#[derive(Clone, Default)]
pub(super) struct Script {
    /// By the request's method and path.
    pub(super) answers: Vec<(&'static str, Vec<(u16, Value)>)>,
    /// After its last step a connection is dropped, without a word unless `end` was said.
    pub(super) connections: Vec<Vec<Step>>,
}

/// A service on a port of its own.
pub(super) struct Service {
    pub(super) url: String,
    seen: Arc<Mutex<Vec<Seen>>>,
}

/// What is left to answer, by method and path.
type Answers = Vec<(&'static str, VecDeque<(u16, Value)>)>;

#[derive(Clone)]
struct Stage {
    answers: Arc<Mutex<Answers>>,
    connections: Arc<Mutex<VecDeque<Vec<Step>>>>,
    seen: Arc<Mutex<Vec<Seen>>>,
}

impl Service {
    pub(super) async fn start(script: Script) -> Self {
        let answers = script.answers.into_iter().map(|(route, list)| (route, list.into())).collect();
        let seen = Arc::default();
        let stage = Stage {
            answers: Arc::new(Mutex::new(answers)),
            connections: Arc::new(Mutex::new(script.connections.into())),
            seen: Arc::clone(&seen),
        };
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let app = Router::new().fallback(answer).with_state(stage);
        tokio::spawn(async move { axum::serve(listener, app).await });
        Self { url, seen }
    }

    pub(super) fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }

    /// The queries of the stream's connections, in order.
    pub(super) fn streamed(&self) -> Vec<String> {
        let seen = self.seen();
        let streams = seen.iter().filter_map(|seen| seen.line.split_once("/logs/stream"));
        streams.map(|(_, query)| query.to_owned()).collect()
    }
}

pub(super) fn data(data: Value) -> (u16, Value) {
    (200, json!({ "data": data, "error": null, "timestamp": "2026-01-02T03:04:05Z" }))
}

pub(super) fn refusal(status: u16, code: &str, details: Value) -> (u16, Value) {
    let error = json!({ "code": code, "message": format!("refused: {code}"), "details": details });
    (status, json!({ "data": null, "error": error, "timestamp": "2026-01-02T03:04:05Z" }))
}

fn header(request: &Request, name: &str) -> Option<String> {
    request.headers().get(name).map(|value| value.to_str().unwrap().to_owned())
}

async fn answer(State(stage): State<Stage>, mut request: Request) -> Response {
    let route = format!("{} {}", request.method(), request.uri().path());
    let line = format!("{} {}", request.method(), request.uri());
    let (token, key) = (header(&request, "x-nomad-token"), header(&request, "idempotency-key"));
    let upgrade = request.extract_parts::<WebSocketUpgrade>().await.ok();
    let body = axum::body::to_bytes(request.into_body(), 1 << 20).await.unwrap();
    let body = serde_json::from_slice(&body).unwrap_or(Value::Null);
    stage.seen.lock().unwrap().push(Seen { line, token, key, body });
    if let Some(upgrade) = upgrade {
        let steps = stage.connections.lock().unwrap().pop_front().unwrap_or_default();
        if let Some(Step::Refuse(status, body)) = steps.first() {
            return (StatusCode::from_u16(*status).unwrap(), Json(body.clone())).into_response();
        }
        return upgrade.on_upgrade(|socket| play(socket, steps));
    }
    let mut answers = stage.answers.lock().unwrap();
    let Some((_, list)) = answers.iter_mut().find(|(known, _)| *known == route) else {
        let (_, body) = refusal(404, "job_not_found", json!([]));
        return (StatusCode::NOT_FOUND, Json(body)).into_response();
    };
    let next = if list.len() > 1 { list.pop_front() } else { list.front().cloned() };
    let (status, body) = next.unwrap();
    let headers = [("x-request-id", "request-7")];
    (StatusCode::from_u16(status).unwrap(), headers, Json(body)).into_response()
}

async fn play(mut socket: WebSocket, steps: Vec<Step>) {
    for step in steps {
        match step {
            Step::Say(message) => {
                let is_end = message["type"] == "end";
                if socket.send(Message::Text(message.to_string().into())).await.is_err() {
                    return;
                }
                if is_end {
                    socket.send(Message::Close(None)).await.ok();
                }
            }
            Step::Flood => {
                let line = super::log("build", "flood", "c").to_string();
                while socket.send(Message::Text(line.clone().into())).await.is_ok() {}
            }
            Step::Hang => while socket.recv().await.is_some_and(|message| message.is_ok()) {},
            Step::Refuse(..) => return,
        }
    }
}
