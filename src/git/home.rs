//! git's home: its configuration and, for the time of a checkout, the credentials.

use std::path::{Path, PathBuf};

use secrecy::{ExposeSecret as _, SecretString};
use tokio::io::AsyncWriteExt as _;

use super::{Credentials, GitError, Source, large_files};

/// How git connects by SSH where it was given no key: with none, as those of this machine are not the job's. Of the machine's own
/// it uses the hosts that are known there, which are no secret.
const SSH: &str = "ssh -F none -oBatchMode=yes -oIdentityFile=none -oIdentitiesOnly=yes -oIdentityAgent=none \
     -oConnectTimeout=30 -oServerAliveInterval=30 -oServerAliveCountMax=4";

/// How it does with a key of its own: from its home, so that no path passes the shell that git has this run by. Nothing else of
/// the machine's is used, and the key is shown to none but the hosts that were named with it.
const SSH_WITH_KEY: &str = "cd \"$HOME\" && exec ssh -F none -oBatchMode=yes -i ssh_key -oIdentitiesOnly=yes \
     -oIdentityAgent=none -oStrictHostKeyChecking=yes -oUserKnownHostsFile=known_hosts -oGlobalKnownHostsFile=none \
     -oUpdateHostKeys=no -oConnectTimeout=30 -oServerAliveInterval=30 -oServerAliveCountMax=4";

/// A folder that is removed when it is dropped, with the credentials in it.
pub(super) struct Home {
    folder: PathBuf,
    ssh: &'static str,
}

impl Home {
    pub(super) async fn make(folder: &Path, source: &Source<'_>) -> Result<Self, GitError> {
        let mut home = Self { folder: folder.to_owned(), ssh: SSH };
        tokio::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(folder)
            .await
            .map_err(|error| GitError::File(folder.to_owned(), error))?;
        home.write("gitconfig", &configuration(source)).await?;
        match source.credentials {
            Some(Credentials::Login { username, password }) => {
                if let Some(line) = credential_line(source.url, username, password) {
                    // Where git's store looks by itself: a path in its option would pass a shell.
                    home.write(".git-credentials", &line).await?;
                }
            }
            Some(Credentials::Key { private, known_hosts }) => {
                home.write("ssh_key", private.expose_secret()).await?;
                home.write("known_hosts", known_hosts).await?;
                home.ssh = SSH_WITH_KEY;
            }
            None => {}
        }
        Ok(home)
    }

    pub(super) fn path(&self) -> &Path {
        &self.folder
    }

    /// How git connects by SSH.
    pub(super) fn ssh(&self) -> &'static str {
        self.ssh
    }

    async fn write(&self, name: &str, text: &str) -> Result<(), GitError> {
        let path = self.folder.join(name);
        let mut options = tokio::fs::OpenOptions::new();
        let written = async {
            let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&path).await?;
            file.write_all(text.as_bytes()).await?;
            file.flush().await
        };
        written.await.map_err(|error| GitError::File(path.clone(), error))
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        // What stays is readable by this user only, and goes with the folder that it is in.
        std::fs::remove_dir_all(&self.folder).ok();
    }
}

fn configuration(source: &Source<'_>) -> String {
    let mut config = String::from(
        "[protocol]\n\tallow = never\n[core]\n\thooksPath = /dev/null\n[advice]\n\tdetachedHead = false\n\
         [init]\n\tdefaultBranch = main\n[gc]\n\tauto = 0\n\
         [http]\n\tlowSpeedLimit = 1\n\tlowSpeedTime = 120\n",
    );
    for transport in source.transports {
        config.push_str(&format!("[protocol \"{transport}\"]\n\tallow = always\n"));
    }
    if source.transports.contains(&"file") {
        // A repository on this machine may belong to somebody else; the operator allowed this transport.
        config.push_str("[safe]\n\tdirectory = *\n");
    }
    if let Some(Credentials::Login { .. }) = source.credentials {
        config.push_str("[credential]\n\thelper = store\n");
    }
    // Git LFS heeds no `protocol.allow`: what a repository's `.lfsconfig` says must not send it elsewhere.
    config.push_str(&format!("[lfs]\n\turl = {}\n", quoted(&large_files::server(source.url))));
    config
}

/// A value as git's configuration files write it.
fn quoted(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n"))
}

/// A line for git's credential store; none where the address is not of HTTP.
fn credential_line(url: &str, username: &str, password: &SecretString) -> Option<String> {
    let (scheme, rest) = url.split_once("://")?;
    let host = rest.split('/').next()?;
    let line = format!("{scheme}://{}:{}@{host}\n", percent(username), percent(password.expose_secret()));
    matches!(scheme, "http" | "https").then_some(line)
}

fn percent(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    text.bytes().map(|b| if plain(b) { char::from(b).to_string() } else { format!("%{b:02X}") }).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn credentials_are_escaped_for_gits_store() {
        let line = credential_line("https://example.com:8443/a.git", "u@x", &"p:/%\n".into());
        assert_eq!(line.as_deref(), Some("https://u%40x:p%3A%2F%25%0A@example.com:8443\n"));
        assert_eq!(credential_line("ssh://git@example.com/a", "u@x", &"p".into()), None);
    }

    #[tokio::test]
    async fn credentials_are_for_this_user_only_and_go_with_the_checkout() {
        let credentials = Credentials::Login { username: "u".to_owned(), password: "p".into() };
        let source = Source {
            url: "https://example.com/a.git",
            reference: None,
            transports: &["https"],
            credentials: Some(&credentials),
            allows: &|_| Ok(()),
            keep_git: false,
            most: crate::git::Most { mebibytes: 1, files: 1, memory: 1 },
            environment: &[],
        };
        let temporary = tempfile::tempdir().unwrap();
        let folder = temporary.path().join("git");
        let home = Home::make(&folder, &source).await.unwrap();
        let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&folder), mode(&folder.join(".git-credentials"))), (0o700, 0o600));
        drop(home);
        assert!(!folder.exists());
    }

    #[test]
    fn a_value_in_gits_configuration_is_read_back_as_it_was() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config");
        let value = "https://h/a\"b\\c;d#e\n[core]\n\teditor = x";
        std::fs::write(&path, format!("[lfs]\n\turl = {}\n", quoted(value))).unwrap();
        let git = std::process::Command::new("git")
            .args(["config", "--null", "--list", "--file"])
            .arg(&path)
            .output();
        assert_eq!(String::from_utf8(git.unwrap().stdout).unwrap(), format!("lfs.url\n{value}\0"));
    }
}
