//! The phase's log: tools' output and the runner's own words, stamped and written to standard output.
//!
//! Invariant: one thread writes, so lines never interleave, and sequence numbers have no holes. The queue before it is
//! bounded: a slow reader of our output slows the tool, it never grows memory. A line that nobody takes any more is lost and
//! counted, so that who reads the log is told of it.

#[cfg(any(test, feature = "fuzz"))]
mod hidden;
mod lines;

use std::borrow::Cow;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom, Write};
use std::os::fd::AsFd as _;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::Instant;

use aho_corasick::BuildError;
use tokio::sync::{mpsc, oneshot};
use tokio_util::task::TaskTracker;

use super::mask::Masker;
use crate::engine::{self, Output};
use crate::job::Stream;
use lines::Lines;

#[cfg(feature = "fuzz")]
pub(crate) use hidden::fuzz_mask;

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
    /// Those who pass on what an engine says.
    passing: TaskTracker,
    masker: Arc<OnceLock<Masker>>,
}

/// The thread that writes.
pub(super) struct Writer {
    thread: JoinHandle<()>,
}

/// Opens the log on standard output. Where what an earlier run wrote there is torn, its line is ended first.
pub(super) fn open(is_torn: bool) -> std::io::Result<(Log, Writer)> {
    // Without the standard library's own buffer: what became of a write is to be known.
    let out = File::from(std::io::stdout().as_fd().try_clone_to_owned()?);
    open_on(out, is_torn)
}

/// Whether a task's log, in Nomad's files, ends within a line: its node went down while it wrote. What is not known is taken for
/// whole.
pub(super) fn is_torn(files: &Path, task: &str) -> bool {
    let prefix = format!("{task}.stdout.");
    let index = |name: &OsStr| name.to_str()?.strip_prefix(&prefix)?.parse::<u64>().ok();
    let entries = std::fs::read_dir(files).into_iter().flatten().flatten();
    let last = entries.filter_map(|entry| Some((index(&entry.file_name())?, entry.path()))).max();
    let last_byte = |path: &Path| {
        let mut file = File::open(path)?;
        file.seek(SeekFrom::End(-1))?;
        let mut byte = [0];
        file.read_exact(&mut byte)?;
        std::io::Result::Ok(byte[0])
    };
    last.is_some_and(|(_, path)| last_byte(&path).is_ok_and(|byte| byte != b'\n'))
}

fn open_on(out: impl Write + Send + 'static, is_torn: bool) -> std::io::Result<(Log, Writer)> {
    let (queue, messages) = mpsc::channel(256);
    let masker = Arc::<OnceLock<Masker>>::default();
    let lines = Lines::new(out, is_torn, Arc::clone(&masker));
    // Of its own, as what is written may block.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
    let write = move || runtime.block_on(write_all(lines, messages));
    let thread = std::thread::Builder::new().name("log".to_owned()).spawn(write)?;
    Ok((Log { queue, passing: TaskTracker::new(), masker }, Writer { thread }))
}

impl Log {
    /// Hides secrets in all that is written from now on. A task is given its secrets once.
    pub(super) fn hide<'a>(&self, secrets: impl IntoIterator<Item = &'a [u8]>) -> Result<(), BuildError> {
        let masker = Masker::new(secrets)?;
        // Those of a task are the same each time that they are read.
        self.masker.set(masker).ok();
        Ok(())
    }

    /// A text without the secrets.
    pub(super) fn masked(&self, text: &str) -> String {
        let masked = self.masker.get().map_or(Cow::Borrowed(text.as_bytes()), |m| m.mask(text.as_bytes()));
        String::from_utf8_lossy(&masked).into_owned()
    }

    /// Takes bytes of a tool's output, waiting for room.
    pub(super) async fn output(&self, stream: Stream, bytes: Vec<u8>) {
        // The writer outlives every log.
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

    /// Gives work a queue for an engine's output and writes what comes; done when both are.
    pub(super) async fn with_output<T>(&self, work: impl AsyncFnOnce(mpsc::Sender<Output>) -> T) -> T {
        let (sender, mut receiver) = mpsc::channel::<Output>(64);
        let log = self.clone();
        // By itself: work that is given up still shows what it said.
        let passing = self.passing.spawn(async move {
            while let Some(output) = receiver.recv().await {
                let stream = match output.stream {
                    engine::Stream::Stdout => Stream::Stdout,
                    engine::Stream::Stderr => Stream::Stderr,
                };
                log.output(stream, output.bytes).await;
            }
        });
        let done = work(sender).await;
        // It only ends with the queue.
        passing.await.ok();
        done
    }

    /// Waits until all that work said is passed on, also that of work that was given up.
    pub(super) async fn settled(&self) {
        self.passing.close();
        self.passing.wait().await;
        self.passing.reopen();
    }

    /// How many lines there are, written or lost.
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
        let joined = tokio::task::spawn_blocking(|| self.thread.join()).await;
        joined.map_err(std::io::Error::other)?.map_err(|_| std::io::Error::other("the log's thread panicked"))
    }
}

async fn write_all(mut lines: Lines<impl Write>, mut messages: mpsc::Receiver<Message>) {
    loop {
        let next = match lines.due() {
            None => Ok(messages.recv().await),
            Some(due) => tokio::time::timeout_at(due.into(), messages.recv()).await,
        };
        match next {
            Ok(Some(message)) => {
                lines.take(message);
                while let Ok(message) = messages.try_recv() {
                    lines.take(message);
                }
            }
            Ok(None) => break,
            // Nothing came before something was due.
            Err(_) => {}
        }
        lines.show_open(Instant::now());
        lines.flush();
    }
    lines.flush_open();
    lines.flush();
}

