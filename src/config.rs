//! The service's configuration: variables and flags in, a checked struct out, with every error at once.

mod namespaces;
mod policy;
mod variables;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use reqwest::Url;
use secrecy::SecretString;
use tokio::sync::Semaphore;

use crate::archive;
use crate::environment::{BadConfiguration, Reader, Source};
use crate::job::{JobId, Payload, Policy, Spec};
use crate::render::{self, Runner, TEMPLATES, Template};
use crate::telemetry::{Format, LogFilter, chain};
use crate::{nomad, tls};
pub use namespaces::Namespaces;
pub use variables::VARIABLES;

/// Everything `serve` needs to know.
pub struct Config {
    /// Where the API listens.
    pub listen: SocketAddr,
    /// Whether callers from anywhere are served though Nomad has no ACLs.
    pub open: bool,
    /// Nomad's auth method at which callers' JWTs are traded, if they are.
    pub jwt_auth_method: Option<String>,
    /// Nomad's auth methods at which people log in through the service.
    pub login_methods: Vec<String>,
    /// The origins whose pages may use the service, `scheme://host[:port]`.
    pub allow_origins: Vec<String>,
    /// The file that is told who did what, if any.
    pub audit_file: Option<PathBuf>,
    /// The TLS of the API, if it has any.
    pub tls: Option<Arc<tls::Server>>,
    /// How many requests a second one address may send; any number for 0.
    pub max_rate: u32,
    /// How many connections there may be to the API.
    pub max_connections: usize,
    /// How many of them one address may have.
    pub max_connections_of_an_address: usize,
    /// Where metrics and probes are served beside the API, if anywhere.
    pub metrics_listen: Option<SocketAddr>,
    /// Nomad.
    pub nomad: nomad::Settings,
    /// The namespaces of the builds.
    pub namespaces: Namespaces,
    /// What submissions may ask for.
    pub policy: Policy,
    /// Registries that are reached by plain HTTP.
    pub insecure_registries: Vec<String>,
    /// How jobs are rendered.
    pub render: render::Settings,
    /// What becomes of what no job needs any more.
    pub sweep: SweepSettings,
    /// Where ended jobs are archived, if anywhere.
    pub archive: Option<archive::Settings>,
    /// How long an archived job is kept.
    pub keep_archive: Duration,
    /// How many archived jobs are kept; any number without.
    pub keep_archive_jobs: Option<usize>,
    /// The most text of one phase that `GET /jobs/{id}/logs` gives, in bytes.
    pub log_limit: usize,
    /// How the service's own log is written.
    pub log_format: Format,
    /// What the service's own log has.
    pub log_filter: Option<LogFilter>,
}

/// What is done with leftovers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sweep {
    /// They are removed.
    On,
    /// They are told, and stay.
    DryRun,
    /// Nobody looks for them.
    Off,
}

impl FromStr for Sweep {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        match text {
            "on" => Ok(Self::On),
            "dry-run" => Ok(Self::DryRun),
            "off" => Ok(Self::Off),
            _ => Err(()),
        }
    }
}

/// How leftovers are told from what is needed.
#[derive(Clone, Copy, Debug)]
pub struct SweepSettings {
    /// What is done with them.
    pub sweep: Sweep,
    /// How old a copy of credentials is at least: a submission writes it before its job is there.
    pub keep_credentials: Duration,
    /// How long after a job's end what it left in a node's engine is left alone.
    pub keep_images: Duration,
    /// How long the ledger of a job that Nomad no longer has is kept after its last change.
    pub keep_ledger: Duration,
}

