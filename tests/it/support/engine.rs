//! What the Docker Engine and the machine say of a job, asked by their own means.

use std::path::Path;
use std::process::Command;
use std::sync::LazyLock;

use nix::sys::signal::Signal;
use tempfile::NamedTempFile;

use crate::stack::environment;

/// The socket of the engine that set-up found.
pub(crate) fn engine_socket() -> &'static str {
    static SOCKET: LazyLock<String> = LazyLock::new(|| {
        let host = environment("DOCKER_HOST").filter(|host| !host.is_empty());
        host.map_or_else(
            || "/var/run/docker.sock".to_owned(),
            |host| host.strip_prefix("unix://").unwrap().to_owned(),
        )
    });
    &SOCKET
}

/// Runs a docker command that must succeed, and returns what it said.
pub(crate) fn docker(arguments: &[&str]) -> String {
    let output = Command::new("docker").args(arguments).output().unwrap();
    assert!(output.status.success(), "docker {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

fn label(name: &str, id: &str) -> String {
    format!("label=nomad-build.{name}={id}")
}

/// The files of the base image, for a build that is to have nothing in common with others.
pub(crate) fn base_archive(base: &str) -> NamedTempFile {
    let container = docker(&["create", base]);
    let archive = NamedTempFile::new().unwrap();
    docker(&["export", "--output", archive.path().to_str().unwrap(), &container]);
    docker(&["rm", &container]);
    archive
}

/// The containers of a job, running or not.
pub(crate) fn containers_of(id: &str) -> Vec<String> {
    let listed = docker(&["ps", "--all", "--quiet", "--filter", &label("test", id)]);
    listed.lines().map(str::to_owned).collect()
}

/// Ends a container, unless it has ended by itself or is gone.
pub(crate) fn end_container(id: &str) {
    let output = Command::new("docker").args(["kill", id]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    let has_ended = ["is not running", "No such container"].iter().any(|why| said.contains(why));
    assert!(output.status.success() || has_ended, "{said}");
}

/// The images of a job, under whatever name.
pub(crate) fn images_of(id: &str) -> Vec<String> {
    let listed =
        docker(&["images", "--all", "--filter", &label("job", id), "--format", "{{.Repository}}:{{.Tag}}"]);
    listed.lines().map(str::to_owned).collect()
}

/// A container that runs and an image, as a runner that was killed with its node leaves them.
pub(crate) fn leave_behind(id: &str) {
    let label = format!("nomad-build.test={id}");
    let base = &super::world().base;
    let name = format!("nomad-build-test-{id}-{}", uuid::Uuid::new_v4().simple());
    let container = docker(&["run", "--detach", "--name", &name, "--label", &label, base, "sleep", "600"]);
    let change = format!("LABEL nomad-build.job={id}");
    docker(&["commit", "--change", &change, &container, &format!("nomad-build/{id}:work")]);
}

/// Waits until the engine has nothing of a job.
pub(crate) async fn engine_is_rid_of(id: &str) {
    super::eventually("the engine has nothing of the job left", async || {
        (containers_of(id).is_empty() && images_of(id).is_empty()).then_some(())
    })
    .await;
}

/// A number that no other process of this machine has among its arguments: of seconds to sleep, mostly.
pub(crate) fn unique_seconds() -> String {
    (100_000_000 + uuid::Uuid::new_v4().as_u128() % 100_000_000).to_string()
}

/// Runs a test in a process of its own, in which it can measure what that takes; whether this is that process.
pub(crate) async fn is_alone(test: &str) -> bool {
    const ALONE: &str = "NOMAD_BUILD_TEST_ALONE";
    if crate::stack::environment(ALONE).is_some() {
        return true;
    }
    let mut itself = tokio::process::Command::new(std::env::current_exe().unwrap());
    itself.args(["--exact", test, "--nocapture"]).env(ALONE, "1").kill_on_drop(true);
    let output = itself.output().await.unwrap();
    let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{}{}", said(&output.stdout), said(&output.stderr));
    assert!(said(&output.stdout).contains("1 passed"), "{}", said(&output.stdout));
    false
}

/// The memory of a process, in KiB.
pub(crate) fn kilobytes(process: u32) -> u64 {
    memory(process, "VmRSS:")
}

/// The most that it ever was.
pub(crate) fn most_kilobytes(process: u32) -> u64 {
    memory(process, "VmHWM:")
}

fn memory(process: u32, of: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(of)).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// Every process with `text` in its command line.
pub(crate) fn processes_with(text: &str) -> Vec<u32> {
    processes(|process| {
        let line = std::fs::read(process.join("cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).contains(text)
    })
}

/// The process of a job's task.
pub(crate) fn runner_of(id: &str, phase: &str) -> Option<i32> {
    let (job, words) = (format!("NOMAD_JOB_ID={id}"), format!("\0phase\0{phase}\0"));
    let found = processes(|process| {
        let line = std::fs::read(process.join("cmdline")).unwrap_or_default();
        let environment = std::fs::read(process.join("environ")).unwrap_or_default();
        String::from_utf8_lossy(&line).ends_with(&words)
            && environment.split(|byte| *byte == 0).any(|variable| variable == job.as_bytes())
    });
    found.first().map(|pid| i32::try_from(*pid).unwrap())
}

/// A variable of a process.
pub(crate) fn environment_of(process: i32, name: &str) -> Option<String> {
    let environment = std::fs::read(format!("/proc/{process}/environ")).ok()?;
    let found = environment
        .split(|byte| *byte == 0)
        .find_map(|variable| variable.strip_prefix(name.as_bytes())?.strip_prefix(b"="))?;
    String::from_utf8(found.to_owned()).ok()
}

/// Ends a job's task at once, as a crash does.
pub(crate) fn crash(id: &str, phase: &str) {
    end_at_once(runner_of(id, phase).unwrap());
}

/// Ends the `sleep` of so many seconds, and not the shell that waits for it; whether there was one.
pub(super) fn end_sleep(seconds: &str) -> bool {
    let line = format!("sleep\0{seconds}\0");
    let found =
        processes(|process| std::fs::read(process.join("cmdline")).is_ok_and(|it| it == line.as_bytes()));
    for process in &found {
        end_at_once(i32::try_from(*process).unwrap());
    }
    !found.is_empty()
}

/// Ends Nomad's helper that takes the output of an allocation's task, as a crash of it does.
pub(crate) fn crash_log(allocation: &str, task: &str) {
    let pipe = format!("{allocation}/alloc/logs/.{task}.stdout.fifo");
    let found = processes(|process| {
        let line = std::fs::read(process.join("cmdline")).unwrap_or_default();
        let open = process.join("fd").read_dir().into_iter().flatten().flatten();
        let mut open = open.filter_map(|file| std::fs::read_link(file.path()).ok());
        String::from_utf8_lossy(&line).contains("logmon")
            && open.any(|file| file.to_string_lossy().ends_with(&pipe))
    });
    end_at_once(i32::try_from(found[0]).unwrap());
}

/// Keeps a job's task from doing anything more.
pub(crate) fn hang(id: &str, phase: &str) {
    signal(runner_of(id, phase).unwrap(), Signal::SIGSTOP);
}

pub(crate) fn end_at_once(process: i32) {
    signal(process, Signal::SIGKILL);
}

fn signal(process: i32, signal: Signal) {
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(process), signal).unwrap();
}

fn processes(is: impl Fn(&Path) -> bool) -> Vec<u32> {
    let entries = Path::new("/proc").read_dir().unwrap().flatten();
    let pids = entries.filter_map(|entry| Some((entry.file_name().to_str()?.parse().ok()?, entry.path())));
    pids.filter(|(_, path)| is(path)).map(|(pid, _)| pid).collect()
}
