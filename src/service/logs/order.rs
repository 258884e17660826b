//! Lines that came before their turn, until those come that belong before them.
//!
//! An agent that is killed as it starts a task starts the task's log collector again, beside the one that lives on. Both read what the
//! runner writes, each writes it out when its own buffer is due, and so lines may stand in the log before earlier ones.

use std::collections::BTreeMap;

use super::cursor::Position;
use super::decoder::Entry;

/// The most that is held, in lines and in bytes: what is missing then is lost, and not late.
const MOST: usize = 1024;
const MOST_BYTES: usize = 512 * 1024;

/// Lines of one run, by their numbers, each with the lines of others that follow it.
#[derive(Debug, Default)]
pub(super) struct Held {
    lines: BTreeMap<u64, Vec<Entry>>,
    bytes: usize,
    /// The one that came last.
    last: Option<u64>,
}

impl Held {
    pub(super) fn is_empty(&self) -> bool {
        self.lines.is_empty()
    }

    /// Whether it is too much to be held any longer.
    pub(super) fn is_full(&self) -> bool {
        self.lines.len() > MOST || self.bytes > MOST_BYTES
    }

    /// Takes in a line. Where it lies says nothing of what comes after it.
    pub(super) fn hold(&mut self, entry: Entry) {
        let seq = entry.position.seq;
        self.bytes += entry.size();
        self.last = Some(seq);
        let entries = self.lines.entry(seq).or_default();
        // No two lines stand in one place, though somebody wrote the same number twice.
        let sub = entries.last().map_or(0, |last| last.position.sub.saturating_add(1));
        let position = Position { sub, ..entry.position };
        entries.push(Entry { offset: None, position, ..entry });
    }

    /// Where the line stands behind which the next one of others comes, if it is held.
    pub(super) fn last(&self) -> Option<Position> {
        Some(self.lines.get(&self.last?)?.last()?.position)
    }

    /// Takes in a line of others, behind the last one.
    pub(super) fn hold_behind(&mut self, entry: Entry) {
        self.bytes += entry.size();
        if let Some(last) = self.last {
            self.lines.entry(last).or_default().push(entry);
        }
    }

    /// What came last is none of these.
    pub(super) fn passed(&mut self) {
        self.last = None;
    }

    /// The line of a number, with what follows it.
    pub(super) fn take(&mut self, seq: u64) -> Option<Vec<Entry>> {
        let entries = self.lines.remove(&seq)?;
        self.bytes -= entries.iter().map(Entry::size).sum::<usize>();
        Some(entries)
    }

    /// All of them, in order.
    pub(super) fn take_all(&mut self) -> impl Iterator<Item = Entry> + use<> {
        std::mem::take(self).lines.into_values().flatten()
    }
}
