//! The git program, run with an argument vector: resolve a ref, fetch it, check it out.
//!
//! Invariant: nothing a user sent is an option or passes a shell. git reads no configuration but ours, runs no hook,
//! asks nobody, and uses only the transports that are allowed.
//! Invariant: knows nothing of jobs, Nomad or engines.

mod home;
mod large_files;
mod process;
mod refs;
mod size;
mod submodules;

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use secrecy::SecretString;

use home::Home;
use process::Git;
use refs::{Remote, Wanted};

pub use size::Most;

/// Whether a checkout may have a submodule of an address; if not, why.
pub type Allows<'a> = dyn Fn(&str) -> Result<(), String> + Send + Sync + 'a;

/// A repository to check out.
pub struct Source<'a> {
    /// Its address.
    pub url: &'a str,
    /// A branch, tag, full ref or commit; none is the default branch.
    pub reference: Option<&'a str>,
    /// Transports that it, and its submodules, may use.
    pub transports: &'a [&'a str],
    /// What opens it.
    pub credentials: Option<&'a Credentials>,
    /// Which addresses its submodules may have.
    pub allows: &'a Allows<'a>,
    /// Whether git's own folder stays: it is another one for each checkout, whatever is checked out.
    pub keep_git: bool,
    /// How much it may take of the machine, with its submodules and large files.
    pub most: Most,
    /// What git's environment has beside our own variables: where programs and trusted certificates are.
    pub environment: &'a [(String, String)],
}

/// The variables that [`Source::environment`] should have, where they are set: proxies as curl spells them.
pub const PASSED: [&str; 11] = [
    "PATH",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "GIT_SSL_CAINFO",
    "http_proxy",
    "https_proxy",
    "HTTPS_PROXY",
    "all_proxy",
    "ALL_PROXY",
    "no_proxy",
    "NO_PROXY",
];

/// What opens a repository.
pub enum Credentials {
    /// For HTTP: a user and a password, or a token as one.
    Login {
        /// The user.
        username: String,
        /// The password.
        password: SecretString,
    },
    /// For SSH.
    Key {
        /// The private key, as `ssh-keygen` writes it, without a passphrase.
        private: SecretString,
        /// The hosts that it may be shown to, in the format of sshd(8): no other host is connected to.
        known_hosts: String,
    },
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
    #[error("{0} cannot be written, or removed")]
    File(PathBuf, #[source] std::io::Error),
    /// git could not be listened to.
    #[error("what git says could not be read")]
    Pipe(#[source] std::io::Error),
    /// git said more than is kept.
    #[error("git {command} said more than {} MiB: the repository has more refs than can be listed", .most >> 20)]
    TooMuch {
        /// The subcommand.
        command: String,
        /// The most bytes.
        most: u64,
    },
    /// The repository has no such ref.
    #[error("the repository has no ref {0:?}: neither a branch, nor a tag, nor a commit that it gives")]
    NoSuchRef(String),
    /// A short commit that several commits begin with.
    #[error("{0:?} begins several commits: give more of its digits")]
    Ambiguous(String),
    /// The repository wants other credentials, or some.
    #[error("the repository refused access: {0}")]
    Unauthorized(String),
    /// Its host is not known by the key that it has.
    #[error(
        "the host of the repository, or of a submodule, is not known by its key: {0}: put that key into known_hosts of \
         git_credentials_path, or where that is not given, into the known hosts of the node (ssh-keyscan shows it; compare \
         it with what the host's owner publishes)"
    )]
    UnknownHost(String),
    /// A submodule is of a repository that may not be built.
    #[error("the address of submodule {0:?} {1}")]
    NotAllowed(String, String),
    /// It takes more of the machine than it may.
    #[error(
        "the repository, with its submodules and large files, takes more than {0} here: make it smaller, or ask who runs the \
         service to allow more (NOMAD_BUILD_MAX_CHECKOUT_MB, NOMAD_BUILD_MAX_CHECKOUT_FILES)"
    )]
    TooLarge(String),
    /// git failed.
    #[error("git {command} failed{}: {message}", .code.map_or_else(String::new, |code| format!(" with exit code {code}")))]
    Failed {
        /// The subcommand.
        command: String,
        /// Its exit code.
        code: Option<i32>,
        /// The last it said.
        message: String,
        /// Whether that may be otherwise in a moment.
        is_passing: bool,
    },
}

/// Takes what git says while it works.
pub trait Output {
    /// Some bytes of git's progress.
    fn bytes(&self, bytes: Vec<u8>) -> impl Future<Output = ()> + Send;
}

/// One repository on its way into a folder.
struct Repository<'a, O> {
    url: &'a str,
    folder: &'a Path,
    allows: &'a Allows<'a>,
    git: Git<'a, O>,
}

