//! From Nomad's words to a job's facts. Pure.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};

use crate::job::{AllocationFacts, Detail, JobFacts, JobId, Labels, Phase, Standing};
use crate::nomad::{Allocation, Evaluation, Job, JobStub, PlacementFailure, TaskEvent, TaskState};

pub(super) fn job(job: &Job) -> Option<(JobId, JobFacts)> {
    facts(&job.id, &job.namespace, job.stop, &job.meta, job.modify_index)
}

pub(super) fn stub(stub: &JobStub) -> Option<(JobId, JobFacts)> {
    facts(&stub.id, &stub.namespace, stub.stop, &stub.meta, stub.modify_index)
}

fn facts(
    id: &str,
    namespace: &str,
    stopped: bool,
    meta: &BTreeMap<String, String>,
    index: u64,
) -> Option<(JobId, JobFacts)> {
    let labels = Labels::from_meta(meta)?;
    Some((id.parse().ok()?, JobFacts { stopped, ..JobFacts::new(index, namespace, labels) }))
}

/// Of one that was asked for by itself, or with its job's: one that is over and tells of no task has none.
pub(super) fn allocation_in_full(of: &Allocation) -> Option<(JobId, AllocationFacts)> {
    let (id, mut facts) = allocation(of)?;
    if facts.is_over() && facts.detail.is_none() {
        facts.detail = Some(Detail { finished: true, ..Detail::default() });
    }
    Some((id, facts))
}

pub(super) fn allocation(allocation: &Allocation) -> Option<(JobId, AllocationFacts)> {
    let states = &allocation.task_states;
    let began = |phase: Phase| states.get(phase.as_str()).is_some_and(|task| task.started_at.is_some());
    let detail = (!states.is_empty()).then(|| Detail {
        begun: Phase::ALL.into_iter().any(began),
        finished: is_finished(allocation),
        setup_error: setup_error(allocation),
        death: death(allocation),
        forgotten_at: forgotten_at(allocation),
        waits_for: waits_for(allocation),
        running: Phase::ALL.into_iter().filter(|phase| runs(allocation, *phase)).collect(),
    });
    let facts = AllocationFacts {
        id: allocation.id.clone(),
        index: allocation.modify_index,
        created: allocation.create_index,
        node_name: allocation.node_name.clone(),
        standing: match allocation.client_status.as_str() {
            "pending" => Standing::Pending,
            "complete" | "failed" => Standing::Over,
            "lost" => Standing::Lost,
            "unknown" => Standing::Away,
            _ => Standing::Running,
        },
        withdrawn: allocation.desired_status != "run",
        changed_at: DateTime::from_timestamp_nanos(allocation.modify_time),
        detail,
    };
    Some((allocation.job_id.parse().ok()?, facts))
}

fn runs(allocation: &Allocation, phase: Phase) -> bool {
    allocation.task_states.get(phase.as_str()).is_some_and(|task| task.state == "running")
}

/// Whether the finish task has ended. An allocation that never reached its node has no tasks.
fn is_finished(allocation: &Allocation) -> bool {
    allocation.task_states.get("finish").is_none_or(|task| task.state == "dead")
}

/// When a node's agent took in an allocation anew of which it had already begun a task. It does so where it lost its own state of
/// it (Nomad 1.11: when it dies within a minute of having reconnected), and then waits for ever for all tasks to be pending.
/// One that has its state goes on where it was, and what it receives is no news to it.
fn forgotten_at(allocation: &Allocation) -> Option<DateTime<Utc>> {
    let begun = allocation.task_states.values().filter(|task| task.state != "pending");
    let newest = begun.filter_map(|task| task.events.last());
    let received = newest.filter(|event| event.kind == "Received").map(|event| event.time).max()?;
    Some(DateTime::from_timestamp_nanos(received))
}

/// Whether a task of an allocation may still do something: Nomad calls an allocation failed as soon as one of its tasks
/// failed, while `finish` still waits for its turn.
pub(super) fn may_still_work(allocation: &Allocation) -> bool {
    match allocation.client_status.as_str() {
        // Nobody hears of its tasks any more.
        "lost" => false,
        "complete" | "failed" => {
            let mut tasks = allocation.task_states.values();
            tasks.any(|task| task.state == "running") || !is_finished(allocation)
        }
        _ => true,
    }
}

/// The phases whose task failed, having run or not. A `finish` that fails ends no job.
fn failed(allocation: &Allocation, has_run: bool) -> impl Iterator<Item = (Phase, &TaskState)> {
    let tasks = Phase::ALL.into_iter();
    let tasks = tasks.filter_map(|phase| Some((phase, allocation.task_states.get(phase.as_str())?)));
    tasks.filter(move |(_, task)| task.failed && task.started_at.is_some() == has_run)
}

