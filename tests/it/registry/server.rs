//! A real registry, and images in the real Docker Engine.

use std::fmt::Write as _;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nomad_build::registry::{Digest, Repository};
use tempfile::{NamedTempFile, TempDir};

use crate::support::kilobytes;

/// bcrypt of `relay-test`, at its least cost.
const HTPASSWD: &str = "ci:$2y$05$abcdefghijklmnopqrstuuVgHK7w/AvQsoGaxBf/GxZTzlk7Fm6K2\n";

/// A registry of its own storage, stopped when it is dropped.
pub(crate) struct Server {
    process: Mutex<Child>,
    host: String,
    directory: TempDir,
}

impl Server {
    pub(crate) async fn start(auth: Option<(&str, &str)>) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let config = directory.path().join("config.yml");
        std::fs::write(&config, Self::config(directory.path(), auth)).unwrap();
        let log = std::fs::File::create(directory.path().join("access.log")).unwrap();
        let mut process = Command::new("docker-registry")
            .arg("serve")
            .arg(&config)
            .env("OTEL_TRACES_EXPORTER", "none")
            .stdout(log)
            .stderr(Stdio::piped())
            .spawn()
            .expect("docker-registry has to be installed");
        let mut lines = BufReader::new(process.stderr.take().unwrap()).lines().map_while(Result::ok);
        let host = tokio::task::spawn_blocking(move || {
            let listening = |line: String| line.split_once("listening on ").map(|(_, rest)| rest.to_owned());
            let rest = lines.by_ref().find_map(listening).expect("the registry has to come up");
            // It would stop at a full pipe.
            std::thread::spawn(move || lines.for_each(drop));
            rest.chars().take_while(|c| c.is_ascii_digit() || ".:".contains(*c)).collect()
        });
        let host = host.await.unwrap();
        Self { process: Mutex::new(process), host, directory }
    }

    fn config(directory: &Path, auth: Option<(&str, &str)>) -> String {
        let storage = directory.join("storage");
        let mut config = format!(
            "version: 0.1\nlog: {{level: info}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\n\
             http: {{addr: '127.0.0.1:0'}}\n",
            storage.display()
        );
        if auth.is_some() {
            let file = directory.join("htpasswd");
            std::fs::write(&file, HTPASSWD).unwrap();
            writeln!(config, "auth: {{htpasswd: {{realm: test, path: {}}}}}", file.display()).unwrap();
        }
        config
    }

    /// Where it keeps everything.
    pub(crate) fn folder(&self) -> &Path {
        self.directory.path()
    }

    pub(crate) fn host(&self) -> &str {
        &self.host
    }

    pub(super) fn kill(&self) {
        let mut process = self.process.lock().unwrap();
        process.kill().ok();
        process.wait().ok();
    }

    /// The tags of a repository, sorted; `None` if it has none.
    pub(super) async fn tags(&self, repository: &Repository) -> Option<Vec<String>> {
        let url = format!("http://{}/v2/{repository}/tags/list", self.host);
        let http = reqwest::Client::builder().no_proxy().build().unwrap();
        let body: serde_json::Value = http.get(url).send().await.unwrap().json().await.unwrap();
        let tags: Option<Vec<String>> = serde_json::from_value(body["tags"].clone()).unwrap();
        tags.map(|mut tags| {
            tags.sort();
            tags
        })
    }

    /// How many requests with this method were answered.
    pub(super) async fn count(&self, method: &str) -> usize {
        self.answered(|line| line.contains(&format!("\"{method} "))).await
    }

    /// How many blobs were taken over from another repository.
    pub(crate) async fn mounts(&self) -> usize {
        self.answered(|line| line.contains("?mount=") && line.contains("\" 201 ")).await
    }

    /// How many uploads it began.
    pub(super) async fn begun(&self) -> usize {
        self.answered(|line| line.contains("\"POST ") && line.contains("\" 202 ")).await
    }

    async fn answered(&self, is: impl Fn(&str) -> bool) -> usize {
        // The log is written after the answer: a request of our own marks how far it is to be read.
        let mark = format!("/v2/mark/{}/tags/list", uuid::Uuid::new_v4());
        let http = reqwest::Client::builder().no_proxy().build().unwrap();
        http.get(format!("http://{}{mark}", self.host)).send().await.unwrap();
        let file = self.directory.path().join("access.log");
        let read = || std::fs::read_to_string(&file).unwrap();
        wait_for("the registry's log", async || read().contains(&mark)).await;
        read().lines().filter(|line| is(line)).count()
    }

    /// Returns when some upload has begun.
    pub(super) async fn first_upload(&self) {
        let uploads = self.directory.path().join("storage/docker/registry/v2/repositories/team/app/_uploads");
        let begun = || {
            let sessions = std::fs::read_dir(&uploads).into_iter().flatten().flatten();
            sessions
                .filter_map(|session| session.path().join("data").metadata().ok())
                .any(|data| data.len() > 0)
        };
        wait_for("an upload", async || begun()).await;
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

/// An image in the engine, removed when it is dropped.
pub(super) struct Image {
    name: String,
    id: Digest,
}

impl Image {
    /// An image of so many small layers that no other image has.
    ///
    /// Loaded whole: builds make intermediate images, which whoever removes others may take along.
    pub(super) async fn load(layers: usize) -> Self {
        Self::of_layers((0..layers).map(|_| uuid::Uuid::new_v4().to_string().into_bytes())).await
    }

    /// An image whose layers have a file of each of these contents.
    pub(super) async fn of_layers(contents: impl Iterator<Item = Vec<u8>>) -> Self {
        let name = Self::unused_name();
        let layer = |(number, content): (usize, Vec<u8>)| tar_of(&[(&number.to_string(), &content)]);
        let layers: Vec<_> = contents.enumerate().map(layer).collect();
        let names: Vec<_> = (0..layers.len()).map(|number| format!("{number}.tar")).collect();
        let digests: Vec<_> = layers.iter().map(|layer| Digest::of(layer)).collect();
        let config = serde_json::json!({
            "architecture": "amd64", "os": "linux", "config": {"Cmd": ["/none"]},
            "rootfs": {"type": "layers", "diff_ids": digests},
        });
        let manifest = serde_json::json!([{"Config": "config.json", "RepoTags": [name], "Layers": names}]);
        let (config, manifest) = (config.to_string(), manifest.to_string());
        let mut files = vec![("config.json", config.as_bytes()), ("manifest.json", manifest.as_bytes())];
        files.extend(names.iter().map(String::as_str).zip(layers.iter().map(Vec::as_slice)));
        let archive = NamedTempFile::new().unwrap();
        std::fs::write(&archive, tar_of(&files)).unwrap();
        docker(&["load", "-q", "-i", archive.path().to_str().unwrap()]).await.unwrap();
        Self::named(name).await
    }

    /// An image of one layer that holds `file`.
    pub(super) async fn import(file: &Path) -> Self {
        let archive = NamedTempFile::new().unwrap();
        let mut tar = tar::Builder::new(archive.as_file());
        tar.append_path_with_name(file, "file").unwrap();
        tar.finish().unwrap();
        drop(tar);
        let name = Self::unused_name();
        docker(&["import", archive.path().to_str().unwrap(), &name]).await.unwrap();
        Self::named(name).await
    }

    fn unused_name() -> String {
        format!("nomad-build-test:{}", uuid::Uuid::new_v4().simple())
    }

    async fn named(name: String) -> Self {
        let id = docker(&["image", "inspect", "-f", "{{.Id}}", &name]).await.unwrap().parse().unwrap();
        Self { name, id }
    }

    pub(super) fn id(&self) -> Digest {
        self.id
    }

    /// Tags the image as `reference` and pushes that.
    pub(super) async fn push(&self, reference: &str) -> Result<String, String> {
        docker(&["tag", &self.name, reference]).await?;
        docker(&["push", reference]).await
    }

    /// Removes the image from the engine.
    pub(super) async fn forget(&self) {
        docker(&["rmi", "-f", &self.id.to_string()]).await.unwrap();
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        let id = self.id.to_string();
        Command::new("docker")
            .args(["rmi", "-f", &id])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .ok();
    }
}

fn tar_of(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for (name, bytes) in files {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        header.set_size(bytes.len() as u64);
        tar.append_data(&mut header, name, *bytes).unwrap();
    }
    tar.into_inner().unwrap()
}

/// Runs the `docker` program; gives what it printed, or why it failed.
pub(crate) async fn docker(arguments: &[&str]) -> Result<String, String> {
    let output = tokio::process::Command::new("docker")
        .args(arguments)
        .output()
        .await
        .expect("docker has to be installed");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
}

/// A file of so many MiB that nothing compresses.
pub(super) fn random_file(mib: u64) -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    let random = std::fs::File::open("/dev/urandom").unwrap();
    std::io::copy(&mut std::io::Read::take(random, mib * 1024 * 1024), &mut file).unwrap();
    file
}

/// Waits until `done` says so, and for at most 20 s.
pub(super) async fn wait_for(what: &str, done: impl AsyncFn() -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !done().await {
        assert!(Instant::now() < end, "waited in vain for {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// This process's memory.
pub(super) fn resident_mib() -> u64 {
    kilobytes(std::process::id()) / 1024
}

/// Watches this process's memory from a thread of its own.
pub(super) struct PeakMemory {
    shared: Arc<(AtomicBool, AtomicU64)>,
}

impl PeakMemory {
    pub(super) fn watch() -> Self {
        let shared = Arc::new((AtomicBool::new(true), AtomicU64::new(0)));
        let theirs = Arc::clone(&shared);
        std::thread::spawn(move || {
            while theirs.0.load(Ordering::Relaxed) {
                theirs.1.fetch_max(resident_mib(), Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        Self { shared }
    }

    /// The most that was seen, in MiB.
    pub(super) fn stop(self) -> u64 {
        self.shared.0.store(false, Ordering::Relaxed);
        self.shared.1.load(Ordering::Relaxed)
    }
}
