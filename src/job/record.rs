//! What the API tells of a job: a pure fold of its facts.
//!
//! Invariant: the end of a job is decided by its claim and, once claimed, by its publish outcome, and by nothing else.
//! Both are written once, so a final status never changes, whatever Nomad says later.

use chrono::{DateTime, SubsecRound as _, TimeDelta, Utc};
use serde::{Deserialize, Serialize};

use super::{Claim, Facts, JobId, Labels, Outcome, Phase, Published, Reason, State, Status, Verdict};

/// How long after a job's end its last phase may tell of itself: it is given a moment, and its node's clock may differ.
const TELLS: TimeDelta = TimeDelta::seconds(10);

/// A job as the API shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The job.
    pub id: JobId,
    /// What a list shows.
    pub labels: Labels,
    /// Where it stands.
    pub status: Status,
    /// The phase it is in, or ended in.
    pub phase: Option<Phase>,
    /// When what happened.
    pub timestamps: Timestamps,
    /// What was checked out.
    pub git: Git,
    /// What was published.
    pub image: Image,
    /// Why it did not succeed.
    pub failure: Option<Failure>,
    /// Why its build has not begun, in words.
    pub placement: Option<String>,
    /// Where it is in Nomad.
    pub nomad: Location,
    /// For each phase, how many lines its log has, once it has ended.
    pub lines: [Option<u64>; 3],
    /// For each phase that has begun, the allocation it began in last: Nomad may have replaced that one since.
    #[serde(default)]
    pub ran_in: [Option<String>; 3],
    /// Whether it was made of the job's ledger alone, since Nomad has forgotten the job: an archived one says more.
    #[serde(skip)]
    pub remembered: bool,
}

/// When a job was submitted, when each phase began and ended, and when the job ended; none is what has not happened.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timestamps {
    /// The submission was accepted.
    pub job_start: Option<DateTime<Utc>>,
    /// The checkout began.
    pub build_start: Option<DateTime<Utc>>,
    /// The image was built, or its build ended otherwise.
    pub build_end: Option<DateTime<Utc>>,
    /// The first test began.
    pub test_start: Option<DateTime<Utc>>,
    /// The last test ended.
    pub test_end: Option<DateTime<Utc>>,
    /// The push began.
    pub publish_start: Option<DateTime<Utc>>,
    /// The last tag was read back.
    pub publish_end: Option<DateTime<Utc>>,
    /// The final status was reached.
    pub job_end: Option<DateTime<Utc>>,
}

/// What was checked out.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Git {
    /// The ref that was asked for, or the default branch once it is known.
    #[serde(rename = "ref")]
    pub reference: Option<String>,
    /// The commit.
    pub commit: Option<String>,
}

/// What was published.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// The manifest's digest, once the job has claimed the right to publish it.
    pub digest: Option<String>,
    /// Every tag asked for.
    pub references: Vec<Reference>,
}

/// One tag of the image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reference {
    /// `host[:port]/path:tag`.
    pub reference: String,
    /// Whether the registry serves the job's digest under it.
    pub published: Published,
}

/// Why a job did not succeed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// The phase it ended in: the one that failed, begun or not, or else the one that had begun last, if any.
    pub phase: Option<Phase>,
    /// The stable code.
    pub reason: Reason,
    /// The exit code of what failed, if it had one.
    pub exit_code: Option<i64>,
    /// What happened, for a person.
    pub message: String,
}

/// Where a job is in Nomad.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Location {
    /// The namespace.
    pub namespace: String,
    /// The Nomad job's ID.
    pub job: String,
    /// The allocation that counts.
    pub allocation: Option<String>,
    /// Its node's name.
    pub node: Option<String>,
}

impl Timestamps {
    /// Start and end of a phase.
    pub fn of(&self, phase: Phase) -> (Option<DateTime<Utc>>, Option<DateTime<Utc>>) {
        match phase {
            Phase::Build => (self.build_start, self.build_end),
            Phase::Test => (self.test_start, self.test_end),
            Phase::Publish => (self.publish_start, self.publish_end),
        }
    }

