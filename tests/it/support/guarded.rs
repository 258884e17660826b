//! A Nomad with ACLs on, and the policies that the README gives its operators.

use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};

use super::agent::{Agent, wait_for};

/// The namespace of the README's policies.
pub(crate) const NAMESPACE: &str = "builds";

pub(crate) struct Guarded {
    agent: Agent,
    pub(crate) url: String,
    management: String,
    http: reqwest::Client,
}

/// A token of a service: its secret and its accessor.
pub(crate) struct ServiceToken {
    pub(crate) secret: String,
    accessor: String,
}

impl Guarded {
    pub(crate) async fn start() -> Self {
        let mut agent = Agent::start("acl {\n enabled = true\n}");
        let url = format!("http://{}", agent.address());
        let http = reqwest::Client::builder().no_proxy().tls_certs_only([]).build().unwrap();
        let bootstrapped = wait_for("a management token", Duration::from_mins(1), async || {
            let answer =
                http.put(format!("{url}/v1/acl/bootstrap")).send().await.ok()?.error_for_status().ok()?;
            answer.json::<Value>().await.ok()
        })
        .await;
        let management = bootstrapped["SecretID"].as_str().unwrap().to_owned();
        agent.token = Some(management.clone());
        agent.namespace = NAMESPACE;
        let guarded = Self { agent, url, management, http };
        guarded.call(Method::PUT, "namespace/builds", &json!({"Name": NAMESPACE})).await;
        let [service, runner] = readme_policies();
        let policy = json!({"Name": "nomad-build", "Rules": service});
        guarded.call(Method::PUT, "acl/policy/nomad-build", &policy).await;
        let policy =
            json!({"Name": "nomad-build-runner", "Rules": runner, "JobACL": {"Namespace": NAMESPACE}});
        guarded.call(Method::PUT, "acl/policy/nomad-build-runner", &policy).await;
        wait_for("a node that is ready", Duration::from_mins(1), async || {
            let nodes = guarded.call(Method::GET, "nodes", &Value::Null).await;
            nodes.as_array()?.iter().any(|node| node["Status"] == "ready").then_some(())
        })
        .await;
        guarded
    }

    /// Asks Nomad with every right.
    pub(crate) async fn call(&self, method: Method, path: &str, body: &Value) -> Value {
        let request = self.http.request(method, format!("{}/v1/{path}", self.url));
        let answer = request.header("X-Nomad-Token", &self.management).json(body).send().await.unwrap();
        let (status, text) = (answer.status(), answer.text().await.unwrap());
        assert!(status.is_success(), "{path}: {status} {text}");
        serde_json::from_str(&text).unwrap_or_default()
    }

    /// A new token with the service's policy.
    pub(crate) async fn token(&self) -> ServiceToken {
        let body = json!({"Name": "nomad-build", "Type": "client", "Policies": ["nomad-build"]});
        let made = self.call(Method::PUT, "acl/token", &body).await;
        let text = |name: &str| made[name].as_str().unwrap().to_owned();
        ServiceToken { secret: text("SecretID"), accessor: text("AccessorID") }
    }

    pub(crate) async fn revoke(&self, token: &ServiceToken) {
        self.call(Method::DELETE, &format!("acl/token/{}", token.accessor), &Value::Null).await;
    }

    /// Remembers a job, to be stopped with the agent.
    pub(crate) fn owns(&self, job: &str) {
        self.agent.owns(job);
    }
}

/// The policies as they stand there: the service's, and the runner's.
fn readme_policies() -> [String; 2] {
    let readme = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/README.md")).unwrap();
    let section = readme.split("### ACLs").nth(1).unwrap();
    let mut blocks =
        section.split("```hcl\n").skip(1).map(|rest| rest.split("```").next().unwrap().to_owned());
    [blocks.next().unwrap(), blocks.next().unwrap()]
}
