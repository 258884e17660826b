use proptest::prelude::*;
use uuid::Uuid;

use super::*;
use crate::job::{AllocationFacts, Detail, Due, JobFacts, Progress, Standing};

pub(in crate::job) fn at(seconds: i64) -> DateTime<Utc> {
    DateTime::from_timestamp(1_700_000_000 + seconds, 0).unwrap()
}

pub(in crate::job) fn id() -> JobId {
    JobId::from_uuid(Uuid::from_u128(7))
}

pub(in crate::job) fn job(index: u64) -> JobFacts {
    let labels = Labels {
        image: "r:1/a".to_owned(),
        tags: vec!["one".to_owned(), "two".to_owned()],
        has_tests: true,
        submitted_at: at(0),
        ..Labels::default()
    };
    JobFacts::new(index, "ci", labels)
}

pub(in crate::job) fn allocation(index: u64, is_over: bool) -> AllocationFacts {
    AllocationFacts {
        id: "alloc".to_owned(),
        index,
        created: 2,
        node_name: "node".to_owned(),
        standing: if is_over { Standing::Over } else { Standing::Running },
        withdrawn: false,
        changed_at: at(0),
        detail: Some(Detail { finished: is_over, ..Detail::default() }),
    }
}

/// Progress up to a phase; the last one is running or over.
pub(in crate::job) fn progress(phases: &[(Phase, bool)]) -> Progress {
    let mut progress = Progress::default();
    for (place, &(phase, over)) in phases.iter().enumerate() {
        let start = i64::try_from(place).unwrap() * 10 + 1;
        let outcome = Outcome::begun("alloc", at(start));
        progress.set(phase, if over { outcome.succeeded(at(start + 5)) } else { outcome });
    }
    progress
}

pub(in crate::job) const DONE: [(Phase, bool); 2] = [(Phase::Build, true), (Phase::Test, true)];

pub(in crate::job) fn claimed() -> Claim {
    Claim::claimed("alloc", "sha256:00", at(30))
}

pub(in crate::job) fn killed(seconds: i64) -> Claim {
    Claim::revoked(Verdict::new(Status::Killed, Some(Phase::Test), Reason::Killed, "killed", at(seconds)))
}

pub(in crate::job) fn facts(progress: Progress, claim: Option<Claim>) -> Facts {
    let mut facts = Facts::new(id());
    facts.see_job(job(1));
    facts.see_allocation(allocation(3, false));
    facts.see_progress(4, progress);
    if let Some(claim) = claim {
        facts.see_claim(5, claim);
    }
    facts
}

#[test]
fn a_list_overrules_what_was_heard_up_to_its_index_and_nothing_newer() {
    let known = || {
        let mut facts = Facts::new(id());
        facts.see_job(JobFacts { stopped: true, ..job(50) });
        facts.see_allocation(allocation(50, false));
        facts
    };
    for (listed, taken) in [(49, false), (50, true), (60, true)] {
        let mut facts = known();
        assert_eq!(facts.see_listed_job(job(20), listed), taken, "{listed}");
        assert_eq!(facts.job.as_ref().unwrap().stopped, !taken, "{listed}");
        assert_eq!(facts.see_listed_allocations(vec![allocation(20, true)], listed), taken, "{listed}");
        assert_eq!(facts.allocation().unwrap().is_over(), taken, "{listed}");
        // Where it is not listed, it is one that Nomad does not have, unless it was over: those are collected.
        let mut facts = known();
        assert_eq!(facts.see_listed_allocations(Vec::new(), listed), taken, "{listed}");
        assert_eq!(facts.allocation().is_none(), taken, "{listed}");
    }
    let mut facts = known();
    facts.see_allocation(allocation(51, true));
    assert!(!facts.see_listed_allocations(Vec::new(), 60));
}

