//! Sends one request to a registry: proof of who is asking, redirects, time limits, retries.

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use backon::{ExponentialBuilder, Retryable};
use bytes::{Bytes, BytesMut};
use futures_util::{TryStream, TryStreamExt};
use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue, LOCATION};
use reqwest::{Body, Method, Response, StatusCode, Url};
use tokio::time::{Instant, timeout};

use super::auth::{Authenticator, Credentials, Realm, Scope};
use super::endpoint::Endpoint;
use super::error::Error;
use super::manifest::LARGEST_MANIFEST;

const CONNECT: Duration = Duration::from_secs(10);
const IDLE: Duration = Duration::from_secs(30);
const FIRST_WAIT: Duration = Duration::from_millis(100);
const LONGEST_WAIT: Duration = Duration::from_secs(10);
const MOST_REDIRECTS: usize = 5;

/// How long a registry is waited for.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// One try of a request without a large body.
    pub attempt: Duration,
    /// All tries of such a request together, and the waits between.
    pub deadline: Duration,
    /// A streamed upload of which no byte moves, or whose last byte is not answered.
    pub stall: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            attempt: Duration::from_secs(30),
            deadline: Duration::from_mins(1),
            stall: Duration::from_mins(5),
        }
    }
}

/// A request, complete but for who is asking.
pub(super) struct Call {
    pub(super) method: Method,
    pub(super) url: Url,
    pub(super) scope: Scope,
    pub(super) headers: HeaderMap,
    pub(super) body: Bytes,
    /// What is being done, to what: the beginning of every error.
    pub(super) doing: String,
}

/// An answer, read to its end.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    pub(super) body: Bytes,
    /// It came from the registry itself, not from where that pointed to: only then is its challenge to be met.
    is_own: bool,
}

impl Answer {
    /// The header's text, if it is there and is text.
    pub(super) fn header(&self, name: impl reqwest::header::AsHeaderName) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }
}

/// A way to one registry.
#[derive(Debug)]
pub(super) struct Transport {
    pub(super) endpoint: Endpoint,
    http: reqwest::Client,
    authenticator: Authenticator,
    limits: Limits,
}

