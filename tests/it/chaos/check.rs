//! What must hold of a history, whatever failed.

use std::collections::{BTreeMap, HashSet};

use serde_json::Value;

use super::history::{Harm, History, Job, Plan};
use crate::support::{PHASES, TIMES};

/// What does not hold, each with its job.
pub(super) fn violations(history: &History) -> Vec<String> {
    let mut found = Vec::new();
    let mut ids = HashSet::new();
    for job in &history.jobs {
        let mut say = |what: String| found.push(format!("{}: {what}", job.id));
        if !ids.insert(&job.id) {
            say("is the ID of two submissions".to_owned());
        }
        if job.ids.iter().any(|id| *id != job.id) {
            say(format!("its key was answered with {:?}", job.ids));
        }
        let purged = job.harms.iter().any(|(_, harm, _)| *harm == Harm::Purge);
        // Who was started behind a purge has nobody to ask, until the job is archived.
        if purged && job.told.is_empty() {
            continue;
        }
        if !purged && !job.unknown.is_empty() {
            say(format!("was told to be unknown: {:?}", job.unknown));
        }
        end(job, &mut say);
        times(job, &mut say);
        published(job, &mut say);
        lines(job, &mut say);
    }
    for allocation in &history.running {
        found.push(format!(
            "{}: still runs in Nomad: {allocation}",
            allocation["JobID"].as_str().unwrap_or("?")
        ));
    }
    if let Some((digest, of)) = &history.shared {
        let claimed = |job: &Job| job.id == *of && last(job)["image"]["digest"] == digest.as_str();
        if !history.jobs.iter().any(claimed) {
            found.push(format!("the shared tag serves {digest}, an image of {of}, which nobody claimed"));
        }
    }
    found
}

fn last(job: &Job) -> &Value {
    job.told.first().map_or(&Value::Null, |(status, _)| status)
}

fn is_final(status: &Value) -> bool {
    matches!(status["status"].as_str(), Some("SUCCEEDED" | "FAILED" | "KILLED" | "LOST"))
}

/// One final status, which never changes and is the same everywhere; before it, no way back.
fn end(job: &Job, say: &mut impl FnMut(String)) {
    let end = last(job);
    if !is_final(end) {
        say(format!("has not ended: {end}"));
        return;
    }
    let of_end =
        |status: &Value| [status["status"].clone(), status["failure"].clone(), status["image"].clone()];
    for (status, _) in &job.told {
        if of_end(status) != of_end(end) {
            say(format!("is told in two ways: {end} and {status}"));
        }
    }
    let rank = |status: &Value| {
        let order = ["PENDING", "BUILDING", "TESTING", "PUBLISHING"];
        order.iter().position(|name| status["status"] == *name).unwrap_or(order.len())
    };
    let mut before: BTreeMap<(usize, usize), &Value> = BTreeMap::new();
    for seen in &job.seen {
        if is_final(&seen.status) && of_end(&seen.status)[..2] != of_end(end)[..2] {
            say(format!("ended as {} and later as {end}", seen.status));
        }
        if let Some(earlier) = before.insert(seen.by, &seen.status)
            && rank(earlier) > rank(&seen.status)
        {
            say(format!(
                "went back from {} to {} on replica {:?}",
                earlier["status"], seen.status["status"], seen.by
            ));
        }
    }
    let status = end["status"].as_str().unwrap_or_default();
    if job.kills.contains(&true) && status != "KILLED" {
        say(format!("was killed, and is {status}"));
    }
    let may = match job.plan {
        _ if !job.harms.is_empty() => true,
        // Nomad replaces what it takes for pending on a node that it misses, and stops it when the node is back.
        _ if (job.away || job.rebooted) && is_of_node(end) => true,
        // Nothing else ends a job: not the death of services, of leaders or of the node's agent.
        Plan::Succeeds | Plan::TakesLong => status == "SUCCEEDED",
        Plan::FailsItsTest => end["failure"]["reason"] == "test_failed",
        Plan::FailsItsBuild => end["failure"]["reason"] == "build_failed",
    };
    if !may {
        say(format!("nobody harmed it, and it ended as {end}\n{}", job.died.join("\n")));
    }
    let fails = matches!(job.plan, Plan::FailsItsBuild | Plan::FailsItsTest);
    if fails && status == "SUCCEEDED" {
        say("succeeded, though it cannot".to_owned());
    }
}

/// Whether a job ended as one does that Nomad replaced, or stopped as its node came back.
fn is_of_node(end: &Value) -> bool {
    matches!(end["failure"]["reason"].as_str(), Some("node_lost" | "stopped"))
}

