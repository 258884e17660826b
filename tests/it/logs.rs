//! Logs: from a real Nomad to readers of every kind.

mod again;
mod job;
mod order;
mod stopped;
mod texts;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::BoxStream;
use nomad_build::job::{Phase, Status};
use nomad_build::nomad::{Error, Kind, Origin};
use nomad_build::service::logs::{Cursor, EndReason, Hub, InvalidCursor, Message, Request, Settings};

use self::job::{Job, Seen, all, phase_only, text};
use crate::support::agent::{Agent, client, wait_for};
use crate::support::proxy::Proxy;
use crate::support::{Instead, is_alone, kilobytes, nomad_front};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn twenty_readers_from_before_placement_to_the_end_share_one_connection_a_task_and_miss_nothing() {
    let mut job = Job::new(10, 10).await;
    let hub = job.hub();
    let readers: Vec<_> = (0..20).map(|_| tokio::spawn(all(job.read(&hub, Request::default())))).collect();
    wait_for("reader", Duration::from_secs(5), async || {
        (hub.counters().readers.load(Relaxed) == 20).then_some(())
    })
    .await;
    job.place().await;
    for phase in Phase::ALL {
        job.begin(phase).await;
        for _ in 0..20 {
            job.lines(phase, 50).await;
            tokio::task::yield_now().await;
        }
        job.raw(phase, b"a panic says something\n".to_vec()).await;
        job.lines(phase, 1).await;
        job.end(phase);
    }
    job.finish(Status::Succeeded);
    let want: Vec<_> = Phase::ALL
        .into_iter()
        .flat_map(|phase| {
            let texts = (1..=1000).map(text).chain(["a panic says something".to_owned(), text(1001)]);
            texts.map(move |text| (phase, text))
        })
        .collect();
    for reader in readers {
        let seen = reader.await.unwrap();
        assert_eq!(seen.gaps, []);
        assert!(seen.lines == want, "{} lines", seen.lines.len());
        assert_eq!(seen.end, Some((Status::Succeeded, None)));
        assert_eq!(
            (seen.statuses.first(), seen.statuses.last()),
            (Some(&Status::Pending), Some(&Status::Succeeded))
        );
    }
    let counters = hub.counters();
    assert_eq!(counters.connections.load(Relaxed), 3);
    assert_eq!((counters.followers.load(Relaxed), counters.readers.load(Relaxed)), (0, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_that_drops_at_any_point_resumes_on_another_replica_without_loss_or_doubling() {
    let mut job = Job::new(10, 10).await;
    let first = job.hub();
    let replicas = [first, job.hub()];
    let record = job.record.clone();
    let reader = tokio::spawn(async move {
        let mut seen = Seen::default();
        for turn in 0_usize.. {
            let request = Request { cursor: seen.last.clone(), tail: Some(1), ..Request::default() };
            let request = if turn == 0 { Request::default() } else { request };
            let mut stream = replicas[turn % 2].read(record.subscribe(), request).unwrap();
            // Before the first line there is no cursor to resume at.
            let most = if turn == 0 { 5 + 10 } else { turn * 7919 % 97 + 2 };
            for _ in 0..most {
                let next =
                    tokio::time::timeout(Duration::from_mins(1), stream.next()).await.expect("a message");
                let Some(message) = next else { return seen };
                seen.take(message);
            }
        }
        seen
    });
    job.place().await;
    for phase in Phase::ALL {
        job.begin(phase).await;
        for _ in 0..10 {
            job.lines(phase, 60).await;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        job.end(phase);
    }
    job.finish(Status::Succeeded);
    let seen = reader.await.unwrap();
    assert_eq!(seen.gaps, []);
    for phase in Phase::ALL {
        seen.numbered(phase, 1, 600);
    }
    assert_eq!(seen.end, Some((Status::Succeeded, None)));
}

/// Counts lines and checks each, holding none.
async fn check(mut stream: BoxStream<'static, Message>, slowly: Arc<AtomicBool>) -> u64 {
    let mut seq = 0;
    while let Some(message) = stream.next().await {
        match message {
            Message::Log { line, .. } => {
                seq += 1;
                assert_eq!(line, text(seq));
                if slowly.load(Relaxed) {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            }
            Message::Gap { message, .. } => panic!("{message}"),
            Message::End { .. } => return seq,
            Message::Status { .. } | Message::Heartbeat { .. } => {}
        }
    }
    panic!("no end after {seq} lines")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fifty_megabytes_are_read_by_a_fast_reader_whatever_a_slow_one_does() {
    const LINES: u64 = 450_000;
    if !is_alone("logs::fifty_megabytes_are_read_by_a_fast_reader_whatever_a_slow_one_does").await {
        return;
    }
    let mut job = Job::building(10, 10).await;
    let hub = job.hub();
    let before = kilobytes(std::process::id());
    let slowly = Arc::new(AtomicBool::new(true));
    let slow = tokio::spawn(check(job.read(&hub, Request::default()), Arc::clone(&slowly)));
    let fast = tokio::spawn(check(job.read(&hub, Request::default()), Arc::default()));
    job.lines(Phase::Build, LINES).await;
    job.end_build();
    assert_eq!(fast.await.unwrap(), LINES);
    let grown = kilobytes(std::process::id()).saturating_sub(before);
    assert!(!slow.is_finished(), "the fast reader did not wait for the slow one");
    assert!(grown < 64 << 10, "{grown} kB more");
    slowly.store(false, Relaxed);
    assert_eq!(slow.await.unwrap(), LINES);
    let counters = hub.counters();
    assert!(counters.catch_ups.load(Relaxed) > 0);
    assert_eq!((counters.followers.load(Relaxed), counters.readers.load(Relaxed)), (0, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_line_of_five_megabytes_comes_in_parts_and_is_whole_as_text() {
    let long: String = (0..5 << 20).map(|at: u32| char::from(b'a' + (at % 23) as u8)).collect();
    let parts: Vec<_> = long.as_bytes().chunks(64 << 10).map(|part| str::from_utf8(part).unwrap()).collect();
    let mut job = Job::building(10, 10).await;
    let hub = job.hub();
    let reader = tokio::spawn(all(job.read(&hub, phase_only(Phase::Build))));
    let texts = parts.iter().enumerate().map(|(index, part)| ((*part).to_owned(), index + 1 < parts.len()));
    job.write(Phase::Build, texts).await;
    job.lines(Phase::Build, 1).await;
    job.end_build();
    let seen = reader.await.unwrap();
    assert_eq!(seen.gaps, []);
    let last = text(u64::try_from(parts.len()).unwrap() + 1);
    assert!(seen.lines.iter().map(|line| line.1.as_str()).eq(parts.iter().copied().chain([last.as_str()])));
    let record = job.record.borrow().clone();
    let logs = hub.text(&record, None, None, 16 << 20).await.unwrap().0;
    let want = format!("{long}\n{last}\n");
    let (length, begin) = (logs.build.len(), logs.build.get(..100));
    assert!(logs.build == want, "{length} of {} bytes, {begin:?}, {:?}", want.len(), logs.missing);
    assert!(logs.test.is_empty() && logs.truncated.is_empty(), "{:?}", logs.truncated);
    // Of a tail, too.
    let logs = hub.text(&record, None, Some(2), 16 << 20).await.unwrap().0;
    assert!(logs.build == want, "{} of {} bytes, {:?}", logs.build.len(), want.len(), logs.missing);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tail_is_the_last_lines_over_all_phases_and_what_follows() {
    let mut job = Job::building(10, 10).await;
    let hub = job.hub();
    job.lines(Phase::Build, 50_000).await;
    job.end(Phase::Build);
    job.begin(Phase::Test).await;
    job.lines(Phase::Test, 30).await;
    let written = async |job: &Job| {
        let record = job.record.borrow().clone();
        let logs = hub.text(&record, Some(&[Phase::Test]), Some(1), 1 << 20).await.ok()?.0;
        (logs.test == text(30) + "\n").then_some(())
    };
    wait_for("line 30", Duration::from_secs(10), async || written(&job).await).await;

    let tail = |lines| Request { tail: Some(lines), ..Request::default() };
    let mut readers = [(10, 50_001, 21), (100, 49_931, 1), (0, 50_001, 31)]
        .map(|(lines, build, test)| (job.read(&hub, tail(lines)), Seen::default(), build, test));
    // The tails are of what is there now: all of it is read before more is written.
    for (stream, seen, build, test) in &mut readers {
        while seen.lines.len() as u64 != 50_001 - *build + 31 - *test {
            seen.take(stream.next().await.unwrap());
        }
        while let Ok(message) = tokio::time::timeout(Duration::from_millis(500), stream.next()).await {
            seen.take(message.unwrap());
        }
    }
    job.lines(Phase::Test, 5).await;
    job.end(Phase::Test);
    job.begin(Phase::Publish).await;
    job.lines(Phase::Publish, 3).await;
    job.end(Phase::Publish);
    job.finish(Status::Succeeded);
    for (mut stream, mut seen, build, test) in readers {
        while let Some(message) = stream.next().await {
            seen.take(message);
        }
        assert_eq!(seen.gaps, []);
        seen.numbered(Phase::Build, build, 50_000);
        seen.numbered(Phase::Test, test, 35);
        seen.numbered(Phase::Publish, 1, 3);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_rotated_away_is_a_gap_and_the_rest_is_whole() {
    let mut job = Job::building(2, 1).await;
    let hub = job.hub();
    job.lines(Phase::Build, 60_000).await;
    job.end_build();
    let mut missing = None;
    wait_for("rotation that is over", Duration::from_secs(30), async || {
        let record = job.record.borrow().clone();
        let mut logs = hub.text(&record, None, None, 64 << 20).await.ok()?.0;
        let before = std::mem::replace(&mut missing, logs.missing.remove(&Phase::Build));
        (logs.build.ends_with(&(text(60_000) + "\n")) && before.is_some() && before == missing).then_some(())
    })
    .await;
    let seen = all(job.read(&hub, Request::default())).await;
    let [(Phase::Build, gap)] = &seen.gaps[..] else { panic!("{:?}", seen.gaps) };
    let first: u64 =
        gap.strip_prefix("lines 1 to ").and_then(|rest| rest.split(' ').next()).unwrap().parse().unwrap();
    assert!(first > 10_000 && first < 60_000, "{gap}");
    seen.numbered(Phase::Build, first + 1, 60_000);
    assert_eq!(seen.end, Some((Status::Failed, None)));

    // A tail has nothing to do with what is gone, though its bytes are counted from nowhere.
    let seen = all(job.read(&hub, Request { tail: Some(5), ..Request::default() })).await;
    assert_eq!(seen.gaps, []);
    seen.numbered(Phase::Build, 59_996, 60_000);
    let record = job.record.borrow().clone();
    let logs = hub.text(&record, None, Some(1), 1 << 20).await.unwrap().0;
    assert_eq!((logs.build, logs.missing.len()), (text(60_000) + "\n", 0));

    // A reader that was cut off long before the gap is told the same.
    let allocation = job.record.borrow().nomad.allocation.clone().unwrap().replace('-', "");
    let cursor: Cursor = format!("c1-{allocation}-build-0-5000-0-500000").parse().unwrap();
    let seen = all(job.read(&hub, Request { cursor: Some(cursor), ..Request::default() })).await;
    assert_eq!(seen.gaps.len(), 1);
    assert!(seen.gaps[0].1.starts_with(&format!("lines 5001 to {first} ")), "{:?}", seen.gaps);
    seen.numbered(Phase::Build, first + 1, 60_000);

    let record = job.record.borrow().clone();
    let logs = hub.text(&record, None, None, 64 << 20).await.unwrap().0;
    assert!(logs.missing[&Phase::Build].contains(&format!("1 to {first} ")), "{:?}", logs.missing);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_that_is_cut_again_and_again_loses_nothing() {
    let mut job = Job::building(10, 10).await;
    let proxy = Proxy::to(job.agent.address()).await;
    let hub = Hub::new(client(proxy.address()), Settings::default());
    let reader = tokio::spawn(all(job.read(&hub, Request::default())));
    for _ in 0..12 {
        job.lines(Phase::Build, 3000).await;
        tokio::time::sleep(Duration::from_millis(130)).await;
        proxy.cut();
    }
    job.end_build();
    let seen = reader.await.unwrap();
    assert_eq!(seen.gaps, []);
    seen.numbered(Phase::Build, 1, 36_000);
    assert!(hub.counters().reconnects.load(Relaxed) > 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_allocation_that_nomad_tells_of_before_it_can_be_read_is_waited_for() {
    let mut job = Job::new(10, 10).await;
    let nomad = format!("http://{}", job.agent.address());
    // Nomad publishes its events before it commits what they tell of.
    let asked = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&asked);
    let front = nomad_front(&nomad, move |_, path| {
        let is_of_it = path.starts_with("/v1/client/fs/logs/") || path.starts_with("/v1/allocation/");
        (is_of_it && counter.fetch_add(1, Relaxed) < 6).then_some(Instead::Unknown)
    });
    let front = client(front.await.strip_prefix("http://").unwrap().parse().unwrap());
    let hub = Hub::new(front, Settings::default());
    let reader = tokio::spawn(all(job.read(&hub, Request::default())));
    job.place().await;
    wait_for("an answer that knows it", Duration::from_secs(30), async || {
        (asked.load(Relaxed) > 6).then_some(())
    })
    .await;
    job.begin(Phase::Build).await;
    job.lines(Phase::Build, 20).await;
    job.end_build();
    let seen = reader.await.unwrap();
    seen.numbered(Phase::Build, 1, 20);
    assert_eq!(seen.gaps, []);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_is_not_asked_for_before_nomads_servers_know_that_its_task_has_begun() {
    let mut job = Job::building(10, 10).await;
    let [asked, looked] = [(); 2].map(|()| Arc::new(AtomicUsize::new(0)));
    let (asks, looks) = (Arc::clone(&asked), Arc::clone(&looked));
    let nomad = format!("http://{}", job.agent.address());
    let front = nomad_front(&nomad, move |_, path| {
        let is = |begin: &str| usize::from(path.starts_with(begin));
        asks.fetch_add(is("/v1/client/fs/logs/"), Relaxed);
        looks.fetch_add(is("/v1/allocation/"), Relaxed);
        None
    });
    let front = client(front.await.strip_prefix("http://").unwrap().parse().unwrap());
    let hub = Hub::new(front, Settings::default());
    let request = Request { phases: Some(vec![Phase::Test]), ..Request::default() };
    let reader = tokio::spawn(all(job.read(&hub, request)));
    wait_for("looks at the task", Duration::from_secs(30), async || (looked.load(Relaxed) > 3).then_some(()))
        .await;
    assert_eq!(asked.load(Relaxed), 0);
    job.end(Phase::Build);
    job.begin(Phase::Test).await;
    job.lines(Phase::Test, 20).await;
    job.end(Phase::Test);
    job.finish(Status::Failed);
    let seen = reader.await.unwrap();
    seen.numbered(Phase::Test, 1, 20);
    assert_eq!(seen.gaps, []);
    assert!(asked.load(Relaxed) > 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_runner_that_was_killed_leaves_a_log_that_ends_with_its_task() {
    let mut job = Job::building(10, 10).await;
    let hub = job.hub();
    let reader = tokio::spawn(all(job.read(&hub, Request::default())));
    job.lines(Phase::Build, 100).await;
    job.raw(Phase::Build, b"thread main panicked, and no line end".to_vec()).await;
    job.nomad.stop("default", job.id.as_str(), false).await.unwrap();
    job.finish(Status::Killed);
    let seen = reader.await.unwrap();
    assert_eq!(seen.gaps, []);
    assert_eq!(seen.lines.len(), 101);
    assert_eq!(seen.lines[100].1, "thread main panicked, and no line end");
    assert_eq!(seen.end, Some((Status::Killed, None)));
    // And again, for who comes late.
    let late = all(job.read(&hub, Request::default())).await;
    assert_eq!((late.lines, late.end), (seen.lines, seen.end));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_that_nomad_has_collected_is_said_to_be_expired() {
    let mut job = Job::on(Agent::own().await, 10, 10).await.begun().await;
    let hub = job.hub();
    job.lines(Phase::Build, 10).await;
    job.end(Phase::Build);
    let allocation = job.record.borrow().nomad.allocation.clone().unwrap();
    // Servers that have not heard of a task's start collect its allocation while the node only begins with it.
    wait_for("the servers' knowledge of the task", Duration::from_secs(30), async || {
        let found = job.nomad.allocation("default", &allocation).await.unwrap();
        found.task_states.get("build").is_some_and(|task| task.state == "dead").then_some(())
    })
    .await;
    job.nomad.stop("default", job.id.as_str(), true).await.unwrap();
    job.finish(Status::Killed);
    let unknown = |error: Error| error.kind == Kind::NotFound;
    wait_for("collection", Duration::from_secs(30), async || {
        job.agent.collect().await;
        job.nomad.allocation("default", &allocation).await.is_err_and(unknown).then_some(())
    })
    .await;
    wait_for("the node's own removal", Duration::from_secs(30), async || {
        let log = job.nomad.task_log("default", &allocation, "build", Origin::Start(0), false).await;
        log.err().is_some_and(unknown).then_some(())
    })
    .await;
    // A node that is about to remove an allocation gives an empty log.
    let nomad = format!("http://{}", job.agent.address());
    let front =
        nomad_front(&nomad, |_, path| path.starts_with("/v1/client/fs/logs/").then_some(Instead::Nothing));
    let front = client(front.await.strip_prefix("http://").unwrap().parse().unwrap());
    for hub in [hub, Hub::new(front, Settings::default())] {
        let seen = all(job.read(&hub, Request::default())).await;
        assert!(
            matches!(&seen.gaps[..], [(Phase::Build, text)] if text.starts_with("the whole log")),
            "{:?}",
            seen.gaps
        );
        assert_eq!(seen.end, Some((Status::Killed, Some(EndReason::Expired))));
        let record = job.record.borrow().clone();
        let logs = hub.text(&record, None, None, 1 << 20).await.unwrap().0;
        assert_eq!(logs.missing.keys().collect::<Vec<_>>(), [&Phase::Build], "{logs:?}");
        assert_eq!(logs.build, format!("[{}]\n", logs.missing[&Phase::Build]));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_nomad_that_stays_away_after_the_end_is_named_and_the_reader_is_let_go() {
    let mut job = Job::building(10, 10).await;
    let proxy = Proxy::to(job.agent.address()).await;
    let settings = Settings { patience: Duration::from_secs(2), ..Settings::default() };
    let hub = Hub::new(client(proxy.address()), settings);
    job.lines(Phase::Build, 10).await;
    let mut stream = job.read(&hub, Request::default());
    let mut seen = Seen::default();
    while seen.lines.len() < 10 {
        seen.take(stream.next().await.unwrap());
    }
    proxy.close();
    job.lines(Phase::Build, 10).await;
    job.end_build();
    while let Some(message) = stream.next().await {
        seen.take(message);
    }
    assert!(seen.gaps[0].1.starts_with("the rest of the log of this phase is missing"), "{:?}", seen.gaps);
    assert_eq!(seen.end, Some((Status::Failed, Some(EndReason::Unavailable))));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_that_is_never_placed_has_an_end_and_a_cursor_of_another_job_is_refused() {
    let mut job = Job::new(10, 10).await;
    let hub = job.hub();
    let reader = tokio::spawn(all(job.read(&hub, Request::default())));
    job.finish(Status::Killed);
    let seen = reader.await.unwrap();
    assert_eq!((seen.lines.len(), seen.gaps.len(), seen.end), (0, 0, Some((Status::Killed, None))));
    let cursor: Cursor = "c1-00000000000000000000000000000005-build-0-3-0-9".parse().unwrap();
    let request = Request { cursor: Some(cursor), ..Request::default() };
    assert_eq!(hub.read(job.record.subscribe(), request).err(), Some(InvalidCursor::Foreign));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cursor_beyond_the_logs_end_harms_no_other_reader_and_comes_to_an_end() {
    let mut job = Job::building(10, 10).await;
    let hub = job.hub();
    let allocation = job.record.borrow().nomad.allocation.clone().unwrap().replace('-', "");
    let most = u64::MAX;
    let cursor: Cursor =
        format!("c1-{allocation}-build-4294967295-{most}-4294967295-{most}").parse().unwrap();
    let request = Request { cursor: Some(cursor), ..Request::default() };
    let beyond = tokio::spawn(all(job.read(&hub, request)));
    let follows = async || (hub.counters().connections.load(Relaxed) > 0).then_some(());
    wait_for("follower", Duration::from_secs(10), follows).await;
    let other = tokio::spawn(all(job.read(&hub, Request::default())));
    job.lines(Phase::Build, 500).await;
    let half = async || (hub.counters().bytes.load(Relaxed) >= 500 * 60).then_some(());
    wait_for("first half", Duration::from_secs(30), half).await;
    job.lines(Phase::Build, 500).await;
    job.end_build();
    let seen = other.await.unwrap();
    assert_eq!(seen.gaps, []);
    seen.numbered(Phase::Build, 1, 1000);
    let seen = beyond.await.unwrap();
    assert_eq!((seen.lines.len(), seen.gaps.len(), seen.end), (0, 0, Some((Status::Failed, None))));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_logs_than_connections_are_all_read_in_turns() {
    let mut jobs = [Job::building(10, 10).await, Job::building(10, 10).await, Job::building(10, 10).await];
    let hub = Hub::new(jobs[0].nomad.clone(), Settings { connections: 1, ..Settings::default() });
    let readers: Vec<_> =
        jobs.iter().map(|job| tokio::spawn(all(job.read(&hub, Request::default())))).collect();
    for job in &mut jobs {
        job.lines(Phase::Build, 1000).await;
    }
    // All three are followed although none has ended.
    let read = async || (hub.counters().bytes.load(Relaxed) >= 3 * 1000 * 60).then_some(());
    wait_for("turns", Duration::from_secs(30), read).await;
    for job in &mut jobs {
        job.lines(Phase::Build, 1000).await;
        job.end_build();
    }
    for reader in readers {
        let seen = reader.await.unwrap();
        assert_eq!(seen.gaps, []);
        seen.numbered(Phase::Build, 1, 2000);
    }
}
