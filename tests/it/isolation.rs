//! User code runs with few rights, and gets no more.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::json;

use crate::support::{Api, Repository, Service, docker, world};

/// A job whose build and only test run these lines of a shell.
async fn run(api: &Api, in_build: &str, in_test: &str) -> (String, serde_json::Value) {
    let repository = world().repository(&format!("RUN {in_build}"));
    let mut job = world().job(&repository);
    job["test_commands"] = json!([in_test]);
    api.run(&job).await
}

#[tokio::test]
async fn user_code_has_no_privileges_and_sees_nothing_of_the_job_s_own() {
    let api = world().api();
    // What grep finds fails the job; `docker.sock` may be anywhere.
    let sees_nothing = "! find / -path /proc -prune -o -path /sys -prune -o \
                          \\( -name docker.sock -o -name api.sock -o -name nomad_token -o -name payload \\) -print | grep . \
                        && ! env | grep -i -e nomad -e token && ! grep -e docker.sock -e /alloc -e /secrets /proc/self/mountinfo \
                        && ! cat /proc/[0-9]*/environ | tr '\\0' '\\n' | grep -i ^nomad_";
    let may_gain_nothing = "grep NoNewPrivs /proc/self/status | grep 1 \
                            && [ $(( 0x$(grep CapEff /proc/self/status | cut -f2) & 0x2000 )) = 0 ]";
    let (id, status) = run(&api, sees_nothing, &format!("set -e; {sees_nothing}; {may_gain_nothing}")).await;
    assert_eq!(status["status"], "SUCCEEDED", "{status:#}\n{:#}", api.logs(&id).await);
}

#[tokio::test]
async fn a_fork_bomb_in_a_test_ends_with_that_test() {
    let world = world();
    let service = Service::start(&world.nomad, &world.registry, &[("NOMAD_BUILD_MAX_PIDS", "50")]);
    let api = Api::new(&service.url);
    let bomb = "i=0; while [ $i -lt 200 ]; do sleep 60 & i=$((i+1)); done; echo all of them";
    let (id, status) = run(&api, "true", bomb).await;
    assert_eq!(
        (&status["status"], &status["failure"]["reason"]),
        (&json!("FAILED"), &json!("test_failed")),
        "{status:#}"
    );
    let log = api.logs(&id).await["test"].as_str().unwrap().to_owned();
    assert!(log.contains("fork") && !log.contains("\nall of them"), "{log}");
}

#[tokio::test]
async fn builds_and_tests_have_a_network_unless_the_operator_takes_it() {
    let world = world();
    let off = [("NOMAD_BUILD_BUILD_NETWORK", "false"), ("NOMAD_BUILD_TEST_NETWORK", "false")];
    let service = Service::start(&world.nomad, &world.registry, &off);
    // The name of a service makes its steps its own: none comes from another build's cache.
    for (api, look) in [
        (world.api(), "ls /sys/class/net | grep -v lo && echo with"),
        (Api::new(&service.url), "! ls /sys/class/net | grep -v lo && echo without"),
    ] {
        let (id, status) = run(&api, look, look).await;
        assert_eq!(status["status"], "SUCCEEDED", "{look}: {status:#}\n{:#}", api.logs(&id).await);
    }
}

#[tokio::test]
async fn what_the_operator_forbids_is_refused_by_name() {
    let world = world();
    let allowed = format!("{}/it", world.registry);
    let rules = [
        ("NOMAD_BUILD_ALLOW_REGISTRIES", allowed.as_str()),
        ("NOMAD_BUILD_ALLOW_REPOSITORIES", "https://git.example.com/acme/"),
        ("NOMAD_BUILD_FORBID_NAMES", "LD_*"),
    ];
    let service = Service::start(&world.nomad, &world.registry, &rules);
    let mut job = world.job(&world.repository(""));
    job["image_name"] = json!("other/api");
    job["build_args"]["LD_PRELOAD"] = json!("x");
    let (status, body) = Api::new(&service.url).call(reqwest::Method::POST, "/jobs", Some(&job)).await;
    assert_eq!(status, 400, "{body}");
    let mut fields: Vec<_> =
        body["error"]["details"].as_array().unwrap().iter().map(|detail| &detail["field"]).collect();
    fields.sort_by_key(ToString::to_string);
    assert_eq!(fields, ["build_args.LD_PRELOAD", "registry_url", "repo_url"]);
}

