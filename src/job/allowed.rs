//! What an operator lets submissions name: registries, repositories, secrets in Vault, and names of arguments and variables.
//!
//! Invariant: a list that is empty allows everything, but for those of Vault and of frontends, which allow nothing; one that is not
//! allows nothing else.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::names::{RegistryUrl, RepoUrl};
use super::paths::{CredentialsPath, VaultPath};

/// The rule that is for all.
const ANY: &str = "*";

/// Docker's own frontend, of any version.
const DOCKERFILE_FRONTEND: &str = "docker.io/docker/dockerfile";

/// A rule as an operator writes it.
macro_rules! rule {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl TryFrom<String> for $name {
            type Error = String;

            fn try_from(text: String) -> Result<Self, String> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(rule: $name) -> Self {
                rule.0
            }
        }
    };
}

rule!(
    /// `host[:port][/path]`: a registry, or what is below a path of it.
    RegistryRule
);
rule!(
    /// An image that may read a Dockerfile, written like a registry's rule, or `*` for whichever.
    FrontendRule
);
rule!(
    /// A repository's address, or the begin of several: up to a `/`.
    RepoRule
);
rule!(
    /// A name of a build argument or a variable, or, with a `*` at its end, the begin of several.
    NameRule
);
rule!(
    /// The path of a secret in Vault, for it and what lies below, or `*` for all that Vault gives.
    VaultRule
);

impl FromStr for VaultRule {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let rule = Self(text.to_owned());
        if rule.is_all() { Ok(rule) } else { text.parse::<VaultPath>().map(|_| rule) }
    }
}

impl VaultRule {
    fn is_all(&self) -> bool {
        self.0 == ANY
    }

    fn covers(&self, path: &VaultPath) -> bool {
        self.is_all() || is_at_or_below(path.as_str(), &self.0)
    }
}

impl FromStr for RegistryRule {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        text.parse::<RegistryUrl>().map(|_| Self(text.to_ascii_lowercase()))
    }
}

impl RegistryRule {
    /// The registry's host.
    pub fn host(&self) -> &str {
        self.0.split('/').next().unwrap_or(&self.0)
    }

    pub(super) fn covers(&self, image: &str) -> bool {
        is_at_or_below(&image.to_ascii_lowercase(), &self.0)
    }
}

impl FromStr for FrontendRule {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == ANY {
            Ok(Self(text.to_owned()))
        } else {
            text.parse().map(|RegistryRule(text)| Self(text))
        }
    }
}

impl FrontendRule {
    /// Whether it is for whichever there are.
    pub fn is_all(&self) -> bool {
        self.0 == ANY
    }

    fn covers(&self, image: &str) -> bool {
        self.is_all() || is_at_or_below(&image.to_ascii_lowercase(), &self.0)
    }
}

impl FromStr for RepoRule {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let text = text.strip_suffix('/').unwrap_or(text);
        // A host alone is none yet.
        let whole = if text.splitn(4, '/').count() < 4 && text.contains("://") {
            format!("{text}/x")
        } else {
            text.to_owned()
        };
        whole.parse::<RepoUrl>().map(|_| Self(text.to_owned()))
    }
}

impl RepoRule {
    fn covers(&self, repository: &RepoUrl) -> bool {
        let (rule, asked) = (Address::of(&self.0), Address::of(repository.as_str()));
        let path = asked.path.strip_suffix(".git").unwrap_or(asked.path);
        rule.scheme == asked.scheme
            && rule.host == asked.host
            && rule.user.is_none_or(|user| asked.user == Some(user))
            && is_at_or_below(path, rule.path.strip_suffix(".git").unwrap_or(rule.path))
    }
}

impl FromStr for NameRule {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let name = text.strip_suffix('*').unwrap_or(text);
        let good = !text.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
        if good {
            Ok(Self(text.to_owned()))
        } else {
            Err("is not a name, or the begin of one and a *".to_owned())
        }
    }
}

