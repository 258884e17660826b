//! What a user sends is refused by name, or carried through verbatim: nothing on the way makes anything of it.

use std::fmt::Write as _;

use reqwest::Method;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::registry::server::docker;
use crate::support::{Repository, image_of, world};

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

#[tokio::test]
async fn a_hostile_text_is_taken_whole_or_refused_by_the_name_of_its_field() {
    let world = world();
    let repository = world.repository("");
    let fields = [
        "owner",
        "repo_url",
        "git_ref",
        "git_credentials_path",
        "dockerfile_path",
        "context_path",
        "image_tags",
        "registry_url",
        "registry_credentials_path",
        "image_name",
        "target",
        "test_commands",
        "test_entry_point",
        "test_env",
        "build_args",
        "labels",
        "timeouts",
        "resources",
        "no_cache",
        "priority",
        "unknown",
    ];
    for text in hostile().into_iter().chain(["a\0b".to_owned()]) {
        for field in fields {
            for value in [json!(text), json!([text]), json!({ "NAME": text }), json!({ &text: "value" })] {
                let mut job = world.job(&repository);
                job[field] = value.clone();
                let (status, body) = world.api().call(Method::POST, "/jobs?dry_run=true", Some(&job)).await;
                if status == 200 {
                    assert!(may_hold(field, &value), "{field} took {value}");
                    continue;
                }
                assert_eq!(status, 400, "{field} {value}: {body}");
                let details = body["error"]["details"].as_array().unwrap();
                let named = |detail: &Value| detail["field"].as_str().unwrap().starts_with(field);
                assert!(!details.is_empty() && details.iter().all(named), "{field} {value}: {body}");
            }
        }
    }
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
