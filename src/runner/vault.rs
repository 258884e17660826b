//! What a task reads in Vault: Nomad logs in for it, and writes the secrets into the directory of its own that nobody else reads.
//! They are there until it has read them (`Surroundings::put_away`).

use std::collections::BTreeMap;
use std::path::Path;

use super::surroundings::NoCredentials;
use crate::job::credentials::{self, Items};
use crate::job::{CredentialsPath, Phase, Spec, Task};
use crate::render::vault_file;

/// A task's credentials, as far as they are in Vault.
pub(super) async fn items(secrets_dir: &Path, task: Task, spec: &Spec) -> Result<Items, NoCredentials> {
    let mut read = BTreeMap::new();
    for (place, path) in spec.vault_paths(task).into_iter().enumerate() {
        let text = tokio::fs::read(secrets_dir.join(vault_file(place))).await;
        let text =
            text.map_err(|source| NoCredentials::Unwritten { path: path.as_str().to_owned(), source })?;
        read.insert(path, credentials::of_vault(&text));
    }
    // Nothing where it is not in Vault, or is none of this task's.
    let found = |field: &str, path: Option<&CredentialsPath>| {
        let read = path.and_then(CredentialsPath::vault).and_then(|path| read.get(path));
        read.map(|items| items.as_ref().map_err(|why| unfit(field, why))).transpose()
    };
    let mut given = Items::new();
    let field = "registry_credentials_path";
    if let Some(items) = found(field, spec.registry_credentials_path.as_ref())? {
        let of = credentials::for_registry(items, spec.registry_url.host());
        let of = of.map_err(|why| unfit(field, &why))?;
        given.extend(of.login);
        if task == Task::Phase(Phase::Build) {
            given.extend(of.bases);
        }
    }
    if task != Task::Phase(Phase::Build) {
        return Ok(given);
    }
    let field = "git_credentials_path";
    if let Some(items) = found(field, spec.git_credentials_path.as_ref())? {
        let of = credentials::for_repository(items, &spec.repo_url);
        given.extend(of.map_err(|why| unfit(field, &why))?);
    }
    for item in spec.step_items() {
        let field = item.field();
        if let Some(items) = found(&field, Some(item.path()))? {
            given.insert(item.copy(), item.of(items).map_err(|why| unfit(&field, &why))?);
        }
    }
    Ok(given)
}

fn unfit(field: &str, why: &str) -> NoCredentials {
    NoCredentials::Unfit { field: field.to_owned(), why: why.to_owned() }
}
