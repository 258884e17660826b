//! How the program ends, as a number that a script can tell apart.

use std::process::ExitCode;

/// The list of codes at the end of `--help`.
pub(super) const HELP: &str = "\
Exit codes (submit --follow, logs -f and status --exit-code end with the job's):
    0  success
    1  the service cannot be reached, or another failure
    2  wrong usage, or a submission that was refused
    3  the build failed
    4  a test failed
    5  publishing failed
    6  the job was killed
    7  a phase took longer than it may
    8  the job was lost
    9  the job has not ended yet (status --exit-code)
   10  the platform failed the job: a task that could not be set up, a runner that died, an engine that was away
  130  detached by Ctrl-C; the job goes on";

/// The end of a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    /// All went well.
    Success,
    /// The service failed or cannot be reached, or anything that has no code of its own.
    Failure,
    /// The arguments are wrong, or the service refused the submission.
    Usage,
    /// The job's build failed.
    BuildFailed,
    /// One of the job's tests failed.
    TestFailed,
    /// The job's image could not be published.
    PublishFailed,
    /// The job was killed.
    Killed,
    /// A phase of the job took longer than it may.
    Timeout,
    /// The job was lost, with its node for example.
    Lost,
    /// The job still lives, and its end was asked for.
    Unfinished,
    /// The job failed by no fault of its build, its tests or its registry.
    Platform,
    /// The user left; the job goes on.
    Detached,
}

impl Exit {
    /// All ends, in the order of their codes.
    #[cfg(test)]
    pub(super) const ALL: [Self; 12] = [
        Self::Success,
        Self::Failure,
        Self::Usage,
        Self::BuildFailed,
        Self::TestFailed,
        Self::PublishFailed,
        Self::Killed,
        Self::Timeout,
        Self::Lost,
        Self::Unfinished,
        Self::Platform,
        Self::Detached,
    ];

    /// The process's exit code.
    pub(crate) fn code(self) -> u8 {
        match self {
            Self::Success => 0,
            Self::Failure => 1,
            Self::Usage => 2,
            Self::BuildFailed => 3,
            Self::TestFailed => 4,
            Self::PublishFailed => 5,
            Self::Killed => 6,
            Self::Timeout => 7,
            Self::Lost => 8,
            Self::Unfinished => 9,
            Self::Platform => 10,
            Self::Detached => 130,
        }
    }

    /// The end that a job's status stands for; the phase and the reason are those of its failure, where there is one.
    pub(super) fn of_job(status: &str, phase: Option<&str>, reason: Option<&str>) -> Self {
        match status {
            "SUCCEEDED" => Self::Success,
            "KILLED" => Self::Killed,
            "LOST" => Self::Lost,
            "FAILED" => match (reason, phase) {
                (Some("timeout"), _) => Self::Timeout,
                (Some(reason), _) if OF_THE_PLATFORM.contains(&reason) => Self::Platform,
                (_, Some("build")) => Self::BuildFailed,
                (_, Some("test")) => Self::TestFailed,
                (_, Some("publish")) => Self::PublishFailed,
                _ => Self::Failure,
            },
            "PENDING" | "BUILDING" | "TESTING" | "PUBLISHING" => Self::Unfinished,
            _ => Self::Failure,
        }
    }
}

/// The reasons of failures that are no fault of what was built or tested, nor of where it was to be published.
const OF_THE_PLATFORM: [&str; 7] = [
    "setup_failed",
    "runner_died",
    "engine_unavailable",
    "image_missing",
    "claim_failed",
    "version_mismatch",
    "internal",
];

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit.code())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_s_end_becomes_its_exit_code() {
        for (status, phase, reason, code) in [
            ("SUCCEEDED", None, None, 0),
            ("FAILED", Some("build"), Some("build_failed"), 3),
            ("FAILED", Some("build"), Some("engine_unavailable"), 10),
            ("FAILED", Some("test"), Some("test_failed"), 4),
            ("FAILED", Some("publish"), Some("unauthorized"), 5),
            ("FAILED", Some("test"), Some("timeout"), 7),
            ("FAILED", None, Some("setup_failed"), 10),
            ("FAILED", Some("publish"), Some("setup_failed"), 10),
            ("FAILED", Some("test"), Some("runner_died"), 10),
            ("FAILED", Some("publish"), Some("claim_failed"), 10),
            ("FAILED", Some("publish"), Some("digest_mismatch"), 5),
            ("FAILED", Some("a phase of tomorrow"), Some("internal"), 10),
            ("FAILED", Some("a phase of tomorrow"), Some("a reason of tomorrow"), 1),
            ("FAILED", None, None, 1),
            ("KILLED", Some("test"), Some("killed"), 6),
            ("LOST", Some("build"), Some("node_lost"), 8),
            ("PENDING", None, None, 9),
            ("PUBLISHING", None, None, 9),
            ("A STATUS OF TOMORROW", None, None, 1),
        ] {
            assert_eq!(Exit::of_job(status, phase, reason).code(), code, "{status} {phase:?} {reason:?}");
        }
    }
}
