mod hostile;

use uuid::Uuid;

use super::*;
use crate::job::{Allowed, Policy, Spec};

fn text(template: &str) -> &'static str {
    TEMPLATES.iter().find(|(name, _)| *name == template).unwrap().1
}

fn settings(template: &str, runner: Runner) -> Settings {
    Settings {
        template: Template::new(text(template)).unwrap(),
        runner,
        engine_socket: "/var/run/docker.sock".to_owned(),
        mounts: Vec::new(),
        datacenters: vec!["*".to_owned()],
        node_pool: "default".to_owned(),
        disk_mb: 1000,
        vault_role: None,
        archive: None,
    }
}

fn payload(change: &Value) -> Payload {
    let mut body = json!({
        "owner": "acme", "repo_url": "https://example.com/acme/api.git", "git_ref": "main", "image_tags": ["v1"],
        "registry_url": "ghcr.io/acme/api", "test_commands": ["true"],
    });
    for (field, value) in change.as_object().unwrap() {
        body[field] = value.clone();
    }
    let allowed = Allowed { vault: vec!["*".parse().unwrap()], ..Allowed::default() };
    let policy = Policy { allowed, ..Policy::default() };
    let spec = Spec::from_json(body, &policy).unwrap();
    Payload { job: JobId::from_uuid(Uuid::from_u128(1)), spec, policy, insecure_registries: Vec::new() }
}

fn rendered(template: &str, runner: Runner, change: &Value) -> Result<Value, RenderError> {
    let at = DateTime::from_timestamp(1_700_000_000, 0).unwrap();
    render(&payload(change), "ci", at, &settings(template, runner))
}

fn path() -> Runner {
    Runner::Path("/usr/bin/nomad-build".to_owned())
}

#[test]
fn the_shipped_templates_keep_the_rules() {
    let artifact = Runner::Artifact { base: "http://service:8080".to_owned() };
    let image = Runner::Image("nomad-build:1".to_owned());
    for (template, runner) in [("raw_exec", path()), ("raw_exec", artifact), ("docker", image)] {
        let job = rendered(template, runner, &json!({})).unwrap();
        let names: Vec<_> =
            job["TaskGroups"][0]["Tasks"].as_array().unwrap().iter().map(|t| &t["Name"]).collect();
        assert_eq!(names, ["build", "test", "publish", "finish"]);
    }
}

#[test]
fn a_job_without_tests_has_no_test_task() {
    let job = rendered("raw_exec", path(), &json!({"test_commands": []})).unwrap();
    assert_eq!(job["TaskGroups"][0]["Tasks"].as_array().unwrap().len(), 3);
}

#[test]
fn a_sweep_runs_as_the_builds_of_its_template_do_on_each_node() {
    let artifact = Runner::Artifact { base: "http://service:8080".to_owned() };
    let image = Runner::Image("nomad-build:1".to_owned());
    for (template, runner) in [("raw_exec", path()), ("raw_exec", artifact), ("docker", image)] {
        let build =
            rendered(template, runner.clone(), &json!({})).unwrap()["TaskGroups"][0]["Tasks"][0].take();
        let id = JobId::from_uuid(Uuid::from_u128(1));
        let sweep = |nodes: &[&str]| {
            render_sweep(&id, "sweep-of-it", "ci", nodes, &settings(template, runner.clone())).unwrap()
        };
        let job = sweep(&["n1", "n2"]);
        assert_eq!((job["ID"].as_str(), job["Namespace"].as_str()), (Some("sweep-of-it"), Some("ci")));
        let groups = job["TaskGroups"].as_array().unwrap();
        for (group, node) in groups.iter().zip(["n1", "n2"]) {
            assert_eq!(group["Constraints"].as_array().unwrap().last().unwrap()["RTarget"], node);
            let task = &group["Tasks"][0];
            assert_eq!(task["Config"]["args"], json!(["phase", "sweep"]));
            assert_eq!(task["Env"]["NOMAD_BUILD_SWEEP"], id.as_str());
            for same in ["Driver", "Artifacts"] {
                assert_eq!(task[same], build[same], "{template}: {same}");
            }
            for same in ["command", "image", "network_mode", "mounts"] {
                assert_eq!(task["Config"][same], build["Config"][same], "{template}: {same}");
            }
        }
        assert_eq!(groups.len(), 2);
        let meta = job["Meta"].as_object().unwrap().iter();
        let meta = meta.map(|(name, value)| (name.clone(), value.as_str().unwrap().to_owned())).collect();
        assert_eq!(swept_nodes(&meta).collect::<Vec<_>>(), ["n1", "n2"]);
        let everywhere =
            render_node_sweep("all", "ci", 60, true, &settings(template, runner.clone())).unwrap();
        assert_eq!((&everywhere["Type"], &everywhere["ID"]), (&json!("sysbatch"), &json!("all")));
        let (group, task) = (&everywhere["TaskGroups"][0], &everywhere["TaskGroups"][0]["Tasks"][0]);
        assert!(group["ReschedulePolicy"].is_null() && group["Disconnect"].is_null(), "{group}");
        assert_eq!(task["Config"], groups[0]["Tasks"][0]["Config"]);
        assert_eq!(task["Env"]["NOMAD_BUILD_SWEEP_ENDED_S"], "60");
        let nowhere = sweep(&[]);
        assert_eq!(nowhere["TaskGroups"][0]["Count"], 0);
        assert_eq!(nowhere["TaskGroups"].as_array().unwrap().len(), 1);
    }
}

