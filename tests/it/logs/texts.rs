//! Logs as text.

use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;

use chrono::TimeDelta;
use nomad_build::job::{Phase, Status};
use nomad_build::service::logs::{Hub, Logs, Settings};

use super::job::{Job, now, text};
use crate::support::agent::client;
use crate::support::{Instead, nomad_front};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_text_that_is_too_large_says_what_it_leaves_out() {
    let mut job = Job::building(10, 10).await;
    let hub = job.hub();
    job.lines(Phase::Build, 20_000).await;
    job.end_build();
    let whole: String = (1..=20_000).map(|seq| text(seq) + "\n").collect();
    let record = job.record.borrow().clone();
    let logs = hub.text(&record, None, None, 100_000).await.unwrap().0;
    assert!(logs.missing.is_empty(), "{:?}", logs.missing);
    let omitted = logs.truncated[&Phase::Build].omitted_bytes;
    let (note, rest) = logs.build.split_once('\n').unwrap();
    assert!(note.contains(&omitted.to_string()) && note.contains("/logs/stream"), "{note}");
    assert!(whole.ends_with(rest) && rest.len() <= 100_000);
    assert_eq!(rest.len() as u64 + omitted, whole.len() as u64);

    let before = hub.counters().bytes.load(Relaxed);
    let logs = hub.text(&record, None, Some(2), 100_000).await.unwrap().0;
    assert_eq!(logs.build, format!("{}\n{}\n", text(19_999), text(20_000)));
    assert!(logs.truncated.is_empty() && logs.missing.is_empty());
    // Not the whole log is read for its last lines.
    let read = hub.counters().bytes.load(Relaxed) - before;
    assert!(read < whole.len() as u64 / 2, "{read}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_of_which_a_busy_node_knows_nothing_yet_is_waited_for() {
    let mut job = Job::building(10, 10).await;
    job.lines(Phase::Build, 20).await;
    job.end_build();
    let record = job.record.borrow().clone();
    let nomad = format!("http://{}", job.agent.address());
    let asked = AtomicUsize::new(0);
    // A runner tells of its phase before its node does: that says that no such task was started.
    let busy = nomad_front(&nomad, move |_, path| {
        let is_log = path.starts_with("/v1/client/fs/logs/");
        (is_log && asked.fetch_add(1, Relaxed) < 3).then_some(Instead::Unknown)
    });
    let hub =
        Hub::new(client(busy.await.strip_prefix("http://").unwrap().parse().unwrap()), Settings::default());
    let logs = hub.text(&record, None, None, 100_000).await.unwrap().0;
    let whole: String = (1..=20).map(|seq| text(seq) + "\n").collect();
    assert_eq!((logs.build, logs.missing.len()), (whole, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_a_phase_that_wrote_nothing_no_line_is_missing_though_its_task_never_began() {
    let mut job = Job::building(10, 10).await;
    job.lines(Phase::Build, 1).await;
    // The build's task goes on, and those behind it wait; but as the record has it, all ended long ago.
    job.change(|record| {
        record.status = Status::Failed;
        record.lines = [Some(1), Some(0), Some(0)];
        record.timestamps.job_end = Some(now() - TimeDelta::minutes(1));
    });
    let record = job.record.borrow().clone();
    let logs = job.hub().text(&record, Some(&[Phase::Test, Phase::Publish]), None, 100_000).await.unwrap().0;
    assert_eq!(logs, Logs::default());
}
