//! What is sent, and what is not.

use super::*;
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::time::Duration;
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

async fn bytes(context: Context) -> Vec<u8> {
    let pieces = context.body.map(|piece| piece.unwrap().to_vec());
    pieces.inspect(|piece| assert!(piece.len() <= PIECE)).concat().await
}

/// Names, each with its header, link target and content.
async fn sent(context: Context) -> BTreeMap<PathBuf, (Header, Vec<u8>, Vec<u8>)> {
    let mut archive = tar::Archive::new(io::Cursor::new(bytes(context).await));
    let entries = archive.entries().unwrap().map(|entry| {
        let mut entry = entry.unwrap();
        let mut data = Vec::new();
        entry.read_to_end(&mut data).unwrap();
        let link = entry.link_name_bytes().unwrap_or_default().into_owned();
        (entry.path().unwrap().into_owned(), (entry.header().clone(), link, data))
    });
    let entries: Vec<_> = entries.collect();
    assert!(entries.is_sorted_by(|a, b| a.0 < b.0), "not in the order of names");
    entries.into_iter().collect()
}

#[tokio::test]
async fn what_is_ignored_stays_out_and_exceptions_come_back_with_their_directories() {
    for (files, expected) in [
        (&["D", ".git/HEAD", "a"][..], ".git/ .git/HEAD D a"),
        (&["D", ".git/HEAD", ".dockerignore:.git"], ".dockerignore D"),
        (&["D", ".dockerignore:*", "a"], ".dockerignore D"),
        (&["D", ".dockerignore:a", "D.dockerignore:b", "a", "b"], ".dockerignore D D.dockerignore a"),
        (&["D", ".dockerignore:a\n!a/b/c", "a/b/c", "a/b/d", "a/e/f"], ".dockerignore D a/ a/b/ a/b/c"),
        (&["D", ".dockerignore:**\n!**/k", "a/k", "b/c"], ".dockerignore D a/ a/k"),
        (&["b/D", "b/c", ".dockerignore:b"], ".dockerignore b/ b/D"),
    ] {
        let dir = tree(files);
        let dockerfile = files.iter().find(|name| name.ends_with('D')).unwrap();
        let entries = sent(open(dir.path(), dir.path().join(dockerfile)).unwrap()).await;
        let names: Vec<_> = entries.keys().map(|name| name.to_str().unwrap()).collect();
        assert_eq!(names.join(" "), expected, "{files:?}");
    }
}

#[tokio::test]
async fn names_links_and_modes_arrive_as_they_are() {
    let (dir, long) = (tree(&["D", "x"]), "n".repeat(200));
    let raw = [&[0xff; 120][..], b"/\xfe"].concat();
    let target = format!("..//./{}", "t".repeat(150));
    fs::create_dir_all(dir.path().join(&long)).unwrap();
    fs::create_dir(dir.path().join(OsStr::from_bytes(&raw[..120]))).unwrap();
    fs::write(dir.path().join(OsStr::from_bytes(&raw)), "raw").unwrap();
    symlink(&target, dir.path().join(&long).join("l")).unwrap();
    symlink("/etc", dir.path().join("etc")).unwrap();
    nix::unistd::mkfifo(&dir.path().join("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    fs::set_permissions(dir.path().join("x"), PermissionsExt::from_mode(0o4751)).unwrap();
    let entries = sent(open(dir.path(), dir.path().join("D")).unwrap()).await;
    assert_eq!(entries.len(), 7, "{:?}", entries.keys());
    assert_eq!(entries[Path::new(OsStr::from_bytes(&raw))].2, b"raw");
    assert_eq!(entries[&Path::new(&long).join("l")].1, target.as_bytes());
    assert_eq!(entries[Path::new("etc")].0.entry_type(), EntryType::Symlink);
    let header = &entries[Path::new("x")].0;
    assert_eq!((header.mode().unwrap(), header.uid().unwrap(), header.gid().unwrap()), (0o4751, 0, 0));
    let modified = u64::try_from(dir.path().join("x").metadata().unwrap().mtime()).unwrap();
    assert_eq!((header.mtime().unwrap(), header.username().unwrap()), (modified, Some("")));
}

#[tokio::test]
async fn a_dockerfile_from_outside_gets_a_reserved_name_and_no_link_leads_out() {
    let dir = tree(&["D:FROM x", "c/.dockerignore:**", "c/a"]);
    let context = open(dir.path().join("c"), dir.path().join("D")).unwrap();
    let (name, entries) = (context.dockerfile.clone(), sent(context).await);
    assert!(name.starts_with(".dockerfile.") && name.len() == 28, "{name}");
    fs::write(dir.path().join("c").join(&name), "FROM another").unwrap();
    fs::write(dir.path().join("c/.dockerignore"), "a").unwrap();
    let context = open(dir.path().join("c"), dir.path().join("D")).unwrap();
    assert_eq!(context.dockerfile, name, "another name for the same content");
    assert_eq!(sent(context).await[Path::new(&name)].2, b"FROM x");
    assert_eq!((entries.len(), &entries[Path::new(&name)].2[..]), (2, &b"FROM x"[..]));
    let other = tree(&["secret"]);
    symlink(other.path().join("secret"), dir.path().join("L")).unwrap();
    symlink(other.path().join("secret"), dir.path().join("D.dockerignore")).unwrap();
    for dockerfile in ["L", "D"] {
        let error = open(dir.path().join("c"), dir.path().join(dockerfile)).err().unwrap();
        assert!(matches!(error, ContextError::Escapes(_)), "{error}");
    }
    let error = open(dir.path(), dir.path().join("none")).err().unwrap();
    assert!(error.to_string().starts_with("finding the Dockerfile /"), "{error}");
}

#[tokio::test]
async fn the_same_directory_gives_the_same_bytes_in_bounded_pieces() {
    let dir = tree(&["D", "a/b", "a.c", "z"]);
    fs::write(dir.path().join("big"), vec![7; 20 << 20]).unwrap();
    let open = || open(dir.path(), dir.path().join("D")).unwrap();
    let first = bytes(open()).await;
    assert!(first.len() > 20 << 20 && first == bytes(open()).await);
}

#[tokio::test]
async fn the_writer_waits_for_its_reader_and_ends_with_it() {
    let dir = tree(&["D"]);
    fs::write(dir.path().join("big"), vec![7; 20 << 20]).unwrap();
    let (mut body, _failure, writer) = start(Plan::new(dir.path(), &dir.path().join("D")).unwrap());
    body.next().await.unwrap().unwrap();
    assert!(!writer.is_finished());
    drop(body);
    tokio::time::timeout(Duration::from_secs(10), writer).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_file_that_shrinks_is_an_error_and_one_that_grows_is_cut() {
    let (sender, mut receiver) = mpsc::channel(WAITING);
    let mut archive = Archive { begun: false, buffer: BytesMut::new(), sender };
    archive.content(3, &b"abcdef"[..]).unwrap();
    assert_eq!((archive.buffer.len(), &archive.buffer[..4]), (BLOCK, &b"abc\0"[..]));
    assert!(archive.content(9, &b"abcdef"[..]).unwrap_err().to_string().contains("from 9 bytes to 6"));
    assert!(receiver.try_recv().is_err());
}
