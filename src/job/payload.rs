//! What travels to the runner inside the Nomad job: one opaque value, so that Nomad interpolates nothing of it.

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Invalid, JobId, Policy, Spec};

/// The payload's version. A runner reads its own and the one before.
pub const PAYLOAD_VERSION: u32 = 1;

/// A job as its runner gets it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Payload {
    /// The job.
    pub job: JobId,
    /// What to do.
    pub spec: Spec,
    /// The operator's policy, checked once more by the runner.
    pub policy: Policy,
    /// Registries that are reached by plain HTTP, as `host[:port]`.
    pub insecure_registries: Vec<String>,
}

#[derive(Serialize, Deserialize)]
struct Wire {
    version: u32,
    job: JobId,
    spec: Value,
    policy: Policy,
    insecure_registries: Vec<String>,
}

/// Why a payload cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PayloadError {
    /// Not what the service wrote.
    #[error(
        "the job's payload cannot be read: run the service and its runner in the same version, or in versions at most one apart"
    )]
    Malformed(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// Written by a service of another age.
    #[error(
        "the job's payload has version {0} and this runner reads {PAYLOAD_VERSION}: run the service and its runner in versions at most one apart"
    )]
    Version(u32),
    /// It would not have been accepted.
    #[error("the job's payload breaks the rules a submission is held to")]
    Invalid(#[from] Invalid),
}

impl Payload {
    /// The opaque value: base64 of JSON.
    pub fn encode(&self) -> Result<String, serde_json::Error> {
        let wire = Wire {
            version: PAYLOAD_VERSION,
            job: self.job.clone(),
            spec: self.spec.to_json(),
            policy: self.policy.clone(),
            insecure_registries: self.insecure_registries.clone(),
        };
        Ok(BASE64_STANDARD.encode(serde_json::to_vec(&wire)?))
    }