impl Config {
    /// Reads the configuration.
    ///
    /// # Errors
    /// Every variable that is wrong, at once.
    pub fn read(source: Source<'_>) -> Result<Self, BadConfiguration> {
        let mut reader = Reader::new(source);
        let address = "an address and port, for example 127.0.0.1:8080";
        let namespaces = Namespaces::read(&mut reader);
        let archive = archive::Settings::read(&mut reader);
        let config = Self {
            listen: reader
                .parsed("NOMAD_BUILD_LISTEN", address)
                .unwrap_or_else(|| SocketAddr::from(([127, 0, 0, 1], 8080))),
            open: reader.parsed("NOMAD_BUILD_OPEN", "true or false").unwrap_or_default(),
            jwt_auth_method: reader.text("NOMAD_BUILD_JWT_AUTH_METHOD"),
            login_methods: reader.list("NOMAD_BUILD_LOGIN_METHODS", "an auth method").unwrap_or_default(),
            allow_origins: reader.list("NOMAD_BUILD_ALLOW_ORIGINS", "an origin").unwrap_or_default(),
            audit_file: audit_file(&mut reader),
            tls: server_tls(&mut reader),
            max_rate: reader.parsed("NOMAD_BUILD_MAX_RATE", "a number of requests").unwrap_or(500),
            max_connections: connections(&mut reader, "NOMAD_BUILD_MAX_CONNECTIONS").unwrap_or(8192),
            max_connections_of_an_address: connections(
                &mut reader,
                "NOMAD_BUILD_MAX_CONNECTIONS_PER_ADDRESS",
            )
            .unwrap_or(2048),
            metrics_listen: reader.parsed("NOMAD_BUILD_METRICS_LISTEN", address),
            nomad: nomad_settings(&mut reader),
            policy: policy::policy(&mut reader),
            insecure_registries: reader
                .list("NOMAD_BUILD_INSECURE_REGISTRIES", "host:port")
                .unwrap_or_default(),
            render: render_settings(&mut reader, &namespaces.first, archive.as_ref()),
            sweep: sweep_settings(&mut reader),
            archive,
            keep_archive: seconds(&mut reader, "NOMAD_BUILD_KEEP_ARCHIVE")
                .unwrap_or(Duration::from_hours(2160)),
            keep_archive_jobs: reader.parsed("NOMAD_BUILD_KEEP_ARCHIVE_JOBS", "a number of jobs"),
            namespaces,
            log_limit: reader.parsed("NOMAD_BUILD_LOG_LIMIT_BYTES", "a number of bytes").unwrap_or(16 << 20),
            log_format: reader.parsed("NOMAD_BUILD_LOG_FORMAT", "text or json").unwrap_or_default(),
            log_filter: reader.parsed("NOMAD_BUILD_LOG", "a filter, for example info,nomad_build=debug"),
        };
        reader.finish(config)
    }
}

fn nomad_settings(reader: &mut Reader<'_>) -> nomad::Settings {
    let parsed: Option<Url> = reader.parsed("NOMAD_ADDR", "a URL, for example http://127.0.0.1:4646");
    let address = parsed.unwrap_or_else(default_nomad);
    if address.cannot_be_a_base() || !matches!(address.scheme(), "http" | "https") {
        reader.wrong("NOMAD_ADDR", "is not an http or https URL");
    }
    let token = match reader.text("NOMAD_TOKEN_FILE") {
        Some(path) => nomad::Token::File(readable(reader, "NOMAD_TOKEN_FILE", path)),
        None => reader.text("NOMAD_TOKEN").map(SecretString::from).into(),
    };
    let mut file = |name: &str| reader.text(name).map(|path| readable(reader, name, path));
    let authority = file("NOMAD_CACERT");
    let (certificate, key) = (file("NOMAD_CLIENT_CERT"), file("NOMAD_CLIENT_KEY"));
    if certificate.is_some() != key.is_some() {
        reader.wrong("NOMAD_CLIENT_CERT", "and NOMAD_CLIENT_KEY belong together: set both, or neither");
    }
    let tls = nomad::Tls { authority, identity: certificate.zip(key) };
    nomad::Settings { address, socket: None, token, tls }
}

fn connections(reader: &mut Reader<'_>, name: &str) -> Option<usize> {
    // More than that a semaphore cannot count.
    let fits = |count: &usize| (1..=Semaphore::MAX_PERMITS).contains(count);
    let count = reader.parsed(name, "a number of connections")?;
    if !fits(&count) {
        reader.wrong(name, "has to be a number of connections, and 1 at least");
    }
    Some(count)
}

