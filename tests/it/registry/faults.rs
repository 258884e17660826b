//! Registries that are busy, slow or silent: each small, and doing wrong in one way only.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use nomad_build::registry::{Client, Digest, Endpoint, Error, Limits, PlainHttp, Relay, RelayError};
use tokio::net::TcpListener;

use super::{repository, tag};

/// Serves `answer`, which is given each request and its number; gives the host and the count of requests.
async fn serve<F, A>(answer: F) -> (String, Arc<AtomicUsize>)
where
    F: Fn(usize, Request) -> A + Clone + Send + Sync + 'static,
    A: Future<Output = Response> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let host = listener.local_addr().unwrap().to_string();
    let count = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&count);
    let router = Router::new()
        .fallback(move |request: Request| answer(counter.fetch_add(1, Ordering::SeqCst), request));
    tokio::spawn(async move { axum::serve(listener, router).await });
    (host, count)
}

fn impatient(host: &str) -> Arc<Client> {
    let limits = Limits {
        attempt: Duration::from_secs(1),
        deadline: Duration::from_secs(2),
        stall: Duration::from_secs(1),
    };
    let endpoint = Endpoint::new(host, &PlainHttp::default()).unwrap();
    Arc::new(Client::with_limits(endpoint, None, limits).unwrap())
}

/// Asks for something once.
async fn ask(host: &str) -> Result<bool, Error> {
    impatient(host).blob_exists(&repository(), Digest::of(b"x")).await
}

fn busy(status: StatusCode, seconds: &'static str) -> Response {
    (status, [(header::RETRY_AFTER, seconds)]).into_response()
}

#[tokio::test]
async fn a_busy_registry_is_asked_again() {
    let (host, count) = serve(|nth, _| async move {
        match nth {
            0 => busy(StatusCode::SERVICE_UNAVAILABLE, "0"),
            1 => busy(StatusCode::TOO_MANY_REQUESTS, "0"),
            _ => StatusCode::OK.into_response(),
        }
    })
    .await;
    ask(&host).await.unwrap();
    assert_eq!(count.load(Ordering::SeqCst), 3);
}

#[tokio::test]
async fn the_wait_that_a_registry_asks_for_is_kept_or_it_is_an_error() {
    let (host, _) = serve(|nth, _| async move {
        if nth == 0 { busy(StatusCode::TOO_MANY_REQUESTS, "1") } else { StatusCode::OK.into_response() }
    })
    .await;
    let started = Instant::now();
    ask(&host).await.unwrap();
    assert!(started.elapsed() >= Duration::from_secs(1));

    let (host, count) = serve(|_, _| async { busy(StatusCode::TOO_MANY_REQUESTS, "3600") }).await;
    let error = ask(&host).await.unwrap_err();
    assert!(matches!(error, Error::Refused { status: 429, .. }), "{error:?}");
    assert_eq!(count.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn a_refusal_is_not_asked_again() {
    let (host, count) = serve(|_, _| async { StatusCode::BAD_REQUEST.into_response() }).await;
    let error = ask(&host).await.unwrap_err();
    assert!(matches!(error, Error::Refused { status: 400, .. }), "{error:?}");
    assert_eq!(count.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn a_silent_registry_is_given_up_by_the_deadline() {
    let (host, _) = serve(|_, _| std::future::pending()).await;
    let started = Instant::now();
    let error = impatient(&host).head_manifest(&repository(), &tag("1")).await.unwrap_err();
    assert!(matches!(error, Error::TimedOut { .. }), "{error:?}");
    assert!(started.elapsed() < Duration::from_secs(4));
}

#[tokio::test]
async fn redirects_that_never_end_are_an_error() {
    let again = || async { (StatusCode::FOUND, [(header::LOCATION, "/v2/again")]).into_response() };
    let (host, count) = serve(move |_, _| again()).await;
    let error = ask(&host).await.unwrap_err();
    assert!(matches!(error, Error::Malformed { .. }), "{error:?}");
    assert!(count.load(Ordering::SeqCst) < 10);
}

/// A registry that begins an upload, then leaves its content unread.
async fn never_reading() -> (String, Arc<AtomicUsize>) {
    serve(|_, request| async move {
        if request.method() == "POST" {
            return (StatusCode::ACCEPTED, [(header::LOCATION, "/v2/upload")]).into_response();
        }
        let _unread = request;
        std::future::pending().await
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_stops_reading_stops_the_engine_and_is_given_up() {
    let (host, count) = never_reading().await;
    let relay = Relay::start(impatient(&host), repository()).await.unwrap();
    let own = relay.reference().trim_end_matches(":push").replacen('/', "/v2/", 1);
    let http = reqwest::Client::builder().no_proxy().build().unwrap();
    let begun = http.post(format!("http://{own}/blobs/uploads/")).send().await.unwrap();
    let location = begun.headers()[header::LOCATION].to_str().unwrap().to_owned();

    let taken = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&taken);
    let chunk = Bytes::from(vec![0; 64 * 1024]);
    let endless = futures_util::stream::repeat_with(move || {
        counter.fetch_add(1, Ordering::SeqCst);
        Ok::<_, Infallible>(chunk.clone())
    });
    let url = format!("http://{}{location}", own.split('/').next().unwrap());
    let answer =
        http.patch(url).body(reqwest::Body::wrap_stream(Body::from_stream(endless).into_data_stream()));
    // The relay answers before the content's end; a client may see that, or the connection's end.
    if let Ok(answer) = answer.send().await {
        assert_eq!(answer.status(), 503, "the engine is to try again");
    }
    let mebibytes = taken.load(Ordering::SeqCst) / 16;
    assert!(mebibytes < 32, "{mebibytes} MiB were taken in, though nobody read them");
    assert_eq!(count.load(Ordering::SeqCst), 2, "content is sent once only");
    let error = relay.finish().unwrap_err();
    assert!(matches!(error, RelayError::Upstream(Error::TimedOut { .. })), "{error:?}");
}
