//! A job's log: whole, or as it is written, by WebSocket or server-sent events.

use std::time::Duration;

use axum::Extension;
use axum::extract::rejection::QueryRejection;
use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::ws::{CloseFrame, Message as Frame, WebSocket, WebSocketUpgrade, close_code};
use axum::extract::{Query, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::sse::{Event, Sse};
use axum::response::{IntoResponse, Response};
use chrono::{DateTime, Utc};
use futures_util::StreamExt as _;
use futures_util::stream::{self, BoxStream};
use secrecy::ExposeSecret as _;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use super::answer::{Code, Data, Problem, Unread, rfc3339};
use super::audit::By;
use super::caller::while_allowed;
use super::jobs::Id;
use super::server::Held;
use super::{App, texts};
use crate::job::{JobId, Phase};
use crate::nomad::Capability;
use crate::service::Caller;
use crate::service::logs::{Cursor, InvalidCursor, Message, Request};

const LAST_EVENT: &str = "last-event-id";

/// A connection is never silent for longer.
const HEARTBEAT: Duration = Duration::from_secs(15);

/// The most of a message of a reader, in bytes: what it says means nothing, and is not kept until it is whole.
const READERS: usize = 4 << 10;

/// The ID of the last event. A browser's event source opens again what the server closed, until it is told that there is no more.
const ENDED: &str = "end";

const NO_CURSOR: &str = "is not a cursor: use that of the last message that came";

/// What a caller may ask of a log. Texts, so that each one's error names its field.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct LogQuery {
    phase: Option<String>,
    tail: Option<String>,
    cursor: Option<String>,
    ticket: Option<String>,
}

impl LogQuery {
    /// One phase, or several separated by commas.
    fn phases(&self) -> Result<Option<Vec<Phase>>, Problem> {
        let Some(text) = &self.phase else { return Ok(None) };
        let phases = text.split(',').map(str::parse).collect::<Result<_, String>>();
        phases.map(Some).map_err(|why| Problem::parameter("phase", &why))
    }

    fn tail(&self) -> Result<Option<u64>, Problem> {
        let tail = self.tail.as_ref().map(|text| text.parse::<u32>().map(u64::from));
        tail.transpose().map_err(|_| {
            Problem::parameter("tail", &format!("is not a number of lines, at most {}", u32::MAX))
        })
    }

    fn cursor(&self) -> Result<Option<Cursor>, Problem> {
        let cursor = self.cursor.as_ref().map(|text| text.parse());
        cursor.transpose().map_err(|_| Problem::parameter("cursor", NO_CURSOR))
    }
}

/// `GET /jobs/{id}/logs`
pub(super) async fn whole(
    State(app): State<App>,
    caller: Caller,
    Id(id): Id,
    query: Result<Query<LogQuery>, QueryRejection>,
) -> Result<Response, Problem> {
    let tenant = app.allow_on(&caller, &id, Capability::ReadLogs).await?;
    let Query(query) = query?;
    let (phases, tail) = (query.phases()?, query.tail()?.and_then(|tail| usize::try_from(tail).ok()));
    for (name, value) in [("cursor", &query.cursor), ("ticket", &query.ticket)] {
        if value.is_some() {
            return Err(Problem::parameter(name, "belongs to /logs/stream"));
        }
    }
    let record = tenant.record_for_logs(&id).await?;
    let limit = app.service.config().log_limit;
    let logs = app.service.hub().text(&record, phases.as_deref(), tail, limit).await;
    let (logs, turn) = logs.map_err(|cause| Problem::from(Unread { job: id, cause }))?;
    Ok(texts::answer(logs, turn))
}

#[derive(Serialize)]
pub(super) struct TicketBody {
    ticket: String,
    #[serde(serialize_with = "rfc3339")]
    expires_at: DateTime<Utc>,
}

/// `POST /jobs/{id}/logs/tickets`
pub(super) async fn ticket(
    State(app): State<App>,
    caller: Caller,
    Id(id): Id,
) -> Result<Data<TicketBody>, Problem> {
    let tenant = app.allow_on(&caller, &id, Capability::ReadLogs).await?;
    tenant.record(&id).await?;
    let ticket = tenant.ticket(&id, &caller).await?;
    let (ticket, expires_at) = (ticket.secret.expose_secret().to_owned(), ticket.expires);
    Ok(Data(TicketBody { ticket, expires_at }))
}