    /// Reads the opaque value, and checks the submission again.
    pub fn decode(text: &str) -> Result<Self, PayloadError> {
        let bytes = BASE64_STANDARD.decode(text.trim()).map_err(|e| PayloadError::Malformed(e.into()))?;
        let value: Value = serde_json::from_slice(&bytes).map_err(|e| PayloadError::Malformed(e.into()))?;
        // The version is read before the shape: another version may have another shape.
        let version =
            value.get("version").and_then(Value::as_u64).and_then(|v| u32::try_from(v).ok()).unwrap_or(0);
        if version == 0 || version > PAYLOAD_VERSION || version + 1 < PAYLOAD_VERSION {
            return Err(PayloadError::Version(version));
        }
        let wire: Wire = serde_json::from_value(value).map_err(|e| PayloadError::Malformed(e.into()))?;
        let spec = Spec::from_json(wire.spec, &wire.policy)?;
        Ok(Self { job: wire.job, spec, policy: wire.policy, insecure_registries: wire.insecure_registries })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use uuid::Uuid;

    use super::*;

    fn payload() -> Payload {
        let policy = Policy::default();
        let spec = json!({
            "owner": "acme", "repo_url": "https://example.com/a", "image_tags": ["v1"], "registry_url": "ghcr.io/acme",
            "test_commands": ["echo ${NOMAD_TOKEN} %{x} {{ env }} $(id)\n"],
        });
        let spec = Spec::from_json(spec, &policy).unwrap();
        let job = JobId::from_uuid(Uuid::from_u128(1));
        Payload { job, spec, policy, insecure_registries: vec!["localhost:5000".to_owned()] }
    }

    #[test]
    fn a_payload_reads_back_and_has_nothing_to_interpolate() {
        let text = payload().encode().unwrap();
        assert!(text.bytes().all(|b| b.is_ascii_alphanumeric() || b"+/=".contains(&b)));
        assert_eq!(Payload::decode(&text).unwrap(), payload());
    }

    #[test]
    fn what_a_service_would_have_refused_the_runner_refuses_too_by_its_field() {
        for (field, value) in [
            ("repo_url", json!("ext::sh -c id")),
            ("repo_url", json!("file:///etc")),
            ("repo_url", json!("https://example.com/a/../b")),
            ("git_ref", json!("--upload-pack=id")),
            ("git_credentials_path", json!("../other")),
            ("dockerfile_path", json!("../Dockerfile")),
            ("context_path", json!("/")),
            ("image_tags", json!(["-x"])),
            ("image_tags", json!([])),
            ("registry_url", json!("user:password@host")),
            ("registry_credentials_path", json!("a b")),
            ("image_name", json!("UPPER")),
            ("test_commands", json!(["a\u{0}b"])),
            ("test_env", json!({"A B": "x"})),
            ("build_args", json!({"BUILDKIT_SYNTAX": "x"})),
            ("build_secrets", json!({"id": "no-item"})),
            ("ssh", json!({"id": "no-item"})),
            ("labels", json!({"nomad-build.job": "x"})),
            ("timeouts", json!({"build": "PT100H"})),
            ("resources", json!({"build": {"memory_mb": 1}})),
            ("target", json!("a b")),
            ("priority", json!(101)),
            ("unknown", json!(1)),
        ] {
            let bytes = BASE64_STANDARD.decode(payload().encode().unwrap()).unwrap();
            let mut wire: Value = serde_json::from_slice(&bytes).unwrap();
            wire["spec"][field] = value.clone();
            let refused = Payload::decode(&BASE64_STANDARD.encode(wire.to_string()));
            let Err(PayloadError::Invalid(Invalid(wrong))) = refused else {
                panic!("{field} {value}: {refused:?}")
            };
            assert!(wrong.iter().all(|wrong| wrong.field.starts_with(field)), "{field} {value}: {wrong:?}");
        }
    }

    #[test]
    fn a_restriction_that_this_runner_does_not_know_is_refused_by_name() {
        for place in ["/policy", "/policy/isolation", "/policy/allowed"] {
            let bytes = BASE64_STANDARD.decode(payload().encode().unwrap()).unwrap();
            let mut wire: Value = serde_json::from_slice(&bytes).unwrap();
            wire.pointer_mut(place).unwrap()["not_on_sundays"] = json!(true);
            let refused = Payload::decode(&BASE64_STANDARD.encode(wire.to_string()));
            let Err(PayloadError::Malformed(why)) = refused else { panic!("{place}: {refused:?}") };
            assert!(why.to_string().contains("not_on_sundays"), "{place}: {why}");
        }
    }

    /// As version 1 wrote it first, before there was anything to leave out.
    #[test]
    fn what_the_first_service_wrote_is_read() {
        let wire = json!({
            "version": 1,
            "job": "nb-00000000-0000-0000-0000-000000000001",
            "spec": {
                "owner": "acme", "repo_url": "https://example.com/a", "image_tags": ["v1"],
                "registry_url": "ghcr.io/acme",
                "test_commands": ["echo ${NOMAD_TOKEN} %{x} {{ env }} $(id)\n"],
            },
            "policy": {
                "schemes": ["https", "ssh"],
                "max_timeout": { "secs": 14400, "nanos": 0 },
                "max_resources": { "cpu": 64000, "memory_mb": 131_072 },
                "default_resources": {
                    "build": { "cpu": 500, "memory_mb": 512 },
                    "test": { "cpu": 500, "memory_mb": 512 },
                    "publish": { "cpu": 100, "memory_mb": 128 },
                },
            },
            "insecure_registries": ["localhost:5000"],
        });
        assert_eq!(Payload::decode(&BASE64_STANDARD.encode(wire.to_string())).unwrap(), payload());
    }

    #[test]
    fn a_payload_of_another_age_is_refused_by_its_version() {
        let bytes =
            BASE64_STANDARD.encode(json!({"version": PAYLOAD_VERSION + 1, "shape": "new"}).to_string());
        assert!(matches!(Payload::decode(&bytes), Err(PayloadError::Version(v)) if v == PAYLOAD_VERSION + 1));
        assert!(matches!(Payload::decode("not base64!"), Err(PayloadError::Malformed(_))));
    }
}
