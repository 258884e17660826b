//! From what was sent to a [`Spec`]: every field checked, every error reported.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use jiff::fmt::temporal::SpanParser;
use serde_json::Value;

use super::fields::{Fields, Invalid};
use super::names::{ImageName, LONGEST_PART, RegistryUrl, RepoUrl, Tag, check_length};
use super::paths::CredentialsPath;
use super::secrets::{self, Kind, SecretItem};
use super::spec::{KEEP_GIT_DIR, LEAST_MEMORY_MB, Limits, Policy, Resources, Spec};

/// The labels that the service sets itself.
const OWN_LABELS: [&str; 3] = [
    "org.opencontainers.image.source",
    "org.opencontainers.image.revision",
    "org.opencontainers.image.created",
];

/// Bytes of build arguments and labels together, as they go to an engine: JSON, encoded for a URL. A URL has 64 KiB, and
/// what else is in it has room in the rest.
const MOST_IN_URL: usize = 48 * 1024;

const DEFAULT_TIMEOUTS: Limits<Duration> = Limits {
    build: Duration::from_mins(30),
    test: Duration::from_mins(15),
    publish: Duration::from_mins(15),
};

impl Spec {
    /// Checks a submission against its grammar and the operator's policy.
    ///
    /// # Errors
    /// Everything that is wrong with it, at once.
    pub fn from_json(value: Value, policy: &Policy) -> Result<Self, Invalid> {
        let mut fields = Fields::new("", value);
        let spec = read(&mut fields, policy);
        let errors = fields.into_errors();
        match spec {
            Some(spec) if errors.is_empty() => Ok(spec),
            _ => Err(Invalid(errors)),
        }
    }
}

/// Reads every field before it gives up on any; `None` only where an error was noted.
fn read(fields: &mut Fields, policy: &Policy) -> Option<Spec> {
    let owner = fields.required("owner");
    let repo_url = repo_url(fields, policy);
    let git_ref = fields.parsed("git_ref");
    let git_credentials_path = CredentialsPath::take(fields, "git_credentials_path", policy);
    let dockerfile_path = fields.parsed("dockerfile_path").or_else(|| "Dockerfile".parse().ok());
    let context_path = fields.parsed("context_path").or_else(|| ".".parse().ok());
    let image_tags = image_tags(fields);
    let registry_url: Option<RegistryUrl> = fields.required("registry_url");
    let registry_credentials_path = CredentialsPath::take(fields, "registry_credentials_path", policy);
    let image_name = image_name(fields, registry_url.as_ref(), repo_url.as_ref());
    if let (Some(registry), Some(name)) = (&registry_url, &image_name)
        && let Err(why) = policy.allowed.image(&format!("{}/{name}", registry.host()))
    {
        fields.wrong("registry_url", &why);
    }
    let test_commands = test_commands(fields);
    let test_entry_point = fields.boolean("test_entry_point");
    let forbidden = |name: &str| policy.allowed.name(name);
    let test_env = fields.map("test_env", |name, _| variable_name(name).and_then(|()| forbidden(name)));
    let build_args = fields.map("build_args", |name, _| build_arg_name(name).and_then(|()| forbidden(name)));
    let [build_secrets, ssh] = [Kind::Secret, Kind::Key].map(|kind| step_items(fields, kind, policy));
    let target = fields.parsed::<Target>("target").map(|target| target.0);
    let labels = fields.map("labels", |name, _| label_name(name));
    fit_in_url(fields, &build_args, &labels);
    let timeouts = timeouts(fields, policy);
    let resources = resources(fields, policy);
    let no_cache = fields.boolean("no_cache");
    let priority =
        fields.number("priority", 1, 100).and_then(|priority| u8::try_from(priority).ok()).unwrap_or(50);
    Some(Spec {
        owner: owner?,
        repo_url: repo_url?,
        git_ref,
        git_credentials_path,
        dockerfile_path: dockerfile_path?,
        context_path: context_path?,
        image_tags,
        registry_url: registry_url?.without_path(),
        registry_credentials_path,
        image_name: image_name?,
        test_commands,
        test_entry_point,
        test_env,
        build_args,
        build_secrets,
        ssh,
        target,
        labels,
        timeouts,
        resources,
        no_cache,
        priority,
    })
}

