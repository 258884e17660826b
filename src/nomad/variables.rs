//! Variables: Nomad's own small store, with compare-and-set.

use std::collections::BTreeMap;
use std::time::Duration;

use reqwest::Method;
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::{Value, json};

use super::client::{Client, Request};
use super::error::{Error, Kind};
use super::types::{Indexed, Variable, VariableStub};

/// What became of a compare-and-set.
#[derive(Debug)]
pub enum Put {
    /// It was written, with this index.
    Written(u64),
    /// Somebody else was first.
    Conflict,
}

/// A lock that is held until its time runs out or it is renewed.
#[derive(Debug)]
pub struct Lock {
    id: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Locked {
    lock: LockBody,
}

#[derive(Deserialize)]
struct LockBody {
    #[serde(rename = "ID")]
    id: String,
}

/// A lock's operation is a flag of the query, which Nomad reads whatever its value.
fn lock(namespace: &str, variable: &str, operation: &'static str, body: &Value) -> Result<Request, Error> {
    let doing = format!("{operation} of Variable {variable} of namespace {namespace:?}");
    Request::new(Method::PUT, &path(variable), doing)
        .query("namespace", namespace)
        .query(operation, "")
        .json(body)
}

fn path(variable: &str) -> Vec<&str> {
    std::iter::once("var").chain(variable.split('/')).collect()
}

fn delete(namespace: &str, variable: &str) -> Request {
    let doing = format!("removing Variable {variable} of namespace {namespace:?}");
    Request::new(Method::DELETE, &path(variable), doing).query("namespace", namespace)
}

fn list(namespace: &str, prefix: &str) -> Request {
    let doing = format!("listing the Variables {prefix}* of namespace {namespace:?}");
    Request::get(&["vars"], doing).query("namespace", namespace).query("prefix", prefix)
}

fn list_from(namespace: &str, prefix: &str, from: &str) -> Request {
    list(namespace, prefix).query("next_token", format_args!("{namespace}.{from}"))
}

fn put(
    namespace: &str,
    variable: &str,
    items: &BTreeMap<String, String>,
    cas: Option<u64>,
) -> Result<Request, Error> {
    let doing = format!("writing Variable {variable} of namespace {namespace:?}");
    let mut request = Request::new(Method::PUT, &path(variable), doing).query("namespace", namespace);
    if let Some(index) = cas {
        request = request.query("cas", index);
    }
    request.json(&json!({"Namespace": namespace, "Path": variable, "Items": items}))
}

impl Client {
    /// Writes a Variable if its index is still the one given; 0 is "does not exist".
    pub async fn put_variable(
        &self,
        namespace: &str,
        variable: &str,
        items: &BTreeMap<String, String>,
        cas: u64,
    ) -> Result<Put, Error> {
        match self.call::<Variable>(put(namespace, variable, items, Some(cas))?).await {
            Ok(written) => Ok(Put::Written(written.value.modify_index)),
            Err(Error { kind: Kind::Conflict, .. }) => Ok(Put::Conflict),
            Err(error) => Err(error),
        }
    }

    /// Writes a Variable, whatever is there.
    pub async fn set_variable(
        &self,
        namespace: &str,
        variable: &str,
        items: &BTreeMap<String, String>,
    ) -> Result<(), Error> {
        self.call::<Variable>(put(namespace, variable, items, None)?).await.map(drop)
    }

