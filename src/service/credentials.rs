//! Credentials by path: read with the caller's own token, copied to where only the job's tasks can read them. What opens
//! the archive goes the same way, to `finish` only. What is in Vault is left to the tasks, which read it there by what they are.
//!
//! Invariant: the service's token reads no credential that a caller names, and none of them passes through a job, a log or
//! an error.

use std::collections::BTreeMap;

use secrecy::SecretString;

use super::submit::Doubt;
use super::{FOR_EVER, PATIENCE, Tenant};
use crate::archive::Settings;
use crate::job::credentials::{self, ForRegistry, Items};
use crate::job::{CredentialsPath, FieldError, JobId, Phase, Spec, Task, VariablePath};
use crate::nomad::{Client, Error, Kind, patiently};
use crate::render::{TASKS_WITH_CREDENTIALS, task_variable};

/// The Variables to write for a job: path and items.
pub(super) type Copies = Vec<(String, Items)>;

/// Why credentials could not be read.
pub(super) enum Unreadable {
    /// The caller named what is not there, or not usable.
    Fields(Vec<FieldError>),
    /// Some of it the caller may not read.
    Forbidden(Vec<FieldError>),
    /// Nomad could not be asked.
    Nomad(Error),
}

impl From<Error> for Unreadable {
    fn from(error: Error) -> Self {
        Self::Nomad(error)
    }
}

const MISSING: &str = "names a Variable that does not exist in the namespace of the builds";

/// Nomad says so of what is not there, too: nobody learns from it which Variables exist.
const FORBIDDEN: &str = "names a Variable that your Nomad token may not read";

/// What Nomad takes in one Variable is 64 KiB, with its path and its own.
const MOST_IN_VARIABLE: usize = 60 * 1024;

const BUILD: Task = Task::Phase(Phase::Build);

/// Reads Variables with a caller's token, each once, and collects what is wrong with them.
struct Reading<'a> {
    nomad: Client,
    namespace: &'a str,
    read: BTreeMap<String, Result<Items, &'static str>>,
    errors: Vec<FieldError>,
    is_forbidden: bool,
}

impl Reading<'_> {
    /// A Variable's items, or why there are none.
    async fn items(&mut self, path: &VariablePath) -> Result<Result<Items, String>, Error> {
        let path = path.as_str();
        if !self.read.contains_key(path) {
            let found = match self.nomad.variable(self.namespace, path).await {
                Ok(found) => found.map(|variable| variable.items).ok_or(MISSING),
                Err(Error { kind: Kind::Forbidden, .. }) => Err(FORBIDDEN),
                Err(error) => return Err(error),
            };
            self.is_forbidden |= found == Err(FORBIDDEN);
            self.read.insert(path.to_owned(), found);
        }
        let known = self.read.get(path).cloned().unwrap_or(Err(MISSING));
        Ok(known.map_err(ToOwned::to_owned))
    }

    fn refuse(&mut self, field: &str, message: String) {
        self.errors.push(FieldError { field: field.to_owned(), message });
    }

    /// What is given of the Variable that a field names; nothing where the field names none, or none that can be used.
    async fn given<T: Default>(
        &mut self,
        field: &str,
        path: Option<&VariablePath>,
        of: impl FnOnce(&Items) -> Result<T, String>,
    ) -> Result<T, Error> {
        let Some(path) = path else { return Ok(T::default()) };
        let given = self.items(path).await?.and_then(|items| of(&items));
        Ok(given.unwrap_or_else(|why| {
            self.refuse(field, why);
            T::default()
        }))
    }

    /// What the steps of a build are given, as the items of its task, by the fields that name it.
    async fn for_steps(&mut self, spec: &Spec) -> Result<BTreeMap<&'static str, Items>, Error> {
        let mut for_steps: BTreeMap<_, Items> = BTreeMap::new();
        for item in spec.step_items() {
            let given =
                self.given(&item.field(), item.path().variable(), |items| item.of(items).map(Some)).await?;
            let of_field = for_steps.entry(item.fields()).or_default();
            of_field.extend(given.map(|text| (item.copy(), text)));
        }
        Ok(for_steps)
    }

    /// Refuses what does not fit into the Variable of one task: the field that brings most of it.
    fn fit(&mut self, given: &[(&str, &[&Items])]) {
        let size = |all: &&[&Items]| -> usize {
            all.iter().flat_map(|items| items.iter()).map(|(name, value)| name.len() + value.len()).sum()
        };
        let total: usize = given.iter().map(|(_, items)| size(items)).sum();
        let most = given.iter().max_by_key(|(_, items)| size(items));
        if let Some((field, items)) = most.filter(|_| total > MOST_IN_VARIABLE) {
            let message = format!(
                "brings {} of the {total} bytes of credentials that the build would be given: at most {MOST_IN_VARIABLE} are allowed",
                size(items)
            );
            self.refuse(field, message);
        }
    }
}

