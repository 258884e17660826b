//! Whose a token is, and what it may do.

use std::fmt;
use std::time::Duration;

use reqwest::Method;
use serde::Deserialize;
use serde_json::{Value, json};

use super::client::{Client, Request};
use super::error::{Error, Kind};
use super::types::Allocation;

/// What Nomad 1.11 says whose every token is where it has no ACLs.
const NO_ACLS: &str = "acls-disabled";

/// The name of a job and of a task that are not there: Nomad looks at a token before it looks for them.
pub(super) const NOBODY: &str = "nomad-build-nobody";

/// What Nomad says, with no status of its own, of a token that it does not have, or not any more, or that is none.
const NO_TOKEN: [&str; 3] = ["ACL token", "failed to parse signed token", "in keyring"];

/// How long it may take to learn whose a token is.
const TOLD: Duration = Duration::from_secs(2);

/// How long it may take to try a token: somebody waits for it.
const TRIED_WITHIN: Duration = Duration::from_secs(5);

/// How many allocations a token is tried on: Nomad's servers may know of one that its node has forgotten.
const TRIED: u32 = 5;

/// Whose a token is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Holder {
    /// An ACL token's, by its accessor. Without ACLs it is the same for everybody.
    Accessor(String),
    /// A workload's, whose identity has no accessor.
    Workload,
    /// Nobody's: Nomad does not have it, or not any more.
    Nobody,
}

/// What a token may do in a namespace, by Nomad's names for it.
///
/// Source: Nomad 1.11, `acl/policy.go` and its documentation of ACL policies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Capability {
    /// See jobs.
    ReadJob,
    /// Read the logs of tasks.
    ReadLogs,
    /// Start what somebody else has registered.
    DispatchJob,
}

impl Capability {
    /// The name that stands in policies.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::ReadJob => "read-job",
            Self::ReadLogs => "read-logs",
            Self::DispatchJob => "dispatch-job",
        }
    }
}

impl fmt::Display for Capability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Token {
    #[serde(rename = "AccessorID")]
    accessor: String,
}

pub(super) fn whose() -> Request {
    Request::get(&["acl", "token", "self"], "asking Nomad whose token this is".to_owned())
}

fn read_job(namespace: &str) -> Request {
    Request::get(&["job", NOBODY], trying(namespace, Capability::ReadJob))
        .query("namespace", namespace)
        // A server that has lost its leader knows policies as well.
        .query("stale", true)
}

fn dispatch_job(namespace: &str) -> Result<Request, Error> {
    Request::new(Method::POST, &["job", NOBODY, "dispatch"], trying(namespace, Capability::DispatchJob))
        .query("namespace", namespace)
        .json(&json!({}))
}

fn read_logs(namespace: &str, allocation: &str) -> Request {
    Request::get(&["client", "fs", "logs", allocation], trying(namespace, Capability::ReadLogs))
        .query("task", NOBODY)
        .query("type", "stdout")
}

fn trying(namespace: &str, capability: Capability) -> String {
    format!("trying whether a token has {capability} in namespace {namespace:?}")
}

/// Whether Nomad says that a token is none, whatever it was used for.
fn is_no_token(error: &Error) -> bool {
    matches!(&error.kind, Kind::Refused { status: 500, message } if NO_TOKEN.iter().any(|said| message.contains(said)))
}

/// What Nomad says of whose a token is.
fn holder(answer: Result<String, Error>) -> Result<Holder, Error> {
    match answer {
        Ok(accessor) => Ok(Holder::Accessor(accessor)),
        Err(Error { kind: Kind::NotFound, .. }) => Ok(Holder::Workload),
        Err(error) if error.kind == Kind::Forbidden || is_no_token(&error) => Ok(Holder::Nobody),
        Err(error) => Err(error),
    }
}

/// Gives a call up that takes too long, with its wait for a place.
async fn within<T>(
    most: Duration,
    doing: &str,
    call: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    tokio::time::timeout(most, call).await.map_err(|late| Error::unreachable(doing, late))?
}

/// What an answer to a question after nothing says of the token; none where it says nothing.
fn verdict(capability: Capability, answer: &Result<(), Error>) -> Option<bool> {
    let Err(error) = answer else { return Some(true) };
    match (capability, &error.kind) {
        (_, Kind::Forbidden) => Some(false),
        _ if is_no_token(error) => Some(false),
        (Capability::ReadJob | Capability::DispatchJob, Kind::NotFound) => Some(true),
        (Capability::DispatchJob, Kind::Refused { message, .. }) => {
            message.contains("job not found").then_some(true)
        }
        // The node was asked, which comes after the token.
        (Capability::ReadLogs, Kind::Refused { message, .. }) => {
            ["unknown task name", "No path to node"].iter().any(|said| message.contains(said)).then_some(true)
        }
        _ => None,
    }
}

impl Client {
    /// The accessor of this client's token, which names it and is no secret. Without ACLs, and without a token, it is the
    /// same for everybody. [`super::Kind::Forbidden`] where Nomad does not know the token.
    pub async fn accessor(&self) -> Result<String, Error> {
        Ok(self.call::<Token>(whose()).await?.value.accessor)
    }

    /// Whose this client's token is, within seconds.
    pub async fn holder(&self) -> Result<Holder, Error> {
        // Not of a server that may lag behind: somebody may have the token since just now.
        let request = whose();
        let doing = request.doing.clone();
        holder(within(TOLD, &doing, self.call::<Token>(request)).await.map(|token| token.value.accessor))
    }

