//! Clients: whatever becomes of a node and of the agent on it, a job goes on or ends, and publishes what it tested.

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::support::{
    Api, At, Cluster, Front, Lent, Nomad, Repository, Service, Sleeper, containers_of, end_container,
    engine_is_rid_of, eventually, image_of, world,
};

/// A cluster for this test alone, and a service that speaks to its server.
struct Bench {
    cluster: Lent,
    api: Api,
    service: Service,
}

impl Bench {
    async fn new() -> Self {
        let cluster = Cluster::lent().await;
        let service = Service::start(&cluster.server(), &world().registry, &[]);
        let api = Api::new(&service.url);
        Self { cluster, api, service }
    }
}

/// Waits until a job has a status, and Nomad's servers know that its allocation runs: one that they take for pending is lost
/// with its node.
async fn runs(cluster: &Cluster, api: &Api, id: &str, status: &str) {
    api.wait_until(id, status, |told| told["status"] == status).await;
    let nomad = Nomad::new(&cluster.server());
    eventually("an allocation that runs by the servers' word", async || {
        let allocations = nomad.get(&format!("/v1/job/{id}/allocations")).await;
        (allocations[0]["ClientStatus"] == "running").then_some(())
    })
    .await;
}

/// How a job ended that did not succeed: status and reason.
fn ended_as(status: &Value) -> (&str, &str) {
    (status["status"].as_str().unwrap(), status["failure"]["reason"].as_str().unwrap())
}

