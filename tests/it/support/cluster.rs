//! Nomad servers and one client agent on this machine's loopback interface, for who wants to kill some of them.
//!
//! The service speaks to the client agent, as it does in production: that one finds the servers that are left.

use std::fs;
use std::ops::Deref;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::agent::{KEEPING, LAZY, LIMITS, MARK, SOCKETS, binary, end_client, end_tasks, wait_for};
use super::ports;
use super::ways::Ways;

const SERVERS: usize = 3;

/// What the ways know the client by: no server has that number.
const CLIENT: usize = SERVERS;

/// How many lines of each agent's log a failed test shows.
const TOLD: usize = 20;

/// One server's ports: HTTP, RPC, serf.
type Ports = [u16; 3];

/// A running cluster. Dropped, it is killed.
pub(crate) struct Cluster {
    dir: TempDir,
    ports: Vec<Ports>,
    ways: Ways,
    servers: Mutex<Vec<Child>>,
    client: Mutex<Child>,
    cgroup: String,
    /// The client agent's address.
    pub(crate) url: String,
}

/// Clusters for tests that leave them well, each for one test at a time. They go with the last test that waits for one. Their
/// client is what such tests make trouble for, so that each has one server: three take three times the cpu to be idle.
struct Pool {
    free: Mutex<Vec<Cluster>>,
    places: Arc<Semaphore>,
}

/// How many there are: such tests mostly wait.
const PLACES: usize = 3;

static POOL: Mutex<Weak<Pool>> = Mutex::new(Weak::new());

/// A cluster of the pool, as long as this value.
pub(crate) struct Lent {
    /// There until the end.
    cluster: Option<Cluster>,
    pool: Arc<Pool>,
    _place: OwnedSemaphorePermit,
}

impl Deref for Lent {
    type Target = Cluster;

    fn deref(&self) -> &Cluster {
        self.cluster.as_ref().unwrap()
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        self.tell_a_failed_test();
        self.pool.free.lock().unwrap_or_else(PoisonError::into_inner).extend(self.cluster.take());
    }
}

impl Cluster {
    /// One for this test alone, that others may have used before.
    pub(crate) async fn lent() -> Lent {
        let pool = {
            let mut pool = POOL.lock().unwrap_or_else(PoisonError::into_inner);
            pool.upgrade().unwrap_or_else(|| {
                let places = Arc::new(Semaphore::new(PLACES));
                let new = Arc::new(Pool { free: Mutex::default(), places });
                *pool = Arc::downgrade(&new);
                new
            })
        };
        let place = Arc::clone(&pool.places).acquire_owned().await.unwrap();
        let free = pool.free.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let cluster = match free {
            Some(cluster) => cluster,
            None => Self::of(1).await,
        };
        // A test that failed may have left it dead: the next one must not fail of that.
        let client_died =
            cluster.client.lock().unwrap_or_else(PoisonError::into_inner).try_wait().unwrap().is_some();
        if client_died {
            cluster.restart_client().await;
        }
        Lent { cluster: Some(cluster), pool, _place: place }
    }

    /// Starts one of three servers, and waits for its leader.
    pub(crate) async fn start() -> Self {
        Self::of(SERVERS).await
    }

