//! One reader's way through a job's log: three phases, one after the other, each from the ring where the ring has it.
//!
//! Invariant: holds a position, at most one chunk of its own, and nothing of what it has not asked for. What is not
//! shown is named.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};
use tokio::sync::{OwnedSemaphorePermit, watch};
use tokio::time::Instant;
use uuid::Uuid;

use super::cursor::{Cursor, InvalidCursor, Position};
use super::follower::{Handle, changed};
use super::message::{EndReason, Message};
use super::ring::{Chunk, Ending, Next};
use super::tap::{Hint, Mark, Tap, Target};
use super::{Inner, Request, Unread, retries, tail};
use crate::job::{Phase, Record, Status};

/// How long a reader tries by itself to catch up: an agent that starts may not know its allocations yet.
const PATIENCE: Duration = Duration::from_secs(3);

/// How many runs of a task are remembered by where they ended, the latest ones.
const RUNS: usize = 16;

/// How often Nomad is asked whether it placed a job that was killed before its place was heard of.
const LOOK: Duration = Duration::from_secs(1);

/// A reader.
pub(super) struct Reader {
    inner: Arc<Inner>,
    record: watch::Receiver<Arc<Record>>,
    removed: bool,
    asked: Vec<Phase>,
    /// Those still to come; the first one is being read.
    phases: VecDeque<Phase>,
    /// For each phase, the allocation whose log was read.
    read_of: [Option<Uuid>; 3],
    mark: Mark,
    /// Where the runs before this one ended, the latest first.
    ends: Vec<Mark>,
    tail: Option<u64>,
    handle: Option<(Arc<Handle>, watch::Receiver<()>)>,
    chunk: Option<(Arc<Chunk>, usize)>,
    /// For as long as the chunk is this reader's own.
    turn: Option<OwnedSemaphorePermit>,
    shown: Option<(Status, Option<Phase>)>,
    reason: Option<EndReason>,
    done: bool,
}

impl Reader {
    pub(super) fn new(
        inner: Arc<Inner>,
        record: watch::Receiver<Arc<Record>>,
        request: Request,
    ) -> Result<Self, InvalidCursor> {
        let asked = super::phases(request.phases.as_deref());
        let mut reader = Self {
            inner,
            removed: false,
            phases: asked.iter().copied().collect(),
            asked,
            read_of: [None; 3],
            mark: Mark::START,
            ends: Vec::new(),
            tail: request.tail,
            handle: None,
            chunk: None,
            turn: None,
            shown: None,
            reason: None,
            done: false,
            record,
        };
        reader.inner.counters.reader(1);
        if let Some(cursor) = request.cursor {
            reader.resume(&cursor)?;
        }
        Ok(reader)
    }

    fn resume(&mut self, cursor: &Cursor) -> Result<(), InvalidCursor> {
        let record = Arc::clone(&self.record.borrow());
        if !record.allocation_of(cursor.phase()).is_some_and(|allocation| cursor.is_of(allocation)) {
            return Err(InvalidCursor::Foreign);
        }
        self.tail = None;
        self.has_read(&record, cursor.phase());
        self.phases.retain(|&phase| phase >= cursor.phase());
        if self.phases.front() == Some(&cursor.phase()) {
            self.mark = Mark::at(cursor.position(), cursor.offset().map_or(Hint::None, Hint::Line));
        }
        Ok(())
    }

    /// The next message; none after the end.
    pub(super) async fn next(&mut self) -> Option<Message> {
        loop {
            if self.done {
                return None;
            }
            if let Some(message) = self.status().or_else(|| self.line()) {
                return Some(message);
            }
            if let Some(lines) = self.tail.take() {
                self.seek(lines).await;
                continue;
            }
            let message = match self.phases.front() {
                Some(&phase) => self.advance(phase).await,
                None => self.end().await,
            };
            if message.is_some() {
                return message;
            }
        }
    }

    /// The job's status, when it is news.
    fn status(&mut self) -> Option<Message> {
        let record = Arc::clone(&self.record.borrow_and_update());
        let now = (record.status, record.phase);
        if self.shown == Some(now) {
            return None;
        }
        self.shown = Some(now);
        Some(Message::Status { status: record.status, phase: record.phase, time: since(&record) })
    }

    /// The next line at hand, or the gap before it.
    fn line(&mut self) -> Option<Message> {
        let (chunk, index) = self.chunk.take()?;
        let Some(entry) = chunk.get(index) else {
            self.turn = None;
            return None;
        };
        let &phase = self.phases.front()?;
        let at = self.mark.position;
        let known = if entry.position.run == at.run { at.seq } else { 0 };
        if entry.position.sub == 0 && entry.position.seq > known.saturating_add(1) {
            let before = Position { seq: entry.position.seq - 1, sub: 0, ..entry.position };
            let text = missing(known, before.seq);
            let gap = self.gap(phase, before, text);
            self.chunk = Some((chunk, index));
            return Some(gap);
        }
        if entry.position.run != at.run {
            // How many lines were counted may be told later.
            self.ends.truncate(RUNS - 1);
            self.ends.insert(0, self.mark);
        }
        self.mark = Mark::after(entry);
        let message = Message::Log {
            phase,
            stream: entry.stream,
            line: entry.text.clone(),
            time: entry.time,
            cursor: self.cursor(phase),
            partial: entry.partial,
        };
        self.chunk = Some((chunk, index + 1));
        Some(message)
    }

