//! A whole stack on one machine: a Nomad agent, a registry run as a Nomad job, and the service.
//!
//! Invariant: what a stack started is taken down in one place only, by its supervisor, a process that outlives the
//! stack's own however that one ends. The next start is the second net, for a supervisor that was killed too.
//! Invariant: only what carries the stack's mark is touched, never another Nomad, registry or engine.
//! Invariant: no path and no port is assumed: the usual ports when they are free, else free ones.

mod agent;
mod config;
mod control;
mod data_dir;
mod error;
mod ports;
mod programs;
mod registry;
mod remains;
mod service;
mod stack;
mod supervisor;
mod take_down;
mod wait;

pub use config::{Config, Listen};
pub use error::Error;
pub use programs::{Registry, find_nomad, find_registry};
pub use stack::{Ended, Stack};
pub(crate) use supervisor::stdin_closed;
pub use supervisor::supervise;
