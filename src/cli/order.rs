//! `kill` and `cleanup`: orders about one job, which the service carries out, or not and why.

use reqwest::Method;

use super::client::{Client, read};
use super::fields::JobId;
use super::wire::Done;
use super::{Error, Exit, Format, Globals, Output};

/// The arguments of an order.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The job
    #[arg(value_name = "ID")]
    job: JobId,
}

/// An order, and how it is spoken of.
pub(super) struct Order {
    /// The last part of its path.
    pub(super) path: &'static str,
    /// "killing", before the job's ID.
    pub(super) doing: &'static str,
    /// "killed", before the job's ID.
    pub(super) done: &'static str,
    /// "is not killed", after the job's ID.
    pub(super) refused: &'static str,
}

/// Stops a job, unless it has already begun to publish.
pub(super) const KILL: Order =
    Order { path: "kill", doing: "killing", done: "killed", refused: "is not killed" };

/// Removes what a job left behind; one that still lives has to be killed first.
pub(super) const CLEANUP: Order = Order {
    path: "cleanup",
    doing: "cleaning up after",
    done: "cleaned up after",
    refused: "is not cleaned up",
};

/// Gives the order, and says what came of it.
pub(super) async fn give(
    order: &Order,
    args: Args,
    globals: &Globals,
    output: &mut Output,
) -> Result<Exit, Error> {
    let client = Client::new(globals)?;
    let job = args.job.as_str();
    let doing = format!("{} {job} at {}", order.doing, client.base());
    let url = client.url(&["jobs", job, order.path], &[]);
    let data = client.call(&doing, Method::POST, url, None).await?;
    let done: Done = read(order.path, &data)?;
    if output.format() == Format::Json {
        output.json(&data)?;
    }
    if !done.success {
        let why = done.reason.unwrap_or_else(|| "the service gives no reason".to_owned());
        return Err(Error::new(Exit::Failure, format!("{job} {}", order.refused)).caused_by(why));
    }
    output.note(&format!("{} {job}", order.done));
    Ok(Exit::Success)
}
