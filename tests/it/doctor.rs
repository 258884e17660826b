//! `nomad-build doctor`: each thing that keeps builds from working is named, with what to do.

use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::support::{Guarded, NAMESPACE, engine_socket, world};

/// The exit code and the findings of a run with these arguments and variables.
pub(crate) async fn examined(arguments: &[&str], variables: &[(&str, &str)]) -> (Option<i32>, Vec<Value>) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nomad-build"));
    command.args(["doctor", "-o", "json"]).args(arguments).stdin(Stdio::null());
    command.env_remove("NOMAD_TOKEN").envs(variables.iter().copied());
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let findings = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {said}"));
    (output.status.code(), findings)
}

/// What was found of a check, as verdict and message.
pub(crate) fn of<'a>(findings: &'a [Value], check: &str) -> Vec<(&'a str, &'a str)> {
    let ours = findings.iter().filter(|finding| finding["check"] == check);
    ours.map(|finding| (finding["verdict"].as_str().unwrap(), finding["message"].as_str().unwrap())).collect()
}

fn not_good(findings: &[Value]) -> Vec<&Value> {
    for finding in findings {
        assert_eq!(finding["remedy"].is_null(), finding["verdict"] == "good", "{finding}");
    }
    findings.iter().filter(|finding| finding["verdict"] != "good").collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_as_the_readme_has_it_is_well_and_what_is_amiss_is_named() {
    let nomad = Guarded::start().await;
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let archive = format!("file://{}", folder.path().join("archive").display());
    std::fs::create_dir(folder.path().join("archive")).unwrap();
    let management = file("management", nomad.management());
    let service = file("service", &nomad.token().await.secret);
    let with = |token: &str| {
        let (url, archive, token) = (nomad.url.clone(), archive.clone(), token.to_owned());
        [
            ("NOMAD_ADDR", url),
            ("NOMAD_BUILD_NAMESPACES", NAMESPACE.to_owned()),
            ("NOMAD_TOKEN_FILE", token),
            ("NOMAD_BUILD_ARCHIVE", archive),
            ("NOMAD_BUILD_ALLOW_REGISTRIES", world().registry.clone()),
            ("NOMAD_BUILD_INSECURE_REGISTRIES", world().registry.clone()),
        ]
    };
    let run = async |token: &str, further: &[(&str, &str)]| {
        let variables = with(token);
        let variables: Vec<_> = variables.iter().map(|(name, value)| (*name, value.as_str())).collect();
        examined(&["--management-token-file", &management], &[&variables, further].concat()).await
    };
    let (code, findings) = run(&service, &[]).await;
    // How full its disk is, is this machine's own affair.
    let amiss: Vec<_> =
        not_good(&findings).into_iter().filter(|finding| finding["check"] != "disk").collect();
    assert_eq!((code, amiss.len()), (Some(0), 0), "{amiss:#?}");
    assert!(matches!(of(&findings, "disk")[..], [("good" | "warning", _)]), "{findings:#?}");
    let left = nomad.call(reqwest::Method::GET, "vars?namespace=builds", &Value::Null).await;
    assert_eq!(left, json!([]), "a check leaves nothing behind");

    // Somebody else may register jobs there.
    nomad.caller("namespace \"b*\" { policy = \"write\" }").await;
    let (code, findings) = run(&service, &[]).await;
    let [(verdict, message), ..] = of(&findings, "policies")[..] else { panic!("{findings:#?}") };
    assert_eq!((code, verdict), (Some(0), "warning"), "{message}");
    assert!(message.contains("caller-") && !message.contains("nomad-build,"), "{message}");

    let weak = nomad.caller("namespace \"builds\" { capabilities = [\"list-jobs\"] }").await;
    let (code, findings) = run(&file("weak", &weak.secret), &[]).await;
    assert_eq!(code, Some(1));
    let bad: Vec<_> = of(&findings, "rights").into_iter().filter(|(verdict, _)| *verdict == "bad").collect();
    for right in ["read-job", "submit-job", "read-logs"] {
        assert!(bad.iter().any(|(_, message)| message.contains(right)), "{right}: {bad:?}");
    }
    assert!(of(&findings, "variables").iter().all(|(verdict, _)| *verdict == "bad"), "{findings:#?}");

    // Nomad leaves out of a list what may be neither listed nor read, and refuses nothing.
    let shipped =
        std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/nomad-jobs/policies/service.hcl"));
    let blind = nomad.caller(&shipped.unwrap().replace("\"list\", ", "")).await;
    let (code, findings) = run(&file("blind", &blind.secret), &[]).await;
    let found = of(&findings, "variables");
    assert!(
        code == Some(1) && found.iter().any(|(_, message)| message.contains("may not list nomad/jobs/nb-")),
        "{found:?}"
    );

    let (_, findings) = run(&management, &[]).await;
    assert_eq!(of(&findings, "token")[0].0, "warning", "{findings:#?}");
    let (code, findings) = run("", &[]).await;
    assert_eq!((code, of(&findings, "token")[0]), (Some(1), ("bad", "there is none")), "{findings:#?}");
    let (code, findings) = run(&file("unknown", &uuid::Uuid::new_v4().to_string()), &[]).await;
    assert_eq!((code, of(&findings, "token")[0].0), (Some(1), "bad"), "{findings:#?}");
    for (variable, value) in [("NOMAD_BUILD_NODE_POOL", "all"), ("NOMAD_BUILD_DATACENTERS", "nowhere,d*1")] {
        let (_, findings) = run(&service, &[(variable, value)]).await;
        assert_eq!(of(&findings, "nodes")[0].0, "good", "{variable}: {findings:#?}");
    }
    for (check, variable, value) in [
        ("nodes", "NOMAD_BUILD_NODE_POOL", "other"),
        ("archive", "NOMAD_BUILD_ARCHIVE", "file:///proc"),
        ("registry", "NOMAD_BUILD_ALLOW_REGISTRIES", "127.0.0.1:1"),
        ("rights", "NOMAD_BUILD_NAMESPACES", "none-such"),
        ("vault", "NOMAD_BUILD_ALLOW_VAULT_PATHS", "*"),
    ] {
        let (code, findings) = run(&service, &[(variable, value)]).await;
        let found = of(&findings, check);
        assert!(code == Some(1) && found.iter().any(|(verdict, _)| *verdict == "bad"), "{check}: {found:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_nomad_that_is_away_or_open_to_all_is_named() {
    let (code, findings) = examined(&[], &[("NOMAD_ADDR", "http://127.0.0.1:1")]).await;
    assert_eq!((code, of(&findings, "nomad")[0].0), (Some(1), "bad"), "{findings:#?}");
    let nomad = world().nomad.as_str();
    let (code, findings) = examined(&[], &[("NOMAD_ADDR", nomad)]).await;
    assert_eq!((code, of(&findings, "acls")[0].0), (Some(0), "good"), "{findings:#?}");
    let open = [("NOMAD_ADDR", nomad), ("NOMAD_BUILD_LISTEN", "0.0.0.0:0")];
    let (code, findings) = examined(&[], &open).await;
    assert_eq!((code, of(&findings, "acls")[0].0), (Some(1), "bad"), "{findings:#?}");
    let (_, findings) = examined(&[], &[&open[..], &[("NOMAD_BUILD_OPEN", "true")]].concat()).await;
    assert_eq!(of(&findings, "acls")[0].0, "warning", "{findings:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_is_looked_at_from_within() {
    let socket = engine_socket();
    let (code, findings) = examined(&["--node"], &[("NOMAD_BUILD_ENGINE_SOCKET", socket)]).await;
    assert_eq!((code, of(&findings, "engine")[0].0), (Some(0), "good"), "{findings:#?}");
    // What the engine cannot contain is said.
    let limits = of(&findings, "limits");
    assert!(limits.iter().any(|(_, message)| message.contains("steps of a build")), "{limits:?}");
    let (code, findings) = examined(&["--node"], &[("NOMAD_BUILD_ENGINE_SOCKET", "/nowhere")]).await;
    assert_eq!((code, of(&findings, "engine")[0].0), (Some(1), "bad"), "{findings:#?}");
    let variables = [("NOMAD_BUILD_ENGINE_SOCKET", socket), ("PATH", "/nowhere")];
    let (code, findings) = examined(&["--node"], &variables).await;
    let programs = of(&findings, "programs");
    assert_eq!(code, Some(1));
    assert_eq!(
        programs.iter().map(|(verdict, _)| *verdict).collect::<Vec<_>>(),
        ["bad", "warning", "warning"]
    );
    let (_, findings) = examined(&["--node"], &[("NOMAD_BUILD_ENGINE_SOCKET", socket)]).await;
    not_good(&findings);
}
