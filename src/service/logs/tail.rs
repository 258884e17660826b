//! Where the last lines of a log begin, without reading the log.

use std::collections::VecDeque;

use super::Inner;
use super::cursor::Position;
use super::tap::{Hint, Mark, Tap, Target};
use crate::nomad::{Error, Kind};

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
pub(super) async fn find(inner: &Inner, target: &Target, lines: u64) -> Result<Found, Error> {
    let wanted = lines.min(MOST);
    let mut guess = wanted.saturating_mul(LINE).max(LEAST);
    loop {
        let mut tap = match Tap::open_end(target, &inner.places, &inner.counters, guess).await {
            Ok(tap) => tap,
            Err(error) if error.kind == Kind::NotFound => return Ok(Found { mark: Mark::START, lines: 0 }),
            Err(error) => return Err(error),
        };
        let mut last = VecDeque::new();
        while let Some(entries) = tap.next(&inner.counters).await? {
            for entry in entries {
                last.push_back(Mark::after(&entry));
                if count(&last) > wanted + 1 {
                    last.pop_front();
                }
            }
        }
        let found = count(&last);
        if found > wanted {
            let mark = last.front().copied().unwrap_or(Mark::START);
            // Where the bytes before the file are not known, the end is the better place to look.
            let hint = if mark.hint == Hint::None { Hint::End(guess.saturating_mul(2)) } else { mark.hint };
            return Ok(Found { mark: Mark { hint, ..mark }, lines: wanted });
        }
        if tap.bytes() < guess {
            // The whole log was read, or all that is left of it: what is gone is not part of a tail.
            let first = last.front().map(|mark| mark.position).unwrap_or_default();
            let before = Position { seq: first.seq.saturating_sub(1), sub: 0, run: 0 };
            let hint = if before.seq == 0 { Hint::None } else { Hint::End(guess) };
            return Ok(Found { mark: Mark { position: before, hint }, lines: found });
        }
        guess = guess.saturating_mul(8);
    }
}

fn count(marks: &VecDeque<Mark>) -> u64 {
    u64::try_from(marks.len()).unwrap_or(u64::MAX)
}
