//! Names in a registry: a repository, and a reference in it (pure).
//!
//! Invariant: a value of these types can stand in a URL's path as it is.

use std::fmt;
use std::str::FromStr;

use super::digest::Digest;

const LONGEST_REPOSITORY: usize = 255;
const LONGEST_TAG: usize = 128;

/// A repository of a registry, without its host: `team/app` (OCI distribution spec, "Pulling manifests").
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Repository(String);

/// What names a manifest in a repository.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Reference {
    /// A name that can be moved to another manifest.
    Tag(String),
    /// The manifest's own digest.
    Digest(Digest),
}

/// A text cannot name anything in a registry.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Not a repository.
    #[error(
        "{0:?} is not a repository: lower-case letters, digits, and `.`, `_`, `-` between them, in parts joined by `/`"
    )]
    Repository(String),
    /// Neither a tag nor a digest.
    #[error("{0:?} is neither a tag (letters, digits, `_`, `.`, `-`; at most 128) nor a sha256 digest")]
    Reference(String),
}

impl Repository {
    /// The text of the name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Repository {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let good = text.len() <= LONGEST_REPOSITORY && text.split('/').all(is_component);
        if good { Ok(Self(text.to_owned())) } else { Err(NameError::Repository(text.to_owned())) }
    }
}

/// Begins and ends with a letter or digit, so that `.` and `..` are none. Which separators may repeat is left to the
/// registry: nothing depends on it here.
fn is_component(part: &str) -> bool {
    let alphanumeric = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let bytes = part.as_bytes();
    bytes.first().is_some_and(alphanumeric)
        && bytes.last().is_some_and(alphanumeric)
        && bytes.iter().all(|byte| alphanumeric(byte) || matches!(byte, b'.' | b'_' | b'-'))
}

impl FromStr for Reference {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if let Ok(digest) = text.parse() {
            return Ok(Self::Digest(digest));
        }
        let word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
        let good = text.len() <= LONGEST_TAG
            && text.bytes().next().is_some_and(word)
            && text.bytes().all(|byte| word(byte) || matches!(byte, b'.' | b'-'));
        if good { Ok(Self::Tag(text.to_owned())) } else { Err(NameError::Reference(text.to_owned())) }
    }
}

impl From<Digest> for Reference {
    fn from(digest: Digest) -> Self {
        Self::Digest(digest)
    }
}

impl fmt::Display for Repository {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tag(tag) => f.write_str(tag),
            Self::Digest(digest) => digest.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_repository_is_a_plain_path() {
        let long = "a".repeat(256);
        let cases = [
            ("app", true),
            ("team/app", true),
            ("a.b_c--d/e", true),
            ("", false),
            ("/app", false),
            ("app/", false),
            ("team//app", false),
            ("../app", false),
            ("app/..", false),
            ("App", false),
            ("app:1", false),
            ("app?x=1", false),
            ("app%2e", false),
            ("äpp", false),
            (&long, false),
        ];
        for (text, good) in cases {
            assert_eq!(text.parse::<Repository>().is_ok(), good, "{text}");
        }
    }

    #[test]
    fn a_reference_is_a_tag_or_a_digest() {
        let digest = Digest::of(b"x");
        assert_eq!(digest.to_string().parse(), Ok(Reference::Digest(digest)));
        for good in ["1", "v1.2-rc_3", "_x", "Latest"] {
            assert_eq!(good.parse(), Ok(Reference::Tag(good.to_owned())));
        }
        for bad in ["", ".x", "-x", "a/b", "a b", "..", "sha256:12", &"a".repeat(129)] {
            assert!(bad.parse::<Reference>().is_err(), "{bad}");
        }
    }
}
