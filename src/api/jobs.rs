//! Submitting, reading, killing and cleaning up jobs.

use axum::Extension;
use axum::extract::rejection::QueryRejection;
use axum::extract::{FromRequest, FromRequestParts, Path, Query, Request, State};
use axum::http::HeaderMap;
use axum::http::header::AGE;
use axum::http::request::Parts;
use axum::response::{IntoResponse, Response};
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::App;
use super::answer::{Code, Data, Problem, milliseconds, rfc3339};
use super::audit::{About, DryRun};
use super::body::Sent;
use crate::job::{
    Failure, FieldError, Git, IdempotencyKey, Image, Invalid, InvalidKey, JobId, Location, Phase, Record,
    Status, Timestamps, take_text,
};
use crate::nomad::Capability;
use crate::service::{Caller, Killed};

/// A job ID from a path. What is none cannot be the ID of a job: 404, not 400.
pub(super) struct Id(pub(super) JobId);

impl<S: Send + Sync> FromRequestParts<S> for Id {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        // A path that is no UTF-8 is no ID either.
        let text = Path::<String>::from_request_parts(parts, state).await.ok();
        let unknown = "there is no such job: a job ID is \"nb-\" and a lower-case UUID";
        text.and_then(|Path(text)| text.parse().ok())
            .map(Self)
            .ok_or_else(|| Problem::new(Code::JobNotFound, unknown))
    }
}

/// The key that makes sending a submission again harmless.
fn idempotency_key(headers: &HeaderMap) -> Result<Option<IdempotencyKey>, FieldError> {
    const NAME: &str = "Idempotency-Key";
    let wrong = |message: String| FieldError { field: NAME.to_owned(), message };
    let mut values = headers.get_all(NAME).iter();
    let Some(value) = values.next() else { return Ok(None) };
    if values.next().is_some() {
        return Err(wrong("was sent twice".to_owned()));
    }
    let key = value.to_str().map_err(|_| InvalidKey).and_then(str::parse);
    key.map(Some).map_err(|error| wrong(error.to_string()))
}

