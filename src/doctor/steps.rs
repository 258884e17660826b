//! What the steps of builds are held to: an engine runs them below its daemon's cgroup-parent, and limits them by nothing else.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;
use tokio::net::UnixStream;

use super::Report;

const DAEMON_JSON: &str = "/etc/docker/daemon.json";

/// Where the daemon says which process it is, where its socket is another one's: that of systemd, for example.
const PID_FILE: &str = "/var/run/docker.pid";

const CGROUPS: &str = "/sys/fs/cgroup";

/// What is no limit, where the kernel writes the largest number of pages for none.
const ENDLESS: u64 = 1 << 62;

/// The limits of a cgroup, with those of the cgroups that it is in.
#[derive(Debug, Default, PartialEq, Eq)]
struct Limits {
    /// Bytes.
    memory: Option<u64>,
    processes: Option<u64>,
    /// Thousandths of a processor.
    processors: Option<u64>,
}

/// Says what limits the steps of builds have.
pub(super) async fn examine(socket: &str, report: &mut Report) {
    let remedy =
        "set cgroup-parent in the engine's daemon.json to a cgroup with limits of memory, processes and cpu";
    let parent = match cgroup_parent(socket).await {
        Ok(Some(parent)) => parent,
        Ok(None) => {
            let message = "the steps of a build have no limits: the engine has no cgroup-parent";
            return report.warn("limits", message, remedy);
        }
        Err(why) => {
            let message = format!("whether the steps of a build have limits is not known: {why}");
            return report.unknown("limits", message, "run this where the engine runs, as its user");
        }
    };
    let Limits { memory, processes, processors } = limits(Path::new(CGROUPS), &parent);
    let mut has = Vec::new();
    has.extend(memory.map(|bytes| format!("{} MiB of memory", bytes >> 20)));
    has.extend(processes.map(|most| format!("{most} processes")));
    has.extend(processors.map(|most| format!("{}.{:03} processors", most / 1000, most % 1000)));
    let has = if has.is_empty() { "no limits".to_owned() } else { has.join(", ") };
    let message =
        format!("the steps of a build have, all together, {has}: by the engine's cgroup-parent {parent}");
    if memory.is_some() && processes.is_some() {
        report.good("limits", message);
    } else {
        report.warn("limits", message, remedy);
    }
}

/// The cgroup that the daemon behind a socket runs containers below, if it was given one.
async fn cgroup_parent(socket: &str) -> Result<Option<String>, String> {
    let path = socket.strip_prefix("unix://").unwrap_or(socket);
    let stream = UnixStream::connect(path).await.map_err(|error| format!("{path}: {error}"))?;
    let peer = stream.peer_cred().ok().and_then(|peer| peer.pid()).filter(|&pid| pid > 1);
    let written = || fs::read_to_string(PID_FILE).ok()?.trim().parse().ok();
    let pid: i32 = peer.or_else(written).ok_or("its daemon is no process that is seen here")?;
    let process = PathBuf::from(format!("/proc/{pid}"));
    let line = fs::read(process.join("cmdline")).map_err(|error| format!("its command line: {error}"))?;
    let line = String::from_utf8_lossy(&line);
    let arguments: Vec<_> = line.split('\0').collect();
    if let Some(parent) = flag(&arguments, "--cgroup-parent") {
        return Ok(Some(parent));
    }
    let file = flag(&arguments, "--config-file").unwrap_or_else(|| DAEMON_JSON.to_owned());
    // As the daemon sees it, which may be in a container.
    let file = process.join("root").join(file.trim_start_matches('/'));
    let text = match fs::read_to_string(&file) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        read => read.map_err(|error| format!("{}: {error}", file.display()))?,
    };
    let settings: Value =
        serde_json::from_str(&text).map_err(|error| format!("{}: {error}", file.display()))?;
    Ok(settings["cgroup-parent"].as_str().filter(|parent| !parent.is_empty()).map(str::to_owned))
}

/// The value of a flag, as `--flag value` or `--flag=value`.
fn flag(arguments: &[&str], name: &str) -> Option<String> {
    let mut all = arguments.iter();
    while let Some(argument) = all.next() {
        match argument.strip_prefix(name) {
            Some("") => return all.next().map(|value| (*value).to_owned()),
            Some(rest) if rest.starts_with('=') => return Some(rest[1..].to_owned()),
            _ => {}
        }
    }
    None
}