    fn of_mut(&mut self, phase: Phase) -> (&mut Option<DateTime<Utc>>, &mut Option<DateTime<Utc>>) {
        match phase {
            Phase::Build => (&mut self.build_start, &mut self.build_end),
            Phase::Test => (&mut self.test_start, &mut self.test_end),
            Phase::Publish => (&mut self.publish_start, &mut self.publish_end),
        }
    }

    /// How long a phase took, in seconds; none until it has ended.
    pub fn seconds(&self, phase: Phase) -> Option<f64> {
        let (start, end) = self.of(phase);
        Some((end? - start?).as_seconds_f64())
    }
}

impl Record {
    /// The record of what was heard; none before the Nomad job itself was heard of.
    pub fn of(facts: &Facts) -> Option<Self> {
        let job = facts.job.as_ref()?;
        let progress = &facts.progress.1;
        let verdict = facts.claim.1.as_ref().and_then(Claim::verdict);
        let published = facts.published();
        let status = status(facts, verdict, published);
        let build = progress.of(Phase::Build);
        let place = facts.allocation().filter(|_| !facts.has_lost_its_place());
        let told_by = progress.latest().map(|(_, outcome)| outcome.allocation.as_str());
        // In one that somebody had Nomad make of an ended job, nothing is done. And Nomad forgets an allocation before its ledger is
        // swept, and that of a job that is purged at once.
        let shown = told_by.filter(|_| status.is_final());
        let shown = shown.or(place.map(|a| a.id.as_str()));
        let shown = shown.or_else(|| told_by.filter(|_| job.remembered || job.gone));
        Some(Self {
            id: facts.id.clone(),
            labels: job.labels.clone(),
            status,
            phase: verdict.map_or_else(|| facts.phase(), |verdict| verdict.phase),
            timestamps: timestamps(facts, job.labels.submitted_at),
            git: Git {
                reference: build.and_then(|o| o.git_ref.clone()).or_else(|| job.labels.git_ref.clone()),
                commit: build.and_then(|o| o.commit.clone()),
            },
            image: image(facts, &job.labels, published),
            failure: failure(verdict, published),
            placement: if status.is_final() { None } else { waits(facts, job.labels.has_tests) },
            nomad: Location {
                namespace: job.namespace.clone(),
                job: facts.id.to_string(),
                allocation: shown.map(str::to_owned),
                node: shown.and_then(|id| facts.allocations.get(id)).map(|a| a.node_name.clone()),
            },
            lines: Phase::ALL.map(|phase| progress.of(phase).and_then(|outcome| outcome.lines)),
            ran_in: Phase::ALL.map(|phase| progress.of(phase).map(|outcome| outcome.allocation.clone())),
            remembered: job.remembered,
        })
    }

    /// Whether what was written at a time was written by the run of a phase that counts. A line has its time in microseconds.
    pub fn wrote_since_it_began(&self, phase: Phase, time: Option<DateTime<Utc>>) -> bool {
        let began = self.timestamps.of(phase).0.map(|began| began.trunc_subsecs(6));
        time.is_some_and(|time| began.is_none_or(|began| time >= began))
    }

    /// Whether the job has just ended, and its last phase is about to tell how long its log is: it ends the job first.
    pub fn is_about_to_tell(&self, now: DateTime<Utc>) -> bool {
        let has_just_ended = |end: DateTime<Utc>| now - end < TELLS;
        self.status.is_final()
            && self.timestamps.job_end.is_some_and(has_just_ended)
            && self.phase.is_some_and(|phase| {
                self.lines[phase as usize].is_none() && self.timestamps.of(phase).0.is_some()
            })
    }

    /// The allocation that has a phase's log: the one it ran in, or else the one it is to run in. None has that of tests which
    /// the job does not have.
    pub fn allocation_of(&self, phase: Phase) -> Option<&str> {
        if phase == Phase::Test && !self.labels.has_tests {
            return None;
        }
        self.ran_in[phase as usize].as_deref().or(self.nomad.allocation.as_deref())
    }
}

