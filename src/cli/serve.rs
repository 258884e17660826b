//! `serve`: the API.

use std::sync::Arc;

use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use super::{Error, Exit};
use crate::config::{Config, VARIABLES};
use crate::dev::stdin_closed;
use crate::service::Service;
use crate::telemetry::{self, Telemetry};
use crate::{api, environment};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Stop when stdin is closed: for a program that starts the service and may be killed
    #[arg(long, hide = true)]
    while_stdin_open: bool,
}

/// The variables of the configuration, for the help.
pub(super) fn help() -> String {
    let mut text = String::from("Configuration, by environment variables:\n");
    for (name, default, what) in VARIABLES {
        let default = if default.is_empty() { String::new() } else { format!(" [{default}]") };
        text.push_str(&format!("  {name:<32} {what}{default}\n"));
    }
    text
}

/// Serves until SIGTERM or SIGINT.
pub(super) fn run(args: &Args) -> Result<Exit, Error> {
    let mut config = Config::read(&environment::process)
        .map_err(|source| Error::new(Exit::Usage, "reading the configuration").caused_by(source))?;
    telemetry::init(config.log_format, config.log_filter.take());
    super::on_threads(serve(config, args.while_stdin_open))
}

async fn serve(config: Config, while_stdin_open: bool) -> Result<Exit, Error> {
    let starting = || Error::new(Exit::Failure, "starting the service");
    if config.archive.is_none() {
        tracing::warn!(
            "there is no archive: a job's log and status last as long as Nomad keeps the job; set NOMAD_BUILD_ARCHIVE to keep them"
        );
    }
    let (listen, metrics_listen) = (config.listen, config.metrics_listen);
    let telemetry = Telemetry::new().map_err(|source| starting().caused_by(source))?;
    let service = Service::new(config, Arc::new(telemetry)).map_err(|source| starting().caused_by(source))?;
    let service = Arc::new(service);
    let bind = async |address| {
        let bound = TcpListener::bind(address).await;
        bound.map_err(|source| Error::new(Exit::Failure, format!("listening on {address}")).caused_by(source))
    };
    let listener = bind(listen).await?;
    let stop = CancellationToken::new();
    let mut work = tokio::task::JoinSet::new();
    if let Some(address) = metrics_listen {
        let stopped = stop.clone().cancelled_owned();
        work.spawn(api::serve_probes(bind(address).await?, Arc::clone(&service), stopped));
    }
    let address = listener.local_addr().map_or_else(|_| listen.to_string(), |address| address.to_string());
    tracing::info!(
        address,
        tls = service.config().tls.is_some(),
        version = env!("CARGO_PKG_VERSION"),
        "serving"
    );
    let (background, retire) = (Arc::clone(&service), CancellationToken::new());
    let retired = retire.clone();
    #[expect(clippy::disallowed_methods, reason = "it is retired and waited for below")]
    let watch = tokio::spawn(async move { Box::pin(background.run(retired)).await });
    work.spawn(api::serve(listener, service, stop.clone().cancelled_owned()));
    wait_for_stop(while_stdin_open).await.map_err(|source| starting().caused_by(source))?;
    tracing::info!("stopping: answers that were begun are finished");
    stop.cancel();
    let drained = tokio::time::timeout(GRACE, async { while work.join_next().await.is_some() {} }).await;
    if drained.is_err() {
        tracing::warn!("some answers did not end in time, and are cut");
    }
    retire.cancel();
    if tokio::time::timeout(RETIRE, watch).await.is_err() {
        tracing::debug!("what this replica holds runs out by itself");
    }
    Ok(Exit::Success)
}

/// How long answers that were begun may take once the service is told to stop.
const GRACE: std::time::Duration = std::time::Duration::from_secs(10);

/// How long giving back what this replica holds may take.
const RETIRE: std::time::Duration = std::time::Duration::from_secs(3);

async fn wait_for_stop(while_stdin_open: bool) -> std::io::Result<()> {
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    tokio::select! {
        _ = term.recv() => {}
        _ = int.recv() => {}
        () = stdin_closed(), if while_stdin_open => {}
    }
    Ok(())
}
