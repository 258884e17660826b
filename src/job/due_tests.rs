use super::*;
use crate::job::record::tests::{DONE, allocation, at, claimed, facts, job, killed, progress};
use crate::job::{Labels, Progress, Record};

#[test]
fn what_nobody_else_ends_is_due() {
    let now = at(100);
    let reason = |facts: &Facts| match facts.due(now, TimeDelta::zero()) {
        Some(Due::Revoke(verdict)) => Some((verdict.status, verdict.reason)),
        Some(Due::Conclude(outcome)) => Some((Status::Failed, outcome.reason.unwrap())),
        _ => None,
    };
    let running = facts(progress(&[(Phase::Build, false)]), None);
    assert_eq!(running.due(now, TimeDelta::zero()), None);

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

    let mut listed = running.clone();
    listed.see_allocation(AllocationFacts { detail: None, ..allocation(9, true) });
    assert_eq!(listed.due(now, TimeDelta::zero()), Some(Due::Look));

    let mut abandoned = facts(progress(&DONE), Some(claimed()));
    assert_eq!(abandoned.due(now, TimeDelta::zero()), None);
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
    assert_eq!(forgotten.due(now, TimeDelta::zero()), Some(Due::Look));
    let mut publishing = facts(progress(&DONE), Some(claimed()));
    publishing.see_allocation(AllocationFacts { detail: detail(20), ..allocation(9, false) });
    assert_eq!(publishing.due(now, TimeDelta::zero()), Some(Due::Stop));
    publishing.see_job(JobFacts { stopped: true, ..job(10) });
    assert_eq!(publishing.due(now, TimeDelta::zero()), None);

    // Whoever revoked stops the job; one that could not is helped.
    assert_eq!(facts(progress(&DONE), Some(killed(99))).due(now, TimeDelta::zero()), None);
    assert_eq!(facts(progress(&DONE), Some(killed(20))).due(now, TimeDelta::zero()), Some(Due::Stop));
}

#[test]
fn a_job_fails_in_the_phase_whose_task_failed_whichever_began_last() {
    use Phase::{Build, Publish, Test};
    // A test that Nomad stopped beside it says that it was told to stop, sooner or later.
    let told_to_stop = {
        let mut told = progress(&TESTING);
        let begun = told.of(Test).cloned().unwrap();
        told.set(Test, begun.failed(at(20), Reason::Killed, None, "told to stop"));
        told
    };
    let (set_up, died, stopped) = (Reason::SetupFailed, Reason::RunnerDied, Reason::Stopped);
    for (told, unset, dead, want) in [
        (progress(&[]), Some(Build), None, (set_up, Some(Build))),
        (progress(&BUILT), Some(Test), None, (set_up, Some(Test))),
        (progress(&BUILT), Some(Publish), None, (set_up, Some(Publish))),
        (progress(&TESTING), Some(Publish), None, (set_up, Some(Publish))),
        (progress(&DONE), Some(Publish), None, (set_up, Some(Publish))),
        (told_to_stop.clone(), Some(Publish), None, (set_up, Some(Publish))),
        (progress(&BUILDING), None, Some(Build), (died, Some(Build))),
        (progress(&TESTING), None, Some(Test), (died, Some(Test))),
        (progress(&TESTING), None, Some(Publish), (died, Some(Publish))),
        (progress(&DONE), None, Some(Publish), (died, Some(Publish))),
        (told_to_stop.clone(), None, Some(Publish), (died, Some(Publish))),
        // Its machine told it, and not Nomad.
        (told_to_stop.clone(), None, Some(Test), (stopped, Some(Test))),
        (told_to_stop, None, None, (stopped, Some(Test))),
        // Nobody says which.
        (progress(&DONE), None, None, (died, Some(Test))),
        (progress(&[]), None, None, (died, None)),
    ] {
        let mut facts = facts(told.clone(), None);
        let says = |phase: Option<Phase>| phase.map(|phase| (phase, "no".to_owned()));
        let detail = Detail { setup_error: says(unset), death: says(dead), ..Detail::default() };
        facts.see_allocation(AllocationFacts { detail: None, ..allocation(9, true) });
        assert_eq!(facts.due(at(100), TimeDelta::zero()), Some(Due::Look));
        facts.see_allocation(AllocationFacts { detail: Some(detail), ..allocation(9, true) });
        let Some(Due::Revoke(verdict)) = facts.due(at(100), TimeDelta::zero()) else { panic!("{facts:#?}") };
        assert_eq!((verdict.reason, verdict.phase), want, "{unset:?} {dead:?} {told:?}");
    }
}

