//! Secrets of a build: its steps mount them, and they are nowhere else.

mod vault;

use std::process::Command;

use reqwest::Method;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use uuid::Uuid;

use crate::sources::payloads;
use crate::support::{docker, eventually, image_of, tags_of, world};

/// A step that writes the digest of what it mounted, and shows it in several ways. It is no other test's.
fn step() -> String {
    format!(
        "RUN --mount=type=secret,id=npmrc,required=true : {} && sha256sum /run/secrets/npmrc | cut -d' ' -f1 > /sum; \
         echo \"token is $(cat /run/secrets/npmrc)\"; base64 /run/secrets/npmrc; ls -l /run/secrets",
        Uuid::new_v4()
    )
}

fn sum(text: &str) -> String {
    Sha256::digest(text).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[tokio::test]
async fn a_step_mounts_the_secrets_of_its_build_and_they_are_nowhere_else() {
    let (world, nomad) = (world(), world().nomad_api());
    let secret = format!("canary-{}", Uuid::new_v4());
    let path = nomad.credentials(&json!({ "npm.token": secret, "other": "not-asked-for" })).await;
    let repository = world.repository(&step());
    let mut job = world.job(&repository);
    job["build_secrets"] = json!({ "npmrc": format!("{path}#npm.token") });
    job["test_commands"] =
        json!([format!("[ \"$(cat /sum)\" = {} ]", sum(&secret)), "! [ -s /run/secrets/npmrc ]",]);
    let (id, status) = world.api().run(&job).await;
    let logs = world.api().logs(&id).await;
    assert_eq!(status["status"], "SUCCEEDED", "{status:#}\n{logs:#}");
    assert!(logs["build"].as_str().unwrap().contains("token is ***\n"), "{logs:#}");
    eventually("the copy goes with the job's end", async || {
        nomad.variables(&format!("nomad/jobs/{id}")).await.is_empty().then_some(())
    })
    .await;
    let payloads = payloads(&nomad.get(&format!("/v1/job/{id}")).await);
    assert!(payloads.contains(&format!("{path}#npm.token")), "the item is named: {payloads}");
    let mut seen = logs.to_string() + &status.to_string() + &payloads;
    for part in ["", "/allocations", "/evaluations"] {
        seen += &nomad.get(&format!("/v1/job/{id}{part}")).await.to_string();
    }
    assert_eq!(tags_of(&world.registry, image_of(&job)).await, ["one"]);
    let image = format!("{}/{}:one", world.registry, image_of(&job));
    docker(&["pull", "--quiet", &image]);
    seen += &docker(&["image", "inspect", &image]);
    seen += &docker(&["history", "--no-trunc", &image]);
    let archive = tempfile::tempdir().unwrap();
    let file = archive.path().join("image.tar");
    docker(&["save", "--output", file.to_str().unwrap(), &image]);
    docker(&["rmi", "--force", &image]);
    let bytes = std::fs::read(file).unwrap();
    assert!(!bytes.windows(secret.len()).any(|window| window == secret.as_bytes()));
    assert!(
        !seen.contains(&secret) && seen.contains("npm.token"),
        "the path is named, and what is there is not"
    );
}

#[tokio::test]
async fn what_a_step_left_that_had_a_secret_is_in_the_cache_for_who_may_name_that_secret_alone() {
    let (world, nomad) = (world(), world().nomad_api());
    let repository = world.repository(&step());
    let mut paths = Vec::new();
    for secret in ["ours", "theirs"] {
        let secret = format!("{secret}-{}", Uuid::new_v4());
        paths.push((nomad.credentials(&json!({ "npm.token": secret })).await, sum(&secret)));
    }
    for (turn, (path, sum)) in [&paths[0], &paths[1], &paths[0]].into_iter().enumerate() {
        let mut job = world.job(&repository);
        job["build_secrets"] = json!({ "npmrc": format!("{path}#npm.token") });
        job["test_commands"] = json!([format!("[ \"$(cat /sum)\" = {sum} ]")]);
        let (id, status) = world.api().run(&job).await;
        let log = world.api().logs(&id).await;
        assert_eq!(status["status"], "SUCCEEDED", "{turn}: {status:#}\n{log:#}");
        let ran = log["build"].as_str().unwrap().contains("token is ***\n");
        assert_eq!(ran, turn < 2, "{turn}: {log:#}");
    }
}

/// A base image in which there is `ssh-add`, of this machine's.
fn base_with_ssh_add() -> String {
    let mut tool = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tools/base-image"));
    let program = Command::new("sh").args(["-c", "command -v ssh-add"]).output().unwrap().stdout;
    let program = String::from_utf8(program).unwrap();
    tool.arg(&world().registry).arg(format!("ssh-{}", Uuid::new_v4())).arg(program.trim());
    let output = tool.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_step_signs_with_a_key_that_it_never_sees() {
    let (world, nomad) = (world(), world().nomad_api());
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("key");
    let made = Command::new("ssh-keygen")
        .args(["-q", "-t", "ed25519", "-N", "", "-C", "it", "-f"])
        .arg(&file)
        .status();
    assert!(made.unwrap().success());
    let read = |name: &str| std::fs::read_to_string(folder.path().join(name)).unwrap();
    let (key, public) = (read("key"), read("key.pub"));
    let path = nomad.credentials(&json!({ "ssh_key": key })).await;
    // That it has something signed shows that the key is there; that it cannot be removed, that nothing else is passed on.
    let repository = world.repository(&format!(
        "RUN --mount=type=ssh,id=deploy,required=true : {} && ssh-add -L > /keys && ssh-add -T /keys && ! ssh-add -D",
        Uuid::new_v4()
    ));
    let mut job = world.job(&repository);
    job["build_args"]["BASE"] = json!(base_with_ssh_add());
    let (id, status) = world.api().run(&job).await;
    assert_eq!(status["failure"]["reason"], "build_failed", "{status:#}");
    let log = world.api().logs(&id).await;
    assert!(log["build"].as_str().unwrap().contains("names no key \"deploy\""), "{log:#}");

    job["ssh"] = json!({ "deploy": format!("{path}#ssh_key") });
    job["test_commands"] = json!([format!("[ \"$(cat /keys)\" = '{}' ]", public.trim())]);
    let (id, status) = world.api().run(&job).await;
    let log = world.api().logs(&id).await;
    assert_eq!(status["status"], "SUCCEEDED", "{status:#}\n{log:#}");
    let seen = log.to_string() + &status.to_string() + &payloads(&nomad.get(&format!("/v1/job/{id}")).await);
    assert!(seen.contains(&format!("{path}#ssh_key")), "the item is named: {seen}");
    let secret = key.lines().nth(1).unwrap();
    assert!(!seen.contains(secret), "{seen}");
    eventually("the copy goes with the job's end", async || {
        nomad.variables(&format!("nomad/jobs/{id}")).await.is_empty().then_some(())
    })
    .await;
    let allocation = status["nomad"]["allocation"].as_str().unwrap();
    let in_it = |process: std::fs::DirEntry| {
        std::fs::read_link(process.path().join("cwd"))
            .is_ok_and(|folder| folder.to_string_lossy().contains(allocation))
    };
    eventually("no agent is left", async || {
        (!std::fs::read_dir("/proc").unwrap().flatten().any(in_it)).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_key_that_no_agent_takes_is_refused_by_its_id_before_anything_is_registered() {
    let world = world();
    let locked =
        "-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\n\nAAAA\n-----END RSA PRIVATE KEY-----";
    let path = world.nomad_api().credentials(&json!({ "a": "ssh-ed25519 AAAA", "b": locked })).await;
    let repository = world.repository("");
    let mut job = world.job(&repository);
    job["owner"] = json!(format!("secrets-{}", Uuid::new_v4()));
    job["ssh"] = json!({ "a": format!("{path}#a"), "b": format!("{path}#b"), "c": format!("{path}#c") });
    let (status, body) = world.api().call(Method::POST, "/jobs", Some(&job)).await;
    assert_eq!(status, 400, "{body}");
    let details = body["error"]["details"].as_array().unwrap();
    for (field, why) in
        [("ssh.a", "is no private key"), ("ssh.b", "has a passphrase"), ("ssh.c", "is not there")]
    {
        let said = |detail: &&Value| detail["field"] == field;
        let message = details.iter().find(said).unwrap()["message"].as_str().unwrap();
        assert!(message.contains(why), "{field}: {message}");
    }
    assert!(world.nomad_api().made_by(job["owner"].as_str().unwrap()).await.is_empty());

    // What looks like one and is none, the agent refuses.
    let broken = "-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n-----END OPENSSH PRIVATE KEY-----";
    let path = world.nomad_api().credentials(&json!({ "key": broken })).await;
    job["ssh"] = json!({ "default": format!("{path}#key") });
    let (_, status) = world.api().run(&job).await;
    assert_eq!(status["failure"]["reason"], "build_failed", "{status:#}");
    let message = status["failure"]["message"].as_str().unwrap();
    assert!(message.contains("the key of ssh.default cannot be used: "), "{message}");
}

#[tokio::test]
async fn a_secret_that_cannot_be_read_is_refused_by_its_id_and_nothing_is_registered() {
    let world = world();
    let path = world.nomad_api().credentials(&json!({ "token": "x" })).await;
    let mut job = world.job(&world.repository(&step()));
    job["owner"] = json!(format!("secrets-{}", Uuid::new_v4()));
    job["build_secrets"] = json!({
        "good": format!("{path}#token"),
        "gone": "creds/nobody/wrote/this#token",
        "npmrc": format!("{path}#other"),
    });
    let (status, body) = world.api().call(Method::POST, "/jobs", Some(&job)).await;
    assert_eq!(status, 400, "{body}");
    let mut fields: Vec<_> =
        body["error"]["details"].as_array().unwrap().iter().map(|detail| detail["field"].clone()).collect();
    fields.sort_by_key(ToString::to_string);
    assert_eq!(fields, ["build_secrets.gone", "build_secrets.npmrc"]);
    let made = world.nomad_api().made_by(job["owner"].as_str().unwrap()).await;
    assert!(made.is_empty(), "{made:?}");
}

#[tokio::test]
async fn of_more_credentials_than_a_build_can_be_given_the_field_that_brings_most_is_named() {
    let world = world();
    let nomad = world.nomad_api();
    let mut job = world.job(&world.repository(&step()));
    job["owner"] = json!(format!("secrets-{}", Uuid::new_v4()));
    let host = job["registry_url"].as_str().unwrap().to_owned();
    for (login, secret, field) in
        [(40, 25, "registry_credentials_path"), (25, 40, "build_secrets")].map(|(login, secret, field)| {
            (json!({ "username": "u", "password": "p".repeat(login << 10) }), "s".repeat(secret << 10), field)
        })
    {
        let config = json!({ "auths": { host.as_str(): login } }).to_string();
        job["registry_credentials_path"] = json!(nomad.credentials(&json!({ "config.json": config })).await);
        let path = nomad.credentials(&json!({ "token": secret })).await;
        job["build_secrets"] = json!({ "npmrc": format!("{path}#token") });
        let (status, body) = world.api().call(Method::POST, "/jobs", Some(&job)).await;
        assert_eq!((status.as_u16(), &body["error"]["details"][0]["field"]), (400, &json!(field)), "{body}");
        let message = body["error"]["details"][0]["message"].as_str().unwrap();
        assert!(message.len() < 300 && message.contains("61440"), "{message}");
    }
    assert!(nomad.made_by(job["owner"].as_str().unwrap()).await.is_empty());
}

#[tokio::test]
async fn a_build_without_a_secret_that_a_step_requires_fails_by_name() {
    let world = world();
    let repository = world.repository(&step());
    let (id, status) = world.api().run(&world.job(&repository)).await;
    assert_eq!(status["failure"]["reason"], json!("build_failed"), "{status:#}");
    let message = status["failure"]["message"].as_str().unwrap();
    assert!(message.contains("npmrc"), "{message}\n{:#}", world.api().logs(&id).await);
    assert_eq!(status["image"]["digest"], Value::Null);
}
