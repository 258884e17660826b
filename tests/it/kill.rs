//! Kill: up to the claim it ends a job and nothing is tagged; behind the claim it says no.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use reqwest::Method;
use serde_json::{Value, json};

use crate::support::{
    Api, At, Front, Instead, Service, Sleeper, TIMES, containers_of, engine_is_rid_of, eventually,
    nomad_front, unique_seconds, world,
};

/// Kills a job, and sees to all that a kill promises.
async fn kill_and_see_to_it(id: &str, job: &Value) -> Value {
    let (world, api) = (world(), world().api());
    assert_eq!(api.post(&format!("/jobs/{id}/kill")).await, json!({"success": true}));
    // The answer is the truth at once, and stays so.
    let status = api.status(id).await;
    assert_eq!(status["status"], "KILLED", "{status:#}");
    assert_eq!(status["failure"]["reason"], "killed");
    assert_eq!(api.post(&format!("/jobs/{id}/kill")).await, json!({"success": true}));
    engine_is_rid_of(id).await;
    let status = api
        .wait_until(id, "every phase that began has ended", |status| {
            let times = &status["phase_timestamps"];
            ["build", "test", "publish"].iter().all(|phase| {
                times[format!("{phase}_start")].is_null() == times[format!("{phase}_end")].is_null()
            })
        })
        .await;
    assert_eq!(status["status"], "KILLED");
    assert!(status["image"]["digest"].is_null(), "{status:#}");
    assert_eq!(status["image"]["references"][0]["published"], "no");
    times_never_go_back(&status);
    is_over_in_nomad(id).await;
    assert_eq!(world.tags(job).await, [] as [&str; 0]);
    status
}

fn times_never_go_back(status: &Value) {
    let times: Vec<_> = TIMES.iter().filter_map(|name| status["phase_timestamps"][name].as_str()).collect();
    assert!(times.is_sorted(), "{status:#}");
    assert!(status["phase_timestamps"]["job_start"].is_string(), "{status:#}");
    assert!(status["phase_timestamps"]["job_end"].is_string(), "{status:#}");
}

