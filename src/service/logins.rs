//! Tokens of identity providers, as CI systems give one to each of their jobs, traded at Nomad for tokens of its own.
//!
//! Invariant: Nomad alone says whether a JWT is good, and what it is good for. A JWT and what it was traded for are kept in memory
//! only, and found by the JWT's hash.
//! Invariant: whoever makes up tokens takes nothing of what the others need: Nomad is asked apart from everything else, and who
//! would wait for long is told so at once.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use chrono::{DateTime, TimeDelta, Utc};
use secrecy::{ExposeSecret as _, SecretString};
use serde::Deserialize;
use tokio::sync::Semaphore;

use super::holders::Holders;
use super::people::refused;
use super::tokens::{Hash, hash_of, lock};
use crate::nomad::{Client, Error, Holder, Login};

/// How long before its end a token is not used any more.
const MARGIN: TimeDelta = TimeDelta::seconds(30);

/// The most tokens that are kept.
const MOST: usize = 10_000;

/// How many are asked about at once: for some, Nomad asks an identity provider for its keys.
const AT_ONCE: usize = 8;

/// How many more wait for that.
const WAITING: usize = 24;

/// Who asks.
#[derive(Clone, Default)]
pub struct Caller {
    /// The Nomad token; none where there is none.
    pub token: Option<SecretString>,
    /// Who it is by an identity provider's word, where the token was traded: the same for each of its JWTs.
    pub subject: Option<String>,
}

/// Why a JWT could not be traded.
#[derive(Debug, thiserror::Error)]
pub enum LoginError {
    /// Nomad does not take it.
    #[error(
        "Nomad's auth method {method:?} does not take this ({why}): send what was made for it, or a Nomad token"
    )]
    Refused {
        /// The auth method.
        method: String,
        /// Nomad's words.
        why: String,
    },
    /// The operator does not offer it.
    #[error("nobody logs in at {method:?} here: {}", offer(.offered))]
    NotOffered {
        /// The auth method.
        method: String,
        /// Those that are offered.
        offered: Vec<String>,
    },
    /// Others are at it.
    #[error("too many are logging in: try again in a moment")]
    Busy,
    /// Nomad could not be asked.
    #[error("Nomad could not be asked for a token")]
    Nomad(#[from] Error),
}

fn offer(offered: &[String]) -> String {
    if offered.is_empty() {
        "the operator can offer auth methods of Nomad's (NOMAD_BUILD_LOGIN_METHODS)".to_owned()
    } else {
        format!("the auth methods are {}", offered.join(", "))
    }
}

/// The claims that are looked at.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Claims {
    iss: String,
    sub: String,
    exp: Option<f64>,
    nomad_job_id: Option<String>,
}

impl Claims {
    /// Who it is, if it says so. Never the name of anybody who has a token of Nomad's, which is an accessor: a UUID.
    fn subject(&self, method: &str) -> Option<String> {
        let Self { iss, sub, .. } = self;
        // Quoted, so that no two are written alike.
        (!sub.is_empty()).then(|| format!("jwt {method} {iss:?} {sub:?}"))
    }

    /// When it expires.
    fn ends(&self) -> Option<DateTime<Utc>> {
        #[expect(clippy::cast_possible_truncation, reason = "seconds, of which what no date holds is none")]
        DateTime::from_timestamp(self.exp? as i64, 0)
    }
}

/// What a JWT was traded for, and until when it is used.
struct Traded {
    token: SecretString,
    until: DateTime<Utc>,
}

/// Trades JWTs.
pub(super) struct Logins {
    nomad: Client,
    /// Where they are traded; none where they are not.
    method: Option<String>,
    /// Room for those who trade, and those who wait for it.
    room: Semaphore,
    traded: Mutex<HashMap<Hash, Traded>>,
    holders: Arc<Holders>,
}

impl Logins {
    pub(super) fn new(nomad: &Client, method: Option<String>, holders: Arc<Holders>) -> Self {
        let (nomad, room) = (nomad.apart(AT_ONCE), Semaphore::new(AT_ONCE + WAITING));
        Self { nomad, method, room, traded: Mutex::default(), holders }
    }

    /// Who has a token, of whatever kind.
    pub(super) async fn caller(&self, sent: Option<SecretString>) -> Result<Caller, LoginError> {
        let Some(sent) = sent else { return Ok(Caller::default()) };
        let (Some(method), Some(claims)) = (&self.method, foreign_claims(sent.expose_secret())) else {
            return Ok(Caller { token: Some(sent), subject: None });
        };
        let hash = hash_of(&sent);
        let token = match self.known(&hash) {
            Some(token) => token,
            None => self.trade(method, &claims, &sent, hash).await?,
        };
        Ok(Caller { token: Some(token), subject: claims.subject(method) })
    }

