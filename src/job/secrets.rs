//! Secrets of a build: what a step mounts by an ID, and where it comes from.

use std::fmt;
use std::str::FromStr;

use super::paths::CredentialsPath;

/// What stands before a secret's ID in the name of its copy for the build's task.
pub const BUILD_SECRET: &str = "secret_";

/// The most that a build may have.
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
