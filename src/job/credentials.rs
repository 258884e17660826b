//! Credentials by path: what a Nomad Variable or a secret in Vault has to have, and what of it a task is given.
//!
//! Invariant: a task is given what it needs, and no other item of the Variable. No item's text stands in an error.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::names::{RepoUrl, Scheme};

/// The items of a Variable, or of a secret in Vault.
pub type Items = BTreeMap<String, String>;

/// The items of a secret in Vault, from what the read of its path answers: of version 2 of the KV engine they lie one level lower.
///
/// # Errors
/// Where it is no object.
pub fn of_vault(answer: &[u8]) -> Result<Items, String> {
    let none = || "is no secret with items".to_owned();
    // What serde says of it may hold a part of it.
    let mut answer: Map<String, Value> = serde_json::from_slice(answer).map_err(|_| none())?;
    let is_second = answer.len() == 2 && answer.get("metadata").is_some_and(Value::is_object);
    let items = match is_second.then(|| answer.remove("data")).flatten() {
        Some(Value::Object(items)) => items,
        Some(_) => return Err("was deleted".to_owned()),
        None => answer,
    };
    let text = |value: Value| match value {
        Value::Null => None,
        Value::String(text) => Some(text),
        // A file of docker login is an object, where somebody put it in as JSON.
        other => Some(other.to_string()),
    };
    Ok(items.into_iter().filter_map(|(name, value)| Some((name, text(value)?))).collect())
}

/// A private key for a repository over SSH, as a task is given it.
pub const GIT_SSH_KEY: &str = "git_ssh_key";

/// The hosts that the key may be shown to, in the format of sshd(8).
pub const GIT_KNOWN_HOSTS: &str = "git_known_hosts";

/// What stands before the host in the items with the logins of registries that a build only pulls from.
pub const BASE_USERNAME: &str = "base_username:";

/// The same for the password.
pub const BASE_PASSWORD: &str = "base_password:";

/// What the header of a private key in OpenSSH's own format says (its PROTOCOL.key).
const OPENSSH_MAGIC: &[u8] = b"openssh-key-v1\0";

/// What of a Variable with registry credentials is for whom.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct ForRegistry {
    /// For each task that reaches the registry.
    pub login: Items,
    /// For the build alone: other registries, which it may pull from.
    pub bases: Items,
}

/// What a repository's task is given of a Variable.
///
/// # Errors
/// What the Variable lacks, as said of it.
pub fn for_repository(variable: &Items, url: &RepoUrl) -> Result<Items, String> {
    if url.scheme() != Scheme::Ssh {
        return login(variable, "git");
    }
    let (Some(key), Some(hosts)) = (item(variable, "ssh_key"), item(variable, "known_hosts")) else {
        return Err(
            "names what is without the items ssh_key and known_hosts, which a repository over SSH takes"
                .to_owned(),
        );
    };
    let key = private_key(key).map_err(|why| format!("has an ssh_key that {why}"))?;
    let given = [(GIT_SSH_KEY, key), (GIT_KNOWN_HOSTS, text_file(hosts))];
    Ok(given.map(|(name, text)| (name.to_owned(), text)).into())
}

/// What the tasks of a job that publishes to `host` are given of a Variable.
///
/// # Errors
/// What the Variable lacks, as said of it.
pub fn for_registry(variable: &Items, host: &str) -> Result<ForRegistry, String> {
    let Some(config) = item(variable, "config.json") else {
        return Ok(ForRegistry { login: login(variable, "registry")?, bases: Items::new() });
    };
    let mut logins = docker_logins(config)?;
    let own = logins.remove(&host_of(host));
    let login = match (login(variable, "registry"), own) {
        (Ok(login), _) => login,
        (Err(_), Some(Ok((username, password)))) => {
            [("registry_username", username), ("registry_password", password)]
                .map(|(name, text)| (name.to_owned(), text))
                .into()
        }
        (Err(_), Some(Err(why))) => return Err(format!("has a config.json that {why} for {host}")),
        (Err(_), None) => {
            return Err(format!("has a config.json without a login for {host}: add one to its auths"));
        }
    };
    let mut bases = Items::new();
    for (host, login) in logins {
        // What cannot be used for another registry may not be needed.
        let Ok((username, password)) = login else { continue };
        bases.insert(format!("{BASE_USERNAME}{host}"), username);
        bases.insert(format!("{BASE_PASSWORD}{host}"), password);
    }
    Ok(ForRegistry { login, bases })
}

