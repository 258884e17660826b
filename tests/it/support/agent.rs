//! A Nomad agent of the tests' own, started by the first test that needs it and stopped after the last.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use nomad_build::nomad::{Client, Settings};
use tempfile::TempDir;

use super::ports;
use crate::stack::processes_of;

static AGENT: Mutex<Weak<Agent>> = Mutex::new(Weak::new());

/// The variable by which an agent's processes, and all that they start, are known: that of a stack.
pub(super) const MARK: &str = "NOMAD_BUILD_STACK";

/// Everybody of these tests has one address. Nobody is asked whether there is another Nomad.
pub(super) const LIMITS: &str = "limits {\n http_max_conns_per_client = 2000\n}\ndisable_update_check = true";

/// A node keeps what has ended until a test has read it, however full the machine's disk is.
pub(super) const KEEPING: &str =
    "gc_max_allocs = 2000\n gc_disk_usage_threshold = 100\n gc_inode_usage_threshold = 100";

/// Where Nomad's helpers have their sockets: in a common folder those of killed ones would stay.
pub(super) const SOCKETS: &str = "PLUGIN_UNIX_SOCKET_DIR";

/// Has programs in Go collect only when they hold that much: Nomad's helpers, of which each job has eight, never do.
pub(crate) const LAZY: [(&str, &str); 2] = [("GOGC", "off"), ("GOMEMLIMIT", "512MiB")];

/// A running agent, server and client in one.
pub(crate) struct Agent {
    dir: TempDir,
    port: u16,
    process: Mutex<Child>,
    environment: Vec<(&'static str, PathBuf)>,
    jobs: Mutex<Vec<String>>,
    cgroup: String,
    /// The token to take it down with, where it has ACLs, and the namespace of its jobs.
    pub(super) token: Option<String>,
    pub(super) namespace: &'static str,
}

impl Agent {
    /// The agent of all tests that run now.
    pub(crate) async fn shared() -> Arc<Self> {
        let agent = {
            let mut shared = AGENT.lock().unwrap();
            shared.upgrade().unwrap_or_else(|| {
                let agent = Arc::new(Self::start(""));
                *shared = Arc::downgrade(&agent);
                agent
            })
        };
        agent.is_ready().await;
        agent
    }

    /// One of a single test, which may collect what has ended: everybody's, on the agent of all.
    pub(crate) async fn own() -> Arc<Self> {
        let agent = Arc::new(Self::start(""));
        agent.is_ready().await;
        agent
    }

    /// One whose node has so much memory, in MiB, whatever the machine has.
    pub(crate) async fn with_memory(megabytes: u32) -> Self {
        let agent = Self::start(&format!("client {{\n memory_total_mb = {megabytes}\n}}"));
        agent.is_ready().await;
        agent
    }

    /// One whose tasks are known to a Vault.
    pub(crate) async fn with_vault(vault: &super::vault::Vault) -> Self {
        let agent = Self::start(&vault.configuration());
        vault.trust(&format!("http://{}", agent.address()));
        agent.is_ready().await;
        agent
    }

    /// Where it keeps everything: its state, its log, the folders of allocations.
    pub(super) fn folder(&self) -> &Path {
        self.dir.path()
    }

    async fn is_ready(&self) {
        self.get_past_its_keyring().await;
        wait_for("a node that is ready", Duration::from_mins(1), async || {
            let nodes = self.get("nodes").await.ok()?;
            nodes.as_array()?.iter().any(|node| node["Status"] == "ready").then_some(())
        })
        .await;
        self.client().leader().await.unwrap();
    }

    /// Starts one, with further configuration.
    pub(super) fn start(further: &str) -> Self {
        Self::start_in(further, &[])
    }

