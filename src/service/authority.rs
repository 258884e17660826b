//! Whether a caller may do something: the caller's own token is tried on Nomad, and what came of it is kept for seconds.
//!
//! Invariant: what one token may do is never taken for what another one may. Of a token only its hash is kept.

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use secrecy::SecretString;

use super::tokens::{Hash, hash_of, lock};
use crate::nomad::{Capability, Client, Error};

/// How long what a token may do is believed: one that is revoked is let in for no longer.
const KEPT: Duration = Duration::from_secs(5);

/// How long it is where Nomad does not answer: reads go on while it is away for a moment.
const KEPT_WITHOUT_NOMAD: Duration = Duration::from_mins(1);

/// How long a stream goes on while nobody knows whether its caller may still read it.
const UNKNOWN: Duration = Duration::from_mins(5);

/// How long it is believed that Nomad has ACLs, or that it has none.
const ACLS_KEPT: Duration = Duration::from_mins(1);

/// The most answers that are kept: callers can make up tokens.
const MOST: usize = 10_000;

/// Why a caller may not do something.
#[derive(Debug, thiserror::Error)]
pub enum Denied {
    /// There is no token, and without one it may not be done.
    #[error("a Nomad token is needed: send it as X-Nomad-Token, or as Authorization: Bearer")]
    Anonymous,
    /// The token may not.
    #[error(
        "the token lacks {0} in namespace {1:?}: ask who runs Nomad for a policy with it, or use another token"
    )]
    Forbidden(Capability, String),
    /// Nomad has no ACLs, and callers may come from anywhere.
    #[error(
        "Nomad has no ACLs, so nobody is served who is not on this machine: turn them on, or let the service \
         listen on a loopback address, or set NOMAD_BUILD_OPEN=true to serve everybody"
    )]
    Closed,
    /// Nomad could not say.
    #[error("whether the token may could not be found out")]
    Unknown(#[from] Error),
}

/// A token, told by its hash, and what it was tried for.
#[derive(PartialEq, Eq, Hash)]
struct Trial {
    /// The namespace, where it is not this one.
    other: Option<String>,
    token: Option<Hash>,
    capability: Capability,
}

/// An answer, and when it came.
type Known = (bool, Instant);

/// Who may do everything where Nomad has no ACLs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Open {
    /// Whoever the operator let in: everybody, also while Nomad does not say whether it has ACLs.
    Everybody,
    /// Who is on this machine, as nobody else gets here.
    ThisMachine,
    /// Nobody, as callers may come from anywhere.
    Nobody,
}

/// What tokens may do in one namespace.
pub(crate) struct Authority {
    nomad: Client,
    namespace: String,
    /// Who may do everything where Nomad has no ACLs.
    open: Open,
    acls: Mutex<Option<Known>>,
    tried: Mutex<HashMap<Trial, Known>>,
}

impl Authority {
    pub(super) fn new(nomad: Client, namespace: &str, open: Open) -> Self {
        let namespace = namespace.to_owned();
        Self { nomad, namespace, open, acls: Mutex::default(), tried: Mutex::default() }
    }

    /// Whether a caller may, who has this token or none.
    pub(crate) async fn check(
        &self,
        caller: Option<&SecretString>,
        capability: Capability,
    ) -> Result<(), Denied> {
        self.check_in(None, caller, capability).await
    }

    /// The same of any other namespace, whether it is one of builds or none.
    pub(crate) async fn check_elsewhere(
        &self,
        caller: Option<&SecretString>,
        namespace: &str,
        capability: Capability,
    ) -> Result<(), Denied> {
        self.check_in(Some(namespace), caller, capability).await
    }

    async fn check_in(
        &self,
        other: Option<&str>,
        caller: Option<&SecretString>,
        capability: Capability,
    ) -> Result<(), Denied> {
        if !self.has_acls().await? {
            return if self.open == Open::Nobody { Err(Denied::Closed) } else { Ok(()) };
        }
        let may = self.may(other, caller, capability).await?;
        match caller {
            _ if may => Ok(()),
            None => Err(Denied::Anonymous),
            Some(_) => Err(Denied::Forbidden(capability, other.unwrap_or(&self.namespace).to_owned())),
        }
    }

    /// Whether it is known that Nomad has ACLs.
    pub(crate) async fn is_guarded(&self) -> bool {
        self.has_acls().await.unwrap_or_default()
    }

    /// Waits until a caller may not any more, or until nobody has known for long; for ever where that does not happen.
    pub(crate) async fn lost(&self, caller: Option<&SecretString>, capability: Capability) {
        let mut known = Instant::now();
        loop {
            tokio::time::sleep(KEPT).await;
            match self.check(caller, capability).await {
                Ok(()) => known = Instant::now(),
                Err(Denied::Unknown(_)) if known.elapsed() < UNKNOWN => {}
                Err(_) => return,
            }
        }
    }

    async fn has_acls(&self) -> Result<bool, Denied> {
        let known = *lock(&self.acls);
        if let Some((has, _)) = known.filter(|(_, at)| at.elapsed() < ACLS_KEPT) {
            return Ok(has);
        }
        match self.nomad.has_acls().await {
            Ok(has) => {
                *lock(&self.acls) = Some((has, Instant::now()));
                Ok(has)
            }
            // They are not turned on or off without Nomad's being restarted.
            Err(error) => match known {
                Some((has, _)) => Ok(has),
                None if self.open == Open::Everybody => Ok(false),
                None => Err(error.into()),
            },
        }
    }

    async fn may(
        &self,
        other: Option<&str>,
        caller: Option<&SecretString>,
        capability: Capability,
    ) -> Result<bool, Error> {
        let token = caller.map(hash_of);
        let trial = Trial { other: other.map(str::to_owned), token, capability };
        let known = lock(&self.tried).get(&trial).copied();
        if let Some((may, _)) = known.filter(|(_, at)| at.elapsed() < KEPT) {
            return Ok(may);
        }
        let namespace = other.unwrap_or(&self.namespace);
        match self.nomad.with_token(caller.cloned()).may(namespace, capability).await {
            Ok(may) => {
                keep(&mut lock(&self.tried), trial, may);
                Ok(may)
            }
            Err(error) if error.is_passing() => {
                let known = known.filter(|(_, at)| at.elapsed() < KEPT_WITHOUT_NOMAD);
                known.map(|(may, _)| may).ok_or(error)
            }
            Err(error) => Err(error),
        }
    }
}

/// Keeps an answer, in bounded memory.
fn keep(tried: &mut HashMap<Trial, Known>, trial: Trial, may: bool) {
    if tried.len() >= MOST {
        tried.retain(|_, (_, at)| at.elapsed() < KEPT);
    }
    if tried.len() >= MOST {
        tried.clear();
    }
    tried.insert(trial, (may, Instant::now()));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn however_many_tokens_are_made_up_memory_is_bounded() {
        let mut tried = HashMap::new();
        for number in 0..=(2 * MOST) {
            let token = Some(hash_of(&number.to_string().into()));
            keep(&mut tried, Trial { other: None, token, capability: Capability::ReadJob }, false);
            assert!(tried.len() <= MOST);
        }
    }
}
