//! The shipped job templates, each way a runner gets onto a node.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use nomad_build::engine::{BuildRequest, DockerEngine, Engine as _};
use serde_json::{Value, json};
use tokio::sync::OnceCell;

use crate::sources::http;
use crate::support::{
    Api, Hold, Repository, Service, World, engine_socket, eventually, image_of, ports, tool, world,
};

/// Has a job built, and cleans it up; its ID.
async fn builds_tests_and_publishes(world: &World, service: &str, repository: &Repository) -> String {
    let mut job = world.job(repository);
    // A runner in a container sees no folder of this machine.
    job["repo_url"] = json!(http::serve(repository, None).await);
    job["test_commands"] = json!(["test -f /built"]);
    let api = Api::new(service);
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
        cache_key: None,
    };
    let (output, mut said_by_engine) = tokio::sync::mpsc::channel(16);
    tokio::spawn(async move { while said_by_engine.recv().await.is_some() {} });
    DockerEngine::new(engine_socket()).build(request, output).await.unwrap();
    said(Command::new("docker").args(["push", "--quiet", tag]));
    said(Command::new("docker").args(["rmi", "--force", tag]));
}

/// An image of this repository's Dockerfile, with the program of this test run in it, pushed to the registry; once for all tests.
async fn image_of_the_program(world: &World) -> &'static String {
    static IMAGE: OnceCell<String> = OnceCell::const_new();
    IMAGE.get_or_init(|| make_image_of_the_program(world)).await
}

async fn make_image_of_the_program(world: &World) -> String {
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
    let image = image_of_the_program(world).await.as_str();
    let archive = tempfile::tempdir().unwrap();
    let url = format!("file://{}", archive.path().display());
    let variables = [
        ("NOMAD_BUILD_TEMPLATE", "docker"),
        ("NOMAD_BUILD_RUNNER", image),
        ("NOMAD_BUILD_ARCHIVE", url.as_str()),
    ];
    let service = Service::start(&world.nomad, &world.registry, &variables);
    let id = builds_tests_and_publishes(world, &service.url, &repository).await;
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
    builds_tests_and_publishes(world, &service.url, &repository).await;
}

#[tokio::test]
async fn a_node_refuses_a_runner_that_is_not_the_one_of_its_checksum() {
    let world = world();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let front = format!("http://{}", listener.local_addr().unwrap());
    let service = Service::start(&world.nomad, &world.registry, &[("NOMAD_BUILD_RUNNER", front.as_str())]);
    let url = service.url.clone();
    let router = axum::Router::new().fallback(async move |uri: axum::http::Uri| {
        if uri.path().ends_with("/nomad-build") {
            return "#!/bin/sh\n".to_owned();
        }
        reqwest::get(format!("{url}{uri}")).await.unwrap().text().await.unwrap()
    });
    tokio::spawn(async move { axum::serve(listener, router).await });
    let job = world.job(&world.repository(""));
    let (_, status) = Api::new(&service.url).run(&job).await;
    let failure = &status["failure"];
    assert_eq!(
        (&status["status"], &failure["reason"]),
        (&json!("FAILED"), &json!("setup_failed")),
        "{status:#}"
    );
    assert!(failure["message"].as_str().unwrap().contains("Checksums did not match"), "{status:#}");
    assert_eq!(world.tags(&job).await, [] as [&str; 0]);
}

/// Runs a job file of the repository until its deployment is healthy, and stops it in the end.
struct Deployed(&'static str);

impl Deployed {
    fn run(job: &'static str, variables: &[(&str, &str)]) -> Self {
        let path = format!("{}/nomad-jobs/{job}.nomad.hcl", env!("CARGO_MANIFEST_DIR"));
        let variables = variables.iter().map(|(name, value)| format!("-var={name}={value}"));
        let arguments: Vec<_> =
            ["job", "run"].map(str::to_owned).into_iter().chain(variables).chain([path]).collect();
        let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
        let (ran, said) = tokio::task::block_in_place(|| world().nomad_program(&arguments));
        let deployed = Self(job);
        assert!(ran, "{said}");
        deployed
    }
}

impl Drop for Deployed {
    fn drop(&mut self) {
        // The stack takes down what stays.
        world().nomad_program(&["job", "stop", "-detach", "-purge", self.0]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_job_files_run_a_service_that_builds_and_a_prometheus_that_finds_it() {
    let world = world();
    let image = image_of_the_program(world).await;
    let (port, prometheus) = (ports::port().to_string(), ports::port().to_string());
    let registries = format!("[\"{}\"]", world.registry);
    let _service = Deployed::run(
        "nomad-build",
        &[
            ("image", image),
            ("port", &port),
            ("nomad_address", &world.nomad),
            ("insecure_registries", &registries),
            ("settings", "{NOMAD_BUILD_ALLOW_REPO_SCHEMES = \"http\"}"),
        ],
    );
    let program = tool("prometheus");
    let command = ("command", program.to_str().unwrap());
    let _prometheus = Deployed::run("prometheus", &[("driver", "raw_exec"), command, ("port", &prometheus)]);
    let repository = world.repository("RUN touch /built");
    builds_tests_and_publishes(world, &format!("http://127.0.0.1:{port}"), &repository).await;
    let query = format!("http://127.0.0.1:{prometheus}/api/v1/query?query=nomad_build_concurrent_jobs");
    eventually("Prometheus has the service's metrics", async || {
        let answer: Value = reqwest::get(&query).await.unwrap().json().await.unwrap();
        let found = answer["data"]["result"][0]["metric"]["instance"] == format!("127.0.0.1:{port}");
        found.then_some(())
    })
    .await;
}
