//! A job's two Variables: the claim, which is written once, and the progress of its phases.
//!
//! Written by the runner with its workload identity and by the service; read by every replica. Both sides go through
//! this room, so both keep its one rule: what was decided first stands. Each carries the job's labels, since it outlives
//! the job in Nomad.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::job::{Claim, Facts, JobId, Labels, Outcome, Phase, Progress};
use crate::nomad::{Client, Error, Put, Variable, patiently};

/// Everything this project keeps in Variables lies below.
pub const PREFIX: &str = "nomad-build/";

/// Which of a job's Variables a path names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Entry {
    /// The claim.
    Claim,
    /// The progress.
    Progress,
}

impl Entry {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Claim, Self::Progress];

    /// Below which the entries of all jobs lie, in the order of the jobs' IDs.
    pub const fn prefix(self) -> &'static str {
        match self {
            Self::Claim => "nomad-build/claims/",
            Self::Progress => "nomad-build/outcomes/",
        }
    }

    /// The path of a job's.
    pub fn path(self, job: &JobId) -> String {
        format!("{}{job}", self.prefix())
    }
}

/// The job and the entry that a Variable's path names; none where it is not ours.
pub fn parse_path(path: &str) -> Option<(JobId, Entry)> {
    Entry::ALL.into_iter().find_map(|entry| Some((path.strip_prefix(entry.prefix())?.parse().ok()?, entry)))
}

/// What one of a job's Variables says.
#[derive(Debug)]
pub struct Page {
    /// Nomad's index of it.
    index: u64,
    /// Whose job it is, where the writer knew.
    labels: Option<Labels>,
    content: Content,
}

#[derive(Debug)]
enum Content {
    Claim(Claim),
    Progress(Progress),
}

impl Page {
    /// Reads a Variable; none where its path is not one of the ledger's.
    pub fn read(variable: &Variable) -> Option<Result<(JobId, Self), String>> {
        let (id, entry) = parse_path(&variable.path)?;
        let items = &variable.items;
        let content = match entry {
            Entry::Claim => Claim::from_items(items).map(Content::Claim),
            Entry::Progress => Progress::from_items(items).map(Content::Progress),
        };
        let page = |content| Self { index: variable.modify_index, labels: Labels::from_meta(items), content };
        Some(content.map(|content| (id, page(content))))
    }

    /// Whether it says whose job it is.
    pub fn has_labels(&self) -> bool {
        self.labels.is_some()
    }

    /// Takes it into what is known of its job. Returns whether it was news.
    pub fn tell(self, namespace: &str, known: &mut Facts) -> bool {
        let Self { index, labels, content } = self;
        let news = labels.is_some_and(|labels| known.see_labels(index, namespace, labels));
        let told = match content {
            Content::Claim(claim) => known.see_claim(index, claim),
            Content::Progress(progress) => known.see_progress(index, progress),
        };
        news || told
    }
}

/// Why the ledger could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    /// Nomad could not be asked.
    #[error("the ledger of job {0} could not be reached")]
    Nomad(JobId, #[source] Error),
    /// There was a claim, and a moment later there was none.
    #[error("the ledger of job {0} was removed meanwhile: somebody cleaned the job up")]
    Removed(JobId),
    /// Somebody wrote something else there.
    #[error("the ledger of job {0} cannot be understood: {1}")]
    Malformed(JobId, String),
}

/// How a job was decided.
#[derive(Debug, PartialEq, Eq)]
pub struct Decision {
    /// The claim that stands.
    pub claim: Claim,
    /// Nomad's index of it.
    pub index: u64,
    /// Whether it is the one that was tried.
    pub ours: bool,
}

/// The ledger of one namespace.
#[derive(Clone)]
pub struct Ledger {
    nomad: Client,
    namespace: String,
    patience: Duration,
}

impl Ledger {
    /// A ledger that keeps trying for `patience` while Nomad gives passing errors.
    pub fn new(nomad: Client, namespace: &str, patience: Duration) -> Self {
        Self { nomad, namespace: namespace.to_owned(), patience }
    }

    async fn patiently<T, F: Future<Output = Result<T, Error>>>(
        &self,
        job: &JobId,
        call: impl FnMut() -> F,
    ) -> Result<T, LedgerError> {
        patiently(self.patience, call).await.map_err(|error| LedgerError::Nomad(job.clone(), error))
    }

    async fn variable(&self, job: &JobId, entry: Entry) -> Result<Option<Variable>, LedgerError> {
        let path = entry.path(job);
        self.patiently(job, || self.nomad.variable(&self.namespace, &path)).await
    }

    /// All that there is of a job.
    pub async fn pages(&self, job: &JobId) -> Result<Vec<Page>, LedgerError> {
        let (claim, progress) =
            tokio::try_join!(self.variable(job, Entry::Claim), self.variable(job, Entry::Progress))?;
        let pages = claim.iter().chain(&progress).filter_map(Page::read);
        let malformed = |why| LedgerError::Malformed(job.clone(), why);
        pages.map(|page| page.map(|(_, page)| page).map_err(malformed)).collect()
    }

