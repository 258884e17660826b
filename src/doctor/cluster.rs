//! The service's side: its Nomad, its token, the nodes that builds may run on, the archive, the registries.

use std::collections::BTreeMap;
use std::time::Duration;

use chrono::{TimeDelta, Utc};
use secrecy::SecretString;
use uuid::Uuid;

use super::Report;
use crate::archive::Archive;
use crate::config::Config;
use crate::job::JobId;
use crate::nomad::{Capability, Client, DiskUsage, Error, Kind, NodeStub, fits};
use crate::registry::{self, Endpoint, PlainHttp};
use crate::render::Runner;
use crate::telemetry::chain;

/// How far apart clocks may be: outcomes, tickets and JWTs go by them.
const APART: TimeDelta = TimeDelta::seconds(5);

/// How long before its end a token is warned of.
const ENDS: TimeDelta = TimeDelta::days(1);

/// How long a registry is waited for.
const PATIENCE: registry::Limits = registry::Limits {
    attempt: Duration::from_secs(5),
    deadline: Duration::from_secs(10),
    stall: Duration::from_secs(10),
};

/// Where the policy is.
const SHIPPED: &str = "it is shipped as nomad-jobs/policies";

/// How full a node's disk may be, in percent, before its agent removes what has ended: `gc_disk_usage_threshold` and
/// `gc_inode_usage_threshold` of an agent that says nothing of them.
const FULL: DiskUsage = DiskUsage { bytes: 80.0, inodes: 70.0 };

/// What to do about a disk that is fuller.
const ROOM: &str =
    "make room there, set NOMAD_BUILD_ARCHIVE, or raise what its agent's configuration says of it";

struct Doctor<'a> {
    config: &'a Config,
    nomad: Client,
    /// The same, asked with a management token.
    manager: Option<Client>,
    /// The policies of the service's token, where that has any.
    own: Option<Vec<String>>,
    report: Report,
}

/// Looks at everything but the nodes' insides. A management token is asked with what the service's own may not.
///
/// # Errors
/// Where not even a client of Nomad can be made.
pub async fn examine(config: &Config, management: Option<SecretString>) -> Result<Report, Error> {
    let nomad = Client::new(&config.nomad)?;
    let manager = management.map(|token| nomad.with_token(Some(token)));
    let mut doctor = Doctor { config, nomad, manager, own: None, report: Report::default() };
    if doctor.nomad().await {
        let guarded = doctor.acls().await;
        if guarded {
            doctor.token().await;
        }
        for namespace in config.namespaces.iter() {
            doctor.rights(namespace).await;
            doctor.variables(namespace).await;
            if guarded {
                doctor.policies(namespace).await;
            }
        }
        doctor.nodes().await;
    }
    doctor.archive().await;
    doctor.registries().await;
    Ok(doctor.report)
}

