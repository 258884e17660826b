//! A Nomad's front: passes everything on, but for the requests that a test answers otherwise.

use std::sync::Arc;

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::Request;
use axum::http::header::CONTENT_LENGTH;
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
    /// Nomad does not know what is asked for.
    Unknown,
    /// Nomad has none of what is listed.
    EmptyList,
    /// Nomad has heard that an allocation is over, and of none of its tasks.
    Unheard,
    /// Nomad gets the registration with a count of 0, so that nothing is run.
    Unplaced,
}

/// Starts a front of the Nomad at a URL, which ends with the test; returns its URL.
pub(crate) async fn nomad_front(
    nomad: &str,
    instead: impl Fn(&Method, &str) -> Option<Instead> + Send + Sync + 'static,
) -> String {
    let (nomad, instead) = (Upstream::new(nomad), Arc::new(instead));
    let router = Router::new().fallback(move |request: Request| {
        let (nomad, instead) = (nomad.clone(), Arc::clone(&instead));
        async move {
            match instead(request.method(), request.uri().path()) {
                Some(Instead::Silence) => Response::new(Body::from_stream(futures_util::stream::pending::<
                    Result<Vec<u8>, std::io::Error>,
                >())),
                Some(Instead::Nothing) => StatusCode::OK.into_response(),
                Some(Instead::Unknown) => (StatusCode::NOT_FOUND, "not yet").into_response(),
                Some(Instead::EmptyList) => "[]".into_response(),
                Some(Instead::Refusal) => (StatusCode::INTERNAL_SERVER_ERROR, "refused").into_response(),
                Some(Instead::Unheard) => unheard(nomad.pass(request).await).await,
                Some(Instead::Unplaced) => nomad.pass(unplaced(request).await).await,
                None => nomad.pass(request).await,
            }
        }
    });
    format!("http://{}", serve(router).await)
}

/// A front of a Nomad that only registers jobs, and runs none.
pub(crate) async fn registering_only(nomad: &str) -> String {
    let registers = |method: &Method, path: &str| method == Method::POST && path == "/v1/jobs";
    nomad_front(nomad, move |method, path| registers(method, path).then_some(Instead::Unplaced)).await
}

/// A submission that is told from an owner's others, for a Nomad that runs none.
pub(crate) fn numbered(owner: &str, number: usize) -> serde_json::Value {
    serde_json::json!({
        "owner": owner, "repo_url": "https://git.example.com/a/b.git", "git_ref": format!("refs/heads/{number}"),
        "image_tags": ["one"], "registry_url": "127.0.0.1:1",
    })
}

async fn unheard(answer: Response) -> Response {
    let body = to_bytes(answer.into_body(), 1 << 20).await.unwrap();
    let mut allocation: serde_json::Value = serde_json::from_slice(&body).unwrap();
    allocation["ClientStatus"] = serde_json::json!("complete");
    allocation["TaskStates"] = serde_json::Value::Null;
    axum::Json(allocation).into_response()
}

async fn unplaced(request: Request) -> Request {
    let (mut head, body) = request.into_parts();
    let body = to_bytes(body, 1 << 20).await.unwrap();
    let mut body: serde_json::Value = serde_json::from_slice(&body).unwrap();
    body["Job"]["TaskGroups"][0]["Count"] = serde_json::json!(0);
    head.headers.remove(CONTENT_LENGTH);
    Request::from_parts(head, body.to_string().into())
}
