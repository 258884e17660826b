//! What finish gives to the archive: the job's logs, and its record where the job's end is decided.
//!
//! The service does the same for a job whose finish could not.

use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use chrono::{DateTime, SubsecRound as _, Utc};
use tokio::fs::File;
use tokio::io::AsyncReadExt as _;
use tokio::time::Instant;

use super::log::Log;
use super::surroundings::{NoCredentials, Surroundings};
use crate::archive::{self, Archive, Index, LogWriter, Settings};
use crate::environment::{BadConfiguration, Reader, Source};
use crate::job::{AllocationFacts, Facts, JobFacts, Outcome, Phase, Progress, Record, Standing, Task};
use crate::ledger::LedgerError;
use crate::telemetry::chain;

/// How long archiving may take, before what is left in the engine is removed without it.
const MOST: Duration = Duration::from_mins(2);

/// How long Nomad's file is waited for: another process copies what a task wrote into it, after the task's end too.
const ARRIVES: Duration = Duration::from_secs(10);

/// How long a file is still before it is held to be whole: one whose length nobody told, and one that has another length.
const STILL: Duration = Duration::from_millis(700);
const OTHER: Duration = Duration::from_secs(2);

/// How often a file that has to grow is looked at.
const LOOK: Duration = Duration::from_millis(20);

/// What is read at once, in bytes.
const PIECE: usize = 64 * 1024;

