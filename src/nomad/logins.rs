//! Logins at Nomad's auth methods: who shows something of an identity provider's gets a token of Nomad's.

use chrono::{DateTime, Utc};
use reqwest::Method;
use secrecy::{ExposeSecret as _, SecretString};
use serde::{Deserialize, Deserializer};
use serde_json::{Value, json};

use super::client::{Client, Request};
use super::error::{Error, Kind};

/// What Nomad answers whatever is asked of its ACLs.
const NO_ACLS: &str = "ACL support disabled";

/// A token that Nomad made for who has one of an identity provider.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Login {
    /// The token.
    #[serde(rename = "SecretID", deserialize_with = "secret")]
    pub token: SecretString,
    /// What names it, and is no secret.
    #[serde(rename = "AccessorID", default)]
    pub accessor: String,
    /// Until when it is good; for ever without.
    pub expiration_time: Option<DateTime<Utc>>,
}

fn secret<'de, D: Deserializer<'de>>(from: D) -> Result<SecretString, D::Error> {
    Ok(String::deserialize(from)?.into())
}

/// An auth method, as Nomad tells anybody of it.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct AuthMethod {
    /// Its name.
    pub name: String,
    /// `OIDC` or `JWT`.
    #[serde(rename = "Type")]
    pub kind: String,
}

/// A login in a browser that was begun.
#[derive(Debug)]
pub struct OidcRequest {
    /// The auth method.
    pub method: String,
    /// Where the identity provider sends the browser afterwards.
    pub redirect_uri: String,
    /// What only who began it knows.
    pub client_nonce: SecretString,
}

impl OidcRequest {
    fn body(&self, further: &[(&str, &str)]) -> Value {
        let mut body = json!({
            "AuthMethodName": self.method, "RedirectURI": self.redirect_uri,
            "ClientNonce": self.client_nonce.expose_secret(),
        });
        for (name, value) in further {
            body[*name] = json!(value);
        }
        body
    }

    fn doing(&self, what: &str) -> String {
        format!("{what} a login at Nomad's auth method {:?}", self.method)
    }
}

/// What an identity provider has a browser bring back.
pub struct OidcAnswer {
    /// Which request it answers.
    pub state: String,
    /// What a token is got for.
    pub code: SecretString,
    /// Who answers, where that says so.
    pub issuer: Option<String>,
}

impl Client {
    /// The auth methods there are; none where there are no ACLs.
    pub async fn auth_methods(&self) -> Result<Vec<AuthMethod>, Error> {
        let request = Request::get(&["acl", "auth-methods"], "listing Nomad's auth methods".to_owned());
        match self.with_token(None).call(request.query("stale", true)).await {
            Err(Error { kind: Kind::Refused { status: 400, message }, .. }) if message.contains(NO_ACLS) => {
                Ok(Vec::new())
            }
            found => Ok(found?.value),
        }
    }

    /// Trades a JWT at an auth method for a token. [`super::Kind::Refused`], with Nomad's own words, where it is not taken.
    pub async fn login(&self, method: &str, jwt: &SecretString) -> Result<Login, Error> {
        let doing = format!("trading a JWT at Nomad's auth method {method:?}");
        let body = json!({ "AuthMethodName": method, "LoginToken": jwt.expose_secret() });
        let request = Request::new(Method::POST, &["acl", "login"], doing).json(&body)?;
        Ok(self.with_token(None).call::<Login>(request).await?.value)
    }

    /// Where a browser is to go for a login.
    pub async fn oidc_address(&self, of: &OidcRequest) -> Result<String, Error> {
        #[derive(Deserialize)]
        struct Answer {
            #[serde(rename = "AuthURL")]
            address: String,
        }
        let request = Request::new(Method::POST, &["acl", "oidc", "auth-url"], of.doing("beginning"));
        let request = request.json(&of.body(&[]))?;
        Ok(self.with_token(None).call::<Answer>(request).await?.value.address)
    }

    /// The token of a login that a browser came back from. [`super::Kind::Refused`] where Nomad or the identity provider does
    /// not take it.
    pub async fn oidc_login(&self, of: &OidcRequest, answer: &OidcAnswer) -> Result<Login, Error> {
        let (state, code) = (answer.state.as_str(), answer.code.expose_secret());
        let further =
            [("State", state), ("Code", code), ("Iss", answer.issuer.as_deref().unwrap_or_default())];
        let request = Request::new(Method::POST, &["acl", "oidc", "complete-auth"], of.doing("completing"));
        let request = request.json(&of.body(&further))?;
        Ok(self.with_token(None).call::<Login>(request).await?.value)
    }
}
