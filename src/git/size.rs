//! How much a checkout takes of the disk: nobody else counts it while git writes, and a small pack can become any number of files.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How often a checkout is looked at.
const LOOKS: Duration = Duration::from_secs(1);

/// How many times as long as a look takes it is let be, so that looking takes little of a machine.
const RESTS: u32 = 20;

/// The bytes of what `st_blocks` counts.
const BLOCK: u64 = 512;

/// How much a checkout may take of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Most {
    /// MiB, as the file system counts them.
    pub mebibytes: u64,
    /// Files, folders and links, with those of git's own.
    pub files: u64,
    /// The memory of each of git's programs, in MiB.
    pub memory: u64,
}

/// Waits until a folder takes more than it may, and tells what of; for ever where it does not.
pub(super) async fn outgrown(folder: &Path, most: Most) -> String {
    let mut rest = LOOKS;
    loop {
        tokio::time::sleep(rest).await;
        let began = Instant::now();
        if let Some(what) = excess(folder, most).await {
            return what;
        }
        rest = LOOKS.max(began.elapsed() * RESTS);
    }
}

/// What a folder has too much of; none where it has not.
pub(super) async fn excess(folder: &Path, most: Most) -> Option<String> {
    let folder = folder.to_owned();
    // A look that panicked found nothing.
    tokio::task::spawn_blocking(move || look(folder, most)).await.ok().flatten()
}

/// Ends as soon as there is too much, so that it takes no longer than what there may be.
fn look(folder: PathBuf, most: Most) -> Option<String> {
    let (mut blocks, mut files, mut folders) = (0_u64, 0_u64, vec![folder]);
    while let Some(folder) = folders.pop() {
        // What is not there any more, or not to be read, takes nothing that could be counted.
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            // Of a link it tells the link's own.
            let Ok(metadata) = entry.metadata() else { continue };
            blocks = blocks.saturating_add(metadata.blocks());
            files = files.saturating_add(1);
            if files > most.files {
                return Some(format!("{} files", most.files));
            }
            if blocks.saturating_mul(BLOCK) >> 20 > most.mebibytes {
                return Some(format!("{} MiB", most.mebibytes));
            }
            if metadata.is_dir() {
                folders.push(entry.path());
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_and_their_bytes_are_counted_in_every_folder_and_no_link_is_followed() {
        let folder = tempfile::tempdir().unwrap();
        let inner = folder.path().join("a/b");
        fs::create_dir_all(&inner).unwrap();
        fs::write(inner.join("large"), vec![1; 3 << 20]).unwrap();
        std::os::unix::fs::symlink("/", inner.join("link")).unwrap();
        let excess = |mebibytes, files| look(folder.path().to_owned(), Most { mebibytes, files, memory: 1 });
        // a, b, large, link.
        assert_eq!(excess(4, 4), None);
        assert_eq!(excess(4, 3).as_deref(), Some("3 files"));
        assert_eq!(excess(1, 4).as_deref(), Some("1 MiB"));
    }
}
