//! A submission is exact: sent again it is the same job, and whatever becomes of an answer, no job is made twice.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use futures_util::{StreamExt as _, stream};
use nomad_build::job::IdempotencyKey;
use reqwest::header::CONTENT_TYPE;
use serde_json::{Value, json};

use crate::support::agent::Agent;
use crate::support::{
    Api, Fault, Faults, Nomad, Random, Service, eventually, numbered, registering_only, scale, world,
};

/// How late a request is that is delayed.
const LATE: std::time::Duration = std::time::Duration::from_millis(20);

/// Submits with a key; status and body.
async fn submit(url: &str, key: &str, body: &Value) -> (u16, Value) {
    let (status, body) = Api::new(url).keyed(key, body).await;
    (status.as_u16(), body)
}

fn id_of((status, body): &(u16, Value)) -> String {
    assert_eq!(*status, 200, "{body}");
    body["data"]["job_id"].as_str().unwrap().to_owned()
}

fn key() -> String {
    uuid::Uuid::new_v4().to_string()
}

#[tokio::test]
async fn a_key_and_a_body_are_one_job_on_every_replica_even_at_once_and_after_its_end() {
    let world = world();
    let other = Service::start(&world.nomad, &world.registry, &[]);
    let urls = [&world.service.url, &other.url];
    let repository = world.repository("");
    let (body, key) = (world.job(&repository), key());
    let at_once = (0..20).map(|index| submit(urls[index % 2], &key, &body));
    let answers = futures_util::future::join_all(at_once).await;
    let id = id_of(&answers[0]);
    assert!(answers.iter().all(|answer| id_of(answer) == id), "{answers:?}");
    assert_eq!(world.api().wait_for_end(&id).await["status"], "SUCCEEDED");
    let versions = world.nomad(&format!("/v1/job/{id}/versions")).await.unwrap();
    assert_eq!(versions["Versions"].as_array().unwrap().len(), 1);
    // As Nomad collects it.
    let (purged, said) = world.nomad_program(&["job", "stop", "-detach", "-purge", &id]);
    assert!(purged, "{said}");
    eventually("the job is gone", async || {
        world.nomad(&format!("/v1/job/{id}")).await.is_none().then_some(())
    })
    .await;
    let fresh = Service::start(&world.nomad, &world.registry, &[]);
    assert_eq!(id_of(&submit(&fresh.url, &key, &body).await), id);
    assert!(world.nomad(&format!("/v1/job/{id}")).await.is_none());
}

#[tokio::test]
async fn a_key_that_comes_with_another_body_is_refused_and_how_it_is_written_does_not_count() {
    let world = world();
    let url = &world.service.url;
    let repository = world.repository("");
    let (mut body, key) = (world.job(&repository), key());
    let id = id_of(&submit(url, &key, &body).await);
    let http = reqwest::Client::builder().tls_certs_only([]).build().unwrap();
    let again = http.post(format!("{url}/jobs")).header("Idempotency-Key", &key);
    let pretty = serde_json::to_string_pretty(&body).unwrap();
    let again = again.header(CONTENT_TYPE, "application/json").body(pretty).send().await.unwrap();
    assert_eq!(again.json::<Value>().await.unwrap()["data"]["job_id"], id);
    body["priority"] = json!(51);
    let (status, refused) = submit(url, &key, &body).await;
    assert_eq!((status, &refused["error"]["code"]), (422, &json!("idempotency_key_reused")), "{refused}");
    let other = id_of(&submit(url, &format!("{key}-2"), &body).await);
    assert_ne!(other, id);
    for id in [id, other] {
        world.api().wait_for_end(&id).await;
    }
}

