//! Jobs with a phase that lasts until it is ended from outside.

use serde_json::{Value, json};

use super::engine::end_sleep;
use super::{Api, Repository, eventually, processes_with, unique_seconds, world};

/// A command that lasts until it is let go, and succeeds then: however slow the machine is, what is to happen while
/// it runs does.
pub(crate) struct Hold(String);

impl Hold {
    pub(crate) fn new() -> Self {
        Self(unique_seconds())
    }

    /// For `/bin/sh -c`.
    pub(crate) fn command(&self) -> String {
        format!("sleep {} || true", self.0)
    }

    /// Ends it once it has begun.
    pub(crate) async fn let_go(&self) {
        eventually("the command runs", async || end_sleep(&self.0).then_some(())).await;
    }
}

pub(crate) struct Sleeper {
    pub(crate) job: Value,
    seconds: String,
    // It is there as long as this value.
    _repository: Repository,
}

impl Sleeper {
    /// A job that sleeps in `phase`: `build` or `test`.
    pub(crate) fn in_phase(phase: &str) -> Self {
        let seconds = unique_seconds();
        let sleep = format!("sleep {seconds}");
        let step = if phase == "build" { format!("RUN {sleep}") } else { String::new() };
        let repository = world().repository(&step);
        let mut job = world().job(&repository);
        job["test_commands"] = json!([sleep]);
        Self { job, seconds, _repository: repository }
    }

    /// Submits the job, and waits until it sleeps; its ID.
    pub(crate) async fn submit(&self, api: &Api) -> String {
        let id = api.submit(&self.job).await;
        eventually("the job sleeps", async || self.sleeps().then_some(())).await;
        id
    }

    /// Whether its sleep runs, inside of a container or not.
    pub(crate) fn sleeps(&self) -> bool {
        !processes_with(&self.seconds).is_empty()
    }

    pub(crate) async fn is_stopped(&self) {
        eventually("the sleep is stopped", async || (!self.sleeps()).then_some(())).await;
    }
}
