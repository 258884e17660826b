//! The runner, for nodes that have none: this program itself, with its checksum.

use std::collections::HashMap;
use std::io::{self, Read as _};
use std::path::{Path as FilePath, PathBuf};
use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::SystemTime;

use axum::body::Body;
use axum::extract::Path;
use axum::extract::rejection::PathRejection;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use sha2::{Digest, Sha256};
use tokio_util::io::ReaderStream;

use super::answer::{Code, Problem};
use super::plain;

/// This program's own platform, in Nomad's words.
fn platform() -> (&'static str, &'static str) {
    let arch = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    (std::env::consts::OS, arch)
}

/// What a path says of a platform: system and architecture.
type Platform = Result<Path<(String, String)>, PathRejection>;

/// The program for a platform: its own for its own, `nomad-build-OS-ARCH` beside it for others.
fn program(asked: Platform) -> Result<PathBuf, Problem> {
    let message =
        "the service has no runner for this platform: put nomad-build-OS-ARCH beside its own program";
    let missing = || Problem::new(Code::RouteNotFound, message);
    // A path that is no UTF-8 is no platform either.
    let Path((os, arch)) = asked.map_err(|_| missing())?;
    let own = std::env::current_exe().map_err(|_| missing())?;
    program_of(&os, &arch, own).ok_or_else(missing)
}

/// What is there for a platform, where this platform's is `own`.
fn program_of(os: &str, arch: &str, own: PathBuf) -> Option<PathBuf> {
    if (os, arch) == platform() {
        return Some(own);
    }
    let plain = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric());
    let other = own.with_file_name(format!("nomad-build-{os}-{arch}"));
    (plain(os) && plain(arch) && other.is_file()).then_some(other)
}

fn unreadable(error: &io::Error) -> Problem {
    Problem::new(Code::Internal, &format!("the runner cannot be read: {error}"))
}

/// The checksum of a program, for as long as it is the same file: its length and when it was changed.
struct Sum {
    length: u64,
    changed: SystemTime,
    hex: String,
}

/// Those of the programs that were asked for: whoever asks needs no token, and a program is long.
static SUMS: LazyLock<Mutex<HashMap<PathBuf, Sum>>> = LazyLock::new(Mutex::default);

/// A program's checksum. One is made at a time, so that many who ask for it cost no more than one.
fn checksum_of(program: &FilePath) -> io::Result<String> {
    let mut sums = SUMS.lock().unwrap_or_else(PoisonError::into_inner);
    let mut file = std::fs::File::open(program)?;
    let now = file.metadata()?;
    let (length, changed) = (now.len(), now.modified()?);
    if let Some(sum) = sums.get(program).filter(|sum| (sum.length, sum.changed) == (length, changed)) {
        return Ok(sum.hex.clone());
    }
    let (mut hasher, mut buffer) = (Sha256::new(), vec![0; 64 * 1024]);
    loop {
        match file.read(&mut buffer)? {
            0 => break,
            count => hasher.update(&buffer[..count]),
        }
    }
    let hex: String = hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    sums.insert(program.to_owned(), Sum { length, changed, hex: hex.clone() });
    Ok(hex)
}

/// `GET /runner/{os}/{arch}/nomad-build`
pub(super) async fn binary(platform: Platform) -> Result<Response, Problem> {
    let file = tokio::fs::File::open(program(platform)?).await.map_err(|error| unreadable(&error))?;
    let body = Body::from_stream(ReaderStream::with_capacity(file, 64 * 1024));
    Ok((StatusCode::OK, [(header::CONTENT_TYPE, "application/octet-stream")], body).into_response())
}

/// `GET /runner/{os}/{arch}/sha256sums`: the checksum in the format of sha256sum(1).
pub(super) async fn checksum(platform: Platform) -> Result<Response, Problem> {
    let program = program(platform)?;
    let made = tokio::task::spawn_blocking(move || checksum_of(&program)).await.map_err(io::Error::other);
    let hex = made.and_then(|made| made).map_err(|error| unreadable(&error))?;
    Ok(plain(StatusCode::OK, "text/plain; charset=utf-8", format!("{hex}  nomad-build\n")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_platform_s_program_is_the_one_beside_this_platform_s() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        for name in ["nomad-build", "nomad-build-plan9-mips", "nomad-build-plan9-"] {
            std::fs::write(at(name), "").unwrap();
        }
        std::fs::create_dir_all(at("nomad-build-plan9-folder")).unwrap();
        let (os, arch) = platform();
        for (os, arch, want) in [
            (os, arch, Some("nomad-build")),
            ("plan9", "mips", Some("nomad-build-plan9-mips")),
            ("plan9", "arm64", None),
            ("plan9", "folder", None),
            ("plan9", "", None),
            ("plan9/..", "mips", None),
            (os, "../nomad-build", None),
        ] {
            assert_eq!(program_of(os, arch, at("nomad-build")), want.map(at), "{os} {arch}");
        }
    }

    #[test]
    fn a_checksum_is_made_once_and_anew_where_the_program_is_another_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("program");
        let at = |seconds| SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(seconds);
        let write = |text: &str, seconds| {
            std::fs::write(&path, text).unwrap();
            std::fs::File::options().write(true).open(&path).unwrap().set_modified(at(seconds)).unwrap();
        };
        write("abc", 1);
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(checksum_of(&path).unwrap(), abc);
        // What only the file's text tells is not looked at again.
        write("xyz", 1);
        assert_eq!(checksum_of(&path).unwrap(), abc);
        write("", 1);
        let empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(checksum_of(&path).unwrap(), empty);
        write("abc", 2);
        assert_eq!(checksum_of(&path).unwrap(), abc);
    }
}
