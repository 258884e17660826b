//! Three Nomad servers and one client agent on this machine's loopback interface, for who wants to kill some of them.
//!
//! The service speaks to the client agent, as it does in production: that one finds the servers that are left.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use super::agent::{MARK, binary, end_client, end_tasks, free_ports, wait_for};

const SERVERS: usize = 3;

/// One server's ports: HTTP, RPC, serf.
type Ports = [u16; 3];

/// A running cluster. Dropped, it is killed.
pub(crate) struct Cluster {
    dir: TempDir,
    ports: Vec<Ports>,
    servers: Mutex<Vec<Child>>,
    client: Mutex<Child>,
    cgroup: String,
    /// The client agent's address.
    pub(crate) url: String,
}

static SHARED: tokio::sync::Mutex<Weak<Cluster>> = tokio::sync::Mutex::const_new(Weak::new());
static IN_USE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

impl Cluster {
    /// One for the tests that harm nodes and leave them well, for one at a time.
    pub(crate) async fn shared() -> (Arc<Self>, tokio::sync::MutexGuard<'static, ()>) {
        let cluster = {
            let mut shared = SHARED.lock().await;
            if let Some(cluster) = shared.upgrade() {
                cluster
            } else {
                let cluster = Arc::new(Self::start().await);
                *shared = Arc::downgrade(&cluster);
                cluster
            }
        };
        let in_use = IN_USE.lock().await;
        // A test that failed may have left it dead: the next one must not fail of that.
        let client_died =
            cluster.client.lock().unwrap_or_else(PoisonError::into_inner).try_wait().unwrap().is_some();
        if client_died {
            cluster.restart_client().await;
        }
        (cluster, in_use)
    }

    /// Starts one, and waits for its leader.
    pub(crate) async fn start() -> Self {
        let dir = tempfile::Builder::new().prefix("nbc-").tempdir_in("/tmp").unwrap();
        let ports: Vec<_> = (0..SERVERS).map(|_| free_ports()).collect();
        let serfs: Vec<_> = ports.iter().map(|[_, _, serf]| format!("127.0.0.1:{serf}")).collect();
        for (number, ports) in ports.iter().enumerate() {
            let role = format!(
                "server {{\n enabled = true\n bootstrap_expect = {SERVERS}\n \
                 min_heartbeat_ttl = \"2s\"\n heartbeat_grace = \"2s\"\n \
                 server_join {{\n retry_join = {serfs:?}\n retry_interval = \"1s\"\n }}\n}}"
            );
            configure(dir.path(), &format!("server{number}"), *ports, &role);
        }
        let rpcs: Vec<_> = ports.iter().map(|[_, rpc, _]| format!("127.0.0.1:{rpc}")).collect();
        let own = free_ports();
        let cgroup = format!("{}.slice", dir.path().file_name().unwrap().to_str().unwrap());
        let role = format!(
            "client {{\n enabled = true\n servers = {rpcs:?}\n cgroup_parent = \"{cgroup}\"\n options {{\n \
             \"fingerprint.denylist\" = \"env_aws,env_gce,env_azure,env_digitalocean\"\n }}\n}}\n\
             plugin \"raw_exec\" {{\n config {{\n enabled = true\n }}\n}}"
        );
        configure(dir.path(), "client", own, &role);
        let servers = (0..SERVERS).map(|number| spawn(dir.path(), &format!("server{number}"))).collect();
        let client = Mutex::new(spawn(dir.path(), "client"));
        let url = format!("http://127.0.0.1:{}", own[0]);
        let cluster = Self { dir, ports, servers: Mutex::new(servers), client, cgroup, url };
        cluster.leader(None).await;
        wait_for("a client that finds the leader", Duration::from_mins(1), async || {
            ask(own[0], "status/leader").await.filter(|leader| leader.len() > 2)
        })
        .await;
        cluster
    }

    /// The number of the leader, once a server other than `than` is one and says so.
    pub(crate) async fn leader(&self, than: Option<usize>) -> usize {
        wait_for("a leader", Duration::from_mins(1), async || {
            for (number, [http, ..]) in
                self.ports.iter().enumerate().filter(|(number, _)| Some(*number) != than)
            {
                let said = ask(*http, "status/leader").await;
                let of = |said: &String| {
                    self.ports.iter().position(|[_, rpc, _]| said.ends_with(&format!(":{rpc}\"")))
                };
                if let Some(leader) = said.as_ref().and_then(of).filter(|leader| Some(*leader) != than) {
                    // A follower may name one that is no more.
                    if leader == number {
                        return Some(leader);
                    }
                }
            }
            None
        })
        .await
    }

    /// Ends a server at once, as a crash does.
    pub(crate) fn kill(&self, number: usize) {
        let server = &mut self.servers.lock().unwrap()[number];
        server.kill().unwrap();
        server.wait().unwrap();
    }

    /// Halts a server or lets it go on, as a machine that hangs.
    pub(crate) fn halt(&self, number: usize, halted: bool) {
        signal(&self.servers.lock().unwrap()[number], halted);
    }

    /// The same of the client agent. Its tasks go on.
    pub(crate) fn halt_client(&self, halted: bool) {
        signal(&self.client.lock().unwrap(), halted);
    }

    /// The address of a server, which goes on without the client.
    pub(crate) fn server(&self) -> String {
        format!("http://127.0.0.1:{}", self.ports[0][0])
    }

