//! A task's log as Nomad keeps it: frames of bytes with the file and offset they came from.

use std::time::Duration;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use bytes::{Buf, BytesMut};
use memchr::memchr;
use reqwest::Response;
use serde::Deserialize;
use tokio::time::Instant;

use super::client::{Client, Request};
use super::error::Error;

/// Nomad's heartbeat on a log comes every second; a log silent for longer is a connection that died unseen.
const SILENCE: Duration = Duration::from_secs(15);

/// The most bytes kept of a frame that is not whole: Nomad sends at most 64 KiB of data, in base64, in one.
const FRAME: usize = 1 << 20;

/// Where reading begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// This many bytes after the start.
    Start(u64),
    /// This many bytes before the end.
    End(u64),
}

/// Some bytes of a log.
#[derive(Debug, PartialEq, Eq)]
pub struct Frame {
    /// The bytes.
    pub data: Vec<u8>,
    /// The file they are from, as Nomad names it; a log that rotates has several.
    pub file: String,
    /// Where in that file the bytes end. Exact for a connection's first frame only: Nomad joins what it read in
    /// several goes and keeps the offset of the first.
    pub offset: u64,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Wire {
    #[serde(default)]
    data: Option<String>,
    #[serde(default)]
    file: String,
    #[serde(default)]
    offset: u64,
}

/// A log being read.
pub struct FrameStream {
    response: Response,
    frames: Frames,
    heard: Instant,
    doing: String,
}

impl Client {
    /// Opens a task's standard output; a task that has not started is [`super::Kind::NotFound`].
    ///
    /// Offsets count over the files that are left. Following goes on after the task is dead, and it is for the caller
    /// to end it; without it, reading ends at what is there.
    pub async fn task_log(
        &self,
        namespace: &str,
        allocation: &str,
        task: &str,
        origin: Origin,
        follow: bool,
    ) -> Result<FrameStream, Error> {
        let doing = format!("reading the log of task {task} of allocation {allocation}");
        let (from, offset) = match origin {
            Origin::Start(offset) => ("start", offset),
            Origin::End(offset) => ("end", offset),
        };
        let request = Request::get(&["client", "fs", "logs", allocation], doing.clone())
            .query("namespace", namespace)
            .query("task", task)
            .query("type", "stdout")
            .query("follow", follow)
            .query("origin", from)
            .query("offset", offset);
        let response = self.open(request, SILENCE).await?;
        Ok(FrameStream { response, frames: Frames::default(), heard: Instant::now(), doing })
    }
}

impl FrameStream {
    /// The next bytes; none at the end. Heartbeats come as frames without data. May be cancelled without loss.
    pub async fn next(&mut self) -> Result<Option<Frame>, Error> {
        loop {
            if let Some(frame) = self.frames.take().map_err(|error| Error::malformed(&self.doing, error))? {
                return Ok(Some(frame));
            }
            let chunk = tokio::time::timeout_at(self.heard + SILENCE, self.response.chunk());
            match chunk.await.map_err(|error| Error::unreachable(&self.doing, error))? {
                Ok(Some(chunk)) => self.frames.buffer.extend_from_slice(&chunk),
                Ok(None) if self.frames.buffer.is_empty() => return Ok(None),
                // Nomad writes the text of an error that comes late behind the frames.
                Ok(None) => return Err(Error::malformed(&self.doing, "it ends within a frame")),
                Err(error) => return Err(Error::unreachable(&self.doing, error.without_url())),
            }
            self.heard = Instant::now();
        }
    }
}

/// Frames as they come in: JSON objects without a separator.
#[derive(Default)]
struct Frames {
    buffer: BytesMut,
    /// How far the buffer was looked through for an end.
    seen: usize,
}

impl Frames {
    fn take(&mut self) -> Result<Option<Frame>, Box<dyn std::error::Error + Send + Sync>> {
        while let Some(at) = memchr(b'}', &self.buffer[self.seen..]) {
            self.seen += at + 1;
            let wire = match serde_json::from_slice::<Wire>(&self.buffer[..self.seen]) {
                Ok(wire) => wire,
                // The brace stands in a name.
                Err(error) if error.is_eof() => continue,
                Err(error) => return Err(error.into()),
            };
            let data = wire.data.map(|data| BASE64_STANDARD.decode(data)).transpose()?.unwrap_or_default();
            self.buffer.advance(self.seen);
            self.seen = 0;
            return Ok(Some(Frame { data, file: wire.file, offset: wire.offset }));
        }
        self.seen = self.buffer.len();
        if self.seen > FRAME { Err("a frame does not end".into()) } else { Ok(None) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TWO: &[u8] = br#"{"Data":"YQpi","File":"alloc/logs/a}b.stdout.0","Offset":3}{}"#;

    fn all(frames: &mut Frames) -> Vec<Frame> {
        std::iter::from_fn(|| frames.take().unwrap()).collect()
    }

    #[test]
    fn frames_are_whole_wherever_the_connection_tears_them() {
        for cut in 0..=TWO.len() {
            let mut frames = Frames::default();
            frames.buffer.extend_from_slice(&TWO[..cut]);
            let mut got = all(&mut frames);
            frames.buffer.extend_from_slice(&TWO[cut..]);
            got.extend(all(&mut frames));
            let data: Vec<_> = got.iter().map(|frame| (frame.data.as_slice(), frame.offset)).collect();
            assert_eq!(data, [(&b"a\nb"[..], 3), (b"", 0)], "{cut}");
            assert_eq!(got[0].file, "alloc/logs/a}b.stdout.0");
        }
    }

    #[test]
    fn what_is_no_frame_is_an_error() {
        let mut frames = Frames::default();
        frames.buffer.extend_from_slice(b"failed to stream}");
        assert!(frames.take().is_err());
    }
}
