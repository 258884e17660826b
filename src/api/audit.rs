//! The audit log: who did what to which job, and what came of it, one JSON object a line.
//!
//! Told are submissions, kills, cleanups, reads of logs, and whatever was refused for who asked. Statuses and lists are not:
//! there are thousands a second. The file is opened for each line, so that it can be moved away at any time.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use axum::extract::{ConnectInfo, RawPathParams, Request};
use axum::http::{Method, StatusCode};
use axum::response::Response;
use chrono::{DateTime, Utc};
use secrecy::SecretString;
use serde::Serialize;
use tokio::io::AsyncWriteExt as _;

use super::answer::{ErrorCode, rfc3339};
use super::caller::token;
use crate::job::JobId;
use crate::service::{Caller, Service};
use crate::telemetry::chain;

/// The job that an answer is about, where its path does not say.
#[derive(Clone)]
pub(super) struct About(pub(super) JobId);

/// Who asked, where the request does not say it by a token.
#[derive(Clone)]
pub(super) struct By(pub(super) Caller);

/// Beside an answer that did nothing, and was not to: to a submission that is only checked, to the begin of a login.
#[derive(Clone, Copy)]
pub(super) struct DryRun;

/// What is known of a request before it is answered.
pub(super) struct Asked {
    action: &'static str,
    token: Option<SecretString>,
    address: Option<SocketAddr>,
    job: Option<String>,
}

/// What is told of an answer.
pub(super) struct Answer {
    status: StatusCode,
    about: Option<About>,
    by: Option<By>,
    error: Option<ErrorCode>,
    is_dry: bool,
}

impl Answer {
    pub(super) fn of(answer: &Response) -> Self {
        let extensions = answer.extensions();
        Self {
            status: answer.status(),
            about: extensions.get().cloned(),
            by: extensions.get().cloned(),
            error: extensions.get().copied(),
            is_dry: extensions.get::<DryRun>().is_some(),
        }
    }
}

/// One line.
#[derive(Serialize)]
struct Line<'a> {
    #[serde(serialize_with = "rfc3339")]
    time: DateTime<Utc>,
    request: &'a str,
    action: &'a str,
    job: Option<&'a str>,
    who: Option<&'a str>,
    address: Option<SocketAddr>,
    status: u16,
    error: Option<&'a str>,
}

/// What is done too often to be told, unless it was refused.
const STATUS: &str = "read_status";
const LIST: &str = "list_jobs";

/// What a route does, in the words of the audit log.
fn action(method: &Method, route: &str) -> Option<&'static str> {
    match route {
        "/jobs" if method == Method::POST => Some("submit"),
        "/jobs" => Some(LIST),
        "/auth/login" if method == Method::POST => Some("login"),
        "/jobs/{id}/status" => Some(STATUS),
        "/jobs/{id}/logs" => Some("read_logs"),
        "/jobs/{id}/logs/stream" => Some("follow_logs"),
        "/jobs/{id}/logs/tickets" => Some("ticket"),
        "/jobs/{id}/kill" => Some("kill"),
        "/jobs/{id}/cleanup" => Some("cleanup"),
        _ => None,
    }
}

impl Asked {
    /// What is to be told of a request, if anything may be.
    pub(super) fn of(request: &Request, route: &str, parameters: Option<&RawPathParams>) -> Option<Self> {
        let action = action(request.method(), route)?;
        let address = request.extensions().get::<ConnectInfo<SocketAddr>>().map(|ConnectInfo(from)| *from);
        // As the route reads it; what is no ID may be anything.
        let id = parameters.and_then(|all| all.iter().find(|(name, _)| *name == "id")).map(|(_, id)| id);
        let job = id.and_then(|id| id.parse::<JobId>().ok()).map(|id| id.to_string());
        Some(Self { action, token: token(request.headers()), address, job })
    }

    /// Tells what came of it.
    pub(super) async fn tell(self, service: &Service, file: &Path, request: &str, answer: Answer) {
        let Answer { status, about, by, error, is_dry } = answer;
        // A job that may not be seen is one that is not there.
        let is_refused =
            matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN | StatusCode::NOT_FOUND);
        // Who is refused for asking too fast is not to have more done than that.
        let is_nothing =
            is_dry || matches!(status, StatusCode::METHOD_NOT_ALLOWED | StatusCode::TOO_MANY_REQUESTS);
        if is_nothing || (matches!(self.action, STATUS | LIST) && !is_refused) {
            return;
        }
        let about = about.map(|About(job)| job.to_string()).or(self.job);
        let error = error.map(|ErrorCode(code)| code);
        let who = match by {
            Some(By(Caller { subject: Some(subject), .. })) => Some(subject),
            Some(By(Caller { token, .. })) => service.name_of(token).await,
            None => service.name_of(self.token).await,
        };
        let line = Line {
            time: Utc::now(),
            request,
            action: self.action,
            job: about.as_deref(),
            who: who.as_deref(),
            address: self.address,
            status: status.as_u16(),
            error,
        };
        if let Err(error) = append(file.to_owned(), &line).await {
            let line = serde_json::to_string(&line).unwrap_or_default();
            tracing::error!(error = chain(&error), line, "the audit log could not be written to");
        }
    }
}

async fn append(file: PathBuf, line: &Line<'_>) -> std::io::Result<()> {
    let mut bytes = serde_json::to_vec(line)?;
    bytes.push(b'\n');
    let mut options = tokio::fs::OpenOptions::new();
    let mut file = options.create(true).append(true).mode(0o600).open(file).await?;
    // In one piece, so that lines of several requests and replicas do not mix.
    file.write_all(&bytes).await?;
    file.flush().await
}
