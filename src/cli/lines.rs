//! Parts of lines put together again.
//!
//! Invariant: pure; each part comes out once, in order within its stream.

use std::collections::BTreeMap;

use super::wire::LogLine;

/// A longer line is shown in pieces, so that a log without line breaks cannot grow without bound here.
const MAX_LINE: usize = 16 << 20;

/// Lines that have begun, by phase and stream.
#[derive(Debug, Default)]
pub(super) struct Joiner {
    open: BTreeMap<(String, String), String>,
}

impl Joiner {
    /// Takes a part and returns the line, once it is whole.
    pub(super) fn push(&mut self, part: LogLine) -> Option<String> {
        let stream = (part.phase, part.stream);
        let line = match self.open.remove(&stream) {
            Some(begun) => begun + &part.line,
            None => part.line,
        };
        if part.partial && line.len() < MAX_LINE {
            self.open.insert(stream, line);
            return None;
        }
        Some(line)
    }

    /// Whether a line has begun.
    pub(super) fn has_begun(&self) -> bool {
        !self.open.is_empty()
    }

    /// Takes what was begun and will not be finished, because lines are missing or none will follow.
    pub(super) fn take_rest(&mut self) -> impl Iterator<Item = String> + use<> {
        std::mem::take(&mut self.open).into_values()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(stream: &str, line: &str, partial: bool) -> LogLine {
        LogLine {
            phase: "build".to_owned(),
            stream: stream.to_owned(),
            line: line.to_owned(),
            cursor: None,
            partial,
        }
    }

    #[test]
    fn a_line_in_parts_comes_out_whole_whatever_the_other_stream_says_meanwhile() {
        let mut joiner = Joiner::default();
        assert_eq!(joiner.push(part("stdout", "one ", true)), None);
        assert_eq!(joiner.push(part("stderr", "other", false)).as_deref(), Some("other"));
        assert_eq!(joiner.push(part("stdout", "li", true)), None);
        assert_eq!(joiner.push(part("stdout", "ne", false)).as_deref(), Some("one line"));
        assert_eq!(joiner.take_rest().count(), 0);
    }

    #[test]
    fn a_line_that_never_ends_is_neither_lost_nor_kept_without_bound() {
        let mut joiner = Joiner::default();
        let piece = "x".repeat(MAX_LINE / 2);
        assert_eq!(joiner.push(part("stdout", &piece, true)), None);
        assert_eq!(joiner.push(part("stdout", &piece, true)).map(|line| line.len()), Some(MAX_LINE));
        assert_eq!(joiner.push(part("stdout", "rest", true)), None);
        assert_eq!(joiner.take_rest().collect::<Vec<_>>(), ["rest"]);
    }
}