/// Times that were told stand, and go on.
fn times(job: &Job, say: &mut impl FnMut(String)) {
    let end = &last(job)["phase_timestamps"];
    // A task that was restarted by hand begins its phase anew, and a verdict has the time before it was written.
    if !job.harms.is_empty() || job.rebooted {
        return;
    }
    let told: Vec<_> = TIMES.iter().filter_map(|name| end[*name].as_str()).collect();
    if !told.is_sorted() {
        say(format!("its times go back: {end}"));
    }
    for seen in &job.seen {
        for name in TIMES {
            let (then, now) = (&seen.status["phase_timestamps"][name], &end[name]);
            if !then.is_null() && then != now {
                say(format!("{name} was {then} and is {now}"));
            }
        }
    }
}

/// What the registry serves is what the job claimed, and nothing of a job that claimed nothing.
fn published(job: &Job, say: &mut impl FnMut(String)) {
    let end = last(job);
    let digest = end["image"]["digest"].as_str();
    if matches!(end["status"].as_str(), Some("KILLED" | "LOST")) && digest.is_some() {
        say(format!("was revoked, and has a claim: {end}"));
    }
    match (&job.served, digest) {
        (Some((served, of)), Some(digest)) if served != digest || *of != job.id => {
            say(format!("claimed {digest}, and its tag serves {served}, an image of {of}"));
        }
        (Some((served, _)), None) => say(format!("claimed nothing, and its tag serves {served}")),
        (None, _) if end["status"] == "SUCCEEDED" => say("succeeded, and its tag serves nothing".to_owned()),
        _ => {}
    }
    let references = end["image"]["references"].as_array();
    let own = references.into_iter().flatten().find(|reference| {
        reference["reference"].as_str().is_some_and(|text| text.ends_with(&format!(":{}", job.tag)))
    });
    let says = own.map_or(&Value::Null, |own| &own["published"]);
    if (says == "yes" && job.served.is_none()) || (says == "no" && job.served.is_some()) {
        say(format!("says {says} of its tag, which serves {:?}", job.served));
    }
}

