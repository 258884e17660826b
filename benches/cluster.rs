//! A Nomad that has nodes, and whose nodes do nothing: what is placed there stays placed.

use std::fs::File;
use std::net::TcpListener;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use nomad_build::dev::find_nomad;
use nomad_build::environment;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::process::{Child, Command};

/// How many nodes there are. What is placed on one slows the next placement there.
const NODES: usize = 16;

/// Longer than anything here takes that is waited for.
const PATIENCE: Duration = Duration::from_mins(10);

const PAUSE: Duration = Duration::from_millis(200);

/// A server and the nodes it knows. Dropped, it is killed.
pub(crate) struct Cluster {
    server: Child,
    pub(crate) url: String,
    http: reqwest::Client,
    dir: TempDir,
}

impl Cluster {
    pub(crate) async fn start(http: &reqwest::Client) -> anyhow::Result<Self> {
        let dir = tempfile::tempdir()?;
        let ports = Ports::free()?;
        let mut settings = ports.settings(&dir.path().join("server"));
        // Its nodes are never heard of again, and are believed to be there.
        settings["server"] = json!({ "enabled": true, "bootstrap_expect": 1, "heartbeat_grace": "24h" });
        let server = agent(dir.path(), "server", &settings)?;
        let url = format!("http://127.0.0.1:{}", ports.http);
        let cluster = Self { server, url, http: http.clone(), dir };
        let agents = (0..NODES).map(|number| cluster.node(ports.rpc, number));
        let agents = agents.collect::<anyhow::Result<Vec<_>>>()?;
        cluster
            .until("nodes that can run jobs", async || {
                let nodes = cluster.get("nodes").await.ok()?;
                let ready = |node: &&Value| {
                    node["Status"] == "ready" && node["Drivers"]["raw_exec"]["Healthy"] == true
                };
                (nodes.as_array()?.iter().filter(ready).count() == NODES).then_some(())
            })
            .await?;
        for mut agent in agents {
            agent.kill().await?;
        }
        Ok(cluster)
    }

    /// Starts a node's agent.
    fn node(&self, rpc: u16, number: usize) -> anyhow::Result<Child> {
        let name = format!("node{number}");
        let dir = self.dir.path();
        let mut settings = Ports::free()?.settings(&dir.join(&name));
        let much = 1_000_000_000;
        settings["client"] = json!({
            "enabled": true,
            "servers": [format!("127.0.0.1:{rpc}")],
            "network_interface": "lo",
            "cpu_total_compute": much,
            "memory_total_mb": much,
            "disk_total_mb": much,
            "options": {
                "fingerprint.denylist": "env_aws,env_gce,env_azure,env_digitalocean",
                "driver.denylist": "java,qemu,docker",
            },
        });
        settings["plugin"] = json!([{ "raw_exec": [{ "config": [{ "enabled": true }] }] }]);
        agent(dir, &name, &settings)
    }

    /// Waits until the server has nothing left to place.
    pub(crate) async fn settle(&self) -> anyhow::Result<()> {
        self.until("an end of the evaluations", async || {
            let pending = self.get("evaluations?status=pending&per_page=1").await.ok()?;
            pending.as_array()?.is_empty().then_some(())
        })
        .await
    }

    /// How many allocations there are.
    pub(crate) async fn allocations(&self) -> anyhow::Result<usize> {
        let listed = self.get("allocations?task_states=false").await?;
        Ok(listed.as_array().context("no list of allocations")?.len())
    }

    pub(crate) async fn stop(mut self) -> anyhow::Result<()> {
        self.server.kill().await.context("ending the server")
    }

    async fn get(&self, path: &str) -> anyhow::Result<Value> {
        let answer = self.http.get(format!("{}/v1/{path}", self.url)).send().await?;
        Ok(answer.error_for_status()?.json().await?)
    }

    async fn until(&self, what: &str, is_so: impl AsyncFn() -> Option<()>) -> anyhow::Result<()> {
        let began = Instant::now();
        while is_so().await.is_none() {
            ensure!(began.elapsed() < PATIENCE, "{what}: not within {PATIENCE:?}");
            tokio::time::sleep(PAUSE).await;
        }
        Ok(())
    }
}

/// An agent's ports.
#[derive(Clone, Copy)]
struct Ports {
    http: u16,
    rpc: u16,
    serf: u16,
}

impl Ports {
    fn free() -> anyhow::Result<Self> {
        // Bound at once, or one port could be given twice.
        let bound = [(); 3].map(|()| TcpListener::bind("127.0.0.1:0"));
        let [http, rpc, serf] = bound.map(|bound| anyhow::Ok(bound?.local_addr()?.port()));
        Ok(Self { http: http?, rpc: rpc?, serf: serf? })
    }

    fn settings(self, data: &Path) -> Value {
        let Self { http, rpc, serf } = self;
        let at = |port: u16| format!("127.0.0.1:{port}");
        json!({
            "name": data.file_name().map(|name| name.to_string_lossy()),
            "data_dir": data,
            "bind_addr": "127.0.0.1",
            "ports": { "http": http, "rpc": rpc, "serf": serf },
            "advertise": { "http": at(http), "rpc": at(rpc), "serf": at(serf) },
            "log_level": "WARN",
            "disable_update_check": true,
            "limits": { "http_max_conns_per_client": 2000 },
            "consul": { "auto_advertise": false, "server_auto_join": false, "client_auto_join": false },
        })
    }
}

fn agent(dir: &Path, name: &str, settings: &Value) -> anyhow::Result<Child> {
    let nomad = find_nomad(environment::process)?;
    let file = dir.join(format!("{name}.json"));
    std::fs::write(&file, settings.to_string())?;
    let log = File::create(dir.join(format!("{name}.log")))?;
    let agent = Command::new(&nomad)
        .arg("agent")
        .arg("-config")
        .arg(&file)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .kill_on_drop(true)
        .spawn();
    agent.with_context(|| format!("starting {}", nomad.display()))
}
