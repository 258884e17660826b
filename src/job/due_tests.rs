use super::*;
use crate::job::record::tests::{DONE, allocation, at, claimed, facts, job, killed, progress};
use crate::job::{Labels, Progress};

#[test]
fn what_nobody_else_ends_is_due() {
    let now = at(100);
    let reason = |facts: &Facts| match facts.due(now) {
        Some(Due::Revoke(verdict)) => Some((verdict.status, verdict.reason)),
        Some(Due::Conclude(outcome)) => Some((Status::Failed, outcome.reason.unwrap())),
        _ => None,
    };
    let running = facts(progress(&[(Phase::Build, false)]), None);
    assert_eq!(running.due(now), None);

    let mut stopped = running.clone();
    stopped.see_job(JobFacts { stopped: true, ..job(9) });
    assert_eq!(reason(&stopped), Some((Status::Killed, Reason::Stopped)));

    let mut purged = running.clone();
    purged.see_gone(9);
    assert_eq!(reason(&purged), Some((Status::Killed, Reason::Stopped)));

    // Its allocation ends because of that.
    purged.see_allocation(allocation(10, true));
    assert_eq!(reason(&purged), Some((Status::Killed, Reason::Stopped)));

    let mut died = running.clone();
    died.see_allocation(allocation(9, true));
    assert_eq!(reason(&died), Some((Status::Failed, Reason::RunnerDied)));

    // Nomad collects what has ended, and nobody purged it.
    let mut collected = died;
    collected.see_gone(12);
    assert_eq!(reason(&collected), Some((Status::Failed, Reason::RunnerDied)));

    let mut unread = running.clone();
    unread.see_allocation(AllocationFacts { detail: None, ..allocation(9, true) });
    unread.see_gone(12);
    assert_eq!(reason(&unread), Some((Status::Lost, Reason::NodeLost)));

    // A runner that was told to stop said so; the allocation that replaced it does nothing.
    let mut drained = running.clone();
    let mut told = Progress::default();
    told.set(
        Phase::Build,
        Outcome::begun("alloc", at(1)).failed(at(5), Reason::Killed, None, "told to stop"),
    );
    drained.see_progress(8, told);
    drained.see_allocation(allocation(9, true));
    assert_eq!(reason(&drained), Some((Status::Killed, Reason::Stopped)));

    let mut lost = running.clone();
    lost.see_allocation(AllocationFacts { standing: Standing::Lost, detail: None, ..allocation(9, true) });
    assert_eq!(reason(&lost), Some((Status::Lost, Reason::NodeLost)));

    let mut unset = running.clone();
    let detail = Some(Detail { setup_error: Some("no such image".to_owned()), ..Detail::default() });
    unset.see_allocation(AllocationFacts { detail, ..allocation(9, true) });
    assert_eq!(reason(&unset), Some((Status::Failed, Reason::SetupFailed)));

    let mut listed = running.clone();
    listed.see_allocation(AllocationFacts { detail: None, ..allocation(9, true) });
    assert_eq!(listed.due(now), Some(Due::Look));

    let mut abandoned = facts(progress(&DONE), Some(claimed()));
    assert_eq!(abandoned.due(now), None);
    abandoned.see_allocation(allocation(9, true));
    assert_eq!(reason(&abandoned), Some((Status::Failed, Reason::RunnerDied)));

    // Its node's agent waits for what never comes.
    let mut forgotten = running;
    let detail = |forgotten| Some(Detail { forgotten_at: Some(at(forgotten)), ..Detail::default() });
    forgotten.see_allocation(AllocationFacts { detail: detail(70), ..allocation(9, false) });
    assert_eq!(reason(&forgotten), None);
    forgotten.see_allocation(AllocationFacts { detail: detail(20), ..allocation(10, false) });
    assert_eq!(reason(&forgotten), Some((Status::Lost, Reason::NodeLost)));
    forgotten.see_allocation(AllocationFacts { detail: None, ..allocation(11, false) });
    assert_eq!(forgotten.due(now), Some(Due::Look));
    let mut publishing = facts(progress(&DONE), Some(claimed()));
    publishing.see_allocation(AllocationFacts { detail: detail(20), ..allocation(9, false) });
    assert_eq!(publishing.due(now), Some(Due::Stop));
    publishing.see_job(JobFacts { stopped: true, ..job(10) });
    assert_eq!(publishing.due(now), None);

    // Whoever revoked stops the job; one that could not is helped.
    assert_eq!(facts(progress(&DONE), Some(killed(99))).due(now), None);
    assert_eq!(facts(progress(&DONE), Some(killed(20))).due(now), Some(Due::Stop));
}

