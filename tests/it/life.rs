//! A service's life: tokens that are replaced, and its end.

use std::path::Path;
use std::sync::Arc;

use futures_util::StreamExt as _;
use reqwest::Method;
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Message;

use crate::follow::read_all;
use crate::support::{
    Api, Fault, Faults, Guarded, NAMESPACE, Namespace, Service, Sleeper, eventually, numbered, world,
};

fn service(nomad: &Guarded, token: &Path) -> Service {
    let token = token.to_str().unwrap();
    let variables = [("NOMAD_BUILD_NAMESPACES", NAMESPACE), ("NOMAD_TOKEN_FILE", token)];
    Service::start_unready(&nomad.url, &world().registry, &variables)
}

/// Whether a service is ready, or else why not.
async fn ready(api: &Api) -> Result<(), String> {
    let (status, body) = api.call(Method::GET, "/ready", None).await;
    if status.is_success() { Ok(()) } else { Err(body["error"]["message"].as_str().unwrap().to_owned()) }
}

/// A job that no node can take, so that it waits.
fn waiting() -> Value {
    let mut job = numbered("life", 1);
    job["resources"] = json!({"build": {"cpu": 60_000}});
    job
}

#[tokio::test]
async fn a_token_that_is_replaced_is_taken_and_one_that_is_revoked_is_told() {
    let nomad = Guarded::start().await;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("token");
    let give = |secret: &str| {
        let new = folder.path().join("new");
        std::fs::write(&new, secret).unwrap();
        std::fs::rename(new, &file).unwrap();
    };
    let [one, two, three] = [nomad.token().await, nomad.token().await, nomad.token().await];
    give(&one.secret);
    let service = service(&nomad, &file);
    let caller = nomad.builder().await;
    let api = Api::with_token(&service.url, &caller.secret);
    let is_ready = async |what: &str| eventually(what, async || ready(&api).await.ok()).await;
    is_ready("ready with the first token").await;
    let id = api.submit(&waiting()).await;
    nomad.owns(&id);
    give(&two.secret);
    nomad.revoke(&one).await;
    let revoked = chrono::Utc::now();
    let later = |status: &Value| {
        chrono::DateTime::parse_from_rfc3339(status["as_of"].as_str().unwrap()).unwrap() > revoked
    };
    api.wait_until(&id, "current with the second token", later).await;
    is_ready("ready with the second token").await;
    let next = api.submit(&waiting()).await;
    nomad.owns(&next);
    nomad.revoke(&two).await;
    let refused = "Nomad's ACLs do not allow it";
    eventually("not ready without a token, and for that reason", async || {
        ready(&api).await.err().filter(|why| why.contains(refused)).map(drop)
    })
    .await;
    // It is the service that is not well, and no job of its.
    for id in [&id, &next] {
        assert_eq!(api.status(id).await["status"], "PENDING");
    }
    give(&three.secret);
    is_ready("ready with the third token").await;
    for id in [&id, &next] {
        assert_eq!(api.status(id).await["status"], "PENDING");
        assert_eq!(api.post(&format!("/jobs/{id}/kill")).await, json!({"success": true}));
    }
}

#[tokio::test]
async fn the_policies_that_are_shipped_are_all_that_service_and_runner_need() {
    let nomad = Guarded::start().await;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("token");
    std::fs::write(&file, nomad.token().await.secret).unwrap();
    let service = service(&nomad, &file);
    let caller = nomad.builder().await;
    let api = Api::with_token(&service.url, &caller.secret);
    eventually("ready", async || ready(&api).await.ok()).await;
    let repository = world().repository("RUN echo built");
    let mut job = world().job(&repository);
    job["test_commands"] = json!(["echo tested"]);
    let id = api.submit(&job).await;
    nomad.owns(&id);
    let status = api.wait_for_end(&id).await;
    assert_eq!(status["status"], "SUCCEEDED", "{status:#}");
    let logs = api.logs(&id).await;
    assert!(logs["test"].as_str().unwrap().contains("\ntested\n"), "{logs:#}");
    let stream = api.stream(&id, "?tail=1").await.text().await.unwrap();
    assert!(stream.contains("event: end"), "{stream}");
    let sleeper = Sleeper::in_phase("test");
    let killed = api.submit(&sleeper.job).await;
    nomad.owns(&killed);
    eventually("the job sleeps", async || sleeper.sleeps().then_some(())).await;
    assert_eq!(api.post(&format!("/jobs/{killed}/kill")).await, json!({"success": true}));
    sleeper.is_stopped().await;
    for id in [&id, &killed] {
        assert_eq!(api.post(&format!("/jobs/{id}/cleanup")).await, json!({"success": true}));
        nomad.owns(&format!("nomad-build-sweep-{id}"));
    }
    nomad.owns("nomad-build-sweep-nodes");
    let left = async || {
        let left = nomad.call(Method::GET, "vars?namespace=builds", &Value::Null).await;
        let paths =
            left.as_array().unwrap().iter().map(|variable| variable["Path"].as_str().unwrap().to_owned());
        paths.filter(|path| path != "nomad-build/reporter").collect::<Vec<_>>()
    };
    eventually("the node's report", async || left().await.iter().any(|path| is_report(path)).then_some(()))
        .await;
    assert!(left().await.iter().all(|path| is_report(path)), "{:?}", left().await);
}

