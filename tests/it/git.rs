//! The git room, over the real git.

mod submodules;

use std::os::unix::fs::PermissionsExt as _;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::http::header::{AUTHORIZATION, LOCATION, WWW_AUTHENTICATE};
use axum::http::{HeaderMap, StatusCode, Uri};
use axum::response::IntoResponse as _;
use nomad_build::git::{CheckedOut, Credentials, GitError, Most, Output, Source, check_out};
use nomad_build::job::{GitRef, RepoUrl};
use tempfile::TempDir;

use crate::sources::http;
use crate::stack::environment;
use crate::support::{Random, Repository, Ssh, eventually, processes_with, scale, serve};

/// Keeps what git says.
#[derive(Default)]
struct Heard(Mutex<Vec<u8>>);

impl Output for Heard {
    async fn bytes(&self, mut bytes: Vec<u8>) {
        self.0.lock().unwrap().append(&mut bytes);
    }
}

const MOST: Most = Most { mebibytes: 1024, files: 100_000, memory: 128 };

/// Checks `main` out below a folder whose name a shell would take apart; what came of it, and what git said.
async fn check_out_within(
    url: &str,
    credentials: Option<&Credentials>,
    most: Most,
    path: String,
) -> (TempDir, Result<CheckedOut, GitError>, String) {
    let source = Source { credentials, most, ..main_of(url) };
    check_out_source(&Source { environment: &[("PATH".to_owned(), path)], ..source }).await
}

/// The branch `main` of a repository.
fn main_of(url: &str) -> Source<'_> {
    Source {
        url,
        reference: Some("main"),
        transports: &["file", "http", "ssh"],
        credentials: None,
        allows: &|_| Ok(()),
        keep_git: false,
        most: MOST,
        environment: &[],
    }
}

async fn check_out_source(source: &Source<'_>) -> (TempDir, Result<CheckedOut, GitError>, String) {
    let folder = tempfile::Builder::new().prefix("a b'$(id)\"").tempdir().unwrap();
    let (checkout, home) = (folder.path().join("checkout"), folder.path().join("home"));
    let heard = Heard::default();
    let checked_out = check_out(source, &checkout, &home, &heard).await;
    assert!(!home.exists(), "git's home is left behind");
    (folder, checked_out, String::from_utf8(heard.0.into_inner().unwrap()).unwrap())
}

/// The same, with the programs that are here.
pub(crate) async fn check_out_main(
    url: &str,
    credentials: Option<&Credentials>,
) -> (TempDir, Result<CheckedOut, GitError>) {
    let (folder, checked_out, _) =
        check_out_within(url, credentials, MOST, environment("PATH").unwrap()).await;
    (folder, checked_out)
}

/// A folder with a program, and a `PATH` that has it before all others.
fn program(name: &str, text: &str) -> (TempDir, String) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    let all = format!("{}:{}", folder.path().display(), environment("PATH").unwrap());
    (folder, all)
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
        None
    })
    .await;
    let (_folder, checked_out) = check_out_main(&url, None).await;
    let second = repository.git(&["rev-parse", "main"]);
    assert_ne!(first, second);
    let reference = Some("refs/heads/main".to_owned());
    assert_eq!(checked_out.unwrap(), CheckedOut { reference, commit: second });
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

