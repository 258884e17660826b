//! `version`: which program this is.

use serde_json::json;

use super::{Error, Exit, Format, Output};

/// Prints the version.
pub(super) fn run(output: &mut Output) -> Result<Exit, Error> {
    let version = env!("CARGO_PKG_VERSION");
    match output.format() {
        Format::Json => output.line(&json!({ "version": version }).to_string())?,
        Format::Text => output.line(&format!("nomad-build {version}"))?,
    }
    Ok(Exit::Success)
}
