//! Several services, and services that die: a job does not notice.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes, to_bytes};
use axum::extract::Request;
use axum::http::response::Parts;
use axum::response::Response;
use serde_json::{Value, json};

use crate::support::{
    Api, At, Front, Hold, Instead, Namespace, Service, Upstream, eventually, image_of, nomad_front, serve,
    world,
};

/// A status without what other jobs, or the replica's last look at Nomad, change.
pub(crate) fn alone(mut status: Value) -> Value {
    status["as_of"].take();
    status["metrics"]["concurrent_jobs_total"].take();
    status
}

#[tokio::test]
async fn a_job_submitted_to_one_replica_is_known_to_the_other_at_once_and_told_alike() {
    let world = world();
    let other = Service::start(&world.nomad, &world.registry, &[]);
    let (one, other) = (world.api(), Api::new(&other.url));
    let repository = world.repository("RUN true");
    for (submitted_to, asked) in [(&one, &other), (&other, &one)] {
        let mut job = world.job(&repository);
        job["test_commands"] = json!(["true"]);
        let id = submitted_to.submit(&job).await;
        let (first, second) = (asked.status(&id).await, submitted_to.status(&id).await);
        let start = |status: &Value| status["phase_timestamps"]["job_start"].clone();
        assert!(start(&first).is_string() && start(&first) == start(&second), "{first:#} {second:#}");
        submitted_to.wait_for_end(&id).await;
        let last = asked.wait_for_end(&id).await;
        assert_eq!(last["status"], "SUCCEEDED", "{last:#}");
        eventually("two replicas that say the same", async || {
            (alone(asked.status(&id).await) == alone(submitted_to.status(&id).await)).then_some(())
        })
        .await;
    }
}

#[tokio::test]
async fn a_service_that_is_killed_in_every_phase_tells_the_job_as_if_nothing_had_happened() {
    let world = world();
    let front = Front::holding(&world.registry, At::Manifest).await;
    let registries = format!("{},{}", world.registry, front.host);
    let mut service = Service::start(&world.nomad, &registries, &[]);
    let holds = [Hold::new(), Hold::new()];
    let repository = world.repository(&format!("RUN {}", holds[0].command()));
    let mut job = world.job(&repository);
    job["test_commands"] = json!([holds[1].command()]);
    job["registry_url"] = json!(front.host);
    let id = Api::new(&service.url).submit(&job).await;
    for (phase, hold) in [("BUILDING", Some(&holds[0])), ("TESTING", Some(&holds[1])), ("PUBLISHING", None)] {
        let before = Api::new(&service.url).wait_until(&id, phase, |status| status["status"] == phase).await;
        service.kill();
        service = Service::start(&world.nomad, &registries, &[]);
        let after = Api::new(&service.url).status(&id).await;
        assert_eq!(after["status"], phase, "{after:#}");
        for (name, time) in before["phase_timestamps"].as_object().unwrap() {
            assert_eq!(&after["phase_timestamps"][name], time, "{name} in {phase}");
        }
        if let Some(hold) = hold {
            hold.let_go().await;
        }
    }
    front.let_go();
    let last = Api::new(&service.url).wait_for_end(&id).await;
    assert_eq!(last["status"], "SUCCEEDED", "{last:#}");
    assert_eq!(world.served(image_of(&job), "one").await.as_deref(), last["image"]["digest"].as_str());
    // The replica that lived through it all says the same.
    world.api().wait_for_end(&id).await;
    eventually("the replica that lived says the same", async || {
        let (lived, restarted) = (world.api().status(&id).await, Api::new(&service.url).status(&id).await);
        (alone(lived) == alone(restarted)).then_some(())
    })
    .await;
}

#[tokio::test]
async fn twenty_jobs_at_once_all_succeed_whichever_replica_took_them() {
    let world = world();
    let other = Service::start(&world.nomad, &world.registry, &[]);
    let replicas = [world.api(), Api::new(&other.url)];
    let repository = world.repository("RUN true");
    let submitted = (0..20).map(|index| {
        let mut job = world.job(&repository);
        job["test_commands"] = json!(["true"]);
        let api = &replicas[index % 2];
        async move { (api.submit(&job).await, job) }
    });
    for (id, job) in futures_util::future::join_all(submitted).await {
        let status = world.api().wait_for_end(&id).await;
        assert_eq!(status["status"], "SUCCEEDED", "{status:#}");
        let digest = status["image"]["digest"].as_str();
        assert_eq!(world.served(image_of(&job), "one").await.as_deref(), digest);
    }
}

