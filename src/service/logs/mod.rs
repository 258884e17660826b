//! A job's log, from Nomad to any number of readers.
//!
//! Each task's log has one follower, started by the first reader and stopped after the last. It keeps the lines decoded
//! last in a ring that its readers share. Who is behind the ring reads the missing piece from Nomad by itself. The log of a
//! job that has ended is read from the archive, if it is there.
//!
//! Invariant: a line is shown exactly as written, once, in order, or the gap is named.
//! Invariant: memory is bounded by the settings, whatever a reader or a log does.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

use backon::{BackoffBuilder as _, ExponentialBuilder};
use chrono::{TimeDelta, Utc};
use futures_util::stream::{BoxStream, StreamExt as _};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use crate::archive::{self, Archive};
use crate::job::{Phase, Record, Status};
use crate::nomad::{self, Kind};

mod cursor;
mod decoder;
mod follower;
#[cfg(feature = "fuzz")]
pub(crate) mod fuzz;
mod message;
mod order;
mod reader;
mod ring;
mod tail;
mod tap;
mod text;

pub use cursor::{Cursor, InvalidCursor};
pub use message::{EndReason, Message};
pub use text::{Logs, Truncated};

pub(super) use tap::ARCHIVE_ASKED;

/// How much the hub may use.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The lines a follower keeps for its readers, in bytes.
    pub ring_bytes: usize,
    /// What a reader that is behind reads at once, in bytes.
    pub bite_bytes: usize,
    /// The connections to logs at once: Nomad allows 100 of one address, for everything.
    pub connections: usize,
    /// The logs read as text at once: each is held whole, up to its limit.
    pub texts: usize,
    /// How many readers that are behind may each hold a piece of their own at once.
    pub bites: usize,
    /// How long after a job's end its log is waited for.
    pub patience: Duration,
    /// Where the logs of ended jobs are, by namespace, if they are archived.
    pub archives: HashMap<String, Archive>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            ring_bytes: 2 << 20,
            bite_bytes: 1 << 20,
            connections: 48,
            texts: 4,
            bites: 64,
            patience: Duration::from_mins(1),
            archives: HashMap::new(),
        }
    }
}

