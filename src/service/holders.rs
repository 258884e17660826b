//! Whose tokens are.
//!
//! Invariant: whoever makes up tokens costs Nomad one call for each, and takes nothing of what those need whose tokens it knows:
//! it is asked about strangers apart from everything else.

use std::sync::Arc;
use std::time::Duration;

use secrecy::SecretString;

use super::memo::{Answer, Memo};
use super::tokens::{Hash, hash_of};
use crate::nomad::{Client, Error, Holder};

/// How many strangers are asked about at once.
const AT_ONCE: usize = 4;

/// How long it is kept whose a token is. What it may do is asked by itself.
const KEPT: Duration = Duration::from_mins(10);

/// How long it is believed that a token is nobody's.
const NOBODY_KEPT: Duration = Duration::from_secs(5);

impl Answer for Holder {
    fn kept(&self) -> Duration {
        if self.is_refusal() { NOBODY_KEPT } else { KEPT }
    }

    fn is_refusal(&self) -> bool {
        *self == Self::Nobody
    }
}

/// Whose tokens are, as far as anybody showed them.
pub(super) struct Holders {
    strangers: Client,
    known: Memo<Hash, Holder>,
}

impl Holders {
    pub(super) fn new(nomad: &Client) -> Self {
        Self { strangers: nomad.apart(AT_ONCE), known: Memo::default() }
    }

    /// Nomad, asked apart from what those need whose tokens it knows.
    pub(super) fn strangers(&self) -> &Client {
        &self.strangers
    }

    /// Whose a token is.
    ///
    /// # Errors
    /// Where Nomad does not say, within seconds.
    pub(super) async fn of(&self, token: &SecretString) -> Result<Holder, Arc<Error>> {
        let nomad = self.strangers.with_token(Some(token.clone()));
        self.known.ask(&hash_of(token), async { nomad.holder().await }).await
    }

    /// Takes in whose a token is that Nomad gave just now.
    pub(super) fn learn(&self, token: &SecretString, accessor: &str) {
        self.known.keep(&hash_of(token), &Ok(Holder::Accessor(accessor.to_owned())));
    }
}
