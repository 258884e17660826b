//! `status`: where a job stands.

use chrono::Utc;

use super::client::{Client, read_status};
use super::fields::JobId;
use super::follow::exit_of;
use super::{Error, Exit, Format, Globals, Output, report};

/// The arguments of `status`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The job
    #[arg(value_name = "ID")]
    job: JobId,
    /// End with the job's exit code, or with 9 while it has not ended
    #[arg(long)]
    exit_code: bool,
}

/// Prints the job's phases, image and failure.
pub(super) async fn run(args: Args, globals: &Globals, output: &mut Output) -> Result<Exit, Error> {
    let data = Client::new(globals)?.status(&args.job).await?;
    let status = read_status(&data)?;
    match output.format() {
        Format::Json => output.json(&data)?,
        Format::Text => output.write(&report::table(&status, Utc::now(), output.paint_stdout()))?,
    }
    Ok(if args.exit_code { exit_of(&status) } else { Exit::Success })
}
