//! One run of the git program, with all the programs that it starts.

use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio::process::{Child, Command};

use super::{GitError, Output};

/// The most that a command may say that is kept: a list of refs is needed whole, and may be long.
const MOST_SAID: u64 = 64 << 20;

/// How much of what git complains is kept.
const KEPT: usize = 1 << 16;

/// What git says below whatever went wrong by SSH, and what says nothing of that.
const ADVICE: [&str; 3] = [
    "fatal: Could not read from remote repository.",
    "Please make sure you have the correct access rights",
    "and the repository exists.",
];

/// What git, curl and ssh say of what may be otherwise in a moment.
const PASSING: [&str; 19] = [
    "returned error: 429",
    "returned error: 5",
    "Could not resolve host",
    "Temporary failure in name resolution",
    "Failed to connect",
    "Couldn't connect",
    "Connection refused",
    "Connection reset",
    "Connection timed out",
    "Connection closed",
    "Connection to",
    "Operation timed out",
    "Operation too slow",
    "No route to host",
    "Empty reply from server",
    "RPC failed",
    "early EOF",
    "unexpected disconnect",
    "the remote end hung up",
];

/// What git says where it may have no more memory.
const OUT_OF_MEMORY: [&str; 2] = ["Out of memory", "out of memory"];

/// How long git is let be before it is tried again.
const PAUSES: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(5)];

/// Has a shell run git with no more memory than it may have, and each program that git starts. What git is told passes the shell as
/// its own arguments, which it does not read. A limit that cannot be set is above the one that holds.
const WITHIN: &str = "ulimit -d \"$0\" 2>/dev/null; exec git \"$@\"";

/// How a shell ends that finds no program.
const NOT_FOUND: i32 = 127;

/// Where and how git runs.
pub(super) struct Git<'a, O> {
    pub(super) home: &'a Path,
    /// How it connects by SSH, as a shell takes it.
    pub(super) ssh: &'static str,
    /// How much memory each of its programs may have, in MiB: a small pack can hold a tree that is larger than any memory.
    pub(super) memory: u64,
    pub(super) environment: &'a [(String, String)],
    pub(super) output: &'a O,
}

/// git and what it started: a process group of its own, which ends with it.
struct Group(Child);

impl Drop for Group {
    fn drop(&mut self) {
        // No number once git was waited for: it may be somebody else's then.
        if let Some(leader) = self.0.id().and_then(|id| i32::try_from(id).ok()) {
            // That there is none left is as good.
            killpg(Pid::from_raw(leader), Signal::SIGKILL).ok();
        }
    }
}

impl<O: Output + Sync> Git<'_, O> {
    /// Runs a command; what it said on standard output. Its progress is passed on.
    pub(super) async fn run(
        &self,
        command: &str,
        arguments: &[&OsStr],
        inside: &Path,
    ) -> Result<String, GitError> {
        let mut git = Command::new("sh");
        git.args(["-c", WITHIN, &self.memory.saturating_mul(1024).to_string(), command]);
        git.args(arguments).current_dir(inside);
        git.env_clear().envs(self.environment.iter().cloned()).envs(environment(self.home, self.ssh));
        git.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
        let mut group = Group(git.spawn().map_err(GitError::Missing)?);
        let (stdout, stderr) = (group.0.stdout.take(), group.0.stderr.take());
        let (said, complained) =
            tokio::try_join!(whole(stdout, command, MOST_SAID), pass_on(stderr, self.output))?;
        // Only now, as what it started lives until the pipes are closed.
        let status = group.0.wait().await.map_err(GitError::Pipe)?;
        if status.success() {
            return Ok(said);
        }
        if status.code() == Some(NOT_FOUND) && complained.contains("git: not found") {
            return Err(GitError::Missing(std::io::ErrorKind::NotFound.into()));
        }
        if OUT_OF_MEMORY.iter().any(|text| complained.contains(text)) {
            return Err(GitError::TooLarge(format!("{} MiB of memory", self.memory)));
        }
        Err(failure(command, status.code(), &complained))
    }

    /// Runs a command that needs another machine: where that is away for a moment, again.
    pub(super) async fn run_remotely(
        &self,
        command: &str,
        arguments: &[&OsStr],
        inside: &Path,
    ) -> Result<String, GitError> {
        for pause in PAUSES {
            match self.run(command, arguments, inside).await {
                Err(error @ GitError::Failed { is_passing: true, .. }) => {
                    let said = format!("warning: {error}; it is tried again in {} s\n", pause.as_secs());
                    self.output.bytes(said.into_bytes()).await;
                }
                ended => return ended,
            }
            tokio::time::sleep(pause).await;
        }
        self.run(command, arguments, inside).await
    }
}

