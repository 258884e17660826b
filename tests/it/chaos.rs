//! Chaos: a load of jobs, while whatever can fail does; then the whole history is held against what is promised.
//!
//! Short runs are part of every test run; `make chaos MINUTES=30 SEED=7` runs for longer, and `make hostile RUNS=1000 SEED=7`
//! does more harm to publishes. The seed repeats the load and the schedule of what fails, though not the machine's own timing.

mod arena;
mod check;
mod history;
mod load;
mod trouble;

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use futures_util::{StreamExt as _, stream};
use serde_json::Value;
use tokio_util::sync::CancellationToken;

use crate::support::agent::wait_for;
use crate::support::{Random, containers_of, docker, images_of, scale, world};
use arena::{Arena, REPLICAS};
use history::{History, Job};
use load::{Harms, Load};
use trouble::Troubles;

/// Since the start.
pub(crate) struct Clock(Instant);

impl Clock {
    fn now(&self) -> u128 {
        self.0.elapsed().as_millis()
    }
}

/// How long jobs are submitted.
#[derive(Clone, Copy)]
enum Most {
    Time(Duration),
    Jobs(usize),
}

/// What a run consists of.
struct Run {
    name: &'static str,
    seed: u64,
    most: Most,
    at_once: usize,
    harms: Harms,
    readers: u64,
    troubles: Troubles,
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_fails_every_history_is_clean() {
    let seconds = scale("NOMAD_BUILD_TEST_CHAOS_SECONDS", 30);
    let seed = scale("NOMAD_BUILD_TEST_CHAOS_SEED", 1) as u64;
    eprintln!("chaos: {seconds} s; again: make chaos MINUTES={} SEED={seed}", seconds.div_ceil(60));
    let run = Run {
        name: "chaos",
        seed,
        most: Most::Time(Duration::from_secs(seconds as u64)),
        at_once: if seconds <= 60 { 2 } else { 4 },
        harms: Harms::Anytime,
        readers: 2,
        troubles: Troubles::All,
    };
    run.is_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_is_done_to_a_job_while_it_publishes_nothing_revoked_and_nothing_foreign_is_published() {
    let jobs = scale("NOMAD_BUILD_TEST_HOSTILE_RUNS", 8);
    let seed = scale("NOMAD_BUILD_TEST_CHAOS_SEED", 1) as u64;
    eprintln!("hostile: {jobs} jobs; again: make hostile RUNS={jobs} SEED={seed}");
    let run = Run {
        name: "hostile",
        seed,
        most: Most::Jobs(jobs),
        at_once: 3,
        harms: Harms::InPublish,
        readers: 4,
        troubles: Troubles::None,
    };
    run.is_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn services_that_are_killed_every_five_seconds_under_twenty_builds_leave_every_history_clean() {
    let jobs = scale("NOMAD_BUILD_TEST_KILLED_SERVICES_JOBS", 20);
    let run = Run {
        name: "services",
        seed: 1,
        most: Most::Jobs(jobs),
        at_once: 20,
        harms: Harms::None,
        readers: 1,
        troubles: Troubles::Replicas,
    };
    run.is_clean().await;
}

impl Run {
    /// Runs, and holds the history against what is promised.
    async fn is_clean(&self) {
        let history = self.history().await;
        let found = check::violations(&history);
        let (name, seed) = (self.name, self.seed);
        eprintln!("{name}: {}, {} violations", summary(&history), found.len());
        if !found.is_empty() {
            let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("target/{name}-{seed}.json"));
            std::fs::write(&path, serde_json::to_vec_pretty(&history).unwrap()).unwrap();
            panic!("with seed {seed}, whose history is in {}:\n{}", path.display(), found.join("\n"));
        }
        assert!(history.shared.is_some(), "nothing was published at all");
    }

    async fn history(&self) -> History {
        let arena = Arena::start().await;
        let clock = Clock(Instant::now());
        let repository = world().repository("ARG ROUND\nARG STATUS\nRUN echo $ROUND; exit $STATUS");
        let image = format!("it/{}-{}", self.name, uuid::Uuid::new_v4().simple());
        let (stop, troubles) = (CancellationToken::new(), Mutex::new(Vec::new()));
        let load = Load {
            arena: &arena,
            clock: &clock,
            repository: &repository,
            image: &image,
            harms: self.harms,
            readers: self.readers,
            troubles: &troubles,
        };
        let goes_on = |number: &usize| match self.most {
            Most::Time(time) => clock.0.elapsed() < time,
            Most::Jobs(jobs) => *number < jobs,
        };
        let of = |number: usize| Random::of(self.seed.wrapping_mul(1_000_003) + number as u64);
        let jobs = stream::iter(0..)
            .take_while(|number| std::future::ready(goes_on(number)))
            .map(|number| load.run(number, of(number)))
            .buffer_unordered(self.at_once);
        let jobs = async {
            let jobs: Vec<_> = jobs.collect().await;
            stop.cancel();
            jobs
        };
        let trouble = trouble::make(self.troubles, &arena, &clock, Random::of(self.seed), &stop, &troubles);
        let (mut jobs, ()) = tokio::join!(jobs, trouble);
        calm(&arena).await;
        let until = Instant::now() + Duration::from_mins(1);
        for job in &mut jobs {
            load.conclude(job, until).await;
        }
        let running = tidy_up(&arena, &jobs).await;
        let shared = load::served(&image, "shared").await;
        let troubles = troubles.into_inner().unwrap();
        for job in &mut jobs {
            // Submitted some seconds before it was first seen, at most.
            let (Some(first), Some(last)) = (job.seen.first(), job.seen.last()) else { continue };
            let lived = first.at.saturating_sub(5000)..=last.at;
            let is_of_its_life =
                |span: RangeInclusive<u128>| span.start() <= lived.end() && span.end() >= lived.start();
            let while_it_lived = |what| trouble::spans(&troubles, what).any(is_of_its_life);
            job.rebooted = while_it_lived(trouble::REBOOT);
            job.away = while_it_lived(trouble::CUT_OFF);
        }
        History { jobs, troubles, shared, running }
    }
}

/// How many jobs ended how, and what was done.
fn summary(history: &History) -> String {
    let count = |of: fn(&Job) -> Vec<String>| {
        let mut counts = BTreeMap::<String, usize>::new();
        history.jobs.iter().flat_map(of).for_each(|what| *counts.entry(what).or_default() += 1);
        let counts = counts.iter().map(|(what, count)| format!("{count} {what}"));
        counts.collect::<Vec<_>>().join(", ")
    };
    let ends = count(|job| {
        vec![job.told.first().map_or("unknown", |(end, _)| end["status"].as_str().unwrap_or("?")).to_owned()]
    });
    let harms = count(|job| job.harms.iter().map(|(_, harm, _)| format!("{harm:?}")).collect());
    let published = history.jobs.iter().filter(|job| job.served.is_some()).count();
    format!(
        "{} jobs ({ends}), {published} of them published; harms: {harms}; {} troubles",
        history.jobs.len(),
        history.troubles.len() / 2
    )
}

/// How long Nomad may run tasks after every job has ended: `finish` archives and removes for minutes, where the engine is slow.
const MOST_BEHIND: Duration = Duration::from_mins(5);

/// Waits until Nomad runs nothing any more, and removes what is left of tasks whose node was away when they were stopped:
/// Nomad (1.11) does not run their last task then. What runs all the same is returned.
async fn tidy_up(arena: &Arena, jobs: &[history::Job]) -> Vec<Value> {
    let runs = |task: &Value| task["State"] == "running";
    let is_over = |allocation: &Value| {
        let ended = matches!(allocation["ClientStatus"].as_str(), Some("complete" | "failed" | "lost"));
        ended && !allocation["TaskStates"].as_object().is_some_and(|tasks| tasks.values().any(runs))
    };
    let until = Instant::now() + MOST_BEHIND;
    let running = wait_for("what Nomad runs", 2 * MOST_BEHIND, async || {
        let all = arena.nomad(reqwest::Method::GET, "/v1/allocations", None).await?;
        let running: Vec<_> = all.as_array()?.iter().filter(|each| !is_over(each)).cloned().collect();
        (running.is_empty() || Instant::now() > until).then_some(running)
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
    running
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
