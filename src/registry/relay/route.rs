//! What a request to the front is about (pure).

use reqwest::Url;

use super::super::digest::{Digest, ParseDigestError};
use super::super::name::Reference;

/// The last part of the front's one repository.
const NAME: &str = "image";

/// The way in: the one repository that the front has, under an unguessable name.
#[derive(Debug)]
pub(super) struct Door {
    repository: String,
    digest: Digest,
}

/// A request's object.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Route {
    /// `/v2/`: whether this is a registry.
    Base,
    /// A blob.
    Blob(Digest),
    /// Where uploads begin. With a digest the body is the whole blob.
    Uploads { completes: Option<Digest> },
    /// An upload that has begun. With a digest this request completes it.
    Upload { id: String, completes: Option<Digest> },
    /// A manifest.
    Manifest(Reference),
}

/// A request that is about nothing here.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum NoRoute {
    Unknown,
    BadDigest,
}

impl From<ParseDigestError> for NoRoute {
    fn from(_: ParseDigestError) -> Self {
        Self::BadDigest
    }
}

impl Door {
    pub(super) fn new(secret: &str) -> Self {
        Self { digest: Digest::of(secret.as_bytes()), repository: format!("{secret}/{NAME}") }
    }

    /// The repository's name, as the engine sees it.
    pub(super) fn repository(&self) -> &str {
        &self.repository
    }

    /// Reads a request's path and query.
    pub(super) fn route(&self, path: &str, query: Option<&str>) -> Result<Route, NoRoute> {
        if matches!(path, "/v2" | "/v2/") {
            return Ok(Route::Base);
        }
        let mut parts = path.strip_prefix("/v2/").ok_or(NoRoute::Unknown)?.split('/');
        let secret = parts.next().unwrap_or_default();
        // Digests are compared, so that the time it takes tells nothing of the secret.
        if Digest::of(secret.as_bytes()) != self.digest || parts.next() != Some(NAME) {
            return Err(NoRoute::Unknown);
        }
        let rest: Vec<&str> = parts.collect();
        match rest.as_slice() {
            ["blobs", "uploads"] | ["blobs", "uploads", ""] => {
                Ok(Route::Uploads { completes: completes(query)? })
            }
            ["blobs", "uploads", id] => {
                Ok(Route::Upload { id: (*id).to_owned(), completes: completes(query)? })
            }
            ["blobs", digest] => Ok(Route::Blob(digest.parse()?)),
            ["manifests", reference] => reference.parse().map(Route::Manifest).map_err(|_| NoRoute::Unknown),
            _ => Err(NoRoute::Unknown),
        }
    }
}

fn completes(query: Option<&str>) -> Result<Option<Digest>, NoRoute> {
    let Some(query) = query else { return Ok(None) };
    let url = Url::parse(&format!("http://relay/?{query}")).map_err(|_| NoRoute::Unknown)?;
    let digest = url.query_pairs().find(|(key, _)| key == "digest");
    Ok(digest.map(|(_, digest)| digest.parse()).transpose()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_one_repository_is_there() {
        let door = Door::new("5ecret");
        let digest = Digest::of(b"x");
        let upload = |id: &str, completes| Ok(Route::Upload { id: id.to_owned(), completes });
        let encoded = digest.to_string().replace(':', "%3A");
        let cases = [
            ("/v2/".to_owned(), None, Ok(Route::Base)),
            ("/v2".to_owned(), None, Ok(Route::Base)),
            (format!("/v2/5ecret/image/blobs/{digest}"), None, Ok(Route::Blob(digest))),
            ("/v2/5ecret/image/blobs/uploads/".to_owned(), None, Ok(Route::Uploads { completes: None })),
            (
                "/v2/5ecret/image/blobs/uploads/".to_owned(),
                Some(format!("mount={digest}&from=other/app")),
                Ok(Route::Uploads { completes: None }),
            ),
            (
                "/v2/5ecret/image/blobs/uploads".to_owned(),
                Some(format!("digest={digest}")),
                Ok(Route::Uploads { completes: Some(digest) }),
            ),
            ("/v2/5ecret/image/blobs/uploads/id".to_owned(), None, upload("id", None)),
            (
                "/v2/5ecret/image/blobs/uploads/id".to_owned(),
                Some(format!("a=b&digest={encoded}")),
                upload("id", Some(digest)),
            ),
            (
                "/v2/5ecret/image/blobs/uploads/id".to_owned(),
                Some("digest=md5:1".to_owned()),
                Err(NoRoute::BadDigest),
            ),
            ("/v2/5ecret/image/blobs/md5:1".to_owned(), None, Err(NoRoute::BadDigest)),
            (
                "/v2/5ecret/image/manifests/push".to_owned(),
                None,
                Ok(Route::Manifest(Reference::Tag("push".to_owned()))),
            ),
            (
                format!("/v2/5ecret/image/manifests/{digest}"),
                None,
                Ok(Route::Manifest(Reference::Digest(digest))),
            ),
            ("/v2//".to_owned(), None, Err(NoRoute::Unknown)),
            ("/v1/".to_owned(), None, Err(NoRoute::Unknown)),
            ("/v2x/5ecret/image/manifests/push".to_owned(), None, Err(NoRoute::Unknown)),
            ("/v2/other/image/manifests/push".to_owned(), None, Err(NoRoute::Unknown)),
            ("/v2/5ecret2/image/manifests/push".to_owned(), None, Err(NoRoute::Unknown)),
            ("/v2/5ecret/other/manifests/push".to_owned(), None, Err(NoRoute::Unknown)),
            ("/v2/5ecret/image/tags/list".to_owned(), None, Err(NoRoute::Unknown)),
            ("/v2/5ecret/image/manifests/a/b".to_owned(), None, Err(NoRoute::Unknown)),
            ("/v2/../v2/5ecret/image/manifests/push".to_owned(), None, Err(NoRoute::Unknown)),
            ("/v2/_catalog".to_owned(), None, Err(NoRoute::Unknown)),
        ];
        for (path, query, expected) in cases {
            assert_eq!(door.route(&path, query.as_deref()), expected, "{path} {query:?}");
        }
    }
}
