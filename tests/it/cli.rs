//! The command line as its users meet it: the real binary, against a service that says what the test wrote down.

mod real;
mod service;
mod terminal;

use std::process::Stdio;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::process::{Child, Command};

use service::{Script, Service, Step, data, refusal};

const JOB: &str = "nb-0193a1c2-7e57-7000-8000-000000000000";
const STATUS: &str = "GET /jobs/nb-0193a1c2-7e57-7000-8000-000000000000/status";

/// How a run of the binary ended.
struct Ran {
    code: i32,
    stdout: String,
    stderr: String,
}

fn command(url: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nomad-build"));
    command.args(arguments).env("NOMAD_BUILD_URL", url).env_remove("NOMAD_TOKEN").env_remove("NO_COLOR");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    command
}

async fn finished(mut command: Command) -> Ran {
    let output = tokio::time::timeout(Duration::from_mins(1), command.output()).await.unwrap().unwrap();
    Ran {
        code: output.status.code().unwrap(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

async fn run(service: &Service, arguments: &[&str]) -> Ran {
    finished(command(&service.url, arguments)).await
}

fn status(status: &str, failure: Value) -> (u16, Value) {
    data(json!({ "job_id": JOB, "status": status, "failure": failure }))
}

fn log(phase: &str, line: &str, cursor: &str) -> Value {
    json!({ "type": "log", "phase": phase, "stream": "stdout", "line": line, "cursor": cursor })
}

fn phase(status: &str) -> Step {
    Step::Say(json!({ "type": "status", "status": status, "phase": null, "time": "2026-01-02T03:04:05Z" }))
}

fn end(status: &str) -> Step {
    Step::Say(json!({ "type": "end", "status": status, "time": "2026-01-02T03:04:05Z" }))
}

fn say(line: &str, cursor: &str) -> Step {
    Step::Say(log("build", line, cursor))
}

/// A job that lives while it is asked for the first time, and has succeeded from then on.
fn succeeding(connections: Vec<Vec<Step>>) -> Script {
    let statuses = vec![status("BUILDING", Value::Null), status("SUCCEEDED", Value::Null)];
    Script { answers: vec![(STATUS, statuses)], connections }
}

#[tokio::test]
async fn a_followed_log_that_is_cut_goes_on_behind_the_last_cursor_with_no_line_lost_or_doubled() {
    let mut part = log("build", "three ", "c3");
    part["partial"] = json!(true);
    let connections = vec![
        vec![phase("BUILDING"), say("one", "c1"), say("two", "c2"), Step::Say(part)],
        vec![Step::Refuse(503, json!({}))],
        vec![phase("BUILDING"), say("and a half", "c4"), Step::Say(json!({ "type": "heartbeat" }))],
        vec![phase("TESTING"), Step::Say(log("test", "four", "c 5&")), end("SUCCEEDED")],
    ];
    let service = Service::start(succeeding(connections)).await;
    let ran = run(&service, &["logs", "-f", "--tail", "9", JOB]).await;
    assert_eq!(ran.stdout, "one\ntwo\nthree and a half\nfour\n", "{}", ran.stderr);
    assert_eq!(service.streamed(), ["?tail=9", "?cursor=c3", "?cursor=c3", "?cursor=c4"]);
    assert_eq!(ran.stderr.matches("==> building").count(), 1, "{}", ran.stderr);
    assert!(ran.stderr.contains("trying again") && ran.stderr.contains("SUCCEEDED"), "{}", ran.stderr);
    assert_eq!(ran.code, 0);
}

#[tokio::test]
async fn lines_that_are_missing_are_named_and_messages_of_tomorrow_are_passed_over() {
    let gap = json!({ "type": "gap", "phase": "build", "message": "the log was rotated", "cursor": "c7" });
    let connections = vec![
        vec![Step::Say(json!({ "type": "weather" })), say("a", "c1"), Step::Say(gap)],
        vec![end("SUCCEEDED")],
    ];
    let service = Service::start(succeeding(connections)).await;
    let ran = run(&service, &["logs", "-f", JOB]).await;
    assert_eq!((ran.code, ran.stdout.as_str()), (0, "a\n"));
    assert!(ran.stderr.contains("gap in build log: the log was rotated"), "{}", ran.stderr);
    assert_eq!(service.streamed()[1], "?cursor=c7");
}

#[tokio::test]
async fn every_end_of_a_job_has_its_own_exit_code() {
    let failure =
        |phase: &str, reason: &str| json!({ "phase": phase, "reason": reason, "message": "no luck" });
    for (name, failure, code) in [
        ("SUCCEEDED", Value::Null, 0),
        ("FAILED", failure("build", "build_failed"), 3),
        ("FAILED", failure("test", "test_failed"), 4),
        ("FAILED", failure("publish", "push_failed"), 5),
        ("KILLED", failure("test", "killed"), 6),
        ("FAILED", failure("test", "timeout"), 7),
        ("LOST", failure("build", "node_lost"), 8),
    ] {
        let script = Script {
            answers: vec![
                ("POST /jobs", vec![data(json!({ "job_id": JOB }))]),
                (STATUS, vec![status(name, failure)]),
            ],
            connections: vec![vec![end(name)]; 2],
        };
        let service = Service::start(script).await;
        for arguments in [&["logs", "-f", JOB][..], &["submit", "--follow"], &["status", "--exit-code", JOB]]
        {
            let ran = run(&service, arguments).await;
            assert_eq!(ran.code, code, "{name} {arguments:?}: {}", ran.stderr);
        }
        assert_eq!(run(&service, &["status", JOB]).await.code, 0);
    }
}

#[tokio::test]
async fn a_job_that_has_not_ended_has_an_exit_code_of_its_own() {
    let service = Service::start(succeeding(Vec::new())).await;
    assert_eq!(run(&service, &["status", "--exit-code", JOB]).await.code, 9);
}

#[tokio::test]
async fn a_refused_submission_names_every_field_on_a_line_of_its_own() {
    let details = json!([{ "field": "owner", "message": "is missing" }, { "field": "image_tags[0]", "message": "no\u{1b}[2J tag" }]);
    let answers = vec![("POST /jobs", vec![refusal(400, "invalid_submission", details)])];
    let service = Service::start(Script { answers, ..Script::default() }).await;
    for arguments in [&["submit"][..], &["submit", "--follow"], &["validate"]] {
        let ran = run(&service, arguments).await;
        assert_eq!((ran.code, ran.stdout.as_str()), (2, ""));
        assert!(
            ran.stderr.contains("\n  owner: is missing\n  image_tags[0]: no\\x1b[2J tag\n"),
            "{}",
            ran.stderr
        );
    }
}

#[tokio::test]
async fn a_submission_is_the_file_s_with_the_flags_on_top_and_prints_the_job_id_alone() {
    let answers = vec![("POST /jobs", vec![data(json!({ "job_id": JOB, "valid": true }))])];
    let service = Service::start(Script { answers, ..Script::default() }).await;
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("build.yaml");
    std::fs::write(&file, "owner: file\nbuild_args: {A: \"$(id)\"}\n").unwrap();
    let file = file.to_str().unwrap();
    let ran = run(&service, &["submit", "-f", file, "--owner", "me"]).await;
    assert_eq!((ran.code, ran.stdout, ran.stderr), (0, format!("{JOB}\n"), String::new()));
    let ran = run(&service, &["validate", "-f", file]).await;
    assert_eq!((ran.code, ran.stdout.as_str()), (0, "valid\n"));
    let seen = service.seen();
    assert_eq!(seen[0].body, json!({ "owner": "me", "build_args": { "A": "$(id)" } }));
    assert_eq!(seen[1].line, "POST /jobs?dry_run=true");
}

#[tokio::test]
async fn a_service_that_is_down_is_said_at_once_and_with_what_to_try() {
    let port = crate::support::ports::port();
    let url = format!("http://127.0.0.1:{port}");
    let submit = &["submit", "--follow", "--retry-for", "PT0S"][..];
    for arguments in [submit, &["status", JOB], &["logs", "-f", JOB], &["kill", JOB]] {
        let ran = finished(command(&url, arguments)).await;
        assert_eq!((ran.code, ran.stdout.as_str()), (1, ""));
        assert!(ran.stderr.contains("because:") && ran.stderr.contains("hint: is the service running?"));
    }
}

#[tokio::test]
async fn a_failing_service_is_told_apart_from_a_refusal_and_its_request_is_named() {
    let answers = vec![("POST /jobs", vec![refusal(503, "nomad_unavailable", json!([]))])];
    let service = Service::start(Script { answers, ..Script::default() }).await;
    let ran = run(&service, &["submit", "--retry-for", "PT0S"]).await;
    assert_eq!(ran.code, 1);
    assert!(ran.stderr.contains("(nomad_unavailable)") && ran.stderr.contains("request-7"), "{}", ran.stderr);
}

#[tokio::test]
async fn a_submission_is_tried_again_under_one_key_until_it_is_answered() {
    let (away, taken) = (refusal(503, "nomad_unavailable", json!([])), data(json!({ "job_id": JOB })));
    let answers =
        vec![("POST /jobs", vec![away.clone(), refusal(429, "too_many_requests", json!([])), taken.clone()])];
    let service = Service::start(Script { answers, ..Script::default() }).await;
    let ran = run(&service, &["submit"]).await;
    assert_eq!((ran.code, ran.stdout.trim()), (0, JOB), "{}", ran.stderr);
    assert_eq!(ran.stderr.matches("trying again").count(), 2, "{}", ran.stderr);
    let keys: Vec<_> = service.seen().into_iter().map(|seen| seen.key).collect();
    assert!(keys[0].is_some() && keys.iter().all(|key| *key == keys[0]), "{keys:?}");
    // What is refused for good is not tried again; a token that has no keys is one more try, without.
    let no_keys = refusal(400, "invalid_request", json!([{ "field": "X-Nomad-Token", "message": "no" }]));
    for (answers, arguments, code, tries) in [
        (vec![refusal(400, "invalid_submission", json!([]))], &["submit"][..], 2, 1),
        (vec![no_keys.clone(), taken.clone()], &["submit"], 0, 2),
        (vec![no_keys, taken], &["submit", "--idempotency-key", "k"], 2, 1),
    ] {
        let answers = vec![("POST /jobs", answers)];
        let service = Service::start(Script { answers, ..Script::default() }).await;
        let ran = run(&service, arguments).await;
        let seen = service.seen();
        assert_eq!((ran.code, seen.len()), (code, tries), "{}", ran.stderr);
        assert_eq!(seen.last().unwrap().key.is_some(), tries == 1);
    }
}

#[tokio::test]
async fn what_the_service_refuses_to_stream_is_not_tried_again() {
    let (code, body) = refusal(403, "forbidden", json!([]));
    let service = Service::start(succeeding(vec![vec![Step::Refuse(code, body)]])).await;
    let ran = run(&service, &["logs", "-f", JOB]).await;
    assert_eq!(ran.code, 1);
    assert!(ran.stderr.contains("(forbidden)"), "{}", ran.stderr);
    assert_eq!(service.streamed().len(), 1);
    let unknown = run(&Service::start(Script::default()).await, &["logs", "-f", JOB]).await;
    assert!(unknown.code == 1 && unknown.stderr.contains("(job_not_found)"), "{}", unknown.stderr);
}

#[tokio::test]
async fn the_token_goes_with_every_request_and_is_never_shown() {
    let mut script = succeeding(vec![vec![end("SUCCEEDED")]]);
    script.answers.push(("POST /jobs", vec![refusal(503, "nomad_unavailable", json!([]))]));
    let service = Service::start(script).await;
    let submit = &["submit", "--retry-for", "PT0S"][..];
    for arguments in [&["logs", "-f", JOB][..], submit, &["--help"], &["submit", "--help"]] {
        let mut command = command(&service.url, arguments);
        command.env("NOMAD_TOKEN", "s3cret-token");
        let ran = finished(command).await;
        assert!(!(ran.stdout + &ran.stderr).contains("s3cret-token"), "{arguments:?}");
    }
    let seen = service.seen();
    assert_eq!(seen.len(), 4);
    assert!(seen.iter().all(|seen| seen.token.as_deref() == Some("s3cret-token")), "{seen:?}");
}

fn signal(child: &Child, signal: Signal) {
    kill(Pid::from_raw(child.id().unwrap().try_into().unwrap()), signal).unwrap();
}

async fn first_line(child: &mut Child) -> String {
    let mut line = String::new();
    BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).await.unwrap();
    line
}

async fn end_of(child: &mut Child) -> (Option<i32>, String) {
    let status = tokio::time::timeout(Duration::from_mins(1), child.wait()).await.unwrap().unwrap();
    let mut stderr = String::new();
    child.stderr.take().unwrap().read_to_string(&mut stderr).await.unwrap();
    (status.code(), stderr)
}

#[tokio::test]
async fn a_reader_that_has_enough_ends_the_follow_quietly() {
    let service = Service::start(succeeding(vec![vec![Step::Flood]])).await;
    let mut child = command(&service.url, &["logs", "-f", JOB]).spawn().unwrap();
    assert_eq!(first_line(&mut child).await, "flood\n");
    drop(child.stdout.take());
    let (code, stderr) = end_of(&mut child).await;
    assert_eq!((code, stderr.as_str()), (Some(0), ""));
}

#[tokio::test]
async fn ctrl_c_leaves_the_job_alone_and_says_how_to_come_back() {
    let connections = vec![vec![say("first", "c1"), Step::Hang], vec![say("first", "c1"), Step::Flood]];
    let service = Service::start(succeeding(connections)).await;
    for _ in 0..2 {
        let mut command = command(&service.url, &["logs", "-f", "--tail", "5", JOB]);
        let mut child = command.env("NOMAD_TOKEN", "s3cret-token").spawn().unwrap();
        assert_eq!(first_line(&mut child).await, "first\n");
        let mut stdout = child.stdout.take().unwrap();
        let drained = tokio::spawn(async move { tokio::io::copy(&mut stdout, &mut tokio::io::sink()).await });
        signal(&child, Signal::SIGINT);
        let (code, stderr) = end_of(&mut child).await;
        assert_eq!(code, Some(130), "{stderr}");
        let program = format!("nomad-build --url {}", service.url);
        for command in [format!("{program} logs -f --cursor c"), format!("{program} kill {JOB}\n")] {
            assert!(stderr.contains(&command), "{stderr}");
        }
        assert!(!stderr.contains("s3cret-token") && !stderr.contains("--tail"), "{stderr}");
        drained.await.unwrap().unwrap();
    }
    assert!(service.seen().iter().all(|seen| seen.line.starts_with("GET ")));
}

#[tokio::test]
async fn a_log_that_is_not_for_a_terminal_is_written_byte_for_byte() {
    let line = "\u{1b}[2J\u{1b}[31mred\ttab\r\u{7}";
    let logs = data(json!({ "build": format!("{line}\n"), "test": "no line end", "publish": "" }));
    let mut script = succeeding(vec![vec![say(line, "c1"), end("SUCCEEDED")]]);
    script.answers.push(("GET /jobs/nb-0193a1c2-7e57-7000-8000-000000000000/logs", vec![logs]));
    let service = Service::start(script).await;
    assert_eq!(run(&service, &["logs", "-f", JOB]).await.stdout, format!("{line}\n"));
    let ran = run(&service, &["logs", JOB]).await;
    assert_eq!(ran.stdout, format!("{line}\nno line end\n"));
    assert_eq!(ran.stderr, "==> build\n==> test\n");
}

#[tokio::test]
async fn json_is_the_service_s_own_and_a_message_a_line_where_a_job_is_followed() {
    let connections = vec![vec![phase("BUILDING"), say("one", "c1"), end("SUCCEEDED")]];
    let mut script = succeeding(connections);
    script.answers.push(("POST /jobs", vec![data(json!({ "job_id": JOB }))]));
    let service = Service::start(script).await;
    let ran = run(&service, &["-o", "json", "status", JOB]).await;
    assert_eq!(
        serde_json::from_str::<Value>(&ran.stdout).unwrap(),
        status("BUILDING", Value::Null).1["data"]
    );
    let ran = run(&service, &["submit", "--follow", "-o", "json"]).await;
    let lines: Vec<Value> = ran.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let types: Vec<_> = lines.iter().map(|line| line["type"].as_str().unwrap()).collect();
    assert_eq!(types, ["submitted", "status", "log", "end"]);
    assert_eq!((&lines[0]["job_id"], &lines[2]), (&json!(JOB), &log("build", "one", "c1")));
}

#[tokio::test]
async fn a_job_that_cannot_be_killed_or_cleaned_up_says_why() {
    let answers = vec![
        (
            "POST /jobs/nb-0193a1c2-7e57-7000-8000-000000000000/kill",
            vec![
                data(json!({ "success": true })),
                data(json!({ "success": false, "reason": "it publishes" })),
            ],
        ),
        (
            "POST /jobs/nb-0193a1c2-7e57-7000-8000-000000000000/cleanup",
            vec![data(json!({ "success": true })), refusal(409, "job_live", json!([]))],
        ),
    ];
    let service = Service::start(Script { answers, ..Script::default() }).await;
    for (verb, why) in [("kill", "it publishes"), ("cleanup", "job_live")] {
        let done = run(&service, &[verb, JOB]).await;
        assert_eq!((done.code, done.stdout.as_str()), (0, ""), "{}", done.stderr);
        let refused = run(&service, &[verb, JOB]).await;
        assert_eq!(refused.code, 1);
        assert!(refused.stderr.contains(why), "{}", refused.stderr);
    }
}

#[tokio::test]
async fn plain_http_works_on_a_machine_without_certificates() {
    let service = Service::start(succeeding(vec![vec![end("SUCCEEDED")]])).await;
    let mut command = command(&service.url, &["logs", "-f", JOB]);
    command.env("SSL_CERT_FILE", "/nonexistent").env("SSL_CERT_DIR", "/nonexistent");
    let ran = finished(command).await;
    assert_eq!(ran.code, 0, "{}", ran.stderr);
}

#[tokio::test]
async fn wrong_usage_is_told_apart_and_what_asks_nobody_needs_no_service() {
    let nowhere = "not a url";
    for (arguments, code) in [
        (&["status"][..], 2),
        (&["status", "../x"], 2),
        (&["submit", "--build-arg", "novalue"], 2),
        (&["submit", "-f", "/nonexistent/file"], 2),
        (&["status", JOB], 2),
        (&["version"], 0),
        (&["--help"], 0),
        (&["completions", "bash"], 0),
    ] {
        let ran = finished(command(nowhere, arguments)).await;
        assert_eq!(ran.code, code, "{arguments:?}: {}", ran.stderr);
        assert_eq!(ran.stdout.is_empty(), code != 0, "{arguments:?}");
    }
}
