//! Nomad's leader is killed, again and again, while jobs are submitted: none is lost, and none is made twice.

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use futures_util::{StreamExt as _, stream};
use reqwest::Method;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use crate::support::{
    Api, Cluster, Nomad, Service, containers_of, eventually, image_of, numbered, registering_only, scale,
    world,
};

/// Submits without a pause until it is stopped; the jobs that were acknowledged, with their numbers.
async fn submit(api: &Api, owner: &str, stop: &CancellationToken, told: &Mutex<HashMap<String, usize>>) {
    let submissions = stream::iter(0..).take_until(stop.cancelled()).for_each_concurrent(8, async |number| {
        let id = api.submit_keyed(&format!("{owner}-{number}"), &numbered(owner, number)).await;
        told.lock().unwrap().insert(id, number);
    });
    submissions.await;
}

/// What becomes of a leader.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// It is killed, and started again.
    Killed,
    /// It hangs, and goes on.
    Hangs,
    /// It reaches nobody and takes itself for the leader still, and is reached again.
    CutOff,
}

impl End {
    fn begins(self, cluster: &Cluster, leader: usize) {
        match self {
            Self::Killed => cluster.kill(leader),
            Self::Hangs => cluster.halt(leader, true),
            Self::CutOff => cluster.cut_off(leader, true),
        }
    }

    async fn is_over(self, cluster: &Cluster, leader: usize) {
        match self {
            Self::Killed => cluster.restart(leader).await,
            Self::Hangs => {
                cluster.halt(leader, false);
                cluster.is_back(leader).await;
            }
            Self::CutOff => cluster.cut_off(leader, false),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn leaders_that_are_killed_during_submits_lose_no_job_and_double_none() {
    let kills = scale("NOMAD_BUILD_TEST_LEADER_KILLS", 2);
    let ends = std::iter::repeat_n(End::Killed, kills).chain([End::Hangs, End::CutOff]);
    let cluster = Cluster::start().await;
    // What counts is what is registered.
    let nomad = registering_only(&cluster.url).await;
    let services = [0, 1].map(|_| Service::start(&nomad, "127.0.0.1:1", &[]));
    let [submits, reads] = [0, 1].map(|number: usize| Api::new(&services[number].url));
    let (stop, told) = (CancellationToken::new(), Mutex::new(HashMap::<String, usize>::new()));
    let mut current = Vec::new();
    let ending = async {
        for end in ends {
            let count = || told.lock().unwrap().len();
            let before = count();
            eventually("jobs are submitted", async || (count() > before + 20).then_some(())).await;
            let known = told.lock().unwrap().keys().next().unwrap().clone();
            // What a replica knows by itself: nobody asks it for the others.
            let live =
                async || reads.status(&known).await["metrics"]["concurrent_jobs_total"].as_i64().unwrap();
            let leader = cluster.leader(None).await;
            end.begins(&cluster, leader);
            cluster.leader(Some(leader)).await;
            let (elected, then) = (Instant::now(), live().await);
            if end == End::Hangs {
                // Nomad's client goes on asking it until its keepalive fails, after half a minute and more.
                end.is_over(&cluster, leader).await;
            }
            eventually("the other replica hears of new jobs", async || (live().await > then).then_some(()))
                .await;
            current.push(elected.elapsed());
            if end != End::Hangs {
                end.is_over(&cluster, leader).await;
            }
        }
        stop.cancel();
    };
    tokio::join!(ending, submit(&submits, "leaders", &stop, &told));
    let made = Nomad::new(&cluster.server_of(cluster.leader(None).await)).made_by("leaders").await;
    assert!(made.values().all(|ids| ids.len() == 1), "made twice: {made:?}");
    let told = told.into_inner().unwrap();
    for (id, number) in &told {
        assert_eq!(made.get(&format!("refs/heads/{number}")), Some(&vec![id.clone()]), "{id} is lost");
    }
    current.sort();
    let median = current.get(current.len() / 2).copied().unwrap_or(Duration::ZERO);
    eprintln!(
        "{kills} leaders killed, one halted and one cut off, {} jobs told, {} made; current again {median:?} after a new \
         leader (median)",
        told.len(),
        made.len()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_leader_a_service_tells_what_it_knows_and_how_old_it_is() {
    let cluster = Cluster::start().await;
    let nomad = registering_only(&cluster.url).await;
    let service = Service::start(&nomad, "127.0.0.1:1", &[]);
    let api = Api::new(&service.url);
    let id = api.submit(&numbered("leaders", 0)).await;
    let leader = cluster.leader(None).await;
    let other = cluster.kill_majority(leader);
    let killed = chrono::Utc::now();
    let ready = async || api.call(Method::GET, "/ready", None).await.0.as_u16();
    eventually("the service is not ready", async || (ready().await == 503).then_some(())).await;
    let as_of = |status: &Value| {
        chrono::DateTime::parse_from_rfc3339(status["as_of"].as_str().unwrap()).unwrap().to_utc()
    };
    eventually("the age of what is told", async || {
        let age =
            reqwest::get(format!("{}/jobs/{id}/status", api.url)).await.unwrap().headers()["age"].clone();
        age.to_str().unwrap().parse::<u64>().unwrap().ge(&2).then_some(())
    })
    .await;
    let known = api.status(&id).await;
    assert_eq!(known["status"], "PENDING", "{known:#}");
    assert!(as_of(&known) < killed, "{known:#}");
    for server in [leader, other] {
        cluster.start_again(server);
    }
    eventually("the service is ready", async || (ready().await == 200).then_some(())).await;
    api.wait_until(&id, "current again", |status| as_of(status) > killed).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_whose_phase_ends_without_a_leader_ends_as_it_would_have() {
    let cluster = Cluster::start().await;
    let service = Service::start(&cluster.url, &world().registry, &[]);
    let api = Api::new(&service.url);
    let repository = world().repository("");
    let mut job = world().job(&repository);
    job["test_commands"] = json!(["sleep 2"]);
    let id = api.submit(&job).await;
    eventually("the test runs", async || (!containers_of(&id).is_empty()).then_some(())).await;
    let leader = cluster.leader(None).await;
    let other = cluster.kill_majority(leader);
    // Then its runner has something to tell.
    eventually("the test has ended", async || containers_of(&id).is_empty().then_some(())).await;
    for server in [leader, other] {
        cluster.start_again(server);
    }
    let status = api.wait_for_end(&id).await;
    assert_eq!(status["status"], "SUCCEEDED", "{status:#}");
    assert_eq!(world().served(image_of(&job), "one").await.as_deref(), status["image"]["digest"].as_str());
}
