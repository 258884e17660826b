//! BuildKit's progress as readable lines.
//!
//! Invariant: pure. A step is announced once; what it prints is passed on byte for byte, line by line.
//! Invariant: every line begins with its step's number: neither a name nor an error can pretend to be another step.

use std::collections::HashMap;

use bollard::moby::buildkit::v1::{StatusResponse, Vertex, VertexLog};

use super::{Output, Stream};

/// What BuildKit calls standard error.
const STDERR: i64 = 2;
/// What is kept of a line until it ends, in bytes: something that never ends its line must not grow memory.
const LONGEST: usize = 1 << 20;

#[derive(Default)]
struct Step {
    number: usize,
    ended: bool,
    /// What of each output has no line end yet.
    open: [Vec<u8>; 2],
}

/// Turns status messages into output.
#[derive(Default)]
pub(super) struct Progress {
    steps: HashMap<String, Step>,
    /// What a failed step said of itself.
    error: Option<String>,
    /// Whose line was passed on without its end: a step's number and its stream.
    unended: Option<(usize, Stream)>,
}

impl Progress {
    /// Takes one message in.
    pub(super) fn take(&mut self, status: &StatusResponse) -> Vec<Output> {
        let mut out = Vec::new();
        for vertex in &status.vertexes {
            // A step is named when it begins: until then its number would tell nothing.
            if vertex.started.is_some() || vertex.cached || !vertex.error.is_empty() {
                self.announce(vertex, &mut out);
            }
        }
        for log in &status.logs {
            self.log(log, &mut out);
        }
        for vertex in &status.vertexes {
            self.end(vertex, &mut out);
        }
        out
    }

    /// What was said last and has no end yet: it may be all there is to come for long.
    pub(super) fn take_open(&mut self) -> Vec<Output> {
        let mut out = Vec::new();
        let mut open: Vec<_> = self
            .steps
            .values_mut()
            .filter(|step| step.open.iter().any(|open| !open.is_empty()))
            .map(|step| (step.number, std::mem::take(&mut step.open)))
            .collect();
        open.sort_unstable_by_key(|(number, _)| *number);
        for (number, open) in open {
            for (rest, stream) in open.into_iter().zip([Stream::Stdout, Stream::Stderr]) {
                if !rest.is_empty() {
                    self.line(number, stream, &rest, &mut out);
                }
            }
        }
        out
    }

    /// What the failed step said of itself.
    pub(super) fn error(&self) -> Option<&str> {
        self.error.as_deref()
    }

    fn announce(&mut self, vertex: &Vertex, out: &mut Vec<Output>) {
        let next = self.steps.len() + 1;
        let step = self.steps.entry(vertex.digest.clone()).or_default();
        if step.number == 0 {
            step.number = next;
            self.say(next, &vertex.name, out);
        }
    }

    fn log(&mut self, log: &VertexLog, out: &mut Vec<Output>) {
        let Some(step) = self.steps.get_mut(&log.vertex) else { return };
        let (slot, stream) = if log.stream == STDERR { (1, Stream::Stderr) } else { (0, Stream::Stdout) };
        let number = step.number;
        step.open[slot].extend_from_slice(&log.msg);
        let mut ready = std::mem::take(&mut step.open[slot]);
        if step.ended && !ready.ends_with(b"\n") {
            ready.push(b'\n'); // Late, but not lost: no end of the step will come to flush it.
        }
        if ready.len() <= LONGEST {
            let ended = ready.iter().rposition(|&byte| byte == b'\n').map_or(0, |end| end + 1);
            step.open[slot] = ready.split_off(ended);
        }
        for line in ready.split_inclusive(|&byte| byte == b'\n') {
            self.line(number, stream, line, out);
        }
    }