#[tokio::test]
async fn a_key_that_is_none_is_refused_by_name() {
    let url = &world().service.url;
    let long = "k".repeat(256);
    for (key, path) in [("", "/jobs"), ("a b", "/jobs"), (&*long, "/jobs"), ("a b", "/jobs?dry_run=true")] {
        let request = reqwest::Client::new().post(format!("{url}{path}")).header("Idempotency-Key", key);
        let answer = request.json(&json!({})).send().await.unwrap();
        assert_eq!(answer.status(), 400);
        let error = answer.json::<Value>().await.unwrap()["error"].take();
        assert_eq!(error["code"], "invalid_submission", "{error}");
        let fields: Vec<_> = error["details"].as_array().unwrap().iter().map(|of| &of["field"]).collect();
        assert_eq!(fields, ["Idempotency-Key", "owner", "repo_url", "image_tags", "registry_url"], "{error}");
    }
    // A refused body takes no key.
    let key = key();
    assert_eq!(submit(url, &key, &json!({})).await.0, 400);
    let name = key.parse::<IdempotencyKey>().unwrap().name("default", "acls-disabled");
    assert!(world().nomad(&format!("/v1/var/nomad-build/keys/{name}")).await.is_none());
    // This is where it would be.
    let repository = world().repository("RUN exit 1");
    let id = id_of(&submit(url, &key, &world().job(&repository)).await);
    assert!(world().nomad(&format!("/v1/var/nomad-build/keys/{name}")).await.is_some());
    world().api().wait_for_end(&id).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_keyed_submission_that_nobody_confirmed_is_made_by_the_next_attempt() {
    let world = world();
    let lossy = Faults::before(&world.nomad).await;
    let service = Service::start(&lossy.url, &world.registry, &[]);
    let repository = world.repository("");
    // Registered by nobody; registered by an attempt whose answer was lost.
    for fault in [Fault::CutBefore, Fault::CutAfter] {
        lossy.harm(move |line| line.starts_with("POST /v1/jobs?").then_some(fault));
        let (body, key) = (world.job(&repository), key());
        let (status, error) = submit(&service.url, &key, &body).await;
        assert_eq!((status, &error["error"]["code"]), (503, &json!("nomad_unavailable")), "{error}");
        let message = error["error"]["message"].as_str().unwrap();
        assert!(message.contains("same Idempotency-Key"), "{message}");
        let id = id_of(&submit(&world.service.url, &key, &body).await);
        assert!(message.contains(&id), "{message}");
        assert_eq!(world.api().wait_for_end(&id).await["status"], "SUCCEEDED");
    }
}

#[tokio::test]
async fn a_key_is_used_up_by_its_job_also_when_that_was_cleaned_up() {
    let world = world();
    let repository = world.repository("RUN exit 1");
    let (body, key) = (world.job(&repository), key());
    let id = id_of(&submit(&world.service.url, &key, &body).await);
    world.api().wait_for_end(&id).await;
    assert_eq!(world.api().post(&format!("/jobs/{id}/cleanup")).await, json!({"success": true}));
    let fresh = Service::start(&world.nomad, &world.registry, &[]);
    for url in [&world.service.url, &fresh.url] {
        assert_eq!(id_of(&submit(url, &key, &body).await), id);
    }
    assert!(world.nomad(&format!("/v1/job/{id}")).await.is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn of_submissions_whose_answers_are_cut_none_is_made_twice_and_none_is_told_that_does_not_exist() {
    let wanted = scale("NOMAD_BUILD_TEST_CUTS", 100);
    let agent = Agent::shared().await;
    let nomad = format!("http://{}", agent.address());
    // What counts is what is registered.
    let lossy = Faults::before(&registering_only(&nomad).await).await;
    let service = Service::start(&lossy.url, "127.0.0.1:1", &[]);
    let cuts = Arc::new(AtomicUsize::new(0));
    let (counted, mut random) = (Arc::clone(&cuts), Random::of(7));
    lossy.harm(move |line| {
        if !line.starts_with("POST /v1/jobs?") {
            return None;
        }
        let kinds =
            [Fault::CutAfter, Fault::Truncated(20), Fault::CutBefore, Fault::Drip, Fault::Delay(LATE)];
        let fault = (!random.once_in(3)).then(|| random.one_of(&kinds))?;
        let cut = matches!(fault, Fault::CutAfter | Fault::Truncated(_));
        counted.fetch_add(usize::from(cut), Ordering::Relaxed);
        Some(fault)
    });
    let api = Api::new(&service.url);
    let run = uuid::Uuid::new_v4().simple().to_string();
    let mut told = HashMap::new();
    let mut submissions = stream::iter(0..)
        .map(|number| {
            let (api, run) = (&api, &run);
            async move {
                let id = api.submit_keyed(&format!("{run}-{number}"), &numbered(run, number)).await;
                (number, id)
            }
        })
        .buffer_unordered(32);
    while let Some((number, id)) = submissions.next().await {
        told.insert(id, number);
        if cuts.load(Ordering::Relaxed) >= wanted {
            break;
        }
    }
    drop(submissions);
    lossy.harm(|_| None);
    let made = Nomad::new(&nomad).made_by(&run).await;
    let twice: Vec<_> = made.iter().filter(|(_, ids)| ids.len() > 1).collect();
    assert!(twice.is_empty(), "made twice: {twice:?}");
    for (id, number) in &told {
        assert_eq!(made.get(&format!("refs/heads/{number}")), Some(&vec![id.clone()]), "told, and not there");
    }
    eprintln!("{} answers cut, {} jobs told, {} made", cuts.load(Ordering::Relaxed), told.len(), made.len());
}
