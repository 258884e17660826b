//! Texts that a user sends and that have a grammar, each checked once and then carried verbatim.
//!
//! Invariant: the only way to one of these types is its `FromStr`; what it accepts is never changed.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Defines a text newtype whose `FromStr` is a check that says what is wrong and how to mend it.
macro_rules! text {
    ($(#[$doc:meta])* $name:ident, $check:ident) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(String);

        impl $name {
            /// The text as it was sent.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = String;

            fn from_str(text: &str) -> Result<Self, String> {
                $check(text).map(|()| Self(text.to_owned()))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

text!(
    /// An owner: who a job is for, as a short plain name.
    Name, check_name
);
text!(
    /// An OCI tag.
    ///
    /// Grammar: OCI Distribution Specification, "Pulling manifests".
    Tag, check_tag
);
text!(
    /// An OCI repository name without the registry's host.
    ImageName, check_image_name
);
text!(
    /// `host[:port][/path]`: where images go. It has no scheme and no credentials.
    RegistryUrl, check_registry
);
text!(
    /// A git branch, tag, full ref or commit.
    ///
    /// Grammar: git-check-ref-format(1), and no leading `-`.
    GitRef, check_git_ref
);
text!(
    /// A path inside the checkout, without `..`.
    RelativePath, check_relative_path
);
text!(
    /// The path of a Nomad Variable.
    ///
    /// Grammar: Nomad's documentation of the Variables HTTP API.
    VariablePath, check_variable_path
);
text!(
    /// A repository's address: `https://`, `ssh://`, `http://`, `file://` or `user@host:path`; never with a password.
    RepoUrl, check_repo_url
);

impl RegistryUrl {
    /// Host and port.
    pub fn host(&self) -> &str {
        self.0.split_once('/').map_or(self.0.as_str(), |(host, _)| host)
    }

    /// The registry itself.
    #[must_use]
    pub fn without_path(&self) -> Self {
        Self(self.host().to_owned())
    }

    /// The path behind the host, if there is one.
    pub fn path(&self) -> Option<&str> {
        self.0.split_once('/').map(|(_, path)| path)
    }
}

/// How a repository is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scheme {
    /// `https://`
    Https,
    /// `ssh://`, or `user@host:path`
    Ssh,
    /// `http://`
    Http,
    /// `file://`
    File,
}

impl Scheme {
    /// Every scheme there is.
    pub const ALL: [Self; 4] = [Self::Https, Self::Ssh, Self::Http, Self::File];

    /// The scheme as it stands before `://`, which is also git's name of the transport.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Https => "https",
            Self::Ssh => "ssh",
            Self::Http => "http",
            Self::File => "file",
        }
    }
}

impl FromStr for Scheme {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL
            .into_iter()
            .find(|scheme| scheme.as_str() == text)
            .ok_or_else(|| "is not a scheme: use https, ssh, http or file".to_owned())
    }
}

impl RepoUrl {
    /// The transport the address asks for.
    pub fn scheme(&self) -> Scheme {
        // Whatever has no scheme passed the check as `user@host:path`.
        self.0.split_once("://").and_then(|(scheme, _)| scheme.parse().ok()).unwrap_or(Scheme::Ssh)
    }

    /// The last part of the path, without `.git`: the name a clone's folder would have.
    pub fn repository_name(&self) -> &str {
        let path = self.0.trim_end_matches('/');
        let last = path.rsplit(['/', ':']).next().unwrap_or(path);
        last.strip_suffix(".git").unwrap_or(last)
    }
}

fn check(holds: bool, message: &str) -> Result<(), String> {
    if holds { Ok(()) } else { Err(message.to_owned()) }
}

pub(super) fn check_length(text: &str, most: usize) -> Result<(), String> {
    check(!text.is_empty(), "is empty")?;
    check(text.len() <= most, &format!("is {} bytes long: at most {most} are allowed", text.len()))
}

fn check_name(text: &str) -> Result<(), String> {
    check_length(text, 128)?;
    check(
        text.starts_with(|c: char| c.is_ascii_alphanumeric())
            && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"._@/+-".contains(&b)),
        "starts with a letter or digit and has only letters, digits and . _ @ / + -",
    )
}

fn check_tag(text: &str) -> Result<(), String> {
    check_length(text, 128)?;
    check(
        !text.starts_with(['.', '-'])
            && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b)),
        "is not an OCI tag: letters, digits, _ . and -, not starting with . or -",
    )
}

/// Whether a text is one component of an OCI repository name: `[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*`.
fn is_path_component(text: &str) -> bool {
    let mut separator = "";
    let mut rest = text;
    while !rest.is_empty() {
        let word = rest.find(|c: char| !(c.is_ascii_lowercase() || c.is_ascii_digit())).unwrap_or(rest.len());
        if word == 0 {
            return false;
        }
        rest = &rest[word..];
        let end = rest.find(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit()).unwrap_or(rest.len());
        separator = &rest[..end];
        if !(matches!(separator, "" | "." | "_" | "__") || separator.bytes().all(|b| b == b'-')) {
            return false;
        }
        rest = &rest[end..];
    }
    !text.is_empty() && separator.is_empty()
}

