//! The stack's registry: the job of `nomad-jobs/registry.nomad.hcl`, run by the stack's Nomad.

use std::net::SocketAddr;
use std::time::Duration;

use super::agent;
use super::config::Config;
use super::control::Control;
use super::data_dir::DataDir;
use super::error::Error;
use super::programs::Registry;
use super::wait::wait_for;

const JOB: &str = include_str!("../../nomad-jobs/registry.nomad.hcl");

/// An image may have to be pulled first.
const UP: Duration = Duration::from_mins(2);

/// Runs the job and waits until the registry answers.
pub(super) async fn start(
    config: &Config,
    dir: &DataDir,
    control: &Control,
    nomad: &str,
    address: SocketAddr,
) -> Result<(), Error> {
    let job = dir.path().join("registry.nomad.hcl");
    std::fs::write(&job, JOB).map_err(Error::file("writing", &job))?;
    std::fs::create_dir_all(dir.registry()).map_err(Error::file("creating", dir.registry()))?;
    let mut run = agent::command(&config.nomad, config, dir);
    run.args(["job", "run", "-detach", "-address", nomad]);
    for variable in variables(&config.registry, dir, address) {
        run.arg("-var").arg(variable);
    }
    let output = run.arg(&job).output().await.map_err(Error::run(&config.nomad))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        return Err(Error::Ended { what: "nomad job run for the registry", status: output.status, said });
    }
    wait_until_up(control, address).await
}

fn variables(registry: &Registry, dir: &DataDir, address: SocketAddr) -> Vec<String> {
    let mut variables = match registry {
        Registry::Program(path) => vec!["driver=raw_exec".into(), format!("command={}", path.display())],
        Registry::Image(image) => vec!["driver=docker".into(), format!("image={image}")],
    };
    variables.push(format!("data_dir={}", dir.registry().display()));
    variables.push(format!("listen={}", address.ip()));
    variables.push(format!("port={}", address.port()));
    variables
}

async fn wait_until_up(control: &Control, address: SocketAddr) -> Result<(), Error> {
    let http = reqwest::Client::builder()
        .no_proxy()
        .build()
        .map_err(|source| Error::Nomad { doing: "making a client".into(), source })?;
    let url = format!("http://{address}/v2/");
    let up = wait_for(UP, async || {
        let answer = http.get(&url).timeout(Duration::from_secs(2)).send().await.ok()?;
        answer.status().is_success().then_some(())
    });
    if up.await.is_some() {
        return Ok(());
    }
    let said = control.last_words("registry").await.unwrap_or_default();
    Err(Error::NotUp { what: "the registry", seconds: UP.as_secs(), said })
}
