//! A job's log as one unbroken sequence of messages, however often the connection breaks.
//!
//! Invariant: a message is handed on exactly once; after a cut the service is asked to go on behind the last cursor.

use std::time::{Duration, Instant};

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};
use futures_util::StreamExt;
use reqwest::StatusCode;
use tokio::sync::mpsc::Sender;
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::handshake::client::Request;
use tokio_tungstenite::tungstenite::{self, Utf8Bytes};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async_tls_with_config};

use super::client::{Client, TOKEN_HEADER};
use super::fields::JobId;
use super::wire::{Envelope, Message};
use super::{Error, Exit};

type Socket = WebSocketStream<MaybeTlsStream<tokio::net::TcpStream>>;

/// How long what is waited for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Patience {
    /// For a connection to stand.
    pub(super) connect: Duration,
    /// For the next message, heartbeats included, before a connection counts as dead.
    pub(super) idle: Duration,
    /// For any message at all, over all attempts, before following is given up.
    pub(super) give_up: Duration,
    /// Before the first new attempt; later ones wait longer.
    pub(super) first_delay: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(10),
            idle: Duration::from_mins(1),
            give_up: Duration::from_mins(5),
            first_delay: Duration::from_millis(200),
        }
    }
}

/// What comes of following a log.
#[derive(Debug)]
pub(super) enum Event {
    /// The service said something: what it means, and its very words.
    Message(Message, Utf8Bytes),
    /// The connection broke; it is tried again.
    Cut(Cut),
}

/// Why a connection broke, where trying again may help.
#[derive(Debug, thiserror::Error)]
pub(super) enum Cut {
    #[error("the service cannot be reached")]
    Connect(#[source] Box<tungstenite::Error>),
    #[error("the service answered HTTP {0}")]
    Unavailable(StatusCode),
    #[error("no connection within {} s", .0.as_secs())]
    Slow(Duration),
    #[error("the connection broke")]
    Broken(#[source] Box<tungstenite::Error>),
    #[error("the connection was closed before the job's end")]
    Closed,
    #[error("nothing was heard for {} s", .0.as_secs())]
    Silent(Duration),
}

/// Which part of which log.
#[derive(Clone, Debug)]
pub(super) struct Wanted {
    pub(super) job: JobId,
    pub(super) phase: Option<String>,
    pub(super) tail: Option<u64>,
    /// Of the last message that came; overrules `tail`.
    pub(super) cursor: Option<String>,
}

/// Follows one job's log.
#[derive(Debug)]
pub(super) struct Follower<'a> {
    client: &'a Client,
    wanted: Wanted,
    patience: Patience,
    status: Option<(String, Option<String>)>,
    last_heard: Instant,
    /// Whether the present connection brought anything new.
    progress: bool,
}

/// How one connection ended.
enum Ended {
    /// With the job's log, or because nobody listens any more.
    Finished,
    Cut(Cut),
}

impl<'a> Follower<'a> {
    /// A follower that has not begun.
    pub(super) fn new(client: &'a Client, wanted: Wanted, patience: Patience) -> Self {
        let last_heard = Instant::now();
        Self { client, wanted, patience, status: None, last_heard, progress: false }
    }

    /// Hands on every event up to and with the `end` message, or the failure that makes it hopeless to go on.
    pub(super) async fn run(mut self, events: Sender<Result<Event, Error>>) {
        if let Err(error) = self.follow(&events).await {
            // Where nobody listens any more, nobody minds.
            events.send(Err(error)).await.ok();
        }
    }

    async fn follow(&mut self, events: &Sender<Result<Event, Error>>) -> Result<(), Error> {
        let mut delays = self.delays();
        loop {
            self.progress = false;
            let cut = match self.one_connection(events).await? {
                Ended::Finished => return Ok(()),
                Ended::Cut(cut) => cut,
            };
            if self.progress {
                delays = self.delays();
            }
            let delay = delays.next().unwrap_or(self.patience.first_delay);
            if self.last_heard.elapsed() + delay > self.patience.give_up {
                return Err(self.given_up(cut));
            }
            if events.send(Ok(Event::Cut(cut))).await.is_err() {
                return Ok(());
            }
            tokio::time::sleep(delay).await;
        }
    }