/// Why a log could not be read.
#[derive(Debug, thiserror::Error)]
pub enum Unread {
    /// Nomad did not give it.
    #[error(transparent)]
    Nomad(#[from] nomad::Error),
    /// The archive, which may have it, did not say.
    #[error("the archive, which may have it, could not be read")]
    Archive(#[source] archive::Error),
    /// Others read, and none of them came to an end.
    #[error("too many logs are being read at once")]
    Busy,
    /// Nor did it in time.
    #[error("the archive, which may have it, did not answer in time")]
    Late,
}

impl Unread {
    /// Whether asking again may help.
    fn is_passing(&self) -> bool {
        match self {
            Self::Nomad(error) => error.is_passing(),
            Self::Archive(_) | Self::Late | Self::Busy => true,
        }
    }

    /// Whether nobody has it.
    fn is_unknown(&self) -> bool {
        matches!(self, Self::Nomad(error) if error.has_no_log())
    }

    fn is_forbidden(&self) -> bool {
        matches!(self, Self::Nomad(error) if error.kind == Kind::Forbidden)
    }
}

/// What a reader wants.
#[derive(Clone, Debug, Default)]
pub struct Request {
    /// Only these phases; all without.
    pub phases: Option<Vec<Phase>>,
    /// Only the last lines there are now, counted over the phases, and everything after; at most 10,000.
    pub tail: Option<u64>,
    /// Only what comes after; overrules `tail`.
    pub cursor: Option<Cursor>,
}

/// What the hub does, in numbers.
#[derive(Debug, Default)]
pub struct Counters {
    /// Followers there are.
    pub followers: AtomicI64,
    /// Readers there are.
    pub readers: AtomicI64,
    /// Bytes of logs read from Nomad.
    pub bytes: AtomicU64,
    /// Connections to logs opened.
    pub connections: AtomicU64,
    /// Times a follower's connection failed.
    pub reconnects: AtomicU64,
    /// Pieces that readers behind a ring read by themselves.
    pub catch_ups: AtomicU64,
}

impl Counters {
    fn follower(&self, change: i64) {
        self.followers.fetch_add(change, Ordering::Relaxed);
    }

    fn reader(&self, change: i64) {
        self.readers.fetch_add(change, Ordering::Relaxed);
    }

    fn read(&self, bytes: usize) {
        self.bytes.fetch_add(u64::try_from(bytes).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    fn connected(&self) {
        self.connections.fetch_add(1, Ordering::Relaxed);
    }

    fn reconnected(&self) {
        self.reconnects.fetch_add(1, Ordering::Relaxed);
    }

    fn caught_up(&self) {
        self.catch_ups.fetch_add(1, Ordering::Relaxed);
    }
}

struct Inner {
    nomad: nomad::Client,
    settings: Settings,
    places: tap::Places,
    texts: Arc<Semaphore>,
    /// Turns for what a reader behind its ring holds by itself.
    bites: Arc<Semaphore>,
    counters: Arc<Counters>,
    followers: follower::Followers,
}

/// All logs that are being read. Cheap to clone.
#[derive(Clone)]
pub struct Hub(Arc<Inner>);

impl Hub {
    /// A hub that reads nothing yet.
    pub fn new(nomad: nomad::Client, settings: Settings) -> Self {
        let places = tap::Places::new(settings.connections);
        let [texts, bites] = [settings.texts, settings.bites].map(|turns| Arc::new(Semaphore::new(turns)));
        let followers = follower::Followers::default();
        Self(Arc::new(Inner { nomad, settings, places, texts, bites, counters: Arc::default(), followers }))
    }

    /// What the hub does, in numbers.
    pub fn counters(&self) -> Arc<Counters> {
        Arc::clone(&self.0.counters)
    }

    /// Reads a job's log: its status at each change, its phases' lines in order, gaps by name, and an end.
    ///
    /// Nothing is read ahead of the reader but what all readers share; dropping the stream lets go of everything.
    pub fn read(
        &self,
        record: watch::Receiver<Arc<Record>>,
        request: Request,
    ) -> Result<BoxStream<'static, Message>, InvalidCursor> {
        let reader = reader::Reader::new(Arc::clone(&self.0), record, request)?;
        let step = async |mut reader: reader::Reader| Some((reader.next().await?, reader));
        Ok(futures_util::stream::unfold(reader, step).boxed())
    }

    /// A job's log as it is now, as text; of each phase at most so many bytes, the last ones. Waits where others read. The
    /// turn is to be held as long as the text is: that is what bounds them.
    pub async fn text(
        &self,
        record: &Record,
        phases: Option<&[Phase]>,
        tail: Option<usize>,
        max_bytes: usize,
    ) -> Result<(Logs, OwnedSemaphorePermit), Unread> {
        let turn = tokio::time::timeout(TURN, Arc::clone(&self.0.texts).acquire_owned()).await;
        // The semaphore is never closed.
        let turn = turn.ok().and_then(Result::ok).ok_or(Unread::Busy)?;
        Ok((text::read(&self.0, record, &self::phases(phases), tail, max_bytes).await?, turn))
    }
}

/// How long a text waits for its turn.
const TURN: Duration = Duration::from_secs(30);

/// How long after a job's end its log may still be on its way into the archive.
const ARCHIVED: TimeDelta = TimeDelta::seconds(180);

impl Inner {
    /// Whether a log that Nomad no longer has may still come to be in the archive.
    fn may_be_archived(&self, record: &Record) -> bool {
        let end = record.timestamps.job_end;
        self.settings.archives.contains_key(&record.nomad.namespace)
            && end.is_none_or(|end| Utc::now() - end < ARCHIVED)
    }

    /// Whether a job was killed so recently that its runner may not have heard of it.
    fn was_just_killed(&self, record: &Record) -> bool {
        let since = record.timestamps.job_end.and_then(|end| (Utc::now() - end).to_std().ok());
        record.status == Status::Killed && since.is_none_or(|since| since < self.settings.patience)
    }
}

/// The phases of a filter, in the order they run.
fn phases(filter: Option<&[Phase]>) -> Vec<Phase> {
    Phase::ALL.into_iter().filter(|phase| filter.is_none_or(|filter| filter.contains(phase))).collect()
}

/// How long to wait before each further try.
fn retries() -> impl Iterator<Item = Duration> {
    ExponentialBuilder::default()
        .with_jitter()
        .with_min_delay(Duration::from_millis(100))
        .with_max_delay(Duration::from_secs(1))
        .without_max_times()
        .build()
}

/// Something about some phases.
type ByPhase<T> = BTreeMap<Phase, T>;
