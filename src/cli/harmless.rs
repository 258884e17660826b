//! Text of strangers on a terminal: colours stay, everything else that a terminal would obey is shown instead.
//!
//! Invariant: pure, and what it returns holds no control character but tabs and complete SGR sequences.

use std::borrow::Cow;
use std::fmt::Write;

const ESCAPE: char = '\x1b';

/// Makes one line of a log harmless. Colours (SGR, `ESC [ … m`) are kept where they are wanted, dropped where not, and
/// never leak into the next line; a carriage return at the end belongs to the line's ending.
pub(super) fn line(line: &str, colours: bool) -> Cow<'_, str> {
    let line = line.strip_suffix('\r').unwrap_or(line);
    if !line.contains(|c| c != '\t' && is_obeyed(c)) {
        return Cow::Borrowed(line);
    }
    let mut safe = String::with_capacity(line.len() + 16);
    let mut coloured = false;
    let mut rest = line;
    while let Some(c) = rest.chars().next() {
        if let Some(parameters) = sgr(rest) {
            let (sequence, after) = rest.split_at(parameters.len() + 3);
            if colours {
                safe.push_str(sequence);
                coloured = !parameters.trim_matches('0').is_empty();
            }
            rest = after;
            continue;
        }
        push(&mut safe, c, c == '\t');
        rest = &rest[c.len_utf8()..];
    }
    if coloured {
        safe.push_str("\x1b[0m");
    }
    Cow::Owned(safe)
}

/// Makes a piece of text harmless that stands inside a line of ours: not even a tab or a line break gets through.
pub(super) fn text(text: &str) -> Cow<'_, str> {
    if !text.contains(is_obeyed) {
        return Cow::Borrowed(text);
    }
    let mut safe = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        push(&mut safe, c, false);
    }
    Cow::Owned(safe)
}

/// Makes a JSON text harmless without changing what it means: outside of strings JSON has no other control characters
/// than white space, and inside of them only those from U+007F on can stand unescaped.
pub(super) fn json(json: &str) -> Cow<'_, str> {
    let is_hidden = |c| c >= '\x7f' && is_obeyed(c);
    if !json.contains(is_hidden) {
        return Cow::Borrowed(json);
    }
    let mut safe = String::with_capacity(json.len() + 16);
    for c in json.chars() {
        if is_hidden(c) {
            write!(safe, "\\u{:04x}", u32::from(c)).ok();
        } else {
            safe.push(c);
        }
    }
    Cow::Owned(safe)
}

/// The parameters of a colour sequence that `text` begins with.
fn sgr(text: &str) -> Option<&str> {
    let body = text.strip_prefix(ESCAPE)?.strip_prefix('[')?;
    let end = body.find(|c: char| !matches!(c, '0'..='9' | ';' | ':'))?;
    body[end..].starts_with('m').then(|| &body[..end])
}

/// Control characters, and those that reorder or break the line they stand in (Unicode's bidirectional controls and separators).
fn is_obeyed(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{200e}' | '\u{200f}' | '\u{061c}')
}

fn push(safe: &mut String, c: char, keep: bool) {
    match c {
        _ if keep || !is_obeyed(c) => safe.push(c),
        '\n' => safe.push_str("\\n"),
        '\r' => safe.push_str("\\r"),
        '\t' => safe.push_str("\\t"),
        '\0'..='\x7f' => {
            write!(safe, "\\x{:02x}", u32::from(c)).ok();
        }
        _ => {
            write!(safe, "\\u{{{:x}}}", u32::from(c)).ok();
        }
    }
}

