//! Whether a caller may do something: the caller's own token is tried on Nomad, and what came of it is kept for seconds.
//!
//! Invariant: what one token may do is never taken for what another one may. Of a token only its hash is kept.
//! Invariant: whoever asks takes nothing of what jobs need: Nomad is asked apart from everything else, and within seconds.

mod acls;

use std::sync::Arc;
use std::time::{Duration, Instant};

use secrecy::SecretString;

use super::holders::Holders;
use super::memo::{Answer, Memo};
use super::tokens::{Hash, hash_of};
use crate::nomad::{Capability, Client, Error, Holder};
use acls::Acls;

/// How many tokens are tried at once.
const AT_ONCE: usize = 8;

/// How long what a token may do is believed: one that is revoked is let in for no longer.
const KEPT: Duration = Duration::from_secs(5);

/// How long it is where Nomad does not answer: reads go on while it is away for a moment.
const KEPT_WITHOUT_NOMAD: Duration = Duration::from_mins(1);

/// How long a stream goes on while nobody knows whether its caller may still read it.
const UNKNOWN: Duration = Duration::from_mins(5);

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
    Unknown(#[from] Arc<Error>),
}

/// A token, told by its hash, and what it was tried for.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Trial {
    namespace: String,
    token: Option<Hash>,
    capability: Capability,
}

impl Answer for bool {
    fn kept(&self) -> Duration {
        KEPT
    }

    fn is_refusal(&self) -> bool {
        !self
    }
}

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

/// What tokens may do, in all namespaces.
pub(super) struct Rights {
    nomad: Client,
    acls: Acls,
    holders: Arc<Holders>,
    tried: Memo<Trial, bool>,
}

impl Rights {
    pub(super) fn new(nomad: &Client, holders: Arc<Holders>) -> Self {
        let nomad = nomad.apart(AT_ONCE);
        Self { acls: Acls::new(nomad.clone()), nomad, holders, tried: Memo::default() }
    }

    /// Keeps it known whether Nomad has ACLs; ends only by being dropped.
    pub(super) async fn watch(&self) {
        self.acls.watch().await;
    }

    async fn may(
        self: &Arc<Self>,
        namespace: &str,
        caller: Option<&SecretString>,
        capability: Capability,
    ) -> Result<bool, Arc<Error>> {
        let trial = Trial { namespace: namespace.to_owned(), token: caller.map(hash_of), capability };
        if let Some(may) = self.tried.current(&trial) {
            return Ok(may);
        }
        let last = || self.tried.last(&trial, KEPT_WITHOUT_NOMAD);
        if let Some(may) = last().filter(|_| self.tried.is_away(&trial)) {
            // Nobody waits for a Nomad that did not answer the last time.
            self.try_beside(trial.clone(), caller.cloned());
            return Ok(may);
        }
        let holder = match caller {
            Some(token) => Some(self.holders.of(token).await),
            None => None,
        };
        if let Some(Ok(Holder::Nobody)) = holder {
            if last().is_some() {
                // Nor is what it was let in for before believed where Nomad goes away now.
                self.tried.keep(&trial, &Ok(false));
            }
            return Ok(false);
        }
        let is_stranger = matches!(holder, Some(Err(_)));
        let tried = self.tried.ask(&trial, self.try_on(&trial, caller.cloned(), is_stranger)).await;
        match tried {
            Err(error) if error.is_passing() => last().ok_or(error),
            tried => tried,
        }
    }

    async fn try_on(
        &self,
        trial: &Trial,
        caller: Option<SecretString>,
        is_stranger: bool,
    ) -> Result<bool, Error> {
        let nomad = if is_stranger { self.holders.strangers() } else { &self.nomad };
        nomad.with_token(caller).may(&trial.namespace, trial.capability).await
    }

    fn try_beside(self: &Arc<Self>, trial: Trial, caller: Option<SecretString>) {
        let rights = Arc::clone(self);
        #[expect(
            clippy::disallowed_methods,
            reason = "it ends within seconds, and what it learns is for who asks next"
        )]
        tokio::spawn(async move {
            rights.tried.ask_alone(&trial, rights.try_on(&trial, caller, false)).await;
        });
    }
}

/// What tokens may do in one namespace.
pub(crate) struct Authority {
    rights: Arc<Rights>,
    namespace: String,
    /// Who may do everything where Nomad has no ACLs.
    open: Open,
}

impl Authority {
    pub(super) fn new(rights: Arc<Rights>, namespace: &str, open: Open) -> Self {
        Self { rights, namespace: namespace.to_owned(), open }
    }

    /// Whether a caller may, who has this token or none.
    pub(crate) async fn check(
        &self,
        caller: Option<&SecretString>,
        capability: Capability,
    ) -> Result<(), Denied> {
        self.check_elsewhere(caller, &self.namespace, capability).await
    }

    /// The same of any other namespace, whether it is one of builds or none.
    pub(crate) async fn check_elsewhere(
        &self,
        caller: Option<&SecretString>,
        namespace: &str,
        capability: Capability,
    ) -> Result<(), Denied> {
        if !self.has_acls().await? {
            return if self.open == Open::Nobody { Err(Denied::Closed) } else { Ok(()) };
        }
        match caller {
            _ if self.rights.may(namespace, caller, capability).await? => Ok(()),
            None => Err(Denied::Anonymous),
            Some(_) => Err(Denied::Forbidden(capability, namespace.to_owned())),
        }
    }

    /// Whether it is known that Nomad has ACLs.
    pub(crate) async fn is_guarded(&self) -> bool {
        self.has_acls().await.unwrap_or_default()
    }

    async fn has_acls(&self) -> Result<bool, Denied> {
        match self.rights.acls.are_on().await {
            Err(_) if self.open == Open::Everybody => Ok(false),
            answer => Ok(answer?),
        }
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
}
