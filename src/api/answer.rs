//! The envelope of every answer, and the errors that stand in it.

use axum::extract::rejection::{BytesRejection, JsonRejection, QueryRejection};
use axum::http::header::{RETRY_AFTER, WWW_AUTHENTICATE};
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use chrono::{DateTime, SecondsFormat, Utc};
use serde::{Serialize, Serializer};

use crate::job::{FieldError, Invalid, JobId};
use crate::nomad;
use crate::service::{
    CleanupError, Denied, FindError, KeyError, KillError, LoginError, SubmitError, TicketError, logs,
};
use crate::telemetry::chain;

#[derive(Serialize)]
struct Envelope<T> {
    data: Option<T>,
    error: Option<ErrorBody>,
    #[serde(serialize_with = "rfc3339")]
    timestamp: DateTime<Utc>,
}

#[derive(Serialize)]
struct ErrorBody {
    code: &'static str,
    message: String,
    details: Vec<FieldError>,
}

/// A time as RFC 3339 in UTC, to the millisecond.
pub(super) fn milliseconds(time: Option<DateTime<Utc>>) -> Option<String> {
    time.map(|time| time.to_rfc3339_opts(SecondsFormat::Millis, true))
}

/// Writes a time as RFC 3339 in UTC, to the millisecond.
pub(super) fn rfc3339<S: Serializer>(time: &DateTime<Utc>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&time.to_rfc3339_opts(SecondsFormat::Millis, true))
}

/// An answer's data, in the envelope.
pub(super) struct Data<T>(pub(super) T);

impl<T: Serialize> IntoResponse for Data<T> {
    fn into_response(self) -> Response {
        Json(Envelope { data: Some(self.0), error: None, timestamp: Utc::now() }).into_response()
    }
}

/// The code of an answer that is an error, beside the answer.
#[derive(Clone, Copy)]
pub(super) struct ErrorCode(pub(super) &'static str);

/// The stable codes of errors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// A field of a submission is wrong.
    InvalidSubmission,
    /// A path or a query parameter is wrong.
    InvalidRequest,
    /// The body is no JSON.
    InvalidJson,
    /// The body is not declared as JSON.
    UnsupportedMediaType,
    /// The body is too large.
    BodyTooLarge,
    /// The body does not come.
    RequestTimeout,
    /// The address asks for too much.
    TooManyRequests,
    /// A token is needed.
    Unauthorized,
    /// The token may not do it.
    Forbidden,
    /// No such route.
    RouteNotFound,
    /// The route has other methods.
    MethodNotAllowed,
    /// No such job.
    JobNotFound,
    /// The job has not ended.
    JobLive,
    /// An idempotency key came with another body before.
    IdempotencyKeyReused,
    /// Nomad does not answer, or not as it should.
    NomadUnavailable,
    /// The archive does not answer, or not as it should.
    ArchiveUnavailable,
    /// Too many are at it; asking again helps.
    Busy,
    /// Not ready to serve.
    NotReady,
    /// The service's fault.
    Internal,
}

