//! The front's answers to the engine (pure).

use axum::body::Body;
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};

use super::super::client::CONTENT_DIGEST;
use super::super::digest::Digest;
use super::super::error::Error;
use super::super::manifest::Manifest;
use super::super::upload::Step;

const API_VERSION: (&str, &str) = ("docker-distribution-api-version", "registry/2.0");
const UPLOAD_ID: HeaderName = HeaderName::from_static("docker-upload-uuid");
const SHORTEST_CHUNK: HeaderName = HeaderName::from_static("oci-chunk-min-length");

/// An answer with an OCI error body.
pub(super) fn refusal(status: StatusCode, code: &str, message: &str) -> Response {
    let body = serde_json::json!({ "errors": [{ "code": code, "message": message }] });
    (status, [API_VERSION], axum::Json(body)).into_response()
}

/// What the engine is told of a failure upstream.
///
/// An engine repeats a blob after a 5xx and gives up at a 4xx whose body says `DENIED`. What was a stream could be
/// sent only once, so the engine is to try again; everything else has been repeated here already. A 401 would make
/// the engine look for credentials, which it must not have.
pub(super) fn failure(error: &Error, streamed: bool) -> Response {
    let message = error.to_string();
    match error {
        Error::NotFound { .. } => refusal(StatusCode::NOT_FOUND, "NAME_UNKNOWN", &message),
        error if streamed && error.is_transient() => {
            refusal(StatusCode::SERVICE_UNAVAILABLE, "UNAVAILABLE", &message)
        }
        Error::Refused { status: status @ 400..500, code, .. } => {
            let status = StatusCode::from_u16(*status).unwrap_or(StatusCode::FORBIDDEN);
            refusal(status, if code.is_empty() { "DENIED" } else { code }, &message)
        }
        _ => refusal(StatusCode::FORBIDDEN, "DENIED", &message),
    }
}

/// `/v2/`: yes, a registry, and one that asks for no credentials.
pub(super) fn base() -> Response {
    ([API_VERSION], axum::Json(serde_json::json!({}))).into_response()
}

/// A blob is there.
pub(super) fn blob(digest: Digest, length: Option<u64>) -> Response {
    let mut response = Response::new(Body::empty());
    set(&mut response, CONTENT_DIGEST, &digest.to_string());
    set(&mut response, header::CONTENT_TYPE, "application/octet-stream");
    if let Some(length) = length {
        set(&mut response, header::CONTENT_LENGTH, &length.to_string());
    }
    response
}

/// A manifest that is held; `with_bytes` for a GET.
pub(super) fn manifest(manifest: &Manifest, with_bytes: bool) -> Response {
    let bytes = manifest.bytes();
    let mut response = Response::new(if with_bytes { Body::from(bytes.clone()) } else { Body::empty() });
    set(&mut response, CONTENT_DIGEST, &manifest.digest().to_string());
    set(&mut response, header::CONTENT_TYPE, manifest.media_type());
    set(&mut response, header::CONTENT_LENGTH, &bytes.len().to_string());
    response
}

/// Content has been taken, and stands at `location`.
pub(super) fn created(location: &str, digest: Digest) -> Response {
    let mut response = StatusCode::CREATED.into_response();
    set(&mut response, header::LOCATION, location);
    set(&mut response, CONTENT_DIGEST, &digest.to_string());
    response
}

/// An upload has begun, and goes on at `location`.
pub(super) fn begun(location: &str, id: &str) -> Response {
    let mut response = StatusCode::ACCEPTED.into_response();
    set(&mut response, header::LOCATION, location);
    set(&mut response, header::RANGE, "0-0");
    set(&mut response, UPLOAD_ID, id);
    response
}

/// The registry's answer to a step, with our own place to go on.
pub(super) fn step(step: &Step, location: &str, id: &str) -> Response {
    let mut response = step.status.into_response();
    for name in [header::RANGE, SHORTEST_CHUNK] {
        if let Some(value) = step.headers.get(&name) {
            response.headers_mut().insert(name, value.clone());
        }
    }
    set(&mut response, header::LOCATION, location);
    set(&mut response, UPLOAD_ID, id);
    response
}

/// A value that no header can hold is left out; all of ours are plain ASCII.
fn set(response: &mut Response, name: HeaderName, value: &str) {
    if let Ok(value) = HeaderValue::from_str(value) {
        response.headers_mut().insert(name, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(status: u16) -> Error {
        let doing = "uploading".to_owned();
        let (code, message) = ("X".to_owned(), "m".to_owned());
        Error::Refused { doing, status, code, message, retry_after: None }
    }

    #[test]
    fn an_engine_repeats_only_what_could_not_be_repeated_here() {
        let doing = || "uploading".to_owned();
        let late = || Error::TimedOut { doing: doing(), after: std::time::Duration::from_secs(1) };
        let unauthorized = |status| Error::Unauthorized { doing: doing(), status, message: String::new() };
        let cases = [
            (unauthorized(401), false, 403),
            (unauthorized(403), true, 403),
            (Error::NotFound { doing: doing(), message: String::new() }, false, 404),
            (late(), true, 503),
            (late(), false, 403),
            (refused(500), true, 503),
            (refused(500), false, 403),
            (refused(429), true, 503),
            (refused(429), false, 429),
            (refused(413), true, 413),
        ];
        for (error, streamed, expected) in cases {
            assert_eq!(failure(&error, streamed).status(), expected, "{error} {streamed}");
        }
    }
}
