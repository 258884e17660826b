//! The one connection that reads a task's log for all its readers.
//!
//! Invariant: never waits for a reader. Ends by itself once nothing can follow, and is stopped after the last reader.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use chrono::{DateTime, Utc};
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::task::AbortOnDropHandle;

use super::cursor::Position;
use super::decoder::Entry;
use super::message::EndReason;
use super::ring::{Chunk, Ending, Next, Ring};
use super::tap::{Mark, Tap, Target};
use super::{Inner, Unread, retries};
use crate::job::Record;

/// How often Nomad is asked whether a task that should have ended has ended.
const CHECK: Duration = Duration::from_secs(1);

/// How long a connection is kept while others wait for its place.
const TURN: Duration = Duration::from_secs(1);

/// Nomad says that a task is dead before it has written out the last of its log: how long to wait for that, how often.
const FLUSH: Duration = Duration::from_millis(600);
const PASSES: u32 = 17;

/// How often in a row nothing comes before that is held to be all, where the runner has not said how much there is.
const STILL: u32 = 3;

/// How long a log that should be there is asked for before it is held to be gone.
const ABSENT: Duration = Duration::from_secs(5);

/// What readers and their follower share.
struct Shared {
    ring: Mutex<Ring>,
    changed: watch::Sender<()>,
}

