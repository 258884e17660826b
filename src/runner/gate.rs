//! The gate: what a task does next, decided from the ledger alone.
//!
//! Invariant: pure, and total. A task that Nomad starts again, on this node or another, decides as the first one did.

use crate::job::{Claim, Outcome, Phase, Progress, State, Verdict};

/// What to do.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Gate {
    /// Do the phase's work.
    Run,
    /// Everything this task is for was done by an earlier run of it.
    Done,
    /// The right to publish is claimed: only bring the registry to this digest.
    Repair {
        /// The digest.
        digest: String,
    },
    /// The job has ended.
    Revoked(Verdict),
    /// This phase or the one before failed, or left nothing to work on.
    Blocked(Phase),
}

/// Decides for one phase; none while the phase before is not over.
pub(super) fn gate(
    phase: Phase,
    has_tests: bool,
    progress: &Progress,
    claim: Option<&Claim>,
) -> Option<Gate> {
    match claim {
        Some(Claim::Revoked { verdict, .. }) => return Some(Gate::Revoked(verdict.clone())),
        Some(Claim::Claimed { digest, .. }) => {
            let over = progress.of(Phase::Publish).is_some_and(Outcome::is_over);
            // Nothing is built or tested anew behind a claim.
            return Some(match phase {
                // The job was cleaned up, and what it told went with that.
                Phase::Publish if progress.of(Phase::Build).is_none() => Gate::Blocked(Phase::Build),
                Phase::Publish if !over => Gate::Repair { digest: digest.clone() },
                _ => Gate::Done,
            });
        }
        None => {}
    }
    match progress.of(phase).map(|outcome| outcome.state) {
        Some(State::Succeeded) if phase != Phase::Publish => return Some(Gate::Done),
        // Its outcome stands, so whatever it did now could not be told: a publish above all.
        Some(State::Failed) => return Some(Gate::Blocked(phase)),
        _ => {}
    }
    let before = match phase {
        Phase::Build => return Some(Gate::Run),
        Phase::Publish if has_tests => Phase::Test,
        Phase::Test | Phase::Publish => Phase::Build,
    };
    match progress.of(before).map(|outcome| outcome.state) {
        Some(State::Succeeded) => Some(Gate::Run),
        // A main task starts when the prestart task has succeeded, so a test never waits for the build.
        Some(State::Running) | None if phase == Phase::Publish && has_tests => None,
        Some(State::Failed | State::Running) | None => Some(Gate::Blocked(before)),
    }
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;

    use super::*;
    use crate::job::{Reason, Status};

    fn progress(phases: &[(Phase, State)]) -> Progress {
        let at = DateTime::from_timestamp(1, 0).unwrap();
        let mut progress = Progress::default();
        for &(phase, state) in phases {
            let outcome = Outcome::begun("a", at);
            let outcome = match state {
                State::Running => outcome,
                State::Succeeded => outcome.succeeded(at),
                State::Failed => outcome.failed(at, Reason::Internal, None, ""),
            };
            progress.set(phase, outcome);
        }
        progress
    }

    #[test]
    fn each_phase_waits_for_the_one_before() {
        use Phase::{Build, Publish, Test};
        use State::{Failed, Running, Succeeded};
        for (phase, has_tests, phases, want) in [
            (Build, true, &[][..], Some(Gate::Run)),
            (Build, true, &[(Build, Succeeded)], Some(Gate::Done)),
            // A node that was rebooted runs the task again; the half-done build is begun anew.
            (Build, true, &[(Build, Running)], Some(Gate::Run)),
            // A task that was stopped by hand, and is started again.
            (Build, true, &[(Build, Failed)], Some(Gate::Blocked(Build))),
            (Publish, false, &[(Build, Succeeded), (Publish, Failed)], Some(Gate::Blocked(Publish))),
            (Test, true, &[(Build, Succeeded)], Some(Gate::Run)),
            (Test, true, &[(Build, Failed)], Some(Gate::Blocked(Build))),
            (Test, true, &[], Some(Gate::Blocked(Build))),
            (Publish, true, &[(Build, Succeeded)], None),
            (Publish, true, &[(Build, Succeeded), (Test, Running)], None),
            (Publish, true, &[(Build, Succeeded), (Test, Succeeded)], Some(Gate::Run)),
            (Publish, true, &[(Build, Succeeded), (Test, Failed)], Some(Gate::Blocked(Test))),
            (Publish, false, &[(Build, Succeeded)], Some(Gate::Run)),
            (Publish, false, &[], Some(Gate::Blocked(Build))),
        ] {
            assert_eq!(gate(phase, has_tests, &progress(phases), None), want, "{phase} {phases:?}");
        }
    }

    #[test]
    fn behind_a_claim_only_the_registry_is_brought_to_its_digest() {
        let at = DateTime::from_timestamp(1, 0).unwrap();
        let claim = Claim::claimed("a", "sha256:00", at);
        let tested = progress(&[(Phase::Build, State::Succeeded), (Phase::Test, State::Succeeded)]);
        let published = progress(&[(Phase::Build, State::Succeeded), (Phase::Publish, State::Succeeded)]);
        let repair = Gate::Repair { digest: "sha256:00".to_owned() };
        assert_eq!(gate(Phase::Publish, true, &tested, Some(&claim)), Some(repair));
        assert_eq!(gate(Phase::Publish, true, &published, Some(&claim)), Some(Gate::Done));
        let cleaned_up = Progress::default();
        assert_eq!(gate(Phase::Publish, true, &cleaned_up, Some(&claim)), Some(Gate::Blocked(Phase::Build)));
        assert_eq!(gate(Phase::Build, true, &Progress::default(), Some(&claim)), Some(Gate::Done));
        assert_eq!(gate(Phase::Test, true, &Progress::default(), Some(&claim)), Some(Gate::Done));
    }

    #[test]
    fn a_revoked_job_does_nothing_in_any_phase() {
        let at = DateTime::from_timestamp(1, 0).unwrap();
        let verdict = Verdict::new(Status::Killed, None, Reason::Killed, "", at);
        let claim = Claim::revoked(verdict.clone());
        let tested = progress(&[(Phase::Build, State::Succeeded), (Phase::Test, State::Succeeded)]);
        for phase in Phase::ALL {
            assert_eq!(gate(phase, true, &tested, Some(&claim)), Some(Gate::Revoked(verdict.clone())));
        }
    }
}
