//! What can go wrong with a registry, and what of its answers may be shown.

use std::time::Duration;

use reqwest::StatusCode;
use reqwest::header::{HeaderMap, RETRY_AFTER};
use serde::Deserialize;

use super::digest::Digest;

/// Longer messages of a registry are cut to so many characters.
const LONGEST_MESSAGE: usize = 512;

/// A request to a registry failed. Each says what was being done and to what, in `doing`.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The registry does not let these credentials (or nobody in particular) do this.
    #[error(
        "{doing}: the registry answered {status} ({message}): check that the credentials are right and may pull from \
         and push to this repository"
    )]
    Unauthorized {
        /// What was being done, to what.
        doing: String,
        /// 401 or 403.
        status: u16,
        /// The registry's own words.
        message: String,
    },
    /// What was asked for, or the repository to put it into, is not there.
    #[error("{doing}: not found ({message})")]
    NotFound {
        /// What was being done, to what.
        doing: String,
        /// The registry's own words.
        message: String,
    },
    /// No connection, or it broke.
    #[error("{doing}: the registry cannot be reached")]
    Unreachable {
        /// What was being done, to what.
        doing: String,
        /// How it failed.
        source: reqwest::Error,
    },
    /// What was being sent ended too early, and the registry is not why.
    #[error("{doing}: what is sent broke off")]
    BrokeOff {
        /// What was being done, to what.
        doing: String,
        /// How it ended.
        source: reqwest::Error,
    },
    /// A connection on which nothing came back in time.
    #[error("{doing}: no answer within {}", seconds(*.after))]
    TimedOut {
        /// What was being done, to what.
        doing: String,
        /// How long was waited.
        after: Duration,
    },
    /// The registry understood and said no, or failed itself.
    #[error("{doing}: the registry answered {status}{}: {message}", after_space(.code))]
    Refused {
        /// What was being done, to what.
        doing: String,
        /// The HTTP status.
        status: u16,
        /// The code of the error body, such as `TOOMANYREQUESTS`; empty if there was none.
        code: String,
        /// The registry's own words.
        message: String,
        /// How long the registry asks to wait before the next try.
        retry_after: Option<Duration>,
    },
    /// The content is not what its name says.
    #[error("{doing}: expected content with digest {expected}, got {actual}")]
    DigestMismatch {
        /// What was being done, to what.
        doing: String,
        /// What was asked for.
        expected: Digest,
        /// What came.
        actual: Digest,
    },
    /// The registry's answer is not one that the protocol allows.
    #[error("{doing}: the registry's answer makes no sense: {what}")]
    Malformed {
        /// What was being done, to what.
        doing: String,
        /// What is wrong with the answer.
        what: String,
    },
    /// The HTTP client could not be set up.
    #[error("setting up the HTTP client for registry {host}")]
    Setup {
        /// The registry.
        host: String,
        /// Why not.
        source: reqwest::Error,
    },
}

impl Error {
    /// Whether the same request may well succeed a little later.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Unreachable { .. } | Self::BrokeOff { .. } | Self::TimedOut { .. } => true,
            // 507: it is full, and is not emptied by trying again.
            Self::Refused { status, .. } => matches!(status, 408 | 425 | 429 | 500..) && *status != 507,
            _ => false,
        }
    }

    /// How long the registry asks to wait.
    pub(super) fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Refused { retry_after, .. } => *retry_after,
            _ => None,
        }
    }

    pub(super) fn unreachable(doing: &str, source: reqwest::Error) -> Self {
        // A redirect's or an upload's URL can carry a signature.
        Self::Unreachable { doing: doing.to_owned(), source: source.without_url() }
    }

    pub(super) fn broke_off(doing: &str, source: reqwest::Error) -> Self {
        Self::BrokeOff { doing: doing.to_owned(), source: source.without_url() }
    }

    pub(super) fn malformed(doing: &str, what: impl Into<String>) -> Self {
        Self::Malformed { doing: doing.to_owned(), what: what.into() }
    }

    /// The error that an answer with a failing status is.
    pub(super) fn from_answer(doing: &str, status: StatusCode, headers: &HeaderMap, body: &[u8]) -> Self {
        let doing = doing.to_owned();
        let Words { code, message } = words(status, body);
        match status.as_u16() {
            status @ (401 | 403) => Self::Unauthorized { doing, status, message },
            404 => Self::NotFound { doing, message },
            status => Self::Refused { doing, status, code, message, retry_after: wait_asked_for(headers) },
        }
    }
}

