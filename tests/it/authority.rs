//! What a caller may do: what the caller's own Nomad token could.

mod absent;
mod audit;
mod hang;
mod login;
mod secrets;
mod tenants;
mod tickets;

use std::collections::BTreeSet;
use std::time::Duration;

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use uuid::Uuid;

use crate::support::openapi::DOCUMENT;
use crate::support::{Api, Guarded, Issuer, NAMESPACE, Service, eventually, numbered, world};

/// A service of a Nomad that has ACLs, and the file of its token. It sweeps no node, which would make allocations.
async fn guarded() -> (Guarded, Service, tempfile::NamedTempFile) {
    guarded_with(&world().registry, &[]).await
}

/// The same, with registries that are reached by plain HTTP and further variables.
async fn guarded_with(
    registries: &str,
    further: &[(&str, &str)],
) -> (Guarded, Service, tempfile::NamedTempFile) {
    guard(Guarded::start().await, registries, further).await
}

/// The same, of a given Nomad.
async fn guard(
    nomad: Guarded,
    registries: &str,
    further: &[(&str, &str)],
) -> (Guarded, Service, tempfile::NamedTempFile) {
    let (service, token) = guard_by(&nomad.url, &nomad, registries, further).await;
    (nomad, service, token)
}

/// The same, which reaches that Nomad by another address.
async fn guard_by(
    url: &str,
    nomad: &Guarded,
    registries: &str,
    further: &[(&str, &str)],
) -> (Service, tempfile::NamedTempFile) {
    let token = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(token.path(), nomad.token().await.secret).unwrap();
    let file = token.path().to_str().unwrap();
    let variables = [
        ("NOMAD_BUILD_NAMESPACES", NAMESPACE),
        ("NOMAD_TOKEN_FILE", file),
        ("NOMAD_BUILD_SWEEP", "off"),
        ("NOMAD_BUILD_JWT_AUTH_METHOD", "ci"),
    ];
    (Service::start(url, registries, &[&variables, further].concat()), token)
}

/// A job that no node can take.
fn waiting() -> Value {
    let mut job = numbered("authority", 1);
    job["resources"] = json!({"build": {"cpu": 60_000}});
    job
}

/// Something to try a token's `read-logs` on.
async fn run_something(nomad: &Guarded) {
    run_something_in(nomad, NAMESPACE).await;
}

/// The same, in another namespace.
async fn run_something_in(nomad: &Guarded, namespace: &str) {
    let job = json!({"Job": {
        "ID": "something", "Name": "something", "Type": "batch", "Datacenters": ["*"], "Namespace": namespace,
        "TaskGroups": [{"Name": "one", "Tasks": [
            {"Name": "one", "Driver": "raw_exec", "Config": {"command": "/bin/true"}, "Resources": {"CPU": 20, "MemoryMB": 16}},
        ]}],
    }});
    nomad.call(Method::POST, &format!("jobs?namespace={namespace}"), &job).await;
    nomad.owns("something");
    eventually("an allocation", async || {
        let path = format!("job/something/allocations?namespace={namespace}");
        let found = nomad.call(Method::GET, &path, &Value::Null).await;
        (found[0]["ClientStatus"] == "complete").then_some(())
    })
    .await;
}

/// The capabilities that routes need; none is that of who may do everything.
const CAPABILITIES: [&str; 3] = ["read-job", "read-logs", "dispatch-job"];

/// Who may ask: some of the capabilities, in the builds' namespace or in another one.
struct Role {
    name: String,
    token: Option<String>,
    has: Vec<&'static str>,
}

impl Role {
    /// The client of who has the role: it sends its token in Nomad's own header, or by a scheme of the one that others use, too.
    fn api(&self, url: &str, scheme: Option<&str>) -> Api {
        match (&self.token, scheme) {
            (None, _) => Api::new(url),
            (Some(token), None) => Api::with_token(url, token),
            (Some(token), Some(scheme)) => Api::with_bearer(url, scheme, token),
        }
    }

