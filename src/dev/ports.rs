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

/// How many ports after a preferred one are tried before the kernel chooses: one of those it may give to anybody at any
/// time, before it is used.
const NEXT: u16 = 100;

/// The preferred ports, or the next three that are all free.
pub(super) fn agent_ports(preferred: AgentPorts) -> Result<AgentPorts, Error> {
    let AgentPorts { http, rpc, serf } = preferred;
    let [http, rpc, serf] =
        first_free([http, rpc, serf], free_together).map_or_else(|| free_together([0, 0, 0]), Ok)?;
    Ok(AgentPorts { http, rpc, serf })
}

/// Decides where `what` listens.
pub(super) fn choose(listen: Listen, what: &'static str) -> Result<SocketAddr, Error> {
    let (_, address) = match listen {
        Listen::Exactly(address) => bind(address, what)?,
        Listen::Preferably(address) => {
            let at = |port| bind(SocketAddr::new(address.ip(), port), what);
            first_free([address.port()], |[port]| at(port)).map_or_else(|| at(0), Ok)?
        }
    };
    Ok(address)
}

/// What can be had of preferred ports, or of the first of the next ones where it can.
fn first_free<const N: usize, T>(
    preferred: [u16; N],
    mut take: impl FnMut([u16; N]) -> Result<T, Error>,
) -> Option<T> {
    let step = u16::try_from(N).ok()?;
    (0..NEXT / step).find_map(|number| take(preferred.map(|port| port.saturating_add(number * step))).ok())
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
        assert!((1..NEXT).contains(&(chosen.port() - address.port())), "{chosen} instead of {address}");
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

    #[test]
    fn of_an_agents_ports_none_stays_where_one_is_taken() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let rpc = taken.local_addr().unwrap().port();
        let AgentPorts { http, rpc: chosen, serf } =
            agent_ports(AgentPorts { http: rpc - 1, rpc, serf: rpc + 1 }).unwrap();
        assert_eq!((chosen - http, serf - chosen), (1, 1));
        assert_eq!((chosen - rpc) % 3, 0);
        assert!((1..NEXT).contains(&(chosen - rpc)), "{chosen} instead of {rpc}");
    }
}
