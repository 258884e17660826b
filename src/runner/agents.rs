//! Agents that hold the keys by which the steps of a build sign. The steps never see a key.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use secrecy::{ExposeSecret as _, SecretString};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::process::{Child, Command};

/// Why there is no agent.
#[derive(Debug, thiserror::Error)]
pub(super) enum NoAgent {
    /// There is no such program, or it could not be spoken to.
    #[error("{program} cannot be run, which ssh takes: install an OpenSSH client where builds run")]
    Program {
        /// The program.
        program: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Its folder could not be made.
    #[error("no folder for the agents of ssh could be made")]
    Folder(#[source] io::Error),
    /// The agent did not begin.
    #[error("the agent of ssh.{0} did not begin")]
    NotBegun(String),
    /// It does not take the key.
    #[error("the key of ssh.{id} cannot be used: {said}")]
    Refused {
        /// The key's ID.
        id: String,
        /// What ssh-add said.
        said: String,
    },
}

/// Agents that run, one for each key. Dropped, they are ended.
#[derive(Default)]
pub(super) struct Agents {
    /// Where each listens, by the ID of its key.
    pub(super) sockets: BTreeMap<String, PathBuf>,
    running: Vec<Child>,
    /// By which the sockets are reached: the path of an allocation is longer than that of a socket may be.
    folder: Option<std::fs::File>,
}

impl Agents {
    /// Starts one for each key, in a folder of their own that nobody else reads.
    pub(super) async fn start(
        keys: &BTreeMap<String, SecretString>,
        folder: &Path,
        environment: &[(String, String)],
    ) -> Result<Self, NoAgent> {
        let mut agents = Self::default();
        if keys.is_empty() {
            return Ok(agents);
        }
        // A task that runs again finds the remains of the first run.
        tokio::fs::remove_dir_all(folder).await.ok();
        tokio::fs::DirBuilder::new().mode(0o700).create(folder).await.map_err(NoAgent::Folder)?;
        let opened = std::fs::File::open(folder).map_err(NoAgent::Folder)?;
        let path = environment.iter().find(|(name, _)| name == "PATH").map(|(_, path)| path.as_str());
        for (place, (id, key)) in keys.iter().enumerate() {
            let socket = place.to_string();
            let run = |program| {
                let mut command = Command::new(program);
                command.current_dir(folder).env_clear().env("SSH_AUTH_SOCK", &socket).kill_on_drop(true);
                command.envs(path.map(|path| ("PATH", path)));
                command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
                command
            };
            agents.running.push(begin(run("ssh-agent"), &socket, id).await?);
            add(run("ssh-add"), key, id).await?;
            let socket = format!("/proc/self/fd/{}/{socket}", opened.as_raw_fd());
            agents.sockets.insert(id.clone(), socket.into());
        }
        agents.folder = Some(opened);
        Ok(agents)
    }
}

async fn begin(mut agent: Command, socket: &str, id: &str) -> Result<Child, NoAgent> {
    let failed = |source| NoAgent::Program { program: "ssh-agent", source };
    let mut agent = agent.args(["-D", "-a", socket]).spawn().map_err(failed)?;
    // It says where it listens once it does.
    let mut said = String::new();
    if let Some(output) = agent.stdout.take() {
        BufReader::new(output).read_line(&mut said).await.map_err(failed)?;
    }
    if said.is_empty() {
        return Err(NoAgent::NotBegun(id.to_owned()));
    }
    // A pipe that nobody reads holds up who writes into it.
    drop(agent.stderr.take());
    Ok(agent)
}

/// Gives an agent its key, which is on no disk and in no argument.
async fn add(mut program: Command, key: &SecretString, id: &str) -> Result<(), NoAgent> {
    let failed = |source| NoAgent::Program { program: "ssh-add", source };
    let mut adding = program.args(["-q", "-"]).stdin(Stdio::piped()).spawn().map_err(failed)?;
    if let Some(mut input) = adding.stdin.take() {
        match input.write_all(key.expose_secret().as_bytes()).await {
            // It says itself what it does not take.
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => return Err(failed(error)),
            _ => {}
        }
    }
    let output = adding.wait_with_output().await.map_err(failed)?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(NoAgent::Refused { id: id.to_owned(), said })
}