/// What Nomad said of the task that could not be started, in words that name the cause where there are any: that it is not
/// restarted comes last, and says nothing.
fn setup_error(allocation: &Allocation) -> Option<(Phase, String)> {
    let causes =
        ["Driver Failure", "Setup Failure", "Failed Validation", "Failed Artifact Download", "Template"];
    failed(allocation, false).find_map(|(phase, task)| {
        let last = |is: &dyn Fn(&TaskEvent) -> bool| task.events.iter().rev().find(|event| is(event));
        let event = last(&|event| causes.contains(&event.kind.as_str()))
            .or_else(|| last(&|event| event.fails_task))?;
        Some((phase, event.display_message.clone()))
    })
}

/// What each task waits for which its node has taken and not begun, by what Nomad said of it last: a secret that cannot be read is
/// asked for again for minutes before the task fails.
fn waits_for(allocation: &Allocation) -> Vec<(Phase, String)> {
    let causes = ["Template", "Driver", "Downloading Artifacts", "Restarting"];
    let waits = |phase: Phase| {
        let task = allocation.task_states.get(phase.as_str()).filter(|task| task.state == "pending")?;
        let event = task.events.last().filter(|event| causes.contains(&event.kind.as_str()))?;
        Some((phase, event.display_message.clone()))
    };
    Phase::ALL.into_iter().filter_map(waits).collect()
}

/// What Nomad said of the end of a task that ran and failed.
fn death(allocation: &Allocation) -> Option<(Phase, String)> {
    failed(allocation, true).find_map(|(phase, task)| {
        let event = task.events.iter().rev().find(|event| event.kind == "Terminated")?;
        Some((phase, event.display_message.clone()))
    })
}

/// Why an evaluation could not place the job, in words; none where it could.
pub(super) fn placement(evaluation: &Evaluation) -> Option<String> {
    let failure = evaluation.failed_groups.values().next()?;
    Some(in_words(failure))
}

