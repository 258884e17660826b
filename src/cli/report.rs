//! A job's status as text for people.
//!
//! Invariant: pure; the time is passed in, and everything of the service's is made harmless.

use std::error::Error as StdError;

use chrono::{DateTime, Utc};

use super::fields::PHASES;
use super::harmless;
use super::output::{Colour, Paint};
use super::wire::{Failure, Status};

/// The width of the left column.
const LABEL: usize = 10;

/// A table of what is known of the job.
pub(super) fn table(status: &Status, now: DateTime<Utc>, paint: Paint) -> String {
    let mut lines = vec![format!(
        "{}  {}",
        paint.text(Colour::Bold, &harmless::text(&status.job_id)),
        paint.text(colour_of(&status.status), &harmless::text(&status.status))
    )];
    lines.extend(labelled("git", &git(status)));
    lines.extend(labelled("waiting", &status.placement.iter().map(|text| clean(text)).collect::<Vec<_>>()));
    lines.push(String::new());
    let head = format!("{:<LABEL$}{:<10}{:>10}  started", "phase", "state", "took");
    lines.push(paint.text(Colour::Dim, &head));
    lines.extend(PHASES.map(|phase| row(status, phase, now, paint)));
    lines.push(String::new());
    lines.extend(image(status, paint));
    lines.extend(status.failure.iter().flat_map(|failure| labelled("failure", &reasons(failure))));
    lines.extend(labelled("nomad", &nomad(status)));
    while lines.last().is_some_and(String::is_empty) {
        lines.pop();
    }
    lines.join("\n") + "\n"
}

/// How a followed job ended, and what came of it.
pub(super) fn summary(status: &Status, paint: Paint) -> Vec<String> {
    let took = match (status.time("job_start"), status.time("job_end")) {
        (Some(start), Some(end)) => format!(" after {}", duration((end - start).as_seconds_f64())),
        _ => String::new(),
    };
    let name = paint.text(colour_of(&status.status), &clean(&status.status));
    let mut lines = vec![format!("==> {name}{took}")];
    lines.extend(status.failure.iter().flat_map(|failure| labelled("failure", &reasons(failure))));
    lines.extend(image(status, paint));
    lines
}

/// An error with its causes, in one line.
pub(super) fn chain(error: &dyn StdError) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    clean(&text)
}

fn row(status: &Status, phase: &str, now: DateTime<Utc>, paint: Paint) -> String {
    let start = status.time(&format!("{phase}_start"));
    let end = status.time(&format!("{phase}_end"));
    let ended_in = status.failure.as_ref().is_some_and(|failure| failure.phase.as_deref() == Some(phase));
    // Of a job that somebody ended, the phase before that may be done.
    let was_stopped = ended_in && status.status == "KILLED" && end.is_some() && end == status.time("job_end");
    let (state, colour) = match (start, end) {
        _ if ended_in && status.status == "FAILED" => ("failed", Colour::Red),
        _ if was_stopped => ("stopped", Colour::Yellow),
        (Some(_), None) if status.is_final() => ("stopped", Colour::Yellow),
        (Some(_), None) => ("running", Colour::Cyan),
        (_, Some(_)) => ("done", Colour::Green),
        (None, None) if status.is_final() || has_later(status, phase) => ("not run", Colour::Dim),
        (None, None) => ("to come", Colour::Dim),
    };
    let until = end.or_else(|| (!status.is_final()).then_some(now));
    let between = start.zip(until).map(|(start, until)| (until - start).as_seconds_f64());
    let took = status.seconds(phase).or(between).map_or_else(|| "-".to_owned(), duration);
    let started =
        start.map_or_else(|| "-".to_owned(), |time| time.format("%Y-%m-%d %H:%M:%S UTC").to_string());
    // Padded before it is coloured: the codes have no width.
    format!("{phase:<LABEL$}{}{took:>10}  {started}", paint.text(colour, &format!("{state:<10}")))
}

/// Whether a later phase has begun, so that this one was passed over: a job without tests has none to run.
fn has_later(status: &Status, phase: &str) -> bool {
    PHASES
        .iter()
        .skip_while(|name| **name != phase)
        .any(|name| status.time(&format!("{name}_start")).is_some())
}

fn git(status: &Status) -> Vec<String> {
    let reference = status.git.reference.as_deref().map(clean);
    let commit = status.git.commit.as_deref().map(clean);
    match (reference, commit) {
        (Some(reference), Some(commit)) => vec![format!("{reference} ({commit})")],
        (reference, commit) => reference.or(commit).into_iter().collect(),
    }
}

