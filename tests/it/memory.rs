//! What is left of a job that Nomad has forgotten: its ledger tells it to whoever never heard of it.

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::archive::forget;
use crate::follow::read_all;
use crate::replicas::alone;
use crate::stack::Stack;
use crate::support::{Api, Nomad, Service, Sleeper, crash, eventually, world};

/// A status without the node, which a ledger does not tell.
fn remembered(status: Value) -> Value {
    let mut status = alone(status);
    status["nomad"]["node"].take();
    status
}

#[tokio::test]
async fn a_job_that_nomad_forgot_is_told_from_its_ledger_by_a_replica_that_never_heard_of_it() {
    let stack = Stack::start(&[]);
    let mut service = Service::start(&stack.nomad, &world().registry, &[]);
    let api = Api::new(&service.url);
    let repository = world().repository("RUN echo built");
    let mut job = world().job(&repository);
    job["test_commands"] = json!(["true"]);
    let succeeded = api.submit(&job).await;
    job["test_commands"] = json!(["exit 7"]);
    let failed = api.submit(&job).await;
    job["resources"] = json!({"build": {"cpu": 60_000}});
    let killed = api.submit(&job).await;
    assert_eq!(api.post(&format!("/jobs/{killed}/kill")).await, json!({"success": true}));
    let ids = [succeeded, failed, killed];
    let mut before = Vec::new();
    for id in &ids {
        before.push(remembered(api.wait_for_end(id).await));
    }
    service.kill();
    forget(&stack, &ids).await;
    let service = Service::start(&stack.nomad, &world().registry, &[]);
    let api = Api::new(&service.url);
    for (id, before) in ids.iter().zip(&before) {
        assert_eq!(remembered(api.status(id).await), *before);
        // Of what has run nobody has the log any more, once its node has let go of it too, and that is said.
        let ran = before["phase_timestamps"]["build_start"].is_string();
        let wanted = if ran { json!("expired") } else { Value::Null };
        eventually("an end that says what is missing", async || {
            let end = read_all(&service.url, id, "").await.pop().unwrap();
            assert_eq!((&end["type"], &end["status"]), (&json!("end"), &before["status"]), "{end}");
            (end["reason"] == wanted).then_some(())
        })
        .await;
        let kill = api.post(&format!("/jobs/{id}/kill")).await;
        assert_eq!(kill["success"], before["status"] == "KILLED", "{kill}");
        // Nobody can say on which node it may come back, so the claim that fences it stays.
        assert_eq!(api.post(&format!("/jobs/{id}/cleanup")).await, json!({"success": true}));
        assert_eq!(remembered(api.status(id).await), *before);
    }
    assert!(stack.stop().success());
}

#[tokio::test]
async fn a_replica_that_knew_a_job_before_nomad_forgot_it_leaves_the_claim_that_fences_it() {
    let stack = Stack::start(&[]);
    let service = Service::start(&stack.nomad, &world().registry, &[]);
    let api = Api::new(&service.url);
    let sleeper = Sleeper::in_phase("test");
    let id = sleeper.submit(&api).await;
    assert_eq!(api.post(&format!("/jobs/{id}/kill")).await, json!({"success": true}));
    sleeper.is_stopped().await;
    forget(&stack, std::slice::from_ref(&id)).await;
    // Nomad tells of what it collects only by leaving it out.
    let before = service.lists().await;
    eventually("another list", async || (service.lists().await > before).then_some(())).await;
    assert_eq!(api.post(&format!("/jobs/{id}/cleanup")).await, json!({"success": true}));
    let claim = Nomad::new(&stack.nomad).get(&format!("/v1/var/nomad-build/claims/{id}")).await;
    assert_eq!(claim["Path"], format!("nomad-build/claims/{id}"), "{claim:#}");
    assert_eq!(api.status(&id).await["status"], "KILLED");
    assert!(stack.stop().success());
}

