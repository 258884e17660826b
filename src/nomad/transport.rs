//! The connection pool to Nomad and the token, both made anew when a file that they are made of has changed.
//!
//! Invariant: a file that cannot be used keeps what there is. It is said once, and read again when it has changed.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use secrecy::SecretString;

use super::client::Settings;
use super::error::Error;

/// How often files are looked at, at most.
const LOOK: Duration = Duration::from_secs(1);

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
    fn files(&self) -> Vec<&Path> {
        let (certificate, key) = self.identity.as_ref().map(|(cert, key)| (cert, key)).unzip();
        [self.authority.as_ref(), certificate, key].into_iter().flatten().map(PathBuf::as_path).collect()
    }
}

/// What tells a file from what it was.
type Stamp = Option<(u64, i64, i64, u64)>;

fn stamp(path: &Path) -> Stamp {
    let found = std::fs::metadata(path).ok()?;
    Some((found.ino(), found.mtime(), found.mtime_nsec(), found.len()))
}

/// Something made of files.
struct Made<T> {
    value: T,
    stamps: Vec<Stamp>,
    looked: Instant,
}

impl<T: Clone> Made<T> {
    fn new(files: &[&Path], make: impl FnOnce() -> Result<T, Error>) -> Result<Self, Error> {
        // Before they are read: a change in between is seen later.
        let stamps = files.iter().map(|path| stamp(path)).collect();
        Ok(Self { value: make()?, stamps, looked: Instant::now() })
    }

    /// What is made of the files now, looking at them at most so often.
    fn now(&mut self, files: &[&Path], what: &str, make: impl FnOnce() -> Result<T, Error>) -> T {
        if !files.is_empty() && self.looked.elapsed() >= LOOK {
            self.looked = Instant::now();
            let stamps: Vec<_> = files.iter().map(|path| stamp(path)).collect();
            if stamps != self.stamps {
                self.stamps = stamps;
                match make() {
                    Ok(value) => {
                        tracing::info!(what, "read again, as its files have changed");
                        self.value = value;
                    }
                    Err(error) => {
                        let cause = std::error::Error::source(&error).map(tracing::field::display);
                        tracing::warn!(what, %error, cause, "its files have changed, and cannot be used: it stays");
                    }
                }
            }
        }
        self.value.clone()
    }
}

/// The pool.
pub(super) struct Transport {
    settings: Settings,
    pool: Mutex<Made<reqwest::Client>>,
    token: Mutex<Made<Option<SecretString>>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Transport {
    pub(super) fn new(settings: &Settings) -> Result<Self, Error> {
        let pool = Made::new(&settings.tls.files(), || pool(settings))?;
        let token = Made::new(&token_files(&settings.token), || read_token(&settings.token))?;
        Ok(Self { settings: settings.clone(), pool: Mutex::new(pool), token: Mutex::new(token) })
    }

    pub(super) fn pool(&self) -> reqwest::Client {
        let make = || pool(&self.settings);
        lock(&self.pool).now(&self.settings.tls.files(), "the connection to Nomad", make)
    }

    pub(super) fn token(&self) -> Option<SecretString> {
        let make = || read_token(&self.settings.token);
        lock(&self.token).now(&token_files(&self.settings.token), "the token for Nomad", make)
    }
}

fn token_files(token: &Token) -> Vec<&Path> {
    match token {
        Token::File(path) => vec![path.as_path()],
        Token::None | Token::Fixed(_) => Vec::new(),
    }
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
    use super::*;

    fn made(token: &Token) -> Made<Option<SecretString>> {
        Made::new(&token_files(token), || read_token(token)).unwrap()
    }

    fn later(made: &mut Made<Option<SecretString>>, token: &Token) -> String {
        use secrecy::ExposeSecret as _;
        made.looked = Instant::now().checked_sub(LOOK).unwrap();
        let now = made.now(&token_files(token), "the token", || read_token(token));
        now.unwrap().expose_secret().to_owned()
    }

    #[test]
    fn a_token_is_the_one_that_stands_in_its_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        let token = Token::File(path.clone());
        std::fs::write(&path, "one\n").unwrap();
        let mut made = made(&token);
        assert_eq!(later(&mut made, &token), "one");
        let replace = |text: &str| {
            std::fs::write(folder.path().join("new"), text).unwrap();
            std::fs::rename(folder.path().join("new"), &path).unwrap();
        };
        replace("two");
        assert_eq!(later(&mut made, &token), "two");
        // Being written, or gone.
        replace("");
        assert_eq!(later(&mut made, &token), "two");
        std::fs::remove_file(&path).unwrap();
        assert_eq!(later(&mut made, &token), "two");
        replace("three");
        assert_eq!(later(&mut made, &token), "three");
    }

    #[test]
    fn a_token_file_that_is_not_there_stops_the_start() {
        assert!(read_token(&Token::File("/no/such/token".into())).is_err());
        assert!(read_token(&Token::None).unwrap().is_none());
    }
}
