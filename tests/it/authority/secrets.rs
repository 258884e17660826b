//! Secrets of a team: its own callers' builds have them, and they are found nowhere.

mod endings;

use std::path::PathBuf;
use std::sync::Arc;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use uuid::Uuid;

use super::{guard, trust};
use crate::registry::server::Server;
use crate::sources::http;
use crate::support::{
    Api, Authority, Canaries, Guarded, Issuer, NAMESPACE, Recorders, Repository, Service, Ssh,
    engine_is_rid_of, eventually, world,
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
    /// What the steps of builds sign with.
    steps: Ssh,
    authority: Authority,
    audit: tempfile::NamedTempFile,
    npm: String,
    password: String,
    /// Of a registry that builds may pull from.
    hub: String,
    /// What is in each image, and no secret.
    mark: String,
}

impl Stage {
    async fn new() -> Self {
        Self::with(&[], &[]).await
    }

    /// The same, with further variables of the service and of the node.
    async fn with(further: &[(&str, &str)], of_node: &[(&'static str, PathBuf)]) -> Self {
        let (authority, registry) = (Authority::new(), Server::start(Some(LOGIN)).await);
        let registries = format!("{},{}", world().registry, registry.host());
        let nomad = Guarded::start_trusting(&authority, of_node).await;
        let audit = tempfile::NamedTempFile::new().unwrap();
        let variables = [("NOMAD_BUILD_AUDIT_FILE", audit.path().to_str().unwrap())];
        let (nomad, service, token) = guard(nomad, &registries, &[&variables, further].concat()).await;
        let (server, steps) = (Ssh::serve().await, Ssh::serve().await);
        let [npm, password, hub, others] = [(); 4].map(|()| canary());
        let logins = [(registry.host(), LOGIN.0, LOGIN.1), ("hub.example.com", "me", &hub)];
        let auths = logins.map(|(host, user, password)| {
            (host.to_owned(), json!({ "auth": BASE64_STANDARD.encode(format!("{user}:{password}")) }))
        });
        let auths: serde_json::Map<_, _> = auths.into_iter().collect();
        for (team, npm) in [("acme", &npm), ("other", &others)] {
            for (what, items) in [
                ("git", json!({ "ssh_key": server.key(), "known_hosts": server.known_host() })),
                ("https", json!({ "username": "me@here", "password": password })),
                ("registry", json!({ "username": LOGIN.0, "password": LOGIN.1 })),
                ("config", json!({ "config.json": json!({ "auths": auths }).to_string() })),
                ("npm", json!({ "token": npm })),
                ("steps", json!({ "ssh_key": steps.key() })),
            ] {
                nomad.write(&format!("creds/{team}/{what}"), &items).await;
            }
        }
        let mark = canary();
        Self { nomad, service, token, registry, server, steps, authority, audit, npm, password, hub, mark }
    }

    /// A repository whose build mounts the secret, and a submission that brings every kind of them.
    fn job(&self) -> (Repository, Value) {
        let sum: String = Sha256::digest(&self.npm).iter().map(|byte| format!("{byte:02x}")).collect();
        let step = format!(
            "RUN --mount=type=secret,id=npm,required=true : {}; echo {} > /mark; \
             test \"$(sha256sum < /run/secrets/npm)\" = '{sum}  -'; sleep 1",
            Uuid::new_v4(),
            self.mark
        );
        let repository = world().repository(&step);
        let mut job = world().job(&repository);
        job["repo_url"] = json!(self.server.url(&repository));
        job["registry_url"] = json!(self.registry.host());
        job["git_credentials_path"] = json!("creds/acme/git");
        job["registry_credentials_path"] = json!("creds/acme/registry");
        job["build_secrets"] = json!({ "npm": "creds/acme/npm#token" });
        job["ssh"] = json!({ "default": "creds/acme/steps#ssh_key" });
        job["test_commands"] = json!(["true"]);
        (repository, job)
    }

    /// Every place where they could have got to.
    fn places(&self) -> Places<'_> {
        Places { nomad: &self.nomad, service: &self.service, registry: &self.registry }
    }
}

fn canary() -> String {
    format!("canary-{}", Uuid::new_v4().simple())
}

/// Where what jobs were given could have got to, beside processes.
struct Places<'a> {
    nomad: &'a Guarded,
    service: &'a Service,
    registry: &'a Server,
}

