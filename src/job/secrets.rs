//! Secrets of a build, and keys that its steps sign with: what a step mounts by an ID, and where it comes from.

use std::fmt;
use std::str::FromStr;

use super::credentials::{self, Items};
use super::paths::CredentialsPath;

/// What stands before a secret's ID in the name of its copy for the build's task.
pub const BUILD_SECRET: &str = "secret_";

/// What stands before a key's ID in the name of its copy for the build's task.
pub const BUILD_KEY: &str = "ssh_";

/// The most that a build may have of either.
pub(super) const MOST: usize = 32;

/// An item of a Nomad Variable or of a secret in Vault, written `path#item`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SecretItem {
    path: CredentialsPath,
    item: String,
}

impl SecretItem {
    /// Where the item is.
    pub fn path(&self) -> &CredentialsPath {
        &self.path
    }

    /// The item's name in it.
    pub fn item(&self) -> &str {
        &self.item
    }
}

impl FromStr for SecretItem {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (path, item) = text.split_once('#').ok_or(
            "names no item: write it as PATH#ITEM, the path of a Nomad Variable or of a secret in Vault, and one of its items",
        )?;
        let path = path.parse().map_err(|why| format!("has a path that {why}"))?;
        if item.is_empty() || item.len() > 128 || !item.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err("has an item that is no name: 1 to 128 characters without white space".to_owned());
        }
        Ok(Self { path, item: item.to_owned() })
    }
}

impl fmt::Display for SecretItem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}#{}", self.path, self.item)
    }
}

/// What the steps of a build are given by an ID.
#[derive(Clone, Copy, Debug)]
pub struct StepItem<'a> {
    kind: Kind,
    id: &'a str,
    item: &'a SecretItem,
}

/// How a step is given something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// As a file, by `RUN --mount=type=secret`.
    Secret,
    /// By an agent that signs with it, by `RUN --mount=type=ssh`.
    Key,
}

impl Kind {
    /// The field of a submission that names it.
    pub(super) fn field(self) -> &'static str {
        match self {
            Self::Secret => "build_secrets",
            Self::Key => "ssh",
        }
    }
}

impl<'a> StepItem<'a> {
    pub(super) fn new(kind: Kind, id: &'a str, item: &'a SecretItem) -> Self {
        Self { kind, id, item }
    }

    /// The field of a submission that names it, without its ID.
    pub fn fields(&self) -> &'static str {
        self.kind.field()
    }

    /// The same, with its ID.
    pub fn field(&self) -> String {
        format!("{}.{}", self.kind.field(), self.id)
    }

    /// The name of its copy for the build's task.
    pub fn copy(&self) -> String {
        let before = match self.kind {
            Kind::Secret => BUILD_SECRET,
            Kind::Key => BUILD_KEY,
        };
        format!("{before}{}", self.id)
    }

    /// Where it is.
    pub fn path(&self) -> &'a CredentialsPath {
        self.item.path()
    }

    /// Its text, of the items that are there.
    ///
    /// # Errors
    /// Why there is none, as said of the field.
    pub fn of(&self, items: &Items) -> Result<String, String> {
        let text = items.get(self.item.item()).ok_or("names an item that is not there")?;
        match self.kind {
            Kind::Secret => Ok(text.clone()),
            Kind::Key => credentials::private_key(text).map_err(|why| format!("names an item that {why}")),
        }
    }
}

/// Whether a text can be the ID of a secret, as a Dockerfile names it.
pub(super) fn check_id(id: &str) -> Result<(), String> {
    let good = id.len() <= 64
        && id.starts_with(|c: char| c.is_ascii_alphanumeric())
        && id.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
    if good {
        Ok(())
    } else {
        Err("has an ID that is none: letters, digits and . _ -, at most 64, not starting with . _ or -"
            .to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::VaultPath;

    #[test]
    fn a_secret_is_an_item_of_a_variable() {
        let secret: SecretItem = "creds/acme/npm#token".parse().unwrap();
        assert_eq!((secret.path().to_string().as_str(), secret.item()), ("creds/acme/npm", "token"));
        assert_eq!(secret.to_string(), "creds/acme/npm#token");
        let secret: SecretItem = "vault:secret/data/npm#token".parse().unwrap();
        assert_eq!(secret.path().vault().map(VaultPath::as_str), Some("secret/data/npm"));
        assert_eq!("a#b#c".parse::<SecretItem>().unwrap().item(), "b#c");
        for bad in ["", "creds/acme", "#x", "creds/acme#", "creds//x#y", "a b#c", "a#b c", "a#b\n"] {
            assert!(bad.parse::<SecretItem>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_key_is_one_that_an_agent_can_sign_with() {
        let item = "creds/deploy#ssh_key".parse().unwrap();
        let key = StepItem::new(Kind::Key, "default", &item);
        let secret = StepItem::new(Kind::Secret, "default", &item);
        assert_eq!((key.field().as_str(), key.copy().as_str()), ("ssh.default", "ssh_default"));
        assert_eq!(
            (secret.field().as_str(), secret.copy().as_str()),
            ("build_secrets.default", "secret_default")
        );
        let text = "\r\n-----BEGIN OPENSSH PRIVATE KEY-----\r\nAAAA\r\n-----END OPENSSH PRIVATE KEY-----";
        let items = Items::from([("ssh_key".to_owned(), text.to_owned())]);
        let clean = "-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n-----END OPENSSH PRIVATE KEY-----\n";
        assert_eq!(key.of(&items).as_deref(), Ok(clean));
        assert_eq!(secret.of(&items).as_deref(), Ok(text));
        let items = Items::from([("ssh_key".to_owned(), "canary".to_owned())]);
        let why = key.of(&items).unwrap_err();
        assert!(why.starts_with("names an item that is no private key") && !why.contains("canary"), "{why}");
        assert_eq!(key.of(&Items::new()).unwrap_err(), "names an item that is not there");
    }

    #[test]
    fn an_id_is_plain() {
        for (id, good) in [
            ("npmrc", true),
            ("pip.conf", true),
            ("A_b-1", true),
            ("", false),
            ("-x", false),
            ("a/b", false),
            ("a b", false),
        ] {
            assert_eq!(check_id(id).is_ok(), good, "{id:?}");
        }
    }
}
