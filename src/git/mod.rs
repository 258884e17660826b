//! The git program, run with an argument vector: resolve a ref, fetch it, check it out.
//!
//! Invariant: nothing a user sent is an option or passes a shell. git reads no configuration but ours, runs no hook,
//! asks nobody, and uses only the transports that are allowed.
//! Invariant: knows nothing of jobs, Nomad or engines.

mod refs;

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use secrecy::{ExposeSecret, SecretString};
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::Command;

use refs::{Remote, Wanted};

/// A repository to check out.
pub struct Source<'a> {
    /// Its address.
    pub url: &'a str,
    /// A branch, tag, full ref or commit; none is the default branch.
    pub reference: Option<&'a str>,
    /// Transports that it, and its submodules, may use.
    pub transports: &'a [&'a str],
    /// For HTTP.
    pub credentials: Option<&'a Credentials>,
    /// What git's environment has beside our own variables: where programs and trusted certificates are.
    pub environment: &'a [(String, String)],
}

/// The variables that [`Source::environment`] should have, where they are set.
pub const PASSED: [&str; 7] =
    ["PATH", "SSL_CERT_FILE", "SSL_CERT_DIR", "GIT_SSL_CAINFO", "https_proxy", "http_proxy", "no_proxy"];

/// A user and a password, or a token as one.
pub struct Credentials {
    /// The user.
    pub username: String,
    /// The password.
    pub password: SecretString,
}

/// What was checked out.
#[derive(Debug, PartialEq, Eq)]
pub struct CheckedOut {
    /// The ref, in full where it has a name.
    pub reference: Option<String>,
    /// The commit.
    pub commit: String,
}

/// Why a checkout failed.
#[derive(Debug, thiserror::Error)]
pub enum GitError {
    /// There is no git.
    #[error("the git program cannot be run: install git where builds run")]
    Missing(#[source] std::io::Error),
    /// A file of ours could not be written.
    #[error("{0} cannot be written")]
    File(PathBuf, #[source] std::io::Error),
    /// The repository has no such ref.
    #[error("the repository has no ref {0:?}: neither a branch, nor a tag, nor a commit that it gives")]
    NoSuchRef(String),
    /// A short commit that several commits begin with.
    #[error("{0:?} begins several commits: give more of its digits")]
    Ambiguous(String),
    /// The repository wants other credentials, or some.
    #[error("the repository refused access: {0}")]
    Unauthorized(String),
    /// git failed.
    #[error("git {command} failed{}: {message}", .code.map_or_else(String::new, |code| format!(" with exit code {code}")))]
    Failed {
        /// The subcommand.
        command: String,
        /// Its exit code.
        code: Option<i32>,
        /// The last it said.
        message: String,
    },
}

/// Takes what git says while it works.
pub trait Output {
    /// Some bytes of git's progress.
    fn bytes(&self, bytes: Vec<u8>) -> impl Future<Output = ()> + Send;
}

/// One repository on its way into a folder.
struct Repository<'a, O> {
    source: &'a Source<'a>,
    folder: &'a Path,
    home: &'a Path,
    output: &'a O,
}

/// Checks a source out into `folder`, which must not exist. `home` holds git's own files and is not part of the checkout.
pub async fn check_out<O: Output + Sync>(
    source: &Source<'_>,
    folder: &Path,
    home: &Path,
    output: &O,
) -> Result<CheckedOut, GitError> {
    let repository = Repository { source, folder, home, output };
    repository.prepare().await?;
    let (remote, initialised) = tokio::join!(repository.list(), repository.initialise());
    initialised?;
    let checked_out = match remote?.resolve(source.reference) {
        Wanted::Named { reference, commit } => {
            repository.fetch(&["--depth=1"], &[&reference]).await?;
            CheckedOut { reference: Some(reference), commit }
        }
        Wanted::Commit(text) => repository.fetch_commit(&text).await?,
        Wanted::Nothing(text) => return Err(GitError::NoSuchRef(text)),
    };
    repository.run("checkout", &["--quiet", "--detach", &checked_out.commit]).await?;
    repository.submodules().await?;
    repository.large_files().await?;
    Ok(checked_out)
}

impl<O: Output + Sync> Repository<'_, O> {
    /// git's home: our configuration and, for the time of the checkout, the credentials.
    async fn prepare(&self) -> Result<(), GitError> {
        let write = async |name: &str, text: String| {
            let path = self.home.join(name);
            tokio::fs::write(&path, text).await.map_err(|error| GitError::File(path, error))
        };
        tokio::fs::create_dir_all(self.home)
            .await
            .map_err(|error| GitError::File(self.home.to_owned(), error))?;
        let mut config = String::from(
            "[protocol]\n\tallow = never\n[core]\n\thooksPath = /dev/null\n[advice]\n\tdetachedHead = false\n\
             [init]\n\tdefaultBranch = main\n[gc]\n\tauto = 0\n",
        );
        for transport in self.source.transports {
            config.push_str(&format!("[protocol \"{transport}\"]\n\tallow = always\n"));
        }
        if self.source.transports.contains(&"file") {
            // A repository on this machine may belong to somebody else; the operator allowed this transport.
            config.push_str("[safe]\n\tdirectory = *\n");
        }
        if self.source.credentials.is_some() {
            let path = self.home.join("credentials");
            config.push_str(&format!("[credential]\n\thelper = store --file={}\n", path.display()));
        }
        write("gitconfig", config).await?;
        if let Some(credentials) = self.source.credentials
            && let Some(line) = credential_line(self.source.url, credentials)
        {
            write("credentials", line).await?;
        }
        Ok(())
    }

