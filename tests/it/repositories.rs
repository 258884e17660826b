//! Repositories that mean harm: each is refused or contained, and nobody else is harmed.

use std::os::unix::fs::PermissionsExt as _;

use futures_util::future::join_all;
use serde_json::{Value, json};

use crate::git::check_out_main;
use crate::support::{Api, Repository, Service, engine_is_rid_of, kilobytes, world};

/// What writes a file where it runs.
fn program(mark: &std::path::Path) -> String {
    format!("#!/bin/sh\ntouch {}\n", mark.display())
}

#[tokio::test]
async fn nothing_that_a_repository_holds_for_git_to_run_is_run() {
    let marks = tempfile::tempdir().unwrap();
    let mark = marks.path().join("ran");
    let line = format!("touch {}", mark.display());
    // A repository of its own within the checkout, as git finds one wherever it looks for it.
    let inner =
        format!("[core]\n\trepositoryformatversion = 0\n\tfsmonitor = {line}\n\tsshCommand = {line}\n");
    let repository = Repository::new()
        .file("Dockerfile", "FROM scratch\n")
        .file("HEAD", "ref: refs/heads/main\n")
        .file("config", &inner)
        .file("objects/kept", "")
        .file("refs/kept", "")
        .file("inner/HEAD", "ref: refs/heads/main\n")
        .file("inner/config", &inner)
        .file("inner/objects/kept", "")
        .file("inner/refs/kept", "")
        .file(".gitattributes", "* filter=evil diff=evil merge=evil\n")
        .file(
            ".lfsconfig",
            &format!("[lfs]\n\tstandalonetransferagent = x\n[lfs \"customtransfer.x\"]\n\tpath = {line}\n"),
        )
        .file(".gitconfig", &format!("[filter \"evil\"]\n\tsmudge = {line}\n\trequired = true\n"));
    let mut repository = repository;
    for hook in ["post-checkout", "post-merge", "reference-transaction", "pre-auto-gc", "fsmonitor-watchman"]
    {
        for folder in ["hooks", "inner/hooks", "githooks", ".githooks"] {
            let path = format!("{folder}/{hook}");
            repository = repository.file(&path, &program(&mark));
            let path = repository.path().join(path);
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
        }
    }
    let repository = repository.commit();
    let (folder, checked_out) = check_out_main(&repository.url(), None).await;
    checked_out.unwrap();
    assert!(folder.path().join("checkout/inner/hooks/post-checkout").exists());
    assert!(!mark.exists());
}

/// A job that means harm, and the reason that it fails with.
struct Harm {
    repository: Repository,
    job: Value,
    reason: &'static str,
}

impl Harm {
    fn new(repository: Repository, reason: &'static str, change: impl FnOnce(&mut Value)) -> Self {
        let mut job = world().job(&repository);
        change(&mut job);
        Self { repository, job, reason }
    }
}

