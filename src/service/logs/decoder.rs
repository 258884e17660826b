//! Bytes of a task's log to numbered lines, whatever way the bytes are torn.
//!
//! Invariant: the same bytes from the same place give the same lines with the same positions, however they are cut up. They come in
//! the order of their numbers.

use chrono::{DateTime, Utc};
use memchr::memchr;

use super::cursor::Position;
use super::order::Held;
use crate::job::{Line, Stream, escape};
use crate::nomad::Frame;

/// The longest line the runner writes, with room: a part of 64 KiB of which every byte may be escaped to four.
const LONGEST: usize = 4 * 64 * 1024 + 128;

/// A line, and where it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) position: Position,
    /// The bytes before the line at `position.seq`, as far as they are known.
    pub(super) offset: Option<u64>,
    pub(super) time: DateTime<Utc>,
    pub(super) stream: Stream,
    pub(super) partial: bool,
    pub(super) text: String,
}

impl Entry {
    /// A line of the runner's.
    fn of(position: Position, offset: Option<u64>, line: Line) -> Self {
        let Line { time, tag, text, .. } = line;
        Self { position, offset, time, stream: tag.stream, partial: tag.partial, text }
    }

    /// What it takes in memory, about.
    pub(super) fn size(&self) -> usize {
        size_of::<Self>() + self.text.len()
    }
}

/// What is known of the first bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Begin {
    /// They are the start of a line.
    Line,
    /// They may be the rest of a line whose start was rotated away.
    PerhapsTorn,
    /// They are from anywhere: nothing counts before the first line of the runner's.
    Anywhere,
}

/// Turns frames into lines.
#[derive(Debug)]
pub(super) struct Decoder {
    pending: Vec<u8>,
    /// How much of `pending` was looked through for an end.
    seen: usize,
    begin: Begin,
    /// `pending` goes on with a foreign line of which a part was handed out.
    runs_on: bool,
    position: Position,
    anchor: Option<u64>,
    held: Held,
    /// When the latest line of this run was written.
    newest: Option<DateTime<Utc>>,
    /// The first line of this run that counts: the log is read from anywhere in it.
    floor: u64,
    /// It is not known whether anything is missing before the next line.
    is_broken: bool,
    /// The bytes before `pending`.
    offset: Option<u64>,
    file: Option<u64>,
    time: DateTime<Utc>,
}

impl Decoder {
    fn new(begin: Begin, position: Position, offset: Option<u64>, now: DateTime<Utc>) -> Self {
        Self {
            pending: Vec::new(),
            seen: 0,
            begin,
            runs_on: false,
            position,
            anchor: offset,
            held: Held::default(),
            newest: None,
            floor: 0,
            is_broken: begin == Begin::Anywhere,
            offset,
            file: None,
            time: now,
        }
    }

    /// For bytes from the first that is left of a log.
    pub(super) fn from_start(now: DateTime<Utc>) -> Self {
        Self::new(Begin::Line, Position::default(), Some(0), now)
    }

    /// For bytes from the start of a line whose position is known.
    pub(super) fn from_line(position: Position, offset: u64, now: DateTime<Utc>) -> Self {
        let before = Position { seq: position.seq.saturating_sub(1), sub: 0, ..position };
        Self::new(Begin::Line, before, Some(offset), now)
    }

    /// For bytes from anywhere in a run.
    pub(super) fn from_anywhere(run: u32, now: DateTime<Utc>) -> Self {
        Self::new(Begin::Anywhere, Position { run, seq: 0, sub: 0 }, None, now)
    }

    /// Takes in a frame, and appends the lines that are whole now.
    pub(super) fn feed(&mut self, frame: &Frame, out: &mut Vec<Entry>) {
        if frame.data.is_empty() {
            return;
        }
        self.see_file(frame);
        self.pending.extend_from_slice(&frame.data);
        let mut start = 0;
        while let Some(at) = memchr(b'\n', &self.pending[self.seen..]) {
            let end = self.seen + at;
            self.line(start, end, out);
            start = end + 1;
            self.seen = start;
            self.offset = self.offset.map(|offset| offset + 1);
        }
        self.seen = self.pending.len();
        while self.seen - start > LONGEST {
            self.foreign(start, start + LONGEST, true, out);
            start += LONGEST;
        }
        self.pending.drain(..start);
        self.seen -= start;
    }

    /// Hands out what stands behind the last line end of a log that nobody writes to any more.
    pub(super) fn finish(&mut self, out: &mut Vec<Entry>) {
        if !self.pending.is_empty() {
            self.line(0, self.pending.len(), out);
            self.pending.clear();
            self.seen = 0;
        }
        self.release(out);
    }

    /// The line that is waited for, where later ones are held until it comes.
    pub(super) fn waits_for(&self) -> Option<(u32, u64)> {
        (!self.held.is_empty()).then_some((self.position.run, self.position.seq))
    }

