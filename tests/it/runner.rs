//! One task as Nomad starts it, over the real Nomad, engine and registry, with a front of Nomad that loses answers.

mod allocation;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use axum::Router;
use axum::extract::Request;
use axum::http::header::RETRY_AFTER;
use axum::http::{Method, StatusCode};
use axum::response::IntoResponse as _;
use chrono::{SecondsFormat, Utc};
use nomad_build::job::{Claim, JobId, Outcome, Phase, Published, Reason, State, Status, Verdict};
use nomad_build::ledger::Ledger;
use nomad_build::nomad::Client;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::sources::http;
use crate::support::{At, Repository, Upstream, agent, docker, engine_socket, serve, unique_seconds, world};

use allocation::Allocation;

/// A front of Nomad that refuses some claims, and does everything else that it is asked, and says of some claims only that
/// something went wrong.
fn losing(nomad: &str, lost: Arc<AtomicUsize>, refused: Arc<AtomicUsize>) -> Router {
    let nomad = Upstream::new(nomad);
    let claiming = Arc::new(AtomicBool::new(false));
    let takes_one = |left: &AtomicUsize| {
        left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).is_ok()
    };
    Router::new().fallback(move |request: Request| {
        let nomad = nomad.clone();
        let is_about_claim = request.uri().path().contains("/nomad-build/claims/");
        let claims = is_about_claim && request.method() == Method::PUT;
        if claims {
            claiming.store(true, Ordering::SeqCst);
        }
        let is_refused = claims && takes_one(&refused);
        let is_lost = is_about_claim && claiming.load(Ordering::SeqCst) && takes_one(&lost);
        async move {
            if is_refused {
                return (StatusCode::FORBIDDEN, "Permission denied").into_response();
            }
            let answer = nomad.pass(request).await;
            if is_lost { (StatusCode::INTERNAL_SERVER_ERROR, "lost").into_response() } else { answer }
        }
    })
}

/// A front of Nomad behind which a job is killed just before it claims, and cleaned up before the request of a method that
/// is about its claim.
fn cleaning_up(nomad: &str, ledger: Ledger, job: JobId, before: Method) -> Router {
    let nomad = Upstream::new(nomad);
    let claims = Arc::new(AtomicBool::new(false));
    Router::new().fallback(move |request: Request| {
        let (nomad, ledger, job) = (nomad.clone(), ledger.clone(), job.clone());
        let is_about_claim = request.uri().path().contains("/nomad-build/claims/");
        let is_first =
            is_about_claim && request.method() == Method::PUT && !claims.swap(true, Ordering::SeqCst);
        let is_cleaned_up = is_about_claim && claims.load(Ordering::SeqCst) && request.method() == before;
        async move {
            if is_first {
                let verdict = Verdict::new(Status::Killed, None, Reason::Killed, "killed", Utc::now());
                ledger.decide(&job, None, &Claim::revoked(verdict)).await.unwrap();
            }
            if is_cleaned_up {
                ledger.remove(&job).await.unwrap();
            }
            nomad.pass(request).await
        }
    })
}

/// A front of a registry whose tags stay what they are: it asks for time, then takes a tag and loses its answer, and then refuses
/// to be told again.
fn keeping(registry: &str) -> Router {
    let (registry, tries) = (Upstream::new(&format!("http://{registry}")), Arc::new(AtomicUsize::new(0)));
    Router::new().fallback(move |request: Request| {
        let (registry, tries) = (registry.clone(), Arc::clone(&tries));
        async move {
            if !At::Tag.is(request.method(), request.uri().path()) {
                return registry.pass(request).await;
            }
            match tries.fetch_add(1, Ordering::SeqCst) {
                0 => (StatusCode::TOO_MANY_REQUESTS, [(RETRY_AFTER, "61")]).into_response(),
                1 => {
                    registry.pass(request).await;
                    StatusCode::BAD_GATEWAY.into_response()
                }
                _ => StatusCode::PRECONDITION_FAILED.into_response(),
            }
        }
    })
}

/// A front of the engine that takes one image for another whenever a name is given, as somebody else with the engine's
/// socket may make it.
fn swapping(image: &str, other: &str) -> (TempDir, String) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("engine.sock");
    let (image, other) = (image.to_owned(), other.to_owned());
    let engine = Upstream::on_socket(engine_socket());
    let router = Router::new().fallback(move |mut request: Request| {
        let engine = engine.clone();
        let uri = request.uri().to_string();
        if request.uri().path().ends_with("/tag") {
            *request.uri_mut() = uri.replace(&image, &other).parse().unwrap();
        }
        async move { engine.pass(request).await }
    });
    let socket = tokio::net::UnixListener::bind(&path).unwrap();
    tokio::spawn(async move { axum::serve(socket, router).await });
    (folder, path.to_str().unwrap().to_owned())
}

