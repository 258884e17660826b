//! The HTTP API: one router, one file a resource, one envelope for every answer.
//!
//! Invariant: handlers convert, ask whether the caller may, call the service, and convert back; they decide nothing.

mod answer;
mod audit;
mod body;
mod browser;
mod caller;
mod jobs;
mod limits;
mod list;
mod login;
mod logs;
mod openapi;
mod probes;
mod runner;
mod server;
mod texts;

use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Instant;

use axum::extract::rejection::RawPathParamsRejection;
use axum::extract::{DefaultBodyLimit, MatchedPath, RawPathParams, Request, State};
use axum::http::{HeaderName, HeaderValue, Method, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, get, post};
use axum::{Router, middleware};
use futures_util::FutureExt as _;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::service::Service;
use limits::Rate;
use server::Most;

pub use answer::{Code, Problem};

/// The largest body taken: a specification is carried inside a Nomad job, and Nomad's limit is not far above.
const BODY: usize = 400 * 1024;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// What every handler sees.
#[derive(Clone)]
struct App {
    service: Arc<Service>,
    rate: Rate,
    /// The rate of logins.
    logins: Rate,
    /// Cancelled when the service stops: streams end then.
    stopping: CancellationToken,
}

impl App {
    fn new(service: Arc<Service>, stopping: CancellationToken) -> Self {
        let most = service.config().max_rate;
        let [rate, logins] = [most, most.min(limits::LOGINS)].map(Rate::new);
        Self { service, rate, logins, stopping }
    }
}

/// Serves the API until `shutdown`, then finishes what was begun.
pub async fn serve(listener: TcpListener, service: Arc<Service>, shutdown: impl Future<Output = ()>) {
    let stopping = CancellationToken::new();
    let app = App::new(Arc::clone(&service), stopping.clone());
    let (config, rate, logins) = (service.config(), app.rate.clone(), app.logins.clone());
    let (connections, of_an_address) =
        limits::connections(config.max_connections, config.max_connections_of_an_address);
    let most = Most { connections, of_an_address };
    let shutdown = async move {
        shutdown.await;
        stopping.cancel();
    };
    tokio::select! {
        () = server::serve(listener, router(app), config.tls.clone(), most, shutdown) => {}
        () = rate.forget(), if config.max_rate > 0 => {}
        () = logins.forget(), if config.max_rate > 0 => {}
    }
}

/// How many connections there may be to the address of probes.
const PROBES: usize = 64;

/// Serves only the metrics and the probes, on an address of their own and without TLS.
pub async fn serve_probes(listener: TcpListener, service: Arc<Service>, shutdown: impl Future<Output = ()>) {
    let most = Most { connections: PROBES, of_an_address: PROBES / 4 };
    let app = App::new(service, CancellationToken::new());
    server::serve(listener, probes().with_state(app), None, most, shutdown).await;
}

fn router(app: App) -> Router {
    edged(guarded_routes().merge(open_routes()).fallback(unknown_route), app)
}

/// Routes with what is around all of them.
fn edged(routes: Router<App>, app: App) -> Router {
    let origins = app.service.config().allow_origins.clone();
    // Where there are none, no page asks.
    let routes = if origins.is_empty() { routes } else { routes.layer(browser::shared(origins)) };
    routes
        .layer(middleware::from_fn(answer_anyway))
        .layer(DefaultBodyLimit::max(BODY))
        .layer(middleware::from_fn_with_state(app.clone(), browser::keep_apart))
        .layer(middleware::from_fn_with_state(app.clone(), limits::keep_rate))
        .layer(middleware::from_fn_with_state(app.clone(), identify_and_count))
        .with_state(app)
}

/// What asks whether its caller may.
fn guarded_routes() -> Router<App> {
    Router::new()
        .route("/jobs", only(get(list::list).post(jobs::submit)))
        .route("/jobs/{id}/status", only(get(jobs::status)))
        .route("/jobs/{id}/logs", only(get(logs::whole)))
        .route("/jobs/{id}/logs/stream", only(get(logs::stream)))
        .route("/jobs/{id}/logs/tickets", only(post(logs::ticket)))
        .route("/jobs/{id}/kill", only(post(jobs::kill)))
        .route("/jobs/{id}/cleanup", only(post(jobs::clean_up)))
        .layer(middleware::from_fn(caller::unless_asked))
}

/// What everybody may: to log in, and to learn what is no secret.
fn open_routes() -> Router<App> {
    Router::new()
        .route("/auth/login", only(get(login::methods).post(login::log_in)))
        .merge(probes())
        .route("/openapi.json", only(get(openapi::document)))
        .route("/runner/{os}/{arch}/nomad-build", only(get(runner::binary)))
        .route("/runner/{os}/{arch}/sha256sums", only(get(runner::checksum)))
}

fn probes() -> Router<App> {
    Router::new()
        .route("/health", only(get(probes::health)))
        .route("/ready", only(get(probes::ready)))
        .route("/metrics", only(get(probes::metrics)))
}

/// A route that answers other methods in the envelope.
fn only(route: MethodRouter<App>) -> MethodRouter<App> {
    route.fallback(wrong_method)
}

async fn unknown_route() -> Problem {
    Problem::new(Code::RouteNotFound, "there is no such route: see README.md for the API")
}

async fn wrong_method(method: Method) -> Problem {
    Problem::new(Code::MethodNotAllowed, &format!("this route does not take {method}"))
}

const ABORTED: &str = "the request was aborted inside the service";

/// Answers for a handler that panics, too, whose caller would only see a connection end; the panic's own hook tells why.
async fn answer_anyway(request: Request, next: Next) -> Response {
    let answered = AssertUnwindSafe(next.run(request)).catch_unwind().await;
    answered.unwrap_or_else(|_| Problem::new(Code::Internal, ABORTED).into_response())
}

