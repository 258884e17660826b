//! Leftovers: Variables that no job needs are found and removed, and nothing else is.

use serde_json::json;

use crate::support::{Api, Namespace, Service, Sleeper, eventually, world};

/// A service of a namespace that sweeps what is a second old.
fn sweeping(namespace: &Namespace, sweep: &str) -> Service {
    let variables = [
        ("NOMAD_BUILD_NAMESPACE", namespace.0.as_str()),
        ("NOMAD_BUILD_SWEEP", sweep),
        ("NOMAD_BUILD_KEEP_CREDENTIALS", "PT1S"),
        ("NOMAD_BUILD_KEEP_LEDGER", "PT1S"),
    ];
    Service::start(&world().nomad, &world().registry, &variables)
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
    let mut dry = sweeping(&namespace, "dry-run");
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
    let service = sweeping(&namespace, "on");
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
