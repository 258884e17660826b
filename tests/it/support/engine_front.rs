//! A front of the engine's socket, which goes away and comes back as an engine does that is restarted.

use std::os::unix::net::UnixListener as Listener;
use std::path::PathBuf;
use std::sync::Mutex;

use tempfile::TempDir;
use tokio::net::{UnixListener, UnixStream};
use tokio_util::sync::CancellationToken;

pub(crate) struct EngineFront {
    path: PathBuf,
    stopped: Mutex<CancellationToken>,
    _folder: TempDir,
}

impl EngineFront {
    pub(crate) fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("engine.sock");
        let front = Self { path, stopped: Mutex::default(), _folder: folder };
        front.start_again();
        front
    }

    pub(crate) fn socket(&self) -> &str {
        self.path.to_str().unwrap()
    }

    /// Cuts every connection, and takes no more.
    pub(crate) fn stop(&self) {
        std::fs::remove_file(&self.path).unwrap();
        self.stopped.lock().unwrap().cancel();
    }

    pub(crate) fn start_again(&self) {
        let stopped = CancellationToken::new();
        *self.stopped.lock().unwrap() = stopped.clone();
        let listener = Listener::bind(&self.path).unwrap();
        listener.set_nonblocking(true).unwrap();
        let listener = UnixListener::from_std(listener).unwrap();
        let forward = async move {
            while let Ok((mut client, _)) = listener.accept().await {
                let stopped = stopped.clone();
                let copy = async move {
                    let mut engine = UnixStream::connect(super::engine_socket()).await?;
                    tokio::io::copy_bidirectional(&mut client, &mut engine).await
                };
                tokio::spawn(stopped.run_until_cancelled_owned(copy));
            }
        };
        tokio::spawn(self.stopped.lock().unwrap().clone().run_until_cancelled_owned(forward));
    }
}
