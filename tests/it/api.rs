//! The API's promises that hold for every route.

mod counter;
mod heartbeat;
mod metrics;
mod quiet;

use reqwest::header::CONTENT_TYPE;
use reqwest::{Method, RequestBuilder, Response, StatusCode};
use serde_json::{Value, json};

use crate::support::{Api, Service, eventually, world};
use counter::{Counter, Fault};

fn http() -> reqwest::Client {
    reqwest::Client::builder().tls_certs_only([]).build().unwrap()
}

/// Checks that an answer is the envelope; returns its data or its error.
async fn enveloped(request: RequestBuilder) -> (StatusCode, Value) {
    let answer = request.send().await.unwrap();
    let status = answer.status();
    assert!(answer.headers().contains_key("x-request-id"));
    assert_eq!(answer.headers()[CONTENT_TYPE], "application/json");
    let body: Value = answer.json().await.unwrap();
    let mut keys: Vec<_> = body.as_object().unwrap().keys().cloned().collect();
    keys.sort();
    assert_eq!(keys, ["data", "error", "timestamp"], "{body}");
    let timestamp = body["timestamp"].as_str().unwrap();
    let age = chrono::Utc::now() - chrono::DateTime::parse_from_rfc3339(timestamp).unwrap().to_utc();
    assert!(timestamp.ends_with('Z') && age.abs() < chrono::Duration::minutes(1), "{timestamp}");
    let (data, error) = (body["data"].clone(), body["error"].clone());
    assert!(data.is_null() != error.is_null(), "{body}");
    assert_eq!(status.is_success(), error.is_null(), "{status}: {body}");
    if error.is_null() {
        return (status, data);
    }
    assert!(!error["message"].as_str().unwrap().is_empty());
    for detail in error["details"].as_array().unwrap() {
        assert!(detail["field"].is_string() && detail["message"].is_string(), "{detail}");
    }
    (status, error)
}

#[tokio::test]
async fn every_refusal_has_its_status_and_its_code_in_the_envelope() {
    let url = &world().service.url;
    let http = http();
    let unknown = "nb-0193a1c2-7e57-7000-8000-000000000000";
    let request = |method: &str, path: &str| http.request(method.parse().unwrap(), format!("{url}{path}"));
    let post = |content_type: &str, body: String| {
        request("POST", "/jobs").header(CONTENT_TYPE, content_type).body(body)
    };
    let json = "application/json";
    for (what, request, status, code) in [
        ("no route", request("GET", "/nothing"), 404, "route_not_found"),
        ("no route", request("GET", "/"), 404, "route_not_found"),
        ("no platform", request("GET", "/runner/%ff/amd64/nomad-build"), 404, "route_not_found"),
        ("no platform", request("GET", "/runner/linux/%ff/sha256sums"), 404, "route_not_found"),
        ("no route", request("POST", "/jobs/"), 404, "route_not_found"),
        ("a method", request("DELETE", "/jobs"), 405, "method_not_allowed"),
        ("a method", request("PUT", "/health"), 405, "method_not_allowed"),
        ("a made-up method", request("BREW", "/ready"), 405, "method_not_allowed"),
        ("a method", request("GET", &format!("/jobs/{unknown}/kill")), 405, "method_not_allowed"),
        ("a method", request("POST", &format!("/jobs/{unknown}/status")), 405, "method_not_allowed"),
        ("no type", request("POST", "/jobs").body("{}"), 415, "unsupported_media_type"),
        ("a wrong type", post("text/plain", "{}".to_owned()), 415, "unsupported_media_type"),
        (
            "a form",
            post("application/x-www-form-urlencoded", "a=b".to_owned()),
            415,
            "unsupported_media_type",
        ),
        ("too much", post(json, format!("\"{}\"", "x".repeat(401 * 1024))), 413, "body_too_large"),
        ("nothing", post(json, String::new()), 400, "invalid_json"),
        ("half", post(json, "{\"owner\":".to_owned()), 400, "invalid_json"),
        ("two", post(json, "{} {}".to_owned()), 400, "invalid_json"),
        ("no text", post(json, "{\"owner\": \"\\ud800\"}".to_owned()), 400, "invalid_json"),
        ("deep", post(json, "[".repeat(10_000)), 400, "invalid_json"),
        ("a list", post(json, "[]".to_owned()), 400, "invalid_submission"),
        ("nothing said", post(json, "{}".to_owned()), 400, "invalid_submission"),
        ("a query", request("POST", "/jobs?dry_run=maybe").json(&json!({})), 400, "invalid_request"),
        ("no job", request("GET", &format!("/jobs/{unknown}/status")), 404, "job_not_found"),
        ("no job", request("POST", &format!("/jobs/{unknown}/kill")), 404, "job_not_found"),
        ("no job", request("POST", &format!("/jobs/{unknown}/cleanup")), 404, "job_not_found"),
        ("no ID", request("GET", "/jobs/nomad-registry/status"), 404, "job_not_found"),
        ("no ID", request("GET", "/jobs/..%2F..%2Fetc/status"), 404, "job_not_found"),
        ("no ID", request("POST", "/jobs/%00/kill"), 404, "job_not_found"),
        ("no ID", request("POST", &format!("/jobs/{}/kill", unknown.to_uppercase())), 404, "job_not_found"),
    ] {
        let (got, error) = enveloped(request).await;
        assert_eq!((got.as_u16(), &error["code"]), (status, &json!(code)), "{what}: {error}");
    }
}

