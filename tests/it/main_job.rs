//! The main job: what is submitted is built, tested and published.

use chrono::{DateTime, Utc};
use serde_json::{Value, json};

use crate::support::{PHASES, TIMES, image_of, tags_of, world};

#[tokio::test]
async fn a_build_is_built_tested_and_published_and_the_registry_serves_the_digest_of_the_status() {
    let world = world();
    let repository = world.repository("RUN echo built > /built");
    let mut job = world.job(&repository);
    job["image_tags"] = json!(["one", "two"]);
    job["test_commands"] = json!(["test \"$(cat /built)\" = built"]);
    let (id, status) = world.api().run(&job).await;
    assert_eq!(status["status"], "SUCCEEDED", "{status:#}");
    let digest = status["image"]["digest"].as_str().unwrap();
    // Two tags, one digest, and nothing else in the repository.
    for tag in ["one", "two"] {
        assert_eq!(world.served(image_of(&job), tag).await.as_deref(), Some(digest));
    }
    let mut tags = tags_of(&world.registry, image_of(&job)).await;
    tags.sort();
    assert_eq!(tags, ["one", "two"]);
    assert_eq!(status["git"]["commit"], repository.git(&["rev-parse", "HEAD"]));
    assert_eq!(status["git"]["ref"], "refs/heads/main");
    times_add_up(&status);
    assert_eq!((&status["job_id"], &status["phase"]), (&json!(id), &json!("publish")));
    assert_eq!((&status["failure"], &status["placement"]), (&Value::Null, &Value::Null));
    let references = ["one", "two"].map(|tag| {
        let reference = format!("{}/{}:{tag}", world.registry, image_of(&job));
        json!({ "reference": reference, "published": "yes" })
    });
    assert_eq!(status["image"]["references"], json!(references));
    let place = &status["nomad"];
    assert_eq!(
        (&place["namespace"], &place["job"], &place["node"]),
        (&json!("default"), &json!(id), &json!("dev"))
    );
    let allocation =
        world.nomad(&format!("/v1/allocation/{}", place["allocation"].as_str().unwrap())).await.unwrap();
    assert_eq!(allocation["JobID"], id);
    let logs = world.api().logs(&id).await;
    for (phase, said) in [("build", "#"), ("test", "==> test 1 of 1"), ("publish", digest)] {
        assert!(logs[phase].as_str().unwrap().contains(said), "{phase}: {logs:#}");
    }
}

/// Every time of a job that succeeded is there, in the order in which things happen, and a duration is what is between two.
fn times_add_up(status: &Value) {
    let at = |name: &str| {
        let text = status["phase_timestamps"][name].as_str();
        text.and_then(|text| text.parse::<DateTime<Utc>>().ok())
            .unwrap_or_else(|| panic!("{name}: {status:#}"))
    };
    assert!(TIMES.map(at).is_sorted(), "{status:#}");
    for phase in PHASES {
        let lasted = at(&format!("{phase}_end")) - at(&format!("{phase}_start"));
        let told = status["metrics"][format!("{phase}_duration_seconds")].as_f64().unwrap();
        // Times are told in milliseconds.
        assert!((told - lasted.as_seconds_f64()).abs() < 0.002 && told > 0.0, "{phase}: {status:#}");
    }
    assert!(status["metrics"]["concurrent_jobs_total"].is_u64(), "{status:#}");
}
