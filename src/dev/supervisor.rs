//! The process that outlives its stack's own to take the stack down.
//!
//! The two are joined by a pipe that nobody writes to: it closes when the stack's process lets go of it or ends,
//! in whatever way. (`PR_SET_PDEATHSIG` would kill only direct children, and `raw_exec` tasks outlive their agent.)

use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, ChildStdin, Command};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

use super::config::Config;
use super::data_dir::DataDir;
use super::error::Error;
use super::take_down::take_down;

const UP: Duration = Duration::from_secs(20);

/// What a supervisor says once it holds the data directory.
const WATCHING: &str = "watching";

/// A stack's hold on its supervisor.
pub(super) struct Supervisor {
    child: Child,
    stack: ChildStdin,
}

impl Supervisor {
    /// Starts a supervisor for a data directory, which it holds from then on.
    pub(super) async fn start(config: &Config, dir: &DataDir) -> Result<Self, Error> {
        let failed = || Error::run(&config.executable);
        let mut command = Command::new(&config.executable);
        command.arg("dev-supervise").arg("--data-dir").arg(dir.path());
        if dir.is_temporary() {
            command.arg("--remove");
        }
        if let Some(host) = &config.docker_host {
            command.env("DOCKER_HOST", host);
        }
        command.process_group(0).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().map_err(failed())?;
        let pipes = child.stdin.take().zip(child.stdout.take());
        let (stack, out) = pipes.ok_or_else(|| failed()(std::io::ErrorKind::BrokenPipe.into()))?;
        let mut line = String::new();
        let mut out = BufReader::new(out);
        match tokio::time::timeout(UP, out.read_line(&mut line)).await {
            Ok(Ok(_)) if line.trim_end() == WATCHING => Ok(Self { child, stack }),
            Ok(_) => {
                let status = child.wait().await.map_err(failed())?;
                Err(Error::Ended { what: "the supervisor", status, said: String::new() })
            }
            Err(_) => {
                Err(Error::NotUp { what: "the supervisor", seconds: UP.as_secs(), said: String::new() })
            }
        }
    }

    /// Waits for the supervisor to end by itself, which it never should.
    pub(super) async fn ended(&mut self) -> Error {
        match self.child.wait().await {
            Ok(status) => Error::Ended { what: "the supervisor", status, said: String::new() },
            Err(source) => Error::Run { program: "the supervisor".into(), source },
        }
    }

    /// Lets the supervisor take the stack down, and waits until it has.
    pub(super) async fn take_down(self) -> Result<(), Error> {
        let Self { mut child, stack } = self;
        drop(stack);
        let status =
            child.wait().await.map_err(|source| Error::Run { program: "the supervisor".into(), source })?;
        if status.success() {
            return Ok(());
        }
        Err(Error::Ended { what: "the supervisor", status, said: String::new() })
    }
}

/// Watches over the stack in `data_dir`: holds the directory, says so on stdout, waits until stdin closes and takes the
/// stack down. With `remove` the directory goes too.
pub async fn supervise(data_dir: PathBuf, remove: bool) -> Result<(), Error> {
    let dir = DataDir::at(data_dir, remove);
    let _held = dir.lock()?;
    // A terminal that closes takes the stack's own process, and must leave this one to its work.
    let _hang_up = signal(SignalKind::hangup()).map_err(Error::Signals)?;
    let _interrupt = signal(SignalKind::interrupt()).map_err(Error::Signals)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(Error::Signals)?;
    writeln!(std::io::stdout(), "{WATCHING}").map_err(Error::file("writing to", "stdout"))?;
    tokio::select! {
        () = stdin_closed() => {}
        _ = terminate.recv() => {}
    }
    take_down(&dir).await
}

/// Completes when stdin ends. A thread of its own reads it: the runtime waits for its own blocking threads at the end,
/// and this one may never return.
pub(crate) async fn stdin_closed() {
    let (closed, wait) = oneshot::channel::<()>();
    std::thread::spawn(move || {
        let mut buffer = [0; 512];
        while std::io::stdin().lock().read(&mut buffer).is_ok_and(|read| read > 0) {}
        drop(closed);
    });
    // Nothing is ever sent: the sender's end is the message.
    wait.await.unwrap_or_default();
}
