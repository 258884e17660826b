//! From the request to the published image: by hand, as a hand-written Nomad job, by the service; in turn.

use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use chrono::{DateTime, Utc};
use serde_json::Value;
use tokio::process::Command;

use crate::sample::Sample;
use crate::stack::{Stack, said};
use crate::{bare_job, nomad};

/// How often a status is asked for.
const POLL: Duration = Duration::from_millis(5);

/// One way through Nomad.
#[derive(Default)]
pub(crate) struct Ends {
    /// Until the image is published, and that is told.
    pub(crate) published: Sample,
    /// Until Nomad says that the allocation is complete: what was left behind is removed too.
    pub(crate) over: Sample,
}

/// All ways, in milliseconds.
pub(crate) struct Times {
    pub(crate) bare: Sample,
    pub(crate) job_by_hand: Ends,
    pub(crate) ours: Ends,
    /// Where the service's time went.
    pub(crate) phases: Vec<(&'static str, Sample)>,
    /// The last job, which has succeeded.
    pub(crate) job: String,
}

/// Measures every way `rounds` times, after one round that fills caches.
pub(crate) async fn measure(stack: &Stack, rounds: usize) -> anyhow::Result<Times> {
    let mut times = Times {
        bare: Sample::default(),
        job_by_hand: Ends::default(),
        ours: Ends::default(),
        phases: SPANS.map(|(name, ..)| (name, Sample::default())).into(),
        job: String::new(),
    };
    for round in 0..=rounds {
        let bare = by_hand(stack).await.context("by hand")?;
        let by_hand = by_job(stack, round).await.context("by a hand-written job")?;
        let ours = by_service(stack).await.context("by nomad-build")?;
        ours.status["job_id"].as_str().unwrap_or_default().clone_into(&mut times.job);
        if round == 0 {
            continue;
        }
        times.bare.push_ms(bare);
        times.job_by_hand.published.push_ms(by_hand.published);
        times.job_by_hand.over.push_ms(by_hand.over);
        times.ours.published.push_ms(ours.run.published);
        times.ours.over.push_ms(ours.run.over);
        for ((_, sample), (_, from, to)) in times.phases.iter_mut().zip(SPANS) {
            sample.push_ms(span(&ours.status, from, to)?);
        }
    }
    Ok(times)
}

/// What lies between two times of a status.
const SPANS: [(&str, &str, &str); 5] = [
    ("until the build begins: register, place, start", "job_start", "build_start"),
    ("build", "build_start", "build_end"),
    ("until the first test begins", "build_end", "test_start"),
    ("test", "test_start", "test_end"),
    ("publish, from the end of the tests", "test_end", "publish_end"),
];

fn span(status: &Value, from: &str, to: &str) -> anyhow::Result<Duration> {
    let times = &status["phase_timestamps"];
    let time = |name: &str| -> anyhow::Result<DateTime<Utc>> {
        let text = times[name].as_str().with_context(|| format!("the status has no {name}"))?;
        Ok(DateTime::parse_from_rfc3339(text)?.to_utc())
    };
    Ok((time(to)? - time(from)?).to_std().unwrap_or_default())
}

struct Run {
    published: Duration,
    over: Duration,
}

async fn by_hand(stack: &Stack) -> anyhow::Result<Duration> {
    let folder = tempfile::tempdir()?;
    let image = format!("{}/bench/bare:bare", stack.registry);
    let mut script = Command::new("/bin/sh");
    script.args(["-eu", "-c", bare_job::BY_HAND]).envs([
        ("REPOSITORY", stack.repository_url()),
        ("FOLDER", folder.path().join("checkout").display().to_string()),
        ("IMAGE", image.clone()),
        ("DOCKER_BUILDKIT", "1".to_owned()),
    ]);
    let began = Instant::now();
    said(&mut script).await?;
    let took = began.elapsed();
    said(Command::new("docker").args(["rmi", &image])).await?;
    Ok(took)
}

async fn by_job(stack: &Stack, round: usize) -> anyhow::Result<Run> {
    let id = format!("bench-{round}");
    let job = bare_job::job(stack, &id, &format!("{}/bench/job:job", stack.registry));
    let (began, began_at) = (Instant::now(), Utc::now());
    nomad::register(&stack.http, &stack.nomad, &job).await?;
    let allocation = nomad::ended_allocation(stack, &id).await?;
    let over = began.elapsed();
    let published = (nomad::finished_at(&allocation, "publish")? - began_at).to_std()?;
    Ok(Run { published, over })
}

struct Ours {
    run: Run,
    status: Value,
}

async fn by_service(stack: &Stack) -> anyhow::Result<Ours> {
    let submission = stack.submission();
    let began = Instant::now();
    let id = stack.submit(&submission).await?;
    let over = async {
        nomad::ended_allocation(stack, &id).await?;
        anyhow::Ok(began.elapsed())
    };
    let (ended, over) = tokio::try_join!(final_status(stack, &id, began), over)?;
    let (published, status) = ended;
    Ok(Ours { run: Run { published, over }, status })
}

async fn final_status(stack: &Stack, id: &str, began: Instant) -> anyhow::Result<(Duration, Value)> {
    let url = format!("{}/jobs/{id}/status", stack.api);
    loop {
        let answer: Value = stack.http.get(&url).send().await?.json().await?;
        let status = &answer["data"];
        match status["status"].as_str() {
            Some("SUCCEEDED") => return Ok((began.elapsed(), status.clone())),
            Some("PENDING" | "BUILDING" | "TESTING" | "PUBLISHING") => tokio::time::sleep(POLL).await,
            _ => bail!("the job did not succeed: {answer}"),
        }
    }
}