#[tokio::test]
async fn a_job_that_ended_and_was_forgotten_while_no_replica_was_there_gets_its_end() {
    let stack = Stack::start(&[]);
    let mut service = Service::start(&stack.nomad, &world().registry, &[]);
    let api = Api::new(&service.url);
    let (stopped, died) = (Sleeper::in_phase("build"), Sleeper::in_phase("test"));
    let (told_to_stop, vanished) = (stopped.submit(&api).await, died.submit(&api).await);
    let testing = |status: &Value| status["status"] == "TESTING";
    let before = api.wait_until(&vanished, "a test that is told of", testing).await;
    let mut unplaced = world().job(&world().repository(""));
    unplaced["resources"] = json!({"build": {"cpu": 60_000}});
    let unplaced = api.submit(&unplaced).await;
    service.kill();
    crash(&vanished, "test");
    died.is_stopped().await;
    for id in [&told_to_stop, &vanished, &unplaced] {
        stack.nomad(&["job", "stop", "-purge", "-detach", id]);
    }
    stopped.is_stopped().await;
    let ids = [told_to_stop, vanished, unplaced];
    forget(&stack, &ids).await;
    let service = Service::start(&stack.nomad, &world().registry, &[]);
    let api = Api::new(&service.url);
    let stopped = api.wait_for_end(&ids[0]).await;
    assert_eq!((&stopped["status"], &stopped["failure"]["reason"]), (&json!("KILLED"), &json!("stopped")));
    let lost = api.wait_for_end(&ids[1]).await;
    assert_eq!((&lost["status"], &lost["failure"]["reason"]), (&json!("LOST"), &json!("node_lost")));
    assert_eq!(lost["failure"]["phase"], "test");
    // Of this one no task ever told anything.
    let untold = api.wait_for_end(&ids[2]).await;
    assert_eq!((&untold["status"], &untold["failure"]["phase"]), (&json!("LOST"), &Value::Null));
    let times = |status: &Value| {
        ["job_start", "build_end", "test_start"].map(|t| status["phase_timestamps"][t].clone())
    };
    assert_eq!(times(&lost), times(&before));
    assert!(stack.stop().success());
}

#[tokio::test]
async fn a_job_that_every_replica_forgot_before_it_was_archived_is_archived_from_its_ledger() {
    let (stack, archive) = (Stack::start(&[]), TempDir::new().unwrap());
    let url = format!("file://{}", archive.path().display());
    let start = || Service::start(&stack.nomad, &world().registry, &[("NOMAD_BUILD_ARCHIVE", &url)]);
    let mut service = start();
    let api = Api::new(&service.url);
    let sleeper = Sleeper::in_phase("test");
    let id = sleeper.submit(&api).await;
    // What it comes to is mostly decided after its `finish` has looked, which archives its log and no record.
    crash(&id, "test");
    let before = api.wait_for_end(&id).await;
    assert_eq!(before["failure"]["reason"], "runner_died", "{before:#}");
    let folder = archive.path().join("default").join(&id);
    let index = folder.join(before["nomad"]["allocation"].as_str().unwrap()).join("index.json");
    eventually("an archived log", async || index.exists().then_some(())).await;
    let (logs, stream) = (api.logs(&id).await, read_all(&service.url, &id, "").await);
    assert!(logs["build"].as_str().unwrap().contains("FROM"), "{logs}");
    service.kill();
    // It is there where its `finish` found the job decided, which is a matter of moments.
    std::fs::remove_file(folder.join("record.json")).ok();
    forget(&stack, std::slice::from_ref(&id)).await;
    let service = start();
    let api = Api::new(&service.url);
    let told = async || {
        let status = remembered(api.status(&id).await);
        (status, api.logs(&id).await, read_all(&service.url, &id, "").await)
    };
    let expected = (remembered(before), logs, stream);
    assert_eq!(told().await, expected);
    eventually("an archived record", async || folder.join("record.json").exists().then_some(())).await;
    assert_eq!(told().await, expected);
    assert!(Nomad::new(&stack.nomad).get("/v1/jobs?prefix=nb-").await.as_array().unwrap().is_empty());
    assert!(stack.stop().success());
}
