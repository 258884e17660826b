//! One connection pool to Nomad, and the one way a request is sent and its answer read.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use reqwest::{Method, Response, Url};
use secrecy::{ExposeSecret, SecretString};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::Semaphore;

use super::error::Error;
use super::transport::{Tls, Token, Transport};
use super::types::Indexed;

/// Nomad answers 429 past 100 connections of one address; streams, and what is asked apart, have places of their own.
const CALLS_AT_ONCE: usize = 20;

/// How long an ordinary call may take.
const CALL: Duration = Duration::from_secs(15);

/// Where Nomad is, and who we are to it.
#[derive(Clone, Debug)]
pub struct Settings {
    /// `http://host:port`, without a path.
    pub address: Url,
    /// A Unix socket to send everything to instead: a task's own `api.sock`.
    pub socket: Option<PathBuf>,
    /// The token.
    pub token: Token,
    /// How to know Nomad, and be known to it, by TLS.
    pub tls: Tls,
}

impl Settings {
    /// A Nomad at an address, asked without a token.
    pub fn plain(address: Url) -> Self {
        Self { address, socket: None, token: Token::None, tls: Tls::default() }
    }

    /// The address to go with a Unix socket: its host is only a header.
    pub fn socket_address() -> Url {
        // A constant; the test below reads it.
        SOCKET_ADDRESS.parse().unwrap_or_else(|_| unreachable!("{SOCKET_ADDRESS} is a URL"))
    }
}

const SOCKET_ADDRESS: &str = "http://localhost";

/// Whose token is sent.
#[derive(Clone)]
enum Asker {
    Ourselves,
    Caller(Option<SecretString>),
}

/// Nomad's HTTP API. Cheap to clone.
#[derive(Clone)]
pub struct Client {
    transport: Arc<Transport>,
    base: Url,
    asker: Asker,
    calls: Arc<Semaphore>,
}

/// A request as a value, so that it can be tested without being sent.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) method: Method,
    /// Path segments; each is percent-encoded as a whole.
    pub(super) path: Vec<String>,
    pub(super) query: Vec<(&'static str, String)>,
    pub(super) body: Option<Vec<u8>>,
    /// What this does, for errors: "registering job …".
    pub(super) doing: String,
}

impl Request {
    pub(super) fn new(method: Method, path: &[&str], doing: String) -> Self {
        let path = path.iter().map(|&segment| segment.to_owned()).collect();
        Self { method, path, query: Vec::new(), body: None, doing }
    }

    pub(super) fn get(path: &[&str], doing: String) -> Self {
        Self::new(Method::GET, path, doing)
    }

    pub(super) fn query(mut self, name: &'static str, value: impl std::fmt::Display) -> Self {
        self.query.push((name, value.to_string()));
        self
    }

    pub(super) fn json(mut self, body: &impl Serialize) -> Result<Self, Error> {
        let bytes = serde_json::to_vec(body).map_err(|error| Error::malformed(&self.doing, error))?;
        self.body = Some(bytes);
        Ok(self)
    }
}

impl Client {
    /// Sets up the pool; sends nothing yet.
    pub fn new(settings: &Settings) -> Result<Self, Error> {
        Ok(Self {
            transport: Arc::new(Transport::new(settings)?),
            base: settings.address.clone(),
            asker: Asker::Ourselves,
            calls: Arc::new(Semaphore::new(CALLS_AT_ONCE)),
        })
    }

    /// The same Nomad, asked with another token, or with none.
    #[must_use]
    pub fn with_token(&self, token: Option<SecretString>) -> Self {
        Self { asker: Asker::Caller(token), ..self.clone() }
    }

    /// The same Nomad, with so many places of its own: what is asked there keeps nothing else waiting.
    #[must_use]
    pub fn apart(&self, places: usize) -> Self {
        Self { calls: Arc::new(Semaphore::new(places)), ..self.clone() }
    }

    /// The same Nomad, asked with our own token.
    pub(super) fn as_ourselves(&self) -> Self {
        Self { asker: Asker::Ourselves, ..self.clone() }
    }

    /// Whether it asks with the secret of an ACL token, and not with nothing or with a workload's identity.
    pub(super) fn has_secret_id(&self) -> bool {
        let is_secret = |token: &SecretString| uuid::Uuid::try_parse(token.expose_secret()).is_ok();
        match &self.asker {
            Asker::Ourselves => self.transport.token().is_some_and(|token| is_secret(&token)),
            Asker::Caller(token) => token.as_ref().is_some_and(is_secret),
        }
    }

