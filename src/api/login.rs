//! Logins of people, at the auth methods that the operator offers.

use axum::Extension;
use axum::extract::State;
use axum::http::header::CACHE_CONTROL;
use axum::response::{IntoResponse, Response};
use secrecy::{ExposeSecret as _, SecretString};
use serde::Serialize;
use serde_json::Value;

use super::App;
use super::answer::{Data, Problem, milliseconds};
use super::audit::{By, DryRun};
use super::body::Sent;
use crate::job::{FieldError, take_text};
use crate::nomad::{OidcAnswer, OidcRequest};
use crate::service::{Caller, Shown};

#[derive(Serialize)]
pub(super) struct Methods {
    methods: Vec<Method>,
}

#[derive(Serialize)]
struct Method {
    name: String,
    r#type: String,
}

/// `GET /auth/login`
pub(super) async fn methods(State(app): State<App>) -> Result<Data<Methods>, Problem> {
    let methods = app.service.people().methods().await?;
    let methods = methods.into_iter().map(|method| Method { name: method.name, r#type: method.kind });
    Ok(Data(Methods { methods: methods.collect() }))
}

/// What somebody wants who logs in.
enum Wanted {
    /// To know where a browser is to go.
    Address(OidcRequest),
    /// A token, at an auth method.
    Token(String, Shown),
}

/// Reads a body, field by field, and tells of everything that is wrong with it.
fn read(mut body: Value) -> Result<Wanted, Problem> {
    let mut wrong = Vec::new();
    let mut text = |of: &mut Value, prefix: &str, name: &str| {
        take_text(of, name).unwrap_or_else(|error| {
            wrong.push(FieldError { field: format!("{prefix}{name}"), ..error });
            None
        })
    };
    if !body.is_object() {
        return Err(Problem::parameter("body", "is no object"));
    }
    let (method, jwt) = (text(&mut body, "", "method"), text(&mut body, "", "jwt"));
    let mut oidc = body.as_object_mut().and_then(|fields| fields.remove("oidc")).unwrap_or_default();
    let is_object = oidc.is_null() || oidc.is_object();
    let [redirect_uri, client_nonce, state, code, issuer] =
        ["redirect_uri", "client_nonce", "state", "code", "iss"].map(|name| text(&mut oidc, "oidc.", name));
    let mut missing = |field: &str, message: &str| {
        wrong.push(FieldError { field: field.to_owned(), message: message.to_owned() });
    };
    let unknown = |of: &Value| of.as_object().map(|fields| fields.keys().cloned().collect::<Vec<_>>());
    for (prefix, of) in [("", &body), ("oidc.", &oidc)] {
        for name in unknown(of).unwrap_or_default() {
            missing(&format!("{prefix}{name}"), "is not a known field: check its spelling or leave it out");
        }
    }
    if method.is_none() {
        missing("method", "is missing: GET /auth/login says which there are");
    }
    if !is_object {
        missing("oidc", "is no object");
    }
    if state.is_some() != code.is_some() {
        missing("oidc", "has to have both of state and code, or neither");
    }
    let request =
        method.as_ref().zip(redirect_uri).zip(client_nonce).map(|((method, redirect_uri), nonce)| {
            OidcRequest { method: method.clone(), redirect_uri, client_nonce: nonce.into() }
        });
    match (&request, &jwt) {
        (None, None) => missing("jwt", "is missing, or oidc with redirect_uri and client_nonce is"),
        (Some(_), Some(_)) => missing("jwt", "came with oidc: send one of them"),
        _ => {}
    }
    if !wrong.is_empty() {
        return Err(Problem::fields(wrong));
    }
    let answer = state.zip(code).map(|(state, code)| OidcAnswer { state, code: code.into(), issuer });
    let jwt = jwt.map(SecretString::from);
    Ok(match (request, answer, jwt) {
        (Some(request), Some(answer), _) => {
            Wanted::Token(request.method.clone(), Shown::Answer(request, answer))
        }
        (Some(request), None, _) => Wanted::Address(request),
        (None, _, jwt) => Wanted::Token(method.unwrap_or_default(), Shown::Jwt(jwt.unwrap_or_default())),
    })
}

#[derive(Serialize)]
struct Address {
    auth_url: String,
}

#[derive(Serialize)]
struct Made {
    token: String,
    accessor: String,
    expires_at: Option<String>,
}

/// `POST /auth/login`
pub(super) async fn log_in(State(app): State<App>, body: Result<Sent, Problem>) -> Result<Response, Problem> {
    let Sent(body) = body?;
    let (method, shown) = match read(body)? {
        Wanted::Address(request) => {
            let auth_url = app.service.people().begin(&request).await?;
            let answer = ([(CACHE_CONTROL, "no-store")], Data(Address { auth_url }));
            return Ok((Extension(DryRun), answer).into_response());
        }
        Wanted::Token(method, shown) => (method, shown),
    };
    let login = app.service.people().log_in(&method, &shown).await?;
    let expires_at = milliseconds(login.expiration_time);
    let token = login.token.expose_secret().to_owned();
    // The audit log tells whose it is, by its accessor.
    let by = Extension(By(Caller { token: Some(login.token), subject: None }));
    let data = Data(Made { token, accessor: login.accessor, expires_at });
    Ok((by, [(CACHE_CONTROL, "no-store")], data).into_response())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn fields(body: Value) -> Vec<String> {
        let problem = read(body).err();
        problem
            .map(|problem| problem.details().iter().map(|detail| detail.field.clone()).collect())
            .unwrap_or_default()
    }

    #[test]
    fn what_is_wrong_with_a_login_is_told_by_its_field() {
        let begun = json!({"redirect_uri": "http://localhost:4649/oidc/callback", "client_nonce": "n"});
        let mut answered = begun.clone();
        answered["state"] = json!("s");
        answered["code"] = json!("c");
        for (body, wanted) in [
            (json!({"method": "m", "jwt": "j"}), &[][..]),
            (json!({"method": "m", "oidc": begun}), &[]),
            (json!({"method": "m", "oidc": answered}), &[]),
            (json!({}), &["method", "jwt"]),
            (json!({"method": 1, "jwt": "j"}), &["method", "method"]),
            (json!({"method": "m", "jwt": "j", "oidc": begun}), &["jwt"]),
            (json!({"method": "m", "oidc": {"redirect_uri": "r"}}), &["jwt"]),
            (
                json!({"method": "m", "oidc": {"redirect_uri": "r", "client_nonce": "n", "state": "s"}}),
                &["oidc"],
            ),
            (json!({"method": "m", "jwt": "j", "colour": "blue"}), &["colour"]),
            (
                json!({"method": "m", "oidc": {"redirect_uri": "r", "client_nonce": "n", "nonse": "n"}}),
                &["oidc.nonse"],
            ),
            (json!({"method": "m", "oidc": "x"}), &["oidc", "jwt"]),
            (json!([]), &["body"]),
        ] {
            assert_eq!(fields(body.clone()), wanted, "{body}");
        }
    }
}
