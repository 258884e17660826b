//! Everything that was heard of one job.
//!
//! Invariant: each fact carries Nomad's index and only a newer one replaces it, so the same facts in any order, however
//! often, give the same result.

use std::collections::BTreeMap;

use chrono::{DateTime, TimeDelta, Utc};

use super::{Claim, JobId, Labels, Outcome, Phase, Progress};

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

/// Where an allocation stands, as far as Nomad's servers know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Its node has begun none of its tasks.
    Pending,
    /// Tasks of it run, or are to.
    Running,
    /// Its node is away: the servers do not hear of it, and wait for it to come back.
    Away,
    /// The client ended with it (complete or failed); poststop tasks may still run.
    Over,
    /// Its node is lost.
    Lost,
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
    /// Where it stands.
    pub standing: Standing,
    /// Whether Nomad's servers want it to run no more: they stopped it, or gave the job another place.
    pub withdrawn: bool,
    /// When anything of it changed last, by the servers' clock.
    pub changed_at: DateTime<Utc>,
    /// What its tasks say; none where a list left them out.
    pub detail: Option<Detail>,
}

impl AllocationFacts {
    /// Whether the client ended with it, or its node is lost.
    pub fn is_over(&self) -> bool {
        matches!(self.standing, Standing::Over | Standing::Lost)
    }
}

/// How long after the last change of an allocation its `finish` is over for certain.
const FINISHED_BY: TimeDelta = TimeDelta::minutes(15);

/// What the tasks of an allocation say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Detail {
    /// Whether a phase of it has begun.
    pub begun: bool,
    /// Whether the finish task has ended.
    pub finished: bool,
    /// The first phase whose task could not be set up, and what Nomad said of it.
    pub setup_error: Option<(Phase, String)>,
    /// The first phase whose task ran and failed, and what Nomad said of its end.
    pub death: Option<(Phase, String)>,
    /// When its agent had lost track of it: it starts no task of it any more, and says that they run.
    pub forgotten_at: Option<DateTime<Utc>>,
    /// The phases whose task has not begun, where Nomad says what it waits for.
    pub waits_for: Vec<(Phase, String)>,
    /// The phases whose runner runs.
    pub running: Vec<Phase>,
}

impl Detail {
    /// The phase whose task failed: Nomad stops the others because of it.
    pub fn failed(&self) -> Option<Phase> {
        self.setup_error.as_ref().or(self.death.as_ref()).map(|(phase, _)| *phase)
    }
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
            known.is_over() || known.index > listed || allocations.iter().any(|listed| listed.id == *id)
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

    /// Whether nothing of the job ran in any place it had, and it has none now: Nomad takes one that is pending from a node that
    /// it misses, and from one that is drained.
    pub fn has_lost_its_place(&self) -> bool {
        // What tells nothing of its tasks and was not lost may have run them.
        let may_have_begun = |allocation: &AllocationFacts| match &allocation.detail {
            Some(detail) => detail.begun,
            None => allocation.standing != Standing::Lost,
        };
        let was_taken = |allocation: &AllocationFacts| {
            allocation.is_over() && allocation.withdrawn && !may_have_begun(allocation)
        };
        !self.allocations.is_empty()
            && self.progress.1.latest().is_none()
            && self.allocations.values().all(was_taken)
    }

    /// Whether `finish` is over wherever the job was, or nothing is heard of it where it was lost.
    pub fn is_finished(&self, now: DateTime<Utc>) -> bool {
        let is_finished = |allocation: &AllocationFacts| match (allocation.standing, &allocation.detail) {
            (Standing::Lost, _) => true,
            (Standing::Over, Some(detail)) => detail.finished,
            // Of one that ended before this replica began, its tasks are not asked for.
            (Standing::Over, None) => now - allocation.changed_at > FINISHED_BY,
            _ => false,
        };
        !self.allocations.is_empty() && self.allocations.values().all(is_finished)
    }

    /// Whether no task of the job ran or will, as far as it is known: none removes what the job was given.
    pub fn has_no_place(&self) -> bool {
        let is_untold = self.allocations.is_empty() && self.progress.1.latest().is_none();
        is_untold || self.has_lost_its_place()
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
