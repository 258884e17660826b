//! One connection to one task's log, at a place that was verified.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use chrono::{DateTime, Utc};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

use super::cursor::Position;
use super::decoder::{Decoder, Entry};
use super::{Counters, Inner, Unread};
use crate::archive::{Archive, Index, LogReader};
use crate::job::{JobId, Phase, Record};
use crate::nomad::{Allocation, Client, Error, Frame, FrameStream, Kind, Origin};

/// How long a place in a log may take to show its first line before it is held to be the wrong place.
const PROOF: Duration = Duration::from_secs(3);

/// How long lines are held until earlier ones come, which somebody else may have yet to write out: Nomad's collectors of logs do so
/// ten times a second.
const HELD: Duration = Duration::from_secs(1);

/// How long the archive is asked before Nomad is.
pub(in crate::service) const ARCHIVE_ASKED: Duration = Duration::from_secs(5);

/// One task's log.
#[derive(Clone)]
pub(super) struct Target {
    nomad: Client,
    archive: Option<Archive>,
    namespace: String,
    job: JobId,
    pub(super) allocation: String,
    pub(super) phase: Phase,
    /// Whether the job has ended: then the archive is asked first, since what it has is whole.
    pub(super) ended: bool,
}

impl Target {
    /// A phase's log.
    pub(super) fn of(inner: &Inner, record: &Record, phase: Phase) -> Self {
        Self {
            nomad: inner.nomad.clone(),
            archive: inner.settings.archives.get(&record.nomad.namespace).cloned(),
            namespace: record.nomad.namespace.clone(),
            job: record.id.clone(),
            allocation: record.allocation_of(phase).unwrap_or_default().to_owned(),
            phase,
            ended: record.status.is_final(),
        }
    }

    /// How often the task was started in its allocation; none where nobody knows.
    pub(super) async fn starts(&self) -> Result<Option<usize>, Unread> {
        if let Some(log) = self.index().await.and_then(|logs| logs.get(&self.phase).copied()) {
            return Ok(usize::try_from(log.runs).ok());
        }
        let starts = |found: Allocation| {
            let task = found.task_states.get(self.phase.as_str())?;
            Some(task.events.iter().filter(|event| event.kind == "Started").count())
        };
        Ok(self.allocation().await?.and_then(starts))
    }

    /// Which logs the archive has of an ended job; none where it does not say, which is as good as no archive.
    async fn index(&self) -> Option<Index> {
        let archive = self.archive.as_ref().filter(|_| self.ended)?;
        let asked = tokio::time::timeout(ARCHIVE_ASKED, archive.index(&self.job, &self.allocation)).await;
        asked.ok().and_then(Result::ok).flatten()
    }

    /// Whether this log is one of those that were archived; none where nothing was, or nobody knows.
    pub(super) async fn is_archived(&self) -> Option<bool> {
        self.index().await.map(|logs| logs.contains_key(&self.phase))
    }

    /// Whether Nomad no longer has the job.
    pub(super) async fn is_purged(&self) -> Result<bool, Error> {
        match self.nomad.job(&self.namespace, self.job.as_str()).await {
            Err(error) if error.kind == Kind::NotFound => Ok(true),
            found => found.map(|_| false),
        }
    }

    /// The allocation as Nomad has it; none where Nomad has forgotten it.
    pub(super) async fn allocation(&self) -> Result<Option<Allocation>, Error> {
        match self.nomad.allocation(&self.namespace, &self.allocation).await {
            Err(error) if error.kind == Kind::NotFound => Ok(None),
            found => found.map(Some),
        }
    }
}

/// Where the bytes of a position may be found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hint {
    /// Nowhere in particular.
    None,
    /// The line at `position.seq` begins here.
    Line(u64),
    /// The line lies within this many bytes before the end, or it did.
    End(u64),
}

/// A position, and where its bytes may be found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mark {
    pub(super) position: Position,
    pub(super) hint: Hint,
    /// When the line there was written; none where that is not known.
    pub(super) time: Option<DateTime<Utc>>,
}

impl Mark {
    pub(super) const START: Self = Self::at(Position { run: 0, seq: 0, sub: 0 }, Hint::None);

    pub(super) const fn at(position: Position, hint: Hint) -> Self {
        Self { position, hint, time: None }
    }

    /// After a line.
    pub(super) fn after(entry: &Entry) -> Self {
        let hint = entry.offset.map_or(Hint::None, Hint::Line);
        Self { position: entry.position, hint, time: Some(entry.time) }
    }

    /// How many lines are known of those that a phase's runner counted: none where the last one is of an earlier run.
    pub(super) fn counted(&self, record: &Record, phase: Phase) -> u64 {
        let is_earlier = record.lines[phase as usize].is_some_and(|lines| self.position.seq > lines)
            && self.time.is_some()
            && !record.wrote_since_it_began(phase, self.time);
        if is_earlier { 0 } else { self.position.seq }
    }