#[tokio::test]
async fn a_path_that_is_not_text_is_no_job() {
    let path = format!("{}/jobs/%ff/status", world().service.url);
    let (status, error) = enveloped(http().get(path)).await;
    assert_eq!((status.as_u16(), &error["code"]), (404, &json!("job_not_found")));
}

#[tokio::test]
async fn a_refused_submission_names_every_field_that_is_wrong() {
    let world = world();
    let body = json!({
        "owner": "-x", "repo_url": "ext::sh -c id", "git_ref": "--upload-pack=x", "git_credentials_path": "a b",
        "dockerfile_path": "../x", "context_path": "/etc", "image_tags": ["ok", "no good", 7],
        "registry_url": "https://ghcr.io", "registry_credentials_path": "%", "image_name": 1, "target": "a b",
        "test_commands": [""], "test_entry_point": "yes", "test_env": {"A=B": "x"}, "build_args": {"A B": "x"},
        "labels": {"nomad-build.job": "x"}, "timeouts": {"build": "soon"}, "resources": {"build": {"cpu": 0}},
        "no_cache": 1, "priority": 101, "image_tag": "x",
    });
    for path in ["/jobs", "/jobs?dry_run=true"] {
        let request = http().post(format!("{}{path}", world.service.url)).json(&body);
        let (status, error) = enveloped(request).await;
        assert_eq!((status.as_u16(), &error["code"]), (400, &json!("invalid_submission")));
        let fields: Vec<_> = error["details"]
            .as_array()
            .unwrap()
            .iter()
            .map(|detail| detail["field"].as_str().unwrap())
            .collect();
        for field in body.as_object().unwrap().keys() {
            assert!(fields.iter().any(|named| named.starts_with(field.as_str())), "{field}: {fields:?}");
        }
    }
}

#[tokio::test]
async fn a_dry_run_says_that_a_submission_is_valid_and_registers_nothing() {
    let world = world();
    let repository = world.repository("RUN true");
    let request =
        http().post(format!("{}/jobs?dry_run=true", world.service.url)).json(&world.job(&repository));
    assert_eq!(enveloped(request).await, (StatusCode::OK, json!({ "valid": true })));
    let listed = world.nomad_api().get("/v1/jobs?meta=true").await.to_string();
    assert!(!listed.contains(&repository.url()));
}

#[tokio::test]
async fn a_plain_request_id_comes_back_and_any_other_is_replaced() {
    let url = format!("{}/health", world().service.url);
    let id = |answer: &Response| answer.headers()["x-request-id"].to_str().unwrap().to_owned();
    let without = id(&http().get(&url).send().await.unwrap());
    assert_ne!(without, id(&http().get(&url).send().await.unwrap()));
    let long = "x".repeat(65);
    for (given, kept) in [
        ("ci-17.a_B", true),
        ("", false),
        (long.as_str(), false),
        ("$(id)", false),
        ("a b", false),
        ("a\"b", false),
        ("\u{fc}", false),
    ] {
        let answer = http().get(&url).header("x-request-id", given.as_bytes()).send().await.unwrap();
        let got = id(&answer);
        assert_eq!(got == given, kept, "{given:?}");
        assert!(kept || uuid::Uuid::parse_str(&got).is_ok(), "{got:?}");
    }
}

#[tokio::test]
async fn a_service_with_nomad_is_healthy_and_ready() {
    for (path, status) in [("/health", "ok"), ("/ready", "ready")] {
        let (code, data) = enveloped(http().get(format!("{}{path}", world().service.url))).await;
        assert_eq!((code, &data["status"]), (StatusCode::OK, &json!(status)));
        assert!(chrono::DateTime::parse_from_rfc3339(data["timestamp"].as_str().unwrap()).is_ok());
    }
}

