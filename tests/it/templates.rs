//! The shipped job templates, each way a runner gets onto a node.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use nomad_build::engine::{BuildRequest, DockerEngine, Engine as _};
use serde_json::{Value, json};

use crate::sources::http;
use crate::support::{Api, Hold, Repository, Service, World, eventually, image_of, ports, world};

/// Has a job built, and cleans it up; its ID.
async fn builds_tests_and_publishes(world: &World, service: &Service, repository: &Repository) -> String {
    let mut job = world.job(repository);
    // A runner in a container sees no folder of this machine.
    job["repo_url"] = json!(http::serve(repository, None).await);
    job["test_commands"] = json!(["test -f /built"]);
    let api = Api::new(&service.url);
    let (id, status) = api.run(&job).await;
    assert_eq!(status["status"], "SUCCEEDED", "{status:#}");
    let served = world.served(image_of(&job), "one").await;
    assert_eq!(served.map(Value::from).as_ref(), Some(&status["image"]["digest"]));
    // What cleans up on the node gets there in the same way.
    assert_eq!(api.post(&format!("/jobs/{id}/cleanup")).await["success"], true);
    id
}

fn said(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// Builds a folder's Dockerfile with BuildKit, which the docker program may lack, and pushes it.
async fn build_and_push(context: &Path, tag: &str, build_args: &[(&str, &str)]) {
    let request = BuildRequest {
        context: context.to_owned(),
        dockerfile: context.join("Dockerfile"),
        tag: tag.to_owned(),
        build_args: build_args
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect(),
        target: None,
        labels: BTreeMap::new(),
        no_cache: false,
        registry_auth: Vec::new(),
        secrets: BTreeMap::new(),
        agents: BTreeMap::new(),
        cache_namespace: "it".to_owned(),
        network: true,
        may_take: Box::new(|_| Ok(())),
    };
    let (output, mut said_by_engine) = tokio::sync::mpsc::channel(16);
    tokio::spawn(async move { while said_by_engine.recv().await.is_some() {} });
    DockerEngine::new("/var/run/docker.sock").build(request, output).await.unwrap();
    said(Command::new("docker").args(["push", "--quiet", tag]));
    said(Command::new("docker").args(["rmi", "--force", tag]));
}

/// An image of this repository's Dockerfile, with the program of this test run in it, pushed to the registry.
async fn image_of_the_program(world: &World) -> String {
    let root = env!("CARGO_MANIFEST_DIR");
    let git = said(Command::new("git").arg("--exec-path"));
    let base = Path::new(root).join("tools/base-image");
    // The program itself is named for the libraries it is linked with.
    let program = env!("CARGO_BIN_EXE_nomad-build");
    let runtime = [&world.registry, "runtime", "/usr/bin/git", &git, "/etc/ssl/certs", program];
    let runtime = said(Command::new(base).args(runtime));
    let context = tempfile::tempdir().unwrap();
    std::fs::copy(program, context.path().join("nomad-build")).unwrap();
    let lines = format!("FROM {}\nCOPY nomad-build /usr/local/bin/nomad-build\n", world.base);
    std::fs::write(context.path().join("Dockerfile"), lines).unwrap();
    let binary = format!("{}/it/binary:one", world.registry);
    build_and_push(context.path(), &binary, &[]).await;
    let image = format!("{}/it/program:one", world.registry);
    let arguments =
        [("BINARY_STAGE", binary.as_str()), ("RUNTIME_IMAGE", &runtime), ("RUNTIME_PACKAGES", "")];
    build_and_push(Path::new(root), &image, &arguments).await;
    image
}

#[tokio::test]
async fn the_docker_template_runs_each_task_in_the_service_s_own_image() {
    let world = world();
    let repository = world.repository("RUN touch /built");
    let image = image_of_the_program(world).await;
    let archive = tempfile::tempdir().unwrap();
    let url = format!("file://{}", archive.path().display());
    let variables = [
        ("NOMAD_BUILD_TEMPLATE", "docker"),
        ("NOMAD_BUILD_RUNNER", image.as_str()),
        ("NOMAD_BUILD_ARCHIVE", url.as_str()),
    ];
    let service = Service::start(&world.nomad, &world.registry, &variables);
    let id = builds_tests_and_publishes(world, &service, &repository).await;
    // The cleanup waits for `finish`, to which the directory is mounted.
    assert!(archive.path().join("default").join(id).join("record.json").exists());
}

#[tokio::test]
async fn a_template_with_meta_constraints_and_datacenters_of_an_operator_s_own_works_to_the_end() {
    let world = world();
    let mut template = include_str!("../../templates/raw_exec.json").to_owned();
    for (shipped, own) in [
        ("\"Meta\": {{ job.meta }}", "\"Meta\": {{ dict(job.meta, team=\"x\") }}"),
        ("\"Datacenters\": {{ job.datacenters }}", "\"Datacenters\": [\"dc1\"]"),
        (
            "\"Constraints\": [",
            "\"Constraints\": [{\"LTarget\": \"${attr.kernel.name}\", \"Operand\": \"=\", \"RTarget\": \"linux\"},",
        ),
    ] {
        assert!(template.contains(shipped), "{shipped}");
        template = template.replace(shipped, own);
    }
    let path = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(path.path(), template).unwrap();
    let variables = [("NOMAD_BUILD_TEMPLATE", path.path().to_str().unwrap())];
    let service = Service::start(&world.nomad, &world.registry, &variables);
    let (api, hold) = (Api::new(&service.url), Hold::new());
    let repository = world.repository("");
    let mut job = world.job(&repository);
    job["test_commands"] = json!([hold.command()]);
    let id = api.submit(&job).await;
    let in_nomad = world.nomad(&format!("/v1/job/{id}")).await.unwrap();
    assert_eq!((&in_nomad["Meta"]["team"], &in_nomad["Datacenters"]), (&json!("x"), &json!(["dc1"])));
    // What a list does not show as a job of the service's is taken for purged.
    let lists = service.lists().await;
    eventually("another list", async || (service.lists().await > lists).then_some(())).await;
    hold.let_go().await;
    let status = api.wait_for_end(&id).await;
    assert_eq!(status["status"], "SUCCEEDED", "{status:#}");
    assert_eq!(api.post(&format!("/jobs/{id}/cleanup")).await["success"], true);
}

#[tokio::test]
async fn a_node_without_the_runner_downloads_it_from_the_service() {
    let world = world();
    let repository = world.repository("RUN touch /built");
    let address = format!("127.0.0.1:{}", ports::port());
    let variables =
        [("NOMAD_BUILD_LISTEN", address.clone()), ("NOMAD_BUILD_RUNNER", format!("http://{address}"))];
    let variables = variables.each_ref().map(|(name, value)| (*name, value.as_str()));
    let service = Service::start(&world.nomad, &world.registry, &variables);
    builds_tests_and_publishes(world, &service, &repository).await;
}
