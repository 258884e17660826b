//! A TCP proxy that harms HTTP requests and their answers on their way, as networks and dying servers do.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};

/// What happens to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The connection is cut before the server has it.
    CutBefore,
    /// The server does it, and the connection is cut before anything of the answer arrives.
    CutAfter,
    /// The connection is cut after so many bytes of the answer.
    Truncated(usize),
    /// So many bytes of the answer arrive and nothing more, and the connection stays open.
    Silent(usize),
    /// The answer arrives in small pieces.
    Drip,
    /// The request arrives late.
    Delay(Duration),
}

/// Decides by the first line of a request.
type Plan = dyn FnMut(&str) -> Option<Fault> + Send;

/// A running proxy; it ends with the test.
pub(crate) struct Faults {
    pub(crate) url: String,
    plan: Arc<Mutex<Box<Plan>>>,
}

impl Faults {
    /// Stands before the server at a URL, and harms nothing yet.
    pub(crate) async fn before(url: &str) -> Self {
        let server: SocketAddr = url.strip_prefix("http://").unwrap().parse().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let plan: Arc<Mutex<Box<Plan>>> = Arc::new(Mutex::new(Box::new(|_| None)));
        let plans = Arc::clone(&plan);
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(forward(client, server, Arc::clone(&plans)));
            }
        });
        Self { url, plan }
    }

    /// From now on requests are harmed as a function of their first lines says, on connections old and new.
    pub(crate) fn harm(&self, plan: impl FnMut(&str) -> Option<Fault> + Send + 'static) {
        *self.plan.lock().unwrap() = Box::new(plan);
    }
}

/// One connection: requests come one after the other, each behind the answer to the one before.
async fn forward(client: TcpStream, server: SocketAddr, plan: Arc<Mutex<Box<Plan>>>) {
    let Ok(server) = TcpStream::connect(server).await else { return };
    let ((from_client, to_client), (from_server, to_server)) = (client.into_split(), server.into_split());
    let fault = Arc::new(Mutex::new(None));
    tokio::select! {
        () = requests(from_client, to_server, &plan, &fault) => {}
        () = answers(from_server, to_client, &fault) => {}
    }
}

async fn requests(
    mut client: OwnedReadHalf,
    mut server: OwnedWriteHalf,
    plan: &Mutex<Box<Plan>>,
    fault: &Mutex<Option<Fault>>,
) {
    let mut piece = vec![0; 64 << 10];
    while let Ok(length @ 1..) = client.read(&mut piece).await {
        if let Some(line) = first_line(&piece[..length]) {
            let planned = plan.lock().unwrap()(line);
            *fault.lock().unwrap() = planned;
            match planned {
                Some(Fault::CutBefore) => return,
                Some(Fault::Delay(time)) => tokio::time::sleep(time).await,
                _ => {}
            }
        }
        if server.write_all(&piece[..length]).await.is_err() {
            return;
        }
    }
}

async fn answers(mut server: OwnedReadHalf, mut client: OwnedWriteHalf, fault: &Mutex<Option<Fault>>) {
    let (mut piece, mut passed_on) = (vec![0; 64 << 10], 0);
    while let Ok(length @ 1..) = server.read(&mut piece).await {
        let answer = &piece[..length];
        let planned = *fault.lock().unwrap();
        let goes_on = match planned {
            None | Some(Fault::CutBefore | Fault::Delay(_)) => client.write_all(answer).await.is_ok(),
            Some(Fault::CutAfter) => false,
            Some(Fault::Truncated(most)) => {
                client.write_all(&answer[..most.min(length)]).await.ok();
                false
            }
            // Until the client gives up.
            Some(Fault::Silent(most)) => {
                let rest = most.saturating_sub(passed_on).min(length);
                rest == 0 || client.write_all(&answer[..rest]).await.is_ok()
            }
            Some(Fault::Drip) => drip(&mut client, answer).await,
        };
        if !goes_on {
            return;
        }
        passed_on += length;
    }
}

async fn drip(client: &mut OwnedWriteHalf, answer: &[u8]) -> bool {
    for drop in answer.chunks(64) {
        if client.write_all(drop).await.is_err() {
            return false;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    true
}

/// The first line of a request, where some bytes begin one.
fn first_line(bytes: &[u8]) -> Option<&str> {
    let end = bytes.iter().position(|byte| *byte == b'\r')?;
    let line = std::str::from_utf8(&bytes[..end]).ok()?;
    line.ends_with(" HTTP/1.1").then_some(line)
}
