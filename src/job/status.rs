//! The words a job's state is told in.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Where a job stands. The last four are final and never change again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Status {
    /// Registered; its build has not begun.
    Pending,
    /// The image is being built.
    Building,
    /// The image is being tested.
    Testing,
    /// The image is on its way to the registry.
    Publishing,
    /// Built, tested and published.
    Succeeded,
    /// A phase failed.
    Failed,
    /// Ended by a person or a program before it claimed the right to publish.
    Killed,
    /// Nobody can know how it ended.
    Lost,
}

impl std::str::FromStr for Status {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let all = || Self::ALL.map(Self::as_str).join(", ");
        let found = Self::ALL.into_iter().find(|status| status.as_str() == text);
        found.ok_or_else(|| format!("is not a status, or statuses separated by commas: there are {}", all()))
    }
}

impl Status {
    /// Every status, in the order a job goes through them.
    pub const ALL: [Self; 8] = [
        Self::Pending,
        Self::Building,
        Self::Testing,
        Self::Publishing,
        Self::Succeeded,
        Self::Failed,
        Self::Killed,
        Self::Lost,
    ];

    /// Whether the status never changes again.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Killed | Self::Lost)
    }

    /// The status as the API writes it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "PENDING",
            Self::Building => "BUILDING",
            Self::Testing => "TESTING",
            Self::Publishing => "PUBLISHING",
            Self::Succeeded => "SUCCEEDED",
            Self::Failed => "FAILED",
            Self::Killed => "KILLED",
            Self::Lost => "LOST",
        }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// One of the three things done for a user.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Checkout and image build.
    Build,
    /// Containers of exactly the built image.
    Test,
    /// From the first byte pushed to the last tag.
    Publish,
}

impl Phase {
    /// In the order they run.
    pub const ALL: [Self; 3] = [Self::Build, Self::Test, Self::Publish];

    /// The name in the API, in metrics and of the Nomad task.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Build => "build",
            Self::Test => "test",
            Self::Publish => "publish",
        }
    }

    /// The phase after this one, of a job with tests or without.
    pub fn next(self, has_tests: bool) -> Option<Self> {
        match self {
            Self::Build if has_tests => Some(Self::Test),
            Self::Build | Self::Test => Some(Self::Publish),
            Self::Publish => None,
        }
    }

    /// The status of a job that is in this phase.
    pub fn status(self) -> Status {
        match self {
            Self::Build => Status::Building,
            Self::Test => Status::Testing,
            Self::Publish => Status::Publishing,
        }
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl std::str::FromStr for Phase {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL
            .into_iter()
            .find(|phase| phase.as_str() == text)
            .ok_or_else(|| "is not a phase: use build, test or publish".to_owned())
    }
}

/// A task of the Nomad job: one for each phase, and the one that cleans up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Task {
    /// A phase's task, which bears the phase's name.
    Phase(Phase),
    /// The poststop task.
    Finish,
}

impl Task {
    /// The name of the Nomad task.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Phase(phase) => phase.as_str(),
            Self::Finish => "finish",
        }
    }
}

impl std::str::FromStr for Task {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "finish" {
            return Ok(Self::Finish);
        }
        text.parse()
            .map(Self::Phase)
            .map_err(|_| "is not a task: use build, test, publish or finish".to_owned())
    }
}

/// Why a job ended as it did: stable codes, for programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// The repository could not be cloned.
    CheckoutFailed,
    /// The repository has no such ref.
    RefNotFound,
    /// The Dockerfile, the context or the stage named does not exist in the checkout.
    InputMissing,
    /// The build was to take an image that its operator does not allow.
    ImageNotAllowed,
    /// The build was to download something that its operator does not allow.
    DownloadNotAllowed,
    /// The engine ran the build, and it failed.
    BuildFailed,
    /// A test ended with an exit code other than 0.
    TestFailed,
    /// The registry took no image.
    PushFailed,
    /// A registry or repository refused the credentials, or wanted some.
    Unauthorized,
    /// The phase took longer than its timeout.
    Timeout,
    /// The container engine did not answer.
    EngineUnavailable,
    /// The node's engine no longer has the image that was built.
    ImageMissing,
    /// Nomad could not be asked for the right to publish.
    ClaimFailed,
    /// What was about to be published is not what was tested.
    DigestMismatch,
    /// Killed through the API.
    Killed,
    /// The Nomad job was stopped or purged by somebody else, or Nomad stopped its tasks: a drain, a preemption.
    Stopped,
    /// A task could not be set up on its node.
    SetupFailed,
    /// The runner ended without saying how.
    RunnerDied,
    /// The node, or everything that was known of the allocation, is gone.
    NodeLost,
    /// The runner and the service do not understand each other's versions.
    VersionMismatch,
    /// A fault of the service or its runner.
    Internal,
    /// A reason that a newer version knows.
    #[serde(other)]
    Unknown,
}

impl Reason {
    /// The code as the API writes it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::CheckoutFailed => "checkout_failed",
            Self::RefNotFound => "ref_not_found",
            Self::InputMissing => "input_missing",
            Self::ImageNotAllowed => "image_not_allowed",
            Self::DownloadNotAllowed => "download_not_allowed",
            Self::BuildFailed => "build_failed",
            Self::TestFailed => "test_failed",
            Self::PushFailed => "push_failed",
            Self::Unauthorized => "unauthorized",
            Self::Timeout => "timeout",
            Self::EngineUnavailable => "engine_unavailable",
            Self::ImageMissing => "image_missing",
            Self::ClaimFailed => "claim_failed",
            Self::DigestMismatch => "digest_mismatch",
            Self::Killed => "killed",
            Self::Stopped => "stopped",
            Self::SetupFailed => "setup_failed",
            Self::RunnerDied => "runner_died",
            Self::NodeLost => "node_lost",
            Self::VersionMismatch => "version_mismatch",
            Self::Internal => "internal",
            Self::Unknown => "unknown",
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_words_in_json_are_the_words_in_text() {
        for status in Status::ALL {
            assert_eq!(serde_json::to_value(status).unwrap(), status.as_str());
        }
        for phase in Phase::ALL {
            assert_eq!(serde_json::to_value(phase).unwrap(), phase.as_str());
            assert_eq!(phase.as_str().parse(), Ok(phase));
        }
        for reason in [Reason::CheckoutFailed, Reason::RunnerDied, Reason::VersionMismatch, Reason::Killed] {
            assert_eq!(serde_json::to_value(reason).unwrap(), reason.as_str());
        }
    }

    #[test]
    fn a_reason_of_a_newer_version_is_still_read() {
        assert_eq!(serde_json::from_str::<Reason>("\"struck_by_lightning\"").unwrap(), Reason::Unknown);
    }
}