    fn may(&self, capability: &str) -> bool {
        self.has.contains(&capability)
    }

    /// What a route answers that needs a capability; `job` says whether it is about one, and whether that is there.
    fn wanted(&self, capability: &str, job: Option<bool>) -> StatusCode {
        match (self.may(capability), job) {
            (true, None | Some(true)) => StatusCode::OK,
            (true, Some(false)) => StatusCode::NOT_FOUND,
            (false, _) if self.token.is_none() => StatusCode::UNAUTHORIZED,
            (false, Some(_)) if !self.may("read-job") => StatusCode::NOT_FOUND,
            (false, _) => StatusCode::FORBIDDEN,
        }
    }
}

async fn roles(nomad: &Guarded) -> Vec<Role> {
    let mut roles = Vec::new();
    for set in 0..8_usize {
        let has: Vec<_> = (0..3).filter(|bit| set & (1 << bit) != 0).map(|bit| CAPABILITIES[bit]).collect();
        let policy = format!(
            "namespace \"builds\" {{ capabilities = {has:?} }}\nnamespace \"default\" {{ policy = \"write\" }}"
        );
        let token = nomad.caller(&policy).await.secret;
        roles.push(Role { name: format!("{has:?}"), token: Some(token), has });
    }
    for (name, token, has) in [
        ("nobody", None, &[][..]),
        ("made up", Some(Uuid::new_v4().to_string()), &[]),
        ("no token at all", Some("ab.cd.ef".to_owned()), &[]),
        ("management", Some(nomad.management().to_owned()), &CAPABILITIES),
    ] {
        roles.push(Role { name: name.to_owned(), token, has: has.to_vec() });
    }
    roles
}

/// The routes about one job, each with the capability that it needs.
const READS: [(&str, &str); 3] =
    [("status", "read-job"), ("logs", "read-logs"), ("logs/stream", "read-logs")];

/// What is about no job.
const OTHERS: [(&str, &str); 2] = [("GET", "/jobs"), ("POST", "/jobs")];

/// What does something to a job, and the capability that it needs.
const DOES: [(&str, &str); 3] =
    [("logs/tickets", "read-logs"), ("kill", "dispatch-job"), ("cleanup", "dispatch-job")];

/// What everybody may.
const OPEN: [(&str, &str); 7] = [
    ("GET", "/auth/login"),
    ("POST", "/auth/login"),
    ("GET", "/health"),
    ("GET", "/ready"),
    ("GET", "/metrics"),
    ("GET", "/openapi.json"),
    ("GET", "/runner/linux/none/sha256sums"),
];

#[test]
fn the_routes_that_are_tried_are_all_that_there_are() {
    let of_jobs =
        READS.iter().map(|(route, _)| ("GET", route)).chain(DOES.iter().map(|(route, _)| ("POST", route)));
    let of_jobs = of_jobs.map(|(method, route)| format!("{method} /jobs/{{id}}/{route}"));
    let others = OTHERS.iter().map(|(method, route)| format!("{method} {route}"));
    let guarded: BTreeSet<_> = of_jobs.chain(others).collect();
    // The program itself is as open as its checksum, and long.
    let runner = |route: &str| route.replace("linux/none", "{os}/{arch}");
    let open = OPEN.iter().map(|(method, route)| format!("{method} {}", runner(route)));
    let open: BTreeSet<_> = open.chain(["GET /runner/{os}/{arch}/nomad-build".to_owned()]).collect();
    let described = |is_open: bool| {
        let paths = DOCUMENT["paths"].as_object().unwrap().iter();
        let operations =
            paths.flat_map(|(path, of)| of.as_object().unwrap().iter().map(move |of| (path, of)));
        let operations = operations.filter(|(_, (name, _))| *name != "parameters");
        let alike = operations.filter(|(_, (_, of))| (of["security"] == json!([])) == is_open);
        alike.map(|(path, (name, _))| format!("{} {path}", name.to_uppercase())).collect::<BTreeSet<_>>()
    };
    assert_eq!((guarded, open), (described(false), described(true)));
}

