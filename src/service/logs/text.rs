//! A job's log as plain text, for who wants all of it at once.

use std::collections::VecDeque;
use std::time::Duration;

use chrono::Utc;
use serde::Serialize;

use super::decoder::Entry;
use super::tap::{Mark, Tap, Target};
use super::{ByPhase, Inner, Unread, retries, tail};
use crate::job::{Phase, Record, Stream};
use crate::nomad::Allocation;

/// How often a log is read on in vain, for lines that its runner has written and that are still on their way: 10 s on a
/// busy node. How often the connection may fail.
const TRIES: u32 = 40;
const FAILURES: u32 = 3;

const EXPIRED: &str = "expired: Nomad no longer has this log";
const ON_ITS_WAY: &str = "Nomad no longer has this log, and it is not archived yet: ask again";

const NOT_THERE: &str = "the node does not have this log yet: ask again";

/// How long lines are on their way from the runner to Nomad's file.
const LAG: Duration = Duration::from_millis(250);

/// The phases' logs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Logs {
    /// What the build wrote; empty where it has not run. So are the others.
    pub build: String,
    /// What the tests wrote.
    pub test: String,
    /// What publishing wrote.
    pub publish: String,
    /// The phases of which only the end is given.
    #[serde(skip_serializing_if = "ByPhase::is_empty")]
    pub truncated: ByPhase<Truncated>,
    /// The phases that did run and whose log, or its beginning or end, is gone, with the reason.
    #[serde(skip_serializing_if = "ByPhase::is_empty")]
    pub missing: ByPhase<String>,
}

/// What was left out of a phase's log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Truncated {
    /// How many bytes of text.
    pub omitted_bytes: u64,
}

/// Reads the logs of some phases.
pub(super) async fn read(
    inner: &Inner,
    record: &Record,
    phases: &[Phase],
    tail: Option<usize>,
    max_bytes: usize,
) -> Result<Logs, Unread> {
    let mut logs = Logs::default();
    // Of a phase that wrote nothing there is nothing to read: its task may not even have begun.
    let wrote = |phase| !Mark::START.is_behind_all(record, phase);
    for &phase in phases.iter().filter(|&&phase| record.allocation_of(phase).is_some() && wrote(phase)) {
        let target = Target::of(inner, record, phase);
        let mut text = Text::new(tail.unwrap_or(usize::MAX), max_bytes);
        let mark = begin(inner, &target, tail).await;
        let missing = collect(inner, &target, record, mark, &mut text).await?;
        let omitted = text.omitted;
        let text = text.finish();
        let slot = match phase {
            Phase::Build => &mut logs.build,
            Phase::Test => &mut logs.test,
            Phase::Publish => &mut logs.publish,
        };
        *slot = text;
        if omitted > 0 {
            logs.truncated.insert(phase, Truncated { omitted_bytes: omitted });
            let note = format!(
                "[{omitted} bytes before this line are left out; GET /jobs/{}/logs/stream?phase={phase} gives all]\n",
                record.id
            );
            slot.insert_str(0, &note);
        }
        if let Some(reason) = missing {
            // Never silently: who reads only the text is told, too.
            slot.insert_str(0, &format!("[{reason}]\n"));
            logs.missing.insert(phase, reason);
        }
    }
    Ok(logs)
}

/// Where the lines that were asked for begin, or somewhere before.
async fn begin(inner: &Inner, target: &Target, tail: Option<usize>) -> Mark {
    match tail.and_then(|lines| u64::try_from(lines).ok()).filter(|&lines| lines <= tail::MOST) {
        // A log that cannot be read is told by who reads it.
        Some(lines) => tail::find(inner, target, lines).await.map_or(Mark::START, |found| found.mark),
        None => Mark::START,
    }
}

