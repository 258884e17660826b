//! A log's lines, from the bytes that tools say: split, masked, numbered, stamped.

use std::borrow::Cow;
use std::io::{ErrorKind, Write};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use chrono::Utc;

use super::super::mask::Masker;
use super::Message;
use crate::job::{Line, LineTag, PART, Stream, escape, part_length};

/// How much is collected before it is written.
const PIECE: usize = 64 * 1024;

/// How long a text waits for the end of its line before it is shown without.
const PAUSE: Duration = Duration::from_secs(1);

pub(super) struct Lines<W: Write> {
    out: W,
    /// Whole lines that are not written yet.
    waiting: Vec<u8>,
    /// Whether what was written last has no end.
    is_torn: bool,
    seq: u64,
    /// What of each stream has no line end yet.
    open: [Open; 2],
    masker: Arc<OnceLock<Masker>>,
}

/// What of a stream has no line end yet.
#[derive(Default)]
struct Open {
    text: Vec<u8>,
    /// When the first of it came, for as long as it has not been shown.
    since: Option<Instant>,
    /// Whether the line's begin is written, so that something has to follow.
    is_begun: bool,
}

/// How much of a text is behind its last whole part.
fn last_part(text: &[u8]) -> usize {
    let mut rest = text;
    while part_length(rest) < rest.len() {
        rest = &rest[part_length(rest)..];
    }
    rest.len()
}

fn slot(stream: Stream) -> usize {
    match stream {
        Stream::Stdout => 0,
        Stream::Stderr => 1,
    }
}

/// How much of a text is whole characters: its last one may still be on its way.
fn whole(text: &[u8]) -> usize {
    let lead = (1..=text.len().min(3)).map(|back| text.len() - back).find(|&at| text[at] & 0xC0 != 0x80);
    let length = |lead: u8| match lead {
        0xF0.. => 4,
        0xE0.. => 3,
        0xC0.. => 2,
        _ => 1,
    };
    lead.filter(|&at| text.len() - at < length(text[at])).unwrap_or(text.len())
}

impl<W: Write> Lines<W> {
    pub(super) fn new(out: W, is_torn: bool, masker: Arc<OnceLock<Masker>>) -> Self {
        let waiting = if is_torn { b"\n".to_vec() } else { Vec::new() };
        Self { out, waiting, is_torn, seq: 0, open: <[Open; 2]>::default(), masker }
    }

    /// When something is to be shown though its line has no end; none where nothing waits for that.
    pub(super) fn due(&self) -> Option<Instant> {
        self.open.iter().filter_map(|open| open.since).min().map(|since| since + PAUSE)
    }

    /// Shows what has waited for long for the end of its line: a question, or dots of progress. What may be the begin of a secret
    /// waits on.
    pub(super) fn show_open(&mut self, now: Instant) {
        for stream in [Stream::Stdout, Stream::Stderr] {
            let open = &mut self.open[slot(stream)];
            if open.since.is_none_or(|since| now.duration_since(since) < PAUSE) {
                continue;
            }
            open.since = None;
            let mut text = std::mem::take(&mut open.text);
            let shown = self.showable(&text);
            let rest = text.split_off(shown);
            if shown > 0 {
                let masked = self.masked(&text);
                self.parts(stream, &masked, true);
            }
            self.open[slot(stream)].text = rest;
        }
    }

    /// How much of a line without an end can be shown.
    fn showable(&self, text: &[u8]) -> usize {
        match self.masker.get().filter(|masker| masker.hold() > 0) {
            None => whole(text),
            Some(masker) if text.len() > masker.hold() => {
                let most = whole(&text[..text.len() - masker.hold()]);
                masker.cut(text, most)
            }
            Some(_) => 0,
        }
    }

    pub(super) fn take(&mut self, message: Message) {
        match message {
            Message::Flush => self.flush_open(),
            Message::Count(answer) => {
                self.flush_open();
                self.flush();
                // Who asked may be gone.
                answer.send(self.seq).ok();
            }
            Message::Output(stream, bytes) => self.output(stream, &bytes),
        }
    }

    fn output(&mut self, stream: Stream, bytes: &[u8]) {
        let mut rest = bytes;
        while let Some(end) = rest.iter().position(|&byte| byte == b'\n') {
            let mut line = std::mem::take(&mut self.open[slot(stream)].text);
            line.extend_from_slice(&rest[..end]);
            self.line(stream, &line);
            line.clear();
            self.open[slot(stream)].text = line;
            rest = &rest[end + 1..];
        }
        let mut text = std::mem::take(&mut self.open[slot(stream)].text);
        text.extend_from_slice(rest);
        let settled = self.settled(&text);
        if settled > 0 {
            let tail = text.split_off(settled);
            let masked = self.masked(&text);
            self.parts(stream, &masked, true);
            text = tail;
        }
        let open = &mut self.open[slot(stream)];
        if !rest.is_empty() {
            open.since.get_or_insert_with(Instant::now);
        }
        open.text = text;
    }

    /// How much of a line without an end is written in parts, so that it never grows memory.
    fn settled(&self, open: &[u8]) -> usize {
        let hold = self.masker.get().map_or(0, Masker::hold);
        match self.masker.get().filter(|_| hold > 0) {
            None => open.len() - last_part(open),
            // More than is needed at a time, as all of it is looked through.
            Some(masker) if open.len() > PART + 2 * hold => {
                let edge = (open.len() - hold - 3..=open.len() - hold).rev();
                let most = edge.into_iter().find(|&at| open[at] & 0xC0 != 0x80);
                masker.cut(open, most.unwrap_or(open.len() - hold))
            }
            Some(_) => 0,
        }
    }

