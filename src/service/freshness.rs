//! Whether what the store shows is current, and why not.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use chrono::{DateTime, TimeDelta, Utc};
use tokio::sync::Notify;

use crate::nomad::Error;

/// Nomad pushes at least every half minute, be it a heartbeat or a blocking query's end.
const STALE: Duration = Duration::from_mins(1);

/// What is watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    Jobs,
    Ledger,
}

#[derive(Default)]
struct State {
    heard: [Option<Instant>; 2],
    broken: [Option<String>; 2],
}

/// When each part was last heard of.
#[derive(Default)]
pub(super) struct Freshness {
    state: Mutex<State>,
    /// Rung when something was heard.
    heard: Notify,
}

impl Freshness {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn current(&self, part: Part) {
        let mut state = self.lock();
        state.heard[part as usize] = Some(Instant::now());
        state.broken[part as usize] = None;
        drop(state);
        self.heard.notify_waiters();
    }

    pub(super) fn broken(&self, part: Part, error: &Error) {
        self.lock().broken[part as usize] = Some(error.to_string());
    }

    /// Waits until everything was listed once.
    pub(super) async fn completed(&self) {
        loop {
            let heard = self.heard.notified();
            if self.is_complete() {
                return;
            }
            heard.await;
        }
    }

    /// Whether everything was listed once.
    pub(super) fn is_complete(&self) -> bool {
        self.heard().is_some()
    }

    /// When what is known was last known to be all there is; none before the first time.
    pub(super) fn as_of(&self) -> Option<DateTime<Utc>> {
        let age = TimeDelta::from_std(self.heard()?.elapsed()).unwrap_or(TimeDelta::MAX);
        Utc::now().checked_sub_signed(age)
    }

    fn heard(&self) -> Option<Instant> {
        let [jobs, ledger] = self.lock().heard;
        Some(jobs?.min(ledger?))
    }

    /// Why the store cannot be believed; none where it can.
    pub(super) fn doubt(&self) -> Option<String> {
        let state = self.lock();
        if let Some(why) = state.broken.iter().flatten().next() {
            return Some(why.clone());
        }
        match state.heard {
            [None, _] | [_, None] => Some("the first list of jobs is not complete yet".to_owned()),
            [Some(jobs), Some(ledger)] if jobs.min(ledger).elapsed() > STALE => {
                Some("nothing was heard of Nomad for over a minute".to_owned())
            }
            _ => None,
        }
    }
}