fn image(status: &Status, paint: Paint) -> Vec<String> {
    let mut lines =
        labelled("digest", &status.image.digest.iter().map(|text| clean(text)).collect::<Vec<_>>());
    let width = status.image.references.iter().map(|image| clean(&image.reference).chars().count()).max();
    let tags = status.image.references.iter().map(|image| {
        let (word, colour) = match image.published.as_deref() {
            Some("yes") => ("published", Colour::Green),
            Some("no") => ("not published", Colour::Dim),
            _ => ("unknown whether published", Colour::Yellow),
        };
        let width = width.unwrap_or_default();
        format!("{:<width$}  {}", clean(&image.reference), paint.text(colour, word))
    });
    lines.extend(labelled("tags", &tags.collect::<Vec<_>>()));
    lines
}

fn reasons(failure: &Failure) -> Vec<String> {
    let place = [failure.phase.as_deref(), failure.reason.as_deref()];
    let mut words: Vec<String> = place.into_iter().flatten().map(clean).collect();
    words.extend(failure.exit_code.map(|code| format!("exit code {code}")));
    let message = failure.message.as_deref().unwrap_or_default();
    let message = message.lines().filter(|line| !line.trim().is_empty()).map(clean);
    std::iter::once(words.join(", ")).filter(|line| !line.is_empty()).chain(message).collect()
}

fn nomad(status: &Status) -> Vec<String> {
    let nomad = &status.nomad;
    let named = [("namespace", &nomad.namespace), ("allocation", &nomad.allocation), ("node", &nomad.node)];
    let words: Vec<String> = named
        .iter()
        .filter_map(|(name, value)| Some(format!("{name} {}", clean(value.as_deref()?))))
        .collect();
    if words.is_empty() { Vec::new() } else { vec![words.join(", ")] }
}

/// The values below each other, the label before the first.
fn labelled(label: &str, values: &[String]) -> Vec<String> {
    let labels = std::iter::once(label).chain(std::iter::repeat(""));
    labels.zip(values).map(|(label, value)| format!("{label:<LABEL$}{value}")).collect()
}

pub(super) fn colour_of(status: &str) -> Colour {
    match status {
        "SUCCEEDED" => Colour::Green,
        "FAILED" | "LOST" => Colour::Red,
        "KILLED" => Colour::Yellow,
        _ => Colour::Cyan,
    }
}

fn clean(text: &str) -> String {
    harmless::text(text).into_owned()
}

