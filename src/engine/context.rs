//! A build context: a directory as a stream of tar, less what its `.dockerignore` leaves out.
//!
//! Invariant: a symbolic link is sent as a link; no file is read through one that leads out of the context.
//! Invariant: the same directory gives the same bytes: names sorted, owners 0, times in whole seconds.
//! Invariant: a stream that ends without an error is a whole archive.
//! Invariant: memory is bounded; a reader that is slow, or gone, holds the writer up, or ends it.
//!
//! A limit: the ignore file and the Dockerfile are always sent, as the engine needs them, and `COPY . .` sees them even
//! where a pattern excludes them. (Docker's own client hides them from a BuildKit that asks it for files one by one;
//! BuildKit applies no patterns to an archive.)

use std::fs::{self, File, Metadata};
use std::io::{self, BufRead as _, BufReader, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use bytes::{Bytes, BytesMut};
use futures_util::stream::{self, BoxStream, StreamExt};
use nix::fcntl::OFlag;
use sha2::{Digest as _, Sha256};
use tar::{EntryType, Header};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

use super::dockerignore::Patterns;

/// Bytes in a piece of the stream, at most.
const PIECE: usize = 64 * 1024;
/// Pieces that may wait for the reader.
const WAITING: usize = 4;
/// Bytes in an ignore file, at most: it is read whole.
const LARGEST_IGNORE_FILE: u64 = 1024 * 1024;
/// What a tar archive is made of.
const BLOCK: usize = 512;

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

/// A directory on its way to an engine.
pub(super) struct Context {
    /// The Dockerfile's name within the archive.
    pub dockerfile: String,
    /// The archive.
    pub body: BoxStream<'static, io::Result<Bytes>>,
    /// Why the archive broke off; nothing else comes here.
    pub failure: oneshot::Receiver<ContextError>,
}

/// Starts to send a directory. Both paths are paths on this machine; the Dockerfile may lie outside the directory.
///
/// Reads the ignore file before it returns, and must be called within a Tokio runtime.
pub(super) fn open(context: impl AsRef<Path>, dockerfile: impl AsRef<Path>) -> Result<Context, ContextError> {
    let plan = Plan::new(context.as_ref(), dockerfile.as_ref())?;
    let name = plan.dockerfile.clone();
    let (body, failure, _writer) = start(plan);
    Ok(Context { dockerfile: name, body, failure })
}

/// What will be sent.
struct Plan {
    /// The directory, free of links.
    root: PathBuf,
    dockerfile: String,
    /// A Dockerfile from outside the directory.
    outside: Option<PathBuf>,
    patterns: Patterns,
    /// Sent whatever the patterns say; relative to the root.
    always: Vec<PathBuf>,
}

impl Plan {
    fn new(context: &Path, dockerfile: &Path) -> Result<Self, ContextError> {
        let root = context.canonicalize().map_err(ContextError::io("opening the build context", context))?;
        let looking = ContextError::io("finding the Dockerfile", dockerfile);
        let dockerfile = locate(dockerfile).map_err(&looking)?;
        let (patterns, ignore_file) = patterns(&root, &dockerfile)?;
        let inside = dockerfile.strip_prefix(&root).ok().map(Path::to_path_buf);
        let mut always: Vec<PathBuf> = ignore_file.into_iter().collect();
        // A name that the engine's API, which speaks UTF-8, cannot say gets one that it can.
        if let Some((path, name)) = inside.and_then(|path| Some((path.clone(), path.to_str()?.to_owned()))) {
            always.push(path);
            return Ok(Self { root, dockerfile: name, outside: None, patterns, always });
        }
        let outside = within(&dockerfile, &root, &dockerfile)
            .map_err(&looking)?
            .ok_or_else(|| ContextError::Escapes(dockerfile.clone()))?;
        // By its content, so that what copies the whole context is found in the cache again.
        let name = content_name(&outside).map_err(looking)?;
        Ok(Self { root, dockerfile: name, outside: Some(outside), patterns, always })
    }

    fn includes(&self, path: &Path) -> bool {
        if self.outside.is_some() && path == Path::new(&self.dockerfile) {
            return false; // No file of the context stands in for the Dockerfile.
        }
        !self.patterns.excludes(&path.to_string_lossy()) || self.always.iter().any(|always| always == path)
    }

    fn may_include_beneath(&self, dir: &Path) -> bool {
        self.always.iter().any(|always| always.starts_with(dir))
            || self.patterns.may_include_beneath(&dir.to_string_lossy())
    }
}

fn content_name(dockerfile: &Path) -> io::Result<String> {
    let (mut digest, mut file) = (Sha256::new(), BufReader::new(open_file(dockerfile)?.0));
    loop {
        let piece = file.fill_buf()?;
        if piece.is_empty() {
            break;
        }
        digest.update(piece);
        let length = piece.len();
        file.consume(length);
    }
    let hex: String = digest.finalize()[..8].iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(format!(".dockerfile.{hex}"))
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

/// The patterns that hold, and the file they stand in, relative to the root, if it lies within.
fn patterns(root: &Path, dockerfile: &Path) -> Result<(Patterns, Option<PathBuf>), ContextError> {
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
        let mut text = Vec::new();
        let (file, _) = open_file(&target).map_err(&unreadable)?;
        file.take(LARGEST_IGNORE_FILE + 1).read_to_end(&mut text).map_err(&unreadable)?;
        if text.len() as u64 > LARGEST_IGNORE_FILE {
            return Err(unreadable(io::ErrorKind::FileTooLarge.into()));
        }
        let patterns = Patterns::parse(&String::from_utf8_lossy(&text))
            .map_err(|problem| ContextError::Pattern { path: path.clone(), problem })?;
        return Ok((patterns, path.strip_prefix(root).ok().map(Path::to_path_buf)));
    }
    Ok((Patterns::default(), None))
}

/// Opens a regular file, never through a link, and never waiting for the other end of a pipe.
fn open_file(path: &Path) -> io::Result<(File, Metadata)> {
    let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
    let file = File::options().read(true).custom_flags(flags.bits()).open(path)?;
    let metadata = file.metadata()?;
    if metadata.is_file() { Ok((file, metadata)) } else { Err(io::Error::other("not a regular file")) }
}

/// What goes from the writer to the reader.
enum Message {
    Piece(Bytes),
    Failed(ContextError),
    /// Without it, the writer died.
    End,
}

type Started = (BoxStream<'static, io::Result<Bytes>>, oneshot::Receiver<ContextError>, JoinHandle<()>);

fn start(plan: Plan) -> Started {
    let (sender, receiver) = mpsc::channel(WAITING);
    let (failed, failure) = oneshot::channel();
    let writer = tokio::task::spawn_blocking(move || {
        let archive = Archive { begun: false, buffer: BytesMut::new(), sender: sender.clone() };
        let last = match (Walk { plan, archive, withheld: Vec::new() }).run() {
            Ok(()) => Message::End,
            Err(error) => Message::Failed(error),
        };
        // A reader that is gone wants neither.
        drop(sender.blocking_send(last));
    });
    let body = stream::unfold(Some((receiver, failed)), |state| async {
        let (mut receiver, failed) = state?;
        match receiver.recv().await {
            Some(Message::End) => None,
            Some(Message::Piece(piece)) => Some((Ok(piece), Some((receiver, failed)))),
            Some(Message::Failed(error)) => {
                // Whoever sends the body makes an error of the connection out of this one.
                failed.send(error).ok();
                Some((Err(io::Error::other("the build context broke off")), None))
            }
            None => Some((Err(io::ErrorKind::UnexpectedEof.into()), None)),
        }
    });
    (body.boxed(), failure, writer)
}

/// Goes through the directory, in the order of names.
struct Walk {
    plan: Plan,
    archive: Archive,
    /// Directories above the present place that are excluded, and sent only if something beneath them is.
    withheld: Vec<(PathBuf, Metadata)>,
}

impl Walk {
    fn run(mut self) -> Result<(), ContextError> {
        let sending = |path: &Path| ContextError::io("sending, with the build context,", path);
        if let Some(path) = &self.plan.outside {
            self.archive.file(self.plan.dockerfile.as_bytes(), path).map_err(sending(path))?;
        }
        let (root, mut left) = (&self.plan.root.clone(), Vec::new());
        list(Path::new(""), root, &mut left).map_err(sending(root))?;
        while let Some(relative) = left.pop() {
            let path = root.join(&relative);
            self.visit(&relative, &path, &mut left).map_err(sending(&path))?;
        }
        self.archive.finish().map_err(sending(root))
    }

    fn visit(&mut self, relative: &Path, path: &Path, left: &mut Vec<PathBuf>) -> io::Result<()> {
        if self.archive.sender.is_closed() {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        self.withheld.retain(|(dir, _)| relative.starts_with(dir));
        let metadata = path.symlink_metadata()?;
        if self.plan.includes(relative) {
            self.send(relative, path, &metadata)?;
        } else if metadata.is_dir() && self.plan.may_include_beneath(relative) {
            self.withheld.push((relative.to_path_buf(), metadata.clone()));
        } else {
            return Ok(());
        }
        if metadata.is_dir() { list(relative, path, left) } else { Ok(()) }
    }

    fn send(&mut self, relative: &Path, path: &Path, metadata: &Metadata) -> io::Result<()> {
        let kind = metadata.file_type();
        if !(kind.is_dir() || kind.is_symlink() || kind.is_file()) {
            return Ok(()); // A socket, a pipe or a device has no content to send.
        }
        for (dir, metadata) in self.withheld.drain(..) {
            self.archive.directory(dir.as_os_str().as_bytes(), &metadata)?;
        }
        let name = relative.as_os_str().as_bytes();
        if kind.is_dir() {
            self.archive.directory(name, metadata)
        } else if kind.is_symlink() {
            let target = fs::read_link(path)?;
            self.archive.header(EntryType::Symlink, name, target.as_os_str().as_bytes(), metadata)
        } else {
            self.archive.file(name, path)
        }
    }
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

/// Writes tar in GNU's format. `tar::Builder` would do, but that it cleans the targets of links, refuses long names that
/// are not UTF-8, and writes the archive's end even after a failure.
struct Archive {
    begun: bool,
    buffer: BytesMut,
    sender: mpsc::Sender<Message>,
}

impl Archive {
    fn directory(&mut self, name: &[u8], metadata: &Metadata) -> io::Result<()> {
        self.header(EntryType::Directory, &[name, b"/"].concat(), &[], metadata)
    }

    fn file(&mut self, name: &[u8], path: &Path) -> io::Result<()> {
        let (file, metadata) = open_file(path)?;
        self.header(EntryType::Regular, name, &[], &metadata)?;
        self.content(metadata.len(), file)
    }

    /// Exactly as much as the header promised: of a file that grows, what it had; one that shrinks is an error.
    fn content(&mut self, size: u64, from: impl Read) -> io::Result<()> {
        let copied = io::copy(&mut from.take(size), self)?;
        if copied < size {
            let message = format!("it shrank from {size} bytes to {copied} while it was read");
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, message));
        }
        let over = usize::try_from(size % BLOCK as u64).unwrap_or(0);
        if over > 0 { self.write_all(&[0; BLOCK][over..]) } else { Ok(()) }
    }

    fn header(&mut self, kind: EntryType, name: &[u8], link: &[u8], metadata: &Metadata) -> io::Result<()> {
        let mut header = blank(kind, if kind.is_file() { metadata.len() } else { 0 });
        header.set_mode(metadata.mode() & 0o7777);
        header.set_mtime(u64::try_from(metadata.mtime()).unwrap_or(0));
        // BuildKit tells an archive by its first 1024 bytes, and only if a whole entry's header is in them.
        let fits =
            place(link, &mut header.as_old_mut().linkname) & place(name, &mut header.as_old_mut().name);
        if !std::mem::replace(&mut self.begun, true) && !fits {
            let mut root = blank(EntryType::Directory, 0);
            root.set_mode(0o755);
            place(b"./", &mut root.as_old_mut().name);
            root.set_cksum();
            self.write_all(root.as_bytes())?;
        }
        if !place(link, &mut header.as_old_mut().linkname) {
            self.long(EntryType::GNULongLink, link)?;
        }
        if !place(name, &mut header.as_old_mut().name) {
            self.long(EntryType::GNULongName, name)?;
        }
        header.set_cksum();
        self.write_all(header.as_bytes())
    }

    /// A name that has no room in the header after this one; GNU's tar ends it with a zero.
    fn long(&mut self, kind: EntryType, name: &[u8]) -> io::Result<()> {
        let size = name.len() as u64 + 1;
        let mut header = blank(kind, size);
        place(b"././@LongLink", &mut header.as_old_mut().name);
        header.set_cksum();
        self.write_all(header.as_bytes())?;
        self.content(size, name.chain(&[0][..]))
    }

    fn finish(mut self) -> io::Result<()> {
        self.write_all(&[0; 2 * BLOCK])?;
        self.flush()
    }
}

fn blank(kind: EntryType, size: u64) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(size);
    header
}

/// Copies a name into a header's field, as much as there is room for; false if that is not all.
fn place(name: &[u8], field: &mut [u8]) -> bool {
    let length = name.len().min(field.len());
    field[..length].copy_from_slice(&name[..length]);
    length == name.len()
}

impl Write for Archive {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let length = bytes.len().min(PIECE - self.buffer.len());
        self.buffer.extend_from_slice(&bytes[..length]);
        if self.buffer.len() == PIECE {
            self.flush()?;
        }
        Ok(length)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        let piece = std::mem::replace(&mut self.buffer, BytesMut::with_capacity(PIECE)).freeze();
        self.sender.blocking_send(Message::Piece(piece)).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

#[cfg(test)]
mod tests;
