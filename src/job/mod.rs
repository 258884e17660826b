//! What a job is: its identity, its specification, what happened to it, and the record made of that.
//!
//! Invariant: pure. No tokio, no network, no clock, no environment; times are passed in.
//! Invariant: knows nothing of Nomad's HTTP API, of engines or of the service's own API.

mod allowed;
mod claim;
pub mod credentials;
mod downloads;
mod due;
mod facts;
mod fields;
mod id;
mod labels;
mod line;
mod names;
mod outcome;
mod paths;
mod payload;
mod record;
mod secrets;
mod spec;
mod status;
mod submission;
mod sweep;

pub use allowed::{Allowed, FrontendRule, NameRule, RegistryRule, RepoRule, VaultRule};
pub use claim::{Claim, Verdict};
pub use due::Due;
pub use facts::{AllocationFacts, Detail, Facts, JobFacts, Standing};
pub use fields::{FieldError, Invalid, take_text};
pub use id::{IdempotencyKey, InvalidId, InvalidKey, JobId};
pub use labels::Labels;
#[cfg(feature = "fuzz")]
pub(crate) use line::fuzz_line;
pub use line::{Line, Stream, Tag as LineTag};
pub(crate) use line::{PART, escape, part_length};
pub use names::{GitRef, ImageName, Name, RegistryUrl, RelativePath, RepoUrl, Scheme, Tag, VariablePath};
pub use outcome::{Outcome, Progress, Published, State};
pub use paths::{CredentialsPath, VaultPath};
pub use payload::{PAYLOAD_VERSION, Payload, PayloadError};
pub use record::{Failure, Git, Image, Location, Record, Reference, Timestamps};
pub use secrets::{BUILD_KEY, BUILD_SECRET, SecretItem, StepItem};
pub use spec::{Isolation, LEAST_MEMORY_MB, Limits, Policy, Resources, Spec};
pub use status::{Phase, Reason, Status, Task};
pub(crate) use submission::image_labels;
pub use sweep::SweepReport;