    async fn of(servers: usize) -> Self {
        let dir = tempfile::Builder::new().prefix("nbc-").tempdir_in("/tmp").unwrap();
        let ports: Vec<_> = (0..servers).map(|_| [0; 3].map(|_| ports::port())).collect();
        let ways = Ways::before(&ports.iter().map(|[_, rpc, _]| *rpc).collect::<Vec<_>>());
        let serfs: Vec<_> = ports.iter().map(|[_, _, serf]| format!("127.0.0.1:{serf}")).collect();
        for (number, ports) in ports.iter().enumerate() {
            let role = format!(
                "server {{\n enabled = true\n bootstrap_expect = {servers}\n \
                 min_heartbeat_ttl = \"2s\"\n heartbeat_grace = \"2s\"\n \
                 server_join {{\n retry_join = {serfs:?}\n retry_interval = \"1s\"\n }}\n}}"
            );
            configure(dir.path(), &format!("server{number}"), *ports, ways.ports[number], &role);
        }
        let rpcs: Vec<_> = ways.ports.iter().map(|port| format!("127.0.0.1:{port}")).collect();
        let own = [0; 3].map(|_| ports::port());
        let cgroup = format!("{}.slice", dir.path().file_name().unwrap().to_str().unwrap());
        let role = format!(
            "client {{\n enabled = true\n servers = {rpcs:?}\n cgroup_parent = \"{cgroup}\"\n {KEEPING}\n options {{\n \
             \"fingerprint.denylist\" = \"env_aws,env_gce,env_azure,env_digitalocean\"\n \"driver.denylist\" = \"java,qemu\"\n }}\n}}\n\
             plugin \"raw_exec\" {{\n config {{\n enabled = true\n }}\n}}"
        );
        configure(dir.path(), "client", own, own[1], &role);
        let servers = (0..servers).map(|number| spawn(dir.path(), number, &ways)).collect();
        let client = Mutex::new(spawn(dir.path(), CLIENT, &ways));
        let url = format!("http://127.0.0.1:{}", own[0]);
        let cluster = Self { dir, ports, ways, servers: Mutex::new(servers), client, cgroup, url };
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
                    self.ways.ports.iter().position(|port| said.ends_with(&format!(":{port}\"")))
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

    /// Cuts a server off from the other agents, or lets it be reached again. It lives on, and answers who asks by HTTP.
    pub(crate) fn cut_off(&self, number: usize, is_cut_off: bool) {
        self.ways.cut_off(number, is_cut_off);
    }

    /// The same of the client agent. Its tasks go on.
    pub(crate) fn cut_client_off(&self, is_cut_off: bool) {
        self.ways.cut_off(CLIENT, is_cut_off);
    }

    /// The address of a server, which goes on without the client.
    pub(crate) fn server(&self) -> String {
        self.server_of(0)
    }

    /// The address of the server of a number.
    pub(crate) fn server_of(&self, number: usize) -> String {
        format!("http://127.0.0.1:{}", self.ports[number][0])
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
        *self.client.lock().unwrap() = spawn(self.dir.path(), CLIENT, &self.ways);
        let port = self.url.rsplit(':').next().unwrap().parse().unwrap();
        wait_for("the client is back", Duration::from_mins(1), async || ask(port, "agent/health").await)
            .await;
    }

    /// Whether the client agent has kept an allocation without its job, which Nomad's own program (1.11) cannot read either.
    pub(crate) fn client_lacks_a_job(&self) -> bool {
        let copy = TempDir::new_in(self.dir.path()).unwrap();
        fs::create_dir(copy.path().join("client")).unwrap();
        let kept = self.dir.path().join("client/client/state.db");
        fs::copy(kept, copy.path().join("client/state.db")).unwrap();
        let state = copy.path().join("client");
        let read = Command::new(binary()).args(["operator", "client-state"]).arg(state).output().unwrap();
        String::from_utf8_lossy(&read.stderr).contains("nil pointer")
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

    /// What the agents said last, for who reads why a test failed.
    fn tell_a_failed_test(&self) {
        if !std::thread::panicking() {
            return;
        }
        let servers = (0..self.ports.len()).map(|number| format!("server{number}"));
        for name in servers.chain(["client".to_owned()]) {
            let said = fs::read_to_string(self.dir.path().join(format!("{name}.log"))).unwrap_or_default();
            let last = said.lines().count().saturating_sub(TOLD);
            said.lines().skip(last).for_each(|line| eprintln!("{name}: {line}"));
        }
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
        self.servers.lock().unwrap()[number] = spawn(self.dir.path(), number, &self.ways);
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

    /// Waits until a server that was started again, or that hung, has a leader and all its peers.
    pub(crate) async fn is_back(&self, number: usize) {
        let [http, ..] = self.ports[number];
        wait_for("the server is back", Duration::from_mins(1), async || {
            let peers = ask(http, "status/peers").await?;
            let leader = ask(http, "status/leader").await?;
            (peers.matches(':').count() == self.ports.len() && leader.len() > 2).then_some(())
        })
        .await;
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.tell_a_failed_test();
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

fn configure(dir: &Path, name: &str, [http, rpc, serf]: Ports, told: u16, role: &str) {
    let config = format!(
        "name = \"{name}\"\ndata_dir = \"{}/{name}\"\nbind_addr = \"127.0.0.1\"\n\
         ports {{\n http = {http}\n rpc = {rpc}\n serf = {serf}\n}}\n\
         advertise {{\n http = \"127.0.0.1\"\n rpc = \"127.0.0.1:{told}\"\n serf = \"127.0.0.1\"\n}}\n{LIMITS}\n{role}\n",
        dir.display(),
    );
    fs::write(dir.join(format!("{name}.hcl")), config).unwrap();
}

/// Starts an agent, whose calls the ways know from then on.
fn spawn(dir: &Path, number: usize, ways: &Ways) -> Child {
    let name = if number == CLIENT { "client".to_owned() } else { format!("server{number}") };
    let log = fs::File::options().create(true).append(true).open(dir.join(format!("{name}.log"))).unwrap();
    let agent = Command::new(binary())
        .args(["agent", "-config"])
        .arg(dir.join(format!("{name}.hcl")))
        .env(MARK, dir)
        .env(SOCKETS, dir)
        .envs(LAZY)
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .unwrap();
    ways.owned_by(agent.id(), number);
    agent
}

async fn ask(port: u16, path: &str) -> Option<String> {
    let http = reqwest::Client::builder().no_proxy().tls_certs_only([]).build().unwrap();
    let asked = http.get(format!("http://127.0.0.1:{port}/v1/{path}")).timeout(Duration::from_secs(2));
    let answer = asked.send().await.ok()?.error_for_status().ok()?;
    answer.text().await.ok()
}
