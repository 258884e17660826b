//! Credentials in Vault, which the job's own tasks read by what Nomad says that they are.

use reqwest::Method;
use serde_json::{Value, json};
use uuid::Uuid;

use super::{step, sum};
use crate::doctor;
use crate::registry::server::Server;
use crate::sources::http;
use crate::sources::payloads;
use crate::support::agent::Agent;
use crate::support::vault::{Identity, Vault};
use crate::support::{Api, Hold, Nomad, Service, eventually, image_of, tags_of, world};

/// Of the registry's file of users.
const LOGIN: (&str, &str) = ("ci", "relay-test");

/// A Nomad with a Vault of these secrets, and a service that lets credentials be below `secret/data`.
async fn with<const N: usize>(
    secrets: [(&str, Value); N],
    registries: &str,
) -> (std::sync::Arc<Vault>, Agent, Service) {
    let vault = Vault::serve(secrets).await;
    let agent = Agent::with_vault(&vault).await;
    let nomad = format!("http://{}", agent.address());
    let variables = [("NOMAD_BUILD_ALLOW_VAULT_PATHS", "secret/data"), ("NOMAD_BUILD_VAULT_ROLE", "builds")];
    let service = Service::start(&nomad, registries, &variables);
    (vault, agent, service)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_is_built_and_published_with_secrets_in_vault_that_only_its_tasks_read_and_nothing_shows() {
    let world = world();
    let [password, token] = [(); 2].map(|()| format!("canary-{}", Uuid::new_v4()));
    let registry = Server::start(Some(LOGIN)).await;
    let secrets = [
        ("default/git", json!({ "username": "me@here", "password": password })),
        ("default/registry", json!({ "username": LOGIN.0, "password": LOGIN.1 })),
        ("default/npm", json!({ "token": token, "other": "not-asked-for" })),
    ];
    let registries = format!("{},{}", world.registry, registry.host());
    let (vault, agent, service) = with(secrets, &registries).await;
    let repository = world.repository(&step());
    let mut job = world.job(&repository);
    job["repo_url"] = json!(http::serve(&repository, Some(("me@here", &password))).await);
    job["registry_url"] = json!(registry.host());
    job["git_credentials_path"] = json!("vault:secret/data/default/git");
    job["registry_credentials_path"] = json!("vault:secret/data/default/registry");
    job["build_secrets"] = json!({ "npmrc": "vault:secret/data/default/npm#token" });
    job["test_commands"] = json!([format!("[ \"$(cat /sum)\" = {} ]", sum(&token)), "! [ -e /secrets ]"]);
    let api = Api::new(&service.url);
    let id = api.submit(&job).await;
    agent.owns(&id);
    let status = api.wait_for_end(&id).await;
    let logs = api.logs(&id).await;
    assert_eq!(status["status"], "SUCCEEDED", "{status:#}\n{logs:#}");
    assert!(logs["build"].as_str().unwrap().contains("token is ***\n"), "{logs:#}");

    // The last task begins when the job has ended.
    let nomad = Nomad::new(&format!("http://{}", agent.address()));
    let allocation = status["nomad"]["allocation"].as_str().unwrap();
    eventually("the end of all tasks", async || {
        let found = nomad.get(&format!("/v1/allocation/{allocation}")).await;
        (found["ClientStatus"] == "complete").then_some(())
    })
    .await;
    let by = |task: &str, path: &str| {
        let [namespace, role, task] = ["default", "builds", task].map(str::to_owned);
        (Identity { namespace, job: id.clone(), task, role }, format!("default/{path}"))
    };
    let reads = [
        ("build", "git"),
        ("build", "npm"),
        ("build", "registry"),
        ("finish", "registry"),
        ("publish", "registry"),
    ];
    assert_eq!(vault.reads(), reads.map(|(task, path)| by(task, path)));

    let registered = nomad.get(&format!("/v1/job/{id}")).await;
    let mut seen = logs.to_string() + &status.to_string() + &payloads(&registered) + &registered.to_string();
    for part in ["/allocations", "/evaluations"] {
        seen += &nomad.get(&format!("/v1/job/{id}{part}")).await.to_string();
    }
    seen += &nomad.get(&format!("/v1/allocation/{allocation}")).await.to_string();
    for task in ["build", "test", "publish", "finish"] {
        seen += &nomad.task_log(allocation, task).await;
    }
    assert!(seen.contains("vault:secret/data/default/npm#token"), "the path is named");
    for secret in [&password, &token] {
        assert!(!seen.contains(secret), "and what is there is not");
    }
    assert!(nomad.variables(&format!("nomad/jobs/{id}")).await.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_secret_in_vault_that_may_not_be_named_or_read_or_used_fails_the_job_by_its_reason() {
    let world = world();
    let secrets = [("default/git", json!({ "token": "t" })), ("other/git", json!({ "token": "canary" }))];
    let (vault, agent, service) = with(secrets, &world.registry).await;
    let api = Api::new(&service.url);
    let nomad = format!("http://{}", agent.address());
    let variables = [("NOMAD_ADDR", nomad.as_str()), ("NOMAD_BUILD_ALLOW_VAULT_PATHS", "*")];
    let (_, findings) = doctor::examined(&[], &variables).await;
    assert_eq!(doctor::of(&findings, "vault")[0].0, "good", "{findings:#?}");
    let repository = world.repository(&step());
    let mut job = world.job(&repository);
    job["git_credentials_path"] = json!("vault:secret/other/git");
    job["build_secrets"] = json!({ "npmrc": "vault:cubbyhole/a#b" });
    let (status, body) = api.call(Method::POST, "/jobs", Some(&job)).await;
    let fields: Vec<_> = body["error"]["details"].as_array().unwrap().iter().map(|of| &of["field"]).collect();
    assert_eq!(status, 400, "{body}");
    assert_eq!(fields, ["git_credentials_path", "build_secrets.npmrc"], "{body}");
    let refused = world.api().call(Method::POST, "/jobs?dry_run=true", Some(&job)).await;
    assert!(refused.1.to_string().contains("none may be named here"), "{refused:?}");

    for (path, reason, why) in [
        // Vault keeps namespaces apart, and says no more of what is another's.
        ("vault:secret/data/other/git", "setup_failed", "secret/data/other/git"),
        ("vault:secret/data/default/gone", "setup_failed", "secret/data/default/gone"),
        ("vault:secret/data/default/git#password", "checkout_failed", "build_secrets.npmrc names an item"),
    ] {
        let mut job = world.job(&repository);
        let secret = if path.contains('#') { path.to_owned() } else { format!("{path}#token") };
        job["build_secrets"] = json!({ "npmrc": secret });
        let id = api.submit(&job).await;
        agent.owns(&id);
        let status = api.wait_for_end(&id).await;
        let logs = api.logs(&id).await;
        let failure = &status["failure"];
        assert_eq!(
            (&status["status"], &failure["phase"], &failure["reason"]),
            (&json!("FAILED"), &json!("build"), &json!(reason)),
            "{status:#}\n{logs}"
        );
        let said = format!("{}{}", status["failure"]["message"], logs["build"]);
        assert!(said.contains(why) && !said.contains("canary"), "{status:#}\n{logs:#}");
        assert!(tags_of(&world.registry, image_of(&job)).await.is_empty());
    }
    assert!(vault.reads().iter().all(|(_, path)| path.starts_with("default/")), "{:?}", vault.reads());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_that_waits_for_a_secret_in_vault_says_which_one() {
    let world = world();
    let (vault, agent, service) = with([("default/npm", json!({ "token": "t" }))], &world.registry).await;
    let api = Api::new(&service.url);
    let repository = world.repository(&step());
    let mut job = world.job(&repository);
    job["build_secrets"] = json!({ "npmrc": "vault:secret/data/default/npm#token" });
    let silence = vault.silence.write().await;
    let id = api.submit(&job).await;
    agent.owns(&id);
    let why = |status: &Value| {
        status["placement"].as_str().is_some_and(|why| why.contains("secret/data/default/npm"))
    };
    let status = api.wait_until(&id, "the secret that it waits for", why).await;
    assert_eq!(status["status"], "PENDING", "{status:#}");
    assert!(status["nomad"]["node"].is_string(), "{status:#}");
    drop(silence);
    let status = api.wait_for_end(&id).await;
    assert_eq!((&status["status"], &status["placement"]), (&json!("SUCCEEDED"), &Value::Null), "{status:#}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_that_is_given_another_place_while_it_waits_for_a_secret_has_its_credentials_there() {
    let world = world();
    let (vault, agent, service) = with([("default/npm", json!({ "token": "t" }))], &world.registry).await;
    let (api, nomad) = (Api::new(&service.url), Nomad::new(&format!("http://{}", agent.address())));
    let repository = world.repository(&step());
    let mut job = world.job(&repository);
    job["repo_url"] = json!(http::serve(&repository, Some(("me", "secret"))).await);
    let login = nomad.credentials(&json!({ "username": "me", "password": "secret" })).await;
    job["git_credentials_path"] = json!(login);
    job["build_secrets"] = json!({ "npmrc": "vault:secret/data/default/npm#token" });
    let silence = vault.silence.write().await;
    let id = api.submit(&job).await;
    agent.owns(&id);
    let status = api.wait_until(&id, "why it waits", |status| !status["placement"].is_null()).await;
    let first = status["nomad"]["allocation"].as_str().unwrap().to_owned();
    let stopped = format!("/v1/allocation/{first}/stop");
    assert!(
        Api::new(&format!("http://{}", agent.address()))
            .call(Method::PUT, &stopped, None)
            .await
            .0
            .is_success()
    );
    eventually("the end of its first place", async || {
        (nomad.get(&format!("/v1/allocation/{first}")).await["ClientStatus"] == "complete").then_some(())
    })
    .await;
    drop(silence);
    let status = api.wait_for_end(&id).await;
    assert_eq!(status["status"], "SUCCEEDED", "{status:#}\n{:#}", api.logs(&id).await);
    assert_ne!(status["nomad"]["allocation"], json!(first));
    eventually("a job without credentials", async || {
        nomad.variables(&format!("nomad/jobs/{id}")).await.is_empty().then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_whose_publish_waits_for_a_secret_in_vault_says_which_one() {
    let world = world();
    let secrets = [("default/registry", json!({ "username": LOGIN.0, "password": LOGIN.1 }))];
    let (vault, agent, service) = with(secrets, &world.registry).await;
    let api = Api::new(&service.url);
    // Time for the silence to begin after the build has read what it needs.
    let repository = world.repository(&format!("RUN echo {}; sleep 8", Uuid::new_v4()));
    let mut job = world.job(&repository);
    job["test_commands"] = json!(["true"]);
    job["registry_credentials_path"] = json!("vault:secret/data/default/registry");
    let id = api.submit(&job).await;
    agent.owns(&id);
    api.wait_until(&id, "a build", |status| status["status"] == "BUILDING").await;
    let silence = vault.silence.write().await;
    let waits = |status: &Value| {
        let why = status["placement"].as_str();
        why.is_some_and(|why| why.contains("publish waits") && why.contains("secret/data/default/registry"))
    };
    let status = api.wait_until(&id, "the secret that it waits for", waits).await;
    assert_eq!(status["status"], "TESTING", "{status:#}");
    assert!(status["phase_timestamps"]["test_end"].is_string(), "{status:#}");
    drop(silence);
    let status = api.wait_for_end(&id).await;
    assert_eq!((&status["status"], &status["placement"]), (&json!("SUCCEEDED"), &Value::Null), "{status:#}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_publish_whose_secret_vault_refuses_after_the_tests_passed_is_what_failed() {
    let world = world();
    let secrets = [("default/registry", json!({ "username": LOGIN.0, "password": LOGIN.1 }))];
    let (vault, agent, service) = with(secrets, &world.registry).await;
    let api = Api::new(&service.url);
    let hold = Hold::new();
    let repository = world.repository(&format!("RUN {}", hold.command()));
    let mut job = world.job(&repository);
    job["test_commands"] = json!(["true"]);
    job["registry_credentials_path"] = json!("vault:secret/data/default/registry");
    let id = api.submit(&job).await;
    agent.owns(&id);
    api.wait_until(&id, "a build", |status| status["status"] == "BUILDING").await;
    // It is not told so before the tests have passed.
    let silence = vault.silence.write().await;
    *vault.refused.lock().unwrap() = Some("publish");
    hold.let_go().await;
    let tested = |status: &Value| status["phase_timestamps"]["test_end"].is_string();
    api.wait_until(&id, "tests that passed", tested).await;
    drop(silence);
    let status = api.wait_for_end(&id).await;
    let failure = &status["failure"];
    assert_eq!(
        (&status["status"], &failure["phase"], &failure["reason"]),
        (&json!("FAILED"), &json!("publish"), &json!("setup_failed")),
        "{status:#}"
    );
    assert!(failure["message"].as_str().unwrap().contains("secret/data/default/registry"), "{status:#}");
    assert!(status["phase_timestamps"]["publish_start"].is_null(), "{status:#}");
}