    /// Hands out the lines that are held: what belongs before them is not waited for any more.
    pub(super) fn release(&mut self, out: &mut Vec<Entry>) {
        for entry in self.held.take_all() {
            self.position = entry.position;
            self.anchor = None;
            out.push(entry);
        }
    }

    fn see_file(&mut self, frame: &Frame) {
        let index = frame.file.rsplit('.').next().and_then(|index| index.parse::<u64>().ok());
        match (self.file, index) {
            (None, Some(first)) => {
                if self.begin == Begin::Line && self.offset == Some(0) && first > 0 {
                    self.begin = Begin::PerhapsTorn;
                    self.is_broken = true;
                }
                // Only of the first file is it known how many bytes were before it: none.
                if self.begin == Begin::Anywhere && first == 0 {
                    let length = u64::try_from(frame.data.len()).unwrap_or(u64::MAX);
                    self.offset = frame.offset.checked_sub(length);
                }
            }
            // A file between was rotated away before it was read: what is pending has lost its end.
            (Some(last), Some(now)) if now > last + 1 => {
                self.pending.clear();
                self.seen = 0;
                self.begin = Begin::PerhapsTorn;
                self.is_broken = true;
            }
            _ => {}
        }
        self.file = index.or(self.file);
    }

    /// One whole line, at `start..end` of `pending`.
    fn line(&mut self, start: usize, end: usize, out: &mut Vec<Entry>) {
        let begin = std::mem::replace(&mut self.begin, Begin::Line);
        let written = &self.pending[start..end];
        let line = if self.runs_on { None } else { std::str::from_utf8(written).ok().and_then(Line::parse) };
        match line.filter(|line| line.seq > 0) {
            Some(line) => {
                let offset = self.offset;
                self.advance(end - start);
                self.time = line.time;
                self.numbered(line, offset, out);
            }
            None if begin == Begin::Line => self.foreign(start, end, false, out),
            None => {
                if begin == Begin::Anywhere {
                    self.begin = begin;
                }
                self.runs_on = false;
                self.advance(end - start);
            }
        }
    }

    /// A line of the runner's, in its turn.
    fn numbered(&mut self, line: Line, offset: Option<u64>, out: &mut Vec<Entry>) {
        if line.seq <= self.position.seq {
            if line.seq > 1 && self.newest.is_some_and(|newest| line.time <= newest) {
                return self.late(line, out);
            }
            // The numbers of a run only grow, but for some that are late: a smaller one begins another run.
            self.release(out);
            let run = self.position.run.saturating_add(1);
            self.position = Position { run, seq: 0, sub: 0 };
            (self.newest, self.floor) = (None, 0);
        }
        if self.is_broken {
            self.release(out);
            if self.position.seq == 0 {
                self.floor = line.seq;
            }
        }
        self.newest = self.newest.max(Some(line.time));
        let Position { run, seq, .. } = self.position;
        let is_early = !self.is_broken && line.seq > seq + 1;
        let entry = Entry::of(Position { run, seq: line.seq, sub: 0 }, offset, line);
        if is_early {
            self.held.hold(entry);
            if self.held.is_full() {
                self.release(out);
            }
            return;
        }
        self.is_broken = false;
        self.held.passed();
        // Of a line that was late, those after it may stand before it.
        self.anchor = offset.filter(|_| self.held.is_empty());
        self.position = entry.position;
        out.push(Entry { offset: self.anchor, ..entry });
        while let Some(entries) = self.held.take(self.position.seq.saturating_add(1)) {
            self.position = entries.last().map_or(self.position, |entry| entry.position);
            self.anchor = None;
            out.extend(entries);
        }
    }

    /// A line that was not waited for any longer: shown where it stands, or not at all where it belongs before all that counts.
    fn late(&mut self, line: Line, out: &mut Vec<Entry>) {
        if line.seq < self.floor {
            return;
        }
        self.position.sub = self.position.sub.saturating_add(1);
        self.anchor = None;
        out.push(Entry::of(self.position, None, line));
    }

    /// Text that is not the runner's: shown as it is.
    fn foreign(&mut self, start: usize, end: usize, runs_on: bool, out: &mut Vec<Entry>) {
        self.runs_on = runs_on;
        self.advance(end - start);
        if self.begin == Begin::Anywhere {
            return;
        }
        let text = escape(&self.pending[start..end]).into_owned();
        let entry = |position: Position, offset| {
            let position = Position { sub: position.sub.saturating_add(1), ..position };
            Entry { position, offset, time: self.time, stream: Stream::Stdout, partial: runs_on, text }
        };
        if let Some(position) = self.held.last() {
            self.held.hold_behind(entry(position, None));
            if self.held.is_full() {
                self.release(out);
            }
            return;
        }
        let entry = entry(self.position, self.anchor);
        self.position = entry.position;
        out.push(entry);
    }

    fn advance(&mut self, bytes: usize) {
        let bytes = u64::try_from(bytes).unwrap_or(u64::MAX);
        self.offset = self.offset.map(|offset| offset.saturating_add(bytes));
    }
}

#[cfg(test)]
#[path = "decoder_tests.rs"]
mod tests;
