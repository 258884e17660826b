//! Health, readiness and metrics.

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use chrono::{DateTime, Utc};
use serde::Serialize;

use super::answer::{Code, Data, Problem, rfc3339};
use super::{App, plain};

#[derive(Serialize)]
pub(super) struct Probe {
    status: &'static str,
    #[serde(serialize_with = "rfc3339")]
    timestamp: DateTime<Utc>,
}

/// `GET /health`: the process answers. Never asks Nomad.
pub(super) async fn health() -> Data<Probe> {
    Data(Probe { status: "ok", timestamp: Utc::now() })
}

/// `GET /ready`: Nomad answers, and what is known is current.
pub(super) async fn ready(State(app): State<App>) -> Result<Data<Probe>, Problem> {
    match app.service.doubt().await {
        None => Ok(Data(Probe { status: "ready", timestamp: Utc::now() })),
        Some(why) => Err(Problem::new(Code::NotReady, &why)),
    }
}

/// `GET /metrics`
pub(super) async fn metrics(State(app): State<App>) -> Result<Response, Problem> {
    let text = app.service.metrics();
    let text =
        text.map_err(|error| Problem::new(Code::Internal, &format!("metrics cannot be written: {error}")))?;
    Ok(plain(StatusCode::OK, "text/plain; version=0.0.4; charset=utf-8", text))
}
