//! Who is asking, and whether that may be: each route names the capability that it needs.

use axum::extract::FromRequestParts;
use axum::http::HeaderMap;
use axum::http::request::Parts;
use futures_util::StreamExt as _;
use futures_util::stream::BoxStream;
use secrecy::SecretString;

use super::App;
use super::answer::Problem;
use crate::job::JobId;
use crate::nomad::Capability;
use crate::service::logs::Message;
use crate::service::{Caller, Denied, FindError};

/// What a caller sent to show who it is.
pub(super) fn token(headers: &HeaderMap) -> Option<SecretString> {
    let text =
        |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).filter(|text| !text.is_empty());
    let bearer = || text("authorization").and_then(|value| value.strip_prefix("Bearer "));
    text("x-nomad-token").or_else(bearer).map(SecretString::from)
}

impl FromRequestParts<App> for Caller {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Problem> {
        Ok(app.service.caller(token(&parts.headers)).await?)
    }
}

impl App {
    /// Lets a caller do what is no one job's.
    pub(super) async fn allow(&self, caller: &Caller, capability: Capability) -> Result<(), Problem> {
        Ok(self.service.authority().check(caller.token.as_ref(), capability).await?)
    }

    /// Lets a caller do something with a job. To who may not see jobs, none is there.
    pub(super) async fn allow_on(
        &self,
        caller: &Caller,
        job: &JobId,
        capability: Capability,
    ) -> Result<(), Problem> {
        let (authority, token) = (self.service.authority(), caller.token.as_ref());
        match authority.check(token, capability).await {
            Err(denied @ Denied::Forbidden(..)) if capability != Capability::ReadJob => {
                match authority.check(token, Capability::ReadJob).await {
                    Ok(()) => Err(denied.into()),
                    Err(Denied::Forbidden(..)) => Err(FindError::Unknown(job.clone()).into()),
                    Err(other) => Err(other.into()),
                }
            }
            Err(Denied::Forbidden(..)) => Err(FindError::Unknown(job.clone()).into()),
            other => Ok(other?),
        }
    }

    /// The caller, or who asked for the ticket that the caller has.
    pub(super) async fn or_by_ticket(
        &self,
        caller: Caller,
        job: &JobId,
        ticket: Option<&str>,
    ) -> Result<Caller, Problem> {
        match ticket {
            None => Ok(caller),
            Some(_) if caller.token.is_some() => {
                Err(Problem::parameter("ticket", "came with a token: send one of them"))
            }
            Some(ticket) => Ok(self.service.redeem(job, ticket).await?),
        }
    }

    /// Ends a stream once its caller may not read it any more: a reader that resumes it is told.
    pub(super) fn while_allowed(
        &self,
        messages: BoxStream<'static, Message>,
        caller: Caller,
    ) -> BoxStream<'static, Message> {
        let service = std::sync::Arc::clone(&self.service);
        let lost = async move { service.authority().lost(caller.token.as_ref(), Capability::ReadLogs).await };
        messages.take_until(Box::pin(lost)).boxed()
    }
}
