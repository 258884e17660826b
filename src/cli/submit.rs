//! `submit`: one POST, and the job's log where it is wanted.

use serde_json::json;

use super::client::{Client, read};
use super::fields::JobId;
use super::follow::follow;
use super::stream::Wanted;
use super::submission::Submission;
use super::wire::Submitted;
use super::{Error, Exit, Format, Globals, Output};

/// The arguments of `submit`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Follow the job to its end: its log on stdout, its phases on stderr
    #[arg(long)]
    follow: bool,
    /// Let the log's control characters through to a terminal
    #[arg(long, requires = "follow")]
    raw: bool,
    /// Sent again with the same key, the submission is the same job: the build's ID in the CI system, for example
    #[arg(long, value_name = "KEY")]
    idempotency_key: Option<String>,
    #[command(flatten)]
    submission: Submission,
}

/// Submits the build; prints its job ID, or follows it.
pub(super) async fn run(args: Args, globals: &Globals, output: &mut Output) -> Result<Exit, Error> {
    let client = Client::new(globals)?;
    let body = args.submission.body()?;
    let doing = format!("submitting the build to {}", client.base());
    let data = client.submit(&doing, &body, args.idempotency_key.as_deref()).await?;
    let job = read::<Submitted>("the submission", &data)?.job_id;
    if !args.follow {
        match output.format() {
            Format::Json => output.json(&data)?,
            Format::Text => output.line(&super::harmless::text(&job))?,
        }
        return Ok(Exit::Success);
    }
    let job: JobId = job.parse().map_err(|why: String| {
        Error::new(Exit::Failure, "understanding the answer to the submission").caused_by(why)
    })?;
    if output.format() == Format::Json {
        // The stream's messages do not name the job, and who reads them has nothing else.
        output.line(&json!({ "type": "submitted", "job_id": job.as_str() }).to_string())?;
    }
    output.note(&format!("submitted {}; Ctrl-C detaches, the job goes on", job.as_str()));
    follow(&client, Wanted { job, phase: None, tail: None }, args.raw, output).await
}