/// Waits until Nomad runs nothing of a job.
async fn is_over_in_nomad(id: &str) {
    eventually("Nomad is done with the job", async || {
        let allocations = world().nomad(&format!("/v1/job/{id}/allocations")).await?;
        let over = |allocation: &Value| {
            let tasks = allocation["TaskStates"].as_object().cloned().unwrap_or_default();
            tasks.values().all(|task| task["State"] == "dead")
                && matches!(allocation["ClientStatus"].as_str(), Some("complete" | "failed"))
        };
        allocations.as_array()?.iter().all(over).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_job_that_no_node_can_take_says_why_in_words_and_can_be_killed() {
    let (world, api) = (world(), world().api());
    let repository = world.repository("");
    let mut job = world.job(&repository);
    job["resources"] = json!({"build": {"memory_mb": 131_072}});
    let id = api.submit(&job).await;
    // While other tests' jobs have all of the node's cpu, that is what Nomad names in place of its memory.
    let why = "no node can take it: of 1 node looked at, 1 node without enough ";
    let says = |status: &Value| status["placement"].as_str().is_some_and(|words| words.starts_with(why));
    let status = api.wait_until(&id, "the reason why it waits", says).await;
    assert_eq!(status["status"], "PENDING");
    let status = kill_and_see_to_it(&id, &job).await;
    assert!(status["failure"]["phase"].is_null(), "{status:#}");
    assert!(status["phase_timestamps"]["build_start"].is_null());
    assert!(status["placement"].is_null());
}

#[tokio::test]
async fn a_job_killed_while_it_builds_stops_building_and_is_never_published() {
    let (sleeper, api) = (Sleeper::in_phase("build"), world().api());
    let id = sleeper.submit(&api).await;
    api.wait_until(&id, "BUILDING", |status| status["status"] == "BUILDING").await;
    let status = kill_and_see_to_it(&id, &sleeper.job).await;
    assert_eq!(status["failure"]["phase"], "build");
    assert!(status["phase_timestamps"]["test_start"].is_null());
    sleeper.is_stopped().await;
}

#[tokio::test]
async fn a_job_killed_while_it_tests_stops_its_container_and_is_never_published() {
    let (sleeper, api) = (Sleeper::in_phase("test"), world().api());
    let id = sleeper.submit(&api).await;
    api.wait_until(&id, "TESTING", |status| status["status"] == "TESTING").await;
    assert_eq!(containers_of(&id).len(), 1);
    let status = kill_and_see_to_it(&id, &sleeper.job).await;
    assert_eq!(status["failure"]["phase"], "test");
    assert!(status["phase_timestamps"]["publish_start"].is_null());
    assert!(!sleeper.sleeps());
}

/// Kills a job whose publish cannot get past a request.
async fn killed_at(at: At) {
    let (world, api) = (world(), world().api());
    let front = Front::holding(&world.registry, at).await;
    // A layer of its own, which no registry has yet.
    let repository = world.repository(&format!("RUN echo {} > /own", unique_seconds()));
    let mut job = world.job_by(&front, &repository);
    job["test_commands"] = json!(["true"]);
    let id = api.submit(&job).await;
    front.holds().await;
    api.wait_until(&id, "PUBLISHING", |status| status["status"] == "PUBLISHING").await;
    let status = kill_and_see_to_it(&id, &job).await;
    assert_eq!(status["failure"]["phase"], "publish");
    // What was on its way arrives late, and changes nothing.
    front.let_go();
    assert_eq!(api.post(&format!("/jobs/{id}/kill")).await, json!({"success": true}));
    assert_eq!(world.tags(&job).await, [] as [&str; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_killed_between_test_and_push_is_never_published() {
    killed_at(At::Everything).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_killed_while_it_pushes_layers_is_never_published() {
    killed_at(At::Upload).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_killed_between_push_and_claim_is_never_published() {
    killed_at(At::Digest).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_has_claimed_the_right_to_publish_is_not_killed_and_ends_as_it_would_have() {
    let (world, api) = (world(), world().api());
    let front = Front::holding(&world.registry, At::Tag).await;
    let repository = world.repository("");
    let job = world.job_by(&front, &repository);
    let id = api.submit(&job).await;
    front.holds().await;
    let answer = api.post(&format!("/jobs/{id}/kill")).await;
    assert_eq!(answer["success"], false);
    assert!(answer["reason"].as_str().unwrap().contains("claimed the right to publish"), "{answer}");
    front.let_go();
    let status = api.wait_for_end(&id).await;
    assert_eq!(status["status"], "SUCCEEDED", "{status:#}");
    assert_eq!(status["image"]["references"][0]["published"], "yes");
    assert_eq!(world.tags(&job).await, ["one"]);
    let served = world.served(crate::support::image_of(&job), "one").await;
    assert_eq!(served.as_deref(), status["image"]["digest"].as_str());
    engine_is_rid_of(&id).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_that_races_with_the_claim_is_answered_as_the_job_ends() {
    let (world, api) = (world(), world().api());
    for _ in 0..4 {
        let front = Front::holding(&world.registry, At::Digest).await;
        let repository = world.repository("");
        let job = world.job_by(&front, &repository);
        let id = api.submit(&job).await;
        front.holds().await;
        front.let_go();
        let answer = api.post(&format!("/jobs/{id}/kill")).await;
        let status = api.wait_for_end(&id).await;
        is_over_in_nomad(&id).await;
        let killed = answer["success"] == true;
        assert_eq!(status["status"], if killed { "KILLED" } else { "SUCCEEDED" }, "{answer} {status:#}");
        assert_eq!(world.tags(&job).await.is_empty(), killed, "{answer} {status:#}");
        assert_eq!(api.status(&id).await["status"], status["status"]);
    }
}

#[tokio::test]
async fn a_job_that_has_ended_otherwise_is_not_killed() {
    let (world, api) = (world(), world().api());
    for (lines, end) in [("", "SUCCEEDED"), ("RUN exit 1", "FAILED")] {
        let repository = world.repository(lines);
        let (id, status) = api.run(&world.job(&repository)).await;
        assert_eq!(status["status"], end, "{status:#}");
        let answer = api.post(&format!("/jobs/{id}/kill")).await;
        assert_eq!(answer, json!({"success": false, "reason": format!("the job has ended: {end}")}));
        assert_eq!(api.status(&id).await["status"], end);
    }
}

#[tokio::test]
async fn a_job_that_nobody_submitted_is_not_found() {
    let path = format!("/jobs/nb-{}/kill", uuid::Uuid::now_v7());
    for path in [path.as_str(), "/jobs/other/kill"] {
        let (status, body) = world().api().call(reqwest::Method::POST, path, None).await;
        assert_eq!((status.as_u16(), &body["error"]["code"]), (404, &json!("job_not_found")), "{body}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_that_cannot_stop_the_tasks_says_what_stands_and_can_be_repeated() {
    let world = world();
    let stops = |method: &Method, _: &str| (method == Method::DELETE).then_some(Instead::Refusal);
    let nomad = nomad_front(&world.nomad, stops).await;
    let service = Service::start(&nomad, &world.registry, &[]);
    let api = Api::new(&service.url);
    let sleeper = Sleeper::in_phase("test");
    let id = sleeper.submit(&api).await;
    let (status, body) = api.call(Method::POST, &format!("/jobs/{id}/kill"), None).await;
    assert_eq!(status.as_u16(), 500, "{body}");
    let message = body["error"]["message"].as_str().unwrap();
    assert!(message.contains("is killed and will publish nothing"), "{message}");
    assert!(message.contains("stopping job"), "{message}");
    assert_eq!(api.status(&id).await["status"], "KILLED");
    // By a service that reaches Nomad.
    kill_and_see_to_it(&id, &sleeper.job).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_another_replica_cleaned_up_meanwhile_is_not_killed_and_leaves_nothing_behind() {
    let world = world();
    // A replica that hears of nothing after its start, which takes as many lists as there are pages.
    let has_started = Arc::new(AtomicBool::new(false));
    let started = Arc::clone(&has_started);
    let nomad = nomad_front(&world.nomad, move |method, path| {
        let is_list = method == Method::GET && matches!(path, "/v1/vars" | "/v1/jobs");
        let is_late = is_list && started.load(Ordering::Relaxed);
        (is_late || path == "/v1/event/stream").then_some(Instead::Silence)
    });
    let service = Service::start(&nomad.await, &world.registry, &[]);
    has_started.store(true, Ordering::Relaxed);
    let (deaf, api) = (Api::new(&service.url), world.api());
    let repository = world.repository("");
    let id = deaf.submit(&world.job(&repository)).await;
    assert_eq!(api.wait_for_end(&id).await["status"], "SUCCEEDED");
    assert_eq!(api.post(&format!("/jobs/{id}/cleanup")).await, json!({"success": true}));
    let (status, body) = deaf.call(Method::POST, &format!("/jobs/{id}/kill"), None).await;
    assert_eq!((status.as_u16(), &body["error"]["code"]), (404, &json!("job_not_found")), "{body}");
    assert!(world.nomad(&format!("/v1/var/nomad-build/claims/{id}")).await.is_none());
}
