//! Why Nomad could not be asked, or what it answered instead.

/// What went wrong, with what was being done.
#[derive(Debug, thiserror::Error)]
#[error("{doing}: {kind}")]
pub struct Error {
    /// What was being done, and to what.
    pub doing: String,
    /// What went wrong.
    pub kind: Kind,
    #[source]
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

/// The kinds of failure a caller tells apart.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Kind {
    /// No answer, or none in time.
    #[error("Nomad did not answer; is it running, and is its address right?")]
    Unreachable,
    /// 404.
    #[error("Nomad does not know it")]
    NotFound,
    /// 403.
    #[error("Nomad's ACLs do not allow it")]
    Forbidden,
    /// 409, or a create-only registration of a job that exists.
    #[error("it exists already, or was changed meanwhile")]
    Conflict,
    /// Any other status.
    #[error("Nomad answered {status}: {message}")]
    Refused {
        /// The HTTP status.
        status: u16,
        /// Nomad's text.
        message: String,
    },
    /// Nothing that Nomad answers would say.
    #[error("Nomad could not tell: {0}")]
    Undecided(&'static str),
    /// An older state than before: of a server that is cut off, or of a restored snapshot.
    #[error("Nomad showed an older state than before")]
    Older,
    /// An answer that is not what Nomad's documentation says.
    #[error("Nomad's answer could not be understood")]
    Malformed,
}

impl Error {
    pub(super) fn unreachable(
        doing: &str,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self { doing: doing.to_owned(), kind: Kind::Unreachable, source: Some(source.into()) }
    }

    pub(super) fn malformed(
        doing: &str,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self { doing: doing.to_owned(), kind: Kind::Malformed, source: Some(source.into()) }
    }

    pub(super) fn answered(doing: &str, status: u16, body: &str) -> Self {
        let kind = match status {
            404 if body.contains("No path to node") => Kind::Refused { status, message: body.to_owned() },
            404 => Kind::NotFound,
            403 => Kind::Forbidden,
            // What a node's agent makes of a server's refusal.
            500 if body.contains("rpc error: Permission denied") => Kind::Forbidden,
            409 => Kind::Conflict,
            // Nomad has no status of its own for a create-only registration that comes second.
            500 if body.contains("Enforcing job modify index") => Kind::Conflict,
            _ => Kind::Refused { status, message: body.chars().take(500).collect() },
        };
        Self { doing: doing.to_owned(), kind, source: None }
    }

    pub(super) fn undecided(doing: &str, why: &'static str) -> Self {
        Self { doing: doing.to_owned(), kind: Kind::Undecided(why), source: None }
    }

    /// An answer that shows an older state than an earlier one did.
    pub fn older(doing: &str, index: u64, earlier: u64) -> Self {
        let why = format!("its index is {index}, and was {earlier} before");
        Self { doing: doing.to_owned(), kind: Kind::Older, source: Some(why.into()) }
    }

    /// Whether Nomad said no, so that nothing was changed.
    pub fn is_refusal(&self) -> bool {
        match &self.kind {
            Kind::NotFound | Kind::Forbidden | Kind::Conflict => true,
            Kind::Refused { status, .. } => (400..500).contains(status) && !self.is_passing(),
            Kind::Unreachable | Kind::Malformed | Kind::Older | Kind::Undecided(_) => false,
        }
    }

    /// Whether Nomad has no such log. It answers 400 for a task of an allocation that has not reached its node.
    pub fn has_no_log(&self) -> bool {
        matches!(self.kind, Kind::NotFound | Kind::Refused { status: 400, .. })
    }

    /// Whether trying again may help: no answer, half an answer, no leader, or too many requests.
    pub fn is_passing(&self) -> bool {
        match &self.kind {
            // Nomad answers 404 for a file on a node that it has lost sight of.
            Kind::Unreachable | Kind::Malformed | Kind::Refused { status: 404, .. } => true,
            Kind::Refused { status, message } => {
                matches!(status, 429 | 502..=504)
                    || (*status == 500 && PASSING.iter().any(|text| message.contains(text)))
            }
            _ => false,
        }
    }
}

/// What Nomad says with status 500 while its servers agree on a leader, or cannot reach each other.
///
/// Source: Nomad 1.11, `nomad/structs/errors.go`, `helper/pool` and, for a task that asks, `command/agent/http.go`; raft 1.7,
/// `api.go`; yamux 0.1, `const.go`; Go's `net`.
const PASSING: &[&str] = &[
    "No cluster leader",
    "Server error authenticating request",
    "Not ready to serve consistent reads",
    "No path to region",
    "leadership lost",
    "leadership transfer in progress",
    "node is not the leader",
    "raft is already shutdown",
    "timed out enqueuing operation",
    "snapshot restored while committing log",
    "failed to get conn",
    "lead thread didn't get connection",
    "rpc error: EOF",
    "unexpected EOF",
    "session shutdown",
    "stream closed",
    "keepalive timeout",
    "connection write timeout",
    "connection refused",
    "connection reset",
    "broken pipe",
    "i/o timeout",
    "i/o deadline reached",
    "no route to host",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_be_tried_again_and_what_was_surely_refused() {
        for (status, body, passing, refusal) in [
            (500, "No cluster leader", true, false),
            (500, "rpc error: EOF", true, false),
            (500, "Server error authenticating request", true, false),
            (429, "", true, false),
            (503, "", true, false),
            // A node that is out of sight may come back, and its files with it.
            (404, "No path to node", true, false),
            (404, "job not found", false, true),
            (403, "Permission denied", false, true),
            (500, "rpc error: Permission denied", false, true),
            (400, "bad request", false, true),
            // Nobody says whether anything was written.
            (500, "rpc error: lead thread didn't get connection", true, false),
            (500, "rpc error: node is not the leader", true, false),
            (500, "1 error occurred: invalid job", false, false),
            (500, "Enforcing job modify index 0: job already exists", false, true),
        ] {
            let error = Error::answered("asking", status, body);
            assert_eq!((error.is_passing(), error.is_refusal()), (passing, refusal), "{status} {body}");
        }
        for lost in [Error::unreachable("asking", "no answer"), Error::malformed("asking", "half of one")] {
            assert!(lost.is_passing() && !lost.is_refusal());
        }
    }
}