#[cfg(test)]
mod tests {
    use std::io::ErrorKind;
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::job::{Line, PART};

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

    /// Takes so many bytes, then none for one attempt, then everything.
    struct Breaks(Shared, usize);

    impl Write for Breaks {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            match self.1 {
                0 => {
                    self.1 = usize::MAX;
                    Err(ErrorKind::BrokenPipe.into())
                }
                most => {
                    let taken = self.0.write(&bytes[..most.min(bytes.len())])?;
                    self.1 = if most == usize::MAX { most } else { most - taken };
                    Ok(taken)
                }
            }
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[tokio::test]
    async fn lines_that_nobody_takes_are_counted_and_those_behind_them_are_whole() {
        for taken in [0, 10, 40, 41, 60, 70] {
            let out = Shared::default();
            let (log, writer) = open_on(Breaks(out.clone(), taken), false).unwrap();
            for line in ["one\n", "two\n", "three\n"] {
                log.output(Stream::Stdout, line.as_bytes().to_vec()).await;
                // Each is written by itself.
                log.lines().await.unwrap();
            }
            let count = log.lines().await.unwrap();
            drop(log);
            writer.finish().await.unwrap();
            let text = String::from_utf8(out.0.lock().unwrap().clone()).unwrap();
            let lines: Vec<_> = text.lines().filter_map(Line::parse).map(|line| line.seq).collect();
            assert_eq!(lines.last(), Some(&count), "{taken}: {text}");
            assert!(lines.is_sorted() && (lines.len() as u64) < count, "{taken}: {text}");
        }
    }

    async fn written(messages: &[(Stream, &[u8])]) -> Vec<Line> {
        let out = Shared::default();
        let (log, writer) = open_on(out.clone(), false).unwrap();
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
    async fn a_secret_is_hidden_however_its_bytes_arrive() {
        let secret = "s3cr3t-of-a-job";
        let filler = "x".repeat(150_000);
        let text = format!("one {secret} two\n{filler}{secret}{filler}\n{secret}");
        for chunk in [1, 2, 7, 16, 1000, 65_530, 65_536, text.len()] {
            let out = Shared::default();
            let (log, writer) = open_on(out.clone(), false).unwrap();
            log.hide([secret.as_bytes()]).unwrap();
            for bytes in text.as_bytes().chunks(chunk) {
                log.output(Stream::Stdout, bytes.to_vec()).await;
            }
            drop(log);
            writer.finish().await.unwrap();
            let written = String::from_utf8(out.0.lock().unwrap().clone()).unwrap();
            let mut joined = String::new();
            for line in written.lines().map(|line| Line::parse(line).unwrap()) {
                assert!(line.text.len() <= PART);
                joined += &line.text;
                joined += if line.tag.partial { "" } else { "\n" };
            }
            assert_eq!(joined, format!("one *** two\n{filler}***{filler}\n***\n"), "{chunk}");
        }
    }

    #[tokio::test]
    async fn what_has_no_line_end_is_shown_in_a_moment_and_joins_to_what_was_said() {
        let out = Shared::default();
        let (log, writer) = open_on(out.clone(), false).unwrap();
        let shown = || {
            let text = String::from_utf8(out.0.lock().unwrap().clone()).unwrap();
            text.lines().map(|line| Line::parse(line).unwrap()).collect::<Vec<_>>()
        };
        let until = async |count: usize| {
            let seen = async {
                while shown().len() < count {
                    tokio::time::sleep(std::time::Duration::from_millis(10)).await;
                }
            };
            tokio::time::timeout(std::time::Duration::from_secs(30), seen).await.unwrap();
        };
        // The last character comes in two pieces.
        log.output(Stream::Stdout, b"ready? \xe2\x82".to_vec()).await;
        until(1).await;
        log.output(Stream::Stdout, b"\xac yes\n".to_vec()).await;
        log.output(Stream::Stderr, b"...".to_vec()).await;
        until(3).await;
        log.say("done").await;
        let count = log.lines().await.unwrap();
        drop(log);
        writer.finish().await.unwrap();
        let lines = shown();
        let seen: Vec<_> = lines.iter().map(|line| (line.text.as_str(), line.tag.partial)).collect();
        assert_eq!(
            seen,
            [("ready? ", true), ("\u{20ac} yes", false), ("...", true), ("", false), ("done", false)]
        );
        assert_eq!(count, lines.len() as u64);
    }

    #[tokio::test]
    async fn what_may_be_the_begin_of_a_secret_is_not_shown_before_its_line_ends() {
        let secret = "s3cr3t-of-a-job";
        let out = Shared::default();
        let (log, writer) = open_on(out.clone(), false).unwrap();
        log.hide([secret.as_bytes()]).unwrap();
        let filler = "x".repeat(2000);
        log.output(Stream::Stdout, format!("{filler}{}", &secret[..9]).into_bytes()).await;
        let shown = || String::from_utf8(out.0.lock().unwrap().clone()).unwrap();
        let seen = async {
            while shown().is_empty() {
                tokio::time::sleep(std::time::Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(std::time::Duration::from_secs(30), seen).await.unwrap();
        log.output(Stream::Stdout, format!("{}\n", &secret[9..]).into_bytes()).await;
        drop(log);
        writer.finish().await.unwrap();
        let joined: String = shown().lines().map(|line| Line::parse(line).unwrap().text).collect();
        assert_eq!(joined, format!("{filler}***"));
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
