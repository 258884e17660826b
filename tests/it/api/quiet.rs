//! A status costs Nomad nothing, and is told while Nomad says nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use futures_util::future::join_all;

use super::proxied_with;
use crate::support::{Api, Fault, Faults, Namespace, Service, eventually, eventually_within, world};

/// The question whether Nomad has ACLs.
const ACLS: &str = "/v1/acl/token/self";

/// What a service asks Nomad for by itself, whether anybody reads or not: what it watches, and its turn to be on duty.
fn is_watched(request: &str) -> bool {
    let path = request.split(['?', ' ']).nth(1).unwrap_or_default();
    let lists = ["jobs", "allocations", "evaluations", "vars", "event/stream"];
    (request.starts_with("GET ") && lists.iter().any(|list| path == format!("/v1/{list}")))
        || path == "/v1/var/nomad-build/reporter"
}

#[tokio::test(flavor = "multi_thread")]
async fn the_status_of_a_known_job_is_read_without_asking_nomad() {
    let (world, namespace) = (world(), Namespace::new());
    let variables = [("NOMAD_BUILD_NAMESPACES", namespace.0.as_str()), ("NOMAD_BUILD_SWEEP", "off")];
    let (counter, service) = proxied_with(&variables).await;
    let api = Api::new(&service.url);
    let repository = world.repository("RUN true");
    let (id, status) = api.run(&world.job(&repository)).await;
    let is_about_acls = |request: &String| request.contains(ACLS);
    let asked_since = |before| counter.since(before).iter().filter(|request| is_about_acls(request)).count();
    let begin = counter.requests();
    eventually("Nomad is asked whether it has ACLs though nobody asks", async || {
        (asked_since(begin) > 1).then_some(())
    })
    .await;
    // Late news of the job may still be read; a service that asks for each status would never be this quiet.
    eventually_within(Duration::from_mins(4), "reads of a status without a question to Nomad", async || {
        let (before, mut reads) = (counter.requests(), 0);
        // Until what was known of the ACLs has run out, and once more.
        while asked_since(before) < 2 {
            assert_eq!(api.status(&id).await["status"], status["status"]);
            reads += 1;
            assert!(reads < 1_000_000, "Nomad is not asked whether it has ACLs");
        }
        assert!(reads > 200, "{reads} reads while that was asked twice");
        let asked = counter.since(before);
        let by_readers: Vec<_> =
            asked.iter().filter(|request| !is_watched(request) && !is_about_acls(request)).collect();
        assert!(asked_since(before) < 4, "{asked:?}");
        by_readers.is_empty().then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn statuses_are_told_at_once_while_nomad_takes_connections_and_answers_nothing() {
    let world = world();
    let front = Faults::before(&world.nomad).await;
    let service = Service::start(&front.url, &world.registry, &[]);
    let api = Api::new(&service.url);
    let repository = world.repository("RUN true");
    let (id, status) = api.run(&world.job(&repository)).await;
    let asked = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&asked);
    front.harm(move |line| {
        counted.fetch_add(usize::from(line.contains(ACLS)), Relaxed);
        Some(Fault::Silent(0))
    });
    // While the first question hangs, and once that is given up.
    for questions in [1, 2] {
        eventually("Nomad is asked whether it has ACLs, and says nothing", async || {
            api.status(&id).await;
            (asked.load(Relaxed) >= questions).then_some(())
        })
        .await;
        let began = Instant::now();
        for told in join_all((0..100).map(|_| api.status(&id))).await {
            assert_eq!(told["status"], status["status"]);
        }
        assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
    }
}