/// Of a registry's address, and of a name asked for: together they are no longer than a repository's name may be.
pub(super) const LONGEST_PART: usize = 127;

fn check_image_name(text: &str) -> Result<(), String> {
    check_length(text, 255)?;
    check(
        text.split('/').all(is_path_component),
        "is not an OCI repository name: lower-case letters and digits, separated by . _ __ or -, in parts separated by /",
    )
}

fn is_host(text: &str) -> bool {
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => (host, Some(port)),
        _ => (text, None),
    };
    let port_is_good = port.is_none_or(|port| {
        port.bytes().all(|b| b.is_ascii_digit()) && port.parse::<u16>().is_ok_and(|port| port > 0)
    });
    let host_is_good = match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
        Some(address) => address.parse::<std::net::Ipv6Addr>().is_ok(),
        None => host.split('.').all(|label| {
            !label.is_empty()
                && label.len() <= 63
                && !label.starts_with('-')
                && !label.ends_with('-')
                && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
        }),
    };
    host_is_good && port_is_good
}

fn check_registry(text: &str) -> Result<(), String> {
    check_length(text, LONGEST_PART)?;
    check(!text.contains("://"), "has a scheme: write it as host[:port][/path]")?;
    check(
        !text.contains('@'),
        "has credentials: name a Nomad Variable in registry_credentials_path instead",
    )?;
    let (host, path) = text.split_once('/').map_or((text, None), |(host, path)| (host, Some(path)));
    check(is_host(host), "does not start with a host: write it as host[:port][/path]")?;
    match path {
        Some(path) => check_image_name(path).map_err(|why| format!("has a path that {why}")),
        None => Ok(()),
    }
}

fn check_git_ref(text: &str) -> Result<(), String> {
    check_length(text, 255)?;
    check(!text.starts_with('-'), "starts with -, which no ref may")?;
    check(
        !text.contains(|c: char| c.is_control() || " ~^:?*[\\".contains(c)),
        "has a character that no ref may have: white space, a control character or one of ~ ^ : ? * [ \\",
    )?;
    let parts_are_good = text
        .split('/')
        .all(|part| !part.is_empty() && !part.starts_with('.') && part.strip_suffix(".lock").is_none());
    check(
        parts_are_good && !text.contains("..") && !text.contains("@{") && !text.ends_with('.') && text != "@",
        "is not a git ref: see git-check-ref-format",
    )
}

fn check_relative_path(text: &str) -> Result<(), String> {
    check_length(text, 1024)?;
    check(!text.contains(char::is_control), "has a control character")?;
    check(!text.starts_with('/'), "is absolute: it must be relative to the repository's root")?;
    check(text.split('/').all(|part| part != ".."), "has a .. part: it must stay inside the repository")
}

fn check_variable_path(text: &str) -> Result<(), String> {
    check_length(text, 128)?;
    let is_part = |part: &str| {
        !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_~".contains(&b))
    };
    check(
        text.split('/').all(is_part),
        "is not the path of a Nomad Variable: parts of letters, digits and - _ ~, with one / between them",
    )
}

/// Whoever resolves such parts ends elsewhere than where the address says.
fn check_steps(path: &str) -> Result<(), String> {
    let is_step = |part: &str| matches!(part.replace("%2e", ".").replace("%2E", ".").as_str(), "." | "..");
    check(!path.split('/').any(is_step), "has a part that is . or ..: write the address without it")
}

fn check_repo_url(text: &str) -> Result<(), String> {
    check_length(text, 2048)?;
    check(
        text.bytes().all(|b| b.is_ascii_graphic() && !b"\"'`<>\\^{|}".contains(&b)),
        "has a character that no URL has: percent-encode it",
    )?;
    let Some((scheme, rest)) = text.split_once("://") else {
        let shape =
            "is not a repository's address: use https://host/path, ssh://user@host/path or user@host:path";
        let (user, rest) = text.split_once('@').ok_or(shape)?;
        let (host, path) = rest.split_once(':').ok_or(shape)?;
        check_name(user).map_err(|why| format!("has a user that {why}"))?;
        check_steps(path)?;
        return check(is_host(host) && !path.is_empty() && !path.starts_with([':', '-']), shape);
    };
    let scheme: Scheme = scheme.parse().map_err(|why| format!("has a scheme that {why}"))?;
    check(!rest.contains(['?', '#']), "has a query or a fragment: name a ref in git_ref instead")?;
    check(
        !rest.to_ascii_lowercase().contains("%2f"),
        "has a / that is percent-encoded: write it as /, or name another repository",
    )?;
    check_steps(rest)?;
    if scheme == Scheme::File {
        return check(rest.starts_with('/'), "is not file:// and an absolute path");
    }
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    let (user, host) =
        authority.rsplit_once('@').map_or((None, authority), |(user, host)| (Some(user), host));
    match (scheme, user) {
        (_, None) => {}
        (Scheme::Ssh, Some(user)) => check_name(user).map_err(|why| format!("has a user that {why}"))?,
        (_, Some(_)) => {
            return Err("has credentials: name a Nomad Variable in git_credentials_path instead".to_owned());
        }
    }
    check(is_host(host) && !path.is_empty(), "has no host or no path")
}

#[cfg(test)]
mod tests;