/// Reads one log from a mark to its end; returns what is missing of it.
async fn collect(
    inner: &Inner,
    target: &Target,
    record: &Record,
    mut mark: Mark,
    text: &mut Text,
) -> Result<Option<String>, Unread> {
    let lines = record.lines[target.phase as usize];
    let began = record.timestamps.of(target.phase).0.is_some() || lines.is_some();
    let mut lost = Vec::new();
    let mut delays = retries();
    let mut failures = 0;
    let mut in_vain = 0;
    let mut archived = false;
    // What is held waits for what may be written out in a moment, once.
    let mut waits = is_fresh(record);
    loop {
        let before = mark.position.seq;
        let mut holds = waits;
        let passed = pass(inner, target, record, &mut mark, &mut lost, text, &mut holds).await;
        // As long as lines come, more of them may.
        in_vain = if mark.position.seq > before { 0 } else { in_vain + 1 };
        let is_last = in_vain == TRIES;
        match passed {
            Ok(false) if holds => {
                waits = false;
                tokio::time::sleep(LAG).await;
            }
            Ok(true) => {
                archived = true;
                break;
            }
            Ok(false) if is_last || lines.is_none() || mark.is_behind_all(record, target.phase) => break,
            Ok(false) if !is_fresh(record) => break,
            Ok(false) => tokio::time::sleep(LAG).await,
            Err(error) if error.is_unknown() => {
                if !began {
                    return Ok(None);
                }
                let found = target.allocation().await?;
                if found.is_none() && record.status.is_final() {
                    return Ok(Some(gone_for(inner, record)));
                }
                if is_last || !is_fresh(record) {
                    // The node has removed it, or has yet to say that there is one.
                    let was_there = found.is_some_and(|found| has_started(&found, target.phase));
                    return Ok(Some(if was_there { gone_for(inner, record) } else { NOT_THERE.to_owned() }));
                }
                // A runner tells of its phase before its node does, and a node that starts knows no allocation at first.
                tokio::time::sleep(LAG).await;
            }
            Err(error) if is_last || failures == FAILURES || error.is_forbidden() => {
                return Err(error);
            }
            Err(_) => {
                failures += 1;
                tokio::time::sleep(delays.next().unwrap_or_default()).await;
            }
        }
    }
    let known = mark.position.seq;
    // While a node removes an allocation it gives an empty log, before it says that there is none.
    if known == 0 && !archived && began && record.status.is_final() && target.allocation().await?.is_none() {
        return Ok(Some(gone_for(inner, record)));
    }
    let known = mark.counted(record, target.phase);
    if let Some(lines) = lines.filter(|&lines| lines > known && !text.is_whole) {
        if !archived && is_fresh(record) {
            return Ok(Some(format!("lines {} to {lines} have not arrived yet: ask again", known + 1)));
        }
        lost.push((known + 1, lines));
    }
    let (first, end) = (lost.iter().map(|lost| lost.0).min(), lost.iter().map(|lost| lost.1).max());
    let (Some(first), Some(end)) = (first, end) else { return Ok(None) };
    let what = if lost.len() == 1 { "lines" } else { "some of lines" };
    Ok(Some(format!("{what} {first} to {end} are missing: Nomad no longer has them")))
}

/// Reads from a mark to the end that the log has now; whether that is all there will ever be. Lines that wait for earlier ones are
/// kept where they may, and it is said whether there are any.
async fn pass(
    inner: &Inner,
    target: &Target,
    record: &Record,
    mark: &mut Mark,
    lost: &mut Vec<(u64, u64)>,
    text: &mut Text,
    holds: &mut bool,
) -> Result<bool, Unread> {
    // A line without an end is the last thing a killed runner wrote; otherwise its end is on its way.
    let ends_open = record.status.is_final() && record.lines[target.phase as usize].is_none();
    let mut tap = Tap::open(target, &inner.places, &inner.counters, *mark, false).await?;
    loop {
        let next = tap.next(&inner.counters).await?;
        let ended = next.is_none();
        let entries = match next {
            Some(entries) => entries,
            None if ends_open => {
                *holds = false;
                tap.finish()
            }
            None if *holds && tap.is_holding() && !tap.is_archived() => return Ok(false),
            None => {
                *holds = false;
                tap.release()
            }
        };
        for entry in entries {
            let at = mark.position;
            let known = if entry.position.run == at.run { at.seq } else { 0 };
            if entry.position.run != at.run {
                text.is_whole |= mark.is_behind_all(record, target.phase);
            }
            if entry.position.sub == 0 && entry.position.seq > known + 1 && lost.len() < 2 {
                lost.push((known + 1, entry.position.seq - 1));
            }
            *mark = Mark::after(&entry);
            text.push(&entry);
        }
        if ended {
            return Ok(tap.is_archived());
        }
    }
}

/// What is said of a log that is nowhere.
fn gone_for(inner: &Inner, record: &Record) -> String {
    let said = if inner.may_be_archived(record) { ON_ITS_WAY } else { EXPIRED };
    said.to_owned()
}

/// Whether lines may still be on their way.
fn is_fresh(record: &Record) -> bool {
    record.timestamps.job_end.is_none_or(|end| (Utc::now() - end).num_seconds() < 10)
}

/// Whether Nomad has heard of the start of a phase's task.
fn has_started(allocation: &Allocation, phase: Phase) -> bool {
    allocation.task_states.get(phase.as_str()).is_some_and(|task| task.started_at.is_some())
}

/// The last lines of a text, bounded in lines and in bytes. One buffer: a line takes its bytes, however short it is.
struct Text {
    /// Whole lines, each with its end.
    kept: VecDeque<u8>,
    lines: usize,
    most_lines: usize,
    most_bytes: usize,
    omitted: u64,
    /// Of each stream, the line that is not whole yet.
    open: [String; 2],
    /// Whether the run whose lines were counted was read to its end, whatever ran after it.
    is_whole: bool,
}