    async fn one_connection(&mut self, events: &Sender<Result<Event, Error>>) -> Result<Ended, Error> {
        let connector = self.client.connector();
        let connecting = connect_async_tls_with_config(self.request()?, None, true, connector);
        let mut socket = match timeout(self.patience.connect, connecting).await {
            Ok(Ok((socket, _))) => socket,
            Ok(Err(error)) => return self.not_connected(error).map(Ended::Cut),
            Err(_) => return Ok(Ended::Cut(Cut::Slow(self.patience.connect))),
        };
        loop {
            let text = match self.next_text(&mut socket).await {
                Ok(text) => text,
                Err(cut) => return Ok(Ended::Cut(cut)),
            };
            let message = self.understand(&text)?;
            let is_end = matches!(message, Message::End { .. });
            if !self.is_news(&message) {
                continue;
            }
            if events.send(Ok(Event::Message(message, text))).await.is_err() || is_end {
                return Ok(Ended::Finished);
            }
        }
    }

    /// The next text message; pings and their like only show that the connection lives.
    async fn next_text(&self, socket: &mut Socket) -> Result<Utf8Bytes, Cut> {
        loop {
            match timeout(self.patience.idle, socket.next()).await {
                Ok(Some(Ok(tungstenite::Message::Text(text)))) => return Ok(text),
                Ok(Some(Ok(_))) => {}
                Ok(Some(Err(error))) => return Err(Cut::Broken(Box::new(error))),
                Ok(None) => return Err(Cut::Closed),
                Err(_) => return Err(Cut::Silent(self.patience.idle)),
            }
        }
    }

    /// Remembers where the log stands; a status that is repeated after a new connection is no news.
    fn is_news(&mut self, message: &Message) -> bool {
        self.last_heard = Instant::now();
        if let Some(cursor) = message.cursor() {
            self.wanted.cursor = Some(cursor.to_owned());
        }
        match message {
            Message::Log(_) | Message::Gap { .. } => {}
            Message::Status { status, phase } => {
                let now = Some((status.clone(), phase.clone()));
                if self.status == now {
                    return false;
                }
                self.status = now;
            }
            Message::Heartbeat {} => return false,
            Message::End { .. } | Message::Unknown => return true,
        }
        self.progress = true;
        true
    }

    fn request(&self) -> Result<Request, Error> {
        let tail = self.wanted.tail.map(|lines| lines.to_string());
        let mut query = Vec::new();
        query.extend(self.wanted.phase.as_deref().map(|phase| ("phase", phase)));
        match (&self.wanted.cursor, &tail) {
            (Some(cursor), _) => query.push(("cursor", cursor.as_str())),
            (None, Some(tail)) => query.push(("tail", tail.as_str())),
            (None, None) => {}
        }
        let url = self.client.url(&["jobs", self.wanted.job.as_str(), "logs", "stream"], &query);
        // Only the scheme differs: http becomes ws, https becomes wss.
        let url = url.as_str().replacen("http", "ws", 1);
        let mut request = url.into_client_request().map_err(|source| self.hopeless().caused_by(source))?;
        if let Some(token) = self.client.token() {
            request.headers_mut().insert(TOKEN_HEADER.clone(), token.clone());
        }
        Ok(request)
    }

    /// Sorts a failed handshake: what the service refuses stays refused, everything else may pass.
    fn not_connected(&self, error: tungstenite::Error) -> Result<Cut, Error> {
        let tungstenite::Error::Http(answer) = error else {
            return Ok(Cut::Connect(Box::new(error)));
        };
        let status = answer.status();
        let may_pass = matches!(status, StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS);
        if status.is_server_error() || may_pass {
            return Ok(Cut::Unavailable(status));
        }
        let envelope =
            answer.body().as_deref().and_then(|body| serde_json::from_slice::<Envelope>(body).ok());
        Err(match envelope.and_then(|envelope| envelope.error) {
            Some(refusal) => self.hopeless().caused_by(refusal),
            None => self.hopeless().caused_by(format!("the service answered HTTP {status}")),
        })
    }

