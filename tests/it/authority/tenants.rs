//! Namespaces are tenants: what a caller may do in one says nothing of another, and nothing of one is told in another.

use std::collections::BTreeSet;
use std::time::Duration;

use futures_util::StreamExt as _;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use uuid::Uuid;

use super::{CAPABILITIES, absent, guard, run_something, run_something_in, trust, waiting};
use crate::support::{Api, Guarded, Issuer, NAMESPACE, Service, eventually, eventually_within, world};

/// The other namespace.
const OTHER: &str = "team-b";

/// One in which nothing is built. The three names are of one length.
const NONE: &str = "team-c";

/// A service for two namespaces of a Nomad that has ACLs.
async fn for_both(further: &[(&str, &str)]) -> (Guarded, Service, tempfile::NamedTempFile) {
    let nomad = Guarded::start().await;
    nomad.add_namespace(OTHER).await;
    let both = format!("{NAMESPACE},{OTHER}");
    let variables = [&[("NOMAD_BUILD_NAMESPACES", both.as_str())], further].concat();
    guard(nomad, &world().registry, &variables).await
}

/// A job that no node can take.
fn waiting_in(namespace: &str) -> Value {
    let mut job = waiting();
    job["namespace"] = json!(namespace);
    job
}

/// Some of the capabilities.
fn set(bits: usize) -> Vec<&'static str> {
    (0..3).filter(|bit| bits & (1 << bit) != 0).map(|bit| CAPABILITIES[bit]).collect()
}

/// What a caller may do in each namespace.
struct Role {
    name: String,
    may: Vec<(&'static str, Vec<&'static str>)>,
    /// What refuses it that tells it nothing: of a job, and of all else.
    refused: [StatusCode; 2],
    api: Api,
}

impl Role {
    /// Who has a token that Nomad is asked about.
    fn new(name: &str, api: Api, may: Vec<(&'static str, Vec<&'static str>)>) -> Self {
        Self { name: name.to_owned(), may, refused: [StatusCode::NOT_FOUND, StatusCode::FORBIDDEN], api }
    }

    /// Who shows nothing that anybody could ask Nomad about.
    fn nobody(name: &str, api: Api) -> Self {
        Self { refused: [StatusCode::UNAUTHORIZED; 2], ..Self::new(name, api, Vec::new()) }
    }

    /// Who has some of the capabilities in the one namespace, and some in the other.
    async fn of_set(nomad: &Guarded, url: &str, bits: usize) -> Self {
        let may = vec![(NAMESPACE, set(bits & 7)), (OTHER, set(bits >> 3))];
        let rules = may.iter().map(|(name, has)| format!("namespace {name:?} {{ capabilities = {has:?} }}"));
        let token = nomad.caller(&rules.collect::<Vec<_>>().join("\n")).await;
        Self::new(&format!("{may:?}"), Api::with_token(url, &token.secret), may)
    }

    fn may(&self, namespace: &str, capability: &str) -> bool {
        self.may.iter().any(|(name, has)| *name == namespace && has.contains(&capability))
    }

    /// What a route answers that needs a capability for a job of a namespace.
    fn wanted(&self, namespace: &str, capability: &str) -> StatusCode {
        match (self.may(namespace, capability), self.may(namespace, "read-job")) {
            (true, _) => StatusCode::OK,
            (false, true) => StatusCode::FORBIDDEN,
            (false, false) => self.refused[0],
        }
    }

    /// What one answers that needs it in a namespace.
    fn wanted_in(&self, namespace: &str, capability: &str) -> StatusCode {
        match (self.may(namespace, capability), namespace == NONE) {
            (true, false) => StatusCode::OK,
            // Nothing is built there, which may be told to it.
            (true, true) => StatusCode::BAD_REQUEST,
            (false, _) => self.refused[1],
        }
    }