fn after_space(code: &str) -> String {
    if code.is_empty() { String::new() } else { format!(" {code}") }
}

fn seconds(duration: Duration) -> String {
    format!("{} s", duration.as_secs_f32().ceil())
}

#[derive(Deserialize)]
struct Body {
    errors: Vec<Words>,
}

#[derive(Deserialize)]
struct Words {
    #[serde(default)]
    code: String,
    #[serde(default)]
    message: String,
}

/// The first error of an OCI error body (distribution spec, "Error Codes"), safe to print.
fn words(status: StatusCode, body: &[u8]) -> Words {
    let first = serde_json::from_slice::<Body>(body).ok().and_then(|body| body.errors.into_iter().next());
    let said = first.unwrap_or(Words { code: String::new(), message: String::new() });
    let message = printable(&said.message);
    let message = if message.is_empty() {
        status.canonical_reason().unwrap_or("no reason given").to_owned()
    } else {
        message
    };
    Words { code: printable(&said.code), message }
}

/// The text without control characters, cut to a length fit for a log line.
pub(super) fn printable(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(LONGEST_MESSAGE).collect::<String>().trim().to_owned()
}

/// `Retry-After`, in seconds or as a date (RFC 9110 section 10.2.3).
fn wait_asked_for(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    if let Ok(seconds) = text.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let date = chrono::DateTime::parse_from_rfc2822(text).ok()?;
    (date.to_utc() - chrono::Utc::now()).to_std().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(status: u16, body: &str) -> Error {
        Error::from_answer(
            "doing it",
            StatusCode::from_u16(status).unwrap(),
            &HeaderMap::new(),
            body.as_bytes(),
        )
    }

    #[test]
    fn a_registry_s_words_are_shown_but_cannot_harm() {
        let long = format!(r#"{{"errors":[{{"code":"X","message":"{}"}}]}}"#, "y".repeat(10_000));
        let cases = [
            (
                500,
                r#"{"errors":[{"code":"UNKNOWN","message":"disk full"}]}"#,
                "doing it: the registry answered 500 UNKNOWN: disk full",
            ),
            (413, "<html>", "doing it: the registry answered 413: Payload Too Large"),
            (
                400,
                "{\"errors\":[{\"code\":\"A\\u001b[31m\",\"message\":\"a\\nb\\u0007c\"}]}",
                "doing it: the registry answered 400 A[31m: abc",
            ),
            (400, r#"{"errors":[]}"#, "doing it: the registry answered 400: Bad Request"),
            (404, "", "doing it: not found (Not Found)"),
        ];
        for (status, body, expected) in cases {
            assert_eq!(answer(status, body).to_string(), expected);
        }
        assert!(answer(500, &long).to_string().len() < 600);
    }

    #[test]
    fn only_what_may_pass_is_tried_again() {
        let cases =
            [(400, false), (401, false), (403, false), (404, false), (408, true), (429, true), (503, true)];
        for (status, transient) in cases {
            assert_eq!(answer(status, "").is_transient(), transient, "{status}");
        }
    }

    #[test]
    fn the_wait_asked_for_is_understood() {
        let later = (chrono::Utc::now() + chrono::TimeDelta::seconds(100)).to_rfc2822();
        let cases = [("7", 7..8), (later.as_str(), 90..101), ("soon", 0..0), ("-1", 0..0)];
        for (text, expected) in cases {
            let headers = HeaderMap::from_iter([(RETRY_AFTER, text.parse().unwrap())]);
            let wait = wait_asked_for(&headers).map(|wait| wait.as_secs());
            assert_eq!(
                wait.is_some_and(|wait| expected.contains(&wait)),
                !expected.is_empty(),
                "{text} {wait:?}"
            );
        }
    }
}