/// See `src/fuzz.rs`: a terminal is told nothing but colours, which end with their line.
#[cfg(feature = "fuzz")]
pub(crate) fn fuzz_terminal(bytes: &[u8]) {
    let given = String::from_utf8_lossy(bytes);
    let is_quiet = |shown: &str| !shown.contains(|c| c != '\t' && is_obeyed(c));
    let first = given.lines().next().unwrap_or_default();
    assert!(is_quiet(&line(first, false)), "{first:?}");
    let coloured = line(first, true);
    let mut rest = &*coloured;
    let mut plain = String::new();
    while let Some(c) = rest.chars().next() {
        let length = sgr(rest).map_or(c.len_utf8(), |parameters| parameters.len() + 3);
        let (one, after) = rest.split_at(length);
        if length == c.len_utf8() {
            plain.push_str(one);
        }
        rest = after;
    }
    assert!(is_quiet(&plain), "{coloured:?}");
    assert!(!text(&given).contains(is_obeyed), "{given:?}");
    if let Ok(value) = serde_json::from_str::<serde_json::Value>(&given) {
        let shown = json(&given);
        assert!(
            serde_json::from_str::<serde_json::Value>(&shown).is_ok_and(|shown| shown == value),
            "{shown:?}"
        );
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_log_line_keeps_its_colours_and_loses_its_powers() {
        for (written, shown) in [
            ("plain", "plain"),
            ("tab\tand ünïcödé 漢字 🦀", "tab\tand ünïcödé 漢字 🦀"),
            ("windows\r", "windows"),
            ("10%\r20%", "10%\\r20%"),
            ("\x1b[31mred\x1b[0m", "\x1b[31mred\x1b[0m"),
            ("\x1b[1;38;5;9mred", "\x1b[1;38;5;9mred\x1b[0m"),
            ("\x1b[38:2::1:2:3mred\x1b[m", "\x1b[38:2::1:2:3mred\x1b[m"),
            ("\x1b[2J\x1b[H", "\\x1b[2J\\x1b[H"),
            ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
            ("\x1b]52;c;ZXZpbA==\x1b\\", "\\x1b]52;c;ZXZpbA==\\x1b\\"),
            ("\x1b[?25l", "\\x1b[?25l"),
            ("\x1b[31", "\\x1b[31"),
            ("\x1b[3\x1b[31mm", "\\x1b[3\x1b[31mm\x1b[0m"),
            ("\x1b", "\\x1b"),
            ("a\x08b\x00c\x7f", "a\\x08b\\x00c\\x7f"),
            ("\u{9b}2J", "\\u{9b}2J"),
            ("admin\u{202e}nimda\u{2066}", "admin\\u{202e}nimda\\u{2066}"),
            ("new\nline", "new\\nline"),
            ("", ""),
        ] {
            assert_eq!(line(written, true), shown, "{written:?}");
        }
    }

    #[test]
    fn without_colours_even_those_of_the_log_are_dropped() {
        assert_eq!(line("\x1b[31mred\x1b[0m and \x1b[2K", false), "red and \\x1b[2K");
    }

    #[test]
    fn inside_a_line_of_ours_nothing_at_all_gets_through() {
        assert_eq!(text("a\tb\nc\x1b[31m"), "a\\tb\\nc\\x1b[31m");
        assert_eq!(text("plain"), "plain");
    }

    #[test]
    fn json_means_the_same_after_it_was_made_harmless() {
        let raw = serde_json::to_string("a\x1b[2J\u{9b}2J\u{7f}\u{202e}").unwrap();
        let safe = json(&raw);
        assert!(!safe.contains(is_obeyed), "{safe:?}");
        assert_eq!(
            serde_json::from_str::<String>(&safe).unwrap(),
            serde_json::from_str::<String>(&raw).unwrap()
        );
    }

    proptest! {
        #[test]
        fn nothing_that_a_terminal_obeys_is_left(written in "(?s)(.|\x1b|\\[|m|[0-9;]){0,60}") {
            let shown = line(&written, false);
            prop_assert!(!shown.contains(|c| c != '\t' && is_obeyed(c)), "{:?}", shown);
            prop_assert!(!text(&written).contains(is_obeyed));
        }
    }
}