fn item<'a>(variable: &'a Items, name: &str) -> Option<&'a str> {
    variable.get(name).map(String::as_str).filter(|text| !text.trim().is_empty())
}

/// A user and a password, or a token.
fn login(variable: &Items, of: &str) -> Result<Items, String> {
    let given = |names: &[&str]| {
        let items = names.iter().map(|name| Some((format!("{of}_{name}"), item(variable, name)?.to_owned())));
        items.collect::<Option<Items>>()
    };
    given(&["username", "password"]).or_else(|| given(&["token"])).ok_or_else(|| {
        let further = if of == "registry" { ", or config.json" } else { "" };
        format!("names what is without the items username and password, or token{further}")
    })
}

/// A text as the file it was: shells and editors take its last line's end, which OpenSSH wants.
fn text_file(text: &str) -> String {
    format!("{}\n", text.replace("\r\n", "\n").trim_matches('\n'))
}

/// A private key as the file it was.
pub(super) fn private_key(text: &str) -> Result<String, &'static str> {
    let key = text_file(text);
    if !key.starts_with("-----BEGIN ") || !key.contains("PRIVATE KEY-----") {
        return Err("is no private key: it is the text of the file that ssh-keygen makes, without .pub");
    }
    if has_passphrase(&key) {
        return Err(
            "has a passphrase, which nobody is there to type: make a deploy key without (ssh-keygen -N '')",
        );
    }
    Ok(key)
}

fn has_passphrase(key: &str) -> bool {
    // PKCS #8 says so in its first line, PEM in a header.
    if key.contains("ENCRYPTED") {
        return true;
    }
    let body: String = key.lines().filter(|line| !line.starts_with("-----")).collect();
    let Ok(bytes) = BASE64_STANDARD.decode(body) else { return false };
    let cipher = bytes.strip_prefix(OPENSSH_MAGIC).and_then(|rest| {
        let (length, rest) = rest.split_first_chunk::<4>()?;
        rest.get(..usize::try_from(u32::from_be_bytes(*length)).ok()?)
    });
    cipher.is_some_and(|cipher| cipher != b"none")
}

