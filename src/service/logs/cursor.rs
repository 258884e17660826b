//! Where a reader stands in a job's log, as text that any replica understands.
//!
//! Invariant: the position is the lines' own numbering. The byte offset is a hint that saves reading the log from its
//! start, and is verified before it is believed: rotation shifts it.

use std::fmt;
use std::str::FromStr;

use serde::{Serialize, Serializer};
use uuid::Uuid;

use crate::job::Phase;

/// The format's version.
const PREFIX: &str = "c1";

/// A place between two lines of one task's log: after the line named.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Position {
    /// How often the numbering began anew: a node that reboots runs its task again into the same log.
    pub(super) run: u32,
    /// The line's sequence number; 0 before the first.
    pub(super) seq: u64,
    /// How many lines that are not the runner's own follow it: a panic's message, for example.
    pub(super) sub: u32,
}

impl Position {
    /// After a line of the first run.
    pub(super) fn after(seq: u64) -> Self {
        Self { run: 0, seq, sub: 0 }
    }
}

/// Where a reader of a job's log stands: opaque to it, and safe in a URL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cursor {
    allocation: Uuid,
    phase: Phase,
    position: Position,
    /// The bytes before the line at `position.seq`, when it was read.
    offset: Option<u64>,
}

/// A text that is not a cursor of this job's log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidCursor {
    /// Not a cursor at all, or one of another version.
    #[error("is not a cursor: use one from a log message, unchanged")]
    Malformed,
    /// A cursor of another job, or of an allocation that no longer counts.
    #[error("is a cursor of another job's log, or of a run that was replaced: start without a cursor")]
    Foreign,
}

impl Cursor {
    pub(super) fn new(allocation: Uuid, phase: Phase, position: Position, offset: Option<u64>) -> Self {
        Self { allocation, phase, position, offset }
    }

    /// The phase whose log it points into.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    pub(super) fn position(&self) -> Position {
        self.position
    }

    pub(super) fn offset(&self) -> Option<u64> {
        self.offset
    }

    /// Whether it points into a log of this allocation.
    pub(super) fn is_of(&self, allocation: &str) -> bool {
        Uuid::try_parse(allocation) == Ok(self.allocation)
    }
}

impl fmt::Display for Cursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Position { run, seq, sub } = self.position;
        write!(f, "{PREFIX}-{}-{}-{run}-{seq}-{sub}", self.allocation.simple(), self.phase)?;
        self.offset.map_or(Ok(()), |offset| write!(f, "-{offset}"))
    }
}

impl FromStr for Cursor {
    type Err = InvalidCursor;

    fn from_str(text: &str) -> Result<Self, InvalidCursor> {
        let cursor = parse(text).ok_or(InvalidCursor::Malformed)?;
        // One spelling only: numbers with a sign or leading zeros parse too.
        if cursor.to_string() == text { Ok(cursor) } else { Err(InvalidCursor::Malformed) }
    }
}

fn parse(text: &str) -> Option<Cursor> {
    let mut parts = text.split('-');
    if parts.next()? != PREFIX {
        return None;
    }
    let allocation = Uuid::try_parse(parts.next()?).ok()?;
    let phase = parts.next()?.parse().ok()?;
    let run = parts.next()?.parse().ok()?;
    let seq = parts.next()?.parse().ok()?;
    let sub = parts.next()?.parse().ok()?;
    let offset = parts.next().map(str::parse).transpose().ok()?;
    Some(Cursor::new(allocation, phase, Position { run, seq, sub }, offset))
}

impl Serialize for Cursor {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_cursor_reads_back_and_is_safe_in_a_url(
            id: u128, phase in 0..3_usize, run: u32, seq: u64, sub: u32, offset: Option<u64>,
        ) {
            let position = Position { run, seq, sub };
            let cursor = Cursor::new(Uuid::from_u128(id), Phase::ALL[phase], position, offset);
            let text = cursor.to_string();
            prop_assert!(text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-'));
            prop_assert_eq!(text.parse(), Ok(cursor));
        }

        #[test]
        fn any_text_is_refused_or_the_one_spelling(text in "\\PC{0,80}|c1-[0-9a-f]{32}-(build|x)(-[0-9+]{1,30}){0,6}") {
            if let Ok(cursor) = text.parse::<Cursor>() {
                prop_assert_eq!(cursor.to_string(), text);
            }
        }
    }

    #[test]
    fn what_is_no_cursor_is_refused() {
        let good = Cursor::new(Uuid::from_u128(5), Phase::Build, Position::after(3), Some(9)).to_string();
        assert_eq!(good, "c1-00000000000000000000000000000005-build-0-3-0-9");
        for text in [
            "",
            "c1",
            "c2-00000000000000000000000000000005-build-0-3-0-9",
            "c1-00000000000000000000000000000005-finish-0-3-0-9",
            "c1-00000000000000000000000000000005-build-0-3",
            "c1-00000000000000000000000000000005-build-0-03-0-9",
            "c1-00000000000000000000000000000005-build-0-3-0-+9",
            "c1-00000000000000000000000000000005-build-0-3-0-9-9",
            "c1-00000000000000000000000000000005-build-0-99999999999999999999999-0-9",
            "c1-../../../../v1/agent/self-build-0-3-0-9",
        ] {
            assert_eq!(text.parse::<Cursor>(), Err(InvalidCursor::Malformed), "{text:?}");
        }
    }
}
