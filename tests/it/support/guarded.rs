//! A Nomad with ACLs on, and the policies that are shipped.

use std::path::{Path, PathBuf};
use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};

use super::agent::{Agent, wait_for};
use super::authority::Authority;
use super::vault::Vault;

/// The namespace of the policies.
pub(crate) const NAMESPACE: &str = "builds";

pub(crate) struct Guarded {
    agent: Agent,
    pub(crate) url: String,
    management: String,
    http: reqwest::Client,
}

/// A token: its secret and its accessor.
pub(crate) struct Token {
    pub(crate) secret: String,
    pub(crate) accessor: String,
}

impl Guarded {
    pub(crate) async fn start() -> Self {
        Self::start_in("", &[]).await
    }

    /// The same, with a node whose programs trust an authority and have further variables.
    pub(crate) async fn start_trusting(authority: &Authority, further: &[(&'static str, PathBuf)]) -> Self {
        let trusting = ["SSL_CERT_FILE", "GIT_SSL_CAINFO"].map(|name| (name, authority.file()));
        Self::start_in("", &[&trusting, further].concat()).await
    }

    /// One whose tasks are known to a Vault.
    pub(crate) async fn with_vault(vault: &Vault) -> Self {
        let guarded = Self::start_in(&vault.configuration(), &[]).await;
        vault.trust(&guarded.url);
        guarded
    }

    async fn start_in(further: &str, environment: &[(&'static str, PathBuf)]) -> Self {
        let mut agent = Agent::start_in(&format!("acl {{\n enabled = true\n}}\n{further}"), environment);
        agent.get_past_its_keyring().await;
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
        let [_, service, runner] = shipped_policies();
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

    /// Where it keeps everything.
    pub(crate) fn folder(&self) -> &Path {
        self.agent.folder()
    }

    /// Writes a Variable into the namespace of the policies.
    pub(crate) async fn write(&self, path: &str, items: &Value) {
        let body = json!({"Namespace": NAMESPACE, "Path": path, "Items": items});
        self.call(Method::PUT, &format!("var/{path}?namespace={NAMESPACE}"), &body).await;
    }

    /// The Variables that are there, but for those that are written for teams, and what the service is known by and tells.
    pub(crate) async fn left(&self) -> Vec<String> {
        let listed = self.call(Method::GET, "vars?namespace=*", &Value::Null).await;
        let paths = listed.as_array().unwrap().iter().map(|of| of["Path"].as_str().unwrap().to_owned());
        let is_own = |path: &String| {
            ["creds/", "nomad-build/reporter", "nomad-build/sweeps/"].iter().any(|own| path.starts_with(own))
        };
        paths.filter(|path| !is_own(path)).collect()
    }

    /// Adds a namespace of builds: what the service and its runners may do in the first one, they may do there, too.
    pub(crate) async fn add_namespace(&self, name: &str) {
        self.call(Method::PUT, &format!("namespace/{name}"), &json!({ "Name": name })).await;
        let [_, service, runner] = shipped_policies();
        let there = |rules: &str| rules.replace("namespace \"builds\"", &format!("namespace {name:?}"));
        let policy = json!({ "Name": "nomad-build", "Rules": format!("{service}\n{}", there(&service)) });
        self.call(Method::PUT, "acl/policy/nomad-build", &policy).await;
        let policy = format!("nomad-build-runner-{name}");
        let body = json!({ "Name": policy, "Rules": there(&runner), "JobACL": { "Namespace": name } });
        self.call(Method::PUT, &format!("acl/policy/{policy}"), &body).await;
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
    pub(crate) async fn token(&self) -> Token {
        self.token_of("nomad-build").await
    }

    /// A new token of somebody who has some rights in a namespace, as a policy's rules have them.
    pub(crate) async fn caller(&self, rules: &str) -> Token {
        let policy = self.policy(rules).await;
        self.token_of(&policy).await
    }

    /// The same, by a role that has the policy.
    pub(crate) async fn caller_by_role(&self, rules: &str) -> Token {
        let policy = self.policy(rules).await;
        let role = json!({"Name": policy, "Policies": [{"Name": policy}]});
        self.call(Method::PUT, "acl/role", &role).await;
        self.made(&json!({"Name": policy, "Type": "client", "Roles": [{"Name": policy}]})).await
    }

    async fn policy(&self, rules: &str) -> String {
        let policy = format!("caller-{}", uuid::Uuid::new_v4().simple());
        let body = json!({"Name": policy, "Rules": rules});
        self.call(Method::PUT, &format!("acl/policy/{policy}"), &body).await;
        policy
    }

    /// A new token of one of those who submit, by the policy that is shipped.
    pub(crate) async fn builder(&self) -> Token {
        self.builder_in(NAMESPACE).await
    }

    /// The same, for another namespace.
    pub(crate) async fn builder_in(&self, namespace: &str) -> Token {
        let [callers, ..] = shipped_policies();
        self.caller(&callers.replace("namespace \"builds\"", &format!("namespace {namespace:?}"))).await
    }

    /// The name of a policy of those who submit.
    pub(crate) async fn builders(&self) -> &'static str {
        let [callers, ..] = shipped_policies();
        let policy = json!({"Name": "builders", "Rules": callers});
        self.call(Method::PUT, "acl/policy/builders", &policy).await;
        "builders"
    }

    /// The token that may do everything.
    pub(crate) fn management(&self) -> &str {
        &self.management
    }

    async fn token_of(&self, policy: &str) -> Token {
        self.made(&json!({"Name": policy, "Type": "client", "Policies": [policy]})).await
    }

    async fn made(&self, token: &Value) -> Token {
        let made = self.call(Method::PUT, "acl/token", token).await;
        let text = |name: &str| made[name].as_str().unwrap().to_owned();
        Token { secret: text("SecretID"), accessor: text("AccessorID") }
    }

    pub(crate) async fn revoke(&self, token: &Token) {
        self.call(Method::DELETE, &format!("acl/token/{}", token.accessor), &Value::Null).await;
    }

    /// Remembers a job, to be stopped with the agent.
    pub(crate) fn owns(&self, job: &str) {
        self.agent.owns(job);
    }
}

/// The policies as they are shipped: the callers', the service's, and the runner's.
fn shipped_policies() -> [String; 3] {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/nomad-jobs/policies");
    ["builders", "service", "runner"]
        .map(|name| std::fs::read_to_string(format!("{folder}/{name}.hcl")).unwrap())
}
