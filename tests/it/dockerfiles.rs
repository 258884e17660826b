//! What Dockerfiles and tests may count on: stages, arguments, labels, caches, ignore files, private bases.

use std::process::Command;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use reqwest::Method;
use serde_json::{Value, json};

use crate::registry::server::{Server, docker};
use crate::support::{Api, Repository, Service, World, base_archive, image_of, tags_of, world};

/// The registry's user, as its password file has it.
const LOGIN: (&str, &str) = ("ci", "relay-test");

/// Runs a job that must succeed.
async fn succeeds(world: &World, job: &Value) -> Value {
    let (_, status) = world.api().run(job).await;
    assert_eq!(status["status"], "SUCCEEDED", "{status:#}");
    status
}

#[tokio::test]
async fn a_cache_mount_keeps_what_an_earlier_build_of_its_owner_left_and_nobody_else_s() {
    let world = world();
    let id = uuid::Uuid::new_v4();
    let line = format!(
        "ARG ROUND\nRUN --mount=type=cache,id={id},target=/cache cat /cache/seen > /seen || true; echo yes > /cache/seen"
    );
    let repository = world.repository(&line);
    let owners = [uuid::Uuid::new_v4().to_string(), uuid::Uuid::new_v4().to_string()];
    for (owner, seen) in [(&owners[0], ""), (&owners[0], "yes"), (&owners[1], "")] {
        let mut job = world.job(&repository);
        job["owner"] = json!(owner);
        // The step is run in each build, as its argument is new.
        job["build_args"]["ROUND"] = json!(uuid::Uuid::new_v4().to_string());
        job["test_commands"] = json!([format!("test \"$(cat /seen)\" = \"{seen}\"")]);
        succeeds(world, &job).await;
    }
}

#[tokio::test]
async fn the_stage_that_is_asked_for_is_built_and_without_asking_the_last() {
    let world = world();
    let repository = Repository::new()
        .file(
            "Dockerfile",
            "ARG BASE\nFROM $BASE AS tools\nRUN echo tools > /stage\nFROM $BASE AS middle\n\
             COPY --from=tools /stage /from\nRUN echo middle > /stage\nFROM middle\nRUN echo last > /stage\n",
        )
        .commit();
    for (target, stage, from) in
        [(json!("tools"), "tools", ""), (json!("middle"), "middle", "tools"), (Value::Null, "last", "tools")]
    {
        let mut job = world.job(&repository);
        job["target"] = target;
        job["test_commands"] = json!([
            format!("test \"$(cat /stage)\" = {stage}"),
            format!("test \"$(cat /from 2>/dev/null)\" = \"{from}\""),
        ]);
        succeeds(world, &job).await;
    }
}

#[tokio::test]
async fn build_arguments_override_defaults_and_only_where_they_are_declared() {
    let world = world();
    let repository =
        world.repository("ARG GIVEN=default\nARG KEPT=default\nRUN echo \"$GIVEN $KEPT $LOST\" > /args");
    let mut job = world.job(&repository);
    job["build_args"]["GIVEN"] = json!("given");
    job["build_args"]["LOST"] = json!("lost");
    job["test_commands"] = json!(["test \"$(cat /args)\" = 'given default '"]);
    succeeds(world, &job).await;
}

