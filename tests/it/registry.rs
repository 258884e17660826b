//! The registry client and the relay, over a real registry and a real Docker Engine.

mod auth;
mod faults;
pub(crate) mod server;

use std::sync::Arc;
use std::time::Duration;

use nomad_build::registry::{
    CapturedManifest, Client, Credentials, Digest, Endpoint, Error, Limits, PlainHttp, Reference, Relay,
    RelayError, Repository,
};

use reqwest::StatusCode;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use server::{Image, Server, docker, random_file};

use crate::support::{At, Fault, Faults, Front, is_alone};

const USER: (&str, &str) = ("ci", "relay-test");

fn client_with(host: &str, credentials: Option<Credentials>) -> Arc<Client> {
    let endpoint = Endpoint::new(host, &PlainHttp::default()).unwrap();
    let limits =
        Limits { attempt: Duration::from_secs(5), deadline: Duration::from_secs(2), ..Limits::default() };
    Arc::new(Client::with_limits(endpoint, credentials, limits).unwrap())
}

fn client(server: &Server) -> Arc<Client> {
    client_with(server.host(), None)
}

fn password(password: &str) -> Credentials {
    Credentials { username: USER.0.to_owned(), password: password.into() }
}

fn repository() -> Repository {
    "team/app".parse().unwrap()
}

fn tag(name: &str) -> Reference {
    name.parse().unwrap()
}

