//! Bytes of a task's log to numbered lines, whatever way the bytes are torn.
//!
//! Invariant: the same bytes from the same place give the same lines with the same positions, however they are cut up. They come in
//! the order of their numbers.

use chrono::{DateTime, Utc};

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
        while let Some(at) = self.pending[self.seen..].iter().position(|&byte| byte == b'\n') {
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

    /// Whether lines are held until earlier ones come.
    pub(super) fn is_holding(&self) -> bool {
        !self.held.is_empty()
    }

    /// Hands out the lines that are held: what belongs before them is not waited for any more.
    pub(super) fn release(&mut self, out: &mut Vec<Entry>) {
        for entry in self.held.take_all() {
            self.position = entry.position;
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
        let Position { run, seq, .. } = self.position;
        // The numbers of a run only grow, but for some that are late: a smaller one than all that were handed out begins another run.
        let begins = line.seq <= seq;
        let is_early = !begins && !self.is_broken && line.seq > seq + 1;
        let entry = Entry {
            position: Position { run: run.saturating_add(u32::from(begins)), seq: line.seq, sub: 0 },
            offset,
            time: line.time,
            stream: line.tag.stream,
            partial: line.tag.partial,
            text: line.text,
        };
        if is_early {
            self.held.hold(entry);
            if self.held.is_full() {
                self.release(out);
            }
            return;
        }
        if begins || self.is_broken {
            self.release(out);
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
        if let Some(behind) = self.held.last() {
            let position = behind.last().map_or(self.position, |line| line.position);
            behind.push(entry(position, None));
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
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn now() -> DateTime<Utc> {
        DateTime::from_timestamp(1_700_000_000, 0).unwrap()
    }

    fn written(seq: u64, text: &str) -> String {
        format!("2023-11-14T22:13:20.000000Z {seq} o {text}\n")
    }

    fn frame(file: u64, data: &[u8]) -> Frame {
        Frame { data: data.to_vec(), file: format!("alloc/logs/build.stdout.{file}"), offset: 0 }
    }

    fn decode(decoder: &mut Decoder, frames: &[Frame]) -> Vec<Entry> {
        let mut out = Vec::new();
        for frame in frames {
            decoder.feed(frame, &mut out);
        }
        out
    }

    /// Positions and texts, short.
    fn short(entries: &[Entry]) -> Vec<(u32, u64, u32, &str)> {
        let of = |entry: &Entry| (entry.position.run, entry.position.seq, entry.position.sub);
        entries
            .iter()
            .map(|entry| {
                let (run, seq, sub) = of(entry);
                (run, seq, sub, entry.text.as_str())
            })
            .collect()
    }

    #[test]
    fn a_line_torn_across_files_is_one_line() {
        let line = written(1, "torn in the middle");
        let (head, tail) = line.as_bytes().split_at(35);
        let got = decode(&mut Decoder::from_start(now()), &[frame(0, head), frame(1, tail)]);
        assert_eq!(short(&got), [(0, 1, 0, "torn in the middle")]);
    }

    #[test]
    fn a_file_that_was_rotated_away_tears_no_line_in_two() {
        let (one, three) = (written(1, "whole"), written(900, "later"));
        let head = [one.as_bytes(), b"2023-11-14T22:13:20.000000Z 2 o cut o"].concat();
        let tail = [b"ff here\n", three.as_bytes()].concat();
        let got = decode(&mut Decoder::from_start(now()), &[frame(0, &head), frame(2, &tail)]);
        assert_eq!(short(&got), [(0, 1, 0, "whole"), (0, 900, 0, "later")]);
    }

    #[test]
    fn a_log_whose_beginning_is_gone_begins_with_a_whole_line() {
        let tail = format!("st of a line\n{}{}", written(8, "a"), written(9, "b"));
        let got = decode(&mut Decoder::from_start(now()), &[frame(3, tail.as_bytes())]);
        assert_eq!(short(&got), [(0, 8, 0, "a"), (0, 9, 0, "b")]);
        let whole = decode(&mut Decoder::from_start(now()), &[frame(3, written(8, "a").as_bytes())]);
        assert_eq!(short(&whole), [(0, 8, 0, "a")]);
    }

    #[test]
    fn from_anywhere_the_first_line_of_the_runner_is_the_first() {
        let text = format!("rest\nforeign\n{}panic\n", written(8, "a"));
        let mut first = frame(0, text.as_bytes());
        first.offset = 1000 + text.len() as u64;
        let got = decode(&mut Decoder::from_anywhere(2, now()), &[first]);
        assert_eq!(short(&got), [(2, 8, 0, "a"), (2, 8, 1, "panic")]);
        assert_eq!(got[0].offset, Some(1013));
    }

    #[test]
    fn lines_of_others_are_shown_between_and_numbering_may_begin_anew() {
        let text =
            format!("start\n{}panic: \u{e4}\n\n{}{}", written(1, "a"), written(2, "b"), written(1, "c"));
        let bytes = [text.as_bytes(), b"\xff\n"].concat();
        let got = decode(&mut Decoder::from_start(now()), &[frame(0, &bytes)]);
        let want = [
            (0, 0, 1, "start"),
            (0, 1, 0, "a"),
            (0, 1, 1, "panic: \u{e4}"),
            (0, 1, 2, ""),
            (0, 2, 0, "b"),
            (1, 1, 0, "c"),
            (1, 1, 1, "\\xff"),
        ];
        assert_eq!(short(&got), want);
    }

    #[test]
    fn a_line_without_an_end_takes_bounded_memory() {
        let mut decoder = Decoder::from_start(now());
        let mut out = Vec::new();
        for _ in 0..20 {
            decoder.feed(&frame(0, &vec![b'x'; 64 * 1024]), &mut out);
            assert!(decoder.pending.len() <= LONGEST);
        }
        decoder.feed(&frame(0, written(1, "not parsed: it is the end of the line").as_bytes()), &mut out);
        decoder.feed(&frame(0, written(1, "a").as_bytes()), &mut out);
        let total: usize = out.iter().filter(|entry| entry.position.seq == 0).map(|e| e.text.len()).sum();
        assert_eq!(total, 20 * 64 * 1024 + written(1, "not parsed: it is the end of the line").len() - 1);
        assert_eq!(out.iter().filter(|entry| !entry.partial).count(), 2);
        assert_eq!(out.last().unwrap().position, Position::after(1));
    }

    #[test]
    fn what_a_killed_runner_left_without_an_end_is_shown_in_the_end() {
        let mut decoder = Decoder::from_start(now());
        let mut out = decode(&mut decoder, &[frame(0, b"2023-11-14T22:13:20.000000Z 1 e half")]);
        assert_eq!(short(&out), []);
        decoder.finish(&mut out);
        assert_eq!(short(&out), [(0, 1, 0, "half")]);
    }

    #[test]
    fn lines_that_two_collectors_wrote_out_stand_in_their_order() {
        let seqs = [1, 2, 5, 3, 4, 6, 8, 7];
        let log: String = seqs.iter().map(|&seq| written(seq, &format!("line {seq}"))).collect();
        let got = decode(&mut Decoder::from_start(now()), &[frame(0, log.as_bytes())]);
        assert_eq!(got.iter().map(|entry| entry.position.seq).collect::<Vec<_>>(), [1, 2, 3, 4, 5, 6, 7, 8]);
        assert!(got.iter().all(|entry| entry.position.run == 0));
        // Who begins where one of them lies misses none of those that come after it.
        for (index, entry) in got.iter().enumerate() {
            let Some(offset) = entry.offset else { continue };
            let rest = frame(0, &log.as_bytes()[usize::try_from(offset).unwrap()..]);
            let again = decode(&mut Decoder::from_line(entry.position, offset, now()), &[rest]);
            assert_eq!(short(&again), short(&got[index..]));
        }
        assert!(got[1].offset.is_some() && got[5].offset.is_some(), "{got:?}");
    }

    #[test]
    fn lines_that_are_lost_are_waited_for_in_bounds() {
        let mut decoder = Decoder::from_start(now());
        let log = [written(1, "a"), written(4, "d"), "panic\n".to_owned()].concat();
        let mut got = decode(&mut decoder, &[frame(0, log.as_bytes())]);
        assert_eq!((short(&got), decoder.is_holding()), (vec![(0, 1, 0, "a")], true));
        decoder.release(&mut got);
        assert_eq!(short(&got), [(0, 1, 0, "a"), (0, 4, 0, "d"), (0, 4, 1, "panic")]);
        // Another run is not held back by it.
        let log = [written(9, "x"), written(1, "again")].concat();
        let got = decode(&mut decoder, &[frame(0, log.as_bytes())]);
        assert_eq!(short(&got), [(0, 9, 0, "x"), (1, 1, 0, "again")]);
        let many: String = (10..3000).map(|seq| written(seq, &"x".repeat(100))).collect();
        let got = decode(&mut decoder, &[frame(0, many.as_bytes())]);
        assert!(got.len() > 1000 && got[0].position.seq == 10, "{}", got.len());
    }

    proptest! {
        #[test]
        fn lines_are_the_same_however_the_bytes_are_torn(
            texts in proptest::collection::vec("[a-z \u{e4}]{0,40}", 1..30), foreign in 0..30_usize,
            cuts in proptest::collection::vec(0..3000_usize, 0..12),
        ) {
            let mut log = String::new();
            for (index, text) in texts.iter().enumerate() {
                if index == foreign { log.push_str("panicked at\n") }
                log.push_str(&written(index as u64 + 1, text));
            }
            let whole = decode(&mut Decoder::from_start(now()), &[frame(0, log.as_bytes())]);
            let mut cuts: Vec<_> = cuts.into_iter().map(|cut| cut.min(log.len())).collect();
            cuts.extend([0, log.len()]);
            cuts.sort_unstable();
            let frames: Vec<_> = (0..).zip(cuts.windows(2))
                .map(|(file, cut)| frame(file, &log.as_bytes()[cut[0]..cut[1]])).collect();
            // An empty piece is a heartbeat, and must not count as a file.
            let frames: Vec<_> = (0..).zip(frames.into_iter().filter(|frame| !frame.data.is_empty()))
                .map(|(file, piece)| frame(file, &piece.data)).collect();
            prop_assert_eq!(&decode(&mut Decoder::from_start(now()), &frames), &whole);

            // Every line's offset is where decoding can begin again.
            for (index, entry) in whole.iter().enumerate().filter(|(_, entry)| entry.position.sub == 0) {
                let offset = entry.offset.unwrap();
                let rest = frame(0, &log.as_bytes()[usize::try_from(offset).unwrap()..]);
                let again = decode(&mut Decoder::from_line(entry.position, offset, now()), &[rest]);
                prop_assert_eq!(again, &whole[index..]);
            }
        }
    }
}
