//! The few calls that a stack makes to its own agent.

use std::time::Duration;

use reqwest::{Client, Method};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::error::Error;

/// An agent's HTTP API. The agent is on this machine: a call takes 5 s at most.
#[derive(Clone, Debug)]
pub(super) struct Control {
    http: Client,
    base: String,
}

/// A job that may still run something.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct LiveJob {
    #[serde(rename = "ID")]
    pub(super) id: String,
    pub(super) namespace: String,
}

/// A node, and which of its drivers work.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Node {
    #[serde(rename = "ID")]
    pub(super) id: String,
    status: String,
    #[serde(default)]
    drivers: std::collections::BTreeMap<String, Driver>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Driver {
    healthy: bool,
}

impl Node {
    /// Is the node ready, with this driver working?
    pub(super) fn can_run(&self, driver: &str) -> bool {
        self.status == "ready" && self.drivers.get(driver).is_some_and(|driver| driver.healthy)
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Allocation {
    #[serde(default)]
    task_states: Option<std::collections::BTreeMap<String, TaskState>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct TaskState {
    #[serde(default)]
    events: Vec<Event>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Event {
    display_message: String,
}

impl Control {
    pub(super) fn new(base: &str) -> Result<Self, Error> {
        let http = Client::builder()
            .no_proxy()
            .timeout(Duration::from_secs(5))
            .build()
            .map_err(|source| Error::Nomad { doing: "making a client".into(), source })?;
        Ok(Self { http, base: base.to_owned() })
    }

    /// The ID of the agent's own node, known before it is registered.
    pub(super) async fn own_node(&self) -> Result<Option<String>, Error> {
        let agent: Value = self.get("asking the agent about itself", "/v1/agent/self", &[]).await?;
        Ok(agent["stats"]["client"]["node_id"].as_str().map(str::to_owned))
    }

    /// Every node that is registered: the agent's own, and those of earlier agents in the same data directory.
    pub(super) async fn nodes(&self) -> Result<Vec<Node>, Error> {
        self.get("listing the nodes", "/v1/nodes", &[]).await
    }

    /// Forgets a node, and takes what ran there as lost.
    pub(super) async fn purge(&self, node: &Node) -> Result<(), Error> {
        let doing = format!("purging node {}", node.id);
        self.send(&doing, Method::PUT, &format!("/v1/node/{}/purge", node.id), &[]).await?;
        Ok(())
    }

    /// The jobs that are not dead, of every namespace.
    pub(super) async fn live_jobs(&self) -> Result<Vec<LiveJob>, Error> {
        let query = [("namespace", "*"), ("filter", r#"Status != "dead""#)];
        self.get("listing the jobs", "/v1/jobs", &query).await
    }

    /// How many allocations have not ended, of every namespace.
    pub(super) async fn live_allocations(&self) -> Result<usize, Error> {
        let live = r#"ClientStatus == "running" or ClientStatus == "pending""#;
        let query = [("namespace", "*"), ("task_states", "false"), ("filter", live)];
        let found: Vec<Allocation> = self.get("listing the allocations", "/v1/allocations", &query).await?;
        Ok(found.len())
    }

    /// Stops a job; its record stays.
    pub(super) async fn stop(&self, job: &LiveJob) -> Result<(), Error> {
        let doing = format!("stopping job {} in namespace {}", job.id, job.namespace);
        let path = format!("/v1/job/{}", percent_encoded(&job.id));
        self.send(&doing, Method::DELETE, &path, &[("namespace", &job.namespace)]).await?;
        Ok(())
    }

    /// What Nomad said last of each task of a job, one line a task.
    pub(super) async fn last_words(&self, job: &str) -> Result<String, Error> {
        let path = format!("/v1/job/{job}/allocations");
        let found: Vec<Allocation> =
            self.get(&format!("listing the allocations of job {job}"), &path, &[]).await?;
        let lines = found.into_iter().flat_map(|allocation| allocation.task_states.unwrap_or_default());
        let lines = lines.filter_map(|(task, state)| {
            state.events.last().map(|event| format!("{task}: {}", event.display_message))
        });
        Ok(lines.collect::<Vec<_>>().join("\n"))
    }

    async fn get<T: DeserializeOwned>(
        &self,
        doing: &str,
        path: &str,
        query: &[(&str, &str)],
    ) -> Result<T, Error> {
        let answer = self.send(doing, Method::GET, path, query).await?;
        answer.json().await.map_err(|source| Error::Nomad { doing: doing.to_owned(), source })
    }

    async fn send(
        &self,
        doing: &str,
        method: Method,
        path: &str,
        query: &[(&str, &str)],
    ) -> Result<reqwest::Response, Error> {
        let request = self.http.request(method, format!("{}{path}", self.base)).query(query);
        let answer = request.send().await.and_then(reqwest::Response::error_for_status);
        answer.map_err(|source| Error::Nomad { doing: doing.to_owned(), source })
    }
}

/// A job ID may hold any character; in a path only these stand for themselves.
fn percent_encoded(text: &str) -> String {
    let encode = |byte: u8| match byte {
        b'-' | b'_' | b'.' | b'~' => char::from(byte).to_string(),
        _ if byte.is_ascii_alphanumeric() => char::from(byte).to_string(),
        _ => format!("%{byte:02X}"),
    };
    text.bytes().map(encode).collect()
}

#[cfg(test)]
mod tests {
    use super::percent_encoded;

    #[test]
    fn a_job_id_stays_one_path_segment() {
        assert_eq!(percent_encoded("nb-0193"), "nb-0193");
        assert_eq!(percent_encoded("a/b c?é"), "a%2Fb%20c%3F%C3%A9");
    }
}
