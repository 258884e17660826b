//! What a stack is started with.

use std::net::SocketAddr;
use std::path::PathBuf;

use super::error::Error;
use super::programs::Registry;

/// What a stack is started with. Everything is resolved: nothing here is read from the environment later.
#[derive(Clone, Debug)]
pub struct Config {
    /// The `nomad-build` program: the supervisor and the service run by it.
    pub executable: PathBuf,
    /// The Nomad program.
    pub nomad: PathBuf,
    /// What runs the registry.
    pub registry: Registry,
    /// The Docker Engine's address, when it is not the usual one.
    pub docker_host: Option<String>,
    /// Where the stack keeps its data; `None` for a temporary directory that is removed at the end.
    pub data_dir: Option<PathBuf>,
    /// Where the service listens; `None` for a stack without the service.
    pub api: Option<Listen>,
    /// Where the registry listens.
    pub registry_listen: Listen,
}

impl Config {
    /// The Docker Engine's socket, when it is not the usual one.
    pub(super) fn engine_socket(&self) -> Result<Option<&str>, Error> {
        let Some(host) = &self.docker_host else { return Ok(None) };
        let socket = host.strip_prefix("unix://").filter(|path| path.starts_with('/'));
        socket.map(Some).ok_or_else(|| Error::EngineElsewhere { host: host.clone() })
    }
}

/// An address to listen on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Listen {
    /// This address or none: a taken one is an error.
    Exactly(SocketAddr),
    /// This address when it is free, else a free port of the same interface.
    Preferably(SocketAddr),
}