impl Doctor<'_> {
    /// Whether Nomad answers.
    async fn nomad(&mut self) -> bool {
        match self.nomad.leader().await {
            Ok(leader) if !leader.is_empty() => self.report.good("nomad", format!("its leader is {leader}")),
            Ok(_) => self.report.bad("nomad", "it has no leader", "look at the logs of its servers"),
            Err(error) => {
                let remedy = "is NOMAD_ADDR right, and NOMAD_CACERT, and does Nomad run there?";
                self.report.bad("nomad", chain(&error), remedy);
                return false;
            }
        }
        match self.nomad.clock().await {
            Ok(Some(time)) => {
                let apart = (Utc::now() - time).abs();
                if apart > APART {
                    let message = format!("this machine's and Nomad's are {} s apart", apart.num_seconds());
                    self.report.warn(
                        "clock",
                        message,
                        "have both kept by NTP: times of phases, tickets and JWTs go by them",
                    );
                } else {
                    self.report.good("clock", "this machine's is Nomad's, to a few seconds");
                }
            }
            Ok(None) => self.report.unknown(
                "clock",
                "Nomad's answer has no Date",
                "is there a proxy that takes it away?",
            ),
            Err(error) => self.report.unknown("clock", chain(&error), "run this again"),
        }
        true
    }

    /// Whether Nomad has ACLs.
    async fn acls(&mut self) -> bool {
        match self.nomad.has_acls().await {
            Ok(true) => {
                self.report.good("acls", "Nomad has them: callers may do what their own tokens may");
                true
            }
            Ok(false) if self.config.open => {
                let message = "Nomad has none, and NOMAD_BUILD_OPEN is true: whoever reaches the service may do everything";
                self.report.warn("acls", message, "turn them on, where others than you reach it");
                false
            }
            Ok(false) if self.config.listen.ip().is_loopback() => {
                self.report.good("acls", "Nomad has none, and the service serves its own machine alone");
                false
            }
            Ok(false) => {
                let message = format!(
                    "Nomad has none, and NOMAD_BUILD_LISTEN is {}: nobody will be served",
                    self.config.listen
                );
                self.report.bad(
                    "acls",
                    message,
                    "turn them on, listen on a loopback address, or set NOMAD_BUILD_OPEN=true",
                );
                false
            }
            Err(error) => {
                self.report.unknown("acls", chain(&error), "run this again");
                true
            }
        }
    }

    async fn token(&mut self) {
        let report = &mut self.report;
        let remedy = "set NOMAD_TOKEN_FILE to a file with one that is good";
        match self.nomad.token().await {
            Ok(token) if token.accessor == "anonymous" => report.bad("token", "there is none", remedy),
            Ok(token) if token.kind == "management" => {
                let remedy = format!("give the service one that has what it needs and no more: {SHIPPED}");
                report.warn("token", "it is a management token, which may do everything", remedy);
            }
            Ok(token) => {
                match token.expiration_time.map(|end| end - Utc::now()) {
                    Some(left) if left < ENDS => {
                        let message = format!("it ends in {} minutes", left.num_minutes());
                        let remedy = "see to it that NOMAD_TOKEN_FILE gets a new one before: it is read again when it changes";
                        report.warn("token", message, remedy);
                    }
                    _ => report.good("token", "Nomad knows it"),
                }
                self.own = token.policies;
            }
            Err(error) if error.kind == Kind::Forbidden => {
                report.bad("token", "Nomad does not know it", remedy);
            }
            // What Nomad says of a workload's identity, which is none of its tokens.
            Err(error) if error.kind == Kind::NotFound => {
                report.good("token", "it is a workload's identity: what it is good for, the rights say");
            }
            Err(error) => report.unknown("token", chain(&error), "run this again"),
        }
    }

    /// What the service has to be able to do in a namespace.
    async fn rights(&mut self, namespace: &str) {
        let nomad = &self.nomad;
        let rights = [
            ("list-jobs", nomad.may_list_jobs(namespace).await),
            ("read-job", nomad.may(namespace, Capability::ReadJob).await),
            ("submit-job", nomad.may_submit(namespace, self.driver()).await),
            ("read-logs", nomad.may(namespace, Capability::ReadLogs).await),
        ];
        for (right, may) in rights {
            match may {
                Ok(true) => self.report.good("rights", format!("{right} in namespace {namespace:?}")),
                Ok(false) => {
                    let message = format!("the token lacks {right} in namespace {namespace:?}");
                    self.report.bad("rights", message, format!("add it to the service's policy: {SHIPPED}"));
                }
                Err(error) if matches!(error.kind, Kind::Undecided(_)) => {
                    self.report.unknown(
                        "rights",
                        format!("{right}: {}", chain(&error)),
                        "run this again after a build",
                    );
                }
                Err(error) => {
                    let remedy = format!("is there a namespace {namespace:?}? (nomad namespace list)");
                    self.report.bad("rights", format!("{right}: {}", chain(&error)), remedy);
                }
            }
        }
    }

    /// Writes, lists, reads and removes Variables where the service does.
    async fn variables(&mut self, namespace: &str) {
        let id = JobId::from_uuid(Uuid::new_v4());
        let ledger = format!("nomad-build/doctor/{}", Uuid::new_v4());
        let copy = format!("nomad/jobs/{id}/doctor");
        for (path, below, reads) in [(ledger, "nomad-build/*", true), (copy, "nomad/jobs/nb-*", false)] {
            match self.try_variable(namespace, &path, reads).await {
                Ok(()) => {
                    self.report.good("variables", format!("{below} in namespace {namespace:?} can be used"));
                }
                Err(error) => {
                    let remedy = format!(
                        "let the service's policy list, write and destroy {below}, and read nomad-build/*: {SHIPPED}"
                    );
                    self.report.bad("variables", error, remedy);
                }
            }
        }
    }

    async fn try_variable(&self, namespace: &str, path: &str, reads: bool) -> Result<(), String> {
        let nomad = &self.nomad;
        let items = BTreeMap::from([("doctor".to_owned(), "was here".to_owned())]);
        let tried = async {
            nomad.set_variable(namespace, path, &items).await?;
            if reads {
                nomad.variable(namespace, path).await?;
            }
            Ok::<_, Error>(nomad.variables(namespace, path).await?.value)
        };
        let tried = tried.await;
        // Also where no answer came.
        let removed = nomad.delete_variable(namespace, path).await;
        let listed = tried.map_err(|error| chain(&error))?;
        // Nomad leaves out of a list what may not be listed.
        if !listed.iter().any(|stub| stub.path == path) {
            return Err(format!("the token may not list {path} in namespace {namespace:?}"));
        }
        removed.map_err(|error| chain(&error))
    }

    /// Who else may register jobs among the builds, and whether their tasks may say how they ended.
    async fn policies(&mut self, namespace: &str) {
        let report = &mut self.report;
        let Some(manager) = &self.manager else {
            let message = format!("who may submit-job in namespace {namespace:?} is not known");
            report.unknown("policies", message, "run this once with --management-token-file");
            return;
        };
        let policies = match manager.policies().await {
            Ok(policies) => policies,
            Err(error) => {
                return report.unknown(
                    "policies",
                    chain(&error),
                    "is it a management token in --management-token-file?",
                );
            }
        };
        let own = self.own.as_deref().unwrap_or_default();
        let may = policies.iter().filter(|policy| policy.may_submit(namespace));
        let others: Vec<_> =
            may.map(|policy| policy.name.as_str()).filter(|name| own.iter().all(|own| own != name)).collect();
        if others.is_empty() {
            let message = format!("nobody but the service may register jobs in namespace {namespace:?}");
            report.good("policies", message);
        } else {
            let message =
                format!("{} let their holders register jobs in namespace {namespace:?}", others.join(", "));
            let remedy = "take it from whoever is not the service: who has it can overwrite a build and read the credentials of its tasks";
            report.warn("policies", message, remedy);
        }
        let is_runners =
            |of: &crate::nomad::Policy| of.workloads.as_ref().is_some_and(|of| of.namespace == namespace);
        if policies.iter().any(is_runners) {
            report.good("policies", format!("workloads of namespace {namespace:?} have a policy"));
        } else {
            let message = format!(
                "no policy is that of the workloads of namespace {namespace:?}: no phase can say how it ended"
            );
            report.bad("policies", message, format!("apply the runner's policy: {SHIPPED}"));
        }
    }

    /// By which driver phases are run, if the template is one of ours.
    fn driver(&self) -> &'static str {
        if matches!(self.config.render.runner, Runner::Image(_)) { "docker" } else { "raw_exec" }
    }

    /// Where builds may run.
    async fn nodes(&mut self) {
        let driver = self.driver();
        let asked = self.manager.as_ref().unwrap_or(&self.nomad).nodes().await;
        let report = &mut self.report;
        let nodes = match asked {
            Ok(nodes) => nodes,
            Err(error) if error.kind == Kind::Forbidden => {
                return report.unknown(
                    "nodes",
                    "the token may not list them, and need not",
                    "run this once with --management-token-file",
                );
            }
            Err(error) => return report.unknown("nodes", chain(&error), "run this again"),
        };
        let settings = &self.config.render;
        let may_run = |node: &&NodeStub| {
            let pool = settings.node_pool == "all" || node.node_pool == settings.node_pool;
            pool && settings.datacenters.iter().any(|of| fits(of, &node.datacenter))
        };
        let ours: Vec<_> = nodes.iter().filter(may_run).collect();
        let is_ready =
            |node: &&&NodeStub| node.status == "ready" && node.scheduling_eligibility == "eligible";
        let has_driver = |node: &&&NodeStub| {
            node.drivers.as_ref().and_then(|all| all.get(driver)).is_some_and(|driver| driver.healthy)
        };
        let pool = &settings.node_pool;
        let names =
            |nodes: &[&&NodeStub]| nodes.iter().map(|node| node.name.as_str()).collect::<Vec<_>>().join(", ");
        let ready: Vec<_> = ours.iter().filter(is_ready).collect();
        let able: Vec<_> = ready.iter().copied().filter(has_driver).collect();
        if able.is_empty() {
            let message = format!(
                "none of pool {pool:?} is ready and has the driver {driver}: of {} there are {} ready",
                ours.len(),
                ready.len()
            );
            let remedy = format!(
                "turn {driver} on in the configuration of their agents, or set NOMAD_BUILD_NODE_POOL and NOMAD_BUILD_DATACENTERS"
            );
            report.bad("nodes", message, remedy);
        } else {
            report.good("nodes", format!("builds may run on {}: run doctor --node there", names(&able)));
        }
        self.disks(&able).await;
        if !able.is_empty() && !self.config.policy.allowed.vault.is_empty() {
            self.vault(&able).await;
        }
    }

    /// Whether the nodes keep the logs of what has ended.
    async fn disks(&mut self, nodes: &[&&NodeStub]) {
        let nomad = self.manager.as_ref().unwrap_or(&self.nomad);
        for node in nodes {
            let name = &node.name;
            match nomad.node_disk(&node.id).await {
                Ok(None) => self.report.unknown("disk", format!("{name} has just started"), "run this again"),
                Ok(Some(disk)) => match full(disk) {
                    None => self.report.good("disk", format!("{name} has room to keep what has ended")),
                    Some(words) => self.report.warn("disk", format!("{name}'s disk {words}"), ROOM),
                },
                Err(error) => self.report.unknown("disk", chain(&error), "is its agent up?"),
            }
        }
    }

    /// Which of the nodes know a Vault, where secrets in one may be named.
    async fn vault(&mut self, nodes: &[&&NodeStub]) {
        let nomad = self.manager.as_ref().unwrap_or(&self.nomad);
        let mut without = Vec::new();
        for node in nodes {
            match nomad.node_attributes(&node.id).await {
                Ok(attributes) if attributes.contains_key("vault.version") => {}
                Ok(_) => without.push(node.name.as_str()),
                Err(error) => return self.report.unknown("vault", chain(&error), "run this again"),
            }
        }
        let remedy = "have their agents know it, or take NOMAD_BUILD_ALLOW_VAULT_PATHS away";
        if without.is_empty() {
            self.report.good("vault", "every node that builds may run on knows one");
        } else if without.len() < nodes.len() {
            let message =
                format!("{} know none: no job that names a secret there runs on them", without.join(", "));
            self.report.warn("vault", message, remedy);
        } else {
            let message =
                "no node that builds may run on knows one: jobs that name a secret there wait for a place";
            self.report.bad("vault", message, remedy);
        }
    }

    async fn archive(&mut self) {
        let report = &mut self.report;
        let Some(settings) = &self.config.archive else {
            let message = "there is none: logs and statuses last as long as Nomad keeps a job";
            return report.warn("archive", message, "set NOMAD_BUILD_ARCHIVE to keep them");
        };
        let tried = async {
            let archive = Archive::open(settings, &self.config.namespaces.first)?;
            archive.try_out(&JobId::from_uuid(Uuid::new_v4())).await
        };
        match tried.await {
            Ok(()) => report.good("archive", "it can be written to, read and cleared"),
            Err(error) => {
                report.bad(
                    "archive",
                    chain(&error),
                    "is NOMAD_BUILD_ARCHIVE right, and may its key do that?",
                );
            }
        }
    }

    /// Those that images may go to, where the operator says which.
    async fn registries(&mut self) {
        let plain = PlainHttp::hosts(self.config.insecure_registries.iter().cloned());
        for rule in &self.config.policy.allowed.registries {
            let host = rule.host();
            let asked = async {
                let endpoint = Endpoint::new(host, &plain).map_err(|error| chain(&error))?;
                let client =
                    registry::Client::with_limits(endpoint, None, PATIENCE).map_err(|error| chain(&error))?;
                let repository =
                    "nomad-build/doctor".parse().map_err(|error: registry::NameError| chain(&error))?;
                let tag = "none".parse().map_err(|error: registry::NameError| chain(&error))?;
                match client.head_manifest(&repository, &tag).await {
                    // What it says to somebody unknown does not matter: it speaks.
                    Ok(_) | Err(registry::Error::Unauthorized { .. } | registry::Error::NotFound { .. }) => {
                        Ok(())
                    }
                    Err(error) => Err(chain(&error)),
                }
            };
            match asked.await {
                Ok(()) => self.report.good("registry", format!("{host} answers")),
                Err(why) => {
                    let remedy = "nodes have to reach it, too; one without TLS belongs into NOMAD_BUILD_INSECURE_REGISTRIES";
                    self.report.bad("registry", format!("{host}: {why}"), remedy);
                }
            }
        }
    }
}