    /// The same, with variables that its node's tasks have, too.
    pub(super) fn start_in(further: &str, environment: &[(&'static str, PathBuf)]) -> Self {
        let dir = tempfile::Builder::new().prefix("nbl-").tempdir_in("/tmp").unwrap();
        let [port, rpc, serf] = [0; 3].map(|_| ports::port());
        let name = dir.path().file_name().unwrap().to_str().unwrap();
        let cgroup = format!("{name}.slice");
        let config = format!(
            r#"
            data_dir = "{data}/nomad"
            bind_addr = "127.0.0.1"
            ports {{
              http = {port}
              rpc = {rpc}
              serf = {serf}
            }}
            advertise {{
              http = "127.0.0.1"
              rpc = "127.0.0.1"
              serf = "127.0.0.1"
            }}
            server {{
              enabled = true
              bootstrap_expect = 1
            }}
            client {{
              enabled = true
              cgroup_parent = "{cgroup}"
              {KEEPING}
              options {{
                "fingerprint.denylist" = "env_aws,env_gce,env_azure,env_digitalocean"
                "driver.denylist" = "java,qemu"
              }}
            }}
            plugin "raw_exec" {{
              config {{ enabled = true }}
            }}
            {LIMITS}
            {further}
            "#,
            data = dir.path().display()
        );
        fs::write(dir.path().join("agent.hcl"), config).unwrap();
        Self {
            process: Mutex::new(spawn(dir.path(), environment)),
            environment: environment.to_vec(),
            dir,
            port,
            jobs: Mutex::default(),
            cgroup,
            token: None,
            namespace: "default",
        }
    }

    /// A client that registers between the server's election and the making of its keyring is refused, and asks again only
    /// after 15 to 30 s (Nomad 1.11: `retryRegisterNode`). An agent that is started again finds both.
    pub(super) async fn get_past_its_keyring(&self) {
        let log = self.dir().join("agent.log");
        let said = || fs::read_to_string(&log).unwrap();
        wait_for("a keyring", Duration::from_mins(1), async || {
            let said = said();
            (said.contains("initialized keyring") || said.contains(RESTARTED)).then_some(())
        })
        .await;
        let mut process = self.process.lock().unwrap();
        // Another test may have been here first.
        let said = said();
        if said.contains("keyring has not been initialized yet") && !said.contains(RESTARTED) {
            process.kill().unwrap();
            process.wait().unwrap();
            fs::write(&log, format!("{RESTARTED}\n")).unwrap();
            *process = spawn(self.dir(), &self.environment);
        }
    }

    pub(crate) fn address(&self) -> std::net::SocketAddr {
        ([127, 0, 0, 1], self.port).into()
    }

    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// A client of it.
    pub(crate) fn client(&self) -> Client {
        client(self.address())
    }

    /// Remembers a job, to be stopped with the agent.
    pub(crate) fn owns(&self, job: &str) {
        self.jobs.lock().unwrap().push(job.to_owned());
    }

    /// Collects everything that has ended.
    pub(crate) async fn collect(&self) {
        let url = format!("http://{}/v1/system/gc", self.address());
        reqwest::Client::new().put(url).send().await.unwrap().error_for_status().unwrap();
    }

    async fn get(&self, path: &str) -> reqwest::Result<serde_json::Value> {
        reqwest::get(format!("http://{}/v1/{path}", self.address())).await?.json().await
    }

    fn cli(&self, args: &[&str]) {
        let _ignored = Command::new(binary())
            .args(args)
            .env("NOMAD_ADDR", format!("http://{}", self.address()))
            .envs(self.token.iter().map(|token| ("NOMAD_TOKEN", token)))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        for job in self.jobs.lock().unwrap().iter() {
            self.cli(&["job", "stop", "-namespace", self.namespace, "-purge", "-yes", "-detach", job]);
        }
        // Collecting stops the helpers of every task and unmounts what they had.
        self.cli(&["system", "gc"]);
        end_client(&mut self.process.lock().unwrap(), self.dir.path(), &self.cgroup);
    }
}

/// The first line of the log of an agent that was started again.
const RESTARTED: &str = "its node was refused: started again";

/// Runs the agent of a folder.
fn spawn(dir: &Path, environment: &[(&'static str, PathBuf)]) -> Child {
    let log = fs::File::options().create(true).append(true).open(dir.join("agent.log")).unwrap();
    Command::new(binary())
        .args(["agent", "-config"])
        .arg(dir.join("agent.hcl"))
        .env(MARK, dir)
        .env(SOCKETS, dir)
        .envs(LAZY)
        .envs(environment.iter().map(|(name, value)| (name, value)))
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .stdin(Stdio::null())
        .spawn()
        .unwrap()
}

/// Ends a client agent whose jobs are collected, and takes what it leaves: mounts below its folder, and its cgroup.
pub(super) fn end_client(process: &mut Child, dir: &Path, cgroup: &str) {
    let pid = Pid::from_raw(i32::try_from(process.id()).unwrap());
    let mounted = || fs::read_to_string("/proc/mounts").unwrap();
    let dir = dir.to_str().unwrap();
    let ours = |line: &str| line.split(' ').nth(1).filter(|at| at.starts_with(dir)).map(str::to_owned);
    let begun = Instant::now();
    while mounted().lines().any(|line| ours(line).is_some()) && begun.elapsed() < Duration::from_secs(5) {
        std::thread::sleep(Duration::from_millis(50));
    }
    // One that a test killed is reaped, and its number may be another process's.
    if let Ok(None) = process.try_wait() {
        kill(pid, Signal::SIGINT).ok();
        process.wait().ok();
    }
    end_tasks(Path::new(dir), cgroup, &[]);
    for path in cgroups(cgroup) {
        remove_cgroup(&path);
    }
}

/// Ends the tasks of a client that is no more, and Nomad's own helpers of them: they outlive it. Its memory file systems go.
pub(super) fn end_tasks(dir: &Path, cgroup: &str, but: &[u32]) {
    let mut pids: Vec<_> = cgroups(cgroup).iter().flat_map(|path| processes_in(path)).collect();
    pids.extend(processes_of(dir));
    for pid in pids.into_iter().filter(|pid| !but.contains(pid)) {
        // It may have ended since it was listed.
        kill(Pid::from_raw(i32::try_from(pid).unwrap()), Signal::SIGKILL).ok();
    }
    for line in fs::read_to_string("/proc/mounts").unwrap().lines() {
        if let Some(at) = line.split(' ').nth(1).filter(|at| Path::new(at).starts_with(dir)) {
            Command::new("umount").arg(at).status().unwrap();
        }
    }
}

/// A client's cgroup, wherever it has one: with version 1 in every hierarchy.
fn cgroups(cgroup: &str) -> Vec<PathBuf> {
    let root = Path::new("/sys/fs/cgroup");
    let hierarchies = fs::read_dir(root).into_iter().flatten().flatten().map(|entry| entry.path());
    let all = hierarchies.chain([root.to_owned()]).map(|hierarchy| hierarchy.join(cgroup));
    all.filter(|path| path.is_dir()).collect()
}

/// The processes of a cgroup and of those below it.
fn processes_in(path: &Path) -> Vec<u32> {
    let own = fs::read_to_string(path.join("cgroup.procs")).unwrap_or_default();
    let below = fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path());
    let below = below.filter(|path| path.is_dir()).flat_map(|path| processes_in(&path));
    own.lines().filter_map(|line| line.parse().ok()).chain(below).collect()
}

/// Cgroups are removed from the leaves, and only empty ones can be.
fn remove_cgroup(path: &Path) {
    for child in fs::read_dir(path).into_iter().flatten().flatten() {
        if child.path().is_dir() {
            remove_cgroup(&child.path());
        }
    }
    let _ignored = fs::remove_dir(path);
}

/// A client of the Nomad at an address.
pub(crate) fn client(address: std::net::SocketAddr) -> Client {
    let address = format!("http://{address}").parse().unwrap();
    Client::new(&Settings::plain(address)).unwrap()
}

#[expect(clippy::disallowed_methods, reason = "tests have no configuration but the environment")]
pub(super) fn binary() -> PathBuf {
    let cached = || PathBuf::from(std::env::var_os("HOME").unwrap()).join(".cache/nomad-build/bin/nomad");
    std::env::var_os("NOMAD_BUILD_NOMAD").map_or_else(cached, PathBuf::from)
}

/// Asks until there is an answer.
pub(crate) async fn wait_for<T>(what: &str, most: Duration, mut ask: impl AsyncFnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(answer) = ask().await {
            return answer;
        }
        assert!(begun.elapsed() < most, "no {what} within {most:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
