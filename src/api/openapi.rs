//! The API's own description, in the terms of OpenAPI 3.1.

use std::sync::LazyLock;

use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse as _, Response};

use super::answer::{Code, Problem};

/// The document, as JSON. It is written in YAML, which people read.
static DOCUMENT: LazyLock<Option<String>> = LazyLock::new(|| {
    let document: serde_json::Value = serde_norway::from_str(include_str!("openapi.yaml")).ok()?;
    Some(document.to_string())
});

/// `GET /openapi.json`
pub(super) async fn document() -> Result<Response, Problem> {
    let document = DOCUMENT.as_deref();
    let document = document.ok_or_else(|| Problem::new(Code::Internal, "the document cannot be read"))?;
    Ok(([(CONTENT_TYPE, "application/json")], document).into_response())
}
