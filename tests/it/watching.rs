//! What a service knows of Nomad: whatever becomes of the event stream, a list makes up for it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::support::{Api, Fault, Faults, Service, eventually, world};

fn is_stream(line: &str) -> bool {
    line.starts_with("GET /v1/event/stream?")
}

/// Waits for the allocation of a job that has ended, which only jobs' events and lists tell.
async fn is_placed(api: &Api, id: &str) -> Value {
    let ended = Instant::now();
    let status = eventually("the allocation is known", async || {
        Some(api.status(id).await).filter(|status| status["nomad"]["allocation"].is_string())
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
    let status = is_placed(&deaf, &id).await;
    assert_eq!(status["nomad"], world.api().status(&id).await["nomad"]);
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
    is_placed(&api, &id).await;
}