#[test]
fn a_job_that_nomad_forgot_is_remembered_by_its_ledger() {
    let remembered = |claim: Option<Claim>| {
        let mut facts = Facts::new(id());
        facts.see_labels(20, "ci", job(0).labels);
        facts.see_progress(20, progress(&DONE));
        if let Some(claim) = claim {
            facts.see_claim(30, claim);
        }
        facts
    };
    let killed = remembered(Some(killed(20)));
    let record = Record::of(&killed).unwrap();
    let known = Record::of(&facts(progress(&DONE), killed.claim.1.clone())).unwrap();
    let nomad = Location { node: None, ..known.nomad.clone() };
    assert_eq!(record, Record { nomad, remembered: true, ..known });

    // Nothing is due before it is known whether Nomad has it, and a list that is older than its ledger does not say.
    let now = at(99);
    for claim in [None, Some(claimed())] {
        let mut facts = remembered(claim);
        assert_eq!(facts.due(now, TimeDelta::zero()), None);
        assert!(!facts.see_gone(19));
        assert_eq!(facts.due(now, TimeDelta::zero()), None);
        let mut there = facts.clone();
        assert!(there.see_job(job(1)));
        assert!(!Record::of(&there).unwrap().remembered);
        assert!(facts.see_gone(20));
        match facts.due(now, TimeDelta::zero()) {
            Some(Due::Revoke(verdict)) if facts.claim.1.is_none() => {
                assert_eq!((verdict.status, verdict.reason), (Status::Lost, Reason::NodeLost));
            }
            Some(Due::Conclude(outcome)) if facts.claim.1.is_some() => {
                assert_eq!(outcome.reason, Some(Reason::RunnerDied));
            }
            due => panic!("{due:?}"),
        }
    }
    let mut stopped = remembered(None);
    let outcome = Outcome::begun("alloc", at(25)).failed(at(26), Reason::Killed, None, "told to stop");
    let mut told = progress(&DONE);
    told.set(Phase::Publish, outcome);
    stopped.see_progress(21, told);
    stopped.see_gone(21);
    let Some(Due::Revoke(verdict)) = stopped.due(now, TimeDelta::zero()) else { panic!("nothing is due") };
    assert_eq!((verdict.status, verdict.reason), (Status::Killed, Reason::Stopped));
}

#[test]
fn the_status_follows_the_phases() {
    use Phase::{Build, Publish, Test};
    for (phases, want) in [
        (&[][..], Status::Pending),
        (&[(Build, false)], Status::Building),
        (&[(Build, true), (Test, false)], Status::Testing),
        (&[(Build, true), (Test, true), (Publish, false)], Status::Publishing),
    ] {
        assert_eq!(Record::of(&facts(progress(phases), None)).unwrap().status, want);
    }
}

#[test]
fn a_job_whose_next_phase_has_not_begun_says_what_it_waits_for() {
    let placement = |facts: &Facts| Record::of(facts).unwrap().placement;
    let mut facts = Facts::new(id());
    facts.see_job(job(1));
    facts.see_placement(1, Some("no node can take it".to_owned()));
    assert_eq!(placement(&facts).as_deref(), Some("no node can take it"));
    facts.see_allocation(allocation(9, false));
    assert_eq!(placement(&facts), None);
    let waiting = |index, phases: &[Phase]| {
        let waits_for = phases.iter().map(|phase| (*phase, "Missing: vault.read(a)".to_owned())).collect();
        AllocationFacts {
            detail: Some(Detail { waits_for, ..Detail::default() }),
            ..allocation(index, false)
        }
    };
    let want = |phase| {
        Some(format!(
            "node node has taken the job, and {phase} waits before it can begin: Missing: vault.read(a)"
        ))
    };
    facts.see_allocation(waiting(10, &[Phase::Build]));
    assert_eq!(placement(&facts), want(Phase::Build));
    facts.see_progress(11, progress(&[(Phase::Build, false)]));
    assert_eq!(placement(&facts), None);
    // The tasks behind the build are begun together, and publish waits for the tests anyway.
    facts.see_allocation(waiting(12, &[Phase::Publish]));
    facts.see_progress(13, progress(&[(Phase::Build, true)]));
    assert_eq!(placement(&facts), None);
    facts.see_progress(14, progress(&[(Phase::Build, true), (Phase::Test, true)]));
    assert_eq!(placement(&facts), want(Phase::Publish));
    facts.see_progress(15, progress(&[(Phase::Build, true), (Phase::Test, true), (Phase::Publish, false)]));
    assert_eq!(placement(&facts), None);
}

#[test]
fn nothing_but_the_claim_and_the_publish_outcome_ends_a_job() {
    let published = |state: fn(Outcome) -> Outcome| {
        let mut progress = progress(&DONE);
        progress.set(Phase::Publish, state(Outcome::begun("alloc", at(25))));
        progress
    };
    let succeeded = published(|outcome| outcome.succeeded(at(40)));
    let failed = published(|outcome| outcome.failed(at(40), Reason::PushFailed, None, "no"));
    for (progress, claim, want) in [
        (succeeded.clone(), None, Status::Publishing),
        (succeeded.clone(), Some(claimed()), Status::Succeeded),
        (failed.clone(), Some(claimed()), Status::Failed),
        (succeeded, Some(killed(20)), Status::Killed),
        (failed, Some(killed(20)), Status::Killed),
    ] {
        assert_eq!(Record::of(&facts(progress, claim)).unwrap().status, want);
    }
}

