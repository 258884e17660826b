//! The command line where somebody looks: on a terminal of the test's own.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read as _;
use std::os::fd::OwnedFd;
use std::process::Stdio;
use std::sync::{Arc, Mutex};

use nix::pty::{Winsize, openpty};
use serde_json::json;
use tokio::process::Child;

use super::{command, end_of};
use crate::support::{Hold, eventually, world};

/// What a program has for a terminal.
#[derive(Clone, Copy, PartialEq)]
enum Seen {
    Both,
    Stdout,
    Nothing,
}

/// A program that runs, and what it wrote to its terminal.
struct Terminal {
    child: Child,
    written: Arc<Mutex<Vec<u8>>>,
    read: Option<std::thread::JoinHandle<()>>,
}

impl Terminal {
    fn run(arguments: &[&str], variables: &[(&str, &str)], seen: Seen) -> Self {
        let size = Winsize { ws_row: 50, ws_col: 200, ws_xpixel: 0, ws_ypixel: 0 };
        let pair = openpty(Some(&size), None).unwrap();
        let mut command = command(&world().service.url, arguments);
        command.env("TERM", "xterm-256color").envs(variables.iter().copied());
        let terminal = |slave: &OwnedFd| Stdio::from(slave.try_clone().unwrap());
        if seen != Seen::Nothing {
            command.stdout(terminal(&pair.slave));
        }
        if seen == Seen::Both {
            command.stderr(terminal(&pair.slave));
        }
        let child = command.spawn().unwrap();
        let written = Arc::<Mutex<Vec<u8>>>::default();
        let heard = Arc::clone(&written);
        let mut master = File::from(pair.master);
        let read = std::thread::spawn(move || {
            let mut piece = [0; 4096];
            // It ends with an error once nobody has the other side any more.
            while let Ok(length @ 1..) = master.read(&mut piece) {
                heard.lock().unwrap().extend_from_slice(&piece[..length]);
            }
        });
        Self { child, written, read: Some(read) }
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.written.lock().unwrap()).into_owned()
    }

    /// Waits for the program's end: its exit code, what it wrote to the terminal, and what to a pipe.
    async fn end(mut self) -> (i32, String, String) {
        let mut piped = String::new();
        if let Some(mut stdout) = self.child.stdout.take() {
            tokio::io::AsyncReadExt::read_to_string(&mut stdout, &mut piped).await.unwrap();
        }
        let code = if self.child.stderr.is_some() {
            let (code, stderr) = end_of(&mut self.child).await;
            piped += &stderr;
            code
        } else {
            self.child.wait().await.unwrap().code()
        };
        let read = self.read.take().unwrap();
        tokio::task::spawn_blocking(move || read.join().unwrap()).await.unwrap();
        (code.unwrap(), self.text(), piped)
    }
}

/// What a terminal would obey in a text, but for line ends: whole escape sequences, and other control characters.
fn obeyed(text: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut rest = text.chars().peekable();
    while let Some(c) = rest.next() {
        if c == '\u{1b}' && rest.peek() == Some(&'[') {
            let parameters: String =
                std::iter::from_fn(|| rest.next_if(|c| !c.is_ascii_alphabetic())).collect();
            found.insert(format!("\u{1b}{parameters}{}", rest.next().unwrap_or_default()));
        } else if c.is_control() && !matches!(c, '\r' | '\n') {
            found.insert(c.to_string());
        }
    }
    found
}

fn is_colour(sequence: &str) -> bool {
    sequence.starts_with("\u{1b}[") && sequence.ends_with('m')
}

