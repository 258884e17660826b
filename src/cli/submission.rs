//! A submission from a file and from flags; what it may hold is the service's business.
//!
//! A flag overrides the file: a value or a list as a whole, a mapping key by key.

use std::io::Read;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::fields::{number_of_phase, of_phase, pair};
use super::{Error, Exit};

/// What to build, test and publish.
#[derive(Debug, Default, clap::Args)]
#[command(next_help_heading = "Submission")]
pub(super) struct Submission {
    /// Read the submission from this YAML or JSON file (`-` is stdin); flags override it
    #[arg(long, short = 'f', value_name = "FILE")]
    file: Option<PathBuf>,
    /// Who the build is for
    #[arg(long)]
    owner: Option<String>,
    /// The Nomad namespace to build in, one of the service's
    #[arg(long)]
    namespace: Option<String>,
    /// The git repository
    #[arg(long, visible_alias = "repo", value_name = "URL")]
    repo_url: Option<String>,
    /// A branch, a tag, any ref or a commit; by default the repository's default branch
    #[arg(long, visible_alias = "ref", value_name = "REF")]
    git_ref: Option<String>,
    /// The Nomad Variable that holds the repository's credentials
    #[arg(long, value_name = "PATH")]
    git_credentials_path: Option<String>,
    /// The Dockerfile, within the repository
    #[arg(long, visible_alias = "dockerfile", value_name = "PATH")]
    dockerfile_path: Option<String>,
    /// The build context, within the repository
    #[arg(long, visible_alias = "context", value_name = "PATH")]
    context_path: Option<String>,
    /// A tag to publish under; may be given again
    #[arg(long = "image-tag", visible_alias = "tag", short = 't', value_name = "TAG")]
    image_tags: Vec<String>,
    /// The registry: HOST[:PORT][/PATH]
    #[arg(long, visible_alias = "registry", value_name = "HOST")]
    registry_url: Option<String>,
    /// The Nomad Variable that holds the registry's credentials
    #[arg(long, value_name = "PATH")]
    registry_credentials_path: Option<String>,
    /// The image's name in the registry
    #[arg(long, value_name = "NAME")]
    image_name: Option<String>,
    /// A command to test the image with, in a container of its own; may be given again
    #[arg(long = "test-command", value_name = "COMMAND")]
    test_commands: Vec<String>,
    /// Test the image by its own entry point
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")]
    test_entry_point: Option<bool>,
    /// An environment variable of the tests; may be given again
    #[arg(long, value_parser = pair, value_name = "KEY=VALUE")]
    test_env: Vec<(String, String)>,
    /// A build argument; may be given again
    #[arg(long = "build-arg", value_parser = pair, value_name = "KEY=VALUE")]
    build_args: Vec<(String, String)>,
    /// A secret of the build's steps, an item of a Nomad Variable; may be given again
    #[arg(long = "build-secret", value_parser = pair, value_name = "ID=PATH#ITEM")]
    build_secrets: Vec<(String, String)>,
    /// A private key that the build's steps sign with, an item of a Nomad Variable; may be given again
    #[arg(long, value_parser = pair, value_name = "ID=PATH#ITEM")]
    ssh: Vec<(String, String)>,
    /// The stage of the Dockerfile to build
    #[arg(long)]
    target: Option<String>,
    /// A label of the image; may be given again
    #[arg(long = "label", value_parser = pair, value_name = "KEY=VALUE")]
    labels: Vec<(String, String)>,
    /// How long a phase may take, as in build=PT30M; may be given again
    #[arg(long = "timeout", value_parser = of_phase, value_name = "PHASE=DURATION")]
    timeouts: Vec<(String, String)>,
    /// The CPU of a phase, in MHz; may be given again
    #[arg(long, value_parser = number_of_phase, value_name = "PHASE=MHZ")]
    cpu: Vec<(String, u64)>,
    /// The memory of a phase, in MiB; may be given again
    #[arg(long, value_parser = number_of_phase, value_name = "PHASE=MIB")]
    memory_mb: Vec<(String, u64)>,
    /// Build without the cache
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")]
    no_cache: Option<bool>,
    /// The priority among Nomad's jobs, 1 to 100
    #[arg(long)]
    priority: Option<u64>,
}

impl Submission {
    /// The body to send: the file's, overridden by the flags.
    pub(super) fn body(&self) -> Result<Value, Error> {
        let mut body = match &self.file {
            Some(file) => read(file)?,
            None => Map::new(),
        };
        self.values(&mut body);
        self.mappings(&mut body)?;
        Ok(Value::Object(body))
    }

