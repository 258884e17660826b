//! Leftovers: Variables that no job needs are found and removed, and nothing else is.

use reqwest::Method;
use serde_json::{Value, json};

use crate::support::{Api, Service, Sleeper, eventually, world};

/// A namespace of Nomad that no other test uses.
struct Namespace(String);

impl Namespace {
    fn new() -> Self {
        let name = format!("it-{}", uuid::Uuid::new_v4().simple());
        let (applied, said) = world().nomad_program(&["namespace", "apply", &name]);
        assert!(applied, "{said}");
        Self(name)
    }

    async fn put(&self, path: &str, items: Value) -> String {
        let body = json!({"Namespace": self.0, "Path": path, "Items": items});
        let url = format!("/v1/var/{path}?namespace={}", self.0);
        let (status, answer) = Api::new(&world().nomad).call(Method::PUT, &url, Some(&body)).await;
        assert!(status.is_success(), "{answer}");
        path.to_owned()
    }

    /// The paths of its Variables.
    async fn variables(&self) -> Vec<String> {
        let listed = world().nomad_api().get(&format!("/v1/vars?namespace={}", self.0)).await;
        let paths = listed.as_array().unwrap().iter().map(|variable| variable["Path"].as_str().unwrap());
        paths.map(str::to_owned).collect()
    }

    /// Waits until each of its Variables may be swept.
    async fn is_older_than_a_second(&self) {
        eventually("Variables that are older than a second", async || {
            let listed = world().nomad_api().get(&format!("/v1/vars?namespace={}", self.0)).await;
            let now = chrono::Utc::now().timestamp_nanos_opt().unwrap();
            let old = |variable: &Value| now - variable["ModifyTime"].as_i64().unwrap() > 1_500_000_000;
            listed.as_array().unwrap().iter().all(old).then_some(())
        })
        .await;
    }

    fn service(&self, sweep: &str) -> Service {
        let variables = [
            ("NOMAD_BUILD_NAMESPACE", self.0.as_str()),
            ("NOMAD_BUILD_SWEEP", sweep),
            ("NOMAD_BUILD_KEEP_CREDENTIALS", "PT1S"),
            ("NOMAD_BUILD_KEEP_LEDGER", "PT1S"),
        ];
        Service::start(&world().nomad, &world().registry, &variables)
    }
}

async fn metric(service: &Service, name: &str) -> Option<u64> {
    let text = reqwest::get(format!("{}/metrics", service.url)).await.unwrap().text().await.unwrap();
    text.lines().find_map(|line| line.strip_prefix(name))?.trim().parse().ok()
}

#[tokio::test]
async fn variables_without_a_job_are_swept_and_nothing_else_is() {
    let namespace = Namespace::new();
    let gone = "nb-0193a1c2-7e57-7000-8000-000000000001";
    let mut left = Vec::new();
    let key = uuid::Uuid::new_v4().to_string();
    for path in [format!("claims/{gone}"), format!("outcomes/{gone}"), format!("keys/{key}")] {
        left.push(namespace.put(&format!("nomad-build/{path}"), json!({"a": "b"})).await);
    }
    left.push(namespace.put(&format!("nomad/jobs/{gone}/job/publish"), json!({"a": "b"})).await);
    let credentials = namespace.put("creds/registry", json!({"username": "a", "password": "b"})).await;
    let mut kept = vec![
        credentials.clone(),
        namespace.put("nomad-build/claims/other", json!({"a": "b"})).await,
        namespace.put(&format!("creds/{gone}"), json!({"a": "b"})).await,
    ];
    namespace.is_older_than_a_second().await;
    let mut dry = namespace.service("dry-run");
    let mut sleeper = Sleeper::in_phase("test");
    sleeper.job["registry_credentials_path"] = json!(credentials);
    let id = sleeper.submit(&Api::new(&dry.url)).await;
    kept.extend(namespace.variables().await.into_iter().filter(|path| path.contains(&id)));
    assert!(kept.iter().any(|path| path.starts_with("nomad/jobs/")), "{kept:?}");
    eventually("the leftovers are counted", async || {
        let counted = async |kind| metric(&dry, &format!("nomad_build_leftovers{{kind=\"{kind}\"}}")).await;
        (counted("ledger").await == Some(3) && counted("credentials").await == Some(1)).then_some(())
    })
    .await;
    let there = namespace.variables().await;
    assert!(left.iter().all(|path| there.contains(path)), "a dry run removed {left:?}: {there:?}");
    dry.kill();
    let service = namespace.service("on");
    eventually("the leftovers are removed", async || {
        let there = namespace.variables().await;
        (!left.iter().any(|path| there.contains(path))).then_some(())
    })
    .await;
    let removed = async |kind| {
        metric(&service, &format!("nomad_build_leftovers_removed_total{{kind=\"{kind}\"}}")).await
    };
    assert_eq!((removed("ledger").await, removed("credentials").await), (Some(3), Some(1)));
    let there = namespace.variables().await;
    assert!(kept.iter().all(|path| there.contains(path)), "{kept:?} {there:?}");
    let api = Api::new(&service.url);
    assert_eq!(api.post(&format!("/jobs/{id}/kill")).await, json!({"success": true}));
    sleeper.is_stopped().await;
}
