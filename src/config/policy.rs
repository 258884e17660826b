//! What the operator allows submissions, and how their code is kept apart.

use super::{at_least, seconds};
use crate::environment::Reader;
use crate::job::{
    Allowed, FrontendRule, Isolation, LEAST_MEMORY_MB, Policy, RegistryRule, Resources, Scheme,
};

pub(super) fn policy(reader: &mut Reader<'_>) -> Policy {
    let default = Policy::default();
    let max_timeout = seconds(reader, "NOMAD_BUILD_MAX_TIMEOUT").unwrap_or(default.max_timeout);
    let build_network = reader.parsed("NOMAD_BUILD_BUILD_NETWORK", "true or false").unwrap_or(true);
    Policy {
        schemes: reader
            .list::<Scheme>("NOMAD_BUILD_ALLOW_REPO_SCHEMES", "https, ssh, http or file")
            .unwrap_or(default.schemes),
        max_timeout,
        max_resources: Resources {
            cpu: at_least(reader, "NOMAD_BUILD_MAX_CPU", 1).unwrap_or(default.max_resources.cpu),
            memory_mb: at_least(reader, "NOMAD_BUILD_MAX_MEMORY_MB", LEAST_MEMORY_MB)
                .unwrap_or(default.max_resources.memory_mb),
        },
        default_resources: default.default_resources,
        allowed: Allowed {
            registries: images(reader, "NOMAD_BUILD_ALLOW_REGISTRIES"),
            repositories: reader
                .list(
                    "NOMAD_BUILD_ALLOW_REPOSITORIES",
                    "the begin of an address, for example https://github.com/acme/",
                )
                .unwrap_or_default(),
            forbidden_names: reader
                .list("NOMAD_BUILD_FORBID_NAMES", "a name, or the begin of one and a *")
                .unwrap_or_default(),
            base_images: images(reader, "NOMAD_BUILD_ALLOW_BASE_IMAGES"),
            frontends: frontends(reader, build_network).unwrap_or(default.allowed.frontends),
            downloads: images(reader, "NOMAD_BUILD_ALLOW_DOWNLOADS"),
            vault: reader
                .list("NOMAD_BUILD_ALLOW_VAULT_PATHS", "the path of a secret in Vault, or *")
                .unwrap_or_default(),
        },
        isolation: Isolation {
            build_network,
            test_network: reader.parsed("NOMAD_BUILD_TEST_NETWORK", "true or false").unwrap_or(true),
            max_pids: at_least(reader, "NOMAD_BUILD_MAX_PIDS", 1).unwrap_or(default.isolation.max_pids),
            max_checkout_mb: at_least(reader, "NOMAD_BUILD_MAX_CHECKOUT_MB", 1)
                .unwrap_or(default.isolation.max_checkout_mb),
            max_checkout_files: at_least(reader, "NOMAD_BUILD_MAX_CHECKOUT_FILES", 1)
                .unwrap_or(default.isolation.max_checkout_files),
        },
    }
}

/// Without a network there is none that a frontend of somebody's own keeps its steps from.
fn frontends(reader: &mut Reader<'_>, build_network: bool) -> Option<Vec<FrontendRule>> {
    const NAME: &str = "NOMAD_BUILD_ALLOW_FRONTENDS";
    let rules = reader.list::<FrontendRule>(NAME, "host[:port][/path], or *")?;
    if !build_network && rules.iter().any(FrontendRule::is_all) {
        reader.wrong(NAME, "is *, and NOMAD_BUILD_BUILD_NETWORK is false, which a frontend need not keep to: name those that may be used");
    }
    Some(rules)
}

fn images(reader: &mut Reader<'_>, name: &str) -> Vec<RegistryRule> {
    reader.list(name, "host[:port][/path]").unwrap_or_default()
}
