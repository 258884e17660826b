//! A replica beside many jobs: how long it takes to start there, and to hear of a job's end.
//!
//! On a Nomad that no other service watches, whose nodes do nothing: the jobs are placed and not begun until they are ended.

use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use chrono::Utc;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use nomad_build::job::{Claim, JobId, Outcome, Phase, Reason, Status, Verdict};
use nomad_build::ledger::{Entry, Ledger};
use nomad_build::nomad::{Client, Settings};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, Command};

use crate::cluster::Cluster;
use crate::nomad;
use crate::sample::Sample;
use crate::stack::PROGRAM;
use crate::submit::rendered;

/// How many jobs there are.
pub(crate) const JOBS: usize = 10_000;

/// How many calls are made at once to make them.
const AT_ONCE: usize = 32;

/// How often a replica is started, and how many ends it is to hear of.
const STARTS: usize = 5;
const ENDS: usize = 20;

/// How many Variables a replica reads at once.
const READS: usize = 16;

/// Longer than any replica should take.
const PATIENCE: Duration = Duration::from_mins(2);

/// In milliseconds, but for the memory.
#[derive(Default)]
pub(crate) struct Times {
    /// The lists of jobs and allocations, fetched and thrown away.
    pub(crate) bare: Sample,
    /// From a replica's start until it is ready, beside jobs that wait for their nodes.
    pub(crate) waiting: Sample,
    /// From the start of its first list until that is taken in, of that.
    pub(crate) waiting_listed: Sample,
    /// The claims of all jobs read, as many at once as a replica reads, and thrown away.
    pub(crate) bare_claims: Sample,
    /// From a replica's start until it is ready, beside as many jobs that have been published.
    pub(crate) ended: Sample,
    /// From the start of its first list until that is taken in, of that.
    pub(crate) ended_listed: Sample,
    /// From the claim that ends a job until a replica tells it, while the ledger is empty.
    pub(crate) heard: Sample,
    /// The same where every job has its ledger.
    pub(crate) heard_beside_all: Sample,
    /// What the last replica takes of memory, in MiB.
    pub(crate) memory: Sample,
}

/// Measures on a Nomad of its own.
pub(crate) async fn measure() -> anyhow::Result<Times> {
    let http = reqwest::Client::builder().tls_certs_only([]).no_proxy().build()?;
    let cluster = Cluster::start(&http).await?;
    let times = beside(&cluster, &http).await?;
    cluster.stop().await?;
    Ok(times)
}

async fn beside(cluster: &Cluster, http: &reqwest::Client) -> anyhow::Result<Times> {
    let nomad = cluster.url.as_str();
    let client = Client::new(&Settings::plain(nomad.parse()?))?;
    let mut times = Times::default();
    let ids = register(http, nomad, JOBS + 2 * ENDS).await?;
    cluster.settle().await?;
    ensure!(cluster.allocations().await? == ids.len(), "not all jobs are placed");
    // The last ones, as it is the youngest jobs that end in practice.
    let (jobs, ends) = ids.split_at(JOBS);
    let (before, after) = ends.split_at(ENDS);
    for _ in 0..STARTS {
        times.bare.push_ms(fetch(http, nomad).await?);
        let replica = Replica::start(http, nomad).await?;
        times.waiting.push_ms(replica.took);
        times.waiting_listed.push_ms(replica.listed().await?);
        replica.stop().await?;
    }
    let replica = Replica::start(http, nomad).await?;
    for id in before {
        times.heard.push_ms(replica.hears(&client, id).await?);
    }
    replica.stop().await?;
    stream::iter(jobs).map(Ok).try_for_each_concurrent(AT_ONCE, |id| publish(&client, id)).await?;
    for _ in 0..STARTS {
        times.bare_claims.push_ms(read_claims(&client, jobs).await?);
        let replica = Replica::start(http, nomad).await?;
        times.ended.push_ms(replica.took);
        times.ended_listed.push_ms(replica.listed().await?);
        replica.stop().await?;
    }
    let replica = Replica::start(http, nomad).await?;
    for id in after {
        times.heard_beside_all.push_ms(replica.hears(&client, id).await?);
    }
    times.memory.push(replica.memory()?);
    replica.stop().await?;
    Ok(times)
}

/// Registers jobs as the service does; their IDs, in the order they were made.
async fn register(http: &reqwest::Client, nomad: &str, count: usize) -> anyhow::Result<Vec<JobId>> {
    let submission = json!({
        "owner": "bench", "repo_url": "https://git.example.com/a/b.git", "image_tags": ["ours"],
        "registry_url": "127.0.0.1:1", "test_commands": ["true"],
    });
    let registered = (0..count).map(async |_| {
        let id = JobId::from_uuid(uuid::Uuid::now_v7());
        let job = rendered("127.0.0.1:1", &id, &submission)?;
        nomad::register(http, nomad, &job).await?;
        anyhow::Ok(id)
    });
    stream::iter(registered).buffered(AT_ONCE).try_collect().await
}

