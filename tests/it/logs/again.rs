//! Phases that run again, in the same allocation or in another.

use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::BoxStream;
use nomad_build::job::{Phase, Status};
use nomad_build::service::logs::{InvalidCursor, Message, Request};

use super::job::{Job, Seen, all, now, text};
use crate::support::agent::wait_for;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_phase_that_begins_again_elsewhere_is_read_from_its_beginning_and_those_before_it_stay_as_they_are()
{
    // Another job's allocation, for the one that Nomad makes next.
    let (mut job, mut next) = (Job::new(10, 10).await, Job::new(10, 10).await);
    for job in [&mut job, &mut next] {
        job.place().await;
        job.begin(Phase::Build).await;
        job.lines(Phase::Build, 10).await;
        job.end(Phase::Build);
        job.begin(Phase::Test).await;
    }
    let allocation_of = |job: &Job| job.record.borrow().nomad.allocation.clone();
    let (first, second) = (allocation_of(&job), allocation_of(&next));
    job.change(|record| record.ran_in = [first.clone(), first, None]);
    job.lines(Phase::Test, 5).await;
    let hub = job.hub();
    let mut stream = job.read(&hub, Request::default());
    let (mut seen, mut cursors) = (Seen::default(), Vec::new());
    while seen.lines.len() < 15 {
        let message = stream.next().await.unwrap();
        cursors.extend(message.cursor().cloned());
        seen.take(message);
    }

    next.lines(Phase::Test, 7).await;
    next.end(Phase::Test);
    job.change(|record| {
        record.ran_in[Phase::Test as usize].clone_from(&second);
        record.nomad.allocation = second;
        record.lines = [Some(10), Some(7), Some(0)];
    });
    job.finish(Status::Failed);
    while let Some(message) = stream.next().await {
        seen.take(message);
    }
    let of = |phase, count| (1..=count).map(move |seq| (phase, text(seq)));
    let want: Vec<_> = of(Phase::Build, 10).chain(of(Phase::Test, 5)).chain(of(Phase::Test, 7)).collect();
    assert_eq!(seen.lines, want);
    assert_eq!(seen.gaps.len(), 1, "{:?}", seen.gaps);
    assert!(
        seen.gaps[0].0 == Phase::Test && seen.gaps[0].1.contains("another allocation"),
        "{:?}",
        seen.gaps
    );
    assert_eq!(seen.end, Some((Status::Failed, None)));

    // A cursor holds as long as its own phase was not run elsewhere.
    let resumed = |number: usize| {
        let request = Request { cursor: Some(cursors[number].clone()), ..Request::default() };
        hub.read(job.record.subscribe(), request)
    };
    assert_eq!(resumed(14).err(), Some(InvalidCursor::Foreign));
    let rest = all(resumed(8).unwrap()).await;
    assert_eq!(rest.lines, [&want[9..10], &want[15..]].concat());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_run_that_is_shorter_than_the_first_is_read_to_its_end() {
    let mut job = Job::building(10, 10).await;
    job.lines(Phase::Build, 100).await;
    let hub = job.hub();
    let mut early = job.read(&hub, Request::default());
    let mut seen = Seen::default();
    while seen.lines.len() < 100 {
        seen.take(early.next().await.unwrap());
    }
    job.run_again(Phase::Build).await;
    job.change(|record| record.timestamps.build_start = Some(now()));
    // Its runner tells how many lines it wrote before they have come to Nomad's file.
    job.change(|record| record.lines = [Some(40), Some(0), Some(0)]);
    let late = tokio::spawn(all(job.read(&hub, Request::default())));
    let record = job.record.borrow().clone();
    let text_of = {
        let hub = job.hub();
        tokio::spawn(async move { hub.text(&record, Some(&[Phase::Build]), None, 100_000).await })
    };
    tokio::time::sleep(Duration::from_secs(1)).await;
    job.lines(Phase::Build, 40).await;
    while seen.lines.len() < 140 {
        let next = tokio::time::timeout(Duration::from_secs(30), early.next()).await;
        seen.take(next.expect("a line of the second run").unwrap());
    }
    job.end_build();
    let want: Vec<_> = (1..=100).chain(1..=40).map(|seq| (Phase::Build, text(seq))).collect();
    let late = late.await.unwrap();
    for seen in [&seen, &late] {
        assert_eq!(seen.gaps, []);
        assert!(seen.lines == want, "{} lines", seen.lines.len());
    }
    let logs = text_of.await.unwrap().unwrap().0;
    // On a busy node they may be on their way for longer than a text waits.
    let late = logs.missing.get(&Phase::Build).is_some_and(|why| why.contains("ask again"));
    assert!(logs.build.lines().count() == 140 || late, "{:?}", logs.missing);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tail_of_a_task_that_ran_again_keeps_no_line_from_another_reader() {
    let mut job = Job::building(10, 10).await;
    let hub = job.hub();
    job.lines(Phase::Build, 100).await;
    let mut said = String::new();
    let mut written = async |job: &Job, lines: u64| {
        let record = job.record.borrow().clone();
        let logs =
            hub.text(&record, None, None, 1 << 20).await.map(|logs| logs.0.build.lines().count() as u64);
        let now = format!("{logs:?}");
        if said != now {
            eprintln!("{now} of {lines} lines");
            said = now;
        }
        (logs.ok()? == lines).then_some(())
    };
    wait_for("the first run", Duration::from_secs(30), async || written(&job, 100).await).await;
    job.run_again(Phase::Build).await;
    // More than is read from the end at once: the second run's numbers alone do not say that it is the second.
    job.lines(Phase::Build, 2000).await;
    wait_for("the second run", Duration::from_secs(30), async || written(&job, 2100).await).await;

    // The tail is there first, and what it reads is shared.
    let mut tail = (job.read(&hub, Request { tail: Some(5), ..Request::default() }), Seen::default(), 5);
    let mut whole = (job.read(&hub, Request::default()), Seen::default(), 2100);
    for (stream, seen, lines) in [&mut tail, &mut whole] {
        while seen.lines.len() < *lines {
            seen.take(stream.next().await.unwrap());
        }
    }
    job.lines(Phase::Build, 10).await;
    job.end_build();
    let want: Vec<_> = (1..=100).chain(1..=2010).map(|seq| (Phase::Build, text(seq))).collect();
    for ((mut stream, mut seen, _), want) in [(tail, &want[2095..]), (whole, &want[..])] {
        let end = async {
            while let Some(message) = stream.next().await {
                seen.take(message);
            }
        };
        assert!(tokio::time::timeout(Duration::from_mins(1), end).await.is_ok(), "{}", seen.lines.len());
        assert_eq!(seen.gaps, []);
        assert!(seen.lines == want, "{} lines", seen.lines.len());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_counted_is_all_there_though_a_run_behind_it_says_a_word() {
    let mut job = Job::building(10, 10).await;
    job.lines(Phase::Build, 50).await;
    job.change(|record| record.lines = [Some(50), Some(0), Some(0)]);
    let hub = job.hub();
    let seen = || {
        wait_for("the first run", Duration::from_secs(30), async || {
            let record = job.record.borrow().clone();
            let logs = hub.text(&record, None, None, 1 << 20).await.ok()?.0;
            (logs.build.lines().count() == 50).then_some(())
        })
    };
    seen().await;
    // "Nothing to do", as its gate is closed.
    job.run_again(Phase::Build).await;
    job.lines(Phase::Build, 1).await;
    job.finish(Status::Failed);
    let record = job.record.borrow().clone();
    let logs = wait_for("the second run", Duration::from_secs(30), async || {
        let logs = hub.text(&record, None, None, 1 << 20).await.ok()?.0;
        (logs.build.lines().count() == 51).then_some(logs)
    })
    .await;
    assert_eq!(logs.missing.len(), 0, "{:?}", logs.missing);
    let seen = all(job.read(&hub, Request::default())).await;
    assert_eq!((seen.gaps, seen.end), (Vec::new(), Some((Status::Failed, None))));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_counted_after_a_run_behind_it_said_a_word_is_all_there_too() {
    let mut job = Job::building(10, 10).await;
    job.lines(Phase::Build, 50).await;
    let hub = job.hub();
    let mut reader = job.read(&hub, Request::default());
    let lines = async |reader: &mut BoxStream<'static, Message>, count: usize| {
        let mut left = count;
        while left > 0 {
            let message = tokio::time::timeout(Duration::from_secs(30), reader.next()).await;
            left -= usize::from(matches!(message.expect("a line comes"), Some(Message::Log { .. })));
        }
    };
    lines(&mut reader, 50).await;
    job.run_again(Phase::Build).await;
    job.lines(Phase::Build, 1).await;
    lines(&mut reader, 1).await;
    // Only now it is heard how long the first run's log is: Nomad did not answer before.
    job.change(|record| record.lines = [Some(50), Some(0), Some(0)]);
    job.finish(Status::Failed);
    let seen = all(reader).await;
    assert_eq!((seen.gaps, seen.end), (Vec::new(), Some((Status::Failed, None))));
}
