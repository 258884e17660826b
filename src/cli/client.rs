//! One request to the service, and its answer out of the envelope.

use std::sync::Arc;
use std::time::Duration;

use reqwest::header::{HeaderName, HeaderValue, LOCATION};
use reqwest::{Method, Request, StatusCode, Url, redirect};
use rustls::ClientConfig;
use secrecy::{ExposeSecret, SecretString};
use serde::de::DeserializeOwned;
use serde_json::value::RawValue;
use tokio_tungstenite::Connector;

use super::fields::JobId;
use super::tokens::Tokens;
use super::wire::{Envelope, Refusal, Status};
use super::{Error, Exit, Globals};
use crate::tls::{ClientFiles, Identity};

/// The service answers in milliseconds; a host that swallows packets is noticed after this.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// The longest silence within one answer.
const READ_TIMEOUT: Duration = Duration::from_mins(1);

/// The header that carries the caller's own Nomad token.
pub(super) static TOKEN_HEADER: HeaderName = HeaderName::from_static("x-nomad-token");

/// The header that makes sending a submission again harmless.
static KEY_HEADER: HeaderName = HeaderName::from_static("idempotency-key");

/// The service, as seen from here.
#[derive(Debug)]
pub(super) struct Client {
    http: reqwest::Client,
    base: Url,
    token: Option<HeaderValue>,
    /// How the service is known by TLS, where it is not by what the machine trusts.
    tls: Option<Arc<ClientConfig>>,
}

impl Client {
    /// A client for the service that the arguments name, with the token of the environment, or that of a login. Nothing is sent
    /// yet.
    pub(super) fn new(globals: &Globals) -> Result<Self, Error> {
        let mut client = Self::without_token(globals)?;
        client.token = token(globals.nomad_token.as_ref())?;
        if client.token.is_none()
            && let Some(tokens) = Tokens::of_user()
        {
            client.token = token(tokens.find(&client.base)?.as_ref())?;
        }
        Ok(client)
    }