#[test]
fn a_phase_never_outlasts_its_job_and_one_that_has_not_run_has_no_time() {
    let mut progress = progress(&[(Phase::Build, true)]);
    let late = Outcome::begun("alloc", at(11)).failed(at(25), Reason::Killed, None, "told to stop");
    progress.set(Phase::Test, late);
    let record = Record::of(&facts(progress, Some(killed(20)))).unwrap();
    assert_eq!(record.timestamps.of(Phase::Test), (Some(at(11)), Some(at(20))));
    assert_eq!(record.timestamps.of(Phase::Publish), (None, None));
    assert_eq!(record.timestamps.job_end, Some(at(20)));
    assert_eq!(record.failure.unwrap().reason, Reason::Killed);
}

#[test]
fn a_tag_is_unknown_only_between_the_claim_and_what_the_registry_said() {
    let published = |facts: &Facts| Record::of(facts).unwrap().image.references[1].published;
    assert_eq!(published(&facts(progress(&DONE), None)), Published::No);
    assert_eq!(published(&facts(progress(&DONE), Some(claimed()))), Published::Unknown);
    assert_eq!(published(&facts(progress(&DONE), Some(killed(20)))), Published::No);
    let mut over = progress(&DONE);
    let mut outcome = Outcome::begun("alloc", at(25)).succeeded(at(40));
    outcome.published = vec![Published::Yes, Published::Yes];
    over.set(Phase::Publish, outcome);
    assert_eq!(published(&facts(over, Some(claimed()))), Published::Yes);
}

#[test]
fn an_ended_job_is_shown_where_it_ended_whoever_starts_it_again() {
    let again = AllocationFacts {
        id: "again".to_owned(),
        index: 50,
        created: 50,
        node_name: "other".to_owned(),
        ..allocation(50, false)
    };
    let shown = |claim: Option<Claim>| {
        let mut facts = facts(progress(&DONE), claim);
        facts.see_allocation(again.clone());
        let nomad = Record::of(&facts).unwrap().nomad;
        (nomad.allocation.unwrap(), nomad.node.unwrap())
    };
    assert_eq!(shown(Some(killed(20))), ("alloc".to_owned(), "node".to_owned()));
    assert_eq!(shown(None), ("again".to_owned(), "other".to_owned()));
}

#[test]
fn a_phase_that_begins_as_its_job_is_killed_takes_no_less_than_no_time() {
    let killed = Verdict::new(Status::Killed, None, Reason::Killed, "killed", at(0));
    let facts = facts(progress(&[(Phase::Build, false)]), Some(Claim::revoked(killed)));
    let times = Record::of(&facts).unwrap().timestamps;
    assert_eq!((times.build_start, times.build_end), (Some(at(0)), Some(at(0))));
    assert_eq!(times.seconds(Phase::Build), Some(0.0));
}

#[test]
fn a_phase_that_ended_its_job_tells_of_itself_behind_that() {
    let failed = Verdict::new(Status::Failed, Some(Phase::Test), Reason::TestFailed, "no", at(30));
    let running = progress(&[(Phase::Build, true), (Phase::Test, false)]);
    let mut facts = facts(running.clone(), Some(Claim::revoked(failed)));
    let about_to_tell = |facts: &Facts, now| Record::of(facts).unwrap().is_about_to_tell(at(now));
    assert!(about_to_tell(&facts, 31));
    // A runner that died does not.
    assert!(!about_to_tell(&facts, 45));
    let mut told = running;
    let mut outcome = Outcome::begun("alloc", at(11)).failed(at(30), Reason::TestFailed, None, "no");
    outcome.lines = Some(7);
    told.set(Phase::Test, outcome);
    facts.see_progress(99, told);
    assert!(!about_to_tell(&facts, 31));
}

/// Everything that may be heard of one job, each state with its index.
#[derive(Clone, Debug)]
enum Heard {
    Job(bool),
    Labels,
    Anew,
    Gone,
    Allocation(bool),
    Progress(usize),
    Claim(bool),
}