fn repo_url(fields: &mut Fields, policy: &Policy) -> Option<RepoUrl> {
    let url: RepoUrl = fields.required("repo_url")?;
    if !policy.schemes.contains(&url.scheme()) {
        let allowed: Vec<_> = policy.schemes.iter().map(|scheme| scheme.as_str()).collect();
        let message =
            format!("has the scheme {}: allowed here are {}", url.scheme().as_str(), allowed.join(", "));
        fields.wrong("repo_url", &message);
        return None;
    }
    policy.allowed.repository(&url).map_err(|why| fields.wrong("repo_url", &why)).ok()?;
    Some(url)
}

fn image_tags(fields: &mut Fields) -> Vec<Tag> {
    let tags: Vec<Tag> = fields.list("image_tags");
    if tags.is_empty() || tags.len() > 32 {
        fields.wrong("image_tags", "must have 1 to 32 valid tags");
    }
    let mut seen = BTreeSet::new();
    for (index, tag) in tags.iter().enumerate() {
        if !seen.insert(tag) {
            fields.wrong(&format!("image_tags[{index}]"), "is there twice: leave one out");
        }
    }
    tags
}

/// The repository in the registry: the registry URL's path and the name asked for, or whichever of them is there, or
/// the source repository's name.
fn image_name(
    fields: &mut Fields,
    registry: Option<&RegistryUrl>,
    repo_url: Option<&RepoUrl>,
) -> Option<ImageName> {
    let asked = fields.text("image_name");
    if let Some(why) = asked.as_ref().and_then(|name| check_length(name, LONGEST_PART).err()) {
        fields.wrong("image_name", &why);
        return None;
    }
    let path = registry.and_then(RegistryUrl::path);
    let (name, field) = match (path, &asked) {
        (Some(path), Some(name)) => (format!("{path}/{name}"), "image_name"),
        (Some(path), None) => (path.to_owned(), "registry_url"),
        (None, Some(name)) => (name.clone(), "image_name"),
        (None, None) => (repo_url?.repository_name().to_ascii_lowercase(), "image_name"),
    };
    match name.parse() {
        Ok(name) => Some(name),
        Err(_) if asked.is_none() => {
            fields.wrong(field, "is missing, and the repository's own name is no OCI name: give one");
            None
        }
        Err(why) => {
            fields.wrong(field, &why);
            None
        }
    }
}

struct Command(String);

impl std::str::FromStr for Command {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.len() {
            0 => Err("is empty".to_owned()),
            1..=65_536 => Ok(Self(text.to_owned())),
            length => Err(format!("is {length} bytes long: at most 65536 are allowed; put it into a script")),
        }
    }
}

fn test_commands(fields: &mut Fields) -> Vec<String> {
    let commands: Vec<Command> = fields.list("test_commands");
    if commands.len() > 100 {
        fields.wrong("test_commands", "must have at most 100 commands: put them into a script");
    }
    commands.into_iter().map(|command| command.0).collect()
}

fn step_items(fields: &mut Fields, kind: Kind, policy: &Policy) -> BTreeMap<String, SecretItem> {
    let check = |id: &str, item: &str| {
        secrets::check_id(id)?;
        policy.allowed.credentials(item.parse::<SecretItem>()?.path())
    };
    let given = fields.map(kind.field(), check);
    if given.len() > secrets::MOST {
        fields.wrong(kind.field(), &format!("must have at most {} of them", secrets::MOST));
    }
    given.into_iter().filter_map(|(id, item)| Some((id, item.parse().ok()?))).collect()
}

struct Target(String);

impl std::str::FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let good = text.len() <= 128
            && text.starts_with(|c: char| c.is_ascii_alphanumeric())
            && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b));
        if good {
            Ok(Self(text.to_owned()))
        } else {
            Err("is not the name of a Dockerfile's stage".to_owned())
        }
    }
}

fn variable_name(name: &str) -> Result<(), String> {
    let good = name.len() <= 128
        && name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
    if good { Ok(()) } else { Err("has a name that is no variable's: letters, digits and _".to_owned()) }
}

