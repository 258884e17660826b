//! Which jobs there are, from memory.

use std::sync::Arc;

use super::Tenant;
use crate::job::{JobId, Record, Status};

/// Which jobs are asked for: those that fit all of it.
#[derive(Debug, Default)]
pub struct Wanted {
    /// Of this owner.
    pub owner: Option<String>,
    /// Of this repository, as it was submitted.
    pub repo_url: Option<String>,
    /// Of this ref: that which was asked for, or the default branch by its name.
    pub git_ref: Option<String>,
    /// With one of these statuses.
    pub statuses: Option<Vec<Status>>,
    /// Submitted before this one.
    pub before: Option<JobId>,
}

impl Wanted {
    fn fits(&self, record: &Record) -> bool {
        let is = |wanted: &Option<String>, text: Option<&str>| {
            wanted.as_ref().is_none_or(|wanted| text == Some(wanted))
        };
        let labels = &record.labels;
        let of_ref = is(&self.git_ref, labels.git_ref.as_deref())
            || is(&self.git_ref, record.git.reference.as_deref());
        self.statuses.as_ref().is_none_or(|statuses| statuses.contains(&record.status))
            && is(&self.owner, Some(&labels.owner))
            && is(&self.repo_url, Some(&labels.repo_url))
            && of_ref
    }
}

impl Tenant {
    /// The latest jobs that are asked for, the newest first, at most so many; none before all were listed. A job that neither
    /// Nomad nor its ledger has any more is told of by its ID only.
    pub fn latest(&self, wanted: &Wanted, most: usize) -> Option<Vec<Arc<Record>>> {
        let latest = || self.store.latest(wanted.before.as_ref(), most, |record| wanted.fits(record));
        self.freshness.is_complete().then(latest)
    }
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;

    use super::*;
    use crate::job::{Facts, JobFacts, Labels};

    #[test]
    fn a_job_is_wanted_that_fits_all_that_is_asked_for() {
        let at = |seconds| JobId::first_of(DateTime::from_timestamp(seconds, 0).unwrap());
        let mut facts = Facts::new(at(5));
        let labels = Labels {
            owner: "acme".to_owned(),
            repo_url: "https://h/r.git".to_owned(),
            git_ref: Some("main".to_owned()),
            ..Labels::default()
        };
        facts.see_job(JobFacts::new(1, "builds", labels));
        let record = Record::of(&facts).unwrap();
        let text = |text: &str| Some(text.to_owned());
        let all = || Wanted { owner: text("acme"), repo_url: text("https://h/r.git"), ..Wanted::default() };
        for (wanted, fits) in [
            (Wanted::default(), true),
            (all(), true),
            (Wanted { owner: text("other"), ..all() }, false),
            (Wanted { repo_url: text("https://h/r"), ..all() }, false),
            (Wanted { git_ref: text("main"), ..all() }, true),
            (Wanted { git_ref: text("v1"), ..all() }, false),
            (Wanted { statuses: Some(vec![Status::Failed, Status::Pending]), ..all() }, true),
            (Wanted { statuses: Some(vec![Status::Failed]), ..all() }, false),
        ] {
            assert_eq!(wanted.fits(&record), fits, "{wanted:?}");
        }
    }
}
