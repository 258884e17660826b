//! A running stack: started in order, watched, and let go of.

use std::future::Future;
use std::net::SocketAddr;
use std::path::Path;
use std::pin::pin;
use std::process::ExitStatus;

use tokio::process::Child;

use super::config::Config;
use super::control::Control;
use super::data_dir::{DataDir, State, start_lock};
use super::error::Error;
use super::supervisor::Supervisor;
use super::take_down::take_down;
use super::{agent, ports, registry, service};

/// A running stack. Dropping it takes it down too, without waiting for it.
pub struct Stack {
    dir: DataDir,
    parts: Parts,
    supervisor: Supervisor,
}

/// How the start of a stack ended.
pub enum Ended {
    /// It is up.
    Up(Box<Stack>),
    /// It was to stop before it was up, and is down.
    Interrupted,
}

/// The running parts of a stack, and where they are reached.
struct Parts {
    nomad: String,
    agent: Child,
    registry: SocketAddr,
    service: Option<(SocketAddr, Child)>,
}

impl Stack {
    /// Starts a stack and waits until all of it is up. When it cannot be, or `interrupt` completes first, what was
    /// started is taken down again before this returns.
    pub async fn start(config: &Config, interrupt: impl Future<Output = ()>) -> Result<Ended, Error> {
        config.engine_socket()?;
        let mut interrupt = pin!(interrupt);
        let _starting = tokio::select! {
            lock = start_lock() => lock?,
            () = &mut interrupt => return Ok(Ended::Interrupted),
        };
        take_down_left_overs().await;
        let dir = prepare(config.data_dir.as_deref()).await?;
        let supervisor = Supervisor::start(config, &dir).await?;
        let up = tokio::select! {
            up = raise(config, &dir) => Some(up),
            () = interrupt => None,
        };
        match up {
            Some(Ok(parts)) => Ok(Ended::Up(Box::new(Self { dir, parts, supervisor }))),
            Some(Err(error)) => {
                if let Err(error) = supervisor.take_down().await {
                    tracing::error!(%error, "taking down what was started");
                }
                Err(error)
            }
            None => supervisor.take_down().await.map(|()| Ended::Interrupted),
        }
    }

    /// The address of Nomad's HTTP API.
    pub fn nomad(&self) -> &str {
        &self.parts.nomad
    }

    /// The registry's address, spoken to by plain HTTP.
    pub fn registry(&self) -> SocketAddr {
        self.parts.registry
    }

    /// The API's address; `None` for a stack without the service.
    pub fn api(&self) -> Option<SocketAddr> {
        self.parts.service.as_ref().map(|(address, _)| *address)
    }

    /// Waits until a part of the stack ends by itself, and says which.
    pub async fn failed(&mut self) -> Error {
        tokio::select! {
            ended = self.parts.agent.wait() => because("the Nomad agent", ended, agent::last_lines(&self.dir)),
            ended = exit(self.parts.service.as_mut().map(|(_, child)| child)) => because("the service", ended, String::new()),
            error = self.supervisor.ended() => error,
        }
    }

    /// Takes the stack down and waits until it is.
    pub async fn stop(self) -> Result<(), Error> {
        self.supervisor.take_down().await
    }
}

async fn exit(child: Option<&mut Child>) -> std::io::Result<ExitStatus> {
    match child {
        Some(child) => child.wait().await,
        None => std::future::pending().await,
    }
}

fn because(what: &'static str, ended: std::io::Result<ExitStatus>, said: String) -> Error {
    match ended {
        Ok(status) => Error::Ended { what, status, said },
        Err(source) => Error::Run { program: what.into(), source },
    }
}

/// The directory of a new stack, in which nothing runs.
async fn prepare(given: Option<&Path>) -> Result<DataDir, Error> {
    let Some(path) = given else { return DataDir::temporary() };
    let dir = DataDir::given(path)?;
    if dir.state().is_some() {
        let _held = dir.lock()?;
        tracing::warn!(data_dir = %path.display(), "taking down what an earlier stack left behind");
        take_down(&dir).await?;
    }
    Ok(dir)
}

/// Starts the parts in order, and writes down each as soon as it runs.
async fn raise(config: &Config, dir: &DataDir) -> Result<Parts, Error> {
    let preferred = agent::last_ports(dir).unwrap_or(ports::USUAL);
    let ports = ports::agent_ports(preferred)?;
    let nomad = format!("http://127.0.0.1:{}", ports.http);
    let control = Control::new(&nomad)?;
    tracing::info!(nomad, data_dir = %dir.path().display(), "starting a Nomad agent");
    let mut state = State { nomad: nomad.clone(), agent: 0, service: None };
    let agent = agent::start(config, dir, ports, &control, |agent| {
        state.agent = pid(agent);
        dir.set_state(&state)
    })
    .await?;

    let registry = ports::choose(config.registry_listen, "the registry")?;
    tracing::info!(%registry, with = ?config.registry, "starting the registry");
    registry::start(config, dir, &control, &nomad, registry).await?;

    let Some(listen) = config.api else {
        return Ok(Parts { nomad, agent, registry, service: None });
    };
    let api = ports::choose(listen, "the API")?;
    tracing::info!(%api, "starting the service");
    let mut service = service::start(config, dir, &nomad, api, registry)?;
    state.service = Some(pid(&service));
    dir.set_state(&state)?;
    service::wait_until_up(&mut service, api).await?;
    Ok(Parts { nomad, agent, registry, service: Some((api, service)) })
}

/// A child that has been waited for has no number any more: then there is nothing to take down, which 0 stands for.
fn pid(child: &Child) -> i32 {
    child.id().and_then(|id| id.try_into().ok()).unwrap_or(0)
}

/// Takes down the temporary stacks of this user whose supervisor was killed as well.
async fn take_down_left_overs() {
    for dir in DataDir::left_over() {
        // Whoever holds it is at work.
        let Ok(_held) = dir.lock() else { continue };
        tracing::warn!(data_dir = %dir.path().display(), "taking down what an earlier stack left behind");
        if let Err(error) = take_down(&dir).await {
            tracing::warn!(%error, "cannot take it down");
        }
    }
}