#[tokio::test(flavor = "multi_thread")]
async fn no_redirect_leads_to_a_transport_that_is_not_allowed() {
    for (scheme, is_followed) in [("http", true), ("https", false), ("ftp", false), ("ssh", false)] {
        let connected = Arc::new(AtomicUsize::new(0));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let there = format!("{scheme}://{}", listener.local_addr().unwrap());
        let counter = Arc::clone(&connected);
        let accepting = tokio::spawn(async move {
            while listener.accept().await.is_ok() {
                counter.fetch_add(1, Ordering::SeqCst);
            }
        });
        let first = Router::new().fallback(async move |uri: Uri| {
            (StatusCode::FOUND, [(LOCATION, format!("{there}{uri}"))]).into_response()
        });
        let url = format!("http://{}/repository.git", serve(first).await);
        let environment = [("PATH".to_owned(), environment("PATH").unwrap())];
        let source = Source { transports: &["http"], environment: &environment, ..main_of(&url) };
        let (_folder, refused, _) = check_out_source(&source).await;
        assert!(matches!(refused, Err(GitError::Failed { .. })), "{scheme}: {refused:?}");
        assert_eq!(connected.load(Ordering::SeqCst) > 0, is_followed, "{scheme}: {refused:?}");
        accepting.abort();
    }
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

#[tokio::test]
async fn a_server_that_is_away_for_a_moment_is_asked_again_and_one_that_refuses_is_not() {
    let repository = Repository::new().file("a", "1").commit();
    let asked = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&asked);
    let url = http::serve_watched(&repository, None, move |uri| {
        let mut seen = seen.lock().unwrap();
        let is_first = !seen.contains(uri);
        seen.push(uri.clone());
        is_first.then_some(StatusCode::BAD_GATEWAY)
    })
    .await;
    let path = environment("PATH").unwrap();
    let (folder, checked_out, said) = check_out_within(&url, None, MOST, path.clone()).await;
    checked_out.unwrap();
    assert!(folder.path().join("checkout/a").exists());
    // Once for each address.
    assert_eq!(said.matches("; it is tried again in ").count(), 2, "{said}");

    asked.lock().unwrap().clear();
    let seen = Arc::clone(&asked);
    let url = http::serve_watched(&repository, None, move |uri| {
        seen.lock().unwrap().push(uri.clone());
        Some(StatusCode::FORBIDDEN)
    })
    .await;
    let (_folder, refused, said) = check_out_within(&url, None, MOST, path).await;
    assert!(matches!(refused, Err(GitError::Unauthorized(_))), "{refused:?}");
    assert!(!said.contains("tried again"), "{said}");
    assert_eq!(asked.lock().unwrap().len(), 1);
}

#[tokio::test]
async fn a_repository_whose_objects_are_named_by_sha256_is_checked_out() {
    let repository = Repository::of_format("sha256").file("a", "1").commit();
    for url in [repository.url(), http::serve(&repository, None).await] {
        let (folder, checked_out) = check_out_main(&url, None).await;
        assert_eq!(checked_out.unwrap().commit, repository.git(&["rev-parse", "main"]), "{url}");
        assert!(folder.path().join("checkout/a").exists());
    }
}

const LARGE: &str = "*.bin filter=lfs diff=lfs merge=lfs -text\n";

#[tokio::test]
async fn large_files_are_got_for_every_folder_and_submodule_from_the_server_of_each() {
    let inner = Repository::new().file("deep/.gitattributes", LARGE).commit();
    let plain = Repository::new().commit();
    let repository = Repository::new().file("assets/images/.gitattributes", LARGE);
    let repository = repository.submodule(&inner.url(), "a sub").submodule(&plain.url(), "plain").commit();
    let (programs, path) =
        program("git-lfs", "echo \"$PWD $(git config lfs.url) $*\" >> \"$(dirname \"$0\")/calls\"");
    let (folder, checked_out, said) = check_out_within(&repository.url(), None, MOST, path).await;
    checked_out.unwrap();
    let calls = std::fs::read_to_string(programs.path().join("calls")).unwrap();
    let checkout = folder.path().join("checkout").canonicalize().unwrap();
    let pulls: Vec<_> = calls.lines().filter(|line| line.ends_with(" pull")).collect();
    let pull = |of: &str, url: &str| format!("{}{of} {url} pull", checkout.display());
    assert_eq!(pulls, [pull("", &repository.url()), pull("/a sub", &inner.url())], "{said}");
}

#[tokio::test]
async fn large_files_that_stay_pointers_are_told() {
    let (_programs, path) = program("git-lfs", "exit 1");
    for (attributes, told) in [(LARGE, true), ("*.bin binary\n", false)] {
        let repository = Repository::new().file("assets/.gitattributes", attributes).commit();
        let (_folder, checked_out, said) =
            check_out_within(&repository.url(), None, MOST, path.clone()).await;
        checked_out.unwrap();
        assert_eq!(said.contains("its large files stay pointers"), told, "{said}");
    }
}