/// All events of a job's log, as text.
async fn events(api: &Api, id: &str, query: &str) -> (u16, String) {
    let http = reqwest::Client::builder().tls_certs_only([]).build().unwrap();
    let url = format!("{}/jobs/{id}/logs/stream{query}", api.url);
    let answer = http.get(url).header("Accept", "text/event-stream").send().await.unwrap();
    (answer.status().as_u16(), answer.text().await.unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_has_not_heard_of_the_allocation_takes_another_ones_cursor() {
    let world = world();
    let without_allocations = |_: &_, path: &str| match path {
        "/v1/event/stream" => Some(Instead::Silence),
        "/v1/allocations" => Some(Instead::EmptyList),
        _ => None,
    };
    let nomad = nomad_front(&world.nomad, without_allocations).await;
    let replica = Service::start(&nomad, &world.registry, &[]);
    let late = Api::new(&replica.url);
    let repository = world.repository("");
    let job = world.job(&repository);
    let id = late.submit(&job).await;
    world.api().wait_for_end(&id).await;
    let (_, whole) = events(&world.api(), &id, "").await;
    let cursor = whole.lines().find_map(|line| line.strip_prefix("id: ")).unwrap();
    let rest = whole.split_once(&format!("id: {cursor}\n")).unwrap().1;
    let rest = rest.lines().filter(|line| line.starts_with("id: ")).collect::<Vec<_>>();
    assert!(late.status(&id).await["nomad"]["node"].is_null());
    let (status, resumed) = events(&late, &id, &format!("?cursor={cursor}")).await;
    assert_eq!(status, 200, "{resumed}");
    assert_eq!(resumed.lines().filter(|line| line.starts_with("id: ")).collect::<Vec<_>>(), rest);
    // Another job's is refused still.
    let foreign = "c1-00000000000000000000000000000005-build-0-3-0-9";
    assert_eq!(events(&late, &id, &format!("?cursor={foreign}")).await.0, 400);
}

/// Waits until a list of claims is not empty.
async fn is_decided(http: reqwest::Client, claims: String) {
    loop {
        let listed = http.get(&claims).send().await.unwrap().text().await.unwrap();
        if listed.contains("nb-") {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// A front of Nomad that, once it showed a namespace's progress, shows it as it was then until its job is decided, and tells of no
/// change after.
async fn front_that_shows_old_progress(nomad: &str, namespace: &str) -> String {
    let claims = format!("/v1/vars?namespace={namespace}&prefix=nomad-build%2Fclaims%2F");
    let (nomad, decided) = (Upstream::new(nomad), Arc::new(AtomicBool::new(false)));
    let shown = Arc::new(Mutex::new(None::<(Parts, Bytes)>));
    let router = Router::new().fallback(move |request: Request| {
        let (nomad, claims) = (nomad.clone(), claims.clone());
        let (decided, shown) = (Arc::clone(&decided), Arc::clone(&shown));
        async move {
            let query = request.uri().query().unwrap_or_default().to_owned();
            let is_list = request.uri().path() == "/v1/vars";
            if is_list && query.contains("per_page") && decided.load(Relaxed) {
                std::future::pending::<()>().await;
            }
            let (head, body) = nomad.pass(request).await.into_parts();
            if !is_list {
                return Response::from_parts(head, body);
            }
            let mut listed = (head, to_bytes(body, 1 << 20).await.unwrap());
            let names_a_job = listed.1.windows(3).any(|text| text == b"nb-");
            if names_a_job && query.contains("outcomes") {
                let known = shown.lock().unwrap().clone();
                if let Some(known) = known {
                    let wait = is_decided(nomad.http.clone(), format!("{}{claims}", nomad.url));
                    tokio::time::timeout(Duration::from_mins(1), wait).await.expect("the job is decided");
                    listed = known;
                } else {
                    *shown.lock().unwrap() = Some(listed.clone());
                }
            }
            decided.fetch_or(names_a_job && query.contains("claims"), Relaxed);
            Response::from_parts(listed.0, Body::from(listed.1))
        }
    });
    format!("http://{}", serve(router).await)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_failed_is_heard_of_with_the_begin_of_the_phase_that_failed() {
    let (world, namespace) = (world(), Namespace::new());
    let nomad = front_that_shows_old_progress(&world.nomad, &namespace.0).await;
    let replica =
        Service::start(&nomad, &world.registry, &[("NOMAD_BUILD_NAMESPACES", namespace.0.as_str())]);
    let repository = world.repository("RUN exit 3");
    let (_, status) = Api::new(&replica.url).run(&world.job(&repository)).await;
    assert_eq!((&status["status"], &status["failure"]["phase"]), (&json!("FAILED"), &json!("build")));
    assert!(status["phase_timestamps"]["build_start"].is_string(), "{status:#}");
}
