//! Where the archive is, and what opens it.

use std::collections::BTreeMap;
use std::path::PathBuf;

use reqwest::Url;
use secrecy::{ExposeSecret as _, SecretString};

use crate::environment::Reader;

/// The variable that names the archive.
const NAME: &str = "NOMAD_BUILD_ARCHIVE";

const WANTED: &str = "is neither file:///DIRECTORY nor s3://BUCKET/PREFIX";

/// Those of the shared variables that are addresses.
const ENDPOINTS: [&str; 2] = ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"];

/// The variables of a bucket that every program needs that reads or writes it.
const SHARED: [&str; 6] = [
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_ALLOW_HTTP",
    "AWS_VIRTUAL_HOSTED_STYLE_REQUEST",
];

/// The variables that name this process's own identity, and mean nothing elsewhere.
const OWN: [&str; 6] = [
    "AWS_ROLE_ARN",
    "AWS_ROLE_SESSION_NAME",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE",
];

/// The variables that are secret, and the items of a Nomad Variable that carry them.
const SECRET: [(&str, &str); 3] = [
    ("AWS_ACCESS_KEY_ID", "archive_access_key_id"),
    ("AWS_SECRET_ACCESS_KEY", "archive_secret_access_key"),
    ("AWS_SESSION_TOKEN", "archive_session_token"),
];

/// Where the archive is, and what opens it.
#[derive(Clone, Debug)]
pub struct Settings {
    url: Url,
    shared: BTreeMap<&'static str, String>,
    own: BTreeMap<&'static str, String>,
    secret: BTreeMap<&'static str, SecretString>,
}

impl Settings {
    /// Reads the variables; none where there is no archive.
    pub fn read(reader: &mut Reader<'_>) -> Option<Self> {
        // Its text is not told: who mistakes its form may have put a key into it.
        let text = reader.text(NAME)?;
        let Ok(url) = text.parse::<Url>() else {
            reader.wrong(NAME, WANTED);
            return None;
        };
        let mut settings =
            Self { url, shared: BTreeMap::new(), own: BTreeMap::new(), secret: BTreeMap::new() };
        if let Err(why) = settings.check() {
            reader.wrong(NAME, &why);
            return None;
        }
        if settings.url.scheme() == "s3" {
            let variables = |reader: &mut Reader<'_>, names: &[&'static str]| {
                names.iter().filter_map(|name| Some((*name, reader.text(name)?))).collect()
            };
            settings.shared = variables(reader, &SHARED);
            settings.own = variables(reader, &OWN);
            settings.secret =
                SECRET.iter().filter_map(|(name, _)| Some((*name, reader.text(name)?.into()))).collect();
            let [id, key, _] = SECRET.map(|(name, _)| settings.secret.contains_key(name));
            if id != key {
                reader.wrong(NAME, "needs AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or neither of them");
            }
            for name in ENDPOINTS.into_iter().filter(|name| settings.shared.contains_key(name)) {
                let is_endpoint = |url: Url| matches!(url.scheme(), "http" | "https") && is_place(&url);
                if !settings.shared[name].parse().is_ok_and(is_endpoint) {
                    reader.wrong(
                        name,
                        "is no plain http or https URL: credentials are given by AWS_ACCESS_KEY_ID",
                    );
                }
            }
        }
        Some(settings)
    }

    fn check(&self) -> Result<(), String> {
        let url = &self.url;
        if !is_place(url) || url.port().is_some() {
            return Err(
                "has more than a place: credentials are given by AWS_ACCESS_KEY_ID and its like".to_owned()
            );
        }
        match (url.scheme(), self.directory()) {
            ("s3", _) if url.host_str().is_some() => Ok(()),
            ("file", Some(path)) if path.is_dir() => Ok(()),
            ("file", Some(path)) => Err(format!(
                "names {}, which is no directory here: create it, for its owner only",
                path.display()
            )),
            _ => Err(WANTED.to_owned()),
        }
    }

    /// Whether the bucket is reached by plain HTTP.
    pub(super) fn is_plain(&self) -> bool {
        ENDPOINTS.iter().any(|name| self.shared.get(name).is_some_and(|url| url.starts_with("http://")))
    }

    /// The place.
    pub fn url(&self) -> &Url {
        &self.url
    }

    /// The directory; none where the archive is a bucket.
    pub fn directory(&self) -> Option<PathBuf> {
        (self.url.scheme() == "file").then(|| self.url.to_file_path().ok()).flatten()
    }

    /// What a runner's environment has to have, and nothing secret.
    pub fn environment(&self) -> BTreeMap<String, String> {
        let shared = self.shared.iter().map(|(name, value)| ((*name).to_owned(), value.clone()));
        shared.chain([(NAME.to_owned(), self.url.to_string())]).collect()
    }

    /// The secrets, as items of a Nomad Variable.
    pub fn items(&self) -> BTreeMap<String, String> {
        let item = |(name, item): &(&'static str, &str)| {
            Some(((*item).to_owned(), self.secret.get(name)?.expose_secret().to_owned()))
        };
        SECRET.iter().filter_map(item).collect()
    }

    /// The same, with the secrets of such items.
    #[must_use]
    pub fn with_items(mut self, items: &BTreeMap<String, String>) -> Self {
        let secrets = SECRET.iter();
        let secrets =
            secrets.filter_map(|(name, item)| Some((*name, SecretString::from(items.get(*item)?.as_str()))));
        self.secret.extend(secrets);
        self
    }

    /// Everything that the store is told, by the name of its variable.
    pub(super) fn options(&self) -> impl Iterator<Item = (&'static str, String)> {
        let plain = self.shared.iter().chain(&self.own).map(|(name, value)| (*name, value.clone()));
        plain.chain(self.secret.iter().map(|(name, value)| (*name, value.expose_secret().to_owned())))
    }
}