#[test]
fn nothing_of_the_users_can_be_expanded_by_nomad() {
    let hostile = "${NOMAD_TOKEN} %{http_code} {{ env \"X\" }} $(id) \" ' \n \\";
    let job = rendered(
        "raw_exec",
        path(),
        &json!({
            "test_commands": [hostile], "git_ref": "${x}%{y}", "build_args": {"A": hostile}, "test_env": {"A": hostile},
            "labels": {"a": hostile}, "dockerfile_path": "${a}/%{b}",
        }),
    )
    .unwrap();
    let text = job.to_string();
    for needle in ["NOMAD_TOKEN", "%{", "{{", "$(id)", "${x}", "${a}"] {
        assert!(!text.contains(needle), "{needle} stands in the job");
    }
}

/// Renders a build and a sweep by a shipped template in which a text is replaced.
fn changed(template: &str, [from, to]: [&str; 2]) -> [Result<Value, RenderError>; 2] {
    let text = text(template).replace(from, to);
    assert_ne!(text, self::text(template), "{from}");
    let runner = if template == "docker" { Runner::Image("nomad-build:1".to_owned()) } else { path() };
    let archive = Archive { directory: Some("/archive".to_owned()), ..Archive::default() };
    let settings = Settings {
        template: Template::new(text).unwrap(),
        mounts: vec!["/etc/ssl".to_owned()],
        archive: Some(archive),
        ..settings(template, runner)
    };
    let (payload, at) = (payload(&json!({})), DateTime::from_timestamp(0, 0).unwrap());
    [render(&payload, "ci", at, &settings), render_sweep(&payload.job, "sweep", "ci", &["node"], &settings)]
}

#[test]
fn a_template_that_breaks_a_rule_is_refused_by_name() {
    for (change, at) in [
        (["\"batch\"", "\"service\""], "Type"),
        (["\"Meta\": {{ job.meta }}", "\"Meta\": {\"team\": \"x\"}"], "Meta"),
        (["\"Meta\": {{ job.meta }},", ""], "Meta"),
        (["{{ job.meta }}", "{{ dict(job.meta, nb_ref=\"other\") }}"], "Meta"),
        (["\"Count\": 1", "\"Count\": 2"], "TaskGroups[0].Count"),
        (["\"Attempts\": 0, \"Interval\"", "\"Attempts\": 1, \"Interval\""], "RestartPolicy.Attempts"),
        (["\"Replace\": false", "\"Replace\": true"], "Disconnect.Replace"),
        (["{{ job.lost_after_ns }}", "60000000000"], "Disconnect.LostAfter"),
        (["\"LostAfter\": {{ job.lost_after_ns }}, ", ""], "Disconnect.LostAfter"),
        (
            [
                "\"Count\": 1,",
                "\"Count\": 1, \"Volumes\": {\"a\": {\"Type\": \"host\", \"Source\": \"etc\"}},",
            ],
            "TaskGroups[0].Volumes",
        ),
        (["{{ task.kill_timeout_ns }}", "5000000000"], "build.KillTimeout"),
        (["\"KillTimeout\": {{ task.kill_timeout_ns }},", ""], "build.KillTimeout"),
        (["\"KillTimeout\"", "\"KillSignal\": \"SIGHUP\", \"KillTimeout\""], "build.KillSignal"),
        (["\"MaxFiles\"", "\"Disabled\": true, \"MaxFiles\""], "build.LogConfig.Disabled"),
        (["\"Driver\":", "\"Leader\": true, \"Driver\":"], "build"),
        (["\"Driver\":", "\"VolumeMounts\": [{\"Volume\": \"a\"}], \"Driver\":"], "build.VolumeMounts"),
        (["\"Driver\": \"raw_exec\"", "\"Driver\": \"exec\""], "build.Driver"),
        (["\"Env\": false", "\"Env\": true"], "build"),
        (["\"args\":", "\"privileged\": true, \"args\":"], "build.Config.privileged"),
    ] {
        is_refused("raw_exec", change, at);
    }
}