/// The file of `docker login`.
#[derive(Deserialize)]
struct DockerConfig {
    auths: BTreeMap<String, DockerAuth>,
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase", default)]
#[derive(Default)]
struct DockerAuth {
    auth: String,
    username: String,
    password: String,
    identitytoken: String,
}

/// A user and a password, or why there is none.
type DockerLogin = Result<(String, String), &'static str>;

/// The logins of a Docker configuration, by host.
fn docker_logins(config: &str) -> Result<BTreeMap<String, DockerLogin>, String> {
    // What serde says of it may hold a part of it.
    let config: DockerConfig = serde_json::from_str(config).map_err(|_| {
        "has a config.json that is not the file of docker login: a JSON object with auths".to_owned()
    })?;
    let mut logins = BTreeMap::new();
    // Docker keeps more below a registry's address than its login.
    let whole = |server: &str| matches!(path_of(server), "" | "v1" | "v2");
    for (server, auth) in config.auths.iter().filter(|(server, _)| whole(server)) {
        let login = docker_login(auth);
        if path_of(server).is_empty() {
            logins.insert(host_of(server), login);
        } else {
            logins.entry(host_of(server)).or_insert(login);
        }
    }
    Ok(logins)
}

fn docker_login(auth: &DockerAuth) -> DockerLogin {
    if !auth.identitytoken.is_empty() {
        return Err("has an identity token in place of a password or an access token");
    }
    if !auth.username.is_empty() && !auth.password.is_empty() {
        return Ok((auth.username.clone(), auth.password.clone()));
    }
    if auth.auth.is_empty() {
        return Err("keeps the login in a credential helper of its machine");
    }
    let decoded = BASE64_STANDARD.decode(&auth.auth).ok().and_then(|bytes| String::from_utf8(bytes).ok());
    let (username, password) = decoded
        .as_deref()
        .and_then(|text| text.split_once(':'))
        .ok_or("has an auth that is not base64 of user:password")?;
    let password = password.trim_end_matches('\0');
    if username.is_empty() || password.is_empty() {
        return Err("has an auth without a user or without a password");
    }
    Ok((username.to_owned(), password.to_owned()))
}

/// What stands behind the host.
fn path_of(server: &str) -> &str {
    let rest = server.split_once("://").map_or(server, |(_, rest)| rest);
    rest.split_once('/').map_or("", |(_, path)| path.trim_end_matches('/'))
}

/// The host of a registry as `docker login` writes it down: perhaps with a scheme and a path, and Docker Hub by an old name.
fn host_of(server: &str) -> String {
    let rest = server.split_once("://").map_or(server, |(_, rest)| rest);
    let host = rest.split('/').next().unwrap_or(rest).to_ascii_lowercase();
    match host.as_str() {
        "index.docker.io" | "registry-1.docker.io" => "docker.io".to_owned(),
        _ => host,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLEAR: &str = "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXktdjEAAAAABG5vbmUAAAAEbm9uZQAAAAAAAAABAAAAMwAAAAtzc2gtZW\n-----END OPENSSH PRIVATE KEY-----";
    const LOCKED: &str = "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXktdjEAAAAACmFlczI1Ni1jdHIAAAAGYmNyeXB0AAAAGAAAABC1\n-----END OPENSSH PRIVATE KEY-----";

    fn items(items: &[(&str, &str)]) -> Items {
        items.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned())).collect()
    }

    fn url(text: &str) -> RepoUrl {
        text.parse().unwrap()
    }

    #[test]
    fn a_repository_is_given_what_its_transport_takes_and_nothing_else() {
        let all = items(&[
            ("username", "me"),
            ("password", "pw"),
            ("token", "t"),
            ("ssh_key", &CLEAR.replace('\n', "\r\n")),
            ("known_hosts", "h ssh-ed25519 A"),
            ("other", "x"),
        ]);
        let login = items(&[("git_username", "me"), ("git_password", "pw")]);
        assert_eq!(for_repository(&all, &url("https://h/a")).unwrap(), login);
        let key = items(&[("git_known_hosts", "h ssh-ed25519 A\n"), ("git_ssh_key", &format!("{CLEAR}\n"))]);
        assert_eq!(for_repository(&all, &url("ssh://git@h/a")).unwrap(), key);
        assert_eq!(for_repository(&all, &url("git@h:a")).unwrap(), key);
        let token = items(&[("token", "t"), ("username", "me")]);
        assert_eq!(for_repository(&token, &url("https://h/a")).unwrap(), items(&[("git_token", "t")]));
    }

    #[test]
    fn what_a_repository_cannot_use_is_told_by_name_and_without_its_text() {
        let (ssh, https) = (url("ssh://git@h/a"), url("https://h/a"));
        for (variable, url, what) in [
            (items(&[("ssh_key", CLEAR), ("known_hosts", "h")]), &https, "username and password"),
            (items(&[("username", "me"), ("password", " ")]), &https, "username and password"),
            (items(&[("ssh_key", CLEAR)]), &ssh, "known_hosts"),
            (items(&[("token", "canary")]), &ssh, "ssh_key"),
            (items(&[("ssh_key", "ssh-ed25519 canary"), ("known_hosts", "h")]), &ssh, "no private key"),
            (items(&[("ssh_key", LOCKED), ("known_hosts", "h")]), &ssh, "passphrase"),
            (
                items(&[("ssh_key", "-----BEGIN ENCRYPTED PRIVATE KEY-----\ncanary"), ("known_hosts", "h")]),
                &ssh,
                "passphrase",
            ),
        ] {
            let why = for_repository(&variable, url).unwrap_err();
            assert!(why.contains(what) && !why.contains("canary"), "{why}");
        }
    }