/// Why something is not archived.
#[derive(Debug, thiserror::Error)]
enum Unkept {
    #[error(transparent)]
    Credentials(#[from] NoCredentials),
    #[error(transparent)]
    Archive(#[from] archive::Error),
    #[error("{0} cannot be read")]
    File(PathBuf, #[source] std::io::Error),
    #[error("what the job came to could not be read")]
    Ledger(#[from] LedgerError),
    #[error("the log of phase {phase} has not arrived whole within {seconds} s")]
    Short { phase: Phase, seconds: u64 },
}

/// What archiving needs beside the task's surroundings.
pub(super) struct Keeper {
    settings: Settings,
    node: String,
}

impl Keeper {
    /// Reads the task's environment; none where there is no archive.
    pub(super) fn read(source: Source<'_>) -> Result<Option<Self>, BadConfiguration> {
        let mut reader = Reader::new(source);
        let settings = Settings::read(&mut reader);
        let node = reader.text("NOMAD_BUILD_NODE").unwrap_or_default();
        let settings = reader.finish(settings)?;
        Ok(settings.map(|settings| Self { settings, node }))
    }

    /// Archives what there is. What cannot be archived is told in the log: the service tries it again.
    pub(super) async fn keep(self, around: &Surroundings, log: &Log) {
        let why = match tokio::time::timeout(MOST, self.keep_all(around, log)).await {
            Ok(Ok(())) => return,
            Ok(Err(error)) => chain(&error),
            Err(_) => format!("the archive did not take it within {} s", MOST.as_secs()),
        };
        log.say(&format!("the job is not archived here, and the service will try: {why}")).await;
    }

    async fn keep_all(self, around: &Surroundings, log: &Log) -> Result<(), Unkept> {
        let (job, allocation) = (&around.job, &around.allocation);
        // All that takes the task's identity first: it ends when Nomad's servers forget the allocation.
        let credentials = around.copied(Task::Finish, log).await?;
        let known = tokio::try_join!(around.ledger.progress(job), around.ledger.claim(job));
        let archive =
            Archive::open(&self.settings.clone().with_items(credentials.items()), &around.namespace)?;
        let mut logs = Index::new();
        for phase in Phase::ALL {
            let Some(mut files) = Files::of(&around.shared("logs"), phase).await? else { continue };
            let mut writer = archive.write_log(job, allocation, phase, files.index > 0);
            let wanted = known
                .as_ref()
                .map_or(Wanted::Stillness, |((_, progress), _)| Wanted::of(progress, phase, allocation));
            if let Err(error) = files.copy(wanted, &mut writer).await {
                writer.abort().await;
                return Err(error);
            }
            logs.insert(phase, writer.finish().await?);
        }
        archive.put_index(job, allocation, logs).await?;
        let ((index, progress), claim) = known?;
        let record = around.labels.clone().and_then(|labels| {
            let mut facts = Facts::new(job.clone());
            facts.see_job(JobFacts::new(1, &around.namespace, labels));
            facts.see_allocation(self.allocation(allocation));
            facts.see_progress(index.max(1), progress);
            if let Some((index, claim)) = claim {
                facts.see_claim(index, claim);
            }
            Record::of(&facts)
        });
        match record {
            // One whose runner died is not decided yet: that is for the service. And what ended in another allocation is that one's.
            Some(record)
                if record.status.is_final() && record.nomad.allocation.as_ref() == Some(allocation) =>
            {
                Ok(archive.put_record(&record).await?)
            }
            _ => Ok(()),
        }
    }

    /// What there is to know of the allocation that this is a task of.
    fn allocation(&self, id: &str) -> AllocationFacts {
        AllocationFacts {
            id: id.to_owned(),
            index: 1,
            created: 1,
            node_name: self.node.clone(),
            standing: Standing::Over,
            withdrawn: false,
            changed_at: Utc::now(),
            detail: None,
        }
    }
}

/// How much of a log there has to be.
#[derive(Clone, Copy)]
enum Wanted {
    /// So many lines, the last one not written before the phase began.
    Lines(u64, DateTime<Utc>),
    /// Whatever comes.
    Stillness,
    /// What is there.
    Nothing,
}

impl Wanted {
    fn of(progress: &Progress, phase: Phase, allocation: &str) -> Self {
        // What a phase wrote in another allocation is not here.
        match progress.of(phase).filter(|outcome| outcome.allocation == allocation) {
            Some(Outcome { lines: Some(lines), started_at, .. }) => {
                Self::Lines(*lines, started_at.trunc_subsecs(6))
            }
            Some(_) => Self::Stillness,
            None => Self::Nothing,
        }
    }

    fn is_there(self, writer: &LogWriter, still: Duration) -> bool {
        match self {
            // Of a task that ran again, nobody knows how many lines each run has; and a clock may have been set back.
            Self::Lines(lines, began) => {
                let are_there = writer.seq() >= lines;
                let are_its_own = lines == 0 || writer.time().is_some_and(|time| time >= began);
                (are_there && are_its_own) || ((are_there || writer.runs() > 1) && still >= OTHER)
            }
            Self::Stillness => still >= STILL,
            Self::Nothing => true,
        }
    }
}

/// The files of a task's log, in the order they were written.
struct Files {
    folder: PathBuf,
    phase: Phase,
    /// The one that is read.
    index: u64,
    file: File,
}

impl Files {
    /// The first one that is left; none where there is no log.
    async fn of(folder: &Path, phase: Phase) -> Result<Option<Self>, Unkept> {
        let unread = |error| Unkept::File(folder.to_owned(), error);
        let mut entries = tokio::fs::read_dir(folder).await.map_err(unread)?;
        let mut first = None;
        while let Some(entry) = entries.next_entry().await.map_err(unread)? {
            let name = entry.file_name();
            let index = name.to_str().and_then(|name| name.strip_prefix(&format!("{phase}.stdout.")));
            let Some(index) = index.and_then(|index| index.parse::<u64>().ok()) else { continue };
            first = Some(first.map_or(index, |first: u64| first.min(index)));
        }
        let Some(index) = first else { return Ok(None) };
        let path = path(folder, phase, index);
        let file = File::open(&path).await.map_err(|error| Unkept::File(path, error))?;
        Ok(Some(Self { folder: folder.to_owned(), phase, index, file }))
    }

    /// Copies from here to the log's end.
    async fn copy(&mut self, wanted: Wanted, writer: &mut LogWriter) -> Result<(), Unkept> {
        let until = Instant::now() + ARRIVES;
        let mut grown = Instant::now();
        let mut next = None;
        let mut piece = vec![0; PIECE];
        loop {
            let read = self.file.read(&mut piece).await;
            let read =
                read.map_err(|error| Unkept::File(path(&self.folder, self.phase, self.index), error))?;
            if read > 0 {
                writer.put(Bytes::copy_from_slice(&piece[..read])).await?;
                grown = Instant::now();
                continue;
            }
            // What was written before the next file was begun is read first.
            if let Some(file) = next.take() {
                self.file = file;
                self.index += 1;
                continue;
            }
            next = File::open(path(&self.folder, self.phase, self.index + 1)).await.ok();
            if next.is_some() {
                continue;
            }
            if wanted.is_there(writer, grown.elapsed()) {
                return Ok(());
            }
            if Instant::now() > until {
                let short = Unkept::Short { phase: self.phase, seconds: ARRIVES.as_secs() };
                return if let Wanted::Lines(..) = wanted { Err(short) } else { Ok(()) };
            }
            tokio::time::sleep(LOOK).await;
        }
    }
}

/// Nomad's name of a file of a task's log.
fn path(folder: &Path, phase: Phase, index: u64) -> PathBuf {
    folder.join(format!("{phase}.stdout.{index}"))
}
