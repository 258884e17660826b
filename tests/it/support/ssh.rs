//! A real SSH server with repositories: OpenSSH's own program, started for each connection, so that it ends with it.

use std::fs::File;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use tempfile::TempDir;
use tokio::net::TcpListener;

use super::Repository;

/// The program wants a user and a folder of its own where it runs as root. Here it sees them, and nobody else does.
const WITH_ITS_OWN: &str = "mount --bind \"$1\" /etc/passwd && mount -t tmpfs none /run && mkdir -m 755 /run/sshd \
                            && exec \"$2\" -i -e -f \"$3\"";

/// A server that lets in who has the key, and the name of its user.
pub(crate) struct Ssh {
    address: SocketAddr,
    user: String,
    folder: TempDir,
}

impl Ssh {
    /// Serves as long as the test runs.
    pub(crate) async fn serve() -> Self {
        let program = super::tool("sshd");
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str| folder.path().join(name);
        for name in ["host_key", "key"] {
            keygen(&["-q", "-t", "ed25519", "-N", "", "-C", "it", "-f"], &file(name));
        }
        std::fs::copy(file("key.pub"), file("authorized_keys")).unwrap();
        let users = std::fs::read_to_string("/etc/passwd").unwrap();
        std::fs::write(file("passwd"), users + "sshd:x:64999:65534::/run/sshd:/usr/sbin/nologin\n").unwrap();
        let settings = format!(
            "HostKey {}\nAuthorizedKeysFile {}\nStrictModes no\nUsePAM no\nPasswordAuthentication no\n\
             KbdInteractiveAuthentication no\nPermitRootLogin prohibit-password\nPidFile none\nAcceptEnv GIT_PROTOCOL\n",
            file("host_key").display(),
            file("authorized_keys").display(),
        );
        std::fs::write(file("settings"), settings).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let user = nix::unistd::User::from_uid(nix::unistd::getuid()).unwrap().unwrap().name;
        let of = folder.path().to_owned();
        tokio::spawn(async move {
            while let Ok((connection, _)) = listener.accept().await {
                let connection = connection.into_std().unwrap();
                connection.set_nonblocking(false).unwrap();
                let mut child = serve_one(&program, &of, connection.into()).spawn().unwrap();
                tokio::task::spawn_blocking(move || child.wait());
            }
        });
        Self { address, user, folder }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The address of a repository.
    pub(crate) fn url(&self, repository: &Repository) -> String {
        format!("ssh://{}@{}{}", self.user, self.address, repository.path().display())
    }

    /// The private key that it lets in.
    pub(crate) fn key(&self) -> String {
        std::fs::read_to_string(self.file("key")).unwrap()
    }

    /// Lets this key in too.
    pub(crate) fn let_in(&self, other: &Self) {
        let both = [self, other].map(|of| std::fs::read_to_string(of.file("key.pub")).unwrap());
        std::fs::write(self.file("authorized_keys"), both.concat()).unwrap();
    }

    /// The line by which it is known.
    pub(crate) fn known_host(&self) -> String {
        let key = std::fs::read_to_string(self.file("host_key.pub")).unwrap();
        format!("[127.0.0.1]:{} {}", self.address.port(), key.trim())
    }

    /// What it said to whom it did not let in, and of what it could not do.
    pub(crate) fn said(&self) -> String {
        std::fs::read_to_string(self.file("log")).unwrap_or_default()
    }
}

fn keygen(arguments: &[&str], path: &Path) {
    let made = Command::new("ssh-keygen").args(arguments).arg(path).output().unwrap();
    assert!(made.status.success(), "{made:?}");
}

/// The server of one connection.
fn serve_one(program: &Path, folder: &Path, connection: OwnedFd) -> Command {
    let settings = folder.join("settings");
    let mut command = if nix::unistd::getuid().is_root() {
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "sh", "-c", WITH_ITS_OWN, "sh"]);
        command.arg(folder.join("passwd")).arg(program).arg(settings);
        command
    } else {
        let mut command = Command::new(program);
        command.args(["-i", "-e", "-f"]).arg(settings);
        command
    };
    let log = File::options().create(true).append(true).open(folder.join("log")).unwrap();
    let answer = connection.try_clone().unwrap();
    command.stdin(Stdio::from(connection)).stdout(Stdio::from(answer)).stderr(log);
    command
}