    /// Reads a Variable; none where there is none.
    pub async fn variable(&self, namespace: &str, variable: &str) -> Result<Option<Variable>, Error> {
        let doing = format!("reading Variable {variable} of namespace {namespace:?}");
        match self.call(Request::get(&path(variable), doing).query("namespace", namespace)).await {
            Ok(read) => Ok(Some(read.value)),
            Err(Error { kind: Kind::NotFound, .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Removes a Variable; it is no error if there is none.
    pub async fn delete_variable(&self, namespace: &str, variable: &str) -> Result<(), Error> {
        match self.order(delete(namespace, variable)).await {
            Ok(()) | Err(Error { kind: Kind::NotFound, .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Removes a Variable if its index is still the one given; one that is gone counts as removed.
    pub async fn delete_variable_at(
        &self,
        namespace: &str,
        variable: &str,
        index: u64,
    ) -> Result<Put, Error> {
        let request = delete(namespace, variable).query("cas", index);
        match self.order(request).await {
            Ok(()) | Err(Error { kind: Kind::NotFound, .. }) => Ok(Put::Written(index)),
            Err(Error { kind: Kind::Conflict, .. }) => Ok(Put::Conflict),
            Err(error) => Err(error),
        }
    }

    /// The Variables below a prefix.
    pub async fn variables(
        &self,
        namespace: &str,
        prefix: &str,
    ) -> Result<Indexed<Vec<VariableStub>>, Error> {
        self.call(list(namespace, prefix)).await
    }

    /// The same, but those whose paths sort before one are passed over: Nomad's pages are in the order of paths, and
    /// a page's token is the namespace and the path that it begins with.
    pub async fn variables_from(
        &self,
        namespace: &str,
        prefix: &str,
        from: &str,
    ) -> Result<Indexed<Vec<VariableStub>>, Error> {
        self.call(list_from(namespace, prefix, from)).await
    }

    /// Waits until something below a prefix is no more as it was at an index, or for so long; the index then.
    pub async fn variables_changed(
        &self,
        namespace: &str,
        prefix: &str,
        index: u64,
        wait: Duration,
    ) -> Result<u64, Error> {
        // What is there is listed by who wants to know it.
        let request = list(namespace, prefix).query("per_page", 1);
        Ok(self.wait::<IgnoredAny>(request, index, wait).await?.index)
    }

    /// Takes the lock on a Variable for `ttl`; none where another one holds it.
    pub async fn acquire_lock(
        &self,
        namespace: &str,
        variable: &str,
        ttl: Duration,
    ) -> Result<Option<Lock>, Error> {
        let ttl = format!("{}s", ttl.as_secs());
        // Nomad wants a Variable to have an item.
        let body = json!({
            "Namespace": namespace, "Path": variable, "Items": {"lock": "held"},
            "Lock": {"TTL": ttl, "LockDelay": "1s"},
        });
        match self.call::<Locked>(lock(namespace, variable, "lock-acquire", &body)?).await {
            Ok(locked) => Ok(Some(Lock { id: locked.value.lock.id })),
            Err(Error { kind: Kind::Conflict, .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Gives a lock back. One that was lost is no error.
    pub async fn release_lock(&self, namespace: &str, variable: &str, held: &Lock) -> Result<(), Error> {
        let body = json!({"Namespace": namespace, "Path": variable, "Lock": {"ID": held.id}});
        match self.call::<Value>(lock(namespace, variable, "lock-release", &body)?).await {
            Ok(_) | Err(Error { kind: Kind::Conflict | Kind::NotFound, .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Holds a lock for another of its times; false where it was lost.
    pub async fn renew_lock(&self, namespace: &str, variable: &str, held: &Lock) -> Result<bool, Error> {
        let body = json!({"Namespace": namespace, "Path": variable, "Lock": {"ID": held.id}});
        match self.call::<Value>(lock(namespace, variable, "lock-renew", &body)?).await {
            Ok(_) => Ok(true),
            Err(Error { kind: Kind::Conflict | Kind::NotFound, .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_from_a_path_begins_with_it() {
        let request = list_from("ci", "nomad-build/claims/", "nomad-build/claims/nb-1");
        assert!(request.query.contains(&("next_token", "ci.nomad-build/claims/nb-1".to_owned())));
    }

    #[test]
    fn a_create_only_write_compares_with_nothing() {
        let request = put("ci", "nomad-build/claims/nb-1", &BTreeMap::new(), Some(0)).unwrap();
        assert_eq!(request.path, ["var", "nomad-build", "claims", "nb-1"]);
        assert!(request.query.contains(&("cas", "0".to_owned())));
    }
}
