//! The archive: what is kept of ended jobs when Nomad has forgotten them, in an object store.
//!
//! `NAMESPACE/JOB/record.json` is a job's final record. `NAMESPACE/JOB/ALLOCATION/PHASE.log` is a phase's log as its runner
//! wrote it, and `index.json` beside it says which logs there are.
//!
//! Invariant: the index is written last, and a log that it does not name does not count.
//! Invariant: a record that is archived is final, so whoever writes it says the same of the job's end, and needs no lock.

mod log;
mod scan;
mod settings;

use std::fmt;
use std::io::ErrorKind;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{StreamExt as _, TryStreamExt as _};
use object_store::aws::AmazonS3Builder;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{ClientOptions, GetResult, ObjectStore, ObjectStoreExt as _, RetryConfig};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::job::{JobId, Record};

pub use log::{Index, Log, LogReader, LogWriter};
pub use settings::Settings;

/// The version of what is written.
const VERSION: u32 = 1;

/// How long one request may take, and how long a store that fails is asked again.
const CONNECTS: Duration = Duration::from_secs(5);
const ANSWERS: Duration = Duration::from_secs(30);
const RETRIES: usize = 4;

/// Why something could not be read from the archive or written to it.
#[derive(Debug, thiserror::Error)]
#[error("{doing}: {why}")]
pub struct Error {
    doing: String,
    /// The store's own text, which has its causes in it.
    why: String,
}

impl Error {
    fn new(doing: &str, why: impl fmt::Display) -> Self {
        Self { doing: doing.to_owned(), why: why.to_string() }
    }
}

/// An object, with the version of its shape.
#[derive(Serialize, Deserialize)]
struct Kept<T> {
    v: u32,
    content: T,
}

#[derive(Deserialize)]
struct Version {
    v: u32,
}

/// The archive of one namespace. Cheap to clone.
#[derive(Clone)]
pub struct Archive {
    store: Arc<dyn ObjectStore>,
    root: Path,
    /// The namespace's folder, where the archive is a directory.
    folder: Option<PathBuf>,
}

impl fmt::Debug for Archive {
    /// Without the store, which may tell its credentials.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Archive").field("root", &self.root).finish_non_exhaustive()
    }
}

impl Archive {
    /// Opens the archive; nothing is asked of the store yet.
    pub fn open(settings: &Settings, namespace: &str) -> Result<Self, Error> {
        let failed = |error: object_store::Error| Error::new("opening the archive", error);
        let directory = settings.directory();
        let (store, root): (Arc<dyn ObjectStore>, Path) = if let Some(directory) = &directory {
            let files = LocalFileSystem::new_with_prefix(directory).map_err(failed)?;
            (Arc::new(files.with_automatic_cleanup(true).with_fsync(true)), Path::default())
        } else {
            let root = Path::from_url_path(settings.url().path());
            (Arc::new(bucket(settings).map_err(failed)?), root.map_err(|error| failed(error.into()))?)
        };
        Ok(Self { store, root: root.join(namespace), folder: directory.map(|all| all.join(namespace)) })
    }

    fn of(&self, job: &JobId) -> Path {
        self.root.clone().join(job.as_str())
    }

    fn record_of(&self, job: &JobId) -> Path {
        self.of(job).join("record.json")
    }

    /// Keeps a final record.
    pub async fn put_record(&self, record: &Record) -> Result<(), Error> {
        let doing = format!("archiving the record of job {}", record.id);
        self.put(&self.record_of(&record.id), record, &doing).await
    }

    /// A job's final record; none where it is not archived.
    pub async fn record(&self, job: &JobId) -> Result<Option<Record>, Error> {
        let doing = format!("reading the archived record of job {job}");
        self.read(&self.record_of(job), &doing).await
    }

