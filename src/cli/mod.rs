//! The command line: one file a command.
//!
//! Invariant: client commands speak HTTP to the service and nothing else; none of them talks to Nomad.
//! Invariant: data goes to stdout, everything else to stderr, and a reader that goes away ends the program quietly.
//! Invariant: text that others wrote (logs, messages, answers) never reaches a terminal as anything but text.

mod again;
mod client;
mod completions;
mod dev;
mod doctor;
mod error;
mod exit;
mod fields;
mod follow;
mod harmless;
mod lines;
mod list;
mod login;
mod logs;
mod order;
mod output;
mod phase;
mod report;
mod screen;
mod serve;
mod status;
mod stream;
mod submission;
mod submit;
mod tokens;
mod validate;
mod version;
mod wire;

use std::future::Future;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand, ValueEnum};
use secrecy::SecretString;

pub(crate) use error::Error;
pub(crate) use exit::Exit;
#[cfg(feature = "fuzz")]
pub(crate) use harmless::fuzz_terminal;
pub(crate) use output::Output;

/// A build service for HashiCorp Nomad: a repository becomes a tested, published image.
#[derive(Debug, Parser)]
#[command(name = "nomad-build", version, after_help = exit::HELP, max_term_width = 100)]
pub(crate) struct Cli {
    #[command(flatten)]
    globals: Globals,
    #[command(subcommand)]
    command: Command,
}

/// What every command that asks the service knows.
#[derive(Debug, clap::Args)]
pub(crate) struct Globals {
    /// Where the service is
    #[arg(long, global = true, env = "NOMAD_BUILD_URL", default_value = "http://127.0.0.1:8080")]
    url: String,
    /// PEM file of the authorities that the service's certificate must be of, where it is no public one
    #[arg(long, global = true, env = "NOMAD_BUILD_CACERT", value_name = "FILE")]
    cacert: Option<PathBuf>,
    /// PEM file of the certificate to show to a service that asks for one; needs --client-key and --cacert
    #[arg(long, global = true, env = "NOMAD_BUILD_CLIENT_CERT", value_name = "FILE")]
    client_cert: Option<PathBuf>,
    /// PEM file of its key
    #[arg(long, global = true, env = "NOMAD_BUILD_CLIENT_KEY", value_name = "FILE")]
    client_key: Option<PathBuf>,
    /// What stdout carries: text for people, or the service's data as JSON
    #[arg(long = "output", short = 'o', global = true, value_enum, default_value_t = Format::Text)]
    format: Format,
    /// Whether colours are off, by this flag.
    #[arg(long, global = true, help = "No colours, neither ours nor those of a log [env: NO_COLOR]")]
    no_color: bool,
    /// Any value but an empty one counts (no-color.org), which a boolean flag cannot say.
    #[arg(long, global = true, hide = true, env = "NO_COLOR", hide_env_values = true)]
    no_color_environment: Option<String>,
    /// Sent as X-Nomad-Token. Meant for the environment: arguments can be read by every user of a machine.
    #[arg(long, global = true, hide = true, env = "NOMAD_TOKEN", hide_env_values = true)]
    nomad_token: Option<SecretString>,
}

/// What stdout carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// The service's data, verbatim; a message a line where a job is followed.
    Json,
    /// Text for people.
    Text,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Submit a build and print its job ID
    Submit(submit::Args),
    /// Log in by an identity provider, for the commands after this one
    Login(login::Args),
    /// Forget a login
    Logout,
    /// List the latest jobs
    List(list::Args),
    /// Show where a job stands
    Status(status::Args),
    /// Print a job's log, or follow it live
    Logs(logs::Args),
    /// Stop a job, unless it has already begun to publish
    Kill(order::Args),
    /// Remove what an ended job left behind
    Cleanup(order::Args),
    /// Ask the service whether it would take a submission, without submitting it
    Validate(validate::Args),
    /// Look for what keeps the service, its Nomad or a node from working
    #[command(
        after_help = "It reads the variables that `serve` reads. It ends with 1 where something keeps builds from working."
    )]
    Doctor(doctor::Args),
    /// Serve the API
    #[command(after_help = serve::help())]
    Serve(serve::Args),
    Dev(dev::Args),
    #[command(hide = true)]
    DevSupervise(dev::SuperviseArgs),
    /// Run a task of a job (Nomad does this)
    #[command(hide = true)]
    Phase(phase::Args),
    /// Print the version
    Version,
    /// Print the completion script of a shell
    Completions(completions::Args),
}

