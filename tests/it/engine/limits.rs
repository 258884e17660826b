//! What the steps of a build are held to by an engine's cgroup-parent, and what `doctor` says of it.

use std::path::{Path, PathBuf};

use nomad_build::engine::EngineError;

use super::directory;
use super::own::OwnEngine;
use crate::doctor::examined;
use crate::support::{base_archive, docker, engine_socket, world};

/// An engine whose containers are below a cgroup with limits.
struct Limited {
    engine: Option<OwnEngine>,
    cgroup: String,
}

/// The hierarchies of the kernel's cgroups that have one.
fn cgroups(name: &str) -> Vec<PathBuf> {
    let root = Path::new("/sys/fs/cgroup");
    let below = root.read_dir().unwrap().flatten().map(|hierarchy| hierarchy.path());
    let all = below.chain([root.to_owned()]).map(|hierarchy| hierarchy.join(name));
    all.filter(|path| path.is_dir()).collect()
}

fn remove(folder: &Path) {
    for entry in folder.read_dir().into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove(&entry.path());
        }
    }
    std::fs::remove_dir(folder).ok();
}

impl Limited {
    async fn start() -> Self {
        let cgroup = format!("nomad-build-test-{}", uuid::Uuid::new_v4().simple());
        let root = Path::new("/sys/fs/cgroup");
        let limits: &[(&str, &str, &str)] = if root.join("cgroup.controllers").exists() {
            &[("", "memory.max", "268435456"), ("", "pids.max", "64")]
        } else {
            &[("memory", "memory.limit_in_bytes", "268435456"), ("pids", "pids.max", "64")]
        };
        for (hierarchy, file, limit) in limits {
            let folder = root.join(hierarchy).join(&cgroup);
            std::fs::create_dir_all(&folder).unwrap();
            std::fs::write(folder.join(file), limit).unwrap();
        }
        let engine = OwnEngine::start(&[
            "--exec-opt",
            "native.cgroupdriver=cgroupfs",
            &format!("--cgroup-parent=/{cgroup}"),
        ])
        .await;
        Self { engine: Some(engine), cgroup }
    }

    fn engine(&self) -> &OwnEngine {
        self.engine.as_ref().unwrap()
    }
}

impl Drop for Limited {
    fn drop(&mut self) {
        // What is in a cgroup keeps it.
        self.engine.take();
        for folder in cgroups(&self.cgroup) {
            remove(&folder);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cgroup_parent_contains_the_steps_of_builds_and_doctor_says_how() {
    let limited = Limited::start().await;
    let bench = limited.engine().bench();
    let archive = base_archive(&world().base);
    let run = async |step: &str| {
        let dockerfile = format!("FROM scratch\nADD base.tar /\nRUN {step}\n");
        let context = directory(&[("Dockerfile", &dockerfile)]);
        std::fs::copy(archive.path(), context.path().join("base.tar")).unwrap();
        let mut request = bench.request(context.path());
        request.network = false;
        bench.build(request).await
    };
    let bomb = |processes: u32| {
        format!("i=0; while [ $i -lt {processes} ]; do sleep 5 & i=$((i+1)); done; echo all of them")
    };
    let (built, said) = run(&bomb(20)).await;
    assert!(built.is_ok(), "{built:?}\n{}", said.text());
    let hog = "x=0123456789abcdef; while :; do x=$x$x; done".to_owned();
    for (step, exit_code) in [(bomb(200), 2), (hog, 137)] {
        let (built, said) = run(&step).await;
        let is_contained =
            matches!(built, Err(EngineError::BuildFailed { exit_code: Some(code), .. }) if code == exit_code);
        assert!(is_contained, "{built:?}\n{}", said.text());
        assert!(!said.text().contains("\nall of them"), "{}", said.text());
    }
    let (_, findings) =
        examined(&["--node"], &[("NOMAD_BUILD_ENGINE_SOCKET", &limited.engine().socket())]).await;
    let limits: Vec<_> = findings.iter().filter(|finding| finding["check"] == "limits").collect();
    let says = |verdict: &str, words: &str| {
        limits.iter().any(|finding| {
            finding["verdict"] == verdict && finding["message"].as_str().unwrap().contains(words)
        })
    };
    assert!(says("good", "256 MiB of memory, 64 processes"), "{limits:#?}");
    let usual = ("NOMAD_BUILD_ENGINE_SOCKET", engine_socket());
    let (_, findings) = examined(&["--node"], &[usual]).await;
    assert!(findings.iter().any(|finding| finding["check"] == "limits"), "{findings:#?}");
    // Nothing of it is in the engine that everybody uses.
    assert!(!docker(&["ps", "--all", "--format", "{{.Names}}"]).contains(&limited.cgroup));
}
