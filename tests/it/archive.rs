//! The archive: what Nomad has forgotten is told as it was.

use std::path::{Path, PathBuf};
use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::follow::read_all;
use crate::replicas::alone;
use crate::stack::Stack;
use crate::support::agent::wait_for;
use crate::support::{
    Api, At, Bucket, Front, Namespace, Nomad, Repository, Service, Sleeper, crash, engine_is_rid_of,
    eventually, processes_with, unique_seconds, world,
};

/// A Nomad of its own, since its garbage is collected, and an archive.
struct Place {
    stack: Stack,
    archive: TempDir,
}

impl Place {
    fn new() -> Self {
        Self { stack: Stack::start(&[]), archive: tempfile::tempdir().unwrap() }
    }

    /// A service that archives into the directory.
    fn service(&self, variables: &[(&str, &str)]) -> Service {
        let url = format!("file://{}", self.archive.path().display());
        let mut all = vec![("NOMAD_BUILD_ARCHIVE", url.as_str())];
        all.extend_from_slice(variables);
        Service::start(&self.stack.nomad, &world().registry, &all)
    }

    fn folder(&self, id: &str) -> PathBuf {
        self.archive.path().join("default").join(id)
    }

    /// Waits until a job is archived, with the logs of its allocation, if it had one.
    async fn has(&self, id: &str, status: &Value) {
        let mut wanted = vec![self.folder(id).join("record.json")];
        if let Some(allocation) = status["nomad"]["allocation"].as_str() {
            wanted.push(self.folder(id).join(allocation).join("index.json"));
        }
        // One that is not whole yet is tried again after a minute.
        let are_there = async || wanted.iter().all(|path| path.exists()).then_some(());
        wait_for(&format!("{wanted:?}"), Duration::from_mins(3), are_there).await;
    }
}

/// Makes Nomad forget these jobs, which have ended.
pub(crate) async fn forget(stack: &Stack, ids: &[String]) {
    let (api, nomad) = (Api::new(&stack.nomad), Nomad::new(&stack.nomad));
    eventually("a Nomad that has forgotten", async || {
        let (status, _) = api.call(Method::PUT, "/v1/system/gc", None).await;
        assert!(status.is_success());
        let jobs = nomad.get("/v1/jobs?prefix=nb-").await;
        let is_left = |id: &String| jobs.as_array().unwrap().iter().any(|job| job["ID"] == id.as_str());
        (!ids.iter().any(is_left)).then_some(())
    })
    .await;
}

/// Everything that a service tells of an ended job.
async fn told(service: &Service, id: &str) -> Value {
    let api = Api::new(&service.url);
    let status = alone(api.status(id).await);
    let tail = api.get(&format!("/jobs/{id}/logs?tail=2")).await;
    let stream = read_all(&service.url, id, "").await;
    let middle = stream.iter().filter(|message| message["type"] == "log").nth(3);
    let resumed = match middle {
        Some(message) => {
            read_all(&service.url, id, &format!("?cursor={}", message["cursor"].as_str().unwrap())).await
        }
        None => Vec::new(),
    };
    let last = read_all(&service.url, id, "?tail=3").await;
    json!({
        "status": status, "logs": api.logs(id).await, "tail": tail, "stream": stream, "resumed": resumed, "last": last,
    })
}

/// A template whose finish knows nothing of an archive.
fn forgetful(folder: &Path) -> PathBuf {
    let shipped = concat!(env!("CARGO_MANIFEST_DIR"), "/templates/raw_exec.json");
    let shipped = std::fs::read_to_string(shipped).unwrap();
    let template = shipped.replace(
        "\"Env\": {{ task.env }}",
        "\"Env\": {\"NOMAD_BUILD_ENGINE_SOCKET\": {{ runner.engine_socket }}}",
    );
    assert_ne!(template, shipped);
    let path = folder.join("template.json");
    std::fs::write(&path, template).unwrap();
    path
}

