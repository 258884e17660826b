//! `phase`: what runs as a task of the Nomad job. Not for people.

use super::{Error, Exit};
use crate::{environment, runner};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// build, test, publish, finish or sweep
    name: String,
}

/// Runs one task of a job.
pub(super) fn run(args: &Args) -> Result<Exit, Error> {
    let doing = || Error::new(Exit::Failure, format!("running the task {}", args.name));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.map_err(|source| doing().caused_by(source))?;
    let done = runtime.block_on(runner::run(&args.name, &environment::process));
    // What a blocking thread still does is cut: everything that counts was waited for.
    runtime.shutdown_background();
    match done.map_err(|source| doing().caused_by(source))? {
        runner::Ended::Well => Ok(Exit::Success),
        runner::Ended::Badly => Ok(Exit::Failure),
    }
}
