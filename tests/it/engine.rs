//! The engine room, over the real Docker Engine.

mod builds;
mod limits;
mod own;
mod runs;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use nomad_build::engine::{
    BuildRequest, DockerEngine, Engine as _, EngineError, Exit, Output, RunCommand, RunRequest, Stream,
};
use tempfile::TempDir;
use tokio::sync::mpsc;

use crate::support::{Torn, engine_socket, eventually, scale, world};

const LABEL: &str = "nomad-build-test.id";

/// One test's engine: what it makes carries a label of its own, and is removed at the end.
struct Bench {
    engine: DockerEngine,
    id: String,
}

/// What was said on both streams.
#[derive(Debug, Default)]
struct Said {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
}

impl Said {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }
}

impl Bench {
    fn new() -> Self {
        Self::at(engine_socket())
    }

    fn at(socket: &str) -> Self {
        Self { engine: DockerEngine::new(socket), id: uuid::Uuid::new_v4().simple().to_string() }
    }

    fn labels(&self) -> BTreeMap<String, String> {
        BTreeMap::from([(LABEL.to_owned(), self.id.clone())])
    }

    /// A build of the Dockerfile in a directory.
    fn request(&self, context: &Path) -> BuildRequest {
        BuildRequest {
            context: context.to_owned(),
            dockerfile: context.join("Dockerfile"),
            tag: format!("nomad-build-test/{}:work", self.id),
            build_args: BTreeMap::new(),
            target: None,
            labels: self.labels(),
            no_cache: false,
            registry_auth: Vec::new(),
            secrets: BTreeMap::new(),
            agents: BTreeMap::new(),
            cache_namespace: self.id.clone(),
            network: true,
            may_take: Box::new(|_| Ok(())),
            cache_key: None,
        }
    }

    /// An image of the base and these further lines.
    async fn image(&self, lines: &str) -> String {
        let context = directory(&[("Dockerfile", &format!("FROM {}\n{lines}\n", world().base))]);
        self.build(self.request(context.path())).await.0.unwrap()
    }

    fn command(&self, image: &str, line: &str) -> RunRequest {
        RunRequest {
            name: format!("nomad-build-test-{}", uuid::Uuid::new_v4().simple()),
            image: image.to_owned(),
            command: RunCommand::Shell(line.to_owned()),
            env: BTreeMap::new(),
            labels: self.labels(),
            memory_bytes: 64 << 20,
            cpu_shares: 100,
            pids: 100,
            network: true,
        }
    }

    async fn build(&self, request: BuildRequest) -> (Result<String, EngineError>, Said) {
        collect(async |output| self.engine.build(request, output).await).await
    }

    async fn run(&self, request: RunRequest) -> (Result<Exit, EngineError>, Said) {
        collect(async |output| self.engine.run(request, output).await).await
    }

    /// The output of a command that must succeed in an image.
    async fn shell(&self, image: &str, line: &str) -> String {
        let (ended, said) = self.run(self.command(image, line)).await;
        assert_eq!(ended.unwrap().code, 0, "{line}: {said:?}");
        said.text()
    }

    async fn remove_containers(&self) -> usize {
        let ours = |name: &str| name.starts_with("nomad-build-test-");
        self.engine.remove_containers((LABEL, &self.id), ours).await.unwrap()
    }

    /// The containers that bear this test's label.
    fn containers(&self) -> String {
        docker(&["ps", "-aq", "--filter", &format!("label={LABEL}={}", self.id)])
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        for id in self.containers().lines() {
            docker(&["rm", "-f", id]);
        }
        let images = docker(&["images", "-q", "--filter", &format!("label={LABEL}={}", self.id)]);
        for id in images.lines() {
            docker(&["rmi", "-f", id]);
        }
    }
}

fn docker(arguments: &[&str]) -> String {
    let output = Command::new("docker").args(arguments).output().unwrap();
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// Reads the output of some work while it goes on.
async fn collect<T>(work: impl AsyncFnOnce(mpsc::Sender<Output>) -> T) -> (T, Said) {
    let (sender, mut receiver) = mpsc::channel(4);
    let read = async {
        let mut said = Said::default();
        while let Some(Output { stream, bytes }) = receiver.recv().await {
            match stream {
                Stream::Stdout => said.stdout.extend(bytes),
                Stream::Stderr => said.stderr.extend(bytes),
            }
        }
        said
    };
    tokio::join!(work(sender), read)
}

/// A directory with these files.
fn directory(files: &[(&str, &str)]) -> TempDir {
    let root = tempfile::tempdir().unwrap();
    for (name, content) in files {
        let path = root.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }
    root
}

/// Whether a process with these words in its command line runs on this machine; the engine's containers do.
fn process_runs(words: &str) -> bool {
    let processes = fs::read_dir("/proc").unwrap();
    processes.filter_map(|entry| fs::read(entry.ok()?.path().join("cmdline")).ok()).any(|line| {
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        line.contains(words)
    })
}
