//! What a service knows of Nomad: whatever becomes of the event stream, a list makes up for it.

use crate::support::{Api, Fault, Faults, Service, eventually, world};

#[tokio::test(flavor = "multi_thread")]
async fn what_a_silent_stream_loses_is_listed_within_a_minute() {
    let world = world();
    let lossy = Faults::before(&world.nomad).await;
    // Nothing ever comes: neither an event nor an end.
    lossy.harm(|line| line.starts_with("GET /v1/event/stream?").then_some(Fault::HalfOpen));
    let service = Service::start(&lossy.url, &world.registry, &[]);
    let deaf = Api::new(&service.url);
    let repository = world.repository("");
    let id = deaf.submit(&world.job(&repository)).await;
    // Variables have no events: the end is known by their blocking query.
    assert_eq!(deaf.wait_for_end(&id).await["status"], "SUCCEEDED");
    let ended = std::time::Instant::now();
    let status = eventually("the allocation is listed", async || {
        Some(deaf.status(&id).await).filter(|status| status["nomad"]["allocation"].is_string())
    })
    .await;
    assert!(ended.elapsed() < std::time::Duration::from_mins(1), "{:?}", ended.elapsed());
    assert_eq!(status["nomad"], world.api().status(&id).await["nomad"]);
}
