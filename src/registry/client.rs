//! One registry: what can be asked of it and put into it.

use std::time::Duration;

use bytes::Bytes;
use reqwest::Method;
use reqwest::header::{ACCEPT, CONTENT_LENGTH, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};

use super::auth::{Credentials, Scope};
use super::digest::Digest;
use super::endpoint::Endpoint;
use super::error::Error;
use super::manifest::{self, Descriptor, Manifest};
use super::name::{Reference, Repository};
use super::transport::{Answer, Call, Limits, Transport};

pub(super) const CONTENT_DIGEST: HeaderName = HeaderName::from_static("docker-content-digest");

/// A client of one registry, with the credentials of one user. Meant to be shared.
#[derive(Debug)]
pub struct Client {
    pub(super) transport: Transport,
}

impl Client {
    /// A client of the registry at `endpoint`; without credentials it asks as nobody in particular.
    pub fn new(endpoint: Endpoint, credentials: Option<Credentials>) -> Result<Self, Error> {
        Self::with_limits(endpoint, credentials, Limits::default())
    }

    /// As [`Client::new`], with its patience given.
    pub fn with_limits(
        endpoint: Endpoint,
        credentials: Option<Credentials>,
        limits: Limits,
    ) -> Result<Self, Error> {
        Ok(Self { transport: Transport::new(endpoint, credentials, limits)? })
    }

    /// The registry's host, as references write it.
    pub fn host(&self) -> &str {
        self.transport.endpoint.host()
    }

    /// What stands under `reference`; `None` if nothing does.
    pub async fn head_manifest(
        &self,
        repository: &Repository,
        reference: &Reference,
    ) -> Result<Option<Descriptor>, Error> {
        let call = self.manifest_call(Method::HEAD, "looking for", repository, reference);
        let Some(answer) = found(self.transport.send(&call).await)? else { return Ok(None) };
        let Some(descriptor) = described(&answer) else {
            // Not every registry says what it has in the headers.
            let manifest = self.get_manifest(repository, reference).await?;
            return Ok(manifest.map(|manifest| manifest.descriptor()));
        };
        expect_digest(&call.doing, reference, descriptor.digest)?;
        Ok(Some(descriptor))
    }

    /// The manifest under `reference`, its digest computed here; `None` if there is none.
    pub async fn get_manifest(
        &self,
        repository: &Repository,
        reference: &Reference,
    ) -> Result<Option<Manifest>, Error> {
        let call = self.manifest_call(Method::GET, "reading", repository, reference);
        let Some(answer) = found(self.transport.send(&call).await)? else { return Ok(None) };
        let actual = Digest::of(&answer.body);
        expect_digest(&call.doing, reference, actual)?;
        if let Some(said) = said_digest(&answer) {
            expect_digest(&call.doing, &said.into(), actual)?;
        }
        let content_type = answer.header(CONTENT_TYPE).unwrap_or_default();
        let manifest = Manifest::new(content_type, answer.body.clone())
            .map_err(|error| Error::malformed(&call.doing, error.to_string()))?;
        Ok(Some(manifest))
    }

    /// Puts `manifest` under a tag, or under its own digest. Everything it points to has to be there already.
    pub async fn put_manifest(
        &self,
        repository: &Repository,
        reference: &Reference,
        manifest: &Manifest,
    ) -> Result<(), Error> {
        self.put_manifest_within(self.transport.deadline(), repository, reference, manifest).await
    }

    /// The same, where a registry that is away, or asks for time, is waited for so long.
    pub async fn put_manifest_within(
        &self,
        deadline: Duration,
        repository: &Repository,
        reference: &Reference,
        manifest: &Manifest,
    ) -> Result<(), Error> {
        let mut call = self.manifest_call(Method::PUT, "putting", repository, reference);
        expect_digest(&call.doing, reference, manifest.digest())?;
        let content_type = HeaderValue::from_str(manifest.media_type())
            .map_err(|_| Error::malformed(&call.doing, "a media type that no header can hold"))?;
        call.headers.insert(CONTENT_TYPE, content_type);
        call.body = manifest.bytes().clone();
        let answer = self.transport.send_within(&call, deadline).await?;
        match said_digest(&answer) {
            Some(actual) if actual != manifest.digest() => {
                Err(Error::DigestMismatch { doing: call.doing, expected: manifest.digest(), actual })
            }
            _ => Ok(()),
        }
    }

    /// Whether the repository holds the blob.
    pub async fn blob_exists(&self, repository: &Repository, digest: Digest) -> Result<bool, Error> {
        Ok(self.head_blob(repository, digest).await?.is_some())
    }

    /// The blob's length, where the registry says it; `None` if there is no such blob.
    pub(super) async fn head_blob(
        &self,
        repository: &Repository,
        digest: Digest,
    ) -> Result<Option<Option<u64>>, Error> {
        let doing = format!("looking for blob {digest} in {}/{repository}", self.host());
        // What is pushed is looked for first: asking for the wider scope saves a second token.
        let path = format!("v2/{repository}/blobs/{digest}");
        let call = self.call(Method::HEAD, &path, Scope::Push(repository.clone()), doing);
        Ok(found(self.transport.send(&call).await)?.map(|answer| content_length(&answer)))
    }

    pub(super) fn call(&self, method: Method, path: &str, scope: Scope, doing: String) -> Call {
        let url = self.transport.endpoint.url(path);
        Call { method, url, scope, headers: HeaderMap::new(), body: Bytes::new(), doing }
    }

    fn manifest_call(
        &self,
        method: Method,
        verb: &str,
        repository: &Repository,
        reference: &Reference,
    ) -> Call {
        let doing = format!("{verb} manifest {reference} in {}/{repository}", self.host());
        let scope = match method {
            Method::PUT => Scope::Push(repository.clone()),
            _ => Scope::Pull(repository.clone()),
        };
        let mut call = self.call(method, &format!("v2/{repository}/manifests/{reference}"), scope, doing);
        call.headers.insert(ACCEPT, HeaderValue::from_static(manifest::ACCEPT));
        call
    }
}

fn found(answer: Result<Answer, Error>) -> Result<Option<Answer>, Error> {
    match answer {
        Ok(answer) => Ok(Some(answer)),
        Err(Error::NotFound { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

fn said_digest(answer: &Answer) -> Option<Digest> {
    answer.header(CONTENT_DIGEST)?.parse().ok()
}

fn content_length(answer: &Answer) -> Option<u64> {
    answer.header(CONTENT_LENGTH)?.parse().ok()
}

fn described(answer: &Answer) -> Option<Descriptor> {
    let media_type = answer.header(CONTENT_TYPE)?.to_owned();
    Some(Descriptor { media_type, digest: said_digest(answer)?, size: content_length(answer)? })
}

fn expect_digest(doing: &str, reference: &Reference, actual: Digest) -> Result<(), Error> {
    match reference {
        Reference::Digest(expected) if *expected != actual => {
            Err(Error::DigestMismatch { doing: doing.to_owned(), expected: *expected, actual })
        }
        _ => Ok(()),
    }
}
