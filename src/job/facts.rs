//! Everything that was heard of one job, and what follows when Nomad is done with it but the job has not ended.
//!
//! Invariant: each fact carries Nomad's index and only a newer one replaces it, so the same facts in any order, however
//! often, give the same result.

use std::collections::BTreeMap;

use chrono::{DateTime, TimeDelta, Utc};

use super::{Claim, JobId, Labels, Outcome, Phase, Progress, Published, Reason, Status, Verdict};

/// How long whoever revoked a job has to stop it.
const STOP_GRACE: TimeDelta = TimeDelta::seconds(3);

/// How long an agent is given that took in anew what it had begun: nothing is known to come of it.
const FORGOTTEN_FOR: TimeDelta = TimeDelta::seconds(30);

/// How old a job is before its tasks are asked for, where they were not heard of: most tell of themselves before that.
const UNHEARD_FOR: TimeDelta = TimeDelta::minutes(1);

const TOLD_TO_STOP: &str = "Nomad told the runner to stop (a drain, a preemption or an alloc stop)";

const FORGOTTEN: &str = "Nomad had forgotten the job before it was heard how it ended";

/// What is known of the Nomad job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobFacts {
    /// Nomad's index of this state.
    pub index: u64,
    /// The namespace.
    pub namespace: String,
    /// What a list shows.
    pub labels: Labels,
    /// Whether somebody stopped it.
    pub stopped: bool,
    /// Whether it is no longer in Nomad.
    pub gone: bool,
    /// Whether its ledger is all that was heard of it: Nomad may have forgotten it.
    pub remembered: bool,
}

impl JobFacts {
    /// A job that Nomad has.
    pub fn new(index: u64, namespace: &str, labels: Labels) -> Self {
        let namespace = namespace.to_owned();
        Self { index, namespace, labels, stopped: false, gone: false, remembered: false }
    }
}

/// What is known of one allocation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AllocationFacts {
    /// Its ID.
    pub id: String,
    /// Nomad's index of this state.
    pub index: u64,
    /// Nomad's index of its creation: the later one is the current one.
    pub created: u64,
    /// The node's name.
    pub node_name: String,
    /// Whether its node has begun none of its tasks, as far as the servers know.
    pub is_pending: bool,
    /// Whether the client ended with it (complete, failed or lost); poststop tasks may still run.
    pub is_over: bool,
    /// Whether the node is lost.
    pub is_lost: bool,
    /// What its tasks say; none where a list left them out.
    pub detail: Option<Detail>,
}

/// What the tasks of an allocation say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Detail {
    /// Whether the finish task has ended.
    pub finished: bool,
    /// What Nomad said of a task that could not be set up.
    pub setup_error: Option<String>,
    /// What Nomad said of the end of a task that failed.
    pub death: Option<String>,
    /// When its agent had lost track of it: it starts no task of it any more, and says that they run.
    pub forgotten_at: Option<DateTime<Utc>>,
    /// What Nomad says that a task waits for which has not begun.
    pub waits_for: Option<String>,
}

/// A value and the index it had.
type Indexed<T> = (u64, T);

/// Everything that was heard of one job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// The job.
    pub id: JobId,
    /// The Nomad job, once heard of.
    pub job: Option<JobFacts>,
    /// Its allocations by ID.
    pub allocations: BTreeMap<String, AllocationFacts>,
    /// Why it waits for a place.
    pub placement: Indexed<Option<String>>,
    /// What its phases say.
    pub progress: Indexed<Progress>,
    /// The fence.
    pub claim: Indexed<Option<Claim>>,
}

/// What the service has to write because nobody else will.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Due {
    /// Revoke the right to publish, with this verdict.
    Revoke(Verdict),
    /// The right was claimed and the claimer is gone: end the publish phase with this outcome.
    Conclude(Outcome),
    /// The job was ended by a verdict and still runs in Nomad: stop it.
    Stop,
    /// What the allocation's tasks say has to be read first.
    Look,
}

impl Facts {
    /// Nothing heard yet.
    pub fn new(id: JobId) -> Self {
        Self {
            id,
            job: None,
            allocations: BTreeMap::new(),
            placement: (0, None),
            progress: (0, Progress::default()),
            claim: (0, None),
        }
    }

    /// Takes in a state of the Nomad job. Returns whether it was news; so do the others.
    pub fn see_job(&mut self, job: JobFacts) -> bool {
        let news = self.job.as_ref().is_none_or(|known| {
            // What was written of a job is newer than the job itself.
            known.index < job.index || (known.remembered && !known.gone)
        });
        if news {
            self.job = Some(job);
        }
        news
    }