fn is_refused(template: &str, change: [&str; 2], at: &str) {
    let [build, sweep] = changed(template, change);
    let is_at = |result: &_, at: &str| matches!(result, Err(RenderError::Rule(rule)) if rule.at == at);
    assert!(is_at(&build, at), "{change:?}: {build:?}");
    if let Some(of_a_task) = at.strip_prefix("build") {
        assert!(is_at(&sweep, &format!("sweep{of_a_task}")), "{change:?}: {sweep:?}");
    }
}

fn is_accepted(template: &str, change: [&str; 2]) {
    let results = changed(template, change);
    assert!(results.iter().all(Result::is_ok), "{template}, {change:?}: {results:?}");
}

#[test]
fn a_template_of_containers_mounts_and_reaches_what_the_operator_lists_and_nothing_else() {
    let beside = |mount: &str| format!("\"mounts\": [{mount},");
    let bind = |source: &str| {
        beside(&format!("{{\"type\": \"bind\", \"source\": \"{source}\", \"target\": \"/x\"}}"))
    };
    let mounts = "\"mounts\": [";
    for source in ["/", "/etc", "/etc/sslx", "/etc/ssl/../shadow", "/archive", "ssl"] {
        is_refused("docker", [mounts, &bind(source)], "build.Config.mounts");
    }
    for mount in [
        "{\"type\": \"volume\", \"source\": \"/etc/ssl\", \"target\": \"/x\"}",
        "{\"source\": \"/etc/ssl\"}",
        "1",
    ] {
        is_refused("docker", [mounts, &beside(mount)], "build.Config.mounts");
    }
    for (more, key) in [
        ("\"mount\": [{\"type\": \"bind\", \"source\": \"/\"}]", "mount"),
        ("\"volumes\": [\"/:/host\"]", "volumes"),
        ("\"devices\": []", "devices"),
        ("\"cap_add\": [\"sys_admin\"]", "cap_add"),
        ("\"pid_mode\": \"host\"", "pid_mode"),
        ("\"security_opt\": [\"seccomp=unconfined\"]", "security_opt"),
        ("\"logging\": {\"type\": \"none\"}", "logging"),
    ] {
        is_refused("docker", ["\"args\":", &format!("{more}, \"args\":")], &format!("build.Config.{key}"));
    }
    is_refused(
        "docker",
        ["\"network_mode\": \"host\"", "\"network_mode\": \"bridge\""],
        "build.Config.network_mode",
    );
    is_refused("docker", ["\"network_mode\": \"host\",", ""], "build.Config.network_mode");
    let tmpfs = beside("{\"type\": \"tmpfs\", \"target\": \"/tmp\"}");
    for change in [[mounts, &bind("/etc/ssl")], [mounts, &bind("/etc/ssl/certs")], [mounts, &tmpfs]] {
        is_accepted("docker", change);
    }
}

#[test]
fn what_an_operator_may_change_is_accepted() {
    for change in [
        ["\"Meta\": {{ job.meta }}", "\"Meta\": {{ dict(job.meta, team=\"x\") }}"],
        [
            "\"Constraints\": [",
            "\"Constraints\": [{\"LTarget\": \"${meta.builds}\", \"Operand\": \"=\", \"RTarget\": \"yes\"},",
        ],
        ["\"Datacenters\": {{ job.datacenters }}", "\"Datacenters\": [\"dc1\", \"dc2\"]"],
        ["{{ job.lost_after_ns }}", "{{ job.lost_after_ns * 2 }}"],
        ["{{ task.kill_timeout_ns }}", "120000000000"],
        ["\"KillTimeout\"", "\"KillSignal\": \"SIGTERM\", \"KillTimeout\""],
        ["\"KillTimeout\"", "\"User\": \"builds\", \"KillTimeout\""],
    ] {
        for template in ["raw_exec", "docker"] {
            is_accepted(template, change);
        }
    }
    let more = "\"security_opt\": [\"label=disable\"], \"group_add\": [\"999\"], \"auth_soft_fail\": true, \"args\":";
    is_accepted("docker", ["\"args\":", more]);
    is_accepted("raw_exec", ["\"args\":", "\"oom_score_adj\": 100, \"args\":"]);
}

#[test]
fn an_unknown_word_in_a_template_is_an_error() {
    let template = Template::new("{{ job.idd }}").unwrap();
    let at = DateTime::from_timestamp(0, 0).unwrap();
    let result =
        render(&payload(&json!({})), "ci", at, &Settings { template, ..settings("raw_exec", path()) });
    assert!(matches!(result, Err(RenderError::Template(_))));
}

