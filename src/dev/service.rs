//! The stack's service: this program's `serve`, as a child.

use std::net::SocketAddr;
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Child;

use super::agent;
use super::config::Config;
use super::data_dir::DataDir;
use super::error::Error;
use super::wait::wait_for;

const UP: Duration = Duration::from_mins(1);

/// Starts the service. What it says goes where the stack's own messages go.
pub(super) fn start(
    config: &Config,
    dir: &DataDir,
    nomad: &str,
    api: SocketAddr,
    registry: SocketAddr,
) -> Result<Child, Error> {
    let archive = dir.archive()?;
    let archive = reqwest::Url::from_directory_path(&archive)
        .map_err(|()| Error::file("naming", &archive)(std::io::ErrorKind::InvalidFilename.into()))?;
    let mut command = agent::command(&config.executable, config, dir);
    if let Some(socket) = config.engine_socket()? {
        command.env("NOMAD_BUILD_ENGINE_SOCKET", socket);
    }
    command
        .arg("serve")
        .env("NOMAD_BUILD_ARCHIVE", archive.as_str())
        .env("NOMAD_ADDR", nomad)
        .env("NOMAD_BUILD_LISTEN", api.to_string())
        .env("NOMAD_BUILD_RUNNER", &config.executable)
        .env("NOMAD_BUILD_TEMPLATE", "raw_exec")
        .env("NOMAD_BUILD_ALLOW_REPO_SCHEMES", "https,ssh,http,file")
        .env("NOMAD_BUILD_INSECURE_REGISTRIES", registry.to_string())
        .stdout(Stdio::null())
        .spawn()
        .map_err(Error::run(&config.executable))
}

/// Waits until the service says that it is ready.
pub(super) async fn wait_until_up(service: &mut Child, api: SocketAddr) -> Result<(), Error> {
    let http = reqwest::Client::builder()
        .no_proxy()
        .build()
        .map_err(|source| Error::Nomad { doing: "making a client".into(), source })?;
    let url = format!("http://{api}/ready");
    let up = wait_for(UP, async || {
        if let Ok(Some(status)) = service.try_wait() {
            return Some(Err(Error::Ended { what: "the service", status, said: String::new() }));
        }
        let answer = http.get(&url).timeout(Duration::from_secs(5)).send().await.ok()?;
        answer.status().is_success().then_some(Ok(()))
    });
    up.await.unwrap_or_else(|| {
        Err(Error::NotUp { what: "the service", seconds: UP.as_secs(), said: String::new() })
    })
}
