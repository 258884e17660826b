//! The runner, for nodes that have none: this program itself, with its checksum.

use std::path::PathBuf;

use axum::body::Body;
use axum::extract::Path;
use axum::extract::rejection::PathRejection;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use sha2::{Digest, Sha256};
use tokio::io::AsyncReadExt as _;
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
    if (os.as_str(), arch.as_str()) == platform() {
        return Ok(own);
    }
    let plain = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric());
    let other = own.with_file_name(format!("nomad-build-{os}-{arch}"));
    if plain(&os) && plain(&arch) && other.is_file() { Ok(other) } else { Err(missing()) }
}

fn unreadable(error: &std::io::Error) -> Problem {
    Problem::new(Code::Internal, &format!("the runner cannot be read: {error}"))
}

/// `GET /runner/{os}/{arch}/nomad-build`
pub(super) async fn binary(platform: Platform) -> Result<Response, Problem> {
    let file = tokio::fs::File::open(program(platform)?).await.map_err(|error| unreadable(&error))?;
    let body = Body::from_stream(ReaderStream::with_capacity(file, 64 * 1024));
    Ok((StatusCode::OK, [(header::CONTENT_TYPE, "application/octet-stream")], body).into_response())
}

/// `GET /runner/{os}/{arch}/sha256sums`: the checksum in the format of sha256sum(1).
pub(super) async fn checksum(platform: Platform) -> Result<Response, Problem> {
    let mut file = tokio::fs::File::open(program(platform)?).await.map_err(|error| unreadable(&error))?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 64 * 1024];
    loop {
        match file.read(&mut buffer).await.map_err(|error| unreadable(&error))? {
            0 => break,
            count => hasher.update(&buffer[..count]),
        }
    }
    let hex: String = hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(plain(StatusCode::OK, "text/plain; charset=utf-8", format!("{hex}  nomad-build\n")))
}