/// Runs what must not stop half-way when its caller goes away.
#[expect(clippy::disallowed_methods, reason = "it is waited for, and goes on where its caller hangs up")]
async fn to_its_end<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> Result<T, Problem> {
    tokio::spawn(work)
        .await
        .map_err(|_| Problem::new(Code::Internal, "the request was aborted inside the service"))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SubmitQuery {
    #[serde(default)]
    dry_run: bool,
}

/// The body of a submission: the namespace that it names, and the rest.
pub(super) struct Body {
    namespace: Result<Option<String>, FieldError>,
    job: Value,
}

impl FromRequest<App> for Body {
    type Rejection = Problem;

    async fn from_request(request: Request, app: &App) -> Result<Self, Problem> {
        let (mut head, body) = request.into_parts();
        let caller = Caller::from_request_parts(&mut head, app).await?;
        // What is sent by who may submit nowhere is not held in memory, nor waited for.
        app.may_anywhere(&caller, Capability::DispatchJob).await?;
        let Sent(mut job) = Sent::from_request(Request::from_parts(head, body), app).await?;
        Ok(Self { namespace: take_text(&mut job, "namespace"), job })
    }
}

#[derive(Serialize)]
pub(super) struct Submitted {
    #[serde(skip_serializing_if = "Option::is_none")]
    job_id: Option<JobId>,
    #[serde(skip_serializing_if = "Option::is_none")]
    valid: Option<bool>,
}

/// `POST /jobs`
pub(super) async fn submit(
    State(app): State<App>,
    caller: Caller,
    query: Result<Query<SubmitQuery>, QueryRejection>,
    headers: HeaderMap,
    body: Result<Body, Problem>,
) -> Result<Response, Problem> {
    // Who may not submit is told that, and not what is wrong with what was sent.
    let named = body.as_ref().map_or(Ok(None), |body| body.namespace.as_ref().map(Option::as_deref));
    let tenant = app.allow_in(&caller, named.map_err(FieldError::clone), Capability::DispatchJob).await?;
    let (Query(query), Body { job, .. }) = (query?, body?);
    let mut wrong = Vec::new();
    let tenant = tenant.map_err(|error| wrong.push(error)).ok();
    let key = idempotency_key(&headers).map_err(|error| wrong.push(error)).ok().flatten();
    let Some(tenant) = tenant.filter(|_| wrong.is_empty() && !query.dry_run) else {
        let further = app.service.validate(job).err().map(|Invalid(further)| further);
        wrong.extend(further.into_iter().flatten());
        if !wrong.is_empty() {
            return Err(Invalid(wrong).into());
        }
        let valid = Data(Submitted { job_id: None, valid: Some(true) });
        return Ok((Extension(DryRun), valid).into_response());
    };
    let submitted = async move { tenant.submit(job, key.as_ref(), caller).await };
    let job_id = to_its_end(submitted).await??;
    let about = Extension(About(job_id.clone()));
    Ok((about, Data(Submitted { job_id: Some(job_id), valid: None })).into_response())
}

#[derive(Serialize)]
pub(super) struct StatusBody {
    job_id: JobId,
    status: Status,
    phase: Option<Phase>,
    metrics: Metrics,
    phase_timestamps: PhaseTimestamps,
    git: Git,
    image: Image,
    failure: Option<Failure>,
    placement: Option<String>,
    nomad: Location,
    #[serde(serialize_with = "rfc3339")]
    as_of: DateTime<Utc>,
}

#[derive(Serialize)]
struct Metrics {
    build_duration_seconds: Option<f64>,
    test_duration_seconds: Option<f64>,
    publish_duration_seconds: Option<f64>,
    concurrent_jobs_total: i64,
}

#[derive(Serialize)]
struct PhaseTimestamps {
    job_start: Option<String>,
    build_start: Option<String>,
    build_end: Option<String>,
    test_start: Option<String>,
    test_end: Option<String>,
    publish_start: Option<String>,
    publish_end: Option<String>,
    job_end: Option<String>,
}

impl From<&Timestamps> for PhaseTimestamps {
    fn from(times: &Timestamps) -> Self {
        let text = milliseconds;
        Self {
            job_start: text(times.job_start),
            build_start: text(times.build_start),
            build_end: text(times.build_end),
            test_start: text(times.test_start),
            test_end: text(times.test_end),
            publish_start: text(times.publish_start),
            publish_end: text(times.publish_end),
            job_end: text(times.job_end),
        }
    }
}

impl StatusBody {
    fn new(record: &Record, live: i64, as_of: DateTime<Utc>) -> Self {
        let times = &record.timestamps;
        Self {
            job_id: record.id.clone(),
            status: record.status,
            phase: record.phase,
            metrics: Metrics {
                build_duration_seconds: times.seconds(Phase::Build),
                test_duration_seconds: times.seconds(Phase::Test),
                publish_duration_seconds: times.seconds(Phase::Publish),
                concurrent_jobs_total: live,
            },
            phase_timestamps: times.into(),
            git: record.git.clone(),
            image: record.image.clone(),
            failure: record.failure.clone(),
            placement: record.placement.clone(),
            nomad: record.nomad.clone(),
            as_of,
        }
    }
}

/// `GET /jobs/{id}/status`
pub(super) async fn status(
    State(app): State<App>,
    caller: Caller,
    Id(id): Id,
) -> Result<impl IntoResponse, Problem> {
    let tenant = app.allow_on(&caller, &id, Capability::ReadJob).await?;
    // Before the record is read, which may be newer than this says, and never older.
    let as_of = tenant.as_of();
    let record = tenant.record(&id).await?;
    let age = (Utc::now() - as_of).num_seconds().max(0).to_string();
    Ok(([(AGE, age)], Data(StatusBody::new(&record, tenant.live(), as_of))))
}

#[derive(Serialize)]
pub(super) struct Done {
    success: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
}

/// `POST /jobs/{id}/kill`
pub(super) async fn kill(State(app): State<App>, caller: Caller, Id(id): Id) -> Result<Data<Done>, Problem> {
    let tenant = app.allow_on(&caller, &id, Capability::DispatchJob).await?;
    Ok(Data(match to_its_end(async move { tenant.kill(&id).await }).await?? {
        Killed::Yes => Done { success: true, reason: None },
        Killed::No(reason) => Done { success: false, reason: Some(reason) },
    }))
}

/// `POST /jobs/{id}/cleanup`
pub(super) async fn clean_up(
    State(app): State<App>,
    caller: Caller,
    Id(id): Id,
) -> Result<Data<Done>, Problem> {
    let tenant = app.allow_on(&caller, &id, Capability::DispatchJob).await?;
    to_its_end(async move { tenant.clean_up(&id).await }).await??;
    Ok(Data(Done { success: true, reason: None }))
}
