//! Nomad's own API, asked without the service.

use std::collections::HashMap;

use reqwest::Method;
use serde_json::{Value, json};

/// A client of Nomad.
pub(crate) struct Nomad {
    url: String,
    http: reqwest::Client,
}

impl Nomad {
    pub(crate) fn new(url: &str) -> Self {
        Self { url: url.to_owned(), http: reqwest::Client::builder().tls_certs_only([]).build().unwrap() }
    }

    async fn text(&self, method: Method, path: &str, body: Option<&Value>) -> String {
        let mut request = self.http.request(method, format!("{}{path}", self.url));
        if let Some(body) = body {
            request = request.json(body);
        }
        let answer = request.send().await.unwrap();
        assert!(answer.status().is_success(), "{path}: {}", answer.status());
        answer.text().await.unwrap()
    }

    /// What a path says.
    pub(crate) async fn get(&self, path: &str) -> Value {
        serde_json::from_str(&self.text(Method::GET, path, None).await).unwrap()
    }

    /// The jobs of an owner that Nomad has, by their refs.
    pub(crate) async fn made_by(&self, owner: &str) -> HashMap<String, Vec<String>> {
        let listed = self.get("/v1/jobs?prefix=nb-&meta=true").await;
        let mut made = HashMap::<String, Vec<String>>::new();
        for job in listed.as_array().unwrap().iter().filter(|job| job["Meta"]["nb_owner"] == owner) {
            let number = job["Meta"]["nb_ref"].as_str().unwrap().to_owned();
            made.entry(number).or_default().push(job["ID"].as_str().unwrap().to_owned());
        }
        made
    }

    /// Waits until a job's second allocation has ended, in Nomad's eyes.
    pub(crate) async fn ran_twice(&self, job: &str) {
        super::eventually("another allocation, which has ended", async || {
            let allocations = self.get(&format!("/v1/job/{job}/allocations")).await;
            let ended = |of: &&Value| matches!(of["ClientStatus"].as_str(), Some("complete" | "failed"));
            (allocations.as_array()?.iter().filter(ended).count() == 2).then_some(())
        })
        .await;
    }

    /// Writes a Variable under a path that no other test uses; returns the path.
    pub(crate) async fn credentials(&self, items: &Value) -> String {
        let path = format!("creds/{}", uuid::Uuid::new_v4());
        let body = json!({ "Path": path, "Items": items });
        self.text(Method::PUT, &format!("/v1/var/{path}"), Some(&body)).await;
        path
    }

    /// The paths of the Variables below one.
    pub(crate) async fn variables(&self, prefix: &str) -> Vec<String> {
        let listed = self.get(&format!("/v1/vars?prefix={prefix}")).await;
        listed
            .as_array()
            .unwrap()
            .iter()
            .map(|variable| variable["Path"].as_str().unwrap().to_owned())
            .collect()
    }

    /// Everything a task has written, once it is over: what it did may be seen before its agent says that it runs.
    pub(crate) async fn task_log(&self, allocation: &str, task: &str) -> String {
        super::eventually("a task that is over", async || {
            let allocation = self.get(&format!("/v1/allocation/{allocation}")).await;
            (allocation["TaskStates"][task]["State"] == "dead").then_some(())
        })
        .await;
        let mut text = String::new();
        for stream in ["stdout", "stderr"] {
            let path = format!("/v1/client/fs/logs/{allocation}?task={task}&type={stream}&plain=true");
            text += &self.text(Method::GET, &path, None).await;
        }
        text
    }
}
