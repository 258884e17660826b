//! Submodules: repositories within a repository, under the same rules, as they read the same configuration.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use super::{GitError, Output, Repository};

/// Says of each submodule where it is and where it came from. It is the same for every repository, and what those have in names
/// passes the shell that git has it run by as the values of variables.
const MODULES: &str = r#"printf '%s\0%s\0' "$displaypath" "$(git config --get remote.origin.url)""#;

/// The addresses of those that are about to be got, by their names, and how they are got.
const ADDRESSES: [&str; 3] = ["--null", "--get-regexp", r"^submodule\..*\.(url|update)$"];

impl<O: Output + Sync> Repository<'_, O> {
    /// Gets the submodules, where the repository has some, of allowed repositories alone. Where each is, however deep, and where it
    /// came from.
    pub(super) async fn submodules(&self) -> Result<Vec<(PathBuf, String)>, GitError> {
        let mut modules: Vec<(PathBuf, String)> = Vec::new();
        let mut folders = vec![self.folder.to_owned()];
        while let Some(folder) = folders.pop() {
            let inside = self.submodules_of(&folder).await?;
            folders.extend(inside.iter().map(|(folder, _)| folder.clone()));
            modules.extend(inside);
        }
        Ok(modules)
    }

    /// Those of one folder, and not what is in them.
    async fn submodules_of(&self, folder: &Path) -> Result<Vec<(PathBuf, String)>, GitError> {
        // Not through a link, which git itself does not follow here.
        let list = tokio::fs::symlink_metadata(folder.join(".gitmodules")).await;
        if !list.is_ok_and(|list| list.is_file()) {
            return Ok(Vec::new());
        }
        let run = async |command, arguments: &[&str]| {
            let arguments: Vec<_> = arguments.iter().map(OsStr::new).collect();
            self.git.run(command, &arguments, folder).await
        };
        run("submodule", &["--quiet", "init"]).await?;
        let addresses = match run("config", &ADDRESSES).await {
            // There are none: the list names what the tree does not have.
            Err(GitError::Failed { code: Some(1), .. }) => return Ok(Vec::new()),
            addresses => addresses?,
        };
        let entries = || addresses.split_terminator('\0').filter_map(|entry| entry.split_once('\n'));
        let of = |key: &'static str| {
            entries().filter_map(move |(name, value)| {
                Some((name.strip_prefix("submodule.")?.strip_suffix(key)?, value))
            })
        };
        // What git was told to leave out it does not get.
        let is_left_out = |name: &str| of(".update").any(|(of, how)| of == name && how == "none");
        for (name, address) in of(".url").filter(|(name, _)| !is_left_out(name)) {
            (self.allows)(address).map_err(|why| GitError::NotAllowed(name.to_owned(), why))?;
        }
        self.git.run_remotely("submodule", &["update", "--depth=1"].map(OsStr::new), folder).await?;
        let said = run("submodule", &["--quiet", "foreach", MODULES]).await?;
        let mut parts = said.split('\0');
        let mut modules = Vec::new();
        while let (Some(path), Some(url)) = (parts.next(), parts.next()) {
            modules.push((folder.join(path), url.to_owned()));
        }
        Ok(modules)
    }

    /// Removes what is git's own, of the submodules too: there it is a file that leads to what is not there any more.
    pub(super) async fn forget(&self, modules: &[(PathBuf, String)]) -> Result<(), GitError> {
        let failed = |path: &Path, error| GitError::File(path.to_owned(), error);
        let root = tokio::fs::canonicalize(self.folder).await.map_err(|error| failed(self.folder, error))?;
        for (folder, _) in modules {
            // Not where a link leads out.
            let folder =
                tokio::fs::canonicalize(folder).await.ok().filter(|folder| folder.starts_with(&root));
            let Some(file) = folder.map(|folder| folder.join(".git")) else { continue };
            match tokio::fs::remove_file(&file).await {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(failed(&file, error));
                }
                _ => {}
            }
        }
        let own = root.join(".git");
        tokio::fs::remove_dir_all(&own).await.map_err(|error| failed(&own, error))
    }
}
