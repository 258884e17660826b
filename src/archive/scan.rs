//! What a log's bytes say of its numbering, whatever way they are torn.

use chrono::{DateTime, Utc};

use crate::job::Line;

/// As much of a line as its time, number and tag take.
const START: usize = 64;

/// Reads line numbers as bytes go by.
#[derive(Debug, Default)]
pub(super) struct Scan {
    start: Vec<u8>,
    /// The number of the last line.
    pub(super) seq: u64,
    /// When it was written.
    pub(super) time: Option<DateTime<Utc>>,
    /// How often the numbering began: more than once where a task ran again into the same log.
    pub(super) runs: u32,
}

impl Scan {
    pub(super) fn feed(&mut self, bytes: &[u8]) {
        let mut lines = bytes.split(|&byte| byte == b'\n').peekable();
        while let Some(part) = lines.next() {
            let room = START.saturating_sub(self.start.len()).min(part.len());
            self.start.extend_from_slice(&part[..room]);
            // The last part has no end yet.
            if lines.peek().is_some() {
                self.line();
            }
        }
    }

    fn line(&mut self) {
        // The text may be cut within a character.
        let start = String::from_utf8_lossy(&self.start);
        if let Some(line) = Line::parse(&start).filter(|line| line.seq > 0) {
            // One that is only late was written before those that it stands behind, and does not begin anew.
            if line.seq > 1 && line.seq < self.seq && self.time.is_some_and(|time| line.time <= time) {
                self.start.clear();
                return;
            }
            self.runs += u32::from(self.runs == 0 || line.seq <= self.seq);
            self.seq = line.seq;
            self.time = Some(line.time);
        }
        self.start.clear();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn numbers_are_read_however_the_bytes_are_torn(
            runs in proptest::collection::vec(1..40_u64, 1..4), text in "[a-z\u{e4}\u{1f600}]{0,90}",
            cuts in proptest::collection::vec(0..4000_usize, 0..9),
        ) {
            let mut log = String::new();
            for &lines in &runs {
                for seq in 1..=lines {
                    log.push_str(&format!("2023-11-14T22:13:20.000000Z {seq} o {text}\nforeign\n"));
                }
            }
            let mut cuts: Vec<_> = cuts.into_iter().map(|cut| cut.min(log.len())).collect();
            cuts.extend([0, log.len()]);
            cuts.sort_unstable();
            let mut scan = Scan::default();
            for cut in cuts.windows(2) {
                scan.feed(&log.as_bytes()[cut[0]..cut[1]]);
            }
            prop_assert_eq!((scan.seq, scan.runs as usize), (*runs.last().unwrap(), runs.len()));
        }
    }

    #[test]
    fn a_line_that_is_late_begins_no_run() {
        let mut scan = Scan::default();
        let line = |seq: u64, second: u64| format!("2023-11-14T22:13:{second:02}.000000Z {seq} o x\n");
        let lines = [line(1, 1), line(4, 4), line(2, 2), line(3, 3)].concat();
        scan.feed(lines.as_bytes());
        assert_eq!((scan.seq, scan.runs), (4, 1));
        scan.feed(line(1, 9).as_bytes());
        assert_eq!((scan.seq, scan.runs), (1, 2));
    }

    #[test]
    fn a_log_without_lines_has_no_runs() {
        let mut scan = Scan::default();
        scan.feed(b"panicked\n\nat 0 o x\n2023-11-14T22:13:20.000000Z 1 o not ended");
        assert_eq!((scan.seq, scan.runs), (0, 0));
        assert!(scan.start.capacity() <= 2 * START);
    }
}
