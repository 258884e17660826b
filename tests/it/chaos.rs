//! Chaos: a load of jobs, while whatever can fail does; then the whole history is held against what is promised.
//!
//! A short run is part of every test run; `make chaos MINUTES=30 SEED=7` runs for longer. The seed repeats the load and the
//! schedule of what fails, though not the machine's own timing.

mod arena;
mod check;
mod history;
mod load;
mod trouble;

use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use futures_util::{StreamExt as _, stream};
use tokio_util::sync::CancellationToken;

use crate::support::agent::wait_for;
use crate::support::{Random, containers_of, docker, eventually, images_of, scale, world};
use arena::{Arena, REPLICAS};
use history::History;
use load::Load;

/// Jobs at once, in a run of a minute and in a longer one.
const AT_ONCE: (usize, usize) = (2, 4);

/// Since the start.
pub(crate) struct Clock(Instant);

impl Clock {
    fn now(&self) -> u128 {
        self.0.elapsed().as_millis()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_fails_every_history_is_clean() {
    let (seconds, seed) =
        (scale("NOMAD_BUILD_TEST_CHAOS_SECONDS", 45), scale("NOMAD_BUILD_TEST_CHAOS_SEED", 1));
    eprintln!(
        "chaos: {seconds} s with seed {seed}; again: make chaos MINUTES={} SEED={seed}",
        seconds.div_ceil(60)
    );
    let arena = Arena::start().await;
    let clock = Clock(Instant::now());
    let repository = world().repository("ARG ROUND\nARG STATUS\nRUN echo $ROUND; exit $STATUS");
    let image = format!("it/chaos-{}", uuid::Uuid::new_v4().simple());
    let load = Load { arena: &arena, clock: &clock, repository: &repository, image: &image };
    let (stop, troubles) = (CancellationToken::new(), Mutex::new(Vec::new()));
    let seed = seed as u64;
    let until = Duration::from_secs(seconds as u64);
    let jobs = stream::iter(0..)
        .take_while(|_| std::future::ready(clock.0.elapsed() < until))
        .map(|number: usize| load.run(number, Random::of(seed.wrapping_mul(1_000_003) + number as u64)))
        .buffer_unordered(if seconds <= 60 { AT_ONCE.0 } else { AT_ONCE.1 });
    let jobs = async {
        let jobs: Vec<_> = jobs.collect().await;
        stop.cancel();
        jobs
    };
    let (mut jobs, ()) =
        tokio::join!(jobs, trouble::make(&arena, &clock, Random::of(seed), &stop, &troubles));
    calm(&arena).await;
    let until = Instant::now() + Duration::from_mins(1);
    for job in &mut jobs {
        load.conclude(job, until).await;
    }
    tidy_up(&arena, &jobs).await;
    let shared = load::served(&image, "shared").await;
    let troubles = troubles.into_inner().unwrap();
    for job in &mut jobs {
        // Submitted some seconds before it was first seen, at most.
        let (Some(first), Some(last)) = (job.seen.first(), job.seen.last()) else { continue };
        let lived = first.at.saturating_sub(5000)..=last.at;
        job.rebooted = trouble::reboots(&troubles).any(|at| lived.contains(&at));
    }
    let history = History { jobs, troubles, shared };
    let found = check::violations(&history);
    eprintln!(
        "chaos: {} jobs, {} troubles, {} violations",
        history.jobs.len(),
        history.troubles.len() / 2,
        found.len()
    );
    if !found.is_empty() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("target/chaos-{seed}.json"));
        std::fs::write(&path, serde_json::to_vec_pretty(&history).unwrap()).unwrap();
        panic!("with seed {seed}, whose history is in {}:\n{}", path.display(), found.join("\n"));
    }
    assert!(history.shared.is_some(), "nothing was published at all");
}

/// Waits until Nomad runs nothing any more, and removes what is left of tasks whose node was away when they were stopped:
/// Nomad (1.11) does not run their last task then.
async fn tidy_up(arena: &Arena, jobs: &[history::Job]) {
    eventually("Nomad runs nothing any more", async || {
        let all = arena.nomad(reqwest::Method::GET, "/v1/allocations", None).await?;
        let runs = |task: &serde_json::Value| task["State"] == "running";
        let is_over = |allocation: &serde_json::Value| {
            let ended = matches!(allocation["ClientStatus"].as_str(), Some("complete" | "failed" | "lost"));
            ended && !allocation["TaskStates"].as_object().is_some_and(|tasks| tasks.values().any(runs))
        };
        all.as_array()?.iter().all(is_over).then_some(())
    })
    .await;
    for job in jobs.iter().filter(|job| !job.harms.is_empty()) {
        for container in containers_of(&job.id) {
            docker(&["rm", "--force", &container]);
        }
        for image in images_of(&job.id).iter().filter(|image| !image.contains('<')) {
            docker(&["rmi", "--force", image]);
        }
    }
}

/// Waits until every replica is well.
async fn calm(arena: &Arena) {
    for number in 0..REPLICAS {
        arena.revive(number);
        wait_for("replica that is ready", Duration::from_mins(5), async || {
            let (url, _) = arena.address(number)?;
            let (status, _) =
                crate::support::Api::new(&url).try_call(reqwest::Method::GET, "/ready", None).await?;
            status.is_success().then_some(())
        })
        .await;
    }
}