fn harms() -> Vec<Harm> {
    let world = world();
    let own = |_: &mut Value| ();
    let plain = |lines: &str| world.repository(lines);
    let modules = "[submodule \"x\"]\n\tpath = x\n\turl = ext::sh -c id\n";
    let with_module = world.repository("").file(".gitmodules", modules).commit();
    let head = with_module.git(&["rev-parse", "HEAD"]);
    with_module.git(&["update-index", "--add", "--cacheinfo", &format!("160000,{head},x")]);
    with_module.git(&["commit", "--quiet", "--message=x"]);
    let linked = Repository::new();
    std::os::unix::fs::symlink("/etc/passwd", linked.path().join("Dockerfile")).unwrap();
    let outer = Repository::new().file("Dockerfile", "FROM scratch\n");
    std::os::unix::fs::symlink("/", outer.path().join("context")).unwrap();
    let bomb = "i=0; while [ $i -lt 300 ]; do sleep 60 & i=$((i+1)); done; echo all of them";
    vec![
        Harm::new(linked.commit(), "input_missing", own),
        Harm::new(outer.commit(), "input_missing", |job| job["context_path"] = json!("context")),
        Harm::new(with_module, "checkout_failed", own),
        // Nothing to fetch, and 20 MB on the disk; ten thousand files of one; more than any memory.
        Harm::new(plain("").file("zeros", &"0".repeat(20_000_000)).commit(), "checkout_failed", own),
        Harm::new(Repository::new().bomb(4), "checkout_failed", own),
        Harm::new(plain("COPY --from=/etc /passwd /x"), "build_failed", own),
        Harm::new(
            plain("RUN --mount=type=bind,source=/../../..,target=/x ls /x/etc/shadow"),
            "build_failed",
            own,
        ),
        Harm::new(plain("RUN --security=insecure id"), "build_failed", own),
        Harm::new(plain("RUN --network=host id"), "build_failed", own),
        Harm::new(plain("RUN --mount=type=ssh ssh-add -l"), "build_failed", own),
        Harm::new(plain(""), "test_failed", |job| job["test_commands"] = json!([bomb])),
        Harm::new(plain(""), "test_failed", |job| {
            job["resources"]["test"]["memory_mb"] = json!(32);
            job["test_commands"] = json!(["x=x; while :; do x=$x$x; done"]);
        }),
        Harm::new(plain(""), "test_failed", |job| {
            // What it fills is gone with it.
            job["test_commands"] = json!(["head -c 100000000 /dev/zero > /filled; exit 1"]);
        }),
        Harm::new(plain(""), "test_failed", |job| {
            job["test_commands"] = json!(["yes \"$(printf 'a\\033[2Jb')\" | head -c 5000000; exit 1"]);
        }),
        Harm::new(plain(""), "timeout", |job| {
            job["timeouts"]["test"] = json!("PT3S");
            job["test_commands"] = json!(["trap '' TERM INT; while :; do sleep 1; done"]);
        }),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_repositories_are_refused_or_contained_and_harm_neither_the_service_nor_other_builds() {
    let world = world();
    let limits = [
        ("NOMAD_BUILD_MAX_CHECKOUT_MB", "16"),
        ("NOMAD_BUILD_MAX_CHECKOUT_FILES", "5000"),
        ("NOMAD_BUILD_MAX_PIDS", "100"),
    ];
    let service = Service::start(&world.nomad, &world.registry, &limits);
    let api = Api::new(&service.url);
    let good = world.repository("RUN true");
    let builds = async || {
        let (id, status) = api.run(&world.job(&good)).await;
        assert_eq!(status["status"], "SUCCEEDED", "{status:#}\n{:#}", api.logs(&id).await);
    };
    builds().await;
    let idle = kilobytes(service.process());
    let harms = harms();
    let all = async {
        join_all(harms.iter().map(async |Harm { job, reason, .. }| {
            let (id, status) = api.run(job).await;
            let log = api.logs(&id).await;
            assert_eq!(status["status"], "FAILED", "{job:#}\n{status:#}\n{log:#}");
            assert_eq!(status["failure"]["reason"], *reason, "{job:#}\n{status:#}\n{log:#}");
            assert!(!log.to_string().contains("root:x:0"), "{job:#}");
            assert!(!log["test"].as_str().unwrap_or_default().contains("\nall of them"), "{job:#}");
            (id, job)
        }))
        .await
    };
    let others = async {
        for _ in 0..3 {
            builds().await;
        }
    };
    let (ended, ()) = tokio::join!(all, others);
    for (id, job) in ended {
        assert!(world.tags(job).await.is_empty(), "{job:#}");
        engine_is_rid_of(&id).await;
    }
    let now = kilobytes(service.process());
    assert!(now * 10 <= idle * 12, "{idle} kB grew to {now} kB");
    drop(harms.into_iter().map(|harm| harm.repository).collect::<Vec<_>>());
}
