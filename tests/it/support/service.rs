//! The service as a program of its own, so that it can be killed like one.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};

/// A running service. Dropped, it is killed.
pub(crate) struct Service {
    child: Child,
    pub(crate) url: String,
    said: Arc<Mutex<String>>,
}

impl Service {
    /// Starts a service on a free port, with further variables, and waits until it is ready.
    pub(crate) fn start(nomad: &str, registry: &str, variables: &[(&str, &str)]) -> Self {
        let service = Self::start_unready(nomad, registry, variables);
        service.wait_until_ready();
        service
    }

    /// Starts a service, and waits only until it listens.
    pub(crate) fn start_unready(nomad: &str, registry: &str, variables: &[(&str, &str)]) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_nomad-build"))
            .args(["serve", "--while-stdin-open"])
            .env("NOMAD_ADDR", nomad)
            .env("NOMAD_BUILD_LISTEN", "127.0.0.1:0")
            .env("NOMAD_BUILD_ALLOW_REPO_SCHEMES", "https,ssh,http,file")
            .env("NOMAD_BUILD_INSECURE_REGISTRIES", registry)
            .env("NOMAD_BUILD_ENGINE_SOCKET", super::engine_socket())
            .env("NOMAD_BUILD_LOG_FORMAT", "json")
            // All tests are one address.
            .env("NOMAD_BUILD_MAX_RATE", "0")
            .envs(variables.iter().copied())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let address = loop {
            let Some(line) = lines.next() else { panic!("the service ended before it served") };
            let line: serde_json::Value = serde_json::from_str(&line.unwrap()).unwrap_or_default();
            if line["fields"]["message"] == "serving" {
                break line["fields"]["address"].as_str().unwrap().to_owned();
            }
        };
        // Its log is read on, or it would block; it is shown where a test fails, as tests' output is.
        let said = Arc::<Mutex<String>>::default();
        let heard = Arc::clone(&said);
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                eprintln!("{line}");
                *heard.lock().unwrap() += &(line + "\n");
            }
        });
        Self { child, url: format!("http://{address}"), said }
    }

    fn wait_until_ready(&self) {
        crate::stack::wait_for("the service is ready", std::time::Duration::from_secs(30), || {
            let mut stream = std::net::TcpStream::connect(self.url.strip_prefix("http://")?).ok()?;
            let mut answer = String::new();
            let request = b"GET /ready HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
            std::io::Write::write_all(&mut stream, request).ok()?;
            std::io::Read::read_to_string(&mut stream, &mut answer).ok()?;
            answer.starts_with("HTTP/1.1 200").then_some(())
        });
    }

    /// The number of its process.
    pub(crate) fn process(&self) -> u32 {
        self.child.id()
    }

    /// Its log.
    pub(crate) fn said(&self) -> String {
        self.said.lock().unwrap().clone()
    }

    /// What it says of a metric, by its name and labels as they are written; none where it says nothing.
    pub(crate) async fn metric(&self, name: &str) -> Option<u64> {
        let text = reqwest::get(format!("{}/metrics", self.url)).await.unwrap().text().await.unwrap();
        text.lines().find_map(|line| line.strip_prefix(name))?.trim().parse().ok()
    }

    /// How often it has listed everything, of the jobs.
    pub(crate) async fn lists(&self) -> Option<u64> {
        self.metric("nomad_build_watch_list_duration_seconds_count{part=\"jobs\"}").await
    }

    /// Tells it to stop, and waits until it has; how it ended.
    pub(crate) async fn stop(mut self) -> std::process::ExitStatus {
        let pid = nix::unistd::Pid::from_raw(self.child.id().try_into().unwrap());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
        super::eventually("the service has stopped", async || self.child.try_wait().unwrap()).await
    }

    /// Ends it at once, as a crash does.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        // Ended already, where a test killed it.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}