#[tokio::test(flavor = "multi_thread")]
async fn progress_is_for_a_terminal_and_colours_are_for_who_wants_them() {
    let (world, hold) = (world(), Hold::new());
    let repository = world.repository("");
    let mut job = world.job(&repository);
    job["test_commands"] = json!(["printf '\\033[31mred\\033[0m\\n'", hold.command()]);
    let id = world.api().submit(&job).await;
    let follow = ["logs", "-f", id.as_str()];
    let uncoloured = ["--no-color", "logs", "-f", id.as_str()];
    let terminals = [
        (Terminal::run(&follow, &[], Seen::Both), true, true),
        (Terminal::run(&follow, &[("NO_COLOR", "1")], Seen::Both), true, false),
        (Terminal::run(&follow, &[("NO_COLOR", "")], Seen::Both), true, true),
        (Terminal::run(&uncoloured, &[], Seen::Both), true, false),
    ];
    let piped = Terminal::run(&follow, &[], Seen::Nothing);
    for (terminal, ..) in &terminals {
        eventually("progress that goes on", async || {
            ["testing 1s", "testing 2s"].iter().all(|shown| terminal.text().contains(shown)).then_some(())
        })
        .await;
    }
    hold.let_go().await;
    for (terminal, moves, colours) in terminals {
        let (code, text, _) = terminal.end().await;
        assert_eq!(code, 0, "{text:?}");
        assert!(text.contains("==> testing") && text.contains("test succeeded"), "{text:?}");
        let (coloured, moved): (BTreeSet<_>, BTreeSet<_>) =
            obeyed(&text).into_iter().partition(|sequence| is_colour(sequence));
        assert_eq!((!moved.is_empty(), !coloured.is_empty()), (moves, colours), "{text:?}");
        // The log's own, and ours.
        let has = |sequence: &str| coloured.contains(sequence);
        assert_eq!((has("\u{1b}[31m"), has("\u{1b}[32m")), (colours, colours), "{text:?}");
        assert!(text.contains("red\u{1b}[0m\r\n") == colours && text.contains("red"), "{text:?}");
    }
    let (code, _, text) = piped.end().await;
    assert_eq!(code, 0, "{text}");
    assert!(text.contains("==> testing\n") && !text.contains("testing 1s"), "{text:?}");
    // The log is as it was written.
    assert_eq!(obeyed(&text).into_iter().collect::<Vec<_>>(), ["\u{1b}[0m", "\u{1b}[31m"], "{text:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hostile_log_moves_no_terminal_and_is_shown_instead() {
    let world = world();
    let hostile = [
        ("\u{1b}[2J", "\\x1b[2J"),
        ("\u{1b}[H", "\\x1b[H"),
        ("\u{1b}[?1049h", "\\x1b[?1049h"),
        ("\u{1b}c", "\\x1bc"),
        ("\u{1b}]0;title\u{7}", "\\x1b]0;title\\x07"),
        ("\u{1b}]52;c;ZXZpbA==\u{1b}\\", "\\x1b]52;c;ZXZpbA==\\x1b\\"),
        ("\u{9b}2J", "\\u{9b}2J"),
        ("10%\r20%", "10%\\r20%"),
        ("a\u{8}b\u{7f}", "a\\x08b\\x7f"),
        ("admin\u{202e}nimda", "admin\\u{202e}nimda"),
    ];
    let repository = world.repository("");
    let mut job = world.job(&repository);
    let commands = hostile.map(|(written, _)| format!("printf '%s\\n' '<{written}>'"));
    job["test_commands"] = json!(commands);
    let (id, status) = world.api().run(&job).await;
    assert_eq!(status["status"], "SUCCEEDED", "{status:#}");
    for (arguments, colours) in
        [(&["logs", "-f", &id][..], true), (&["logs", &id], true), (&["logs", "-f", &id], false)]
    {
        let variables = if colours { &[][..] } else { &[("NO_COLOR", "1")] };
        let (code, text, _) = Terminal::run(arguments, variables, Seen::Stdout).end().await;
        assert_eq!(code, 0, "{text:?}");
        assert_eq!(obeyed(&text), BTreeSet::new(), "{text:?}");
        for (_, shown) in hostile {
            // Twice: what the test is, and what it said.
            assert_eq!(text.matches(&format!("<{shown}>")).count(), 2, "{shown} {text:?}");
        }
        assert!(!text.contains(['\u{202e}', '\u{9b}']), "{text:?}");
    }
    // Beside it the program's own progress moves the cursor, and nothing else does.
    let (code, text, _) = Terminal::run(&["logs", "-f", &id], &[], Seen::Both).end().await;
    let moved: BTreeSet<_> = obeyed(&text).into_iter().filter(|sequence| !is_colour(sequence)).collect();
    assert_eq!(code, 0);
    assert!(
        moved.iter().all(|sequence| ["\u{1b}[2K", "\u{1b}[1A", "\u{1b}[K"].contains(&sequence.as_str())),
        "{moved:?}"
    );
    // As JSON it still means what it was.
    let (code, text, _) = Terminal::run(&["-o", "json", "logs", &id], &[], Seen::Stdout).end().await;
    assert_eq!((code, obeyed(&text)), (0, BTreeSet::new()), "{text:?}");
    let logs: serde_json::Value = serde_json::from_str(&text).unwrap();
    for (written, _) in hostile {
        assert!(logs["test"].as_str().unwrap().contains(&format!("\n<{written}>\n")), "{written:?} {logs:#}");
    }
}
