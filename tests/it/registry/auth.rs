//! Tokens and credentials: against a registry that asks for tokens, which is small and keeps a book of what it saw.

use std::collections::HashSet;
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use nomad_build::registry::{Client, Digest, Error, Reference, Relay, RelayError};
use tokio::net::TcpListener;

use super::{client_with, password, repository, tag};

const MANIFEST: &str = concat!(
    r#"{"schemaVersion":2,"config":{"mediaType":"x","size":1,"#,
    r#""digest":"sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"},"layers":[]}"#
);
const OCI_IMAGE: &str = "application/vnd.oci.image.manifest.v1+json";

/// What the fake saw and gives out.
#[derive(Default)]
struct Book {
    own: String,
    /// Where blobs are really kept.
    storage: String,
    /// This is storage, and asks who is asking.
    asks: bool,
    token_lifetime: u64,
    tokens: HashSet<String>,
    token_requests: Vec<String>,
    /// Method, path and `Authorization` of every other request.
    requests: Vec<(String, String, Option<String>)>,
}

type Shared = Arc<Mutex<Book>>;

async fn fake(token_lifetime: u64, storage: &str) -> (String, Shared) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let own = listener.local_addr().unwrap().to_string();
    let book = Book { own: own.clone(), storage: storage.to_owned(), token_lifetime, ..Book::default() };
    let shared = Arc::new(Mutex::new(book));
    let router = Router::new().fallback(answer).with_state(Arc::clone(&shared));
    tokio::spawn(async move { axum::serve(listener, router).await });
    (own, shared)
}

