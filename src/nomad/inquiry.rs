//! What an operator wants to know of a Nomad before anything is built: its clock, its nodes, and what a token may do.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use reqwest::Method;
use serde::Deserialize;
use serde_json::{Value, json};

use super::acl::{NOBODY, whose};
use super::client::{Client, Request};
use super::error::{Error, Kind};

/// How long an answer that says the time may take.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(10);

/// A token, as it is told to itself.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct TokenInfo {
    /// What names it; `anonymous` for who has none.
    #[serde(rename = "AccessorID")]
    pub accessor: String,
    /// The names of its policies.
    #[serde(default)]
    pub policies: Option<Vec<String>>,
    /// Its roles.
    #[serde(default)]
    pub(super) roles: Option<Vec<RoleLink>>,
    /// `client` or `management`.
    #[serde(rename = "Type")]
    pub kind: String,
    /// When it ends; never without.
    #[serde(default)]
    pub expiration_time: Option<DateTime<Utc>>,
}

/// A role, as a token names it.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct RoleLink {
    #[serde(rename = "ID")]
    pub(super) id: String,
}

/// How full a disk is, in percent.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct DiskUsage {
    /// Of its bytes.
    #[serde(rename = "UsedPercent")]
    pub bytes: f64,
    /// Of its inodes.
    #[serde(rename = "InodesUsedPercent")]
    pub inodes: f64,
}

/// A node, as a list shows it.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct NodeStub {
    /// Its ID.
    #[serde(rename = "ID")]
    pub id: String,
    /// Its name.
    pub name: String,
    /// Its datacenter.
    #[serde(default)]
    pub datacenter: String,
    /// Its pool.
    #[serde(default)]
    pub node_pool: String,
    /// `ready`, for example.
    pub status: String,
    /// Whether anything is placed there.
    #[serde(default)]
    pub scheduling_eligibility: String,
    /// Its drivers.
    #[serde(default)]
    pub drivers: Option<BTreeMap<String, Driver>>,
}

/// A driver of a node.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Driver {
    /// Whether tasks can be started by it.
    #[serde(default)]
    pub healthy: bool,
}

fn register_nothing(namespace: &str, driver: &str) -> Result<Request, Error> {
    let doing = format!("trying whether a token has submit-job in namespace {namespace:?}");
    let task = json!({"Name": NOBODY, "Driver": driver, "Config": {"image": NOBODY, "command": "/bin/true"}});
    let job = json!({
        "ID": NOBODY, "Name": NOBODY, "Type": "batch", "Namespace": namespace, "Datacenters": ["*"],
        "TaskGroups": [{"Name": NOBODY, "Count": 0, "Tasks": [task]}],
    });
    // The index of a job that is not there: Nomad looks at the token, and then refuses it.
    Request::new(Method::POST, &["jobs"], doing)
        .query("namespace", namespace)
        .json(&json!({"Job": job, "EnforceIndex": true, "JobModifyIndex": 1}))
}

/// Whether it was allowed, where what was asked for does not matter.
fn allowed<T>(answer: Result<T, Error>) -> Result<bool, Error> {
    match answer {
        Ok(_) => Ok(true),
        Err(error) if error.kind == Kind::Forbidden => Ok(false),
        Err(error) => Err(error),
    }
}

impl Client {
    /// What Nomad's clock says, to the second.
    pub async fn clock(&self) -> Result<Option<DateTime<Utc>>, Error> {
        let request = Request::get(&["status", "leader"], "asking Nomad for the time".to_owned());
        let answer = self.open(request, PATIENCE).await?;
        let date = answer.headers().get(reqwest::header::DATE).and_then(|date| date.to_str().ok());
        let date = date.and_then(|date| DateTime::parse_from_rfc2822(date).ok());
        Ok(date.map(|date| date.to_utc()))
    }

    /// This client's token. [`super::Kind::Forbidden`] where Nomad does not know it.
    pub async fn token(&self) -> Result<TokenInfo, Error> {
        Ok(self.call(whose()).await?.value)
    }

    /// Whether this client's token may list the jobs of a namespace.
    pub async fn may_list_jobs(&self, namespace: &str) -> Result<bool, Error> {
        allowed(self.jobs(namespace, NOBODY).await)
    }

    /// Whether it may register jobs there, by a driver: one is tried that Nomad refuses for another reason.
    pub async fn may_submit(&self, namespace: &str, driver: &str) -> Result<bool, Error> {
        match self.call::<Value>(register_nothing(namespace, driver)?).await {
            Err(error) if error.kind == Kind::Conflict => Ok(true),
            answer => allowed(answer),
        }
    }

    /// The nodes. It takes `node:read`.
    pub async fn nodes(&self) -> Result<Vec<NodeStub>, Error> {
        Ok(self.call(Request::get(&["nodes"], "listing the nodes".to_owned())).await?.value)
    }

    /// What a node's agent found out about it. It takes `node:read`.
    pub async fn node_attributes(&self, id: &str) -> Result<BTreeMap<String, String>, Error> {
        #[derive(Deserialize)]
        #[serde(rename_all = "PascalCase")]
        struct Node {
            #[serde(default)]
            attributes: BTreeMap<String, String>,
        }
        let node: Node = self.call(Request::get(&["node", id], format!("reading node {id}"))).await?.value;
        Ok(node.attributes)
    }

    /// How full the disk of a node's allocations is, once its agent has looked. It takes `node:read`.
    pub async fn node_disk(&self, id: &str) -> Result<Option<DiskUsage>, Error> {
        #[derive(Deserialize)]
        struct Stats {
            #[serde(rename = "AllocDirStats")]
            disk: Option<DiskUsage>,
        }
        let request = Request::get(&["client", "stats"], format!("asking node {id} for its disk"));
        let stats: Stats = self.call(request.query("node_id", id)).await?.value;
        Ok(stats.disk)
    }
}