    /// The claim, with its index; none where nobody decided yet.
    pub async fn claim(&self, job: &JobId) -> Result<Option<(u64, Claim)>, LedgerError> {
        let read = self.variable(job, Entry::Claim).await?;
        let parse = |variable: Variable| {
            let claim = Claim::from_items(&variable.items);
            claim
                .map(|claim| (variable.modify_index, claim))
                .map_err(|why| LedgerError::Malformed(job.clone(), why))
        };
        read.map(parse).transpose()
    }

    /// Decides the job, unless it is decided.
    ///
    /// An attempt whose answer was lost finds its own claim: that is ours too.
    pub async fn decide(
        &self,
        job: &JobId,
        labels: Option<&Labels>,
        claim: &Claim,
    ) -> Result<Decision, LedgerError> {
        let malformed = |error: serde_json::Error| LedgerError::Malformed(job.clone(), error.to_string());
        let items = with_labels(claim.to_items().map_err(malformed)?, labels);
        let path = Entry::Claim.path(job);
        match self.patiently(job, || self.nomad.put_variable(&self.namespace, &path, &items, 0)).await? {
            Put::Written(index) => Ok(Decision { claim: claim.clone(), index, ours: true }),
            Put::Conflict => match self.claim(job).await? {
                Some((index, standing)) => Ok(Decision { ours: standing == *claim, claim: standing, index }),
                // It was decided: nobody may decide it once more.
                None => Err(LedgerError::Removed(job.clone())),
            },
        }
    }

    /// Writes down whose job it is, where nothing is written of it yet: until its first phase tells, Nomad's job is all that
    /// does, and Nomad may forget it before.
    pub async fn open(&self, job: &JobId, labels: &Labels) -> Result<(), LedgerError> {
        let (path, items) = (Entry::Progress.path(job), labels.to_meta());
        // A conflict is as good: it was written before.
        self.patiently(job, || self.nomad.put_variable(&self.namespace, &path, &items, 0)).await.map(drop)
    }

    /// The progress, with its index; 0 and nothing where no phase has begun.
    pub async fn progress(&self, job: &JobId) -> Result<(u64, Progress), LedgerError> {
        match self.variable(job, Entry::Progress).await? {
            None => Ok((0, Progress::default())),
            Some(variable) => Progress::from_items(&variable.items)
                .map(|progress| (variable.modify_index, progress))
                .map_err(|why| LedgerError::Malformed(job.clone(), why)),
        }
    }

    /// Writes a phase's outcome, unless that phase is over. Returns the progress that stands, with its
    /// index.
    pub async fn record(
        &self,
        job: &JobId,
        labels: Option<&Labels>,
        phase: Phase,
        outcome: &Outcome,
    ) -> Result<(u64, Progress), LedgerError> {
        let path = Entry::Progress.path(job);
        loop {
            let (index, mut progress) = self.progress(job).await?;
            if !progress.set(phase, outcome.clone()) {
                return Ok((index, progress));
            }
            let items =
                progress.to_items().map_err(|e| LedgerError::Malformed(job.clone(), e.to_string()))?;
            let items = with_labels(items, labels);
            let put = self
                .patiently(job, || self.nomad.put_variable(&self.namespace, &path, &items, index))
                .await?;
            if let Put::Written(index) = put {
                return Ok((index, progress));
            }
        }
    }

    /// Removes both Variables. What the phases told goes first: a claim without it is one that was won behind this.
    pub async fn remove(&self, job: &JobId) -> Result<(), LedgerError> {
        for entry in [Entry::Progress, Entry::Claim] {
            let path = entry.path(job);
            self.patiently(job, || self.nomad.delete_variable(&self.namespace, &path)).await?;
        }
        Ok(())
    }
}

fn with_labels(mut items: BTreeMap<String, String>, labels: Option<&Labels>) -> BTreeMap<String, String> {
    items.extend(labels.into_iter().flat_map(Labels::to_meta));
    items
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    #[test]
    fn paths_name_a_job_and_an_entry() {
        let id = JobId::from_uuid(Uuid::from_u128(1));
        for entry in Entry::ALL {
            assert_eq!(parse_path(&entry.path(&id)), Some((id.clone(), entry)));
        }
        assert_eq!(parse_path("nomad-build/claims/x"), None);
        assert_eq!(parse_path("other"), None);
    }

    #[test]
    fn a_page_says_whose_job_it_is_where_its_writer_knew() {
        let id = JobId::from_uuid(Uuid::from_u128(1));
        let labels = Labels { owner: "acme".to_owned(), tags: vec!["1".to_owned()], ..Labels::default() };
        let claim = Claim::claimed("a", "sha256:00", chrono::DateTime::UNIX_EPOCH);
        for known in [None, Some(&labels)] {
            let items = with_labels(claim.to_items().unwrap(), known);
            let path = Entry::Claim.path(&id);
            let variable = Variable { path, items, modify_index: 7, ..Variable::default() };
            let (of, page) = Page::read(&variable).unwrap().unwrap();
            assert_eq!((&of, page.has_labels()), (&id, known.is_some()));
            let mut facts = Facts::new(of);
            assert!(page.tell("ci", &mut facts));
            assert_eq!(facts.claim, (7, Some(claim.clone())));
            assert_eq!(facts.job.map(|job| job.labels).as_ref(), known);
        }
    }
}
