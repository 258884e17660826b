//! The names of the variables, for people.

/// The variables of `serve`, their defaults and what they are for: the text of its help.
pub const VARIABLES: &[(&str, &str, &str)] = &[
    ("NOMAD_BUILD_LISTEN", "127.0.0.1:8080", "address of the API"),
    (
        "NOMAD_BUILD_OPEN",
        "false",
        "true: callers from other machines are served though Nomad has no ACLs, so that anybody may do anything",
    ),
    (
        "NOMAD_BUILD_JWT_AUTH_METHOD",
        "",
        "Nomad auth method (JWT) at which the JWTs of a CI system are traded for Nomad tokens",
    ),
    (
        "NOMAD_BUILD_ALLOW_ORIGINS",
        "",
        "origins whose pages may use the API, as https://host, separated by commas",
    ),
    (
        "NOMAD_BUILD_AUDIT_FILE",
        "",
        "file that is told who submitted, killed, cleaned up or read the log of what, and who was refused, as JSON lines",
    ),
    ("NOMAD_BUILD_METRICS_LISTEN", "", "an address of its own for /metrics"),
    ("NOMAD_ADDR", "http://127.0.0.1:4646", "Nomad"),
    (
        "NOMAD_TOKEN_FILE",
        "",
        "file with the service's Nomad token, read again when it changes (or NOMAD_TOKEN)",
    ),
    ("NOMAD_CACERT", "", "PEM file of the authority of Nomad's certificate, read again when it changes"),
    (
        "NOMAD_CLIENT_CERT",
        "",
        "PEM file of the service's own certificate for Nomad, read again when it changes",
    ),
    ("NOMAD_CLIENT_KEY", "", "PEM file of its key"),
    ("NOMAD_BUILD_NAMESPACE", "default", "namespace of the builds"),
    ("NOMAD_BUILD_TEMPLATE", "raw_exec", "raw_exec, docker, or the path of a job template"),
    (
        "NOMAD_BUILD_RUNNER",
        "this program's path",
        "how nodes get the runner: a path on the node, an image, or http://… where nodes reach this service",
    ),
    ("NOMAD_BUILD_ENGINE_SOCKET", "/var/run/docker.sock", "the Docker Engine's socket on a node"),
    ("NOMAD_BUILD_NODE_POOL", "default", "Nomad node pool of the builds"),
    ("NOMAD_BUILD_DATACENTERS", "*", "Nomad datacenters of the builds, separated by commas"),
    ("NOMAD_BUILD_DISK_MB", "500", "ephemeral disk of a build beside its logs, in MiB"),
    ("NOMAD_BUILD_ALLOW_REPO_SCHEMES", "https,ssh", "transports of repositories: https, ssh, http, file"),
    (
        "NOMAD_BUILD_INSECURE_REGISTRIES",
        "",
        "registries reached by plain HTTP, as host:port, separated by commas",
    ),
    (
        "NOMAD_BUILD_ALLOW_REGISTRIES",
        "",
        "where images may go, as host[:port][/path], separated by commas; without it, anywhere",
    ),
    (
        "NOMAD_BUILD_ALLOW_REPOSITORIES",
        "",
        "what may be built, as begins of addresses up to a /, separated by commas; without it, anything",
    ),
    (
        "NOMAD_BUILD_FORBID_NAMES",
        "",
        "names that build_args and test_env may not have, a * at the end for all that begin so",
    ),
    ("NOMAD_BUILD_BUILD_NETWORK", "true", "false: the steps of a build have no network"),
    ("NOMAD_BUILD_TEST_NETWORK", "true", "false: tests have no network"),
    ("NOMAD_BUILD_MAX_PIDS", "4096", "the most processes and threads of a test"),
    ("NOMAD_BUILD_MAX_TIMEOUT", "PT4H", "the longest timeout a phase may ask for"),
    ("NOMAD_BUILD_MAX_CPU", "64000", "the most CPU a phase may reserve, in MHz"),
    ("NOMAD_BUILD_MAX_MEMORY_MB", "131072", "the most memory a phase may reserve, in MiB"),
    (
        "NOMAD_BUILD_SWEEP",
        "on",
        "what becomes of Variables, containers and images that no job needs: on (removed), dry-run (told) or off",
    ),
    (
        "NOMAD_BUILD_KEEP_CREDENTIALS",
        "PT1H",
        "how old a copy of credentials without a live job is left alone",
    ),
    (
        "NOMAD_BUILD_KEEP_IMAGES",
        "PT1H",
        "how long after its end what a job left in a node's engine is left alone",
    ),
    ("NOMAD_BUILD_KEEP_LEDGER", "PT720H", "how long the ledger of a job that Nomad collected is kept"),
    (
        "NOMAD_BUILD_ARCHIVE",
        "",
        "where ended jobs are archived: file:///DIRECTORY, or s3://BUCKET/PREFIX with AWS_REGION, AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID and their like",
    ),
    ("NOMAD_BUILD_KEEP_ARCHIVE", "PT2160H", "how long after its submission an archived job is kept"),
    ("NOMAD_BUILD_KEEP_ARCHIVE_JOBS", "", "how many archived jobs are kept: the newest"),
    ("NOMAD_BUILD_LOG_LIMIT_BYTES", "16777216", "the most text of one phase in GET /jobs/{id}/logs"),
    ("NOMAD_BUILD_LOG", "info", "filter of the service's own log, as tracing's EnvFilter reads it"),
    ("NOMAD_BUILD_LOG_FORMAT", "text", "text or json"),
];