impl NameRule {
    fn covers(&self, name: &str) -> bool {
        self.0.strip_suffix('*').map_or(self.0 == name, |begin| name.starts_with(begin))
    }
}

/// A repository's address in its parts.
pub(super) struct Address<'a> {
    scheme: &'a str,
    user: Option<&'a str>,
    /// Without a port that is the scheme's own.
    pub(super) host: String,
    pub(super) path: &'a str,
}

impl<'a> Address<'a> {
    /// Of a text that is one: `scheme://[user@]host[:port]/path`, or `user@host:path`, which is ssh's.
    pub(super) fn of(text: &'a str) -> Self {
        let (scheme, (authority, path)) = text.split_once("://").map_or_else(
            || ("ssh", text.split_once(':').unwrap_or((text, ""))),
            |(scheme, rest)| (scheme, rest.split_once('/').unwrap_or((rest, ""))),
        );
        let (user, host) =
            authority.rsplit_once('@').map_or((None, authority), |(user, host)| (Some(user), host));
        let own_port = match scheme {
            "https" => ":443",
            "http" => ":80",
            _ => ":22",
        };
        let host = host.strip_suffix(own_port).unwrap_or(host).to_ascii_lowercase();
        Self { scheme, user, host, path: path.trim_matches('/') }
    }
}

fn is_at_or_below(text: &str, begin: &str) -> bool {
    text.strip_prefix(begin).is_some_and(|rest| begin.is_empty() || rest.is_empty() || rest.starts_with('/'))
}

/// All of an operator's rules.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Allowed {
    /// Where images may go.
    pub registries: Vec<RegistryRule>,
    /// What may be built.
    pub repositories: Vec<RepoRule>,
    /// Names that build arguments and the variables of tests may not have.
    pub forbidden_names: Vec<NameRule>,
    /// What a Dockerfile may build from.
    pub base_images: Vec<RegistryRule>,
    /// What may read a Dockerfile in place of the engine's own frontend.
    pub frontends: Vec<FrontendRule>,
    /// What the engine may download for an `ADD`.
    pub downloads: Vec<RegistryRule>,
    /// Which secrets in Vault credentials may be.
    pub vault: Vec<VaultRule>,
}

impl Default for Allowed {
    fn default() -> Self {
        Self {
            registries: Vec::new(),
            repositories: Vec::new(),
            forbidden_names: Vec::new(),
            base_images: Vec::new(),
            // One of somebody's own need not keep to what the engine is told with the build: its network, its caches, its labels.
            frontends: vec![FrontendRule(DOCKERFILE_FRONTEND.to_owned())],
            downloads: Vec::new(),
            vault: Vec::new(),
        }
    }
}

impl Allowed {
    /// Whether images may go to a repository in a registry, `host[:port]/name`.
    pub(super) fn image(&self, image: &str) -> Result<(), String> {
        held(&self.registries, |rule| rule.covers(image), "registries")
    }

    /// Whether a build may take an image, `host[:port]/name`.
    ///
    /// # Errors
    /// Why not.
    pub fn base_image(&self, image: &str) -> Result<(), String> {
        held(&self.base_images, |rule| rule.covers(image), "base images")
    }

    /// Whether an image may read a Dockerfile. It may build from whatever it likes.
    ///
    /// # Errors
    /// Why not.
    pub fn frontend(&self, image: &str) -> Result<(), String> {
        if self.frontends.is_empty() {
            return Err("is a frontend, and none is allowed here: leave \"# syntax=\" out".to_owned());
        }
        held(&self.frontends, |rule| rule.covers(image), "frontends")
            .map_err(|why| format!("{why}: name one of them by \"# syntax=\", or none"))
    }

    /// Whether a repository may be built.
    pub(super) fn repository(&self, repository: &RepoUrl) -> Result<(), String> {
        held(&self.repositories, |rule| rule.covers(repository), "repositories")
    }

