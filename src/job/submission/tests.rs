//! What submissions are taken, and what is refused by which field.

use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::job::Allowed;

fn good() -> Value {
    json!({
        "owner": "acme",
        "repo_url": "https://example.com/acme/api.git",
        "image_tags": ["v1", "latest"],
        "registry_url": "ghcr.io/acme/api",
    })
}

fn with(field: &str, value: Value) -> Result<Spec, Invalid> {
    let mut body = good();
    body[field] = value;
    Spec::from_json(body, &Policy::default())
}

fn bad_fields(result: Result<Spec, Invalid>) -> Vec<String> {
    result.unwrap_err().0.into_iter().map(|error| error.field).collect()
}

#[test]
fn the_least_submission_gets_its_defaults() {
    let spec = Spec::from_json(good(), &Policy::default()).unwrap();
    assert_eq!(spec.dockerfile_path.as_str(), "Dockerfile");
    assert_eq!(spec.context_path.as_str(), ".");
    assert_eq!(spec.image(), "ghcr.io/acme/api");
    assert_eq!(spec.timeouts, DEFAULT_TIMEOUTS);
    assert_eq!(spec.priority, 50);
    assert!(!spec.has_tests() && spec.git_ref.is_none());
}

#[test]
fn all_errors_come_back_at_once() {
    let body = json!({
        "owner": "-x", "repo_url": "ext::sh -c id", "git_ref": "--upload-pack=x", "dockerfile_path": "../x",
        "image_tags": ["ok", "no good", 7], "registry_url": "https://ghcr.io", "test_commands": [""],
        "test_entry_point": "yes", "build_args": {"A B": "x", "OK": 1, "BUILDKIT_SYNTAX": "x", "BUILDKIT_CONTEXT_KEEP_GIT_DIR": "1"},
        "labels": {"nomad-build.job": "x"}, "timeouts": {"build": "soon", "tset": "PT1M"},
        "build_secrets": {"a b": "x#y", "ok": "x#y", "bad": "x"}, "ssh": {"a/b": "x#y"},
        "resources": {"build": {"cpu": 0}}, "priority": 101, "image_tag": "x", "git_credentials_path": "a b",
    });
    let mut fields = bad_fields(Spec::from_json(body, &Policy::default()));
    fields.sort();
    assert_eq!(
        fields,
        [
            "build_args.A B",
            "build_args.BUILDKIT_SYNTAX",
            "build_args.OK",
            "build_secrets.a b",
            "build_secrets.bad",
            "dockerfile_path",
            "git_credentials_path",
            "git_ref",
            "image_tag",
            "image_tags[1]",
            "image_tags[2]",
            "labels.nomad-build.job",
            "owner",
            "priority",
            "registry_url",
            "repo_url",
            "resources.build.cpu",
            "ssh.a/b",
            "test_commands[0]",
            "test_entry_point",
            "timeouts.build",
            "timeouts.tset",
        ]
    );
}

#[test]
fn what_must_be_there_is_named_when_it_is_not() {
    let fields = bad_fields(Spec::from_json(json!({}), &Policy::default()));
    assert_eq!(fields, ["owner", "repo_url", "image_tags", "registry_url"]);
    assert_eq!(bad_fields(Spec::from_json(json!([]), &Policy::default()))[0], "");
}

#[test]
fn the_image_is_named_by_path_name_or_repository() {
    for (registry, name, want) in [
        ("ghcr.io/acme", Value::Null, "ghcr.io/acme"),
        ("ghcr.io/acme", json!("api"), "ghcr.io/acme/api"),
        ("ghcr.io", json!("acme/api"), "ghcr.io/acme/api"),
        ("ghcr.io", Value::Null, "ghcr.io/api"),
    ] {
        let mut body = good();
        body["registry_url"] = json!(registry);
        body["image_name"] = name;
        assert_eq!(Spec::from_json(body, &Policy::default()).unwrap().image(), want);
    }
    assert_eq!(bad_fields(with("image_name", json!("API"))), ["image_name"]);
    let mut longest = good();
    longest["image_name"] = json!("a".repeat(127));
    longest["registry_url"] = json!(format!("ghcr.io/{}", "a".repeat(119)));
    assert!(Spec::from_json(longest.clone(), &Policy::default()).is_ok());
    longest["registry_url"] = json!(format!("ghcr.io/{}", "a".repeat(120)));
    longest["image_name"] = json!("a".repeat(128));
    let refused = Spec::from_json(longest, &Policy::default());
    assert_eq!(bad_fields(refused), ["registry_url", "image_name"]);
}