/// Waits until Nomad's servers say of the one node what `holds` wants; its ID.
async fn node(cluster: &Cluster, what: &str, holds: impl Fn(&Value) -> bool) -> String {
    let nomad = Nomad::new(&cluster.server());
    let node = eventually(what, async || {
        let node = nomad.get("/v1/nodes").await.get_mut(0)?.take();
        holds(&node).then_some(node)
    })
    .await;
    node["ID"].as_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_goes_on_though_its_nodes_agent_is_killed_in_every_phase() {
    let Bench { cluster, api, .. } = &Bench::new().await;
    let world = world();
    let repository = world.repository("ARG ROUND\nRUN echo built; sleep 5");
    let front = Front::holding(&world.registry, At::Everything).await;
    let mut job = world.job_by(&front, &repository);
    job["build_args"]["ROUND"] = json!(uuid::Uuid::new_v4().to_string());
    job["test_commands"] = json!(["echo tested; sleep 5"]);
    let id = api.submit(&job).await;
    for phase in ["BUILDING", "TESTING", "PUBLISHING"] {
        runs(cluster, api, &id, phase).await;
        cluster.kill_client();
        cluster.restart_client().await;
    }
    front.let_go();
    let status = api.wait_for_end(&id).await;
    assert_eq!(status["status"], "SUCCEEDED", "{status:#}");
    assert_eq!(world.served(image_of(&job), "one").await.as_deref(), status["image"]["digest"].as_str());
    let logs = api.logs(&id).await;
    assert!(logs["missing"].is_null(), "{logs:#}");
    for (phase, text) in [("build", "built"), ("test", "tested"), ("publish", "sha256:")] {
        assert!(logs[phase].as_str().unwrap().contains(text), "{phase}: {logs:#}");
    }
}

/// How long each phase of such a job may take.
const TIMEOUT: &str = "PT40S";

/// A job whose tests succeed while its node is away and nobody hears of them.
struct Unheard {
    job: Value,
    id: String,
    node: String,
    // It is there as long as this value.
    _repository: Repository,
}

impl Unheard {
    /// Submits one, and waits until its node is missed.
    async fn new(cluster: &Cluster, api: &Api) -> Self {
        let repository = world().repository("");
        let mut job = world().job(&repository);
        job["test_commands"] = json!(["sleep 5"]);
        job["timeouts"] = json!({"build": TIMEOUT, "test": TIMEOUT, "publish": TIMEOUT});
        let nomad = Nomad::new(&cluster.server());
        let login = nomad.credentials(&json!({"username": "me", "password": "nobody's"})).await;
        job["registry_credentials_path"] = json!(login);
        let id = api.submit(&job).await;
        runs(cluster, api, &id, "TESTING").await;
        assert_ne!(nomad.variables(&format!("nomad/jobs/{id}")).await, [] as [&str; 0]);
        cluster.kill_client();
        let node = node(cluster, "the node is missed", |node| node["Status"] != "ready").await;
        Self { job, id, node, _repository: repository }
    }

    /// Brings the node back, and sees to it that nothing comes of the job there, and that it can be cleaned up.
    async fn comes_to_nothing(&self, cluster: &Cluster, api: &Api, end: (&str, &str)) {
        let id = &self.id;
        cluster.restart_client().await;
        node(cluster, "the node is back", |node| node["Status"] == "ready").await;
        eventually("the tasks are ended", async || containers_of(id).is_empty().then_some(())).await;
        let status = api.status(id).await;
        assert_eq!(ended_as(&status), end, "{status:#}");
        let nomad = Nomad::new(&cluster.server());
        eventually("a job without credentials", async || {
            nomad.variables(&format!("nomad/jobs/{id}")).await.is_empty().then_some(())
        })
        .await;
        assert_eq!(world().tags(&self.job).await, [] as [&str; 0]);
        // Nomad (1.11) does not run the poststop task of an allocation that was stopped while its node was away.
        eventually("the node is cleaned up", async || {
            let (status, _) = api.call(Method::POST, &format!("/jobs/{id}/cleanup"), None).await;
            status.is_success().then_some(())
        })
        .await;
        engine_is_rid_of(id).await;
        assert_eq!(world().tags(&self.job).await, [] as [&str; 0]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_killed_while_its_node_is_away_publishes_nothing_when_the_node_comes_back() {
    let Bench { cluster, api, .. } = &Bench::new().await;
    let unheard = Unheard::new(cluster, api).await;
    assert_eq!(api.status(&unheard.id).await["status"], "TESTING");
    assert_eq!(api.post(&format!("/jobs/{}/kill", unheard.id)).await, json!({"success": true}));
    unheard.comes_to_nothing(cluster, api, ("KILLED", "killed")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_whose_node_is_cut_off_and_alive_publishes_nothing_that_was_revoked_meanwhile() {
    let Bench { cluster, api, .. } = &Bench::new().await;
    let world = world();
    for (at, kills, end) in
        [(At::Digest, true, "KILLED"), (At::Digest, false, "SUCCEEDED"), (At::Tag, true, "SUCCEEDED")]
    {
        let front = Front::holding(&world.registry, at).await;
        let repository = world.repository("");
        let job = world.job_by(&front, &repository);
        let id = api.submit(&job).await;
        runs(cluster, api, &id, "PUBLISHING").await;
        front.holds().await;
        cluster.cut_client_off(true);
        node(cluster, "the node is missed", |node| node["Status"] != "ready").await;
        if kills {
            let answer = api.post(&format!("/jobs/{id}/kill")).await;
            assert_eq!(answer["success"], end == "KILLED", "{answer}");
        }
        // The runner goes on, and cannot reach Nomad.
        front.let_go();
        if at == At::Tag {
            eventually("what it claimed is published", async || world.served(image_of(&job), "one").await)
                .await;
        }
        cluster.cut_client_off(false);
        node(cluster, "the node is back", |node| node["Status"] == "ready").await;
        let status = api.wait_for_end(&id).await;
        assert_eq!(status["status"], end, "{status:#}");
        engine_is_rid_of(&id).await;
        let served = world.served(image_of(&job), "one").await;
        assert_eq!(json!(served), status["image"]["digest"], "{status:#}");
        assert_eq!(world.tags(&job).await.is_empty(), end == "KILLED");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_on_a_node_that_is_drained_is_told_to_stop_and_publishes_nothing() {
    let Bench { cluster, api, .. } = &Bench::new().await;
    let world = world();
    let sleeper = Sleeper::in_phase("test");
    let id = sleeper.submit(api).await;
    let node = node(cluster, "a node that is ready", |node| node["Status"] == "ready").await;
    let nomad = Api::new(&cluster.server());
    let drain = async |body: Value| {
        let (status, answer) = nomad.call(Method::PUT, &format!("/v1/node/{node}/drain"), Some(&body)).await;
        assert!(status.is_success(), "{answer}");
    };
    // At once, as `nomad node drain -force` does.
    drain(json!({"DrainSpec": {"Deadline": -1}})).await;
    let status = api.wait_for_end(&id).await;
    assert_eq!(ended_as(&status), ("KILLED", "stopped"), "{status:#}");
    sleeper.is_stopped().await;
    engine_is_rid_of(&id).await;
    assert_eq!(world.tags(&sleeper.job).await, [] as [&str; 0]);
    drain(json!({"DrainSpec": null, "MarkEligible": true})).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_whose_node_is_removed_from_nomad_is_lost_and_publishes_nothing_when_the_node_comes_back() {
    let Bench { cluster, api, .. } = &Bench::new().await;
    let unheard = Unheard::new(cluster, api).await;
    let nomad = Api::new(&cluster.server());
    let (status, answer) = nomad.call(Method::PUT, &format!("/v1/node/{}/purge", unheard.node), None).await;
    assert!(status.is_success(), "{answer}");
    let status = api.wait_for_end(&unheard.id).await;
    assert_eq!(ended_as(&status), ("LOST", "node_lost"), "{status:#}");
    unheard.comes_to_nothing(cluster, api, ("LOST", "node_lost")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_whose_node_stays_away_is_lost_and_publishes_nothing_when_the_node_comes_back() {
    let Bench { cluster, api, .. } = &Bench::new().await;
    let unheard = Unheard::new(cluster, api).await;
    let status = api.wait_for_late_end(&unheard.id).await;
    assert_eq!(ended_as(&status), ("LOST", "node_lost"), "{status:#}");
    let (answer, said) = api.call(Method::POST, &format!("/jobs/{}/cleanup", unheard.id), None).await;
    assert_eq!(answer, StatusCode::SERVICE_UNAVAILABLE, "{said}");
    assert!(said["error"]["message"].as_str().unwrap().contains("it is away"), "{said}");
    assert!(status["failure"]["message"].as_str().unwrap().contains("has been away"), "{status:#}");
    unheard.comes_to_nothing(cluster, api, ("LOST", "node_lost")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_whose_node_is_lost_before_it_began_waits_for_another_place_and_is_built_there() {
    let Bench { cluster, api, .. } = &Bench::new().await;
    let world = world();
    let nomad = Nomad::new(&cluster.server());
    for dies in [false, true] {
        let repository = world.repository("");
        let job = world.job(&repository);
        // Its node takes it no more, and Nomad places what is pending anew, once there is a place.
        if dies {
            cluster.kill_client();
        } else {
            cluster.halt_client(true);
        }
        let id = api.submit(&job).await;
        eventually("an allocation that is lost", async || {
            let allocations = nomad.get(&format!("/v1/job/{id}/allocations")).await;
            (allocations[0]["ClientStatus"] == "lost").then_some(())
        })
        .await;
        let waits = |status: &Value| !status["placement"].is_null();
        let status = api.wait_until(&id, "why it waits", waits).await;
        assert_eq!(status["status"], "PENDING", "{status:#}");
        assert_eq!(status["nomad"]["allocation"], Value::Null, "{status:#}");
        // A replica that never heard of its first place says the same.
        let fresh = Service::start(&cluster.server(), &world.registry, &[]);
        let fresh_api = Api::new(&fresh.url);
        assert_eq!(fresh_api.wait_until(&id, "why it waits", waits).await["status"], "PENDING");
        if dies {
            cluster.restart_client().await;
        } else {
            cluster.halt_client(false);
        }
        let status = api.wait_for_end(&id).await;
        assert_eq!(status["status"], "SUCCEEDED", "{status:#}");
        assert_eq!(world.served(image_of(&job), "one").await.as_deref(), status["image"]["digest"].as_str());
        assert_eq!(fresh_api.wait_for_end(&id).await["status"], "SUCCEEDED");
        eventually("Nomad is done with all its allocations", async || {
            let all = nomad.get(&format!("/v1/job/{id}/allocations?all=true")).await;
            let over = |allocation: &Value| {
                matches!(allocation["ClientStatus"].as_str(), Some("complete" | "failed" | "lost"))
            };
            all.as_array().unwrap().iter().all(over).then_some(())
        })
        .await;
        engine_is_rid_of(&id).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_whose_node_is_rebooted_in_any_phase_runs_it_again_and_publishes_what_it_claimed() {
    let Bench { cluster, api, .. } = &Bench::new().await;
    let world = world();
    for place in ["BUILDING", "TESTING", "before its claim", "behind its claim"] {
        let at = if place == "behind its claim" { At::Tag } else { At::Digest };
        let front = Front::holding(&world.registry, at).await;
        let pause = |phase: &str| if place == phase { "sleep 5" } else { "true" };
        let repository = world.repository(&format!("ARG ROUND\nRUN echo $ROUND; {}", pause("BUILDING")));
        let mut job = world.job_by(&front, &repository);
        job["build_args"]["ROUND"] = json!(uuid::Uuid::new_v4().to_string());
        job["test_commands"] = json!([pause("TESTING")]);
        let id = api.submit(&job).await;
        if place.ends_with("claim") {
            runs(cluster, api, &id, "PUBLISHING").await;
            front.holds().await;
        } else {
            runs(cluster, api, &id, place).await;
        }
        cluster.reboot_client().await;
        for container in containers_of(&id) {
            end_container(&container);
        }
        front.let_go();
        let status = api.wait_for_end(&id).await;
        // Its node runs the task again, which goes on from what the claim and the engine say.
        assert_eq!(status["status"], "SUCCEEDED", "{place}: {status:#}");
        assert_eq!(world.tags(&job).await, ["one"], "{place}: {status:#}");
        assert_eq!(status["image"]["references"][0]["published"], "yes", "{place}: {status:#}");
        let served = world.served(image_of(&job), "one").await;
        assert_eq!(json!(served), status["image"]["digest"], "{place}: {status:#}");
        api.post(&format!("/jobs/{id}/cleanup")).await;
        engine_is_rid_of(&id).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_decided_stands_though_an_older_snapshot_of_nomad_is_restored() {
    let Bench { cluster, api, .. } = &Bench::new().await;
    let world = world();
    let sleeper = Sleeper::in_phase("test");
    let id = sleeper.submit(api).await;
    api.wait_until(&id, "TESTING", |status| status["status"] == "TESTING").await;
    let snapshot = cluster.snapshot();
    assert_eq!(api.post(&format!("/jobs/{id}/kill")).await, json!({"success": true}));
    sleeper.is_stopped().await;
    cluster.restore(&snapshot);
    let claim = format!("/v1/var/nomad-build/claims/{id}");
    let nomad = Api::new(&cluster.server());
    eventually("the older state", async || {
        let (_, job) = nomad.call(Method::GET, &format!("/v1/job/{id}"), None).await;
        (job["Stop"] == false).then_some(())
    })
    .await;
    eventually("what was decided is written again", async || {
        nomad.call(Method::GET, &claim, None).await.0.is_success().then_some(())
    })
    .await;
    // A replica that never heard of it says the same.
    let fresh = Service::start(&cluster.server(), &world.registry, &[]);
    for api in [api, &Api::new(&fresh.url)] {
        let status = api.wait_for_end(&id).await;
        assert_eq!(ended_as(&status), ("KILLED", "killed"), "{status:#}");
    }
    engine_is_rid_of(&id).await;
    assert_eq!(world.tags(&sleeper.job).await, [] as [&str; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_decided_stands_though_nomad_had_forgotten_the_job_when_an_older_snapshot_is_restored() {
    let Bench { cluster, api, service } = &Bench::new().await;
    let sleeper = Sleeper::in_phase("test");
    let id = sleeper.submit(api).await;
    api.wait_until(&id, "TESTING", |status| status["status"] == "TESTING").await;
    let snapshot = cluster.snapshot();
    assert_eq!(api.post(&format!("/jobs/{id}/kill")).await, json!({"success": true}));
    sleeper.is_stopped().await;
    let nomad = Api::new(&cluster.server());
    eventually("a Nomad that has forgotten the job", async || {
        nomad.call(Method::PUT, "/v1/system/gc", None).await;
        (nomad.call(Method::GET, &format!("/v1/job/{id}"), None).await.0 == 404).then_some(())
    })
    .await;
    let before = service.lists().await;
    eventually("another list", async || (service.lists().await > before).then_some(())).await;
    cluster.restore(&snapshot);
    eventually("the older state", async || {
        (nomad.call(Method::GET, &format!("/v1/job/{id}"), None).await.0 == 200).then_some(())
    })
    .await;
    let claim = format!("/v1/var/nomad-build/claims/{id}");
    eventually("what was decided is written again", async || {
        nomad.call(Method::GET, &claim, None).await.0.is_success().then_some(())
    })
    .await;
    let status = api.wait_for_end(&id).await;
    assert_eq!(ended_as(&status), ("KILLED", "killed"), "{status:#}");
    engine_is_rid_of(&id).await;
    assert_eq!(world().tags(&sleeper.job).await, [] as [&str; 0]);
}

/// Has the node's agent lose track of a job that runs there: Nomad (1.11) keeps an allocation without its job when it
/// reconnected, until it hears of it next, and cannot read that again.
async fn forget(cluster: &Cluster, id: &str) {
    let nomad = Nomad::new(&cluster.server());
    let is = async |wanted: &str| {
        eventually(&format!("an allocation that is {wanted} by the servers' word"), async || {
            let allocations = nomad.get(&format!("/v1/job/{id}/allocations")).await;
            (allocations[0]["ClientStatus"] == wanted).then_some(())
        })
        .await;
    };
    eventually("an agent that keeps an allocation without its job", async || {
        cluster.kill_client();
        is("unknown").await;
        cluster.restart_client().await;
        is("running").await;
        // It may hear of it before anybody looked.
        cluster.halt_client(true);
        cluster.client_lacks_a_job().then_some(())
    })
    .await;
    cluster.reboot_client().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_its_nodes_agent_lost_track_of_ends_and_publishes_nothing_but_what_it_claimed() {
    let Bench { cluster, api, .. } = &Bench::new().await;
    let world = world();
    for phase in ["BUILDING", "PUBLISHING"] {
        let front = Front::holding(&world.registry, At::Tag).await;
        let pause = if phase == "BUILDING" { "sleep 600" } else { "true" };
        let repository = world.repository(&format!("RUN : {}; {pause}", uuid::Uuid::new_v4()));
        let job = world.job_by(&front, &repository);
        let id = api.submit(&job).await;
        runs(cluster, api, &id, phase).await;
        if phase == "PUBLISHING" {
            front.holds().await;
        }
        forget(cluster, &id).await;
        for container in containers_of(&id) {
            end_container(&container);
        }
        front.let_go();
        let status = api.wait_for_end(&id).await;
        if phase == "BUILDING" {
            assert_eq!(ended_as(&status), ("LOST", "node_lost"), "{status:#}");
            assert!(status["failure"]["message"].as_str().unwrap().contains("lost track"), "{status:#}");
            assert_eq!(world.tags(&job).await, [] as [&str; 0]);
        } else {
            assert_eq!(status["status"], "SUCCEEDED", "{status:#}");
            let served = world.served(image_of(&job), "one").await;
            assert_eq!(json!(served), status["image"]["digest"], "{status:#}");
        }
        let nomad = Nomad::new(&cluster.server());
        eventually("Nomad is done with it", async || {
            let allocations = nomad.get(&format!("/v1/job/{id}/allocations")).await;
            matches!(allocations[0]["ClientStatus"].as_str(), Some("complete" | "failed")).then_some(())
        })
        .await;
        api.post(&format!("/jobs/{id}/cleanup")).await;
        engine_is_rid_of(&id).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_starts_after_an_agent_lost_track_of_a_job_ends_it_too() {
    let Bench { cluster, api, service } = Bench::new().await;
    let world = world();
    let repository = world.repository(&format!("RUN : {}; sleep 600", uuid::Uuid::new_v4()));
    let job = world.job(&repository);
    let id = api.submit(&job).await;
    runs(&cluster, &api, &id, "BUILDING").await;
    forget(&cluster, &id).await;
    drop(service);
    let fresh = Service::start(&cluster.server(), &world.registry, &[]);
    let status = Api::new(&fresh.url).wait_for_end(&id).await;
    assert_eq!(ended_as(&status), ("LOST", "node_lost"), "{status:#}");
    assert_eq!(world.tags(&job).await, [] as [&str; 0]);
}
