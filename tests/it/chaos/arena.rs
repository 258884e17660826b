//! Where it happens: three Nomad servers, a node, three replicas of the service, and a proxy before each.

use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use reqwest::Method;
use serde_json::Value;
use tempfile::TempDir;

use crate::support::agent::wait_for;
use crate::support::{Api, Cluster, Faults, Service, world};

pub(super) const REPLICAS: usize = 3;

struct Replica {
    service: Option<Service>,
    /// How often it was started.
    starts: usize,
}

pub(super) struct Arena {
    pub(super) cluster: Cluster,
    /// What each replica sees of Nomad.
    pub(super) ways: Vec<Faults>,
    replicas: Vec<Mutex<Replica>>,
    archive: TempDir,
    /// Held by who does something to the node.
    node: tokio::sync::Mutex<()>,
}

impl Arena {
    pub(super) async fn start() -> Self {
        let cluster = Cluster::start().await;
        let mut ways = Vec::new();
        for _ in 0..REPLICAS {
            ways.push(Faults::before(&cluster.url).await);
        }
        let replicas = (0..REPLICAS).map(|_| Mutex::new(Replica { service: None, starts: 0 })).collect();
        let archive = tempfile::tempdir().unwrap();
        let arena = Self { cluster, ways, replicas, archive, node: tokio::sync::Mutex::default() };
        for number in 0..REPLICAS {
            arena.revive(number);
        }
        arena
    }

    fn replica(&self, number: usize) -> MutexGuard<'_, Replica> {
        self.replicas[number].lock().unwrap()
    }

    /// A replica's address, and how often it was started; none while it is dead.
    pub(super) fn address(&self, number: usize) -> Option<(String, usize)> {
        let replica = self.replica(number);
        replica.service.as_ref().map(|service| (service.url.clone(), replica.starts))
    }

    /// Ends a replica at once.
    pub(super) fn kill(&self, number: usize) {
        if let Some(mut service) = self.replica(number).service.take() {
            service.kill();
        }
    }

    /// Starts a replica, where it is dead; it may not be ready for long.
    pub(super) fn revive(&self, number: usize) {
        let mut replica = self.replica(number);
        if replica.service.is_none() {
            let archive = format!("file://{}", self.archive.path().display());
            let variables = [("NOMAD_BUILD_ARCHIVE", archive.as_str())];
            let nomad = &self.ways[number].url;
            let start = || Service::start_unready(nomad, &world().registry, &variables);
            replica.service = Some(tokio::task::block_in_place(start));
            replica.starts += 1;
        }
    }

    /// Reboots the node, and tells when that begins and when it is over.
    pub(super) async fn reboot(&self, tell: impl Fn(&str)) {
        let _alone = self.node.lock().await;
        tell("");
        self.cluster.reboot_client().await;
        self.has_its_node().await;
        tell(" is over");
    }

    /// Cuts the node's agent off for a while, and tells when that begins and when it is over.
    pub(super) async fn cut_node_off(&self, lasts: Duration, tell: impl Fn(&str)) {
        let _alone = self.node.lock().await;
        tell("");
        self.cluster.cut_client_off(true);
        tokio::time::sleep(lasts).await;
        self.cluster.cut_client_off(false);
        self.has_its_node().await;
        tell(" is over");
    }

    /// Waits until Nomad takes the node for ready, by the word of the node's own agent.
    async fn has_its_node(&self) {
        wait_for("node that is ready", Duration::from_mins(5), async || {
            let nodes = self.nomad(Method::GET, "/v1/nodes", None).await?;
            nodes.as_array()?.iter().all(|node| node["Status"] == "ready").then_some(())
        })
        .await;
    }

    /// Asks Nomad itself; none where it does not answer so.
    pub(super) async fn nomad(&self, method: Method, path: &str, body: Option<&Value>) -> Option<Value> {
        let (status, answer) = Api::new(&self.cluster.url).try_call(method, path, body).await?;
        status.is_success().then_some(answer)
    }
}