/// Why nothing can take a job, or why the node that has taken it does not begin the phase that is next.
fn waits(facts: &Facts, has_tests: bool) -> Option<String> {
    let latest = facts.progress.1.latest();
    let Some(allocation) = facts.allocation().filter(|_| !facts.has_lost_its_place()) else {
        return facts.placement.1.clone().filter(|_| latest.is_none());
    };
    let next = match latest {
        None => Phase::Build,
        Some((phase, outcome)) => phase.next(has_tests).filter(|_| outcome.state == State::Succeeded)?,
    };
    let (_, why) = allocation.detail.as_ref()?.waits_for.iter().find(|(phase, _)| *phase == next)?;
    Some(format!(
        "node {} has taken the job, and {next} waits before it can begin: {why}",
        allocation.node_name
    ))
}

fn status(facts: &Facts, verdict: Option<&Verdict>, published: Option<&Outcome>) -> Status {
    match (verdict, published) {
        (Some(verdict), _) => verdict.status,
        (None, Some(outcome)) if outcome.state == State::Succeeded => Status::Succeeded,
        (None, Some(_)) => Status::Failed,
        (None, None) => match facts.progress.1.latest() {
            None => Status::Pending,
            // A phase that waits for its task is not yet begun, and its status would have no start.
            Some((phase, _)) => phase.status(),
        },
    }
}

fn timestamps(facts: &Facts, submitted_at: DateTime<Utc>) -> Timestamps {
    let end = facts.ended_at();
    let ended_in = facts.claim.1.as_ref().and_then(|claim| match claim {
        Claim::Revoked { verdict, .. } => verdict.phase,
        Claim::Claimed { .. } => Some(Phase::Publish),
    });
    // A runner on a lost node may have ended its phase long before, or run on; it tells if the node comes back.
    let is_lost =
        facts.claim.1.as_ref().and_then(Claim::verdict).is_some_and(|v| v.reason == Reason::NodeLost);
    let mut times = Timestamps { job_start: Some(submitted_at), job_end: end, ..Timestamps::default() };
    for phase in Phase::ALL {
        let Some(outcome) = facts.progress.1.of(phase) else { continue };
        let (start, stop) = times.of_mut(phase);
        // One that was killed as it began may only then have begun, or its node's clock is ahead.
        *start = Some(end.map_or(outcome.started_at, |end| outcome.started_at.min(end)));
        // Of a phase before the one that the job ended in, it may not be heard yet how it ended.
        let was_over = ended_in.is_some_and(|last| phase < last);
        // A phase does not outlast its job: what a runner writes while it is being stopped comes later.
        *stop = match (outcome.ended_at, end) {
            (Some(stop), Some(end)) => Some(stop.min(end)),
            (None, _) if was_over || is_lost => None,
            (stop, end) => stop.or(end),
        };
    }
    times
}

fn image(facts: &Facts, labels: &Labels, published: Option<&Outcome>) -> Image {
    let digest = match &facts.claim.1 {
        Some(Claim::Claimed { digest, .. }) => Some(digest.clone()),
        _ => None,
    };
    let before = if digest.is_some() { Published::Unknown } else { Published::No };
    let of =
        |index: usize| published.and_then(|outcome| outcome.published.get(index)).copied().unwrap_or(before);
    let references = labels.tags.iter().enumerate();
    let references = references
        .map(|(index, tag)| Reference { reference: format!("{}:{tag}", labels.image), published: of(index) })
        .collect();
    Image { digest, references }
}

fn failure(verdict: Option<&Verdict>, published: Option<&Outcome>) -> Option<Failure> {
    if let Some(verdict) = verdict {
        let Verdict { phase, reason, exit_code, ref message, .. } = *verdict;
        return Some(Failure { phase, reason, exit_code, message: message.clone() });
    }
    let outcome = published.filter(|outcome| outcome.state == State::Failed)?;
    Some(Failure {
        phase: Some(Phase::Publish),
        reason: outcome.reason.unwrap_or(Reason::Internal),
        exit_code: outcome.exit_code,
        message: outcome.message.clone().unwrap_or_default(),
    })
}

#[cfg(test)]
#[path = "record_tests.rs"]
pub(super) mod tests;