    /// Takes in whose job it is from its ledger, as written at an index: the ledger outlives the job in Nomad.
    pub fn see_labels(&mut self, index: u64, namespace: &str, labels: Labels) -> bool {
        match &mut self.job {
            None => {
                self.job = Some(JobFacts { remembered: true, ..JobFacts::new(index, namespace, labels) });
                true
            }
            Some(job) => {
                // A list that was made before this was written says nothing of a job that is newer than the list.
                if job.remembered && !job.gone {
                    job.index = job.index.max(index);
                }
                false
            }
        }
    }

    /// Takes in a state of the Nomad job from a list at an index, which is the truth of its time: what it shows counts, though
    /// it is older than what was heard before, as after a restore.
    pub fn see_listed_job(&mut self, job: JobFacts, listed: u64) -> bool {
        if let Some(known) = &mut self.job {
            overrule(&mut known.index, job.index, listed);
        }
        self.see_job(job)
    }

    /// Takes in that the job is not in Nomad, as of an index.
    pub fn see_gone(&mut self, index: u64) -> bool {
        match &mut self.job {
            Some(job) if !job.gone && job.index <= index => {
                job.gone = true;
                job.index = index;
                true
            }
            _ => false,
        }
    }

    /// Takes in a state of an allocation.
    pub fn see_allocation(&mut self, allocation: AllocationFacts) -> bool {
        let news = self.allocations.get(&allocation.id).is_none_or(|known| {
            // A list shows the same state without its tasks.
            known.index < allocation.index
                || (known.index == allocation.index && known.detail.is_none() && allocation.detail.is_some())
        });
        if news {
            self.allocations.insert(allocation.id.clone(), allocation);
        }
        news
    }

    /// Takes in the allocations from a list at an index, in the same way. One that is not over and not listed is one that a
    /// restored Nomad never had: Nomad forgets only what is over.
    pub fn see_listed_allocations(&mut self, allocations: Vec<AllocationFacts>, listed: u64) -> bool {
        let known = self.allocations.len();
        self.allocations.retain(|id, known| {
            known.is_over || known.index > listed || allocations.iter().any(|listed| listed.id == *id)
        });
        let mut news = known != self.allocations.len();
        for allocation in allocations {
            if let Some(known) = self.allocations.get_mut(&allocation.id) {
                overrule(&mut known.index, allocation.index, listed);
            }
            news |= self.see_allocation(allocation);
        }
        news
    }

    /// Takes in why the job waits, or that it does not.
    pub fn see_placement(&mut self, index: u64, placement: Option<String>) -> bool {
        replace(&mut self.placement, index, placement)
    }

    /// Takes in what the phases say. What they said once stands, whatever a restored Nomad shows.
    pub fn see_progress(&mut self, index: u64, mut progress: Progress) -> bool {
        let (known, standing) = &mut self.progress;
        if *known < index {
            progress.keep(standing);
            self.progress = (index, progress);
            return true;
        }
        standing.keep(&progress)
    }

    /// Takes in the fence. What was decided once stands, whatever a restored Nomad shows.
    pub fn see_claim(&mut self, index: u64, claim: Claim) -> bool {
        if self.claim.1.as_ref().is_some_and(|standing| *standing != claim) {
            return false;
        }
        replace(&mut self.claim, index, Some(claim))
    }

    /// Nomad is in an older state than what was heard of it: what it says from now on counts, whatever its index. What the
    /// job decided and its phases told stands.
    pub fn begin_anew(&mut self) {
        if let Some(job) = &mut self.job {
            job.index = 0;
        }
        self.allocations.clear();
        self.placement = (0, None);
        self.progress.0 = 0;
    }

    /// The allocation that counts: the one created last.
    pub fn allocation(&self) -> Option<&AllocationFacts> {
        self.allocations.values().max_by_key(|allocation| (allocation.created, &allocation.id))
    }

    /// The publish phase's outcome, if it counts: the right was claimed, and the phase is over.
    pub fn published(&self) -> Option<&Outcome> {
        match self.claim.1 {
            Some(Claim::Claimed { .. }) => {
                self.progress.1.of(Phase::Publish).filter(|outcome| outcome.is_over())
            }
            _ => None,
        }
    }

    /// When the job ended; none while it has not.
    pub fn ended_at(&self) -> Option<DateTime<Utc>> {
        let verdict = self.claim.1.as_ref().and_then(Claim::verdict);
        verdict.map(|verdict| verdict.at).or_else(|| self.published().and_then(|outcome| outcome.ended_at))
    }

    /// The phase that runs or ran last.
    pub fn phase(&self) -> Option<Phase> {
        self.progress.1.latest().map(|(phase, _)| phase)
    }