#[test]
fn a_job_that_lost_its_place_before_it_began_is_lost_only_if_nomad_looks_for_none() {
    let now = at(100);
    let due = |standing, withdrawn, detail: Option<Detail>, phases: &[(Phase, bool)]| {
        let mut facts = facts(progress(phases), None);
        facts.see_placement(5, Some("no room".to_owned()));
        facts.see_allocation(AllocationFacts { standing, withdrawn, detail, ..allocation(9, true) });
        let record = Record::of(&facts).unwrap();
        assert_eq!(record.placement.is_some(), record.nomad.allocation.is_none());
        match facts.due(now, TimeDelta::zero())? {
            Due::Revoke(verdict) => Some((false, verdict.status, verdict.reason)),
            Due::RevokeUnlessPlaced(verdict) => {
                assert_eq!(record.placement.as_deref(), Some("no room"));
                Some((true, verdict.status, verdict.reason))
            }
            due => panic!("{due:?}"),
        }
    };
    let detail = |begun| Some(Detail { begun, finished: true, ..Detail::default() });
    let setup_error = Some((Phase::Build, "no such program".to_owned()));
    let unset = Detail { setup_error, ..Detail::default() };
    let setup_failed = (Status::Failed, Reason::SetupFailed);
    let (lost, died) = ((Status::Lost, Reason::NodeLost), (Status::Failed, Reason::RunnerDied));
    for (standing, withdrawn, detail, phases, (unless_placed, (status, reason))) in [
        (Standing::Lost, true, None, &[][..], (true, lost)),
        (Standing::Lost, true, detail(false), &[], (true, lost)),
        (Standing::Lost, true, detail(true), &[], (false, lost)),
        (Standing::Lost, true, None, &BUILDING, (false, lost)),
        (Standing::Over, true, detail(false), &[], (true, lost)),
        (Standing::Over, true, detail(true), &[], (false, died)),
        (Standing::Over, true, detail(false), &BUILDING, (false, died)),
        // Nobody took it: it could not be begun there.
        (Standing::Over, false, detail(false), &[], (false, died)),
        (Standing::Over, false, Some(unset), &[], (false, setup_failed)),
    ] {
        let found = due(standing, withdrawn, detail.clone(), phases);
        assert_eq!(found, Some((unless_placed, status, reason)), "{standing:?} {detail:?} {phases:?}");
    }

    // One of two that runs is a place.
    let mut placed = facts(Progress::default(), None);
    placed.see_allocation(AllocationFacts { standing: Standing::Lost, ..allocation(9, true) });
    placed.see_allocation(AllocationFacts { id: "other".to_owned(), created: 3, ..allocation(9, false) });
    assert_eq!(placed.due(now, TimeDelta::zero()), None);
    assert_eq!(Record::of(&placed).unwrap().nomad.allocation.as_deref(), Some("other"));
}

/// A job that was built, tested and published, as far as told, and whose last change by Nomad is of second 20: the build began
/// in second 1 and ended in 6, the test 10 s later each, and the publish 20.
fn silent(phases: &[(Phase, bool)], claim: Option<Claim>, running: &[Phase]) -> Facts {
    let mut facts = facts(progress(phases), claim);
    let labels = Labels { timeouts: Some(Limits { build: 60, test: 40, publish: 20 }), ..job(1).labels };
    facts.see_job(JobFacts { labels, ..job(6) });
    let detail = Some(Detail { running: running.to_vec(), ..Detail::default() });
    facts.see_allocation(AllocationFacts { detail, changed_at: at(20), ..allocation(9, false) });
    facts
}

/// What is due in a second of a job of which nothing was heard for a day, in short.
fn unheard(facts: &Facts, second: i64) -> Option<(Status, Reason, Option<Phase>)> {
    match facts
        .due(at(second), TimeDelta::days(1))
        .map(|due| if let Due::Silent(due) = due { *due } else { due })?
    {
        Due::Revoke(verdict) => Some((verdict.status, verdict.reason, verdict.phase)),
        Due::Conclude(outcome) => Some((Status::Failed, outcome.reason.unwrap(), Some(Phase::Publish))),
        Due::Stop => STOP,
        due => panic!("{due:#?}"),
    }
}

const STOP: Option<(Status, Reason, Option<Phase>)> = Some((Status::Publishing, Reason::Stopped, None));
const CONCLUDED: Option<(Status, Reason, Option<Phase>)> =
    Some((Status::Failed, Reason::RunnerDied, Some(Phase::Publish)));

const BUILDING: [(Phase, bool); 1] = [(Phase::Build, false)];
const BUILT: [(Phase, bool); 1] = [(Phase::Build, true)];
const TESTING: [(Phase, bool); 2] = [(Phase::Build, true), (Phase::Test, false)];
const PUBLISHING: [(Phase, bool); 3] = [(Phase::Build, true), (Phase::Test, true), (Phase::Publish, false)];

