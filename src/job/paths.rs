//! Credentials by path: a Nomad Variable, or a secret in Vault.

use std::fmt;
use std::str::FromStr;

use super::Policy;
use super::fields::Fields;
use super::names::VariablePath;

/// What stands before the path of a secret in Vault.
const VAULT: &str = "vault:";

/// The most bytes that a path may have, as Nomad has it for those of Variables.
const MOST: usize = 128;

/// A secret in Vault, as `vault kv get` and Nomad's templates name it: `secret/data/team/git`.
///
/// Invariant: nothing that Nomad or a template interpolates, and no step upwards.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct VaultPath(String);

impl VaultPath {
    /// The path as it was sent, without what says that it is one of Vault's.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for VaultPath {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let is_part = |part: &str| {
            let is_plain = part.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.~@+".contains(&b));
            !matches!(part, "" | "." | "..") && is_plain
        };
        if text.split('/').all(is_part) {
            return Ok(Self(text.to_owned()));
        }
        Err("is not the path of a secret in Vault: parts of letters, digits and - _ . ~ @ +, with one / between them".to_owned())
    }
}

/// Where credentials are: `creds/git` is a Nomad Variable, `vault:secret/data/git` a secret in Vault.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum CredentialsPath {
    /// In a Nomad Variable, which the caller can read.
    Variable(VariablePath),
    /// In Vault, which the job's own task reads by what Nomad says that it is.
    Vault(VaultPath),
}

impl CredentialsPath {
    /// Takes the one that a field names, where the operator allows it.
    pub(super) fn take(fields: &mut Fields, name: &str, policy: &Policy) -> Option<Self> {
        let path = fields.parsed(name)?;
        policy.allowed.credentials(&path).map_err(|why| fields.wrong(name, &why)).ok()?;
        Some(path)
    }

    /// The Variable, where it is one.
    pub fn variable(&self) -> Option<&VariablePath> {
        if let Self::Variable(path) = self { Some(path) } else { None }
    }

    /// The secret in Vault, where it is one.
    pub fn vault(&self) -> Option<&VaultPath> {
        if let Self::Vault(path) = self { Some(path) } else { None }
    }
}

impl FromStr for CredentialsPath {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.len() > MOST {
            return Err(format!("is {} bytes long: at most {MOST} are allowed", text.len()));
        }
        match text.strip_prefix(VAULT) {
            Some(path) => path.parse().map(Self::Vault),
            None => text.parse().map(Self::Variable),
        }
    }
}

impl fmt::Display for CredentialsPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Variable(path) => path.fmt(f),
            Self::Vault(path) => write!(f, "{VAULT}{}", path.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_a_variables_or_vaults() {
        for text in ["creds/acme/git", "vault:secret/data/acme/git", "vault:kv/a.b@c+d"] {
            let path: CredentialsPath = text.parse().unwrap();
            assert_eq!((path.to_string().as_str(), path.vault().is_some()), (text, text.starts_with(VAULT)));
            assert_ne!(path.vault().is_some(), path.variable().is_some());
        }
        let long = format!("vault:{}", "x".repeat(123));
        for text in [
            "vault:",
            "vault:/a",
            "vault:a/",
            "vault:a//b",
            "vault:a/../b",
            "vault:./a",
            "vault:a b",
            "vault:a\"b",
            "vault:a}}{{ env \"HOME\" }}",
            "vault:${attr.unique.hostname}",
            "vault:a\nb",
            "vault:a?b",
            "vault:a#b",
            "VAULT:a",
            &long,
        ] {
            assert!(text.parse::<CredentialsPath>().is_err(), "{text:?}");
        }
    }
}
