//! Failures: each ends the job FAILED with its phase and reason, and nothing is tagged.

use axum::http::StatusCode;
use reqwest::Method;
use serde_json::{Value, json};

use crate::registry::server::Server;
use crate::support::{
    Api, At, EngineFront, Front, Repository, Service, Sleeper, containers_of, crash, engine_is_rid_of,
    eventually, hang, processes_with, runner_of, unique_seconds, world,
};

/// Runs a job that must fail, and sees to all that a failure promises; returns its ID and status.
async fn fails(job: &Value, phase: &str, reason: &str) -> (String, Value) {
    let (id, status) = world().api().run(job).await;
    failed(&id, job, phase, reason, &status).await;
    (id, status)
}

async fn failed(id: &str, job: &Value, phase: &str, reason: &str, status: &Value) {
    let failure = &status["failure"];
    assert_eq!(status["status"], "FAILED", "{status:#}");
    assert_eq!((&failure["phase"], &failure["reason"]), (&json!(phase), &json!(reason)), "{status:#}");
    assert!(!failure["message"].as_str().unwrap().is_empty());
    assert!(status["phase_timestamps"]["job_end"].is_string(), "{status:#}");
    assert!(status["image"]["digest"].is_null(), "{status:#}");
    for reference in status["image"]["references"].as_array().unwrap() {
        assert_eq!(reference["published"], "no", "{status:#}");
    }
    assert_eq!(world().tags(job).await, [] as [&str; 0]);
    engine_is_rid_of(id).await;
}

fn never_began(status: &Value, phase: &str) {
    for end in ["start", "end"] {
        assert!(status["phase_timestamps"][format!("{phase}_{end}")].is_null(), "{status:#}");
    }
}

#[tokio::test]
async fn a_failed_build_is_never_tested_nor_published() {
    let repository = world().repository("RUN exit 3");
    let mut job = world().job(&repository);
    job["image_tags"] = json!(["one", "two"]);
    job["test_commands"] = json!(["true"]);
    let (_, status) = fails(&job, "build", "build_failed").await;
    assert_eq!(status["failure"]["exit_code"], 3);
    assert_eq!(status["git"]["commit"], repository.git(&["rev-parse", "HEAD"]));
    never_began(&status, "test");
    never_began(&status, "publish");
}

#[tokio::test]
async fn a_failed_test_command_ends_the_tests_and_is_never_published() {
    let repository = world().repository("");
    let mut job = world().job(&repository);
    let seconds = unique_seconds();
    job["image_tags"] = json!(["one", "two"]);
    // Were the third test run, the job would not end before its timeout.
    job["test_commands"] = json!(["true", "exit 7", format!("sleep {seconds}")]);
    let (_, status) = fails(&job, "test", "test_failed").await;
    assert_eq!(status["failure"]["exit_code"], 7);
    assert!(status["failure"]["message"].as_str().unwrap().contains("test 2 of 3"), "{status:#}");
    assert!(processes_with(&seconds).is_empty());
    never_began(&status, "publish");
}

#[tokio::test]
async fn a_failed_entry_point_is_never_published() {
    let repository = world().repository("ENTRYPOINT [\"/bin/sh\", \"-c\", \"exit 5\"]");
    let mut job = world().job(&repository);
    job["test_commands"] = json!(["true"]);
    job["test_entry_point"] = json!(true);
    let (_, status) = fails(&job, "test", "test_failed").await;
    assert_eq!(status["failure"]["exit_code"], 5);
    never_began(&status, "publish");
}

