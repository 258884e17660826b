//! What Nomad and the operator tell a task: who it is, where its folders are, where the engine is.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::credentials::Credentials;
use super::log::Log;
use super::vault;
use crate::environment::{BadConfiguration, Reader, Source};
use crate::git;
use crate::job::credentials::Items;
use crate::job::{Claim, JobId, Labels, Outcome, Phase, Spec, State, SweepReport, Task};
use crate::ledger::{Decision, Ledger, LedgerError};
use crate::nomad::{self, Client, patiently};
use crate::render::{TASKS_WITH_CREDENTIALS, is_vault_file, task_variable};
use crate::telemetry::chain;

/// How long the runner keeps trying while Nomad gives passing errors: a new leader is found in less.
const PATIENCE: Duration = Duration::from_mins(1);

/// What the sign of a phase says.
const SUCCEEDED: &str = "succeeded";
const FAILED: &str = "failed";

/// Of the folders in the directory of a task's secrets, the one with git's home, in which credentials are while git runs.
const GIT_HOME: &str = "git";

/// The label of a job's image.
pub(super) const IMAGE_LABEL: &str = "nomad-build.job";

/// The label of a job's containers. Not that of its image: whoever runs the published image runs it with its labels.
pub(super) const CONTAINER_LABEL: &str = "nomad-build.test";

/// The label by which a development stack finds its containers.
const STACK_LABEL: &str = "nomad-build.stack";

/// What a task knows of where it runs.
pub(super) struct Surroundings {
    pub(super) job: JobId,
    pub(super) allocation: String,
    pub(super) engine_socket: String,
    /// What is known of the job without its specification.
    pub(super) labels: Option<Labels>,
    pub(super) container_labels: BTreeMap<String, String>,
    pub(super) ledger: Ledger,
    /// What git's environment has beside its own.
    pub(super) git_environment: Vec<(String, String)>,
    pub(super) namespace: String,
    alloc_dir: PathBuf,
    secrets_dir: PathBuf,
    nomad: Client,
}

