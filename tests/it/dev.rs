//! `nomad-build dev`: what it promises of a stack's life.

use std::fs::File;
use std::net::TcpListener;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::stack::{Stack, processes_of, wait_for};
use crate::support::{Api, EngineFront, Hold, Repository, containers_of, eventually, tags_of, world};

const DOWN: Duration = Duration::from_mins(1);

/// Tasks that end neither at a signal nor with their agent, one of them in a session of its own.
const STUBBORN: &str = r#"
job "stubborn" {
  type = "batch"
  group "stubborn" {
    task "stubborn" {
      driver       = "raw_exec"
      kill_timeout = "1s"
      config {
        command = "/bin/sh"
        args    = ["-c", "trap '' INT TERM; setsid sleep 600 & while :; do sleep 1; done"]
      }
    }
  }
}
"#;

fn run_stubborn_job(stack: &Stack) {
    let job = stack.data_dir.join("stubborn.nomad.hcl");
    std::fs::write(&job, STUBBORN).unwrap();
    stack.nomad(&["job", "run", "-detach", job.to_str().unwrap()]);
    wait_for("the job runs", DOWN, || {
        stack.nomad(&["job", "status", "stubborn"]).contains(" running ").then_some(())
    });
}

fn assert_nothing_is_left(data_dir: &Path) {
    let deadline = Instant::now() + DOWN;
    while !processes_of(data_dir).is_empty() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(50));
    }
    let left = command_lines(data_dir);
    assert!(left.is_empty(), "after {DOWN:?}: {left:?}");
    wait_for("the directory is gone", DOWN, || (!data_dir.exists()).then_some(()));
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(!mounts.contains(data_dir.to_str().unwrap()), "{mounts}");
}

#[test]
fn a_stack_that_is_stopped_leaves_nothing_behind() {
    let stack = Stack::start(&[]);
    run_stubborn_job(&stack);
    let data_dir = stack.data_dir.clone();
    assert!(!processes_of(&data_dir).is_empty());
    assert!(stack.stop().success());
    assert!(!data_dir.exists());
    assert_nothing_is_left(&data_dir);
}

#[test]
fn a_stack_that_is_killed_leaves_nothing_behind() {
    let mut stack = Stack::start(&[]);
    run_stubborn_job(&stack);
    stack.child.kill().unwrap();
    stack.child.wait().unwrap();
    assert_nothing_is_left(&stack.data_dir);
}

#[test]
fn what_a_stack_left_behind_is_taken_down_by_the_next() {
    let mut stack = Stack::start(&[]);
    run_stubborn_job(&stack);
    let supervisor = supervisor_of(&stack.data_dir);
    kill(supervisor, Signal::SIGKILL).unwrap();
    stack.child.kill().unwrap();
    stack.child.wait().unwrap();
    // A signal is sent before it has killed: what a supervisor still holds is not left behind yet.
    let lock = File::open(stack.data_dir.join("lock")).unwrap();
    wait_for("the supervisor's end", DOWN, || lock.try_lock().ok());
    drop(lock);
    // Its agent and tasks are still there, and nobody watches over them.
    assert!(!processes_of(&stack.data_dir).is_empty());
    assert!(Stack::start(&[]).stop().success());
    assert_nothing_is_left(&stack.data_dir);
}

#[test]
fn two_stacks_of_one_machine_keep_apart() {
    let [one, two] =
        [(); 2].map(|()| std::thread::spawn(|| Stack::start(&[]))).map(|stack| stack.join().unwrap());
    assert_ne!(one.nomad, two.nomad);
    assert_ne!(one.registry, two.registry);
    assert!(one.stop().success());
    assert!(!processes_of(&two.data_dir).is_empty());
    two.nomad(&["job", "status", "registry"]);
    assert!(two.stop().success());
}

#[test]
fn a_data_directory_keeps_the_registrys_images() {
    let dir = tempfile::Builder::new().prefix("nbt").tempdir_in("/tmp").unwrap();
    let arguments = ["--data-dir", dir.path().to_str().unwrap()];
    let stack = Stack::start(&arguments);
    let kept = dir.path().join("registry/kept");
    std::fs::write(&kept, "").unwrap();
    assert!(stack.stop().success());
    let stack = Stack::start(&arguments);
    stack.nomad(&["job", "status", "registry"]);
    assert!(stack.stop().success());
    assert!(kept.exists());
}

/// A submission to a stack's own service and registry, and the repository that it names.
fn submission(stack: &Stack) -> (Value, Repository) {
    let lines = "ARG BASE\nFROM $BASE\nRUN touch /built\n";
    let repository = Repository::new().file("Dockerfile", lines).commit();
    let job = json!({
        "owner": "it", "repo_url": repository.url(), "image_tags": ["one"], "registry_url": stack.registry,
        "image_name": "it/dev", "build_args": {"BASE": stack.base_image()}, "test_commands": ["test -f /built"],
    });
    (job, repository)
}