    /// Whether this is behind all the lines that a phase's runner counted. Those of an earlier run are not what it counted,
    /// and came before it began.
    pub(super) fn is_behind_all(&self, record: &Record, phase: Phase) -> bool {
        let Some(lines) = record.lines[phase as usize] else { return false };
        self.position.seq >= lines && (lines == 0 || record.wrote_since_it_began(phase, self.time))
    }
}

/// The places for connections to logs: Nomad allows 100 connections of one address.
pub(super) struct Places {
    free: Arc<Semaphore>,
    waiting: AtomicUsize,
}

/// A place, given back when dropped.
pub(super) struct Place {
    _permit: Option<OwnedSemaphorePermit>,
    since: Instant,
}

impl Places {
    pub(super) fn new(count: usize) -> Self {
        Self { free: Arc::new(Semaphore::new(count)), waiting: AtomicUsize::new(0) }
    }

    /// Waits for a place; who waits longest comes first.
    async fn take(&self) -> Place {
        let waiting = Waiting::new(&self.waiting);
        // The semaphore is never closed.
        let permit = Arc::clone(&self.free).acquire_owned().await.ok();
        drop(waiting);
        Place { _permit: permit, since: Instant::now() }
    }

    /// Whether a place has been held for its turn and somebody waits for one.
    fn is_due(&self, place: &Place, turn: Duration) -> bool {
        self.waiting.load(Ordering::Relaxed) > 0 && place.since.elapsed() >= turn
    }
}

/// Counts one that waits, also when it gives up.
struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Where the bytes come from.
enum Frames {
    Nomad(FrameStream),
    Archive(LogReader),
}

impl Frames {
    async fn next(&mut self) -> Result<Option<Frame>, Unread> {
        match self {
            Self::Nomad(frames) => Ok(frames.next().await?),
            // One file, whatever the log was in.
            Self::Archive(log) => Ok(log.next().await.map_err(Unread::Archive)?.map(|(bytes, end)| Frame {
                data: bytes.into(),
                file: "archive.0".to_owned(),
                offset: end,
            })),
        }
    }
}

/// An open log.
pub(super) struct Tap {
    frames: Frames,
    decoder: Decoder,
    /// Decoded while the place was verified.
    first: Vec<Entry>,
    after: Position,
    bytes: u64,
    place: Place,
    /// Whether more may come than there is.
    follow: bool,
    /// Behind which line the next one is missing while later ones are held, and since when.
    held: Option<((u32, u64), Instant)>,
}

impl Tap {
    /// Opens a log after a mark; where its hint does not hold, from the start.
    pub(super) async fn open(
        target: &Target,
        places: &Places,
        counters: &Counters,
        mark: Mark,
        follow: bool,
    ) -> Result<Self, Unread> {
        let place = places.take().await;
        let hinted = match mark.hint {
            Hint::None | Hint::Line(0) => None,
            Hint::Line(offset) => {
                let decoder = Decoder::from_line(mark.position, offset, Utc::now());
                Some((Origin::Start(offset), decoder))
            }
            Hint::End(bytes) => {
                Some((Origin::End(bytes), Decoder::from_anywhere(mark.position.run, Utc::now())))
            }
        };
        if let Some((origin, decoder)) = hinted {
            match Self::prove(target, counters, mark, origin, decoder, follow).await {
                Ok(Some((frames, decoder, first, bytes))) => {
                    return Ok(Self {
                        frames,
                        decoder,
                        first,
                        after: mark.position,
                        bytes,
                        place,
                        follow,
                        held: None,
                    });
                }
                // A hint may come from a cursor: what Nomad says to it is not what it says to the log.
                Ok(None) => {}
                Err(error) if !error.is_passing() => {}
                Err(error) => return Err(error),
            }
        }
        let frames = connect(target, counters, Origin::Start(0), follow).await?;
        let decoder = Decoder::from_start(Utc::now());
        Ok(Self {
            frames,
            decoder,
            first: Vec::new(),
            after: mark.position,
            bytes: 0,
            place,
            follow,
            held: None,
        })
    }

    /// Opens a log some bytes before its end, to see what is there.
    pub(super) async fn open_end(
        target: &Target,
        places: &Places,
        counters: &Counters,
        bytes: u64,
    ) -> Result<Self, Unread> {
        let place = places.take().await;
        let frames = connect(target, counters, Origin::End(bytes), false).await?;
        let decoder = Decoder::from_anywhere(0, Utc::now());
        let after = Position::default();
        Ok(Self { frames, decoder, first: Vec::new(), after, bytes: 0, place, follow: false, held: None })
    }

