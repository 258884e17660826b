//! `validate`: would the service take this submission?

use reqwest::Method;

use super::client::Client;
use super::submission::Submission;
use super::{Error, Exit, Format, Globals, Output};

/// The arguments of `validate`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    submission: Submission,
}

/// Asks the service for everything that is wrong with the submission; nothing is submitted.
pub(super) async fn run(args: Args, globals: &Globals, output: &mut Output) -> Result<Exit, Error> {
    let client = Client::new(globals)?;
    let body = args.submission.body()?;
    let doing = format!("validating the submission at {}", client.base());
    let url = client.url(&["jobs"], &[("dry_run", "true")]);
    let data = client.call(&doing, Method::POST, url, Some(&body)).await?;
    match output.format() {
        Format::Json => output.json(&data)?,
        Format::Text => output.line("valid")?,
    }
    Ok(Exit::Success)
}
