//! Ports for who has to be told its own before it listens.

use std::net::{TcpListener, UdpSocket};
use std::sync::atomic::{AtomicU32, Ordering};

/// The first that is given out: below it are those that services are known by.
const FIRST: u16 = 10_000;

/// How many were asked for in this process.
static ASKED: AtomicU32 = AtomicU32::new(0);

/// A port that nobody else gets before its owner listens there: outside of the range that the kernel chooses from for whoever
/// asks for any, and never the same twice.
pub(crate) fn port() -> u16 {
    let range = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap();
    let end: u16 = range.split_whitespace().next().unwrap().parse().unwrap();
    let span = u32::from(end.checked_sub(FIRST).unwrap());
    // Test processes that run at once begin far from each other.
    let begin = std::process::id().wrapping_mul(257);
    loop {
        let offset = begin.wrapping_add(ASKED.fetch_add(1, Ordering::Relaxed)) % span;
        let port = FIRST + u16::try_from(offset).unwrap();
        if TcpListener::bind(("127.0.0.1", port)).is_ok() && UdpSocket::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}
