//! What follows where Nomad is done with a job that has not ended, where it is not done with one that has, and where nobody
//! was heard of for too long.

use chrono::{DateTime, TimeDelta, Utc};

use super::{
    AllocationFacts, Claim, Detail, Facts, JobFacts, Limits, Outcome, Phase, Published, Reason, Standing,
    State, Status, Verdict,
};

/// How long whoever revoked a job has to stop it.
const STOP_GRACE: TimeDelta = TimeDelta::seconds(3);

/// How long an agent is given that took in anew what it had begun: nothing is known to come of it.
const FORGOTTEN_FOR: TimeDelta = TimeDelta::seconds(30);

/// How old a job is before its tasks are asked for, where they were not heard of: most tell of themselves before that.
const UNHEARD_FOR: TimeDelta = TimeDelta::minutes(1);

/// How long after its timeout a phase has to be over: its runner stops what it started, and tells that as soon as it can.
const HANGS_AFTER: TimeDelta = TimeDelta::minutes(1);

/// How long tags may take behind the claim where a registry is slow: it is waited for for five minutes, and else what is asked of it
/// has a minute each time, twice for all of them and three times for each.
const TAGGING_S: u64 = 420;
const TAG_S: u64 = 180;

const TOLD_TO_STOP: &str = "Nomad told the runner to stop (a drain, a preemption or an alloc stop)";

const FORGOTTEN: &str = "Nomad had forgotten the job before it was heard how it ended";

/// What the service has to write because nobody else will.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Due {
    /// Revoke the right to publish, with this verdict.
    Revoke(Verdict),
    /// The same, unless Nomad looks for another place for the job, of which nothing ran yet.
    RevokeUnlessPlaced(Verdict),
    /// The right was claimed and the claimer is gone: end the publish phase with this outcome.
    Conclude(Outcome),
    /// The job was ended by a verdict and still runs in Nomad: stop it.
    Stop,
    /// What the allocation's tasks say has to be read first.
    Look,
    /// Nothing was heard of the job for too long: this is due if Nomad, asked once more, has nothing new either.
    Silent(Box<Due>),
}

impl Facts {
    /// What has to be done because Nomad is done with the job and the job has not ended, or the other way round, or because
    /// nothing new was heard of it for so long.
    pub fn due(&self, now: DateTime<Utc>, silent: TimeDelta) -> Option<Due> {
        // Of one that is only remembered it is not known yet whether Nomad has it.
        let job = self.job.as_ref().filter(|job| !job.remembered || job.gone)?;
        self.said(job, now).or_else(|| {
            let timeouts = job.labels.timeouts.as_ref().filter(|_| !job.gone)?;
            let silence = Silence { job, timeouts, now, silent };
            Some(Due::Silent(Box::new(self.due_by_silence(&silence)?)))
        })
    }

    /// What is due by what was heard.
    fn said(&self, job: &JobFacts, now: DateTime<Utc>) -> Option<Due> {
        if self.published().is_some() {
            return None;
        }
        let over = self.is_over();
        let last = self.allocation().filter(|_| over);
        match &self.claim.1 {
            Some(Claim::Revoked { verdict, .. }) => {
                // Whoever revoked stops the job too, and a runner that failed ends by itself; this is for one that could not.
                let failed = verdict.status == Status::Failed;
                let late = now - verdict.at > if failed { HANGS_AFTER } else { STOP_GRACE };
                (late && !over && !job.stopped && !job.gone).then_some(Due::Stop)
            }
            // Its `finish` ends the publish, or it is over then.
            Some(Claim::Claimed { .. }) if !job.gone && !job.stopped && self.is_forgotten(now) => {
                Some(Due::Stop)
            }
            Some(Claim::Claimed { allocation: claimer, digest, .. }) => {
                let done = match last {
                    _ if job.gone => true,
                    None => return self.is_unseen(job, now).then_some(Due::Look),
                    Some(AllocationFacts { standing: Standing::Lost, .. }) => true,
                    Some(AllocationFacts { detail: None, .. }) => return Some(Due::Look),
                    Some(AllocationFacts { detail: Some(detail), .. }) => detail.finished,
                };
                done.then(|| Due::Conclude(self.abandoned(job, claimer, digest, now)))
            }
            None => self.verdict(job, last, now),
        }
    }

    /// Whether Nomad is done with all that there is of the job.
    fn is_over(&self) -> bool {
        !self.allocations.is_empty() && self.allocations.values().all(AllocationFacts::is_over)
    }

