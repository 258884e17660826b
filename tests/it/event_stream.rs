//! What a service knows of Nomad: whatever becomes of the event stream, a list makes up for it.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use reqwest::Method;
use serde_json::{Value, json};

use crate::support::agent::Agent;
use crate::support::{
    Api, Fault, Faults, Instead, Passes, Random, Service, Sleeper, eventually, lossy, nomad_front, scale,
    world,
};

fn is_stream(line: &str) -> bool {
    line.starts_with("GET /v1/event/stream?")
}

/// Waits until a part of where a job ran is known that has ended: its node, which only allocations' events and lists tell, or its
/// allocation, which its ledger tells, too.
async fn is_told(api: &Api, id: &str, part: &str) -> Value {
    let ended = Instant::now();
    let status = eventually(part, async || {
        Some(api.status(id).await).filter(|status| status["nomad"][part].is_string())
    })
    .await;
    assert!(ended.elapsed() < Duration::from_mins(1), "{:?}", ended.elapsed());
    status
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_stream_that_never_begins_loses_is_listed_within_a_minute() {
    let world = world();
    let lossy = Faults::before(&world.nomad).await;
    // Nothing ever comes: neither an event nor an end.
    lossy.harm(|line| is_stream(line).then_some(Fault::Silent(0)));
    let service = Service::start(&lossy.url, &world.registry, &[]);
    let deaf = Api::new(&service.url);
    let repository = world.repository("");
    let id = deaf.submit(&world.job(&repository)).await;
    // Variables have no events: the end is known by their blocking query.
    assert_eq!(deaf.wait_for_end(&id).await["status"], "SUCCEEDED");
    let status = is_told(&deaf, &id, "node").await;
    assert_eq!(status["nomad"], world.api().status(&id).await["nomad"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_breaks_whenever_it_begins_holds_no_list_up() {
    let world = world();
    let repository = world.repository("");
    let job = world.job(&repository);
    let (first, _) = world.api().run(&job).await;
    // Nomad begins with what happened last. One line of it arrives.
    let mut passes = [Passes::On, Passes::Cut].into_iter().cycle();
    let front = lossy(&world.nomad, move || passes.next().unwrap()).await;
    let late = Faults::before(&front).await;
    late.harm(|line| line.starts_with("GET /v1/jobs?").then_some(Fault::Delay(Duration::from_millis(500))));
    let service = Service::start_unready(&late.url, &world.registry, &[]);
    eventually("lists", async || service.lists().await.filter(|lists| *lists > 2)).await;
    assert!(service.metric("nomad_build_watch_reconnects_total{part=\"jobs\"}").await > Some(1));
    let (second, _) = world.api().run(&job).await;
    let api = Api::new(&service.url);
    for id in [first, second] {
        // Its node is what only a list tells.
        let status = api.wait_until(&id, "its node", |status| status["nomad"]["node"].is_string()).await;
        assert_eq!(status["nomad"], world.api().status(&id).await["nomad"]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn why_a_job_waits_is_known_though_the_stream_loses_it() {
    let world = world();
    let deaf = lossy(&world.nomad, || Passes::Lost).await;
    let service = Service::start(&deaf, &world.registry, &[]);
    let api = Api::new(&service.url);
    let repository = world.repository("");
    let mut job = world.job(&repository);
    job["resources"] = json!({"build": {"memory_mb": 131_072}});
    let id = api.submit(&job).await;
    let waits = |status: &Value| status["placement"].is_string();
    let status = api.wait_until(&id, "why it waits", waits).await;
    assert!(status["placement"].as_str().unwrap().contains("memory"), "{status:#}");
    assert_eq!(api.post(&format!("/jobs/{id}/kill")).await, json!({"success": true}));
}

#[tokio::test(flavor = "multi_thread")]
async fn where_a_job_ran_that_was_purged_is_known_though_the_stream_loses_it() {
    let world = world();
    let cuts = Arc::new(AtomicBool::new(false));
    let is_due = Arc::clone(&cuts);
    let plan = move || if is_due.swap(false, Ordering::Relaxed) { Passes::Cut } else { Passes::Lost };
    let service = Service::start(&lossy(&world.nomad, plan).await, &world.registry, &[]);
    let api = Api::new(&service.url);
    let sleeper = Sleeper::in_phase("build");
    let id = sleeper.submit(&api).await;
    let purge = format!("/v1/job/{id}?purge=true");
    assert!(Api::new(&world.nomad).call(Method::DELETE, &purge, None).await.0.is_success());
    // Everything is listed again, where there is nothing of it any more: only its ledger tells.
    cuts.store(true, Ordering::Relaxed);
    assert_eq!(api.wait_for_end(&id).await["status"], "KILLED");
    is_told(&api, &id, "allocation").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_variable_that_nomad_never_gives_keeps_no_other_from_being_heard_of() {
    let world = world();
    let repository = world.repository("");
    let job = world.job(&repository);
    let (bad, _) = world.api().run(&job).await;
    let path = format!("/v1/var/nomad-build/outcomes/{bad}");
    let nomad = nomad_front(&world.nomad, move |_, asked| (asked == path).then_some(Instead::Refusal)).await;
    let service = Service::start_unready(&nomad, &world.registry, &[]);
    let api = Api::new(&service.url);
    eventually("the service is ready", async || {
        api.call(Method::GET, "/ready", None).await.0.is_success().then_some(())
    })
    .await;
    let (id, status) = api.run(&job).await;
    assert_eq!(status["status"], "SUCCEEDED", "{status:#}");
    assert_eq!(world.api().wait_for_end(&id).await["image"], status["image"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_falls_silent_is_opened_anew() {
    let world = world();
    let lossy = Faults::before(&world.nomad).await;
    let streams = Arc::new(AtomicUsize::new(0));
    let opened = Arc::clone(&streams);
    // The first one begins, and then says nothing more.
    lossy.harm(move |line| {
        let first = is_stream(line) && opened.fetch_add(1, Ordering::Relaxed) == 0;
        first.then_some(Fault::Silent(100))
    });
    let service = Service::start(&lossy.url, &world.registry, &[]);
    eventually("another stream", async || (streams.load(Ordering::Relaxed) > 1).then_some(())).await;
    let api = Api::new(&service.url);
    let repository = world.repository("");
    let id = api.submit(&world.job(&repository)).await;
    assert_eq!(api.wait_for_end(&id).await["status"], "SUCCEEDED");
    is_told(&api, &id, "node").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_has_not_read_the_ledger_yet_ends_no_job() {
    let (world, api) = (world(), world().api());
    let repository = world.repository("");
    let mut job = world.job(&repository);
    job["resources"] = json!({"build": {"memory_mb": 131_072}});
    let id = api.submit(&job).await;
    // From now on it is a job that somebody stopped, and only its ledger says that it has ended.
    assert_eq!(api.post(&format!("/jobs/{id}/kill")).await, json!({"success": true}));
    let (attempts, asked) = (Arc::new(AtomicUsize::new(0)), Arc::new(Mutex::new(Vec::new())));
    let (counted, noted, of_job) = (Arc::clone(&attempts), Arc::clone(&asked), id.clone());
    let nomad = nomad_front(&world.nomad, move |method, path| {
        if path.contains(&of_job) {
            noted.lock().unwrap().push(format!("{method} {path}"));
        }
        (path == "/v1/vars").then(|| {
            counted.fetch_add(1, Ordering::Relaxed);
            Instead::Refusal
        })
    });
    let _service = Service::start_unready(&nomad.await, &world.registry, &[]);
    eventually("attempts to read the ledger", async || (attempts.load(Ordering::Relaxed) > 4).then_some(()))
        .await;
    assert_eq!(*asked.lock().unwrap(), [] as [String; 0]);
}

/// What a status says of a job, whoever tells it; of one that Nomad has forgotten nobody knows the node any more.
fn of_the_job(status: &Value, forgotten: bool) -> Value {
    let fields = ["status", "phase", "failure", "image", "phase_timestamps", "git", "placement", "nomad"];
    let told = fields.iter().filter(|field| !forgotten || **field != "nomad");
    told.map(|field| (*field, status[*field].clone())).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_the_stream_loses_every_record_becomes_that_of_a_fresh_list_within_a_minute() {
    let rounds = scale("NOMAD_BUILD_TEST_LOSSES", 1);
    let agent = Agent::shared().await;
    let nomad = format!("http://{}", agent.address());
    let mut random = Random::of(3);
    // Most events are lost, and where the stream is cut it resumes behind some that nobody hears of.
    let plan = move || match random.below(20) {
        0 => Passes::Cut,
        1..=4 => Passes::On,
        _ => Passes::Lost,
    };
    let front = lossy(&nomad, plan).await;
    // Nobody else is there who could end a job.
    let deaf = Service::start(&front, &world().registry, &[]);
    let (api, direct) = (Api::new(&deaf.url), Api::new(&nomad));
    let (mut waits, mut ids) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        let sleepers = [(); 3].map(|()| Sleeper::in_phase("test"));
        let [stopped, purged, killed] =
            [sleepers[0].submit(&api).await, sleepers[1].submit(&api).await, sleepers[2].submit(&api).await];
        let repositories = ["", "RUN exit 1"].map(|lines| world().repository(lines));
        let submit = async |number: usize| api.submit(&world().job(&repositories[number])).await;
        let (succeeds, fails) = tokio::join!(submit(0), submit(1));
        let by_hand = async |id: &str, query: &str| {
            let path = format!("/v1/job/{id}{query}");
            assert!(direct.call(Method::DELETE, &path, None).await.0.is_success());
        };
        by_hand(&stopped, "").await;
        by_hand(&purged, "?purge=true").await;
        assert_eq!(api.post(&format!("/jobs/{killed}/kill")).await, json!({"success": true}));
        let wanted = [
            (stopped, "KILLED", false),
            (purged, "KILLED", true),
            (killed, "KILLED", false),
            (succeeds, "SUCCEEDED", false),
            (fails, "FAILED", false),
        ];
        let settled = wanted.iter().map(async |(id, end, forgotten)| {
            // Nomad is done with the job: from now on it is a matter of hearing of it.
            eventually("nothing runs any more", async || {
                let path = format!("/v1/job/{id}/allocations?all=true");
                let allocations = direct.call(Method::GET, &path, None).await.1;
                let over = |a: &Value| matches!(a["ClientStatus"].as_str(), Some("complete" | "failed"));
                allocations.as_array().is_some_and(|all| all.iter().all(over)).then_some(())
            })
            .await;
            let over = Instant::now();
            let status = api.wait_for_end(id).await;
            assert_eq!(status["status"], *end, "{status:#}");
            if !forgotten {
                is_told(&api, id, "node").await;
            }
            over.elapsed()
        });
        waits.extend(join_all(settled).await);
        ids.extend(wanted.map(|(id, _, forgotten)| (id, forgotten)));
    }
    let fresh = Service::start(&nomad, &world().registry, &[]);
    let began = Instant::now();
    for (id, forgotten) in &ids {
        let truth = of_the_job(&Api::new(&fresh.url).wait_for_end(id).await, *forgotten);
        eventually("the record of a fresh list", async || {
            (of_the_job(&api.status(id).await, *forgotten) == truth).then_some(())
        })
        .await;
    }
    waits.push(began.elapsed());
    waits.sort();
    assert!(waits.last() < Some(&Duration::from_mins(1)), "{waits:?}");
    eprintln!(
        "{} jobs behind a stream that loses events: known {:?} after their end (median)",
        ids.len(),
        waits[waits.len() / 2]
    );
}
