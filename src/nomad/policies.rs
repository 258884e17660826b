//! ACL policies, read as Nomad reads them.
//!
//! Source: Nomad 1.11, `acl/acl.go` and `acl/policy.go`.

use std::collections::BTreeSet;

use serde::Deserialize;

use super::acl::Capability;
use super::client::{Client, Request};
use super::error::{Error, Kind};

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Named {
    name: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Role {
    #[serde(default)]
    policies: Option<Vec<Named>>,
}

/// An ACL policy.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Policy {
    /// Its name.
    pub name: String,
    /// The workloads that have it by themselves.
    #[serde(default, rename = "JobACL")]
    pub workloads: Option<Workloads>,
    /// What it allows, as Nomad read it.
    #[serde(default, rename = "RulesJSON")]
    rules: Option<Rules>,
}

/// Which workloads have a policy.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Workloads {
    /// Those of this namespace.
    #[serde(default)]
    pub namespace: String,
    /// Of this job alone; of all without.
    #[serde(default, rename = "JobID")]
    pub job: String,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Rules {
    #[serde(default)]
    namespaces: Option<Vec<NamespaceRule>>,
}

/// Of one namespace, or of those that fit a name with `*`. Nomad has put into `capabilities` what `policy = "write"` and its like
/// stand for.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct NamespaceRule {
    name: String,
    #[serde(default)]
    capabilities: Option<Vec<String>>,
}

impl NamespaceRule {
    fn has(&self, name: &str) -> bool {
        self.capabilities.iter().flatten().any(|capability| capability == name)
    }

    /// How much of a namespace's name its stars stand for.
    fn distance(&self, namespace: &str) -> usize {
        (namespace.len() + self.name.matches('*').count()).saturating_sub(self.name.len())
    }
}

impl Policy {
    /// Whether it lets its holders register jobs in a namespace.
    pub fn may_submit(&self, namespace: &str) -> bool {
        let policies = std::slice::from_ref(self);
        ["submit-job", "register-job"].into_iter().any(|name| allow(policies, namespace, name))
    }
}

/// Whether policies together allow something in a namespace: the rules of its own name, else those of the name with stars that is
/// closest to it; and one that denies is enough.
fn allow(policies: &[Policy], namespace: &str, capability: &str) -> bool {
    let rules = policies.iter().filter_map(|policy| policy.rules.as_ref()?.namespaces.as_ref()).flatten();
    let mut fitting: Vec<_> = rules.filter(|rule| fits(&rule.name, namespace)).collect();
    if fitting.iter().any(|rule| rule.name == namespace) {
        fitting.retain(|rule| rule.name == namespace);
    }
    let closest = fitting.iter().map(|rule| rule.distance(namespace)).min();
    fitting.retain(|rule| Some(rule.distance(namespace)) == closest);
    // Of names that are as close as each other Nomad takes any.
    let names: BTreeSet<_> = fitting.iter().map(|rule| rule.name.as_str()).collect();
    let of_each =
        names.iter().all(|name| fitting.iter().any(|rule| rule.name == *name && rule.has(capability)));
    !names.is_empty() && of_each && !fitting.iter().any(|rule| rule.has("deny"))
}

/// What Nomad takes for a capability: who may read files may read logs.
fn sufficient(capability: Capability) -> &'static [&'static str] {
    match capability {
        Capability::ReadJob => &["read-job"],
        Capability::DispatchJob => &["dispatch-job"],
        Capability::ReadLogs => &["read-logs", "read-fs"],
    }
}

/// Whether a name of a rule, in which `*` is any text, is that of a namespace.
pub fn fits(pattern: &str, name: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == name,
        Some((begin, rest)) => name.strip_prefix(begin).is_some_and(|left| {
            (0..=left.len()).filter(|at| left.is_char_boundary(*at)).any(|at| fits(rest, &left[at..]))
        }),
    }
}

impl Client {
    /// Every ACL policy. It takes a management token.
    pub async fn policies(&self) -> Result<Vec<Policy>, Error> {
        let listed = Request::get(&["acl", "policies"], "listing the ACL policies".to_owned());
        let listed = self.call::<Vec<Named>>(listed).await?.value;
        self.policies_of(listed.into_iter().map(|Named { name }| name)).await
    }