/// Seconds as a person says them.
fn duration(seconds: f64) -> String {
    if !seconds.is_finite() || seconds < 0.0 {
        return "-".to_owned();
    }
    if seconds < 60.0 {
        return format!("{seconds:.1}s");
    }
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "checked above; a cast saturates"
    )]
    let whole = seconds.round() as u64;
    match (whole / 3600, whole / 60 % 60, whole % 60) {
        (0, minutes, seconds) => format!("{minutes}m {seconds:02}s"),
        (hours, minutes, seconds) => format!("{hours}h {minutes:02}m {seconds:02}s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(json: &str) -> Status {
        serde_json::from_str(json).unwrap()
    }

    fn at(text: &str) -> DateTime<Utc> {
        text.parse().unwrap()
    }

    #[test]
    fn a_duration_is_said_as_a_person_says_it() {
        for (seconds, said) in [
            (0.04, "0.0s"),
            (12.34, "12.3s"),
            (59.99, "60.0s"),
            (60.0, "1m 00s"),
            (3599.6, "1h 00m 00s"),
            (f64::NAN, "-"),
            (-1.0, "-"),
        ] {
            assert_eq!(duration(seconds), said);
        }
    }

    #[test]
    fn a_failed_job_shows_what_failed_and_nothing_a_terminal_obeys() {
        let status = status(
            r#"{"job_id":"nb-1","status":"FAILED","metrics":{"build_duration_seconds":62,"test_duration_seconds":1.5},
            "phase_timestamps":{"job_start":"2026-01-02T03:04:00Z","build_start":"2026-01-02T03:04:05Z",
            "build_end":"2026-01-02T03:05:07Z","test_start":"2026-01-02T03:05:08Z","test_end":"2026-01-02T03:05:09.5Z",
            "publish_start":null,"job_end":"2026-01-02T03:05:10Z"},
            "git":{"ref":"main","commit":"4f2c1a"},
            "image":{"digest":null,"references":[{"reference":"r/app:1","published":"no"},{"reference":"r/app:latest","published":"no"}]},
            "failure":{"phase":"test","reason":"test_failed","exit_code":7,"message":"command 1 failed\n\u001b[2Jboo"},
            "nomad":{"namespace":"ci","job":"nb-1","allocation":"a1","node":"n1"}}"#,
        );
        insta::assert_snapshot!(table(&status, at("2026-01-02T03:10:00Z"), Paint(false)), @r"
        nb-1  FAILED
        git       main (4f2c1a)

        phase     state           took  started
        build     done          1m 02s  2026-01-02 03:04:05 UTC
        test      failed          1.5s  2026-01-02 03:05:08 UTC
        publish   not run            -  -

        tags      r/app:1       not published
                  r/app:latest  not published
        failure   test, test_failed, exit code 7
                  command 1 failed
                  \x1b[2Jboo
        nomad     namespace ci, allocation a1, node n1
        ");
        insta::assert_snapshot!(summary(&status, Paint(false)).join("\n"), @r"
        ==> FAILED after 1m 10s
        failure   test, test_failed, exit code 7
                  command 1 failed
                  \x1b[2Jboo
        tags      r/app:1       not published
                  r/app:latest  not published
        ");
    }

    #[test]
    fn only_the_phase_that_failed_is_shown_as_failed() {
        let states = |state: &str, phase: &str, times: &str| {
            let json = format!(
                r#"{{"job_id":"nb-1","status":"{state}","failure":{{"phase":"{phase}"}},"phase_timestamps":{{
                "build_start":"2026-01-02T03:04:00Z","build_end":"2026-01-02T03:04:01Z",{times}
                "job_end":"2026-01-02T03:04:09Z"}}}}"#
            );
            PHASES.map(|phase| {
                let row = row(&status(&json), phase, at("2026-01-02T03:10:00Z"), Paint(false));
                row[LABEL..LABEL + 10].trim_end().to_owned()
            })
        };
        let test = |end: &str| format!(r#""test_start":"2026-01-02T03:04:02Z","test_end":{end},"#);
        let (tested, cut) = (test("\"2026-01-02T03:04:03Z\""), test("\"2026-01-02T03:04:09Z\""));
        for (state, phase, times, want) in [
            ("FAILED", "publish", tested.as_str(), ["done", "done", "failed"]),
            ("FAILED", "publish", &test("null"), ["done", "stopped", "failed"]),
            ("FAILED", "test", &cut, ["done", "failed", "not run"]),
            ("KILLED", "test", &cut, ["done", "stopped", "not run"]),
            ("KILLED", "test", &tested, ["done", "done", "not run"]),
            ("LOST", "build", "", ["done", "not run", "not run"]),
            ("LOST", "test", &test("null"), ["done", "stopped", "not run"]),
        ] {
            assert_eq!(states(state, phase, times), want, "{state} in {phase}: {times}");
        }
    }

    #[test]
    fn a_running_job_without_tests_shows_how_long_it_publishes() {
        let status = status(
            r#"{"job_id":"nb-1","status":"PUBLISHING","phase_timestamps":{"build_start":"2026-01-02T03:04:05Z",
            "build_end":"2026-01-02T03:04:06Z","publish_start":"2026-01-02T03:04:07Z"}}"#,
        );
        insta::assert_snapshot!(table(&status, at("2026-01-02T03:04:10Z"), Paint(false)), @r"
        nb-1  PUBLISHING

        phase     state           took  started
        build     done            1.0s  2026-01-02 03:04:05 UTC
        test      not run            -  -
        publish   running         3.0s  2026-01-02 03:04:07 UTC
        ");
    }

    #[test]
    fn a_waiting_job_says_why_it_waits() {
        let status = status(
            r#"{"job_id":"nb-1","status":"PENDING","placement":"no node has 9000 MHz","git":{"ref":"main"}}"#,
        );
        insta::assert_snapshot!(table(&status, at("2026-01-02T03:04:10Z"), Paint(false)), @r"
        nb-1  PENDING
        git       main
        waiting   no node has 9000 MHz

        phase     state           took  started
        build     to come            -  -
        test      to come            -  -
        publish   to come            -  -
        ");
    }
}