    /// The name of who has a token: the subject of a JWT that was traded, the accessor of a Nomad token, or where there is neither, a
    /// part of the token's hash.
    pub(super) async fn name_of(&self, token: Option<SecretString>) -> Option<String> {
        let token = token?;
        let hash = hash_of(&token);
        if let (Some(method), Some(claims)) = (&self.method, foreign_claims(token.expose_secret())) {
            if self.known(&hash).is_some() {
                return claims.subject(method).or_else(|| Some(format!("jwt {method}")));
            }
        } else if let Ok(Holder::Accessor(accessor)) = self.holders.of(&token).await {
            return Some(accessor);
        }
        let short: String = hash.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
        Some(format!("sha256:{short}"))
    }

    /// What a JWT was traded for, if that is still good.
    fn known(&self, hash: &Hash) -> Option<SecretString> {
        lock(&self.traded).get(hash).filter(|traded| traded.until > Utc::now()).map(|t| t.token.clone())
    }

    async fn trade(
        &self,
        method: &str,
        claims: &Claims,
        jwt: &SecretString,
        hash: Hash,
    ) -> Result<SecretString, LoginError> {
        let _room = self.room.try_acquire().map_err(|_| LoginError::Busy)?;
        let login = self.nomad.login(method, jwt).await;
        let Login { token, accessor, expiration_time } = login.map_err(|error| refused(method, error))?;
        self.holders.learn(&token, &accessor);
        let for_ever = DateTime::<Utc>::MAX_UTC;
        let token_ends = expiration_time.map_or(for_ever, |at| at - MARGIN);
        // Nor is a JWT good for longer than it says.
        let until = token_ends.min(claims.ends().unwrap_or(for_ever));
        let mut traded = lock(&self.traded);
        if traded.len() >= MOST {
            traded.retain(|_, of| of.until > Utc::now());
        }
        if traded.len() >= MOST {
            traded.clear();
        }
        traded.insert(hash, Traded { token: token.clone(), until });
        Ok(token)
    }
}

/// What a JWT claims that is not one of Nomad's own, which Nomad takes as it is; none of what is no JWT.
fn foreign_claims(token: &str) -> Option<Claims> {
    let [_, payload, _] = token.split('.').collect::<Vec<_>>().try_into().ok()?;
    let bytes = BASE64_URL_SAFE_NO_PAD.decode(payload).ok()?;
    let claims: Claims = serde_json::from_slice(&bytes).ok()?;
    claims.nomad_job_id.is_none().then_some(claims)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_subject_is_one_issuers_and_ends_with_its_jwt() {
        let claims = |json: &str| serde_json::from_str::<Claims>(json).unwrap();
        let of = |json| claims(json).subject("ci");
        assert_eq!(of(r#"{"iss":"https://ci","sub":"a"}"#).as_deref(), Some(r#"jwt ci "https://ci" "a""#));
        assert_ne!(of(r#"{"iss":"x","sub":"y z"}"#), of(r#"{"iss":"x y","sub":"z"}"#));
        assert_eq!(of(r#"{"iss":"https://ci"}"#), None);
        let ends = claims(r#"{"exp": 1700000000.5}"#).ends();
        assert_eq!(ends, DateTime::from_timestamp(1_700_000_000, 0));
        assert_eq!(claims("{}").ends(), None);
    }

    #[test]
    fn a_jwt_of_somebody_else_is_told_from_nomads_own_and_from_what_is_none() {
        let jwt = |payload: &str| format!("e30.{}.c2ln", BASE64_URL_SAFE_NO_PAD.encode(payload));
        for (token, foreign) in [
            (jwt(r#"{"iss":"https://ci","sub":"repo:acme/api"}"#), true),
            (jwt("{}"), true),
            (jwt(r#"{"sub":"x","nomad_job_id":"j","nomad_allocation_id":"a"}"#), false),
            (jwt("not JSON"), false),
            ("a.b".to_owned(), false),
            ("e30.%.x".to_owned(), false),
            ("b2f3c1de-0000-4000-8000-000000000000".to_owned(), false),
        ] {
            assert_eq!(foreign_claims(&token).is_some(), foreign, "{token}");
        }
    }
}
