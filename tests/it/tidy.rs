//! The house stays tidy: imports point down the list of rooms, pure rooms stay pure, files stay readable.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// The rooms from the top of the house to its foundation, as src/lib.rs and ARCHITECTURE.md list them.
const ROOMS: [&str; 20] = [
    "fuzz",
    "cli",
    "dev",
    "api",
    "service",
    "doctor",
    "runner",
    "ledger",
    "config",
    "render",
    "archive",
    "registry",
    "engine",
    "git",
    "nomad",
    "tls",
    "reload",
    "telemetry",
    "job",
    "environment",
];

/// Rooms without tokio, network, clock or environment.
const PURE: [&str; 2] = ["job", "render"];

const LONGEST: usize = 500;

fn sources(below: &str) -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    let mut folders = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join(below)];
    while let Some(folder) = folders.pop() {
        for entry in folder.read_dir().unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = std::fs::read_to_string(&path).unwrap();
                found.push((path, text));
            }
        }
    }
    found
}

/// The room that a file of src/ belongs to; none for lib.rs and main.rs.
fn room_of(path: &Path) -> Option<usize> {
    let inside = path.strip_prefix(Path::new(env!("CARGO_MANIFEST_DIR")).join("src")).unwrap();
    let first = inside.components().next().unwrap().as_os_str().to_str().unwrap();
    let name = first.strip_suffix(".rs").unwrap_or(first);
    if matches!(name, "lib" | "main") {
        return None;
    }
    Some(
        ROOMS
            .iter()
            .position(|room| *room == name)
            .unwrap_or_else(|| panic!("{name} is in no list of rooms")),
    )
}

/// The rooms that a text names behind `crate::`, alone or in braces.
fn imports(text: &str) -> Vec<&str> {
    let mut rooms = Vec::new();
    for (at, _) in text.match_indices("crate::") {
        let rest = &text[at + "crate::".len()..];
        let names = match rest.strip_prefix('{') {
            Some(braces) => braces.split('}').next().unwrap_or_default(),
            None => rest.split(|c: char| !(c.is_alphanumeric() || c == '_')).next().unwrap_or_default(),
        };
        rooms.extend(names.split(',').map(|name| name.trim().split("::").next().unwrap_or_default()));
    }
    rooms
}

#[test]
fn imports_point_down_the_list_of_rooms() {
    for (path, text) in sources("src") {
        let Some(room) = room_of(&path) else { continue };
        for import in imports(&text) {
            if let Some(target) = ROOMS.iter().position(|room| *room == import) {
                assert!(
                    target >= room,
                    "{}: {} imports {import}, which is above it",
                    path.display(),
                    ROOMS[room]
                );
            }
        }
    }
}

#[test]
fn the_architecture_lists_every_room_in_the_order_of_the_house_with_what_it_imports() {
    let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/ARCHITECTURE.md")).unwrap();
    let rows = text.lines().filter_map(|line| line.strip_prefix("| `src/"));
    let rows =
        rows.filter_map(|row| Some((row.split(['/', '.', '`']).next()?, row.split('|').nth(2)?.trim())));
    let rows: Vec<_> = rows.filter(|(room, _)| ROOMS.contains(room)).collect();
    assert_eq!(rows.iter().map(|(room, _)| *room).collect::<Vec<_>>(), ROOMS);
    let mut imported = vec![BTreeSet::new(); ROOMS.len()];
    for (path, text) in sources("src") {
        let Some(room) = room_of(&path) else { continue };
        let targets =
            imports(&text).into_iter().filter_map(|name| ROOMS.iter().position(|room| *room == name));
        imported[room].extend(targets.filter(|target| *target != room));
    }
    for ((room, listed), imported) in rows.into_iter().zip(imported) {
        let names: Vec<_> = imported.into_iter().map(|target| ROOMS[target]).collect();
        let names = if names.is_empty() { "nothing".to_owned() } else { names.join(", ") };
        assert_eq!(listed, names, "what {room} imports");
    }
    assert!(text.lines().count() <= 300, "ARCHITECTURE.md has more than 300 lines");
}

#[test]
fn pure_rooms_have_no_runtime_no_network_no_clock_and_no_environment() {
    for (path, text) in sources("src") {
        let Some(room) = room_of(&path).filter(|room| PURE.contains(&ROOMS[*room])) else { continue };
        for word in [
            "tokio",
            "reqwest",
            "std::net::Tcp",
            "Utc::now",
            "SystemTime",
            "Instant::now",
            "std::env",
            "std::fs",
        ] {
            let mut code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
            assert!(
                !code.any(|line| line.contains(word)),
                "{}: {} is pure, and names {word}",
                path.display(),
                ROOMS[room]
            );
        }
    }
}

#[test]
fn no_file_is_longer_than_500_lines() {
    for (path, text) in sources("src").into_iter().chain(sources("tests")) {
        let lines = text.lines().count();
        assert!(lines <= LONGEST, "{} has {lines} lines", path.display());
    }
}

fn text_of(file: &str) -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(file)).unwrap_or_default()
}

/// The rows of the table whose first column has this heading, each by its cells.
fn table<'a>(text: &'a str, heading: &str) -> Vec<Vec<&'a str>> {
    let begin = format!("| {heading} |");
    let rows = text.lines().skip_while(|line| !line.starts_with(&begin)).skip(2);
    let rows = rows.take_while(|line| line.starts_with('|'));
    rows.map(|row| row.trim_matches('|').split(" | ").map(str::trim).collect()).collect()
}