    /// Opens a hinted place and reads its first line; none when it is not the line it should be.
    async fn prove(
        target: &Target,
        counters: &Counters,
        mark: Mark,
        origin: Origin,
        mut decoder: Decoder,
        follow: bool,
    ) -> Result<Option<(Frames, Decoder, Vec<Entry>, u64)>, Unread> {
        let mut frames = connect(target, counters, origin, follow).await?;
        let mut first = Vec::new();
        let mut bytes = 0;
        let until = Instant::now() + PROOF;
        while first.is_empty() {
            let Ok(frame) = tokio::time::timeout_at(until, frames.next()).await else { return Ok(None) };
            let Some(frame) = frame? else { return Ok(None) };
            bytes += count(frame.data.len());
            counters.read(frame.data.len());
            decoder.feed(&frame, &mut first);
        }
        let Position { run, seq, .. } = mark.position;
        let holds = |entry: &Entry| match origin {
            Origin::Start(_) => entry.position == Position { run, seq, sub: 0 },
            Origin::End(_) => entry.position.run == run && entry.position.seq <= seq.saturating_add(1),
        };
        Ok(first.first().is_some_and(holds).then_some((frames, decoder, first, bytes)))
    }

    /// The next lines, perhaps none; nothing at the log's end. May be cancelled without loss.
    pub(super) async fn next(&mut self, counters: &Counters) -> Result<Option<Vec<Entry>>, Unread> {
        let mut entries = std::mem::take(&mut self.first);
        if entries.is_empty() {
            let until = self.held.filter(|_| self.follow).map(|(_, since)| since + HELD);
            let next = match until {
                Some(until) => tokio::time::timeout_at(until, self.frames.next()).await.ok(),
                None => Some(self.frames.next().await),
            };
            if let Some(next) = next {
                let Some(frame) = next? else { return Ok(None) };
                self.bytes += count(frame.data.len());
                counters.read(frame.data.len());
                self.decoder.feed(&frame, &mut entries);
            }
            if until.is_some_and(|until| until <= Instant::now()) {
                self.decoder.release(&mut entries);
            }
        }
        self.held = self.decoder.waits_for().map(|line| match self.held {
            Some((before, since)) if before == line => (line, since),
            _ => (line, Instant::now()),
        });
        Ok(Some(self.news(entries)))
    }

    /// Whether lines are held.
    pub(super) fn is_holding(&self) -> bool {
        self.held.is_some()
    }

    /// The lines that are held until earlier ones come, at the end of what there is.
    pub(super) fn release(&mut self) -> Vec<Entry> {
        let mut entries = Vec::new();
        self.decoder.release(&mut entries);
        self.news(entries)
    }

    /// What stands behind the last line end, once nobody writes any more.
    pub(super) fn finish(&mut self) -> Vec<Entry> {
        let mut entries = Vec::new();
        self.decoder.finish(&mut entries);
        self.news(entries)
    }

    /// Whether everything that ever will be there is read at its end.
    pub(super) fn is_archived(&self) -> bool {
        matches!(self.frames, Frames::Archive(_))
    }

    /// How many bytes were read.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether somebody else should have this connection's place.
    pub(super) fn is_due(&self, places: &Places, turn: Duration) -> bool {
        // Who waits for a line has to be there when that is over.
        self.held.is_none() && places.is_due(&self.place, turn)
    }

    fn news(&self, mut entries: Vec<Entry>) -> Vec<Entry> {
        let known = entries.iter().take_while(|entry| entry.position <= self.after).count();
        entries.drain(..known);
        entries
    }
}

fn count(length: usize) -> u64 {
    u64::try_from(length).unwrap_or(u64::MAX)
}

async fn connect(
    target: &Target,
    counters: &Counters,
    origin: Origin,
    follow: bool,
) -> Result<Frames, Unread> {
    let Target { nomad, archive, namespace, job, allocation, phase, ended } = target;
    let mut unread = None;
    if let Some(archive) = archive.as_ref().filter(|_| *ended) {
        let begin = |bytes: u64| match origin {
            Origin::Start(offset) => offset,
            Origin::End(offset) => bytes.saturating_sub(offset),
        };
        match tokio::time::timeout(ARCHIVE_ASKED, archive.read_log(job, allocation, *phase, begin)).await {
            Ok(Ok(Some(log))) => return Ok(Frames::Archive(log)),
            Ok(Ok(None)) => {}
            Ok(Err(error)) => unread = Some(Unread::Archive(error)),
            Err(_) => unread = Some(Unread::Late),
        }
    }
    match nomad.task_log(namespace, allocation, phase.as_str(), origin, follow).await {
        Ok(frames) => {
            counters.connected();
            Ok(Frames::Nomad(frames))
        }
        // That Nomad no longer has it says nothing of what the archive has.
        Err(error) => Err(unread.unwrap_or_else(|| error.into())),
    }
}
