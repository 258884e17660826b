//! `submit`: one POST, and the job's log where it is wanted.

use std::time::Duration;

use backon::{ExponentialBuilder, Retryable as _};
use jiff::fmt::temporal::SpanParser;
use serde_json::value::RawValue;
use serde_json::{Value, json};
use uuid::Uuid;

use super::client::{Client, read};
use super::fields::JobId;
use super::follow::follow;
use super::stream::Wanted;
use super::submission::Submission;
use super::wire::Submitted;
use super::{Error, Exit, Format, Globals, Output, report};

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
    /// How long a service is tried that is away, or has too much to do: an ISO 8601 duration
    #[arg(long, value_name = "DURATION", default_value = "PT1M", value_parser = duration)]
    retry_for: Duration,
    #[command(flatten)]
    submission: Submission,
}

fn duration(text: &str) -> Result<Duration, String> {
    let parsed = SpanParser::new().parse_unsigned_duration(text);
    parsed.map_err(|_| "it is no ISO 8601 duration, for example PT1M".to_owned())
}

/// Sends the submission until it is answered, under one key, so that it is one job though an answer is lost.
async fn submitted(
    client: &Client,
    doing: &str,
    body: &Value,
    args: &Args,
    output: &Output,
) -> Result<Box<RawValue>, Error> {
    let own = format!("nomad-build-submit-{}", Uuid::new_v4());
    let key = args.idempotency_key.as_deref().unwrap_or(&own);
    let backoff = ExponentialBuilder::default()
        .with_min_delay(Duration::from_millis(500))
        .with_max_delay(Duration::from_secs(5))
        .with_total_delay(Some(args.retry_for))
        .without_max_times()
        .with_jitter();
    let tried = (|| client.submit(doing, body, Some(key)))
        .retry(backoff)
        .when(Error::is_passing)
        .notify(|error, _| output.note(&format!("--- {}; trying again", report::chain(error))))
        .await;
    match tried {
        // A token that Nomad does not know by an accessor has no keys.
        Err(error) if args.idempotency_key.is_none() && error.is_about(TOKEN) => {
            client.submit(doing, body, None).await
        }
        // It may have been taken, and only the answers lost.
        Err(error) if error.is_passing() => Err(error.hint(format!(
            "sent again with --idempotency-key {key} it is the same job, if there is one already"
        ))),
        tried => tried,
    }
}

/// What the service calls the token, where it refuses a key because of it.
const TOKEN: &str = "X-Nomad-Token";

/// Submits the build; prints its job ID, or follows it.
pub(super) async fn run(args: Args, globals: &Globals, output: &mut Output) -> Result<Exit, Error> {
    let client = Client::new(globals)?;
    let body = args.submission.body()?;
    let doing = format!("submitting the build to {}", client.base());
    let data = submitted(&client, &doing, &body, &args, output).await?;
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
    let wanted = Wanted { job, phase: None, tail: None, cursor: None };
    follow(&client, globals, wanted, args.raw, output).await
}