/// Nomad itself, without the front.
fn nomad() -> Client {
    agent::client(world().nomad.strip_prefix("http://").unwrap().parse().unwrap())
}

/// A submission that no test's service sees.
fn submission() -> Value {
    world().job(&Repository::new())
}

#[tokio::test]
async fn a_publish_whose_claim_was_written_and_its_answer_lost_goes_on() {
    let submission = submission();
    let allocation = Allocation::built(&submission).await;
    allocation.lost.store(1, Ordering::SeqCst);
    let (well, log) = allocation.run("publish", engine_socket()).await;
    assert!(well, "{log}");
    allocation.is_published(&submission, &log).await;
}

#[tokio::test]
async fn a_registry_that_asks_for_time_and_loses_an_answer_has_the_tag_all_the_same() {
    let mut submission = submission();
    let front = serve(keeping(&world().registry)).await.to_string();
    let url = submission["registry_url"].as_str().unwrap().replace(&world().registry, &front);
    submission["registry_url"] = json!(url);
    let allocation = Allocation::built(&submission).await;
    let (well, log) = allocation.run("publish", engine_socket()).await;
    assert!(well, "{log}");
    let outcome = allocation.outcome(Phase::Publish).await;
    assert_eq!((outcome.state, outcome.published), (State::Succeeded, vec![Published::Yes]), "{log}");
    allocation.ledger.remove(&allocation.job).await.unwrap();
}

#[tokio::test]
async fn a_job_that_was_killed_and_cleaned_up_while_it_claims_tags_nothing() {
    for before in [Method::PUT, Method::GET] {
        let submission = submission();
        let allocation = Allocation::built(&submission).await;
        let (ledger, job) = (allocation.ledger.clone(), allocation.job.clone());
        allocation.asks(cleaning_up(&world().nomad, ledger, job, before.clone()));
        let (well, log) = allocation.run("publish", engine_socket()).await;
        assert!(!well, "{log}");
        // Whoever claims is not asked to go on, either.
        for task in ["publish", "finish"] {
            let (_, log) = allocation.run(task, engine_socket()).await;
            assert!(!log.contains("bringing every tag to it"), "{task} {log}");
        }
        assert_eq!(world().tags(&submission).await, [] as [&str; 0], "{before} {log}");
        allocation.ledger.remove(&allocation.job).await.unwrap();
    }
}

#[tokio::test]
async fn a_publish_that_cannot_know_whether_it_claimed_leaves_what_it_claimed_to_be_repaired() {
    for (lost, repairing) in [(2, "finish"), (2, "publish"), (usize::MAX, "finish")] {
        let submission = submission();
        let allocation = Allocation::built(&submission).await;
        allocation.lost.store(lost, Ordering::SeqCst);
        let (well, log) = allocation.run("publish", engine_socket()).await;
        assert!(!well && log.contains("publish cannot go on: "), "{log}");
        // Else nobody would go on with it.
        assert!(!allocation.outcome(Phase::Publish).await.is_over());
        assert_eq!(world().tags(&submission).await, [] as [&str; 0]);
        allocation.lost.store(0, Ordering::SeqCst);
        let (well, log) = allocation.run(repairing, engine_socket()).await;
        assert!(well, "{log}");
        allocation.is_published(&submission, &log).await;
    }
}

#[tokio::test]
async fn a_task_that_is_started_while_it_runs_does_its_work_once() {
    let submission = submission();
    let allocation = Allocation::built(&submission).await;
    let runs = [(); 2].map(|()| allocation.run("publish", engine_socket()));
    let runs = futures_util::future::join_all(runs).await;
    let [said, nothing] = if runs[1].1.is_empty() { [&runs[0], &runs[1]] } else { [&runs[1], &runs[0]] };
    assert_eq!((said.0, nothing), (true, &(true, String::new())), "{}", said.1);
    allocation.is_published(&submission, &said.1).await;
}

#[tokio::test]
async fn an_image_that_somebody_removed_is_named_as_missing() {
    let gone = "sha256:0000000000000000000000000000000000000000000000000000000000000000";
    for (phase, task) in [(Phase::Test, "test"), (Phase::Publish, "publish")] {
        let mut submission = submission();
        if phase == Phase::Test {
            submission["test_commands"] = json!(["true"]);
        }
        let allocation = Allocation::new(&submission);
        let built = Outcome { image_id: Some(gone.to_owned()), ..Outcome::begun("a", Utc::now()) };
        let built = built.succeeded(Utc::now());
        allocation.ledger.record(&allocation.job, None, Phase::Build, &built).await.unwrap();
        let (well, log) = allocation.run(task, engine_socket()).await;
        let outcome = allocation.outcome(phase).await;
        assert_eq!((well, outcome.reason), (false, Some(Reason::ImageMissing)), "{log}");
        assert!(outcome.message.unwrap().contains(gone), "{log}");
        assert_eq!(world().tags(&submission).await, [] as [&str; 0]);
        allocation.ledger.remove(&allocation.job).await.unwrap();
    }
}