/// Whether a file has a function of this name that runs as a test.
fn has_test(file: &str, name: &str) -> bool {
    let (text, begins) = (text_of(file), [format!("fn {name}("), format!("async fn {name}(")]);
    let lines: Vec<_> = text.lines().map(str::trim).collect();
    let Some(at) = lines.iter().position(|line| begins.iter().any(|begin| line.starts_with(begin))) else {
        return false;
    };
    let above = lines[..at].iter().rev().take_while(|line| line.starts_with("#[") || line.starts_with("//"));
    let above: Vec<_> = above.collect();
    above.iter().any(|line| **line == "#[test]" || line.starts_with("#[tokio::test"))
        && !above.iter().any(|line| line.starts_with("#[ignore"))
}

/// Whether the Makefile has a rule for a target.
fn has_target(name: &str) -> bool {
    let rule = |line: &str| {
        line.strip_prefix(name)?.strip_prefix(':').map(|rest| !before_comment(rest).contains('='))
    };
    text_of("Makefile").lines().filter_map(rule).any(|is_rule| is_rule)
}

fn before_comment(line: &str) -> &str {
    line.split('#').next().unwrap_or_default()
}

/// Whether what a document calls a test is one: `make TARGET`, `src/FILE.rs::FUNCTION`, or `MODULE::FUNCTION` of tests/it/.
fn is_a_test(name: &str) -> bool {
    if let Some(target) = name.strip_prefix("make ") {
        return has_target(target);
    }
    let Some((file, function)) = name.rsplit_once("::") else { return false };
    if file.starts_with("src/") {
        return has_test(file, function);
    }
    has_test(&format!("tests/it/{}.rs", file.replace("::", "/")), function)
}

/// Each row names tests in its last cell, and those are there.
fn name_tests(rows: Vec<Vec<&str>>) {
    for row in rows {
        let named: Vec<_> = row.last().unwrap().split('`').skip(1).step_by(2).collect();
        assert!(!named.is_empty(), "no test: {row:?}");
        for name in named {
            assert!(is_a_test(name), "{name} is no test: {row:?}");
        }
    }
}

#[test]
fn what_is_no_test_is_not_taken_for_one() {
    for (name, wanted) in [
        ("tidy::what_is_no_test_is_not_taken_for_one", true),
        ("src/api/caller.rs::a_route_that_does_not_ask_whether_its_caller_may_answers_nobody", true),
        ("authority::audit::who_did_what_to_which_job_is_told_and_no_secret_is", true),
        // Of a property, within a macro.
        ("src/cli/harmless.rs::nothing_that_a_terminal_obeys_is_left", true),
        ("make lint", true),
        ("make fuzz", true),
        ("make nothing", false),
        // A file, and a module's whole.
        ("src/api/caller.rs", false),
        ("hostile::\u{2026}", false),
        // Functions that are no tests, and one that is not there.
        ("tidy::is_a_test", false),
        ("src/api/caller.rs::hidden", false),
        ("src/api/caller.rs::a_route", false),
        ("nowhere::at_all", false),
    ] {
        assert_eq!(is_a_test(name), wanted, "{name}");
    }
}

#[test]
fn every_threat_of_the_security_policy_names_tests_that_are_there() {
    let policy = text_of("SECURITY.md");
    let rows = table(&policy, "threat");
    assert!(rows.len() > 15, "no table of threats");
    name_tests(rows);
}

#[test]
fn each_of_the_ten_risks_of_ci_systems_names_tests_that_are_there() {
    let policy = text_of("SECURITY.md");
    let rows = table(&policy, "risk");
    let risks: Vec<_> = rows.iter().filter_map(|row| row[0].split_once(':')).map(|(risk, _)| risk).collect();
    assert_eq!(risks, (1..=10).map(|number| format!("CICD-SEC-{number}")).collect::<Vec<_>>());
    name_tests(rows);
}

#[test]
fn every_dependency_is_one_of_the_registry_whose_bytes_are_known() {
    for file in ["Cargo.lock", "fuzz/Cargo.lock"] {
        let text = text_of(file);
        let packages: Vec<_> = text.split("[[package]]").skip(1).collect();
        assert!(packages.len() > 100, "{file}");
        for package in packages {
            let is_ours = ["nomad-build", "nomad-build-fuzz"].iter().any(|name| {
                package.contains(&format!("name = \"{name}\"\n")) && !package.contains("\nsource = ")
            });
            let is_known = package
                .contains("\nsource = \"registry+https://github.com/rust-lang/crates.io-index\"\n")
                && package.contains("\nchecksum = \"");
            assert!(is_ours || is_known, "{file}: {package}");
        }
    }
}

/// Every package of a lock file, as its name and its version.
fn locked(file: &str) -> BTreeSet<String> {
    let text = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(file)).unwrap();
    let lines: Vec<_> = text.lines().collect();
    let packages = lines.iter().zip(lines.iter().skip(1)).filter(|(name, _)| name.starts_with("name = "));
    packages.map(|(name, version)| format!("{name} {version}")).collect()
}

#[test]
fn what_is_fuzzed_is_made_of_what_is_shipped() {
    let (shipped, fuzzed) = (locked("Cargo.lock"), locked("fuzz/Cargo.lock"));
    assert!(fuzzed.len() > 100, "{fuzzed:?}");
    let own = ["arbitrary", "libfuzzer-sys", "nomad-build-fuzz"];
    let is_own = |package: &&String| own.iter().any(|own| package.starts_with(&format!("name = \"{own}\"")));
    let other: Vec<_> = fuzzed.difference(&shipped).filter(|package| !is_own(package)).collect();
    assert!(other.is_empty(), "copy Cargo.lock to fuzz/ and run cargo metadata there: {other:#?}");
}
