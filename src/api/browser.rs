//! What a browser is kept from: pages of other origins may not use a caller's reach or a caller's machine.
//!
//! A page may send requests anywhere, and opens a `WebSocket` without asking first. It cannot hide its origin.

use std::time::Duration;

use axum::extract::{Request, State};
use axum::http::header::{
    AUTHORIZATION, CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HOST, ORIGIN, REFERRER_POLICY,
    RETRY_AFTER, STRICT_TRANSPORT_SECURITY, X_CONTENT_TYPE_OPTIONS,
};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};

use tower_http::cors::{AllowOrigin, CorsLayer};

use super::answer::{Code, Problem};
use super::{App, REQUEST_ID};

/// What every answer says: it is what it says it is, is shown nowhere, and is kept nowhere.
const HEADERS: [(HeaderName, &str); 4] = [
    (X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (CONTENT_SECURITY_POLICY, "default-src 'none'; frame-ancestors 'none'"),
    (REFERRER_POLICY, "no-referrer"),
    (CACHE_CONTROL, "no-store"),
];

/// What answers over TLS say: for a year, this name is asked by TLS alone. A name below it may be anybody's.
const BY_TLS_ALONE: HeaderValue = HeaderValue::from_static("max-age=31536000");

/// Tells browsers what to make of an answer.
pub(super) fn tell(headers: &mut HeaderMap, by_tls: bool) {
    for (name, value) in HEADERS {
        headers.entry(name).or_insert(HeaderValue::from_static(value));
    }
    if by_tls {
        headers.insert(STRICT_TRANSPORT_SECURITY, BY_TLS_ALONE);
    }
}

/// Refuses what a page of another origin sends.
pub(super) async fn keep_apart(State(app): State<App>, request: Request, next: Next) -> Response {
    let refusal = match foreign_origin(request.headers(), &app.service.config().allow_origins) {
        None => foreign_host(&app, request.headers(), request.uri().path()).await,
        refusal => refusal,
    };
    match refusal {
        Some(why) => Problem::new(Code::Forbidden, &why).into_response(),
        None => next.run(request).await,
    }
}

/// What a page of an allowed origin may send beside what every page may, in a header.
const SENT: [HeaderName; 6] = [
    AUTHORIZATION,
    CONTENT_TYPE,
    HeaderName::from_static("x-nomad-token"),
    HeaderName::from_static("idempotency-key"),
    HeaderName::from_static("last-event-id"),
    REQUEST_ID,
];

/// How long a browser need not ask again whether a page may.
const ASKED: Duration = Duration::from_mins(10);

/// Tells browsers what pages of the allowed origins may send, and that they may read the answers. Nobody is known by a cookie.
pub(super) fn shared(allowed: Vec<String>) -> CorsLayer {
    let is_allowed = move |origin: &HeaderValue, _: &_| {
        allowed.iter().any(|allowed| allowed.as_bytes().eq_ignore_ascii_case(origin.as_bytes()))
    };
    CorsLayer::new()
        .allow_origin(AllowOrigin::predicate(is_allowed))
        .allow_methods([Method::GET, Method::POST])
        .allow_headers(SENT)
        .expose_headers([REQUEST_ID, RETRY_AFTER])
        .max_age(ASKED)
}

fn text(headers: &HeaderMap, name: HeaderName) -> Option<&str> {
    headers.get(name).map(|value| value.to_str().unwrap_or_default())
}

/// Why a page may not send this; none where it may, or where no page sent it.
fn foreign_origin(headers: &HeaderMap, allowed: &[String]) -> Option<String> {
    let origin = text(headers, ORIGIN)?;
    let host = text(headers, HOST).unwrap_or_default();
    let is_same = origin.split_once("://").is_some_and(|(_, of)| of.eq_ignore_ascii_case(host));
    if is_same || allowed.iter().any(|allowed| allowed.eq_ignore_ascii_case(origin)) {
        return None;
    }
    Some(format!(
        "pages of {origin:?} may not use this service: its operator can allow them (NOMAD_BUILD_ALLOW_ORIGINS)"
    ))
}

/// Why nobody may ask by this name; none where it is as good as any. Whoever owns a name can have it lead to this machine, and then
/// a page of that name is of the same origin: where no token is asked for, that would be all it needs.
async fn foreign_host(app: &App, headers: &HeaderMap, path: &str) -> Option<String> {
    let config = app.service.config();
    let host = text(headers, HOST).filter(|host| !host.is_empty() && !is_of_this_machine(host))?;
    let is_for_this_machine = config.listen.ip().is_loopback() && !config.open;
    // Probes tell nothing, and ask nobody.
    if !is_for_this_machine || !path.starts_with("/jobs") {
        return None;
    }
    let is_guarded = app.service.is_guarded().await;
    (!is_guarded).then(|| {
        format!("Nomad has no ACLs, so only this machine is served, and {host:?} is no name or address of it")
    })
}

/// Whether a Host header is an address, or the one name that leads nowhere else.
fn is_of_this_machine(host: &str) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    };
    let address = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(name);
    name.eq_ignore_ascii_case("localhost") || address.parse::<std::net::IpAddr>().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_of_another_origin_is_refused() {
        let allowed = ["https://ci.example.com".to_owned()];
        for (host, origin, good) in [
            ("127.0.0.1:8080", None, true),
            ("127.0.0.1:8080", Some("http://127.0.0.1:8080"), true),
            ("127.0.0.1:8080", Some("http://127.0.0.1:9090"), false),
            ("127.0.0.1:8080", Some("https://evil.example"), false),
            ("127.0.0.1:8080", Some("null"), false),
            ("builds.example.com", Some("https://builds.example.com"), true),
            ("builds.example.com", Some("https://ci.example.com"), true),
            ("builds.example.com", Some("https://CI.example.com"), true),
            ("builds.example.com", Some("http://ci.example.com"), false),
            ("builds.example.com", Some("https://ci.example.com.evil.example"), false),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(HOST, host.parse().unwrap());
            if let Some(origin) = origin {
                headers.insert(ORIGIN, origin.parse().unwrap());
            }
            assert_eq!(foreign_origin(&headers, &allowed).is_none(), good, "{host} {origin:?}");
        }
    }

    #[test]
    fn a_name_that_somebody_else_may_own_is_not_this_machines() {
        for (host, ours) in [
            ("127.0.0.1:8080", true),
            ("localhost:8080", true),
            ("LOCALHOST", true),
            ("[::1]:8080", true),
            ("10.0.0.7", true),
            ("evil.example:8080", false),
            ("localhost.evil.example", false),
            ("127.0.0.1.evil.example", false),
        ] {
            assert_eq!(is_of_this_machine(host), ours, "{host}");
        }
    }
}