    pub(super) async fn send(&self, request: Request, timeout: Option<Duration>) -> Result<Response, Error> {
        let Request { method, path, query, body, doing } = request;
        let mut url = self.base.clone();
        // A base that cannot have segments is refused where the address is configured.
        if let Ok(mut segments) = url.path_segments_mut() {
            segments.pop_if_empty().push("v1").extend(&path);
        }
        let mut builder = self.transport.pool().request(method, url).query(&query);
        let token = match &self.asker {
            Asker::Ourselves => self.transport.token(),
            Asker::Caller(token) => token.clone(),
        };
        if let Some(token) = token {
            builder = builder.header("X-Nomad-Token", token.expose_secret());
        }
        if let Some(body) = body {
            builder = builder.body(body);
        }
        if let Some(timeout) = timeout {
            builder = builder.timeout(timeout);
        }
        // The address may hold a password of a proxy in front of Nomad; it has no place in an error.
        let response =
            builder.send().await.map_err(|error| Error::unreachable(&doing, error.without_url()))?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let body = response.text().await.unwrap_or_default();
        Err(Error::answered(&doing, status.as_u16(), body.trim()))
    }

    /// Opens a stream, which takes no place and lasts as long as it likes; it has to begin within `patience`.
    pub(super) async fn open(&self, request: Request, patience: Duration) -> Result<Response, Error> {
        let doing = request.doing.clone();
        let opened = tokio::time::timeout(patience, self.send(request, None)).await;
        opened.map_err(|error| Error::unreachable(&doing, error))?
    }

    /// Sends a request whose answer says nothing but that it was done.
    pub(super) async fn order(&self, request: Request) -> Result<(), Error> {
        let doing = request.doing.clone();
        // The semaphore is never closed.
        let _place = self.calls.acquire().await.map_err(|error| Error::unreachable(&doing, error))?;
        self.send(request, Some(CALL)).await.map(drop)
    }

    /// Sends a request and reads its answer, with the index of the state it shows.
    pub(super) async fn call<T: DeserializeOwned>(&self, request: Request) -> Result<Indexed<T>, Error> {
        let doing = request.doing.clone();
        // The semaphore is never closed.
        let _place = self.calls.acquire().await.map_err(|error| Error::unreachable(&doing, error))?;
        read(self.send(request, Some(CALL)).await?, &doing).await
    }

    /// The same for a blocking query, which waits at Nomad for up to `wait` and takes no place meanwhile.
    pub(super) async fn wait<T: DeserializeOwned>(
        &self,
        request: Request,
        index: u64,
        wait: Duration,
    ) -> Result<Indexed<T>, Error> {
        let doing = request.doing.clone();
        let request = request.query("index", index).query("wait", format!("{}s", wait.as_secs()));
        // Nomad adds up to a sixteenth of the wait, so that queries do not end all at once.
        read(self.send(request, Some(wait + wait / 8 + CALL)).await?, &doing).await
    }
}

async fn read<T: DeserializeOwned>(response: Response, doing: &str) -> Result<Indexed<T>, Error> {
    let index = response.headers().get("X-Nomad-Index").and_then(|value| value.to_str().ok()?.parse().ok());
    let next =
        response.headers().get("X-Nomad-Nexttoken").and_then(|value| value.to_str().ok()).map(str::to_owned);
    let bytes = response.bytes().await.map_err(|error| Error::unreachable(doing, error.without_url()))?;
    let value = serde_json::from_slice(&bytes).map_err(|error| Error::malformed(doing, error))?;
    Ok(Indexed { value, index: index.unwrap_or(0), next })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nomad::Kind;

    #[tokio::test]
    async fn a_stream_that_nomad_takes_and_never_begins_is_given_up() {
        // Takes connections, and never answers.
        let hung = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", hung.local_addr().unwrap()).parse().unwrap();
        let client = Client::new(&Settings::plain(address)).unwrap();
        let request = Request::get(&["event", "stream"], "opening".to_owned());
        let opened = client.open(request, Duration::from_millis(100));
        let opened = tokio::time::timeout(Duration::from_mins(1), opened).await.unwrap();
        assert_eq!(opened.unwrap_err().kind, Kind::Unreachable);
    }
}
