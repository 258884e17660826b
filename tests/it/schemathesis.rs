//! What schemathesis makes up from the API's description: what that allows is accepted, what it does not allow is refused, and
//! every answer is as it says.

use std::time::Duration;

use serde_json::{Value, json};

use crate::support::agent::Agent;
use crate::support::openapi::DOCUMENT;
use crate::support::{Service, registering_only, scale, tool};

/// What is not in a schema: a body may be too large, a key may have come with another submission, and a stream has two ways.
const SETTINGS: &str = r#"
[checks.negative_data_rejection]
expected-statuses = [400, 401, 403, 404, 405, 406, 409, 413, 415, 422, 429]

[checks.positive_data_acceptance]
expected-statuses = ["2xx", 401, 403, 404, 409, 422, 429]

[[operations]]
include-operation-id = "stream"
headers = { Accept = "text/event-stream" }
"#;

/// The document with what this service's operator and cluster allow of what it leaves to them.
fn document() -> Value {
    let mut document = DOCUMENT.clone();
    let parameters = document["paths"]["/jobs"]["get"]["parameters"].as_array_mut().unwrap();
    let namespace = parameters.iter_mut().find(|parameter| parameter["name"] == "namespace").unwrap();
    namespace["schema"] = json!({"type": "string", "enum": ["default"]});
    let schemas = &mut document["components"]["schemas"];
    schemas["Duration"]["pattern"] = json!("^PT[1-9][0-9]{0,3}S$");
    schemas["Resources"]["properties"]["cpu"]["maximum"] = json!(64_000);
    schemas["Resources"]["properties"]["memory_mb"]["maximum"] = json!(131_072);
    schemas["Login"]["properties"]["method"]["enum"] = json!(["people"]);
    let submission = &mut schemas["Submission"]["properties"];
    submission["namespace"]["enum"] = json!(["default", null]);
    // Whether what they name is there, a dry run does not ask.
    for field in ["git_credentials_path", "registry_credentials_path", "build_secrets", "ssh"] {
        submission.as_object_mut().unwrap().remove(field);
    }
    document
}

/// Nothing is found on a service whose jobs are registered, and run nowhere.
async fn finds_nothing(document: &Value, phases: &str) {
    let agent = Agent::shared().await;
    let nomad = registering_only(&format!("http://{}", agent.address())).await;
    let service = Service::start(&nomad, "127.0.0.1:1", &[("NOMAD_BUILD_LOGIN_METHODS", "people")]);
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let settings = file("schemathesis.toml", SETTINGS);
    let document = file("openapi.json", &document.to_string());
    let mut command = tokio::process::Command::new(tool("schemathesis"));
    command.arg("--no-color").arg("--config-file").arg(settings).arg("run").arg(document);
    command.args(["--url", &service.url, "--phases", phases, "--continue-on-failure"]);
    command.args(["--max-examples", &scale("NOMAD_BUILD_TEST_SCHEMATHESIS_EXAMPLES", 5).to_string()]);
    command.args(["--seed", &scale("NOMAD_BUILD_TEST_SCHEMATHESIS_SEED", 1).to_string()]);
    let run = command.current_dir(folder.path()).kill_on_drop(true).output();
    let ended =
        tokio::time::timeout(Duration::from_mins(30), run).await.expect("it ends").expect("it starts");
    // Whole bodies stand in it.
    let said = String::from_utf8_lossy(&ended.stdout);
    let said: Vec<String> = said.lines().map(|line| line.chars().take(500).collect()).collect();
    assert!(ended.status.success(), "{}\n{}", said.join("\n"), String::from_utf8_lossy(&ended.stderr));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_document_allows_is_accepted_and_what_it_does_not_is_refused() {
    finds_nothing(&document(), "coverage,fuzzing").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_may_be_done_with_a_job_is_done_as_the_document_says() {
    let mut document = document();
    // A dry run makes no job, and the stream of one that waits has no end.
    let submit = &mut document["paths"]["/jobs"]["post"];
    submit["parameters"].as_array_mut().unwrap().retain(|parameter| parameter["name"] != "dry_run");
    document["components"]["responses"]["Submitted"]["links"].as_object_mut().unwrap().remove("stream");
    document["paths"].as_object_mut().unwrap().remove("/jobs/{id}/logs/stream");
    finds_nothing(&document, "stateful").await;
}
