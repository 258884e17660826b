//! Long texts as an answer: written as JSON while they are sent, so that no second copy of them is held.

use std::iter::once;

use axum::body::{Body, Bytes};
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse as _, Response};
use chrono::Utc;
use futures_util::stream;
use serde::Serialize;
use tokio::sync::OwnedSemaphorePermit;

use super::answer::{Code, Problem, milliseconds};
use crate::service::logs::Logs;

/// How much of a text is sent at once, in bytes.
const PIECE: usize = 64 << 10;

/// The pieces of a text, as they stand within a JSON string.
fn escaped(text: String) -> impl Iterator<Item = String> {
    let mut from = 0;
    std::iter::from_fn(move || {
        let rest = text.get(from..).filter(|rest| !rest.is_empty())?;
        let mut length = rest.len().min(PIECE);
        while !rest.is_char_boundary(length) {
            length -= 1;
        }
        from += length;
        let quoted = serde_json::Value::from(&rest[..length]).to_string();
        Some(quoted[1..quoted.len() - 1].to_owned())
    })
}

/// A further field, where there is something in it.
fn field(name: &str, value: &impl Serialize, is_empty: bool) -> Result<String, serde_json::Error> {
    if is_empty {
        return Ok(String::new());
    }
    Ok(format!(",{name:?}:{}", serde_json::to_string(value)?))
}

/// The logs in the envelope, in pieces.
fn pieces(logs: Logs, timestamp: &str) -> Result<impl Iterator<Item = String> + use<>, serde_json::Error> {
    let Logs { build, test, publish, truncated, missing } = logs;
    let further = field("truncated", &truncated, truncated.is_empty())?
        + &field("missing", &missing, missing.is_empty())?;
    let end = format!("\"{further}}},\"error\":null,\"timestamp\":\"{timestamp}\"}}");
    let all = once("{\"data\":{\"build\":\"".to_owned())
        .chain(escaped(build))
        .chain(once("\",\"test\":\"".to_owned()))
        .chain(escaped(test))
        .chain(once("\",\"publish\":\"".to_owned()))
        .chain(escaped(publish))
        .chain(once(end));
    Ok(all)
}

/// Answers with logs, which hold their turn until they are sent, or given up.
pub(super) fn answer(logs: Logs, turn: OwnedSemaphorePermit) -> Response {
    let timestamp = milliseconds(Some(Utc::now())).unwrap_or_default();
    let pieces = match pieces(logs, &timestamp) {
        Ok(pieces) => pieces,
        Err(error) => return Problem::new(Code::Internal, &format!("no answer: {error}")).into_response(),
    };
    let body = Body::from_stream(stream::iter(pieces.map(move |piece| {
        let _held = &turn;
        Ok::<_, std::convert::Infallible>(Bytes::from(piece))
    })));
    ([(CONTENT_TYPE, "application/json")], body).into_response()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::job::Phase;
    use crate::service::logs::Truncated;

    #[test]
    fn the_pieces_are_the_logs_in_the_envelope() {
        let long = "a \"line\"\n\u{1b}[2J\u{20ac}\\".repeat(20_000);
        let mut logs = Logs { build: long, publish: "\u{0}".to_owned(), ..Logs::default() };
        for _ in 0..2 {
            let whole: String = pieces(logs.clone(), "now").unwrap().collect();
            let value: Value = serde_json::from_str(&whole).unwrap();
            assert_eq!(value, json!({ "data": logs, "error": null, "timestamp": "now" }));
            logs.truncated.insert(Phase::Build, Truncated { omitted_bytes: 7 });
            logs.missing.insert(Phase::Test, "gone".to_owned());
        }
        assert!(pieces(logs, "now").unwrap().all(|piece| piece.len() <= 6 * PIECE));
    }
}
