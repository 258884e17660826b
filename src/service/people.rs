//! Logins of people: passed on to Nomad, which alone says who they are and what they may.
//!
//! Invariant: nothing of a login is kept here, and only the auth methods that the operator names are offered.
//! Invariant: whoever logs in, or pretends to, takes nothing of what the others need: Nomad is asked apart from everything else.

use secrecy::SecretString;
use tokio::sync::Semaphore;

use super::LoginError;
use crate::nomad::{AuthMethod, Client, Error, Kind, Login, OidcAnswer, OidcRequest};

/// How many logins are passed on at once: each waits for the identity provider.
const AT_ONCE: usize = 4;

/// What somebody shows.
pub enum Shown {
    /// An identity provider's JWT.
    Jwt(SecretString),
    /// That a browser came back from the identity provider.
    Answer(OidcRequest, OidcAnswer),
}

/// Where people log in.
pub struct People {
    nomad: Client,
    offered: Vec<String>,
    turns: Semaphore,
}

impl People {
    pub(super) fn new(nomad: &Client, offered: Vec<String>) -> Self {
        Self { nomad: nomad.apart(AT_ONCE), offered, turns: Semaphore::new(AT_ONCE) }
    }

    /// The auth methods that are offered.
    ///
    /// # Errors
    /// Where Nomad does not tell them.
    pub async fn methods(&self) -> Result<Vec<AuthMethod>, LoginError> {
        if self.offered.is_empty() {
            return Ok(Vec::new());
        }
        let _turn = self.turns.try_acquire().map_err(|_| LoginError::Busy)?;
        let mut methods = self.nomad.auth_methods().await?;
        methods.retain(|method| self.offered.contains(&method.name));
        Ok(methods)
    }

    /// Where a browser is to go for a login.
    ///
    /// # Errors
    /// Where the method is not offered, or Nomad does not begin it.
    pub async fn begin(&self, request: &OidcRequest) -> Result<String, LoginError> {
        self.is_offered(&request.method)?;
        let _turn = self.turns.try_acquire().map_err(|_| LoginError::Busy)?;
        let address = self.nomad.oidc_address(request).await;
        address.map_err(|error| refused(&request.method, error))
    }

    /// The token of who shows something.
    ///
    /// # Errors
    /// Where the method is not offered, or Nomad does not take it.
    pub async fn log_in(&self, method: &str, shown: &Shown) -> Result<Login, LoginError> {
        self.is_offered(method)?;
        let _turn = self.turns.try_acquire().map_err(|_| LoginError::Busy)?;
        let login = match shown {
            Shown::Jwt(jwt) => self.nomad.login(method, jwt).await,
            Shown::Answer(request, answer) => self.nomad.oidc_login(request, answer).await,
        };
        login.map_err(|error| refused(method, error))
    }

    fn is_offered(&self, method: &str) -> Result<(), LoginError> {
        if self.offered.iter().any(|name| name == method) {
            return Ok(());
        }
        Err(LoginError::NotOffered { method: method.to_owned(), offered: self.offered.clone() })
    }
}

/// What Nomad answers with the status 500 to what an identity provider does not confirm: its words, and ours for whoever logs in.
///
/// Source: Nomad 1.11, `nomad/acl_endpoint.go`; hashicorp/cap 0.11, `oidc`.
const UNCONFIRMED: [(&str, &str); 6] = [
    ("failed to exchange token with provider", "the identity provider does not confirm it"),
    ("exchanged token is not valid", "what the identity provider says is not good"),
    ("failed to retrieve the", "what the identity provider says is not good"),
    (
        "no OIDC request found",
        "no login was begun with this client_nonce, or it was completed before, or too long ago",
    ),
    ("unauthorized redirect", "the auth method does not allow this redirect_uri"),
    ("invalid or missing issuer", "it is not the identity provider that answered"),
];

/// What Nomad says to who shows something that is not good, told from its not being able to say. This is the one place for both
/// people and JWTs of programs.
pub(super) fn refused(method: &str, error: Error) -> LoginError {
    let because = |why: &str| LoginError::Refused { method: method.to_owned(), why: why.to_owned() };
    match &error.kind {
        // No answer, of Nomad's or of the identity provider's.
        _ if error.is_passing() => LoginError::Nomad(error),
        Kind::Refused { message, .. } if message.contains("too many") => LoginError::Busy,
        // The operator's to mend.
        Kind::Refused { status: 400, message } if message.contains("not found") => LoginError::Nomad(error),
        Kind::Refused { status: 400 | 401, message } => because(message),
        Kind::Refused { message, .. } => match UNCONFIRMED.iter().find(|(said, _)| message.contains(said)) {
            Some((_, why)) => because(why),
            None => LoginError::Nomad(error),
        },
        Kind::Forbidden => because("it is forbidden"),
        _ => LoginError::Nomad(error),
    }
}
