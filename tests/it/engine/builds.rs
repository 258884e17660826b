//! Builds.

use std::ffi::OsStr;
use std::fs::Permissions;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::time::{Duration, UNIX_EPOCH};

use super::own::OwnEngine;
use super::*;

#[tokio::test]
async fn build_arguments_that_are_too_long_are_told_as_such() {
    let bench = Bench::new();
    let context = directory(&[("Dockerfile", "FROM scratch\nCOPY . /\n")]);
    let build_args = [("A".to_owned(), "x".repeat(70_000))].into();
    let error =
        bench.build(BuildRequest { build_args, ..bench.request(context.path()) }).await.0.unwrap_err();
    assert!(matches!(error, EngineError::TooLong), "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_whose_lines_and_their_ends_arrive_apart_is_whole() {
    let torn = Torn::before(engine_socket());
    let bench = Bench::at(torn.socket.to_str().unwrap());
    let image = bench.image("RUN echo built").await;
    let reference = format!("{}/it/torn-{}:one", world().registry, bench.id);
    let (output, mut said) = mpsc::channel(16);
    let listening = tokio::spawn(async move { while said.recv().await.is_some() {} });
    bench.engine.push(&image, &reference, output).await.unwrap();
    listening.await.unwrap();
}

#[tokio::test]
async fn build_arguments_and_labels_are_data_up_to_the_length_that_a_submission_may_have() {
    let bench = Bench::new();
    // A byte is up to three in a URL: with the labels, close to 48 KiB.
    let long = "long & ".repeat(2600);
    let values =
        ["$(id)", "${HOME}", "a'b\"c\\", "two\nlines", "-x", "é\u{202e}", "a=b&c=d+e", "%{x}", &long];
    let mut dockerfile = format!("FROM {}\n", world().base);
    let mut request = bench.request(Path::new("/"));
    for (index, value) in values.iter().enumerate() {
        dockerfile += &format!("ARG V{index}\nRUN printf '[%s]' \"$V{index}\" >> /values\n");
        request.build_args.insert(format!("V{index}"), (*value).to_owned());
        request.labels.insert(format!("l{index}"), (*value).to_owned());
    }
    // What else is in the URL is as long as it may be.
    request.labels.insert("org.opencontainers.image.source".to_owned(), "/".repeat(2048));
    let name = format!("{}/{}", vec!["%".repeat(200); 4].join("/"), "%".repeat(200));
    let context = directory(&[(&name, &dockerfile)]);
    let request = BuildRequest {
        context: context.path().to_owned(),
        dockerfile: context.path().join(&name),
        ..request
    };
    let labels = request.labels.clone();
    let image = bench.build(request).await.0.unwrap();
    let expected: String = values.iter().map(|value| format!("[{value}]")).collect();
    assert_eq!(bench.shell(&image, "cat /values").await, expected);
    let inspected = docker(&["image", "inspect", "--format", "{{json .Config.Labels}}", &image]);
    let inspected: BTreeMap<String, String> = serde_json::from_str(&inspected).unwrap();
    assert!(labels.iter().all(|label| inspected.get(label.0) == Some(label.1)), "{inspected:?}");
}

#[tokio::test]
async fn a_context_that_cannot_be_read_to_its_end_is_named() {
    let bench = Bench::new();
    let context = directory(&[("Dockerfile", "FROM scratch\nCOPY . /\n")]);
    fs::File::create(context.path().join("big")).unwrap().set_len(8 << 20).unwrap();
    // A path that is longer than the kernel takes: root can read everything else.
    let deeper = "cd \"$0\"; d=z$(printf '%0250d' 0); for i in $(seq 20); do mkdir $d; cd $d; done";
    Command::new("bash").args(["-c", deeper]).arg(context.path()).output().unwrap();
    let error = bench.build(bench.request(context.path())).await.0.unwrap_err();
    assert!(matches!(error, EngineError::Context(_)), "{error:?}");
    let cause = std::error::Error::source(&error).unwrap();
    assert!(cause.to_string().contains(context.path().to_str().unwrap()), "{cause}");
}

#[tokio::test]
async fn a_dockerfile_from_outside_keeps_the_cache_of_what_copies_the_whole_context() {
    let bench = Bench::new();
    // Where another build of the same base is running, Engine 20.10 looks for no copy of the same content.
    let checkout =
        directory(&[("docker/Dockerfile", "FROM scratch\nCOPY . /context\n"), ("service/a", &bench.id)]);
    let request = || BuildRequest {
        dockerfile: checkout.path().join("docker/Dockerfile"),
        ..bench.request(&checkout.path().join("service"))
    };
    bench.build(request()).await.0.unwrap();
    let (_, said) = bench.build(request()).await;
    assert!(said.text().contains(" CACHED\n"), "{}", said.text());
}

#[tokio::test]
async fn cache_mounts_are_kept_within_a_namespace_and_nowhere_else() {
    let bench = Bench::new();
    let base = &world().base;
    let nested = format!("ours-{}/x", bench.id);
    let (ours, theirs) = (format!("ours-{}", bench.id), format!("theirs-{}", bench.id));
    for (namespace, id, expected) in [
        (&ours, String::new(), ""),
        (&ours, String::new(), "mark\n"),
        (&theirs, String::new(), ""),
        (&theirs, format!(",id=../{ours}/c"), ""),
        (&theirs, format!(",id=../{ours}//c"), ""),
        (&theirs, format!(",id={ours}//c"), ""),
        (&nested, String::new(), ""),
        (&ours, ",id=x//c".to_owned(), ""),
    ] {
        let run = format!("RUN --mount=type=cache,target=/c{id} ls /c > /seen && touch /c/mark");
        let context = directory(&[("Dockerfile", &format!("FROM {base}\nARG TIME\n{run}\n"))]);
        let request = BuildRequest {
            cache_namespace: namespace.clone(),
            build_args: [("TIME".to_owned(), uuid::Uuid::new_v4().to_string())].into(),
            ..bench.request(context.path())
        };
        let image = bench.build(request).await.0.unwrap();
        assert_eq!(bench.shell(&image, "cat /seen").await, expected, "{namespace} {id}");
    }
}

#[tokio::test]
async fn a_dropped_build_is_stopped_in_the_engine() {
    let bench = Bench::new();
    // In place of its shell, the engine runs just this.
    let command = format!("sleep 1{:09}", uuid::Uuid::new_v4().as_fields().0);
    let dockerfile = format!("FROM {}\nRUN echo started; {command}\n", world().base);
    let context = directory(&[("Dockerfile", &dockerfile)]);
    let (output, mut reader) = mpsc::channel::<Output>(4);
    let started = async {
        while let Some(piece) = reader.recv().await {
            if piece.bytes.ends_with(b" started\n") {
                // Its shell wrote this a moment before it becomes the command.
                return eventually("the step runs", async || process_runs(&command).then_some(())).await;
            }
        }
        panic!("it did not start");
    };
    tokio::select! {
        ended = bench.engine.build(bench.request(context.path()), output) => panic!("it ended: {ended:?}"),
        () = started => {}
    }
    eventually("the step is stopped", async || (!process_runs(&command)).then_some(())).await;
}

#[tokio::test]
async fn a_build_dropped_while_its_context_is_sent_stops_sending() {
    let bench = Bench::new();
    let context = directory(&[("Dockerfile", "FROM scratch\nCOPY . /\n")]);
    let path = context.path().join("big");
    // Takes long to send, and no space.
    fs::File::create(&path).unwrap().set_len(4 << 30).unwrap();
    let is_open = || {
        let files = fs::read_dir("/proc/self/fd").unwrap();
        files.filter_map(|file| fs::read_link(file.ok()?.path()).ok()).any(|file| file == path)
    };
    let (output, _reader) = mpsc::channel(4);
    tokio::select! {
        ended = bench.engine.build(bench.request(context.path()), output) => panic!("it ended: {ended:?}"),
        () = eventually("the file is opened", async || is_open().then_some(())) => {}
    }
    eventually("the file is closed", async || (!is_open()).then_some(())).await;
}

#[tokio::test]
async fn a_step_that_fails_while_the_context_is_sent_is_what_failed() {
    let bench = Bench::new();
    let context = directory(&[(
        "Dockerfile",
        &format!(
            "FROM {} AS a\nRUN : {} && exit 3\nFROM scratch\nCOPY . /\nCOPY --from=a / /\n",
            world().base,
            bench.id
        ),
    )]);
    // Takes longer to send than the step takes to fail.
    fs::File::create(context.path().join("big")).unwrap().set_len(8 << 30).unwrap();
    let error = bench.build(bench.request(context.path())).await.0.unwrap_err();
    assert!(matches!(error, EngineError::BuildFailed { exit_code: Some(3), .. }), "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_build_that_is_dropped_takes_no_other_with_it_that_shares_its_steps() {
    let (bench, rounds) = (Bench::new(), scale("NOMAD_BUILD_TEST_SHARED_BUILDS", 3));
    for round in 0..rounds {
        // Steps that are the same are one in the engine, whosever they are.
        let shared = format!("FROM {}\nRUN echo {}{round}; sleep 0.3\n", world().base, bench.id);
        let contexts: Vec<_> = (0..6)
            .map(|build| {
                directory(&[("Dockerfile", &format!("{shared}COPY {build} /\n")), (&build.to_string(), "")])
            })
            .collect();
        let builds = contexts.iter().enumerate().map(|(number, context)| {
            let mut request = bench.request(context.path());
            request.tag = format!("nomad-build-test/{}:{number}", bench.id);
            let build = bench.build(request);
            async move {
                if number % 2 == 0 {
                    // At any time from before the first step to behind the last.
                    let at = Duration::from_millis(40 * ((round * 3 + number / 2) % 20) as u64);
                    tokio::time::timeout(at, build).await.ok();
                    return;
                }
                let (ended, said) = build.await;
                assert!(ended.is_ok(), "round {round}: {ended:?}\n{}", said.text());
            }
        });
        futures_util::future::join_all(builds).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_build_beside_prunes_of_the_cache_loses_nothing() {
    let own = OwnEngine::start(&[]).await;
    let bench = own.bench();
    let client = reqwest::Client::builder().unix_socket(own.socket()).build().unwrap();
    let context = directory(&[("Dockerfile", "FROM scratch\nCOPY . /a\nCOPY . /b\n")]);
    let prunes = async {
        loop {
            let pruned = client.post("http://docker/build/prune?all=true").send().await.unwrap();
            assert!(pruned.status().is_success(), "{pruned:?}");
        }
    };
    let builds = async {
        for _ in 0..scale("NOMAD_BUILD_TEST_PRUNED_BUILDS", 20) {
            let (built, said) = bench.build(bench.request(context.path())).await;
            built.unwrap_or_else(|error| panic!("{error:?}: {}", said.text()));
        }
    };
    tokio::select! {
        () = builds => {}
        () = prunes => {}
    }
}

#[tokio::test]
async fn the_context_arrives_as_it_is_less_what_is_ignored_and_nothing_more() {
    let bench = Bench::new();
    let dockerfile = format!("FROM {}\nCOPY . /src\n", world().base);
    let checkout = directory(&[
        ("docker/app.Dockerfile", &dockerfile),
        ("src/.dockerignore", ".dockerignore\nnot\n"),
        ("src/not", "x"),
        ("src/a-b", "x"),
        ("src/a/b", "x"),
        ("src/empty", ""),
        ("src/ä ö", "x"),
    ]);
    let path = |name: &str| checkout.path().join("src").join(name);
    fs::write(path("large"), vec![7; 3 << 20]).unwrap();
    fs::write(path("").join(OsStr::from_bytes(b"raw\xff")), "x").unwrap();
    symlink("..//./nowhere", path("link")).unwrap();
    for (name, mode) in [("a", 0o1777), ("a-b", 0o4751), ("a/b", 0o600), ("large", 0o644), ("empty", 0o644)] {
        fs::set_permissions(path(name), Permissions::from_mode(mode)).unwrap();
    }
    fs::File::open(path("large")).unwrap().set_modified(UNIX_EPOCH + Duration::new(1_000_000, 5)).unwrap();
    let request = BuildRequest {
        dockerfile: checkout.path().join("docker/app.Dockerfile"),
        ..bench.request(&checkout.path().join("src"))
    };
    let image = bench.build(request).await.0.unwrap();
    let list = "cd /src && find . | sort | while IFS= read -r f; do \
        echo \"$(printf %s \"$f\" | od -An -c | tr -d ' \\n') $(stat -c '%a %u:%g' \"$f\")\"; done; \
        readlink link; stat -c '%Y %s' large; tr -d '\\007' < large | wc -c";
    let want = ". 755 0:0
./a 1777 0:0
./a-b 4751 0:0
./a/b 600 0:0
./empty 644 0:0
./large 644 0:0
./link 777 0:0
./raw377 644 0:0
./303244303266 644 0:0
..//./nowhere
1000000 3145728
0
";
    assert_eq!(bench.shell(&image, list).await.replace('\\', ""), want);
}
