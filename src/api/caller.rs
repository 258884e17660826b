//! Who is asking, and whether that may be: each route names the capability that it needs.

use std::cell::Cell;
use std::sync::Arc;

use axum::extract::{FromRequestParts, Request};
use axum::http::HeaderMap;
use axum::http::request::Parts;
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use futures_util::StreamExt as _;
use futures_util::future::join_all;
use futures_util::stream::BoxStream;
use secrecy::SecretString;

use super::App;
use super::answer::{Code, Problem};
use crate::job::{FieldError, JobId};
use crate::nomad::Capability;
use crate::service::logs::Message;
use crate::service::{Caller, Denied, FindError, Tenant};

tokio::task_local! {
    /// Whether it was found out, for this request, that its caller may have it done.
    static ALLOWED: Cell<bool>;
}

/// Notes that a caller may have done what is asked for.
fn allowed() {
    // Outside of a guarded route nobody looks.
    ALLOWED.try_with(|allowed| allowed.set(true)).ok();
}

/// Lets no answer of a route through that did not ask whether its caller may: a route that forgets it does not work for anybody.
pub(super) async fn unless_asked(request: Request, next: Next) -> Response {
    let answer = async move {
        let answer = next.run(request).await;
        let is_good = !answer.status().is_client_error() && !answer.status().is_server_error();
        if is_good && !ALLOWED.with(Cell::get) {
            tracing::error!("a route answered without asking whether its caller may");
            let message = "this route does not ask whether you may: that is a fault of the service";
            return Problem::new(Code::Internal, message).into_response();
        }
        answer
    };
    ALLOWED.scope(Cell::new(false), answer).await
}

/// What a caller sent to show who it is.
pub(super) fn token(headers: &HeaderMap) -> Option<SecretString> {
    let text =
        |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).filter(|text| !text.is_empty());
    text("x-nomad-token").or_else(|| text("authorization").and_then(bearer)).map(SecretString::from)
}

/// The token of an `Authorization` header, if that has one. Upper and lower case are alike in the scheme's name.
///
/// Source: RFC 9110, section 11.4.
fn bearer(credentials: &str) -> Option<&str> {
    let (scheme, token) = credentials.split_once(' ')?;
    let token = token.trim_matches(' ');
    (scheme.eq_ignore_ascii_case("bearer") && !token.is_empty()).then_some(token)
}

impl FromRequestParts<App> for Caller {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Problem> {
        Ok(app.service.caller(token(&parts.headers)).await?)
    }
}

/// What a caller may do with the jobs of a namespace.
enum Sight {
    /// What is asked for.
    Allowed,
    /// See them; what is asked for, not, or nobody knows.
    Visible(Denied),
    /// Nothing.
    Hidden(Denied),
}

impl Sight {
    /// What a caller may do in a namespace, or why that cannot be known.
    async fn of(tenant: &Tenant, caller: &Caller, capability: Capability) -> Result<Self, Denied> {
        let (authority, token) = (tenant.authority(), caller.token.as_ref());
        let Err(denied) = authority.check(token, capability).await else { return Ok(Self::Allowed) };
        let sees = match capability {
            Capability::ReadJob => Err(denied),
            _ => authority.check(token, Capability::ReadJob).await.map(|()| denied),
        };
        match sees {
            Ok(denied) => Ok(Self::Visible(denied)),
            Err(denied @ (Denied::Anonymous | Denied::Forbidden(..))) => Ok(Self::Hidden(denied)),
            Err(unknown) => Err(unknown),
        }
    }
}

impl App {
    /// The namespace that a submission names, or the first one, if its caller may do something there. What is wrong with the
    /// name is told beside what else is wrong with the submission.
    pub(super) async fn allow_in(
        &self,
        caller: &Caller,
        named: Result<Option<&str>, FieldError>,
        capability: Capability,
    ) -> Result<Result<Arc<Tenant>, FieldError>, Problem> {
        let (service, token) = (&self.service, caller.token.as_ref());
        let named = named.and_then(|name| match name {
            Some(name) if !is_namespace(name) => Err(FieldError {
                field: "namespace".to_owned(),
                message: "is not the name of a Nomad namespace: it has 1 to 128 letters, digits and -"
                    .to_owned(),
            }),
            name => Ok(name),
        });
        let is_named = |tenant: &&Arc<Tenant>| matches!(named, Ok(Some(name)) if tenant.namespace() == name);
        let tenant = match (&named, service.tenants().iter().find(is_named)) {
            (_, Some(tenant)) => tenant,
            (Ok(Some(name)), None) => {
                // To who may do nothing there it looks like one that there is.
                service.first().authority().check_elsewhere(token, name, capability).await?;
                return Ok(Err(self.no_such_namespace(caller, capability).await));
            }
            (Ok(None) | Err(_), None) => service.first(),
        };
        tenant.authority().check(token, capability).await?;
        allowed();
        Ok(named.map(|_| Arc::clone(tenant)))
    }

