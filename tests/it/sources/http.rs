//! A git server over HTTP: git's own CGI program behind a small server.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::State;
use axum::http::header::{AUTHORIZATION, CONTENT_TYPE, WWW_AUTHENTICATE};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use tokio::io::AsyncWriteExt;

use crate::support::Repository;

/// Sees a request before it is answered, and may have it refused.
type Watch = Box<dyn Fn(&Uri) -> Option<StatusCode> + Send + Sync>;

struct Server {
    root: PathBuf,
    /// The header that a caller must send; none lets everybody in.
    authorization: Option<String>,
    watch: Watch,
}

/// Serves a repository as long as the test runs; returns its address.
pub(crate) async fn serve(repository: &Repository, login: Option<(&str, &str)>) -> String {
    serve_watched(repository, login, |_| None).await
}

/// The same, showing each request before it is answered, or refused where that is said.
pub(crate) async fn serve_watched(
    repository: &Repository,
    login: Option<(&str, &str)>,
    watch: impl Fn(&Uri) -> Option<StatusCode> + Send + Sync + 'static,
) -> String {
    let authorization = login
        .map(|(user, password)| format!("Basic {}", BASE64_STANDARD.encode(format!("{user}:{password}"))));
    let root = repository.path().parent().unwrap().to_owned();
    let server = Arc::new(Server { root, authorization, watch: Box::new(watch) });
    let router = axum::Router::new().fallback(answer).with_state(server);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, router).await });
    format!("http://{address}/{}", repository.path().file_name().unwrap().to_str().unwrap())
}

async fn answer(
    State(server): State<Arc<Server>>,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    if let Some(refused) = (server.watch)(&uri) {
        return refused.into_response();
    }
    let given = headers.get(AUTHORIZATION).map(|value| value.to_str().unwrap().to_owned());
    if server.authorization.is_some() && server.authorization != given {
        return (StatusCode::UNAUTHORIZED, [(WWW_AUTHENTICATE, "Basic realm=\"git\"")]).into_response();
    }
    let header = |name: &str| headers.get(name).map_or("", |value| value.to_str().unwrap());
    let variables = HashMap::from([
        ("GIT_HTTP_EXPORT_ALL", "1"),
        ("PATH_INFO", uri.path()),
        ("QUERY_STRING", uri.query().unwrap_or_default()),
        ("REQUEST_METHOD", method.as_str()),
        ("CONTENT_TYPE", header("content-type")),
        ("HTTP_CONTENT_ENCODING", header("content-encoding")),
        ("GIT_PROTOCOL", header("git-protocol")),
    ]);
    respond(&run(&server.root, variables, &body).await)
}

async fn run(root: &Path, variables: HashMap<&str, &str>, body: &[u8]) -> Vec<u8> {
    let mut program = tokio::process::Command::new("git")
        .arg("http-backend")
        .env("GIT_PROJECT_ROOT", root)
        .env("CONTENT_LENGTH", body.len().to_string())
        .envs(variables)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = program.stdin.take().unwrap();
    let (written, output) = tokio::join!(
        async move {
            stdin.write_all(body).await.unwrap();
        },
        program.wait_with_output()
    );
    let () = written;
    output.unwrap().stdout
}

/// A CGI program's output as an answer.
fn respond(output: &[u8]) -> Response {
    let split = output.windows(4).position(|window| window == b"\r\n\r\n").unwrap();
    let mut response = output[split + 4..].to_vec().into_response();
    response.headers_mut().remove(CONTENT_TYPE);
    for line in std::str::from_utf8(&output[..split]).unwrap().lines() {
        let (name, value) = line.split_once(": ").unwrap();
        if name == "Status" {
            *response.status_mut() = value.split(' ').next().unwrap().parse().unwrap();
        } else {
            response
                .headers_mut()
                .insert(name.parse::<HeaderName>().unwrap(), HeaderValue::from_str(value).unwrap());
        }
    }
    response
}