#[tokio::test]
async fn a_repository_that_takes_more_of_the_machine_than_it_may_is_refused_and_removed() {
    let path = environment("PATH").unwrap();
    let (bomb, endless) = (Repository::new().bomb(4), Repository::new().bomb(12));
    // What a working copy of it would be added by does not end.
    let list = format!("[submodule \"x\"]\n\tpath = x\n\turl = {}\n", endless.url());
    let hidden = Repository::new().file(".gitmodules", &list).commit();
    let commit = endless.git(&["rev-parse", "main"]);
    hidden.git(&["update-index", "--add", "--cacheinfo", &format!("160000,{commit},x")]);
    hidden.git(&["commit", "--quiet", "--message=x"]);
    let large = Repository::new().file("large", &"0123456789abcdef".repeat(1 << 18)).commit();
    let holder = Repository::new().submodule(&large.url(), "large").commit();
    for (repository, most, what) in [
        (&bomb, Most { files: 5_000, ..MOST }, "5000 files"),
        (&endless, MOST, "128 MiB of memory"),
        (&hidden, MOST, "128 MiB of memory"),
        (&large, Most { mebibytes: 3, ..MOST }, "3 MiB"),
        (&holder, Most { mebibytes: 3, ..MOST }, "3 MiB"),
    ] {
        let (folder, refused, _) = check_out_within(&repository.url(), None, most, path.clone()).await;
        let refused = refused.unwrap_err().to_string();
        assert!(refused.contains(&format!("takes more than {what} here")), "{refused}");
        assert!(!folder.path().join("checkout").exists());
    }
    let (_folder, checked_out, _) = check_out_within(&large.url(), None, MOST, path).await;
    checked_out.unwrap();
}

/// Writes down what git is told, each run by itself, and answers as a repository that has the ref, and large files where it should.
const RECORDER: &str = r#"for word; do printf '%s\0' "$word"; done > "$(dirname "$0")/call.$$"
commit=1111111111111111111111111111111111111111
case "$1" in
    ls-remote) printf '%s\trefs/heads/%s\n' $commit "$REF" ;;
    rev-parse) echo $commit ;;
    init) for folder; do :; done; mkdir -p "$folder/.git" ;;
    grep) exit "$WITHOUT_LARGE_FILES" ;;
esac"#;

/// What the recorder wrote down, in no order.
fn recorded(programs: &std::path::Path) -> Vec<Vec<String>> {
    let files = std::fs::read_dir(programs).unwrap().map(|file| file.unwrap().path());
    let calls = files.filter(|file| file.file_name().is_some_and(|name| name != "git"));
    let call = |file: std::path::PathBuf| {
        let call = std::fs::read_to_string(&file).unwrap();
        std::fs::remove_file(file).unwrap();
        call.split_terminator('\0').map(str::to_owned).collect()
    };
    calls.map(call).collect()
}

/// A text of what means something to a shell, or to whoever reads options.
fn made_up(random: &mut Random) -> String {
    const PARTS: [&str; 18] = [
        "$(id)",
        "`id`",
        "${IFS}",
        "--upload-pack=id",
        "-",
        ";",
        "&&",
        "|",
        "'",
        "(",
        ")",
        "%2e",
        "%s",
        "{{",
        "}}",
        "!",
        "a/b",
        "x",
    ];
    (0..=random.below(4)).map(|_| random.one_of(&PARTS)).collect()
}

