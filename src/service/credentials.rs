//! Credentials by path: read with the caller's own token, copied to where only the job's tasks can read them. What opens
//! the archive goes the same way, to `finish` only.
//!
//! Invariant: the service's token reads no credential that a caller names, and none of them passes through a job, a log or
//! an error.

use std::collections::BTreeMap;

use secrecy::SecretString;

use super::submit::Doubt;
use super::{FOR_EVER, PATIENCE, Service};
use crate::archive::Settings;
use crate::job::{BUILD_SECRET, FieldError, JobId, Phase, Spec, Task, VariablePath};
use crate::nomad::{Client, Error, Kind, patiently};
use crate::render::{TASKS_WITH_CREDENTIALS, task_variable};

/// The Variables to write for a job: path and items.
pub(super) type Copies = Vec<(String, BTreeMap<String, String>)>;

/// Why credentials could not be read.
pub(super) enum Unreadable {
    /// The caller named a Variable that the caller cannot read.
    Fields(Vec<FieldError>),
    /// Nomad could not be asked.
    Nomad(Error),
}

/// One text for both, so that nobody learns which Variables exist.
const UNREADABLE: &str = "names a Variable that does not exist or that your Nomad token may not read";

/// What Nomad takes in one Variable is 64 KiB, with its path and its own.
const MOST_IN_VARIABLE: usize = 60 * 1024;

const BUILD: Task = Task::Phase(Phase::Build);

impl Service {
    /// Reads what a specification names, with the caller's token.
    pub(super) async fn read_credentials(
        &self,
        job: &JobId,
        spec: &Spec,
        caller: Option<SecretString>,
    ) -> Result<Copies, Unreadable> {
        let asks = [
            ("git_credentials_path", "git", spec.git_credentials_path.as_ref(), &[BUILD][..]),
            (
                "registry_credentials_path",
                "registry",
                spec.registry_credentials_path.as_ref(),
                &TASKS_WITH_CREDENTIALS,
            ),
        ];
        let nomad = self.nomad.with_token(caller);
        let mut errors = Vec::new();
        let mut copies: BTreeMap<String, BTreeMap<String, String>> = BTreeMap::new();
        let archive = self.config.archive.as_ref().map(Settings::items).unwrap_or_default();
        if !archive.is_empty() {
            copies.insert(task_variable(job, Task::Finish), archive);
        }
        for (field, prefix, path, tasks) in asks {
            let Some(path) = path else { continue };
            match self.read_one(&nomad, path).await.map_err(Unreadable::Nomad)? {
                Err(message) => errors.push(FieldError { field: field.to_owned(), message }),
                Ok(items) => {
                    for &task in tasks {
                        let copy = copies.entry(task_variable(job, task)).or_default();
                        copy.extend(
                            items.iter().map(|(key, value)| (format!("{prefix}_{key}"), value.clone())),
                        );
                    }
                }
            }
        }
        let build = copies.entry(task_variable(job, BUILD)).or_default();
        self.read_secrets(&nomad, spec, build, &mut errors).await.map_err(Unreadable::Nomad)?;
        copies.retain(|_, items| !items.is_empty());
        if errors.is_empty() { Ok(copies.into_iter().collect()) } else { Err(Unreadable::Fields(errors)) }
    }

    /// Reads the secrets of a build into the copy for its task.
    async fn read_secrets(
        &self,
        nomad: &Client,
        spec: &Spec,
        build: &mut BTreeMap<String, String>,
        errors: &mut Vec<FieldError>,
    ) -> Result<(), Error> {
        let mut read = BTreeMap::new();
        for (id, secret) in &spec.build_secrets {
            let path = secret.path().as_str();
            if !read.contains_key(path) {
                read.insert(path, self.variable(nomad, secret.path()).await?);
            }
            let item = match read.get(path) {
                Some(Some(items)) => {
                    items.get(secret.item()).ok_or("names an item that the Variable does not have")
                }
                _ => Err(UNREADABLE),
            };
            match item {
                Ok(value) => drop(build.insert(format!("{BUILD_SECRET}{id}"), value.clone())),
                Err(why) => {
                    errors.push(FieldError { field: format!("build_secrets.{id}"), message: why.to_owned() });
                }
            }
        }
        let bytes: usize = build.iter().map(|(name, value)| name.len() + value.len()).sum();
        if bytes > MOST_IN_VARIABLE {
            let message = format!(
                "have {bytes} bytes together with the build's other credentials: at most {MOST_IN_VARIABLE} are allowed"
            );
            errors.push(FieldError { field: "build_secrets".to_owned(), message });
        }
        Ok(())
    }

