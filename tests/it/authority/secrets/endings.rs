//! However a job ends, nothing of what it was given stays on its node, be it of a Variable or of Vault.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use reqwest::Method;
use serde_json::{Value, json};
use tokio::net::TcpListener;

use super::{LOGIN, Places, canary};
use crate::authority::guard;
use crate::registry::server::Server;
use crate::sources::http;
use crate::support::vault::Vault;
use crate::support::{
    Api, Canaries, Guarded, Repository, Service, Watch, crash, eventually, eventually_within, processes_with,
    runner_of, unique_seconds, world,
};

/// How a job ends, or is ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ending {
    Succeeds,
    /// By a test.
    Fails,
    /// While it builds.
    IsKilled,
    TakesTooLong,
    /// Its runner is ended at once while git has what opens the repository.
    DiesAtItsCheckout,
    /// That of its publishing, which has read nothing yet of what is there for it.
    DiesBeforeItPublishes,
}

use Ending::{DiesAtItsCheckout, DiesBeforeItPublishes, Fails, IsKilled, Succeeds, TakesTooLong};

impl Ending {
    const ALL: [Self; 6] =
        [Succeeds, Fails, IsKilled, TakesTooLong, DiesAtItsCheckout, DiesBeforeItPublishes];

    /// The status, and the reason where there is one.
    fn told(self) -> (Value, Value) {
        let (status, reason) = match self {
            Succeeds => ("SUCCEEDED", Value::Null),
            Fails => ("FAILED", json!("test_failed")),
            IsKilled => ("KILLED", json!("killed")),
            TakesTooLong => ("FAILED", json!("timeout")),
            DiesAtItsCheckout | DiesBeforeItPublishes => ("FAILED", json!("runner_died")),
        };
        (json!(status), reason)
    }
}

/// What the jobs are submitted with.
struct Stage {
    nomad: Guarded,
    service: Service,
    api: Api,
    registry: Server,
    canaries: Arc<Canaries>,
    /// The address of a repository that wants the login, and one that is never answered.
    url: String,
    silent: TcpListener,
    repository: Repository,
}

impl Stage {
    /// The submission of a job that ends so, and for how long its step or test sleeps.
    fn job(&self, ending: Ending) -> (Value, String) {
        let mut job = world().job(&self.repository);
        let seconds = unique_seconds();
        let sleep = format!("sleep {seconds}");
        job["repo_url"] = json!(self.url);
        job["build_args"]["STEP"] = json!("true");
        job["test_commands"] = json!(["true"]);
        match ending {
            Succeeds => {}
            Fails => job["test_commands"] = json!(["false"]),
            IsKilled => job["build_args"]["STEP"] = json!(sleep),
            TakesTooLong => {
                job["build_args"]["STEP"] = json!(sleep);
                job["timeouts"] = json!({ "build": "PT10S" });
            }
            DiesAtItsCheckout => {
                job["repo_url"] = json!(format!("http://{}/a.git", self.silent.local_addr().unwrap()));
            }
            DiesBeforeItPublishes => job["test_commands"] = json!([sleep]),
        }
        job["registry_url"] = json!(self.registry.host());
        job["git_credentials_path"] = json!("creds/acme/git");
        job["registry_credentials_path"] = json!("vault:secret/data/builds/registry");
        job["build_secrets"] = json!({ "npm": "vault:secret/data/builds/npm#token" });
        (job, seconds)
    }

    /// Whether a secret is in the folder of a task's secrets.
    fn has(&self, allocation: &str, task: &str, secret: &str) -> bool {
        let folder = self.nomad.folder().join("nomad/alloc").join(allocation).join(task).join("secrets");
        self.canaries.below(&folder).iter().any(|found| found.starts_with(secret))
    }