fn server_tls(reader: &mut Reader<'_>) -> Option<Arc<tls::Server>> {
    let [certificate_name, key_name, callers_name] =
        ["NOMAD_BUILD_TLS_CERT", "NOMAD_BUILD_TLS_KEY", "NOMAD_BUILD_TLS_CLIENT_CA"];
    let mut file = |name| reader.text(name).map(PathBuf::from);
    let (certificate, key, callers) = (file(certificate_name), file(key_name), file(callers_name));
    if certificate.is_some() != key.is_some() {
        reader.wrong(certificate_name, "and NOMAD_BUILD_TLS_KEY belong together: set both, or neither");
    }
    if callers.is_some() && certificate.is_none() {
        reader.wrong(
            callers_name,
            "needs NOMAD_BUILD_TLS_CERT and NOMAD_BUILD_TLS_KEY: without TLS nobody shows a certificate",
        );
    }
    let identity = tls::Identity { certificate: certificate?, key: key? };
    match (tls::ServerFiles { identity, callers }).load() {
        Ok(tls) => Some(Arc::new(tls)),
        Err(error) => {
            reader.wrong("NOMAD_BUILD_TLS_*", &format!("cannot be used: {}", chain(&error)));
            None
        }
    }
}

/// The path of a file that can be written to, which is made where it is not there.
fn audit_file(reader: &mut Reader<'_>) -> Option<PathBuf> {
    const NAME: &str = "NOMAD_BUILD_AUDIT_FILE";
    let path = reader.text(NAME)?;
    if let Err(error) = std::fs::File::options().create(true).append(true).open(&path) {
        reader.wrong(NAME, &format!("names {path:?}, which cannot be written to: {error}"));
    }
    Some(path.into())
}

/// The path of a file, which must be there.
fn readable(reader: &mut Reader<'_>, name: &str, path: String) -> PathBuf {
    // What it says is read again whenever it is used.
    drop(read_file(reader, name, &path));
    path.into()
}

#[expect(clippy::expect_used, reason = "a constant that a test reads")]
fn default_nomad() -> Url {
    "http://127.0.0.1:4646".parse().expect("the default address is a URL")
}

fn read_file(reader: &mut Reader<'_>, name: &str, path: &str) -> Option<String> {
    std::fs::read_to_string(path)
        .map_err(|error| reader.wrong(name, &format!("names {path}, which cannot be read: {error}")))
        .ok()
}

fn sweep_settings(reader: &mut Reader<'_>) -> SweepSettings {
    let sweep = reader.parsed("NOMAD_BUILD_SWEEP", "on, dry-run or off").unwrap_or(Sweep::On);
    let hours = |hours| Duration::from_hours(hours);
    SweepSettings {
        sweep,
        keep_credentials: seconds(reader, "NOMAD_BUILD_KEEP_CREDENTIALS").unwrap_or(hours(1)),
        keep_images: seconds(reader, "NOMAD_BUILD_KEEP_IMAGES").unwrap_or(hours(1)),
        keep_ledger: seconds(reader, "NOMAD_BUILD_KEEP_LEDGER").unwrap_or(hours(720)),
    }
}

fn seconds(reader: &mut Reader<'_>, name: &str) -> Option<Duration> {
    let text = reader.text(name)?;
    let parsed = jiff::fmt::temporal::SpanParser::new().parse_unsigned_duration(&text).ok();
    let usable = parsed.filter(|value| !value.is_zero() && value.subsec_nanos() == 0);
    if usable.is_none() {
        let why = format!("is {text:?}: an ISO 8601 duration of whole seconds is wanted, for example PT4H");
        reader.wrong(name, &why);
    }
    usable
}

fn at_least(reader: &mut Reader<'_>, name: &str, least: u32) -> Option<u32> {
    let value = reader.parsed(name, "a number")?;
    if value < least {
        reader.wrong(name, &format!("is {value}: at least {least} is wanted"));
    }
    Some(value)
}

