//! The reflector: list, then stream, then list again.
//!
//! Two loops, because Nomad has two ways to push: the event stream for jobs, allocations and evaluations, and a
//! blocking query for Variables, which have no events. A list is the truth; a stream is a hint in between.

mod jobs;
mod variables;

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use super::freshness::Freshness;
use super::store::Store;
use crate::ledger::Ledger;
use crate::nomad::{Client, Error, Kind};
use crate::telemetry::Share;

/// How long a blocking query waits at Nomad.
const WAIT: Duration = Duration::from_secs(25);

/// How long what is pushed is believed before everything is listed again: the event stream loses events without a word.
const RELIST: Duration = Duration::from_secs(30);

/// Where lists take long they are made more rarely: at most a twentieth of the time goes into them.
const SHARE: u32 = 20;

/// How many objects are read at once.
const READS: usize = 16;

/// How long Nomad's index has to stay below what it was until that is taken for an older state of Nomad: a restored
/// snapshot, or another cluster. A leader that lost its office may answer for a moment as if it had not (raft's lease
/// ends after 0.5 s).
const CONFIRM: Duration = Duration::from_secs(10);

/// Follows one namespace into a store.
pub(super) struct Watcher {
    pub(super) nomad: Client,
    pub(super) namespace: String,
    pub(super) ledger: Ledger,
    pub(super) store: Arc<Store>,
    pub(super) freshness: Arc<Freshness>,
    pub(super) telemetry: Arc<Share>,
    /// Rung when jobs were listed: then it is asked why those wait of which that was not heard.
    pub(super) began: Notify,
}

impl Watcher {
    /// Follows for ever; ends only by being dropped.
    pub(super) async fn run(self) {
        tokio::join!(self.follow_jobs(), self.follow_ledger(), self.explain_waiting());
    }
}

/// How long everything is not listed again, where that took so long.
fn quiet(took: Duration) -> Duration {
    RELIST.max(took * SHARE)
}

/// The highest index that was heard, and since when it is contradicted.
#[derive(Debug, Default)]
struct Highest {
    index: u64,
    lower_since: Option<Instant>,
}

/// What an index says of the state it came with.
#[derive(Debug, PartialEq, Eq)]
enum State {
    /// As new as what was heard, or newer.
    Newer,
    /// Older, and it may be a mistake.
    Doubtful,
    /// Older for so long that it is what Nomad has now.
    Restored,
}

impl Highest {
    /// Takes in the index of an event.
    fn heard(&mut self, index: u64) {
        self.index = self.index.max(index);
    }

    /// Takes in that nothing could be listed: what was doubtful before says nothing of what comes.
    fn failed(&mut self, error: &Error) {
        if error.kind != Kind::Older {
            self.lower_since = None;
        }
    }

    /// Takes in the index of a list.
    fn listed(&mut self, index: u64, now: Instant) -> State {
        if index >= self.index {
            *self = Self { index, lower_since: None };
            return State::Newer;
        }
        if now.duration_since(*self.lower_since.get_or_insert(now)) < CONFIRM {
            return State::Doubtful;
        }
        *self = Self { index, lower_since: None };
        State::Restored
    }
}

/// Waits longer after each failure, and short again after some quiet time.
struct Pause {
    next: Duration,
}

impl Pause {
    const LEAST: Duration = Duration::from_millis(100);
    const MOST: Duration = Duration::from_secs(1);

    fn new() -> Self {
        Self { next: Self::LEAST }
    }

    async fn after(&mut self, began: Instant) {
        if began.elapsed() > Self::MOST * 10 {
            self.next = Self::LEAST;
        }
        tokio::time::sleep(self.next).await;
        self.next = (self.next * 2).min(Self::MOST);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_index_that_goes_back_is_believed_when_it_stays_back() {
        let (mut highest, began) = (Highest::default(), Instant::now());
        let second = |number| began + Duration::from_secs(number);
        assert_eq!(highest.listed(40, second(0)), State::Newer);
        highest.heard(50);
        // A leader that does not know yet that it is none.
        assert_eq!(highest.listed(45, second(1)), State::Doubtful);
        assert_eq!(highest.listed(50, second(2)), State::Newer);
        assert_eq!(highest.listed(45, second(11)), State::Doubtful);
        assert_eq!(highest.listed(46, second(20)), State::Doubtful);
        assert_eq!(highest.listed(47, second(21)), State::Restored);
        assert_eq!(highest.listed(47, second(22)), State::Newer);
    }
}