fn in_words(failure: &PlacementFailure) -> String {
    if failure.nodes_evaluated == 0 {
        return "no node can take it: none is ready in its node pool and datacenters".to_owned();
    }
    let nodes = |count: u64| if count == 1 { "1 node".to_owned() } else { format!("{count} nodes") };
    let lacking = failure
        .dimension_exhausted
        .iter()
        .map(|(what, count)| format!("{} without enough {what}", nodes(*count)));
    let filtered = failure
        .constraint_filtered
        .iter()
        .map(|(why, count)| format!("{} ruled out by {why}", nodes(*count)));
    let reasons: Vec<_> = lacking.chain(filtered).collect();
    format!("no node can take it: of {} looked at, {}", nodes(failure.nodes_evaluated), reasons.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_placement_failure_is_told_in_words() {
        let failure = |nodes_evaluated, exhausted: &[(&str, u64)], filtered: &[(&str, u64)]| {
            let map = |of: &[(&str, u64)]| {
                of.iter().map(|(k, v)| ((*k).to_owned(), *v)).collect::<BTreeMap<_, _>>()
            };
            PlacementFailure {
                nodes_evaluated,
                dimension_exhausted: map(exhausted),
                constraint_filtered: map(filtered),
            }
        };
        for (failure, want) in [
            (failure(0, &[], &[]), "no node can take it: none is ready in its node pool and datacenters"),
            (
                failure(1, &[("memory", 1)], &[]),
                "no node can take it: of 1 node looked at, 1 node without enough memory",
            ),
            (
                failure(3, &[("cpu", 2)], &[("${attr.driver.docker} = 1", 1)]),
                "no node can take it: of 3 nodes looked at, 2 nodes without enough cpu, 1 node ruled out by ${attr.driver.docker} = 1",
            ),
        ] {
            assert_eq!(in_words(&failure), want);
        }
    }

    #[test]
    fn a_task_that_could_not_be_started_is_told_by_its_cause() {
        let event = |kind: &str, says: &str| TaskEvent {
            kind: kind.to_owned(),
            display_message: says.to_owned(),
            fails_task: kind != "Received",
            ..TaskEvent::default()
        };
        let told = |names: &[&str], events: &[(&str, &str)]| {
            let events: Vec<_> = events.iter().map(|(kind, says)| event(kind, says)).collect();
            let task = TaskState { failed: true, events, ..TaskState::default() };
            let task_states = names.iter().map(|name| ((*name).to_owned(), task.clone())).collect();
            setup_error(&Allocation { task_states, ..Allocation::default() })
        };
        let says = |phase, says: &str| Some((phase, says.to_owned()));
        let restarts = ("Not Restarting", "Policy allows no restarts");
        let cause = ("Driver Failure", "no such program");
        let all = [("Received", "r"), cause, restarts];
        assert_eq!(told(&["build"], &all), says(Phase::Build, "no such program"));
        assert_eq!(told(&["build"], &[restarts]), says(Phase::Build, "Policy allows no restarts"));
        assert_eq!(told(&["build"], &[("Received", "r")]), None);
        assert_eq!(told(&["finish", "publish"], &all), says(Phase::Publish, "no such program"));
        assert_eq!(told(&["publish", "test"], &all), says(Phase::Test, "no such program"));
        assert_eq!(told(&["finish"], &all), None);
    }

    #[test]
    fn a_task_that_its_node_has_not_begun_tells_what_it_waits_for() {
        let told = |state: &str, kinds: &[&str]| {
            let event = |kind: &&str| TaskEvent {
                kind: (*kind).to_owned(),
                display_message: "Missing: vault.read(a)".to_owned(),
                ..TaskEvent::default()
            };
            let events = kinds.iter().map(event).collect();
            let task = TaskState { state: state.to_owned(), events, ..TaskState::default() };
            let task_states =
                [("publish".to_owned(), task), ("finish".to_owned(), TaskState::default())].into();
            waits_for(&Allocation { task_states, ..Allocation::default() })
        };
        let waits = [(Phase::Publish, "Missing: vault.read(a)".to_owned())];
        assert_eq!(told("pending", &["Received", "Task Setup", "Template"]), waits);
        assert_eq!(told("pending", &["Received", "Driver"]), waits);
        assert_eq!(told("pending", &["Received", "Template", "Killing"]), []);
        assert_eq!(told("pending", &["Received"]), []);
        assert_eq!(told("running", &["Received", "Template"]), []);
        assert_eq!(told("dead", &["Received", "Template"]), []);
    }

    #[test]
    fn a_job_that_is_not_ours_is_passed_over() {
        assert!(job(&Job { id: "nb-other".to_owned(), ..Job::default() }).is_none());
    }

    #[test]
    fn an_allocation_that_its_agent_took_in_anew_after_it_began_is_forgotten() {
        let heard = |tasks: &[(&str, &[&str])]| {
            let events = |kinds: &[&str]| {
                let kinds = kinds.iter().zip(1..);
                kinds
                    .map(|(kind, time)| TaskEvent { kind: (*kind).to_owned(), time, ..TaskEvent::default() })
                    .collect()
            };
            let task = |(state, kinds): &(&str, &[&str])| TaskState {
                state: (*state).to_owned(),
                events: events(kinds),
                ..TaskState::default()
            };
            let names = ["build", "finish", "publish", "test"];
            let task_states =
                names.iter().zip(tasks).map(|(name, of)| ((*name).to_owned(), task(of))).collect();
            forgotten_at(&Allocation { task_states, ..Allocation::default() })
        };
        for (tasks, at) in [
            (&[("pending", &["Received"][..]), ("pending", &["Received"])][..], None),
            (&[("running", &["Received", "Task Setup", "Started"]), ("pending", &["Received"])], None),
            (&[("running", &["Received", "Started", "Reconnected"]), ("pending", &["Received"])], None),
            (
                &[("running", &["Received", "Started", "Received"]), ("pending", &["Received", "Received"])],
                Some(3),
            ),
            (
                &[("dead", &["Started", "Terminated", "Received"]), ("pending", &["Received", "Received"])],
                Some(3),
            ),
            // Nothing had begun, so all that it waits for is there.
            (&[("pending", &["Received", "Received"]), ("pending", &["Received", "Received"])], None),
        ] {
            assert_eq!(heard(tasks), at.map(DateTime::from_timestamp_nanos), "{tasks:?}");
        }
    }

    #[test]
    fn an_unknown_allocation_is_not_over() {
        let id = JobId::from_uuid(uuid::Uuid::from_u128(1)).to_string();
        for (status, over) in
            [("pending", false), ("running", false), ("unknown", false), ("lost", true), ("failed", true)]
        {
            let heard =
                Allocation { job_id: id.clone(), client_status: status.to_owned(), ..Allocation::default() };
            assert_eq!(allocation(&heard).unwrap().1.is_over(), over, "{status}");
        }
    }

    #[test]
    fn a_failed_allocation_may_work_until_its_finish_task_is_dead() {
        let allocation = |status: &str, tasks: &[(&str, &str)]| Allocation {
            client_status: status.to_owned(),
            task_states: tasks
                .iter()
                .map(|(name, state)| {
                    ((*name).to_owned(), TaskState { state: (*state).to_owned(), ..TaskState::default() })
                })
                .collect(),
            ..Allocation::default()
        };
        for (status, tasks, may) in [
            ("failed", &[("build", "dead"), ("finish", "pending")][..], true),
            ("failed", &[("build", "dead"), ("finish", "running")], true),
            ("failed", &[("build", "running"), ("finish", "pending")], true),
            ("failed", &[("build", "dead"), ("finish", "dead")], false),
            ("complete", &[("build", "dead"), ("finish", "dead")], false),
            // Stopped before it reached its node.
            ("complete", &[], false),
            ("failed", &[], false),
            ("lost", &[("build", "running"), ("finish", "pending")], false),
            ("pending", &[], true),
            ("unknown", &[("finish", "pending")], true),
        ] {
            assert_eq!(may_still_work(&allocation(status, tasks)), may, "{status} {tasks:?}");
        }
    }
}