/// Jobs that end in every way that leaves something else to archive; their IDs. The repository has to be kept meanwhile.
async fn ended_jobs(place: &Place, api: &Api, forgetful: &Api) -> (Repository, Vec<String>) {
    let repository = world().repository("RUN echo built");
    let job = |tests: Value| {
        let mut job = world().job(&repository);
        job["test_commands"] = tests;
        job
    };
    let count = "i=0; while [ $i -lt 300 ]; do i=$((i+1)); echo line $i; done";
    let mut ids = vec![api.submit(&job(json!([count]))).await, api.submit(&job(json!(["exit 7"]))).await];
    ids.push(forgetful.submit(&job(json!([count]))).await);
    let mut huge = job(json!(["true"]));
    huge["resources"] = json!({"build": {"cpu": 60_000}});
    let waits = api.submit(&huge).await;
    assert_eq!(api.post(&format!("/jobs/{waits}/kill")).await, json!({"success": true}));
    ids.push(waits);
    let sleeper = Sleeper::in_phase("build");
    let killed = sleeper.submit(api).await;
    assert_eq!(api.post(&format!("/jobs/{killed}/kill")).await, json!({"success": true}));
    ids.push(killed);
    let sleeper = Sleeper::in_phase("test");
    let died = sleeper.submit(api).await;
    crash(&died, "test");
    ids.push(died);
    let sleeper = Sleeper::in_phase("test");
    let replaced = sleeper.submit(api).await;
    assert_eq!(api.post(&format!("/jobs/{replaced}/kill")).await, json!({"success": true}));
    place.stack.nomad(&["job", "start", "-detach", &replaced]);
    // What is done in the second one is as good as nothing, and is not told over what was done in the first.
    Nomad::new(&place.stack.nomad).ran_twice(&replaced).await;
    ids.push(replaced);
    (repository, ids)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_nomad_has_forgotten_is_told_as_it_was() {
    let place = Place::new();
    let template = forgetful(place.archive.path());
    let mut service = place.service(&[]);
    let other = place.service(&[("NOMAD_BUILD_TEMPLATE", template.to_str().unwrap())]);
    let api = Api::new(&service.url);
    let (_repository, ids) = ended_jobs(&place, &api, &Api::new(&other.url)).await;
    drop(other);
    let mut ends = Vec::new();
    for id in &ids {
        let status = api.wait_for_end(id).await;
        place.has(id, &status).await;
        ends.push(status["status"].as_str().unwrap().to_owned());
    }
    // As Nomad has it.
    let plain = Service::start(&place.stack.nomad, &world().registry, &[]);
    let mut before = Vec::new();
    for id in &ids {
        before.push(told(&plain, id).await);
    }
    drop(plain);
    assert_eq!(ends, ["SUCCEEDED", "FAILED", "SUCCEEDED", "KILLED", "KILLED", "FAILED", "KILLED"]);
    assert_eq!(before[5]["status"]["failure"]["reason"], "runner_died");
    forget(&place.stack, &ids).await;
    // By who has known them, and by who has never heard of them.
    for (id, before) in ids.iter().zip(&before) {
        assert_eq!(told(&service, id).await, *before, "{id}");
    }
    service.kill();
    let service = place.service(&[]);
    for (id, before) in ids.iter().zip(&before) {
        assert_eq!(told(&service, id).await, *before, "{id}");
        assert!(before["logs"]["missing"].is_null(), "{before:#}");
    }
    let api = Api::new(&service.url);
    for (id, end) in ids.iter().zip(&ends) {
        let killed = api.post(&format!("/jobs/{id}/kill")).await;
        assert_eq!(killed["success"], end == "KILLED", "{id}: {killed}");
        assert_eq!(api.post(&format!("/jobs/{id}/cleanup")).await, json!({"success": true}), "{id}");
    }
    assert!(place.stack.stop().success());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_archived_is_told_while_nomad_is_away() {
    let archive = tempfile::tempdir().unwrap();
    let url = format!("file://{}", archive.path().display());
    // Who may read it, a Nomad that is away does not say.
    let variables = [("NOMAD_BUILD_ARCHIVE", url.as_str()), ("NOMAD_BUILD_OPEN", "true")];
    let service = Service::start(&world().nomad, &world().registry, &variables);
    let repository = world().repository("");
    let (id, status) = Api::new(&service.url).run(&world().job(&repository)).await;
    let record = archive.path().join("default").join(&id).join("record.json");
    eventually("the job is archived", async || record.exists().then_some(())).await;
    let before = told(&service, &id).await;
    drop(service);
    let service = Service::start_unready("http://127.0.0.1:1", &world().registry, &variables);
    assert_eq!(told(&service, &id).await, before);
    assert_eq!(before["status"]["image"], status["image"]);
    let (refused, _) = Api::new(&service.url)
        .call(Method::GET, "/jobs/nb-0193a1c2-7e57-7000-8000-000000000003/status", None)
        .await;
    assert_eq!(refused, 503, "nobody knows whether there is such a job");
}

/// A service that archives into a bucket, by way of a host.
fn service_with(bucket: &Bucket, host: &str, nomad: &str) -> Service {
    let variables = bucket.variables(host);
    let variables: Vec<_> = variables.iter().map(|(name, value)| (*name, value.as_str())).collect();
    Service::start(nomad, &world().registry, &variables)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_was_killed_is_archived_by_its_own_finish_also_where_it_is_cleaned_up_at_once() {
    let bucket = Bucket::new().await;
    let service = service_with(&bucket, &bucket.host, &world().nomad);
    let api = Api::new(&service.url);
    for cleans_up in [false, true] {
        let sleeper = Sleeper::in_phase("test");
        let id = sleeper.submit(&api).await;
        let placed = |status: &Value| status["nomad"]["allocation"].is_string();
        let status = api.wait_until(&id, "the allocation is known", placed).await;
        assert_eq!(api.post(&format!("/jobs/{id}/kill")).await, json!({"success": true}));
        let allocation = status["nomad"]["allocation"].as_str().unwrap();
        let index = bucket.file(&format!("default/{id}/{allocation}/index.json"));
        let record = bucket.file(&format!("default/{id}/record.json"));
        if cleans_up {
            assert_eq!(api.post(&format!("/jobs/{id}/cleanup")).await, json!({"success": true}));
            assert!(index.exists() && record.exists());
        } else {
            eventually("it is archived", async || (index.exists() && record.exists()).then_some(())).await;
            let said = world().nomad_api().task_log(allocation, "finish").await;
            assert!(!said.contains("is not archived here"), "{said}");
        }
        let logs = api.logs(&id).await;
        assert!(logs["build"].as_str().unwrap().contains("FROM") && logs["missing"].is_null(), "{logs:#}");
        eventually("the copy of the key is removed", async || {
            world().nomad_api().variables(&format!("nomad/jobs/{id}")).await.is_empty().then_some(())
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bucket_keeps_long_logs_and_its_key_shows_up_nowhere() {
    let bucket = Bucket::new().await;
    let mut service = service_with(&bucket, &bucket.host, &world().nomad);
    let api = Api::new(&service.url);
    let repository = world().repository("");
    let mut job = world().job(&repository);
    // More than one part of an upload.
    job["test_commands"] =
        json!(["i=0; while [ $i -lt 120 ]; do i=$((i+1)); head -c 60000 /dev/zero | tr '\\0' x; echo; done"]);
    let (id, status) = api.run(&job).await;
    assert_eq!(status["status"], "SUCCEEDED", "{status:#}");
    let allocation = status["nomad"]["allocation"].as_str().unwrap();
    let index = bucket.file(&format!("default/{id}/{allocation}/index.json"));
    let record = bucket.file(&format!("default/{id}/record.json"));
    eventually("the job is archived", async || (index.exists() && record.exists()).then_some(())).await;
    let before = told(&service, &id).await;
    assert!(before["logs"]["test"].as_str().unwrap().len() > 7_000_000);
    // Where somebody could look.
    let nomad = world().nomad_api();
    let mut seen = nomad.get(&format!("/v1/job/{id}")).await.to_string();
    for task in ["build", "test", "publish", "finish"] {
        seen += &nomad.task_log(allocation, task).await;
    }
    seen += &before.to_string();
    assert!(seen.contains("s3://bucket/prefix") && !seen.contains(&bucket.key));
    eventually("the copy of the key is removed", async || {
        nomad.variables(&format!("nomad/jobs/{id}")).await.is_empty().then_some(())
    })
    .await;
    let (purged, said) = world().nomad_program(&["job", "stop", "-purge", "-detach", &id]);
    assert!(purged, "{said}");
    service.kill();
    let service = service_with(&bucket, &bucket.host, &world().nomad);
    // Too long to be shown.
    assert!(told(&service, &id).await == before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_nomad_forgets_while_finish_archives_it_is_archived_whole() {
    let place = Place::new();
    let bucket = Bucket::new().await;
    let front = Front::holding(&bucket.host, At::Put).await;
    let mut service = service_with(&bucket, &front.host, &place.stack.nomad);
    let api = Api::new(&service.url);
    let repository = world().repository("");
    let mut job = world().job(&repository);
    job["test_commands"] = json!(["echo these are the words; exit 7"]);
    let (id, status) = api.run(&job).await;
    assert_eq!(status["failure"]["reason"], "test_failed", "{status:#}");
    front.holds().await;
    let allocation = status["nomad"]["allocation"].as_str().unwrap();
    forget(&place.stack, std::slice::from_ref(&id)).await;
    // So that nobody else archives it.
    service.kill();
    front.let_go();
    let record = bucket.file(&format!("default/{id}/record.json"));
    eventually("the job is archived", async || record.exists().then_some(())).await;
    assert!(bucket.file(&format!("default/{id}/{allocation}/index.json")).exists());
    let service = service_with(&bucket, &bucket.host, &place.stack.nomad);
    let logs = Api::new(&service.url).logs(&id).await;
    assert!(logs["test"].as_str().unwrap().contains("\nthese are the words\n"), "{logs:#}");
    assert!(logs["missing"].is_null(), "{logs:#}");
    engine_is_rid_of(&id).await;
    assert!(place.stack.stop().success());
}

#[tokio::test]
async fn jobs_that_were_kept_long_enough_are_let_go_of() {
    let namespace = Namespace::new();
    let archive = tempfile::tempdir().unwrap();
    let archived = |id: &str| {
        let folder = archive.path().join(&namespace.0).join(id);
        std::fs::create_dir_all(folder.join("a")).unwrap();
        std::fs::write(folder.join("record.json"), "{}").unwrap();
        std::fs::write(folder.join("a/build.log"), "").unwrap();
        // What a write leaves that was cut.
        std::fs::write(folder.join("a/build.log#1"), "").unwrap();
        folder
    };
    let old = archived("nb-018bcfe5-687b-7000-8000-000000000001");
    let young = archived(&format!("nb-{}", uuid::Uuid::now_v7()));
    let others = archived("somebody-elses");
    let url = format!("file://{}", archive.path().display());
    let variables = [("NOMAD_BUILD_NAMESPACES", namespace.0.as_str()), ("NOMAD_BUILD_ARCHIVE", url.as_str())];
    let _service = Service::start(&world().nomad, &world().registry, &variables);
    eventually("the old job is let go of", async || (!old.exists()).then_some(())).await;
    assert!(young.join("record.json").exists() && others.join("a/build.log").exists());
}

#[tokio::test]
async fn an_archive_that_does_not_answer_holds_no_job_up_and_is_told_by_name() {
    let canary = unique_seconds();
    let variables = [
        ("NOMAD_BUILD_ARCHIVE", "s3://bucket/prefix"),
        // Nobody listens there.
        ("AWS_ENDPOINT_URL", "http://127.0.0.1:1"),
        ("AWS_ALLOW_HTTP", "true"),
        ("AWS_ACCESS_KEY_ID", "nobody"),
        ("AWS_SECRET_ACCESS_KEY", canary.as_str()),
    ];
    let service = Service::start(&world().nomad, &world().registry, &variables);
    let api = Api::new(&service.url);
    let repository = world().repository("");
    let (id, status) = api.run(&world().job(&repository)).await;
    assert_eq!(status["status"], "SUCCEEDED", "{status:#}");
    let allocation = status["nomad"]["allocation"].as_str().unwrap();
    let job = world().nomad(&format!("/v1/job/{id}")).await.unwrap().to_string();
    assert!(job.contains("s3://bucket/prefix") && !job.contains(&canary), "{job}");
    eventually("finish says that it could not archive", async || {
        let said = world().nomad_api().task_log(allocation, "finish").await;
        assert!(!said.contains(&canary), "{said}");
        said.contains("the job is not archived here").then_some(())
    })
    .await;
    assert_eq!(processes_with(&canary), [] as [u32; 0]);
    let variable = format!("nomad/jobs/{id}/job/finish");
    eventually("the archive's credentials are removed", async || {
        world().nomad_api().variables(&variable).await.is_empty().then_some(())
    })
    .await;
    let unknown = "/jobs/nb-0193a1c2-7e57-7000-8000-000000000009/status";
    let (status, body) = api.call(Method::GET, unknown, None).await;
    assert_eq!((status.as_u16(), &body["error"]["code"]), (503, &json!("archive_unavailable")), "{body}");
    assert!(!body.to_string().contains(&canary), "{body}");
    // What is kept nowhere else stays.
    let (status, body) = api.call(Method::POST, &format!("/jobs/{id}/cleanup"), None).await;
    assert_eq!((status.as_u16(), &body["error"]["code"]), (503, &json!("archive_unavailable")), "{body}");
    assert_eq!(api.status(&id).await["status"], "SUCCEEDED");
    assert_eq!(world().api().post(&format!("/jobs/{id}/cleanup")).await, json!({"success": true}));
}