#[test]
fn the_operator_says_what_may_be_named() {
    let allowed = Allowed {
        registries: vec!["ghcr.io/acme".parse().unwrap()],
        repositories: vec!["https://example.com/acme".parse().unwrap()],
        forbidden_names: vec!["HTTP_*".parse().unwrap()],
        ..Allowed::default()
    };
    let policy = Policy { allowed, ..Policy::default() };
    assert!(Spec::from_json(good(), &policy).is_ok());
    let mut bad = good();
    bad["repo_url"] = json!("https://example.com/other/api.git");
    bad["registry_url"] = json!("ghcr.io");
    bad["image_name"] = json!("other/api");
    bad["build_args"] = json!({"HTTP_PROXY": "x", "OK": "x"});
    bad["test_env"] = json!({"HTTP_X": "x"});
    let mut fields = bad_fields(Spec::from_json(bad, &policy));
    fields.sort();
    assert_eq!(fields, ["build_args.HTTP_PROXY", "registry_url", "repo_url", "test_env.HTTP_X"]);
}

#[test]
fn the_operator_bounds_what_may_be_asked() {
    assert_eq!(bad_fields(with("repo_url", json!("file:///srv/a"))), ["repo_url"]);
    assert_eq!(bad_fields(with("timeouts", json!({"build": "PT5H"}))), ["timeouts.build"]);
    assert_eq!(
        bad_fields(with("resources", json!({"test": {"memory_mb": 1_000_000}}))),
        ["resources.test.memory_mb"]
    );
    assert_eq!(with("timeouts", json!({"build": "PT90S"})).unwrap().timeouts.build, Duration::from_secs(90));
}

#[test]
fn build_arguments_and_labels_fit_in_a_url() {
    let of = |args: usize, labels: usize| {
        let mut body = good();
        body["build_args"] = json!({"A": "x".repeat(args)});
        body["labels"] = json!({"l": "é".repeat(labels)});
        Spec::from_json(body, &Policy::default())
    };
    assert!(of(20_000, 4_000).is_ok());
    assert_eq!(bad_fields(of(26_000, 4_000)), ["build_args"]);
    assert_eq!(bad_fields(of(10_000, 7_000)), ["labels"]);
}

#[test]
fn a_tag_is_asked_for_once() {
    assert_eq!(bad_fields(with("image_tags", json!(["a", "a"]))), ["image_tags[1]"]);
    assert_eq!(bad_fields(with("image_tags", json!([]))), ["image_tags"]);
}

proptest! {
    #[test]
    fn a_specification_with_its_defaults_is_taken_again_whatever_the_operator_allows(
        seconds in 1..100_000_u64, cpu in 1..2_000_u32, memory_mb in LEAST_MEMORY_MB..2_000,
    ) {
        let max_resources = Resources { cpu, memory_mb };
        let policy =
            Policy { max_timeout: Duration::from_secs(seconds), max_resources, ..Policy::default() };
        let spec = Spec::from_json(good(), &policy).unwrap();
        prop_assert_eq!(Spec::from_json(spec.to_json(), &policy), Ok(spec));
    }

    #[test]
    fn a_specification_survives_the_way_to_the_runner(
        command in "[^\0]{1,200}", value in "[^\0]{0,200}", path in "[a-z$(){}% ]{1,20}", tests: bool,
    ) {
        let mut body = good();
        if tests { body["test_commands"] = json!([command]); }
        body["build_args"] = json!({"ARG": value});
        body["test_env"] = json!({"ENV": value});
        body["context_path"] = json!(path);
        let spec = Spec::from_json(body, &Policy::default()).unwrap();
        prop_assert_eq!(&spec.build_args["ARG"], &value);
        prop_assert_eq!(Spec::from_json(spec.to_json(), &Policy::default()).unwrap(), spec);
    }
}