    /// Whether a repository may be a submodule of one that is built: where there is a list, it has to be one that may be built itself.
    ///
    /// # Errors
    /// Why not.
    pub fn submodule(&self, address: &str) -> Result<(), String> {
        if self.repositories.is_empty() {
            return Ok(());
        }
        let repository = address
            .parse::<RepoUrl>()
            .map_err(|error| format!("is not one that may be built here: {error}"))?;
        self.repository(&repository)
    }

    /// Whether credentials may be there.
    pub(super) fn credentials(&self, path: &CredentialsPath) -> Result<(), String> {
        match path.vault() {
            Some(_) if self.vault.is_empty() => {
                Err("is a secret in Vault, and none may be named here: name a Nomad Variable".to_owned())
            }
            Some(path) => held(&self.vault, |rule| rule.covers(path), "secrets in Vault"),
            None => Ok(()),
        }
    }

    /// Whether a build argument or a variable may have a name.
    pub(super) fn name(&self, name: &str) -> Result<(), String> {
        match self.forbidden_names.iter().find(|rule| rule.covers(name)) {
            None => Ok(()),
            Some(rule) => Err(format!("is a name that is forbidden here ({rule}): leave it out")),
        }
    }
}

pub(super) fn held<R: fmt::Display>(
    rules: &[R],
    covers: impl FnMut(&R) -> bool,
    what: &str,
) -> Result<(), String> {
    if rules.is_empty() || rules.iter().any(covers) {
        return Ok(());
    }
    let all: Vec<_> = rules.iter().map(ToString::to_string).collect();
    Err(format!("is none of the {what} allowed here: {}", all.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_registry_is_allowed_with_what_is_below_its_path() {
        for (rule, image, want) in [
            ("ghcr.io/acme", "ghcr.io/acme/api", true),
            ("ghcr.io/acme", "ghcr.io/acme", true),
            ("GHCR.io/acme", "ghcr.IO/acme/a/b", true),
            ("ghcr.io/acme", "ghcr.io/acme-evil/api", false),
            ("ghcr.io/acme", "evil.io/ghcr.io/acme", false),
            ("ghcr.io", "ghcr.io/anything", true),
            ("ghcr.io", "ghcr.io:5000/anything", false),
            ("ghcr.io", "ghcr.io.evil.example/x", false),
        ] {
            let allowed = Allowed { registries: vec![rule.parse().unwrap()], ..Allowed::default() };
            assert_eq!(allowed.image(image).is_ok(), want, "{rule} {image}");
        }
        assert!(Allowed::default().image("any.example/x").is_ok());
        assert!("https://ghcr.io".parse::<RegistryRule>().is_err());
    }

    #[test]
    fn where_base_images_are_limited_a_frontend_has_to_be_named() {
        let rule = |text: &str| vec![text.parse::<RegistryRule>().unwrap()];
        let none = Allowed::default();
        assert!(none.base_image("docker.io/library/alpine").is_ok());
        let bases = Allowed { base_images: rule("docker.io/library"), ..Allowed::default() };
        assert!(bases.base_image("docker.io/library/alpine").is_ok());
        assert!(bases.base_image("docker.io/eve/alpine").is_err());
        assert!(bases.frontend("docker.io/library/alpine").is_err());
    }

    #[test]
    fn a_frontend_has_to_be_allowed_and_docker_s_own_is() {
        for (rules, image, want) in [
            (None, "docker.io/docker/dockerfile", true),
            (None, "docker.io/docker/dockerfile-upstream", false),
            (None, "evil.example/docker.io/docker/dockerfile", false),
            (Some(&["ghcr.io/acme"][..]), "ghcr.io/acme/frontend", true),
            (Some(&["ghcr.io/acme"]), "docker.io/docker/dockerfile", false),
            (Some(&["*"]), "evil.example/frontend", true),
            (Some(&[]), "docker.io/docker/dockerfile", false),
        ] {
            let mut allowed = Allowed::default();
            if let Some(rules) = rules {
                allowed.frontends = rules.iter().map(|rule| rule.parse().unwrap()).collect();
            }
            assert_eq!(allowed.frontend(image).is_ok(), want, "{rules:?} {image}");
        }
    }

    #[test]
    fn a_repository_is_allowed_however_its_address_is_written() {
        for (rule, asked, want) in [
            ("https://github.com/acme/", "https://github.com/acme/api", true),
            ("https://github.com/acme", "https://GitHub.com:443/acme/api.git", true),
            ("https://github.com/acme/api.git", "https://github.com/acme/api", true),
            ("https://github.com/acme/api", "https://github.com/acme/api.git", true),
            ("https://github.com", "https://github.com/any/thing", true),
            ("https://github.com/acme", "https://github.com/acme-evil/api", false),
            ("https://github.com/acme", "http://github.com/acme/api", false),
            ("https://github.com/acme", "https://github.com.evil.example/acme/api", false),
            ("https://github.com/acme", "https://github.com:8443/acme/api", false),
            ("https://github.com/acme", "ssh://git@github.com/acme/api", false),
            ("ssh://git@github.com/acme", "git@github.com:acme/api.git", true),
            ("ssh://github.com/acme", "git@github.com:acme/api.git", true),
            ("git@github.com:acme", "ssh://git@github.com:22/acme/api", true),
            ("git@github.com:acme", "ssh://eve@github.com/acme/api", false),
            ("file:///srv/git", "file:///srv/git/a", true),
            ("file:///srv/git", "file:///srv/gitea/a", false),
        ] {
            let allowed = Allowed { repositories: vec![rule.parse().unwrap()], ..Allowed::default() };
            let asked: RepoUrl = asked.parse().unwrap();
            assert_eq!(allowed.repository(&asked).is_ok(), want, "{rule} {asked}");
        }
        assert!("github.com/acme".parse::<RepoRule>().is_err());
        let rule = "https://github.com/acme".parse().unwrap();
        let allowed = Allowed { repositories: vec![rule], ..Allowed::default() };
        for (address, want) in [
            ("https://github.com/acme/api", true),
            ("https://github.com/eve/api", false),
            ("https://eve:secret@github.com/acme/api", false),
            ("ext::sh -c id", false),
            ("../api", false),
            ("", false),
        ] {
            let found = allowed.submodule(address);
            assert_eq!(found.is_ok(), want, "{address}: {found:?}");
            assert!(!format!("{found:?}").contains("secret"), "{found:?}");
            assert!(Allowed::default().submodule(address).is_ok(), "git knows which it can get");
        }
    }

    #[test]
    fn no_secret_in_vault_is_allowed_but_those_that_are_listed() {
        let allowed = |rules: &[&str]| {
            let vault = rules.iter().map(|rule| rule.parse().unwrap()).collect();
            Allowed { vault, ..Allowed::default() }
        };
        for (rules, path, want) in [
            (&[][..], "creds/git", true),
            (&[], "vault:secret/data/ci/git", false),
            (&["secret/data/ci"], "vault:secret/data/ci/git", true),
            (&["secret/data/ci"], "vault:secret/data/ci", true),
            (&["secret/data/ci"], "vault:secret/data/cia", false),
            (&["kv/a", "kv/b"], "vault:kv/b/c", true),
            (&["*"], "vault:anything/at/all", true),
        ] {
            let path: CredentialsPath = path.parse().unwrap();
            assert_eq!(allowed(rules).credentials(&path).is_ok(), want, "{rules:?} {path}");
        }
        for bad in ["", "a//b", "../a", "secret/*"] {
            assert!(bad.parse::<VaultRule>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_name_is_forbidden_by_itself_or_by_its_begin() {
        let rules = ["LD_*", "PATH"].map(|rule| rule.parse().unwrap());
        let allowed = Allowed { forbidden_names: rules.to_vec(), ..Allowed::default() };
        for (name, good) in
            [("LD_PRELOAD", false), ("LD_", false), ("PATH", false), ("PATHS", true), ("LD", true)]
        {
            assert_eq!(allowed.name(name).is_ok(), good, "{name}");
        }
        for bad in ["", "A B", "*A", "A**"] {
            assert!(bad.parse::<NameRule>().is_err(), "{bad}");
        }
    }
}
