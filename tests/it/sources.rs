//! Where the source comes from: refs, transports, credentials, submodules, folders.

pub(crate) mod http;
mod ssh;

use axum::Router;
use axum::http::HeaderMap;
use axum::http::header::{AUTHORIZATION, WWW_AUTHENTICATE};
use axum::response::IntoResponse as _;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::support::{Api, Repository, Service, World, eventually, serve, tags_of, world};

/// Strange enough to be found wherever it shows up.
const PASSWORD: &str = "pa$$:w0rd/%40-7f3a9c";

/// A repository with one commit after another: the file `version` says which one it is.
fn versions(world: &World) -> Repository {
    let mut repository = world.repository("COPY version /version");
    for version in ["1", "2", "3"] {
        repository = repository.file("version", version).commit();
        match version {
            "1" => {
                repository.git(&["tag", "light"]);
                repository.git(&["tag", "--annotate", "--message=x", "noted"]);
            }
            "2" => drop(repository.git(&["branch", "feature/a/b"])),
            _ => {}
        }
    }
    repository
}

fn has_version(version: &str) -> Value {
    json!([format!("test \"$(cat /version)\" = {version}")])
}

#[tokio::test]
async fn every_way_to_name_a_commit_builds_that_commit() {
    let world = world();
    let repository = versions(world);
    let commit = |of: &str| repository.git(&["rev-parse", &format!("{of}^{{commit}}")]);
    let (first, second) = (commit("light"), commit("feature/a/b"));
    let mut jobs = Vec::new();
    for (git_ref, of, reference) in [
        (None, "main", Some("refs/heads/main")),
        (Some("HEAD"), "main", Some("refs/heads/main")),
        (Some("main"), "main", Some("refs/heads/main")),
        (Some("light"), "light", Some("refs/tags/light")),
        (Some("noted"), "light", Some("refs/tags/noted")),
        (Some("feature/a/b"), "feature/a/b", Some("refs/heads/feature/a/b")),
        (Some("refs/heads/feature/a/b"), "feature/a/b", Some("refs/heads/feature/a/b")),
        (Some(second.as_str()), "feature/a/b", Some(second.as_str())),
        (Some(&first[..9]), "light", Some(&first[..9])),
    ] {
        let mut job = world.job(&repository);
        job["git_ref"] = json!(git_ref);
        job["test_commands"] = has_version(match of {
            "light" => "1",
            "main" => "3",
            _ => "2",
        });
        jobs.push((world.api().submit(&job).await, git_ref, commit(of), reference));
    }
    for (id, git_ref, commit, reference) in jobs {
        let status = world.api().wait_for_end(&id).await;
        assert_eq!(status["status"], "SUCCEEDED", "{git_ref:?}: {status:#}");
        assert_eq!(status["git"], json!({ "ref": reference, "commit": commit }), "{git_ref:?}");
    }
}

#[tokio::test]
async fn a_ref_that_is_not_there_fails_the_build_and_publishes_nothing() {
    let world = world();
    let repository = versions(world);
    for git_ref in ["nowhere", "refs/heads/nowhere", "deadbeef", "0123456789012345678901234567890123456789"] {
        let mut job = world.job(&repository);
        job["git_ref"] = json!(git_ref);
        let (_, status) = world.api().run(&job).await;
        assert_eq!(status["status"], "FAILED", "{git_ref}: {status:#}");
        assert_eq!(status["failure"]["phase"], "build", "{git_ref}");
        assert_eq!(status["failure"]["reason"], "ref_not_found", "{git_ref}: {status:#}");
        assert!(tags_of(&world.registry, crate::support::image_of(&job)).await.is_empty());
    }
}

#[tokio::test]
async fn a_repository_over_http_is_built() {
    let world = world();
    let repository = versions(world);
    let first = repository.git(&["rev-parse", "light"]);
    for (git_ref, version) in [("main", "3"), ("feature/a/b", "2"), (&first[..10], "1")] {
        let mut job = world.job(&repository);
        job["repo_url"] = json!(http::serve(&repository, None).await);
        job["git_ref"] = json!(git_ref);
        job["test_commands"] = has_version(version);
        let (_, status) = world.api().run(&job).await;
        assert_eq!(status["status"], "SUCCEEDED", "{status:#}");
    }
}

