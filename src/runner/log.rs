//! The phase's log: tools' output and the runner's own words, stamped and written to standard output.
//!
//! Invariant: one thread writes, so lines never interleave, and sequence numbers have no holes. The queue before it is
//! bounded: a slow reader of our output slows the tool, it never grows memory.

use std::io::{BufWriter, Write};
use std::thread::JoinHandle;

use chrono::Utc;
use tokio::sync::{mpsc, oneshot};

use crate::job::{Line, LineTag, Stream, escape, part_length};

/// Bytes of a tool's output, or the end of it.
enum Message {
    Output(Stream, Vec<u8>),
    /// What is left without a line end becomes a line.
    Flush,
    /// Tells how many lines there are, once they are written.
    Count(oneshot::Sender<u64>),
}

/// Where output goes. Cheap to clone; the log ends when the last one is dropped.
#[derive(Clone)]
pub(super) struct Log {
    queue: mpsc::Sender<Message>,
}

/// The thread that writes.
pub(super) struct Writer {
    thread: JoinHandle<std::io::Result<()>>,
}

/// Opens the log on standard output.
pub(super) fn open() -> std::io::Result<(Log, Writer)> {
    open_on(std::io::stdout())
}

fn open_on(out: impl Write + Send + 'static) -> std::io::Result<(Log, Writer)> {
    let (queue, messages) = mpsc::channel(256);
    let thread =
        std::thread::Builder::new().name("log".to_owned()).spawn(move || write_all(out, messages))?;
    Ok((Log { queue }, Writer { thread }))
}

impl Log {
    /// Takes bytes of a tool's output, waiting for room.
    pub(super) async fn output(&self, stream: Stream, bytes: Vec<u8>) {
        // The writer ends early only when standard output is gone: then nobody reads, and work goes on.
        drop(self.queue.send(Message::Output(stream, bytes)).await);
    }

    /// Says something of the runner's own.
    pub(super) async fn say(&self, text: &str) {
        drop(self.queue.send(Message::Flush).await);
        let mut bytes = Vec::with_capacity(text.len() + 1);
        bytes.extend_from_slice(text.as_bytes());
        bytes.push(b'\n');
        self.output(Stream::Stdout, bytes).await;
    }

    /// How many lines there are; none where they cannot be written.
    pub(super) async fn lines(&self) -> Option<u64> {
        let (answer, lines) = oneshot::channel();
        self.queue.send(Message::Count(answer)).await.ok()?;
        lines.await.ok()
    }
}

impl Writer {
    /// Waits until everything is written.
    ///
    /// Every [`Log`] must be gone, or this waits for it.
    pub(super) async fn finish(self) -> std::io::Result<()> {
        tokio::task::spawn_blocking(|| self.thread.join())
            .await
            .map_err(std::io::Error::other)?
            .unwrap_or_else(|_| Err(std::io::Error::other("the log's thread panicked")))
    }
}

fn write_all(out: impl Write, mut messages: mpsc::Receiver<Message>) -> std::io::Result<()> {
    let mut writer =
        Lines { out: BufWriter::with_capacity(64 * 1024, out), seq: 0, open: [Vec::new(), Vec::new()] };
    while let Some(message) = messages.blocking_recv() {
        writer.take(message)?;
        while let Ok(message) = messages.try_recv() {
            writer.take(message)?;
        }
        writer.out.flush()?;
    }
    writer.flush_open()?;
    writer.out.flush()
}

struct Lines<W: Write> {
    out: BufWriter<W>,
    seq: u64,
    /// What of each stream has no line end yet.
    open: [Vec<u8>; 2],
}

fn slot(stream: Stream) -> usize {
    match stream {
        Stream::Stdout => 0,
        Stream::Stderr => 1,
    }
}

impl<W: Write> Lines<W> {
    fn take(&mut self, message: Message) -> std::io::Result<()> {
        match message {
            Message::Flush => self.flush_open(),
            Message::Count(answer) => {
                self.flush_open()?;
                self.out.flush()?;
                // Who asked may be gone.
                answer.send(self.seq).ok();
                Ok(())
            }
            Message::Output(stream, bytes) => self.output(stream, &bytes),
        }
    }

