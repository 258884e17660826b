//! The front's server: one request of the engine, at most a few of the real registry.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::{Body, HttpBody as _};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, Method, StatusCode, header};
use axum::response::Response;
use reqwest::Url;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::super::client::Client;
use super::super::digest::Digest;
use super::super::error::Error;
use super::super::manifest::{LARGEST_MANIFEST, Manifest};
use super::super::name::{Reference, Repository};
use super::super::upload::{Mount, Stage};
use super::captured::{Captured, CapturedManifest, NotHeld};
use super::reply;
use super::route::{Door, NoRoute, Route};

/// An engine has a handful of uploads at a time.
const MOST_UPLOADS: usize = 1024;

/// How long an upload that was begun is gone on with: registries forget them, some soon.
const GOOD_FOR: Duration = Duration::from_mins(1);

/// All that the front knows.
#[derive(Debug)]
pub(super) struct Front {
    client: Arc<Client>,
    repository: Repository,
    elsewhere: Elsewhere,
    door: Door,
    stop: CancellationToken,
    /// Where each upload goes on upstream. The engine only ever sees the key.
    uploads: Mutex<HashMap<String, Url>>,
    captured: Mutex<Captured>,
    failure: Mutex<Option<Error>>,
}

/// Where else the registry may have what is pushed.
#[derive(Debug, Default)]
pub(super) struct Elsewhere {
    repositories: Mutex<Vec<Repository>>,
    /// An engine asks several times, and each time for one the registry would be asked twice.
    looked_for: Mutex<HashSet<Digest>>,
    /// Uploads that the registry began where it had nothing to take over, and when: what is sent next goes on with them.
    begun: Mutex<Vec<(Url, Instant)>>,
    /// The registry does not let an upload be ended. It forgets it in time.
    keeps: AtomicBool,
}

impl Elsewhere {
    /// In these, but for this blob.
    pub(super) fn except(digest: Digest, repositories: Vec<Repository>) -> Self {
        Self {
            repositories: Mutex::new(repositories),
            looked_for: Mutex::new(HashSet::from([digest])),
            begun: Mutex::default(),
            keeps: AtomicBool::new(false),
        }
    }

    /// Those in which a blob is to be looked for: none the second time.
    fn to_ask(&self, digest: Digest) -> Vec<Repository> {
        let is_new = lock(&self.looked_for).insert(digest);
        if is_new { lock(&self.repositories).clone() } else { Vec::new() }
    }

    /// One that is not to be asked again.
    fn forget(&self, repository: &Repository) {
        lock(&self.repositories).retain(|other| other != repository);
    }
}

/// The front as an HTTP service.
pub(super) fn router(front: Arc<Front>) -> Router {
    Router::new().fallback(answer).with_state(front)
}

