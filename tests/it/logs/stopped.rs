//! What a task says that is told to stop: it comes after the job's end.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use chrono::TimeDelta;
use futures_util::StreamExt as _;
use futures_util::future::join_all;
use nomad_build::archive::{self, Archive};
use nomad_build::environment::Reader;
use nomad_build::job::{Phase, Status};
use nomad_build::nomad::{Allocation, Origin};
use nomad_build::service::logs::{EndReason, Hub, Message, Request, Settings};

use super::job::{Job, Seen, all, now};
use crate::support::agent::{client, wait_for};
use crate::support::{Instead, nomad_front};

/// A hub behind a front of the job's Nomad.
async fn hub_behind(job: &Job, instead: impl Fn(&str) -> Option<Instead> + Send + Sync + 'static) -> Hub {
    hub_with(job, Settings::default(), instead).await
}

async fn hub_with(
    job: &Job,
    settings: Settings,
    instead: impl Fn(&str) -> Option<Instead> + Send + Sync + 'static,
) -> Hub {
    let nomad = format!("http://{}", job.agent.address());
    let front = nomad_front(&nomad, move |_, path| instead(path)).await;
    let front = client(front.strip_prefix("http://").unwrap().parse().unwrap());
    Hub::new(front, settings)
}

/// What Nomad has of a job's build: its log, and how its task is.
async fn read(job: &Job) -> (String, Option<Allocation>) {
    let allocation = job.record.borrow().nomad.allocation.clone().unwrap();
    let log = job.nomad.task_log("default", &allocation, "build", Origin::Start(0), false).await;
    let mut text = String::new();
    match log {
        Ok(mut log) => {
            while let Ok(Some(frame)) = log.next().await {
                text.push_str(&String::from_utf8_lossy(&frame.data));
            }
        }
        Err(error) => text = format!("{error:?}"),
    }
    (text, job.nomad.allocation("default", &allocation).await.ok())
}

/// Waits until Nomad has a log of so many bytes.
async fn is_written(job: &Job, phase: Phase, bytes: usize) {
    let allocation = job.record.borrow().nomad.allocation.clone().unwrap();
    wait_for("the log in Nomad", Duration::from_secs(30), async || {
        let log = job.nomad.task_log("default", &allocation, phase.as_str(), Origin::Start(0), false);
        let (mut log, mut read) = (log.await.ok()?, 0);
        while let Some(frame) = log.next().await.ok()? {
            read += frame.data.len();
        }
        (read >= bytes).then_some(())
    })
    .await;
}