/// Whether a URL has nothing that may be a secret.
fn is_place(url: &Url) -> bool {
    let has_user = !url.username().is_empty() || url.password().is_some();
    !has_user && url.query().is_none() && url.fragment().is_none()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variables: &[(&str, &str)]) -> Result<Option<Settings>, Vec<String>> {
        let find = |name: &str| variables.iter().find(|(known, _)| *known == name);
        let source = |name: &str| find(name).map(|(_, value)| (*value).to_owned());
        let mut reader = Reader::new(&source);
        let settings = Settings::read(&mut reader);
        reader.finish(settings).map_err(|wrong| wrong.0)
    }

    #[test]
    fn an_archive_is_a_directory_or_a_bucket() {
        assert!(read(&[]).unwrap().is_none());
        let files = read(&[(NAME, "file:///tmp"), ("AWS_REGION", "x")]).unwrap().unwrap();
        assert_eq!(files.directory(), Some("/tmp".into()));
        assert_eq!(files.environment(), BTreeMap::from([(NAME.to_owned(), "file:///tmp".to_owned())]));
        for url in [
            "/tmp",
            "file:///no/such",
            "s3:///a",
            "gs://a",
            "s3://me:secret@a/b",
            "s3://a/b?c=d",
            "file://h/x",
        ] {
            let errors = read(&[(NAME, url)]).unwrap_err();
            assert!(errors[0].starts_with("NOMAD_BUILD_ARCHIVE "), "{url}: {errors:?}");
        }
        for url in ["s3://ID:canary/def@bucket/a", "s3://ID:123/canary@bucket"] {
            let errors = read(&[(NAME, url)]).unwrap_err();
            assert!(!errors[0].contains("canary"), "{errors:?}");
        }
        for url in ["http://me:canary@store", "ftp://store/canary", "canary:9000"] {
            let errors = read(&[(NAME, "s3://a/b"), ("AWS_ENDPOINT_URL", url)]).unwrap_err();
            assert!(
                errors[0].starts_with("AWS_ENDPOINT_URL ") && !errors[0].contains("canary"),
                "{errors:?}"
            );
        }
        let half = read(&[(NAME, "s3://a/b"), ("AWS_ACCESS_KEY_ID", "id")]).unwrap_err();
        assert!(half[0].contains("AWS_SECRET_ACCESS_KEY"), "{half:?}");
    }

    #[test]
    fn secrets_travel_apart_from_the_environment() {
        let settings = read(&[
            (NAME, "s3://bucket/prefix"),
            ("AWS_REGION", "eu-central-1"),
            ("AWS_ROLE_ARN", "arn"),
            ("AWS_ACCESS_KEY_ID", "id"),
            ("AWS_SECRET_ACCESS_KEY", "canary"),
        ]);
        let settings = settings.unwrap().unwrap();
        assert!(!format!("{settings:?}").contains("canary"));
        let environment = settings.environment();
        assert_eq!(environment.keys().collect::<Vec<_>>(), ["AWS_REGION", NAME]);
        let variables: Vec<_> =
            environment.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        let other = read(&variables).unwrap().unwrap().with_items(&settings.items());
        let options: BTreeMap<_, _> = other.options().collect();
        assert_eq!(options["AWS_SECRET_ACCESS_KEY"], "canary");
        assert_eq!(options["AWS_REGION"], "eu-central-1");
        assert!(!options.contains_key("AWS_ROLE_ARN"));
    }
}
