//! A Nomad's front: passes everything on, but for the requests that a test answers otherwise.

use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use axum::http::{Method, StatusCode};
use axum::response::{IntoResponse, Response};

use super::upstream::{Upstream, serve};

/// What happens to a request that does not get through.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Instead {
    /// Nomad takes it and says nothing more, as an event stream without events.
    Silence,
    /// Nomad refuses it for good.
    Refusal,
    /// Nomad gives nothing, as a log of which nothing is there.
    Nothing,
}

/// Starts a front of the Nomad at a URL, which ends with the test; returns its URL.
pub(crate) async fn nomad_front(nomad: &str, instead: fn(&Method, &str) -> Option<Instead>) -> String {
    let nomad = Upstream::new(nomad);
    let router = Router::new().fallback(move |request: Request| {
        let nomad = nomad.clone();
        async move {
            match instead(request.method(), request.uri().path()) {
                Some(Instead::Silence) => Response::new(Body::from_stream(futures_util::stream::pending::<
                    Result<Vec<u8>, std::io::Error>,
                >())),
                Some(Instead::Nothing) => StatusCode::OK.into_response(),
                Some(Instead::Refusal) => (StatusCode::INTERNAL_SERVER_ERROR, "refused").into_response(),
                None => nomad.pass(request).await,
            }
        }
    });
    format!("http://{}", serve(router).await)
}
