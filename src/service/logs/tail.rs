//! Where the last lines of a log begin, without reading the log.

use std::collections::VecDeque;

use super::cursor::Position;
use super::tap::{Hint, Mark, Tap, Target};
use super::{Inner, Unread};

/// The most lines a tail has; positions are held of as many.
pub(super) const MOST: u64 = 10_000;

/// Bytes to guess for a line, and at least.
const LINE: u64 = 160;
const LEAST: u64 = 64 * 1024;

/// What was found.
pub(super) struct Found {
    /// After it come the lines wanted.
    pub(super) mark: Mark,
    /// How many there are; fewer than wanted where the log has no more.
    pub(super) lines: u64,
}

/// Finds the mark before the last lines of a log, reading back from its end as far as it takes.
///
/// From the end of a log nobody can tell how often its numbering began anew: that of a task that ran again is read whole.
pub(super) async fn find(inner: &Inner, target: &Target, lines: u64) -> Result<Found, Unread> {
    let Inner { places, counters, .. } = inner;
    let wanted = lines.min(MOST);
    // A log that is gone is for its reader to tell.
    let from_start = target.starts().await?.is_some_and(|starts| starts > 1);
    let mut guess = wanted.saturating_mul(LINE).max(LEAST);
    loop {
        let opened = if from_start {
            Tap::open(target, places, counters, Mark::START, false).await
        } else {
            Tap::open_end(target, places, counters, guess).await
        };
        let mut tap = match opened {
            Ok(tap) => tap,
            Err(error) if error.is_unknown() => return Ok(Found { mark: Mark::START, lines: 0 }),
            Err(error) => return Err(error),
        };
        let mut first = None;
        // After whole lines only: a tail begins with no part of a line.
        let mut last = VecDeque::new();
        let mut ended = false;
        while !ended {
            let next = tap.next(counters).await?;
            ended = next.is_none();
            let entries = next.unwrap_or_else(|| tap.release());
            first = first.or_else(|| entries.first().map(|entry| entry.position));
            for entry in entries.iter().filter(|entry| !entry.partial) {
                last.push_back(Mark::after(entry));
                if count(&last) > wanted + 1 {
                    last.pop_front();
                }
            }
        }
        let found = count(&last);
        if found > wanted {
            let mark = last.front().copied().unwrap_or(Mark::START);
            // Where the bytes before the file are not known, the end is the better place to look.
            let looks_back = mark.hint == Hint::None && !from_start;
            let hint = if looks_back { Hint::End(guess.saturating_mul(2)) } else { mark.hint };
            return Ok(Found { mark: Mark { hint, ..mark }, lines: wanted });
        }
        if from_start || tap.bytes() < guess {
            // The whole log was read, or all that is left of it: what is gone is not part of a tail.
            let first = first.unwrap_or_default();
            let before = Position { seq: first.seq.saturating_sub(1), sub: 0, run: first.run };
            let hint = if before.seq == 0 || from_start { Hint::None } else { Hint::End(guess) };
            return Ok(Found { mark: Mark::at(before, hint), lines: found });
        }
        guess = guess.saturating_mul(8);
    }
}

fn count(marks: &VecDeque<Mark>) -> u64 {
    u64::try_from(marks.len()).unwrap_or(u64::MAX)
}