    /// Whether a caller may do something in any namespace, before it is known in which one.
    pub(super) async fn may_anywhere(&self, caller: &Caller, capability: Capability) -> Result<(), Problem> {
        let mut refused = None;
        for tenant in self.service.tenants() {
            match tenant.authority().check(caller.token.as_ref(), capability).await {
                Ok(()) => return Ok(()),
                Err(denied) => drop(refused.get_or_insert(denied)),
            }
        }
        refused.map_or(Ok(()), |denied| Err(denied.into()))
    }

    /// The namespaces whose jobs a caller may see: that which is named, or all of them.
    pub(super) async fn seen_by(
        &self,
        caller: &Caller,
        named: Option<&str>,
    ) -> Result<Vec<Arc<Tenant>>, Problem> {
        const NEEDED: Capability = Capability::ReadJob;
        if named.is_some() {
            let tenant = self.allow_in(caller, Ok(named), NEEDED).await?;
            let wrong = |wrong: FieldError| Problem::parameter(&wrong.field, &wrong.message);
            return tenant.map(|tenant| vec![tenant]).map_err(wrong);
        }
        let (mut seen, mut denied, mut failed) = (Vec::new(), None, None);
        for tenant in self.service.tenants() {
            match tenant.authority().check(caller.token.as_ref(), NEEDED).await {
                Ok(()) => seen.push(Arc::clone(tenant)),
                Err(why @ (Denied::Anonymous | Denied::Forbidden(..))) => drop(denied.get_or_insert(why)),
                Err(closed @ Denied::Closed) => return Err(closed.into()),
                Err(unknown) => drop(failed.get_or_insert(nobody_knows(&unknown))),
            }
        }
        // What can be told is told, though of some namespaces nobody knows now.
        match (failed, denied) {
            (Some(failed), _) if seen.is_empty() => Err(failed),
            (None, Some(denied)) if seen.is_empty() => Err(denied.into()),
            _ => {
                allowed();
                Ok(seen)
            }
        }
    }

    /// Says where builds are taken, of the namespaces that a caller may use.
    async fn no_such_namespace(&self, caller: &Caller, capability: Capability) -> FieldError {
        let token = caller.token.as_ref();
        let mut names = Vec::new();
        for tenant in self.service.tenants() {
            if tenant.authority().check(token, capability).await.is_ok() {
                names.push(format!("{:?}", tenant.namespace()));
            }
        }
        let message = match names.join(", ") {
            names if names.is_empty() => "is none that this service takes builds for".to_owned(),
            names => format!("is none that this service takes builds for: those you may use are {names}"),
        };
        FieldError { field: "namespace".to_owned(), message }
    }

    /// The namespace of a job, if its caller may do something with the jobs there. To who may not see jobs, none is there.
    pub(super) async fn allow_on(
        &self,
        caller: &Caller,
        job: &JobId,
        capability: Capability,
    ) -> Result<Arc<Tenant>, Problem> {
        let home = self.service.home_of(job);
        // One namespace is asked about first, whether the job is known or not: that nobody can tell by the time it takes.
        let tenant = home.unwrap_or_else(|| self.service.first());
        let sight = Sight::of(tenant, caller, capability).await;
        if home.is_some() {
            match sight? {
                Sight::Allowed => {
                    allowed();
                    return Ok(Arc::clone(tenant));
                }
                Sight::Visible(denied) => return Err(denied.into()),
                Sight::Hidden(denied) if self.service.tenants().len() == 1 => {
                    return Err(hidden(job, denied));
                }
                // As if nobody had heard of it.
                Sight::Hidden(_) => {}
            }
        }
        self.search(caller, job, capability).await
    }

