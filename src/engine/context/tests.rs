//! What is sent, and what is not.

use super::*;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::symlink;
use tempfile::TempDir;

/// A directory of these files, each holding its own name, or what follows a colon.
fn tree(files: &[&str]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for file in files {
        let (name, content) = file.split_once(':').unwrap_or((file, file));
        fs::create_dir_all(dir.path().join(name).parent().unwrap()).unwrap();
        fs::write(dir.path().join(name), content).unwrap();
    }
    dir
}

/// The names of what is sent, a directory's with a slash behind it.
fn sent(context: &Context) -> Vec<PathBuf> {
    let mut names = Vec::new();
    let walked = context.walk(|entry| {
        assert_eq!(entry.path, context.root.join(entry.relative));
        let slash = if entry.metadata.is_dir() { "/" } else { "" };
        let name = [entry.relative.as_os_str().as_bytes(), slash.as_bytes()].concat();
        names.push(PathBuf::from(OsStr::from_bytes(&name)));
        Ok(())
    });
    walked.unwrap();
    assert!(names.is_sorted(), "not in the order of names");
    names
}

#[test]
fn what_is_ignored_stays_out_and_exceptions_come_back_with_their_directories() {
    for (files, expected) in [
        (&["D", ".git/HEAD", "a"][..], ".git/ .git/HEAD D a"),
        (&["D", ".git/HEAD", ".dockerignore:.git"], ".dockerignore D"),
        (&["D", ".dockerignore:*", "a"], ""),
        (&["D", ".dockerignore:.dockerignore\nD", "a"], "a"),
        (&["D", ".dockerignore:a", "D.dockerignore:b", "a", "b"], ".dockerignore D D.dockerignore a"),
        (&["D", ".dockerignore:a\n!a/b/c", "a/b/c", "a/b/d", "a/e/f"], ".dockerignore D a/ a/b/ a/b/c"),
        (&["D", ".dockerignore:**\n!**/k", "a/k", "b/c"], "a/ a/k"),
        (&["b/D", "b/c", ".dockerignore:b"], ".dockerignore"),
    ] {
        let dir = tree(files);
        let dockerfile = files.iter().find(|name| name.ends_with('D')).unwrap();
        let context = Context::open(dir.path(), &dir.path().join(dockerfile)).unwrap();
        let names = sent(&context);
        let names: Vec<_> = names.iter().map(|name| name.to_str().unwrap()).collect();
        assert_eq!(names.join(" "), expected, "{files:?}");
        assert_eq!(context.dockerfile(), dir.path().canonicalize().unwrap().join(dockerfile));
    }
}

#[test]
fn whatever_has_content_is_sent_under_its_own_name() {
    let (dir, long) = (tree(&["D"]), "n".repeat(200));
    let raw = OsStr::from_bytes(b"\xff/\xfe");
    fs::create_dir_all(dir.path().join(&long)).unwrap();
    fs::create_dir_all(dir.path().join(raw).parent().unwrap()).unwrap();
    fs::write(dir.path().join(raw), "raw").unwrap();
    symlink("/etc", dir.path().join("etc")).unwrap();
    nix::unistd::mkfifo(&dir.path().join("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let names = sent(&Context::open(dir.path(), &dir.path().join("D")).unwrap());
    let long = format!("{long}/");
    let expected = [OsStr::new("D"), OsStr::new("etc"), OsStr::new(&long), OsStr::from_bytes(b"\xff/"), raw];
    assert_eq!(names, expected.map(PathBuf::from));
}

#[test]
fn a_dockerfile_may_be_outside_of_the_context_and_no_link_leads_out() {
    let dir = tree(&["D:FROM x", "c/.dockerignore:**", "c/a"]);
    let context = Context::open(&dir.path().join("c"), &dir.path().join("D")).unwrap();
    assert_eq!(context.dockerfile(), dir.path().canonicalize().unwrap().join("D"));
    assert!(sent(&context).is_empty());
    let other = tree(&["secret"]);
    symlink(other.path().join("secret"), dir.path().join("L")).unwrap();
    symlink(other.path().join("secret"), dir.path().join("D.dockerignore")).unwrap();
    for dockerfile in ["L", "D"] {
        let error = Context::open(&dir.path().join("c"), &dir.path().join(dockerfile)).err().unwrap();
        assert!(matches!(error, ContextError::Escapes(_)), "{error}");
    }
    let error = Context::open(dir.path(), &dir.path().join("none")).err().unwrap();
    assert!(error.to_string().starts_with("finding the Dockerfile /"), "{error}");
}

#[test]
fn what_cannot_be_sent_is_named() {
    let dir = tree(&["D", "a/b"]);
    let context = Context::open(dir.path(), &dir.path().join("D")).unwrap();
    let walked = context.walk(|entry| {
        if entry.relative == Path::new("a/b") { Err(io::ErrorKind::BrokenPipe.into()) } else { Ok(()) }
    });
    let said = walked.unwrap_err().to_string();
    assert!(said.starts_with("sending, with the build context, /") && said.ends_with("/a/b"), "{said}");
}
