//! One integration binary over a real Nomad, Docker Engine, registry and git.
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stderr,
    clippy::needless_pass_by_value,
    clippy::disallowed_methods,
    reason = "a test that cannot go on fails, what its service says is shown then, and what it spawns ends with it"
)]

mod api;
mod archive;
mod authority;
mod chaos;
mod cleanup;
mod cli;
mod clients;
mod corpus;
mod dev;
mod dockerfiles;
mod doctor;
mod edges;
mod engine;
mod event_stream;
mod failures;
mod follow;
mod git;
mod hostile;
mod isolation;
mod kill;
mod leaders;
mod life;
mod list;
mod logs;
mod main_job;
mod memory;
mod openapi;
mod publishing;
mod registry;
mod replicas;
mod repositories;
mod runner;
mod schemathesis;
mod secrets;
mod sources;
mod stack;
mod submit;
mod support;
mod sweeper;
mod templates;
mod tidy;
