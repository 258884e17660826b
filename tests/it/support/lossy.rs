//! A front of Nomad whose event stream loses events without a word, as Nomad's own does.

use std::io;
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::{Body, BodyDataStream};
use axum::extract::Request;
use axum::http::header::ACCEPT_ENCODING;
use axum::response::Response;
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
    let router = Router::new().fallback(move |mut request: Request| {
        let (nomad, plan) = (nomad.clone(), Arc::clone(&plan));
        async move {
            if request.uri().path() != "/v1/event/stream" {
                return nomad.pass(request).await;
            }
            // Line by line, as it is.
            request.headers_mut().remove(ACCEPT_ENCODING);
            let (head, body) = nomad.pass(request).await.into_parts();
            Response::from_parts(head, Body::from_stream(some(body.into_data_stream(), plan)))
        }
    });
    format!("http://{}", serve(router).await)
}

/// Those lines of a stream that pass.
fn some(stream: BodyDataStream, plan: Arc<Plan>) -> impl Stream<Item = io::Result<Vec<u8>>> {
    let mut rest = Vec::new();
    let pieces = stream.map(move |piece| -> io::Result<Vec<u8>> {
        rest.extend_from_slice(&piece.map_err(io::Error::other)?);
        let end = rest.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        let whole: Vec<u8> = rest.drain(..end).collect();
        let mut kept = Vec::new();
        for line in whole.split_inclusive(|byte| *byte == b'\n') {
            // Nomad's heartbeats: without them the connection would be taken for dead.
            let passes = if line.starts_with(b"{}") { Passes::On } else { plan.lock().unwrap()() };
            match passes {
                Passes::On => kept.extend_from_slice(line),
                Passes::Lost => {}
                Passes::Cut => return Err(io::Error::other("cut by the test")),
            }
        }
        Ok(kept)
    });
    pieces.filter(|piece| std::future::ready(piece.as_ref().map_or(true, |kept| !kept.is_empty())))
}
