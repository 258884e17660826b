//! Proves to a registry who is asking: nothing, a password, or tokens that are kept until they expire.

use std::collections::HashMap;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue, WWW_AUTHENTICATE};
use reqwest::{StatusCode, Url};
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;
use tokio::sync::Mutex;
use tokio::time::Instant;

use super::challenge::Challenge;
use super::endpoint::Endpoint;
use super::error::Error;
use super::name::Repository;
use super::transport::read_body;

/// What a token lives when its realm does not say (distribution's token specification).
const USUAL_LIFE: Duration = Duration::from_mins(1);
/// A token this near to its end is not used for another request.
const MARGIN: Duration = Duration::from_secs(10);
const LARGEST_TOKEN: usize = 256 * 1024;

/// Who is asking a registry.
#[derive(Clone, Debug)]
pub struct Credentials {
    /// The user.
    pub username: String,
    /// The password, or an access token in its place.
    pub password: SecretString,
}

/// What a request wants to do, and so what its token has to allow.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Scope {
    Pull(Repository),
    Push(Repository),
    /// To push to the first what is pulled from the second.
    Mount(Repository, Repository),
}

impl Scope {
    fn parameters(&self) -> Vec<String> {
        let pull = |repository| format!("repository:{repository}:pull");
        let push = |repository| format!("repository:{repository}:pull,push");
        match self {
            Self::Pull(repository) => vec![pull(repository)],
            Self::Push(repository) => vec![push(repository)],
            Self::Mount(to, from) => vec![push(to), pull(from)],
        }
    }
}

/// Answers one registry's challenges. One lock is held while a token is fetched, so that requests started together
/// fetch it once.
#[derive(Debug)]
pub(super) struct Authenticator {
    credentials: Option<Credentials>,
    learned: Mutex<Learned>,
}

#[derive(Debug, Default)]
struct Learned {
    challenge: Option<Challenge>,
    tokens: HashMap<Scope, Token>,
}

#[derive(Debug, Clone)]
struct Token {
    header: HeaderValue,
    expires: Instant,
}

impl Authenticator {
    pub(super) fn new(credentials: Option<Credentials>) -> Self {
        Self { credentials, learned: Mutex::default() }
    }

    /// The `Authorization` header for a request, as far as it is known what the registry wants.
    pub(super) async fn authorization(
        &self,
        via: &Realm<'_>,
        scope: &Scope,
    ) -> Result<Option<HeaderValue>, Error> {
        let mut learned = self.learned.lock().await;
        match learned.challenge.clone() {
            None => Ok(None),
            Some(Challenge::Basic) => self.basic(via.doing),
            Some(Challenge::Bearer { realm, service }) => {
                let fresh = learned.tokens.get(scope).filter(|token| token.expires > Instant::now() + MARGIN);
                if let Some(token) = fresh {
                    return Ok(Some(token.header.clone()));
                }
                let token = self.fetch_token(via, &realm, service.as_deref(), scope).await?;
                learned.tokens.insert(scope.clone(), token.clone());
                Ok(Some(token.header))
            }
        }
    }

    /// Takes in a 401 to a request that carried `used`; says whether another try can do better.
    pub(super) async fn learn(&self, answer: &HeaderMap, scope: &Scope, used: Option<&HeaderValue>) -> bool {
        let offers = answer.get_all(WWW_AUTHENTICATE).iter().filter_map(|value| value.to_str().ok());
        let Some(challenge) = Challenge::choose(offers) else { return false };
        let mut learned = self.learned.lock().await;
        if used.is_some() && learned.tokens.get(scope).is_some_and(|token| Some(&token.header) == used) {
            learned.tokens.remove(scope);
        }
        let can_answer = match (&challenge, &self.credentials) {
            // The same password would be sent again.
            (Challenge::Basic, credentials) => credentials.is_some() && used.is_none(),
            (Challenge::Bearer { .. }, _) => true,
        };
        learned.challenge = Some(challenge);
        can_answer
    }