    /// One step further in a phase; a message if there is one to give at once.
    async fn advance(&mut self, phase: Phase) -> Option<Message> {
        let record = Arc::clone(&self.record.borrow());
        if phase == Phase::Test && !record.labels.has_tests {
            self.next_phase();
            return None;
        }
        if let Some(message) = self.began_again(&record) {
            return Some(message);
        }
        if self.phases.front() != Some(&phase) {
            return None;
        }
        if allocation(&record, phase).is_none() {
            if !self.is_final() {
                self.changed().await;
            } else if self.is_placed_unheard(&record).await {
                tokio::select! {
                    () = self.changed() => {}
                    () = tokio::time::sleep(LOOK) => {}
                }
            } else {
                self.next_phase();
            }
            return None;
        }
        self.has_read(&record, phase);
        if self.handle.is_none() {
            if self.mark.is_behind_all(&record, phase) {
                self.next_phase();
                return None;
            }
            let handle = Handle::get(
                &self.inner,
                Target::of(&self.inner, &record, phase),
                self.mark,
                self.record.clone(),
            );
            let changes = handle.changes();
            self.handle = Some((handle, changes));
        }
        let (handle, changes) = self.handle.as_mut()?;
        changes.borrow_and_update();
        match handle.after(self.mark.position) {
            Next::Lines(chunk, index) => self.chunk = Some((chunk, index)),
            Next::Behind => self.catch_up(&record, phase).await,
            Next::Nothing if self.mark.is_behind_all(&record, phase) => self.next_phase(),
            Next::Nothing => {
                tokio::select! {
                    // The handle keeps the other end.
                    Ok(()) = changes.changed() => {}
                    () = changed(&mut self.record, &mut self.removed) => {}
                }
            }
            Next::Ended(ending) => return self.ended(phase, &record, ending),
        }
        None
    }

    /// Whether Nomad placed a job that was killed before anybody heard of it: what its runner says then is still to come.
    async fn is_placed_unheard(&self, record: &Record) -> bool {
        if self.removed || !self.inner.was_just_killed(record) {
            return false;
        }
        let location = &record.nomad;
        match self.inner.nomad.job_allocations(&location.namespace, &location.job).await {
            Ok(allocations) => !allocations.is_empty(),
            Err(error) => error.is_passing(),
        }
    }

    /// A phase that was read, or is being read, began again in another allocation: goes back to it.
    fn began_again(&mut self, record: &Record) -> Option<Message> {
        let other = |&phase: &Phase| {
            let (before, now) = (self.read_of[phase as usize], allocation(record, phase));
            before.is_some() && now.is_some() && before != now
        };
        let again = self.asked.iter().copied().find(other)?;
        let begun = self.mark != Mark::START || self.phases.front() != Some(&again);
        self.restart();
        self.phases = self.asked.iter().copied().filter(|&phase| phase >= again).collect();
        for phase in Phase::ALL.into_iter().filter(|&phase| phase >= again) {
            self.read_of[phase as usize] = None;
        }
        self.has_read(record, again);
        let text = "Nomad started this phase again in another allocation: what follows is its log from the beginning";
        let cursor = self.cursor(again);
        begun.then(|| Message::Gap { phase: again, message: text.to_owned(), cursor })
    }

    /// Remembers of which allocations the log was read up to a phase.
    fn has_read(&mut self, record: &Record, until: Phase) {
        for phase in Phase::ALL.into_iter().filter(|&phase| phase <= until) {
            let read = &mut self.read_of[phase as usize];
            *read = read.or_else(|| allocation(record, phase));
        }
    }

    /// Whether the run whose lines were counted was read to its end, whatever ran after it.
    fn is_whole(&self, record: &Record, phase: Phase) -> bool {
        self.ends.iter().any(|end| end.is_behind_all(record, phase))
    }

    /// The follower is done.
    fn ended(&mut self, phase: Phase, record: &Record, ending: Ending) -> Option<Message> {
        let (at, lines) = (self.mark.position, record.lines[phase as usize]);
        let known = self.mark.counted(record, phase);
        let gap = match (ending, lines) {
            (Ending::Missing(reason, text), _) => {
                self.reason = self.reason.max(Some(reason));
                let all = lines.map_or(at, Position::after).max(at);
                let what = if at == Position::default() { "the whole log" } else { "the rest of the log" };
                Some(self.gap(phase, all, format!("{what} of this phase is missing: {text}")))
            }
            (Ending::Done, Some(lines)) if lines > known && !self.is_whole(record, phase) => {
                self.reason = self.reason.max(Some(EndReason::Unavailable));
                // Those of an earlier run do not count.
                let run = at.run.saturating_add(u32::from(known < at.seq));
                Some(self.gap(phase, Position { run, seq: lines, sub: 0 }, missing(known, lines)))
            }
            (Ending::Done, _) => None,
        };
        self.next_phase();
        gap
    }

