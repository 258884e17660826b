//! Secrets of a team: its own callers' builds have them, and they are found nowhere.

mod endings;

use std::sync::Arc;

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use uuid::Uuid;

use super::guard;
use crate::registry::server::Server;
use crate::sources::http;
use crate::support::{
    Api, Authority, Canaries, Guarded, NAMESPACE, Repository, Service, Ssh, engine_is_rid_of, eventually,
    world,
};

/// The private registry's user.
const LOGIN: (&str, &str) = ("ci", "relay-test");

/// A cluster with ACLs, where two teams have secrets of the same kinds.
struct Stage {
    nomad: Guarded,
    service: Service,
    token: tempfile::NamedTempFile,
    registry: Server,
    server: Ssh,
    authority: Authority,
    audit: tempfile::NamedTempFile,
    npm: String,
    password: String,
}

impl Stage {
    async fn new() -> Self {
        let (authority, registry) = (Authority::new(), Server::start(Some(LOGIN)).await);
        let registries = format!("{},{}", world().registry, registry.host());
        let nomad = Guarded::start_trusting(&authority).await;
        let audit = tempfile::NamedTempFile::new().unwrap();
        let variables = [("NOMAD_BUILD_AUDIT_FILE", audit.path().to_str().unwrap())];
        let (nomad, service, token) = guard(nomad, &registries, &variables).await;
        let server = Ssh::serve().await;
        let canary = || format!("canary-{}", Uuid::new_v4().simple());
        let (npm, password) = (canary(), canary());
        for (team, npm) in [("acme", npm.clone()), ("other", canary())] {
            for (what, items) in [
                ("git", json!({ "ssh_key": server.key(), "known_hosts": server.known_host() })),
                ("https", json!({ "username": "me@here", "password": password })),
                ("registry", json!({ "username": LOGIN.0, "password": LOGIN.1 })),
                ("npm", json!({ "token": npm })),
            ] {
                nomad.write(&format!("creds/{team}/{what}"), &items).await;
            }
        }
        Self { nomad, service, token, registry, server, authority, audit, npm, password }
    }

    /// A repository whose build mounts the secret, and a submission that brings every kind of them.
    fn job(&self) -> (Repository, Value) {
        let sum: String = Sha256::digest(&self.npm).iter().map(|byte| format!("{byte:02x}")).collect();
        let step = format!(
            "RUN --mount=type=secret,id=npm,required=true : {}; \
             test \"$(sha256sum < /run/secrets/npm)\" = '{sum}  -'; sleep 1",
            Uuid::new_v4()
        );
        let repository = world().repository(&step);
        let mut job = world().job(&repository);
        job["repo_url"] = json!(self.server.url(&repository));
        job["registry_url"] = json!(self.registry.host());
        job["git_credentials_path"] = json!("creds/acme/git");
        job["registry_credentials_path"] = json!("creds/acme/registry");
        job["build_secrets"] = json!({ "npm": "creds/acme/npm#token" });
        job["test_commands"] = json!(["true"]);
        (repository, job)
    }

