//! What a reader of a job's log is told, one message at a time.

use chrono::{DateTime, Utc};
use serde::Serialize;

use super::cursor::Cursor;
use crate::job::{Failure, Phase, Status, Stream};

/// One message of a log stream, as the API writes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum Message {
    /// The job's status; the current one comes first.
    Status {
        /// Where the job stands.
        status: Status,
        /// The phase it is in, or ended in.
        phase: Option<Phase>,
        /// Since when.
        time: DateTime<Utc>,
    },
    /// One line.
    Log {
        /// The phase that wrote it.
        phase: Phase,
        /// Which output it came from.
        stream: Stream,
        /// The text, without its end.
        line: String,
        /// When the runner read it.
        time: DateTime<Utc>,
        /// Resumes after this line.
        cursor: Cursor,
        /// The line goes on in the next message of this stream.
        #[serde(skip_serializing_if = "std::ops::Not::not")]
        partial: bool,
    },
    /// Lines that cannot be shown.
    Gap {
        /// The phase that wrote them.
        phase: Phase,
        /// Which, and why.
        message: String,
        /// Resumes after the gap.
        cursor: Cursor,
    },
    /// Nothing happened. Made by who keeps the connection open, never by the hub.
    Heartbeat {
        /// Now.
        time: DateTime<Utc>,
    },
    /// The last message.
    End {
        /// How the job ended.
        status: Status,
        /// When.
        time: DateTime<Utc>,
        /// Why the job did not succeed: what its status says, which may be gone by the time it is asked.
        #[serde(skip_serializing_if = "Option::is_none")]
        failure: Option<Failure>,
        /// Why the log is not complete, if it is not.
        #[serde(skip_serializing_if = "Option::is_none")]
        reason: Option<EndReason>,
    },
}

/// Why a log ended without being complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum EndReason {
    /// Nomad no longer has some phase's log.
    Expired,
    /// Some phase's log could not be read.
    Unavailable,
    /// The job was removed while it was read.
    Removed,
}

impl Message {
    /// The message's type, as the API writes it.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Status { .. } => "status",
            Self::Log { .. } => "log",
            Self::Gap { .. } => "gap",
            Self::Heartbeat { .. } => "heartbeat",
            Self::End { .. } => "end",
        }
    }

    /// Whether nothing can come after it, however often it is asked for: what could not be read may be read again.
    pub fn is_final(&self) -> bool {
        matches!(self, Self::End { reason, .. } if *reason != Some(EndReason::Unavailable))
    }

    /// Where to resume after this message, if it says.
    pub fn cursor(&self) -> Option<&Cursor> {
        match self {
            Self::Log { cursor, .. } | Self::Gap { cursor, .. } => Some(cursor),
            Self::Status { .. } | Self::Heartbeat { .. } | Self::End { .. } => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::job::Reason;
    use crate::service::logs::cursor::Position;

    #[test]
    fn messages_are_written_as_the_api_promises() {
        let time = DateTime::from_timestamp(1_700_000_000, 0).unwrap();
        let cursor = || Cursor::new(uuid::Uuid::nil(), Phase::Test, Position::after(7), None);
        let at = "2023-11-14T22:13:20Z";
        let text = cursor().to_string();
        let (phase, reason) = (Some(Phase::Test), Reason::TestFailed);
        let failure = Failure { phase, reason, exit_code: Some(7), message: "no".to_owned() };
        for (message, want) in [
            (
                Message::Status { status: Status::Pending, phase: None, time },
                json!({"type": "status", "status": "PENDING", "phase": null, "time": at}),
            ),
            (
                Message::Log {
                    phase: Phase::Test,
                    stream: Stream::Stderr,
                    line: "x".to_owned(),
                    time,
                    cursor: cursor(),
                    partial: false,
                },
                json!({"type": "log", "phase": "test", "stream": "stderr", "line": "x", "time": at, "cursor": text}),
            ),
            (
                Message::Gap { phase: Phase::Test, message: "gone".to_owned(), cursor: cursor() },
                json!({"type": "gap", "phase": "test", "message": "gone", "cursor": text}),
            ),
            (Message::Heartbeat { time }, json!({"type": "heartbeat", "time": at})),
            (
                Message::End { status: Status::Lost, time, failure: None, reason: Some(EndReason::Expired) },
                json!({"type": "end", "status": "LOST", "time": at, "reason": "expired"}),
            ),
            (
                Message::End {
                    status: Status::Failed,
                    time,
                    failure: Some(failure),
                    reason: Some(EndReason::Unavailable),
                },
                json!({"type": "end", "status": "FAILED", "time": at, "reason": "unavailable", "failure":
                    {"phase": "test", "reason": "test_failed", "exit_code": 7, "message": "no"}}),
            ),
            (
                Message::End { status: Status::Succeeded, time, failure: None, reason: None },
                json!({"type": "end", "status": "SUCCEEDED", "time": at}),
            ),
        ] {
            assert_eq!(message.kind(), want["type"]);
            assert_eq!(message.is_final(), want["type"] == "end" && want["reason"] != "unavailable");
            assert_eq!(serde_json::to_value(message).unwrap(), want);
        }
    }
}