#[tokio::test]
async fn a_private_repository_is_built_with_the_credentials_of_a_variable_that_show_up_nowhere() {
    let world = world();
    let (api, nomad) = (world.api(), world.nomad_api());
    let repository = versions(world);
    let mut job = world.job(&repository);
    job["repo_url"] = json!(http::serve(&repository, Some(("me@here", PASSWORD))).await);
    let path = nomad.credentials(&json!({ "username": "me@here", "password": PASSWORD })).await;
    job["git_credentials_path"] = json!(path);
    job["test_commands"] = has_version("3");
    let (id, status) = api.run(&job).await;
    assert_eq!(status["status"], "SUCCEEDED", "{status:#}");

    let nomad_job = nomad.get(&format!("/v1/job/{id}")).await;
    let mut seen = payloads(&nomad_job);
    // So the payloads were found, and read.
    assert!(seen.contains(&path), "{seen}");
    seen += &nomad_job.to_string();
    seen += &status.to_string();
    seen += &nomad.get(&format!("/v1/job/{id}/allocations")).await.to_string();
    let allocation = status["nomad"]["allocation"].as_str().unwrap();
    for task in ["build", "test", "publish"] {
        let log = nomad.task_log(allocation, task).await;
        assert!(!log.is_empty(), "{task}");
        seen += &log;
    }
    let percent = "pa%24%24%3Aw0rd%2F%2540-7f3a9c";
    for secret in [PASSWORD, percent, &BASE64_STANDARD.encode(format!("me@here:{PASSWORD}"))] {
        assert!(!seen.contains(secret));
    }
}

/// What the templates of a Nomad job's tasks hold, decoded.
pub(crate) fn payloads(nomad_job: &Value) -> String {
    let tasks = nomad_job["TaskGroups"][0]["Tasks"].as_array().unwrap();
    let templates = tasks.iter().filter_map(|task| task["Templates"].as_array()).flatten();
    let templates = templates.filter(|template| template["DestPath"].as_str().unwrap().ends_with("/payload"));
    let decode = |template: &Value| {
        let bytes = BASE64_STANDARD.decode(template["EmbeddedTmpl"].as_str().unwrap().trim()).unwrap();
        String::from_utf8(bytes).unwrap()
    };
    templates.map(decode).collect()
}

#[tokio::test]
async fn without_the_right_credentials_a_private_repository_is_unauthorized() {
    let world = world();
    let repository = versions(world);
    let url = http::serve(&repository, Some(("me", PASSWORD))).await;
    let wrong = world.nomad_api().credentials(&json!({ "username": "me", "password": "wrong" })).await;
    for path in [Value::Null, json!(wrong)] {
        let mut job = world.job(&repository);
        job["repo_url"] = json!(url);
        job["git_credentials_path"] = path;
        let (_, status) = world.api().run(&job).await;
        assert_eq!(status["status"], "FAILED", "{status:#}");
        assert_eq!(status["failure"]["phase"], "build", "{status:#}");
        assert_eq!(status["failure"]["reason"], "unauthorized", "{status:#}");
    }
}

#[tokio::test]
async fn a_password_that_a_git_server_tells_its_client_is_hidden_in_log_and_status() {
    let world = world();
    let password = "p4ss/w\u{f6}rd \"of\" a+job%";
    let login = BASE64_STANDARD.encode(format!("me:{password}"));
    let said = format!(
        "{password} is known\n{} too\nlogin {login}\nurl {}\n",
        json!(password),
        password.bytes().map(|byte| format!("%{byte:02X}")).collect::<String>()
    );
    let (asks, tells) = ([(WWW_AUTHENTICATE, "Basic realm=\"git\"")], said.clone());
    let router = Router::new().fallback(async move |headers: HeaderMap| match headers.get(AUTHORIZATION) {
        None => (StatusCode::UNAUTHORIZED, asks).into_response(),
        Some(_) => (StatusCode::FORBIDDEN, tells).into_response(),
    });
    let url = format!("http://{}/repository.git", serve(router).await);
    let path = world.nomad_api().credentials(&json!({ "username": "me", "password": password })).await;
    let mut job = world.job(&versions(world));
    job["repo_url"] = json!(url);
    job["git_credentials_path"] = json!(path);
    let (id, status) = world.api().run(&job).await;
    assert_eq!(status["status"], "FAILED", "{status:#}");
    let log = world.api().logs(&id).await["build"].as_str().unwrap().to_owned();
    assert!(log.contains("remote: *** is known\n") && log.contains("remote: url ***\n"), "{log}");
    assert!(log.contains("remote: \"***\" too\n"), "{log}");
    // What of the login is not the password stays: the name of the user.
    let hidden = &login[4..login.len() - 4];
    for text in [log, status.to_string()] {
        assert!(!text.contains("p4ss") && !text.contains("%70") && !text.contains(hidden), "{text}");
    }
}