    fn basic(&self, doing: &str) -> Result<Option<HeaderValue>, Error> {
        let Some(Credentials { username, password }) = &self.credentials else { return Ok(None) };
        let pair = SecretString::from(format!("{username}:{}", password.expose_secret()));
        secret_header("Basic", &BASE64.encode(pair.expose_secret()), doing).map(Some)
    }

    async fn fetch_token(
        &self,
        via: &Realm<'_>,
        realm: &Url,
        service: Option<&str>,
        scope: &Scope,
    ) -> Result<Token, Error> {
        let doing = format!("{}: asking {} for a token", via.doing, realm.host_str().unwrap_or_default());
        if !via.endpoint.is_as_safe(realm) {
            return Err(Error::malformed(&doing, "its token realm is not reached by HTTPS"));
        }
        let mut url = realm.clone();
        let service = service.map(|service| ("service", service.to_owned()));
        let scopes = scope.parameters().into_iter().map(|scope| ("scope", scope));
        url.query_pairs_mut().extend_pairs(service.into_iter().chain(scopes));
        let mut request = via.http.get(url);
        if let Some(basic) = self.basic(&doing)? {
            request = request.header(AUTHORIZATION, basic);
        }
        let response = request.send().await.map_err(|source| Error::unreachable(&doing, source))?;
        let (status, headers) = (response.status(), response.headers().clone());
        let body = read_body(&doing, response, LARGEST_TOKEN).await?;
        if status != StatusCode::OK {
            return Err(Error::from_answer(&doing, status, &headers, &body));
        }
        let granted: Granted = serde_json::from_slice(&body)
            .map_err(|_| Error::malformed(&doing, "the token realm's answer is not the JSON expected"))?;
        granted.into_token(&doing)
    }
}

/// How to get to a token realm, and for what.
pub(super) struct Realm<'a> {
    pub(super) http: &'a reqwest::Client,
    pub(super) endpoint: &'a Endpoint,
    pub(super) doing: &'a str,
}

/// A token realm's answer, with no `Debug`. `access_token` is what OAuth calls `token`.
#[derive(Deserialize)]
struct Granted {
    token: Option<String>,
    access_token: Option<String>,
    expires_in: Option<u64>,
}

impl Granted {
    fn into_token(self, doing: &str) -> Result<Token, Error> {
        let given = [self.token, self.access_token].into_iter().flatten().find(|token| !token.is_empty());
        let token =
            given.ok_or_else(|| Error::malformed(doing, "the token realm's answer holds no token"))?;
        let life = self.expires_in.map_or(USUAL_LIFE, |seconds| Duration::from_secs(seconds.min(24 * 3600)));
        let header = secret_header("Bearer", &token, doing)?;
        Ok(Token { header, expires: Instant::now() + life })
    }
}

fn secret_header(scheme: &str, secret: &str, doing: &str) -> Result<HeaderValue, Error> {
    let mut header = HeaderValue::try_from(format!("{scheme} {secret}"))
        .map_err(|_| Error::malformed(doing, "a token with characters that no header can hold"))?;
    header.set_sensitive(true);
    Ok(header)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_asks_for_both_repositories() {
        let [to, from] = ["team/app", "base/alpine"].map(|name| name.parse().unwrap());
        let wanted = ["repository:team/app:pull,push", "repository:base/alpine:pull"];
        assert_eq!(Scope::Mount(to, from).parameters(), wanted);
    }

    #[test]
    fn secrets_are_not_shown() {
        let password = Credentials { username: "ci".into(), password: "hunter2".into() };
        let authenticator = Authenticator::new(Some(password.clone()));
        let header = authenticator.basic("x").unwrap().unwrap();
        for shown in [format!("{password:?}"), format!("{authenticator:?}"), format!("{header:?}")] {
            assert!(!shown.contains("hunter2") && !shown.contains(&BASE64.encode("ci:hunter2")), "{shown}");
        }
        assert_eq!(header.to_str().unwrap(), "Basic Y2k6aHVudGVyMg==");
    }
}