async fn answer(State(front): State<Arc<Front>>, request: Request) -> Response {
    let stopped = || reply::refusal(StatusCode::SERVICE_UNAVAILABLE, "UNAVAILABLE", "the relay has ended");
    front.stop.run_until_cancelled(front.answer(request)).await.unwrap_or_else(stopped)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Front {
    pub(super) fn new(
        client: Arc<Client>,
        (repository, elsewhere): (Repository, Elsewhere),
        door: Door,
        stop: CancellationToken,
    ) -> Self {
        Self {
            client,
            repository,
            elsewhere,
            door,
            stop,
            uploads: Mutex::default(),
            captured: Mutex::default(),
            failure: Mutex::default(),
        }
    }

    pub(super) fn door(&self) -> &Door {
        &self.door
    }

    pub(super) fn take_captured(&self) -> Option<CapturedManifest> {
        lock(&self.captured).complete()
    }

    pub(super) fn take_failure(&self) -> Option<Error> {
        lock(&self.failure).take()
    }

    async fn answer(&self, request: Request) -> Response {
        let (head, body) = request.into_parts();
        let route = match self.door.route(head.uri.path(), head.uri.query()) {
            Ok(route) => route,
            Err(NoRoute::Unknown) => {
                return reply::refusal(StatusCode::NOT_FOUND, "NAME_UNKNOWN", "no such repository here");
            }
            Err(NoRoute::BadDigest) => {
                return reply::refusal(StatusCode::BAD_REQUEST, "DIGEST_INVALID", "not a sha256 digest");
            }
        };
        match (head.method, route) {
            (Method::GET | Method::HEAD, Route::Base) => reply::base(),
            (Method::HEAD, Route::Blob(digest)) => self.find_blob(digest).await,
            (Method::POST, Route::Uploads { completes: None }) => self.start_upload().await,
            (Method::POST, Route::Uploads { completes: Some(digest) }) => {
                self.upload_whole(digest, &head.headers, body).await
            }
            (method @ (Method::GET | Method::PATCH | Method::DELETE), Route::Upload { id, .. }) => {
                self.step(id, method, None, &head.headers, body).await
            }
            (Method::PUT, Route::Upload { id, completes: Some(digest) }) => {
                self.step(id, Method::PUT, Some(digest), &head.headers, body).await
            }
            (method @ (Method::GET | Method::HEAD), Route::Manifest(reference)) => {
                self.find_manifest(&reference, method == Method::GET)
            }
            (Method::PUT, Route::Manifest(reference)) => self.capture(&reference, &head.headers, body).await,
            _ => reply::refusal(StatusCode::METHOD_NOT_ALLOWED, "UNSUPPORTED", "a relay only takes pushes"),
        }
    }

    /// Keeps the first failure of the registry: what follows it is often only its echo. What the engine broke off itself, it tells
    /// itself.
    fn failed(&self, error: Error, streamed: bool) -> Response {
        let response = reply::failure(&error, streamed);
        if !matches!(error, Error::BrokeOff { .. }) {
            lock(&self.failure).get_or_insert(error);
        }
        response
    }

    async fn find_blob(&self, digest: Digest) -> Response {
        let mut found = self.client.head_blob(&self.repository, digest).await;
        if matches!(found, Ok(None)) && self.take_over(digest).await {
            found = self.client.head_blob(&self.repository, digest).await;
        }
        match found {
            Ok(Some(length)) => reply::blob(digest, length),
            Ok(None) => reply::refusal(StatusCode::NOT_FOUND, "BLOB_UNKNOWN", "no such blob"),
            Err(error) => self.failed(error, false),
        }
    }

    /// Whether another repository had it.
    async fn take_over(&self, digest: Digest) -> bool {
        let mut begun = None;
        let mut is_taken = false;
        for other in self.elsewhere.to_ask(digest) {
            match self.client.mount(&self.repository, digest, &other).await {
                Ok(Mount::Taken) => {
                    is_taken = true;
                    break;
                }
                Ok(Mount::Begun(url)) if begun.is_none() => begun = Some((url, Instant::now())),
                Ok(Mount::Begun(url)) => self.let_go(url).await,
                // It may not be read with these credentials, or the registry does nothing of the kind. The blob is sent instead: if
                // there is more to it, that tells.
                Err(_) => self.elsewhere.forget(&other),
            }
        }
        if let Some((url, at)) = begun {
            // Of a layer that was taken over nothing is sent: one upload is enough for what is sent behind all layers.
            let unneeded = {
                let mut kept = lock(&self.elsewhere.begun);
                if is_taken && !kept.is_empty() {
                    Some(url)
                } else {
                    kept.push((url, at));
                    None
                }
            };
            if let Some(url) = unneeded {
                self.let_go(url).await;
            }
        }
        is_taken
    }

    async fn let_go(&self, url: Url) {
        if !self.elsewhere.keeps.load(Ordering::Relaxed)
            && let Err(error) = self.client.let_go(&self.repository, url).await
        {
            tracing::debug!(%error, "an upload that nobody goes on with was not ended");
            self.elsewhere.keeps.store(true, Ordering::Relaxed);
        }
    }

    /// Where a blob can be sent to.
    async fn begin(&self) -> Result<Url, Error> {
        let begun = lock(&self.elsewhere.begun).pop();
        match begun {
            Some((url, at)) if at.elapsed() < GOOD_FOR => Ok(url),
            _ => self.client.start_upload(&self.repository).await,
        }
    }

    async fn start_upload(&self) -> Response {
        let url = match self.begin().await {
            Ok(url) => url,
            Err(error) => return self.failed(error, false),
        };
        let id = Uuid::new_v4().simple().to_string();
        let mut uploads = lock(&self.uploads);
        if uploads.len() >= MOST_UPLOADS {
            return reply::refusal(
                StatusCode::TOO_MANY_REQUESTS,
                "TOOMANYREQUESTS",
                "too many uploads at once",
            );
        }
        uploads.insert(id.clone(), url);
        reply::begun(&self.upload_path(&id), &id)
    }

    /// A blob that comes with its first request: upstream it is begun and completed in two, which every registry knows.
    async fn upload_whole(&self, digest: Digest, sent: &HeaderMap, body: Body) -> Response {
        let url = match self.begin().await {
            Ok(url) => url,
            Err(error) => return self.failed(error, false),
        };
        let headers = content_headers(sent);
        let stage = Stage { method: Method::PUT, url, completes: Some(digest), headers };
        match self.client.upload(&self.repository, stage, body.into_data_stream()).await {
            Ok(_) => reply::created(&self.blob_path(digest), digest),
            Err(error) => self.failed(error, true),
        }
    }

    async fn step(
        &self,
        id: String,
        method: Method,
        completes: Option<Digest>,
        sent: &HeaderMap,
        body: Body,
    ) -> Response {
        let Some(url) = lock(&self.uploads).get(&id).cloned() else {
            return reply::refusal(StatusCode::NOT_FOUND, "BLOB_UPLOAD_UNKNOWN", "no such upload");
        };
        let ends = method == Method::DELETE;
        let is_empty = body.is_end_stream() || matches!(method, Method::GET | Method::DELETE);
        let headers = if is_empty { HeaderMap::new() } else { content_headers(sent) };
        let stage = Stage { method, url, completes, headers };
        let result = if is_empty {
            self.client.upload_empty(&self.repository, stage).await
        } else {
            self.client.upload(&self.repository, stage, body.into_data_stream()).await
        };
        let mut uploads = lock(&self.uploads);
        match (result, completes) {
            (Ok(_), Some(digest)) => {
                uploads.remove(&id);
                reply::created(&self.blob_path(digest), digest)
            }
            (Ok(step), None) => {
                if ends {
                    uploads.remove(&id);
                } else if let Some(next) = step.next.clone() {
                    uploads.insert(id.clone(), next);
                }
                reply::step(&step, &self.upload_path(&id), &id)
            }
            (Err(error), _) if ends => {
                uploads.remove(&id);
                reply::failure(&error, false)
            }
            (Err(error), _) => self.failed(error, true),
        }
    }

    fn find_manifest(&self, reference: &Reference, with_bytes: bool) -> Response {
        match lock(&self.captured).find(reference) {
            Some(manifest) => reply::manifest(&manifest, with_bytes),
            None => reply::refusal(StatusCode::NOT_FOUND, "MANIFEST_UNKNOWN", "no such manifest"),
        }
    }

    async fn capture(&self, reference: &Reference, sent: &HeaderMap, body: Body) -> Response {
        let invalid = |message: &str| reply::refusal(StatusCode::BAD_REQUEST, "MANIFEST_INVALID", message);
        let Ok(bytes) = axum::body::to_bytes(body, LARGEST_MANIFEST).await else {
            return reply::refusal(
                StatusCode::PAYLOAD_TOO_LARGE,
                "SIZE_INVALID",
                "a manifest has at most 4 MiB",
            );
        };
        let content_type = sent.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
        let manifest = match Manifest::new(content_type.unwrap_or_default(), bytes) {
            Ok(manifest) => manifest,
            Err(error) => return invalid(&error.to_string()),
        };
        let digest = manifest.digest();
        match lock(&self.captured).hold(reference, manifest) {
            Ok(()) => reply::created(&format!("/v2/{}/manifests/{digest}", self.door.repository()), digest),
            Err(NotHeld::WrongDigest) => {
                reply::refusal(StatusCode::BAD_REQUEST, "DIGEST_INVALID", "not the content of that digest")
            }
            Err(NotHeld::WrongTag) => invalid("a relay has one tag only"),
            Err(NotHeld::TooMuch) => invalid("too many manifests in one push"),
        }
    }

    fn upload_path(&self, id: &str) -> String {
        format!("/v2/{}/blobs/uploads/{id}", self.door.repository())
    }

    fn blob_path(&self, digest: Digest) -> String {
        format!("/v2/{}/blobs/{digest}", self.door.repository())
    }
}

/// The headers that say what part of a blob a body is.
fn content_headers(sent: &HeaderMap) -> HeaderMap {
    let names = [header::CONTENT_TYPE, header::CONTENT_LENGTH, header::CONTENT_RANGE];
    names.into_iter().filter_map(|name| Some((name.clone(), sent.get(&name)?.clone()))).collect()
}
