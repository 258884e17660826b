//! Whether what the store shows is current, and why not.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use chrono::{DateTime, TimeDelta, Utc};

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
pub(super) struct Freshness(Mutex<State>);

impl Freshness {
    pub(super) fn current(&self, part: Part) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.heard[part as usize] = Some(Instant::now());
        state.broken[part as usize] = None;
    }

    pub(super) fn broken(&self, part: Part, error: &Error) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.broken[part as usize] = Some(error.to_string());
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
        let state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let [jobs, ledger] = state.heard;
        Some(jobs?.min(ledger?))
    }

    /// Why the store cannot be believed; none where it can.
    pub(super) fn doubt(&self) -> Option<String> {
        let state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
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