#[tokio::test]
async fn the_pulled_image_has_the_labels_of_its_user_its_source_and_its_dockerfile() {
    let world = world();
    let repository = world.repository("LABEL from.dockerfile=yes org.example.team=overridden");
    let mut job = world.job(&repository);
    job["labels"] = json!({ "org.example.team": "a \"team\"", "version": "1.0" });
    let status = succeeds(world, &job).await;
    let image = format!("{}/{}:one", world.registry, image_of(&job));
    docker(&["pull", "--quiet", &image]).await.unwrap();
    let labels = docker(&["image", "inspect", "--format", "{{json .Config.Labels}}", &image]).await.unwrap();
    docker(&["rmi", "--force", &image]).await.unwrap();
    let labels: Value = serde_json::from_str(&labels).unwrap();
    assert_eq!(labels["org.opencontainers.image.source"], repository.url());
    assert_eq!(labels["org.opencontainers.image.revision"], repository.git(&["rev-parse", "HEAD"]));
    let created = labels["org.opencontainers.image.created"].as_str().unwrap();
    let created = chrono::DateTime::parse_from_rfc3339(created).unwrap();
    let time = |name: &str| {
        chrono::DateTime::parse_from_rfc3339(status["phase_timestamps"][name].as_str().unwrap()).unwrap()
    };
    // Written to the second.
    assert!(created.timestamp() >= time("build_start").timestamp() && created <= time("build_end"));
    for (name, value) in [("org.example.team", "a \"team\""), ("version", "1.0"), ("from.dockerfile", "yes")]
    {
        assert_eq!(labels[name], value, "{labels:#}");
    }
}

/// A repository whose image has one program and nothing else.
fn scratch(entry_point: &str) -> Repository {
    let dockerfile = format!("FROM scratch\nCOPY busybox /busybox\nENTRYPOINT {entry_point}\n");
    let repository = Repository::new().file("Dockerfile", &dockerfile);
    let busybox = Command::new("sh").args(["-c", "command -v busybox"]).output().unwrap();
    let busybox = String::from_utf8(busybox.stdout).unwrap();
    std::fs::copy(busybox.trim(), repository.path().join("busybox")).unwrap();
    repository.commit()
}

#[tokio::test]
async fn an_image_without_a_shell_is_tested_by_its_entry_point() {
    let world = world();
    let repository = scratch("[\"/busybox\", \"true\"]");
    let mut job = world.job(&repository);
    job["test_entry_point"] = json!(true);
    succeeds(world, &job).await;

    let repository = scratch("[\"/busybox\", \"sh\", \"-c\", \"exit 7\"]");
    let mut job = world.job(&repository);
    job["test_entry_point"] = json!(true);
    let (_, status) = world.api().run(&job).await;
    assert_eq!(status["status"], "FAILED", "{status:#}");
    assert_eq!(status["failure"]["reason"], "test_failed");
    assert_eq!(status["failure"]["exit_code"], 7);
    assert!(tags_of(&world.registry, image_of(&job)).await.is_empty());
}

#[tokio::test]
async fn tests_run_in_their_order_each_in_a_fresh_container_until_the_first_that_fails() {
    let world = world();
    let repository = world.repository("RUN true\nENTRYPOINT [\"/bin/false\"]");
    let mut job = world.job(&repository);
    job["test_commands"] = json!([
        "echo first; echo left > /left",
        "echo second; test ! -e /left && test ! -e /tmp/left",
        "echo third; exit 9",
        "echo fourth",
    ]);
    let (_, status) = world.api().run(&job).await;
    assert_eq!(status["status"], "FAILED", "{status:#}");
    assert_eq!((&status["failure"]["phase"], &status["failure"]["exit_code"]), (&json!("test"), &json!(9)));
    assert_eq!(status["failure"]["message"], "test 3 of 4 ended with exit code 9");
    let allocation = status["nomad"]["allocation"].as_str().unwrap();
    let log = world.nomad_api().task_log(allocation, "test").await;
    let said: Vec<_> = log.lines().filter_map(|line| line.split(' ').nth(3)).collect();
    let said: Vec<_> =
        said.into_iter().filter(|word| ["first", "second", "third", "fourth"].contains(word)).collect();
    assert_eq!(said, ["first", "second", "third"], "{log}");
}

#[tokio::test]
async fn the_environment_of_the_tests_is_theirs_and_not_the_image_s() {
    let world = world();
    let repository = world.repository("ENV KEPT=image CHANGED=image");
    let mut job = world.job(&repository);
    job["test_env"] = json!({ "CHANGED": "test", "NEW": "a b", "EMPTY": "" });
    job["test_commands"] = json!([
        "test \"$KEPT|$CHANGED|$NEW|${EMPTY-unset}|${NOMAD_JOB_ID-unset}\" = 'image|test|a b||unset'"
    ]);
    succeeds(world, &job).await;
    let image = format!("{}/{}:one", world.registry, image_of(&job));
    docker(&["pull", "--quiet", &image]).await.unwrap();
    let env = docker(&["image", "inspect", "--format", "{{json .Config.Env}}", &image]).await.unwrap();
    docker(&["rmi", "--force", &image]).await.unwrap();
    assert!(env.contains("CHANGED=image") && !env.contains("NEW"), "{env}");
}

