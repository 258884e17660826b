//! `completions`: a shell's completion script.

use clap::CommandFactory;
use clap_complete::Shell;

use super::{Cli, Error, Exit, Output};

/// The arguments of `completions`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The shell
    #[arg(value_enum)]
    shell: Shell,
}

/// Prints the script.
pub(super) fn run(args: &Args, output: &mut Output) -> Result<Exit, Error> {
    // Collected first: the generator panics on a pipe that is closed.
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "nomad-build", &mut script);
    output.write(&String::from_utf8_lossy(&script))?;
    Ok(Exit::Success)
}
