//! Which replica does what only one is to do: count what happens to jobs, and sweep.
//!
//! Every replica sees every job, so counters of all of them added up would count each job several times. The one that
//! holds a Nomad Variable's lock is on duty; another takes over within seconds when it goes.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::nomad::{Client, Error, Lock};
use crate::telemetry::{Share, chain};

/// Below the ledger's prefix, so that one policy covers both.
const VARIABLE: &str = "nomad-build/reporter";

/// How long a lock outlives its holder. Nomad's least is 10 s.
const HELD: Duration = Duration::from_secs(15);

/// How often it is tried for, or renewed.
const EVERY: Duration = Duration::from_secs(5);

/// How long after it was said that it cannot be had that is said again.
const AGAIN: Duration = Duration::from_mins(5);

pub(super) struct Duty {
    pub(super) nomad: Client,
    pub(super) namespace: String,
    pub(super) telemetry: Arc<Share>,
    /// Tells the others of this replica.
    pub(super) on: watch::Sender<bool>,
    /// When to give the lock back and end.
    pub(super) retired: CancellationToken,
}

impl Duty {
    /// Tries until this replica retires.
    pub(super) async fn run(self) {
        let mut held = None;
        let mut said: Option<Instant> = None;
        while !self.retired.is_cancelled() {
            held = match self.hold(held).await {
                Ok(held) => {
                    said = None;
                    held
                }
                Err(error) => {
                    if said.is_none_or(|at| at.elapsed() > AGAIN) {
                        said = Some(Instant::now());
                        let error = chain(&error);
                        tracing::warn!(
                            error,
                            variable = VARIABLE,
                            "the lock of the replica on duty cannot be had: this replica counts, sweeps and archives nothing"
                        );
                    }
                    // Whether it is still ours cannot be known: to count nothing is better than to count twice.
                    None
                }
            };
            self.telemetry.set_reports(held.is_some());
            self.on.send_replace(held.is_some());
            tokio::select! {
                () = tokio::time::sleep(EVERY) => {}
                () = self.retired.cancelled() => {}
            }
        }
        let Some(lock) = held else { return };
        self.telemetry.set_reports(false);
        self.on.send_replace(false);
        // Another replica need not wait until it runs out.
        if let Err(error) = self.nomad.release_lock(&self.namespace, VARIABLE, &lock).await {
            tracing::debug!(error = chain(&error), "the lock of the replica on duty runs out by itself");
        }
    }

    async fn hold(&self, held: Option<Lock>) -> Result<Option<Lock>, Error> {
        if let Some(lock) = held
            && self.nomad.renew_lock(&self.namespace, VARIABLE, &lock).await?
        {
            return Ok(Some(lock));
        }
        self.nomad.acquire_lock(&self.namespace, VARIABLE, HELD).await
    }
}