fn render_settings(
    reader: &mut Reader<'_>,
    namespace: &str,
    archive: Option<&archive::Settings>,
) -> render::Settings {
    let template = template(reader);
    let was_read = template.is_some();
    let settings = render::Settings {
        template: template.unwrap_or_default(),
        runner: runner(reader),
        engine_socket: reader
            .text("NOMAD_BUILD_ENGINE_SOCKET")
            .unwrap_or_else(|| "/var/run/docker.sock".to_owned()),
        mounts: reader.list("NOMAD_BUILD_ALLOW_MOUNTS", "a path on a node").unwrap_or_default(),
        datacenters: reader
            .list("NOMAD_BUILD_DATACENTERS", "a datacenter")
            .unwrap_or_else(|| vec!["*".to_owned()]),
        node_pool: reader.text("NOMAD_BUILD_NODE_POOL").unwrap_or_else(|| "default".to_owned()),
        vault_role: reader.text("NOMAD_BUILD_VAULT_ROLE"),
        disk_mb: reader.parsed("NOMAD_BUILD_DISK_MB", "a number of MiB").unwrap_or(500),
        archive: archive.map(|archive| render::Archive {
            environment: archive.environment(),
            directory: archive.directory().map(|path| path.to_string_lossy().into_owned()),
        }),
    };
    if was_read && let Err(why) = try_template(&settings, namespace) {
        let text = format!("and NOMAD_BUILD_RUNNER give no job that Nomad could run: {why}");
        reader.wrong("NOMAD_BUILD_TEMPLATE", &text);
    }
    settings
}

/// Renders a job with tests as a submission would, so that a wrong template stops the start and not the first build.
fn try_template(settings: &render::Settings, namespace: &str) -> Result<(), String> {
    let body = serde_json::json!({
        "owner": "nomad-build", "repo_url": "https://git.example.com/a/b.git", "image_tags": ["latest"],
        "registry_url": "registry.example.com", "test_commands": ["true"],
    });
    let policy = Policy::default();
    let spec = Spec::from_json(body, &policy).map_err(|error| chain(&error))?;
    let job = JobId::from_uuid(uuid::Uuid::nil());
    let payload = Payload { job, spec, policy, insecure_registries: Vec::new() };
    let rendered = render::render(&payload, namespace, chrono::DateTime::UNIX_EPOCH, settings);
    let swept = render::render_sweep(&payload.job, "sweep", namespace, &["node"], settings);
    let swept = swept.and(render::render_node_sweep("sweep", namespace, 1, true, settings));
    rendered.and(swept).map(drop).map_err(|error| chain(&error))
}

/// The template; none where it was said that there is none.
fn template(reader: &mut Reader<'_>) -> Option<Template> {
    const NAME: &str = "NOMAD_BUILD_TEMPLATE";
    let name = reader.text(NAME).unwrap_or_else(|| "raw_exec".to_owned());
    let text = match TEMPLATES.iter().find(|(shipped, _)| *shipped == name) {
        Some((_, text)) => (*text).to_owned(),
        None if name.contains('/') => read_file(reader, NAME, &name)?,
        None => {
            reader.wrong(NAME, &format!("is {name:?}: raw_exec, docker or the path of a template is wanted"));
            return None;
        }
    };
    let template = Template::new(text);
    template.map_err(|why| reader.wrong(NAME, &format!("is no template: {}", chain(&why)))).ok()
}