fn is_report(path: &str) -> bool {
    path.starts_with("nomad-build/sweeps/")
}

/// Reads a stream up to its close; the lines, the last cursor, and the code it was closed with.
async fn read_to_the_close(url: &str, id: &str) -> (Vec<String>, String, u16) {
    let url = format!("{}/jobs/{id}/logs/stream", url.replacen("http", "ws", 1));
    let (mut socket, _) = tokio_tungstenite::connect_async(url).await.unwrap();
    let (mut lines, mut cursor) = (Vec::new(), String::new());
    while let Some(message) = socket.next().await {
        match message.unwrap() {
            Message::Text(text) => {
                let message: Value = serde_json::from_str(&text).unwrap();
                if message["type"] == "log" {
                    lines.push(message["line"].as_str().unwrap().to_owned());
                    message["cursor"].as_str().unwrap().clone_into(&mut cursor);
                }
            }
            Message::Close(frame) => return (lines, cursor, frame.unwrap().code.into()),
            _ => {}
        }
    }
    panic!("the connection ended without a close")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_that_is_told_to_stop_ends_what_it_began_and_lets_go() {
    let namespace = Namespace::new();
    let slow = Faults::before(&world().nomad).await;
    let variables = [("NOMAD_BUILD_NAMESPACES", namespace.0.as_str())];
    let stopped = Service::start(&slow.url, &world().registry, &variables);
    let api = Api::new(&stopped.url);
    let reporter = format!("/v1/var/nomad-build/reporter?namespace={}", namespace.0);
    let is_held = async || world().nomad(&reporter).await.is_some_and(|found| found["Lock"].is_object());
    eventually("the service is on duty", async || is_held().await.then_some(())).await;
    let sleeper = Sleeper::in_phase("test");
    let id = sleeper.submit(&api).await;
    let reader = tokio::spawn({
        let (url, id) = (stopped.url.clone(), id.clone());
        async move { read_to_the_close(&url, &id).await }
    });
    let readers = async || stopped.metric("nomad_build_log_readers").await.filter(|readers| *readers == 1);
    eventually("the reader reads", readers).await;
    // A submission that is on its way when the service is told to stop.
    let begun = Arc::new(tokio::sync::Notify::new());
    let arrived = Arc::clone(&begun);
    slow.harm(move |line| {
        line.starts_with("POST /v1/jobs?").then(|| arrived.notify_one())?;
        Some(Fault::Delay(std::time::Duration::from_secs(2)))
    });
    let late = tokio::spawn({
        let api = api.clone();
        async move { api.submit(&waiting()).await }
    });
    begun.notified().await;
    assert!(stopped.stop().await.success());
    let late = late.await.unwrap();
    let (mut lines, cursor, code) = reader.await.unwrap();
    assert_eq!(code, 1001);
    assert!(!is_held().await, "the replica on duty did not give its lock back");
    let other = Service::start(&world().nomad, &world().registry, &variables);
    let api = Api::new(&other.url);
    for id in [&id, &late] {
        assert_eq!(api.post(&format!("/jobs/{id}/kill")).await, json!({"success": true}));
    }
    let of = |messages: Vec<Value>| {
        let lines = messages.into_iter().filter(|message| message["type"] == "log");
        lines.map(|message| message["line"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    // None, where no line had arrived yet.
    let query = if cursor.is_empty() { String::new() } else { format!("?cursor={cursor}") };
    lines.extend(of(read_all(&other.url, &id, &query).await));
    assert_eq!(lines, of(read_all(&other.url, &id, "").await));
    sleeper.is_stopped().await;
}
