//! The directory of a stack: where its parts keep their data, who holds it, and what runs in it.

use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::io::ErrorKind;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use uuid::Uuid;

use super::error::Error;
use super::wait::wait_for;

/// The environment variable that marks every process of a stack: its value is the data directory. `raw_exec` tasks, and
/// what they start, inherit it from the agent.
pub(super) const MARK: &str = "NOMAD_BUILD_STACK";

/// The longest data directory: `<dir>/n/alloc/<allocation>/registry/secrets/api.sock` is a unix socket.
const LONGEST: usize = 107 - "/n/alloc/".len() - 36 - "/registry/secrets/api.sock".len();

const TEMPORARY_PREFIX: &str = "nb-";

/// The directory of a stack.
#[derive(Clone, Debug)]
pub(super) struct DataDir {
    path: PathBuf,
    temporary: bool,
}

/// What runs in a data directory, written as soon as it is started.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct State {
    /// Nomad's HTTP API.
    pub(super) nomad: String,
    /// The agent's process.
    pub(super) agent: i32,
    /// The service's process.
    pub(super) service: Option<i32>,
}

impl DataDir {
    /// A new directory that is removed when the stack is taken down.
    pub(super) fn temporary() -> Result<Self, Error> {
        let name = format!("{TEMPORARY_PREFIX}{}", &Uuid::new_v4().simple().to_string()[..8]);
        Self::create(temporary_root().join(name), true)
    }

    /// A directory of the caller's, which stays.
    pub(super) fn given(path: &Path) -> Result<Self, Error> {
        let path = std::path::absolute(path).map_err(Error::file("finding", path))?;
        Self::create(path, false)
    }

    /// A directory that exists.
    pub(super) fn at(path: PathBuf, temporary: bool) -> Self {
        Self { path, temporary }
    }

    fn create(path: PathBuf, temporary: bool) -> Result<Self, Error> {
        if path.as_os_str().len() > LONGEST {
            return Err(Error::DataDirTooLong { path, limit: LONGEST });
        }
        // Tasks may run as another user, who has to pass through.
        DirBuilder::new()
            .recursive(true)
            .mode(0o711)
            .create(&path)
            .map_err(Error::file("creating", &path))?;
        Ok(Self { path, temporary })
    }

    /// The temporary directories of this user whose stack is gone without having been taken down.
    pub(super) fn left_over() -> Vec<Self> {
        let user = nix::unistd::getuid().as_raw();
        let Ok(entries) = temporary_root().read_dir() else { return Vec::new() };
        entries
            .flatten()
            .filter(|entry| is_temporary_name(&entry.file_name().to_string_lossy()))
            .filter(|entry| entry.metadata().is_ok_and(|found| found.is_dir() && found.uid() == user))
            .map(|entry| Self::at(entry.path(), true))
            .collect()
    }

    /// Holds the directory until the file is dropped. The supervisor does, for as long as the stack lives.
    pub(super) fn lock(&self) -> Result<File, Error> {
        let path = self.path.join("lock");
        let file = open_lock(&path)?;
        match tried(&file) {
            Some(locked) => locked.map(|()| file).map_err(Error::file("locking", path)),
            None => Err(Error::InUse { path: self.path.clone() }),
        }
    }

    /// What runs here, as far as it was written down.
    pub(super) fn state(&self) -> Option<State> {
        serde_json::from_slice(&std::fs::read(self.state_file()).ok()?).ok()
    }

    /// Writes down what runs here.
    pub(super) fn set_state(&self, state: &State) -> Result<(), Error> {
        let path = self.state_file();
        let text = serde_json::to_vec(state).map_err(|error| Error::File {
            doing: "encoding",
            path: path.clone(),
            source: error.into(),
        })?;
        std::fs::write(&path, text).map_err(Error::file("writing", &path))
    }