    fn values(&self, body: &mut Map<String, Value>) {
        let strings = [
            ("owner", &self.owner),
            ("namespace", &self.namespace),
            ("repo_url", &self.repo_url),
            ("git_ref", &self.git_ref),
            ("git_credentials_path", &self.git_credentials_path),
            ("dockerfile_path", &self.dockerfile_path),
            ("context_path", &self.context_path),
            ("registry_url", &self.registry_url),
            ("registry_credentials_path", &self.registry_credentials_path),
            ("image_name", &self.image_name),
            ("target", &self.target),
        ];
        let given = |(name, value): (&str, &Option<String>)| Some((name.to_owned(), json!(value.as_ref()?)));
        body.extend(strings.into_iter().filter_map(given));
        let lists = [("image_tags", &self.image_tags), ("test_commands", &self.test_commands)];
        let given = lists.into_iter().filter(|(_, list)| !list.is_empty());
        body.extend(given.map(|(name, list)| (name.to_owned(), json!(list))));
        let booleans = [("test_entry_point", self.test_entry_point), ("no_cache", self.no_cache)];
        body.extend(booleans.into_iter().filter_map(|(name, value)| Some((name.to_owned(), json!(value?)))));
        body.extend(self.priority.map(|priority| ("priority".to_owned(), json!(priority))));
    }

    fn mappings(&self, body: &mut Map<String, Value>) -> Result<(), Error> {
        let mappings = [
            ("test_env", &self.test_env),
            ("build_args", &self.build_args),
            ("build_secrets", &self.build_secrets),
            ("ssh", &self.ssh),
            ("labels", &self.labels),
            ("timeouts", &self.timeouts),
        ];
        for (name, pairs) in mappings {
            for (key, value) in pairs {
                mapping(body, name, name)?.insert(key.clone(), json!(value));
            }
        }
        for (name, pairs) in [("cpu", &self.cpu), ("memory_mb", &self.memory_mb)] {
            for (phase, amount) in pairs {
                let phases = mapping(body, "resources", "resources")?;
                mapping(phases, phase, &format!("resources.{phase}"))?.insert(name.to_owned(), json!(amount));
            }
        }
        Ok(())
    }
}

/// The mapping of that name, made where there is none. `path` says where it stands, for the user.
fn mapping<'a>(
    body: &'a mut Map<String, Value>,
    name: &str,
    path: &str,
) -> Result<&'a mut Map<String, Value>, Error> {
    let value = body.entry(name).or_insert(Value::Null);
    if value.is_null() {
        *value = json!({});
    }
    value.as_object_mut().ok_or_else(|| {
        Error::new(
            Exit::Usage,
            format!("adding flags to {path}, which is not a mapping in the submission's file"),
        )
    })
}

fn read(file: &Path) -> Result<Map<String, Value>, Error> {
    let is_stdin = file == Path::new("-");
    let name = if is_stdin { "stdin".into() } else { file.to_string_lossy() };
    let failed = || Error::new(Exit::Usage, format!("reading the submission from {name}"));
    let text = if is_stdin {
        let mut text = String::new();
        std::io::stdin().lock().read_to_string(&mut text).map(|_| text)
    } else {
        std::fs::read_to_string(file)
    };
    parse(&text.map_err(|source| failed().caused_by(source))?).map_err(|source| failed().caused_by(source))
}

