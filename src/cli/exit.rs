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
    /// The user left; the job goes on.
    Detached,
}

impl Exit {
    /// All ends, in the order of their codes.
    #[cfg(test)]
    pub(super) const ALL: [Self; 11] = [
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
            Self::Detached => 130,
        }
    }

    /// The end that a job's status stands for; the phase and the reason are those of its failure, where known.
    pub(super) fn of_job(status: &str, phase: Option<&str>, reason: Option<&str>) -> Self {
        match status {
            "SUCCEEDED" => Self::Success,
            "KILLED" => Self::Killed,
            "LOST" => Self::Lost,
            "FAILED" if reason == Some("timeout") => Self::Timeout,
            "FAILED" => match phase.or_else(|| reason.and_then(phase_of)) {
                Some("build") => Self::BuildFailed,
                Some("test") => Self::TestFailed,
                Some("publish") => Self::PublishFailed,
                _ => Self::Failure,
            },
            "PENDING" | "BUILDING" | "TESTING" | "PUBLISHING" => Self::Unfinished,
            _ => Self::Failure,
        }
    }
}

/// The only phase in which a reason can arise, for the case that the status can no longer be asked.
fn phase_of(reason: &str) -> Option<&'static str> {
    match reason {
        "checkout_failed"
        | "ref_not_found"
        | "input_missing"
        | "image_not_allowed"
        | "download_not_allowed"
        | "build_failed" => Some("build"),
        "test_failed" => Some("test"),
        "push_failed" | "claim_failed" | "digest_mismatch" => Some("publish"),
        _ => None,
    }
}

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
            ("FAILED", Some("build"), Some("engine_unavailable"), 3),
            ("FAILED", Some("test"), Some("test_failed"), 4),
            ("FAILED", Some("publish"), Some("unauthorized"), 5),
            ("FAILED", Some("test"), Some("timeout"), 7),
            ("FAILED", None, Some("ref_not_found"), 3),
            ("FAILED", None, Some("test_failed"), 4),
            ("FAILED", None, Some("digest_mismatch"), 5),
            ("FAILED", None, Some("unauthorized"), 1),
            ("FAILED", Some("a phase of tomorrow"), Some("internal"), 1),
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