/// Why a task could not find its bearings.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Lost {
    /// A variable that Nomad sets is not there.
    #[error("this runs as a task of a Nomad job, and nowhere else")]
    Environment(#[from] BadConfiguration),
    /// The connection to Nomad could not be set up.
    #[error("the connection to Nomad's task API could not be set up")]
    Nomad(#[from] nomad::Error),
}

/// Why a task's credentials cannot be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum NoCredentials {
    /// Nomad did not give them.
    #[error("the task's credentials could not be read")]
    Nomad(#[from] nomad::Error),
    /// Nomad did not write what it was to read in Vault.
    #[error("the secret \"vault:{path}\" could not be read where Nomad was to write it")]
    Unwritten {
        /// The secret's path.
        path: String,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// What is there is not what is needed.
    #[error("the submission's {field} {why}")]
    Unfit {
        /// What names it.
        field: String,
        /// What is missing.
        why: String,
    },
    /// They would stand in the log.
    #[error("the task's credentials cannot be hidden in its log")]
    Unhidden(#[from] aho_corasick::BuildError),
}

impl Surroundings {
    pub(super) fn read(source: Source<'_>) -> Result<Self, Lost> {
        let mut reader = Reader::new(source);
        let job = reader.parsed::<JobId>("NOMAD_JOB_ID", "a job ID");
        if job.is_none() && reader.text("NOMAD_JOB_ID").is_none() {
            reader.wrong("NOMAD_JOB_ID", "is not set");
        }
        let allocation = reader.required("NOMAD_ALLOC_ID");
        let namespace = reader.text("NOMAD_NAMESPACE").unwrap_or_else(|| "default".to_owned());
        let (alloc_dir, secrets_dir) = (reader.path("NOMAD_ALLOC_DIR"), reader.path("NOMAD_SECRETS_DIR"));
        let engine_socket = engine_socket(&mut reader);
        let stack = reader.text("NOMAD_BUILD_STACK");
        let item = |key: &str| Some((key.to_owned(), reader.text(&format!("NOMAD_META_{key}"))?));
        let labels = Labels::from_meta(&Labels::KEYS.into_iter().filter_map(item).collect());
        let git_environment = git::PASSED.iter();
        let git_environment = git_environment
            .filter_map(|&name| Some((name.to_owned(), reader.text(name)?)))
            .collect::<Vec<_>>();
        let (job, allocation) = reader.finish((job, allocation))?;
        // Never none behind `finish`.
        let job = job.ok_or_else(|| BadConfiguration(vec!["NOMAD_JOB_ID is not set".to_owned()]))?;
        let mut container_labels = BTreeMap::from([(CONTAINER_LABEL.to_owned(), job.to_string())]);
        // A development stack that is taken down takes its containers with it.
        container_labels.extend(stack.map(|stack| (STACK_LABEL.to_owned(), stack)));
        let nomad = connect(&secrets_dir)?;
        let ledger = Ledger::new(nomad.clone(), &namespace, PATIENCE);
        Ok(Self {
            job,
            allocation,
            engine_socket,
            labels,
            container_labels,
            ledger,
            git_environment,
            namespace,
            alloc_dir,
            secrets_dir,
            nomad,
        })
    }

    /// Decides the job, unless it is decided.
    pub(super) async fn decide(&self, claim: &Claim) -> Result<Decision, LedgerError> {
        self.ledger.decide(&self.job, self.labels.as_ref(), claim).await
    }

    /// Tells the ledger of a phase, unless that phase is over.
    pub(super) async fn tell(&self, phase: Phase, outcome: &Outcome) -> Result<(), LedgerError> {
        self.ledger.record(&self.job, self.labels.as_ref(), phase, outcome).await.map(drop)
    }

    /// A folder or file in the directory that the job's tasks share and user code never sees.
    pub(super) fn shared(&self, name: &str) -> PathBuf {
        self.alloc_dir.join(name)
    }

    /// The file that says that a phase is over.
    pub(super) fn sign_of(&self, phase: Phase) -> PathBuf {
        self.shared(&format!("{phase}.over"))
    }

    /// Says to the other tasks of this allocation how a phase ended: only a sign, as what counts stands in the ledger.
    pub(super) async fn sign(&self, phase: Phase, state: State) -> std::io::Result<()> {
        let text = if state == State::Succeeded { SUCCEEDED } else { FAILED };
        tokio::fs::write(self.sign_of(phase), text).await
    }

    /// What that sign says; none where there is none, or none that can be read.
    pub(super) async fn signed(&self, phase: Phase) -> Option<State> {
        match tokio::fs::read_to_string(self.sign_of(phase)).await.ok()?.as_str() {
            SUCCEEDED => Some(State::Succeeded),
            FAILED => Some(State::Failed),
            _ => None,
        }
    }

    /// A folder in the directory that only this task reads. It is small, and in memory where Nomad may mount it.
    pub(super) fn secret(&self, name: &str) -> PathBuf {
        self.secrets_dir.join(name)
    }

    /// Where the checkout is.
    pub(super) fn checkout(&self) -> PathBuf {
        self.shared("checkout")
    }

    /// The unique local tag of the image being built.
    pub(super) fn work_tag(&self) -> String {
        format!("nomad-build/{}:work", self.job)
    }

    /// The credentials that were given to one task of the job. From now on its log shows none of them.
    pub(super) async fn credentials(
        &self,
        task: Task,
        spec: &Spec,
        log: &Log,
    ) -> Result<Credentials, NoCredentials> {
        let mut items = self.copies(task).await?;
        items.extend(vault::items(&self.secrets_dir, task, spec).await?);
        let credentials = Credentials::new(items);
        log.hide(credentials.secrets())?;
        // What is read is in memory, and what an earlier run of this task left is no use to it.
        self.put_away(log).await;
        Ok(credentials)
    }

    /// What the service copied for one task. From now on its log shows none of it.
    pub(super) async fn copied(&self, task: Task, log: &Log) -> Result<Credentials, NoCredentials> {
        let credentials = Credentials::new(self.copies(task).await?);
        log.hide(credentials.secrets())?;
        Ok(credentials)
    }

    async fn copies(&self, task: Task) -> Result<Items, nomad::Error> {
        let path = task_variable(&self.job, task);
        let variable = patiently(PATIENCE, || self.nomad.variable(&self.namespace, &path)).await?;
        Ok(variable.map(|variable| variable.items).unwrap_or_default())
    }

    /// Removes what this task was given from the directory of its secrets.
    ///
    /// It is done once it is read, as a runner may be killed, and at the task's end: Nomad writes a secret of Vault's again when it
    /// hears of another version, or when its agent is started again.
    pub(super) async fn put_away(&self, log: &Log) {
        remove_given(&self.secrets_dir, log).await;
    }

    /// The same for all tasks of this allocation, as far as their directories are seen from here: none is from within a container.
    pub(super) async fn put_away_all(&self, log: &Log) {
        self.put_away(log).await;
        for phase in Phase::ALL {
            if let Some(allocation) = self.alloc_dir.parent() {
                remove_given(&allocation.join(phase.as_str()).join("secrets"), log).await;
            }
        }
    }

    /// Removes the credentials of every task of the job, as many as can be.
    pub(super) async fn remove_credentials(&self) -> Result<(), nomad::Error> {
        let mut removed = Ok(());
        for task in TASKS_WITH_CREDENTIALS {
            let path = task_variable(&self.job, task);
            let one = patiently(PATIENCE, || self.nomad.delete_variable(&self.namespace, &path)).await;
            removed = removed.and(one);
        }
        removed
    }
}

/// Removes a folder with all that is in it; it is no error if there is none.
pub(super) async fn remove_folder(path: &Path) -> std::io::Result<()> {
    match tokio::fs::remove_dir_all(path).await {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Removes from the directory of a task's secrets what is not Nomad's own: git's home, and what Nomad read in Vault.
async fn remove_given(secrets: &Path, log: &Log) {
    let removed = async {
        remove_folder(&secrets.join(GIT_HOME)).await?;
        let mut files = tokio::fs::read_dir(secrets).await?;
        while let Some(file) = files.next_entry().await? {
            if file.file_name().to_str().is_some_and(is_vault_file) {
                tokio::fs::remove_file(file.path()).await?;
            }
        }
        Ok::<_, std::io::Error>(())
    };
    match removed.await {
        // Another run of the task, or its `finish`, was here first; or the directory is not seen from here.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => {
            let left = "what the task was given stays in its secrets directory until Nomad collects the job";
            log.say(&format!("{left}: {}", chain(&error))).await;
        }
        Ok(()) => {}
    }
}

/// A task that belongs to no job of this service, and goes through what others left.
pub(super) struct Visitor {
    pub(super) namespace: String,
    pub(super) ledger: Ledger,
    node: String,
    nomad: Client,
}

impl Visitor {
    pub(super) fn read(source: Source<'_>) -> Result<Self, Lost> {
        let mut reader = Reader::new(source);
        let namespace = reader.text("NOMAD_NAMESPACE").unwrap_or_else(|| "default".to_owned());
        let node = reader.required("NOMAD_BUILD_NODE_ID");
        let secrets_dir = reader.path("NOMAD_SECRETS_DIR");
        reader.finish(())?;
        let nomad = connect(&secrets_dir)?;
        let ledger = Ledger::new(nomad.clone(), &namespace, PATIENCE);
        Ok(Self { namespace, ledger, node, nomad })
    }

    /// Tells the service what was found on this node.
    pub(super) async fn report(&self, report: &SweepReport) -> Result<(), nomad::Error> {
        let path = SweepReport::path(&self.node);
        let items = report.to_items();
        patiently(PATIENCE, || self.nomad.set_variable(&self.namespace, &path, &items)).await
    }
}

/// A task's connection to Nomad: its own socket, with its own identity, which Nomad may renew.
fn connect(secrets: &Path) -> Result<Client, Lost> {
    let settings = nomad::Settings {
        socket: Some(secrets.join("api.sock")),
        token: nomad::Token::File(secrets.join("nomad_token")),
        ..nomad::Settings::plain(nomad::Settings::socket_address())
    };
    Ok(Client::new(&settings)?)
}

/// The engine's socket on this node.
pub(super) fn engine_socket(reader: &mut Reader<'_>) -> String {
    reader.text("NOMAD_BUILD_ENGINE_SOCKET").unwrap_or_else(|| "/var/run/docker.sock".to_owned())
}
