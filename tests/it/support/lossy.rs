//! A front of Nomad whose event stream loses events without a word, as Nomad's own does.

use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, BodyDataStream};
use axum::extract::Request;
use axum::response::Response;
use futures_util::stream::iter;
use futures_util::{Stream, StreamExt as _};

use super::upstream::{Upstream, serve};

/// What becomes of a line of the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Passes {
    /// It arrives.
    On,
    /// It does not, and nothing says so.
    Lost,
    /// It does not, and the connection is cut.
    Cut,
}

/// Decides of one line after the other.
type Plan = Mutex<dyn FnMut() -> Passes + Send>;

/// Starts a front of the Nomad at a URL, which ends with the test; returns its URL.
pub(crate) async fn lossy(nomad: &str, plan: impl FnMut() -> Passes + Send + 'static) -> String {
    let nomad = Upstream::new(nomad);
    let plan: Arc<Plan> = Arc::new(Mutex::new(plan));
    let router = Router::new().fallback(move |request: Request| {
        let (nomad, plan) = (nomad.clone(), Arc::clone(&plan));
        async move {
            if request.uri().path() != "/v1/event/stream" {
                return nomad.pass(request).await;
            }
            let (head, body) = nomad.pass(request).await.into_parts();
            Response::from_parts(head, Body::from_stream(some(body.into_data_stream(), plan)))
        }
    });
    format!("http://{}", serve(router).await)
}

/// Those lines of a stream that pass.
fn some(stream: BodyDataStream, plan: Arc<Plan>) -> impl Stream<Item = io::Result<Vec<u8>>> {
    let mut rest = Vec::new();
    let pieces = stream.flat_map(move |piece| {
        let mut out = Vec::new();
        match piece {
            Ok(piece) => rest.extend_from_slice(&piece),
            Err(error) => out.push(Err(io::Error::other(error))),
        }
        let end = rest.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        let whole: Vec<u8> = rest.drain(..end).collect();
        for line in whole.split_inclusive(|byte| *byte == b'\n') {
            // Nomad's heartbeats: without them the connection would be taken for dead.
            let passes = if line.starts_with(b"{}") { Passes::On } else { plan.lock().unwrap()() };
            match passes {
                Passes::On => out.push(Ok(line.to_vec())),
                Passes::Lost => {}
                Passes::Cut => out.push(Err(io::Error::other("cut by the test"))),
            }
        }
        iter(out)
    });
    pieces.then(async |piece| {
        if piece.is_err() {
            // What passed before it arrives.
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        piece
    })
}
