//! Logs in the archive: written once, read from anywhere.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use chrono::{DateTime, Utc};
use futures_util::StreamExt as _;
use futures_util::stream::{self, BoxStream};
use object_store::buffered::BufWriter;
use object_store::path::Path;
use object_store::{GetOptions, GetRange, ObjectStore as _};
use serde::{Deserialize, Serialize};
use tokio::io::AsyncWriteExt as _;

use super::scan::Scan;
use super::{Archive, Error, found};
use crate::job::{JobId, Line, Phase};

/// What is sent at once, in bytes: the least that a bucket takes as a part. Two are on their way at most.
const PART: usize = 5 << 20;
const PARTS: usize = 2;

/// The longest beginning of a log that is looked at for a line's end, in bytes: longer than any line of the runner's.
const HEAD: usize = 512 * 1024;

/// What is known of an archived log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Log {
    /// Its length.
    pub bytes: u64,
    /// How often its numbering began: more than once where the task ran again.
    pub runs: u32,
}

/// The archived logs of an allocation.
pub type Index = BTreeMap<Phase, Log>;

/// A log that is being archived.
pub struct LogWriter {
    writer: BufWriter,
    /// The beginning, while it is not known to be a line's.
    torn: Option<Vec<u8>>,
    scan: Scan,
    bytes: u64,
    doing: String,
}

/// A log that is being read.
pub struct LogReader {
    pieces: BoxStream<'static, object_store::Result<Bytes>>,
    at: u64,
    doing: String,
}

impl Archive {
    fn beside(&self, job: &JobId, allocation: &str, name: &str) -> Path {
        self.of(job).join(allocation).join(name)
    }

    fn log_of(&self, job: &JobId, allocation: &str, phase: Phase) -> Path {
        self.beside(job, allocation, &format!("{phase}.log"))
    }

    /// Begins to archive a log. What is left of a line whose beginning was rotated away is left out, where that may be.
    pub fn write_log(&self, job: &JobId, allocation: &str, phase: Phase, may_be_torn: bool) -> LogWriter {
        let path = self.log_of(job, allocation, phase);
        let writer = BufWriter::with_capacity(Arc::clone(&self.store), path, PART);
        LogWriter {
            writer: writer.with_max_concurrency(PARTS),
            torn: may_be_torn.then(Vec::new),
            scan: Scan::default(),
            bytes: 0,
            doing: format!("archiving the log of phase {phase} of job {job}"),
        }
    }

    /// Says which logs of an allocation are archived, once they are.
    pub async fn put_index(&self, job: &JobId, allocation: &str, logs: Index) -> Result<(), Error> {
        let doing = format!("archiving which logs job {job} has");
        self.put(&self.beside(job, allocation, "index.json"), logs, &doing).await
    }

    /// Which logs of an allocation are archived; none where nobody has archived them.
    pub async fn index(&self, job: &JobId, allocation: &str) -> Result<Option<Index>, Error> {
        let doing = format!("reading which logs of job {job} are archived");
        self.read(&self.beside(job, allocation, "index.json"), &doing).await
    }

    /// Opens a log at the byte that `begin` says for its length; none where it is not archived.
    pub async fn read_log(
        &self,
        job: &JobId,
        allocation: &str,
        phase: Phase,
        begin: impl FnOnce(u64) -> u64,
    ) -> Result<Option<LogReader>, Error> {
        let index = self.index(job, allocation).await?;
        let Some(&Log { bytes, .. }) = index.as_ref().and_then(|index| index.get(&phase)) else {
            return Ok(None);
        };
        let doing = format!("reading the archived log of phase {phase} of job {job}");
        let at = begin(bytes).min(bytes);
        // Nothing is no range.
        if at == bytes {
            return Ok(Some(LogReader { pieces: stream::empty().boxed(), at, doing }));
        }
        let options = GetOptions { range: Some(GetRange::Bounded(at..bytes)), ..GetOptions::default() };
        let got = self.store.get_opts(&self.log_of(job, allocation, phase), options).await;
        let got = found(got).map_err(|error| Error::new(&doing, error))?;
        Ok(got.map(|got| LogReader { pieces: got.into_stream(), at, doing }))
    }
}

impl LogWriter {
    /// Appends bytes.
    pub async fn put(&mut self, bytes: Bytes) -> Result<(), Error> {
        let Some(head) = &mut self.torn else { return self.send(bytes).await };
        head.extend_from_slice(&bytes);
        if head.contains(&b'\n') || head.len() > HEAD {
            return self.decide().await;
        }
        Ok(())
    }

    /// Leaves the rest of a torn line out.
    async fn decide(&mut self) -> Result<(), Error> {
        let Some(mut head) = self.torn.take() else { return Ok(()) };
        if let Some(end) = head.iter().position(|&byte| byte == b'\n')
            && std::str::from_utf8(&head[..end]).ok().and_then(Line::parse).is_none()
        {
            head.drain(..=end);
        }
        self.send(head.into()).await
    }

    async fn send(&mut self, bytes: Bytes) -> Result<(), Error> {
        self.scan.feed(&bytes);
        self.bytes += u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        self.writer.put(bytes).await.map_err(|error| Error::new(&self.doing, error))
    }

    /// The number of the last line.
    pub fn seq(&self) -> u64 {
        self.scan.seq
    }

    /// When the last line was written.
    pub fn time(&self) -> Option<DateTime<Utc>> {
        self.scan.time
    }

    /// How often the numbering began.
    pub fn runs(&self) -> u32 {
        self.scan.runs
    }

    /// Gives the log up, and what was sent of it.
    pub async fn abort(mut self) {
        // What cannot be taken back is not named by an index, and does not count.
        self.writer.abort().await.ok();
    }

    /// Completes the log.
    pub async fn finish(mut self) -> Result<Log, Error> {
        self.decide().await?;
        self.writer.shutdown().await.map_err(|error| Error::new(&self.doing, error))?;
        Ok(Log { bytes: self.bytes, runs: self.scan.runs })
    }
}

impl LogReader {
    /// The next bytes, and where in the log they end; none at its end. May be cancelled without loss.
    pub async fn next(&mut self) -> Result<Option<(Bytes, u64)>, Error> {
        let piece = self.pieces.next().await.transpose().map_err(|error| Error::new(&self.doing, error))?;
        Ok(piece.map(|bytes| {
            self.at += u64::try_from(bytes.len()).unwrap_or(u64::MAX);
            (bytes, self.at)
        }))
    }
}
