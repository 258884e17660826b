//! Submissions that are made up to be expanded, run or taken for options: what is refused is not rendered, and the job of what is
//! accepted has it in its opaque value, and in labels that mean nothing to Nomad. A path in Vault stands in a template, too, whole.

use std::cell::Cell;
use std::collections::BTreeSet;

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
const MARK: &str = "q7zq";

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

/// The path of credentials, a Variable's or one in Vault: as much as its grammar lets in, or anything.
fn credentials_path() -> impl Strategy<Value = String> {
    let plain = ("[A-Za-z0-9_.~@+/-]{0,3}", "[A-Za-z0-9_.~@+/-]{0,3}");
    let name = prop_oneof![9 => plain.prop_map(|(a, b)| format!("{a}{MARK}{b}")), 1 => text()];
    (select(vec!["creds/", "vault:", "vault:secret/data/"]), name)
        .prop_map(|(of, name)| format!("{of}{name}"))
}

fn credentials(name: &'static str) -> impl Strategy<Value = Option<(String, Value)>> {
    proptest::option::weighted(0.2, credentials_path().prop_map(move |path| (name.to_owned(), json!(path))))
}

/// What steps are given by an ID: an item of either kind, whose name may be anything that is seen.
fn step_items(name: &'static str) -> impl Strategy<Value = Option<(String, Value)>> {
    let id = prop_oneof![20 => "[A-Za-z0-9][A-Za-z0-9._-]{0,6}", 1 => text()];
    let item = (credentials_path(), prop_oneof![9 => "[!-~]{1,9}", 1 => text()])
        .prop_map(|(path, item)| format!("{path}#{item}{MARK}"));
    let items = btree_map(id, item, 1..3);
    proptest::option::weighted(0.2, items.prop_map(move |items| (name.to_owned(), json!(items))))
}