    /// Nothing runs here any more: removes a temporary directory. Of another the registry's images, the archive and Nomad's
    /// server state stay; the client's go, which names processes that are gone, and a node that comes back as a new one.
    pub(super) fn close(&self) -> Result<(), Error> {
        if self.temporary {
            return removed(std::fs::remove_dir_all, self.path.clone());
        }
        for part in ["client", "alloc"] {
            removed(std::fs::remove_dir_all, self.nomad().join(part))?;
        }
        removed(std::fs::remove_file, self.state_file())
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn is_temporary(&self) -> bool {
        self.temporary
    }

    /// Nomad's own data; one letter, see [`LONGEST`].
    pub(super) fn nomad(&self) -> PathBuf {
        self.path.join("n")
    }

    pub(super) fn registry(&self) -> PathBuf {
        self.path.join("registry")
    }

    /// The archive of ended jobs; created where it is not there, for this user only.
    pub(super) fn archive(&self) -> Result<PathBuf, Error> {
        let path = self.path.join("archive");
        let mut create = DirBuilder::new();
        create.recursive(true).mode(0o700).create(&path).map_err(Error::file("creating", &path))?;
        Ok(path)
    }

    /// A cgroup for this directory only: the clients of two agents must not share one.
    pub(super) fn cgroup(&self) -> String {
        let digest = Sha256::digest(self.path.as_os_str().as_encoded_bytes());
        let id = digest.iter().take(4).fold(0_u32, |id, byte| id << 8 | u32::from(*byte));
        format!("nomad-build-{id:08x}.slice")
    }

    fn state_file(&self) -> PathBuf {
        self.path.join("stack.json")
    }
}

/// Held while a stack starts, so that two stacks of one user never choose the same port, and what is left over is not
/// mistaken for what is just starting. Waits for its turn, for as long as that takes.
pub(super) async fn start_lock() -> Result<File, Error> {
    let path = temporary_root().join(format!("nomad-build-dev-{}.lock", nix::unistd::getuid()));
    let file = open_lock(&path)?;
    if let Some(locked) = tried(&file) {
        return locked.map(|()| file).map_err(Error::file("locking", path));
    }
    tracing::info!("another stack is starting; waiting for it");
    loop {
        if let Some(locked) = wait_for(Duration::from_mins(1), async || tried(&file)).await {
            return locked.map(|()| file).map_err(Error::file("locking", path));
        }
    }
}

/// Tries to lock; `None` when another holds the lock.
fn tried(file: &File) -> Option<std::io::Result<()>> {
    match file.try_lock() {
        Ok(()) => Some(Ok(())),
        Err(TryLockError::WouldBlock) => None,
        Err(TryLockError::Error(error)) => Some(Err(error)),
    }
}

/// What is not there needs no removing.
fn removed(remove: fn(PathBuf) -> std::io::Result<()>, path: PathBuf) -> Result<(), Error> {
    match remove(path.clone()) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::file("removing", path)(error)),
        _ => Ok(()),
    }
}

fn open_lock(path: &Path) -> Result<File, Error> {
    OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)
        .map_err(Error::file("opening", path))
}

/// Where temporary files go, unless that is too deep for a socket below it.
fn temporary_root() -> PathBuf {
    let root = std::env::temp_dir();
    if root.as_os_str().len() + "/nb-12345678".len() <= LONGEST { root } else { "/tmp".into() }
}

fn is_temporary_name(name: &str) -> bool {
    name.strip_prefix(TEMPORARY_PREFIX)
        .is_some_and(|id| id.len() == 8 && id.bytes().all(|byte| byte.is_ascii_hexdigit()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_too_deep_for_a_socket_is_refused() {
        let path = PathBuf::from(format!("/tmp/{}", "x".repeat(LONGEST)));
        let error = DataDir::given(&path).unwrap_err();
        assert!(matches!(error, Error::DataDirTooLong { limit: 36, .. }), "{error}");
        assert!(!path.exists());
    }

    #[test]
    fn a_held_directory_is_in_use_until_it_is_let_go() {
        let path = temporary_root().join(format!("t{}", std::process::id()));
        let dir = DataDir::given(&path).unwrap();
        let held = dir.lock().unwrap();
        assert!(matches!(dir.lock(), Err(Error::InUse { .. })));
        drop(held);
        dir.lock().unwrap();
        std::fs::remove_dir_all(path).unwrap();
    }

    #[test]
    fn the_state_is_read_as_it_was_written() {
        let parent = tempfile::tempdir_in("/tmp").unwrap();
        let dir = DataDir::create(parent.path().join("x"), true).unwrap();
        assert_eq!(dir.state(), None);
        let state = State { nomad: "http://127.0.0.1:1".into(), agent: 7, service: Some(8) };
        dir.set_state(&state).unwrap();
        assert_eq!(dir.state(), Some(state));
        dir.close().unwrap();
        assert!(!dir.path().exists());
        dir.close().unwrap();
    }

    #[test]
    fn only_names_of_ours_are_temporary() {
        assert!(is_temporary_name("nb-0123abcd"));
        for name in ["nb-", "nb-0123abc", "nb-0123abcde", "nb-0123abcx", "xnb-0123abcd"] {
            assert!(!is_temporary_name(name), "{name}");
        }
    }
}