#[tokio::test]
async fn what_the_ignore_file_names_is_not_in_the_build() {
    let world = world();
    let repository = world
        .repository("COPY . /src")
        .file(
            ".dockerignore",
            "# a comment\nDockerfile\n.dockerignore\n*.log\n!keep.log\n**/secret\ndocs\n!docs/readme\n.git\n",
        )
        .file("a.log", "")
        .file("keep.log", "")
        .file("deep/er/secret", "")
        .file("deep/er/kept", "")
        .file("docs/big", "")
        .file("docs/readme", "")
        .commit();
    let mut job = world.job(&repository);
    let want = "deep/er/kept docs/readme keep.log";
    job["test_commands"] =
        json!([format!("cd /src && test \"$(find . -type f | sed 's,^[.]/,,' | sort | xargs)\" = '{want}'")]);
    succeeds(world, &job).await;
}

#[tokio::test]
async fn a_step_behind_the_whole_context_is_taken_from_the_cache_unless_no_cache_is_asked_for() {
    let world = world();
    // Where another build of the same base is running, Engine 20.10 looks for no copy of the same content.
    let dockerfile = format!(
        "FROM scratch\nADD base.tar /\nCOPY . /src\nRUN : {} && cat /proc/sys/kernel/random/uuid > /id\n",
        uuid::Uuid::new_v4()
    );
    let repository = Repository::new().file("Dockerfile", &dockerfile);
    std::fs::copy(base_archive(&world.base).path(), repository.path().join("base.tar")).unwrap();
    let repository = repository.commit();
    let mut layers = Vec::new();
    for no_cache in [false, false, true] {
        let mut job = world.job(&repository);
        job["no_cache"] = json!(no_cache);
        succeeds(world, &job).await;
        let image = format!("{}/{}:one", world.registry, image_of(&job));
        docker(&["pull", "--quiet", &image]).await.unwrap();
        layers.push(
            docker(&["image", "inspect", "--format", "{{json .RootFS.Layers}}", &image]).await.unwrap(),
        );
        docker(&["rmi", "--force", &image]).await.unwrap();
    }
    assert_eq!(layers[0], layers[1]);
    assert_ne!(layers[1], layers[2]);
}

#[tokio::test]
async fn git_s_own_folder_is_in_the_context_only_where_that_is_asked_for() {
    let world = world();
    let repository = world.repository("COPY . /src");
    for (build_args, test) in [
        (json!({ "BASE": world.base }), "test ! -e /src/.git"),
        (json!({ "BASE": world.base, "BUILDKIT_CONTEXT_KEEP_GIT_DIR": "1" }), "test -e /src/.git/HEAD"),
    ] {
        let mut job = world.job(&repository);
        job["build_args"] = build_args;
        job["test_commands"] = json!([test]);
        succeeds(world, &job).await;
    }
}

/// Puts the base image into a registry that asks for a password; returns its name there, and the name by its digest.
async fn private_base(world: &World, registry: &Server) -> (String, String) {
    let base = format!("{}/base/private:latest", registry.host());
    docker(&["pull", "--quiet", &world.base]).await.unwrap();
    let config = tempfile::tempdir().unwrap();
    let folder = config.path().to_str().unwrap();
    let (user, password) = LOGIN;
    docker(&["--config", folder, "login", "--username", user, "--password", password, registry.host()])
        .await
        .unwrap();
    docker(&["tag", &world.base, &base]).await.unwrap();
    let said = docker(&["--config", folder, "push", &base]).await.unwrap();
    docker(&["rmi", &base]).await.unwrap();
    let digest = said.split_whitespace().find(|word| word.starts_with("sha256:")).unwrap();
    let by_digest = format!("{base}@{digest}");
    (base, by_digest)
}