    /// Has a job end so, with all of its tasks; its ID, and that of its allocation.
    async fn end(&self, ending: Ending) -> (String, String) {
        let (job, seconds) = self.job(ending);
        let id = self.api.submit(&job).await;
        self.nomad.owns(&id);
        let sleeps = async || (!processes_with(&seconds).is_empty()).then_some(());
        let allocation = async || {
            let status = self.api.status(&id).await;
            status["nomad"]["allocation"].as_str().map(str::to_owned)
        };
        match ending {
            Succeeds | Fails | TakesTooLong => {}
            IsKilled => {
                eventually("it sleeps", sleeps).await;
                assert_eq!(self.api.post(&format!("/jobs/{id}/kill")).await, json!({ "success": true }));
            }
            DiesAtItsCheckout => {
                let _connection = self.silent.accept().await.unwrap();
                let allocation = eventually("its place", allocation).await;
                assert!(self.has(&allocation, "build", "the password of git"), "git has what it needs");
                crash(&id, "build");
            }
            DiesBeforeItPublishes => {
                eventually("it sleeps", sleeps).await;
                let allocation = eventually("its place", allocation).await;
                let is_there = self.has(&allocation, "publish", "the password of the registry");
                assert!(is_there, "Nomad has written what it needs");
                eventually("it begins", async || runner_of(&id, "publish")).await;
                crash(&id, "publish");
            }
        }
        let status = self.api.wait_for_end(&id).await;
        let told = (status["status"].clone(), status["failure"]["reason"].clone());
        assert_eq!(told, ending.told(), "{ending:?}: {status:#}\n{:#}", self.api.logs(&id).await);
        let allocation = allocation().await.unwrap();
        // Nomad (1.11) begins a task that is known to Vault a minute late where its allocation is at its end: `identity_hook.go`.
        eventually_within(Duration::from_mins(3), "an end of all its tasks", async || {
            let path = format!("allocation/{allocation}?namespace=builds");
            let found = self.nomad.call(Method::GET, &path, &Value::Null).await;
            let tasks = found["TaskStates"].as_object()?;
            tasks.values().all(|task| task["State"] == "dead").then_some(())
        })
        .await;
        (id, allocation)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn however_a_job_ends_nothing_that_it_was_given_is_kept_or_told() {
    let registry = Server::start(Some(LOGIN)).await;
    let begun = chrono::Utc::now().timestamp();
    let [password, npm] = [(); 2].map(|()| canary());
    let vault = Vault::serve([
        ("builds/npm", json!({ "token": npm })),
        ("builds/registry", json!({ "username": LOGIN.0, "password": LOGIN.1 })),
    ])
    .await;
    let variables = [
        ("NOMAD_BUILD_ALLOW_VAULT_PATHS", "secret/data"),
        ("NOMAD_BUILD_VAULT_ROLE", "builds"),
        ("NOMAD_BUILD_LOG", "trace"),
    ];
    let registries = format!("{},{}", world().registry, registry.host());
    let (nomad, service, own) = guard(Guarded::with_vault(&vault).await, &registries, &variables).await;
    nomad.write("creds/acme/git", &json!({ "username": "me@here", "password": password })).await;
    let step = "ARG STEP\nRUN --mount=type=secret,id=npm,required=true test -s /run/secrets/npm && $STEP";
    let repository = world().repository(step);
    let token = nomad.builder().await.secret;
    let own = std::fs::read_to_string(own.path()).unwrap();
    let tokens = Arc::new(Canaries::new(&[("the caller's token", &token), ("the service's token", &own)]));
    let stage = Stage {
        api: Api::with_token(&service.url, &token),
        service,
        url: http::serve(&repository, Some(("me@here", &password))).await,
        silent: TcpListener::bind("127.0.0.1:0").await.unwrap(),
        canaries: Arc::new(Canaries::new(&[
            ("the password of git", &password),
            ("the step's secret", &npm),
            ("the password of the registry", LOGIN.1),
        ])),
        nomad,
        registry,
        repository,
    };
    let processes = [&stage.canaries, &tokens].map(Canaries::watch);
    let (ids, allocations): (Vec<_>, Vec<_>) =
        join_all(Ending::ALL.map(|ending| stage.end(ending))).await.into_iter().unzip();
    for (ending, allocation) in Ending::ALL.iter().zip(&allocations) {
        let folder = stage.nomad.folder().join("nomad/alloc").join(allocation);
        assert!(folder.is_dir(), "Nomad has not collected it");
        let found = stage.canaries.below(&folder);
        assert!(found.is_empty(), "{ending:?}: {found:#?}");
    }
    eventually("no copy is left", async || {
        let path = "vars?namespace=builds&prefix=nomad/jobs";
        let left = stage.nomad.call(Method::GET, path, &Value::Null).await;
        left.as_array()?.is_empty().then_some(())
    })
    .await;
    let mut found = processes.map(Watch::end).concat();
    let places = Places { nomad: &stage.nomad, service: &stage.service, registry: &stage.registry };
    found.extend(places.found(&stage.canaries, &tokens, &stage.api, &ids, begun).await);
    assert!(found.is_empty(), "{found:#?}");
    let by = vault.reads();
    assert!(by.iter().all(|(task, _)| task.namespace == "builds" && task.role == "builds"), "{by:?}");
    assert_eq!(by.iter().filter(|(task, _)| task.task == "build").count(), 2 * Ending::ALL.len(), "{by:?}");
}