#[tokio::test]
async fn an_address_and_a_ref_are_arguments_of_git_whole_and_behind_its_options() {
    let wanted = scale("NOMAD_BUILD_TEST_HOSTILE_SUBMISSIONS", 30);
    let (programs, path) = program("git", RECORDER);
    let mut random = Random::of(7);
    let mut tried = 0;
    while tried < wanted {
        let url = format!("https://example.com/{}", made_up(&mut random)).parse::<RepoUrl>();
        let named = made_up(&mut random).parse::<GitRef>();
        let (Ok(url), Ok(named)) = (url, named) else { continue };
        tried += 1;
        let (is_commit, has_large_files) = (random.once_in(3), random.once_in(3));
        let commit = format!("{:09x}", random.below(1 << 36));
        let (reference, listed) =
            if is_commit { (&*commit, "main") } else { (named.as_str(), named.as_str()) };
        let without = if has_large_files { "0" } else { "1" };
        let environment = [("PATH", path.as_str()), ("REF", listed), ("WITHOUT_LARGE_FILES", without)]
            .map(|(name, value)| (name.to_owned(), value.to_owned()));
        let url = url.as_str();
        let source = Source {
            reference: Some(reference),
            transports: &["https"],
            environment: &environment,
            ..main_of(url)
        };
        check_out_source(&source).await.1.unwrap();
        let calls = recorded(programs.path());
        let is_told =
            |words: &[&str]| assert!(calls.iter().any(|call| call == words), "{words:?}: {calls:?}");
        is_told(&["ls-remote", "--symref", "--", url]);
        is_told(&["remote", "add", "--", "origin", url]);
        let fetch = ["fetch", "--no-tags", "--no-recurse-submodules"];
        let parse = ["rev-parse", "--verify", "--end-of-options"];
        if is_commit {
            let all = ["+refs/heads/*:refs/remotes/origin/*", "+refs/tags/*:refs/tags/*"];
            is_told(&[&fetch[..], &["--", url], &all].concat());
            is_told(&[&parse[..], &[&format!("{commit}^{{commit}}")]].concat());
        } else {
            is_told(&[&fetch[..], &["--depth=1", "--", url, &format!("refs/heads/{named}")]].concat());
            is_told(&[&parse[..], &["FETCH_HEAD^{commit}"]].concat());
        }
        if has_large_files {
            is_told(&["config", "--local", "--", "lfs.url", &format!("{url}.git/info/lfs")]);
            is_told(&["lfs", "pull"]);
        }
        assert_eq!(calls.len(), if has_large_files { 11 } else { 7 }, "{calls:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_keys_of_the_machine_that_builds_are_shown_to_nobody() {
    let server = Ssh::serve().await;
    let repository = Repository::new().commit();
    // A machine whose user has a key that opens the repository, and knows its host.
    let machine = tempfile::tempdir().unwrap();
    let file = |name: &str| machine.path().join(name);
    std::fs::create_dir(file(".ssh")).unwrap();
    let key = file(".ssh/id_ed25519");
    std::fs::write(&key, server.key()).unwrap();
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o600)).unwrap();
    std::fs::write(file(".ssh/known_hosts"), server.known_host()).unwrap();
    let own = nix::unistd::User::from_uid(nix::unistd::getuid()).unwrap().unwrap();
    let line = format!("{}:x:{}:{}::{}:/bin/sh\n", own.name, own.uid, own.gid, machine.path().display());
    std::fs::write(file("passwd"), line).unwrap();
    let ssh = environment("PATH")
        .unwrap()
        .split(':')
        .map(|dir| format!("{dir}/ssh"))
        .find(|ssh| std::path::Path::new(ssh).exists());
    let there = format!(
        "exec unshare --mount sh -c 'mount --bind {} /etc/passwd && exec {} \"$@\"' ssh \"$@\"",
        file("passwd").display(),
        ssh.unwrap()
    );
    let (_programs, path) = program("ssh", &there);
    let bare = std::process::Command::new("git")
        .args(["ls-remote", &server.url(&repository)])
        .env("PATH", &path)
        .env("GIT_SSH_COMMAND", "ssh -oBatchMode=yes")
        .output()
        .unwrap();
    assert!(bare.status.success(), "the key does not open it: {}", String::from_utf8_lossy(&bare.stderr));
    let (_folder, refused, _) = check_out_within(&server.url(&repository), None, MOST, path).await;
    assert!(matches!(refused, Err(GitError::Unauthorized(_))), "{refused:?}");
}
