//! An allocation as its tasks see it.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use axum::Router;
use chrono::Utc;
use nomad_build::job::{JobId, Outcome, Payload, Phase, Policy, Published, Reason, Scheme, Spec, State};
use nomad_build::ledger::Ledger;
use serde_json::Value;
use tempfile::TempDir;

use super::{losing, nomad};
use crate::stack::environment;
use crate::support::{docker, image_of, world};

/// What Nomad gives a task, and what is left of the job: the tasks share it, as those of one allocation do.
pub(super) struct Allocation {
    pub(super) job: JobId,
    pub(super) ledger: Ledger,
    pub(super) folder: TempDir,
    /// How many of the next answers about claims are lost, from the first attempt to claim on.
    pub(super) lost: Arc<AtomicUsize>,
    /// How many of the next attempts to claim are refused.
    pub(super) refused: Arc<AtomicUsize>,
}

impl Allocation {
    pub(super) fn new(submission: &Value) -> Self {
        let world = world();
        let folder = tempfile::tempdir().unwrap();
        for name in ["alloc", "secrets"] {
            std::fs::create_dir(folder.path().join(name)).unwrap();
        }
        let policy = Policy { schemes: vec![Scheme::Https, Scheme::Http, Scheme::File], ..Policy::default() };
        let payload = Payload {
            job: JobId::from_uuid(uuid::Uuid::now_v7()),
            spec: Spec::from_json(submission.clone(), &policy).unwrap(),
            policy,
            insecure_registries: vec![
                world.registry.clone(),
                submission["registry_url"].as_str().unwrap().split('/').next().unwrap().to_owned(),
            ],
        };
        std::fs::write(folder.path().join("alloc/payload"), payload.encode().unwrap()).unwrap();
        std::fs::write(folder.path().join("secrets/nomad_token"), "none").unwrap();
        let [lost, refused] = [(); 2].map(|()| Arc::new(AtomicUsize::new(0)));
        let router = losing(&world.nomad, Arc::clone(&lost), Arc::clone(&refused));
        let ledger = Ledger::new(nomad(), "default", std::time::Duration::from_secs(10));
        let allocation = Self { job: payload.job, ledger, folder, lost, refused };
        allocation.asks(router);
        allocation
    }

    /// Its tasks find this instead of Nomad from now on.
    pub(super) fn asks(&self, nomad: Router) {
        let path = self.path("secrets/api.sock");
        std::fs::remove_file(&path).ok();
        let socket = tokio::net::UnixListener::bind(path).unwrap();
        tokio::spawn(async move { axum::serve(socket, nomad).await });
    }

    /// An allocation whose build is done: its image is the base.
    pub(super) async fn built(submission: &Value) -> Self {
        let allocation = Self::new(submission);
        docker(&["pull", "--quiet", &world().base]);
        let image = docker(&["inspect", "--format", "{{.Id}}", &world().base]);
        let built = Outcome { image_id: Some(image), ..Outcome::begun("a", Utc::now()) };
        let built = built.succeeded(Utc::now());
        allocation.ledger.record(&allocation.job, None, Phase::Build, &built).await.unwrap();
        allocation
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Runs a task to its end; whether it ended well, and its log.
    pub(super) async fn run(&self, task: &str, engine: &str) -> (bool, String) {
        self.run_with(task, engine, &[]).await
    }

    /// The same, with further variables.
    pub(super) async fn run_with(
        &self,
        task: &str,
        engine: &str,
        variables: &[(&str, &str)],
    ) -> (bool, String) {
        let output = tokio::process::Command::new(env!("CARGO_BIN_EXE_nomad-build"))
            .args(["phase", task])
            .env_clear()
            .env("PATH", environment("PATH").unwrap())
            .env("NOMAD_JOB_ID", self.job.as_str())
            .env("NOMAD_ALLOC_ID", "a")
            .env("NOMAD_ALLOC_DIR", self.path("alloc"))
            .env("NOMAD_SECRETS_DIR", self.path("secrets"))
            .env("NOMAD_BUILD_ENGINE_SOCKET", engine)
            .envs(variables.iter().copied())
            .output()
            .await
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        (output.status.success(), said.into_owned())
    }

    pub(super) async fn outcome(&self, phase: Phase) -> Outcome {
        let (_, progress) = self.ledger.progress(&self.job).await.unwrap();
        progress.of(phase).unwrap().clone()
    }

    /// Why the right to publish was revoked.
    pub(super) async fn revoked_for(&self) -> Reason {
        let (_, claim) = self.ledger.claim(&self.job).await.unwrap().unwrap();
        claim.verdict().unwrap().reason
    }

    /// Sees to it that everything is published, and that a log said so.
    pub(super) async fn is_published(&self, submission: &Value, log: &str) {
        let outcome = self.outcome(Phase::Publish).await;
        assert_eq!(outcome.state, State::Succeeded, "{outcome:?}");
        assert_eq!(outcome.published, [Published::Yes]);
        let image = image_of(submission);
        assert_eq!(world().served(image, "one").await, outcome.digest);
        assert!(log.contains(&format!("{image}:one published")), "{log}");
        self.ledger.remove(&self.job).await.unwrap();
    }
}