    async fn initialise(&self) -> Result<(), GitError> {
        self.git("init", &["--quiet", "--"], &[self.folder.as_os_str()], None).await.map(drop)
    }

    async fn list(&self) -> Result<Remote, GitError> {
        let said = self.git("ls-remote", &["--symref", "--"], &[OsStr::new(self.source.url)], None).await?;
        Ok(Remote::parse(&said))
    }

    async fn fetch(&self, options: &[&str], refs: &[&str]) -> Result<(), GitError> {
        let mut arguments: Vec<&str> = vec!["--no-tags", "--no-recurse-submodules"];
        arguments.extend(options);
        arguments.extend(["--", self.source.url]);
        arguments.extend(refs);
        self.run("fetch", &arguments).await.map(drop)
    }

    /// A commit that no ref names. Servers may refuse to give one by its hash; then everything is fetched.
    async fn fetch_commit(&self, text: &str) -> Result<CheckedOut, GitError> {
        let whole = matches!(text.len(), 40 | 64);
        if whole && self.fetch(&["--depth=1"], &[text]).await.is_ok() {
            return Ok(CheckedOut { reference: None, commit: text.to_ascii_lowercase() });
        }
        self.fetch(&[], &["+refs/heads/*:refs/remotes/origin/*", "+refs/tags/*:refs/tags/*"]).await?;
        let wanted = format!("{text}^{{commit}}");
        match self.run("rev-parse", &["--verify", "--end-of-options", &wanted]).await {
            Ok(said) => Ok(CheckedOut { reference: None, commit: said.trim().to_owned() }),
            Err(GitError::Failed { message, .. }) if message.contains("ambiguous") => {
                Err(GitError::Ambiguous(text.to_owned()))
            }
            Err(GitError::Failed { .. }) => Err(GitError::NoSuchRef(text.to_owned())),
            Err(error) => Err(error),
        }
    }

    /// Submodules, where the repository has some: under the same rules, as they read the same configuration.
    async fn submodules(&self) -> Result<(), GitError> {
        if !self.folder.join(".gitmodules").is_file() {
            return Ok(());
        }
        self.run("submodule", &["update", "--init", "--recursive", "--depth=1"]).await.map(drop)
    }

    /// Git LFS objects, where the repository has some and the program is there.
    async fn large_files(&self) -> Result<(), GitError> {
        let attributes =
            tokio::fs::read_to_string(self.folder.join(".gitattributes")).await.unwrap_or_default();
        if !attributes.contains("filter=lfs") {
            return Ok(());
        }
        if self.run("lfs", &["version"]).await.is_err() {
            let warning = "warning: the repository uses Git LFS, and git-lfs is not installed here: its large files stay pointers\n";
            self.output.bytes(warning.as_bytes().to_vec()).await;
            return Ok(());
        }
        self.run("lfs", &["install", "--local", "--skip-repo"]).await?;
        self.run("lfs", &["pull"]).await.map(drop)
    }

    /// Runs git inside the checkout.
    async fn run(&self, command: &str, arguments: &[&str]) -> Result<String, GitError> {
        let arguments: Vec<_> = arguments.iter().map(OsStr::new).collect();
        self.git(command, &[], &arguments, Some(self.folder)).await
    }

