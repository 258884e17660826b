//! The connection pool to Nomad and the token, both made anew when a file that they are made of has changed.

use std::path::{Path, PathBuf};
use std::time::Duration;

use secrecy::SecretString;

use super::client::Settings;
use super::error::Error;
use crate::reload::Reloaded;

/// Who we are to Nomad.
#[derive(Clone, Debug, Default)]
pub enum Token {
    /// Nobody: Nomad's anonymous policy counts.
    #[default]
    None,
    /// Always this one.
    Fixed(SecretString),
    /// The one that stands in a file now.
    File(PathBuf),
}

impl From<Option<SecretString>> for Token {
    fn from(token: Option<SecretString>) -> Self {
        token.map_or(Self::None, Self::Fixed)
    }
}

/// What TLS is made of: PEM files, read again when they change.
#[derive(Clone, Debug, Default)]
pub struct Tls {
    /// The authority that signed Nomad's certificate, where it is not a public one.
    pub authority: Option<PathBuf>,
    /// Our own certificate and its key, where Nomad asks for one.
    pub identity: Option<(PathBuf, PathBuf)>,
}

impl Tls {
    fn files(&self) -> Vec<PathBuf> {
        let (certificate, key) = self.identity.as_ref().map(|(cert, key)| (cert, key)).unzip();
        [self.authority.as_ref(), certificate, key].into_iter().flatten().cloned().collect()
    }
}

/// The pool.
pub(super) struct Transport {
    pool: Reloaded<reqwest::Client, Error>,
    token: Reloaded<Option<SecretString>, Error>,
}

impl Transport {
    pub(super) fn new(settings: &Settings) -> Result<Self, Error> {
        let (of_pool, token) = (settings.clone(), settings.token.clone());
        Ok(Self {
            pool: Reloaded::new("the connection to Nomad", settings.tls.files(), move || pool(&of_pool))?,
            token: reloaded(token)?,
        })
    }

    pub(super) fn pool(&self) -> reqwest::Client {
        self.pool.now()
    }

    pub(super) fn token(&self) -> Option<SecretString> {
        self.token.now()
    }
}

fn reloaded(token: Token) -> Result<Reloaded<Option<SecretString>, Error>, Error> {
    let files = match &token {
        Token::File(path) => vec![path.clone()],
        Token::None | Token::Fixed(_) => Vec::new(),
    };
    Reloaded::new("the token for Nomad", files, move || read_token(&token))
}

fn read_token(token: &Token) -> Result<Option<SecretString>, Error> {
    let path = match token {
        Token::None => return Ok(None),
        Token::Fixed(token) => return Ok(Some(token.clone())),
        Token::File(path) => path,
    };
    let doing = format!("reading the token file {}", path.display());
    let text = std::fs::read_to_string(path).map_err(|error| Error::malformed(&doing, error))?;
    // Half of a file that is being written is as good as none.
    let token = Some(text.trim()).filter(|token| !token.is_empty());
    token.map(|token| Some(token.into())).ok_or_else(|| Error::malformed(&doing, "it is empty"))
}

/// Nothing is asked for compressed: Nomad makes a new compressor for every answer, which costs it more than the answer.
fn pool(settings: &Settings) -> Result<reqwest::Client, Error> {
    let mut builder = reqwest::Client::builder()
        .connect_timeout(Duration::from_secs(3))
        .tcp_keepalive(Duration::from_secs(15))
        .pool_idle_timeout(Duration::from_mins(1))
        .redirect(reqwest::redirect::Policy::none());
    if let Some(socket) = &settings.socket {
        builder = builder.unix_socket(socket.as_path());
    }
    if settings.address.scheme() == "http" {
        // Without this a machine that has no CA store could not even speak plain HTTP.
        builder = builder.tls_certs_only([]);
    }
    let read = |path: &Path, what: &str| {
        let doing = format!("reading {what}, {}", path.display());
        std::fs::read(path).map_err(|error| Error::malformed(&doing, error))
    };
    if let Some(path) = &settings.tls.authority {
        let what = "the authority of Nomad's certificate";
        let certificate = reqwest::Certificate::from_pem(&read(path, what)?)
            .map_err(|error| Error::malformed(&format!("reading {what}, {}", path.display()), error))?;
        builder = builder.tls_certs_merge([certificate]);
    }
    if let Some((certificate, key)) = &settings.tls.identity {
        let mut pem = read(certificate, "the certificate for Nomad")?;
        pem.push(b'\n');
        pem.extend(read(key, "the key for Nomad")?);
        let doing = format!("reading the certificate for Nomad, {}", certificate.display());
        let identity = reqwest::Identity::from_pem(&pem).map_err(|error| Error::malformed(&doing, error))?;
        builder = builder.identity(identity);
    }
    builder.build().map_err(|error| Error::malformed("setting up the connection to Nomad", error))
}

#[cfg(test)]
mod tests {
    use secrecy::ExposeSecret as _;

    use super::*;

    #[test]
    fn a_token_is_the_one_that_stands_in_its_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        let token = Token::File(path.clone());
        std::fs::write(&path, "one\n").unwrap();
        let made = reloaded(token).unwrap();
        let now = || made.at_once().unwrap().expose_secret().to_owned();
        assert_eq!(now(), "one");
        let replace = |text: &str| {
            std::fs::write(folder.path().join("new"), text).unwrap();
            std::fs::rename(folder.path().join("new"), &path).unwrap();
        };
        replace("two");
        assert_eq!(now(), "two");
        // Being written, or gone.
        replace("");
        assert_eq!(now(), "two");
        std::fs::remove_file(&path).unwrap();
        assert_eq!(now(), "two");
        replace("three");
        assert_eq!(now(), "three");
    }

    #[test]
    fn a_token_file_that_is_not_there_stops_the_start() {
        assert!(read_token(&Token::File("/no/such/token".into())).is_err());
        assert!(read_token(&Token::None).unwrap().is_none());
    }
}
