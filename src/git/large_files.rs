//! Git LFS: the large files of a repository and of its submodules, where they have some and the program is there.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use super::{GitError, Output, Repository};

/// A file that speaks of Git LFS, in any folder.
const ATTRIBUTES: [&str; 7] =
    ["--cached", "--quiet", "--fixed-strings", "-e", "filter=lfs", "--", ":(top,glob)**/.gitattributes"];

const MISSING: &str = "warning: the repository uses Git LFS, and git-lfs is not installed here: its large files stay pointers\n";

impl<O: Output + Sync> Repository<'_, O> {
    /// Gets the large files.
    pub(super) async fn large_files(&self, modules: &[(PathBuf, String)]) -> Result<(), GitError> {
        let modules = modules.iter().map(|(folder, url)| (folder.as_path(), url.as_str()));
        let mut found = Vec::new();
        for (folder, url) in std::iter::once((self.folder, self.url)).chain(modules) {
            if self.has_large_files(folder).await? {
                found.push((folder, url));
            }
        }
        if found.is_empty() {
            return Ok(());
        }
        if self.run("lfs", &["version"]).await.is_err() {
            self.git.output.bytes(MISSING.as_bytes().to_vec()).await;
            return Ok(());
        }
        for (folder, url) in found {
            self.get(folder, url).await?;
        }
        Ok(())
    }

    async fn get(&self, folder: &Path, url: &str) -> Result<(), GitError> {
        let run = async |command, arguments: &[&str]| {
            let arguments: Vec<_> = arguments.iter().map(OsStr::new).collect();
            self.git.run(command, &arguments, folder).await
        };
        // Git LFS heeds no `protocol.allow`: what a repository's `.lfsconfig` says must not send it elsewhere.
        run("config", &["--local", "--", "lfs.url", &server(url)]).await?;
        run("lfs", &["install", "--local", "--skip-repo"]).await?;
        self.git.run_remotely("lfs", &[OsStr::new("pull")], folder).await.map(drop)
    }

    /// Whether what is checked out in a folder says that it has large files.
    async fn has_large_files(&self, folder: &Path) -> Result<bool, GitError> {
        match self.git.run("grep", &ATTRIBUTES.map(OsStr::new), folder).await {
            Ok(_) => Ok(true),
            Err(GitError::Failed { code: Some(1), .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }
}

/// Where Git LFS looks for a repository's objects by its own rule (its documentation of the server discovery).
pub(super) fn server(url: &str) -> String {
    if !url.starts_with("https://") && !url.starts_with("http://") {
        return url.to_owned();
    }
    let url = url.trim_end_matches('/');
    format!("{}.git/info/lfs", url.strip_suffix(".git").unwrap_or(url))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_files_come_from_the_repositorys_own_server() {
        for (url, want) in [
            ("https://example.com/a.git", "https://example.com/a.git/info/lfs"),
            ("https://example.com/a", "https://example.com/a.git/info/lfs"),
            ("http://example.com/a/", "http://example.com/a.git/info/lfs"),
            ("git@example.com:a.git", "git@example.com:a.git"),
            ("ssh://git@example.com/a.git", "ssh://git@example.com/a.git"),
            ("file:///srv/a", "file:///srv/a"),
        ] {
            assert_eq!(server(url), want);
        }
    }
}
