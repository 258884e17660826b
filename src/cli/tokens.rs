//! The tokens of `login`, kept for the commands after it: one for each service, in a file that only its owner reads.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use chrono::{DateTime, Utc};
use reqwest::Url;
use secrecy::{ExposeSecret as _, SecretString};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::{Error, Exit};
use crate::environment;

/// A token that is kept.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Kept {
    #[serde(serialize_with = "exposed", deserialize_with = "secret")]
    pub(super) token: SecretString,
    pub(super) accessor: String,
    /// Until when it is good; for ever without.
    pub(super) expires_at: Option<DateTime<Utc>>,
}

fn exposed<S: Serializer>(token: &SecretString, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(token.expose_secret())
}

/// Reads a secret out of JSON.
pub(super) fn secret<'de, D: Deserializer<'de>>(from: D) -> Result<SecretString, D::Error> {
    Ok(String::deserialize(from)?.into())
}

/// The file, which may not be there yet.
pub(super) struct Tokens {
    file: PathBuf,
}

type All = BTreeMap<String, Kept>;

impl Tokens {
    /// Where the environment says; none where it says nothing.
    pub(super) fn of_user() -> Option<Self> {
        let folder = environment::process("XDG_CONFIG_HOME").map(PathBuf::from);
        let home = || environment::process("HOME").map(|home| Path::new(&home).join(".config"));
        // By the XDG Base Directory Specification, one that is not absolute does not count.
        let folder = folder.filter(|folder| folder.is_absolute()).or_else(home)?;
        Some(Self { file: folder.join("nomad-build").join("tokens.json") })
    }

    /// The token for a service, while it is good.
    pub(super) fn find(&self, service: &Url) -> Result<Option<SecretString>, Error> {
        // Whose home is nobody's, as in many a container, has kept nothing there.
        if let Err(error) = std::fs::File::open(&self.file)
            && matches!(error.kind(), ErrorKind::PermissionDenied | ErrorKind::NotADirectory)
        {
            return Ok(None);
        }
        let kept = self.read()?.remove(service.as_str());
        let good = kept.filter(|kept| kept.expires_at.is_none_or(|end| Utc::now() < end));
        Ok(good.map(|kept| kept.token))
    }

    /// Keeps a token for a service, in place of an earlier one; those that have expired are forgotten.
    pub(super) fn keep(&self, service: &Url, kept: Kept) -> Result<(), Error> {
        let mut all = self.read()?;
        all.retain(|_, kept| kept.expires_at.is_none_or(|end| Utc::now() < end));
        all.insert(service.to_string(), kept);
        self.write(&all)
    }

    /// Forgets the token for a service; whether there was one.
    pub(super) fn forget(&self, service: &Url) -> Result<bool, Error> {
        let mut all = self.read()?;
        let had = all.remove(service.as_str()).is_some();
        if had {
            self.write(&all)?;
        }
        Ok(had)
    }

    fn read(&self) -> Result<All, Error> {
        let failed = || Error::new(Exit::Usage, format!("reading the tokens in {}", self.file.display()));
        match std::fs::read(&self.file) {
            Ok(text) => serde_json::from_slice(&text)
                .map_err(|source| failed().caused_by(source).hint("remove the file, and log in again")),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(All::new()),
            Err(error) => Err(failed().caused_by(error)),
        }
    }

    /// Writes another file and puts it in place of this one, so that there is never half of it.
    fn write(&self, all: &All) -> Result<(), Error> {
        let failed = |source| {
            Error::new(Exit::Failure, format!("writing the tokens to {}", self.file.display()))
                .caused_by(source)
        };
        let write = || {
            if let Some(folder) = self.file.parent() {
                std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
            }
            let new = self.file.with_extension(format!("{}.new", std::process::id()));
            let mut options = std::fs::File::options();
            let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&new)?;
            file.write_all(&serde_json::to_vec_pretty(all)?)?;
            file.sync_all()?;
            std::fs::rename(&new, &self.file)
        };
        write().map_err(failed)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use chrono::TimeDelta;

    use super::*;

    #[test]
    fn a_token_is_kept_for_one_service_and_its_time_where_nobody_else_reads_it() {
        let folder = tempfile::tempdir().unwrap();
        let tokens = Tokens { file: folder.path().join("a/b/tokens.json") };
        let [one, other] = ["http://one/", "https://other/"].map(|url| url.parse::<Url>().unwrap());
        let kept = |text: &str, ends: Option<TimeDelta>| Kept {
            token: text.into(),
            accessor: "a".to_owned(),
            expires_at: ends.map(|ends| Utc::now() + ends),
        };
        let found = |url: &Url| tokens.find(url).unwrap().map(|token| token.expose_secret().to_owned());
        assert_eq!(found(&one), None);
        assert!(!tokens.forget(&one).unwrap());
        tokens.keep(&one, kept("first", Some(TimeDelta::hours(1)))).unwrap();
        tokens.keep(&other, kept("second", None)).unwrap();
        assert_eq!((found(&one).as_deref(), found(&other).as_deref()), (Some("first"), Some("second")));
        let mode = std::fs::metadata(&tokens.file).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        tokens.keep(&one, kept("third", Some(TimeDelta::seconds(-1)))).unwrap();
        assert_eq!(found(&one), None);
        assert!(tokens.forget(&other).unwrap());
        assert_eq!(found(&other), None);
        std::fs::write(&tokens.file, "half of").unwrap();
        assert!(tokens.find(&one).is_err());
    }
}
