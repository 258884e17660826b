//! `nomad-build dev`: a whole stack on this machine, in the foreground.

use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};

use super::{Error, Exit};
use crate::dev::{self, Config, Ended, Listen, Registry, Stack, stdin_closed};
use crate::environment;

/// Run a whole stack on this machine, in the foreground: a Nomad agent, a registry and the service.
///
/// When all is up, one line on stdout says where: `ready api=http://… registry=HOST:PORT nomad=http://…`.
/// Everything is stopped at Ctrl-C, and also when this process is killed.
///
/// For development only: all of it listens on the loopback interface without authentication, so every user of this
/// machine can run anything through it.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Keep the data here instead of in a temporary directory that is removed at the end
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Where the API listens [default: 127.0.0.1:8080, or a free port when that is taken]
    #[arg(long, value_name = "ADDRESS:PORT")]
    listen: Option<SocketAddr>,
    /// The registry's port on the loopback interface [default: 5000, or a free port when that is taken]
    #[arg(long, value_name = "PORT")]
    registry_port: Option<u16>,
    /// The registry: the path of a program, or an image [default: docker-registry, else registry:2]
    #[arg(long, value_name = "PATH|IMAGE", env = "NOMAD_BUILD_REGISTRY_PROGRAM")]
    registry: Option<String>,
    /// The Nomad program [default: nomad on PATH, else the one that tools/setup has built]
    #[arg(long, value_name = "PATH", env = "NOMAD_BUILD_NOMAD")]
    nomad: Option<PathBuf>,
    /// The Docker Engine's address, a socket of this machine (`unix:///PATH`)
    #[arg(long, value_name = "URL", env = "DOCKER_HOST")]
    docker_host: Option<String>,
    /// Run Nomad and the registry only
    #[arg(long)]
    no_service: bool,
    /// Stop when stdin is closed: for a program that starts a stack and may be killed
    #[arg(long)]
    while_stdin_open: bool,
}

/// The supervisor of a stack (started by `dev`).
#[derive(Debug, clap::Args)]
pub(super) struct SuperviseArgs {
    #[arg(long)]
    data_dir: PathBuf,
    #[arg(long)]
    remove: bool,
}

/// Runs a stack until it is told to stop.
pub(super) async fn run(args: Args) -> Result<Exit, Error> {
    let done = args.run().await;
    done.map(|()| Exit::Success)
        .map_err(|source| Error::new(Exit::Failure, "running the stack").caused_by(source))
}

/// Watches over a stack until it is gone.
pub(super) async fn supervise(args: SuperviseArgs) -> Result<Exit, Error> {
    let done = args.run().await;
    done.map(|()| Exit::Success)
        .map_err(|source| Error::new(Exit::Failure, "watching over the stack").caused_by(source))
}

impl Args {
    async fn run(self) -> anyhow::Result<()> {
        log_to_stderr();
        let while_stdin_open = self.while_stdin_open;
        let config = self.config()?;
        let stop = stop_requested(while_stdin_open)?;
        tokio::pin!(stop);
        let mut stack = match Stack::start(&config, &mut stop).await? {
            Ended::Up(stack) => stack,
            Ended::Interrupted => return Ok(()),
        };
        let told = tell_ready(&stack).context("writing to stdout");
        let failed = match told {
            Ok(()) => tokio::select! {
                () = stop => None,
                error = stack.failed() => Some(error.into()),
            },
            Err(error) => Some(error),
        };
        tracing::info!("stopping");
        let stopped = stack.stop().await;
        failed.map_or(Ok(()), Err)?;
        Ok(stopped?)
    }

    fn config(self) -> Result<Config, anyhow::Error> {
        let local = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let or = |given: Option<SocketAddr>, usual: u16| {
            given.map_or(Listen::Preferably(local(usual)), Listen::Exactly)
        };
        let executable = std::env::current_exe().context("finding this program's own path")?;
        let nomad = self.nomad.map_or_else(|| dev::find_nomad(environment::process), Ok)?;
        let registry = self
            .registry
            .map_or_else(|| dev::find_registry(environment::process), |name| Registry::named(&name));
        Ok(Config {
            executable,
            nomad,
            registry,
            docker_host: self.docker_host.filter(|host| !host.is_empty()),
            data_dir: self.data_dir,
            api: (!self.no_service).then(|| or(self.listen, 8080)),
            registry_listen: or(self.registry_port.map(local), 5000),
        })
    }
}

impl SuperviseArgs {
    async fn run(self) -> anyhow::Result<()> {
        log_to_stderr();
        Ok(dev::supervise(self.data_dir, self.remove).await?)
    }
}

fn tell_ready(stack: &Stack) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    write!(out, "ready")?;
    if let Some(api) = stack.api() {
        write!(out, " api=http://{api}")?;
    }
    writeln!(out, " registry={} nomad={}", stack.registry(), stack.nomad())?;
    out.flush()
}

/// Completes at SIGINT, SIGTERM or SIGHUP and, when asked to, at the end of stdin. The handlers stay: a second signal
/// does not cut the stop short.
fn stop_requested(while_stdin_open: bool) -> anyhow::Result<impl Future<Output = ()>> {
    let handler = |kind| signal(kind).context("listening for signals");
    let mut interrupt = handler(SignalKind::interrupt())?;
    let mut terminate = handler(SignalKind::terminate())?;
    let mut hang_up = handler(SignalKind::hangup())?;
    Ok(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hang_up.recv() => {}
            () = stdin_closed(), if while_stdin_open => {}
        }
    })
}

/// A supervisor may outlive whoever reads its stderr: a line that cannot be written is dropped.
fn log_to_stderr() {
    let filter = tracing_subscriber::EnvFilter::builder()
        .with_default_directive(tracing::level_filters::LevelFilter::INFO.into())
        .from_env_lossy();
    let subscriber = tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_env_filter(filter)
        .with_target(false)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .log_internal_errors(false);
    subscriber.init();
}