fn hear(facts: &mut Facts, index: u64, heard: &Heard) {
    use Phase::{Build, Publish, Test};
    let phases = [(Build, true), (Test, true), (Publish, true)];
    match heard {
        Heard::Job(stopped) => facts.see_job(JobFacts { stopped: *stopped, ..job(index) }),
        Heard::Labels => facts.see_labels(index, "ci", job(0).labels),
        Heard::Anew => {
            facts.begin_anew();
            true
        }
        Heard::Gone => facts.see_gone(index),
        Heard::Allocation(over) => facts.see_allocation(allocation(index, *over)),
        Heard::Progress(count) => facts.see_progress(index, progress(&phases[..*count])),
        Heard::Claim(wins) => facts.see_claim(index, if *wins { claimed() } else { killed(20) }),
    };
}

fn anything() -> impl Strategy<Value = Heard> {
    prop_oneof![
        any::<bool>().prop_map(Heard::Job),
        Just(Heard::Labels),
        any::<bool>().prop_map(Heard::Allocation),
        (0_usize..4).prop_map(Heard::Progress),
    ]
}

proptest! {
    #[test]
    fn any_order_and_any_repetition_gives_the_same_record(
        heard in proptest::collection::vec(anything(), 1..12),
        order in proptest::collection::vec(any::<prop::sample::Index>(), 0..40),
        claim in proptest::option::of(any::<bool>()),
    ) {
        let mut all: Vec<(u64, Heard)> = heard.into_iter().enumerate().map(|(i, h)| (i as u64 + 1, h)).collect();
        all.extend(claim.map(|wins| (50, Heard::Claim(wins))));
        let mut straight = Facts::new(id());
        for (index, heard) in &all {
            hear(&mut straight, *index, heard);
        }
        let mut shuffled = Facts::new(id());
        for pick in &order {
            let (index, heard) = pick.get(&all);
            hear(&mut shuffled, *index, heard);
        }
        // Whatever was lost or doubled, a list at the end says everything once more.
        for (index, heard) in all.iter().rev() {
            hear(&mut shuffled, *index, heard);
        }
        prop_assert_eq!(Record::of(&shuffled), Record::of(&straight));
        prop_assert_eq!(shuffled.due(at(100), TimeDelta::zero()), straight.due(at(100), TimeDelta::zero()));
    }

    #[test]
    fn a_final_status_absorbs_whatever_nomad_says_later(
        later in proptest::collection::vec(prop_oneof![anything(), Just(Heard::Gone), Just(Heard::Anew)], 0..12), wins: bool,
    ) {
        let mut facts = facts(progress(&[(Phase::Build, true), (Phase::Test, true), (Phase::Publish, true)]), None);
        hear(&mut facts, 10, &Heard::Claim(wins));
        let end = Record::of(&facts).unwrap();
        prop_assert!(end.status.is_final());
        for (index, heard) in later.iter().enumerate().filter(|(_, heard)| !matches!(heard, Heard::Progress(_))) {
            hear(&mut facts, 20 + index as u64, heard);
            let now = Record::of(&facts).unwrap();
            prop_assert_eq!((now.status, now.timestamps.clone(), now.image.clone()), (end.status, end.timestamps.clone(), end.image.clone()));
        }
    }
}

#[test]
fn when_an_earlier_phase_ended_is_not_made_up_before_it_is_heard() {
    let building = progress(&[(Phase::Build, false)]);
    let verdict = Verdict::new(Status::Failed, Some(Phase::Test), Reason::TestFailed, "", at(9));
    let claim = Some(Claim::revoked(verdict));
    let times = Record::of(&facts(building, claim)).unwrap().timestamps;
    assert_eq!((times.build_end, times.job_end), (None, Some(at(9))));
    assert!(times.build_start.is_some());
}

#[test]
fn when_the_phase_ended_that_ran_on_a_lost_node_is_not_made_up() {
    let verdict = Verdict::new(Status::Lost, Some(Phase::Build), Reason::NodeLost, "", at(9));
    let mut facts = facts(progress(&[(Phase::Build, false)]), Some(Claim::revoked(verdict)));
    let end = |facts: &Facts| Record::of(facts).unwrap().timestamps.build_end;
    assert_eq!(end(&facts), None);
    // The node came back, and its runner had been done before the verdict.
    facts.see_progress(99, progress(&[(Phase::Build, true)]));
    assert_eq!(end(&facts), Some(at(6)));
}
