//! The lines decoded last, shared by all readers of one log, bounded in bytes.

use std::collections::VecDeque;
use std::sync::Arc;

use super::cursor::Position;
use super::decoder::Entry;
use super::message::EndReason;

/// Lines that were decoded together. Never empty.
#[derive(Debug)]
pub(super) struct Chunk {
    entries: Vec<Entry>,
    size: usize,
}

impl Chunk {
    /// None without lines.
    pub(super) fn new(entries: Vec<Entry>) -> Option<Arc<Self>> {
        let size = entries.iter().map(Entry::size).sum();
        (!entries.is_empty()).then(|| Arc::new(Self { entries, size }))
    }

    pub(super) fn get(&self, index: usize) -> Option<&Entry> {
        self.entries.get(index)
    }

    fn last(&self) -> Position {
        self.entries.last().map(|entry| entry.position).unwrap_or_default()
    }

    fn first_after(&self, position: Position) -> usize {
        self.entries.partition_point(|entry| entry.position <= position)
    }
}

/// How a log ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    /// All there ever will be was read.
    Done,
    /// It cannot be read, or no longer.
    Missing(EndReason, String),
}

/// What comes after a reader's position.
#[derive(Debug)]
pub(super) enum Next {
    /// These lines, from this index.
    Lines(Arc<Chunk>, usize),
    /// Something the ring no longer has, or never had.
    Behind,
    /// Nothing yet.
    Nothing,
    /// Nothing any more.
    Ended(Ending),
}

/// The ring. Everything after `begin` and up to the last chunk is in it.
#[derive(Debug)]
pub(super) struct Ring {
    chunks: VecDeque<Arc<Chunk>>,
    size: usize,
    limit: usize,
    begin: Position,
    ending: Option<Ending>,
}

impl Ring {
    /// An empty ring, for what comes after a position.
    pub(super) fn new(begin: Position, limit: usize) -> Self {
        Self { chunks: VecDeque::new(), size: 0, limit, begin, ending: None }
    }

    /// Appends lines, which are later than all before, and lets go of the oldest ones.
    pub(super) fn push(&mut self, chunk: Arc<Chunk>) {
        self.size += chunk.size;
        self.chunks.push_back(chunk);
        while self.size > self.limit && self.chunks.len() > 1 {
            let Some(oldest) = self.chunks.pop_front() else { break };
            self.size -= oldest.size;
            self.begin = oldest.last();
        }
    }

    /// Says that nothing follows; what was said first stands.
    pub(super) fn end_with(&mut self, ending: impl FnOnce() -> Ending) {
        self.ending.get_or_insert_with(ending);
    }

    /// What comes after a position.
    pub(super) fn after(&self, position: Position) -> Next {
        if position < self.begin {
            return Next::Behind;
        }
        let index = self.chunks.partition_point(|chunk| chunk.last() <= position);
        if let Some(chunk) = self.chunks.get(index) {
            return Next::Lines(Arc::clone(chunk), chunk.first_after(position));
        }
        self.ending.clone().map_or(Next::Nothing, Next::Ended)
    }
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;
    use proptest::prelude::*;

    use super::*;
    use crate::job::Stream;

    fn entry(seq: u64) -> Entry {
        Entry {
            position: Position::after(seq),
            offset: None,
            time: DateTime::UNIX_EPOCH,
            stream: Stream::Stdout,
            partial: false,
            text: "x".repeat(100),
        }
    }

    fn chunk(seqs: std::ops::Range<u64>) -> Arc<Chunk> {
        Chunk::new(seqs.map(entry).collect()).unwrap()
    }

    #[test]
    fn what_the_ring_never_had_is_behind() {
        let mut ring = Ring::new(Position::after(10), 1 << 20);
        assert!(matches!(ring.after(Position::after(9)), Next::Behind));
        assert!(matches!(ring.after(Position::after(10)), Next::Nothing));
        // A reader may be further than the ring is.
        assert!(matches!(ring.after(Position::after(99)), Next::Nothing));
        ring.push(chunk(11..13));
        assert!(matches!(ring.after(Position::after(9)), Next::Behind));
        assert!(matches!(ring.after(Position::after(11)), Next::Lines(_, 1)));
        ring.end_with(|| Ending::Done);
        ring.end_with(|| Ending::Missing(EndReason::Expired, String::new()));
        assert!(matches!(ring.after(Position::after(12)), Next::Ended(Ending::Done)));
    }

    proptest! {
        #[test]
        fn every_reader_gets_every_line_once_or_knows_that_it_is_behind(
            sizes in proptest::collection::vec(1..20_u64, 1..30), limit in 1..5000_usize, from in 0..200_u64,
        ) {
            let mut ring = Ring::new(Position::default(), limit);
            let mut next = 1;
            for size in sizes {
                ring.push(chunk(next..next + size));
                next += size;
                prop_assert!(ring.size <= limit || ring.chunks.len() == 1);
            }
            let mut position = Position::after(from);
            let mut got = Vec::new();
            let behind = loop {
                match ring.after(position) {
                    Next::Lines(chunk, index) => {
                        let entry = chunk.get(index).unwrap();
                        got.push(entry.position.seq);
                        position = entry.position;
                    }
                    other => break matches!(other, Next::Behind),
                }
            };
            prop_assert_eq!(behind, from < ring.begin.seq);
            if !behind {
                prop_assert_eq!(got, (from + 1..next).collect::<Vec<_>>());
            }
        }
    }
}