    fn output(&mut self, stream: Stream, bytes: &[u8]) -> std::io::Result<()> {
        let mut rest = bytes;
        while let Some(end) = rest.iter().position(|&byte| byte == b'\n') {
            let mut line = std::mem::take(&mut self.open[slot(stream)]);
            line.extend_from_slice(&rest[..end]);
            self.line(stream, &line)?;
            line.clear();
            self.open[slot(stream)] = line;
            rest = &rest[end + 1..];
        }
        let mut open = std::mem::take(&mut self.open[slot(stream)]);
        open.extend_from_slice(rest);
        // A line without an end is written in parts, so that it never grows memory.
        while part_length(&open) < open.len() {
            let tail = open.split_off(part_length(&open));
            self.write(LineTag { stream, partial: true }, &open)?;
            open = tail;
        }
        self.open[slot(stream)] = open;
        Ok(())
    }

    fn line(&mut self, stream: Stream, line: &[u8]) -> std::io::Result<()> {
        let mut rest = line;
        while part_length(rest) < rest.len() {
            let (part, tail) = rest.split_at(part_length(rest));
            self.write(LineTag { stream, partial: true }, part)?;
            rest = tail;
        }
        self.write(LineTag { stream, partial: false }, rest)
    }

    fn write(&mut self, tag: LineTag, text: &[u8]) -> std::io::Result<()> {
        self.seq += 1;
        let mut out = String::with_capacity(text.len() + 48);
        Line { time: Utc::now(), seq: self.seq, tag, text: escape(text).into_owned() }.write_to(&mut out);
        self.out.write_all(out.as_bytes())
    }

    fn flush_open(&mut self) -> std::io::Result<()> {
        for stream in [Stream::Stdout, Stream::Stderr] {
            let open = std::mem::take(&mut self.open[slot(stream)]);
            if !open.is_empty() {
                self.line(stream, &open)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Shared(Arc<Mutex<Vec<u8>>>);

    impl Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    async fn written(messages: &[(Stream, &[u8])]) -> Vec<Line> {
        let out = Shared::default();
        let (log, writer) = open_on(out.clone()).unwrap();
        for (stream, bytes) in messages {
            log.output(*stream, bytes.to_vec()).await;
        }
        let count = log.lines().await.unwrap();
        drop(log);
        writer.finish().await.unwrap();
        let text = String::from_utf8(out.0.lock().unwrap().clone()).unwrap();
        let lines: Vec<_> = text.lines().map(|line| Line::parse(line).unwrap()).collect();
        assert_eq!(count, lines.len() as u64);
        lines
    }

    #[tokio::test]
    async fn lines_are_joined_across_chunks_and_numbered_without_holes() {
        let lines = written(&[
            (Stream::Stdout, b"one\ntw"),
            (Stream::Stderr, b"err\n"),
            (Stream::Stdout, b"o\nlast"),
        ])
        .await;
        let seen: Vec<_> = lines.iter().map(|line| (line.seq, line.tag.stream, line.text.as_str())).collect();
        assert_eq!(
            seen,
            [
                (1, Stream::Stdout, "one"),
                (2, Stream::Stderr, "err"),
                (3, Stream::Stdout, "two"),
                (4, Stream::Stdout, "last")
            ]
        );
    }

    #[tokio::test]
    async fn a_long_line_is_written_in_parts_that_join_to_what_was_said() {
        let long = "\u{20ac}".repeat(100_000);
        let mut sent = long.clone().into_bytes();
        sent.push(b'\n');
        for chunk in [sent.len(), 1000, 65_536] {
            let messages: Vec<_> = sent.chunks(chunk).map(|chunk| (Stream::Stdout, chunk)).collect();
            let lines = written(&messages).await;
            assert!(lines.iter().rev().skip(1).all(|line| line.tag.partial));
            assert!(!lines.last().unwrap().tag.partial);
            assert_eq!(lines.iter().map(|line| line.text.as_str()).collect::<String>(), long);
        }
    }
}