    /// The jobs of which anything is archived.
    pub async fn jobs(&self) -> Result<Vec<JobId>, Error> {
        let listed = self.store.list_with_delimiter(Some(&self.root)).await;
        let listed = listed.map_err(|error| Error::new("listing the archived jobs", error))?;
        let name = |path: &Path| path.filename().and_then(|name| name.parse().ok());
        Ok(listed.common_prefixes.iter().filter_map(name).collect())
    }

    /// Removes everything that is archived of a job.
    pub async fn remove(&self, job: &JobId) -> Result<(), Error> {
        let objects = self.store.list(Some(&self.of(job))).map_ok(|object| object.location).boxed();
        let removed = self.store.delete_stream(objects).try_for_each(|_| std::future::ready(Ok(()))).await;
        let failed =
            |error: &dyn fmt::Display| Error::new(&format!("removing job {job} from the archive"), error);
        removed.map_err(|error| failed(&error))?;
        // A write that was cut leaves a file that is no object.
        let Some(folder) = &self.folder else { return Ok(()) };
        match tokio::fs::remove_dir_all(folder.join(job.as_str())).await {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(failed(&error)),
            _ => Ok(()),
        }
    }

    /// Writes, reads and removes something of a job that is none.
    pub async fn try_out(&self, job: &JobId) -> Result<(), Error> {
        const DOING: &str = "trying out the archive";
        let path = self.of(job).join("doctor.json");
        self.put(&path, "was here", DOING).await?;
        let read: Result<Option<String>, Error> = self.read(&path, DOING).await;
        self.remove(job).await?;
        read?.map(drop).ok_or_else(|| Error::new(DOING, "what was written is not there"))
    }

    async fn put<T: Serialize>(&self, path: &Path, content: T, doing: &str) -> Result<(), Error> {
        let text =
            serde_json::to_vec(&Kept { v: VERSION, content }).map_err(|error| Error::new(doing, error))?;
        let put = self.store.put(path, Bytes::from(text).into()).await;
        put.map(drop).map_err(|error| Error::new(doing, error))
    }

    async fn read<T: DeserializeOwned>(&self, path: &Path, doing: &str) -> Result<Option<T>, Error> {
        let failed = |error| Error::new(doing, error);
        let Some(found) = found(self.store.get(path).await).map_err(failed)? else { return Ok(None) };
        let text = found.bytes().await.map_err(failed)?;
        // The version is read before the shape: another version may have another shape.
        let Version { v } = from_json(&text, doing)?;
        if v != VERSION {
            let why = format!("it has version {v}, and this service reads {VERSION}");
            return Err(Error::new(doing, why));
        }
        from_json(&text, doing).map(|kept: Kept<T>| Some(kept.content))
    }
}

fn from_json<T: DeserializeOwned>(text: &[u8], doing: &str) -> Result<T, Error> {
    serde_json::from_slice(text).map_err(|error| Error::new(doing, error))
}

/// What was got; none where the store says that it does not have it. That it does not have the bucket is an error.
fn found(got: object_store::Result<GetResult>) -> object_store::Result<Option<GetResult>> {
    match got {
        Err(object_store::Error::NotFound { ref source, .. })
            if !source.to_string().contains("NoSuchBucket") =>
        {
            Ok(None)
        }
        got => got.map(Some),
    }
}

fn bucket(settings: &Settings) -> object_store::Result<object_store::aws::AmazonS3> {
    let mut client = ClientOptions::new().with_connect_timeout(CONNECTS).with_timeout(ANSWERS);
    if settings.is_plain() {
        // Without this a machine that has no CA store could not even speak plain HTTP.
        client = client.with_no_system_certificates(true);
    }
    let retries = RetryConfig { max_retries: RETRIES, retry_timeout: ANSWERS, ..RetryConfig::default() };
    let mut builder = AmazonS3Builder::new()
        .with_client_options(client)
        .with_retry(retries)
        .with_url(settings.url().as_str());
    for (name, value) in settings.options() {
        builder = builder.with_config(name.to_ascii_lowercase().parse()?, value);
    }
    builder.build()
}
