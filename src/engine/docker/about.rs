//! What the engine says of itself.

use std::path::PathBuf;
use std::time::Duration;

use super::DockerEngine;
use crate::engine::EngineError;

/// How long the engine may take to say it.
const ANSWERS: Duration = Duration::from_secs(10);

/// An engine, in its own words.
#[derive(Debug)]
pub struct About {
    /// Its version.
    pub version: String,
    /// Where it keeps images, as it sees it.
    pub root: PathBuf,
    /// Which limits of a container it cannot apply on this kernel.
    pub unlimited: Vec<&'static str>,
    /// What it says should be known, a line each.
    pub warnings: Vec<String>,
}

impl DockerEngine {
    /// Asks the engine what it is.
    ///
    /// # Errors
    /// Where it does not answer.
    pub async fn about(&self) -> Result<About, EngineError> {
        let asked = async {
            let info = self.docker()?.info().await;
            info.map_err(|error| self.failed("asking the engine what it is", error))
        };
        let info = self.within(ANSWERS, asked).await?;
        let limits =
            [("memory", info.memory_limit), ("processes", info.pids_limit), ("cpu", info.cpu_shares)];
        // What is not said is held to be there.
        let unlimited = limits.into_iter().filter(|(_, has)| *has == Some(false)).map(|(name, _)| name);
        Ok(About {
            version: info.server_version.unwrap_or_default(),
            root: info.docker_root_dir.unwrap_or_default().into(),
            unlimited: unlimited.collect(),
            warnings: info.warnings.unwrap_or_default(),
        })
    }
}