#[tokio::test]
async fn a_publish_that_may_not_claim_fails_by_name_and_tags_nothing() {
    let submission = submission();
    let allocation = Allocation::built(&submission).await;
    allocation.refused.store(1, Ordering::SeqCst);
    let (well, log) = allocation.run("publish", engine_socket()).await;
    let outcome = allocation.outcome(Phase::Publish).await;
    assert_eq!((well, outcome.reason), (false, Some(Reason::ClaimFailed)), "{log}");
    assert!(outcome.message.unwrap().contains("ACLs do not allow it"), "{log}");
    assert_eq!(allocation.revoked_for().await, Reason::ClaimFailed);
    assert_eq!(world().tags(&submission).await, [] as [&str; 0]);
    allocation.ledger.remove(&allocation.job).await.unwrap();
}

#[tokio::test]
async fn an_image_that_is_not_the_one_that_was_tested_is_not_published() {
    let submission = submission();
    let allocation = Allocation::built(&submission).await;
    let image = docker(&["inspect", "--format", "{{.Id}}", &world().base]);
    let container = docker(&["create", &world().base]);
    let other = docker(&["commit", "--change", "ENV OTHER=1", &container]);
    let (_folder, engine) = swapping(&image, &other);
    let (well, log) = allocation.run("publish", &engine).await;
    docker(&["rm", &container]);
    docker(&["rmi", "--force", &other]);
    let outcome = allocation.outcome(Phase::Publish).await;
    assert_eq!((well, outcome.reason), (false, Some(Reason::DigestMismatch)), "{log}");
    assert_eq!(allocation.revoked_for().await, Reason::DigestMismatch);
    assert_eq!(world().tags(&submission).await, [] as [&str; 0]);
    allocation.ledger.remove(&allocation.job).await.unwrap();
}

#[tokio::test]
async fn a_payload_that_a_runner_cannot_read_fails_the_job_by_name() {
    let allocation = Allocation::new(&submission());
    std::fs::write(allocation.path("alloc/payload"), "of another time").unwrap();
    let (well, log) = allocation.run("build", engine_socket()).await;
    assert!(!well && log.contains("build cannot go on: "), "{log}");
    assert_eq!(allocation.revoked_for().await, Reason::VersionMismatch);
    allocation.ledger.remove(&allocation.job).await.unwrap();
}

/// A file system of its own in place of a folder, as long as this value.
struct Small(PathBuf);

impl Small {
    fn new(folder: PathBuf, kilobytes: u32) -> Self {
        let size = format!("size={kilobytes}k");
        let mounted = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", &size, "tmpfs"])
            .arg(&folder)
            .status();
        assert!(mounted.unwrap().success());
        Self(folder)
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        std::process::Command::new("umount").arg(&self.0).status().ok();
    }
}

#[tokio::test]
async fn a_checkout_that_finds_no_room_on_its_disk_says_so() {
    let repository = Repository::new().file("large", &unique_seconds().repeat(100_000)).commit();
    let mut submission = submission();
    submission["repo_url"] = json!(repository.url());
    let allocation = Allocation::new(&submission);
    let payload = std::fs::read(allocation.path("alloc/payload")).unwrap();
    let _small = Small::new(allocation.path("alloc"), 300);
    std::fs::write(allocation.path("alloc/payload"), payload).unwrap();
    let (well, log) = allocation.run("build", engine_socket()).await;
    let outcome = allocation.outcome(Phase::Build).await;
    assert_eq!((well, outcome.reason), (false, Some(Reason::CheckoutFailed)), "{log}");
    // In git's words, whichever of its files came first.
    let message = outcome.message.unwrap();
    assert!(message.contains("diskspace") || message.contains("No space left on device"), "{log}");
    allocation.ledger.remove(&allocation.job).await.unwrap();
}

#[tokio::test]
async fn finish_removes_the_checkout_though_there_is_no_engine() {
    let allocation = Allocation::new(&submission());
    std::fs::create_dir_all(allocation.path("alloc/checkout/.git")).unwrap();
    let engine = allocation.path("none.sock");
    let (well, log) = allocation.run("finish", engine.to_str().unwrap()).await;
    assert!(!well, "what it may have left in the engine is told: {log}");
    assert!(!allocation.path("alloc/checkout").exists());
}