/// Where a cgroup is below a hierarchy's root. A slice of systemd's is within those that its name begins with.
fn folders(parent: &str) -> Vec<PathBuf> {
    let mut path = PathBuf::new();
    let mut folders = Vec::new();
    let mut step = |name: &str| {
        path.push(name);
        folders.push(path.clone());
    };
    for part in parent.split('/').filter(|part| !part.is_empty()) {
        match part.strip_suffix(".slice") {
            Some(slice) => {
                for (at, _) in slice.match_indices('-') {
                    step(&format!("{}.slice", &slice[..at]));
                }
                step(part);
            }
            None => step(part),
        }
    }
    folders
}

/// The limits of a cgroup, whatever the version of the kernel's interface.
fn limits(root: &Path, parent: &str) -> Limits {
    let is_unified = root.join("cgroup.controllers").exists();
    let mut limits = Limits::default();
    let least = |one: Option<u64>, other: Option<u64>| [one, other].into_iter().flatten().min();
    for folder in folders(parent) {
        let read = |controller: &str, file: &str| {
            let root = if is_unified { root.to_owned() } else { root.join(controller) };
            fs::read_to_string(root.join(&folder).join(file)).unwrap_or_default()
        };
        let number = |text: &str| text.trim().parse::<u64>().ok().filter(|&number| number < ENDLESS);
        let (memory, processors) = if is_unified {
            let text = read("cpu", "cpu.max");
            let mut words = text.split_whitespace().map(number);
            (number(&read("memory", "memory.max")), words.next().flatten().zip(words.next().flatten()))
        } else {
            let processors =
                number(&read("cpu", "cpu.cfs_quota_us")).zip(number(&read("cpu", "cpu.cfs_period_us")));
            (number(&read("memory", "memory.limit_in_bytes")), processors)
        };
        let processors = processors.and_then(|(quota, period)| (quota * 1000).checked_div(period));
        limits = Limits {
            memory: least(limits.memory, memory),
            processes: least(limits.processes, number(&read("pids", "pids.max"))),
            processors: least(limits.processors, processors),
        };
    }
    limits
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(root: &Path, files: &[(&str, &str)]) {
        for (path, text) in files {
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
    }

    #[test]
    fn a_flag_is_found_however_it_is_written() {
        for (arguments, want) in [
            (&["dockerd", "--cgroup-parent", "/a"][..], Some("/a")),
            (&["dockerd", "--cgroup-parent=/a", "-H", "x"], Some("/a")),
            (&["dockerd", "--cgroup-parents", "/a"], None),
            (&["dockerd", "--cgroup-parent"], None),
        ] {
            assert_eq!(flag(arguments, "--cgroup-parent").as_deref(), want, "{arguments:?}");
        }
    }

    #[test]
    fn the_limits_of_a_cgroup_are_those_of_the_ones_that_it_is_in_too() {
        let root = tempfile::tempdir().unwrap();
        let files = [
            ("memory/builds/memory.limit_in_bytes", "9223372036854771712\n"),
            ("memory/builds/steps/memory.limit_in_bytes", "268435456\n"),
            ("pids/builds/pids.max", "64\n"),
            ("pids/builds/steps/pids.max", "max\n"),
            ("cpu/builds/steps/cpu.cfs_quota_us", "150000\n"),
            ("cpu/builds/steps/cpu.cfs_period_us", "100000\n"),
        ];
        write(root.path(), &files);
        let want = Limits { memory: Some(256 << 20), processes: Some(64), processors: Some(1500) };
        assert_eq!(limits(root.path(), "/builds/steps"), want);
        let outer = Limits { processes: Some(64), ..Limits::default() };
        assert_eq!(limits(root.path(), "builds"), outer);
        assert_eq!(limits(root.path(), "/nowhere"), Limits::default());
    }

    #[test]
    fn the_unified_interface_and_slices_are_read_too() {
        let root = tempfile::tempdir().unwrap();
        let files = [
            ("cgroup.controllers", "cpu memory pids\n"),
            ("ci.slice/memory.max", "1073741824\n"),
            ("ci.slice/ci-builds.slice/memory.max", "max\n"),
            ("ci.slice/ci-builds.slice/pids.max", "512\n"),
            ("ci.slice/ci-builds.slice/cpu.max", "200000 100000\n"),
            ("ci.slice/cpu.max", "max 100000\n"),
        ];
        write(root.path(), &files);
        let want = Limits { memory: Some(1 << 30), processes: Some(512), processors: Some(2000) };
        assert_eq!(limits(root.path(), "ci-builds.slice"), want);
    }
}