    /// A Variable's items; none where it is not there, or not for this caller.
    async fn variable(
        &self,
        nomad: &Client,
        path: &VariablePath,
    ) -> Result<Option<BTreeMap<String, String>>, Error> {
        match nomad.variable(&self.config.namespace, path.as_str()).await {
            Ok(found) => Ok(found.map(|variable| variable.items)),
            Err(Error { kind: Kind::Forbidden, .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn read_one(
        &self,
        nomad: &Client,
        path: &VariablePath,
    ) -> Result<Result<BTreeMap<String, String>, String>, Error> {
        Ok(match self.variable(nomad, path).await? {
            Some(items) => usable(&items).map(|()| items),
            None => Err(UNREADABLE.to_owned()),
        })
    }

    /// Writes the copies, in place of those of an earlier attempt. On failure, what was written is removed again, unless
    /// another attempt for the same job may need it.
    pub(super) async fn write_credentials(&self, copies: &Copies, doubt: Doubt) -> Result<(), Error> {
        let namespace = &self.config.namespace;
        for (path, items) in copies {
            let write = || self.nomad.set_variable(namespace, path, items);
            if let Err(error) = patiently(PATIENCE, write).await {
                if doubt == Doubt::Withdraw {
                    self.remove_copies(copies).await;
                }
                return Err(error);
            }
        }
        Ok(())
    }

    /// Removes the copies, and goes on with that where the caller has waited long enough.
    pub(super) async fn remove_copies(&self, copies: &Copies) {
        let paths = copies.iter().map(|(path, _)| path.clone()).collect();
        let removal = remove_copies(self.nomad.clone(), self.config.namespace.clone(), paths);
        tokio::time::timeout(PATIENCE, tokio::spawn(removal)).await.ok();
    }

    /// Removes every copy a job may have.
    pub(super) async fn remove_credentials(&self, job: &JobId) -> Result<(), Error> {
        self.remove_copies_for(job, &TASKS_WITH_CREDENTIALS).await
    }

    /// Removes the copies of a job that was stopped, whose `finish` may have yet to archive it: that one removes its own.
    pub(super) async fn remove_credentials_of_phases(&self, job: &JobId) -> Result<(), Error> {
        let phases = TASKS_WITH_CREDENTIALS.into_iter().filter(|task| matches!(task, Task::Phase(_)));
        self.remove_copies_for(job, &phases.collect::<Vec<_>>()).await
    }

    async fn remove_copies_for(&self, job: &JobId, tasks: &[Task]) -> Result<(), Error> {
        for &task in tasks {
            self.nomad.delete_variable(&self.config.namespace, &task_variable(job, task)).await?;
        }
        Ok(())
    }
}

/// Removes copies, trying for as long as this service lives: no job is there whose cleanup would remove them.
pub(super) async fn remove_copies(nomad: Client, namespace: String, paths: Vec<String>) {
    for path in paths {
        if let Err(error) = patiently(FOR_EVER, || nomad.delete_variable(&namespace, &path)).await {
            tracing::error!(variable = path, %error, "a copy of credentials stays behind");
        }
    }
}

/// Whether a Variable holds what a login needs.
fn usable(items: &BTreeMap<String, String>) -> Result<(), String> {
    let has = |name| items.get(name).is_some_and(|value| !value.is_empty());
    if has("token") || (has("username") && has("password")) {
        return Ok(());
    }
    Err("names a Variable without the items username and password, or token".to_owned())
}
