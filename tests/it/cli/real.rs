//! The command line against the real service.

use std::path::Path;
use std::process::Stdio;

use axum::http::StatusCode;
use nix::sys::signal::Signal;
use reqwest::Method;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader};
use tokio::process::Command;

use super::{command, end_of, finished, first_line, signal};
use crate::support::{At, Front, Hold, Repository, crash, eventually, world};

/// A job whose phase fails once it is let go, and how.
async fn failing(phase: &str) -> (Repository, Value, Hold, i32) {
    let (world, hold) = (world(), Hold::new());
    let step = if phase == "build" { format!("RUN {}; exit 9", hold.command()) } else { String::new() };
    let repository = world.repository(&step);
    let mut job = world.job(&repository);
    job["test_commands"] = json!([hold.command(), if phase == "test" { "exit 7" } else { "true" }]);
    let code = match phase {
        "build" => 3,
        "test" => 4,
        "publish" => {
            let refusing = Front::refusing(&world.registry, At::Upload, StatusCode::METHOD_NOT_ALLOWED).await;
            job["registry_url"] = json!(refusing);
            5
        }
        _ => 10,
    };
    (repository, job, hold, code)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_job_that_is_cleaned_up_before_its_status_is_asked_ends_the_follow_as_it_ended() {
    let (world, api) = (world(), world().api());
    let ended = ["build", "test", "publish", "runner"].map(async |phase| {
        let (_repository, job, hold, code) = failing(phase).await;
        let id = api.submit(&job).await;
        let mut child = command(&world.service.url, &["logs", "-f", &id]).spawn().unwrap();
        first_line(&mut child).await;
        // It hears of nothing until the job is gone; what it is told waits for it.
        signal(&child, Signal::SIGSTOP);
        if phase == "runner" {
            eventually("the tests", async || (api.status(&id).await["status"] == "TESTING").then_some(()))
                .await;
            crash(&id, "test");
        } else {
            hold.let_go().await;
        }
        let status = api.wait_for_end(&id).await;
        assert_eq!(status["status"], "FAILED", "{status:#}");
        eventually("a cleanup", async || {
            let (status, _) = api.call(Method::POST, &format!("/jobs/{id}/cleanup"), None).await;
            status.is_success().then_some(())
        })
        .await;
        let (gone, body) = api.call(Method::GET, &format!("/jobs/{id}/status"), None).await;
        assert_eq!(gone, 404, "{body}");
        signal(&child, Signal::SIGCONT);
        let (ended, stderr) = end_of(&mut child).await;
        assert_eq!(ended, Some(code), "{stderr}");
        let failure = &status["failure"];
        for word in [&failure["phase"], &failure["reason"], &failure["message"]] {
            assert!(stderr.contains(word.as_str().unwrap()), "{failure:#}\n{stderr}");
        }
        assert!(stderr.contains("no more is known"), "{stderr}");
    });
    futures_util::future::join_all(ended).await;
}

#[tokio::test]
async fn the_command_that_a_detached_follow_prints_goes_on_with_exactly_the_rest() {
    let (world, api) = (world(), world().api());
    let hold = Hold::new();
    let repository = world.repository("");
    let mut job = world.job(&repository);
    let lines = |from: u32, to: u32| {
        format!("i={from}; while [ $i -le {to} ]; do echo \"line $i\"; i=$((i+1)); done")
    };
    job["test_commands"] = json!([lines(1, 60), hold.command(), lines(61, 90)]);
    let id = api.submit(&job).await;
    let mut follow = command("http://127.0.0.1:1", &["--url", &world.service.url, "logs"]);
    let mut child = follow.args(["-f", "--phase", "test", &id]).spawn().unwrap();
    let (mut shown, mut stdout) = (String::new(), BufReader::new(child.stdout.take().unwrap()));
    while !shown.ends_with("line 30\n") {
        assert_ne!(stdout.read_line(&mut shown).await.unwrap(), 0, "{shown}");
    }
    signal(&child, Signal::SIGINT);
    stdout.read_to_string(&mut shown).await.unwrap();
    let (code, stderr) = end_of(&mut child).await;
    assert_eq!(code, Some(130), "{stderr}");
    hold.let_go().await;

    let printed = stderr.lines().find_map(|line| line.strip_prefix("follow it again with: ")).unwrap();
    // As who copies it has the program in their path, and nothing of ours in their environment.
    let path = Path::new(env!("CARGO_BIN_EXE_nomad-build")).parent().unwrap();
    let mut again = Command::new("/bin/sh");
    again.args(["-c", printed]).env("PATH", path).env_remove("NOMAD_BUILD_URL").env_remove("NOMAD_TOKEN");
    again.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let ran = finished(again).await;
    assert_eq!(ran.code, 0, "{printed}\n{}", ran.stderr);
    assert_eq!(shown + &ran.stdout, api.logs(&id).await["test"].as_str().unwrap(), "{printed}");
}
