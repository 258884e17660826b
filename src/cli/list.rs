//! `list`: which jobs there are.

use reqwest::Method;

use super::client::{Client, read};
use super::report::colour_of;
use super::wire::{Listed, ListedJob};
use super::{Error, Exit, Format, Globals, Output, harmless};

/// The most jobs that the service tells at once.
const PAGE: usize = 1000;

/// The arguments of `list`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Only jobs of this namespace
    #[arg(long)]
    namespace: Option<String>,
    /// Only jobs of this owner
    #[arg(long)]
    owner: Option<String>,
    /// Only jobs of this repository
    #[arg(long, visible_alias = "repo", value_name = "URL")]
    repo_url: Option<String>,
    /// Only jobs of this ref
    #[arg(long, visible_alias = "ref", value_name = "REF")]
    git_ref: Option<String>,
    /// Only jobs with this status, or one of these, separated by commas
    #[arg(long)]
    status: Option<String>,
    /// How many, the latest ones
    #[arg(long, default_value_t = 20, value_name = "NUMBER")]
    limit: usize,
}

/// Prints the latest jobs, the newest first: a line each, or the service's answers, one a line.
pub(super) async fn run(args: Args, globals: &Globals, output: &mut Output) -> Result<Exit, Error> {
    let client = Client::new(globals)?;
    let doing = format!("asking {} for its jobs", client.base());
    let filters = [
        ("namespace", args.namespace),
        ("owner", args.owner),
        ("repo_url", args.repo_url),
        ("git_ref", args.git_ref),
        ("status", args.status.map(|text| text.to_uppercase())),
    ];
    let filters: Vec<_> =
        filters.iter().filter_map(|(name, value)| Some((*name, value.as_deref()?))).collect();
    let (mut left, mut before) = (args.limit, None::<String>);
    while left > 0 {
        let limit = left.min(PAGE).to_string();
        let mut query = filters.clone();
        query.push(("limit", &limit));
        query.extend(before.as_deref().map(|before| ("before", before)));
        let data = client.call(&doing, Method::GET, client.url(&["jobs"], &query), None).await?;
        let Listed { jobs, next } = read("the question which jobs there are", &data)?;
        match output.format() {
            Format::Json => output.json(&data)?,
            Format::Text => {
                for job in &jobs {
                    output.line(&line(job, output))?;
                }
            }
        }
        left = left.saturating_sub(jobs.len());
        match next {
            Some(next) if !jobs.is_empty() => before = Some(next),
            _ => break,
        }
    }
    Ok(Exit::Success)
}

fn line(job: &ListedJob, output: &Output) -> String {
    let clean = |text: &str| harmless::text(text).into_owned();
    let status = format!("{:<10}", clean(&job.status));
    let status = output.paint_stdout().text(colour_of(&job.status), &status);
    let start = job.job_start.as_deref().map_or_else(|| format!("{:<24}", "-"), clean);
    let source = [Some(&job.repo_url), job.git_ref.as_ref(), job.reason.as_ref()];
    let source: Vec<_> = source.into_iter().flatten().map(|text| clean(text)).collect();
    format!("{}  {status}  {start}  {}  {}", clean(&job.job_id), clean(&job.owner), source.join("  "))
}
