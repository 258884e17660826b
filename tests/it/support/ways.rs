//! The ways between a cluster's agents: every call to a server goes through a proxy here that knows whose it is, so that an
//! agent can be cut off from all the others and live on.
//!
//! Threads, as a cluster outlives the test, and with it the runtime, that started it.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io;
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use super::ports;

/// How often it is looked whether a server that was down is up.
const PROBE: Duration = Duration::from_millis(50);

/// The proxies of some servers. Dropped, they end.
pub(super) struct Ways {
    state: Arc<Mutex<State>>,
    /// Where each server is to be reached.
    pub(super) ports: Vec<u16>,
}

#[derive(Default)]
struct State {
    /// The agents by their processes: a server's number, or one that no server has.
    agents: HashMap<u32, usize>,
    cut_off: HashSet<usize>,
    open: HashMap<u64, Connection>,
    opened: u64,
    is_over: bool,
}

struct Connection {
    between: [Option<usize>; 2],
    ends: [TcpStream; 2],
}

impl Connection {
    fn close(&self) {
        for end in &self.ends {
            // It may be closed already.
            end.shutdown(Shutdown::Both).ok();
        }
    }
}

impl Ways {
    /// Stands before servers at these ports.
    pub(super) fn before(servers: &[u16]) -> Self {
        let state = Arc::<Mutex<State>>::default();
        let listen = |(number, &port): (usize, &u16)| {
            let own = ports::port();
            let listener = TcpListener::bind(("127.0.0.1", own)).unwrap();
            let state = Arc::clone(&state);
            thread::spawn(move || serve(listener, number, port, &state));
            own
        };
        let ports = servers.iter().enumerate().map(listen).collect();
        Self { state, ports }
    }

    /// Remembers which agent a process is.
    pub(super) fn owned_by(&self, process: u32, agent: usize) {
        self.state.lock().unwrap().agents.insert(process, agent);
    }

    /// Cuts an agent off from all the others, or lets it be reached again.
    pub(super) fn cut_off(&self, agent: usize, is_cut_off: bool) {
        let mut state = self.state.lock().unwrap();
        if is_cut_off {
            state.cut_off.insert(agent);
            let its = state.open.values().filter(|open| open.between.contains(&Some(agent)));
            its.for_each(Connection::close);
        } else {
            state.cut_off.remove(&agent);
        }
    }
}

impl Drop for Ways {
    fn drop(&mut self) {
        let mut state = self.state.lock().unwrap();
        state.is_over = true;
        state.open.values().for_each(Connection::close);
        for port in &self.ports {
            // So that each hears of it, if it is not about to look.
            TcpStream::connect(("127.0.0.1", *port)).ok();
        }
    }
}

/// Takes connections to a server, and refuses them while it is down, as its own port would.
fn serve(mut listener: TcpListener, server: usize, port: u16, state: &Arc<Mutex<State>>) {
    let own = listener.local_addr().unwrap();
    loop {
        let client = listener.accept();
        if state.lock().unwrap().is_over {
            return;
        }
        if let (Ok((client, _)), Ok(target)) = (client, TcpStream::connect(("127.0.0.1", port))) {
            let state = Arc::clone(state);
            thread::spawn(move || pass(client, target, server, &state));
            continue;
        }
        drop(listener);
        listener = loop {
            thread::sleep(PROBE);
            if state.lock().unwrap().is_over {
                return;
            }
            if TcpStream::connect(("127.0.0.1", port)).is_ok()
                && let Ok(again) = TcpListener::bind(own)
            {
                break again;
            }
        };
    }
}

/// One connection, to its end.
fn pass(client: TcpStream, target: TcpStream, server: usize, state: &Mutex<State>) -> io::Result<()> {
    let agents = state.lock().unwrap().agents.clone();
    let between = [owner(&client, &agents)?, Some(server)];
    let ends = [client.try_clone()?, target.try_clone()?];
    let number = {
        let mut state = state.lock().unwrap();
        if state.is_over || between.iter().flatten().any(|agent| state.cut_off.contains(agent)) {
            return Ok(());
        }
        state.opened += 1;
        let number = state.opened;
        state.open.insert(number, Connection { between, ends });
        number
    };
    thread::scope(|scope| {
        for (mut from, mut to) in [(&client, &target), (&target, &client)] {
            scope.spawn(move || {
                // However it ends, it ends both ways.
                io::copy(&mut from, &mut to).ok();
                from.shutdown(Shutdown::Both).ok();
                to.shutdown(Shutdown::Both).ok();
            });
        }
    });
    state.lock().unwrap().open.remove(&number);
    Ok(())
}

/// Which agent a connection comes from, by the kernel's tables; none where it is none of the cluster's.
fn owner(client: &TcpStream, agents: &HashMap<u32, usize>) -> io::Result<Option<usize>> {
    let ports = [client.peer_addr()?.port(), client.local_addr()?.port()];
    let [own, far] = ports.map(|port| format!(":{port:04X}"));
    let table = fs::read_to_string("/proc/net/tcp")?;
    let line = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    // proc(5): the local and the remote address, and in the tenth column the inode.
    let mut line = line.filter(|line| line.len() > 9 && line[1].ends_with(&own) && line[2].ends_with(&far));
    let Some(socket) = line.next().map(|line| format!("socket:[{}]", line[9])) else { return Ok(None) };
    let has = |process: &u32| {
        let open = fs::read_dir(format!("/proc/{process}/fd")).into_iter().flatten().flatten();
        open.filter_map(|file| fs::read_link(file.path()).ok()).any(|file| file == Path::new(&socket))
    };
    Ok(agents.iter().find(|(process, _)| has(process)).map(|(_, agent)| *agent))
}
