//! How much one address may ask for, so that nobody keeps the others from being answered.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::num::NonZeroU32;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::extract::{ConnectInfo, Request, State};
use axum::http::header::RETRY_AFTER;
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use governor::clock::{Clock as _, DefaultClock};
use governor::{DefaultKeyedRateLimiter, Quota, RateLimiter};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use super::App;
use super::answer::{Code, Problem};

/// What is asked whatever the rate: a probe that is refused has a service restarted that only has much to do.
const PROBES: [&str; 3] = ["/health", "/ready", "/metrics"];

/// What Nomad remembers of each request to this for minutes, and of so many only: at most this often a second.
const LOGIN: &str = "/auth/login";
pub(super) const LOGINS: u32 = 2;

/// The highest rate that is told from no limit, by a clock that counts nanoseconds.
const MOST: u32 = 1_000_000;

/// How often addresses are forgotten that ask for nothing any more.
const FORGETS: Duration = Duration::from_mins(1);

/// Who has an IPv6 address has all those of its network.
fn caller(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() & !u128::from(u64::MAX)).into(),
        address @ IpAddr::V4(_) => address,
    }
}

/// The rate of requests of each address. Cheap to clone.
#[derive(Clone)]
pub(super) struct Rate(Option<Arc<DefaultKeyedRateLimiter<IpAddr>>>);

impl Rate {
    /// So many requests a second, and as many more at once as those of two seconds; any number for 0.
    pub(super) fn new(a_second: u32) -> Self {
        let quota = NonZeroU32::new(a_second.min(MOST)).map(|most| {
            Quota::per_second(most).allow_burst(most.saturating_mul(NonZeroU32::MIN.saturating_add(1)))
        });
        Self(quota.map(|quota| Arc::new(RateLimiter::keyed(quota))))
    }

    /// Forgets, from time to time, who asks for nothing any more; ends only by being dropped.
    pub(super) async fn forget(self) {
        let Some(limiter) = self.0 else { return };
        loop {
            tokio::time::sleep(FORGETS).await;
            limiter.retain_recent();
            limiter.shrink_to_fit();
        }
    }

    /// How long an address has to wait before it may ask; none where it may now.
    fn wait(&self, address: IpAddr) -> Option<Duration> {
        let refused = self.0.as_ref()?.check_key(&caller(address)).err()?;
        Some(refused.wait_time_from(DefaultClock::default().now()))
    }
}

/// Refuses what comes too fast.
pub(super) async fn keep_rate(State(app): State<App>, request: Request, next: Next) -> Response {
    let address = request.extensions().get::<ConnectInfo<SocketAddr>>().map(|ConnectInfo(from)| from.ip());
    let path = request.uri().path();
    let limited = address.filter(|_| !PROBES.contains(&path));
    let of_logins = || limited.filter(|_| path == LOGIN).and_then(|from| app.logins.wait(from));
    let wait = limited.and_then(|from| app.rate.wait(from)).or_else(of_logins);
    let Some(wait) = wait else { return next.run(request).await };
    let message = "this address asks for more than it may: ask again later, or follow a job's log and status by one \
                   stream (its operator sets NOMAD_BUILD_MAX_RATE)";
    let seconds = wait.as_secs().saturating_add(1).to_string();
    ([(RETRY_AFTER, seconds)], Problem::new(Code::TooManyRequests, message)).into_response()
}

/// How many file handles are left to everything but connections: Nomad, the archive, files.
const RESERVE: u64 = 512;

/// How many of so many connections there may be by the file handles that this process may have, which are made as many as they may
/// be; and how many of them one address may have: not so many that it is left with all.
pub(super) fn connections(wanted: usize, of_an_address: usize) -> (usize, usize) {
    let raised = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(soft, hard)| {
        if soft < hard {
            setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
        }
        Ok(hard)
    });
    let most = match raised {
        Ok(handles) => {
            usize::try_from(handles.saturating_sub(RESERVE).max(handles / 2)).unwrap_or(usize::MAX)
        }
        Err(error) => {
            tracing::warn!(%error, "how many files this process may have open could not be set");
            wanted
        }
    };
    if most < wanted {
        tracing::warn!(
            wanted,
            most,
            "fewer connections than wanted: this process may have no more file handles (ulimit -n)"
        );
    }
    let connections = wanted.min(most).max(1);
    (connections, of_an_address.min((connections / 2).max(1)))
}

/// The connections of each address.
pub(super) struct Seats {
    most: usize,
    taken: Arc<Mutex<HashMap<IpAddr, usize>>>,
}

/// A connection's hold on its place.
pub(super) struct Seat {
    address: IpAddr,
    taken: Arc<Mutex<HashMap<IpAddr, usize>>>,
}

impl Seats {
    pub(super) fn new(most: usize) -> Self {
        Self { most, taken: Arc::default() }
    }

    /// A place for a connection; none where its address has all that it may.
    pub(super) fn take(&self, address: IpAddr) -> Option<Seat> {
        let address = caller(address);
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let count = taken.entry(address).or_default();
        if *count >= self.most {
            return None;
        }
        *count += 1;
        Some(Seat { address, taken: Arc::clone(&self.taken) })
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = taken.get_mut(&self.address) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                taken.remove(&self.address);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn each_address_has_a_rate_of_its_own_and_a_network_of_ipv6_is_one_address() {
        let rate = Rate::new(2);
        for _ in 0..4 {
            assert_eq!(rate.wait(ip("192.0.2.1")), None);
        }
        assert!(rate.wait(ip("192.0.2.1")).is_some_and(|wait| wait <= Duration::from_millis(500)));
        // The same address, by the other family's socket.
        assert!(rate.wait(ip("::ffff:192.0.2.1")).is_some());
        assert_eq!(rate.wait(ip("192.0.2.2")), None);
        for last in 0..4 {
            assert_eq!(rate.wait(ip(&format!("2001:db8::{last}"))), None);
        }
        assert!(rate.wait(ip("2001:db8::ffff")).is_some());
        assert_eq!(rate.wait(ip("2001:db8:0:1::1")), None);
        assert_eq!(Rate::new(u32::MAX).wait(ip("192.0.2.1")), None);
        let none = Rate::new(0);
        assert!((0..10_000).all(|_| none.wait(ip("192.0.2.1")).is_none()));
    }

    #[test]
    fn a_place_is_given_back_and_nobody_is_remembered_for_nothing() {
        let seats = Seats::new(2);
        let (first, second) = (seats.take(ip("192.0.2.1")), seats.take(ip("192.0.2.1")));
        assert!(first.is_some() && second.is_some() && seats.take(ip("192.0.2.1")).is_none());
        let other = seats.take(ip("192.0.2.2"));
        assert!(other.is_some());
        drop(first);
        let third = seats.take(ip("192.0.2.1"));
        assert!(third.is_some());
        drop((second, third, other));
        assert!(seats.taken.lock().unwrap().is_empty());
    }
}