impl Text {
    fn new(most_lines: usize, most_bytes: usize) -> Self {
        let open = [String::new(), String::new()];
        Self { kept: VecDeque::new(), lines: 0, most_lines, most_bytes, omitted: 0, open, is_whole: false }
    }

    fn push(&mut self, entry: &Entry) {
        let open = &mut self.open[usize::from(entry.stream == Stream::Stderr)];
        open.push_str(&entry.text);
        self.omitted += cut(open, self.most_bytes);
        if !entry.partial {
            let line = std::mem::take(open);
            self.line(&line);
        }
    }

    fn line(&mut self, line: &str) {
        self.kept.extend(line.as_bytes());
        self.kept.push_back(b'\n');
        self.lines += 1;
        while self.lines > self.most_lines {
            // What is before the tail was not asked for.
            self.drop_line();
        }
        while self.kept.len() > self.most_bytes && self.lines > 1 {
            self.omitted += self.drop_line();
        }
        let mut over = self.kept.len().saturating_sub(self.most_bytes);
        let is_torn = |byte: &u8| byte & 0xc0 == 0x80;
        while over > 0 && self.kept.get(over).is_some_and(is_torn) {
            over += 1;
        }
        self.kept.drain(..over);
        self.omitted += u64::try_from(over).unwrap_or(u64::MAX);
    }

    /// Lets go of the first line; returns its length.
    fn drop_line(&mut self) -> u64 {
        let length = self.kept.iter().position(|&byte| byte == b'\n').map_or(self.kept.len(), |at| at + 1);
        self.kept.drain(..length);
        self.lines -= 1;
        u64::try_from(length).unwrap_or(u64::MAX)
    }

    fn finish(mut self) -> String {
        for open in std::mem::take(&mut self.open) {
            if !open.is_empty() {
                self.line(&open);
            }
        }
        self.kept.shrink_to_fit();
        // It is UTF-8: made of texts, and cut between characters.
        String::from_utf8(self.kept.into())
            .unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned())
    }
}

/// Keeps the last bytes of a text, cut at a character's edge; returns how many went.
fn cut(text: &mut String, most: usize) -> u64 {
    let mut from = text.len().saturating_sub(most);
    while !text.is_char_boundary(from) {
        from += 1;
    }
    text.drain(..from);
    u64::try_from(from).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;

    use super::*;
    use crate::service::logs::cursor::Position;

    fn text(most_lines: usize, most_bytes: usize, entries: &[(Stream, bool, &str)]) -> (String, u64) {
        let mut text = Text::new(most_lines, most_bytes);
        for &(stream, partial, line) in entries {
            let (position, time) = (Position::default(), DateTime::UNIX_EPOCH);
            text.push(&Entry { position, offset: None, time, stream, partial, text: line.to_owned() });
        }
        let omitted = text.omitted;
        (text.finish(), omitted)
    }

    #[test]
    fn parts_are_joined_for_each_stream_by_itself() {
        use Stream::{Stderr, Stdout};
        let entries = [(Stdout, true, "a"), (Stderr, false, "x"), (Stdout, true, "b"), (Stdout, false, "c")];
        assert_eq!(text(9, 99, &entries), ("x\nabc\n".to_owned(), 0));
        assert_eq!(text(9, 99, &entries[..3]), ("x\nab\n".to_owned(), 0));
    }

    #[test]
    fn short_lines_take_no_more_memory_than_long_ones() {
        let mut text = Text::new(usize::MAX, 1 << 20);
        let (position, time) = (Position::default(), DateTime::UNIX_EPOCH);
        let entry = Entry {
            position,
            offset: None,
            time,
            stream: Stream::Stdout,
            partial: false,
            text: "x".to_owned(),
        };
        for _ in 0..1 << 20 {
            text.push(&entry);
        }
        assert!(text.kept.capacity() <= 2 << 20, "{}", text.kept.capacity());
        assert_eq!((text.kept.len(), text.omitted), (1 << 20, 1 << 20));
    }

    #[test]
    fn only_the_end_is_kept_and_the_rest_is_counted() {
        let lines =
            [(Stream::Stdout, false, "one"), (Stream::Stdout, false, "two"), (Stream::Stdout, false, "3")];
        assert_eq!(text(9, 10, &lines), ("one\ntwo\n3\n".to_owned(), 0));
        assert_eq!(text(9, 9, &lines), ("two\n3\n".to_owned(), 4));
        assert_eq!(text(2, 99, &lines), ("two\n3\n".to_owned(), 0));
        let long = [(Stream::Stdout, true, "0123456789"), (Stream::Stdout, false, "ab\u{e4}")];
        assert_eq!(text(9, 4, &long), ("b\u{e4}\n".to_owned(), 11));
        assert_eq!(text(9, 3, &long), ("\u{e4}\n".to_owned(), 12));
    }
}