#[tokio::test]
async fn a_push_to_a_registry_where_nothing_listens_fails_in_time() {
    let repository = world().repository("");
    let mut job = world().job(&repository);
    // Nobody gets port 1 by asking for a free one.
    let nobody = "127.0.0.1:1";
    job["registry_url"] = json!(nobody);
    job["timeouts"] = json!({"publish": "PT5M"});
    let (_, status) = fails(&job, "publish", "push_failed").await;
    assert!(status["failure"]["message"].as_str().unwrap().contains(nobody), "{status:#}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_push_to_a_registry_that_takes_nothing_fails() {
    for (at, answer, reason) in [
        (At::Upload, StatusCode::METHOD_NOT_ALLOWED, "push_failed"),
        (At::Digest, StatusCode::BAD_REQUEST, "push_failed"),
        (At::Upload, StatusCode::FORBIDDEN, "unauthorized"),
        // One that is full.
        (At::Upload, StatusCode::INSUFFICIENT_STORAGE, "push_failed"),
        (At::Digest, StatusCode::INSUFFICIENT_STORAGE, "push_failed"),
    ] {
        let repository = world().repository(&format!("RUN echo {} > /own", unique_seconds()));
        let mut job = world().job(&repository);
        job["registry_url"] = json!(Front::refusing(&world().registry, at, answer).await);
        fails(&job, "publish", reason).await;
    }
}

#[tokio::test]
async fn a_push_without_the_password_that_the_registry_asks_for_is_unauthorized() {
    let server = Server::start(Some(("ci", "relay-test"))).await;
    let repository = world().repository("");
    let mut job = world().job(&repository);
    job["registry_url"] = json!(server.host());
    let (_, status) = fails(&job, "publish", "unauthorized").await;
    assert!(status["phase_timestamps"]["publish_start"].is_string(), "{status:#}");
}

/// A repository that has been tampered with, or is not there.
#[tokio::test]
async fn what_is_missing_is_told_as_missing() {
    let outside = tempfile::tempdir().unwrap();
    std::fs::write(outside.path().join("Dockerfile"), "FROM scratch\n").unwrap();
    let linked = Repository::new();
    std::os::unix::fs::symlink(outside.path().join("Dockerfile"), linked.path().join("Dockerfile")).unwrap();
    let linked = linked.file("other", "").commit();
    let empty = Repository::new().file("other", "").commit();
    let whole = world().repository("");
    let gone = format!("file://{}", outside.path().join("nothing").display());
    for (repository, field, value, reason, says) in [
        (&empty, "owner", json!("it"), "input_missing", "Dockerfile"),
        (&linked, "owner", json!("it"), "input_missing", "leads out of the repository"),
        (&whole, "dockerfile_path", json!("none/Dockerfile"), "input_missing", "none/Dockerfile"),
        (&whole, "context_path", json!("none"), "input_missing", "context_path"),
        (&whole, "git_ref", json!("none"), "ref_not_found", "none"),
        (&whole, "git_ref", json!("0123456789012345678901234567890123456789"), "ref_not_found", "0123"),
        (&whole, "repo_url", json!(gone), "checkout_failed", ""),
    ] {
        let mut job = world().job(repository);
        job[field] = value;
        let (_, status) = fails(&job, "build", reason).await;
        assert!(status["failure"]["message"].as_str().unwrap().contains(says), "{status:#}");
        never_began(&status, "publish");
    }
}

#[tokio::test]
async fn a_build_beyond_its_timeout_is_stopped_in_the_engine_too() {
    let mut sleeper = Sleeper::in_phase("build");
    // Long enough for the step to begin on a busy machine.
    sleeper.job["timeouts"] = json!({"build": "PT6S"});
    let id = sleeper.submit(&world().api()).await;
    let status = world().api().wait_for_end(&id).await;
    failed(&id, &sleeper.job, "build", "timeout", &status).await;
    sleeper.is_stopped().await;
}

/// Submits a job by a service whose nodes have their engine at `socket`; its ID, its last status and its build's log.
async fn build_with_engine_at(socket: &std::path::Path, job: &Value) -> (String, Value, String) {
    let variables = [("NOMAD_BUILD_ENGINE_SOCKET", socket.to_str().unwrap())];
    let service = Service::start(&world().nomad, &world().registry, &variables);
    let api = Api::new(&service.url);
    let (id, status) = api.run(job).await;
    let log = eventually("the whole log", async || {
        let log = api.logs(&id).await["build"].as_str().unwrap().to_owned();
        log.contains("build failed").then_some(log)
    })
    .await;
    (id, status, log)
}

#[tokio::test]
async fn a_node_without_an_engine_fails_the_job_and_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("none.sock");
    let repository = world().repository("");
    let job = world().job(&repository);
    let (id, status, log) = build_with_engine_at(&socket, &job).await;
    failed(&id, &job, "build", "engine_unavailable", &status).await;
    assert!(log.contains("build failed (engine_unavailable)"), "{log}");
    assert!(log.contains(socket.to_str().unwrap()), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_phase_whose_engine_goes_away_fails_and_says_so() {
    let engine = EngineFront::start();
    let variables = [("NOMAD_BUILD_ENGINE_SOCKET", engine.socket())];
    let service = Service::start(&world().nomad, &world().registry, &variables);
    let api = Api::new(&service.url);
    let registry = Front::holding(&world().registry, At::Upload).await;
    for phase in ["build", "test", "publish"] {
        let sleeper = Sleeper::in_phase(phase);
        let repository = world().repository(&format!("RUN echo {} > /own", unique_seconds()));
        let (id, job) = if phase == "publish" {
            let job = world().job_by(&registry, &repository);
            let id = api.submit(&job).await;
            registry.holds().await;
            (id, job)
        } else {
            (sleeper.submit(&api).await, sleeper.job.clone())
        };
        engine.stop();
        registry.let_go();
        let status = api.wait_for_end(&id).await;
        assert_eq!(status["status"], "FAILED", "{status:#}");
        let failure = &status["failure"];
        assert_eq!(
            (&failure["phase"], &failure["reason"]),
            (&json!(phase), &json!("engine_unavailable")),
            "{status:#}"
        );
        assert!(failure["message"].as_str().unwrap().contains(engine.socket()), "{status:#}");
        assert_eq!(world().tags(&job).await, [] as [&str; 0]);
        engine.start_again();
        // Without its engine the job could remove nothing itself.
        eventually("a cleanup of what the job left", async || {
            let (status, _) = api.call(Method::POST, &format!("/jobs/{id}/cleanup"), None).await;
            status.is_success().then_some(())
        })
        .await;
        engine_is_rid_of(&id).await;
        sleeper.is_stopped().await;
    }
}

#[tokio::test]
async fn a_phase_ends_by_its_timeout_though_the_engine_never_answers() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("silent.sock");
    // Connections are made, and nobody reads them.
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let repository = world().repository("");
    let mut job = world().job(&repository);
    job["timeouts"] = json!({"build": "PT2S"});
    let (id, status, log) = build_with_engine_at(&socket, &job).await;
    failed(&id, &job, "build", "timeout", &status).await;
    assert!(log.contains("containers may be left behind"), "{log}");
}

#[tokio::test]
async fn what_a_build_asked_before_its_timeout_is_in_its_log() {
    let repository = world().repository("RUN printf 'Overwrite it? [y/N] '; sleep 3600");
    let mut job = world().job(&repository);
    job["timeouts"] = json!({"build": "PT8S"});
    let (id, _) = fails(&job, "build", "timeout").await;
    let log = world().api().logs(&id).await;
    assert!(log["build"].as_str().unwrap().contains(" Overwrite it? [y/N]"), "{log:#}");
}

#[tokio::test]
async fn a_test_beyond_its_timeout_is_stopped_with_its_container() {
    let mut sleeper = Sleeper::in_phase("test");
    sleeper.job["timeouts"] = json!({"test": "PT4S"});
    let id = sleeper.submit(&world().api()).await;
    let status = world().api().wait_for_end(&id).await;
    // Before anybody is told, the container is gone.
    assert_eq!(containers_of(&id), [] as [&str; 0]);
    assert!(!sleeper.sleeps());
    failed(&id, &sleeper.job, "test", "timeout", &status).await;
    never_began(&status, "publish");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_publish_beyond_its_timeout_tags_nothing() {
    let front = Front::holding(&world().registry, At::Digest).await;
    let repository = world().repository("");
    let mut job = world().job_by(&front, &repository);
    job["timeouts"] = json!({"publish": "PT2S"});
    fails(&job, "publish", "timeout").await;
    front.let_go();
    assert_eq!(world().tags(&job).await, [] as [&str; 0]);
}

#[tokio::test]
async fn a_job_whose_runner_died_fails() {
    for phase in ["build", "test"] {
        let sleeper = Sleeper::in_phase(phase);
        let id = sleeper.submit(&world().api()).await;
        crash(&id, phase);
        let status = world().api().wait_for_end(&id).await;
        failed(&id, &sleeper.job, phase, "runner_died", &status).await;
        sleeper.is_stopped().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_publish_that_dies_before_its_claim_fails_and_tags_nothing() {
    let front = Front::holding(&world().registry, At::Digest).await;
    let repository = world().repository("");
    let job = world().job_by(&front, &repository);
    let id = world().api().submit(&job).await;
    front.holds().await;
    crash(&id, "publish");
    front.let_go();
    let status = world().api().wait_for_end(&id).await;
    failed(&id, &job, "publish", "runner_died", &status).await;
}

#[tokio::test]
async fn a_phase_whose_runner_hangs_fails_by_its_timeout_and_leaves_nothing() {
    let api = world().api();
    let hanging = ["build", "test"].map(async |phase| {
        let mut sleeper = Sleeper::in_phase(phase);
        sleeper.job["timeouts"] = json!({phase: "PT20S"});
        let id = sleeper.submit(&api).await;
        hang(&id, phase);
        let status = api.wait_for_late_end(&id).await;
        failed(&id, &sleeper.job, phase, "timeout", &status).await;
        assert!(status["failure"]["message"].as_str().unwrap().contains("hangs"), "{status:#}");
        sleeper.is_stopped().await;
        engine_is_rid_of(&id).await;
    });
    futures_util::future::join_all(hanging).await;
}

#[tokio::test]
async fn a_job_whose_task_cannot_be_started_fails_and_says_why() {
    let world = world();
    let runner = [("NOMAD_BUILD_RUNNER", "/nowhere/nomad-build")];
    let service = Service::start(&world.nomad, &world.registry, &runner);
    let repository = world.repository("");
    let job = world.job(&repository);
    let (id, status) = Api::new(&service.url).run(&job).await;
    failed(&id, &job, "build", "setup_failed", &status).await;
    assert!(status["failure"]["message"].as_str().unwrap().contains("/nowhere/nomad-build"), "{status:#}");
    never_began(&status, "build");
}

#[tokio::test]
async fn a_job_whose_publish_cannot_be_started_fails_by_that_and_not_by_the_test_that_runs() {
    let world = world();
    let shipped = include_str!("../../templates/raw_exec.json");
    let publishing = "{% if task.name == \"publish\" %}\"/nowhere\"{% else %}{{ runner.path }}{% endif %}";
    let (folder, broken) = (tempfile::tempdir().unwrap(), shipped.replace("{{ runner.path }}", publishing));
    assert_ne!(broken, shipped);
    let template = folder.path().join("template.json");
    std::fs::write(&template, broken).unwrap();
    let template = [("NOMAD_BUILD_TEMPLATE", template.to_str().unwrap())];
    let service = Service::start(&world.nomad, &world.registry, &template);
    let sleeper = Sleeper::in_phase("test");
    let (id, status) = Api::new(&service.url).run(&sleeper.job).await;
    failed(&id, &sleeper.job, "publish", "setup_failed", &status).await;
    assert!(status["failure"]["message"].as_str().unwrap().contains("/nowhere"), "{status:#}");
    never_began(&status, "publish");
    sleeper.is_stopped().await;
}

#[tokio::test]
async fn a_publish_that_dies_while_it_waits_for_the_tests_is_what_failed() {
    let sleeper = Sleeper::in_phase("test");
    let id = sleeper.submit(&world().api()).await;
    eventually("a publish that waits", async || runner_of(&id, "publish").map(drop)).await;
    crash(&id, "publish");
    let status = world().api().wait_for_end(&id).await;
    failed(&id, &sleeper.job, "publish", "runner_died", &status).await;
    never_began(&status, "publish");
    sleeper.is_stopped().await;
}

#[tokio::test]
async fn a_job_that_is_stopped_or_purged_in_nomad_is_killed_and_never_published() {
    let api = world().api();
    for arguments in [&["job", "stop", "-detach"][..], &["job", "stop", "-detach", "-purge"]] {
        let sleeper = Sleeper::in_phase("test");
        let id = sleeper.submit(&api).await;
        let (stopped, said) = world().nomad_program(&[arguments, &[id.as_str()]].concat());
        assert!(stopped, "{said}");
        let status = api.wait_for_end(&id).await;
        assert_eq!(status["status"], "KILLED", "{status:#}");
        assert_eq!(status["failure"]["reason"], "stopped", "{status:#}");
        engine_is_rid_of(&id).await;
        assert_eq!(world().tags(&sleeper.job).await, [] as [&str; 0]);
        // A purge takes the Nomad job, not what is known of it.
        assert_eq!(api.status(&id).await["status"], "KILLED");
    }
}

#[tokio::test]
async fn a_job_whose_allocation_was_stopped_says_that_it_was_told_to_stop() {
    let api = world().api();
    for phase in ["build", "test"] {
        let sleeper = Sleeper::in_phase(phase);
        let id = sleeper.submit(&api).await;
        let placed = |status: &Value| status["nomad"]["allocation"].is_string();
        let status = api.wait_until(&id, "the allocation is known", placed).await;
        let allocation = status["nomad"]["allocation"].as_str().unwrap();
        let (stopped, said) = world().nomad_program(&["alloc", "stop", "-detach", allocation]);
        assert!(stopped, "{said}");
        let status = api.wait_for_end(&id).await;
        let failure = &status["failure"];
        assert_eq!(
            (&status["status"], &failure["reason"]),
            (&json!("KILLED"), &json!("stopped")),
            "{status:#}"
        );
        assert_eq!(failure["phase"], phase, "{status:#}");
        assert!(failure["message"].as_str().unwrap().contains("told the runner to stop"), "{status:#}");
        engine_is_rid_of(&id).await;
        assert_eq!(world().tags(&sleeper.job).await, [] as [&str; 0]);
    }
}

#[tokio::test]
async fn a_job_that_is_stopped_in_nomad_before_it_was_placed_leaves_no_copy_of_its_credentials() {
    let (world, api) = (world(), world().api());
    let repository = world.repository("");
    let mut job = world.job(&repository);
    job["resources"] = json!({"build": {"memory_mb": 131_072}});
    let items = json!({"username": "ci", "password": "secret"});
    job["registry_credentials_path"] = json!(world.nomad_api().credentials(&items).await);
    let id = api.submit(&job).await;
    let copies = format!("nomad/jobs/{id}/");
    assert!(!world.nomad_api().variables(&copies).await.is_empty());
    let (stopped, said) = world.nomad_program(&["job", "stop", "-detach", &id]);
    assert!(stopped, "{said}");
    let status = api.wait_for_end(&id).await;
    assert_eq!(status["failure"]["reason"], "stopped", "{status:#}");
    assert_eq!(world.nomad_api().variables(&copies).await, [] as [&str; 0]);
}