impl Tenant {
    /// Reads what a specification names, with the caller's token.
    pub(super) async fn read_credentials(
        &self,
        job: &JobId,
        spec: &Spec,
        caller: Option<SecretString>,
    ) -> Result<Copies, Unreadable> {
        let (nomad, namespace) = (self.nomad.with_token(caller), self.namespace.as_str());
        let mut reading =
            Reading { nomad, namespace, read: BTreeMap::new(), errors: Vec::new(), is_forbidden: false };
        let path = spec.git_credentials_path.as_ref().and_then(CredentialsPath::variable);
        let for_git = |items: &Items| credentials::for_repository(items, &spec.repo_url);
        let git = reading.given("git_credentials_path", path, for_git).await?;
        let path = spec.registry_credentials_path.as_ref().and_then(CredentialsPath::variable);
        let for_registry = |items: &Items| credentials::for_registry(items, spec.registry_url.host());
        let ForRegistry { login, bases } =
            reading.given("registry_credentials_path", path, for_registry).await?;
        let for_steps = reading.for_steps(spec).await?;
        let mut copies: BTreeMap<Task, Items> =
            TASKS_WITH_CREDENTIALS.into_iter().map(|task| (task, login.clone())).collect();
        let of_paths: [(&str, &[&Items]); 2] =
            [("git_credentials_path", &[&git]), ("registry_credentials_path", &[&login, &bases])];
        let of_steps: Vec<_> = for_steps.iter().map(|(field, items)| (*field, [items])).collect();
        let of_steps = of_steps.iter().map(|(field, items)| (*field, &items[..]));
        reading.fit(&of_paths.into_iter().chain(of_steps).collect::<Vec<_>>());
        let for_steps = for_steps.into_values().flatten();
        copies.entry(BUILD).or_default().extend(git.into_iter().chain(bases).chain(for_steps));
        let archive = self.config.archive.as_ref().map(Settings::items).unwrap_or_default();
        copies.entry(Task::Finish).or_default().extend(archive);
        copies.retain(|_, items| !items.is_empty());
        match reading {
            Reading { is_forbidden: true, errors, .. } => Err(Unreadable::Forbidden(errors)),
            Reading { errors, .. } if !errors.is_empty() => Err(Unreadable::Fields(errors)),
            _ => Ok(copies.into_iter().map(|(task, items)| (task_variable(job, task), items)).collect()),
        }
    }

    /// Writes the copies, in place of those of an earlier attempt. On failure, what was written is removed again, unless
    /// another attempt for the same job may need it.
    pub(super) async fn write_credentials(&self, copies: &Copies, doubt: Doubt) -> Result<(), Error> {
        let namespace = &self.namespace;
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
        let removal = remove_copies(self.nomad.clone(), self.namespace.clone(), paths);
        #[expect(clippy::disallowed_methods, reason = "it goes on where its caller has waited long enough")]
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
            self.nomad.delete_variable(&self.namespace, &task_variable(job, task)).await?;
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