    fn end(&mut self, vertex: &Vertex, out: &mut Vec<Output>) {
        let Some(step) = self.steps.get_mut(&vertex.digest).filter(|step| !step.ended) else { return };
        let outcome = if !vertex.error.is_empty() {
            self.error.get_or_insert_with(|| vertex.error.clone());
            format!("ERROR: {}", vertex.error)
        } else if vertex.cached {
            "CACHED".to_owned()
        } else {
            let (Some(started), Some(completed)) = (&vertex.started, &vertex.completed) else { return };
            let milliseconds = (completed.seconds - started.seconds) * 1000
                + i64::from(completed.nanos - started.nanos) / 1_000_000;
            format!("DONE {}.{}s", milliseconds / 1000, milliseconds % 1000 / 100)
        };
        step.ended = true;
        let (number, open) = (step.number, std::mem::take(&mut step.open));
        for (mut rest, stream) in open.into_iter().zip([Stream::Stdout, Stream::Stderr]) {
            if !rest.is_empty() {
                rest.push(b'\n');
                self.line(number, stream, &rest, out);
            }
        }
        self.say(number, &outcome, out);
    }

    /// Our own words of a step; each of their lines is one of the step's.
    fn say(&mut self, number: usize, text: &str, out: &mut Vec<Output>) {
        self.end_line(out);
        for line in text.trim_end().split(['\n', '\r']) {
            self.line(number, Stream::Stdout, format!("{line}\n").as_bytes(), out);
        }
    }

    /// Nothing gets into the middle of a line: the pieces become lines.
    fn end_line(&mut self, out: &mut Vec<Output>) {
        if let Some((_, stream)) = self.unended.take() {
            out.push(Output { stream, bytes: b"\n".to_vec() });
        }
    }

    /// Passes on a line of a step, or a piece of one that is very long.
    fn line(&mut self, number: usize, stream: Stream, line: &[u8], out: &mut Vec<Output>) {
        let prefix = if self.unended == Some((number, stream)) {
            String::new()
        } else {
            self.end_line(out);
            format!("#{number} ")
        };
        self.unended = None;
        if !line.ends_with(b"\n") {
            self.unended = Some((number, stream));
        }
        out.push(Output { stream, bytes: [prefix.as_bytes(), line].concat() });
    }
}

/// The exit code that the engine's words end with.
pub(super) fn exit_code(message: &str) -> Option<i64> {
    let (_, code) = message.rsplit_once("exit code: ")?;
    let end = code.find(|c: char| !(c.is_ascii_digit() || c == '-')).unwrap_or(code.len());
    code[..end].parse().ok()
}