/// What follows from how full a disk is, where something does.
fn full(disk: DiskUsage) -> Option<String> {
    let (words, setting) = if disk.bytes > FULL.bytes {
        (format!("is {:.0} % full", disk.bytes), format!("gc_disk_usage_threshold ({} % ", FULL.bytes))
    } else if disk.inodes > FULL.inodes {
        let words = format!("has {:.0} % of its inodes in use", disk.inodes);
        (words, format!("gc_inode_usage_threshold ({} % ", FULL.inodes))
    } else {
        return None;
    };
    Some(format!(
        "{words}: past {setting}by default) the node removes ended jobs, and their logs with them, within a minute"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_full_where_nomad_begins_to_remove() {
        for (bytes, inodes, want) in [
            (80.0, 70.0, None),
            (80.4, 0.0, Some("is 80 % full: past gc_disk_usage_threshold (80 %")),
            (97.0, 99.0, Some("is 97 % full: past gc_disk_usage_threshold (80 %")),
            (0.0, 71.0, Some("has 71 % of its inodes in use: past gc_inode_usage_threshold (70 %")),
        ] {
            let found = full(DiskUsage { bytes, inodes });
            let is_right = match (&found, want) {
                (Some(found), Some(want)) => found.starts_with(want),
                (found, want) => found.is_none() && want.is_none(),
            };
            assert!(is_right, "{bytes} {inodes}: {found:?}");
        }
    }
}
