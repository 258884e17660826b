//! Chooses addresses to listen on.
//!
//! A port that is free now may be taken when it is used: stacks of one user choose one after the other (the start lock),
//! and against everybody else the agent's own error stands.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};

use super::config::Listen;
use super::error::Error;

/// The ports of a Nomad agent, all on the loopback interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct AgentPorts {
    pub(super) http: u16,
    pub(super) rpc: u16,
    pub(super) serf: u16,
}

/// The usual ports of Nomad.
pub(super) const USUAL: AgentPorts = AgentPorts { http: 4646, rpc: 4647, serf: 4648 };

/// The preferred ports when all three are free, else three free ones.
pub(super) fn agent_ports(preferred: AgentPorts) -> Result<AgentPorts, Error> {
    let AgentPorts { http, rpc, serf } = preferred;
    let [http, rpc, serf] = free_together([http, rpc, serf]).or_else(|_| free_together([0, 0, 0]))?;
    Ok(AgentPorts { http, rpc, serf })
}

/// Decides where `what` listens.
pub(super) fn choose(listen: Listen, what: &'static str) -> Result<SocketAddr, Error> {
    match listen {
        Listen::Exactly(address) => bind(address, what),
        Listen::Preferably(address) => {
            bind(address, what).or_else(|_| bind(SocketAddr::new(address.ip(), 0), what))
        }
    }
    .map(|(_, address)| address)
}

/// All are held until the last is bound, so that no two are the same.
fn free_together(ports: [u16; 3]) -> Result<[u16; 3], Error> {
    let bound = ports.map(|port| bind((Ipv4Addr::LOCALHOST, port).into(), "Nomad"));
    let mut free = [0; 3];
    let mut held = Vec::with_capacity(free.len());
    for (free, bound) in free.iter_mut().zip(bound) {
        let (listener, address) = bound?;
        *free = address.port();
        held.push(listener);
    }
    Ok(free)
}

fn bind(address: SocketAddr, what: &'static str) -> Result<(TcpListener, SocketAddr), Error> {
    let taken = |source| Error::PortTaken { what, address, source };
    let listener = TcpListener::bind(address).map_err(taken)?;
    let bound = listener.local_addr().map_err(taken)?;
    Ok((listener, bound))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_preferred_port_that_is_taken_gives_way() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = taken.local_addr().unwrap();
        let chosen = choose(Listen::Preferably(address), "the API").unwrap();
        assert_eq!(chosen.ip(), address.ip());
        assert_ne!(chosen.port(), address.port());
    }

    #[test]
    fn an_exact_port_that_is_taken_is_an_error() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = taken.local_addr().unwrap();
        let error = choose(Listen::Exactly(address), "the API").unwrap_err();
        assert_eq!(error.to_string(), format!("cannot listen on {address} for the API"));
    }

    #[test]
    fn the_ports_of_an_agent_differ() {
        let [a, b, c] = free_together([0, 0, 0]).unwrap();
        assert!(a != b && b != c && a != c);
    }
}