/// Ends a job as its runner does that published.
async fn publish(nomad: &Client, id: &JobId) -> anyhow::Result<()> {
    let (allocation, now) = (uuid::Uuid::new_v4().to_string(), Utc::now());
    let digest = format!("sha256:{}", "0".repeat(64));
    let ledger = ledger(nomad);
    ledger.decide(id, None, &Claim::claimed(&allocation, &digest, now)).await?;
    let outcome = Outcome { digest: Some(digest), ..Outcome::begun(&allocation, now).succeeded(now) };
    ledger.record(id, None, Phase::Publish, &outcome).await?;
    Ok(())
}

/// Revokes a job's right to publish, which ends it.
async fn revoke(nomad: &Client, id: &JobId) -> anyhow::Result<()> {
    let verdict = Verdict::new(Status::Killed, None, Reason::Killed, "killed by the bench", Utc::now());
    ledger(nomad).decide(id, None, &Claim::revoked(verdict)).await?;
    Ok(())
}

fn ledger(nomad: &Client) -> Ledger {
    Ledger::new(nomad.clone(), "default", Duration::from_secs(10))
}

/// Fetches what a replica lists, and throws it away.
async fn fetch(http: &reqwest::Client, nomad: &str) -> anyhow::Result<Duration> {
    let began = Instant::now();
    for path in ["jobs?prefix=nb-&meta=true", "allocations?task_states=false"] {
        http.get(format!("{nomad}/v1/{path}")).send().await?.error_for_status()?.bytes().await?;
    }
    Ok(began.elapsed())
}

/// Reads the claims of jobs, and throws them away.
async fn read_claims(nomad: &Client, jobs: &[JobId]) -> anyhow::Result<Duration> {
    let began = Instant::now();
    let read = async |id: &JobId| {
        let claim = nomad.variable("default", &Entry::Claim.path(id)).await?;
        claim.map(drop).with_context(|| format!("{id} has no claim"))
    };
    stream::iter(jobs).map(Ok).try_for_each_concurrent(READS, read).await?;
    Ok(began.elapsed())
}

/// A service of its own process.
struct Replica {
    program: Child,
    url: String,
    http: reqwest::Client,
    /// From its start until it was ready.
    took: Duration,
}

impl Replica {
    async fn start(http: &reqwest::Client, nomad: &str) -> anyhow::Result<Self> {
        let began = Instant::now();
        let mut program = Command::new(PROGRAM)
            .args(["serve", "--while-stdin-open"])
            .env("NOMAD_ADDR", nomad)
            .env("NOMAD_BUILD_LISTEN", "127.0.0.1:0")
            .env("NOMAD_BUILD_LOG", "info")
            .env("NOMAD_BUILD_LOG_FORMAT", "json")
            .env("NOMAD_BUILD_SWEEP", "off")
            .env("NOMAD_BUILD_MAX_RATE", "1000000")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let stderr = program.stderr.take().context("the service has no stderr")?;
        let mut lines = BufReader::new(stderr).lines();
        let address = loop {
            let line = lines.next_line().await?.context("the service ended before it served")?;
            let line: Value = serde_json::from_str(&line).unwrap_or_default();
            if line["fields"]["message"] == "serving" {
                break line["fields"]["address"].as_str().context("it serves nowhere")?.to_owned();
            }
        };
        // Its log is read on, or it would block.
        #[expect(clippy::disallowed_methods, reason = "it ends with the program that it reads")]
        tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
        let url = format!("http://{address}");
        while !http.get(format!("{url}/ready")).send().await?.status().is_success() {
            ensure!(began.elapsed() < PATIENCE, "the replica is not ready within {PATIENCE:?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Ok(Self { program, url, http: http.clone(), took: began.elapsed() })
    }

    /// Ends a job, and waits until this replica says so.
    async fn hears(&self, nomad: &Client, id: &JobId) -> anyhow::Result<Duration> {
        revoke(nomad, id).await?;
        let began = Instant::now();
        loop {
            let answer = self.http.get(format!("{}/jobs/{id}/status", self.url)).send().await?;
            let status: Value = answer.error_for_status()?.json().await?;
            if status["data"]["status"] == "KILLED" {
                return Ok(began.elapsed());
            }
            ensure!(began.elapsed() < PATIENCE, "the end of {id} is not heard of within {PATIENCE:?}");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// How long its first list took, of jobs and allocations, until it was taken in.
    async fn listed(&self) -> anyhow::Result<Duration> {
        let metrics = self.http.get(format!("{}/metrics", self.url)).send().await?.text().await?;
        let name = "nomad_build_watch_list_duration_seconds_sum{part=\"jobs\"}";
        let seconds = metrics.lines().find_map(|line| line.strip_prefix(name)).context("no list")?;
        Ok(Duration::from_secs_f64(seconds.trim().parse()?))
    }

    /// Its resident memory, in MiB.
    fn memory(&self) -> anyhow::Result<f64> {
        let pid = self.program.id().context("the service has ended")?;
        let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = line.and_then(|line| line.split_whitespace().next()).context("no VmRSS")?;
        Ok(kib.parse::<f64>()? / 1024.0)
    }

    async fn stop(mut self) -> anyhow::Result<()> {
        drop(self.program.stdin.take());
        let status = self.program.wait().await?;
        ensure!(status.success(), "the service ended with {status}");
        Ok(())
    }
}
