//! Leftovers: what no job needs is found and removed, in Nomad and on its nodes, and nothing else is.

use serde_json::json;

use crate::support::{
    Api, Namespace, Service, Sleeper, containers_of, docker, eventually, images_of, leave_behind, world,
};

/// A service of a namespace that sweeps what is a second old.
fn sweeping(namespace: &Namespace, sweep: &str) -> Service {
    let variables = [
        ("NOMAD_BUILD_NAMESPACES", namespace.0.as_str()),
        ("NOMAD_BUILD_SWEEP", sweep),
        ("NOMAD_BUILD_KEEP_CREDENTIALS", "PT1S"),
        ("NOMAD_BUILD_KEEP_LEDGER", "PT1S"),
        ("NOMAD_BUILD_KEEP_IMAGES", "PT1S"),
    ];
    Service::start(&world().nomad, &world().registry, &variables)
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
    let dry = sweeping(&namespace, "dry-run");
    let mut sleeper = Sleeper::in_phase("test");
    sleeper.job["registry_credentials_path"] = json!(credentials);
    let id = sleeper.submit(&Api::new(&dry.url)).await;
    kept.extend(namespace.variables().await.into_iter().filter(|path| path.contains(&id)));
    assert!(kept.iter().any(|path| path.starts_with("nomad/jobs/")), "{kept:?}");
    eventually("the leftovers are counted", async || {
        let counted = async |kind| dry.metric(&format!("nomad_build_leftovers{{kind=\"{kind}\"}}")).await;
        (counted("ledger").await == Some(3) && counted("credentials").await == Some(1)).then_some(())
    })
    .await;
    let there = namespace.variables().await;
    assert!(left.iter().all(|path| there.contains(path)), "a dry run removed {left:?}: {there:?}");
    // Told to stop, it gives its duty back at once.
    assert!(dry.stop().await.success());
    let service = sweeping(&namespace, "on");
    eventually("the leftovers are removed", async || {
        let there = namespace.variables().await;
        (!left.iter().any(|path| there.contains(path))).then_some(())
    })
    .await;
    let removed =
        async |kind| service.metric(&format!("nomad_build_leftovers_removed_total{{kind=\"{kind}\"}}")).await;
    assert_eq!((removed("ledger").await, removed("credentials").await), (Some(3), Some(1)));
    let there = namespace.variables().await;
    assert!(kept.iter().all(|path| there.contains(path)), "{kept:?} {there:?}");
    let api = Api::new(&service.url);
    assert_eq!(api.post(&format!("/jobs/{id}/kill")).await, json!({"success": true}));
    sleeper.is_stopped().await;
}

#[tokio::test]
async fn what_ended_jobs_left_on_a_node_is_swept_and_nothing_else_is() {
    let namespace = Namespace::new();
    let first = sweeping(&namespace, "off");
    let api = Api::new(&first.url);
    let repository = world().repository("RUN false");
    let (ended, _) = api.run(&world().job(&repository)).await;
    let sleeper = Sleeper::in_phase("test");
    let live = sleeper.submit(&api).await;
    assert!(first.stop().await.success());
    // Of a job of somebody else on the same engine: this namespace has no ledger of it.
    let foreign = nomad_build::job::JobId::from_uuid(uuid::Uuid::now_v7()).to_string();
    for id in [&ended, &foreign] {
        leave_behind(id);
    }
    // Pulled by whoever runs the published image.
    let published = format!("{}/it/pulled:{ended}", world().registry);
    docker(&["tag", &format!("nomad-build/{ended}:work"), &published]);
    let of = |id: &str| (containers_of(id).len(), images_of(id));
    let (of_live, of_foreign) = (of(&live), of(&foreign));
    assert_eq!((of_live.0, of_foreign.0, of(&ended).0), (1, 1, 1));
    let dry = sweeping(&namespace, "dry-run");
    eventually("the leftovers are counted", async || {
        let counted = async |kind| dry.metric(&format!("nomad_build_leftovers{{kind=\"{kind}\"}}")).await;
        (counted("containers").await == Some(1) && counted("images").await == Some(1)).then_some(())
    })
    .await;
    assert_eq!((of(&ended).0, of(&ended).1.len()), (1, 2), "a dry run removed something");
    assert!(dry.stop().await.success());
    let service = sweeping(&namespace, "on");
    eventually("the leftovers are removed", async || {
        (of(&ended) == (0, vec![published.clone()])).then_some(())
    })
    .await;
    let removed =
        async |kind| service.metric(&format!("nomad_build_leftovers_removed_total{{kind=\"{kind}\"}}")).await;
    eventually("what was removed is counted", async || {
        (removed("containers").await == Some(1) && removed("images").await == Some(1)).then_some(())
    })
    .await;
    assert_eq!((of(&live), of(&foreign)), (of_live, of_foreign));
    let api = Api::new(&service.url);
    assert_eq!(api.post(&format!("/jobs/{live}/kill")).await, json!({"success": true}));
    sleeper.is_stopped().await;
    docker(&["rm", "--force", &containers_of(&foreign)[0]]);
    docker(&["rmi", &format!("nomad-build/{foreign}:work"), &published]);
}
