//! Publishing: what was built and tested here, under the tags asked for, and nothing else ever.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Value, json};

use crate::support::{
    At, Front, World, crash, docker, eventually, image_of, images_of, leave_behind, unique_seconds, world,
};

/// An image that says who built it.
fn saying(world: &World, who: &str) -> crate::support::Repository {
    world.repository(&format!("RUN echo {who} > /who\nCMD [\"cat\", \"/who\"]"))
}

/// Pulls an image of a submission by its digest and runs it; what it said.
fn run_by_digest(world: &World, job: &Value, status: &Value) -> String {
    let digest = status["image"]["digest"].as_str().unwrap();
    let reference = format!("{}/{}@{digest}", world.registry, image_of(job));
    let said = docker(&["run", "--rm", &reference]);
    docker(&["rmi", "--force", &reference]);
    said
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_is_purged_behind_its_claim_ends_as_its_publish_does() {
    let (world, api) = (world(), world().api());
    let front = Front::holding(&world.registry, At::Tag).await;
    let repository = world.repository("");
    let job = world.job_by(&front, &repository);
    let id = api.submit(&job).await;
    front.holds().await;
    let (purged, said) = world.nomad_program(&["job", "stop", "-purge", "-detach", &id]);
    assert!(purged, "{said}");
    // For as long as it may take somebody to hear of the purge.
    for _ in 0..30 {
        let status = api.status(&id).await;
        assert_eq!(status["status"], "PUBLISHING", "{status:#}");
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    front.let_go();
    let status = api.wait_for_end(&id).await;
    assert_eq!(status["status"], "SUCCEEDED", "{status:#}");
    assert_eq!(json!(world.served(image_of(&job), "one").await), status["image"]["digest"]);
}

#[tokio::test]
async fn two_jobs_that_race_for_one_tag_each_publish_what_they_built() {
    let (world, api) = (world(), world().api());
    for _ in 0..4 {
        let whos = [unique_seconds(), unique_seconds()];
        let repositories = [saying(world, &whos[0]), saying(world, &whos[1])];
        let mut jobs = repositories.each_ref().map(|repository| world.job(repository));
        jobs[1]["image_name"] = jobs[0]["image_name"].clone();
        for (job, who) in jobs.iter_mut().zip(&whos) {
            job["test_commands"] = json!([format!("test \"$(cat /who)\" = {who}")]);
        }
        let ((_, one), (_, other)) = tokio::join!(api.run(&jobs[0]), api.run(&jobs[1]));
        for (status, who) in [&one, &other].into_iter().zip(&whos) {
            assert_eq!(status["status"], "SUCCEEDED", "{status:#}");
            assert_eq!(&run_by_digest(world, &jobs[0], status), who);
        }
        let served = json!(world.served(image_of(&jobs[0]), "one").await);
        assert!([&one["image"]["digest"], &other["image"]["digest"]].contains(&&served));
        assert_eq!(world.tags(&jobs[0]).await, ["one"]);
    }
}

#[tokio::test]
async fn whoever_hears_of_a_success_does_not_meet_the_removal_of_the_image() {
    let (world, api) = (world(), world().api());
    let (id, status) = api.run(&world.job(&saying(world, &unique_seconds()))).await;
    assert_eq!(status["status"], "SUCCEEDED", "{status:#}");
    let label = format!("label=nomad-build.job={id}");
    assert_eq!(docker(&["images", "--quiet", "--filter", &label]), "");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_whose_tag_another_one_takes_at_once_has_succeeded_and_says_whose_the_tag_is() {
    let (world, api) = (world(), world().api());
    let front = Front::holding(&world.registry, At::ReadBack).await;
    let repositories = [saying(world, "one"), saying(world, "other")];
    let first = world.job_by(&front, &repositories[0]);
    let id = api.submit(&first).await;
    front.holds().await;
    let mut second = world.job(&repositories[1]);
    second["image_name"] = first["image_name"].clone();
    let (_, other) = api.run(&second).await;
    assert_eq!(other["status"], "SUCCEEDED", "{other:#}");
    front.let_go();
    let one = api.wait_for_end(&id).await;
    assert_eq!(one["status"], "SUCCEEDED", "{one:#}");
    assert_eq!(one["image"]["references"][0]["published"], "no", "{one:#}");
    assert_eq!(json!(world.served(image_of(&first), "one").await), other["image"]["digest"]);
    assert_eq!(run_by_digest(world, &first, &one), "one");
}

#[tokio::test]
async fn local_names_in_the_engine_change_nothing_of_what_is_published() {
    let (world, api) = (world(), world().api());
    // Another image under the name that the job publishes to, and under that of its base.
    let poison = format!("poison-{}:1", unique_seconds());
    let container = docker(&["create", &world.base]);
    docker(&[
        "commit",
        "--change",
        "CMD [\"echo\", \"poison\"]",
        "--change",
        "ENV POISON=1",
        &container,
        &poison,
    ]);
    docker(&["rm", &container]);
    let base = format!("{}/base/own-{}:latest", world.registry, unique_seconds());
    docker(&["tag", &world.base, &base]);
    docker(&["push", "--quiet", &base]);
    let who = unique_seconds();
    let repository = saying(world, &who);
    let mut job = world.job(&repository);
    job["build_args"] = json!({"BASE": base});
    let target = format!("{}/{}:one", world.registry, image_of(&job));
    docker(&["tag", &poison, &target]);
    docker(&["tag", &poison, &base]);
    let (_, status) = api.run(&job).await;
    assert_eq!(status["status"], "SUCCEEDED", "{status:#}");
    assert_eq!(json!(world.served(image_of(&job), "one").await), status["image"]["digest"]);
    assert_eq!(run_by_digest(world, &job, &status), who);
    let reference =
        format!("{}/{}@{}", world.registry, image_of(&job), status["image"]["digest"].as_str().unwrap());
    let environment = docker(&["run", "--rm", &reference, "env"]);
    assert!(!environment.contains("POISON"), "{environment}");
    docker(&["rmi", "--force", &reference, &target, &base, &poison]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_publish_that_dies_behind_its_claim_is_brought_to_the_claimed_digest() {
    let (world, api) = (world(), world().api());
    let front = Front::holding(&world.registry, At::Tag).await;
    let who = unique_seconds();
    let repository = saying(world, &who);
    let mut job = world.job_by(&front, &repository);
    job["image_tags"] = json!(["one", "two"]);
    let id = api.submit(&job).await;
    front.holds().await;
    let status = api.wait_until(&id, "the claim", |status| status["image"]["digest"].is_string()).await;
    let claimed = status["image"]["digest"].clone();
    assert_eq!(status["image"]["references"][0]["published"], "unknown", "{status:#}");
    // As one that died sooner leaves them.
    eventually("no name of the image", async || images_of(&id).is_empty().then_some(())).await;
    leave_behind(&id);
    crash(&id, "publish");
    front.let_go();
    let status = api.wait_for_end(&id).await;
    assert_eq!(status["status"], "SUCCEEDED", "{status:#}");
    // Who hears of the end and pulls the image here must not meet its removal.
    assert_eq!(images_of(&id), [] as [&str; 0]);
    assert_eq!(status["image"]["digest"], claimed);
    for (index, tag) in ["one", "two"].into_iter().enumerate() {
        assert_eq!(status["image"]["references"][index]["published"], "yes", "{status:#}");
        assert_eq!(json!(world.served(image_of(&job), tag).await), claimed);
    }
    assert_eq!(world.tags(&job).await, ["one", "two"]);
    assert_eq!(run_by_digest(world, &job, &status), who);
}

/// How often Nomad has started the tasks of a job, all told; none while any of them is not dead.
async fn starts(id: &str) -> Option<u64> {
    let allocations = world().nomad(&format!("/v1/job/{id}/allocations")).await?;
    let mut starts = 0;
    for allocation in allocations.as_array()? {
        for task in allocation["TaskStates"].as_object()?.values() {
            if task["State"] != "dead" {
                return None;
            }
            starts +=
                u64::from(task["StartedAt"].is_string()) + task["Restarts"].as_u64().unwrap_or_default();
        }
    }
    Some(starts)
}

#[tokio::test]
async fn an_ended_job_that_is_started_again_by_hand_changes_neither_its_status_nor_the_registry() {
    let (world, api) = (world(), world().api());
    for (lines, end, tags) in
        [("", "SUCCEEDED", &["one"][..]), ("RUN exit 1", "FAILED", &[]), ("RUN sleep 3600", "KILLED", &[])]
    {
        let repository = world.repository(lines);
        let job = world.job(&repository);
        let id = api.submit(&job).await;
        if end == "KILLED" {
            let builds =
                |status: &Value| status["status"] == "BUILDING" && status["git"]["commit"].is_string();
            api.wait_until(&id, "its commit is being built", builds).await;
            assert_eq!(api.post(&format!("/jobs/{id}/kill")).await["success"], true);
        }
        let before = api.wait_for_end(&id).await;
        assert_eq!(before["status"], end, "{before:#}");
        let digest = world.served(image_of(&job), "one").await;
        let first = eventually("the job's tasks have ended", async || starts(&id).await).await;
        let (started, said) = world.nomad_program(&["job", "start", "-detach", &id]);
        // Nomad only starts what was stopped.
        assert_eq!(started, end == "KILLED", "{said}");
        if started {
            eventually("it was started again", async || starts(&id).await.filter(|now| *now > first)).await;
        }
        let allocation = before["nomad"]["allocation"].as_str().unwrap();
        // Nor does it restart what has ended.
        let (restarted, said) = world.nomad_program(&["alloc", "restart", "-all-tasks", allocation]);
        assert!(!restarted, "{said}");
        let after = api.status(&id).await;
        for field in ["status", "failure", "image", "phase_timestamps", "git", "nomad"] {
            assert_eq!(after[field], before[field], "{field}");
        }
        assert_eq!(world.served(image_of(&job), "one").await, digest);
        assert_eq!(world.tags(&job).await, tags);
    }
}

/// Restarts a job's tasks by hand while its publish cannot get past a request; its last status.
async fn restarted_at(at: At) -> (Value, Value) {
    let (world, api) = (world(), world().api());
    let front = Front::holding(&world.registry, at).await;
    let repository = saying(world, &unique_seconds());
    let mut job = world.job_by(&front, &repository);
    job["test_commands"] = json!(["true"]);
    let id = api.submit(&job).await;
    front.holds().await;
    let allocation = api.status(&id).await["nomad"]["allocation"].as_str().unwrap().to_owned();
    let before = api.status(&id).await;
    // It waits until every task was stopped and started again.
    let (restarted, said) = world.nomad_program(&["alloc", "restart", "-all-tasks", &allocation]);
    assert!(restarted, "{said} {before:#}");
    front.let_go();
    let status = api.wait_for_end(&id).await;
    eventually("the job's tasks have ended", async || starts(&id).await).await;
    assert_eq!(api.status(&id).await["status"], status["status"], "a final status stays");
    (job, status)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_restarted_by_hand_behind_its_claim_publishes_what_it_claimed() {
    let (job, status) = restarted_at(At::Tag).await;
    assert_eq!(status["status"], "SUCCEEDED", "{status:#}");
    assert_eq!(json!(world().served(image_of(&job), "one").await), status["image"]["digest"]);
    assert_eq!(world().tags(&job).await, ["one"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_restarted_by_hand_before_its_claim_tells_the_truth_of_its_tags() {
    let (job, status) = restarted_at(At::Digest).await;
    let tagged = !world().tags(&job).await.is_empty();
    assert_eq!(status["status"] == "SUCCEEDED", tagged, "{status:#}");
    let published = if tagged { "yes" } else { "no" };
    assert_eq!(status["image"]["references"][0]["published"], published, "{status:#}");
}

#[tokio::test]
async fn no_other_tag_is_ever_there_while_a_job_publishes() {
    let (world, api) = (world(), world().api());
    // Some layers, so that a push takes a while.
    let layers: Vec<_> =
        (0..4).map(|_| "RUN dd if=/dev/urandom of=/$RANDOM bs=1M count=8 2>/dev/null").collect();
    let repository = world.repository(&layers.join("\n"));
    let mut job = world.job(&repository);
    job["image_tags"] = json!(["one", "two"]);
    job["no_cache"] = json!(true);
    let over = AtomicBool::new(false);
    let run = async {
        let (_, status) = api.run(&job).await;
        over.store(true, Ordering::Relaxed);
        status
    };
    let watch = async {
        let mut seen = BTreeSet::new();
        while !over.load(Ordering::Relaxed) {
            seen.extend(world.tags(&job).await);
            tokio::task::yield_now().await;
        }
        seen.extend(world.tags(&job).await);
        seen
    };
    let (status, seen) = tokio::join!(run, watch);
    assert_eq!(status["status"], "SUCCEEDED", "{status:#}");
    assert_eq!(seen.into_iter().collect::<Vec<_>>(), ["one", "two"]);
}

#[tokio::test]
async fn who_runs_the_published_image_keeps_container_and_image_when_the_job_is_cleaned_up() {
    let (world, api) = (world(), world().api());
    let (ended, _) = api.run(&world.job(&world.repository("RUN false"))).await;
    let repository = world.repository(&format!("LABEL nomad-build.test={ended}"));
    let job = world.job(&repository);
    let (id, status) = api.run(&job).await;
    assert_eq!(status["status"], "SUCCEEDED", "{status:#}");
    let image = status["image"]["references"][0]["reference"].as_str().unwrap();
    // The image's labels are those of everything that is run from it, its Dockerfile's own with them.
    let container = docker(&["run", "--detach", image, "sleep", "600"]);
    for id in [&id, &ended] {
        api.post(&format!("/jobs/{id}/cleanup")).await;
    }
    let running = docker(&["inspect", "--format", "{{.State.Running}}", &container]);
    let named = docker(&["images", "--quiet", image]);
    docker(&["rm", "--force", &container]);
    docker(&["rmi", image]);
    assert_eq!(running, "true");
    assert!(!named.is_empty());
}