    fn verdict(&self, job: &JobFacts, over: Option<&AllocationFacts>, now: DateTime<Utc>) -> Option<Due> {
        let (status, reason, message) = match over {
            _ if job.remembered && self.was_told_to_stop() => {
                (Status::Killed, Reason::Stopped, TOLD_TO_STOP.to_owned())
            }
            _ if job.remembered => (Status::Lost, Reason::NodeLost, FORGOTTEN.to_owned()),
            // Nomad collects only what has ended; what it forgot before that was purged.
            _ if job.gone && over.is_none_or(|last| last.index > job.index) => {
                (Status::Killed, Reason::Stopped, "the Nomad job was purged by somebody else".to_owned())
            }
            _ if job.stopped => {
                (Status::Killed, Reason::Stopped, "the Nomad job was stopped by somebody else".to_owned())
            }
            None => return self.forgotten(job, now),
            // Whether it was stopped because of another task, its tasks say.
            Some(AllocationFacts { detail: None, standing: Standing::Over, .. }) if !job.gone => {
                return Some(Due::Look);
            }
            // Whatever became of an allocation that replaced it: there, the phase that was stopped is not run again.
            Some(AllocationFacts { node_name, .. }) if self.was_told_to_stop() => {
                let message = format!("{TOLD_TO_STOP}, last seen on node {node_name}");
                (Status::Killed, Reason::Stopped, message)
            }
            Some(AllocationFacts { node_name, standing: Standing::Lost, .. }) => {
                let message = format!("node {node_name} was lost while the job ran on it");
                (Status::Lost, Reason::NodeLost, message)
            }
            Some(AllocationFacts { detail: None, .. }) => {
                (Status::Lost, Reason::NodeLost, FORGOTTEN.to_owned())
            }
            Some(AllocationFacts {
                detail: Some(Detail { setup_error: Some((phase, why)), .. }), ..
            }) => {
                (Status::Failed, Reason::SetupFailed, format!("the task {phase} could not be set up: {why}"))
            }
            Some(AllocationFacts { node_name, .. }) if self.has_lost_its_place() => {
                let message = format!("Nomad took the job from node {node_name} before anything of it ran");
                (Status::Lost, Reason::NodeLost, message)
            }
            Some(AllocationFacts { node_name, detail, .. }) => {
                let death = detail.as_ref().and_then(|detail| detail.death.as_ref());
                let death = death.map_or_else(String::new, |(phase, why)| format!(" ({phase}: {why})"));
                let message = format!("the runner on node {node_name} ended without an outcome{death}");
                (Status::Failed, Reason::RunnerDied, message)
            }
        };
        let failed = over.and_then(|last| last.detail.as_ref()).and_then(Detail::failed);
        let phase = failed.filter(|_| status == Status::Failed).or_else(|| self.phase());
        let verdict = Verdict::new(status, phase, reason, &message, now);
        let may_be_placed =
            status == Status::Lost && !job.gone && !job.remembered && self.has_lost_its_place();
        Some(if may_be_placed { Due::RevokeUnlessPlaced(verdict) } else { Due::Revoke(verdict) })
    }

    /// The allocation that counts, where it is not over.
    fn open_allocation(&self) -> Option<&AllocationFacts> {
        self.allocation().filter(|allocation| !allocation.is_over())
    }

    /// Whether the agent of the job's node has lost track of it for good.
    fn is_forgotten(&self, now: DateTime<Utc>) -> bool {
        let detail = self.open_allocation().and_then(|allocation| allocation.detail.as_ref());
        detail.and_then(|detail| detail.forgotten_at).is_some_and(|at| now - at > FORGOTTEN_FOR)
    }

    /// Whether it is time to ask for the tasks of the allocation that counts.
    fn is_unseen(&self, job: &JobFacts, now: DateTime<Utc>) -> bool {
        let unseen = |open: &AllocationFacts| open.detail.is_none() && open.standing != Standing::Pending;
        self.open_allocation().is_some_and(unseen) && now - job.labels.submitted_at > UNHEARD_FOR
    }

    /// What is due of a job that is not over by Nomad's word.
    fn forgotten(&self, job: &JobFacts, now: DateTime<Utc>) -> Option<Due> {
        if self.is_unseen(job, now) {
            return Some(Due::Look);
        }
        let allocation = self.open_allocation()?;
        let node = &allocation.node_name;
        let message = format!(
            "Nomad's agent on node {node} lost track of the job when it was restarted, and runs no task of it any more"
        );
        let verdict = Verdict::new(Status::Lost, self.phase(), Reason::NodeLost, &message, now);
        self.is_forgotten(now).then_some(Due::Revoke(verdict))
    }