#[tokio::test]
async fn a_service_without_nomad_is_healthy_and_says_why_it_is_not_ready() {
    // Nobody gets port 1 by asking for a free one.
    let service = Service::start_unready("http://127.0.0.1:1", "127.0.0.1:1", &[]);
    let (status, _) = enveloped(http().get(format!("{}/health", service.url))).await;
    assert_eq!(status, StatusCode::OK);
    // Right after its start it only knows that it has no list yet.
    eventually("the service says that Nomad is missing", async || {
        let (status, error) = enveloped(http().get(format!("{}/ready", service.url))).await;
        assert_eq!((status.as_u16(), &error["code"]), (503, &json!("not_ready")));
        error["message"].as_str().unwrap().contains("Nomad").then_some(())
    })
    .await;
    let unknown = format!("{}/jobs/nb-0193a1c2-7e57-7000-8000-000000000000/status", service.url);
    let (status, error) = enveloped(http().get(unknown)).await;
    assert_eq!((status.as_u16(), &error["code"]), (503, &json!("nomad_unavailable")));
}

#[tokio::test]
async fn metrics_are_well_formed_and_hold_no_id() {
    let world = world();
    let repository = world.repository("RUN true");
    let mut job = world.job(&repository);
    job["test_commands"] = json!(["true"]);
    let (id, _) = world.api().run(&job).await;
    // Strange paths and methods are counted too, under no name of their own.
    world.api().call(Method::GET, &format!("/{id}/strange"), None).await;
    let strange: Method = "STRANGE".parse().unwrap();
    world.api().call(strange, &format!("/jobs/{id}/status"), None).await;
    let text = http().get(format!("{}/metrics", world.service.url)).send().await.unwrap();
    assert!(text.headers()[CONTENT_TYPE].to_str().unwrap().starts_with("text/plain; version=0.0.4"));
    let text = text.text().await.unwrap();
    metrics::check(&text);
    for label in metrics::label_values(&text) {
        let held = ["nb-", "strange", "STRANGE", crate::support::image_of(&job)];
        assert!(!held.iter().any(|text| label.contains(text)), "{label}");
    }
}

#[tokio::test]
async fn the_replica_that_reports_counts_jobs_and_phases() {
    let world = world();
    let repository = world.repository("RUN true");
    world.api().run(&world.job(&repository)).await;
    for name in [
        "nomad_build_jobs_total{status=\"SUCCEEDED\"}",
        "nomad_build_phase_duration_seconds_count{phase=\"build\"",
    ] {
        eventually(name, async || {
            let text = http().get(format!("{}/metrics", world.service.url)).send().await.unwrap();
            text.text().await.unwrap().contains(name).then_some(())
        })
        .await;
    }
}

/// A service that reaches Nomad through a proxy.
async fn proxied() -> (Counter, Service) {
    proxied_with(&[]).await
}