impl Code {
    fn parts(self) -> (StatusCode, &'static str) {
        match self {
            Self::InvalidSubmission => (StatusCode::BAD_REQUEST, "invalid_submission"),
            Self::InvalidRequest => (StatusCode::BAD_REQUEST, "invalid_request"),
            Self::InvalidJson => (StatusCode::BAD_REQUEST, "invalid_json"),
            Self::UnsupportedMediaType => (StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type"),
            Self::BodyTooLarge => (StatusCode::PAYLOAD_TOO_LARGE, "body_too_large"),
            Self::RequestTimeout => (StatusCode::REQUEST_TIMEOUT, "request_timeout"),
            Self::TooManyRequests => (StatusCode::TOO_MANY_REQUESTS, "too_many_requests"),
            Self::Unauthorized => (StatusCode::UNAUTHORIZED, "unauthorized"),
            Self::Forbidden => (StatusCode::FORBIDDEN, "forbidden"),
            Self::RouteNotFound => (StatusCode::NOT_FOUND, "route_not_found"),
            Self::MethodNotAllowed => (StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed"),
            Self::JobNotFound => (StatusCode::NOT_FOUND, "job_not_found"),
            Self::JobLive => (StatusCode::CONFLICT, "job_live"),
            Self::IdempotencyKeyReused => (StatusCode::UNPROCESSABLE_ENTITY, "idempotency_key_reused"),
            Self::NomadUnavailable => (StatusCode::SERVICE_UNAVAILABLE, "nomad_unavailable"),
            Self::Busy => (StatusCode::SERVICE_UNAVAILABLE, "busy"),
            Self::ArchiveUnavailable => (StatusCode::SERVICE_UNAVAILABLE, "archive_unavailable"),
            Self::NotReady => (StatusCode::SERVICE_UNAVAILABLE, "not_ready"),
            Self::Internal => (StatusCode::INTERNAL_SERVER_ERROR, "internal"),
        }
    }
}

/// A log that could not be read.
#[derive(Debug, thiserror::Error)]
#[error("the log of job {job} could not be read")]
pub(super) struct Unread {
    pub(super) job: JobId,
    #[source]
    pub(super) cause: logs::Unread,
}

/// An error as the API answers it.
#[derive(Debug)]
pub struct Problem {
    code: Code,
    message: String,
    details: Vec<FieldError>,
}

impl Problem {
    /// An error with a message for people.
    pub fn new(code: Code, message: &str) -> Self {
        Self { code, message: message.to_owned(), details: Vec::new() }
    }

    /// One parameter that is wrong.
    pub(super) fn parameter(field: &str, message: &str) -> Self {
        let details = vec![FieldError { field: field.to_owned(), message: message.to_owned() }];
        Self { code: Code::InvalidRequest, message: format!("{field} {message}"), details }
    }

    /// Several fields that are wrong.
    pub(super) fn fields(details: Vec<FieldError>) -> Self {
        let message = format!("the request has {} invalid field(s)", details.len());
        Self { code: Code::InvalidRequest, message, details }
    }

    #[cfg(test)]
    pub(super) fn details(&self) -> &[FieldError] {
        &self.details
    }

    /// A fault of ours or of Nomad's: the cause goes to the log, the caller learns what was being done.
    pub(super) fn caused(code: Code, message: String, error: &dyn std::error::Error) -> Self {
        tracing::warn!(error = chain(error), "{message}");
        Self { code, message, details: Vec::new() }
    }

    fn archive(error: &dyn std::error::Error) -> Self {
        let message = format!("{error}: Nomad no longer has it, and the archive did not answer as it should");
        Self::caused(Code::ArchiveUnavailable, message, error)
    }

    pub(super) fn of_nomad(cause: &nomad::Error, whole: &dyn std::error::Error) -> Self {
        let code = if cause.is_passing() { Code::NomadUnavailable } else { Code::Internal };
        Self::caused(code, format!("{whole}: {cause}"), whole)
    }
}

impl From<Unread> for Problem {
    fn from(error: Unread) -> Self {
        match &error.cause {
            logs::Unread::Nomad(cause) => Self::of_nomad(cause, &error),
            // The store's own text is for the log: it may tell an access key's ID.
            logs::Unread::Archive(_) | logs::Unread::Late => Self::archive(&error),
            logs::Unread::Busy => Self::new(
                Code::Busy,
                &format!("{error}: ask again, or read /logs/stream, which takes its lines as you do"),
            ),
        }
    }
}

/// How many seconds later to ask again what too many ask for now.
const SOON: HeaderValue = HeaderValue::from_static("1");

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let is_busy = self.code == Code::Busy;
        let (status, code) = self.code.parts();
        let error = ErrorBody { code, message: self.message, details: self.details };
        let envelope = Envelope::<()> { data: None, error: Some(error), timestamp: Utc::now() };
        let mut answer = (status, Extension(ErrorCode(code)), Json(envelope)).into_response();
        if status == StatusCode::UNAUTHORIZED {
            answer.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if is_busy {
            answer.headers_mut().insert(RETRY_AFTER, SOON);
        }
        answer
    }
}

impl From<Invalid> for Problem {
    fn from(Invalid(details): Invalid) -> Self {
        let message =
            format!("the submission has {} invalid field(s); nothing was registered", details.len());
        Self { code: Code::InvalidSubmission, message, details }
    }
}

impl From<Denied> for Problem {
    fn from(denied: Denied) -> Self {
        match denied {
            Denied::Anonymous => Self::new(Code::Unauthorized, &denied.to_string()),
            Denied::Forbidden(..) | Denied::Closed => Self::new(Code::Forbidden, &denied.to_string()),
            Denied::Unknown(ref cause) => {
                Self::caused(Code::NomadUnavailable, format!("{denied}: {cause}"), &denied)
            }
        }
    }
}

impl From<LoginError> for Problem {
    fn from(error: LoginError) -> Self {
        match error {
            LoginError::Refused { .. } => Self::new(Code::Unauthorized, &error.to_string()),
            LoginError::NotOffered { .. } => {
                Self::fields(vec![FieldError { field: "method".to_owned(), message: error.to_string() }])
            }
            LoginError::Busy => Self::new(Code::Busy, &error.to_string()),
            LoginError::Nomad(ref cause) => Self::of_nomad(cause, &error),
        }
    }
}

impl From<TicketError> for Problem {
    fn from(error: TicketError) -> Self {
        match error {
            TicketError::Unknown => Self::new(Code::Unauthorized, &error.to_string()),
            TicketError::TooMany => Self::new(Code::TooManyRequests, &error.to_string()),
            TicketError::Nomad(ref cause) => Self::of_nomad(cause, &error),
            TicketError::Unmade => Self::caused(Code::Internal, error.to_string(), &error),
        }
    }
}

impl From<SubmitError> for Problem {
    fn from(error: SubmitError) -> Self {
        match error {
            SubmitError::Invalid(invalid) => invalid.into(),
            SubmitError::Forbidden(details) => {
                let message =
                    "the submission names what your Nomad token may not read; nothing was registered";
                Self { code: Code::Forbidden, message: message.to_owned(), details }
            }
            SubmitError::Nomad(ref cause) | SubmitError::Key(KeyError::Nomad(ref cause)) => {
                Self::of_nomad(cause, &error)
            }
            SubmitError::Key(KeyError::Malformed(_)) => {
                Self::caused(Code::Internal, error.to_string(), &error)
            }
            SubmitError::Unconfirmed(..) | SubmitError::Unanswered(..) | SubmitError::Ledger(_) => {
                Self::caused(Code::NomadUnavailable, error.to_string(), &error)
            }
            SubmitError::Find(find) => find.into(),
            SubmitError::KeyTaken => Self::new(Code::IdempotencyKeyReused, &error.to_string()),
            SubmitError::Token => Self::parameter(
                "X-Nomad-Token",
                "is no ACL token that Nomad knows: an Idempotency-Key is kept apart by it",
            ),
            SubmitError::Render(_) => {
                let message =
                    "the operator's job template cannot be used; the service's log says why".to_owned();
                Self::caused(Code::Internal, message, &error)
            }
        }
    }
}

impl From<FindError> for Problem {
    fn from(error: FindError) -> Self {
        match error {
            FindError::Unknown(_) => Self::new(Code::JobNotFound, &error.to_string()),
            FindError::Nomad(_, ref cause) => Self::of_nomad(cause, &error),
            FindError::Archive(..) => Self::archive(&error),
            FindError::Ledger(..) => Self::caused(Code::NomadUnavailable, error.to_string(), &error),
        }
    }
}

impl From<KillError> for Problem {
    fn from(error: KillError) -> Self {
        match error {
            KillError::Find(find) => find.into(),
            KillError::Undecided(..) => Self::caused(Code::NomadUnavailable, error.to_string(), &error),
            KillError::Running(_, ref cause) | KillError::Credentials(_, ref cause) => {
                Self::of_nomad(cause, &error)
            }
        }
    }
}

impl From<CleanupError> for Problem {
    fn from(error: CleanupError) -> Self {
        match error {
            CleanupError::Find(find) => find.into(),
            CleanupError::Live(_) | CleanupError::Running(_) => Self::new(Code::JobLive, &error.to_string()),
            CleanupError::Nomad(_, ref cause) => Self::of_nomad(cause, &error),
            CleanupError::Render(_) => Self::caused(Code::Internal, error.to_string(), &error),
            CleanupError::Archive(..) => Self::caused(Code::ArchiveUnavailable, error.to_string(), &error),
            CleanupError::Ledger(..) | CleanupError::Node(..) => {
                Self::caused(Code::NomadUnavailable, error.to_string(), &error)
            }
        }
    }
}

impl From<JsonRejection> for Problem {
    fn from(rejection: JsonRejection) -> Self {
        match rejection {
            JsonRejection::MissingJsonContentType(_) => Self::new(
                Code::UnsupportedMediaType,
                "the body must be declared as Content-Type: application/json",
            ),
            JsonRejection::BytesRejection(rejection) => rejection.into(),
            other => Self::new(Code::InvalidJson, &format!("the body is not JSON: {}", other.body_text())),
        }
    }
}

impl From<BytesRejection> for Problem {
    fn from(rejection: BytesRejection) -> Self {
        if rejection.status() == StatusCode::PAYLOAD_TOO_LARGE {
            return Self::new(
                Code::BodyTooLarge,
                "the body is larger than 400 KiB: put long tests into a script",
            );
        }
        Self::new(Code::InvalidRequest, "the body could not be read")
    }
}

impl From<QueryRejection> for Problem {
    fn from(rejection: QueryRejection) -> Self {
        Self::new(Code::InvalidRequest, &format!("the query cannot be read: {}", rejection.body_text()))
    }
}
