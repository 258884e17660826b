//! What is made of files, and made anew when one of them has changed.
//!
//! Invariant: a file that cannot be used keeps what there is. It is said once, and read again when it has changed.

use std::error::Error;
use std::fmt;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How often files are looked at, at most.
const LOOK: Duration = Duration::from_secs(1);

/// What tells a file from what it was.
type Stamp = Option<[i128; 6]>;

fn stamp(path: &Path) -> Stamp {
    let found = std::fs::metadata(path).ok()?;
    let times = [found.mtime(), found.mtime_nsec(), found.ctime(), found.ctime_nsec()].map(i128::from);
    let [modified, modified_ns, changed, changed_ns] = times;
    Some([found.ino().into(), found.len().into(), modified, modified_ns, changed, changed_ns])
}

fn stamps(files: &[PathBuf]) -> Vec<Stamp> {
    files.iter().map(|path| stamp(path)).collect()
}

struct Made<T> {
    value: T,
    stamps: Vec<Stamp>,
    looked: Instant,
    /// The files could not be used as they were last.
    failed: bool,
}

/// Something made of files.
pub struct Reloaded<T, E> {
    what: &'static str,
    files: Vec<PathBuf>,
    make: Box<dyn Fn() -> Result<T, E> + Send + Sync>,
    made: Mutex<Made<T>>,
}

impl<T, E> fmt::Debug for Reloaded<T, E> {
    /// Without what was made, which may be a secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reloaded")
            .field("what", &self.what)
            .field("files", &self.files)
            .finish_non_exhaustive()
    }
}

impl<T: Clone, E: Error> Reloaded<T, E> {
    /// Makes something of files; `what` is what a log calls it.
    ///
    /// # Errors
    /// Where it cannot be made now.
    pub fn new(
        what: &'static str,
        files: Vec<PathBuf>,
        make: impl Fn() -> Result<T, E> + Send + Sync + 'static,
    ) -> Result<Self, E> {
        // Before they are read: a change in between is seen later.
        let stamps = stamps(&files);
        let first = Made { value: make()?, stamps, looked: Instant::now(), failed: false };
        Ok(Self { what, files, make: Box::new(make), made: Mutex::new(first) })
    }

    /// What is made of the files now, which are looked at once a second at most.
    pub fn now(&self) -> T {
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.files.is_empty() && made.looked.elapsed() >= LOOK {
            made.looked = Instant::now();
            let stamps = stamps(&self.files);
            let is_new = stamps != made.stamps;
            // What keeps a file from being read may pass without changing it.
            if is_new || made.failed {
                made.stamps = stamps;
                self.renew(&mut made, is_new);
            }
        }
        made.value.clone()
    }

    fn renew(&self, made: &mut Made<T>, is_new: bool) {
        let what = self.what;
        match (self.make)() {
            Ok(value) => {
                tracing::info!(what, "read again, as its files have changed");
                (made.value, made.failed) = (value, false);
            }
            Err(_) if !is_new => {}
            Err(error) => {
                made.failed = true;
                let cause = error.source().map(tracing::field::display);
                tracing::warn!(what, %error, cause, "its files have changed, and cannot be used: it stays");
            }
        }
    }

    /// What is made of the files now, however recently they were looked at.
    #[cfg(test)]
    pub(crate) fn at_once(&self) -> T {
        let earlier = Instant::now().checked_sub(LOOK).expect("the machine has run for a second");
        self.made.lock().unwrap_or_else(PoisonError::into_inner).looked = earlier;
        self.now()
    }
}