    fn masked<'a>(&self, text: &'a [u8]) -> Cow<'a, [u8]> {
        self.masker.get().map_or(Cow::Borrowed(text), |masker| masker.mask(text))
    }

    fn line(&mut self, stream: Stream, line: &[u8]) {
        let masked = self.masked(line);
        self.parts(stream, &masked, false);
    }

    /// Writes a text, in parts where it is long; `goes_on` is whether another one follows the last of them.
    fn parts(&mut self, stream: Stream, text: &[u8], goes_on: bool) {
        let mut rest = text;
        while part_length(rest) < rest.len() {
            let (part, tail) = rest.split_at(part_length(rest));
            self.write(LineTag { stream, partial: true }, part);
            rest = tail;
        }
        self.write(LineTag { stream, partial: goes_on }, rest);
        let open = &mut self.open[slot(stream)];
        open.is_begun = goes_on;
        if !goes_on {
            open.since = None;
        }
    }

    fn write(&mut self, tag: LineTag, text: &[u8]) {
        self.seq += 1;
        let mut out = String::with_capacity(text.len() + 48);
        Line { time: Utc::now(), seq: self.seq, tag, text: escape(text).into_owned() }.write_to(&mut out);
        self.waiting.extend_from_slice(out.as_bytes());
        if self.waiting.len() >= PIECE {
            self.flush();
        }
    }

    /// Writes what waits, as far as it is taken: where Nomad's reader of the pipe is gone, the work goes on.
    pub(super) fn flush(&mut self) {
        let mut written = 0;
        while written < self.waiting.len() {
            match self.out.write(&self.waiting[written..]) {
                Ok(0) => break,
                Ok(more) => written += more,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
        if let Some(last) = self.waiting[..written].last() {
            self.is_torn = *last != b'\n';
            // What is there of the line looks like one: the number behind it is nobody's, so that a gap is named there.
            self.seq += u64::from(self.is_torn);
        }
        self.waiting.clear();
        if self.is_torn {
            self.waiting.push(b'\n');
        }
    }

    pub(super) fn flush_open(&mut self) {
        for stream in [Stream::Stdout, Stream::Stderr] {
            let Open { text, is_begun, .. } = std::mem::take(&mut self.open[slot(stream)]);
            if !text.is_empty() || is_begun {
                self.line(stream, &text);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use base64::Engine as _;
    use base64::prelude::BASE64_STANDARD as STANDARD;

    use super::*;

    /// What is written of a text that comes in pieces of one length.
    fn written(secret: &str, text: &[u8], piece: usize) -> String {
        let masker = Arc::<OnceLock<Masker>>::default();
        masker.set(Masker::new([secret.as_bytes()]).unwrap()).ok().unwrap();
        let mut lines = Lines::new(Vec::new(), false, masker);
        for bytes in text.chunks(piece) {
            lines.take(Message::Output(Stream::Stdout, bytes.to_vec()));
        }
        lines.flush_open();
        lines.flush();
        let written = String::from_utf8(lines.out).unwrap();
        written.lines().map(|line| Line::parse(line).unwrap().text + "\n").collect()
    }

    #[test]
    fn a_secret_is_hidden_in_every_form_at_every_size_of_what_comes() {
        let secret = "tok/en+of \"a\" job\nand its second line\n";
        let plain = secret.trim_end();
        let base64 = |before: &str| STANDARD.encode(format!("{before}{plain} behind"));
        let json = serde_json::to_string(plain).unwrap();
        let percent: String = plain.bytes().map(|byte| format!("%{byte:02X}")).collect();
        let few = plain.replace('\n', "%0A").replace(' ', "%20").replace('"', "%22").replace('+', "%2B");
        let url_safe = base64("").replace('+', "-").replace('/', "_");
        let wrapped: Vec<_> =
            base64("//host/:_authToken=").as_bytes().chunks(20).map(<[u8]>::to_vec).collect();
        let wrapped = String::from_utf8(wrapped.join(&b'\n')).unwrap();
        for text in [
            plain.to_owned(),
            json.clone(),
            serde_json::to_string(&json).unwrap(),
            percent,
            few.clone(),
            few.replace("%20", "+"),
            base64(""),
            base64("x"),
            base64("xy"),
            url_safe,
            wrapped,
        ] {
            let text = format!("before {text} behind");
            let whole = written(secret, text.as_bytes(), text.len());
            assert!(whole.starts_with("before ") && whole.contains("***"), "{text}: {whole}");
            for piece in ["tok/en", "second", "%74%6F", "dG9rL2", "90b2sv", "9rL2Vu", "tok%2Fen"] {
                assert!(!whole.contains(piece), "{text}: {whole}");
            }
            for size in 1..text.len() {
                assert_eq!(written(secret, text.as_bytes(), size), whole, "{text} in {size}");
            }
        }
    }

    #[test]
    fn a_character_that_is_still_on_its_way_is_no_part_of_a_text() {
        let text = "a\u{20ac}\u{1f600}\u{e9}".as_bytes();
        for end in 0..=text.len() {
            let valid = str::from_utf8(&text[..end]).map_or_else(|error| error.valid_up_to(), str::len);
            assert_eq!(whole(&text[..end]), valid, "{end}");
        }
        // What is no text at all is not waited for.
        assert_eq!(whole(&[0x80, 0x80, 0x80, 0x80]), 4);
        assert_eq!(whole(&[0xff, b'a']), 2);
    }
}
