//! A namespace of Nomad that no other test uses.

use reqwest::Method;
use serde_json::{Value, json};

use super::{Api, eventually, world};

pub(crate) struct Namespace(pub(crate) String);

impl Namespace {
    pub(crate) fn new() -> Self {
        let name = format!("it-{}", uuid::Uuid::new_v4().simple());
        let (applied, said) = world().nomad_program(&["namespace", "apply", &name]);
        assert!(applied, "{said}");
        Self(name)
    }

    /// Writes a Variable; returns its path.
    pub(crate) async fn put(&self, path: &str, items: Value) -> String {
        let body = json!({"Namespace": self.0, "Path": path, "Items": items});
        let url = format!("/v1/var/{path}?namespace={}", self.0);
        let (status, answer) = Api::new(&world().nomad).call(Method::PUT, &url, Some(&body)).await;
        assert!(status.is_success(), "{answer}");
        path.to_owned()
    }

    /// The paths of its Variables.
    pub(crate) async fn variables(&self) -> Vec<String> {
        let listed = world().nomad_api().get(&format!("/v1/vars?namespace={}", self.0)).await;
        let paths = listed.as_array().unwrap().iter().map(|variable| variable["Path"].as_str().unwrap());
        paths.map(str::to_owned).collect()
    }

    /// Waits until each of its Variables may be swept.
    pub(crate) async fn is_older_than_a_second(&self) {
        eventually("Variables that are older than a second", async || {
            let listed = world().nomad_api().get(&format!("/v1/vars?namespace={}", self.0)).await;
            let now = chrono::Utc::now().timestamp_nanos_opt().unwrap();
            let old = |variable: &Value| now - variable["ModifyTime"].as_i64().unwrap() > 1_500_000_000;
            listed.as_array().unwrap().iter().all(old).then_some(())
        })
        .await;
    }
}