impl Places<'_> {
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

    /// What is found of secrets, and of what callers are known by, of jobs that have ended; since a time, in the engine's store.
    async fn found(
        &self,
        secrets: &Canaries,
        tokens: &Canaries,
        api: &Api,
        ids: &[String],
        since: i64,
    ) -> Vec<String> {
        let mut found = Vec::new();
        let told = futures_util::future::join_all(ids.iter().map(|id| self.told(api, id))).await.concat();
        for canaries in [secrets, tokens] {
            found.extend(canaries.within("what is told", told.as_bytes()));
            found.extend(canaries.within("the service's log", self.service.said().as_bytes()));
            found.extend(canaries.below(&self.registry.folder().join("storage")));
            found.extend(canaries.in_engine(since));
        }
        found.extend(secrets.below(self.nomad.folder()));
        // Nomad's servers keep the tokens of its ACLs as they are.
        for part in ["alloc", "client"] {
            found.extend(tokens.below(&self.nomad.folder().join("nomad").join(part)));
        }
        let log = std::fs::read(self.nomad.folder().join("agent.log")).unwrap();
        found.extend(tokens.within("Nomad's log", &log));
        found
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

/// Opens a job's log with a ticket, which is told.
async fn followed_by_ticket(stage: &Stage, api: &Api, id: &str) -> String {
    let ticket = api.post(&format!("/jobs/{id}/logs/tickets")).await["ticket"].as_str().unwrap().to_owned();
    let log = Api::new(&stage.service.url).stream(id, &format!("?ticket={ticket}")).await;
    assert_eq!(log.status(), StatusCode::OK);
    assert!(log.text().await.unwrap().contains("event: end"));
    ticket
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_builds_with_the_secrets_of_its_own_team_and_they_are_found_nowhere() {
    let begun = chrono::Utc::now().timestamp();
    let recorders = Recorders::of(&["git", "ssh", "ssh-agent", "ssh-add"]);
    let stage = Stage::with(&[("NOMAD_BUILD_LOG", "trace")], &[("PATH", recorders.path())]).await;
    let (issuer, token) = (Issuer::new(), stage.nomad.builder().await.secret);
    trust(&stage.nomad, &issuer, "acme/api").await;
    let jwt = issuer.token("acme/api", 600);
    let own = std::fs::read_to_string(stage.token.path()).unwrap();
    let auth = BASE64_STANDARD.encode(format!("me:{}", stage.hub));
    let (key, steps) = (stage.server.key(), stage.steps.key());
    let secrets = [
        ("the step's secret", &*stage.npm),
        ("the password of git", &stage.password),
        ("the key of git", &key),
        ("the key of steps", &steps),
        ("the password of the registry", LOGIN.1),
        ("the password of another registry", &stage.hub),
        ("that password in config.json", &auth),
    ];
    let tokens = [
        ("the caller's token", &*token),
        ("the service's token", &own),
        ("the JWT", jwt.rsplit('.').next().unwrap()),
    ];
    let all = Arc::new(Canaries::new(&[&secrets[..], &tokens].concat()));
    // What is looked for is found where it is.
    assert_eq!(all.within("a key", key.as_bytes()), ["the key of git in a key"]);
    let processes = all.watch();
    // Who is one of those that submit, as the README has it: there is no `submit-job`.
    let api = Api::with_token(&stage.service.url, &token);
    let (repository, by_ssh) = stage.job();
    let plain = http::serve(&repository, Some(("me@here", &stage.password))).await;
    let (host, path) = plain.strip_prefix("http://").unwrap().split_once('/').unwrap();
    let mut by_https = by_ssh.clone();
    let front = stage.authority.before(host.parse().unwrap()).await;
    by_https["repo_url"] = json!(format!("https://{front}/{path}"));
    by_https["git_credentials_path"] = json!("creds/acme/https");
    by_https["registry_credentials_path"] = json!("creds/acme/config");
    let (mut ended, mut tickets) = (Vec::new(), Vec::new());
    for (caller, job) in [(&api, by_ssh), (&Api::with_token(&stage.service.url, &jwt), by_https)] {
        let id = caller.submit(&job).await;
        stage.nomad.owns(&id);
        tickets.push(followed_by_ticket(&stage, caller, &id).await);
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
    found.extend(all.below(recorders.calls()));
    found.extend(all.within("the audit log", &std::fs::read(stage.audit.path()).unwrap()));
    let (secrets, tokens) = (
        Canaries::new(&secrets),
        [&tokens[..], &[("a ticket", &*tickets[0]), ("another ticket", &tickets[1])]].concat(),
    );
    let tokens = Canaries::new(&tokens);
    found.extend(tokens.within("the audit log", &std::fs::read(stage.audit.path()).unwrap()));
    found.extend(stage.places().found(&secrets, &tokens, &api, &ended, begun).await);
    assert!(found.is_empty(), "{found:#?}");
    assert!(stage.service.said().contains("\"TRACE\""), "the service says all that it can");
    // And what is no secret is found in each place that an image gets to.
    let mark = Canaries::new(&[("the mark", &stage.mark)]);
    let told = stage.places().told(&api, &ended[0]).await;
    assert!(!mark.within("what is told", told.as_bytes()).is_empty());
    assert!(
        !mark.below(&stage.registry.folder().join("storage")).is_empty() && !mark.in_engine(begun).is_empty()
    );
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
    let why = async || refused.said().contains("Regular expression").then_some(());
    eventually("it is for the expression that Nomad refuses it", why).await;
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
