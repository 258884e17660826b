//! The files of a build, as BuildKit asks its client for them: first what there is, then the content of what it wants.
//!
//! The messages are those of <https://github.com/tonistiigi/fsutil>, but that names are bytes here, as they are in Linux.
//!
//! Invariant: what is asked for is a number of this list, never a path.
//! Invariant: memory is bounded, but for the list; a reader that is slow, or gone, holds the sender up, or ends it.

use std::convert::Infallible;
use std::ffi::OsStr;
use std::fs::{self, Metadata};
use std::io::{self, Read as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::task::{Context as TaskContext, Poll};

use bytes::{Bytes, BytesMut};
use futures_util::stream::{self, BoxStream, StreamExt as _};
use prost::Message;
use tokio::sync::mpsc::{self, Receiver, Sender};
use tonic::codegen::http::{Request as HttpRequest, Response as HttpResponse};
use tonic::codegen::{Body, BoxFuture, Service, StdError};
use tonic::metadata::MetadataMap;
use tonic::server::{Grpc, NamedService, StreamingService};
use tonic::{Code, Request, Response, Status, Streaming};
use tonic_prost::ProstCodec;

use super::super::context::{Context, ContextError, Entry, open_file};

/// What BuildKit calls to be sent files.
pub(super) const METHOD: &str = "/moby.filesync.v1.FileSync/DiffCopy";

/// Bytes of a file in one message, at most.
const PIECE: usize = 64 * 1024;
/// Messages that may wait for the reader.
const WAITING: usize = 16;

const STAT: i32 = 0;
const REQUEST: i32 = 1;
const DATA: i32 = 2;
const FINISHED: i32 = 3;

#[derive(Clone, PartialEq, Message)]
struct Packet {
    #[prost(int32, tag = "1")]
    kind: i32,
    #[prost(message, optional, tag = "2")]
    stat: Option<Stat>,
    /// A file's number, by its place among all that was told.
    #[prost(uint32, tag = "3")]
    id: u32,
    #[prost(bytes = "bytes", tag = "4")]
    data: Bytes,
}

#[derive(Clone, PartialEq, Message)]
struct Stat {
    #[prost(bytes = "bytes", tag = "1")]
    path: Bytes,
    /// As Go has it.
    #[prost(uint32, tag = "2")]
    mode: u32,
    #[prost(int64, tag = "5")]
    size: i64,
    /// Nanoseconds since 1970.
    #[prost(int64, tag = "6")]
    modified: i64,
    #[prost(bytes = "bytes", tag = "7")]
    target: Bytes,
}

impl Stat {
    fn of(entry: &Entry<'_>) -> io::Result<Self> {
        let (metadata, is_link) = (entry.metadata, entry.metadata.is_symlink());
        let target =
            if is_link { fs::read_link(entry.path)?.into_os_string() } else { OsStr::new("").to_owned() };
        Ok(Self {
            path: Bytes::copy_from_slice(entry.relative.as_os_str().as_bytes()),
            mode: mode(metadata),
            size: if metadata.is_file() { i64::try_from(metadata.len()).unwrap_or(i64::MAX) } else { 0 },
            // Whole seconds, as in an image.
            modified: metadata.mtime().saturating_mul(1_000_000_000),
            target: Bytes::copy_from_slice(target.as_bytes()),
        })
    }
}

/// Go's `os.FileMode`: the permissions as usual, and the rest in bits of its own.
fn mode(metadata: &Metadata) -> u32 {
    let (kind, mode) = (metadata.file_type(), metadata.mode());
    let bit = |is: bool, bit: u32| u32::from(is) << bit;
    (mode & 0o777)
        | bit(kind.is_dir(), 31)
        | bit(kind.is_symlink(), 27)
        | bit(mode & 0o4000 != 0, 23)
        | bit(mode & 0o2000 != 0, 22)
        | bit(mode & 0o1000 != 0, 20)
}

/// What BuildKit wants to be sent.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Wanted {
    Dockerfile,
    /// The whole context, or what has this one name in it.
    Context(Option<&'static str>),
}

impl Wanted {
    fn of(metadata: &MetadataMap) -> Option<Self> {
        match metadata.get("dir-name")?.as_bytes() {
            b"dockerfile" => Some(Self::Dockerfile),
            // BuildKit looks for patterns first, to say which files it does not want. It is sent none of those in any case.
            b"context" => Some(Self::Context(is_asked_alone(metadata).then_some(IGNORE_FILE))),
            _ => None,
        }
    }
}

const IGNORE_FILE: &str = ".dockerignore";

fn is_asked_alone(metadata: &MetadataMap) -> bool {
    ["followpaths", "include-patterns"].into_iter().any(|key| {
        let mut paths = metadata.get_all(key).iter();
        paths.next().is_some_and(|path| path.as_bytes() == IGNORE_FILE.as_bytes()) && paths.next().is_none()
    })
}

/// The files of one build.
#[derive(Clone)]
pub(super) struct Files {
    context: Arc<Context>,
    /// The Dockerfile's name in the request.
    dockerfile: Arc<str>,
    failed: Sender<ContextError>,
}

type Answers = BoxStream<'static, Result<Packet, Status>>;

impl Files {
    /// The files, and why they could not be sent, if they could not: the engine is told less.
    pub(super) fn new(context: Context, dockerfile: &str) -> (Self, Receiver<ContextError>) {
        let (failed, failure) = mpsc::channel(1);
        (Self { context: Arc::new(context), dockerfile: dockerfile.into(), failed }, failure)
    }

    fn send(&self, wanted: Wanted, requests: Streaming<Packet>) -> Answers {
        let (output, mut answers) = mpsc::channel(WAITING);
        let (ask, asked) = mpsc::channel(WAITING);
        let files = self.clone();
        tokio::task::spawn_blocking(move || {
            let mut sending = Sending { output, files: Vec::new(), told: 0 };
            if let Err(error) = files.serve(&wanted, &mut sending, asked) {
                // A reader that is gone has its own reason; of others, only the first is of interest.
                if sending.output.is_closed() {
                    return;
                }
                files.failed.try_send(error).ok();
                let broken = Status::new(Code::Aborted, "the build context broke off");
                sending.output.blocking_send(Err(broken)).ok();
            }
        });
        let answers = stream::poll_fn(move |context| answers.poll_recv(context));
        stream::select(answers, requests_to(ask, requests)).boxed()
    }

    fn serve(
        &self,
        wanted: &Wanted,
        sending: &mut Sending,
        mut asked: Receiver<u32>,
    ) -> Result<(), ContextError> {
        match wanted {
            Wanted::Dockerfile => {
                let path = self.context.dockerfile();
                let metadata = path.symlink_metadata();
                let told = metadata.and_then(|metadata| {
                    sending.tell(&Entry { relative: Path::new(&*self.dockerfile), path, metadata: &metadata })
                });
                told.map_err(Context::sending(path))?;
            }
            Wanted::Context(only) => self.context.walk(|entry| match only {
                Some(name) if entry.relative != Path::new(name) => Ok(()),
                _ => sending.tell(&entry),
            })?,
        }
        let whole = || Context::sending(self.context.root());
        sending.put(Packet { kind: STAT, ..Packet::default() }).map_err(whole())?;
        while let Some(id) = asked.blocking_recv() {
            let path = sending.path(id).map_err(whole())?;
            sending.content(id, &path).map_err(Context::sending(&path))?;
        }
        sending.put(Packet { kind: FINISHED, ..Packet::default() }).map_err(whole())
    }
}

/// Passes on what is asked for, until nothing more will be; says nothing itself.
fn requests_to(ask: Sender<u32>, mut requests: Streaming<Packet>) -> Answers {
    let asked = async move {
        while let Ok(Some(packet)) = requests.message().await {
            // Who would send it has failed, and said so.
            if packet.kind != REQUEST || ask.send(packet.id).await.is_err() {
                break;
            }
        }
    };
    stream::once(asked).filter_map(|()| std::future::ready(None)).boxed()
}

/// What has been told to the one who asks.
struct Sending {
    output: Sender<Result<Packet, Status>>,
    /// The regular files, by number.
    files: Vec<(u32, PathBuf)>,
    told: u32,
}

impl Sending {
    fn put(&self, packet: Packet) -> io::Result<()> {
        self.output.blocking_send(Ok(packet)).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }

    fn tell(&mut self, entry: &Entry<'_>) -> io::Result<()> {
        self.put(Packet { kind: STAT, stat: Some(Stat::of(entry)?), ..Packet::default() })?;
        if entry.metadata.is_file() {
            self.files.push((self.told, entry.path.to_path_buf()));
        }
        self.told += 1;
        Ok(())
    }

    fn path(&self, id: u32) -> io::Result<PathBuf> {
        let found = self.files.binary_search_by_key(&id, |(id, _)| *id);
        let found = found.map_err(|_| io::Error::other(format!("file {id} was asked for, which is none")))?;
        Ok(self.files[found].1.clone())
    }

    /// Exactly as much as was told: of a file that grows, what it had; one that shrinks is an error.
    fn content(&self, id: u32, path: &Path) -> io::Result<()> {
        let (file, metadata) = open_file(path)?;
        let (size, mut sent) = (metadata.len(), 0);
        let mut file = file.take(size);
        loop {
            let mut piece = BytesMut::zeroed(PIECE);
            let length = file.read(&mut piece)?;
            piece.truncate(length);
            // An empty one is the end.
            self.put(Packet { kind: DATA, id, data: piece.freeze(), ..Packet::default() })?;
            if length == 0 {
                break;
            }
            sent += length as u64;
        }
        if sent < size {
            let message = format!("it shrank from {size} bytes to {sent} while it was read");
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, message));
        }
        Ok(())
    }
}