    /// Everything that Nomad and the service tell of a job, and of all jobs.
    async fn told(&self, api: &Api, id: &str) -> String {
        let mut told = api.status(id).await.to_string() + &api.logs(id).await.to_string();
        told += &api.stream(id, "").await.text().await.unwrap();
        told += &api.call(Method::GET, "/jobs", None).await.1.to_string();
        for path in ["", "/allocations", "/evaluations", "/deployments", "/versions", "/summary"] {
            let path = format!("job/{id}{path}?namespace=builds");
            told += &self.nomad.call(Method::GET, &path, &Value::Null).await.to_string();
        }
        let variables = self.nomad.call(Method::GET, "vars?namespace=*", &Value::Null).await;
        for variable in variables.as_array().unwrap() {
            let path = variable["Path"].as_str().unwrap();
            // Where they are the team's own.
            if !path.starts_with("creds/") {
                let path = format!("var/{path}?namespace=builds");
                told += &self.nomad.call(Method::GET, &path, &Value::Null).await.to_string();
            }
        }
        told
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_fails_leaves_nothing_that_it_was_given() {
    let stage = Stage::new().await;
    let api = Api::with_token(&stage.service.url, &stage.nomad.builder().await.secret);
    let (_repository, mut job) = stage.job();
    for (broken, reason) in [("test", "test_failed"), ("build", "input_missing")] {
        match broken {
            "test" => job["test_commands"] = json!(["false"]),
            _ => job["dockerfile_path"] = json!("none"),
        }
        let id = api.submit(&job).await;
        stage.nomad.owns(&id);
        let status = api.wait_for_end(&id).await;
        assert_eq!(status["failure"]["reason"], reason, "{status:#}");
        // Of a task that failed Nomad takes the allocation for ended, and refuses what `finish` is.
        eventually("no copy is left", async || {
            let path = format!("vars?namespace=builds&prefix=nomad/jobs/{id}");
            stage.nomad.call(Method::GET, &path, &Value::Null).await.as_array()?.is_empty().then_some(())
        })
        .await;
        engine_is_rid_of(&id).await;
        let allocation = status["nomad"]["allocation"].as_str().unwrap();
        eventually("an end of all its tasks", async || {
            let path = format!("allocation/{allocation}?namespace=builds");
            let found = stage.nomad.call(Method::GET, &path, &Value::Null).await;
            let tasks = found["TaskStates"].as_object().unwrap();
            tasks.values().all(|task| task["State"] == "dead").then_some(())
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_builds_with_the_secrets_of_its_own_team_and_they_are_found_nowhere() {
    let stage = Stage::new().await;
    let canaries = Arc::new(Canaries::new(&[
        ("the step's secret", &stage.npm),
        ("the password of git", &stage.password),
        ("the key of git", &stage.server.key()),
        ("the password of the registry", LOGIN.1),
    ]));
    // What is looked for is found where it is.
    assert_eq!(canaries.within("a key", stage.server.key().as_bytes()), ["the key of git in a key"]);
    let processes = canaries.watch();
    // Who is one of those that submit, as the README has it: there is no `submit-job`.
    let api = Api::with_token(&stage.service.url, &stage.nomad.builder().await.secret);
    let (repository, by_ssh) = stage.job();
    let plain = http::serve(&repository, Some(("me@here", &stage.password))).await;
    let (host, path) = plain.strip_prefix("http://").unwrap().split_once('/').unwrap();
    let mut by_https = by_ssh.clone();
    let front = stage.authority.before(host.parse().unwrap()).await;
    by_https["repo_url"] = json!(format!("https://{front}/{path}"));
    by_https["git_credentials_path"] = json!("creds/acme/https");
    let mut ended = Vec::new();
    for job in [by_ssh, by_https] {
        let id = api.submit(&job).await;
        stage.nomad.owns(&id);
        let status = api.wait_for_end(&id).await;
        let said = stage.server.said();
        assert_eq!(status["status"], "SUCCEEDED", "{status:#}\n{:#}\n{said}", api.logs(&id).await);
        ended.push(id);
    }
    let copies = async || {
        let path = "vars?namespace=builds&prefix=nomad/jobs";
        stage.nomad.call(Method::GET, path, &Value::Null).await
    };
    eventually("no copy is left", async || copies().await.as_array()?.is_empty().then_some(())).await;
    let mut found = processes.end();
    for id in &ended {
        found.extend(canaries.within("what is told", stage.told(&api, id).await.as_bytes()));
    }
    found.extend(canaries.below(stage.nomad.folder()));
    found.extend(canaries.below(&stage.registry.folder().join("storage")));
    found.extend(canaries.within("the service's log", stage.service.said().as_bytes()));
    found.extend(canaries.within("the audit log", &std::fs::read(stage.audit.path()).unwrap()));
    assert!(found.is_empty(), "{found:#?}");
}

#[tokio::test]
async fn a_caller_builds_with_no_secret_of_another_team() {
    let stage = Stage::new().await;
    let api = Api::with_token(&stage.service.url, &stage.nomad.builder().await.secret);
    let (_repository, mut job) = stage.job();
    let of = |name: &str, team: &str, item: &str| json!({ name: format!("creds/{team}/{item}") });
    for (field, mine, others) in [
        ("git_credentials_path", json!("creds/acme/git"), json!("creds/other/git")),
        ("registry_credentials_path", json!("creds/acme/registry"), json!("creds/other/registry")),
        ("build_secrets", of("npm", "acme", "npm#token"), of("npm", "other", "npm#token")),
        ("ssh", of("default", "acme", "git#ssh_key"), of("default", "other", "git#ssh_key")),
    ] {
        job[field] = others;
        // As the command line sends it, and without.
        let key = Uuid::new_v4().to_string();
        let answers = [api.keyed(&key, &job).await, api.call(Method::POST, "/jobs", Some(&job)).await];
        for (status, body) in answers {
            assert_eq!(status, StatusCode::FORBIDDEN, "{body}");
            assert_eq!(body["error"]["code"], "forbidden", "{body}");
            let details = body["error"]["details"].as_array().unwrap();
            assert_eq!(details.len(), 1, "{body}");
            assert!(details[0]["field"].as_str().unwrap().starts_with(field), "{body}");
        }
        job[field] = mine;
    }
    let jobs = stage.nomad.call(Method::GET, "jobs?namespace=builds&prefix=nb-", &Value::Null).await;
    assert_eq!(jobs, json!([]));
    assert!(stage.nomad.left().await.is_empty(), "{:?}", stage.nomad.left().await);
}

#[tokio::test]
async fn a_keyed_submission_that_nomad_refuses_leaves_nothing_and_its_key_is_as_new() {
    let stage = Stage::new().await;
    let template = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/templates/raw_exec.json"));
    let file = tempfile::NamedTempFile::new().unwrap();
    // No expression: Nomad looks at that, and nobody before.
    std::fs::write(
        file.path(),
        template
            .replace(r#""Operand": "=""#, r#""Operand": "regexp""#)
            .replace(r#""RTarget": "1""#, r#""RTarget": "(""#),
    )
    .unwrap();
    let registries = format!("{},{}", world().registry, stage.registry.host());
    let variables = [
        ("NOMAD_BUILD_NAMESPACES", NAMESPACE),
        ("NOMAD_TOKEN_FILE", stage.token.path().to_str().unwrap()),
        ("NOMAD_BUILD_SWEEP", "off"),
        ("NOMAD_BUILD_TEMPLATE", file.path().to_str().unwrap()),
    ];
    let refused = Service::start(&stage.nomad.url, &registries, &variables);
    let token = stage.nomad.builder().await.secret;
    let (_repository, job) = stage.job();
    let key = Uuid::new_v4().to_string();
    let (status, body) = Api::with_token(&refused.url, &token).keyed(&key, &job).await;
    assert_eq!(status, StatusCode::INTERNAL_SERVER_ERROR, "{body}");
    assert!(refused.said().contains("Regular expression"), "{}", refused.said());
    assert!(stage.nomad.left().await.is_empty(), "{:?}", stage.nomad.left().await);

    let api = Api::with_token(&stage.service.url, &token);
    let id = api.submit_keyed(&key, &job).await;
    stage.nomad.owns(&id);
    assert_eq!(api.wait_for_end(&id).await["status"], "SUCCEEDED", "{:#}", api.logs(&id).await);
    // It is told to whoever has the key, though what it was made with is gone.
    stage.nomad.call(Method::DELETE, "var/creds/acme/npm?namespace=builds", &Value::Null).await;
    for service in [&stage.service, &refused] {
        assert_eq!(Api::with_token(&service.url, &token).submit_keyed(&key, &job).await, id);
    }
    let mut other = job.clone();
    other["priority"] = json!(51);
    let (status, body) = api.keyed(&key, &other).await;
    assert_eq!((status.as_u16(), &body["error"]["code"]), (422, &json!("idempotency_key_reused")), "{body}");
}
