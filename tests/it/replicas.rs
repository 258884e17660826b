//! Several services, and services that die: a job does not notice.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes, to_bytes};
use axum::extract::Request;
use axum::http::response::Parts;
use axum::response::Response;
use futures_util::StreamExt as _;
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Message;
use uuid::Uuid;

use crate::follow::{lines, read_all};
use crate::support::{
    Api, At, Front, Hold, Instead, Namespace, PHASES, Service, Upstream, eventually, image_of, nomad_front,
    serve, world,
};

/// A status without what other jobs, or the replica's last look at Nomad, change.
pub(crate) fn alone(mut status: Value) -> Value {
    status["as_of"].take();
    status["metrics"]["concurrent_jobs_total"].take();
    status
}

/// The lines of a log as a stream tells them, with whatever it says of each.
fn told(messages: &[Value]) -> Vec<&Value> {
    messages.iter().filter(|message| ["log", "gap"].contains(&message["type"].as_str().unwrap())).collect()
}

/// The latest jobs of an owner, as a replica lists them.
async fn listed(api: &Api, owner: &str) -> Value {
    api.get(&format!("/jobs?owner={owner}")).await["jobs"].clone()
}

/// A command that writes numbered lines.
fn counting(from: u32, to: u32) -> String {
    format!("i={from}; while [ $i -le {to} ]; do echo \"line $i\"; i=$((i+1)); done")
}

