//! The listeners: connections in, with TLS where it is set up, and requests out of them.
//!
//! axum's own loop sets no limit to what a connection may take: here one that sends no request, does not finish its TLS handshake
//! or takes nothing of its answer ends by itself, and there are only so many, in all and of one address.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::Router;
use axum::extract::ConnectInfo;
use axum::http::Request;
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::{GracefulShutdown, Watcher};
use hyper_util::service::TowerToHyperService;
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::TcpUserTimeout;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_rustls::TlsAcceptor;
use tower::ServiceExt as _;

use super::limits::{Seat, Seats};
use crate::tls;

/// How long a TLS handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// How long a connection has for the head of its first request.
const HEAD: Duration = Duration::from_secs(30);

/// How long a connection that was used may be idle, with the head of its next request. Clients let go of theirs first, most of
/// them after 90 s or sooner: who sends something just when it is hung up on cannot know whether it was taken.
const IDLE: Duration = Duration::from_secs(100);

/// The most that the head of a request may be, in bytes: Nomad's tokens and JWTs are a few KiB.
const HEAD_BYTES: usize = 64 * 1024;

/// How long a caller may take nothing of an answer, in milliseconds: then the kernel ends the connection. A stream is resumed
/// by its cursor.
const STALLED: u32 = 60_000;

/// How long nothing is accepted after the machine had no file handle left, for example.
const REST: Duration = Duration::from_secs(1);

/// How many connections there may be.
#[derive(Clone, Copy, Debug)]
pub(super) struct Most {
    /// In all; whoever comes then waits.
    pub(super) connections: usize,
    /// Of one address; whoever comes then is hung up on.
    pub(super) of_an_address: usize,
}

/// Serves until `shutdown`, then finishes what was begun.
pub(super) async fn serve(
    listener: TcpListener,
    router: Router,
    tls: Option<Arc<tls::Server>>,
    most: Most,
    shutdown: impl Future<Output = ()>,
) {
    let graceful = GracefulShutdown::new();
    let (places, seats) = (Arc::new(Semaphore::new(most.connections)), Seats::new(most.of_an_address));
    tokio::pin!(shutdown);
    loop {
        let accepted = tokio::select! {
            accepted = accept(&listener, &places) => accepted,
            () = &mut shutdown => break,
        };
        let (stream, address, place) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "no connection can be accepted; will be tried again");
                tokio::time::sleep(REST).await;
                continue;
            }
        };
        let Some(seat) = seats.take(address.ip()) else {
            tracing::debug!(%address, "hung up on: its address has as many connections as it may");
            continue;
        };
        let (watcher, held) = (graceful.watcher(), Held(Arc::new((place, seat))));
        let connection = Connection { router: router.clone(), address, watcher, held };
        #[expect(
            clippy::disallowed_methods,
            reason = "a connection ends by itself, and the listener waits for it"
        )]
        tokio::spawn(connection.run(stream, tls.as_ref().map(|tls| tls.now().into())));
    }
    drop(listener);
    graceful.shutdown().await;
}

/// The next connection, once there is a place for it.
async fn accept(
    listener: &TcpListener,
    places: &Arc<Semaphore>,
) -> io::Result<(TcpStream, SocketAddr, OwnedSemaphorePermit)> {
    // The semaphore is never closed.
    let place = Arc::clone(places).acquire_owned().await.map_err(io::Error::other)?;
    loop {
        match listener.accept().await {
            Ok((stream, address)) => return Ok((stream, address, place)),
            // Who hung up before it was accepted.
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(error) => return Err(error),
        }
    }
}

/// A connection's place, held for as long as anybody uses it: what becomes of it after an upgrade is not seen here.
#[derive(Clone)]
pub(super) struct Held(#[expect(dead_code, reason = "held, not read")] Arc<(OwnedSemaphorePermit, Seat)>);

struct Connection {
    router: Router,
    address: SocketAddr,
    watcher: Watcher,
    held: Held,
}

impl Connection {
    async fn run(self, stream: TcpStream, tls: Option<TlsAcceptor>) {
        let address = self.address;
        let set = setsockopt(&stream, TcpUserTimeout, &STALLED).map_err(io::Error::from);
        if let Err(error) = set.and_then(|()| stream.set_nodelay(true)) {
            tracing::debug!(%address, %error, "a connection may stall for ever");
        }
        match tls {
            None => self.serve(stream).await,
            Some(acceptor) => match tokio::time::timeout(HANDSHAKE, acceptor.accept(stream)).await {
                Ok(Ok(stream)) => self.serve(stream).await,
                Ok(Err(error)) => tracing::debug!(%address, %error, "no TLS connection"),
                Err(_) => tracing::debug!(%address, "no TLS connection: the handshake took too long"),
            },
        }
    }

    async fn serve(self, stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) {
        let Self { router, address, watcher, held } = self;
        let asked = Arc::new(AtomicBool::new(false));
        let asks = Arc::clone(&asked);
        let service = router.map_request(move |mut request: Request<Incoming>| {
            asks.store(true, Ordering::Relaxed);
            request.extensions_mut().insert(ConnectInfo(address));
            request.extensions_mut().insert(held.clone());
            request
        });
        let mut builder = auto::Builder::new(TokioExecutor::new()).http1_only();
        builder.http1().timer(TokioTimer::new()).header_read_timeout(IDLE).max_buf_size(HEAD_BYTES);
        let connection = builder
            .serve_connection_with_upgrades(TokioIo::new(stream), TowerToHyperService::new(service))
            .into_owned();
        // hyper has one deadline for idle connections and heads.
        let silent = async {
            tokio::time::sleep(HEAD).await;
            if asked.load(Ordering::Relaxed) {
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            ended = watcher.watch(connection) => if let Err(error) = ended {
                tracing::debug!(%address, %error, "a connection ended badly");
            },
            () = silent => tracing::debug!(%address, "hung up on: no request came"),
        }
    }
}
