//! The line format of a phase's log: `TIME SEQ TAG TEXT`.
//!
//! One stream carries both of a tool's outputs, so their order is kept; `nomad alloc logs` stays readable by a person.
//! Invariant: sequence numbers of one run start at 1 and have no holes, so a reader knows a gap when it sees one.

use std::borrow::Cow;

use chrono::{DateTime, SecondsFormat, Utc};
use serde::{Deserialize, Serialize};

/// The longest text of one written line, in bytes; longer ones are written in parts.
pub(crate) const PART: usize = 64 * 1024;

/// Which of a tool's outputs a line came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stream {
    /// Standard output, and what the runner itself says.
    Stdout,
    /// Standard error.
    Stderr,
}

/// What stands between sequence number and text: the stream, and whether the line goes on in the next one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tag {
    /// Where the text came from.
    pub stream: Stream,
    /// The line is longer than one part, and the next line with this stream continues it.
    pub partial: bool,
}

impl Tag {
    fn letter(self) -> char {
        match (self.stream, self.partial) {
            (Stream::Stdout, false) => 'o',
            (Stream::Stdout, true) => 'O',
            (Stream::Stderr, false) => 'e',
            (Stream::Stderr, true) => 'E',
        }
    }

    fn from_letter(letter: &str) -> Option<Self> {
        let (stream, partial) = match letter {
            "o" => (Stream::Stdout, false),
            "O" => (Stream::Stdout, true),
            "e" => (Stream::Stderr, false),
            "E" => (Stream::Stderr, true),
            _ => return None,
        };
        Some(Self { stream, partial })
    }
}

/// One line of a log, as its reader sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// When the runner read it from the tool, to the microsecond.
    pub time: DateTime<Utc>,
    /// Its place in the run, from 1.
    pub seq: u64,
    /// Stream, and whether it goes on.
    pub tag: Tag,
    /// The text, without its line end. What is not UTF-8 stands as `\xHH`.
    pub text: String,
}

impl Line {
    /// Appends the line as it is written, its end included.
    pub fn write_to(&self, out: &mut String) {
        let time = self.time.to_rfc3339_opts(SecondsFormat::Micros, true);
        out.push_str(&time);
        out.push_str(&format!(" {} {} ", self.seq, self.tag.letter()));
        out.push_str(&self.text);
        out.push('\n');
    }

    /// Reads a line, given without its line end; `None` is not a line of ours.
    pub fn parse(written: &str) -> Option<Self> {
        let mut parts = written.splitn(4, ' ');
        let time = DateTime::parse_from_rfc3339(parts.next()?).ok()?.with_timezone(&Utc);
        let seq = parts.next()?.parse().ok()?;
        let tag = Tag::from_letter(parts.next()?)?;
        Some(Self { time, seq, tag, text: parts.next()?.to_owned() })
    }
}

/// Bytes as text that stands on one line: UTF-8 verbatim, everything else and `\n` as `\xHH`.
pub(crate) fn escape(bytes: &[u8]) -> Cow<'_, str> {
    if let Ok(text) = std::str::from_utf8(bytes)
        && !text.contains('\n')
    {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(bytes.len() + 16);
    for chunk in bytes.utf8_chunks() {
        for char in chunk.valid().chars() {
            if char == '\n' { out.push_str("\\x0a") } else { out.push(char) }
        }
        for byte in chunk.invalid() {
            out.push_str(&format!("\\x{byte:02x}"));
        }
    }
    Cow::Owned(out)
}

/// Where to cut bytes so that a part is at most [`PART`] long and no UTF-8 sequence is torn.
pub(crate) fn part_length(bytes: &[u8]) -> usize {
    if bytes.len() <= PART {
        return bytes.len();
    }
    // A UTF-8 sequence has at most three continuation bytes.
    (PART - 3..=PART).rev().find(|&at| bytes[at] & 0xC0 != 0x80).unwrap_or(PART)
}

/// See `src/fuzz.rs`: what is written of a line is one line, and reads back as it was.
#[cfg(feature = "fuzz")]
pub(crate) fn fuzz_line(bytes: &[u8]) {
    if let Some(line) = str::from_utf8(bytes).ok().and_then(Line::parse) {
        let mut out = String::new();
        line.write_to(&mut out);
        let again = out.strip_suffix('\n').and_then(Line::parse);
        // A time is written to the microsecond.
        assert!(
            again
                .is_some_and(|again| (again.seq, again.tag, &again.text) == (line.seq, line.tag, &line.text))
        );
    }
    let escaped = escape(bytes);
    assert!(!escaped.contains('\n'), "{escaped:?}");
    let part = part_length(bytes);
    assert!(part <= PART.max(bytes.len()) && (part > 0 || bytes.is_empty()));
    if str::from_utf8(bytes).is_ok() {
        assert!(str::from_utf8(&bytes[..part]).is_ok(), "a part ends within a character");
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn line(seq: u64, letter: &str, text: &str) -> Line {
        let time = DateTime::from_timestamp_micros(1_700_000_000_123_456).unwrap();
        Line { time, seq, tag: Tag::from_letter(letter).unwrap(), text: text.to_owned() }
    }

    #[test]
    fn a_line_is_readable_by_a_person() {
        let mut out = String::new();
        line(7, "e", "warning: x").write_to(&mut out);
        assert_eq!(out, "2023-11-14T22:13:20.123456Z 7 e warning: x\n");
    }

    #[test]
    fn what_is_not_a_line_is_not_read_as_one() {
        for text in
            ["", "x", "2023-11-14T22:13:20.123456Z", "2023-11-14T22:13:20.123456Z 1 q text", "now 1 o text"]
        {
            assert_eq!(Line::parse(text), None, "{text:?}");
        }
    }

    #[test]
    fn bytes_that_are_not_text_are_escaped() {
        for (bytes, want) in [
            (&b"plain"[..], "plain"),
            (b"a\rb", "a\rb"),
            (b"a\nb", "a\\x0ab"),
            (b"\xff\xfe", "\\xff\\xfe"),
            ("gr\u{fc}n".as_bytes(), "gr\u{fc}n"),
            (b"\x1b[31mred", "\u{1b}[31mred"),
        ] {
            assert_eq!(escape(bytes), want);
        }
    }

    proptest! {
        #[test]
        fn every_line_reads_back(seq: u64, letter in "[oOeE]", text in "[^\n]*") {
            let line = line(seq, &letter, &text);
            let mut out = String::new();
            line.write_to(&mut out);
            prop_assert_eq!(Line::parse(out.strip_suffix('\n').unwrap()), Some(line));
        }

        #[test]
        fn escaped_bytes_stand_on_one_line(bytes: Vec<u8>) {
            prop_assert!(!escape(&bytes).contains('\n'));
        }

        #[test]
        fn a_part_never_tears_a_character(unit in "[a\u{e4}\u{20ac}\u{1f600}]{1,9}") {
            let text = unit.repeat(PART / unit.len() + 2);
            let bytes = text.as_bytes();
            let (head, tail) = bytes.split_at(part_length(bytes));
            prop_assert!(head.len() <= PART);
            prop_assert!(std::str::from_utf8(head).is_ok() && std::str::from_utf8(tail).is_ok());
        }
    }
}