    async fn git(
        &self,
        command: &str,
        options: &[&str],
        arguments: &[&OsStr],
        inside: Option<&Path>,
    ) -> Result<String, GitError> {
        let mut git = Command::new("git");
        git.arg(command).args(options).args(arguments);
        git.env_clear().envs(self.source.environment.iter().cloned()).envs(environment(self.home));
        git.current_dir(inside.unwrap_or(self.home));
        git.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        let mut child = git.spawn().map_err(GitError::Missing)?;
        let (mut stdout, mut stderr) = (child.stdout.take(), child.stderr.take());
        let said = async { read(stdout.as_mut(), None::<&O>).await };
        let complained = async { read(stderr.as_mut(), Some(self.output)).await };
        let (said, complained, status) = tokio::join!(said, complained, child.wait());
        let status = status.map_err(GitError::Missing)?;
        if status.success() {
            return Ok(said);
        }
        Err(failure(command, status.code(), &complained))
    }
}

/// Our own part of git's environment.
fn environment(home: &Path) -> [(&'static str, OsString); 7] {
    [
        ("HOME", home.into()),
        ("GIT_CONFIG_NOSYSTEM", "1".into()),
        ("GIT_CONFIG_GLOBAL", home.join("gitconfig").into()),
        ("GIT_TERMINAL_PROMPT", "0".into()),
        ("GIT_ASKPASS", "/bin/false".into()),
        ("GIT_SSH_COMMAND", "ssh -oBatchMode=yes".into()),
        ("LC_ALL", "C".into()),
    ]
}

/// Reads a pipe to its end, passing on what it says; keeps the last 64 KiB.
async fn read<O: Output>(pipe: Option<&mut (impl AsyncRead + Unpin)>, output: Option<&O>) -> String {
    const KEPT: usize = 1 << 16;
    let Some(pipe) = pipe else { return String::new() };
    let mut kept = Vec::new();
    let mut buffer = vec![0; 16 * 1024];
    while let Ok(count @ 1..) = pipe.read(&mut buffer).await {
        let bytes = &buffer[..count];
        kept.extend_from_slice(bytes);
        // A list of refs may be long and is needed whole.
        if let Some(output) = output {
            output.bytes(bytes.to_vec()).await;
            let surplus = kept.len().saturating_sub(KEPT);
            kept.drain(..surplus);
        }
    }
    String::from_utf8_lossy(&kept).into_owned()
}

fn failure(command: &str, code: Option<i32>, complained: &str) -> GitError {
    let lines: Vec<_> = complained.lines().filter(|line| !line.trim().is_empty()).collect();
    let from = lines.len().saturating_sub(3);
    let message = lines[from..].join("; ");
    let refused = [
        "Authentication failed",
        "could not read Username",
        "could not read Password",
        "Permission denied",
        "HTTP 403",
    ];
    if refused.iter().any(|text| complained.contains(text)) {
        return GitError::Unauthorized(format!("name its credentials in git_credentials_path ({message})"));
    }
    GitError::Failed { command: command.to_owned(), code, message }
}

/// A line for git's credential store; none where the address is not of HTTP.
fn credential_line(url: &str, credentials: &Credentials) -> Option<String> {
    let (scheme, rest) = url.split_once("://")?;
    let host = rest.split('/').next()?;
    let password = credentials.password.expose_secret();
    let line = format!("{scheme}://{}:{}@{host}\n", percent(&credentials.username), percent(password));
    matches!(scheme, "http" | "https").then_some(line)
}

fn percent(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    text.bytes().map(|b| if plain(b) { char::from(b).to_string() } else { format!("%{b:02X}") }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_are_escaped_for_gits_store() {
        let credentials = Credentials { username: "u@x".to_owned(), password: "p:/%\n".into() };
        let line = credential_line("https://example.com:8443/a.git", &credentials);
        assert_eq!(line.as_deref(), Some("https://u%40x:p%3A%2F%25%0A@example.com:8443\n"));
        assert_eq!(credential_line("ssh://git@example.com/a", &credentials), None);
    }

    #[test]
    fn a_refused_login_is_told_from_other_failures() {
        let refused = failure("fetch", Some(128), "fatal: Authentication failed for 'http://h/'\n");
        assert!(matches!(refused, GitError::Unauthorized(_)));
        let other = failure("fetch", Some(128), "a\nb\nc\nfatal: d\n");
        assert_eq!(other.to_string(), "git fetch failed with exit code 128: b; c; fatal: d");
    }
}