#[tokio::test]
async fn a_credentials_path_without_a_usable_variable_is_refused_by_name_and_nothing_is_registered() {
    let world = world();
    let repository = versions(world);
    let useless = world.nomad_api().credentials(&json!({ "user": "me" })).await;
    for field in ["git_credentials_path", "registry_credentials_path"] {
        for path in ["creds/nobody/wrote/this", useless.as_str()] {
            let mut job = world.job(&repository);
            job[field] = json!(path);
            let (status, body) = world.api().call(Method::POST, "/jobs", Some(&job)).await;
            assert_eq!(status, StatusCode::BAD_REQUEST, "{body}");
            assert_eq!(body["error"]["code"], "invalid_submission");
            assert_eq!(body["error"]["details"].as_array().unwrap().len(), 1, "{body}");
            assert_eq!(body["error"]["details"][0]["field"], field, "{body}");
        }
    }
    let listed = world.nomad_api().get("/v1/jobs?meta=true").await.to_string();
    assert!(!listed.contains(&repository.url()));
}

#[tokio::test]
async fn the_copies_of_credentials_are_gone_when_the_job_has_ended() {
    let world = world();
    let nomad = world.nomad_api();
    let login = nomad.credentials(&json!({ "username": "me", "password": PASSWORD })).await;
    let slow = "RUN sleep 600";
    for (line, end) in
        [("RUN true", "SUCCEEDED"), ("RUN false", "FAILED"), (slow, "KILLED"), (slow, "FAILED")]
    {
        let repository = world.repository(line);
        let mut job = world.job(&repository);
        job["registry_credentials_path"] = json!(login);
        job["git_credentials_path"] = json!(login);
        if (line, end) == (slow, "FAILED") {
            job["timeouts"] = json!({ "build": "PT2S" });
        }
        let id = world.api().submit(&job).await;
        if end == "KILLED" {
            world.api().wait_until(&id, "building", |status| status["status"] == "BUILDING").await;
            world.api().post(&format!("/jobs/{id}/kill")).await;
        }
        let status = world.api().wait_for_end(&id).await;
        assert_eq!(status["status"], end, "{status:#}");
        eventually("a job without credentials", async || {
            nomad.variables(&format!("nomad/jobs/{id}")).await.is_empty().then_some(())
        })
        .await;
    }
    // What the caller wrote stays the caller's.
    assert_eq!(nomad.variables(&login).await, std::slice::from_ref(&login));
}

#[tokio::test]
async fn a_submodule_is_checked_out() {
    let world = world();
    let inner = Repository::new().file("inside", "inner").commit();
    let outer = world.repository("COPY sub/inside /inside");
    outer.git(&["-c", "protocol.file.allow=always", "submodule", "--quiet", "add", &inner.url(), "sub"]);
    let outer = outer.commit();
    let mut job = world.job(&outer);
    job["test_commands"] = json!(["test \"$(cat /inside)\" = inner"]);
    let (_, status) = world.api().run(&job).await;
    assert_eq!(status["status"], "SUCCEEDED", "{status:#}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_submodule_is_held_to_the_list_of_repositories() {
    let world = world();
    let inner = Repository::new().file("inside", "inner").commit();
    let outer = world.repository("COPY sub/inside /inside").submodule(&inner.url(), "sub").commit();
    let job = world.job(&outer);
    for (allowed, end) in [(outer.url(), "FAILED"), (format!("{},{}", outer.url(), inner.url()), "SUCCEEDED")]
    {
        let variables = [("NOMAD_BUILD_ALLOW_REPOSITORIES", allowed.as_str())];
        let service = Service::start(&world.nomad, &world.registry, &variables);
        let (_, status) = Api::new(&service.url).run(&job).await;
        assert_eq!(status["status"], end, "{status:#}");
        if end == "FAILED" {
            assert_eq!(status["failure"]["reason"], "checkout_failed", "{status:#}");
            let message = status["failure"]["message"].as_str().unwrap();
            let wanted = format!(
                "the address of submodule \"sub\" is none of the repositories allowed here: {allowed}"
            );
            assert!(message.contains(&wanted), "{message}");
        }
    }
}

#[tokio::test]
async fn one_folder_of_a_repository_can_be_the_context_and_another_have_the_dockerfile() {
    let world = world();
    let repository = Repository::new()
        .file("services/api/content", "api")
        .file("content", "root")
        .file("docker/api.Dockerfile", "ARG BASE\nFROM $BASE\nCOPY . /src\n")
        .file("Dockerfile", "FROM scratch\nRUN never\n")
        .commit();
    let mut job = world.job(&repository);
    job["context_path"] = json!("services/api");
    job["dockerfile_path"] = json!("docker/api.Dockerfile");
    job["test_commands"] = json!([
        "test \"$(cat /src/content)\" = api",
        "test \"$(find /src)\" = \"$(printf '/src\\n/src/content')\""
    ]);
    let (_, status) = world.api().run(&job).await;
    assert_eq!(status["status"], "SUCCEEDED", "{status:#}");
}
