//! What a task was given to open repositories and registries, and the secrets and keys of a build.

use std::collections::BTreeMap;

use secrecy::SecretString;

use crate::engine::RegistryAuth;
use crate::git;
use crate::job::credentials::{BASE_PASSWORD, BASE_USERNAME, GIT_KNOWN_HOSTS, GIT_SSH_KEY, Items};
use crate::job::{BUILD_KEY, BUILD_SECRET};
use crate::registry;

/// The items of a task's credentials: `git_username`, `registry_password` and so on.
pub(super) struct Credentials(Items);

impl Credentials {
    pub(super) fn new(items: Items) -> Self {
        Self(items)
    }

    /// As they are.
    pub(super) fn items(&self) -> &Items {
        &self.0
    }

    /// Those that must not be seen: all but keys of hosts, and names of users that are no tokens.
    pub(super) fn secrets(&self) -> impl Iterator<Item = &[u8]> {
        let is_public = |name: &str, value: &str| match name {
            GIT_KNOWN_HOSTS => true,
            "git_username" | "registry_username" => !is_like_a_token(value),
            _ => name.starts_with(BASE_USERNAME) && !is_like_a_token(value),
        };
        self.0.iter().filter(move |(name, value)| !is_public(name, value)).map(|(_, value)| value.as_bytes())
    }

    /// For the steps of a build, by ID.
    pub(super) fn build_secrets(&self) -> BTreeMap<String, SecretString> {
        self.by_id(BUILD_SECRET)
    }

    /// What the steps of a build sign with, by ID.
    pub(super) fn build_keys(&self) -> BTreeMap<String, SecretString> {
        self.by_id(BUILD_KEY)
    }

    fn by_id(&self, before: &str) -> BTreeMap<String, SecretString> {
        let secret = |(name, value): (&String, &String)| {
            Some((name.strip_prefix(before)?.to_owned(), SecretString::from(value.as_str())))
        };
        self.0.iter().filter_map(secret).collect()
    }

    fn item(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str).filter(|value| !value.is_empty())
    }

    fn login(&self, of: &str) -> Option<(String, SecretString)> {
        let item = |name: &str| self.item(&format!("{of}_{name}"));
        if let (Some(username), Some(password)) = (item("username"), item("password")) {
            return Some((username.to_owned(), SecretString::from(password)));
        }
        // What the forges document for a token in place of a password.
        item("token").map(|token| ("oauth2".to_owned(), SecretString::from(token)))
    }

    /// For the repository.
    pub(super) fn git(&self) -> Option<git::Credentials> {
        if let (Some(private), Some(known_hosts)) = (self.item(GIT_SSH_KEY), self.item(GIT_KNOWN_HOSTS)) {
            return Some(git::Credentials::Key {
                private: private.into(),
                known_hosts: known_hosts.to_owned(),
            });
        }
        self.login("git").map(|(username, password)| git::Credentials::Login { username, password })
    }

    /// For the registry.
    pub(super) fn registry(&self) -> Option<registry::Credentials> {
        self.registry_login().map(|(username, password)| registry::Credentials { username, password })
    }

    /// For whichever registry a build pulls from, where the job's own is at `own`.
    pub(super) fn of_registry(&self, host: &str, own: &str) -> Option<registry::Credentials> {
        if host == own {
            return self.registry();
        }
        let login = self.base_logins().find(|login| login.host == host)?;
        Some(registry::Credentials { username: login.username, password: login.password })
    }

    /// For the registry, as user and password.
    pub(super) fn registry_login(&self) -> Option<(String, SecretString)> {
        self.login("registry")
    }

    /// For the registries that a build only pulls from.
    pub(super) fn base_logins(&self) -> impl Iterator<Item = RegistryAuth> {
        self.0.iter().filter_map(|(name, username)| {
            let host = name.strip_prefix(BASE_USERNAME)?.to_owned();
            let password = self.item(&format!("{BASE_PASSWORD}{host}"))?;
            Some(RegistryAuth { host, username: username.clone(), password: password.into() })
        })
    }
}

/// The fewest characters that a forge's token has.
const SHORTEST_TOKEN: usize = 20;

/// Whether a user's name may be a token, as forges take one in its place. What else is as long and has a digit or a capital is no
/// loss to a log; a plain name stands in every image's, and is not hidden.
fn is_like_a_token(username: &str) -> bool {
    username.len() >= SHORTEST_TOKEN && username.bytes().any(|b| b.is_ascii_digit() || b.is_ascii_uppercase())
}

#[cfg(test)]
mod tests {
    use secrecy::ExposeSecret as _;

    use super::*;

    fn given(items: &[(&str, &str)]) -> Credentials {
        Credentials::new(items.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned())).collect())
    }

    #[test]
    fn what_is_hidden_is_all_but_names_and_hosts() {
        let all = given(&[
            ("git_ssh_key", "key"),
            ("git_known_hosts", "hosts"),
            ("registry_username", "me"),
            ("registry_password", "pw"),
            ("base_username:docker.io", "hub"),
            ("base_password:docker.io", "hubpw"),
            ("secret_npm", "npm"),
            ("ssh_default", "step"),
        ]);
        let mut hidden: Vec<_> = all.secrets().collect();
        hidden.sort_unstable();
        assert_eq!(hidden, [&b"hubpw"[..], b"key", b"npm", b"pw", b"step"]);
        let ids = |of: BTreeMap<String, SecretString>| of.into_keys().collect::<Vec<_>>();
        assert_eq!(
            (ids(all.build_secrets()), ids(all.build_keys())),
            (vec!["npm".to_owned()], vec!["default".to_owned()])
        );
        let bases: Vec<_> = all.base_logins().collect();
        assert_eq!(
            (bases.len(), bases[0].host.as_str(), bases[0].username.as_str()),
            (1, "docker.io", "hub")
        );
        assert_eq!(bases[0].password.expose_secret(), "hubpw");
        assert!(matches!(all.git(), Some(git::Credentials::Key { .. })));
    }

    #[test]
    fn a_users_name_that_may_be_a_token_is_hidden_and_a_plain_one_is_not() {
        for (username, is_hidden) in [
            ("ghp_16C7e42F292c6912E7710c838347Ae178B4a", true),
            ("glpat-xxYYzz11-abcdefghijk", true),
            ("0123456789abcdef0123456789abcdef01234567", true),
            ("x-access-token", false),
            ("oauth2", false),
            ("ci7", false),
            ("a-company-with-a-long-name", false),
        ] {
            for name in ["git_username", "registry_username", "base_username:docker.io"] {
                let given = given(&[(name, username)]);
                assert_eq!(given.secrets().count() == 1, is_hidden, "{name} {username}");
            }
        }
    }
}