#[tokio::test]
async fn a_private_registry_gives_the_base_and_takes_the_image_with_the_credentials_of_a_variable() {
    let world = world();
    let registry = Server::start(Some(LOGIN)).await;
    let (base, by_digest) = private_base(world, &registry).await;
    let service = Service::start(&world.nomad, registry.host(), &[]);
    let api = Api::new(&service.url);
    let login = world.nomad_api().credentials(&json!({ "username": LOGIN.0, "password": LOGIN.1 })).await;
    let wrong = world.nomad_api().credentials(&json!({ "username": LOGIN.0, "password": "wrong" })).await;
    let repository = world.repository("RUN true");
    let mut mounted = 0;
    for (base, path, phase) in [
        (&base, json!(login), None),
        (&base, Value::Null, Some("build")),
        // The engine has it by now, under this very digest.
        (&by_digest, Value::Null, Some("build")),
        (&by_digest, json!(login), None),
        (&base, json!(wrong), Some("build")),
        (&world.base, json!(login), None),
        (&world.base, Value::Null, Some("publish")),
        (&world.base, json!(wrong), Some("publish")),
    ] {
        let mut job = world.job(&repository);
        job["registry_url"] = json!(registry.host());
        job["registry_credentials_path"] = path.clone();
        job["build_args"]["BASE"] = json!(base);
        let (_, status) = api.run(&job).await;
        let case = format!("{base} {path}: {status:#}");
        if phase.is_none() {
            assert_eq!(status["status"], "SUCCEEDED", "{case}");
            assert!(status["image"]["digest"].as_str().unwrap().starts_with("sha256:"), "{case}");
            // What the registry has of a base is not sent to it again; of one that is elsewhere it has nothing.
            mounted += usize::from(*base != world.base);
            assert_eq!(registry.mounts().await, mounted, "{case}");
            continue;
        }
        assert_eq!(status["status"], "FAILED", "{case}");
        assert_eq!(status["failure"]["phase"], json!(phase), "{case}");
        assert_eq!(status["failure"]["reason"], "unauthorized", "{case}");
    }
}

#[tokio::test]
async fn a_docker_configuration_opens_the_registry_and_those_that_a_build_pulls_from() {
    let world = world();
    let (bases, images) = (Server::start(Some(LOGIN)).await, Server::start(Some(LOGIN)).await);
    let (base, _) = private_base(world, &bases).await;
    let service = Service::start(&world.nomad, &format!("{},{}", bases.host(), images.host()), &[]);
    let api = Api::new(&service.url);
    let auth = json!({ "auth": BASE64_STANDARD.encode(format!("{}:{}", LOGIN.0, LOGIN.1)) });
    let config = json!({ "auths": {
        format!("http://{}/v2/", bases.host()): auth,
        images.host(): auth,
    } });
    let path = world.nomad_api().credentials(&json!({ "config.json": config.to_string() })).await;
    let repository = world.repository("RUN true");
    let mut job = world.job(&repository);
    job["registry_url"] = json!(images.host());
    job["registry_credentials_path"] = json!(path);
    job["build_args"]["BASE"] = json!(base);
    let (id, status) = api.run(&job).await;
    assert_eq!(status["status"], "SUCCEEDED", "{status:#}\n{:#}", api.logs(&id).await);
    // One that says nothing of the registry is refused before anything is registered.
    job["registry_url"] = json!(world.registry);
    let (code, body) = api.call(Method::POST, "/jobs", Some(&job)).await;
    assert_eq!(code, 400, "{body}");
    let detail = &body["error"]["details"][0];
    assert_eq!(detail["field"], "registry_credentials_path", "{body}");
    assert!(detail["message"].as_str().unwrap().contains(&world.registry), "{body}");
    assert!(!body.to_string().contains(LOGIN.1), "{body}");
}