/// What each route answers about a job, and what it should.
async fn try_job(role: &Role, api: &Api, id: &str, is_there: bool) -> [Vec<(&'static str, StatusCode)>; 2] {
    let (mut got, mut wanted) = (Vec::new(), Vec::new());
    for (route, capability) in READS {
        let answer = if route == "logs/stream" {
            api.stream(id, "").await.status()
        } else {
            api.call(Method::GET, &format!("/jobs/{id}/{route}"), None).await.0
        };
        got.push((route, answer));
        wanted.push((route, role.wanted(capability, Some(is_there))));
    }
    // A cleanup needs a job that has ended.
    for (route, capability) in DOES {
        got.push((route, api.call(Method::POST, &format!("/jobs/{id}/{route}"), None).await.0));
        wanted.push((route, role.wanted(capability, Some(is_there))));
    }
    [got, wanted]
}

#[tokio::test]
async fn each_route_asks_for_its_capability_and_tells_nobody_else_whether_a_job_is_there() {
    let (nomad, service, _token) = guarded().await;
    run_something(&nomad).await;
    let all = Api::with_token(&service.url, nomad.management());
    let unknown = format!("nb-{}", Uuid::new_v4());
    // Whoever the job is for: an owner is no right. Nor does it matter in which header a token is sent.
    let each = [("acme", None), ("umbrella", None), ("acme", Some("Bearer")), ("umbrella", Some("bearer"))];
    let roles = roles(&nomad).await;
    for (role, (owner, scheme)) in roles.iter().flat_map(|role| each.map(|of| (role, of))) {
        let (api, who) = (role.api(&service.url, scheme), format!("{} by {scheme:?}", role.name));
        let mut job = waiting();
        job["owner"] = json!(owner);
        let id = all.submit(&job).await;
        nomad.owns(&id);
        // What is hidden looks like what is not there.
        absent::look_alike(&api, &id, &unknown, &who, |capability| !role.may(capability)).await;
        for (id, is_there) in [(&id, true), (&unknown, false)] {
            let [got, wanted] = try_job(role, &api, id, is_there).await;
            assert_eq!(got, wanted, "{who}, a job that is there: {is_there}");
        }
        for route in ["/jobs?dry_run=true", "/jobs"] {
            let (status, body) = api.call(Method::POST, route, Some(&waiting())).await;
            if let Some(id) = body["data"]["job_id"].as_str() {
                nomad.owns(id);
            }
            assert_eq!(status, role.wanted("dispatch-job", None), "{who}, {route}: {body}");
        }
        // What is listed is seen; what everybody may, everybody may.
        let (status, body) = api.call(Method::GET, "/jobs", None).await;
        assert_eq!(status, role.wanted("read-job", None), "{who}, /jobs: {body}");
        for (method, route) in OPEN {
            let (status, body) = api.call(method.parse().unwrap(), route, Some(&json!({}))).await;
            let is_let_in = !matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN);
            assert!(is_let_in, "{who}, {method} {route}: {body}");
        }
    }
}

