//! Prometheus' text format, as promtool reads it.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::process::{Command, Stdio};
use std::sync::Arc;

use nomad_build::telemetry::{Archived, Leftover, Share, Telemetry};

use crate::support::{Api, Namespace, Service, eventually, tool, world};

/// Has promtool check a text; returns the families in it.
pub(super) fn check(text: &str) -> BTreeSet<&str> {
    let promtool = Command::new(tool("promtool"))
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut promtool = promtool.unwrap();
    promtool.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    let found = promtool.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&found.stdout) + String::from_utf8_lossy(&found.stderr);
    assert!(found.status.success(), "{said}\n{text}");
    text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next()).collect()
}

/// The value of each label of each sample.
pub(super) fn label_values(text: &str) -> impl Iterator<Item = &str> {
    let samples = text.lines().filter(|line| !line.starts_with('#'));
    // `name{a="x",b="y"} 1`
    samples.flat_map(|line| line.split('"').skip(1).step_by(2))
}

#[tokio::test]
async fn promtool_and_the_readme_know_every_metric() {
    // The only service of its namespace is the one on duty there.
    let (world, namespace) = (world(), Namespace::new());
    let variables = [("NOMAD_BUILD_NAMESPACES", namespace.0.as_str())];
    let service = Service::start(&world.nomad, &world.registry, &variables);
    let repository = world.repository("RUN true");
    let served = eventually("what the replica on duty counts", async || {
        Api::new(&service.url).run(&world.job(&repository)).await;
        let text = reqwest::get(format!("{}/metrics", service.url)).await.unwrap().text().await.unwrap();
        text.contains("nomad_build_phase_duration_seconds_count{").then_some(text)
    })
    .await;
    // What happens to few services.
    let telemetry = Arc::new(Telemetry::new().unwrap());
    telemetry.watch_broken("jobs", &std::fmt::Error);
    telemetry.corrected("jobs", 1);
    telemetry.leftovers_removed(Leftover::Ledger, 1);
    telemetry.archived(Archived::Written);
    let share = Share::new(Arc::clone(&telemetry));
    share.set_reports(true);
    share.leftovers(Leftover::Ledger, 1);
    let rare = telemetry.text().unwrap();
    // Of a counter that appears at its first event, nobody sees an increase.
    for begun in [
        "nomad_build_watch_reconnects_total{part=\"ledger\"} 0",
        "nomad_build_jobs_total{status=\"LOST\"} 0",
        "nomad_build_leftovers_removed_total{kind=\"images\"} 0",
        "nomad_build_archived_jobs_total{result=\"failed\"} 0",
    ] {
        assert!(rare.lines().any(|line| line == begun), "{begun}: {rare}");
    }
    let (own, of_the_process): (BTreeSet<_>, BTreeSet<_>) =
        check(&served).union(&check(&rare)).copied().partition(|name| name.starts_with("nomad_build_"));
    assert!(of_the_process.iter().all(|name| name.starts_with("process_")), "{of_the_process:?}");
    let readme = include_str!("../../../README.md").lines();
    let told = readme.filter_map(|line| line.strip_prefix("| `nomad_build_")?.split('`').next());
    let told: BTreeSet<_> = told.map(|name| format!("nomad_build_{name}")).collect();
    assert!(told.iter().map(String::as_str).eq(own.iter().copied()), "{told:?}\n{own:?}");
}