/// Our own part of git's environment.
fn environment(home: &Path, ssh: &str) -> [(&'static str, OsString); 8] {
    [
        ("HOME", home.into()),
        ("GIT_CONFIG_NOSYSTEM", "1".into()),
        ("GIT_CONFIG_GLOBAL", home.join("gitconfig").into()),
        ("GIT_TERMINAL_PROMPT", "0".into()),
        ("GIT_ASKPASS", "/bin/false".into()),
        ("GIT_SSH_COMMAND", ssh.into()),
        ("GIT_SSH_VARIANT", "ssh".into()),
        ("LC_ALL", "C".into()),
    ]
}

/// Reads a pipe to its end.
async fn whole(pipe: Option<impl AsyncRead + Unpin>, command: &str, most: u64) -> Result<String, GitError> {
    let Some(pipe) = pipe else { return Ok(String::new()) };
    let mut said = Vec::new();
    let count = pipe.take(most + 1).read_to_end(&mut said).await.map_err(GitError::Pipe)?;
    if u64::try_from(count).is_ok_and(|count| count > most) {
        return Err(GitError::TooMuch { command: command.to_owned(), most });
    }
    Ok(String::from_utf8_lossy(&said).into_owned())
}

/// Reads a pipe to its end, passing on what it says; keeps the last of it.
async fn pass_on(pipe: Option<impl AsyncRead + Unpin>, output: &impl Output) -> Result<String, GitError> {
    let Some(mut pipe) = pipe else { return Ok(String::new()) };
    let mut kept = Vec::new();
    let mut buffer = vec![0; 16 * 1024];
    loop {
        let count = pipe.read(&mut buffer).await.map_err(GitError::Pipe)?;
        if count == 0 {
            return Ok(String::from_utf8_lossy(&kept).into_owned());
        }
        let bytes = &buffer[..count];
        kept.extend_from_slice(bytes);
        output.bytes(bytes.to_vec()).await;
        let surplus = kept.len().saturating_sub(KEPT);
        kept.drain(..surplus);
    }
}

fn failure(command: &str, code: Option<i32>, complained: &str) -> GitError {
    let is_said = |line: &&str| !line.trim().is_empty() && !ADVICE.contains(&line.trim());
    let lines: Vec<_> = complained.lines().filter(is_said).collect();
    let from = lines.len().saturating_sub(3);
    let mut message = lines[from..].join("; ");
    // Forges say so of a private one, too.
    if message.contains("fatal: repository '") && message.contains("' not found") {
        message.push_str(" (if it is private, name its credentials in git_credentials_path)");
    }
    let refused = [
        "Authentication failed",
        "could not read Username",
        "could not read Password",
        // ssh's words, which are told from those of a file of this machine's by what follows.
        "Permission denied (",
        "Permission denied, please try again",
        "returned error: 403",
        "HTTP 403",
    ];
    if refused.iter().any(|text| complained.contains(text)) {
        return GitError::Unauthorized(format!("name its credentials in git_credentials_path ({message})"));
    }
    if complained.contains("Host key verification failed") {
        return GitError::UnknownHost(message);
    }
    let is_passing = PASSING.iter().any(|text| complained.contains(text));
    GitError::Failed { command: command.to_owned(), code, message, is_passing }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_login_is_told_from_other_failures() {
        let refused = failure("fetch", Some(128), "fatal: Authentication failed for 'http://h/'\n");
        assert!(matches!(refused, GitError::Unauthorized(_)));
        let refused = "fatal: unable to access 'http://h/': The requested URL returned error: 403\n";
        assert!(matches!(failure("fetch", Some(128), refused), GitError::Unauthorized(_)));
        let missing = failure("ls-remote", Some(128), "fatal: repository 'https://h/a/' not found\n");
        assert!(
            missing.to_string().ends_with("(if it is private, name its credentials in git_credentials_path)")
        );
        let full = "error: unable to create file a: Permission denied\n";
        assert!(matches!(failure("checkout", Some(1), full), GitError::Failed { is_passing: false, .. }));
        let other = failure("fetch", Some(128), "a\nb\nc\nfatal: d\n");
        assert_eq!(other.to_string(), "git fetch failed with exit code 128: b; c; fatal: d");
        let advice = "fatal: Could not read from remote repository.\n\nPlease make sure you have the correct access \
                      rights\nand the repository exists.\n";
        let said = format!("git@h: Permission denied (publickey).\n{advice}");
        assert!(matches!(failure("fetch", Some(128), &said), GitError::Unauthorized(_)));
        let said = format!("No key is known for h.\nHost key verification failed.\n{advice}");
        let unknown = failure("ls-remote", Some(128), &said);
        assert!(matches!(unknown, GitError::UnknownHost(_)), "{unknown}");
        assert!(unknown.to_string().contains("No key is known for h."), "{unknown}");
        let said = format!("ssh: connect to host h port 22: Connection refused\n{advice}");
        let refused = failure("ls-remote", Some(128), &said).to_string();
        assert_eq!(
            refused,
            "git ls-remote failed with exit code 128: ssh: connect to host h port 22: Connection refused"
        );
    }

    #[test]
    fn what_may_be_otherwise_in_a_moment_is_told_from_what_stays() {
        for (said, passing) in [
            ("fatal: unable to access 'http://h/a/': The requested URL returned error: 502", true),
            ("fatal: unable to access 'http://h/a/': Could not resolve host: h", true),
            ("ssh: connect to host h port 22: Connection refused", true),
            ("fetch-pack: unexpected disconnect while reading sideband packet", true),
            ("fatal: repository 'http://h/a/' not found", false),
            ("fatal: couldn't find remote ref refs/heads/x", false),
            ("fatal: transport 'ext' not allowed", false),
        ] {
            let is_passing = match failure("fetch", Some(128), said) {
                GitError::Failed { is_passing, .. } => is_passing,
                other => panic!("{other}"),
            };
            assert_eq!(is_passing, passing, "{said}");
        }
    }

    #[tokio::test]
    async fn what_git_says_is_kept_up_to_a_bound_and_refused_beyond_it() {
        assert_eq!(whole(Some(&b"refs"[..]), "ls-remote", 4).await.unwrap(), "refs");
        let error = whole(Some(tokio::io::repeat(b'x')), "ls-remote", 3 << 20).await.unwrap_err();
        assert_eq!(
            error.to_string(),
            "git ls-remote said more than 3 MiB: the repository has more refs than can be listed"
        );
    }
}