#[test]
fn a_job_whose_runner_says_nothing_for_longer_than_its_timeout_is_ended() {
    use Phase::{Build, Publish, Test};
    let timeout = |phase| Some((Status::Failed, Reason::Timeout, phase));
    for (phases, claim, running, last, then) in [
        // It runs, and says neither that it has begun nor that it has ended, nor ends behind that.
        (&[][..], None, &[Build][..], 140, timeout(Some(Build))),
        (&BUILDING, None, &[Build], 140, timeout(Some(Build))),
        (&BUILT, None, &[Build], 140, timeout(Some(Build))),
        // Nomad has not started the next task yet, or it runs and does not begin.
        (&BUILT, None, &[Publish], 1000, None),
        (&BUILT, None, &[Test, Publish], 120, timeout(Some(Test))),
        (&TESTING, None, &[Test, Publish], 120, timeout(Some(Test))),
        (&DONE, None, &[Publish], 100, timeout(Some(Publish))),
        // Behind the claim all tags have thirteen minutes; then its `finish` ends the publish.
        (&PUBLISHING, Some(claimed()), &[Publish], 881, STOP),
    ] {
        let facts = silent(phases, claim.clone(), running);
        assert_eq!(
            (unheard(&facts, last), unheard(&facts, last + 1)),
            (None, then),
            "{phases:?} {running:?}"
        );
        // Of a job that an older version submitted it is not known.
        let mut older = facts.clone();
        older.see_job(JobFacts { labels: Labels { timeouts: None, ..job(1).labels }, ..job(7) });
        assert_eq!(unheard(&older, 9999), None);
        // This replica heard of it a moment ago, whatever the clocks say.
        assert_eq!(facts.due(at(9999), TimeDelta::seconds(70)), None, "{phases:?}");
    }
}

#[test]
fn a_phase_has_its_time_from_the_end_of_the_one_before() {
    // Nomad tells of nothing while a long test runs, and a moment too late that its task has ended.
    let mut tested = progress(&BUILT);
    tested.set(Phase::Test, Outcome::begun("alloc", at(11)).succeeded(at(500)));
    for running in [&[Phase::Test, Phase::Publish][..], &[Phase::Publish]] {
        let mut facts = silent(&BUILT, None, running);
        facts.see_progress(20, tested.clone());
        assert_eq!(unheard(&facts, 580), None);
        assert!(unheard(&facts, 901).is_some());
    }
}

#[test]
fn a_job_whose_node_is_away_for_longer_than_its_timeouts_is_ended() {
    for (phases, claim, then) in [
        (&BUILDING[..], None, Some((Status::Lost, Reason::NodeLost, Some(Phase::Build)))),
        (&PUBLISHING, Some(claimed()), CONCLUDED),
        // All is told: a node that comes back with it has nothing to do.
        (&[(Phase::Build, true), (Phase::Test, true), (Phase::Publish, true)], Some(claimed()), STOP),
    ] {
        let mut away = silent(phases, claim, &[]);
        let standing = Standing::Away;
        away.see_allocation(AllocationFacts { standing, changed_at: at(30), ..allocation(10, false) });
        assert_eq!((unheard(&away, 150), unheard(&away, 151)), (None, then), "{phases:?}");
    }
}

#[test]
fn what_nobody_can_end_is_concluded_and_what_has_ended_is_stopped() {
    let published = [(Phase::Build, true), (Phase::Test, true), (Phase::Publish, true)];
    // A `finish` that hangs.
    let mut finishing = silent(&DONE, Some(claimed()), &[]);
    let detail = Some(Detail::default());
    finishing.see_allocation(AllocationFacts { detail, changed_at: at(30), ..allocation(10, true) });
    assert_eq!((unheard(&finishing, 890), unheard(&finishing, 891)), (None, CONCLUDED));
    // A task that Nomad cannot kill.
    let mut stuck = silent(&PUBLISHING, Some(claimed()), &[Phase::Publish]);
    stuck.job.as_mut().unwrap().stopped = true;
    assert_eq!(unheard(&stuck, 882), CONCLUDED);
    // A runner that goes on though all is told, and one that failed.
    let told = silent(&published, Some(claimed()), &[Phase::Publish]);
    assert_eq!((unheard(&told, 106), unheard(&told, 107)), (None, STOP));
    let failed = Verdict::new(Status::Failed, Some(Phase::Build), Reason::BuildFailed, "", at(30));
    let failed = silent(&BUILDING, Some(Claim::revoked(failed)), &[Phase::Build]);
    assert_eq!((unheard(&failed, 90), unheard(&failed, 91)), (None, STOP));
}
