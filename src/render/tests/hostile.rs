//! Submissions that are made up to be expanded, run or taken for options: what is refused is not rendered, and the job of what is
//! accepted has it in its opaque value, and in labels that mean nothing to Nomad.

use std::cell::Cell;

use proptest::collection::{btree_map, vec};
use proptest::prelude::*;
use proptest::sample::select;
use proptest::test_runner::{Config, TestRunner};

use super::*;
use crate::job::Labels;

const SUBMISSIONS: u32 = 10_000;

/// What means something to Nomad, HCL, a template, a shell, or whoever reads options.
const MEANINGS: [&str; 28] = [
    "${NOMAD_TOKEN}",
    "${attr.unique.hostname}",
    "$${x}",
    "${",
    "}",
    "%{if true}",
    "%{endif}",
    "%{",
    "{{ env \"PATH\" }}",
    "{{",
    "}}",
    "{% raw %}",
    "$(id)",
    "`id`",
    "$$",
    "\"",
    "'",
    "\\",
    "\n",
    "\r",
    "--help",
    "-",
    ";",
    "&&",
    "../",
    "@",
    "%7B",
    "a",
];

/// Stands in every text that is made up, so that it is found wherever that goes.
const MARK: &str = "q7Zq";

fn text() -> impl Strategy<Value = String> {
    let part = prop_oneof![3 => select(&MEANINGS[..]).prop_map(str::to_owned), 1 => "\\PC{1,4}"];
    (vec(part.clone(), 0..4), vec(part, 0..4))
        .prop_map(|(a, b)| format!("{}{MARK}{}", a.concat(), b.concat()))
}

/// A field that is sent now and then: as it is made up, or behind what would be good.
fn field(
    name: &'static str,
    good: &'static str,
    often: f64,
) -> impl Strategy<Value = Option<(String, Value)>> {
    let value = (any::<bool>(), text())
        .prop_map(move |(bare, text)| json!(if bare { text } else { format!("{good}{text}") }));
    proptest::option::weighted(often, value.prop_map(move |value| (name.to_owned(), value)))
}

fn texts(name: &'static str) -> impl Strategy<Value = Option<(String, Value)>> {
    btree_map(prop_oneof![20 => "[A-Z][A-Z0-9_]{0,6}", 1 => text()], text(), 0..3)
        .prop_map(move |map| Some((name.to_owned(), json!(map))))
}

fn submission() -> impl Strategy<Value = Value> {
    let narrow = [
        field("owner", "acme", 0.05),
        field("repo_url", "https://example.com/", 0.3),
        field("git_ref", "refs/heads/", 0.4),
        field("git_credentials_path", "creds/", 0.05),
        field("registry_credentials_path", "creds/", 0.05),
        field("dockerfile_path", "docker/", 0.5),
        field("context_path", "src/", 0.5),
        field("registry_url", "ghcr.io/", 0.05),
        field("image_name", "acme/", 0.05),
        field("target", "stage", 0.05),
    ];
    let tags = proptest::option::weighted(0.1, vec(text(), 1..3));
    let free = (vec(text(), 0..3), texts("test_env"), texts("build_args"), texts("labels"));
    (narrow, tags, free).prop_map(|(narrow, tags, (commands, env, arguments, labels))| {
        let mut body = json!({
            "owner": "acme", "repo_url": "https://example.com/acme/api.git", "image_tags": ["v1"],
            "registry_url": "ghcr.io/acme", "test_commands": commands,
        });
        for (name, value) in narrow.into_iter().chain([env, arguments, labels]).flatten() {
            body[name] = value;
        }
        if let Some(tags) = tags {
            body["image_tags"] = json!(tags);
        }
        body
    })
}

/// Every text of a job, and where it stands.
fn strings<'a>(value: &'a Value, at: &str, found: &mut Vec<(String, &'a str)>) {
    match value {
        Value::String(text) => found.push((at.to_owned(), text)),
        Value::Array(all) => all.iter().for_each(|value| strings(value, at, found)),
        Value::Object(all) => {
            for (name, value) in all {
                found.push((at.to_owned(), name));
                strings(value, &format!("{at}/{name}"), found);
            }
        }
        _ => {}
    }
}

/// Holds an accepted submission, its specification and its jobs against each other.
fn is_carried(body: &Value, spec: Spec) {
    let sent = spec.to_json();
    for name in
        ["owner", "repo_url", "git_ref", "dockerfile_path", "context_path", "image_tags", "test_commands"]
    {
        if let Some(value) = body.get(name) {
            assert_eq!(&sent[name], value, "{name}");
        }
    }
    for name in ["test_env", "build_args", "labels", "target", "git_credentials_path"] {
        if let Some(value) = body.get(name) {
            assert_eq!(&sent[name], value, "{name}");
        }
    }
    let at = DateTime::from_timestamp(1_700_000_000, 0).unwrap();
    let labels = spec.labels_for_lists(at);
    let job = JobId::from_uuid(Uuid::from_u128(1));
    let payload = Payload { job, spec, policy: Policy::default(), insecure_registries: Vec::new() };
    let encoded = payload.encode().unwrap();
    assert_eq!(Payload::decode(&encoded).unwrap(), payload);
    for (template, runner) in [("raw_exec", path()), ("docker", Runner::Image("nomad-build:1".to_owned()))] {
        let job = render(&payload, "ci", at, &settings(template, runner)).unwrap();
        let mut found = Vec::new();
        strings(&job, "", &mut found);
        for (at, text) in found {
            if at.starts_with("/Meta/nb_") {
                assert!(
                    !text.contains(['$', '{', '}', '"', '\\', '\n', '\r', '`', ';', ' ']),
                    "{at}: {text}"
                );
            } else {
                assert!(!text.contains(MARK), "{at}: {text}");
            }
        }
        let meta = serde_json::from_value(job["Meta"].clone()).unwrap();
        assert_eq!(Labels::from_meta(&meta).as_ref(), Some(&labels));
        assert!(job.to_string().contains(&encoded));
    }
}

#[test]
fn of_ten_thousand_hostile_submissions_none_leaves_anything_to_be_expanded() {
    let (accepted, refused) = (Cell::new(0), Cell::new(0));
    let config = Config { cases: SUBMISSIONS, failure_persistence: None, ..Config::default() };
    let tried = TestRunner::new(config).run(&submission(), |body| {
        match Spec::from_json(body.clone(), &Policy::default()) {
            Ok(spec) => {
                accepted.set(accepted.get() + 1);
                is_carried(&body, spec);
            }
            Err(_) => refused.set(refused.get() + 1),
        }
        Ok(())
    });
    tried.unwrap();
    let (accepted, refused) = (accepted.get(), refused.get());
    assert_eq!(accepted + refused, SUBMISSIONS);
    assert!(accepted > 1000 && refused > 1000, "{accepted} accepted, {refused} refused");
}
