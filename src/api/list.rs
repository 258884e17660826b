//! Which jobs there are.

use std::sync::Arc;

use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use super::App;
use super::answer::{Code, Data, Problem, milliseconds, rfc3339};
use crate::job::{JobId, Phase, Reason, Record, Status};
use crate::service::{Caller, Wanted};

/// How many jobs are told at once: where nothing is said, and at most.
const USUAL: usize = 100;
const MOST: usize = 1000;

/// What a caller may ask for. Texts, so that each one's error names its field.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ListQuery {
    namespace: Option<String>,
    owner: Option<String>,
    repo_url: Option<String>,
    git_ref: Option<String>,
    status: Option<String>,
    before: Option<String>,
    limit: Option<String>,
}

impl ListQuery {
    /// How many jobs are asked for, and which.
    fn read(self) -> Result<(usize, Wanted), Problem> {
        let Self { namespace: _, owner, repo_url, git_ref, status, before, limit } = self;
        let limit = limit.map_or(Ok(USUAL), |text| {
            let number = text.parse().ok().filter(|number| (1..=MOST).contains(number));
            number.ok_or_else(|| Problem::parameter("limit", "is not a number from 1 to 1000"))
        })?;
        let one = |text: &str| text.parse().map_err(|why: String| Problem::parameter("status", &why));
        let statuses = status.map(|text| text.split(',').map(one).collect()).transpose()?;
        let before = before.map(|text| text.parse()).transpose();
        let before = before.map_err(|_| Problem::parameter("before", "is not the ID of a job"))?;
        Ok((limit, Wanted { owner, repo_url, git_ref, statuses, before }))
    }
}

/// A job, in few words.
#[derive(Serialize)]
struct Item {
    job_id: JobId,
    namespace: String,
    owner: String,
    repo_url: String,
    git_ref: Option<String>,
    image: String,
    image_tags: Vec<String>,
    digest: Option<String>,
    status: Status,
    phase: Option<Phase>,
    reason: Option<Reason>,
    job_start: Option<String>,
    job_end: Option<String>,
}

impl From<&Record> for Item {
    fn from(record: &Record) -> Self {
        let labels = &record.labels;
        Self {
            job_id: record.id.clone(),
            namespace: record.nomad.namespace.clone(),
            owner: labels.owner.clone(),
            repo_url: labels.repo_url.clone(),
            git_ref: record.git.reference.clone().or_else(|| labels.git_ref.clone()),
            image: labels.image.clone(),
            image_tags: labels.tags.clone(),
            digest: record.image.digest.clone(),
            status: record.status,
            phase: record.phase,
            reason: record.failure.as_ref().map(|failure| failure.reason),
            job_start: milliseconds(record.timestamps.job_start),
            job_end: milliseconds(record.timestamps.job_end),
        }
    }
}

#[derive(Serialize)]
pub(super) struct Listed {
    jobs: Vec<Item>,
    /// What to ask for next, as `before`; none where there are no more.
    next: Option<JobId>,
    #[serde(serialize_with = "rfc3339")]
    as_of: DateTime<Utc>,
}

/// `GET /jobs`
pub(super) async fn list(
    State(app): State<App>,
    caller: Caller,
    query: Result<Query<ListQuery>, QueryRejection>,
) -> Result<Data<Listed>, Problem> {
    let named = query.as_ref().ok().and_then(|Query(query)| query.namespace.as_deref());
    let tenants = app.seen_by(&caller, named).await?;
    let Query(query) = query?;
    let (limit, wanted) = query.read()?;
    // Before anything is read, which may be newer than this says, and never older.
    let as_of = tenants.iter().map(|tenant| tenant.as_of()).min().unwrap_or_else(Utc::now);
    let mut found: Vec<Arc<Record>> = Vec::new();
    for tenant in &tenants {
        // One more than is told, to know whether there is one.
        let latest = tenant.latest(&wanted, limit + 1);
        let early = || Problem::new(Code::NotReady, "the first list of jobs is not complete yet: ask again");
        found.extend(latest.ok_or_else(early)?);
    }
    found.sort_unstable_by(|one, other| other.id.cmp(&one.id));
    let is_more = found.len() > limit;
    found.truncate(limit);
    let next = found.last().filter(|_| is_more).map(|record| record.id.clone());
    Ok(Data(Listed { jobs: found.iter().map(|record| Item::from(&**record)).collect(), next, as_of }))
}
