//! A front of the Docker Engine whose answers arrive in pieces: a line's end is apart from the line.

use std::path::{Path, PathBuf};
use std::time::Duration;

use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};

/// Long enough for what came before to be read by itself.
const APART: Duration = Duration::from_millis(2);

/// A running front; it ends with the test.
pub(crate) struct Torn {
    pub(crate) socket: PathBuf,
    _folder: TempDir,
}

impl Torn {
    pub(crate) fn before(engine: &'static str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("engine.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(forward(client, Path::new(engine)));
            }
        });
        Self { socket, _folder: folder }
    }
}

async fn forward(client: UnixStream, engine: &Path) {
    let Ok(engine) = UnixStream::connect(engine).await else { return };
    let ((mut from_client, mut to_client), (mut from_engine, mut to_engine)) =
        (client.into_split(), engine.into_split());
    let answers = async {
        let mut bytes = vec![0; 64 << 10];
        while let Ok(length @ 1..) = from_engine.read(&mut bytes).await {
            for piece in bytes[..length].split_inclusive(|byte| *byte == b'}') {
                if to_client.write_all(piece).await.is_err() {
                    return;
                }
                tokio::time::sleep(APART).await;
            }
        }
    };
    tokio::select! {
        () = answers => {}
        () = async {
            tokio::io::copy(&mut from_client, &mut to_engine).await.ok();
            std::future::pending::<()>().await;
        } => {}
    }
}
