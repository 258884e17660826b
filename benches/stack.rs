//! What is measured on: a stack of `nomad-build dev`, a repository, a base image.

use std::path::Path;
use std::process::Stdio;

use anyhow::{Context as _, bail, ensure};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, Command};

/// The program that is measured.
pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_nomad-build");

/// What a submission may ask for here: more than any node has, so that a job can be made to wait.
pub(crate) const MOST_CPU: u32 = 4_000_000;

/// A running stack. It ends with this process, however that ends, as its stdin closes then.
pub(crate) struct Stack {
    program: Child,
    pub(crate) api: String,
    pub(crate) registry: String,
    pub(crate) nomad: String,
    pub(crate) repository: TempDir,
    pub(crate) http: reqwest::Client,
}

impl Stack {
    pub(crate) async fn start() -> anyhow::Result<Self> {
        let (program, line) = ready().await?;
        let field = |name: &str| {
            let found = line.split_whitespace().find_map(|field| field.strip_prefix(name));
            found.map(str::to_owned).with_context(|| format!("no {name} in {line:?}"))
        };
        let (api, registry, nomad) = (field("api=")?, field("registry=")?, field("nomad=")?);
        let base =
            said(Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tools/base-image")).arg(&registry))
                .await?;
        let http = reqwest::Client::builder().tls_certs_only([]).no_proxy().build()?;
        let repository = repository(&base).await?;
        Ok(Self { program, api, registry, nomad, repository, http })
    }

    /// Lets go of the stack and waits until it is down.
    pub(crate) async fn stop(mut self) -> anyhow::Result<()> {
        drop(self.program.stdin.take());
        let status = self.program.wait().await?;
        ensure!(status.success(), "the stack ended with {status}");
        Ok(())
    }

    /// The submission that is measured.
    pub(crate) fn submission(&self) -> Value {
        json!({
            "owner": "bench",
            "repo_url": self.repository_url(),
            "image_tags": ["ours"],
            "registry_url": self.registry,
            "image_name": "bench/ours",
            "test_commands": ["test -e /built"],
        })
    }

    pub(crate) fn repository_url(&self) -> String {
        format!("file://{}", self.repository.path().display())
    }

    /// Submits a job; returns its ID.
    pub(crate) async fn submit(&self, submission: &Value) -> anyhow::Result<String> {
        let answer = self.http.post(format!("{}/jobs", self.api)).json(submission).send().await?;
        let answer: Value = answer.json().await?;
        let id = answer["data"]["job_id"].as_str();
        Ok(id.with_context(|| format!("the submission was refused: {answer}"))?.to_owned())
    }
}

/// Starts the program as a stack; returns it with the line by which it says that all is up.
async fn ready() -> anyhow::Result<(Child, String)> {
    let mut program = Command::new(PROGRAM)
        .args(["dev", "--while-stdin-open"])
        .env("NOMAD_BUILD_MAX_CPU", MOST_CPU.to_string())
        .env("NOMAD_BUILD_LOG", "warn")
        // Counted, as it is by default, and not refused.
        .env("NOMAD_BUILD_MAX_RATE", "1000000")
        .env("RUST_LOG", "warn")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("starting nomad-build dev")?;
    let stdout = program.stdout.take().context("the stack has no stdout")?;
    let mut line = String::new();
    BufReader::new(stdout).read_line(&mut line).await?;
    Ok((program, line))
}

/// Runs a command to its end; returns what it said.
pub(crate) async fn said(command: &mut Command) -> anyhow::Result<String> {
    let output = command.stdin(Stdio::null()).kill_on_drop(true).output().await;
    let output = output.with_context(|| format!("running {command:?}"))?;
    if !output.status.success() {
        bail!("{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}

async fn repository(base: &str) -> anyhow::Result<TempDir> {
    let folder = tempfile::tempdir()?;
    let dockerfile = format!("FROM {base}\nCOPY greeting /greeting\nRUN cp /greeting /built\n");
    std::fs::write(folder.path().join("Dockerfile"), dockerfile)?;
    std::fs::write(folder.path().join("greeting"), "hello\n")?;
    for arguments in [
        &["init", "--quiet", "--initial-branch=main"][..],
        &["add", "--all"],
        &["commit", "--quiet", "--message=x"],
    ] {
        git(folder.path(), arguments).await?;
    }
    Ok(folder)
}

async fn git(folder: &Path, arguments: &[&str]) -> anyhow::Result<()> {
    let mut git = Command::new("git");
    git.args(["-c", "user.name=bench", "-c", "user.email=bench@localhost"])
        .args(arguments)
        .current_dir(folder);
    said(&mut git).await.map(drop)
}
