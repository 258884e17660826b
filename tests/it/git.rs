//! The git room, over the real git.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::http::header::{AUTHORIZATION, LOCATION, WWW_AUTHENTICATE};
use axum::http::{HeaderMap, StatusCode, Uri};
use axum::response::IntoResponse as _;
use nomad_build::git::{CheckedOut, Credentials, GitError, Output, Source, check_out};
use tempfile::TempDir;

use crate::sources::http;
use crate::stack::environment;
use crate::support::{Repository, eventually, processes_with, serve};

/// Hears git, and does nothing of it.
struct Deaf;

impl Output for Deaf {
    async fn bytes(&self, _: Vec<u8>) {}
}

/// Checks `main` out below a folder whose name a shell would take apart.
pub(crate) async fn check_out_main(
    url: &str,
    credentials: Option<&Credentials>,
) -> (TempDir, Result<CheckedOut, GitError>) {
    let folder = tempfile::Builder::new().prefix("a b'$(id)\"").tempdir().unwrap();
    let environment = [("PATH".to_owned(), environment("PATH").unwrap())];
    let source = Source {
        url,
        reference: Some("main"),
        transports: &["file", "http", "ssh"],
        credentials,
        environment: &environment,
    };
    let (checkout, home) = (folder.path().join("checkout"), folder.path().join("home"));
    let checked_out = check_out(&source, &checkout, &home, &Deaf).await;
    assert!(!home.exists(), "git's home is left behind");
    (folder, checked_out)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_branch_that_moves_after_it_was_listed_is_checked_out_as_it_was_fetched() {
    let repository = Arc::new(Repository::new().file("version", "1").commit());
    let first = repository.git(&["rev-parse", "main"]);
    let (moved, listings) = (Arc::clone(&repository), AtomicUsize::new(0));
    let url = http::serve_watched(&repository, None, move |uri| {
        // The first listing is that of `ls-remote`, the second belongs to `fetch`.
        if uri.path().ends_with("/info/refs") && listings.fetch_add(1, Ordering::SeqCst) == 1 {
            moved.git(&["commit", "--quiet", "--allow-empty", "--message=moved"]);
        }
    })
    .await;
    let (_folder, checked_out) = check_out_main(&url, None).await;
    let second = repository.git(&["rev-parse", "main"]);
    assert_ne!(first, second);
    let reference = Some("refs/heads/main".to_owned());
    assert_eq!(checked_out.unwrap(), CheckedOut { reference, commit: second });
}

#[tokio::test]
async fn a_submodule_with_an_address_relative_to_the_repository_is_checked_out() {
    let inner = Repository::new().file("inside", "inner").commit();
    let name = inner.path().file_name().unwrap().to_str().unwrap();
    let outer = Repository::new();
    outer.git(&["remote", "add", "origin", &outer.url()]);
    let relative = format!("../{name}");
    outer.git(&["-c", "protocol.file.allow=always", "submodule", "--quiet", "add", &relative, "sub"]);
    let outer = outer.commit();
    let (folder, checked_out) = check_out_main(&outer.url(), None).await;
    checked_out.unwrap();
    let inside = std::fs::read_to_string(folder.path().join("checkout/sub/inside")).unwrap();
    assert_eq!(inside, "inner");
}

#[tokio::test]
async fn a_link_in_place_of_the_list_of_submodules_is_not_followed() {
    let repository = Repository::new().file("target", "[submodule]").commit();
    let blob = repository.git(&["rev-parse", "main:target"]);
    let list = repository.path().join("tree");
    std::fs::write(&list, format!("120000 blob {blob}\t.gitmodules\n")).unwrap();
    // What `git add` refuses, a tree can hold all the same.
    let tree = std::process::Command::new("git")
        .args(["mktree"])
        .current_dir(repository.path())
        .stdin(std::fs::File::open(&list).unwrap())
        .output();
    let tree = String::from_utf8(tree.unwrap().stdout).unwrap();
    let commit = repository.git(&["commit-tree", "-m", "x", tree.trim()]);
    repository.git(&["update-ref", "refs/heads/main", &commit]);
    let (_folder, checked_out) = check_out_main(&repository.url(), None).await;
    assert!(checked_out.unwrap_err().to_string().contains("invalid path '.gitmodules'"));
}

#[tokio::test]
async fn a_submodule_whose_transport_runs_programs_runs_none() {
    let marks = tempfile::tempdir().unwrap();
    let mark = marks.path().join("ran");
    for url in [
        format!("ext::sh -c \"touch% {}\"", mark.display()),
        format!("ssh://-oProxyCommand=touch\u{20}{}/x", mark.display()),
        format!("--upload-pack=touch {}", mark.display()),
    ] {
        let list = format!("[submodule \"x\"]\n\tpath = x\n\turl = {url}\n");
        let repository = Repository::new().file(".gitmodules", &list).commit();
        let head = repository.git(&["rev-parse", "HEAD"]);
        repository.git(&["update-index", "--add", "--cacheinfo", &format!("160000,{head},x")]);
        repository.git(&["commit", "--quiet", "--message=x"]);
        let (_folder, checked_out) = check_out_main(&repository.url(), None).await;
        assert!(matches!(checked_out, Err(GitError::Failed { .. })), "{url}: {checked_out:?}");
        assert!(!mark.exists(), "{url}");
    }
}

#[tokio::test]
async fn credentials_go_to_the_host_they_are_for_and_not_where_that_sends_to() {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let shown = Arc::clone(&seen);
    let asks = || (StatusCode::UNAUTHORIZED, [(WWW_AUTHENTICATE, "Basic realm=\"git\"")]).into_response();
    let other = Router::new().fallback(async move |headers: HeaderMap| {
        shown.lock().unwrap().push(headers.get(AUTHORIZATION).cloned());
        asks()
    });
    // Of another name, as a port alone is no other host to every client.
    let other = format!("http://localhost:{}", serve(other).await.port());
    let first = Router::new().fallback(async move |uri: Uri, headers: HeaderMap| {
        if headers.contains_key(AUTHORIZATION) {
            (StatusCode::FOUND, [(LOCATION, format!("{other}{uri}"))]).into_response()
        } else {
            asks()
        }
    });
    let url = format!("http://{}/repository.git", serve(first).await);
    let login = Credentials::Login { username: "me".to_owned(), password: "secret".into() };
    let refused = check_out_main(&url, Some(&login)).await.1;
    assert!(refused.is_err(), "{refused:?}");
    let seen = seen.lock().unwrap();
    assert!(!seen.is_empty() && seen.iter().all(Option::is_none), "{seen:?}");
}

#[tokio::test]
async fn credentials_are_found_wherever_they_are_kept() {
    let repository = Repository::new().commit();
    let url = http::serve(&repository, Some(("me@here", "pa:$ '\"word"))).await;
    let login =
        |password: &str| Credentials::Login { username: "me@here".to_owned(), password: password.into() };
    check_out_main(&url, Some(&login("pa:$ '\"word"))).await.1.unwrap();
    let refused = check_out_main(&url, Some(&login("other"))).await.1.unwrap_err();
    assert!(matches!(refused, GitError::Unauthorized(_)), "{refused}");
}

#[tokio::test]
async fn a_checkout_that_is_given_up_leaves_no_program_of_git_behind() {
    // It takes connections, and never answers.
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let url = format!("http://{address}/a.git");
    let programs = || processes_with(&address).len();
    let checkout = check_out_main(&url, None);
    let connected = eventually("git is connected by its helper", async || {
        let connected = tokio::time::timeout(std::time::Duration::from_millis(10), listener.accept()).await;
        connected.ok().filter(|_| programs() >= 2)
    });
    let connection = tokio::select! {
        _ = checkout => panic!("the checkout ended"),
        connection = connected => connection.unwrap(),
    };
    eventually("every program of git has ended", async || (programs() == 0).then_some(())).await;
    drop(connection);
}
