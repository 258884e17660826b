//! Cleanup: what an ended job left in Nomad and in its node's engine goes, and nothing else.

use std::path::Path;

use reqwest::Method;
use serde_json::{Value, json};
use tokio::sync::watch;

use crate::support::{
    Api, Fault, Faults, Service, Sleeper, containers_of, end_at_once, engine_is_rid_of, environment_of,
    eventually, images_of, leave_behind, runner_of, unique_seconds, world,
};

async fn clean_up_by(api: &Api, id: &str) -> (u16, Value) {
    let (status, body) = api.call(Method::POST, &format!("/jobs/{id}/cleanup"), None).await;
    (status.as_u16(), body)
}

async fn clean_up(id: &str) -> (u16, Value) {
    clean_up_by(&world().api(), id).await
}

async fn is_cleaned_up(id: &str) {
    is_cleaned_up_by(&world().api(), id).await;
}

/// A node that is busy may take longer than a cleanup waits; the next one then waits for the same sweep.
async fn is_cleaned_up_by(api: &Api, id: &str) {
    eventually("a cleanup", async || {
        let (status, body) = clean_up_by(api, id).await;
        let is_busy = body["error"]["message"].as_str().is_some_and(|why| why.contains(": its task is "));
        assert!(status == 200 || is_busy, "{body}");
        (body["data"] == json!({"success": true})).then_some(())
    })
    .await;
}

/// Waits until the job's own tasks are done: what they would remove, they have removed.
async fn finish_has_ended(id: &str) {
    eventually("finish has ended", async || {
        let allocations = world().nomad(&format!("/v1/job/{id}/allocations")).await?;
        (allocations[0]["TaskStates"]["finish"]["State"] == "dead").then_some(())
    })
    .await;
}

/// A service that is configured otherwise than the world's.
fn service(variables: &[(&str, &str)]) -> Service {
    Service::start(&world().nomad, &world().registry, variables)
}

/// The Variables of a job: its ledger, and credentials.
async fn variables_of(id: &str) -> Vec<String> {
    let mut paths = Vec::new();
    for prefix in ["nomad-build/", "nomad/jobs/"] {
        let listed = world().nomad(&format!("/v1/vars?prefix={prefix}")).await.unwrap();
        let listed =
            listed.as_array().unwrap().iter().map(|variable| variable["Path"].as_str().unwrap().to_owned());
        paths.extend(listed.filter(|path| path.contains(id)));
    }
    paths
}

#[tokio::test]
async fn a_live_job_is_not_cleaned_up() {
    let (sleeper, api) = (Sleeper::in_phase("test"), world().api());
    let id = sleeper.submit(&api).await;
    let (status, body) = clean_up(&id).await;
    assert_eq!((status, &body["error"]["code"]), (409, &json!("job_live")), "{body}");
    // Nothing of it was touched.
    assert_eq!(containers_of(&id).len(), 1);
    api.wait_until(&id, "testing", |status| status["status"] == "TESTING").await;
    api.post(&format!("/jobs/{id}/kill")).await;
    is_cleaned_up(&id).await;
    engine_is_rid_of(&id).await;
}

#[tokio::test]
async fn an_ended_job_is_cleaned_up_and_what_it_published_stays() {
    let (world, api) = (world(), world().api());
    let repository = world.repository("");
    let job = world.job(&repository);
    let (id, status) = api.run(&job).await;
    assert_eq!(status["status"], "SUCCEEDED", "{status:#}");
    assert!(!variables_of(&id).await.is_empty());
    is_cleaned_up(&id).await;
    assert!(world.nomad(&format!("/v1/job/{id}")).await.is_none());
    assert_eq!(variables_of(&id).await, [] as [&str; 0]);
    let (gone, body) = api.call(Method::GET, &format!("/jobs/{id}/status"), None).await;
    assert_eq!((gone.as_u16(), &body["error"]["code"]), (404, &json!("job_not_found")), "{body}");
    // Again is harmless.
    is_cleaned_up(&id).await;
    assert_eq!(world.tags(&job).await, ["one"]);
    let served = world.served(crate::support::image_of(&job), "one").await;
    assert_eq!(served.as_deref(), status["image"]["digest"].as_str());
}