    /// What is due of a job of which nothing is heard any more.
    fn due_by_silence(&self, silence: &Silence<'_>) -> Option<Due> {
        let &Silence { job, timeouts, now, .. } = silence;
        let allocation = self.allocation()?;
        let is_away = allocation.standing == Standing::Away
            && silence.is_past(timeouts.longest(), &[allocation.changed_at]);
        let stop = (!job.stopped).then_some(Due::Stop);
        match (&self.claim.1, self.published()) {
            // All is told, and its task goes on: nobody needs that, nor a node that may come back with it.
            (Some(Claim::Claimed { .. }), Some(outcome)) => {
                let since = [allocation.changed_at, outcome.ended_at.unwrap_or(now)];
                let goes_on =
                    allocation.standing == Standing::Running && silence.is_past(timeouts.publish, &since);
                stop.filter(|_| goes_on || is_away)
            }
            (Some(Claim::Claimed { allocation: claimer, digest, .. }), None) => {
                let conclude = || Due::Conclude(self.abandoned(job, claimer, digest, now));
                // Nobody ends a `finish` that hangs.
                let finish_hangs =
                    self.is_over() && silence.is_past(silence.publishing(), &[allocation.changed_at]);
                match self.hangs(silence) {
                    _ if is_away || finish_hangs => Some(conclude()),
                    // Its `finish` ends the publish, unless not even Nomad can end the task.
                    Some(_) => stop.or_else(|| Some(conclude())),
                    None => None,
                }
            }
            (Some(Claim::Revoked { .. }), _) => None,
            (None, _) if is_away => {
                let message = format!(
                    "node {} has been away for longer than any phase of the job may take",
                    allocation.node_name
                );
                Some(Due::Revoke(Verdict::new(Status::Lost, self.phase(), Reason::NodeLost, &message, now)))
            }
            (None, _) => {
                let (phase, timeout) = self.hangs(silence)?;
                let message = format!(
                    "{phase} did not end though its timeout of {timeout} s is over: its runner on node {} hangs",
                    allocation.node_name
                );
                Some(Due::Revoke(Verdict::new(Status::Failed, Some(phase), Reason::Timeout, &message, now)))
            }
        }
    }

    /// The phase whose runner runs and neither ends it, nor is ended by its own timeout, and that timeout in seconds. One that
    /// has not begun hangs too, where its task runs: what it waits for before that is Nomad's. So does one that has told its
    /// success and does not end.
    fn hangs(&self, silence: &Silence<'_>) -> Option<(Phase, u64)> {
        let allocation = self.allocation().filter(|allocation| allocation.standing == Standing::Running)?;
        let running = &allocation.detail.as_ref()?.running;
        let (phase, since) = match self.progress.1.latest() {
            Some((phase, outcome)) if !outcome.is_over() => (phase, Some(outcome.started_at)),
            Some((phase, outcome)) if outcome.state == State::Succeeded => {
                let waits = !running.contains(&phase);
                (if waits { phase.next(silence.job.labels.has_tests)? } else { phase }, outcome.ended_at)
            }
            Some(_) => return None,
            None => (Phase::Build, None),
        };
        let timeout = *silence.timeouts.of(phase);
        // Publishing's ends at the claim.
        let most = if self.claim.1.is_some() { silence.publishing() } else { timeout };
        // A phase that a rebooted node begins anew was begun long ago until that is told.
        let since = [allocation.changed_at, since.unwrap_or(allocation.changed_at)];
        (running.contains(&phase) && silence.is_past(most, &since)).then_some((phase, timeout))
    }

    /// Whether a runner said that it was told to stop, and nobody revoked the job. One that Nomad stopped because another task
    /// of its allocation had failed does not count.
    fn was_told_to_stop(&self) -> bool {
        let has_failed_beside = |phase: Phase, outcome: &Outcome| {
            let allocation = self.allocations.get(&outcome.allocation);
            let failed = allocation.and_then(|allocation| allocation.detail.as_ref()?.failed());
            failed.is_some_and(|failed| failed != phase)
        };
        Phase::ALL.into_iter().any(|phase| {
            let told = self.progress.1.of(phase).filter(|told| told.reason == Some(Reason::Killed));
            told.is_some_and(|told| !has_failed_beside(phase, told))
        })
    }

    /// The end of a publish phase whose runner is gone: each tag may or may not have been put.
    fn abandoned(&self, job: &JobFacts, claimer: &str, digest: &str, now: DateTime<Utc>) -> Outcome {
        let begun = self.progress.1.of(Phase::Publish).cloned();
        let mut outcome = begun.unwrap_or_else(|| Outcome::begun(claimer, now));
        outcome.digest = Some(digest.to_owned());
        outcome.published = vec![Published::Unknown; job.labels.tags.len()];
        let message =
            "the runner claimed the right to publish and ended without an outcome: read the registry";
        outcome.failed(now, Reason::RunnerDied, None, message)
    }
}

/// How long nothing new was heard of a job, and what it is held against.
struct Silence<'a> {
    job: &'a JobFacts,
    timeouts: &'a Limits<u64>,
    now: DateTime<Utc>,
    /// By a clock that nobody sets, and that stands still while the machine sleeps.
    silent: TimeDelta,
}

impl Silence<'_> {
    /// How long a publish may take with all its tags, in seconds.
    fn publishing(&self) -> u64 {
        let tags = self.job.labels.tags.iter().map(|_| TAG_S);
        self.timeouts.publish.saturating_add(TAGGING_S).saturating_add(tags.sum())
    }

    /// Whether a timeout is over, and the time to end by it, that began at the latest of some times.
    fn is_past(&self, timeout_s: u64, since: &[DateTime<Utc>]) -> bool {
        // What is too long to be reckoned with is never over.
        let timeout = i64::try_from(timeout_s).ok().and_then(TimeDelta::try_seconds);
        let most = timeout.and_then(|timeout| timeout.checked_add(&HANGS_AFTER));
        most.is_some_and(|most| self.silent > most && since.iter().all(|since| self.now - since > most))
    }
}

#[cfg(test)]
#[path = "due_tests.rs"]
mod tests;
