//! Lines that stand in Nomad's log in another order than they were written in.

use std::time::Duration;

use futures_util::StreamExt as _;
use nomad_build::job::Phase;
use nomad_build::service::logs::{Message, Request};

use super::job::{Job, all, text};

/// As two collectors write out what they took by turns.
const WRITTEN: [&[u64]; 4] = [&[1, 2, 5], &[3, 4], &[6, 9, 7], &[10, 8, 11]];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lines_that_two_collectors_wrote_out_are_read_in_their_order_from_wherever_a_reader_resumes() {
    let mut job = Job::building(10, 10).await;
    let hub = job.hub();
    let mut live = job.read(&hub, Request::default());
    for seqs in WRITTEN {
        job.numbered(Phase::Build, seqs).await;
    }
    job.end_build();
    let mut cursors = Vec::new();
    let read = async {
        while let Some(message) = live.next().await {
            match message {
                Message::Log { line, cursor, .. } => cursors.push((line, cursor)),
                Message::Gap { message, .. } => panic!("{message}"),
                _ => {}
            }
        }
    };
    tokio::time::timeout(Duration::from_mins(1), read).await.unwrap();
    let lines: Vec<_> = cursors.iter().map(|(line, _)| line.clone()).collect();
    assert_eq!(lines, (1..=11).map(text).collect::<Vec<_>>());
    for (read, (_, cursor)) in (1..).zip(cursors) {
        let rest = all(job.read(&hub, Request { cursor: Some(cursor), ..Request::default() })).await;
        rest.numbered(Phase::Build, read + 1, 11);
    }
    let record = job.record.borrow().clone();
    let logs = hub.text(&record, None, None, 1 << 20).await.unwrap().0;
    assert_eq!(logs.build, (1..=11).map(|seq| text(seq) + "\n").collect::<String>());
    assert!(logs.missing.is_empty(), "{:?}", logs.missing);
    let tail = hub.text(&record, None, Some(3), 1 << 20).await.unwrap().0;
    assert_eq!(tail.build, (9..=11).map(|seq| text(seq) + "\n").collect::<String>());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn however_long_two_collectors_take_turns_their_lines_are_read_in_order() {
    let mut job = Job::building(10, 10).await;
    let hub = job.hub();
    let live = tokio::spawn(all(job.read(&hub, Request::default())));
    // At any time one of them is missing, and never for long: for some seconds, as a build takes.
    job.numbered(Phase::Build, &[2]).await;
    for odd in (1..80).step_by(2) {
        job.numbered(Phase::Build, &[odd + 3]).await;
        tokio::time::sleep(Duration::from_millis(50)).await;
        job.numbered(Phase::Build, &[odd]).await;
    }
    job.numbered(Phase::Build, &[81]).await;
    job.end_build();
    let seen = live.await.unwrap();
    assert!(seen.gaps.is_empty(), "{:?}", seen.gaps);
    seen.numbered(Phase::Build, 1, 82);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_line_that_never_comes_holds_those_behind_it_for_a_moment_only() {
    let mut job = Job::building(10, 10).await;
    let hub = job.hub();
    let mut live = job.read(&hub, Request::default());
    job.numbered(Phase::Build, &[1, 3, 4]).await;
    let mut seen = Vec::new();
    let read = async {
        while seen.len() < 4 {
            match live.next().await.unwrap() {
                Message::Log { line, .. } => seen.push(line),
                Message::Gap { message, .. } => seen.push(message),
                _ => {}
            }
        }
    };
    tokio::time::timeout(Duration::from_mins(1), read).await.unwrap();
    let gap = "lines 2 to 2 are missing: Nomad no longer has them".to_owned();
    assert_eq!(seen, [text(1), gap, text(3), text(4)]);
    job.numbered(Phase::Build, &[5]).await;
    job.end_build();
    let rest = all(live).await;
    rest.numbered(Phase::Build, 5, 5);
    let record = job.record.borrow().clone();
    let logs = hub.text(&record, None, None, 1 << 20).await.unwrap().0;
    assert!(logs.build.ends_with(&(text(5) + "\n")), "{}", logs.build);
    assert!(logs.missing[&Phase::Build].contains("lines 2 to 2"), "{:?}", logs.missing);
}
