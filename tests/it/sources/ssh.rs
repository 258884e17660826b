//! Repositories over SSH: with the key of a Variable, and with hosts that are known.

use nomad_build::git::{Credentials, GitError};
use reqwest::{Method, StatusCode};
use serde_json::json;

use super::{has_version, payloads, versions};
use crate::git::check_out_main;
use crate::support::{Repository, Ssh, eventually, world};

#[tokio::test]
async fn a_repository_over_ssh_is_built_with_the_key_of_a_variable_that_shows_up_nowhere() {
    let world = world();
    let (api, nomad) = (world.api(), world.nomad_api());
    let (server, repository) = (Ssh::serve().await, versions(world));
    // As `nomad var put ssh_key="$(cat key)"` has it, and as an editor elsewhere.
    let path = nomad
        .credentials(&json!({
            "ssh_key": server.key().trim_end().replace('\n', "\r\n"),
            "known_hosts": server.known_host(),
            "unneeded": "stays-where-it-is",
        }))
        .await;
    let mut job = world.job(&repository);
    job["repo_url"] = json!(server.url(&repository));
    job["git_credentials_path"] = json!(path);
    job["test_commands"] = has_version("3");
    let (id, status) = api.run(&job).await;
    let log = api.logs(&id).await["build"].as_str().unwrap().to_owned();
    assert_eq!(status["status"], "SUCCEEDED", "{status:#}\n{log}\n{}", server.said());
    let nomad_job = nomad.get(&format!("/v1/job/{id}")).await;
    let seen = payloads(&nomad_job) + &nomad_job.to_string() + &status.to_string() + &log;
    assert!(seen.contains(&path));
    for line in server.key().lines().filter(|line| !line.starts_with("-----")) {
        assert!(!seen.contains(line), "{line}");
    }
    eventually("the copy goes with the job's end", async || {
        nomad.variables(&format!("nomad/jobs/{id}")).await.is_empty().then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_host_that_is_not_the_known_one_is_told_as_such_and_a_key_it_does_not_know_is_unauthorized() {
    let world = world();
    let (server, other, repository) = (Ssh::serve().await, Ssh::serve().await, versions(world));
    let another_key = server.known_host().rsplit_once("ssh-ed25519").unwrap().0.to_owned()
        + other.known_host().split_once(' ').unwrap().1;
    for (key, known_hosts, reason, what) in [
        (server.key(), other.known_host(), "checkout_failed", "known_hosts"),
        (server.key(), another_key, "checkout_failed", "known_hosts"),
        (other.key(), server.known_host(), "unauthorized", "git_credentials_path"),
    ] {
        let items = json!({ "ssh_key": key, "known_hosts": known_hosts });
        let mut job = world.job(&repository);
        job["repo_url"] = json!(server.url(&repository));
        job["git_credentials_path"] = json!(world.nomad_api().credentials(&items).await);
        let (_, status) = world.api().run(&job).await;
        assert_eq!(status["failure"]["reason"], reason, "{status:#}");
        assert!(status["failure"]["message"].as_str().unwrap().contains(what), "{status:#}");
    }
}

#[tokio::test]
async fn a_variable_without_what_ssh_takes_is_refused_by_name() {
    let world = world();
    let (server, repository) = (Ssh::serve().await, versions(world));
    for (items, what) in [
        (json!({ "username": "me", "password": "secret" }), "ssh_key and known_hosts"),
        (json!({ "ssh_key": server.key() }), "ssh_key and known_hosts"),
        (json!({ "ssh_key": "ssh-ed25519 AAAA", "known_hosts": "h" }), "no private key"),
    ] {
        let mut job = world.job(&repository);
        job["repo_url"] = json!(server.url(&repository));
        job["git_credentials_path"] = json!(world.nomad_api().credentials(&items).await);
        let (status, body) = world.api().call(Method::POST, "/jobs", Some(&job)).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{body}");
        let detail = &body["error"]["details"][0];
        assert_eq!(detail["field"], "git_credentials_path", "{body}");
        assert!(detail["message"].as_str().unwrap().contains(what), "{body}");
    }
}

#[tokio::test]
async fn a_key_is_shown_to_no_host_that_was_not_named_with_it() {
    let (server, other) = (Ssh::serve().await, Ssh::serve().await);
    other.let_in(&server);
    let inner = Repository::new().commit();
    let head = inner.git(&["rev-parse", "HEAD"]);
    let list = format!("[submodule \"x\"]\n\tpath = x\n\turl = {}\n", other.url(&inner));
    let outer = Repository::new().file(".gitmodules", &list).commit();
    outer.git(&["update-index", "--add", "--cacheinfo", &format!("160000,{head},x")]);
    outer.git(&["commit", "--quiet", "--message=x"]);
    let key = |known_hosts: String| Credentials::Key { private: server.key().into(), known_hosts };
    let both = [server.known_host(), other.known_host()].join("\n") + "\n";
    check_out_main(&server.url(&outer), Some(&key(both))).await.1.unwrap();
    let one = server.known_host() + "\n";
    let refused = check_out_main(&server.url(&outer), Some(&key(one))).await.1;
    assert!(matches!(refused, Err(GitError::UnknownHost(_))), "{refused:?}");
}