async fn stop(job: &Job) {
    job.nomad.stop("default", job.id.as_str(), false).await.unwrap();
    let allocation = job.record.borrow().nomad.allocation.clone().unwrap();
    wait_for("the end of the task", Duration::from_secs(30), async || {
        let found = job.nomad.allocation("default", &allocation).await.ok()?;
        found.task_states.get("build").is_some_and(|task| task.state == "dead").then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_runner_says_that_was_killed_at_its_begin_is_read_to_its_end() {
    let mut job = Job::new(10, 10).await;
    let asked = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&asked);
    let hub = hub_behind(&job, move |path| {
        counter.fetch_add(usize::from(path.starts_with("/v1/allocation/")), Relaxed);
        None
    })
    .await;
    job.place().await;
    job.open(Phase::Build).await;
    // It has told nobody yet that it began.
    job.change(|record| {
        record.status = Status::Killed;
        record.timestamps.job_end = Some(now());
    });
    let reader = tokio::spawn(all(job.read(&hub, Request::default())));
    wait_for("a follower that asks what became of the task", Duration::from_secs(30), async || {
        (asked.load(Relaxed) > 1 || reader.is_finished()).then_some(())
    })
    .await;
    job.raw(Phase::Build, b"build was stopped\n".to_vec()).await;
    is_written(&job, Phase::Build, 18).await;
    stop(&job).await;
    let seen = reader.await.unwrap();
    assert_eq!(seen.lines, [(Phase::Build, "build was stopped".to_owned())], "{:?}", seen.gaps);
    assert_eq!((seen.gaps.len(), seen.end), (0, Some((Status::Killed, None))));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_that_was_killed_before_its_place_was_heard_of_is_read_all_the_same() {
    let mut job = Job::new(10, 10).await;
    job.open(Phase::Build).await;
    job.change(|record| {
        record.status = Status::Killed;
        record.timestamps.job_end = Some(now());
    });
    let asked = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&asked);
    let of_the_job = format!("/v1/job/{}/allocations", job.id);
    let hub = hub_behind(&job, move |path| {
        counter.fetch_add(usize::from(path == of_the_job), Relaxed);
        None
    })
    .await;
    let reader = tokio::spawn(all(job.read(&hub, Request::default())));
    wait_for("a reader that asks whether it was placed", Duration::from_secs(30), async || {
        (asked.load(Relaxed) > 0 || reader.is_finished()).then_some(())
    })
    .await;
    job.place().await;
    job.raw(Phase::Build, b"build was stopped\n".to_vec()).await;
    is_written(&job, Phase::Build, 18).await;
    stop(&job).await;
    let seen = reader.await.unwrap();
    assert_eq!(seen.lines, [(Phase::Build, "build was stopped".to_owned())], "{:?}", seen.gaps);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_nomad_forgets_while_it_is_read_is_said_to_be_missing() {
    let mut job = Job::building(10, 10).await;
    job.raw(Phase::Build, b"the first line\n".to_vec()).await;
    is_written(&job, Phase::Build, 15).await;
    let purged = Arc::new(AtomicBool::new(false));
    let is_purged = Arc::clone(&purged);
    let hub = hub_behind(&job, move |path| match path {
        _ if !is_purged.load(Relaxed) => None,
        path if path.starts_with("/v1/client/fs/logs/") => Some(Instead::Nothing),
        path if path.starts_with("/v1/allocation/") => Some(Instead::Unknown),
        _ => None,
    })
    .await;
    let mut reader = job.read(&hub, Request::default());
    let first = tokio::time::timeout(Duration::from_secs(30), async {
        loop {
            if let Some(Message::Log { line, .. }) = reader.next().await {
                return line;
            }
        }
    });
    assert_eq!(first.await.unwrap(), "the first line");
    // Its task writes on for a while, and nobody can read that.
    purged.store(true, Relaxed);
    job.change(|record| {
        record.status = Status::Killed;
        record.timestamps.job_end = Some(now());
    });
    let seen = all(reader).await;
    assert_eq!((seen.lines.len(), seen.gaps.len()), (0, 1), "{:?}", seen.gaps);
    assert_eq!(seen.end, Some((Status::Killed, Some(EndReason::Expired))));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_nomad_writes_out_late_of_a_task_that_took_long_to_stop_is_read() {
    let mut job = Job::building(10, 10).await;
    job.raw(Phase::Build, b"build was stopped\n".to_vec()).await;
    is_written(&job, Phase::Build, 18).await;
    stop(&job).await;
    job.finish(Status::Killed);
    // It was killed long before its task ended.
    job.change(|record| record.timestamps.job_end = Some(now() - TimeDelta::seconds(25)));
    let reads = AtomicUsize::new(0);
    let hub = hub_behind(&job, move |path| {
        let is_early = path.starts_with("/v1/client/fs/logs/") && reads.fetch_add(1, Relaxed) < 3;
        is_early.then_some(Instead::Nothing)
    })
    .await;
    let seen = all(job.read(&hub, Request::default())).await;
    assert_eq!(seen.lines, [(Phase::Build, "build was stopped".to_owned())], "{:?}", seen.gaps);
}

/// What a reader sees of a build that is purged as it begins, before it has told anybody that it did: what it was shown before
/// Nomad forgot it, and what the archive says after.
async fn seen_of_a_purged_build(shown: &str, of_it: Instead, archived: Option<&str>) -> Seen {
    let mut job = Job::new(10, 10).await;
    job.place().await;
    job.open(Phase::Build).await;
    let folder = tempfile::tempdir().unwrap();
    let url = format!("file://{}", folder.path().display());
    let variable = |name: &str| (name == "NOMAD_BUILD_ARCHIVE").then(|| url.clone());
    let settings = archive::Settings::read(&mut Reader::new(&variable)).unwrap();
    let archive = Archive::open(&settings, "default").unwrap();
    let (purged, asked) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let (is_purged, counter) = (Arc::clone(&purged), Arc::clone(&asked));
    let settings =
        Settings { archives: [("default".to_owned(), archive.clone())].into(), ..Settings::default() };
    let hub = hub_with(&job, settings, move |path| match path {
        _ if !is_purged.load(Relaxed) => None,
        path if path.starts_with("/v1/client/fs/logs/") => Some(Instead::Unknown),
        path if path.starts_with("/v1/job/") => Some(Instead::Unknown),
        path if path.starts_with("/v1/allocation/") => {
            counter.fetch_add(1, Relaxed);
            Some(of_it)
        }
        _ => None,
    })
    .await;
    let mut reader = job.read(&hub, Request::default());
    if !shown.is_empty() {
        job.raw(Phase::Build, format!("{shown}\n").into_bytes()).await;
        let first = async { while !matches!(reader.next().await, Some(Message::Log { .. })) {} };
        let in_time = tokio::time::timeout(Duration::from_secs(30), first).await;
        assert!(in_time.is_ok(), "no line was shown; Nomad has {:?}, {:?}", read(&job).await, hub.counters());
    }
    purged.store(true, Relaxed);
    job.change(|record| {
        record.status = Status::Killed;
        record.timestamps.job_end = Some(now());
    });
    let reader = tokio::spawn(all(reader));
    wait_for("a follower that asks more than once", Duration::from_secs(30), async || {
        (asked.load(Relaxed) > 1 || reader.is_finished()).then_some(())
    })
    .await;
    let allocation = job.record.borrow().nomad.allocation.clone().unwrap();
    let mut logs = archive::Index::new();
    if let Some(text) = archived {
        let mut writer = archive.write_log(&job.id, &allocation, Phase::Build, false);
        writer.put(text.to_owned().into()).await.unwrap();
        logs.insert(Phase::Build, writer.finish().await.unwrap());
    }
    archive.put_index(&job.id, &allocation, logs).await.unwrap();
    reader.await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_build_says_that_was_purged_before_it_told_of_its_begin_is_read_from_the_archive() {
    const STOPPED: &str = "build was stopped";
    let first_and = format!("the first line\n{STOPPED}\n");
    let only = format!("{STOPPED}\n");
    let cases = [
        ("the first line", Instead::Unknown, &first_and),
        ("", Instead::Unknown, &only),
        ("", Instead::Unheard, &only),
    ];
    let seen = cases.map(|(shown, of_it, text)| seen_of_a_purged_build(shown, of_it, Some(text)));
    for (seen, (shown, ..)) in join_all(seen).await.into_iter().zip(&cases) {
        assert_eq!(seen.lines, [(Phase::Build, STOPPED.to_owned())], "{shown}: {:?}", seen.gaps);
        assert_eq!((seen.gaps.len(), seen.end), (0, Some((Status::Killed, None))), "{shown}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_a_purged_build_that_the_archive_does_not_have_what_was_begun_is_said_to_be_missing() {
    let cases = [("the first line", Some(EndReason::Expired)), ("", None)];
    let seen = cases.map(|(shown, _)| seen_of_a_purged_build(shown, Instead::Unknown, None));
    for (seen, (shown, reason)) in join_all(seen).await.into_iter().zip(cases) {
        assert_eq!((seen.lines.len(), seen.gaps.len()), (0, usize::from(reason.is_some())), "{shown}");
        assert_eq!(seen.end, Some((Status::Killed, reason)), "{shown}");
    }
}