#[tokio::test]
async fn gits_credentials_are_where_only_the_task_reads_and_gone_after_the_checkout() {
    let repository = world().repository("");
    let mut submission = submission();
    let folder = Arc::new(std::sync::OnceLock::<PathBuf>::new());
    let (seen, places) = (Arc::new(AtomicUsize::new(0)), Arc::clone(&folder));
    let seen_by_server = Arc::clone(&seen);
    submission["repo_url"] = json!(
        http::serve_watched(&repository, Some(("me", "secret-word")), move |_| {
            let folder = places.get().unwrap();
            let holds = |name: &str| files_with(&folder.join(name), "secret-word");
            assert_eq!(holds("alloc"), 0);
            seen_by_server.fetch_max(holds("secrets"), Ordering::SeqCst);
            None
        })
        .await
    );
    let allocation = Allocation::new(&submission);
    folder.set(allocation.folder.path().to_owned()).unwrap();
    let path = format!("nomad/jobs/{}/job/build", allocation.job);
    let items = [("git_username", "me"), ("git_password", "secret-word")];
    let items = items.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
    nomad().put_variable("default", &path, &items, 0).await.unwrap();
    let engine = allocation.path("none.sock");
    let (_, log) = allocation.run("build", engine.to_str().unwrap()).await;
    let outcome = allocation.outcome(Phase::Build).await;
    // So it was checked out.
    assert_eq!(outcome.reason, Some(Reason::EngineUnavailable), "{log}");
    assert_eq!(seen.load(Ordering::SeqCst), 1, "{log}");
    assert_eq!(files_with(allocation.folder.path(), "secret-word"), 0);
    nomad().delete_variable("default", &path).await.unwrap();
    allocation.ledger.remove(&allocation.job).await.unwrap();
}

/// How many files below a folder hold a text.
fn files_with(folder: &std::path::Path, text: &str) -> usize {
    let entries = folder.read_dir().into_iter().flatten().flatten();
    let count = |entry: std::fs::DirEntry| match entry.file_type() {
        Ok(kind) if kind.is_dir() => files_with(&entry.path(), text),
        Ok(kind) if kind.is_file() => usize::from(
            String::from_utf8_lossy(&std::fs::read(entry.path()).unwrap_or_default()).contains(text),
        ),
        _ => 0,
    };
    entries.map(count).sum()
}

#[tokio::test]
async fn finish_archives_all_of_a_phase_that_ran_twice_though_its_second_run_was_the_shorter_one() {
    let allocation = Allocation::built(&submission()).await;
    let archive = tempfile::tempdir().unwrap();
    let logs = allocation.path("alloc/logs");
    std::fs::create_dir(&logs).unwrap();
    let log = logs.join("publish.stdout.0");
    let run = |lines: u64| {
        let line =
            |seq| format!("{} {seq} o said\n", Utc::now().to_rfc3339_opts(SecondsFormat::Micros, true));
        (1..=lines).map(line).collect::<String>()
    };
    let first = run(6);
    std::fs::write(&log, &first).unwrap();
    let over = Outcome { lines: Some(3), ..Outcome::begun("a", Utc::now()) };
    let over = over.failed(Utc::now(), Reason::PushFailed, None, "no");
    allocation.ledger.record(&allocation.job, None, Phase::Publish, &over).await.unwrap();
    let second = run(3);
    let url = format!("file://{}", archive.path().display());
    let late = async {
        tokio::time::sleep(std::time::Duration::from_millis(500)).await;
        std::fs::write(&log, format!("{first}{second}")).unwrap();
    };
    let variables = [("NOMAD_BUILD_ARCHIVE", url.as_str())];
    let ((well, said), ()) = tokio::join!(allocation.run_with("finish", engine_socket(), &variables), late);
    assert!(well, "{said}");
    let archived = archive.path().join(format!("default/{}/a/publish.log", allocation.job));
    assert_eq!(std::fs::read_to_string(archived).unwrap(), format!("{first}{second}"), "{said}");
    allocation.ledger.remove(&allocation.job).await.unwrap();
}

#[tokio::test]
async fn a_run_behind_a_line_that_was_cut_short_begins_with_a_line_of_its_own() {
    for (before, first) in [("half of a li", "\n2"), ("a line\n", "2"), ("", "2")] {
        let submission = submission();
        let allocation = Allocation::built(&submission).await;
        let logs = allocation.path("alloc/logs");
        std::fs::create_dir(&logs).unwrap();
        std::fs::write(logs.join("publish.stdout.0"), "half of a li").unwrap();
        std::fs::write(logs.join("publish.stdout.10"), before).unwrap();
        let (well, log) = allocation.run("publish", engine_socket()).await;
        assert!(well && log.starts_with(first), "{before:?} {log}");
        allocation.is_published(&submission, &log).await;
    }
}
