//! A stack of `nomad-build dev`, started as a program: it goes with this process, however this process ends.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use crate::support::agent::LAZY;

/// A running stack.
pub(crate) struct Stack {
    pub(crate) child: Child,
    /// The line that says where it is.
    pub(crate) ready: String,
    pub(crate) nomad: String,
    pub(crate) registry: String,
    pub(crate) data_dir: PathBuf,
}

impl Stack {
    /// Starts a stack without the service, with further arguments, and waits until it is up.
    pub(crate) fn start(arguments: &[&str]) -> Self {
        Self::with_service(&[&["--no-service"], arguments].concat())
    }

    /// The same with the service.
    pub(crate) fn with_service(arguments: &[&str]) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_nomad-build"))
            .args(["dev", "--while-stdin-open"])
            .args(arguments)
            .envs(LAZY)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut ready = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut ready).unwrap();
        let [nomad, registry] = ["nomad=", "registry="].map(|name| field(&ready, name));
        let data_dir = data_dir_of(&nomad);
        Self { child, ready, nomad, registry, data_dir }
    }

    /// The address of the service's API.
    pub(crate) fn api(&self) -> String {
        field(&self.ready, "api=")
    }

    /// Makes a base image with a shell and busybox' programs in the stack's registry; its reference.
    pub(crate) fn base_image(&self) -> String {
        let program = concat!(env!("CARGO_MANIFEST_DIR"), "/tools/base-image");
        let made = Command::new(program).arg(&self.registry).output().unwrap();
        assert!(made.status.success(), "no base image: {}", String::from_utf8_lossy(&made.stderr));
        String::from_utf8(made.stdout).unwrap().trim().to_owned()
    }

    /// Runs a command of the Nomad program against this stack, and answers with what it printed.
    pub(crate) fn nomad(&self, arguments: &[&str]) -> String {
        let (succeeded, text) = self.try_nomad(arguments);
        assert!(succeeded, "nomad {arguments:?}: {text}");
        text
    }

    /// Runs such a command, that may fail; whether it succeeded, and what it printed.
    pub(crate) fn try_nomad(&self, arguments: &[&str]) -> (bool, String) {
        let program = nomad_build::dev::find_nomad(environment).unwrap();
        let output = Command::new(program).args(arguments).env("NOMAD_ADDR", &self.nomad).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        (output.status.success(), text.into_owned())
    }

    /// Lets go of the stack and waits until it is down.
    pub(crate) fn stop(mut self) -> ExitStatus {
        drop(self.child.stdin.take());
        self.child.wait().unwrap()
    }
}

/// A word of the line that says where a stack is, without its name.
fn field(ready: &str, name: &str) -> String {
    let found = ready.split_whitespace().find_map(|field| field.strip_prefix(name));
    found.unwrap_or_else(|| panic!("no {name} in {ready:?}")).to_owned()
}

#[expect(clippy::disallowed_methods, reason = "as the program itself finds Nomad")]
pub(crate) fn environment(key: &str) -> Option<String> {
    std::env::var(key).ok()
}

/// The processes that carry the mark of a stack.
pub(crate) fn processes_of(data_dir: &Path) -> Vec<u32> {
    let mark = format!("NOMAD_BUILD_STACK={}", data_dir.display());
    let pids = Path::new("/proc").read_dir().unwrap().flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|pid: &u32| {
        let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environment.split(|byte| *byte == 0).any(|variable| variable == mark.as_bytes())
    })
    .collect()
}

/// Waits until `ask` has an answer.
pub(crate) fn wait_for<T>(what: &str, limit: Duration, mut ask: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(Instant::now() < deadline, "{what}: not within {limit:?}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn data_dir_of(nomad: &str) -> PathBuf {
    let address = nomad.strip_prefix("http://").unwrap();
    let mut answer = String::new();
    let mut stream = std::net::TcpStream::connect(address).unwrap();
    std::io::Write::write_all(
        &mut stream,
        b"GET /v1/agent/self HTTP/1.1\r\nHost: nomad\r\nConnection: close\r\n\r\n",
    )
    .unwrap();
    stream.read_to_string(&mut answer).unwrap();
    let rest = answer.split(r#""DataDir":""#).nth(1).unwrap();
    Path::new(rest.split('"').next().unwrap()).parent().unwrap().to_owned()
}