/// Checks a source out into `folder`, which must not exist. `home` is git's own as long as this takes: it holds the
/// credentials, so it belongs where nobody else reads.
pub async fn check_out<O: Output + Sync>(
    source: &Source<'_>,
    folder: &Path,
    home: &Path,
    output: &O,
) -> Result<CheckedOut, GitError> {
    let home = Home::make(home, source).await?;
    let memory = source.most.memory;
    let git = Git { home: home.path(), ssh: home.ssh(), memory, environment: source.environment, output };
    let repository = Repository { url: source.url, folder, allows: source.allows, git };
    let checked_out = tokio::select! {
        checked_out = repository.check_out(source.reference, source.keep_git) => checked_out,
        // What git is at then is ended by being dropped.
        what = size::outgrown(folder, source.most) => Err(GitError::TooLarge(what)),
    };
    // What was there for less time than passes between two looks.
    let ended = match checked_out {
        Ok(done) => {
            size::excess(folder, source.most).await.map_or(Ok(done), |what| Err(GitError::TooLarge(what)))
        }
        failed => failed,
    };
    if let Err(GitError::TooLarge(_)) = ended {
        // The disk has others on it.
        tokio::fs::remove_dir_all(folder).await.map_err(|error| GitError::File(folder.to_owned(), error))?;
    }
    ended
}

impl<O: Output + Sync> Repository<'_, O> {
    async fn check_out(&self, reference: Option<&str>, keep_git: bool) -> Result<CheckedOut, GitError> {
        let (remote, initialised) = tokio::join!(self.list(), self.initialise("sha1"));
        initialised?;
        let remote = remote?;
        if remote.is_sha256() {
            // Of the two kinds the rarer, which one is only known now.
            let removed = tokio::fs::remove_dir_all(self.folder).await;
            removed.map_err(|error| GitError::File(self.folder.to_owned(), error))?;
            self.initialise("sha256").await?;
        }
        let checked_out = match remote.resolve(reference) {
            Wanted::Named(reference) => {
                let commit = self.fetch_one(&reference).await?;
                CheckedOut { reference: Some(reference), commit }
            }
            Wanted::Commit(text) => CheckedOut { reference: None, commit: self.fetch_commit(&text).await? },
            Wanted::Nothing(text) => return Err(GitError::NoSuchRef(text)),
        };
        self.run("checkout", &["--quiet", "--detach", &checked_out.commit]).await?;
        let modules = self.submodules().await?;
        self.large_files(&modules).await?;
        if !keep_git {
            self.forget(&modules).await?;
        }
        Ok(checked_out)
    }

    async fn initialise(&self, format: &str) -> Result<(), GitError> {
        let format = format!("--object-format={format}");
        let arguments = ["--quiet".as_ref(), format.as_ref(), "--".as_ref(), self.folder.as_os_str()];
        self.git.run("init", &arguments, self.git.home).await?;
        // What a submodule's relative address is relative to.
        self.run("remote", &["add", "--", "origin", self.url]).await.map(drop)
    }

    async fn list(&self) -> Result<Remote, GitError> {
        let arguments = ["--symref", "--", self.url].map(OsStr::new);
        Ok(Remote::parse(&self.git.run_remotely("ls-remote", &arguments, self.git.home).await?))
    }

    async fn fetch(&self, options: &[&str], refs: &[&str]) -> Result<(), GitError> {
        let mut arguments: Vec<&str> = vec!["--no-tags", "--no-recurse-submodules"];
        arguments.extend(options);
        arguments.extend(["--", self.url]);
        arguments.extend(refs);
        self.run_remotely("fetch", &arguments).await.map(drop)
    }

    /// Fetches a ref or a commit; the commit that came, which need not be the one that was listed.
    async fn fetch_one(&self, wanted: &str) -> Result<String, GitError> {
        self.fetch(&["--depth=1"], &[wanted]).await?;
        self.commit("FETCH_HEAD").await
    }

    /// A commit that no ref names. Servers may refuse to give one by its hash; then everything is fetched.
    async fn fetch_commit(&self, text: &str) -> Result<String, GitError> {
        let is_whole = matches!(text.len(), 40 | 64);
        if is_whole && let Ok(commit) = self.fetch_one(text).await {
            return Ok(commit);
        }
        self.fetch(&[], &["+refs/heads/*:refs/remotes/origin/*", "+refs/tags/*:refs/tags/*"]).await?;
        self.commit(text).await.map_err(|error| match error {
            GitError::Failed { message, .. } if message.contains("ambiguous") => {
                GitError::Ambiguous(text.to_owned())
            }
            GitError::Failed { .. } => GitError::NoSuchRef(text.to_owned()),
            error => error,
        })
    }

    /// The commit that something fetched is, or that it names.
    async fn commit(&self, of: &str) -> Result<String, GitError> {
        let wanted = format!("{of}^{{commit}}");
        let said = self.run("rev-parse", &["--verify", "--end-of-options", &wanted]).await?;
        Ok(said.trim().to_owned())
    }

    /// Runs git inside the checkout.
    async fn run(&self, command: &str, arguments: &[&str]) -> Result<String, GitError> {
        let arguments: Vec<_> = arguments.iter().map(OsStr::new).collect();
        self.git.run(command, &arguments, self.folder).await
    }

    /// Runs git inside the checkout, against another machine.
    async fn run_remotely(&self, command: &str, arguments: &[&str]) -> Result<String, GitError> {
        let arguments: Vec<_> = arguments.iter().map(OsStr::new).collect();
        self.git.run_remotely(command, &arguments, self.folder).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_variable_by_which_curl_finds_a_proxy_is_passed() {
        // http_proxy in small letters only: in capitals, a CGI's caller could set it.
        for name in
            ["http_proxy", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY"]
        {
            assert!(PASSED.contains(&name), "{name}");
        }
    }
}