impl StreamingService<Packet> for Files {
    type Response = Packet;
    type ResponseStream = Answers;
    type Future = BoxFuture<Response<Answers>, Status>;

    fn call(&mut self, request: Request<Streaming<Packet>>) -> Self::Future {
        let answer = Wanted::of(request.metadata())
            .map(|wanted| Response::new(self.send(wanted, request.into_inner())))
            .ok_or_else(|| Status::not_found("only the Dockerfile and the build context can be had"));
        Box::pin(std::future::ready(answer))
    }
}

impl<B> Service<HttpRequest<B>> for Files
where
    B: Body + Send + 'static,
    B::Error: Into<StdError> + Send + 'static,
{
    type Response = HttpResponse<tonic::body::Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Self::Error>;

    fn poll_ready(&mut self, _: &mut TaskContext<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: HttpRequest<B>) -> Self::Future {
        let files = self.clone();
        Box::pin(async move {
            if request.uri().path() != METHOD {
                return Ok(Status::unimplemented("files are sent by DiffCopy").into_http());
            }
            Ok(Grpc::new(ProstCodec::<Packet, Packet>::default()).streaming(files, request).await)
        })
    }
}

impl NamedService for Files {
    const NAME: &'static str = "moby.filesync.v1.FileSync";
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    #[test]
    fn a_mode_is_told_as_go_has_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        fs::write(path("file"), "").unwrap();
        fs::create_dir(path("dir")).unwrap();
        symlink("a", path("link")).unwrap();
        // As `os.FileMode` prints them: d is 1<<31, L 1<<27, u 1<<23, g 1<<22, t 1<<20.
        for (name, permissions, want) in [
            ("file", 0o644, 0o644),
            ("file", 0o4751, 1 << 23 | 0o751),
            ("file", 0o2755, 1 << 22 | 0o755),
            ("dir", 0o700, 1 << 31 | 0o700),
            ("dir", 0o1777, 1 << 31 | 1 << 20 | 0o777),
        ] {
            fs::set_permissions(path(name), fs::Permissions::from_mode(permissions)).unwrap();
            assert_eq!(mode(&path(name).symlink_metadata().unwrap()), want, "{name} {permissions:o}");
        }
        assert_eq!(mode(&path("link").symlink_metadata().unwrap()), 1 << 27 | 0o777);
    }

    #[test]
    fn the_context_and_the_dockerfile_can_be_had_and_nothing_else() {
        let ignore = [("followpaths", ".dockerignore")];
        for (name, paths, want) in [
            ("dockerfile", &[("followpaths", "D")][..], Some(Wanted::Dockerfile)),
            ("context", &[], Some(Wanted::Context(None))),
            ("context", &ignore, Some(Wanted::Context(Some(IGNORE_FILE)))),
            ("context", &[("include-patterns", ".dockerignore")], Some(Wanted::Context(Some(IGNORE_FILE)))),
            ("context", &[ignore[0], ("followpaths", "a")], Some(Wanted::Context(None))),
            ("etc", &[], None),
        ] {
            let mut metadata = MetadataMap::new();
            metadata.insert("dir-name", name.parse().unwrap());
            for (key, path) in paths {
                metadata.append(*key, path.parse().unwrap());
            }
            assert_eq!(Wanted::of(&metadata), want, "{name} {paths:?}");
        }
        assert_eq!(Wanted::of(&MetadataMap::new()), None);
    }
}