fn whole_stack(arguments: &[&str]) -> (Stack, Api) {
    let stack = tokio::task::block_in_place(|| Stack::with_service(arguments));
    let api = Api::new(&stack.api());
    (stack, api)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_whole_stack_has_a_port_of_its_own_builds_and_is_down_after_ctrl_c() {
    // Where somebody else holds it, that does as well.
    let _held = TcpListener::bind("127.0.0.1:8080").ok();
    let (mut stack, api) = whole_stack(&[]);
    assert_eq!(
        stack.ready,
        format!("ready api={} registry={} nomad={}\n", api.url, stack.registry, stack.nomad)
    );
    assert!(!api.url.ends_with(":8080"), "{}", stack.ready);
    let (job, _repository) = submission(&stack);
    let (_, status) = api.run(&job).await;
    assert_eq!(status["status"], "SUCCEEDED", "{status:#}");
    assert_eq!(tags_of(&stack.registry, "it/dev").await, ["one"]);
    let is_service = |line: &&Vec<String>| line[0].ends_with("nomad-build") && line[1] == "serve";
    assert_eq!(command_lines(&stack.data_dir).iter().filter(is_service).count(), 1);
    kill(Pid::from_raw(stack.child.id().try_into().unwrap()), Signal::SIGINT).unwrap();
    assert!(tokio::task::block_in_place(|| stack.child.wait()).unwrap().success());
    assert!(!stack.data_dir.exists());
    assert_nothing_is_left(&stack.data_dir);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_whole_stack_that_is_killed_takes_its_service_and_its_jobs_along() {
    let (mut stack, api) = whole_stack(&[]);
    let (mut job, _repository) = submission(&stack);
    job["test_commands"] = json!([Hold::new().command()]);
    let id = api.submit(&job).await;
    eventually("the test's container", async || (!containers_of(&id).is_empty()).then_some(())).await;
    stack.child.kill().unwrap();
    stack.child.wait().unwrap();
    assert_nothing_is_left(&stack.data_dir);
    assert_eq!(containers_of(&id), [] as [&str; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stack_builds_by_the_engine_that_it_is_given() {
    let engine = EngineFront::start();
    let (stack, api) = whole_stack(&["--docker-host", &format!("unix://{}", engine.socket())]);
    let (job, _repository) = submission(&stack);
    let (_, status) = api.run(&job).await;
    assert_eq!(status["status"], "SUCCEEDED", "{status:#}");
    engine.stop();
    let (_, status) = api.run(&job).await;
    assert_eq!(status["failure"]["reason"], "engine_unavailable", "{status:#}");
    engine.start_again();
    assert!(tokio::task::block_in_place(|| stack.stop()).success());
}

#[test]
fn an_engine_that_has_no_socket_here_is_refused_by_name() {
    for host in ["tcp://127.0.0.1:2375", "ssh://build@example.com", "unix://engine.sock"] {
        let ended =
            Command::new(env!("CARGO_BIN_EXE_nomad-build")).args(["dev", "--docker-host", host]).output();
        let ended = ended.unwrap();
        let said = String::from_utf8_lossy(&ended.stderr);
        assert_eq!(ended.status.code(), Some(1), "{said}");
        assert!(said.contains(host) && said.contains("unix:///PATH"), "{said}");
    }
}

#[test]
fn the_job_files_are_valid() {
    let stack = Stack::start(&[]);
    let jobs = Path::new(env!("CARGO_MANIFEST_DIR")).join("nomad-jobs");
    for job in ["registry", "prometheus", "nomad-build"] {
        let path = jobs.join(format!("{job}.nomad.hcl"));
        let path = path.to_str().unwrap();
        let mut variables = match job {
            "nomad-build" => {
                let image = ["-var", "image=registry.example.com/nomad-build:1"];
                let archive = ["-var", "archive=s3://a/b", "-var", "archive_credentials=creds/archive"];
                vec![image.to_vec(), [&image[..], &archive].concat()]
            }
            _ => vec![vec!["-var", "driver=docker"], vec!["-var", "driver=raw_exec"]],
        };
        for variables in &mut variables {
            let mut arguments = vec!["job", "validate"];
            arguments.append(variables);
            arguments.push(path);
            let said = stack.nomad(&arguments);
            assert!(said.contains("Job validation successful"), "{job}: {said}");
        }
    }
    assert!(stack.stop().success());
}

fn supervisor_of(data_dir: &Path) -> Pid {
    let supervises = |pid: &u32| {
        let arguments = command_line(*pid);
        arguments.iter().any(|argument| argument == "dev-supervise")
            && arguments.iter().any(|argument| Path::new(argument) == data_dir)
    };
    let entries = Path::new("/proc").read_dir().unwrap().flatten();
    let mut pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    Pid::from_raw(pids.find(supervises).unwrap().try_into().unwrap())
}

fn command_lines(data_dir: &Path) -> Vec<Vec<String>> {
    processes_of(data_dir).into_iter().map(command_line).collect()
}

fn command_line(pid: u32) -> Vec<String> {
    let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&command).split_terminator('\0').map(str::to_owned).collect()
}

#[tokio::test]
async fn nomad_takes_more_connections_of_this_machine_than_it_takes_of_one_client_by_default() {
    let http = || reqwest::Client::builder().tls_certs_only([]).build().unwrap();
    let clients: Vec<_> = (0..150).map(|_| http()).collect();
    let asked = clients.iter().map(|client| client.get(format!("{}/v1/status/leader", world().nomad)).send());
    let answers = futures_util::future::join_all(asked).await;
    // Each client keeps its connection.
    let refused = answers.iter().filter(|answer| !answer.as_ref().unwrap().status().is_success());
    assert_eq!(refused.count(), 0);
}