    /// The same, of somebody who has no token yet.
    pub(super) fn without_token(globals: &Globals) -> Result<Self, Error> {
        let base = base(&globals.url)?;
        let tls = tls_config(globals)?;
        let http = match &tls {
            Some(tls) => reqwest::Client::builder().tls_backend_preconfigured(ClientConfig::clone(tls)),
            // Plain HTTP needs no certificates, and must work where the machine has none.
            None if base.scheme() == "http" => reqwest::Client::builder().tls_certs_only([]),
            None => reqwest::Client::builder(),
        };
        let http = http
            .connect_timeout(CONNECT_TIMEOUT)
            .read_timeout(READ_TIMEOUT)
            // A redirect would carry the token to a host that nobody named.
            .redirect(redirect::Policy::none())
            // The log's WebSocket takes no proxy either; half a client behind one helps nobody.
            .no_proxy()
            .user_agent(concat!("nomad-build/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(|source| Error::new(Exit::Failure, "preparing the HTTP client").caused_by(source))?;
        Ok(Self { http, base, token: None, tls })
    }

    /// Where the service is, for messages.
    pub(super) fn base(&self) -> &Url {
        &self.base
    }

    /// The token as a header's value, where there is one.
    pub(super) fn token(&self) -> Option<&HeaderValue> {
        self.token.as_ref()
    }

    /// How a WebSocket is to know the service by TLS; none where it is known by what the machine trusts.
    pub(super) fn connector(&self) -> Option<Connector> {
        self.tls.clone().map(Connector::Rustls)
    }

    /// The address of a resource.
    pub(super) fn url(&self, path: &[&str], query: &[(&str, &str)]) -> Url {
        let mut url = self.base.clone();
        if let Ok(mut segments) = url.path_segments_mut() {
            segments.pop_if_empty().extend(path);
        }
        if !query.is_empty() {
            url.query_pairs_mut().extend_pairs(query);
        }
        url
    }

    /// Where the job stands.
    pub(super) async fn status(&self, job: &JobId) -> Result<Box<RawValue>, Error> {
        let doing = format!("asking {} for the status of {}", self.base, job.as_str());
        self.call(&doing, Method::GET, self.url(&["jobs", job.as_str(), "status"], &[]), None).await
    }

    /// Sends one request; `doing` says to the user what it is for. The answer is the envelope's data.
    pub(super) async fn call(
        &self,
        doing: &str,
        method: Method,
        url: Url,
        body: Option<&serde_json::Value>,
    ) -> Result<Box<RawValue>, Error> {
        self.send(doing, self.request(method, url, body)).await
    }

    /// Submits a build, under a key where there is one.
    pub(super) async fn submit(
        &self,
        doing: &str,
        body: &serde_json::Value,
        key: Option<&str>,
    ) -> Result<Box<RawValue>, Error> {
        let mut request = self.request(Method::POST, self.url(&["jobs"], &[]), Some(body));
        if let Some(key) = key {
            let key = HeaderValue::from_str(key).map_err(|source| {
                Error::new(Exit::Usage, "reading --idempotency-key, which cannot stand in a header")
                    .caused_by(source)
            })?;
            request.headers_mut().insert(KEY_HEADER.clone(), key);
        }
        self.send(doing, request).await
    }

    async fn send(&self, doing: &str, request: Request) -> Result<Box<RawValue>, Error> {
        let answer = self.http.execute(request).await;
        let answer = answer.map_err(|source| unreachable(doing, source))?;
        let status = answer.status();
        let header = |name: &str| answer.headers().get(name).and_then(|v| v.to_str().ok()).map(str::to_owned);
        let (request_id, location) = (header("x-request-id"), header(LOCATION.as_str()));
        let bytes = answer.bytes().await.map_err(|source| unreachable(doing, source))?;
        match serde_json::from_slice::<Envelope>(&bytes) {
            Ok(Envelope { data: Some(data), error: None }) if status.is_success() => Ok(data),
            Ok(Envelope { error: Some(refusal), .. }) => Err(refused(doing, status, refusal, request_id)),
            _ if status.is_redirection() => Err(Error::new(Exit::Failure, doing)
                .caused_by(format!("the answer is a redirect to {}", location.unwrap_or_default()))
                .hint("redirects are not followed: set --url to where the service really is")),
            _ => {
                let error = Error::new(Exit::Failure, doing)
                    .caused_by(format!("the answer, HTTP {status}, is not one of nomad-build's"))
                    .hint(format!("does --url, {}, name a nomad-build service?", self.base));
                // A proxy's, of a service that is just away.
                Err(if is_passing(status) { error.passing() } else { error })
            }
        }
    }

    fn request(&self, method: Method, url: Url, body: Option<&serde_json::Value>) -> Request {
        let mut request = Request::new(method, url);
        if let Some(token) = &self.token {
            request.headers_mut().insert(TOKEN_HEADER.clone(), token.clone());
        }
        if let Some(body) = body {
            let json = HeaderValue::from_static("application/json");
            request.headers_mut().insert(reqwest::header::CONTENT_TYPE, json);
            *request.body_mut() = Some(body.to_string().into());
        }
        request
    }
}

/// Reads the part of the service's data that a command needs.
pub(super) fn read<T: DeserializeOwned>(doing: &str, data: &RawValue) -> Result<T, Error> {
    serde_json::from_str(data.get()).map_err(|source| {
        Error::new(Exit::Failure, format!("understanding the answer to {doing}"))
            .caused_by(source)
            .hint("is this program much older or newer than the service?")
    })
}

/// Reads a job's status.
pub(super) fn read_status(data: &RawValue) -> Result<Status, Error> {
    read("the question where the job stands", data)
}

fn base(text: &str) -> Result<Url, Error> {
    let refused = |why: &str| {
        Error::new(Exit::Usage, "reading the service's address (--url or NOMAD_BUILD_URL)")
            .caused_by(why.to_owned())
            .hint("it looks like http://HOST:PORT or https://HOST/PATH")
    };
    let url = Url::parse(text).map_err(|why| refused(&format!("not a URL: {why}")))?;
    if !matches!(url.scheme(), "http" | "https") {
        return Err(refused("only http and https are spoken"));
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err(refused("it holds a user or a password, which would show up in messages"));
    }
    if url.query().is_some() || url.fragment().is_some() {
        return Err(refused("it holds a query or a fragment"));
    }
    Ok(url)
}

/// The TLS of the flags, where there are any.
fn tls_config(globals: &Globals) -> Result<Option<Arc<ClientConfig>>, Error> {
    let Globals { cacert, client_cert, client_key, .. } = globals;
    let wrong = |doing: &str, hint: &str| Error::new(Exit::Usage, doing).hint(hint);
    let identity = match (client_cert.clone(), client_key.clone()) {
        (None, None) => None,
        (Some(certificate), Some(key)) => Some(Identity { certificate, key }),
        _ => return Err(wrong("reading --client-cert and --client-key", "set both, or neither")),
    };
    let authority = match cacert.clone() {
        Some(authority) => authority,
        None if identity.is_none() => return Ok(None),
        None => {
            let hint = "say by --cacert (or NOMAD_BUILD_CACERT) whom the service's certificate must be of: the machine's own \
                        authorities are often in /etc/ssl/certs/ca-certificates.crt";
            return Err(wrong("reading --client-cert, which comes without --cacert", hint));
        }
    };
    let unfit = |source| Error::new(Exit::Usage, "reading the files for TLS").caused_by(source);
    ClientFiles { authority, identity }.read().map(|config| Some(Arc::new(config))).map_err(unfit)
}

fn token(token: Option<&SecretString>) -> Result<Option<HeaderValue>, Error> {
    let Some(token) = token.map(ExposeSecret::expose_secret).filter(|token| !token.is_empty()) else {
        return Ok(None);
    };
    let mut value = HeaderValue::from_str(token).map_err(|source| {
        Error::new(Exit::Usage, "reading NOMAD_TOKEN, which cannot stand in a header").caused_by(source)
    })?;
    value.set_sensitive(true);
    Ok(Some(value))
}

fn unreachable(doing: &str, source: reqwest::Error) -> Error {
    let is_connect = source.is_connect();
    let error = Error::new(Exit::Failure, doing).caused_by(source).passing();
    if is_connect { error.hint(IS_IT_RUNNING) } else { error }
}

/// What to try when nobody answers.
const IS_IT_RUNNING: &str = "is the service running? Start it with `nomad-build serve`, or say where it is with --url or NOMAD_BUILD_URL";

/// Whether what is answered may be another answer in a moment.
fn is_passing(status: StatusCode) -> bool {
    matches!(
        status,
        StatusCode::TOO_MANY_REQUESTS
            | StatusCode::BAD_GATEWAY
            | StatusCode::SERVICE_UNAVAILABLE
            | StatusCode::GATEWAY_TIMEOUT
    )
}

fn refused(doing: &str, status: StatusCode, mut refusal: Refusal, request_id: Option<String>) -> Error {
    let exit = match status {
        StatusCode::BAD_REQUEST | StatusCode::PAYLOAD_TOO_LARGE | StatusCode::UNPROCESSABLE_ENTITY => {
            Exit::Usage
        }
        _ => Exit::Failure,
    };
    let is_live = refusal.code == "job_live";
    let details = std::mem::take(&mut refusal.details);
    let mut error = Error::new(exit, doing).caused_by(refusal);
    for detail in details {
        error = error.detail(format!("{}: {}", detail.field, detail.message));
    }
    if is_passing(status) {
        error = error.passing();
    }
    if status == StatusCode::UNAUTHORIZED {
        error = error.hint("set NOMAD_TOKEN to a Nomad token, or log in: nomad-build login");
    }
    if is_live {
        error = error.hint("it has to end first; `nomad-build kill` stops it");
    }
    match request_id {
        Some(id) if status.is_server_error() => {
            error.hint(format!("the service's log says more of request {id}"))
        }
        _ => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(url: &str) -> Client {
        Client { http: reqwest::Client::new(), base: base(url).unwrap(), token: None, tls: None }
    }

    #[test]
    fn a_resource_stands_below_the_service_s_address() {
        for (url, expected) in [
            ("http://127.0.0.1:8080", "http://127.0.0.1:8080/jobs/nb-1/logs?tail=5"),
            ("http://127.0.0.1:8080/", "http://127.0.0.1:8080/jobs/nb-1/logs?tail=5"),
            ("https://ci.example/builds/", "https://ci.example/builds/jobs/nb-1/logs?tail=5"),
        ] {
            assert_eq!(client(url).url(&["jobs", "nb-1", "logs"], &[("tail", "5")]).as_str(), expected);
        }
    }

    #[test]
    fn an_address_that_is_none_is_refused_without_showing_a_password() {
        for url in [
            "",
            "127.0.0.1:8080",
            "ftp://host",
            "http://me:s3cret@host",
            "http://host/?a=b",
            "http://host/#x",
        ] {
            let error = base(url).unwrap_err();
            assert!(!format!("{error:?}").contains("s3cret"), "{error:?}");
        }
    }

    #[test]
    fn a_token_is_sent_and_never_shown() {
        let value = token(Some(&SecretString::from("s3cret"))).unwrap().unwrap();
        let client = Client { token: Some(value), ..client("http://host") };
        assert!(!format!("{client:?}").contains("s3cret"));
        let request = client.request(Method::GET, client.url(&["health"], &[]), None);
        assert_eq!(request.headers()[&TOKEN_HEADER], "s3cret");
        assert!(
            !format!("{:?}", token(Some(&SecretString::from("s3cret\n"))).unwrap_err()).contains("s3cret")
        );
        assert!(token(Some(&SecretString::from(""))).unwrap().is_none());
    }
}
