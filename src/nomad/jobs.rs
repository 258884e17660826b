//! Jobs, their allocations and evaluations.

use std::time::Duration;

use reqwest::Method;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::client::{Client, Request};
use super::error::{Error, Kind};
use super::types::{Allocation, Evaluation, Indexed, Job, JobStub};

/// How many objects a page of a list has.
const PAGE: u32 = 2000;

/// Nomad's answer to a registration.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Registration {
    /// The index of the job it made.
    pub job_modify_index: u64,
}

/// A job that must not exist yet.
#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Registering<'a> {
    job: &'a Value,
    enforce_index: bool,
    job_modify_index: u64,
}

fn register(namespace: &str, id: &str, job: &Value) -> Result<Request, Error> {
    Request::new(Method::POST, &["jobs"], format!("registering job {id} in namespace {namespace:?}"))
        .query("namespace", namespace)
        .json(&Registering { job, enforce_index: true, job_modify_index: 0 })
}

fn stop(namespace: &str, id: &str, purge: bool) -> Request {
    let doing = format!("{} job {id} in namespace {namespace:?}", if purge { "purging" } else { "stopping" });
    Request::new(Method::DELETE, &["job", id], doing).query("namespace", namespace).query("purge", purge)
}

fn list(namespace: &str, prefix: &str) -> Request {
    Request::get(&["jobs"], format!("listing the jobs {prefix}* of namespace {namespace:?}"))
        .query("namespace", namespace)
        .query("prefix", prefix)
        .query("meta", true)
        .query("per_page", PAGE)
}

impl Client {
    /// Registers a job that must not exist yet: a second registration is [`super::Kind::Conflict`].
    pub async fn register(&self, namespace: &str, id: &str, job: &Value) -> Result<Registration, Error> {
        Ok(self.call(register(namespace, id, job)?).await?.value)
    }

    /// Stops a job; purged ones are forgotten by Nomad at once. It is no error if there is none.
    pub async fn stop(&self, namespace: &str, id: &str, purge: bool) -> Result<(), Error> {
        match self.call::<Value>(stop(namespace, id, purge)).await.map(drop) {
            Err(Error { kind: Kind::NotFound, .. }) => Ok(()),
            done => done,
        }
    }

    /// One job.
    pub async fn job(&self, namespace: &str, id: &str) -> Result<Job, Error> {
        let doing = format!("reading job {id} of namespace {namespace:?}");
        Ok(self.call(Request::get(&["job", id], doing).query("namespace", namespace)).await?.value)
    }

    /// Every job with a prefix, and the oldest index among the pages.
    pub async fn jobs(&self, namespace: &str, prefix: &str) -> Result<Indexed<Vec<JobStub>>, Error> {
        self.pages(|| list(namespace, prefix)).await
    }

    /// Every allocation of a namespace, without their tasks.
    pub async fn allocations(&self, namespace: &str) -> Result<Indexed<Vec<Allocation>>, Error> {
        let doing = format!("listing the allocations of namespace {namespace:?}");
        self.pages(|| {
            Request::get(&["allocations"], doing.clone())
                .query("namespace", namespace)
                .query("task_states", false)
                .query("per_page", PAGE)
        })
        .await
    }

    /// The newest allocations of a namespace, without their tasks.
    pub(super) async fn latest_allocations(
        &self,
        namespace: &str,
        most: u32,
    ) -> Result<Vec<Allocation>, Error> {
        let doing = format!("listing the newest allocations of namespace {namespace:?}");
        let request = Request::get(&["allocations"], doing)
            .query("namespace", namespace)
            .query("task_states", false)
            .query("reverse", true)
            .query("stale", true)
            .query("per_page", most);
        Ok(self.call(request).await?.value)
    }

    /// The allocations of one job, with their tasks.
    pub async fn job_allocations(&self, namespace: &str, id: &str) -> Result<Vec<Allocation>, Error> {
        Ok(self.call(job_allocations(namespace, id)).await?.value)
    }

    /// The same, waiting until they differ from those of an index.
    pub async fn job_allocations_after(
        &self,
        namespace: &str,
        id: &str,
        index: u64,
        wait: Duration,
    ) -> Result<Indexed<Vec<Allocation>>, Error> {
        self.wait(job_allocations(namespace, id), index, wait).await
    }

    /// One allocation, with its tasks.
    pub async fn allocation(&self, namespace: &str, id: &str) -> Result<Allocation, Error> {
        let doing = format!("reading allocation {id} of namespace {namespace:?}");
        Ok(self.call(Request::get(&["allocation", id], doing).query("namespace", namespace)).await?.value)
    }

    /// The evaluations of one job.
    pub async fn job_evaluations(&self, namespace: &str, id: &str) -> Result<Vec<Evaluation>, Error> {
        let doing = format!("reading the evaluations of job {id} of namespace {namespace:?}");
        Ok(self
            .call(Request::get(&["job", id, "evaluations"], doing).query("namespace", namespace))
            .await?
            .value)
    }

    /// The leader's address: the cheapest question that only a working cluster answers.
    pub async fn leader(&self) -> Result<String, Error> {
        Ok(self
            .call(Request::get(&["status", "leader"], "asking Nomad for its leader".to_owned()))
            .await?
            .value)
    }

    /// Reads a list page by page. Its index is that of the first page: what changed later, the stream says again.
    async fn pages<T: serde::de::DeserializeOwned>(
        &self,
        request: impl Fn() -> Request,
    ) -> Result<Indexed<Vec<T>>, Error> {
        let mut all = self.call::<Vec<T>>(request()).await?;
        while let Some(next) = all.next.take() {
            let page = self.call::<Vec<T>>(request().query("next_token", next)).await?;
            all.value.extend(page.value);
            all.next = page.next;
        }
        Ok(all)
    }
}

fn job_allocations(namespace: &str, id: &str) -> Request {
    let doing = format!("reading the allocations of job {id} of namespace {namespace:?}");
    Request::get(&["job", id, "allocations"], doing).query("namespace", namespace).query("all", true)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_registration_creates_only() {
        let request = register("ci", "nb-1", &json!({"ID": "nb-1"})).unwrap();
        assert_eq!((request.method, request.path), (Method::POST, vec!["jobs".to_owned()]));
        let body: Value = serde_json::from_slice(&request.body.unwrap()).unwrap();
        assert_eq!(body, json!({"Job": {"ID": "nb-1"}, "EnforceIndex": true, "JobModifyIndex": 0}));
    }

    #[test]
    fn a_stop_says_whether_it_purges() {
        assert!(stop("ci", "nb-1", true).query.contains(&("purge", "true".to_owned())));
        assert_eq!(stop("ci", "nb-1", false).doing, "stopping job nb-1 in namespace \"ci\"");
    }
}