impl Shared {
    fn ring(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A reader's hold on a follower, which stops when the last one is dropped.
pub(super) struct Handle {
    shared: Arc<Shared>,
    inner: Arc<Inner>,
    key: Key,
    _task: AbortOnDropHandle<()>,
}

type Key = (String, crate::job::Phase);

/// The followers there are.
#[derive(Default)]
pub(super) struct Followers(Mutex<HashMap<Key, Weak<Handle>>>);

impl Followers {
    fn lock(&self) -> MutexGuard<'_, HashMap<Key, Weak<Handle>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Handle {
    /// The follower of a log; started at a mark where there is none.
    pub(super) fn get(
        inner: &Arc<Inner>,
        target: Target,
        mark: Mark,
        record: watch::Receiver<Arc<Record>>,
    ) -> Arc<Self> {
        let key = (target.allocation.clone(), target.phase);
        let mut all = inner.followers.lock();
        if let Some(handle) = all.get(&key).and_then(Weak::upgrade) {
            return handle;
        }
        let handle = Self::spawn(inner, target, mark, record);
        all.insert(key, Arc::downgrade(&handle));
        handle
    }

    /// A follower from a mark on, in place of the one there is; who reads from that one goes on doing so.
    pub(super) fn start(
        inner: &Arc<Inner>,
        target: Target,
        mark: Mark,
        record: watch::Receiver<Arc<Record>>,
    ) -> Arc<Self> {
        let key = (target.allocation.clone(), target.phase);
        let handle = Self::spawn(inner, target, mark, record);
        inner.followers.lock().insert(key, Arc::downgrade(&handle));
        handle
    }

    fn spawn(
        inner: &Arc<Inner>,
        target: Target,
        mark: Mark,
        record: watch::Receiver<Arc<Record>>,
    ) -> Arc<Self> {
        let key = (target.allocation.clone(), target.phase);
        let ring = Mutex::new(Ring::new(mark.position, inner.settings.ring_bytes));
        let shared = Arc::new(Shared { ring, changed: watch::Sender::new(()) });
        let follower = Follower {
            inner: Arc::clone(inner),
            shared: Arc::clone(&shared),
            target,
            record,
            removed: false,
            mark,
            progress: Instant::now(),
            ended: None,
            absent: None,
            has_begun: false,
        };
        inner.counters.follower(1);
        #[expect(clippy::disallowed_methods, reason = "its handle ends it with its readers")]
        let task = AbortOnDropHandle::new(tokio::spawn(follower.run()));
        Arc::new(Self { shared, inner: Arc::clone(inner), key, _task: task })
    }

    /// Wakes at every change.
    pub(super) fn changes(&self) -> watch::Receiver<()> {
        self.shared.changed.subscribe()
    }

    /// What comes after a position.
    pub(super) fn after(&self, position: Position) -> Next {
        self.shared.ring().after(position)
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.inner.counters.follower(-1);
        let mut all = self.inner.followers.lock();
        // Another one may have been started since the last reader let go of this one.
        if all.get(&self.key).is_some_and(|handle| handle.strong_count() == 0) {
            all.remove(&self.key);
        }
    }
}

struct Follower {
    inner: Arc<Inner>,
    shared: Arc<Shared>,
    target: Target,
    record: watch::Receiver<Arc<Record>>,
    removed: bool,
    mark: Mark,
    /// When the log last grew.
    progress: Instant,
    /// When it was first seen that the job has ended.
    ended: Option<Instant>,
    /// Since when the log is not there although its task has started and ended.
    absent: Option<Instant>,
    /// Whether Nomad's servers know that the task has begun.
    has_begun: bool,
}

/// What Nomad says of the task.
enum Task {
    /// It may still write.
    Live,
    /// It wrote, and will not any more; when it ended.
    Dead(Option<DateTime<Utc>>),
    /// It never ran, and may still.
    Waits,
    /// It never ran, and never will.
    Never,
    /// Nomad has forgotten the allocation.
    Gone,
}

impl Task {
    fn ended_at(&self) -> Option<DateTime<Utc>> {
        if let Self::Dead(at) = self { *at } else { None }
    }

    fn is_over(&self) -> bool {
        matches!(self, Self::Dead(_) | Self::Never | Self::Gone)
    }
}

impl Follower {
    async fn run(mut self) {
        let ending = self.follow().await;
        tracing::debug!(allocation = self.target.allocation, phase = %self.target.phase, ?ending, "log read");
        self.shared.ring().end_with(|| ending);
    }

    async fn follow(&mut self) -> Ending {
        let mut delays = retries();
        loop {
            let before = self.mark.position;
            if self.is_complete() {
                return Ending::Done;
            }
            match self.connection().await {
                Ok(Some(ending)) => return ending,
                Ok(None) => {}
                Err(error) => {
                    if let Some(ending) = self.judge(&error).await {
                        return ending;
                    }
                }
            }
            if self.mark.position != before {
                delays = retries();
            }
            let delay = delays.next().unwrap_or(CHECK);
            // A change may be the task's start: no need to wait any longer.
            tokio::select! {
                () = tokio::time::sleep(delay) => {}
                () = changed(&mut self.record, &mut self.removed) => delays = retries(),
            }
        }
    }

    /// Whether the log may be asked for: not before Nomad's servers know that its task has begun. A node (Nomad 1.11) that is
    /// asked for a log at the moment in which it takes note of that forgets it again (`AllocState` writes back the copy that it had
    /// made before), and gives nothing of the log until something else happens to the task. The servers hear of it after that.
    async fn may_ask(&mut self) -> Result<bool, Unread> {
        if !self.has_begun && !self.is_final() {
            self.has_begun = !matches!(self.task().await?, Task::Waits);
            return Ok(self.has_begun);
        }
        Ok(true)
    }

    /// Reads until the log is complete, the connection ends, or its place is somebody else's turn.
    async fn connection(&mut self) -> Result<Option<Ending>, Unread> {
        if !self.may_ask().await? {
            return Ok(None);
        }
        self.target.ended = self.is_final();
        let Inner { places, counters, .. } = &*Arc::clone(&self.inner);
        let mut tap = Tap::open(&self.target, places, counters, self.mark, true).await?;
        // A log whose length is known ends by itself.
        let soon = if self.is_over() && self.lines().is_none() { Duration::ZERO } else { CHECK };
        let mut check = tokio::time::interval_at(Instant::now() + soon, CHECK);
        check.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (from, mut read) = (self.mark.position, 0);
        loop {
            let (mut ended, mut settle) = (false, false);
            tokio::select! {
                entries = tap.next(counters) => {
                    ended = entries.as_ref().is_ok_and(Option::is_none);
                    self.push(entries?.unwrap_or_default());
                    settle = ended && self.is_over();
                }
                () = changed(&mut self.record, &mut self.removed) => {}
                _ = check.tick() => settle = self.is_over(),
            }
            if ended && tap.is_archived() {
                self.push(tap.finish());
                return Ok(Some(Ending::Done));
            }
            if self.is_complete() {
                return Ok(Some(Ending::Done));
            }
            if settle && !tap.is_archived() {
                match self.task().await? {
                    // What never began by the record's word is not waited for: its right to begin was revoked.
                    task if task.is_over() || self.never_began() => {
                        drop(tap);
                        return self.drain(&task).await;
                    }
                    _ if self.is_out_of_patience() => {
                        let text =
                            "the job has ended, but its task has not: what it may still write is not shown";
                        return Ok(Some(Ending::Missing(EndReason::Unavailable, text.to_owned())));
                    }
                    _ => {}
                }
            }
            // Who has to read from the log's beginning gets on to what is new, however many wait.
            let is_on_its_way = self.mark.position == from && tap.bytes() > read;
            read = tap.bytes();
            if ended || (tap.is_due(places, TURN) && !is_on_its_way) {
                return Ok(None);
            }
        }
    }

    /// Reads what is left of a log that nobody writes to any more; no end where it may yet be found elsewhere.
    async fn drain(&mut self, task: &Task) -> Result<Option<Ending>, Unread> {
        self.target.ended = self.is_final();
        let Inner { places, counters, .. } = &*Arc::clone(&self.inner);
        // A task that is told to stop may take its time, and writes until its end.
        let end =
            self.record.borrow().timestamps.job_end.map(|end| task.ended_at().map_or(end, |at| at.max(end)));
        let is_fresh = end.is_none_or(|end| (Utc::now() - end).num_seconds() < 10);
        let is_fresh = is_fresh && (self.has_run() || task.ended_at().is_some());
        let mut still = 0;
        for passed in 0..PASSES {
            if is_fresh {
                tokio::time::sleep(FLUSH).await;
            }
            let before = self.mark.position;
            let mut tap = Tap::open(&self.target, places, counters, self.mark, false).await?;
            while let Some(entries) = tap.next(counters).await? {
                self.push(entries);
            }
            // What is held waits for what was to be written out since the pass before.
            if passed > 0 {
                self.push(tap.release());
            }
            still = if self.mark.position == before && self.lines().is_none() { still + 1 } else { 0 };
            if !is_fresh || still == STILL {
                // A line without an end is the last thing a killed runner wrote.
                self.push(tap.finish());
                break;
            }
            if self.is_complete() {
                break;
            }
        }
        if self.is_complete() {
            return Ok(Some(Ending::Done));
        }
        // While a node removes an allocation it gives nothing more of its log, before it says that there is none.
        match self.task().await? {
            Task::Gone => Ok(self.elsewhere().await),
            Task::Never if self.is_told_of() || self.is_purged().await? => Ok(self.elsewhere().await),
            _ => Ok(Some(Ending::Done)),
        }
    }

    /// The end of a log that Nomad has no more of; none where the archive has it, or may come to have it.
    async fn elsewhere(&self) -> Option<Ending> {
        let otherwise = || if self.is_told_of() { expired() } else { Ending::Done };
        if !self.may_be_archived() || !(self.is_told_of() || self.was_just_killed()) {
            return Some(otherwise());
        }
        match self.target.is_archived().await {
            // Whoever wrote the index had all the logs that there are.
            Some(false) => Some(otherwise()),
            Some(true) | None => None,
        }
    }

    fn push(&mut self, entries: Vec<Entry>) {
        let Some(last) = entries.last() else { return };
        self.mark = Mark::after(last);
        self.progress = Instant::now();
        self.absent = None;
        if let Some(chunk) = Chunk::new(entries) {
            self.shared.ring().push(chunk);
            self.shared.changed.send_replace(());
        }
    }

    /// Whether an error is the end.
    async fn judge(&mut self, error: &Unread) -> Option<Ending> {
        let missing = |text: String| Some(Ending::Missing(EndReason::Unavailable, text));
        match error {
            error if error.is_unknown() => match self.task().await {
                // Nomad tells of an allocation before it can be read, and forgets only what has ended.
                Ok(Task::Gone) if !self.is_final() => None,
                Ok(Task::Gone) => self.elsewhere().await,
                // Nomad's servers hear of a task's start up to a second after the record may.
                Ok(Task::Waits) if self.never_began() => Some(Ending::Done),
                Ok(Task::Never) if !self.is_told_of() => match self.is_purged().await {
                    Ok(true) => self.elsewhere().await,
                    Ok(false) => Some(Ending::Done),
                    Err(_) => None,
                },
                Ok(Task::Dead(_)) if self.is_over() => {
                    let since = *self.absent.get_or_insert_with(Instant::now);
                    (since.elapsed() >= ABSENT).then(expired)
                }
                Ok(_) if self.is_out_of_patience() => missing(format!("the log cannot be read: {error}")),
                Err(cause) if self.is_out_of_patience() => {
                    missing(format!("the log cannot be read: {cause}"))
                }
                Ok(_) | Err(_) => None,
            },
            error if error.is_forbidden() => missing(format!("the log may not be read: {error}")),
            _ => {
                tracing::debug!(%error, "reading a log again");
                self.inner.counters.reconnected();
                if self.is_out_of_patience() {
                    missing(format!("the log cannot be read: {error}"))
                } else {
                    None
                }
            }
        }
    }

    async fn task(&self) -> Result<Task, Unread> {
        let Some(found) = self.target.allocation().await? else { return Ok(Task::Gone) };
        let is_over = matches!(found.client_status.as_str(), "complete" | "failed" | "lost");
        Ok(match found.task_states.get(self.target.phase.as_str()) {
            Some(task) if task.started_at.is_some() && task.state == "dead" => Task::Dead(task.finished_at),
            Some(task) if task.started_at.is_some() => Task::Live,
            Some(task) if task.state == "dead" || is_over => Task::Never,
            None if is_over => Task::Never,
            _ => Task::Waits,
        })
    }

    fn may_be_archived(&self) -> bool {
        !self.removed && self.inner.may_be_archived(&self.record.borrow())
    }

    fn lines(&self) -> Option<u64> {
        self.record.borrow().lines[self.target.phase as usize]
    }

    /// Whether every line that the runner counted was read.
    fn is_complete(&self) -> bool {
        self.mark.is_behind_all(&self.record.borrow(), self.target.phase)
    }

    fn is_final(&self) -> bool {
        self.removed || self.record.borrow().status.is_final()
    }

    /// Whether the phase is over, so that nothing new is written.
    fn is_over(&self) -> bool {
        let ended = self.record.borrow().timestamps.of(self.target.phase).1.is_some();
        ended || self.lines().is_some() || self.is_final()
    }

    fn has_run(&self) -> bool {
        self.record.borrow().timestamps.of(self.target.phase).0.is_some() || self.lines().is_some()
    }

    /// Whether the phase told that it began, or wrote anything.
    fn is_told_of(&self) -> bool {
        self.has_run() || self.mark.position != Position::default()
    }

    /// Whether the job was killed just now. Its runner hears of that last, and may have begun without a word to anybody.
    fn was_just_killed(&self) -> bool {
        !self.removed && self.inner.was_just_killed(&self.record.borrow())
    }

    /// Whether the phase never told of its begin and will not any more: whether one does that was killed just now, Nomad says.
    fn never_began(&self) -> bool {
        self.is_final() && !self.has_run() && !self.was_just_killed()
    }

    /// Whether Nomad was told to forget the job: then its servers may never hear that a task began.
    async fn is_purged(&self) -> Result<bool, Unread> {
        Ok(self.was_just_killed() && self.target.is_purged().await?)
    }

    /// Whether the job has ended and nothing was heard of its log for long.
    fn is_out_of_patience(&mut self) -> bool {
        if !self.is_final() {
            return false;
        }
        let ended = *self.ended.get_or_insert_with(Instant::now);
        ended.max(self.progress).elapsed() >= self.inner.settings.patience
    }
}

impl Drop for Follower {
    /// Readers never wait for a follower that is no more, whatever became of it.
    fn drop(&mut self) {
        let text = "reading it was given up because of a fault of the service";
        let fault = || Ending::Missing(EndReason::Unavailable, text.to_owned());
        self.shared.ring().end_with(fault);
        self.shared.changed.send_replace(());
    }
}

fn expired() -> Ending {
    Ending::Missing(EndReason::Expired, "Nomad no longer has this log".to_owned())
}

/// Waits for a change of the record; for ever once there can be none.
pub(super) async fn changed(record: &mut watch::Receiver<Arc<Record>>, removed: &mut bool) {
    if *removed {
        std::future::pending::<()>().await;
    }
    *removed = record.changed().await.is_err();
}
