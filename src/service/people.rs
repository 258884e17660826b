//! Logins of people: passed on to Nomad, which alone says who they are and what they may.
//!
//! Invariant: nothing of a login is kept here, and only the auth methods that the operator names are offered.

use secrecy::SecretString;

use super::{LoginError, Service};
use crate::nomad::{AuthMethod, Error, Kind, Login, OidcAnswer, OidcRequest};

/// What somebody shows.
pub enum Shown {
    /// An identity provider's JWT.
    Jwt(SecretString),
    /// That a browser came back from the identity provider.
    Answer(OidcRequest, OidcAnswer),
}

impl Service {
    /// The auth methods that are offered.
    ///
    /// # Errors
    /// Where Nomad does not tell them.
    pub async fn login_methods(&self) -> Result<Vec<AuthMethod>, LoginError> {
        let offered = &self.config.login_methods;
        if offered.is_empty() {
            return Ok(Vec::new());
        }
        let mut methods = self.nomad.auth_methods().await?;
        methods.retain(|method| offered.contains(&method.name));
        Ok(methods)
    }

    /// Where a browser is to go for a login.
    ///
    /// # Errors
    /// Where the method is not offered, or Nomad does not begin it.
    pub async fn begin_login(&self, request: &OidcRequest) -> Result<String, LoginError> {
        self.is_offered(&request.method)?;
        let address = self.nomad.oidc_address(request).await;
        address.map_err(|error| refused(&request.method, error))
    }

    /// The token of who shows something.
    ///
    /// # Errors
    /// Where the method is not offered, or Nomad does not take it.
    pub async fn log_in(&self, method: &str, shown: &Shown) -> Result<Login, LoginError> {
        self.is_offered(method)?;
        let login = match shown {
            Shown::Jwt(jwt) => self.nomad.login(method, jwt).await,
            Shown::Answer(request, answer) => self.nomad.oidc_login(request, answer).await,
        };
        login.map_err(|error| refused(method, error))
    }

    fn is_offered(&self, method: &str) -> Result<(), LoginError> {
        let offered = &self.config.login_methods;
        if offered.iter().any(|name| name == method) {
            return Ok(());
        }
        Err(LoginError::NotOffered { method: method.to_owned(), offered: offered.clone() })
    }
}

/// What Nomad says to who shows something that is not good, told from its not being able to say.
fn refused(method: &str, error: Error) -> LoginError {
    // Nomad says by the status 500 what the identity provider did not take.
    let words = [
        "failed to exchange token",
        "ID token",
        "no OIDC request found",
        "unauthorized redirect",
        "invalid or missing issuer",
    ];
    match error.kind {
        Kind::Refused { status: 400 | 401, message } => LoginError::refused(method, message),
        Kind::Refused { message, .. } if words.iter().any(|said| message.contains(said)) => {
            LoginError::refused(method, message)
        }
        Kind::Forbidden => LoginError::refused(method, "it is forbidden".to_owned()),
        _ => LoginError::Nomad(error),
    }
}