    /// Whether Nomad looks at tokens at all, within seconds.
    pub async fn has_acls(&self) -> Result<bool, Error> {
        let request = whose().query("stale", true);
        let doing = "asking Nomad whether it has ACLs";
        match within(TRIED_WITHIN, doing, self.with_token(None).call::<Token>(request)).await {
            Ok(token) => Ok(token.value.accessor != NO_ACLS),
            // Who has no token is nobody, in some versions.
            Err(Error { kind: Kind::Forbidden, .. }) => Ok(true),
            Err(error) => Err(error),
        }
    }

    /// Whether this client's token has a capability in a namespace, within seconds: it is used to ask after something that is
    /// not there.
    pub async fn may(&self, namespace: &str, capability: Capability) -> Result<bool, Error> {
        within(TRIED_WITHIN, &trying(namespace, capability), self.try_for(namespace, capability)).await
    }

    async fn try_for(&self, namespace: &str, capability: Capability) -> Result<bool, Error> {
        let answer = match capability {
            Capability::ReadJob => self.call::<Value>(read_job(namespace)).await.map(drop),
            Capability::DispatchJob => self.call::<Value>(dispatch_job(namespace)?).await.map(drop),
            Capability::ReadLogs => return self.may_read_logs(namespace).await,
        };
        match (verdict(capability, &answer), answer) {
            (Some(may), _) => Ok(may),
            (None, Err(error)) => Err(error),
            // Never: what was answered well says yes.
            (None, Ok(())) => Ok(false),
        }
    }

    /// Logs belong to allocations, so one has to be there: which, this client asks for by itself, and not by that token. Where there
    /// is none, the policies of the token say.
    async fn may_read_logs(&self, namespace: &str) -> Result<bool, Error> {
        let capability = Capability::ReadLogs;
        // A node that was asked once lets a token in long after its end (Nomad 1.11: over a minute after).
        if self.has_secret_id()
            && matches!(self.call::<Token>(whose().query("stale", true)).await, Err(e) if e.kind == Kind::Forbidden)
        {
            return Ok(false);
        }
        for Allocation { id, .. } in self.as_ourselves().latest_allocations(namespace, TRIED).await? {
            let answer = self.order(read_logs(namespace, &id)).await;
            match (verdict(capability, &answer), answer) {
                (Some(may), _) => return Ok(may),
                (None, Err(error)) if error.is_passing() => return Err(error),
                (None, _) => {}
            }
        }
        // All that there were may be collected, and what they wrote is archived.
        if let Some(may) = self.may_by_its_policies(namespace, capability).await? {
            return Ok(may);
        }
        let why = "it has no allocation there to try the token on, and the token is no ACL token, which has policies to read: \
                   there is one once a build has run";
        Err(Error::undecided(&trying(namespace, capability), why))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_nomad_says_of_nothing_tells_what_a_token_may_do() {
        use Capability::{DispatchJob, ReadJob, ReadLogs};
        for (capability, status, body, want) in [
            (ReadJob, 403, "Permission denied", Some(false)),
            (ReadJob, 404, "job not found", Some(true)),
            (ReadJob, 500, "No cluster leader", None),
            (DispatchJob, 403, "Permission denied", Some(false)),
            (DispatchJob, 500, "parameterized job not found", Some(true)),
            (DispatchJob, 500, "No cluster leader", None),
            (DispatchJob, 429, "", None),
            (ReadLogs, 403, "Permission denied", Some(false)),
            (ReadLogs, 400, "unknown task name \"nomad-build-nobody\"", Some(true)),
            (ReadLogs, 404, "No path to node", Some(true)),
            (ReadLogs, 500, "ACL token not found", Some(false)),
            (ReadLogs, 500, "ACL token expired", Some(false)),
            (ReadLogs, 500, "rpc error: Permission denied", Some(false)),
            (ReadLogs, 500, "rpc error: failed to parse signed token: invalid", Some(false)),
            // Its servers, before they look at the token, and its node say this alike.
            (ReadLogs, 404, "Unknown allocation \"x\"", None),
            (ReadLogs, 400, "must provide a valid alloc id", None),
        ] {
            let answer = Err(Error::answered("trying", status, body));
            assert_eq!(verdict(capability, &answer), want, "{capability} {status} {body}");
        }
    }

    #[test]
    fn a_token_is_somebodys_a_workloads_or_nobodys_or_nomad_does_not_say() {
        assert_eq!(holder(Ok("a".to_owned())).unwrap(), Holder::Accessor("a".to_owned()));
        for (status, body, want) in [
            (404, "ACL token not found", Some(Holder::Workload)),
            (403, "ACL token not found", Some(Holder::Nobody)),
            (403, "Permission denied", Some(Holder::Nobody)),
            (500, "ACL token expired", Some(Holder::Nobody)),
            (500, "failed to parse signed token: invalid", Some(Holder::Nobody)),
            (500, "operation cancelled: no such key \"one\" in keyring", Some(Holder::Nobody)),
            (500, "No cluster leader", None),
            (429, "", None),
        ] {
            assert_eq!(holder(Err(Error::answered("asking", status, body))).ok(), want, "{status} {body}");
        }
    }

    #[test]
    fn nothing_that_is_there_is_asked_after() {
        for request in [read_job("ci"), dispatch_job("ci").unwrap()] {
            assert_eq!(request.path[1], NOBODY);
            assert!(request.query.contains(&("namespace", "ci".to_owned())));
        }
        assert!(read_logs("ci", "a").query.contains(&("task", NOBODY.to_owned())));
    }
}
