//! Test: each test in a fresh container of exactly the built image, in order, until the first failure.

use std::time::Instant;

use super::build::engine_failure;
use super::{Failure, Runner, Work, removal};
use crate::engine::{Engine as _, Exit, RunCommand, RunRequest};
use crate::job::{Outcome, Phase, Reason};

/// The kernel takes no fewer.
const LEAST_SHARES: i64 = 2;

impl Runner {
    pub(super) async fn test(&self, begun: Outcome) -> Work {
        match self.within_limits(Phase::Test, self.run_tests()).await {
            Ok(()) => Work::Done(begun),
            Err(interrupted) => interrupted.into_work(begun),
        }
    }

    async fn run_tests(&self) -> Result<(), Failure> {
        let spec = &self.payload.spec;
        let image = self.tested_image().await?;
        let commands = spec.test_commands.iter().map(|command| (command.as_str(), Some(command)));
        let entry_point = spec.test_entry_point.then_some(("the image's own entry point", None));
        let tests: Vec<_> = commands.chain(entry_point).collect();
        for (index, (name, command)) in tests.iter().enumerate() {
            let what = format!("test {} of {}", index + 1, tests.len());
            self.log.say(&format!("==> {what}: {name}")).await;
            let command =
                command.map_or(RunCommand::EntryPoint, |command| RunCommand::Shell(command.clone()));
            self.run_test(&what, &image, command).await?;
        }
        Ok(())
    }

    async fn run_test(&self, what: &str, image: &str, command: RunCommand) -> Result<(), Failure> {
        let (spec, isolation) = (&self.payload.spec, &self.payload.policy.isolation);
        let request = RunRequest {
            name: removal::container_name(&self.around.job),
            image: image.to_owned(),
            command,
            env: spec.test_env.clone(),
            labels: self.around.container_labels.clone(),
            memory_bytes: i64::from(spec.resources.test.memory_mb) << 20,
            // Nomad's docker driver takes MHz for shares, too.
            cpu_shares: i64::from(spec.resources.test.cpu).max(LEAST_SHARES),
            pids: i64::from(isolation.max_pids),
            network: isolation.test_network,
        };
        let began = Instant::now();
        let exit = self.log.with_output(|output| self.engine.run(request, output)).await;
        let exit = exit.map_err(|error| engine_failure(&error, Reason::TestFailed))?;
        let seconds = began.elapsed().as_secs_f64();
        if exit.code == 0 {
            self.log.say(&format!("<== {what}: passed in {seconds:.1} s")).await;
            return Ok(());
        }
        let ended = how(exit);
        self.log.say(&format!("<== {what}: failed after {seconds:.1} s with {ended}")).await;
        let message = format!("{what} ended with {ended}");
        Err(Failure { exit_code: Some(exit.code), ..Failure::new(Reason::TestFailed, message) })
    }

    /// The ID of the image that the build phase of this job made.
    pub(super) async fn tested_image(&self) -> Result<String, Failure> {
        let progress = self.around.ledger.progress(&self.around.job).await;
        let (_, progress) = progress.map_err(|error| Failure::of(Reason::Internal, &error))?;
        let image = progress.of(Phase::Build).and_then(|outcome| outcome.image_id.clone());
        image.ok_or_else(|| Failure::new(Reason::Internal, "the build phase left no image"))
    }
}

/// How a test failed, and what can be done about it.
fn how(exit: Exit) -> String {
    let hint = match exit {
        Exit { out_of_memory: true, .. } => {
            ": something in it was killed for lack of memory; raise resources.test.memory_mb"
        }
        // SIGKILL. Engines lose word of what the kernel killed: of 160 containers, eight at once, 19.
        Exit { code: 137, .. } => {
            ": it was killed, most likely for lack of memory; if so, raise resources.test.memory_mb"
        }
        Exit { .. } => "",
    };
    format!("exit code {}{hint}", exit.code)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kill_for_lack_of_memory_says_what_to_raise() {
        assert_eq!(how(Exit { code: 3, out_of_memory: false }), "exit code 3");
        let killed = how(Exit { code: 137, out_of_memory: true });
        assert!(killed.starts_with("exit code 137: ") && killed.ends_with("raise resources.test.memory_mb"));
        let perhaps = how(Exit { code: 137, out_of_memory: false });
        assert!(perhaps.contains("most likely") && perhaps.ends_with("raise resources.test.memory_mb"));
    }
}