#[test]
fn only_finish_is_told_of_the_archive() {
    let archive = Archive {
        environment: BTreeMap::from([("NOMAD_BUILD_ARCHIVE".to_owned(), "file:///archive".to_owned())]),
        directory: Some("/archive".to_owned()),
    };
    let image = Runner::Image("nomad-build:1".to_owned());
    let at = DateTime::from_timestamp(0, 0).unwrap();
    for (template, runner) in [("raw_exec", path()), ("docker", image)] {
        let settings = Settings { archive: Some(archive.clone()), ..settings(template, runner) };
        let job = render(&payload(&json!({})), "ci", at, &settings).unwrap();
        for task in job["TaskGroups"][0]["Tasks"].as_array().unwrap() {
            let is_finish = task["Name"] == "finish";
            assert_eq!(task["Env"]["NOMAD_BUILD_ARCHIVE"] == "file:///archive", is_finish, "{task}");
            let mounts = task["Config"]["mounts"].as_array().map_or(0, Vec::len);
            assert_eq!(mounts, if template == "docker" { 1 + usize::from(is_finish) } else { 0 }, "{task}");
        }
    }
}

#[test]
fn a_task_is_known_to_vault_where_it_reads_there_and_nowhere_else() {
    let change = json!({
        "git_credentials_path": "vault:kv/git", "registry_credentials_path": "vault:secret/data/registry",
        "build_secrets": {"npm": "vault:kv/npm#token", "pip": "vault:kv/npm#pip", "own": "creds/own#x"},
    });
    let image = Runner::Image("nomad-build:1".to_owned());
    let at = DateTime::from_timestamp(0, 0).unwrap();
    for (template, runner) in [("raw_exec", path()), ("docker", image)] {
        let settings = Settings { vault_role: Some("builds".to_owned()), ..settings(template, runner) };
        let job = render(&payload(&change), "ci", at, &settings).unwrap();
        for task in job["TaskGroups"][0]["Tasks"].as_array().unwrap() {
            let paths: &[&str] = match task["Name"].as_str().unwrap() {
                "build" => &["kv/git", "kv/npm", "secret/data/registry"],
                "test" => &[],
                _ => &["secret/data/registry"],
            };
            let vault = json!({"Role": "builds", "Env": false, "DisableFile": true, "ChangeMode": "noop"});
            assert_eq!(task["Vault"], if paths.is_empty() { Value::Null } else { vault }, "{task}");
            let templates = task["Templates"].as_array().map_or(&[][..], Vec::as_slice);
            let secrets: Vec<_> = templates
                .iter()
                .filter(|of| of["DestPath"].as_str().unwrap().starts_with("secrets/"))
                .collect();
            assert_eq!(secrets.len(), paths.len(), "{task}");
            for (place, (secret, path)) in secrets.iter().zip(paths).enumerate() {
                assert_eq!(secret["DestPath"], format!("secrets/vault-{place}.json"));
                let text = format!("{{{{ with secret \"{path}\" }}}}{{{{ .Data | toJSON }}}}{{{{ end }}}}");
                assert_eq!((&secret["EmbeddedTmpl"], &secret["Perms"]), (&json!(text), &json!("0600")));
            }
        }
    }
}

#[test]
fn a_template_that_leaves_out_what_a_task_is_given_is_refused() {
    let good = settings("raw_exec", path());
    let change = json!({"git_credentials_path": "vault:kv/git"});
    for (from, to) in [
        ("\"DisableFile\": true", "\"DisableFile\": false"),
        ("\"Env\": false, \"DisableFile\"", "\"Env\": true, \"DisableFile\""),
        ("{%- if task.vault %}", "{%- if false %}"),
        ("for template in task.templates", "for template in task.templates[:1]"),
    ] {
        let template = text("raw_exec").replace(from, to);
        assert_ne!(template, text("raw_exec"), "{from}");
        let template = Template::new(template).unwrap();
        let at = DateTime::from_timestamp(0, 0).unwrap();
        let result = render(&payload(&change), "ci", at, &Settings { template, ..good.clone() });
        assert!(matches!(&result, Err(RenderError::Rule(rule)) if rule.at == "build"), "{from}: {result:?}");
    }
}

#[test]
fn what_nomad_writes_of_vault_is_told_from_what_is_nomad_s_own() {
    for (name, is_one) in [
        (vault_file(0).as_str(), true),
        (vault_file(17).as_str(), true),
        ("vault_token", false),
        ("nomad_token", false),
        ("api.sock", false),
        ("vault-.json", false),
        ("vault-01.json", false),
        ("vault-x.json", false),
    ] {
        assert_eq!(is_vault_file(name), is_one, "{name}");
    }
}