    /// Reads a bounded piece of what the ring does not have from Nomad.
    async fn catch_up(&mut self, record: &Record, phase: Phase) {
        let target = Target::of(&self.inner, record, phase);
        let mut delays = retries();
        let started = Instant::now();
        self.turn = None;
        // The semaphore is never closed.
        self.turn = Arc::clone(&self.inner.bites).acquire_owned().await.ok();
        while started.elapsed() < PATIENCE {
            match self.bite(&target).await {
                Ok(None) => break,
                Ok(Some(chunk)) => {
                    self.chunk = Some((chunk, 0));
                    return;
                }
                Err(error) => {
                    tracing::debug!(%error, "reading a log again");
                    tokio::time::sleep(delays.next().unwrap_or_default()).await;
                }
            }
        }
        self.turn = None;
        // The follower was started after this position and nothing lies between: its first reader's cursor pointed
        // beyond the log's end. Or nothing can be read: then a follower from here finds out why, and says so.
        let handle = Handle::start(&self.inner, target, self.mark, self.record.clone());
        let changes = handle.changes();
        self.handle = Some((handle, changes));
    }

    async fn bite(&self, target: &Target) -> Result<Option<Arc<Chunk>>, Unread> {
        let Inner { places, counters, settings, .. } = &*self.inner;
        counters.caught_up();
        let mut tap = Tap::open(target, places, counters, self.mark, false).await?;
        let mut all = Vec::new();
        let mut size = 0;
        while size < settings.bite_bytes {
            let Some(entries) = tap.next(counters).await? else { break };
            size += entries.iter().map(super::decoder::Entry::size).sum::<usize>();
            all.extend(entries);
        }
        Ok(Chunk::new(all))
    }

    /// Goes to the last lines of the phases asked for, counted over all of them.
    async fn seek(&mut self, lines: u64) {
        let record = Arc::clone(&self.record.borrow());
        let mut left = lines.min(tail::MOST);
        for &phase in self.asked.iter().rev() {
            let begun = record.timestamps.of(phase).0.is_some() || record.lines[phase as usize].is_some();
            if !begun || record.allocation_of(phase).is_none() {
                continue;
            }
            let target = Target::of(&self.inner, &record, phase);
            // What cannot be read now is read by the follower, and named there if it cannot either.
            let Ok(found) = tail::find(&self.inner, &target, left).await else { continue };
            left -= found.lines.min(left);
            if left == 0 {
                self.mark = found.mark;
                self.phases.retain(|&other| other >= phase);
                self.has_read(&record, phase);
                return;
            }
        }
    }

    /// After the last phase: waits for the job's end.
    async fn end(&mut self) -> Option<Message> {
        let record = Arc::clone(&self.record.borrow());
        let again = self.began_again(&record);
        if again.is_some() || !self.phases.is_empty() {
            return again;
        }
        if !self.is_final() {
            self.changed().await;
            return None;
        }
        self.done = true;
        let removed = (!record.status.is_final()).then_some(EndReason::Removed);
        let (status, time, failure) = (record.status, since(&record), record.failure.clone());
        Some(Message::End { status, time, failure, reason: self.reason.or(removed) })
    }

    async fn changed(&mut self) {
        changed(&mut self.record, &mut self.removed).await;
    }

    fn is_final(&self) -> bool {
        self.removed || self.record.borrow().status.is_final()
    }

    fn next_phase(&mut self) {
        self.phases.pop_front();
        self.restart();
    }

    fn restart(&mut self) {
        self.mark = Mark::START;
        self.ends.clear();
        self.chunk = None;
        self.turn = None;
        self.handle = None;
    }

    fn gap(&mut self, phase: Phase, until: Position, message: String) -> Message {
        self.mark = Mark::at(until, Hint::None);
        Message::Gap { phase, message, cursor: self.cursor(phase) }
    }

    fn cursor(&self, phase: Phase) -> Cursor {
        let offset = match self.mark.hint {
            Hint::Line(offset) => Some(offset),
            Hint::None | Hint::End(_) => None,
        };
        Cursor::new(self.read_of[phase as usize].unwrap_or_default(), phase, self.mark.position, offset)
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.inner.counters.reader(-1);
    }
}

fn allocation(record: &Record, phase: Phase) -> Option<Uuid> {
    Uuid::try_parse(record.allocation_of(phase)?).ok()
}

fn missing(known: u64, until: u64) -> String {
    let first = known.saturating_add(1);
    format!("lines {first} to {until} are missing: Nomad no longer has them")
}

/// Since when a job has its status.
fn since(record: &Record) -> DateTime<Utc> {
    let times = &record.timestamps;
    let time = match record.status {
        Status::Pending => times.job_start,
        Status::Building => times.build_start,
        Status::Testing => times.test_start,
        Status::Publishing => times.publish_start,
        Status::Succeeded | Status::Failed | Status::Killed | Status::Lost => times.job_end,
    };
    time.or(times.job_start).unwrap_or_else(Utc::now)
}