    #[test]
    fn a_secret_in_vault_has_its_items_in_either_version() {
        let all = items(&[("username", "me"), ("n", "7"), ("config.json", r#"{"auths":{}}"#)]);
        let items = r#"{"username": "me", "n": 7, "none": null, "config.json": {"auths": {}}}"#;
        assert_eq!(of_vault(items.as_bytes()).unwrap(), all);
        let second = format!(r#"{{"data": {items}, "metadata": {{"version": 3}}}}"#);
        assert_eq!(of_vault(second.as_bytes()).unwrap(), all);
        // In the first version, these are names as others.
        let first = br#"{"data": "x", "metadata": "y"}"#;
        assert_eq!(of_vault(first).unwrap().len(), 2);
        for (answer, why) in [
            (r#"{"data": null, "metadata": {"deletion_time": "x"}}"#, "deleted"),
            ("[]", "no secret"),
            ("canary", "no secret"),
            ("", "no secret"),
        ] {
            let said = of_vault(answer.as_bytes()).unwrap_err();
            assert!(said.contains(why) && !said.contains("canary"), "{said}");
        }
    }

    #[test]
    fn a_docker_configuration_gives_the_registrys_login_to_all_and_the_others_to_the_build() {
        let auth = BASE64_STANDARD.encode("hub:p:w");
        let config = format!(
            r#"{{"auths": {{"https://index.docker.io/v1/": {{"auth": "{auth}"}},
                 "Registry.example.com:5000": {{"username": "me", "password": "pw"}},
                 "https://index.docker.io/v1/refresh-token": {{"username": "hub", "password": "refresh"}},
                 "ghcr.io": {{}}, "a.azurecr.io": {{"auth": "x", "identitytoken": "y"}}}}, "credsStore": "x"}}"#
        );
        let variable = items(&[("config.json", &config)]);
        let given = for_registry(&variable, "registry.example.com:5000").unwrap();
        assert_eq!(given.login, items(&[("registry_username", "me"), ("registry_password", "pw")]));
        let hub = items(&[("base_username:docker.io", "hub"), ("base_password:docker.io", "p:w")]);
        assert_eq!(given.bases, hub);
        let given = for_registry(&variable, "docker.io").unwrap();
        assert_eq!(given.login, items(&[("registry_username", "hub"), ("registry_password", "p:w")]));
        for (host, what) in [
            ("ghcr.io", "helper"),
            ("a.azurecr.io", "identity token"),
            ("other.example.com", "without a login"),
        ] {
            let why = for_registry(&variable, host).unwrap_err();
            assert!(why.contains(what) && why.contains(host), "{why}");
        }
        let both = items(&[("config.json", &config), ("token", "t")]);
        let given = for_registry(&both, "other.example.com").unwrap();
        assert_eq!(given.login, items(&[("registry_token", "t")]));
        assert!(given.bases.contains_key("base_username:registry.example.com:5000"), "{given:?}");
    }

    #[test]
    fn what_is_no_docker_configuration_is_told_without_its_text() {
        for config in ["canary", "[]", r#"{"auths": {"h": "canary"}}"#, r#"{"canary": 1}"#] {
            let why = for_registry(&items(&[("config.json", config)]), "h").unwrap_err();
            assert!(why.contains("docker login") && !why.contains("canary"), "{why}");
        }
        for (auth, what) in
            [("%", "user:password"), ("bm9jb2xvbg==", "user:password"), ("dXNlcjo=", "without a password")]
        {
            let config = format!(r#"{{"auths": {{"h": {{"auth": "{auth}"}}}}}}"#);
            let why = for_registry(&items(&[("config.json", &config)]), "h").unwrap_err();
            assert!(why.contains(what), "{why}");
        }
        let why = for_registry(&items(&[("user", "me")]), "h").unwrap_err();
        assert!(why.contains("token, or config.json"), "{why}");
    }
}
