//! Uploads of blobs, one step at a time (OCI distribution spec, "Pushing blobs").

use std::time::Duration;

use bytes::Bytes;
use futures_util::TryStream;
use reqwest::header::{CONTENT_LENGTH, HeaderMap, HeaderValue, LOCATION};
use reqwest::{Method, StatusCode, Url};

use super::auth::Scope;
use super::client::Client;
use super::digest::Digest;
use super::error::Error;
use super::name::Repository;
use super::transport::{Answer, Call};

/// How long is waited for the end of an upload that nobody goes on with.
const LETTING_GO: Duration = Duration::from_secs(5);

/// What a registry answered to one step of an upload.
#[derive(Debug)]
pub(super) struct Step {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    /// Where the upload goes on.
    pub(super) next: Option<Url>,
}

/// What a registry did that was to take a blob over.
#[derive(Debug)]
pub(super) enum Mount {
    /// It has it now.
    Taken,
    /// It began an upload instead.
    Begun(Url),
}

/// One step of an upload that has been started.
#[derive(Debug, Clone)]
pub(super) struct Stage {
    pub(super) method: Method,
    pub(super) url: Url,
    /// With this step the blob is complete.
    pub(super) completes: Option<Digest>,
    pub(super) headers: HeaderMap,
}

impl Client {
    /// Begins an upload. May be repeated: an upload that nobody goes on with does no harm.
    pub(super) async fn start_upload(&self, repository: &Repository) -> Result<Url, Error> {
        let doing = format!("starting an upload to {}/{repository}", self.host());
        let path = format!("v2/{repository}/blobs/uploads/");
        let mut call = self.call(Method::POST, &path, Scope::Push(repository.clone()), doing);
        call.headers.insert(CONTENT_LENGTH, HeaderValue::from_static("0"));
        let step = self.step(&call, self.transport.send(&call).await?)?;
        step.next.ok_or_else(|| Error::malformed(&call.doing, "it does not say where to upload to"))
    }

    /// Has a blob taken over from another repository of the registry.
    pub(super) async fn mount(
        &self,
        repository: &Repository,
        digest: Digest,
        from: &Repository,
    ) -> Result<Mount, Error> {
        let doing = format!("taking blob {digest} over from {from} to {}/{repository}", self.host());
        let path = format!("v2/{repository}/blobs/uploads/");
        let mut call = self.call(Method::POST, &path, Scope::Mount(repository.clone(), from.clone()), doing);
        call.url
            .query_pairs_mut()
            .append_pair("mount", &digest.to_string())
            .append_pair("from", from.as_str());
        call.headers.insert(CONTENT_LENGTH, HeaderValue::from_static("0"));
        let step = self.step(&call, self.transport.send(&call).await?)?;
        match step.next {
            _ if step.status == StatusCode::CREATED => Ok(Mount::Taken),
            Some(url) => Ok(Mount::Begun(url)),
            None => Err(Error::malformed(&call.doing, "it does not say where to upload to")),
        }
    }

    /// Ends an upload that nobody goes on with.
    pub(super) async fn let_go(&self, repository: &Repository, url: Url) -> Result<(), Error> {
        let stage = Stage { method: Method::DELETE, url, completes: None, headers: HeaderMap::new() };
        let call = self.upload_call(repository, stage);
        self.transport.send_within(&call, LETTING_GO).await.map(drop)
    }

    /// Sends a step without content, once.
    pub(super) async fn upload_empty(&self, repository: &Repository, stage: Stage) -> Result<Step, Error> {
        let mut call = self.upload_call(repository, stage);
        call.headers.insert(CONTENT_LENGTH, HeaderValue::from_static("0"));
        self.step(&call, self.transport.send_once(&call).await?)
    }

    /// Sends a step whose content is `body`, which is never held.
    pub(super) async fn upload<S, E>(
        &self,
        repository: &Repository,
        stage: Stage,
        body: S,
    ) -> Result<Step, Error>
    where
        S: TryStream<Ok = Bytes, Error = E> + Send + 'static,
        E: Into<Box<dyn std::error::Error + Send + Sync>> + 'static,
    {
        let call = self.upload_call(repository, stage);
        self.step(&call, self.transport.send_stream(&call, body).await?)
    }

    fn upload_call(&self, repository: &Repository, stage: Stage) -> Call {
        let doing = match stage.completes {
            Some(digest) => format!("completing the upload of blob {digest} to {}/{repository}", self.host()),
            None => format!("uploading a blob to {}/{repository}", self.host()),
        };
        let Stage { method, mut url, completes, headers } = stage;
        if let Some(digest) = completes {
            // The registry's own query, such as `_state`, stays as it is.
            url.query_pairs_mut().append_pair("digest", &digest.to_string());
        }
        Call { method, url, scope: Scope::Push(repository.clone()), headers, body: Bytes::new(), doing }
    }

    fn step(&self, call: &Call, answer: Answer) -> Result<Step, Error> {
        let next = match answer.header(LOCATION) {
            Some(location) if answer.status != StatusCode::CREATED => {
                Some(self.transport.location(call, &call.url, location)?)
            }
            _ => None,
        };
        Ok(Step { status: answer.status, headers: answer.headers, next })
    }
}
