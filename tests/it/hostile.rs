//! What a user sends is refused by name, or carried through verbatim: nothing on the way makes anything of it.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use futures_util::{StreamExt as _, stream};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::registry::server::docker;
use crate::sources::payloads;
use crate::support::agent::Agent;
use crate::support::openapi::DOCUMENT;
use crate::support::{Api, Nomad, Repository, Service, image_of, world};

/// Texts that mean something to a shell, Nomad, HCL, a template, curl, or an option parser.
fn hostile() -> Vec<String> {
    let texts = [
        "$(id)",
        "`id`",
        "${NOMAD_TOKEN}",
        "$NOMAD_JOB_ID $$",
        "%{http_code}",
        "%s%n",
        "{{ env \"PATH\" }}",
        "{% raw %}",
        "it's \"quoted\" \\ twice",
        "two\nlines\n",
        "\r\n\ttab",
        "--help",
        "-rf /",
        "; touch /tmp/x #",
        "a && b | c > d",
        "*?[a-z]~!",
        "gr\u{fc}n \u{1f433} \u{202e}",
        "\u{1b}[2J\u{7}",
        "",
    ];
    texts.into_iter().map(ToOwned::to_owned).chain(["0123456789".repeat(1024)]).collect()
}

fn sha256(text: &str) -> String {
    Sha256::digest(text).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Writes a text as one word of a shell.
fn word(text: &str) -> String {
    format!("'{}'", text.replace('\'', "'\\''"))
}

/// Every field that there is below an object of the API's description, by its path, and one that is not there.
fn fields(object: &Value, path: &str, into: &mut Vec<String>) {
    let Some(properties) = object["properties"].as_object() else { return };
    for (name, of) in properties.iter().chain([(&"unknown".to_owned(), &Value::Null)]) {
        let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
        let of = of["$ref"].as_str().map_or(of, |at| DOCUMENT.pointer(at.trim_start_matches('#')).unwrap());
        fields(of, &path, into);
        into.push(path);
    }
}

/// The field of that path, made where there is none.
fn at<'a>(job: &'a mut Value, path: &str) -> &'a mut Value {
    path.split('.').fold(job, |object, name| &mut object[name])
}

/// Whether an answer refuses a submission for this field, and for no other.
fn refuses(field: &str, status: StatusCode, body: &Value) -> bool {
    let details = body["error"]["details"].as_array();
    let named = |detail: &Value| detail["field"].as_str().unwrap().starts_with(field);
    status == 400 && details.is_some_and(|all| !all.is_empty() && all.iter().all(named))
}