/// Pushes `image` through a relay, whatever comes of it.
async fn relayed(client: &Arc<Client>, image: &Image) -> Result<CapturedManifest, RelayError> {
    let relay = Relay::start(Arc::clone(client), repository()).await.unwrap();
    image.push(&relay.reference()).await.ok();
    relay.finish()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_pushed_through_a_relay_is_under_no_tag_until_it_is_put_there() {
    let (server, image) = (Server::start(None).await, Image::load(3).await);
    let client = client(&server);
    let captured = relayed(&client, &image).await.unwrap();
    assert!(captured.is_image(image.id()), "{captured:?} is not {}", image.id());
    assert_eq!(server.tags(&repository()).await, None);
    let digest = captured.manifest().digest();
    assert_eq!(client.head_manifest(&repository(), &digest.into()).await.unwrap(), None);

    captured.put_by_digest(&client, &repository()).await.unwrap();
    assert_eq!(server.tags(&repository()).await, None, "a digest is not a tag");
    for name in ["1.0", "latest"] {
        client.put_manifest(&repository(), &tag(name), captured.manifest()).await.unwrap();
        let found = client.head_manifest(&repository(), &tag(name)).await.unwrap().unwrap();
        assert_eq!(found, captured.manifest().descriptor());
        let read = client.get_manifest(&repository(), &tag(name)).await.unwrap().unwrap();
        assert_eq!(&read, captured.manifest());
    }
    assert_eq!(server.tags(&repository()).await.unwrap(), ["1.0", "latest"]);

    let reference = format!("{}/{}@{digest}", server.host(), repository());
    image.forget().await;
    docker(&["pull", &reference]).await.unwrap();
    assert_eq!(
        docker(&["image", "inspect", "-f", "{{.Id}}", &reference]).await.unwrap(),
        image.id().to_string()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_another_repository_of_the_registry_has_is_taken_over_and_not_sent() {
    for user in [None, Some(USER)] {
        let server = Server::start(user).await;
        let client = client_with(server.host(), user.map(|(_, secret)| password(secret)));
        // Of small layers an engine does not ask whether they are anywhere.
        let layers = 2;
        let files = (0..layers).map(|_| std::fs::read(random_file(1).path()).unwrap());
        let (image, base) = (Image::of_layers(files).await, "base/image".parse::<Repository>().unwrap());
        let relay = Relay::start(Arc::clone(&client), base.clone()).await.unwrap();
        image.push(&relay.reference()).await.unwrap();
        let first = relay.finish().unwrap();
        first.put_by_digest(&client, &base).await.unwrap();
        let sent = server.count("PATCH").await;
        let nowhere = ["nothing/here", "nothing/there", "nothing/anywhere"];
        let cases =
            [(&nowhere[..1], false), (&nowhere[..], false), (&nowhere[..1], true), (&nowhere[..], true)];
        for (number, (others, is_there)) in cases.into_iter().enumerate() {
            let to: Repository = format!("to/{number}").parse().unwrap();
            let mut others: Vec<Repository> = others.iter().map(|name| name.parse().unwrap()).collect();
            others.extend(is_there.then(|| base.clone()));
            let vain = layers * (others.len() - usize::from(is_there));
            // Its configuration is its own, and looked for nowhere else.
            let (sent, kept) = if is_there { (sent - layers, 1) } else { (sent, layers) };
            let relay = Relay::of_image(image.id(), others, Arc::clone(&client), to.clone()).await.unwrap();
            let counts =
                async || [server.count("PATCH").await, server.begun().await, server.count("DELETE").await];
            let before = counts().await;
            image.push(&relay.reference()).await.unwrap();
            let captured = relay.finish().unwrap();
            assert_eq!(captured.manifest(), first.manifest());
            captured.put_by_digest(&client, &to).await.unwrap();
            let after = counts().await;
            let [pieces, begun, ended] = [0, 1, 2].map(|count| after[count] - before[count]);
            assert_eq!(pieces, sent, "{to}");
            // What is sent goes on with what was begun in vain, of which no more is kept than is sent.
            assert_eq!((begun, ended), (vain + sent - kept, vain - kept), "{to}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_lets_no_upload_be_ended_is_asked_all_the_same() {
    let (server, file) = (Server::start(None).await, random_file(1));
    let (image, base) = (Image::import(file.path()).await, "base/image".parse::<Repository>().unwrap());
    let relay = Relay::start(client(&server), base.clone()).await.unwrap();
    image.push(&relay.reference()).await.unwrap();
    relay.finish().unwrap().put_by_digest(&client(&server), &base).await.unwrap();
    let front = Front::refusing(server.host(), At::Ending, StatusCode::METHOD_NOT_ALLOWED).await;
    let client = client_with(&front, None);
    let others = ["nothing/here", "nothing/there"].map(|name| name.parse().unwrap());
    let others = others.into_iter().chain([base]).collect();
    let relay = Relay::of_image(image.id(), others, Arc::clone(&client), repository()).await.unwrap();
    image.push(&relay.reference()).await.unwrap();
    relay.finish().unwrap();
    assert_eq!(server.mounts().await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_taken_over_is_sent() {
    let (server, file) = (Server::start(None).await, random_file(1));
    let (image, base) = (Image::import(file.path()).await, "base/image".parse::<Repository>().unwrap());
    let relay = Relay::start(client(&server), base.clone()).await.unwrap();
    image.push(&relay.reference()).await.unwrap();
    let first = relay.finish().unwrap();
    let front = Faults::before(&format!("http://{}", server.host())).await;
    front.harm(|line| line.contains("?mount=").then_some(Fault::CutBefore));
    let client = client_with(front.url.strip_prefix("http://").unwrap(), None);
    let relay = Relay::of_image(image.id(), vec![base], Arc::clone(&client), repository()).await.unwrap();
    image.push(&relay.reference()).await.unwrap();
    let captured = relay.finish().unwrap();
    assert_eq!(captured.manifest(), first.manifest());
    captured.put_by_digest(&client, &repository()).await.unwrap();
    assert_eq!(server.mounts().await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_with_a_password_is_pushed_to_by_an_engine_that_has_none() {
    let (server, image) = (Server::start(Some(USER)).await, Image::load(2).await);
    let client = client_with(server.host(), Some(password(USER.1)));
    let captured = relayed(&client, &image).await.unwrap();
    captured.put_by_digest(&client, &repository()).await.unwrap();
    client.put_manifest(&repository(), &tag("1"), captured.manifest()).await.unwrap();
    let found = client.head_manifest(&repository(), &tag("1")).await.unwrap().unwrap();
    assert_eq!(found.digest, captured.manifest().digest());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_password_is_told_as_such() {
    let (server, image) = (Server::start(Some(USER)).await, Image::load(1).await);
    for credentials in [Some(password("wrong-secret")), None] {
        let client = client_with(server.host(), credentials);
        let error = relayed(&client, &image).await.unwrap_err();
        let RelayError::Upstream(cause) = &error else { panic!("{error:?}") };
        assert!(matches!(cause, Error::Unauthorized { .. }), "{cause:?}");
        assert!(cause.to_string().contains("team/app"), "{cause}");
        assert!(!format!("{error:?} {cause}").contains("wrong-secret"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_dies_in_the_middle_of_a_push_is_unreachable() {
    let (server, file) = (Server::start(None).await, random_file(60));
    let image = Image::import(file.path()).await;
    let relay = Relay::start(client(&server), repository()).await.unwrap();
    let reference = relay.reference();
    let dies = async {
        server.first_upload().await;
        server.kill();
    };
    let (pushed, ()) = tokio::join!(image.push(&reference), dies);
    assert!(pushed.is_err());
    let error = relay.finish().unwrap_err();
    assert!(matches!(error, RelayError::Upstream(Error::Unreachable { .. })), "{error:?}");
}

#[tokio::test]
async fn an_upload_that_the_engine_breaks_off_is_not_the_registrys_failure() {
    let server = Server::start(None).await;
    let relay = Relay::start(client(&server), repository()).await.unwrap();
    let reference = relay.reference();
    let (host, rest) = reference.split_once('/').unwrap();
    let (path, _) = rest.split_once(':').unwrap();
    let http = reqwest::Client::builder().no_proxy().tls_certs_only([]).build().unwrap();
    let begun = http.post(format!("http://{host}/v2/{path}/blobs/uploads/")).send().await.unwrap();
    let upload = begun.headers()["location"].to_str().unwrap().to_owned();
    // One piece, and then what begins none.
    let head = format!("PATCH {upload} HTTP/1.1\r\nHost: {host}\r\nTransfer-Encoding: chunked\r\n\r\n");
    let mut engine = TcpStream::connect(host).await.unwrap();
    engine.write_all(format!("{head}5\r\nbytes\r\nno piece\r\n").as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    engine.read_to_end(&mut answer).await.ok();
    let error = relay.finish().unwrap_err();
    assert!(matches!(error, RelayError::NothingPushed), "{error:?} {}", String::from_utf8_lossy(&answer));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_push_done_again_uploads_nothing_again() {
    let (server, image) = (Server::start(None).await, Image::load(3).await);
    let relay = Relay::start(client(&server), repository()).await.unwrap();
    image.push(&relay.reference()).await.unwrap();
    let uploads = server.count("POST").await;
    assert_eq!(uploads, 4, "three layers and a configuration");
    image.push(&relay.reference()).await.unwrap();
    assert_eq!(server.count("POST").await, uploads);
    assert!(relay.finish().unwrap().is_image(image.id()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_layer_streams_through_little_memory_and_is_known_to_the_next_relay() {
    if !is_alone("registry::a_large_layer_streams_through_little_memory_and_is_known_to_the_next_relay").await
    {
        return;
    }
    let (server, file) = (Server::start(None).await, random_file(60));
    let (client, image) = (client(&server), Image::import(file.path()).await);
    let before = server::resident_mib();
    let peak = server::PeakMemory::watch();
    let first = relayed(&client, &image).await.unwrap();
    let grown = peak.stop().saturating_sub(before);
    assert!(grown < 40, "{grown} MiB more while 60 MiB went through");
    let patches = server.count("PATCH").await;
    let second = relayed(&client, &image).await.unwrap();
    assert_eq!(first.manifest(), second.manifest());
    assert!(server.count("PATCH").await <= patches + 1, "only the configuration may be sent again");
}

#[tokio::test(flavor = "multi_thread")]
async fn only_who_knows_the_path_can_push() {
    let server = Server::start(None).await;
    let relay = Relay::start(client(&server), repository()).await.unwrap();
    let reference = relay.reference();
    let (host, rest) = reference.split_once('/').unwrap();
    let own = rest.split_once(':').unwrap().0;
    let http = reqwest::Client::builder().no_proxy().build().unwrap();
    let post = async |path: String| {
        http.post(format!("http://{host}{path}")).send().await.map(|answer| answer.status().as_u16()).ok()
    };
    for foreign in ["team/app", "image", "x/image", &own.replace("/image", "/other"), &format!("{own}/x")] {
        assert_eq!(post(format!("/v2/{foreign}/blobs/uploads/")).await, Some(404), "{foreign}");
    }
    assert_eq!(server.count("POST").await, 0);
    assert_eq!(post(format!("/v2/{own}/blobs/uploads/")).await, Some(202));
    let path = format!("/v2/{own}/blobs/uploads/");
    drop(relay);
    server::wait_for("the relay to end", async || {
        post(path.clone()).await.is_none_or(|status| status == 503)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_that_push_to_one_repository_at_once_each_publish_their_own_image() {
    let server = Server::start(None).await;
    let client = client(&server);
    for _ in 0..5 {
        let (one, two) = tokio::join!(Image::load(1), Image::load(1));
        let (first, second) = tokio::join!(relayed(&client, &one), relayed(&client, &two));
        assert!(first.unwrap().is_image(one.id()));
        assert!(second.unwrap().is_image(two.id()));
    }
}

/// As an engine with the containerd store does: the manifests by digest, then the index by tag.
#[tokio::test(flavor = "multi_thread")]
async fn an_index_is_captured_with_its_manifests() {
    let server = Server::start(None).await;
    let client = client(&server);
    let relay = Relay::start(Arc::clone(&client), repository()).await.unwrap();
    let own = relay.reference().trim_end_matches(":push").replacen('/', "/v2/", 1);
    let http = reqwest::Client::builder().no_proxy().build().unwrap();
    let put = async |kind: &str, name: &str, body: String| {
        let kind = format!("application/vnd.oci.image.{kind}.v1+json");
        let request =
            http.put(format!("http://{own}/manifests/{name}")).header("content-type", kind).body(body);
        request.send().await.unwrap().status().as_u16()
    };
    let described = |digest: Digest, kind: &str, size: usize| {
        serde_json::json!({
            "mediaType": format!("application/vnd.oci.image.{kind}.v1+json"), "digest": digest, "size": size,
            "platform": {"os": "linux", "architecture": kind},
        })
    };
    let mut children = Vec::new();
    for config in ["{}", "{ }"] {
        let digest = Digest::of(config.as_bytes());
        let post = http.post(format!("http://{own}/blobs/uploads/?digest={digest}")).body(config);
        assert_eq!(post.send().await.unwrap().status(), 201);
        let config = described(digest, "config", config.len());
        let image = serde_json::json!({"schemaVersion": 2, "config": config, "layers": []}).to_string();
        let digest = Digest::of(image.as_bytes());
        children.push(described(digest, "manifest", image.len()));
        assert_eq!(put("manifest", &Digest::of(b"not that").to_string(), image.clone()).await, 400);
        assert_eq!(put("manifest", &digest.to_string(), image).await, 201);
        let head = http.head(format!("http://{own}/manifests/{digest}")).send().await.unwrap();
        assert_eq!(head.headers()["docker-content-digest"], digest.to_string());
    }
    let index = serde_json::json!({"schemaVersion": 2, "manifests": children}).to_string();
    assert_eq!(put("index", "push", index.clone()).await, 201);

    let captured = relay.finish().unwrap();
    assert!(captured.manifest().is_index() && captured.is_image(Digest::of(index.as_bytes())));
    assert_eq!(captured.children().len(), 2);
    captured.put_by_digest(&client, &repository()).await.unwrap();
    assert_eq!(server.tags(&repository()).await, None);
    client.put_manifest(&repository(), &tag("1"), captured.manifest()).await.unwrap();
    assert_eq!(client.get_manifest(&repository(), &tag("1")).await.unwrap().unwrap().children().len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_manifest_that_is_too_large_is_not_held() {
    let server = Server::start(None).await;
    let relay = Relay::start(client(&server), repository()).await.unwrap();
    let url =
        format!("http://{}", relay.reference().replacen('/', "/v2/", 1).replace(":push", "/manifests/push"));
    let http = reqwest::Client::builder().no_proxy().build().unwrap();
    let put = http.put(url).header("content-type", "application/vnd.oci.image.manifest.v1+json");
    // A client may see the answer, or the connection's end before its body's.
    if let Ok(answer) = put.body(vec![b' '; 5 * 1024 * 1024]).send().await {
        assert_eq!(answer.status(), 413);
    }
    assert!(matches!(relay.finish(), Err(RelayError::NothingPushed)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blob_sent_in_one_request_is_taken() {
    let server = Server::start(None).await;
    let client = client(&server);
    let relay = Relay::start(Arc::clone(&client), repository()).await.unwrap();
    let own = relay.reference().trim_end_matches(":push").replacen('/', "/v2/", 1);
    let http = reqwest::Client::builder().no_proxy().build().unwrap();
    let digest = Digest::of(b"all at once");
    let post = http.post(format!("http://{own}/blobs/uploads/?digest={digest}")).body("all at once");
    assert_eq!(post.send().await.unwrap().status(), 201);
    assert!(client.blob_exists(&repository(), digest).await.unwrap());
    let other = Digest::of(b"other");
    let post = http.post(format!("http://{own}/blobs/uploads/?digest={other}")).body("not that");
    assert_eq!(post.send().await.unwrap().status(), 400);
    assert!(matches!(relay.finish(), Err(RelayError::Upstream(Error::Refused { status: 400, .. }))));
}