fn runner(reader: &mut Reader<'_>) -> Runner {
    const NAME: &str = "NOMAD_BUILD_RUNNER";
    let own = || std::env::current_exe().map(|path| path.to_string_lossy().into_owned());
    match reader.text(NAME) {
        Some(path) if path.starts_with('/') => Runner::Path(path),
        Some(url) if url.starts_with("http://") || url.starts_with("https://") => {
            Runner::Artifact { base: url.trim_end_matches('/').to_owned() }
        }
        Some(image) => Runner::Image(image),
        None => Runner::Path(own().unwrap_or_else(|error| {
            reader.wrong(NAME, &format!("is not set, and this program does not know its own path: {error}"));
            String::new()
        })),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_variables_everything_has_a_default() {
        let config = Config::read(&|_| None).unwrap();
        assert_eq!(config.listen.to_string(), "127.0.0.1:8080");
        assert_eq!(config.nomad.address, default_nomad());
    }

    #[test]
    fn every_wrong_variable_is_named() {
        let wrong = Config::read(&|name| match name {
            "NOMAD_BUILD_LISTEN" => Some("nowhere".to_owned()),
            "NOMAD_ADDR" => Some("unix:/x".to_owned()),
            "NOMAD_TOKEN_FILE" => Some("/does/not/exist".to_owned()),
            "NOMAD_CLIENT_KEY" => Some("/proc/version".to_owned()),
            "NOMAD_BUILD_TEMPLATE" => Some("podman".to_owned()),
            "NOMAD_BUILD_ALLOW_REPO_SCHEMES" => Some("https,ext".to_owned()),
            _ => None,
        });
        let BadConfiguration(errors) = wrong.err().unwrap();
        let names: Vec<_> = errors.iter().map(|error| error.split(' ').next().unwrap()).collect();
        assert_eq!(
            names,
            [
                "NOMAD_BUILD_LISTEN",
                "NOMAD_ADDR",
                "NOMAD_TOKEN_FILE",
                "NOMAD_CLIENT_CERT",
                "NOMAD_BUILD_ALLOW_REPO_SCHEMES",
                "NOMAD_BUILD_TEMPLATE"
            ]
        );
    }

    #[test]
    fn the_runner_is_a_path_an_image_or_a_download() {
        for ([template, value], want) in [
            (["raw_exec", "/usr/bin/nb"], Runner::Path("/usr/bin/nb".to_owned())),
            (["docker", "ghcr.io/x/nb:1"], Runner::Image("ghcr.io/x/nb:1".to_owned())),
            (
                ["raw_exec", "http://nb.example:8080/"],
                Runner::Artifact { base: "http://nb.example:8080".to_owned() },
            ),
        ] {
            let config = with(&[("NOMAD_BUILD_TEMPLATE", template), ("NOMAD_BUILD_RUNNER", value)]).unwrap();
            assert_eq!(config.render.runner, want);
        }
    }

    fn with(variables: &[(&str, &str)]) -> Result<Config, BadConfiguration> {
        let find = |name: &str| variables.iter().find(|(known, _)| *known == name);
        Config::read(&|name| find(name).map(|(_, value)| (*value).to_owned()))
    }

    #[test]
    fn a_template_and_a_runner_that_do_not_fit_stop_the_start() {
        for (template, runner) in
            [("docker", "/usr/bin/nb"), ("docker", "http://nb.example"), ("raw_exec", "ghcr.io/x/nb:1")]
        {
            let BadConfiguration(errors) =
                with(&[("NOMAD_BUILD_TEMPLATE", template), ("NOMAD_BUILD_RUNNER", runner)]).err().unwrap();
            let [error] = &errors[..] else { panic!("{errors:?}") };
            assert!(error.starts_with("NOMAD_BUILD_TEMPLATE and NOMAD_BUILD_RUNNER"), "{error}");
        }
    }

    #[test]
    fn limits_that_no_job_could_keep_stop_the_start() {
        for (name, value) in [
            ("NOMAD_BUILD_MAX_TIMEOUT", "PT0S"),
            ("NOMAD_BUILD_MAX_TIMEOUT", "PT0.5S"),
            ("NOMAD_BUILD_MAX_TIMEOUT", "-PT1H"),
            ("NOMAD_BUILD_MAX_CPU", "0"),
            ("NOMAD_BUILD_MAX_MEMORY_MB", "15"),
            ("NOMAD_BUILD_SWEEP", "yes"),
            ("NOMAD_BUILD_KEEP_CREDENTIALS", "1h"),
            ("NOMAD_BUILD_KEEP_LEDGER", "P1M"),
            ("NOMAD_BUILD_LOG_FORMAT", "yaml"),
            ("NOMAD_BUILD_LOG", "info,,=what"),
        ] {
            let BadConfiguration(errors) = with(&[(name, value)]).err().unwrap();
            assert!(errors.len() == 1 && errors[0].starts_with(name), "{errors:?}");
        }
    }
}