/// The same, with further variables.
async fn proxied_with(variables: &[(&'static str, &str)]) -> (Counter, Service) {
    let world = world();
    let counter = Counter::start(&world.nomad).await;
    let variables: Vec<_> = variables.iter().map(|(name, value)| (*name, (*value).to_owned())).collect();
    let service = tokio::task::spawn_blocking({
        let (nomad, registry) = (counter.url.clone(), world.registry.clone());
        move || {
            let variables: Vec<_> = variables.iter().map(|(name, value)| (*name, value.as_str())).collect();
            Service::start(&nomad, &registry, &variables)
        }
    });
    let service = service.await.unwrap();
    (counter, service)
}

/// Submits through a fault, and sees the job refused by its name and withdrawn.
async fn is_withdrawn(fault: Fault) {
    let world = world();
    let (counter, service) = proxied().await;
    counter.lose_registrations(fault);
    let repository = world.repository("RUN sleep 300");
    let body = world.job(&repository);
    let (status, error) = enveloped(http().post(format!("{}/jobs", service.url)).json(&body)).await;
    assert_eq!((status.as_u16(), error["code"].as_str()), (503, Some("nomad_unavailable")), "{error}");
    let message = error["message"].as_str().unwrap();
    let id = message.split_whitespace().find(|word| word.starts_with("nb-")).unwrap();
    // Another replica sees it, and how it ended.
    let ended = world.api().wait_for_end(id).await;
    assert_eq!(ended["status"], "KILLED", "{ended}");
    assert!(ended["failure"]["message"].as_str().unwrap().starts_with("withdrawn"), "{ended}");
}

#[tokio::test]
async fn a_job_whose_registration_nobody_confirms_is_refused_by_name_and_withdrawn() {
    is_withdrawn(Fault::Lost).await;
}

#[tokio::test]
async fn a_job_that_nomad_refuses_after_an_answer_was_lost_is_withdrawn() {
    is_withdrawn(Fault::LostThenForbidden).await;
}

#[tokio::test]
async fn a_job_that_claimed_before_its_registration_was_confirmed_is_accepted() {
    let world = world();
    let (counter, service) = proxied().await;
    counter.lose_registrations(Fault::LostBehindTheClaim);
    let repository = world.repository("RUN true");
    let id = Api::new(&service.url).submit(&world.job(&repository)).await;
    assert!(world.nomad(&format!("/v1/job/{id}")).await.is_some());
}

#[tokio::test]
async fn pages_of_other_origins_are_refused_on_every_route() {
    let world = world();
    let allow = [("NOMAD_BUILD_ALLOW_ORIGINS", "https://ci.example.com")];
    let service = Service::start(&world.nomad, &world.registry, &allow);
    let http = reqwest::Client::builder().tls_certs_only([]).build().unwrap();
    for (header, value, is_refused) in [
        ("origin", "https://evil.example", true),
        ("origin", "null", true),
        ("host", "evil.example", true),
        ("origin", "https://ci.example.com", false),
        ("origin", service.url.as_str(), false),
        ("host", "localhost", false),
    ] {
        for route in ["/health", "/metrics", "/jobs/nb-x/status", "/jobs/nb-x/logs/stream", "/other"] {
            let answer =
                http.get(format!("{}{route}", service.url)).header(header, value).send().await.unwrap();
            // A name tells nothing of who asks for nobody's jobs.
            let is_refused = is_refused && (header == "origin" || route.starts_with("/jobs"));
            assert_eq!(answer.status() == 403, is_refused, "{route} {header}: {value}");
            assert_eq!(answer.headers()["x-content-type-options"], "nosniff", "{route}");
            assert_eq!(answer.headers()["cache-control"], "no-store", "{route}");
            assert_eq!(answer.headers()["referrer-policy"], "no-referrer", "{route}");
            let policy = "default-src 'none'; frame-ancestors 'none'";
            assert_eq!(answer.headers()["content-security-policy"], policy, "{route}");
        }
        let socket = format!("{}/jobs/nb-x/logs/stream", service.url.replacen("http", "ws", 1));
        let mut request =
            tokio_tungstenite::tungstenite::client::IntoClientRequest::into_client_request(socket);
        request.as_mut().unwrap().headers_mut().insert(header, value.parse().unwrap());
        let refused = tokio_tungstenite::connect_async(request.unwrap()).await.unwrap_err();
        let tokio_tungstenite::tungstenite::Error::Http(answer) = refused else { panic!("{refused}") };
        assert_eq!(answer.status() == 403, is_refused, "{header}: {value}");
    }
}

#[tokio::test]
async fn a_page_of_an_allowed_origin_may_send_what_the_api_takes_and_read_its_answers() {
    let world = world();
    let origin = "https://ci.example.com";
    let service = Service::start(&world.nomad, &world.registry, &[("NOMAD_BUILD_ALLOW_ORIGINS", origin)]);
    let http = reqwest::Client::builder().tls_certs_only([]).build().unwrap();
    let unknown = "nb-01890a5d-ac96-774b-bcce-b302099a8057";
    let asks = async |origin: &str, route: &str| {
        let asked = http.request(Method::OPTIONS, format!("{}{route}", service.url)).header("origin", origin);
        let asked = asked.header("access-control-request-method", "POST");
        let named = "x-nomad-token,content-type,idempotency-key,authorization";
        asked.header("access-control-request-headers", named).send().await.unwrap()
    };
    for route in ["/jobs", &format!("/jobs/{unknown}/logs/tickets")] {
        let answer = asks(origin, route).await;
        assert!(answer.status().is_success(), "{}", answer.status());
        let header = |name: &str| answer.headers()[name].to_str().unwrap().to_ascii_lowercase();
        assert_eq!(header("access-control-allow-origin"), origin);
        assert!(header("access-control-allow-methods").contains("post"));
        for name in ["x-nomad-token", "content-type", "idempotency-key", "authorization"] {
            assert!(header("access-control-allow-headers").contains(name), "{name}");
        }
        assert!(!answer.headers().contains_key("access-control-allow-credentials"));
        assert_eq!(asks("https://evil.example", route).await.status(), 403);
    }
    for route in ["/health", &format!("/jobs/{unknown}/status")] {
        let read = http.get(format!("{}{route}", service.url));
        let answer = read.try_clone().unwrap().header("origin", origin).send().await.unwrap();
        assert_eq!(answer.headers()["access-control-allow-origin"], origin, "{route}");
        assert_eq!(answer.headers()["access-control-expose-headers"], "x-request-id,retry-after", "{route}");
        assert!(answer.headers()["vary"].to_str().unwrap().contains("origin"), "{route}");
        assert!(!read.send().await.unwrap().headers().contains_key("access-control-allow-origin"), "{route}");
    }
}
