//! Why a stack could not be started, or did not stay up.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitStatus;

/// Why a stack could not be started, or did not stay up.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no Nomad on this machine.
    #[error("no Nomad found on PATH or at {}: run tools/setup, or say where it is with --nomad", cached.display())]
    NoNomad {
        /// Where set-up would have put one.
        cached: PathBuf,
    },
    /// Nomad puts a socket below the data directory, and a socket's path is at most 107 bytes.
    #[error("the data directory {} is too long: {limit} bytes are left of the 107 of a unix socket's path", path.display())]
    DataDirTooLong {
        /// The data directory, made absolute.
        path: PathBuf,
        /// How many bytes it may have.
        limit: usize,
    },
    /// Another stack runs in the same data directory.
    #[error("the data directory {} is in use by another stack", path.display())]
    InUse {
        /// The data directory.
        path: PathBuf,
    },
    /// The Docker Engine is not behind a socket of this machine.
    #[error(
        "builds cannot use the Docker Engine at {host}: they reach an engine of this machine, by its socket. Unset DOCKER_HOST, or name a socket: --docker-host unix:///PATH"
    )]
    EngineElsewhere {
        /// Its address.
        host: String,
    },
    /// A port that was asked for by number is taken.
    #[error("cannot listen on {address} for {what}")]
    PortTaken {
        /// What was to listen there.
        what: &'static str,
        /// The address.
        address: SocketAddr,
        /// Why not.
        source: std::io::Error,
    },
    /// A file or directory could not be read, written, locked or removed.
    #[error("{doing} {}", path.display())]
    File {
        /// What was being done.
        doing: &'static str,
        /// To what.
        path: PathBuf,
        /// Why it failed.
        source: std::io::Error,
    },
    /// A program could not be started or waited for.
    #[error("running {}", program.display())]
    Run {
        /// The program.
        program: PathBuf,
        /// Why it failed.
        source: std::io::Error,
    },
    /// A program of the stack ended by itself.
    #[error("{what} ended ({status}){}", quoted(said))]
    Ended {
        /// Which program.
        what: &'static str,
        /// How it ended.
        status: ExitStatus,
        /// The last lines it said, when they are kept in a file.
        said: String,
    },
    /// A part of the stack did not come up in time.
    #[error("{what} was not up after {seconds} s{}", quoted(said))]
    NotUp {
        /// Which part.
        what: &'static str,
        /// How long it was waited for.
        seconds: u64,
        /// What it says of itself.
        said: String,
    },
    /// A call to the stack's Nomad failed.
    #[error("asking Nomad: {doing}")]
    Nomad {
        /// What was being done.
        doing: String,
        /// Why it failed.
        source: reqwest::Error,
    },
    /// A process of the stack, or a mount, could not be removed.
    #[error("the stack in {} is not fully down: {left}", path.display())]
    LeftBehind {
        /// The data directory.
        path: PathBuf,
        /// What is left.
        left: String,
    },
    /// A signal handler could not be installed.
    #[error("listening for signals")]
    Signals(#[source] std::io::Error),
}

impl Error {
    /// For `map_err`: a failure of `doing` something to the file at `path`.
    pub(super) fn file(doing: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { doing, path, source }
    }

    /// For `map_err`: a failure to run `program`.
    pub(super) fn run(program: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let program = program.into();
        move |source| Self::Run { program, source }
    }
}

fn quoted(said: &str) -> String {
    if said.is_empty() { String::new() } else { format!("; it said:\n{said}") }
}
