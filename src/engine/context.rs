//! A build context: what a directory has, less what its `.dockerignore` leaves out.
//!
//! Invariant: a symbolic link is sent as a link; no file is read through one that leads out of the context.
//! Invariant: entries come in the order of their names, a directory before what it holds.

use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;

use super::dockerignore::Patterns;

/// Bytes in an ignore file or a Dockerfile, at most: it is read whole.
const LARGEST_FILE: u64 = 1024 * 1024;

/// Why a build context cannot be sent.
#[derive(Debug, thiserror::Error)]
pub enum ContextError {
    /// A file or directory cannot be read.
    #[error("{doing} {}", path.display())]
    Io {
        /// What was being done, in words that its path ends.
        doing: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file that lists what to leave out makes no sense.
    #[error("{}: {problem}", path.display())]
    Pattern {
        /// The file.
        path: PathBuf,
        /// The pattern, and what is wrong with it.
        problem: String,
    },
    /// A symbolic link would have us read what is not ours to send.
    #[error("{} is a symbolic link that leads out of the build context", .0.display())]
    Escapes(PathBuf),
}

impl ContextError {
    fn io(doing: &'static str, path: &Path) -> impl Fn(io::Error) -> Self + use<> {
        let path = path.to_path_buf();
        move |source| Self::Io { doing, path: path.clone(), source }
    }
}

/// A directory that is to be sent, and the Dockerfile, which may lie outside of it.
pub(super) struct Context {
    /// The directory, free of links.
    root: PathBuf,
    /// Where the Dockerfile is, free of links.
    dockerfile: PathBuf,
    text: String,
    patterns: Patterns,
}

/// One thing that is sent.
pub(super) struct Entry<'a> {
    /// Its place in the context.
    pub relative: &'a Path,
    /// Its place on this machine.
    pub path: &'a Path,
    /// What it is: a directory, a symbolic link or a regular file, and nothing else.
    pub metadata: &'a Metadata,
}

impl Context {
    /// Reads the ignore file. Both paths are paths on this machine.
    pub(super) fn open(context: &Path, dockerfile: &Path) -> Result<Self, ContextError> {
        let root = context.canonicalize().map_err(ContextError::io("opening the build context", context))?;
        let looking = ContextError::io("finding the Dockerfile", dockerfile);
        let located = locate(dockerfile).map_err(&looking)?;
        let patterns = patterns(&root, &located)?;
        let dockerfile = within(&located, &root, &located)
            .map_err(&looking)?
            .ok_or_else(|| ContextError::Escapes(located.clone()))?;
        let text = read(&dockerfile).map_err(ContextError::io("reading", &dockerfile))?;
        Ok(Self { root, dockerfile, text, patterns })
    }

    /// The directory, free of links.
    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    /// Where the Dockerfile is, free of links.
    pub(super) fn dockerfile(&self) -> &Path {
        &self.dockerfile
    }

    /// What the Dockerfile says; what is no UTF-8 is replaced.
    pub(super) fn dockerfile_text(&self) -> &str {
        &self.text
    }