/// Submits a job with a value that a dry run takes or refuses; the ID of what is registered, which carries it.
async fn taken_whole_or_refused(api: &Api, nomad: &Nomad, job: &Value, field: &str) -> Option<String> {
    let (status, body) = api.call(Method::POST, "/jobs?dry_run=true", Some(job)).await;
    let (submitted, told) = api.call(Method::POST, "/jobs", Some(job)).await;
    let value = at(&mut job.clone(), field).clone();
    if status != 200 {
        assert!(refuses(field, status, &body), "{field} {value}: {status} {body}");
        assert!(refuses(field, submitted, &told), "{field} {value}: {submitted} {told}");
        return None;
    }
    assert!(may_hold(field, &value), "{field} took {value}");
    assert_eq!(submitted, 200, "{field} {value}: {told}");
    let id = told["data"]["job_id"].as_str().unwrap();
    let carried = payloads(&nomad.get(&format!("/v1/job/{id}")).await);
    let mut carried: Value = serde_json::from_str(&carried).unwrap();
    assert_eq!(*at(&mut carried["spec"], field), value, "{field}");
    Some(id.to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hostile_text_is_taken_whole_or_refused_by_the_name_of_its_field_and_registers_nothing() {
    let world = world();
    let agent = Agent::with_memory(3000).await;
    let nomad = format!("http://{}", agent.address());
    let service = Service::start(&nomad, &world.registry, &[]);
    let (api, nomad_api) = (Api::new(&service.url), Nomad::new(&nomad));
    // Texts that are a Variable's path are taken as that.
    let credentials = json!({ "Path": "--help", "Items": { "token": "t" } });
    Api::new(&nomad).call(Method::PUT, "/v1/var/--help", Some(&credentials)).await;
    let repository = world.repository("");
    let mut all = Vec::new();
    fields(&DOCUMENT["components"]["schemas"]["Submission"], "", &mut all);
    assert!(
        ["ssh", "timeouts.build", "resources.publish.cpu", "resources.unknown"]
            .iter()
            .all(|of| all.contains(&(*of).to_owned())),
        "{all:?}"
    );
    let mut jobs = Vec::new();
    for text in hostile().into_iter().chain(["a\0b".to_owned()]) {
        for field in &all {
            for value in [json!(text), json!([text]), json!({ "NAME": text }), json!({ &text: "value" })] {
                let mut job = world.job(&repository);
                // What is taken waits for room that there is not.
                job["resources"]["build"]["memory_mb"] = json!(4000);
                *at(&mut job, field) = value;
                jobs.push((job, field.as_str()));
            }
        }
    }
    let tried = jobs.iter().map(|(job, field)| taken_whole_or_refused(&api, &nomad_api, job, field));
    let taken: Vec<_> = stream::iter(tried).buffer_unordered(8).filter_map(async |id| id).collect().await;
    for id in &taken {
        agent.owns(id);
    }

    let there = nomad_api.get("/v1/jobs?prefix=nb-").await;
    let there = there.as_array().unwrap().iter().map(|job| job["ID"].as_str().unwrap().to_owned());
    assert_eq!(there.collect::<BTreeSet<_>>(), taken.iter().cloned().collect());
    for (prefix, place) in [("nomad-build/outcomes/", 2), ("nomad-build/claims/", 2), ("nomad/jobs/nb-", 2)] {
        let there = nomad_api.variables(prefix).await;
        let of = |path: &String| path.split('/').nth(place).unwrap().to_owned();
        assert!(there.iter().map(of).all(|id| taken.contains(&id)), "{there:?}");
    }
    assert!(taken.len() > 60, "{}", taken.len());
    assert_eq!(nomad_api.variables("nomad-build/outcomes/").await.len(), taken.len());
}

/// Whether a field is free text, or a ref or path, of which the repository decides.
fn may_hold(field: &str, value: &Value) -> bool {
    let text = value.to_string();
    match field {
        "build_args" | "labels" | "test_env" => value["NAME"].is_string() && !text.contains("\\u0000"),
        "test_commands" => value.is_array() && !text.contains("\\u0000"),
        "git_ref" => value.is_string() && !text.contains([' ', '\\', '~', '*', '?']),
        "dockerfile_path" | "context_path" => value.is_string() && !text.contains("\\n"),
        // Letters and dashes are a Variable's path, which is only ever part of a URL's.
        "git_credentials_path" | "registry_credentials_path" => text == "\"--help\"",
        _ => false,
    }
}

#[tokio::test]
async fn build_arguments_labels_the_environment_and_commands_arrive_byte_for_byte() {
    let world = world();
    let texts = hostile();
    let (mut lines, mut steps, mut commands) = (String::new(), "RUN true".to_owned(), Vec::new());
    let mut job = json!({});
    for (index, text) in texts.iter().enumerate() {
        let name = format!("V{index}");
        writeln!(lines, "ARG {name}").unwrap();
        write!(steps, " && printf %s \"${name}\" | sha256sum > /{name}").unwrap();
        for field in ["build_args", "labels", "test_env"] {
            job[field][&name] = json!(text);
        }
        let hash = format!("{}  -", sha256(text));
        commands.push(format!(
            "test \"$(cat /{name})\" = '{hash}' && test \"$(printf %s \"${name}\" | sha256sum)\" = '{hash}' \
             && test \"$(printf %s {} | sha256sum)\" = '{hash}'",
            word(text)
        ));
    }
    let repository = world.repository(&(lines + &steps));
    let mut submission = world.job(&repository);
    for field in ["labels", "test_env"] {
        submission[field] = job[field].clone();
    }
    submission["build_args"].as_object_mut().unwrap().extend(job["build_args"].as_object().unwrap().clone());
    submission["test_commands"] = json!([commands.join(" && ")]);
    let (_, status) = world.api().run(&submission).await;
    assert_eq!(status["status"], "SUCCEEDED", "{status:#}");

    let image = format!("{}/{}:one", world.registry, image_of(&submission));
    docker(&["pull", "--quiet", &image]).await.unwrap();
    let labels = docker(&["image", "inspect", "--format", "{{json .Config.Labels}}", &image]).await.unwrap();
    docker(&["rmi", "--force", &image]).await.unwrap();
    let labels: Value = serde_json::from_str(&labels).unwrap();
    for (index, text) in texts.iter().enumerate() {
        assert_eq!(labels[format!("V{index}")], json!(text));
    }
}

#[tokio::test]
async fn a_hostile_branch_is_a_branch() {
    let world = world();
    let branches = ["$(id)${NOMAD_TOKEN}", "%{http_code}{{env}}", "it's\"so\";id&&id|id", "gr\u{fc}n/-x"];
    let mut repository = world.repository("COPY branch /branch");
    for branch in branches {
        repository.git(&["checkout", "--quiet", "-b", branch]);
        repository = repository.file("branch", branch).commit();
    }
    let mut jobs = Vec::new();
    for branch in branches {
        let mut job = world.job(&repository);
        job["git_ref"] = json!(branch);
        job["test_commands"] = json!([format!("test \"$(cat /branch)\" = {}", word(branch))]);
        jobs.push((world.api().submit(&job).await, branch));
    }
    for (id, branch) in jobs {
        let status = world.api().wait_for_end(&id).await;
        assert_eq!(status["status"], "SUCCEEDED", "{branch}: {status:#}");
        assert_eq!(status["git"]["ref"], format!("refs/heads/{branch}"));
    }
}

#[tokio::test]
async fn a_hostile_path_is_a_path() {
    let world = world();
    // Each is once the context's and once the Dockerfile's.
    let names = [
        "$(id)${NOMAD_TOKEN}%{http_code}",
        "{{ env \"PATH\" }}",
        "it's \"so\"a*[b]?",
        "--help",
        "-rf",
        "!x #gr\u{fc}n",
    ];
    let pairs: Vec<_> = names.into_iter().zip(names.into_iter().cycle().skip(1)).collect();
    let mut repository = Repository::new();
    for (name, other) in &pairs {
        repository = repository
            .file(&format!("{name}/{other}.docker"), "ARG BASE\nFROM $BASE\nCOPY name /name\n")
            .file(&format!("{name}/name"), name);
    }
    let repository = repository.commit();
    let mut jobs = Vec::new();
    for (name, other) in pairs {
        let mut job = world.job(&repository);
        job["context_path"] = json!(name);
        job["dockerfile_path"] = json!(format!("{name}/{other}.docker"));
        job["test_commands"] = json!([format!("test \"$(cat /name)\" = {}", word(name))]);
        jobs.push((world.api().submit(&job).await, name));
    }
    for (id, name) in jobs {
        let status = world.api().wait_for_end(&id).await;
        assert_eq!(status["status"], "SUCCEEDED", "{name}: {status:#}");
    }
}