    /// Ends the client agent at once, as a crash does. Its tasks go on.
    pub(crate) fn kill_client(&self) {
        let client = &mut self.client.lock().unwrap();
        client.kill().unwrap();
        client.wait().unwrap();
    }

    /// What a reboot does to the node: its agent and every task end at once, its memory file systems are empty, and the
    /// agent starts again.
    pub(crate) async fn reboot_client(&self) {
        self.kill_client();
        let servers: Vec<_> = self.servers.lock().unwrap().iter().map(Child::id).collect();
        end_tasks(self.dir.path(), &self.cgroup, &servers);
        self.restart_client().await;
    }

    /// Starts the client agent again, and waits until it answers.
    pub(crate) async fn restart_client(&self) {
        *self.client.lock().unwrap() = spawn(self.dir.path(), "client");
        let port = self.url.rsplit(':').next().unwrap().parse().unwrap();
        wait_for("the client is back", Duration::from_mins(1), async || ask(port, "agent/health").await)
            .await;
    }

    /// Nomad's state, in a file.
    pub(crate) fn snapshot(&self) -> std::path::PathBuf {
        let path = self.dir.path().join(format!("{}.snap", uuid::Uuid::new_v4()));
        self.program(&["operator", "snapshot", "save", path.to_str().unwrap()]);
        path
    }

    /// Brings Nomad back to an older state.
    pub(crate) fn restore(&self, snapshot: &Path) {
        self.program(&["operator", "snapshot", "restore", snapshot.to_str().unwrap()]);
    }

    fn program(&self, arguments: &[&str]) {
        let output =
            Command::new(binary()).args(arguments).env("NOMAD_ADDR", self.server()).output().unwrap();
        assert!(output.status.success(), "nomad {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// Ends two servers, so that there is no leader; the number of the second one.
    pub(crate) fn kill_majority(&self, first: usize) -> usize {
        let second = (first + 1) % SERVERS;
        self.kill(first);
        self.kill(second);
        second
    }

    /// Starts a server again that was killed.
    pub(crate) fn start_again(&self, number: usize) {
        self.servers.lock().unwrap()[number] = spawn(self.dir.path(), &format!("server{number}"));
    }

    /// The same, and waits until the others count it in.
    pub(crate) async fn restart(&self, number: usize) {
        self.start_again(number);
        self.is_back(number).await;
    }

    /// Ends every server at once, and starts them again after a while.
    pub(crate) async fn restart_all(&self, after: Duration) {
        (0..SERVERS).for_each(|number| self.kill(number));
        tokio::time::sleep(after).await;
        (0..SERVERS).for_each(|number| self.start_again(number));
        for number in 0..SERVERS {
            self.is_back(number).await;
        }
    }

    /// Waits until a server that was started again has a leader and all its peers.
    async fn is_back(&self, number: usize) {
        let [http, ..] = self.ports[number];
        wait_for("the server is back", Duration::from_mins(1), async || {
            let peers = ask(http, "status/peers").await?;
            let leader = ask(http, "status/leader").await?;
            (peers.matches(':').count() == SERVERS && leader.len() > 2).then_some(())
        })
        .await;
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let servers = self.servers.get_mut().unwrap_or_else(PoisonError::into_inner);
        let client = self.client.get_mut().unwrap_or_else(PoisonError::into_inner);
        // A test that failed may leave some of them halted: nothing below would end.
        for process in servers.iter_mut().chain([&mut *client]) {
            if let Ok(None) = process.try_wait() {
                signal(process, false);
            }
        }
        // Collecting unmounts what tasks had. Where there is no leader any more, nothing was run.
        Command::new("timeout")
            .arg("30")
            .arg(binary())
            .args(["system", "gc"])
            .env("NOMAD_ADDR", &self.url)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .ok();
        end_client(client, self.dir.path(), &self.cgroup);
        for server in servers {
            server.kill().ok();
            server.wait().ok();
        }
    }
}

fn signal(process: &Child, halted: bool) {
    let pid = Pid::from_raw(process.id().try_into().unwrap());
    kill(pid, if halted { Signal::SIGSTOP } else { Signal::SIGCONT }).unwrap();
}

fn configure(dir: &Path, name: &str, [http, rpc, serf]: Ports, role: &str) {
    let config = format!(
        "name = \"{name}\"\ndata_dir = \"{}/{name}\"\nbind_addr = \"127.0.0.1\"\n\
         ports {{\n http = {http}\n rpc = {rpc}\n serf = {serf}\n}}\n\
         advertise {{\n http = \"127.0.0.1\"\n rpc = \"127.0.0.1\"\n serf = \"127.0.0.1\"\n}}\n{role}\n",
        dir.display(),
    );
    fs::write(dir.join(format!("{name}.hcl")), config).unwrap();
}

fn spawn(dir: &Path, name: &str) -> Child {
    let log = fs::File::options().create(true).append(true).open(dir.join(format!("{name}.log"))).unwrap();
    Command::new(binary())
        .args(["agent", "-config"])
        .arg(dir.join(format!("{name}.hcl")))
        .env(MARK, dir)
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .unwrap()
}

async fn ask(port: u16, path: &str) -> Option<String> {
    let http = reqwest::Client::builder().no_proxy().tls_certs_only([]).build().unwrap();
    let asked = http.get(format!("http://127.0.0.1:{port}/v1/{path}")).timeout(Duration::from_secs(2));
    let answer = asked.send().await.ok()?.error_for_status().ok()?;
    answer.text().await.ok()
}
