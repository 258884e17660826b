//! The API's description is true: of every answer of every test, and of what here.

use std::collections::BTreeSet;

use nomad_build::job::{Allowed, Policy, Scheme, Spec};
use proptest::prelude::*;
use proptest::string::string_regex;
use proptest::test_runner::{Config, TestRunner};
use serde_json::{Value, json};

use crate::support::openapi::{DOCUMENT, errors_of};
use crate::support::world;

fn policy() -> Policy {
    let allowed = Allowed { vault: vec!["*".parse().unwrap()], ..Allowed::default() };
    Policy { schemes: Scheme::ALL.to_vec(), allowed, ..Policy::default() }
}

fn good() -> Value {
    json!({
        "owner": "acme", "repo_url": "https://example.com/acme/api.git", "image_tags": ["v1"],
        "registry_url": "ghcr.io/acme/api",
    })
}

fn schema(name: &str) -> &'static Value {
    &DOCUMENT["components"]["schemas"][name]
}

/// What a pattern matches. Each of its alternatives is anchored at both ends.
fn matching(pattern: &str) -> impl Strategy<Value = String> + use<> {
    let plain = pattern.strip_prefix('^').and_then(|rest| rest.strip_suffix('$')).unwrap();
    string_regex(&plain.replace("$|^", "|")).unwrap()
}

#[test]
fn every_route_is_in_the_document_and_nothing_else_is() {
    let source = include_str!("../../src/api/mod.rs").split("#[cfg(test)]").next().unwrap();
    let source = source.split("fn router").nth(1).unwrap();
    let routes = source.split(".route(\"").skip(1).flat_map(|route| {
        let (path, rest) = route.split_once("\", only(").unwrap();
        let methods = rest.lines().next().unwrap().split('(').filter(|of| !of.contains("))"));
        methods.map(|of| (path.to_owned(), of.rsplit('.').next().unwrap().to_owned())).collect::<Vec<_>>()
    });
    let paths = DOCUMENT["paths"].as_object().unwrap();
    let operations = |of: &Value| {
        let names = of.as_object().unwrap().keys();
        names.filter(|name| *name != "parameters").cloned().collect::<Vec<_>>()
    };
    let described = paths
        .iter()
        .flat_map(|(path, of)| operations(of).into_iter().map(move |method| (path.clone(), method)));
    assert_eq!(routes.collect::<BTreeSet<_>>(), described.collect::<BTreeSet<_>>());
}

#[tokio::test]
async fn the_document_is_served_as_it_is_written() {
    let (status, body) = world().api().call(reqwest::Method::GET, "/openapi.json", None).await;
    assert_eq!((status.as_u16(), &body), (200, &*DOCUMENT));
}

#[test]
fn whatever_text_the_document_allows_is_accepted() {
    let properties = schema("Submission")["properties"].as_object().unwrap();
    let mut fields = 0;
    for (field, of) in properties {
        let of = of["$ref"].as_str().map_or(of, |name| schema(name.rsplit('/').next().unwrap()));
        let Some(pattern) = of["pattern"].as_str() else { continue };
        fields += 1;
        let most = usize::try_from(of["maxLength"].as_u64().unwrap_or(u64::MAX)).unwrap();
        let texts = matching(pattern).prop_filter("not too long", |text| text.len() <= most);
        let config = Config { cases: 32, failure_persistence: None, ..Config::default() };
        TestRunner::new(config)
            .run(&texts, |text| {
                let mut body = good();
                if field == "image_name" {
                    // Together with the registry's path, it has a longest length.
                    body["registry_url"] = json!("ghcr.io");
                }
                body[field] = json!(text);
                // A pattern is not all that the document says of a text.
                prop_assume!(errors_of("Submission", &body).is_empty());
                prop_assert!(Spec::from_json(body, &policy()).is_ok(), "{} {:?}", field, text);
                Ok(())
            })
            .unwrap();
    }
    assert!(fields > 8, "{fields}");
}

#[test]
fn what_people_write_is_allowed_by_the_document_too() {
    for (field, value) in [
        ("git_ref", json!("v1.2.3")),
        ("git_ref", json!("release/1.0")),
        ("git_ref", json!("refs/pull/7/head")),
        ("repo_url", json!("ssh://git@localhost:50000/acme/api.git")),
        ("repo_url", json!("git@example.com:acme/api.git")),
        ("registry_url", json!("localhost:50000/acme/api")),
        ("dockerfile_path", json!(".ci/Dockerfile")),
        ("context_path", json!("./services/api")),
        ("git_credentials_path", json!("vault:secret/data/acme/git")),
        ("build_secrets", json!({"npm": "vault:kv/acme.npm#token"})),
        ("ssh", json!({"default": "creds/acme#ssh_key"})),
        ("git_ref", Value::Null),
        ("context_path", Value::Null),
        ("registry_credentials_path", Value::Null),
        ("timeouts", json!({"build": "PT120S", "test": "PT1H30M"})),
        ("image_tags", json!(["1.4.0", "latest", "sha-0a1b2c3"])),
    ] {
        let mut body = good();
        body[field] = value;
        assert_eq!(errors_of("Submission", &body), Vec::<String>::new(), "{body}");
        assert!(Spec::from_json(body.clone(), &policy()).is_ok(), "{body}");
    }
}

#[test]
fn what_is_refused_whatever_its_operator_allows_is_refused_by_the_document_too() {
    for (field, value) in [
        ("owner", json!("a b")),
        ("owner", Value::Null),
        ("repo_url", json!("ext::sh")),
        ("repo_url", json!("https://me:secret@example.com/a")),
        ("git_ref", json!("-x")),
        ("git_credentials_path", json!("a//b")),
        ("git_credentials_path", json!("vault:a/../b")),
        ("registry_credentials_path", json!("vault:a/${b}")),
        ("build_secrets", json!({"a": "vault:./b#c"})),
        ("dockerfile_path", json!("../x")),
        ("context_path", json!("/x")),
        ("image_tags", json!([])),
        ("image_tags", json!(["a", "a"])),
        ("image_tags", json!([".a"])),
        ("registry_url", json!("https://ghcr.io")),
        ("image_name", json!("API")),
        ("test_commands", json!([""])),
        ("test_env", json!({"A B": "x"})),
        ("build_args", json!({"BUILDKIT_SYNTAX": "x"})),
        ("build_args", json!({"A": 1})),
        ("build_secrets", json!({"a": "b"})),
        ("ssh", json!({"a b": "c#d"})),
        ("labels", json!({"nomad-build.job": "x"})),
        ("timeouts", json!({"build": "soon"})),
        ("timeouts", json!({"tset": "PT1M"})),
        ("resources", json!({"build": {"cpu": 0}})),
        ("priority", json!(101)),
        ("image_tag", json!("x")),
    ] {
        let mut body = good();
        assert_eq!(errors_of("Submission", &body), Vec::<String>::new());
        body[field] = value;
        assert!(!errors_of("Submission", &body).is_empty(), "{body}");
        assert!(Spec::from_json(body.clone(), &policy()).is_err(), "{body}");
    }
}