fn submission() -> impl Strategy<Value = Value> {
    let narrow = [
        field("owner", "acme", 0.05),
        field("repo_url", "https://example.com/", 0.3),
        field("git_ref", "refs/heads/", 0.4),
        field("dockerfile_path", "docker/", 0.5),
        field("context_path", "src/", 0.5),
        field("registry_url", "ghcr.io/", 0.05),
        field("image_name", "acme/", 0.05),
        field("target", "stage", 0.05),
    ];
    let tags = proptest::option::weighted(0.1, vec(text(), 1..3));
    let free = (vec(text(), 0..3), texts("test_env"), texts("build_args"), texts("labels"));
    let paths = [credentials("git_credentials_path"), credentials("registry_credentials_path")];
    let items = [step_items("build_secrets"), step_items("ssh")];
    (narrow, tags, free, paths, items).prop_map(|(narrow, tags, free, paths, items)| {
        let (commands, env, arguments, labels) = free;
        let mut body = json!({
            "owner": "acme", "repo_url": "https://example.com/acme/api.git", "image_tags": ["v1"],
            "registry_url": "ghcr.io/acme", "test_commands": commands,
        });
        let maps = [env, arguments, labels].into_iter().chain(items);
        for (name, value) in narrow.into_iter().chain(paths).chain(maps).flatten() {
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

/// The fields that go into a job as they were sent.
const CARRIED: [&str; 15] = [
    "owner",
    "repo_url",
    "git_ref",
    "git_credentials_path",
    "dockerfile_path",
    "context_path",
    "image_tags",
    "registry_credentials_path",
    "test_commands",
    "test_env",
    "build_args",
    "build_secrets",
    "ssh",
    "target",
    "labels",
];

/// The paths in Vault that a submission names.
fn vault_paths(body: &Value) -> BTreeSet<String> {
    let mut named = Vec::new();
    for name in ["git_credentials_path", "registry_credentials_path", "build_secrets", "ssh"] {
        strings(&body[name], "", &mut named);
    }
    let path = |text: &str| Some(text.strip_prefix("vault:")?.split('#').next()?.to_owned());
    named.into_iter().filter_map(|(_, text)| path(text)).collect()
}

/// Holds an accepted submission, its specification and its jobs against each other. How many paths in Vault it names.
fn is_carried(body: &Value, policy: &Policy, spec: Spec) -> usize {
    let sent = spec.to_json();
    for name in CARRIED {
        if let Some(value) = body.get(name) {
            assert_eq!(&sent[name], value, "{name}");
        }
    }
    let text = |of: &Value, name: &str| of[name].as_str().map(str::to_owned);
    let image = |of: &Value| {
        [text(of, "registry_url"), text(of, "image_name")].into_iter().flatten().collect::<Vec<_>>().join("/")
    };
    assert!(image(&sent).starts_with(&image(body)), "{}", image(&sent));
    let in_vault = vault_paths(body);
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.~@+/".contains(&byte);
    assert!(in_vault.iter().all(|path| path.bytes().all(plain)), "{in_vault:?}");
    let at = DateTime::from_timestamp(1_700_000_000, 0).unwrap();
    let labels = spec.labels_for_lists(at);
    let job = JobId::from_uuid(Uuid::from_u128(1));
    let payload = Payload { job, spec, policy: policy.clone(), insecure_registries: Vec::new() };
    let encoded = payload.encode().unwrap();
    assert_eq!(Payload::decode(&encoded).unwrap(), payload);
    for (template, runner) in [("raw_exec", path()), ("docker", Runner::Image("nomad-build:1".to_owned()))] {
        let job = render(&payload, "ci", at, &settings(template, runner)).unwrap();
        let mut found = Vec::new();
        strings(&job, "", &mut found);
        let mut in_templates = BTreeSet::new();
        for (at, text) in found {
            if at.starts_with("/Meta/nb_") {
                assert!(
                    !text.contains(['$', '{', '}', '"', '\\', '\n', '\r', '`', ';', ' ']),
                    "{at}: {text}"
                );
            } else if text != encoded && text.contains(MARK) {
                assert_eq!(at, "/TaskGroups/Tasks/Templates/EmbeddedTmpl", "{text}");
                let path = text.strip_prefix("{{ with secret \"");
                let path = path.and_then(|text| text.strip_suffix("\" }}{{ .Data | toJSON }}{{ end }}"));
                in_templates.insert(path.unwrap_or(text).to_owned());
            }
        }
        assert_eq!(in_templates, in_vault);
        let meta = serde_json::from_value(job["Meta"].clone()).unwrap();
        assert_eq!(Labels::from_meta(&meta).as_ref(), Some(&labels));
        assert!(job.to_string().contains(&encoded));
    }
    in_vault.len()
}

#[test]
fn of_ten_thousand_hostile_submissions_none_leaves_anything_to_be_expanded() {
    let (accepted, refused, in_vault) = (Cell::new(0), Cell::new(0), Cell::new(0));
    let allowed = Allowed { vault: vec!["*".parse().unwrap()], ..Allowed::default() };
    let policy = Policy { allowed, ..Policy::default() };
    let config = Config { cases: SUBMISSIONS, failure_persistence: None, ..Config::default() };
    let tried = TestRunner::new(config).run(&submission(), |body| {
        match Spec::from_json(body.clone(), &policy) {
            Ok(spec) => {
                accepted.set(accepted.get() + 1);
                in_vault.set(in_vault.get() + is_carried(&body, &policy, spec));
            }
            Err(_) => refused.set(refused.get() + 1),
        }
        Ok(())
    });
    tried.unwrap();
    let (accepted, refused, in_vault) = (accepted.get(), refused.get(), in_vault.get());
    assert_eq!(accepted + refused, SUBMISSIONS);
    assert!(accepted > 1000 && refused > 1000, "{accepted} accepted, {refused} refused");
    assert!(in_vault > 300, "{in_vault} paths in Vault");
}
