//! The event stream: newline-delimited JSON, `{}` as heartbeat.
//!
//! Invariant: a hint, never the truth. Nomad resumes a client whose index has left the buffer at the closest one
//! without an error, so whoever listens also lists.

use std::time::Duration;

use bytes::{Buf, BytesMut};
use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use memchr::memchr;
use reqwest::Response;
use serde::Deserialize;
use tokio::time::Instant;

use super::client::{Client, Request};
use super::error::Error;
use super::types::{Allocation, Evaluation, Job};

/// Nomad's heartbeat comes every 30 s; a stream silent for longer is a connection that died unseen.
const SILENCE: Duration = Duration::from_secs(45);

/// The longest line taken. A node that comes back tells of all its allocations in one, some KB each; what is longer still is
/// listed instead.
const LINE: usize = 16 << 20;

/// One event.
#[derive(Debug)]
pub enum Event {
    /// A job was registered, changed, stopped or purged.
    Job(Box<Job>),
    /// A job was purged.
    JobGone {
        /// Its ID.
        id: String,
    },
    /// An allocation was made or changed.
    Allocation(Box<Allocation>),
    /// An evaluation was made or changed.
    Evaluation(Box<Evaluation>),
}

/// What one line of the stream says.
#[derive(Debug)]
pub struct Heard {
    /// Nomad's index of these events.
    pub index: u64,
    /// The events, those of other topics left out.
    pub events: Vec<Event>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Batch {
    #[serde(default)]
    index: u64,
    #[serde(default)]
    events: Vec<Wire>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Wire {
    topic: String,
    #[serde(rename = "Type", default)]
    kind: String,
    #[serde(default)]
    key: String,
    payload: Payload,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Payload {
    job: Option<Box<Job>>,
    allocation: Option<Box<Allocation>>,
    evaluation: Option<Box<Evaluation>>,
}

/// An event stream, open or on its way to be. An error ends it.
pub struct EventStream {
    opening: BoxFuture<'static, Result<Response, Error>>,
    response: Option<Response>,
    lines: Lines,
    /// When it has been silent for too long. Kept from call to call, as each of them may be given up.
    deadline: Instant,
}

impl Client {
    /// Opens the stream of jobs, allocations and evaluations from an index on, as far as Nomad still has it; 0 is the
    /// oldest that it has.
    pub fn events(&self, namespace: &str, index: u64) -> EventStream {
        let doing = format!("opening the event stream of namespace {namespace:?}");
        let request = Request::get(&["event", "stream"], doing)
            .query("namespace", namespace)
            .query("index", index)
            .query("topic", "Job")
            .query("topic", "Allocation")
            .query("topic", "Evaluation");
        let client = self.clone();
        let opening = async move { client.open(request, SILENCE).await };
        let deadline = Instant::now() + SILENCE;
        EventStream { opening: opening.boxed(), response: None, lines: Lines::default(), deadline }
    }
}

impl EventStream {
    /// Waits until Nomad has begun the stream; versions before 1.11 do so with the first event.
    pub async fn opened(&mut self) -> Result<(), Error> {
        self.response().await.map(drop)
    }

    async fn response(&mut self) -> Result<&mut Response, Error> {
        match self.response {
            Some(ref mut response) => Ok(response),
            // Goes on where an earlier wait was given up.
            None => Ok(self.response.insert((&mut self.opening).await?)),
        }
    }

    /// The next line. An error at the stream's end, and when it is silent for too long.
    pub async fn next(&mut self) -> Result<Heard, Error> {
        const DOING: &str = "reading the event stream";
        loop {
            if let Some(line) = self.lines.take() {
                return parse(&line).map_err(|error| Error::malformed(DOING, error));
            }
            if self.lines.buffer.len() > LINE {
                return Err(Error::malformed(DOING, "a line of it does not end"));
            }
            let deadline = self.deadline;
            let response = self.response().await?;
            let chunk = tokio::time::timeout_at(deadline, response.chunk());
            match chunk.await.map_err(|error| Error::unreachable(DOING, error))? {
                Ok(Some(chunk)) => {
                    self.deadline = Instant::now() + SILENCE;
                    self.lines.buffer.extend_from_slice(&chunk);
                }
                Ok(None) => return Err(Error::unreachable(DOING, "it ended")),
                Err(error) => return Err(Error::unreachable(DOING, error.without_url())),
            }
        }
    }
}

/// Lines as they come in.
#[derive(Default)]
struct Lines {
    buffer: BytesMut,
    /// How far the buffer was looked through for an end: a line of MBs comes in hundreds of pieces.
    seen: usize,
}

impl Lines {
    fn take(&mut self) -> Option<BytesMut> {
        let Some(at) = memchr(b'\n', &self.buffer[self.seen..]) else {
            self.seen = self.buffer.len();
            return None;
        };
        let line = self.buffer.split_to(self.seen + at);
        self.buffer.advance(1);
        self.seen = 0;
        Some(line)
    }
}

fn parse(line: &[u8]) -> Result<Heard, serde_json::Error> {
    let batch: Batch = serde_json::from_slice(line)?;
    let events = batch.events.into_iter().filter_map(|wire| match wire.topic.as_str() {
        "Job" if wire.kind == "JobDeregistered" && !is_left(wire.payload.job.as_deref(), batch.index) => {
            Some(Event::JobGone { id: wire.key })
        }
        "Job" => wire.payload.job.map(Event::Job),
        "Allocation" => wire.payload.allocation.map(Event::Allocation),
        "Evaluation" => wire.payload.evaluation.map(Event::Evaluation),
        _ => None,
    });
    Ok(Heard { index: batch.index, events: events.collect() })
}

/// Whether a deregistered job is still there, stopped: a purge shows the job as it was before, with an older index.
fn is_left(job: Option<&Job>, index: u64) -> bool {
    job.is_some_and(|job| !job.id.is_empty() && job.modify_index >= index)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn lines_are_the_same_in_whatever_pieces_they_come_and_no_byte_is_looked_at_twice(
            text in "[a\n]{0,40}", cuts in prop::collection::vec(0..40_usize, 0..8),
        ) {
            let mut lines = Lines::default();
            let mut cuts: Vec<_> = cuts.into_iter().map(|cut| cut.min(text.len())).collect();
            cuts.extend([0, text.len()]);
            cuts.sort_unstable();
            let mut taken = Vec::new();
            for piece in cuts.windows(2) {
                lines.buffer.extend_from_slice(&text.as_bytes()[piece[0]..piece[1]]);
                while let Some(line) = lines.take() {
                    taken.push(String::from_utf8(line.to_vec()).unwrap());
                }
                prop_assert_eq!(lines.seen, lines.buffer.len());
            }
            let mut wanted: Vec<_> = text.split('\n').map(str::to_owned).collect();
            prop_assert_eq!(wanted.pop().map(String::into_bytes), Some(lines.buffer.to_vec()));
            prop_assert_eq!(taken, wanted);
        }
    }

    #[test]
    fn a_heartbeat_says_nothing() {
        let heard = parse(b"{}").unwrap();
        assert!(heard.events.is_empty() && heard.index == 0);
    }

    #[test]
    fn a_purge_is_told_from_a_stop_by_the_index_of_the_job() {
        let heard = |modified: u64| {
            let job = serde_json::json!({"ID": "a", "Stop": true, "ModifyIndex": modified});
            let event = serde_json::json!({
                "Topic": "Job", "Type": "JobDeregistered", "Key": "a", "Payload": {"Job": job},
            });
            let line = serde_json::json!({"Index": 41, "Events": [event]}).to_string();
            parse(line.as_bytes()).unwrap().events.pop().unwrap()
        };
        assert!(matches!(heard(41), Event::Job(_)));
        assert!(matches!(heard(35), Event::JobGone { .. }));
    }
}
