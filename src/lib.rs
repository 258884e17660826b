//! nomad-build: a build service that lives inside HashiCorp Nomad.
//!
//! The rooms, from the top of the house to its foundation. An import points only downwards: ARCHITECTURE.md has the
//! table, and a test holds it.

#[cfg(feature = "fuzz")]
pub mod fuzz;

pub mod cli;

pub mod dev;

pub mod api;

pub mod service;

pub mod doctor;

mod runner;

pub mod ledger;

pub mod config;

pub mod render;

pub mod archive;

pub mod registry;

pub mod engine;

pub mod git;

pub mod nomad;

pub mod tls;

pub mod reload;

pub mod telemetry;

pub mod job;

pub mod environment;
