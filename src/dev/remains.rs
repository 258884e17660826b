//! What a stack has left on the machine: processes, containers, mounts and cgroups, each known by the stack's mark.

use std::collections::HashMap;
use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use bollard::Docker;
use bollard::models::ContainerSummary;
use bollard::query_parameters::{ListContainersOptionsBuilder, RemoveContainerOptionsBuilder};
use nix::mount::MntFlags;
use nix::sys::signal::Signal;
use nix::unistd::Pid;

use super::data_dir::{DataDir, MARK};

/// The label of a container that a runner started in a stack; its value is the data directory, as in the variable.
const CONTAINER_LABEL: &str = "nomad-build.stack";

/// What a stack has left on the machine.
pub(super) struct Remains<'a> {
    dir: &'a DataDir,
    mark: Vec<u8>,
    cgroup: String,
}

impl<'a> Remains<'a> {
    pub(super) fn of(dir: &'a DataDir) -> Self {
        let mut mark = format!("{MARK}=").into_bytes();
        mark.extend_from_slice(dir.path().as_os_str().as_bytes());
        Self { dir, mark, cgroup: dir.cgroup() }
    }

    /// The living processes of the stack, other than this one.
    pub(super) fn processes(&self) -> Vec<Pid> {
        let Ok(entries) = Path::new("/proc").read_dir() else { return Vec::new() };
        entries
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .map(Pid::from_raw)
            .filter(|pid| *pid != Pid::this() && self.is_ours(*pid))
            .collect()
    }

    /// Is this a living process of the stack? (A number may have been given to another since.)
    pub(super) fn is_ours(&self, pid: Pid) -> bool {
        let proc = PathBuf::from(format!("/proc/{pid}"));
        // A process that has ended, but was not waited for, has neither arguments nor environment.
        if std::fs::read(proc.join("cmdline")).unwrap_or_default().is_empty() {
            return false;
        }
        let environment = std::fs::read(proc.join("environ")).unwrap_or_default();
        environment.split(|byte| *byte == 0).any(|variable| variable == self.mark)
            || std::fs::read_to_string(proc.join("cgroup")).is_ok_and(|text| text.contains(&self.cgroup))
    }

    /// Sends a signal to a process, if it is still the stack's.
    pub(super) fn signal(&self, pid: Pid, signal: Signal) {
        if self.is_ours(pid)
            && let Err(error) = nix::sys::signal::kill(pid, signal)
        {
            tracing::debug!(%pid, %error, "cannot signal a process");
        }
    }

    /// Removes the containers that the stack's tasks run in or were started by its runners.
    pub(super) async fn remove_containers(&self) {
        let Ok(engine) = Docker::connect_with_defaults() else { return };
        let all = ListContainersOptionsBuilder::default().all(true).build();
        // No engine, no containers of it.
        let Ok(containers) = engine.list_containers(Some(all)).await else { return };
        for id in containers.iter().filter(|found| self.owns(found)).filter_map(|found| found.id.as_deref()) {
            let force = RemoveContainerOptionsBuilder::default().force(true).v(true).build();
            if let Err(error) = engine.remove_container(id, Some(force)).await {
                tracing::warn!(container = id, %error, "cannot remove a container of the stack");
            }
        }
    }

    fn owns(&self, container: &ContainerSummary) -> bool {
        let labels = container.labels.as_ref();
        let label = labels.and_then(|labels: &HashMap<String, String>| labels.get(CONTAINER_LABEL));
        let mut sources = container.mounts.iter().flatten().filter_map(|mount| mount.source.as_deref());
        label.is_some_and(|value| Path::new(value) == self.dir.path())
            || sources.any(|source| Path::new(source).starts_with(self.dir.path()))
    }