async fn answer(State(shared): State<Shared>, request: Request) -> Response {
    let mut book = shared.lock().unwrap();
    let path = request.uri().path().to_owned();
    let seen = request.headers().get(header::AUTHORIZATION).map(|value| value.to_str().unwrap().to_owned());
    if path == "/token" {
        return book.give_token(request.uri().query().unwrap_or_default(), seen.as_deref());
    }
    book.requests.push((request.method().to_string(), path.clone(), seen.clone()));
    if path.starts_with("/storage/") && !book.asks {
        return StatusCode::OK.into_response();
    }
    if !seen
        .and_then(|seen| seen.strip_prefix("Bearer ").map(str::to_owned))
        .is_some_and(|t| book.tokens.contains(&t))
    {
        let challenge = format!(r#"Bearer realm="http://{}/token",service="fake""#, book.own);
        return (StatusCode::UNAUTHORIZED, [(header::WWW_AUTHENTICATE, challenge)]).into_response();
    }
    let elsewhere = [(header::LOCATION, format!("http://{}/storage/x?sig=1", book.storage))];
    match (request.method().as_str(), path.as_str()) {
        ("POST", _) => (StatusCode::ACCEPTED, elsewhere).into_response(),
        (_, path) if path.contains("/blobs/") => (StatusCode::TEMPORARY_REDIRECT, elsewhere).into_response(),
        (_, path) if path.ends_with("/manifests/liar") => manifest(Digest::of(b"other")).into_response(),
        (_, path) if path.contains("/manifests/") => {
            manifest(Digest::of(MANIFEST.as_bytes())).into_response()
        }
        _ => StatusCode::OK.into_response(),
    }
}

fn manifest(said: Digest) -> impl IntoResponse {
    let digest = said.to_string();
    let headers: HeaderMap = [("content-type", OCI_IMAGE), ("docker-content-digest", &digest)]
        .into_iter()
        .map(|(name, value)| (name.parse::<axum::http::HeaderName>().unwrap(), value.parse().unwrap()))
        .collect();
    (headers, MANIFEST)
}

impl Book {
    fn give_token(&mut self, query: &str, seen: Option<&str>) -> Response {
        self.token_requests.push(query.to_owned());
        if seen != Some("Basic Y2k6cmVsYXktdGVzdA==") {
            return StatusCode::UNAUTHORIZED.into_response();
        }
        let token = format!("token-{}", self.token_requests.len());
        self.tokens.insert(token.clone());
        axum::Json(serde_json::json!({ "token": token, "expires_in": self.token_lifetime })).into_response()
    }
}

fn with_password(host: &str) -> Arc<Client> {
    client_with(host, Some(password("relay-test")))
}

async fn read(client: &Client) -> Result<Digest, Error> {
    let found = client.head_manifest(&repository(), &tag("1")).await?;
    Ok(found.unwrap().digest)
}

#[tokio::test]
async fn a_token_is_fetched_once_for_each_scope() {
    let (host, book) = fake(300, "").await;
    let client = with_password(&host);
    for _ in 0..3 {
        assert_eq!(read(&client).await.unwrap(), Digest::of(MANIFEST.as_bytes()));
    }
    client.blob_exists(&repository(), Digest::of(b"x")).await.unwrap_err();
    let asked = book.lock().unwrap().token_requests.clone();
    assert_eq!(
        asked,
        [
            "service=fake&scope=repository%3Ateam%2Fapp%3Apull",
            "service=fake&scope=repository%3Ateam%2Fapp%3Apull%2Cpush"
        ]
    );
}

#[tokio::test]
async fn requests_started_together_share_a_token() {
    let (host, book) = fake(300, "").await;
    let client = with_password(&host);
    read(&client).await.unwrap();
    book.lock().unwrap().token_requests.clear();
    let push = |n: u8| {
        let client = Arc::clone(&client);
        async move { client.blob_exists(&repository(), Digest::of(&[n])).await.ok() }
    };
    tokio::join!(push(1), push(2), push(3), push(4));
    assert_eq!(book.lock().unwrap().token_requests.len(), 1);
}

#[tokio::test]
async fn a_token_that_ended_or_was_revoked_is_replaced() {
    let (host, book) = fake(1, "").await;
    let client = with_password(&host);
    read(&client).await.unwrap();
    read(&client).await.unwrap();
    assert_eq!(book.lock().unwrap().token_requests.len(), 2, "one second is too short to be used again");

    let (host, book) = fake(300, "").await;
    let client = with_password(&host);
    read(&client).await.unwrap();
    book.lock().unwrap().tokens.clear();
    read(&client).await.unwrap();
    assert_eq!(book.lock().unwrap().token_requests.len(), 2);
}

#[tokio::test]
async fn a_token_realm_that_refuses_the_password_is_unauthorized() {
    let (host, _book) = fake(300, "").await;
    for credentials in [Some(password("wrong")), None] {
        let error = read(&client_with(&host, credentials)).await.unwrap_err();
        assert!(matches!(error, Error::Unauthorized { .. }), "{error:?}");
    }
}

#[tokio::test]
async fn nobody_but_the_registry_sees_who_is_asking() {
    let (storage, elsewhere) = fake(300, "").await;
    let (host, book) = fake(300, &storage).await;
    let client = with_password(&host);
    assert!(client.blob_exists(&repository(), Digest::of(b"x")).await.unwrap(), "storage has it");

    let relay = Relay::start(Arc::clone(&client), repository()).await.unwrap();
    let own = relay.reference().trim_end_matches(":push").replacen('/', "/v2/", 1);
    let http = reqwest::Client::builder().no_proxy().build().unwrap();
    let begun = http.post(format!("http://{own}/blobs/uploads/")).send().await.unwrap();
    let location = begun.headers()[header::LOCATION].to_str().unwrap().to_owned();
    assert!(!location.contains("storage") && !location.contains("sig"), "{location}");
    let address = own.split('/').next().unwrap();
    let patched = http.patch(format!("http://{address}{location}")).body("part").send().await.unwrap();
    assert_eq!(patched.status(), 200);

    let seen = elsewhere.lock().unwrap().requests.clone();
    let methods: Vec<&str> = seen.iter().map(|(method, ..)| method.as_str()).collect();
    assert_eq!(methods, ["HEAD", "PATCH"]);
    assert!(seen.iter().all(|(.., authorization)| authorization.is_none()), "{seen:?}");
    let own_requests = book.lock().unwrap().requests.clone();
    assert!(own_requests.iter().any(|(.., authorization)| authorization.is_some()));
    assert!(matches!(relay.finish(), Err(RelayError::NothingPushed)));
}

#[tokio::test]
async fn storage_that_asks_for_credentials_gets_none() {
    let (storage, elsewhere) = fake(300, "").await;
    elsewhere.lock().unwrap().asks = true;
    let (host, _book) = fake(300, &storage).await;
    let client = with_password(&host);
    for _ in 0..2 {
        let error = client.blob_exists(&repository(), Digest::of(b"x")).await.unwrap_err();
        assert!(matches!(error, Error::Unauthorized { .. }), "{error:?}");
    }
    read(&client).await.unwrap();
    assert_eq!(elsewhere.lock().unwrap().token_requests, Vec::<String>::new());
}

#[tokio::test]
async fn a_manifest_that_is_not_what_was_asked_for_is_refused() {
    let (host, _book) = fake(300, "").await;
    let client = with_password(&host);
    let other = Reference::Digest(Digest::of(b"other"));
    let head = client.head_manifest(&repository(), &other).await.unwrap_err();
    assert!(matches!(head, Error::DigestMismatch { .. }), "{head:?}");
    let get = client.get_manifest(&repository(), &other).await.unwrap_err();
    assert!(matches!(get, Error::DigestMismatch { .. }), "{get:?}");
    let lie = client.get_manifest(&repository(), &tag("liar")).await.unwrap_err();
    assert!(matches!(lie, Error::DigestMismatch { .. }), "{lie:?}");
}