impl Transport {
    pub(super) fn new(
        endpoint: Endpoint,
        credentials: Option<Credentials>,
        limits: Limits,
    ) -> Result<Self, Error> {
        let mut builder = reqwest::Client::builder()
            .user_agent(concat!("nomad-build/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(CONNECT)
            // Shorter than what usual proxies keep: an upload on a connection that is just closed cannot be repeated.
            .pool_idle_timeout(IDLE)
            // Followed here, where it is known what may go where.
            .redirect(reqwest::redirect::Policy::none())
            // A digest is that of the bytes as they are stored.
            .no_gzip();
        if endpoint.is_loopback() {
            builder = builder.no_proxy();
        }
        let http =
            builder.build().map_err(|source| Error::Setup { host: endpoint.host().to_owned(), source })?;
        Ok(Self { endpoint, http, authenticator: Authenticator::new(credentials), limits })
    }

    /// How long a registry is usually waited for.
    pub(super) fn deadline(&self) -> Duration {
        self.limits.deadline
    }

    /// Sends a call that may be repeated, until it succeeds, fails for good, or its time is over.
    pub(super) async fn send(&self, call: &Call) -> Result<Answer, Error> {
        self.send_within(call, self.limits.deadline).await
    }

    /// The same, with another time.
    pub(super) async fn send_within(&self, call: &Call, deadline: Duration) -> Result<Answer, Error> {
        let started = Instant::now();
        let left = || deadline.saturating_sub(started.elapsed());
        let backoff = ExponentialBuilder::default()
            .with_min_delay(FIRST_WAIT)
            .with_max_delay(LONGEST_WAIT)
            .without_max_times()
            .with_jitter();
        (|| self.attempt(call, self.limits.attempt.min(left())))
            .retry(backoff)
            .when(Error::is_transient)
            .adjust(|error, wait| {
                let wait = wait?.max(error.retry_after().unwrap_or_default());
                (wait < left()).then_some(wait)
            })
            .await
    }

    /// Sends a call that must not be repeated.
    pub(super) async fn send_once(&self, call: &Call) -> Result<Answer, Error> {
        self.attempt(call, self.limits.stall).await
    }

    async fn attempt(&self, call: &Call, after: Duration) -> Result<Answer, Error> {
        let late = |_| Error::TimedOut { doing: call.doing.clone(), after };
        let answer = timeout(after, self.answered(call)).await.map_err(late)??;
        checked(call, answer)
    }

    /// One answer, whatever its status; a challenge is met once.
    async fn answered(&self, call: &Call) -> Result<Answer, Error> {
        let used = self.authorization(call).await?;
        let answer = self.followed(call, used.clone()).await?;
        let challenged = answer.is_own
            && answer.status == StatusCode::UNAUTHORIZED
            && self.authenticator.learn(&answer.headers, &call.scope, used.as_ref()).await;
        if !challenged {
            return Ok(answer);
        }
        let proof = self.authorization(call).await?;
        self.followed(call, proof).await
    }

    async fn authorization(&self, call: &Call) -> Result<Option<HeaderValue>, Error> {
        let realm = Realm { http: &self.http, endpoint: &self.endpoint, doing: &call.doing };
        self.authenticator.authorization(&realm, &call.scope).await
    }

    /// Follows the redirects of reads: storage often is elsewhere, and must not see who is asking.
    async fn followed(&self, call: &Call, authorization: Option<HeaderValue>) -> Result<Answer, Error> {
        let mut url = call.url.clone();
        for _ in 0..=MOST_REDIRECTS {
            let request = self.request(call, &url, authorization.as_ref()).body(call.body.clone());
            let response = request.send().await.map_err(|source| Error::unreachable(&call.doing, source))?;
            let is_read = matches!(call.method, Method::GET | Method::HEAD);
            let location = response.headers().get(LOCATION).and_then(|value| value.to_str().ok());
            match location {
                Some(location) if is_read && response.status().is_redirection() => {
                    url = self.location(call, &url, location)?;
                }
                _ => return self.read_answer(call, &url, response).await,
            }
        }
        Err(Error::malformed(&call.doing, format!("more than {MOST_REDIRECTS} redirects")))
    }

    async fn read_answer(&self, call: &Call, from: &Url, response: Response) -> Result<Answer, Error> {
        let (status, headers) = (response.status(), response.headers().clone());
        let body = read_body(&call.doing, response, LARGEST_MANIFEST).await?;
        Ok(Answer { status, headers, body, is_own: self.endpoint.owns(from) })
    }

    fn request(
        &self,
        call: &Call,
        url: &Url,
        authorization: Option<&HeaderValue>,
    ) -> reqwest::RequestBuilder {
        let request = self.http.request(call.method.clone(), url.clone()).headers(call.headers.clone());
        match authorization {
            Some(value) if self.endpoint.owns(url) => request.header(AUTHORIZATION, value),
            _ => request,
        }
    }

    /// The URL that a `Location` in an answer from `from` leads to.
    pub(super) fn location(&self, call: &Call, from: &Url, location: &str) -> Result<Url, Error> {
        self.endpoint.follow(from, location).map_err(|error| Error::malformed(&call.doing, error.to_string()))
    }

    /// Sends a call with a body that comes once and so cannot be repeated; `call.body` is not sent.
    pub(super) async fn send_stream<S, E>(&self, call: &Call, body: S) -> Result<Answer, Error>
    where
        S: TryStream<Ok = Bytes, Error = E> + Send + 'static,
        E: Into<Box<dyn std::error::Error + Send + Sync>> + 'static,
    {
        let limit = self.limits.attempt;
        let late = |after| Error::TimedOut { doing: call.doing.clone(), after };
        let used = timeout(limit, self.authorization(call)).await.map_err(|_| late(limit))??;
        let moved = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&moved);
        let has_broken = Arc::new(AtomicBool::new(false));
        let breaks = Arc::clone(&has_broken);
        let body = body
            .inspect_ok(move |chunk| {
                counter.fetch_add(chunk.len() as u64, Ordering::Relaxed);
            })
            .inspect_err(move |_| breaks.store(true, Ordering::Relaxed));
        let request = self.request(call, &call.url, used.as_ref()).body(Body::wrap_stream(body));
        let mut sending = pin!(async {
            let response = request.send().await.map_err(|source| {
                let broke_off = has_broken.load(Ordering::Relaxed);
                if broke_off {
                    Error::broke_off(&call.doing, source)
                } else {
                    Error::unreachable(&call.doing, source)
                }
            })?;
            self.read_answer(call, &call.url, response).await
        });
        let mut seen = 0;
        let answer = loop {
            if let Ok(done) = timeout(self.limits.stall, &mut sending).await {
                break done?;
            }
            let now = moved.load(Ordering::Relaxed);
            if now == seen {
                return Err(late(self.limits.stall));
            }
            seen = now;
        };
        if answer.is_own && answer.status == StatusCode::UNAUTHORIZED {
            // Too late for this body, but the next call then asks for a new token.
            self.authenticator.learn(&answer.headers, &call.scope, used.as_ref()).await;
        }
        checked(call, answer)
    }
}

fn checked(call: &Call, answer: Answer) -> Result<Answer, Error> {
    if answer.status.is_success() {
        return Ok(answer);
    }
    Err(Error::from_answer(&call.doing, answer.status, &answer.headers, &answer.body))
}

/// A body of at most `most` bytes.
pub(super) async fn read_body(doing: &str, mut response: Response, most: usize) -> Result<Bytes, Error> {
    let mut body = BytesMut::new();
    while let Some(chunk) = response.chunk().await.map_err(|source| Error::unreachable(doing, source))? {
        if body.len() + chunk.len() > most {
            return Err(Error::malformed(doing, format!("more than {most} bytes")));
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body.freeze())
}
