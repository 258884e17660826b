//! An engine that only one test has.

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use super::Bench;
use crate::support::agent::wait_for;

pub(super) struct OwnEngine {
    daemon: Child,
    folder: TempDir,
}

impl OwnEngine {
    /// It has a network of its own, as it would take the other engine's bridge away, and so no registry.
    pub(super) async fn start(arguments: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let log = std::fs::File::create(path("log")).unwrap();
        let daemon = Command::new("unshare")
            .args(["--net", "dockerd", "--bridge", "none", "--iptables=false"])
            .args(arguments)
            .arg(format!("--host=unix://{}", path("socket").display()))
            .arg(format!("--data-root={}", path("data").display()))
            .arg(format!("--exec-root={}", path("exec").display()))
            .arg(format!("--pidfile={}", path("pid").display()))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        let own = Self { daemon, folder };
        let bench = own.bench();
        wait_for("an engine of its own", Duration::from_mins(1), async || bench.engine.about().await.ok())
            .await;
        own
    }

    pub(super) fn socket(&self) -> String {
        self.folder.path().join("socket").display().to_string()
    }

    pub(super) fn bench(&self) -> Bench {
        Bench::at(&self.socket())
    }
}

impl Drop for OwnEngine {
    fn drop(&mut self) {
        // It ends what it started, and takes its mounts.
        kill(Pid::from_raw(self.daemon.id().cast_signed()), Signal::SIGTERM).ok();
        self.daemon.wait().ok();
    }
}