#[tokio::test]
async fn what_is_sent_by_who_may_not_submit_is_not_waited_for() {
    let (nomad, service, _token) = guarded().await;
    let reader = nomad.caller("namespace \"builds\" { capabilities = [\"read-job\"] }").await;
    for (token, wanted) in [
        (String::new(), "HTTP/1.1 401"),
        (format!("X-Nomad-Token: {}\r\n", Uuid::new_v4()), "HTTP/1.1 403"),
        (format!("X-Nomad-Token: {}\r\n", reader.secret), "HTTP/1.1 403"),
    ] {
        let address = service.url.strip_prefix("http://").unwrap();
        let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
        let head = format!(
            "POST /jobs HTTP/1.1\r\nHost: localhost\r\n{token}Content-Type: application/json\r\n\
             Content-Length: 400000\r\n\r\n{{"
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut begin = [0; 12];
        stream.read_exact(&mut begin).await.unwrap();
        assert_eq!(std::str::from_utf8(&begin).unwrap(), wanted);
    }
}

#[tokio::test]
async fn where_no_allocation_is_left_a_log_is_read_by_those_whose_policies_say_so() {
    let (nomad, service, _token) = guarded().await;
    let all = Api::with_token(&service.url, nomad.management());
    let id = all.submit(&waiting()).await;
    nomad.owns(&id);
    let logs = format!("/jobs/{id}/logs");
    all.logs(&id).await;
    let builder = Api::with_token(&service.url, &nomad.builder().await.secret);
    builder.logs(&id).await;
    for (rules, wanted) in [
        ("namespace \"builds\" { capabilities = [\"read-logs\"] }", StatusCode::OK),
        ("namespace \"builds\" { capabilities = [\"read-fs\"] }", StatusCode::OK),
        ("namespace \"b*\" { policy = \"write\" }", StatusCode::OK),
        ("namespace \"builds\" { policy = \"read\" }", StatusCode::FORBIDDEN),
        (
            "namespace \"b*\" { policy = \"write\" }\nnamespace \"builds\" { policy = \"deny\" }",
            StatusCode::NOT_FOUND,
        ),
        ("namespace \"default\" { policy = \"write\" }", StatusCode::NOT_FOUND),
    ] {
        let token = nomad.caller(rules).await;
        let answer = Api::with_token(&service.url, &token.secret).call(Method::GET, &logs, None).await;
        assert_eq!(answer.0, wanted, "{rules} {}", answer.1);
        // The same rights by a role.
        let token = nomad.caller_by_role(rules).await;
        let answer = Api::with_token(&service.url, &token.secret).call(Method::GET, &logs, None).await;
        assert_eq!(answer.0, wanted, "by a role: {rules} {}", answer.1);
    }
}

#[tokio::test]
async fn a_token_that_is_revoked_is_shut_out_within_seconds_of_what_it_reads_too() {
    let (nomad, service, _token) = guarded().await;
    run_something(&nomad).await;
    let caller = nomad.builder().await;
    let api = Api::with_token(&service.url, &caller.secret);
    let id = api.submit(&waiting()).await;
    nomad.owns(&id);
    let stream = api.stream(&id, "").await;
    assert_eq!(stream.status(), StatusCode::OK);
    assert_eq!(api.status(&id).await["status"], "PENDING");
    nomad.revoke(&caller).await;
    eventually("a status that is not there any more", async || {
        let (status, _) = api.call(Method::GET, &format!("/jobs/{id}/status"), None).await;
        (status == StatusCode::NOT_FOUND).then_some(())
    })
    .await;
    // The job waits on, so nothing else would end it.
    let read = tokio::time::timeout(Duration::from_secs(30), stream.text()).await;
    let read = read.expect("the stream ends").unwrap();
    assert!(!read.contains("event: end"), "{read}");
}

#[tokio::test]
async fn without_acls_only_this_machine_is_served_unless_the_operator_says_so() {
    let world = world();
    for (variables, wanted) in [
        (&[("NOMAD_BUILD_LISTEN", "0.0.0.0:0")][..], StatusCode::FORBIDDEN),
        (&[("NOMAD_BUILD_LISTEN", "0.0.0.0:0"), ("NOMAD_BUILD_OPEN", "true")], StatusCode::OK),
        (&[], StatusCode::OK),
    ] {
        let service = Service::start(&world.nomad, &world.registry, variables);
        let api = Api::new(&service.url);
        let (status, body) = api.call(Method::POST, "/jobs?dry_run=true", Some(&waiting())).await;
        assert_eq!(status, wanted, "{variables:?} {body}");
        if status == StatusCode::FORBIDDEN {
            assert_eq!(body["error"]["code"], "forbidden");
            let message = body["error"]["message"].as_str().unwrap();
            assert!(message.contains("NOMAD_BUILD_OPEN=true"), "{message}");
        }
    }
}

/// Has Nomad take the JWTs of an issuer, whose jobs of one repository are among those that submit.
async fn trust(nomad: &Guarded, issuer: &Issuer, repository: &str) {
    let config = json!({
        "JWTValidationPubKeys": [issuer.pem()], "BoundAudiences": ["nomad-build"], "SigningAlgs": ["ES256"],
        "ClaimMappings": { "repository": "repository" },
    });
    let method = json!({ "Name": "ci", "Type": "JWT", "TokenLocality": "local", "MaxTokenTTL": "10m", "Config": config });
    nomad.call(Method::POST, "acl/auth-method", &method).await;
    let policy = nomad.builders().await;
    let selector = format!("value.repository == \"{repository}\"");
    let rule = json!({ "AuthMethod": "ci", "BindType": "policy", "BindName": policy, "Selector": selector });
    nomad.call(Method::POST, "acl/binding-rule", &rule).await;
}

#[tokio::test]
async fn a_jwt_of_a_ci_system_is_traded_for_what_nomad_binds_it_to_and_for_nothing_else() {
    let (nomad, service, _token) = guarded().await;
    let (issuer, stranger) = (Issuer::new(), Issuer::new());
    trust(&nomad, &issuer, "acme/api").await;
    let good = issuer.token("acme/api", 600);
    let id = Api::with_token(&service.url, &good).submit_keyed("one", &waiting()).await;
    nomad.owns(&id);
    // Another one of the same subject: it sees the job, and its key is the same key.
    let next = Api::with_token(&service.url, &issuer.token("acme/api", 600));
    assert_eq!(next.status(&id).await["status"], "PENDING");
    assert_eq!(next.submit_keyed("one", &waiting()).await, id);
    let forged = good.rsplit_once('.').unwrap().0.to_owned()
        + "."
        + good.rsplit('.').next().unwrap().rsplit_once('A').map_or("AAAA", |(rest, _)| rest);
    for (what, jwt) in [
        ("another repository's", issuer.token("other/api", 600)),
        ("one that has expired", issuer.token("acme/api", -3600)),
        ("another issuer's", stranger.token("acme/api", 600)),
        ("a forged one", forged),
        ("another audience's", issuer.token_for(&json!("other"), "acme/api")),
        ("one of several other audiences", issuer.token_for(&json!(["other", "nomad-build-2"]), "acme/api")),
        ("nobody's audience", issuer.token_for(&Value::Null, "acme/api")),
        ("one without a signature", issuer.unsigned("acme/api", "none", false)),
        ("one that says that it has none, and has one", issuer.unsigned("acme/api", "none", true)),
        ("one that says so in capitals", issuer.unsigned("acme/api", "NONE", false)),
        ("one without the signature that it says it has", issuer.unsigned("acme/api", "ES256", false)),
        ("one that is signed with the public key", issuer.signed_with_the_public_key("acme/api")),
    ] {
        let api = Api::with_token(&service.url, &jwt);
        let (status, body) = api.call(Method::POST, "/jobs?dry_run=true", Some(&waiting())).await;
        assert_eq!(status, StatusCode::UNAUTHORIZED, "{what}: {body}");
        assert_eq!(body["error"]["code"], "unauthorized", "{what}: {body}");
        assert!(!body.to_string().contains(&jwt), "{what}: {body}");
        let (status, _) = api.call(Method::GET, &format!("/jobs/{id}/status"), None).await;
        assert_eq!(status, StatusCode::UNAUTHORIZED, "{what}");
    }
}