    /// What was answered for a job of a namespace, or of none, by each route, and what should have been.
    async fn try_job(&self, namespace: &str, id: &str) -> [Vec<(&'static str, StatusCode)>; 2] {
        const ROUTES: [(Method, &str, &str); 6] = [
            (Method::GET, "status", "read-job"),
            (Method::GET, "logs", "read-logs"),
            (Method::GET, "logs/stream", "read-logs"),
            (Method::POST, "logs/tickets", "read-logs"),
            (Method::POST, "kill", "dispatch-job"),
            // What was killed before has ended.
            (Method::POST, "cleanup", "dispatch-job"),
        ];
        let (mut got, mut wanted) = (Vec::new(), Vec::new());
        for (method, route, capability) in ROUTES {
            let answer = if route == "logs/stream" {
                self.api.stream(id, "").await.status()
            } else {
                self.api.call(method, &format!("/jobs/{id}/{route}"), None).await.0
            };
            got.push((route, answer));
            wanted.push((route, self.wanted(namespace, capability)));
        }
        [got, wanted]
    }
}

/// Has a role ask for everything in each namespace; `all` submits the jobs that it asks for.
async fn try_all(all: &Api, role: &Role) {
    let (api, who) = (&role.api, &role.name);
    let unknown = format!("nb-{}", Uuid::new_v4());
    for namespace in [NAMESPACE, OTHER] {
        let id = all.submit(&waiting_in(namespace)).await;
        let lacks = |what: &str| !role.may(namespace, what) && !role.may(namespace, "read-job");
        absent::look_alike(api, &id, &unknown, &format!("{who}, a job of {namespace}"), lacks).await;
        let [got, wanted] = role.try_job(namespace, &id).await;
        assert_eq!(got, wanted, "{who}, a job of {namespace}");
        if role.may.iter().all(|(name, has)| *name != namespace || has.is_empty())
            && !role.may(NONE, "read-job")
        {
            absent::namespaces_look_alike(api, namespace, NONE, who, &waiting()).await;
        }
    }
    let [got, _] = role.try_job(NONE, &unknown).await;
    assert!(got.iter().all(|(_, status)| *status == role.refused[0]), "{who}: {got:?}");
    let listed = api.call(Method::GET, "/jobs", None).await;
    let seen: Vec<_> = [NAMESPACE, OTHER].into_iter().filter(|name| role.may(name, "read-job")).collect();
    let wanted = if seen.is_empty() { role.refused[1] } else { StatusCode::OK };
    assert_eq!(listed.0, wanted, "{who}: {}", listed.1);
    for job in listed.1["data"]["jobs"].as_array().into_iter().flatten() {
        assert!(seen.iter().any(|name| job["namespace"] == *name), "{who}: {job}");
    }
    for namespace in [NAMESPACE, OTHER, NONE] {
        let (status, body) = api.call(Method::GET, &format!("/jobs?namespace={namespace}"), None).await;
        assert_eq!(status, role.wanted_in(namespace, "read-job"), "{who}, the jobs of {namespace}: {body}");
    }
    for name in [None, Some(NAMESPACE), Some(OTHER), Some(NONE)] {
        let mut job = waiting();
        job["namespace"] = json!(name);
        let wanted = role.wanted_in(name.unwrap_or(NAMESPACE), "dispatch-job");
        for route in ["/jobs?dry_run=true", "/jobs"] {
            let (status, body) = api.call(Method::POST, route, Some(&job)).await;
            assert_eq!(status, wanted, "{who}, a submission to {name:?}: {body}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_each_namespace_a_caller_may_do_what_its_token_may_there_and_is_told_of_nothing_else() {
    let (nomad, service, _token) = for_both(&[]).await;
    run_something(&nomad).await;
    run_something_in(&nomad, OTHER).await;
    let all = &Api::with_token(&service.url, nomad.management());
    let (nomad, url) = (&nomad, &service.url);
    // Every set of capabilities in the one with every set in the other.
    let tried = futures_util::stream::iter(0..64)
        .map(async |bits| try_all(all, &Role::of_set(nomad, url, bits).await).await);
    tried.buffer_unordered(4).collect::<Vec<()>>().await;
    let jobs = nomad.call(Method::GET, "jobs?namespace=*&prefix=nb-", &Value::Null).await;
    let namespaces: BTreeSet<_> =
        jobs.as_array().unwrap().iter().map(|job| job["Namespace"].as_str().unwrap()).collect();
    assert_eq!(namespaces, BTreeSet::from([NAMESPACE, OTHER]));
}

/// The identity of a workload of the first namespace, which a policy gives rights in the second one.
async fn identity(nomad: &Guarded) -> String {
    let job = json!({"Job": {
        "ID": "identity", "Name": "identity", "Type": "batch", "Datacenters": ["*"], "Namespace": NAMESPACE,
        "TaskGroups": [{"Name": "one", "Tasks": [{
            "Name": "one", "Driver": "raw_exec", "Config": {"command": "/bin/sleep", "args": ["600"]},
            "Resources": {"CPU": 20, "MemoryMB": 16}, "Identity": {"File": true},
        }]}],
    }});
    nomad.call(Method::POST, &format!("jobs?namespace={NAMESPACE}"), &job).await;
    nomad.owns("identity");
    let rules = format!("namespace {OTHER:?} {{ capabilities = [\"read-job\", \"read-logs\"] }}");
    let of_the_job = json!({ "Namespace": NAMESPACE, "JobID": "identity" });
    let policy = json!({ "Name": "identity", "Rules": rules, "JobACL": of_the_job });
    nomad.call(Method::PUT, "acl/policy/identity", &policy).await;
    eventually("the workload runs and has its identity", async || {
        let found = nomad
            .call(Method::GET, &format!("job/identity/allocations?namespace={NAMESPACE}"), &Value::Null)
            .await;
        let allocation = found[0]["ID"].as_str().filter(|_| found[0]["ClientStatus"] == "running")?;
        let file = nomad.folder().join(format!("nomad/alloc/{allocation}/one/secrets/nomad_token"));
        std::fs::read_to_string(file).ok()
    })
    .await
}

/// Those whose rights are not a list of capabilities.
async fn special(nomad: &Guarded, url: &str) -> Vec<Role> {
    let (issuer, stranger) = (Issuer::new(), Issuer::new());
    trust(nomad, &issuer, "acme/api").await;
    let with = |token: &str| Api::with_bearer(url, "Bearer", token);
    let forged =
        stranger.sign(&json!({ "sub": "x", "nomad_job_id": "identity", "nomad_namespace": "default" }));
    let all = || CAPABILITIES.to_vec();
    let mut roles = vec![
        Role::nobody("nobody", Api::new(url)),
        Role::nobody("a JWT that has expired", with(&issuer.token("acme/api", -3600))),
        Role::nobody("a JWT of another repository", with(&issuer.token("other/api", 600))),
        Role::new("made up", with(&Uuid::new_v4().to_string()), vec![]),
        Role::new("a made-up identity", with(&forged), vec![]),
        Role::new("a JWT", with(&issuer.token("acme/api", 600)), vec![(NAMESPACE, all())]),
        Role::new("an identity", with(&identity(nomad).await), vec![(OTHER, vec!["read-job", "read-logs"])]),
        Role::new(
            "management",
            with(nomad.management()),
            [NAMESPACE, OTHER, NONE].map(|name| (name, all())).into(),
        ),
    ];
    for (rules, may) in [
        (
            "namespace \"*\" { policy = \"write\" }\nnamespace \"team-b\" { policy = \"deny\" }",
            vec![NAMESPACE, NONE],
        ),
        (
            "namespace \"*\" { policy = \"write\" }\nnamespace \"team-*\" { policy = \"deny\" }",
            vec![NAMESPACE],
        ),
        ("namespace \"team-*\" { policy = \"write\" }", vec![OTHER, NONE]),
        ("namespace \"*\" { policy = \"deny\" }\nnamespace \"*-b\" { policy = \"write\" }", vec![OTHER]),
        (
            "namespace \"builds\" { capabilities = [\"deny\", \"read-job\", \"read-logs\", \"dispatch-job\"] }",
            vec![],
        ),
    ] {
        let token = nomad.caller(rules).await;
        roles.push(Role::new(
            rules,
            with(&token.secret),
            may.into_iter().map(|name| (name, all())).collect(),
        ));
    }
    roles
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_each_namespace_those_without_a_list_of_rights_may_what_nomad_lets_them_and_learn_nothing_else() {
    let (nomad, service, _token) = for_both(&[]).await;
    run_something(&nomad).await;
    run_something_in(&nomad, OTHER).await;
    // The shortest that Nomad gives out: it is over by the end of the others.
    let token = json!({ "Name": "short", "Type": "management", "ExpirationTTL": "1m" });
    let expiring = nomad.call(Method::PUT, "acl/token", &token).await;
    let expiring = Api::with_token(&service.url, expiring["SecretID"].as_str().unwrap());
    let all = &Api::with_token(&service.url, nomad.management());
    assert_eq!(expiring.call(Method::GET, "/jobs", None).await.0, StatusCode::OK);
    let roles = special(&nomad, &service.url).await;
    let tried = futures_util::stream::iter(&roles).map(async |role| try_all(all, role).await);
    tried.buffer_unordered(4).collect::<Vec<()>>().await;
    tickets_open_nothing_else(&service.url, all).await;
    eventually_within(Duration::from_mins(2), "the token is shut out", async || {
        (expiring.call(Method::GET, "/jobs", None).await.0 == StatusCode::FORBIDDEN).then_some(())
    })
    .await;
    // Each of its rights is kept for seconds by itself, so those that were not tried are none.
    try_all(all, &Role::new("one that has expired", expiring, vec![])).await;
}

/// A ticket of a job of one namespace says nothing of those of the other, and is good for no other route.
async fn tickets_open_nothing_else(url: &str, all: &Api) {
    let [id, other] = [NAMESPACE, OTHER].map(async |namespace| all.submit(&waiting_in(namespace)).await);
    let (id, other, unknown) = (id.await, other.await, format!("nb-{}", Uuid::new_v4()));
    let ticket = all.post(&format!("/jobs/{id}/logs/tickets")).await["ticket"].as_str().unwrap().to_owned();
    let nobody = Api::new(url);
    for (method, route) in [
        (Method::GET, "status"),
        (Method::GET, "logs"),
        (Method::GET, "logs/stream"),
        (Method::POST, "logs/tickets"),
        (Method::POST, "kill"),
        (Method::POST, "cleanup"),
    ] {
        let ask = async |job: &str| {
            let headers = &[("accept", "text/event-stream")];
            let path = format!("/jobs/{job}/{route}?ticket={ticket}");
            nobody.whole(&method, &path, headers, None).await.replace(job, "this job")
        };
        let told = ask(&unknown).await;
        assert!(told.starts_with("HTTP/1.1 401 "), "{method} {route}: {told}");
        assert_eq!(ask(&other).await, told, "{method} {route}");
        if route != "logs/stream" {
            assert_eq!(ask(&id).await, told, "{method} {route}");
        }
    }
    assert_eq!(nobody.stream(&id, &format!("?ticket={ticket}")).await.status(), StatusCode::OK);
}

#[tokio::test]
async fn a_namespace_that_nothing_is_built_in_is_named_beside_what_else_is_wrong() {
    let (nomad, service, _token) = for_both(&[]).await;
    let all = Api::with_token(&service.url, nomad.management());
    for (namespace, why) in [
        (json!("nowhere"), "those you may use are \"builds\", \"team-b\""),
        (json!(7), "is a number"),
        (json!("no where"), "is not the name of a Nomad namespace"),
        (json!("x".repeat(129)), "is not the name of a Nomad namespace"),
    ] {
        let mut job = waiting();
        job["namespace"] = namespace;
        job["image_tags"] = json!([]);
        let (status, body) = all.call(Method::POST, "/jobs", Some(&job)).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{body}");
        let details = body["error"]["details"].as_array().unwrap();
        let fields: Vec<_> = details.iter().map(|detail| detail["field"].as_str().unwrap()).collect();
        assert_eq!(fields, ["namespace", "image_tags"], "{body}");
        assert!(details[0]["message"].as_str().unwrap().contains(why), "{body}");
    }
    // Whoever may build in one only is told of that one only.
    let one = Api::with_token(&service.url, &nomad.builder_in(OTHER).await.secret);
    let (status, body) = one.call(Method::POST, "/jobs", Some(&waiting_in("nowhere"))).await;
    assert_eq!(status, StatusCode::FORBIDDEN, "{body}");
    assert!(!body.to_string().contains(NAMESPACE), "{body}");
}

#[tokio::test]
async fn builds_of_two_namespaces_are_kept_apart_and_told_after_their_end_by_any_replica() {
    let world = world();
    let folder = tempfile::tempdir().unwrap();
    let archive = format!("file://{}", folder.path().display());
    let archived = [("NOMAD_BUILD_ARCHIVE", archive.as_str())];
    let (nomad, service, token) = for_both(&archived).await;
    let secret = json!({ "Namespace": OTHER, "Path": "creds/acme/npm", "Items": { "token": "of team b" } });
    nomad.call(Method::PUT, &format!("var/creds/acme/npm?namespace={OTHER}"), &secret).await;
    let builder = Api::with_token(&service.url, &nomad.builder_in(OTHER).await.secret);
    let step = format!(
        "RUN --mount=type=secret,id=npm,required=true : {}; test \"$(cat /run/secrets/npm)\" = \"of team b\"",
        Uuid::new_v4()
    );
    let repository = world.repository(&step);
    let mut job = world.job(&repository);
    job["namespace"] = json!(OTHER);
    job["build_secrets"] = json!({ "npm": "creds/acme/npm#token" });
    let id = builder.submit(&job).await;
    // Of the same key each namespace has one of its own.
    let all = Api::with_token(&service.url, nomad.management());
    let first = all.submit_keyed("one", &waiting()).await;
    let second = all.submit_keyed("one", &waiting_in(OTHER)).await;
    assert_ne!(first, second);
    assert_eq!(all.submit_keyed("one", &waiting_in(NAMESPACE)).await, first);
    assert_eq!(all.status(&first).await["nomad"]["namespace"], NAMESPACE);
    assert_eq!(all.status(&second).await["nomad"]["namespace"], OTHER);
    let status = builder.wait_for_end(&id).await;
    assert_eq!(status["status"], "SUCCEEDED", "{status:#}\n{:#}", builder.logs(&id).await);
    assert_eq!(status["nomad"]["namespace"], OTHER);
    for (id, live) in [(&first, 1), (&second, 1), (&id, 1)] {
        assert_eq!(all.status(id).await["metrics"]["concurrent_jobs_total"], live, "{id}");
    }
    assert_eq!(service.metric("nomad_build_concurrent_jobs").await, Some(2));
    let before = builder.logs(&id).await;
    let record = folder.path().join(OTHER).join(&id).join("record.json");
    crate::support::eventually("the job is archived", async || record.exists().then_some(())).await;
    nomad.call(Method::DELETE, &format!("job/{id}?namespace={OTHER}&purge=true"), &Value::Null).await;
    let both = format!("{NAMESPACE},{OTHER}");
    let variables = [
        ("NOMAD_BUILD_NAMESPACES", both.as_str()),
        ("NOMAD_TOKEN_FILE", token.path().to_str().unwrap()),
        ("NOMAD_BUILD_SWEEP", "off"),
        archived[0],
    ];
    let replica = Service::start(&nomad.url, &world.registry, &variables);
    let later = Api::with_token(&replica.url, nomad.management());
    assert_eq!(later.logs(&id).await, before);
    let told = later.status(&id).await;
    assert_eq!((&told["status"], &told["image"]), (&status["status"], &status["image"]));
    let stranger = Api::with_token(&replica.url, &nomad.builder().await.secret);
    let hidden = stranger.call(Method::GET, &format!("/jobs/{id}/status"), None).await;
    assert_eq!(hidden.0, StatusCode::NOT_FOUND, "{}", hidden.1);
    for id in [first, second] {
        assert_eq!(later.post(&format!("/jobs/{id}/kill")).await["success"], true);
    }
}