fn build_arg_name(name: &str) -> Result<(), String> {
    variable_name(name)?;
    if name.starts_with("BUILDKIT_") && name != KEEP_GIT_DIR {
        return Err("is set by the service: names that start with BUILDKIT_ are its own".to_owned());
    }
    Ok(())
}

fn label_name(name: &str) -> Result<(), String> {
    let good = name.len() <= 128
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._/-".contains(&b));
    if !good {
        return Err("has a name that is no label's: letters, digits and . _ / -".to_owned());
    }
    if OWN_LABELS.contains(&name) || name.starts_with("nomad-build.") {
        return Err("is a label that the service sets itself: leave it out".to_owned());
    }
    Ok(())
}

fn fit_in_url(fields: &mut Fields, build_args: &BTreeMap<String, String>, labels: &BTreeMap<String, String>) {
    let (args, labels) = (length_in_url(build_args), length_in_url(labels));
    if args + labels > MOST_IN_URL {
        let message = format!(
            "is too long: build_args and labels have {} bytes together as JSON encoded for a URL, which is how an \
             engine takes them, and at most {MOST_IN_URL} are allowed; put what is long into a file",
            args + labels
        );
        fields.wrong(if args >= labels { "build_args" } else { "labels" }, &message);
    }
}

fn length_in_url(map: &BTreeMap<String, String>) -> usize {
    let json = serde_json::json!(map).to_string();
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b" *-._".contains(&byte);
    json.bytes().map(|byte| if plain(byte) { 1 } else { 3 }).sum()
}

fn timeouts(fields: &mut Fields, policy: &Policy) -> Limits<Duration> {
    fields.nested("timeouts", |fields| Limits {
        build: timeout(fields, "build", policy, DEFAULT_TIMEOUTS.build),
        test: timeout(fields, "test", policy, DEFAULT_TIMEOUTS.test),
        publish: timeout(fields, "publish", policy, DEFAULT_TIMEOUTS.publish),
    })
}

fn timeout(fields: &mut Fields, name: &str, policy: &Policy, default: Duration) -> Duration {
    let default = default.min(policy.max_timeout);
    let Some(text) = fields.text(name) else { return default };
    let parsed = SpanParser::new().parse_unsigned_duration(&text).ok();
    match parsed {
        Some(value) if value.subsec_nanos() == 0 && !value.is_zero() && value <= policy.max_timeout => value,
        Some(value) if value > policy.max_timeout => {
            fields.wrong(
                name,
                &format!("is longer than the {} seconds allowed here", policy.max_timeout.as_secs()),
            );
            default
        }
        _ => {
            fields.wrong(name, "is not a duration in whole seconds: write ISO 8601, for example PT30M");
            default
        }
    }
}

fn resources(fields: &mut Fields, policy: &Policy) -> Limits<Resources> {
    let max = policy.max_resources;
    let of = |fields: &mut Fields, name: &str, default: Resources| {
        fields.nested(name, |fields| Resources {
            cpu: whole(fields.number("cpu", 1, max.cpu.into()), default.cpu.min(max.cpu)),
            memory_mb: whole(
                fields.number("memory_mb", LEAST_MEMORY_MB.into(), max.memory_mb.into()),
                default.memory_mb.min(max.memory_mb),
            ),
        })
    };
    fields.nested("resources", |fields| Limits {
        build: of(fields, "build", policy.default_resources.build),
        test: of(fields, "test", policy.default_resources.test),
        publish: of(fields, "publish", policy.default_resources.publish),
    })
}

fn whole(asked: Option<u64>, default: u32) -> u32 {
    asked.and_then(|number| u32::try_from(number).ok()).unwrap_or(default)
}

/// The image's labels: the user's, and those that the service sets.
pub(crate) fn image_labels(spec: &Spec, commit: &str, created: &str, job: &str) -> BTreeMap<String, String> {
    let mut labels = spec.labels.clone();
    let own = [spec.repo_url.as_str(), commit, created];
    labels.extend(OWN_LABELS.iter().zip(own).map(|(name, value)| ((*name).to_owned(), value.to_owned())));
    labels.insert("nomad-build.job".to_owned(), job.to_owned());
    labels
}

#[cfg(test)]
mod tests;