/// A caller's request ID is kept if it is short and plain; it comes back in a header and stands in logs.
fn request_id(request: &Request) -> HeaderValue {
    let plain = |value: &&HeaderValue| {
        value.to_str().is_ok_and(|id| {
            (1..=64).contains(&id.len())
                && id.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
        })
    };
    if let Some(given) = request.headers().get(REQUEST_ID).filter(plain) {
        return given.clone();
    }
    // A UUID is always a header's value.
    HeaderValue::from_str(&uuid::Uuid::new_v4().to_string()).unwrap_or(HeaderValue::from_static("none"))
}

async fn identify_and_count(
    State(app): State<App>,
    path: Option<MatchedPath>,
    parameters: Result<RawPathParams, RawPathParamsRejection>,
    request: Request,
    next: Next,
) -> Response {
    let began = Instant::now();
    let method = known_method(request.method());
    let id = request_id(&request);
    let route = path.as_ref().map_or("", MatchedPath::as_str);
    let asked = app.service.config().audit_file.is_some();
    let asked = asked.then(|| audit::Asked::of(&request, route, parameters.as_ref().ok())).flatten();
    let mut response = match asked {
        Some(asked) => answer_and_tell(&app, asked, &id, request, next).await,
        None => next.run(request).await,
    };
    let status = response.status();
    app.service.telemetry().answered(method, route, status.as_u16(), began.elapsed().as_secs_f64());
    let request = id.to_str().unwrap_or_default();
    if status.is_server_error() {
        tracing::warn!(method, route, status = status.as_u16(), request, "answered with an error");
    } else {
        tracing::debug!(method, route, status = status.as_u16(), request, "answered");
    }
    browser::tell(response.headers_mut(), app.service.config().tls.is_some());
    response.headers_mut().insert(REQUEST_ID, id);
    response
}

/// Answers in a task of its own, so that what a caller did who hangs up is told, too.
async fn answer_and_tell(
    app: &App,
    asked: audit::Asked,
    id: &HeaderValue,
    request: Request,
    next: Next,
) -> Response {
    let (service, id) = (Arc::clone(&app.service), id.clone());
    #[expect(clippy::disallowed_methods, reason = "it is waited for: a fault of a handler ends it alone")]
    let told = tokio::spawn(async move {
        let response = next.run(request).await;
        let answer = audit::Answer::of(&response);
        if let Some(file) = &service.config().audit_file {
            asked.tell(&service, file, id.to_str().unwrap_or_default(), answer).await;
        }
        response
    });
    told.await.unwrap_or_else(|_| Problem::new(Code::Internal, ABORTED).into_response())
}

/// A method as a label: what callers make up is not one.
fn known_method(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::POST => "POST",
        Method::HEAD => "HEAD",
        Method::PUT => "PUT",
        Method::DELETE => "DELETE",
        Method::OPTIONS => "OPTIONS",
        Method::PATCH => "PATCH",
        _ => "other",
    }
}

/// An answer of plain text that is not in the envelope.
fn plain(status: StatusCode, content_type: &'static str, body: String) -> Response {
    (status, [(axum::http::header::CONTENT_TYPE, content_type)], body).into_response()
}

#[cfg(test)]
mod tests {
    use axum::body::{Body, to_bytes};
    use serde_json::{Value, json};
    use tower::ServiceExt as _;

    use super::*;
    use crate::config::Config;
    use crate::telemetry::Telemetry;

    /// What a service of these variables answers whose handler of kills panics: the answer, its body, and the metrics then.
    async fn of_a_panic(source: &dyn Fn(&str) -> Option<String>) -> (Response<()>, Value, String) {
        let telemetry = Arc::new(Telemetry::new().unwrap());
        let service = Arc::new(Service::new(Config::read(source).unwrap(), telemetry).unwrap());
        let routes =
            Router::new().route("/jobs/{id}/kill", post(async || -> StatusCode { panic!("a fault") }));
        let app = App::new(Arc::clone(&service), CancellationToken::new());
        let kill = Request::post("/jobs/nb-01890a5d-ac96-774b-bcce-b302099a8057/kill").body(Body::empty());
        let (parts, body) = edged(routes, app).oneshot(kill.unwrap()).await.unwrap().into_parts();
        let body = serde_json::from_slice(&to_bytes(body, BODY).await.unwrap()).unwrap();
        (Response::from_parts(parts, ()), body, service.metrics().unwrap())
    }

    #[tokio::test]
    async fn a_handler_that_panics_is_answered_counted_and_told_in_the_audit_log() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("audit.jsonl");
        let path = file.to_str().unwrap();
        for audit in [None, Some(path)] {
            let variable = |name: &str| audit.filter(|_| name == "NOMAD_BUILD_AUDIT_FILE").map(str::to_owned);
            let (answer, body, metrics) = of_a_panic(&variable).await;
            assert_eq!(answer.status(), StatusCode::INTERNAL_SERVER_ERROR);
            assert_eq!(body["error"]["code"], "internal", "{body}");
            assert!(
                answer.headers().contains_key(REQUEST_ID)
                    && answer.headers().contains_key("x-content-type-options")
            );
            let counted = metrics.lines().any(|line| line.contains("status=\"500\"") && line.ends_with(" 1"));
            assert!(counted, "{metrics}");
        }
        let told: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
        assert_eq!(
            [&told["action"], &told["status"], &told["error"]],
            [&json!("kill"), &json!(500), &json!("internal")],
            "{told}"
        );
    }
}