#[tokio::test]
async fn a_build_takes_only_the_images_that_the_operator_allows() {
    let world = world();
    // Another name for the same image.
    let other = format!("{}/other/base", world.registry);
    for arguments in
        [&["pull", &world.base][..], &["tag", &world.base, &other], &["push", &other], &["rmi", &other]]
    {
        docker(arguments);
    }
    let base = world.base.rsplit_once(':').unwrap().0;
    let bases = [("NOMAD_BUILD_ALLOW_BASE_IMAGES", base)];
    let frontends = [bases[0], ("NOMAD_BUILD_ALLOW_FRONTENDS", base)];
    let any = [("NOMAD_BUILD_ALLOW_FRONTENDS", "*")];
    let services =
        [&[][..], &bases, &frontends, &any].map(|rules| Service::start(&world.nomad, &world.registry, rules));
    let [usual, limited, with_frontend, with_any] = &services;
    let unique = uuid::Uuid::new_v4();
    let good =
        format!("ARG BASE\nFROM $BASE AS one\nRUN echo {unique}\nFROM scratch\nCOPY --from=one /bin/sh /\n");
    let told = |service: &Service, dockerfile: &str, build_args: serde_json::Value| {
        let (api, repository) =
            (Api::new(&service.url), Repository::new().file("Dockerfile", dockerfile).commit());
        let mut job = world.job(&repository);
        job["build_args"] = build_args;
        async move {
            let (id, status) = api.run(&job).await;
            let _kept = repository;
            let log = api.logs(&id).await["build"].as_str().unwrap().to_owned();
            (status["status"].as_str().unwrap().to_owned(), status["failure"].clone(), log)
        }
    };
    let only_base = || json!({ "BASE": world.base });
    let (status, failure, log) = told(limited, &good, only_base()).await;
    assert_eq!(status, "SUCCEEDED", "{failure}\n{log}");
    // Whatever way it is named, a build that takes it fails.
    let from_argument = "ARG BASE\nARG OTHER\nFROM ${OTHER:-$BASE}\n".to_owned();
    let copied = format!("FROM {}\nCOPY --from={other} /bin/sh /two\n", world.base);
    let mounted = format!("FROM {}\nRUN --mount=from={other},target=/m true\n", world.base);
    for dockerfile in [from_argument, copied, mounted] {
        let arguments = json!({ "BASE": world.base, "OTHER": other });
        let used = if dockerfile.starts_with("ARG") { arguments } else { json!({}) };
        let (status, failure, log) = told(limited, &dockerfile, used).await;
        assert_eq!(
            (&*status, &failure["reason"]),
            ("FAILED", &json!("image_not_allowed")),
            "{dockerfile}\n{log}"
        );
        let message = failure["message"].as_str().unwrap();
        assert!(message.contains(&other) && message.contains(base), "{message}");
    }
    // A base image is no frontend, so where one is allowed the build fails by it, and where none is, before.
    let syntax = format!("# syntax={}\n{good}", world.base);
    for service in [usual, limited] {
        let (_, failure, log) = told(service, &syntax, only_base()).await;
        assert_eq!(failure["reason"], "image_not_allowed", "{failure}\n{log}");
        assert!(failure["message"].as_str().unwrap().contains("# syntax="), "{failure}");
        // The engine has not heard of it.
        assert!(!log.contains("resolve image config"), "{log}");
    }
    for service in [with_any, with_frontend] {
        let (_, failure, log) = told(service, &syntax, only_base()).await;
        assert_eq!(failure["reason"], "build_failed", "{failure}\n{log}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_add_downloads_what_the_operator_allows_and_nothing_of_the_node_s_own() {
    let world = world();
    let asked = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&asked);
    let router = axum::Router::new().fallback(async move || {
        counted.fetch_add(1, Ordering::Relaxed);
        "downloaded"
    });
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    // As good as a metadata service, or Nomad itself: an engine downloads in its node's own network.
    let host = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move { axum::serve(listener, router).await });
    let address = format!("http://{host}/{}", uuid::Uuid::new_v4());
    let add = format!("ADD {address} /it");
    let (list, other) =
        (("NOMAD_BUILD_ALLOW_DOWNLOADS", &*host), ("NOMAD_BUILD_ALLOW_DOWNLOADS", "example.com"));
    let off = ("NOMAD_BUILD_BUILD_NETWORK", "false");
    for (rules, lines, allowed) in [
        (&[][..], &*add, false),
        (&[other], &*add, false),
        (&[list, off], &*add, false),
        (&[list], "ARG URL\nADD $URL /it", false),
        (&[list], &*add, true),
    ] {
        let service = Service::start(&world.nomad, &world.registry, rules);
        let repository = world.repository(lines);
        let mut job = world.job(&repository);
        job["build_args"]["URL"] = json!(address);
        job["test_commands"] = json!(["[ \"$(cat /it)\" = downloaded ]"]);
        let (_, status) = Api::new(&service.url).run(&job).await;
        assert_eq!(status["status"] == "SUCCEEDED", allowed, "{rules:?} {lines}: {status:#}");
        if !allowed {
            assert_eq!(status["failure"]["reason"], "download_not_allowed", "{rules:?} {lines}: {status:#}");
        }
        assert_eq!(asked.load(Ordering::Relaxed) > 0, allowed, "{rules:?} {lines}");
    }
}