/// See `src/fuzz.rs`: whatever steps say, each line begins with its step's number.
#[cfg(feature = "fuzz")]
pub(crate) fn fuzz_progress(bytes: &[u8]) {
    let mut progress = Progress::default();
    let mut rest = bytes;
    let mut out = Vec::new();
    // What is said, by which step, and how much of what follows it says.
    while let [what, step, length, after @ ..] = rest {
        let (said, after) = after.split_at(usize::from(*length).min(after.len()));
        rest = after;
        let digest = format!("sha256:{}", step % 4);
        let text = String::from_utf8_lossy(said).into_owned();
        let mut status = StatusResponse::default();
        match what % 5 {
            0 => status.vertexes.push(Vertex { digest, name: text, cached: true, ..Vertex::default() }),
            1 => status.vertexes.push(Vertex { digest, error: text, ..Vertex::default() }),
            2 => out.extend(progress.take_open()),
            stream => {
                let stream = i64::from(stream) - 2;
                status.logs.push(VertexLog {
                    vertex: digest,
                    stream,
                    msg: said.to_vec(),
                    ..VertexLog::default()
                });
            }
        }
        out.extend(progress.take(&status));
    }
    out.extend(progress.take_open());
    let all: Vec<u8> = out.into_iter().flat_map(|output| output.bytes).collect();
    for line in all.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
        assert!(line.starts_with(b"#"), "{:?}", String::from_utf8_lossy(line));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vertex(digest: &str, name: &str, times: (bool, bool), error: &str, cached: bool) -> Vertex {
        Vertex {
            digest: digest.to_owned(),
            name: name.to_owned(),
            // The protocol's own type of time has no name here; its default is as good.
            started: times.0.then(Default::default),
            completed: times.1.then(Default::default),
            error: error.to_owned(),
            cached,
            ..Vertex::default()
        }
    }

    fn log(vertex: &str, stream: i64, text: &str) -> VertexLog {
        VertexLog { vertex: vertex.to_owned(), stream, msg: text.as_bytes().to_vec(), ..VertexLog::default() }
    }

    fn text(outputs: &[Output]) -> String {
        outputs.iter().map(|output| String::from_utf8_lossy(&output.bytes).into_owned()).collect()
    }

    #[test]
    fn the_exit_code_is_read_from_the_engines_words() {
        for (message, want) in [
            ("executor failed running [/bin/sh -c exit 3]: exit code: 3", Some(3)),
            ("process \"x\" did not complete successfully: exit code: 127", Some(127)),
            ("failed to solve: exit code: 1: rest", Some(1)),
            ("no such thing", None),
        ] {
            assert_eq!(exit_code(message), want);
        }
    }

    #[test]
    fn a_step_is_announced_once_and_its_lines_are_joined() {
        let mut progress = Progress::default();
        let began = StatusResponse {
            vertexes: vec![vertex("a", "[1/2] FROM x", (true, false), "", false)],
            logs: vec![log("a", 1, "one\ntw"), log("a", 2, "err\n")],
            ..StatusResponse::default()
        };
        assert_eq!(text(&progress.take(&began)), "#1 [1/2] FROM x\n#1 one\n#1 err\n");
        let ended = StatusResponse {
            vertexes: vec![vertex("a", "[1/2] FROM x", (true, true), "", false)],
            logs: vec![log("a", 1, "o\nlast")],
            ..StatusResponse::default()
        };
        assert_eq!(text(&progress.take(&ended)), "#1 two\n#1 last\n#1 DONE 0.0s\n");
        assert_eq!(text(&progress.take(&ended)), "#1 o\n#1 last\n", "late output is shown, the end once");
    }

    #[test]
    fn a_failed_step_and_a_cached_one_say_so() {
        let mut progress = Progress::default();
        let status = StatusResponse {
            vertexes: vec![
                vertex("a", "[1/2] RUN x", (true, true), "exit code: 3", false),
                vertex("b", "[2/2] COPY", (false, false), "", true),
            ],
            ..StatusResponse::default()
        };
        assert_eq!(
            text(&progress.take(&status)),
            "#1 [1/2] RUN x\n#2 [2/2] COPY\n#1 ERROR: exit code: 3\n#2 CACHED\n"
        );
        assert_eq!(progress.error(), Some("exit code: 3"));
    }

    #[test]
    fn names_and_errors_of_many_lines_pretend_nothing() {
        let status = StatusResponse {
            vertexes: vec![vertex(
                "a",
                "RUN <<E\n#2 DONE 0.0s\r#3 x\nE\n",
                (true, true),
                "no\n#1 DONE",
                false,
            )],
            ..StatusResponse::default()
        };
        assert_eq!(
            text(&Progress::default().take(&status)),
            "#1 RUN <<E\n#1 #2 DONE 0.0s\n#1 #3 x\n#1 E\n#1 ERROR: no\n#1 #1 DONE\n"
        );
    }

    #[test]
    fn a_very_long_line_stays_one_unless_another_comes_between() {
        let (long, rest) = ("x".repeat(LONGEST + 1), "y".repeat(LONGEST + 1));
        let mut progress = Progress::default();
        let mut take = |vertexes, logs| {
            text(&progress.take(&StatusResponse { vertexes, logs, ..StatusResponse::default() }))
        };
        let began = |digest| vertex(digest, digest, (true, false), "", false);
        take(vec![began("a"), began("b")], vec![]);
        let logs = vec![log("a", 1, &long), log("a", 1, &rest), log("a", 1, "z\n")];
        assert!(take(vec![], logs) == format!("#1 {long}{rest}z\n"));
        let logs = vec![log("a", 1, &long), log("b", 1, "b\n"), log("a", 1, "z\n")];
        assert!(take(vec![], logs) == format!("#1 {long}\n#2 b\n#1 z\n"));
        let ended = vertex("a", "a", (true, true), "", false);
        assert!(take(vec![ended], vec![log("a", 1, &long)]) == format!("#1 {long}\n#1 DONE 0.0s\n"));
    }
}
