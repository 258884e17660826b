//! `kill`: stops a job.

use reqwest::Method;

use super::client::{Client, read};
use super::fields::JobId;
use super::wire::Done;
use super::{Error, Exit, Format, Globals, Output};

/// The arguments of `kill`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The job
    #[arg(value_name = "ID")]
    job: JobId,
}

/// Kills the job, or says why it can no longer be killed.
pub(super) async fn run(args: Args, globals: &Globals, output: &mut Output) -> Result<Exit, Error> {
    let client = Client::new(globals)?;
    let job = args.job.as_str();
    let doing = format!("killing {job} at {}", client.base());
    let data = client.call(&doing, Method::POST, client.url(&["jobs", job, "kill"], &[]), None).await?;
    let done: Done = read("the kill", &data)?;
    if output.format() == Format::Json {
        output.json(&data)?;
    }
    if !done.success {
        let why = done.reason.unwrap_or_else(|| "the service gives no reason".to_owned());
        return Err(Error::new(Exit::Failure, format!("{job} is not killed")).caused_by(why));
    }
    output.note(&format!("killed {job}"));
    Ok(Exit::Success)
}