    /// Goes through the directory, and gives what is sent of it.
    pub(super) fn walk(&self, mut give: impl FnMut(Entry<'_>) -> io::Result<()>) -> Result<(), ContextError> {
        let (mut left, mut withheld) = (Vec::new(), Vec::new());
        list(Path::new(""), &self.root, &mut left).map_err(Self::sending(&self.root))?;
        while let Some(relative) = left.pop() {
            let path = self.root.join(&relative);
            let visited = self.visit(&relative, &path, &mut withheld, &mut give);
            let goes_on = visited.map_err(Self::sending(&path))?;
            if goes_on {
                list(&relative, &path, &mut left).map_err(Self::sending(&path))?;
            }
        }
        Ok(())
    }

    /// That something could not be sent, with its cause.
    pub(super) fn sending(path: &Path) -> impl Fn(io::Error) -> ContextError + use<> {
        ContextError::io("sending, with the build context,", path)
    }

    /// Whether what is beneath it has to be looked at. `withheld` are the directories above it that are excluded, and sent only
    /// if something beneath them is.
    fn visit(
        &self,
        relative: &Path,
        path: &Path,
        withheld: &mut Vec<(PathBuf, Metadata)>,
        give: &mut impl FnMut(Entry<'_>) -> io::Result<()>,
    ) -> io::Result<bool> {
        withheld.retain(|(dir, _)| relative.starts_with(dir));
        let (metadata, name) = (path.symlink_metadata()?, relative.to_string_lossy());
        let kind = metadata.file_type();
        if self.patterns.excludes(&name) {
            let goes_on = kind.is_dir() && self.patterns.may_include_beneath(&name);
            if goes_on {
                withheld.push((relative.to_path_buf(), metadata));
            }
            return Ok(goes_on);
        }
        // A socket, a pipe or a device has no content to send.
        if kind.is_dir() || kind.is_symlink() || kind.is_file() {
            for (dir, metadata) in withheld.drain(..) {
                give(Entry { relative: &dir, path: &self.root.join(&dir), metadata: &metadata })?;
            }
            give(Entry { relative, path, metadata: &metadata })?;
        }
        Ok(kind.is_dir())
    }
}

/// The file's path, free of links but for the file itself.
fn locate(path: &Path) -> io::Result<PathBuf> {
    let name = path.file_name().ok_or(io::ErrorKind::IsADirectory)?;
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let path = parent.canonicalize()?.join(name);
    if path.symlink_metadata()?.is_dir() { Err(io::ErrorKind::IsADirectory.into()) } else { Ok(path) }
}

/// Where the path leads, unless that is out of both the context and the directory of the Dockerfile.
fn within(path: &Path, root: &Path, dockerfile: &Path) -> io::Result<Option<PathBuf>> {
    let path = path.canonicalize()?;
    let ours = path.starts_with(root) || dockerfile.parent().is_some_and(|dir| path.starts_with(dir));
    Ok(ours.then_some(path))
}

/// The patterns that hold.
fn patterns(root: &Path, dockerfile: &Path) -> Result<Patterns, ContextError> {
    let mut own = dockerfile.as_os_str().to_owned();
    own.push(".dockerignore");
    for path in [PathBuf::from(own), root.join(".dockerignore")] {
        let unreadable = ContextError::io("reading", &path);
        let target = match within(&path, root, dockerfile) {
            Ok(Some(target)) => target,
            Ok(None) => return Err(ContextError::Escapes(path.clone())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(unreadable(error)),
        };
        let text = read(&target).map_err(unreadable)?;
        return Patterns::parse(&text)
            .map_err(|problem| ContextError::Pattern { path: path.clone(), problem });
    }
    Ok(Patterns::default())
}

/// Reads a file whole; what is no UTF-8 is replaced.
fn read(path: &Path) -> io::Result<String> {
    let (mut text, (file, _)) = (Vec::new(), open_file(path)?);
    file.take(LARGEST_FILE + 1).read_to_end(&mut text)?;
    if text.len() as u64 > LARGEST_FILE {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// Opens a regular file, never through a link, and never waiting for the other end of a pipe.
pub(super) fn open_file(path: &Path) -> io::Result<(File, Metadata)> {
    let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
    let file = File::options().read(true).custom_flags(flags.bits()).open(path)?;
    let metadata = file.metadata()?;
    if metadata.is_file() { Ok((file, metadata)) } else { Err(io::Error::other("not a regular file")) }
}

/// Puts what a directory holds onto the stack, so that the first name comes off first.
fn list(relative: &Path, path: &Path, left: &mut Vec<PathBuf>) -> io::Result<()> {
    let start = left.len();
    for entry in fs::read_dir(path)? {
        left.push(relative.join(entry?.file_name()));
    }
    left[start..].sort_unstable_by(|a, b| b.as_os_str().cmp(a.as_os_str()));
    Ok(())
}

#[cfg(test)]
mod tests;