    async fn policies_of(&self, names: impl IntoIterator<Item = String>) -> Result<Vec<Policy>, Error> {
        let mut policies = Vec::new();
        for name in names {
            let read = Request::get(&["acl", "policy", &name], format!("reading ACL policy {name:?}"));
            match self.call(read).await {
                Ok(policy) => policies.push(policy.value),
                // One that a token names and that nobody wrote allows nothing.
                Err(error) if error.kind == Kind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(policies)
    }

    /// What this client's token may do in a namespace by the word of its policies, which it may read itself; none where it is no
    /// ACL token.
    pub(super) async fn may_by_its_policies(
        &self,
        namespace: &str,
        capability: Capability,
    ) -> Result<Option<bool>, Error> {
        let token = match self.token().await {
            Ok(token) => token,
            Err(error) if error.kind == Kind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        if token.kind == "management" {
            return Ok(Some(true));
        }
        let mut names: BTreeSet<String> = token.policies.into_iter().flatten().collect();
        for role in token.roles.into_iter().flatten() {
            let read = Request::get(&["acl", "role", &role.id], format!("reading ACL role {:?}", role.id));
            let Role { policies } = self.call(read).await?.value;
            names.extend(policies.into_iter().flatten().map(|Named { name }| name));
        }
        let policies = self.policies_of(names).await?;
        Ok(Some(sufficient(capability).iter().any(|name| allow(&policies, namespace, name))))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn policy(rules: &Value) -> Policy {
        serde_json::from_value(json!({"Name": "p", "RulesJSON": {"Namespaces": rules}})).unwrap()
    }

    #[test]
    fn who_may_submit_is_said_by_the_rule_that_fits_best() {
        let write = json!(["read-job", "submit-job", "read-logs"]);
        for (rules, want) in [
            (json!([{"Name": "builds", "Policy": "write", "Capabilities": write}]), true),
            (json!([{"Name": "builds", "Capabilities": ["register-job"]}]), true),
            (json!([{"Name": "builds", "Capabilities": ["read-job"]}]), false),
            (json!([{"Name": "*", "Capabilities": write}]), true),
            (
                json!([{"Name": "*", "Capabilities": write}, {"Name": "builds", "Capabilities": ["read-job"]}]),
                false,
            ),
            (json!([{"Name": "bu*", "Capabilities": ["deny"]}, {"Name": "*", "Capabilities": write}]), false),
            (json!([{"Name": "b*d*s", "Capabilities": write}]), true),
            (json!([{"Name": "b*x*s", "Capabilities": write}]), false),
            (json!([{"Name": "builds", "Capabilities": ["submit-job", "deny"]}]), false),
            (json!([{"Name": "other", "Capabilities": write}]), false),
            (json!(null), false),
        ] {
            assert_eq!(policy(&rules).may_submit("builds"), want, "{rules}");
        }
    }

    #[test]
    fn policies_together_allow_what_one_of_them_does_unless_one_denies_it() {
        let one = |name: &str, capabilities: &[&str]| {
            policy(&json!([{"Name": name, "Capabilities": capabilities}]))
        };
        for (policies, want) in [
            (vec![], false),
            (vec![one("builds", &["read-job"]), one("builds", &["read-logs"])], true),
            (vec![one("builds", &["read-logs"]), one("builds", &["deny"])], false),
            // A name of its own comes before every star, whatever those say.
            (vec![one("builds", &["read-job"]), one("build*", &["read-logs"])], false),
            (vec![one("builds", &["read-logs"]), one("*", &["deny"])], true),
            (vec![one("*", &["read-logs"]), one("bu*", &["read-job"])], false),
            (vec![one("*", &["read-job"]), one("bu*", &["read-logs"])], true),
            (vec![one("buil*", &["read-logs"]), one("*ilds", &["read-job"])], false),
            (vec![one("buil*", &["read-logs"]), one("*ilds", &["read-logs"])], true),
        ] {
            assert_eq!(allow(&policies, "builds", "read-logs"), want, "{policies:?}");
        }
    }
}
