//! The stack's Nomad agent: server and client in one, on the loopback interface only.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::process::{Child, Command};
use tokio::time::Instant;

use super::config::Config;
use super::control::{Control, Node};
use super::data_dir::{DataDir, MARK};
use super::error::Error;
use super::ports::AgentPorts;
use super::wait::wait_for;

const UP: Duration = Duration::from_secs(90);

/// How long a node that is not refused takes to be known, on a busy machine.
const REGISTERS: Duration = Duration::from_millis(1500);

const RESTARTS: usize = 2;

/// Nomad's own variables: an agent or a command of the stack must not see those meant for another Nomad.
const NOMAD_VARIABLES: [&str; 13] = [
    "NOMAD_ADDR",
    "NOMAD_CACERT",
    "NOMAD_CAPATH",
    "NOMAD_CLIENT_CERT",
    "NOMAD_CLIENT_KEY",
    "NOMAD_HTTP_AUTH",
    "NOMAD_LICENSE",
    "NOMAD_NAMESPACE",
    "NOMAD_REGION",
    "NOMAD_SKIP_VERIFY",
    "NOMAD_TLS_SERVER_NAME",
    "NOMAD_TOKEN",
    "NOMAD_TOKEN_FILE",
];

/// A command of the stack: marked, without another Nomad's variables, without input, in a process group of its own, so
/// that Ctrl-C at a terminal reaches only the one who stops the rest in order.
pub(super) fn command(program: &Path, config: &Config, dir: &DataDir) -> Command {
    let mut command = Command::new(program);
    for variable in NOMAD_VARIABLES {
        command.env_remove(variable);
    }
    if let Some(host) = &config.docker_host {
        command.env("DOCKER_HOST", host);
    }
    command.env(MARK, dir.path()).stdin(Stdio::null()).process_group(0);
    command
}

/// Starts the agent and waits until its node can run `raw_exec` tasks; `started` hears of each process. The docker driver
/// is not waited for: an engine that is missing concerns builds, not the stack.
///
/// A client that registers between the server's election and the making of its keyring is refused, and asks again only
/// after 15 to 30 s (Nomad 1.11: `retryRegisterNode`). An agent that is started again finds both, at once.
pub(super) async fn start(
    config: &Config,
    dir: &DataDir,
    ports: AgentPorts,
    control: &Control,
    mut started: impl FnMut(&Child) -> Result<(), Error>,
) -> Result<Child, Error> {
    for _ in 0..RESTARTS {
        let mut agent = spawn(config, dir, ports)?;
        started(&agent)?;
        if wait_until_up(&mut agent, control, dir, Some(REGISTERS)).await? == Outcome::Up {
            return Ok(agent);
        }
        tracing::debug!("the agent's node was refused by its server: starting the agent again");
        agent.kill().await.map_err(Error::run(&config.nomad))?;
    }
    let mut agent = spawn(config, dir, ports)?;
    started(&agent)?;
    wait_until_up(&mut agent, control, dir, None).await?;
    Ok(agent)
}

fn spawn(config: &Config, dir: &DataDir, ports: AgentPorts) -> Result<Child, Error> {
    let settings = settings_file(dir);
    let text = format!("{:#}\n", agent_config(dir, ports, config.docker_host.as_deref()));
    std::fs::write(&settings, text).map_err(Error::file("writing", &settings))?;
    let log = log_file(dir);
    let out = File::create(&log).map_err(Error::file("creating", &log))?;
    let err = out.try_clone().map_err(Error::file("opening", &log))?;
    command(&config.nomad, config, dir)
        .arg("agent")
        .arg("-config")
        .arg(&settings)
        .stdout(out)
        .stderr(err)
        .spawn()
        .map_err(Error::run(&config.nomad))
}

#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    Up,
    NotRegistered,
}

/// `registers`: how long after the election the node has to be known; `None` for as long as it takes.
async fn wait_until_up(
    agent: &mut Child,
    control: &Control,
    dir: &DataDir,
    registers: Option<Duration>,
) -> Result<Outcome, Error> {
    let mut elected = None;
    let up = wait_for(UP, async || {
        if let Ok(Some(status)) = agent.try_wait() {
            return Some(Err(Error::Ended { what: "the Nomad agent", status, said: last_lines(dir) }));
        }
        let own = control.own_node().await.ok()??;
        let nodes = control.nodes().await.ok()?;
        let node = nodes.iter().find(|node| node.id == own);
        if node.is_some_and(|node| node.can_run("raw_exec")) {
            return Some(forget_others(control, &nodes, &own).await.map(|()| Outcome::Up));
        }
        // The list is answered only once there is a leader.
        let elected = *elected.get_or_insert_with(Instant::now);
        let refused = node.is_none() && registers.is_some_and(|limit| elected.elapsed() > limit);
        refused.then_some(Ok(Outcome::NotRegistered))
    });
    up.await.unwrap_or_else(|| {
        Err(Error::NotUp { what: "the Nomad agent", seconds: UP.as_secs(), said: last_lines(dir) })
    })
}

