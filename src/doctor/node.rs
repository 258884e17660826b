//! A node's side: the programs that the runner calls, the engine, and what user code can take there.

use std::path::Path;
use std::process::Stdio;

use super::{Report, steps};
use crate::engine::DockerEngine;
use crate::telemetry::chain;

/// The oldest Docker Engine that builds.
const ENGINE: (u64, u64) = (20, 10);

/// The oldest git that checks out as the runner asks for it.
const GIT: (u64, u64) = (2, 32);

/// Of how much free space an engine's storage is warned, in GiB.
const ROOM: u64 = 10;

/// What there is to know of a node before it is looked at.
pub struct Node {
    /// The engine's socket.
    pub engine_socket: String,
}

/// Looks at the machine that this runs on.
pub async fn examine(node: &Node) -> Report {
    let mut report = Report::default();
    git(&mut report).await;
    let optional = [
        ("ssh", "-V", "repositories over SSH cannot be built here", "install an OpenSSH client"),
        ("git-lfs", "version", "files in Git LFS stay pointers", "install git-lfs"),
    ];
    for (program, argument, without, remedy) in optional {
        match said(program, argument).await {
            Ok(version) => report.good("programs", version),
            Err(why) => report.warn("programs", format!("{program} {why}: {without}"), remedy),
        }
    }
    engine(node, &mut report).await;
    report
}

/// What a program says of its version, or why it does not.
async fn said(program: &str, argument: &str) -> Result<String, String> {
    let mut command = tokio::process::Command::new(program);
    command.arg(argument).stdin(Stdio::null()).kill_on_drop(true);
    let output = command.output().await.map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => "is not on the PATH".to_owned(),
        _ => format!("cannot be run ({error})"),
    })?;
    // ssh says it on the other stream.
    let words = if output.stdout.is_empty() { output.stderr } else { output.stdout };
    let words = String::from_utf8_lossy(&words);
    let first = words.lines().next().unwrap_or_default().trim().to_owned();
    if output.status.success() { Ok(first) } else { Err(format!("fails ({first})")) }
}

/// The first two numbers of a version, wherever they stand.
fn version(text: &str) -> Option<(u64, u64)> {
    let begin = text.find(|c: char| c.is_ascii_digit())?;
    let mut numbers = text[begin..].split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

async fn git(report: &mut Report) {
    match said("git", "--version").await {
        Ok(words) if version(&words).is_some_and(|version| version >= GIT) => report.good("programs", words),
        Ok(words) => {
            report.bad(
                "programs",
                format!("{words} is too old"),
                format!("install git {}.{} or newer", GIT.0, GIT.1),
            );
        }
        Err(why) => {
            report.bad("programs", format!("git {why}"), "install git: the runner checks out with it");
        }
    }
}

async fn engine(node: &Node, report: &mut Report) {
    let about = match DockerEngine::new(&node.engine_socket).about().await {
        Ok(about) => about,
        Err(error) => {
            let remedy = "start it, set NOMAD_BUILD_ENGINE_SOCKET to where it listens, or let this user reach its socket";
            return report.bad("engine", chain(&error), remedy);
        }
    };
    let words = format!("Docker Engine {} at {}", about.version, node.engine_socket);
    if version(&about.version).is_some_and(|version| version < ENGINE) {
        report.bad(
            "engine",
            format!("{words} is too old"),
            "install Docker Engine 20.10 or newer: it has BuildKit",
        );
    } else {
        report.good("engine", words);
    }
    for warning in &about.warnings {
        report.warn("engine", warning.clone(), "see the engine's documentation");
    }
    if about.unlimited.is_empty() {
        report.good("limits", "a test's container is held to its memory, processes and CPU weight");
    } else {
        let message =
            format!("the engine cannot limit a container's {} on this kernel", about.unlimited.join(", "));
        report.warn(
            "limits",
            message,
            "turn the kernel's cgroup controllers on: a test may take all of the node's",
        );
    }
    steps::examine(&node.engine_socket, report).await;
    let message = "nothing bounds the disk that the steps of a build and its tests fill";
    report.warn("limits", message, "give the engine's storage a volume of its own");
    room(&about.root, report);
}

/// How much room the engine's storage has.
fn room(root: &Path, report: &mut Report) {
    match nix::sys::statvfs::statvfs(root) {
        Ok(found) => {
            let gib = found.blocks_available().saturating_mul(found.fragment_size()) >> 30;
            let message = format!("{gib} GiB are free for images, in {}", root.display());
            if gib < ROOM {
                report.warn("disk", message, "make room, or builds will fail of it: docker system df");
            } else {
                report.good("disk", message);
            }
        }
        Err(error) => {
            let message = format!("{}: {error}", root.display());
            report.unknown("disk", message, "look at the machine that the engine runs on");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_found_in_whatever_a_program_says() {
        for (text, want) in [
            ("git version 2.39.5", Some((2, 39))),
            ("OpenSSH_9.2p1 Debian-2+deb12u3, OpenSSL 3.0.15", Some((9, 2))),
            ("20.10.24+dfsg1", Some((20, 10))),
            ("none", None),
            ("7", None),
        ] {
            assert_eq!(version(text), want, "{text}");
        }
    }
}