impl Globals {
    /// Whether our own output and a log may be coloured at all; a terminal is asked for beside it.
    fn colours(&self) -> bool {
        !self.no_color && self.no_color_environment.as_ref().is_none_or(String::is_empty)
    }
}

/// Runs the command line of this process and says how it ended.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(refusal) => return usage(&refusal),
    };
    // Refused only where a provider is installed already, which is as good.
    rustls::crypto::aws_lc_rs::default_provider().install_default().ok();
    let mut output = Output::new(cli.globals.format, cli.globals.colours());
    match dispatch(cli, &mut output) {
        Ok(exit) => exit.into(),
        Err(error) => error.report(&output).into(),
    }
}

fn dispatch(cli: Cli, output: &mut Output) -> Result<Exit, Error> {
    let globals = cli.globals;
    match cli.command {
        Command::Submit(args) => block_on(submit::run(args, &globals, output)),
        Command::Login(args) => block_on(login::run(args, &globals, output)),
        Command::Logout => login::log_out(&globals, output),
        Command::List(args) => block_on(list::run(args, &globals, output)),
        Command::Status(args) => block_on(status::run(args, &globals, output)),
        Command::Logs(args) => block_on(logs::run(args, &globals, output)),
        Command::Kill(args) => block_on(order::give(&order::KILL, args, &globals, output)),
        Command::Cleanup(args) => block_on(order::give(&order::CLEANUP, args, &globals, output)),
        Command::Validate(args) => block_on(validate::run(args, &globals, output)),
        Command::Doctor(args) => block_on(doctor::run(args, output)),
        Command::Serve(args) => serve::run(&args),
        Command::Dev(args) => on_threads(dev::run(args)),
        Command::DevSupervise(args) => on_threads(dev::supervise(args)),
        Command::Phase(args) => phase::run(&args),
        Command::Version => version::run(output),
        Command::Completions(args) => completions::run(&args, output),
    }
}

/// Runs a client command. One thread is enough for one conversation.
fn block_on<F: Future<Output = Result<Exit, Error>>>(command: F) -> Result<Exit, Error> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|source| Error::new(Exit::Failure, "starting the asynchronous runtime").caused_by(source))?
        .block_on(command)
}

/// Runs a command that does several things at once.
fn on_threads<F: Future<Output = Result<Exit, Error>>>(command: F) -> Result<Exit, Error> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|source| Error::new(Exit::Failure, "starting the asynchronous runtime").caused_by(source))?
        .block_on(command)
}

/// Help and versions are data and go to stdout, a wrong usage goes to stderr: clap knows which is which.
fn usage(refusal: &clap::Error) -> ExitCode {
    // Nobody is left to tell where even this cannot be written.
    refusal.print().ok();
    if refusal.use_stderr() { Exit::Usage.into() } else { Exit::Success.into() }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_arguments_fit_together() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_token_is_shown_neither_in_help_nor_in_debug_output() {
        let cli = Cli::try_parse_from(["nomad-build", "--nomad-token", "s3cret", "version"]).unwrap();
        assert!(!format!("{cli:?}").contains("s3cret"));
        let help = Cli::command().render_long_help().to_string();
        assert!(!help.to_lowercase().contains("token"), "{help}");
    }

    #[test]
    fn the_help_lists_every_exit_code() {
        let help = Cli::command().render_help().to_string();
        for exit in Exit::ALL {
            assert!(help.contains(&format!("{:>3}  ", exit.code())), "{exit:?} in {help}");
        }
    }
}