/// A node of an earlier agent counts as ready until its heartbeat is missed: nothing must be placed there.
async fn forget_others(control: &Control, nodes: &[Node], own: &str) -> Result<(), Error> {
    for node in nodes.iter().filter(|node| node.id != own) {
        control.purge(node).await?;
    }
    Ok(())
}

/// The ports of the last agent in this directory: a server that comes back elsewhere takes long to know itself.
pub(super) fn last_ports(dir: &DataDir) -> Option<AgentPorts> {
    let settings: Value = serde_json::from_slice(&std::fs::read(settings_file(dir)).ok()?).ok()?;
    let port = |name: &str| settings["ports"][name].as_u64()?.try_into().ok();
    Some(AgentPorts { http: port("http")?, rpc: port("rpc")?, serf: port("serf")? })
}

/// The end of the agent's log.
pub(super) fn last_lines(dir: &DataDir) -> String {
    let log = std::fs::read_to_string(log_file(dir)).unwrap_or_default();
    let lines: Vec<&str> = log.lines().filter(|line| !line.is_empty()).collect();
    lines[lines.len().saturating_sub(12)..].join("\n")
}

fn settings_file(dir: &DataDir) -> PathBuf {
    dir.path().join("nomad.json")
}

fn log_file(dir: &DataDir) -> PathBuf {
    dir.path().join("nomad.log")
}

fn agent_config(dir: &DataDir, ports: AgentPorts, docker_host: Option<&str>) -> Value {
    let AgentPorts { http, rpc, serf } = ports;
    let mut docker = json!({
        // The engine is shared with other clients, and builds rely on its images: Nomad collects neither.
        "gc": { "image": false, "dangling_containers": { "enabled": false } },
        // For the registry's data, and the engine's socket in a runner's container.
        "volumes": { "enabled": true },
    });
    if let Some(host) = docker_host {
        docker["endpoint"] = host.into();
    }
    json!({
        "name": "dev",
        "data_dir": dir.nomad(),
        "bind_addr": "127.0.0.1",
        "ports": { "http": http, "rpc": rpc, "serf": serf },
        "advertise": {
            "http": format!("127.0.0.1:{http}"),
            "rpc": format!("127.0.0.1:{rpc}"),
            "serf": format!("127.0.0.1:{serf}"),
        },
        "log_level": "WARN",
        "disable_update_check": true,
        // There is no Consul in this stack, and one that is on the machine is somebody else's.
        // Everybody of this machine has one address: the service, its callers, the tests.
        "limits": { "http_max_conns_per_client": 2000 },
        "consul": { "auto_advertise": false, "server_auto_join": false, "client_auto_join": false },
        "server": { "enabled": true, "bootstrap_expect": 1 },
        "client": {
            "enabled": true,
            "servers": [format!("127.0.0.1:{rpc}")],
            "network_interface": "lo",
            "cgroup_parent": dir.cgroup(),
            // A runner has to stop its containers, and may be pushing.
            "max_kill_timeout": "120s",
            // Logs go with their allocation: keep them for as long as the stack lives, however full the disk is.
            "gc_max_allocs": 2000,
            "gc_disk_usage_threshold": 99,
            "gc_inode_usage_threshold": 99,
            // These ask for a cloud's metadata, and some abort the start over a variable like AWS_CA_BUNDLE; no job here asks for
            // these drivers, and to look for one starts a JVM.
            "options": {
                "fingerprint.denylist": "env_aws,env_gce,env_azure,env_digitalocean",
                "driver.denylist": "java,qemu",
            },
        },
        // Each level a list: Nomad reads JSON as HCL, where blocks repeat.
        "plugin": [
            { "raw_exec": [{ "config": [{ "enabled": true }] }] },
            { "docker": [{ "config": [docker] }] },
        ],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_agent_is_reached_from_this_machine_only() {
        let dir = DataDir::at("/tmp/nb-00000000".into(), true);
        let config = agent_config(&dir, AgentPorts { http: 1, rpc: 2, serf: 3 }, Some("unix:///e.sock"));
        assert_eq!(config["bind_addr"], "127.0.0.1");
        assert_eq!(config["advertise"]["rpc"], "127.0.0.1:2");
        assert_eq!(config["plugin"][1]["docker"][0]["config"][0]["endpoint"], "unix:///e.sock");
        let other = DataDir::at("/tmp/nb-00000001".into(), true);
        assert_ne!(config["client"]["cgroup_parent"], Value::from(other.cgroup()));
    }
}
