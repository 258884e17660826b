//! `cleanup`: removes what an ended job left behind.

use reqwest::Method;

use super::client::{Client, read};
use super::fields::JobId;
use super::wire::Done;
use super::{Error, Exit, Format, Globals, Output};

/// The arguments of `cleanup`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The job
    #[arg(value_name = "ID")]
    job: JobId,
}

/// Cleans up after the job; one that still lives has to be killed first.
pub(super) async fn run(args: Args, globals: &Globals, output: &mut Output) -> Result<Exit, Error> {
    let client = Client::new(globals)?;
    let job = args.job.as_str();
    let doing = format!("cleaning up after {job} at {}", client.base());
    let data = client.call(&doing, Method::POST, client.url(&["jobs", job, "cleanup"], &[]), None).await?;
    let done: Done = read("the clean-up", &data)?;
    if output.format() == Format::Json {
        output.json(&data)?;
    }
    if !done.success {
        let why = done.reason.unwrap_or_else(|| "the service gives no reason".to_owned());
        return Err(Error::new(Exit::Failure, format!("{job} is not cleaned up")).caused_by(why));
    }
    output.note(&format!("cleaned up after {job}"));
    Ok(Exit::Success)
}