/// A text that is no submission.
#[derive(Debug, thiserror::Error)]
enum ParseError {
    #[error("it is neither JSON nor YAML")]
    Yaml(#[source] serde_norway::Error),
    #[error("its YAML says something that JSON cannot")]
    NotJson(#[source] serde_json::Error),
    #[error("it is not a mapping of fields to values")]
    NotAMapping,
}

fn parse(text: &str) -> Result<Map<String, Value>, ParseError> {
    // YAML holds nearly all of JSON, but for tabs and some escapes.
    let value = if let Ok(json) = serde_json::from_str(text) {
        json
    } else {
        // YAML's own value refuses a key that stands twice, where JSON's would keep the last.
        let yaml: serde_norway::Value = serde_norway::from_str(text).map_err(ParseError::Yaml)?;
        serde_json::to_value(yaml).map_err(ParseError::NotJson)?
    };
    match value {
        Value::Object(fields) => Ok(fields),
        _ => Err(ParseError::NotAMapping),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Flags {
        #[command(flatten)]
        submission: Submission,
    }

    fn merged(file: &str, flags: &[&str]) -> Result<Value, Error> {
        let arguments = std::iter::once("test").chain(flags.iter().copied());
        let submission = Flags::try_parse_from(arguments).unwrap().submission;
        let mut body = parse(file).unwrap();
        submission.values(&mut body);
        submission.mappings(&mut body)?;
        Ok(Value::Object(body))
    }

    #[test]
    fn every_field_has_a_flag() {
        let flags = [
            "--owner=me",
            "--namespace=team-a",
            "--repo=https://h/r.git",
            "--ref=v1",
            "--git-credentials-path=a",
            "--dockerfile=D",
            "--context=sub",
            "-t",
            "1",
            "-t",
            "2",
            "--registry=h:5000",
            "--registry-credentials-path=b",
            "--image-name=n",
            "--test-command=--version",
            "--test-entry-point",
            "--test-env=A=b=c",
            "--build-arg=V=$(id)",
            "--build-secret=npmrc=creds/npm#token",
            "--ssh=default=creds/deploy#ssh_key",
            "--target=t",
            "--label=l=",
            "--timeout=build=PT1M",
            "--cpu=test=500",
            "--memory-mb=test=64",
            "--no-cache=false",
            "--priority=70",
        ];
        let expected = json!({
            "owner": "me", "namespace": "team-a", "repo_url": "https://h/r.git", "git_ref": "v1", "git_credentials_path": "a",
            "dockerfile_path": "D", "context_path": "sub", "image_tags": ["1", "2"], "registry_url": "h:5000",
            "registry_credentials_path": "b", "image_name": "n", "test_commands": ["--version"],
            "test_entry_point": true, "test_env": {"A": "b=c"}, "build_args": {"V": "$(id)"}, "target": "t",
            "build_secrets": {"npmrc": "creds/npm#token"}, "ssh": {"default": "creds/deploy#ssh_key"},
            "labels": {"l": ""}, "timeouts": {"build": "PT1M"}, "resources": {"test": {"cpu": 500, "memory_mb": 64}},
            "no_cache": false, "priority": 70,
        });
        assert_eq!(merged("{}", &flags).unwrap(), expected);
        let api: Value = serde_norway::from_str(include_str!("../api/openapi.yaml")).unwrap();
        let schemas = &api["components"]["schemas"];
        let names = |of: &Value| of.as_object().unwrap().keys().cloned().collect::<BTreeSet<_>>();
        assert_eq!(names(&expected), names(&schemas["Submission"]["properties"]));
        assert_eq!(names(&expected["resources"]["test"]), names(&schemas["Resources"]["properties"]));
    }

    #[test]
    fn a_flag_overrides_a_value_or_a_list_as_a_whole_and_a_mapping_key_by_key() {
        let file = "owner: file\nimage_tags: [a, b]\nbuild_args: {A: 1, B: 2}\nresources: {build: {cpu: 1}}\nno_cache:";
        let flags = ["--owner=flag", "-t=c", "--build-arg=B=3", "--memory-mb=build=9"];
        let expected = json!({
            "owner": "flag", "image_tags": ["c"], "build_args": {"A": 1, "B": "3"},
            "resources": {"build": {"cpu": 1, "memory_mb": 9}}, "no_cache": null,
        });
        assert_eq!(merged(file, &flags).unwrap(), expected);
    }

    #[test]
    fn a_flag_does_not_silently_replace_what_is_no_mapping() {
        assert!(merged("build_args: [A=1]", &["--build-arg=B=3"]).is_err());
        assert!(merged("resources: {build: 4}", &["--cpu=build=3"]).is_err());
    }

    #[test]
    fn what_the_file_says_is_sent_as_it_is_and_a_mistake_is_named() {
        assert_eq!(Value::Object(parse("{\n\t\"owner\": \"tab\"}").unwrap()), json!({"owner": "tab"}));
        assert_eq!(Value::Object(parse("unknown: [no, yes]").unwrap()), json!({"unknown": ["no", "yes"]}));
        assert!(matches!(parse("owner: a\nowner: b"), Err(ParseError::Yaml(_))));
        assert!(matches!(parse("owner: {"), Err(ParseError::Yaml(_))));
        assert!(matches!(parse("- owner"), Err(ParseError::NotAMapping)));
        assert!(matches!(parse(""), Err(ParseError::NotAMapping)));
    }
}