fn numbered(to: u32) -> Vec<String> {
    (1..=to).map(|number| format!("line {number}")).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_submitted_to_one_replica_is_known_to_the_other_at_once_and_told_alike() {
    let world = world();
    let other = Service::start(&world.nomad, &world.registry, &[]);
    let (one, other) = (world.api(), Api::new(&other.url));
    let repository = world.repository("RUN true");
    for (submitted_to, asked) in [(&one, &other), (&other, &one)] {
        let owner = format!("it-{}", Uuid::new_v4().simple());
        let mut job = world.job(&repository);
        job["test_commands"] = json!([counting(1, 100)]);
        job["owner"] = json!(owner);
        let id = submitted_to.submit(&job).await;
        let (first, second) = (asked.status(&id).await, submitted_to.status(&id).await);
        let start = |status: &Value| status["phase_timestamps"]["job_start"].clone();
        assert!(start(&first).is_string() && start(&first) == start(&second), "{first:#} {second:#}");
        let (followed, elsewhere) =
            tokio::join!(read_all(&submitted_to.url, &id, ""), read_all(&asked.url, &id, ""));
        submitted_to.wait_for_end(&id).await;
        let last = asked.wait_for_end(&id).await;
        assert_eq!(last["status"], "SUCCEEDED", "{last:#}");
        eventually("two replicas that say the same", async || {
            let statuses = alone(asked.status(&id).await) == alone(submitted_to.status(&id).await);
            let lists = listed(asked, &owner).await == listed(submitted_to, &owner).await;
            (statuses && lists).then_some(())
        })
        .await;
        assert_eq!(listed(asked, &owner).await.as_array().unwrap().len(), 1);
        assert_eq!(told(&followed), told(&elsewhere));
        let later = read_all(&asked.url, &id, "").await;
        assert_eq!(told(&followed), told(&later));
        let whole = asked.logs(&id).await;
        assert_eq!(whole, submitted_to.logs(&id).await);
        for phase in PHASES {
            assert_eq!(whole[phase].as_str().unwrap().lines().collect::<Vec<_>>(), lines(&followed, phase));
        }
        let printed = lines(&followed, "test").into_iter().filter(|line| line.starts_with("line "));
        assert_eq!(printed.collect::<Vec<_>>(), numbered(100));
    }
}

/// Reads a job's log to its end, wherever the service is meanwhile, behind the last message that came.
async fn read_through(url: &Mutex<String>, id: &str, seen: &Mutex<Vec<Value>>) {
    let mut query = String::new();
    loop {
        let address = url.lock().unwrap().replacen("http", "ws", 1);
        let opened =
            tokio_tungstenite::connect_async(format!("{address}/jobs/{id}/logs/stream{query}")).await;
        let Ok((mut socket, _)) = opened else {
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        while let Some(Ok(frame)) = socket.next().await {
            let Message::Text(text) = frame else { continue };
            let message: Value = serde_json::from_str(&text).unwrap();
            if let Some(cursor) = message["cursor"].as_str() {
                query = format!("?cursor={cursor}");
            }
            let is_last = message["type"] == "end";
            seen.lock().unwrap().push(message);
            if is_last {
                return;
            }
        }
    }
}

/// What is told of a job that must not change when the service is killed.
fn stays(status: &Value) -> [&Value; 3] {
    ["status", "phase_timestamps", "placement"].map(|name| &status[name])
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_that_is_killed_in_every_phase_tells_the_job_as_if_nothing_had_happened() {
    let world = world();
    let front = Front::holding(&world.registry, At::Manifest).await;
    let registries = format!("{},{}", world.registry, front.host);
    let mut service = Service::start(&world.nomad, &registries, &[]);
    let (url, seen) = (Mutex::new(service.url.clone()), Mutex::default());
    let holds = [Hold::new(), Hold::new()];
    let repository = world.repository(&format!("RUN echo begun; {}; echo done", holds[0].command()));
    let mut job = world.job_by(&front, &repository);
    job["test_commands"] =
        json!([format!("{}; {}; {}", counting(1, 50), holds[1].command(), counting(51, 100))]);
    let id = Api::new(&service.url).submit(&job).await;
    // One that no node can take waits all the time.
    let mut waiting = world.job(&repository);
    waiting["resources"] = json!({"build": {"cpu": 60_000}});
    let waiting = Api::new(&service.url).submit(&waiting).await;
    let waits = |status: &Value| status["placement"].is_string();
    let placeless = Api::new(&service.url).wait_until(&waiting, "a job without a place", waits).await;
    let works = async {
        for (phase, of, hold) in [
            ("BUILDING", "build", Some(&holds[0])),
            ("TESTING", "test", Some(&holds[1])),
            ("PUBLISHING", "publish", None),
        ] {
            let before =
                Api::new(&service.url).wait_until(&id, phase, |status| status["status"] == phase).await;
            eventually("a line of the phase", async || {
                let seen: std::sync::MutexGuard<'_, Vec<Value>> = seen.lock().unwrap();
                seen.iter().any(|message| message["type"] == "log" && message["phase"] == of).then_some(())
            })
            .await;
            service.kill();
            service = Service::start(&world.nomad, &registries, &[]);
            url.lock().unwrap().clone_from(&service.url);
            let after = Api::new(&service.url).status(&id).await;
            assert_eq!(after["status"], phase, "{after:#}");
            for (name, time) in before["phase_timestamps"].as_object().unwrap() {
                assert_eq!(&after["phase_timestamps"][name], time, "{name} in {phase}");
            }
            // While Nomad looks for a place anew, as it does whenever a task ends, it does not say why there is none.
            let says = |status: &Value| stays(status) == stays(&placeless);
            Api::new(&service.url).wait_until(&waiting, "a job without a place, as before", says).await;
            if let Some(hold) = hold {
                hold.let_go().await;
            }
        }
        front.let_go();
    };
    tokio::join!(works, read_through(&url, &id, &seen));
    let api = Api::new(&service.url);
    let last = api.wait_for_end(&id).await;
    assert_eq!(last["status"], "SUCCEEDED", "{last:#}");
    assert_eq!(world.served(image_of(&job), "one").await.as_deref(), last["image"]["digest"].as_str());
    is_whole(&api, &id, &seen.into_inner().unwrap()).await;
    api.post(&format!("/jobs/{waiting}/kill")).await;
    assert_eq!(api.wait_for_end(&waiting).await["status"], "KILLED");
    // The replica that lived through it all says the same.
    for id in [&id, &waiting] {
        world.api().wait_for_end(id).await;
        eventually("the replica that lived says the same", async || {
            (alone(world.api().status(id).await) == alone(api.status(id).await)).then_some(())
        })
        .await;
    }
}

/// Holds what one reader was told against what was written, and what is there.
async fn is_whole(api: &Api, id: &str, seen: &[Value]) {
    assert!(seen.iter().all(|message| message["type"] != "gap"), "{seen:#?}");
    let whole = api.logs(id).await;
    for phase in PHASES {
        let there: Vec<_> = whole[phase].as_str().unwrap().lines().collect();
        assert_eq!(lines(seen, phase), there, "{phase}");
    }
    let printed = lines(seen, "test").into_iter().filter(|line| line.starts_with("line "));
    assert_eq!(printed.collect::<Vec<_>>(), numbered(100));
    let cursors: Vec<_> = seen.iter().filter_map(|message| message["cursor"].as_str()).collect();
    let different = cursors.iter().collect::<std::collections::BTreeSet<_>>();
    assert_eq!(cursors.len(), different.len(), "{cursors:?}");
    assert!(different.len() > 100, "{different:?}");
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