    /// Unmounts what is mounted below the data directory: Nomad keeps each task's secrets in a file system of its own.
    pub(super) fn unmount(&self) {
        for path in self.mounts() {
            if let Err(error) = nix::mount::umount2(&path, MntFlags::MNT_DETACH) {
                tracing::warn!(path = %path.display(), %error, "cannot unmount");
            }
        }
    }

    /// The mounts below the data directory, the innermost first.
    pub(super) fn mounts(&self) -> Vec<PathBuf> {
        let table = std::fs::read("/proc/self/mountinfo").unwrap_or_default();
        let mut mounts = mount_points(&table);
        mounts.retain(|path| path.starts_with(self.dir.path()) && path != self.dir.path());
        mounts.sort_by_key(|path| std::cmp::Reverse(path.components().count()));
        mounts
    }

    /// Removes the stack's empty cgroups, under each of version 1's hierarchies or the one of version 2.
    pub(super) fn remove_cgroups(&self) {
        let root = Path::new("/sys/fs/cgroup");
        remove_empty_dirs(&root.join(&self.cgroup));
        for hierarchy in root.read_dir().into_iter().flatten().flatten() {
            remove_empty_dirs(&hierarchy.path().join(&self.cgroup));
        }
    }
}

/// The fifth field of each line, in which the kernel writes blanks and backslashes as `\` and three octal digits.
fn mount_points(table: &[u8]) -> Vec<PathBuf> {
    let fields =
        table.split(|byte| *byte == b'\n').filter_map(|line| line.split(|byte| *byte == b' ').nth(4));
    fields.map(unescaped).collect()
}

fn unescaped(field: &[u8]) -> PathBuf {
    let mut path = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, tail @ ..] = rest {
        let octal = tail.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        match octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) if *first == b'\\' => {
                path.push(byte);
                rest = &tail[3..];
            }
            _ => {
                path.push(*first);
                rest = tail;
            }
        }
    }
    OsString::from_vec(path).into()
}

/// A cgroup's files are the kernel's: only directories are removed, from the inside out.
fn remove_empty_dirs(path: &Path) {
    let Ok(entries) = path.read_dir() else { return };
    for entry in entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
        remove_empty_dirs(&entry.path());
    }
    if let Err(error) = std::fs::remove_dir(path) {
        tracing::debug!(path = %path.display(), %error, "cannot remove a cgroup");
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::process::{Child, Command, Stdio};

    use super::*;

    #[test]
    fn mount_points_are_read_as_the_kernel_writes_them() {
        let table = b"26 1 254:0 / / rw - ext4 /dev/vda rw\n\
            31 26 0:28 / /tmp/nb\\0401/\\134x rw,noexec shared:5 - tmpfs tmpfs rw\n";
        assert_eq!(mount_points(table), [PathBuf::from("/"), PathBuf::from("/tmp/nb 1/\\x")]);
    }

    /// A program that runs: what it was given has come back. (Right after `spawn` the kernel may not show its environment yet.)
    fn running(mark: &str) -> Child {
        let mut echo = Command::new("cat");
        let mut child = echo.env(MARK, mark).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        child.stdin.as_mut().unwrap().write_all(b".").unwrap();
        child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
        child
    }

    #[test]
    fn a_process_is_of_the_stack_by_its_whole_mark() {
        let dir = DataDir::at("/tmp/nb-no-such".into(), true);
        let mut ours = running("/tmp/nb-no-such");
        let mut other = running("/tmp/nb-no-such-too");
        let pid = |child: &Child| Pid::from_raw(child.id().try_into().unwrap());
        let remains = Remains::of(&dir);
        assert_eq!(remains.processes(), [pid(&ours)]);
        assert!(!remains.is_ours(pid(&other)));
        remains.signal(pid(&other), Signal::SIGKILL);
        assert!(other.try_wait().unwrap().is_none());
        remains.signal(pid(&ours), Signal::SIGKILL);
        assert!(!ours.wait().unwrap().success());
        other.kill().unwrap();
        other.wait().unwrap();
    }
}
