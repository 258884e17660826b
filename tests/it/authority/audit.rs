//! The audit log says who did what to which job.

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use uuid::Uuid;

use super::{guarded_with, waiting};
use crate::support::{Api, world};

/// What the file says: action, job, who, status and error of each line.
fn lines(path: &std::path::Path) -> Vec<[Value; 5]> {
    let text = std::fs::read_to_string(path).unwrap();
    let of = |line: &str| {
        let line: Value = serde_json::from_str(line).unwrap();
        assert!(line["address"].as_str().unwrap().starts_with("127.0.0.1:"), "{line}");
        assert!(!line["request"].as_str().unwrap().is_empty() && line["time"].is_string(), "{line}");
        ["action", "job", "who", "status", "error"].map(|name| line[name].clone())
    };
    text.lines().map(of).collect()
}

#[tokio::test]
async fn who_did_what_to_which_job_is_told_and_no_secret_is() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("audit.jsonl");
    let variables = [("NOMAD_BUILD_AUDIT_FILE", file.to_str().unwrap())];
    let (nomad, service, _token) = guarded_with(&world().registry, &variables).await;
    let (builder, reader) =
        (nomad.builder().await, nomad.caller("namespace \"builds\" { capabilities = [\"read-job\"] }").await);
    let [api, other, nobody] = [Some(&builder), Some(&reader), None].map(|token| {
        token.map_or_else(|| Api::new(&service.url), |token| Api::with_token(&service.url, &token.secret))
    });
    let id = api.submit(&waiting()).await;
    nomad.owns(&id);
    api.status(&id).await;
    let kill = format!("/jobs/{id}/kill");
    assert_eq!(other.call(Method::POST, &kill, None).await.0, StatusCode::FORBIDDEN);
    assert_eq!(nobody.call(Method::POST, "/jobs", Some(&waiting())).await.0, StatusCode::UNAUTHORIZED);
    let unknown = format!("nb-{}", Uuid::new_v4());
    api.call(Method::POST, &format!("/jobs/{unknown}/cleanup"), None).await;
    let (submitter, reader) = (json!(builder.accessor), json!(reader.accessor));
    let told = lines(&file);
    assert_eq!(
        told,
        [
            [json!("submit"), json!(id), submitter.clone(), json!(200), Value::Null],
            [json!("kill"), json!(id), reader, json!(403), json!("forbidden")],
            [json!("submit"), Value::Null, Value::Null, json!(401), json!("unauthorized")],
            [json!("cleanup"), json!(unknown), submitter.clone(), json!(404), json!("job_not_found")],
        ]
    );
    // Whoever wants to go unseen is told that there is no such parameter, and that is written down.
    let (status, body) = api.call(Method::POST, "/jobs?x=dry_run=true", Some(&waiting())).await;
    assert_eq!(status, StatusCode::BAD_REQUEST, "{body}");
    api.call(Method::POST, "/jobs?dry_run=true", Some(&waiting())).await;
    api.call(Method::POST, &format!("/jobs/{}/cleanup", id.replace('-', "%2D")), None).await;
    let told = lines(&file).split_off(4);
    assert_eq!(
        told,
        [
            [json!("submit"), Value::Null, submitter.clone(), json!(400), json!("invalid_request")],
            [json!("cleanup"), json!(id), submitter.clone(), json!(409), json!("job_live")],
        ]
    );
    // Moved away, as a rotation does.
    std::fs::rename(&file, folder.path().join("audit.jsonl.1")).unwrap();
    api.post(&kill).await;
    assert_eq!(lines(&file), [[json!("kill"), json!(id), submitter, json!(200), Value::Null]]);
    for name in ["audit.jsonl", "audit.jsonl.1"] {
        let text = std::fs::read_to_string(folder.path().join(name)).unwrap();
        assert!(!text.contains(&builder.secret));
    }
}