    /// Looks for a job in every namespace that its caller may see.
    async fn search(
        &self,
        caller: &Caller,
        job: &JobId,
        capability: Capability,
    ) -> Result<Arc<Tenant>, Problem> {
        let tenants = self.service.tenants();
        let looked = tenants.iter().map(async |tenant| {
            let sight = Sight::of(tenant, caller, capability).await;
            let found = match sight {
                Ok(Sight::Allowed | Sight::Visible(_)) => tenant.follow(job).await.map(drop),
                _ => Err(FindError::Unknown(job.clone())),
            };
            (tenant, sight, found)
        });
        let mut denied = None;
        let mut failed = None;
        for (tenant, sight, found) in join_all(looked).await {
            match (sight, found) {
                (Ok(Sight::Allowed), Ok(())) => {
                    allowed();
                    return Ok(Arc::clone(tenant));
                }
                (Ok(Sight::Visible(denied)), Ok(())) => return Err(denied.into()),
                (Ok(Sight::Hidden(why)), _) => drop(denied.get_or_insert(why)),
                (Ok(_), Err(FindError::Unknown(_))) => {}
                (Ok(_), Err(error)) => drop(failed.get_or_insert(Problem::from(error))),
                (Err(unknown), _) => drop(failed.get_or_insert(nobody_knows(&unknown))),
            }
        }
        let nobody = || Problem::from(FindError::Unknown(job.clone()));
        Err(failed.unwrap_or_else(|| denied.map_or_else(nobody, |denied| hidden(job, denied))))
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
}

/// Whether Nomad could have a namespace of this name. What is asked there is kept in memory for a while.
///
/// Source: Nomad 1.11, `nomad/structs/structs.go`, `validNamespaceName`.
fn is_namespace(name: &str) -> bool {
    (1..=128).contains(&name.len()) && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
}

/// Ends a stream once its caller may not read it any more: a reader that resumes it is told.
pub(super) fn while_allowed(
    messages: BoxStream<'static, Message>,
    caller: Caller,
    tenant: Arc<Tenant>,
) -> BoxStream<'static, Message> {
    let lost = async move { tenant.authority().lost(caller.token.as_ref(), Capability::ReadLogs).await };
    messages.take_until(Box::pin(lost)).boxed()
}

/// What somebody is told where nobody knows what a token may in some namespace: not in which one.
fn nobody_knows(unknown: &Denied) -> Problem {
    match unknown {
        Denied::Closed => Problem::new(Code::Forbidden, &unknown.to_string()),
        _ => Problem::caused(
            Code::NomadUnavailable,
            "what the token may cannot be found out now: ask again".to_owned(),
            unknown,
        ),
    }
}

/// What somebody is told of a job that is not to be seen: whoever shows no token is asked for one, whether it is there or not.
fn hidden(job: &JobId, denied: Denied) -> Problem {
    match denied {
        Denied::Anonymous => denied.into(),
        _ => FindError::Unknown(job.clone()).into(),
    }
}

#[cfg(test)]
mod tests {
    use axum::body::Body;
    use axum::http::{HeaderName, HeaderValue, StatusCode};
    use axum::routing::get;
    use axum::{Router, middleware};
    use secrecy::ExposeSecret;
    use tower::ServiceExt as _;

    use super::*;

    #[test]
    fn a_token_comes_in_either_header_and_the_scheme_in_any_case() {
        const OWN: &str = "x-nomad-token";
        const SHARED: &str = "authorization";
        for (sent, wanted) in [
            (&[(OWN, "a-b-c")][..], Some("a-b-c")),
            (&[(SHARED, "Bearer a-b-c")], Some("a-b-c")),
            (&[(SHARED, "bearer a-b-c")], Some("a-b-c")),
            (&[(SHARED, "BEARER a-b-c")], Some("a-b-c")),
            // The grammar has one space or several.
            (&[(SHARED, "Bearer   a-b-c")], Some("a-b-c")),
            // Nomad's own header says more than the one that others use, too.
            (&[(SHARED, "Bearer a-b-c"), (OWN, "d-e-f")], Some("d-e-f")),
            (&[(SHARED, "Bearer a-b-c"), (OWN, "")], Some("a-b-c")),
            (&[], None),
            (&[(OWN, "")], None),
            (&[(SHARED, "")], None),
            (&[(SHARED, "a-b-c")], None),
            (&[(SHARED, "Bearer")], None),
            (&[(SHARED, "Bearer  ")], None),
            (&[(SHARED, "Bearera-b-c")], None),
            (&[(SHARED, "Basic Og==")], None),
        ] {
            let headers = sent
                .iter()
                .map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)));
            let token = token(&headers.collect());
            assert_eq!(token.as_ref().map(ExposeSecret::expose_secret), wanted, "{sent:?}");
        }
    }

    #[tokio::test]
    async fn a_route_that_does_not_ask_whether_its_caller_may_answers_nobody() {
        let router = Router::new()
            .route("/forgets", get(async || "a secret"))
            .route("/asks", get(async || allowed()))
            .route("/refuses", get(async || StatusCode::FORBIDDEN))
            .layer(middleware::from_fn(unless_asked));
        for (path, wanted) in [
            ("/asks", StatusCode::OK),
            ("/forgets", StatusCode::INTERNAL_SERVER_ERROR),
            ("/refuses", StatusCode::FORBIDDEN),
            // Each request is asked about by itself.
            ("/forgets", StatusCode::INTERNAL_SERVER_ERROR),
        ] {
            let request = Request::builder().uri(path).body(Body::empty()).unwrap();
            assert_eq!(router.clone().oneshot(request).await.unwrap().status(), wanted, "{path}");
        }
    }
}