#[test]
fn a_job_of_which_nothing_is_heard_for_longer_than_its_timeouts_is_ended() {
    const BUILT: [(Phase, bool); 1] = [(Phase::Build, true)];
    let timeouts = Some(Limits { build: 60, test: 40, publish: 20 });
    // Its last change by Nomad is of second 20; the build began in second 1, test in 11, publish in 21.
    let silent = |phases: &[(Phase, bool)], claim: Option<Claim>, running: &[Phase], timeouts| {
        let mut facts = facts(progress(phases), claim);
        facts.see_job(JobFacts { labels: Labels { timeouts, ..job(1).labels }, ..job(6) });
        let detail = Some(Detail { running: running.to_vec(), ..Detail::default() });
        facts.see_allocation(AllocationFacts { detail, changed_at: at(20), ..allocation(9, false) });
        facts
    };
    let due = |facts: &Facts, now: i64| match facts.due(at(now)) {
        Some(Due::Revoke(verdict)) => Some((verdict.status, verdict.reason, verdict.phase)),
        Some(Due::Conclude(outcome)) => Some((Status::Failed, outcome.reason.unwrap(), Some(Phase::Publish))),
        Some(Due::Stop) => Some((Status::Publishing, Reason::Stopped, None)),
        Some(Due::Look) => panic!("{facts:#?}"),
        None => None,
    };
    let stop = Some((Status::Publishing, Reason::Stopped, None));
    let timeout = |phase| Some((Status::Failed, Reason::Timeout, Some(phase)));
    let building = [(Phase::Build, false)];
    for (phases, claim, running, last, then) in [
        // It runs, and says neither that it has begun nor that it has ended.
        (&[][..], None, &[Phase::Build][..], 110, timeout(Phase::Build)),
        (&building, None, &[Phase::Build], 110, timeout(Phase::Build)),
        // Nomad has not started the next task yet, or it runs and does not begin.
        (&BUILT, None, &[Phase::Publish], 1000, None),
        (&BUILT, None, &[Phase::Test, Phase::Publish], 90, timeout(Phase::Test)),
        (
            &[(Phase::Build, true), (Phase::Test, false)],
            None,
            &[Phase::Test, Phase::Publish],
            90,
            timeout(Phase::Test),
        ),
        (&DONE, None, &[Phase::Publish], 70, timeout(Phase::Publish)),
        // Behind the claim each of its two tags may take two minutes; then its `finish` ends the publish.
        (
            &[(Phase::Build, true), (Phase::Test, true), (Phase::Publish, false)],
            Some(claimed()),
            &[Phase::Publish],
            311,
            stop,
        ),
    ] {
        let facts = silent(phases, claim.clone(), running, timeouts);
        assert_eq!((due(&facts, last), due(&facts, last + 1)), (None, then), "{phases:?} {running:?}");
        // Of a job that an older version submitted it is not known.
        assert_eq!(due(&silent(phases, claim, running, None), 9999), None);
    }

    // A node that is away may come back, while the job could still need it.
    for (claim, then) in [
        (None, Some((Status::Lost, Reason::NodeLost, Some(Phase::Build)))),
        (Some(claimed()), Some((Status::Failed, Reason::RunnerDied, Some(Phase::Publish)))),
    ] {
        let mut away = silent(&building, claim, &[Phase::Build], timeouts);
        away.see_allocation(AllocationFacts {
            standing: Standing::Away,
            changed_at: at(30),
            ..allocation(10, false)
        });
        assert_eq!((due(&away, 120), due(&away, 121)), (None, then));
    }

    // A `finish` that hangs, and a runner that failed and hangs then.
    let mut finishing = silent(&DONE, Some(claimed()), &[], timeouts);
    let detail = Some(Detail::default());
    finishing.see_allocation(AllocationFacts { detail, changed_at: at(30), ..allocation(10, true) });
    assert_eq!(due(&finishing, 320), None);
    assert_eq!(due(&finishing, 321), Some((Status::Failed, Reason::RunnerDied, Some(Phase::Publish))));
    let failed = Verdict::new(Status::Failed, Some(Phase::Build), Reason::BuildFailed, "", at(30));
    let failed = silent(&building, Some(Claim::revoked(failed)), &[Phase::Build], timeouts);
    assert_eq!((due(&failed, 60), due(&failed, 61)), (None, stop));
}