    fn understand(&self, text: &str) -> Result<Message, Error> {
        serde_json::from_str(text).map_err(|source| {
            let hint = "is this program much older or newer than the service?";
            self.hopeless().caused_by(source).hint(hint)
        })
    }

    fn hopeless(&self) -> Error {
        let (job, base) = (self.wanted.job.as_str(), self.client.base());
        Error::new(Exit::Failure, format!("following the log of {job} at {base}"))
    }

    fn given_up(&self, cut: Cut) -> Error {
        let seconds = self.patience.give_up.as_secs();
        let (job, base) = (self.wanted.job.as_str(), self.client.base());
        Error::new(Exit::Failure, format!("following the log of {job}: given up on {base} after {seconds} s"))
            .caused_by(cut)
            .passing()
    }

    fn delays(&self) -> ExponentialBackoff {
        ExponentialBuilder::default()
            .with_jitter()
            .with_min_delay(self.patience.first_delay)
            .with_max_delay(Duration::from_secs(10))
            .without_max_times()
            .build()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use axum::Router;
    use axum::extract::ws::{Message as Frame, WebSocketUpgrade};
    use axum::routing::get;
    use clap::Parser;
    use tokio::sync::mpsc;

    use super::*;

    const PATIENCE: Patience = Patience {
        connect: Duration::from_secs(5),
        idle: Duration::from_millis(50),
        give_up: Duration::from_secs(2),
        first_delay: Duration::from_millis(10),
    };

    /// A service that says one thing on each connection, the last one again and again, and then holds its tongue.
    async fn service(says: &'static [&'static str]) -> String {
        let connections = std::sync::Arc::new(AtomicUsize::new(0));
        let stream = move |upgrade: WebSocketUpgrade| async move {
            upgrade.on_upgrade(async move |mut socket| {
                let connection = connections.fetch_add(1, Ordering::SeqCst);
                if let Some(text) = says.get(connection).or(says.last()) {
                    socket.send(Frame::text(*text)).await.ok();
                }
                while let Some(Ok(_)) = socket.recv().await {}
            })
        };
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let app = Router::new().route("/jobs/nb-1/logs/stream", get(stream));
        #[expect(clippy::disallowed_methods, reason = "it ends with the test")]
        tokio::spawn(async move { axum::serve(listener, app).await });
        url
    }

    async fn followed(url: &str, patience: Patience) -> Vec<Result<Event, Error>> {
        let cli = crate::cli::Cli::parse_from(["nomad-build", "--url", url, "version"]);
        let client = Client::new(&cli.globals).unwrap();
        let wanted = Wanted { job: "nb-1".parse().unwrap(), phase: None, tail: None, cursor: None };
        let (sender, mut receiver) = mpsc::channel(100);
        Follower::new(&client, wanted, patience).run(sender).await;
        let mut events = Vec::new();
        while let Ok(event) = receiver.try_recv() {
            events.push(event);
        }
        events
    }

    #[tokio::test]
    async fn a_connection_that_fell_silent_is_replaced() {
        let says = &[r#"{"type":"heartbeat"}"#, r#"{"type":"end","status":"SUCCEEDED"}"#];
        let events =
            followed(&service(says).await, Patience { give_up: Duration::from_mins(1), ..PATIENCE }).await;
        assert!(matches!(events[0], Ok(Event::Cut(Cut::Silent(_)))), "{events:?}");
        assert!(matches!(events.last(), Some(Ok(Event::Message(Message::End { .. }, _)))), "{events:?}");
    }

    #[tokio::test]
    async fn a_service_that_stays_silent_is_given_up_in_the_end() {
        let events = followed(&service(&[]).await, PATIENCE).await;
        let (last, cuts) = events.split_last().unwrap();
        assert!(!cuts.is_empty() && cuts.iter().all(|cut| matches!(cut, Ok(Event::Cut(_)))), "{events:?}");
        assert!(last.as_ref().is_err_and(|error| error.to_string().contains("given up")), "{events:?}");
    }

    #[tokio::test]
    async fn a_message_that_is_none_ends_the_follow() {
        let events = followed(&service(&["<html>"]).await, PATIENCE).await;
        assert!(matches!(events[..], [Err(_)]), "{events:?}");
    }
}
