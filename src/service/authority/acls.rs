//! Whether Nomad looks at tokens at all: asked beside everything else, and answered from memory.
//!
//! Invariant: once it is known, nobody who asks waits for Nomad.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::nomad::{Client, Error};
use crate::service::memo::AGAIN;
use crate::service::tokens::lock;

/// How often Nomad is asked: its ACLs are turned on and off with its servers.
const EVERY: Duration = Duration::from_secs(15);

/// What Nomad did not answer, and when.
type Failure = (Arc<Error>, Instant);

pub(super) struct Acls {
    nomad: Client,
    known: Mutex<Option<bool>>,
    /// The turn of who asks.
    failed: tokio::sync::Mutex<Option<Failure>>,
}

impl Acls {
    pub(super) fn new(nomad: Client) -> Self {
        Self { nomad, known: Mutex::default(), failed: tokio::sync::Mutex::default() }
    }

    /// Keeps asking; ends only by being dropped.
    pub(super) async fn watch(&self) {
        loop {
            let answered = self.ask().await.is_ok();
            tokio::time::sleep(if answered { EVERY } else { AGAIN }).await;
        }
    }

    /// Whether they are on, as last heard of.
    ///
    /// # Errors
    /// Where Nomad has not said so yet.
    pub(super) async fn are_on(&self) -> Result<bool, Arc<Error>> {
        let known = *lock(&self.known);
        if let Some(on) = known {
            return Ok(on);
        }
        let mut failed = self.failed.lock().await;
        // Whoever was first has asked.
        let known = *lock(&self.known);
        match (known, &*failed) {
            (Some(on), _) => Ok(on),
            (None, Some((error, at))) if at.elapsed() < AGAIN => Err(Arc::clone(error)),
            _ => self.ask_in_turn(&mut failed).await,
        }
    }

    async fn ask(&self) -> Result<bool, Arc<Error>> {
        self.ask_in_turn(&mut *self.failed.lock().await).await
    }

    async fn ask_in_turn(&self, failed: &mut Option<Failure>) -> Result<bool, Arc<Error>> {
        match self.nomad.has_acls().await {
            Ok(on) => {
                *lock(&self.known) = Some(on);
                Ok(on)
            }
            Err(error) => {
                let error = Arc::new(error);
                *failed = Some((Arc::clone(&error), Instant::now()));
                Err(error)
            }
        }
    }
}