#[tokio::test]
async fn a_failed_job_whose_tasks_could_not_clean_up_is_cleaned_up_and_nobody_else_is() {
    let (world, api) = (world(), world().api());
    let repository = world.repository("RUN exit 1");
    let (id, status) = api.run(&world.job(&repository)).await;
    assert_eq!(status["status"], "FAILED", "{status:#}");
    let (other, _) = api.run(&world.job(&repository)).await;
    // Only once their own tasks are done: it is not those that are to clean up here.
    for id in [&id, &other] {
        finish_has_ended(id).await;
        leave_behind(id);
    }
    is_cleaned_up(&id).await;
    assert_eq!((containers_of(&id).len(), images_of(&id).len()), (0, 0));
    assert_eq!((containers_of(&other).len(), images_of(&other).len()), (1, 1));
    is_cleaned_up(&other).await;
    assert_eq!((containers_of(&other).len(), images_of(&other).len()), (0, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cleanup_that_was_cut_in_the_middle_changes_nothing_of_how_the_job_ended() {
    let world = world();
    let faults = Faults::before(&world.nomad).await;
    let service = Service::start(&faults.url, &world.registry, &[]);
    let api = Api::new(&service.url);
    let repository = world.repository("");
    let (id, status) = api.run(&world.job(&repository)).await;
    assert_eq!(status["status"], "SUCCEEDED", "{status:#}");
    faults.harm(|line| line.starts_with("DELETE /v1/var/nomad-build/claims/").then_some(Fault::CutBefore));
    assert_eq!(clean_up_by(&api, &id).await.0, 503);
    // It knows the claim, and that Nomad is done with the job.
    let fresh = Service::start(&world.nomad, &world.registry, &[]);
    let fresh = Api::new(&fresh.url);
    eventually("what is half removed is not told", async || {
        let (status, body) = fresh.call(Method::GET, &format!("/jobs/{id}/status"), None).await;
        assert_ne!(body["data"]["status"], "FAILED", "{body:#}");
        (status == 404).then_some(())
    })
    .await;
    is_cleaned_up_by(&fresh, &id).await;
    assert_eq!(variables_of(&id).await, [] as [&str; 0]);
}

#[tokio::test]
async fn a_job_that_nobody_submitted_is_not_cleaned_up() {
    for id in [format!("nb-{}", uuid::Uuid::now_v7()), "other".to_owned()] {
        let (status, body) = clean_up(&id).await;
        assert_eq!((status, &body["error"]["code"]), (404, &json!("job_not_found")), "{body}");
    }
}

#[tokio::test]
async fn a_cleanup_after_one_whose_sweep_failed_is_judged_by_its_own_sweep() {
    let (world, api) = (world(), world().api());
    let repository = world.repository("RUN exit 1");
    let (id, _) = api.run(&world.job(&repository)).await;
    finish_has_ended(&id).await;
    leave_behind(&id);
    let broken = service(&[("NOMAD_BUILD_RUNNER", "/bin/false")]);
    for _ in 0..2 {
        let (status, body) = clean_up_by(&Api::new(&broken.url), &id).await;
        assert_eq!((status, &body["error"]["code"]), (503, &json!("nomad_unavailable")), "{body}");
        assert!(body["error"]["message"].as_str().unwrap().contains("the sweep failed there"), "{body}");
    }
    is_cleaned_up(&id).await;
    assert_eq!((containers_of(&id).len(), images_of(&id).len()), (0, 0));
}

#[tokio::test]
async fn a_cleanup_that_the_node_does_not_answer_takes_the_credentials_and_leaves_the_claim_for_a_later_one()
{
    let (world, api) = (world(), world().api());
    let repository = world.repository("RUN exit 1");
    let (id, _) = api.run(&world.job(&repository)).await;
    finish_has_ended(&id).await;
    leave_behind(&id);
    let copy = format!("nomad/jobs/{id}/job/build");
    let (put, said) = world.nomad_program(&["var", "put", "-force", &copy, "git_username=ci"]);
    assert!(put, "{said}");
    // Its sweeps are placed nowhere, as those of a node that is gone.
    let elsewhere = service(&[("NOMAD_BUILD_DATACENTERS", "nowhere")]);
    let (status, body) = clean_up_by(&Api::new(&elsewhere.url), &id).await;
    assert_eq!((status, &body["error"]["code"]), (503, &json!("nomad_unavailable")), "{body}");
    let mut left = variables_of(&id).await;
    left.sort();
    assert_eq!(left, [format!("nomad-build/claims/{id}"), format!("nomad-build/outcomes/{id}")]);
    // Nomad forgets the job, and a replica that never knew it goes on: a sweep that was begun is no cleanup.
    let (purged, said) = world.nomad_program(&["job", "stop", "-purge", "-detach", &id]);
    assert!(purged, "{said}");
    let fresh = service(&[]);
    is_cleaned_up_by(&Api::new(&fresh.url), &id).await;
    assert_eq!(variables_of(&id).await, [] as [&str; 0]);
    assert_eq!((containers_of(&id).len(), images_of(&id).len()), (0, 0));
}

#[tokio::test]
async fn a_cleanup_waits_for_a_sweep_that_still_runs_and_does_not_begin_it_anew() {
    let (world, api) = (world(), world().api());
    let repository = world.repository("RUN exit 1");
    let (id, _) = api.run(&world.job(&repository)).await;
    finish_has_ended(&id).await;
    leave_behind(&id);
    // A runner that a busy node starts late.
    let folder = tempfile::tempdir().unwrap();
    let (runner, start) = (folder.path().join("runner"), folder.path().join("start"));
    let program = env!("CARGO_BIN_EXE_nomad-build");
    let script =
        format!("#!/bin/sh\nwhile [ ! -e {} ]; do sleep 0.1; done\nexec {program} \"$@\"\n", start.display());
    std::fs::write(&runner, script).unwrap();
    std::fs::set_permissions(&runner, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let slow = service(&[("NOMAD_BUILD_RUNNER", runner.to_str().unwrap())]);
    let (status, body) = clean_up_by(&Api::new(&slow.url), &id).await;
    assert_eq!((status, &body["error"]["code"]), (503, &json!("nomad_unavailable")), "{body}");
    assert!(body["error"]["message"].as_str().unwrap().contains(": its task is running"), "{body}");
    std::fs::write(&start, "").unwrap();
    is_cleaned_up(&id).await;
    assert_eq!((containers_of(&id).len(), images_of(&id).len()), (0, 0));
    let sweeps = format!("/v1/job/nomad-build-sweep-{id}/allocations?all=true");
    let sweeps = world.nomad(&sweeps).await.unwrap();
    assert_eq!(sweeps.as_array().unwrap().len(), 1, "{sweeps:#}");
}

/// A template whose finish task waits for a file; the file comes once it is let go.
async fn template_whose_finish_waits() -> (tempfile::NamedTempFile, watch::Sender<bool>) {
    let (open, opened) = watch::channel(false);
    let router = axum::Router::new().fallback(async move || {
        opened.clone().wait_for(|open| *open).await.unwrap();
    });
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let file = format!("http://{}/file", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, router).await });
    (template_whose_finish_downloads(&file), open)
}

/// A template whose finish task begins once it has a file.
fn template_whose_finish_downloads(file: &str) -> tempfile::NamedTempFile {
    let artifacts = json!([{"GetterSource": file, "GetterMode": "file", "RelativeDest": "local/file"}]);
    let lines = format!("{{%- if task.name == \"finish\" %}}\n\"Artifacts\": {artifacts},\n{{%- endif %}}\n");
    let shipped = include_str!("../../templates/raw_exec.json");
    let template = shipped.replace("        \"Env\":", &format!("{lines}        \"Env\":"));
    let path = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(path.path(), template).unwrap();
    path
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_whose_finish_task_has_yet_to_run_is_not_cleaned_up() {
    let world = world();
    let (template, open) = template_whose_finish_waits().await;
    let service = service(&[("NOMAD_BUILD_TEMPLATE", template.path().to_str().unwrap())]);
    let api = Api::new(&service.url);
    let repository = world.repository("RUN exit 1");
    let (id, status) = api.run(&world.job(&repository)).await;
    assert_eq!(status["status"], "FAILED", "{status:#}");
    eventually("Nomad calls the allocation failed", async || {
        let allocations = world.nomad(&format!("/v1/job/{id}/allocations")).await?;
        (allocations[0]["ClientStatus"] == "failed").then_some(())
    })
    .await;
    let (status, body) = clean_up_by(&api, &id).await;
    assert_eq!((status, &body["error"]["code"]), (409, &json!("job_live")), "{body}");
    assert!(world.nomad(&format!("/v1/job/{id}")).await.is_some());
    open.send_replace(true);
    is_cleaned_up_by(&api, &id).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_runner_left_that_was_killed_goes_though_its_finish_task_could_not_run() {
    let world = world();
    // Nobody listens there.
    let template = template_whose_finish_downloads("http://127.0.0.1:9/file");
    let service = service(&[("NOMAD_BUILD_TEMPLATE", template.path().to_str().unwrap())]);
    let api = Api::new(&service.url);
    for (phase, status) in [("build", "BUILDING"), ("test", "TESTING")] {
        let wait = format!("sleep {}", unique_seconds());
        let repository =
            world.repository(&if phase == "build" { format!("RUN {wait}") } else { String::new() });
        let mut job = world.job(&repository);
        job["test_commands"] = json!([wait]);
        let id = api.submit(&job).await;
        let is_there = |shared: &str| match phase {
            "build" => Path::new(shared).join("checkout/Dockerfile").exists(),
            _ => containers_of(&id).len() == 1 && images_of(&id).len() == 1,
        };
        api.wait_until(&id, "the phase runs", |told| told["status"] == status).await;
        let (runner, shared) = eventually("there is something to leave", async || {
            let runner = runner_of(&id, phase)?;
            let shared = environment_of(runner, "NOMAD_ALLOC_DIR")?;
            is_there(&shared).then_some((runner, shared))
        })
        .await;
        end_at_once(runner);
        let ended = api.wait_for_end(&id).await;
        assert_eq!(ended["failure"]["reason"], "runner_died", "{ended:#}");
        finish_has_ended(&id).await;
        assert!(is_there(&shared), "{phase}: nothing was left");
        is_cleaned_up_by(&api, &id).await;
        engine_is_rid_of(&id).await;
        eventually("the checkout is gone", async || (!Path::new(&shared).exists()).then_some(())).await;
    }
}
