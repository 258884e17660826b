//! A TCP proxy whose connections can be cut.

use std::net::SocketAddr;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// Forwards to one address.
pub(crate) struct Proxy {
    address: SocketAddr,
    /// Connections of an older number are cut.
    epoch: watch::Sender<u64>,
    task: JoinHandle<()>,
}

impl Proxy {
    pub(crate) async fn to(target: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let epoch = watch::Sender::new(0);
        let cuts = epoch.clone();
        let task = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(forward(client, target, cuts.subscribe()));
            }
        });
        Self { address, epoch, task }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Cuts every connection there is.
    pub(crate) fn cut(&self) {
        self.epoch.send_modify(|epoch| *epoch += 1);
    }

    /// Cuts everything, and takes no more.
    pub(crate) fn close(&self) {
        self.task.abort();
        self.cut();
    }
}

async fn forward(mut client: TcpStream, target: SocketAddr, mut cut: watch::Receiver<u64>) {
    let Ok(mut server) = TcpStream::connect(target).await else { return };
    tokio::select! {
        _ = tokio::io::copy_bidirectional(&mut client, &mut server) => {}
        _ = cut.changed() => {}
    }
}
