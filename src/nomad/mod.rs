//! Nomad's HTTP API, as far as this project speaks it: jobs, allocations, Variables, the event stream, files of a task.
//!
//! Invariant: knows nothing of builds. What it returns is what Nomad said.

mod acl;
mod client;
mod error;
mod events;
mod files;
mod inquiry;
mod jobs;
mod logins;
mod policies;
mod retry;
mod transport;
mod types;
mod variables;

pub use acl::{Capability, Holder};
pub use client::{Client, Settings};
pub use error::{Error, Kind};
pub use events::{Event, EventStream, Heard};
pub use files::{Frame, FrameStream, Origin};
pub use inquiry::{DiskUsage, NodeStub, TokenInfo};
pub use jobs::Registration;
pub use logins::{AuthMethod, Login, OidcAnswer, OidcRequest};
pub use policies::{Policy, fits};
pub use retry::patiently;
pub use transport::{Tls, Token};
pub use types::{
    Allocation, Evaluation, Indexed, Job, JobStub, PlacementFailure, TaskEvent, TaskState, Variable,
    VariableStub,
};
pub use variables::{Lock, Put};