    /// What has to be done because Nomad is done with the job and the job has not ended, or the other way round.
    pub fn due(&self, now: DateTime<Utc>) -> Option<Due> {
        // Of one that is only remembered it is not known yet whether Nomad has it.
        let job = self.job.as_ref().filter(|job| !job.remembered || job.gone)?;
        if self.published().is_some() {
            return None;
        }
        let over = !self.allocations.is_empty() && self.allocations.values().all(|a| a.is_over);
        let last = self.allocation().filter(|_| over);
        match &self.claim.1 {
            Some(Claim::Revoked { verdict, .. }) => {
                // Whoever revoked stops the job too; this is for one that could not.
                let late = now - verdict.at > STOP_GRACE && verdict.status != Status::Failed;
                (late && !over && !job.stopped && !job.gone).then_some(Due::Stop)
            }
            // Its `finish` ends the publish, or it is over then.
            Some(Claim::Claimed { .. }) if !job.gone && !job.stopped && self.is_forgotten(now) => {
                Some(Due::Stop)
            }
            Some(Claim::Claimed { allocation: claimer, digest, .. }) => {
                let done = match last {
                    _ if job.gone => true,
                    None => return None,
                    Some(AllocationFacts { is_lost: true, .. }) => true,
                    Some(AllocationFacts { detail: None, .. }) => return Some(Due::Look),
                    Some(AllocationFacts { detail: Some(detail), .. }) => detail.finished,
                };
                done.then(|| Due::Conclude(self.abandoned(job, claimer, digest, now)))
            }
            None => self.verdict(job, last, now),
        }
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
            // Whatever became of an allocation that replaced it: there, the phase that was stopped is not run again.
            Some(AllocationFacts { node_name, .. }) if self.was_told_to_stop() => {
                let message = format!("{TOLD_TO_STOP}, last seen on node {node_name}");
                (Status::Killed, Reason::Stopped, message)
            }
            Some(AllocationFacts { detail: None, is_lost: false, .. }) if job.gone => {
                (Status::Lost, Reason::NodeLost, FORGOTTEN.to_owned())
            }
            Some(AllocationFacts { detail: None, is_lost: false, .. }) => return Some(Due::Look),
            Some(allocation) if allocation.is_lost => {
                let message = format!("node {} was lost while the job ran on it", allocation.node_name);
                (Status::Lost, Reason::NodeLost, message)
            }
            Some(AllocationFacts { detail: Some(Detail { setup_error: Some(why), .. }), .. }) => {
                (Status::Failed, Reason::SetupFailed, format!("a task could not be set up: {why}"))
            }
            Some(AllocationFacts { node_name, detail, .. }) => {
                let death = detail.as_ref().and_then(|detail| detail.death.as_ref());
                let death = death.map_or_else(String::new, |death| format!(" ({death})"));
                let message = format!("the runner on node {node_name} ended without an outcome{death}");
                (Status::Failed, Reason::RunnerDied, message)
            }
        };
        Some(Due::Revoke(Verdict::new(status, self.phase(), reason, &message, now)))
    }

    /// The allocation that counts, where it is not over.
    fn open_allocation(&self) -> Option<&AllocationFacts> {
        self.allocation().filter(|allocation| !allocation.is_over)
    }

    /// Whether the agent of the job's node has lost track of it for good.
    fn is_forgotten(&self, now: DateTime<Utc>) -> bool {
        let detail = self.open_allocation().and_then(|allocation| allocation.detail.as_ref());
        detail.and_then(|detail| detail.forgotten_at).is_some_and(|at| now - at > FORGOTTEN_FOR)
    }

    /// What is due of a job that is not over by Nomad's word.
    fn forgotten(&self, job: &JobFacts, now: DateTime<Utc>) -> Option<Due> {
        let allocation = self.open_allocation()?;
        if allocation.detail.is_none()
            && !allocation.is_pending
            && now - job.labels.submitted_at > UNHEARD_FOR
        {
            return Some(Due::Look);
        }
        let node = &allocation.node_name;
        let message = format!(
            "Nomad's agent on node {node} lost track of the job when it was restarted, and runs no task of it any more"
        );
        let verdict = Verdict::new(Status::Lost, self.phase(), Reason::NodeLost, &message, now);
        self.is_forgotten(now).then_some(Due::Revoke(verdict))
    }

    /// Whether a runner said that it was told to stop, and nobody revoked the job.
    fn was_told_to_stop(&self) -> bool {
        let mut outcomes = Phase::ALL.into_iter().filter_map(|phase| self.progress.1.of(phase));
        outcomes.any(|outcome| outcome.reason == Some(Reason::Killed))
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

/// What a list at an index shows is taken, where it is older than what is known and that is not newer than the list.
fn overrule(known: &mut u64, shown: u64, listed: u64) {
    if shown < *known && *known <= listed {
        *known = 0;
    }
}

fn replace<T: PartialEq>(slot: &mut Indexed<T>, index: u64, value: T) -> bool {
    let news = slot.0 < index;
    if news {
        *slot = (index, value);
    }
    news
}
