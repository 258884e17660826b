//! A Nomad's front: passes everything on, but for the requests that a test answers otherwise.

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::Request;
use axum::http::{Method, StatusCode};
use axum::response::{IntoResponse, Response};
use tokio::net::TcpListener;

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
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let http = reqwest::Client::builder().no_proxy().tls_certs_only([]).build().unwrap();
    let nomad = nomad.to_owned();
    let router = Router::new().fallback(move |request: Request| {
        let (http, nomad) = (http.clone(), nomad.clone());
        async move {
            match instead(request.method(), request.uri().path()) {
                Some(Instead::Silence) => Response::new(Body::from_stream(futures_util::stream::pending::<
                    Result<Vec<u8>, std::io::Error>,
                >())),
                Some(Instead::Nothing) => StatusCode::OK.into_response(),
                Some(Instead::Refusal) => (StatusCode::INTERNAL_SERVER_ERROR, "refused").into_response(),
                None => pass_on(&http, &nomad, request).await,
            }
        }
    });
    tokio::spawn(async move { axum::serve(listener, router).await });
    url
}

async fn pass_on(http: &reqwest::Client, nomad: &str, request: Request) -> Response {
    let (head, body) = request.into_parts();
    let body = to_bytes(body, usize::MAX).await.unwrap();
    let asked = http.request(head.method, format!("{nomad}{}", head.uri)).headers(head.headers).body(body);
    let Ok(mut answer) = asked.send().await else { return StatusCode::BAD_GATEWAY.into_response() };
    let mut response = Response::builder().status(answer.status());
    std::mem::swap(response.headers_mut().unwrap(), answer.headers_mut());
    response.body(Body::from_stream(answer.bytes_stream())).unwrap()
}
