//! Submodules, over the real git.

use std::sync::Mutex;

use nomad_build::git::{GitError, Source};

use super::{check_out_main, check_out_source, main_of};
use crate::stack::environment;
use crate::support::Repository;

#[tokio::test]
async fn a_submodule_with_an_address_relative_to_the_repository_is_checked_out() {
    let inner = Repository::new().file("inside", "inner").commit();
    let name = inner.path().file_name().unwrap().to_str().unwrap();
    let outer = Repository::new();
    outer.git(&["remote", "add", "origin", &outer.url()]);
    let outer = outer.submodule(&format!("../{name}"), "sub").commit();
    let (folder, checked_out) = check_out_main(&outer.url(), None).await;
    checked_out.unwrap();
    let checkout = folder.path().join("checkout");
    assert!(!checkout.join(".git").exists() && !checkout.join("sub/.git").exists());
    let inside = std::fs::read_to_string(folder.path().join("checkout/sub/inside")).unwrap();
    assert_eq!(inside, "inner");
}

#[tokio::test(flavor = "multi_thread")]
async fn of_the_submodules_none_is_got_that_is_not_allowed() {
    let names = ["deepest", "inner", "other"];
    let [deepest, inner, other] = names.map(|name| Repository::new().file("name", name).commit());
    let inner = inner.submodule(&deepest.url(), "a sub").commit();
    let outer = Repository::new().submodule(&other.url(), "o").submodule(&inner.url(), "sub").commit();
    let environment = [("PATH".to_owned(), environment("PATH").unwrap())];
    for (forbidden, name) in
        [(None, ""), (Some(&other), "o"), (Some(&inner), "sub"), (Some(&deepest), "a sub")]
    {
        let asked = Mutex::new(Vec::new());
        let forbidden = forbidden.map(Repository::url);
        let allows = |address: &str| {
            asked.lock().unwrap().push(address.to_owned());
            if forbidden.as_deref() == Some(address) { Err("is forbidden".to_owned()) } else { Ok(()) }
        };
        let url = outer.url();
        let source = Source { allows: &allows, environment: &environment, ..main_of(&url) };
        let (folder, checked_out, said) = check_out_source(&source).await;
        match checked_out {
            Ok(_) => assert_eq!(name, ""),
            Err(GitError::NotAllowed(module, why)) => {
                assert_eq!((module.as_str(), why.as_str()), (name, "is forbidden"));
            }
            Err(error) => panic!("{error:?}: {said}"),
        }
        // Of a forbidden one git is not told at all, and of what is in it nobody.
        let checkout = folder.path().join("checkout");
        let got = |path: &str| checkout.join(path).join("name").exists();
        let is_whole = forbidden.is_none();
        assert_eq!(got("sub/a sub"), is_whole, "{forbidden:?}: {said}");
        assert!(forbidden.is_none_or(|url| !said.contains(&url)), "{said}");
        let is_in_the_outer_one = ["o", "sub"].contains(&name);
        assert_eq!(got("o") && got("sub"), !is_in_the_outer_one, "{name}: {said}");
        assert_eq!(asked.lock().unwrap().contains(&deepest.url()), !is_in_the_outer_one);
    }
}

#[tokio::test]
async fn a_submodule_that_is_to_be_left_out_is_neither_got_nor_forbidden() {
    let inner = Repository::new().file("inside", "inner").commit();
    let outer = Repository::new().submodule(&inner.url(), "sub");
    outer.git(&["config", "--file=.gitmodules", "submodule.sub.update", "none"]);
    let (outer, environment) = (outer.commit(), [("PATH".to_owned(), environment("PATH").unwrap())]);
    let url = outer.url();
    let allows = |_: &str| Err("is forbidden".to_owned());
    let source = Source { allows: &allows, environment: &environment, ..main_of(&url) };
    let (folder, checked_out, _) = check_out_source(&source).await;
    checked_out.unwrap();
    assert!(!folder.path().join("checkout/sub/inside").exists());
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