/// `GET /jobs/{id}/logs/stream`
pub(super) async fn stream(
    State(app): State<App>,
    caller: Caller,
    Id(id): Id,
    query: Result<Query<LogQuery>, QueryRejection>,
    headers: HeaderMap,
    held: Option<Extension<Held>>,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<Response, Problem> {
    let Query(query) = query?;
    let mut request = Request { phases: query.phases()?, tail: query.tail()?, cursor: query.cursor()? };
    let has_ended = headers.get(LAST_EVENT).is_some_and(|id| id == ENDED);
    if !has_ended {
        // A browser's event source resumes by this header, and with the address that it was opened with: what came since counts.
        request.cursor = last_event(&headers)?.or(request.cursor);
    }
    if upgrade.is_err() && !wants_events(&headers) {
        let message = "open this as a WebSocket, or with Accept: text/event-stream";
        return Err(Problem::new(Code::InvalidRequest, message));
    }
    let caller = app.or_by_ticket(caller, &id, query.ticket.as_deref()).await?;
    let by = query.ticket.map(|_| Extension(By(caller.clone())));
    if has_ended && upgrade.is_err() {
        app.allow_on(&caller, &id, Capability::ReadLogs).await?.record_for_logs(&id).await?;
        return Ok((by, StatusCode::NO_CONTENT).into_response());
    }
    let answer = match (open(&app, caller, &id, request).await, upgrade) {
        (Err(problem), _) => problem.into_response(),
        (Ok(messages), Ok(upgrade)) => {
            let upgrade = upgrade.max_message_size(READERS).max_frame_size(READERS);
            upgrade.on_upgrade(async move |socket| {
                let _held = held;
                by_websocket(socket, messages, app.stopping).await;
            })
        }
        (Ok(messages), Err(_)) => by_events(messages, app.stopping),
    };
    Ok((by, answer).into_response())
}

/// Opens a job's log for a caller, for as long as the caller may read it.
async fn open(
    app: &App,
    caller: Caller,
    id: &JobId,
    request: Request,
) -> Result<BoxStream<'static, Message>, Problem> {
    let tenant = app.allow_on(&caller, id, Capability::ReadLogs).await?;
    let record = tenant.follow(id).await?;
    let mut messages = app.service.hub().read(record, request.clone());
    if let Err(InvalidCursor::Foreign) = messages {
        // Given out by a replica that knew of the allocation first: a client takes a refusal as final.
        messages = app.service.hub().read(tenant.follow_anew(id).await?, request);
    }
    let messages = messages.map_err(|error| Problem::parameter("cursor", &error.to_string()))?;
    Ok(while_allowed(messages, caller, tenant))
}

/// The cursor of the last event that came, where a reader resumes by its ID.
fn last_event(headers: &HeaderMap) -> Result<Option<Cursor>, Problem> {
    let Some(id) = headers.get(LAST_EVENT).filter(|id| !id.is_empty()) else { return Ok(None) };
    let cursor = id.to_str().ok().and_then(|text| text.parse().ok());
    cursor.map(Some).ok_or_else(|| Problem::parameter("Last-Event-ID", NO_CURSOR))
}

fn wants_events(headers: &HeaderMap) -> bool {
    headers
        .get(header::ACCEPT)
        .and_then(|value| value.to_str().ok())
        .is_some_and(|value| value.contains("text/event-stream"))
}

/// Sends messages until their end, until the reader goes, or until the service stops. Each message waits for the one
/// before to be taken, so a slow reader holds nothing but its own place.
async fn by_websocket(
    mut socket: WebSocket,
    mut messages: BoxStream<'static, Message>,
    stopping: CancellationToken,
) {
    let close = |code, reason: &'static str| Frame::Close(Some(CloseFrame { code, reason: reason.into() }));
    let mut heartbeat = tokio::time::interval_at(tokio::time::Instant::now() + HEARTBEAT, HEARTBEAT);
    loop {
        let message = tokio::select! {
            message = messages.next() => message,
            _ = heartbeat.tick() => Some(Message::Heartbeat { time: Utc::now() }),
            () = stopping.cancelled() => {
                socket.send(close(close_code::AWAY, "the service stops: resume with the last cursor")).await.ok();
                return;
            }
            // What a reader sends means nothing, but that it sends nothing any more ends the stream.
            received = socket.recv() => match received {
                Some(Ok(Frame::Close(_)) | Err(_)) | None => return,
                Some(Ok(_)) => continue,
            },
        };
        let Some(message) = message else {
            socket.send(close(close_code::NORMAL, "")).await.ok();
            return;
        };
        let Ok(text) = serde_json::to_string(&message) else { return };
        if socket.send(Frame::Text(text.into())).await.is_err() {
            return;
        }
        heartbeat.reset();
    }
}

/// The same as server-sent events: the type as the event's name, the cursor as its ID.
fn by_events(messages: BoxStream<'static, Message>, stopping: CancellationToken) -> Response {
    let events = stream::unfold(messages, move |mut messages| {
        let stopping = stopping.clone();
        async move {
            let message = tokio::select! {
                message = messages.next() => message?,
                () = tokio::time::sleep(HEARTBEAT) => Message::Heartbeat { time: Utc::now() },
                () = stopping.cancelled() => return None,
            };
            Some((message, messages))
        }
    });
    let events = events.map(|message| {
        let mut event = Event::default().event(message.kind());
        if let Some(cursor) = message.cursor() {
            event = event.id(cursor.to_string());
        } else if message.is_final() {
            event = event.id(ENDED);
        }
        event.json_data(&message)
    });
    // Proxies of nginx's kind keep an answer until they have some KiB of it, but for this header.
    ([("x-accel-buffering", "no")], Sse::new(events)).into_response()
}