/// What a reader was told is the log, or a gap that is named.
fn lines(job: &Job, say: &mut impl FnMut(String)) {
    let unharmed = job.harms.is_empty() && !job.rebooted && !job.away;
    for (_, log) in &job.told {
        if !log["missing"].is_null() && unharmed {
            say(format!("its log lacks {}", log["missing"]));
        }
    }
    let (Some(messages), Some((_, log))) = (&job.read, job.told.first()) else { return };
    if messages.last().is_none_or(|message| message["type"] != "end") {
        say("its reader never came to the end".to_owned());
    }
    if messages.iter().any(|message| message["type"] == "gap") || !log["missing"].is_null() {
        if unharmed {
            say(format!("its reader was told of gaps: {messages:?}"));
        }
        return;
    }
    // These run in another allocation, or write into the same log again.
    let runs_again = |(_, harm, _): &(u128, Harm, String)| {
        matches!(harm, Harm::StopAndStart | Harm::KillAndStart | Harm::Restart | Harm::Reboot)
    };
    if job.rebooted || job.harms.iter().any(runs_again) {
        return;
    }
    for phase in PHASES {
        // What waited in vain may say so, whenever it hears of it.
        if last(job)["phase_timestamps"][format!("{phase}_start")].is_null() {
            continue;
        }
        let of_phase = |message: &&Value| message["type"] == "log" && message["phase"] == phase;
        let read: String = messages
            .iter()
            .filter(of_phase)
            .flat_map(|message| {
                let end = if message["partial"] == true { "" } else { "\n" };
                [message["line"].as_str().unwrap_or_default(), end]
            })
            .collect();
        let whole = log[phase].as_str().unwrap_or_default();
        // A node that is rebooted behind a job's end starts its task again, which finds that it has ended.
        let is_of_the_job = |line: &str| !line.starts_with("nothing to do: ");
        if whole.strip_prefix(&read).is_none_or(|more| more.lines().any(is_of_the_job)) {
            say(format!("its reader was told of {phase}:\n{read}and the log is:\n{whole}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::history::Seen;
    use super::*;

    fn status(status: &str) -> Value {
        let image = match status {
            "SUCCEEDED" => {
                json!({"digest": "sha256:1", "references": [{"reference": "r/a:t", "published": "yes"}]})
            }
            _ => json!({"digest": null, "references": [{"reference": "r/a:t", "published": "no"}]}),
        };
        let times =
            json!({"job_start": "2026-01-01T00:00:00.000Z", "build_start": "2026-01-01T00:00:01.000Z"});
        json!({"status": status, "failure": null, "image": image, "phase_timestamps": times})
    }

    fn seen(name: &str) -> Seen {
        Seen { at: 0, by: (0, 0), status: status(name) }
    }

    fn log() -> Value {
        json!({"build": "a\nbc\n", "test": "", "publish": ""})
    }

    fn clean() -> Job {
        let line = |text: &str, partial: bool| json!({"type": "log", "phase": "build", "line": text, "partial": partial});
        let mut job = Job::new("nb-1", Plan::Succeeds, "t");
        job.seen = ["PENDING", "BUILDING", "SUCCEEDED"].map(seen).into();
        job.told = vec![(status("SUCCEEDED"), log()); 2];
        job.read = Some(vec![line("a", false), line("b", true), line("c", false), json!({"type": "end"})]);
        job.served = Some(("sha256:1".to_owned(), "nb-1".to_owned()));
        job
    }

    fn found(jobs: Vec<Job>) -> Vec<String> {
        let shared = Some(("sha256:1".to_owned(), "nb-1".to_owned()));
        violations(&History { jobs, troubles: Vec::new(), shared, running: Vec::new() })
    }

    #[test]
    fn a_clean_history_is_clean() {
        assert_eq!(found(vec![clean()]), [] as [String; 0]);
    }

    #[test]
    fn whatever_is_wrong_is_found() {
        type Wrong = fn(&mut Job);
        let wrong: [(&str, Wrong); 17] = [
            ("its key was answered", |job| job.ids.push("nb-2".to_owned())),
            ("unknown", |job| job.unknown.push((1, 2))),
            ("has not ended", |job| job.told[0].0 = status("TESTING")),
            ("two ways", |job| job.told[1].0["status"] = json!("LOST")),
            ("and later as", |job| job.seen.push(seen("FAILED"))),
            ("went back", |job| job.seen.insert(2, seen("PENDING"))),
            ("was killed", |job| job.kills.push(true)),
            ("nobody harmed it", |job| job.plan = Plan::FailsItsTest),
            ("though it cannot", |job| {
                job.plan = Plan::FailsItsBuild;
                job.harms.push((0, Harm::Crash, String::new()));
            }),
            ("times go back", |job| {
                job.told[0].0["phase_timestamps"]["job_end"] = json!("2025-01-01T00:00:00.000Z");
            }),
            ("build_start was", |job| {
                job.seen[1].status["phase_timestamps"]["build_start"] = json!("2026-01-01T00:00:00.500Z");
            }),
            ("has a claim", |job| job.told.iter_mut().for_each(|told| told.0["status"] = json!("KILLED"))),
            ("its tag serves sha256:2", |job| job.served = Some(("sha256:2".to_owned(), "nb-1".to_owned()))),
            ("an image of nb-9", |job| job.served = Some(("sha256:1".to_owned(), "nb-9".to_owned()))),
            ("serves nothing", |job| job.served = None),
            ("never came to the end", |job| drop(job.read.as_mut().and_then(Vec::pop))),
            ("was told of build", |job| drop(job.read.as_mut().map(|read| read.remove(0)))),
        ];
        for (want, harm) in wrong {
            let mut job = clean();
            harm(&mut job);
            let found = found(vec![job]);
            assert!(found.iter().any(|text| text.contains(want)), "{want}: {found:?}");
        }
        assert!(found(vec![clean(), clean()])[0].contains("two submissions"));
        let mut other = clean();
        other.told.iter_mut().for_each(|told| told.0["image"]["digest"] = json!("sha256:3"));
        assert!(found(vec![other]).iter().any(|text| text.contains("shared tag")));
    }

    #[test]
    fn what_a_task_says_that_was_started_behind_the_end_is_no_part_of_the_log() {
        for (more, is_clean) in [("nothing to do: the job has ended (FAILED)\n", true), ("d\n", false)] {
            let mut job = clean();
            job.told[0].1["build"] = json!(format!("a\nbc\n{more}"));
            assert_eq!(found(vec![job]).is_empty(), is_clean, "{more}");
        }
    }

    #[test]
    fn a_gap_that_is_named_is_no_lie_of_a_job_that_was_harmed() {
        let mut job = clean();
        job.harms.push((0, Harm::Crash, String::new()));
        job.read.as_mut().unwrap()[0] = json!({"type": "gap", "message": "lines 1 to 1 are missing"});
        assert_eq!(found(vec![job.clone()]), [] as [String; 0]);
        job.harms.clear();
        assert!(found(vec![job])[0].contains("told of gaps"));
    }
}
