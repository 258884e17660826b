//! The sweeper: removes Variables that no job needs any more and that nobody else removes, and has the nodes swept.
//!
//! Copies of credentials are left by a service that dies between writing them and registering their job, and of a job that Nomad
//! forgot before the custodian removed them. Claims, outcomes and keys outlive their job, since a node may come back with its tasks,
//! and a caller with its key.
//!
//! Invariant: nothing is removed that was changed since it was looked at, or whose path does not name a job of this service.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use tokio::sync::watch;

use super::{Tenant, keys, nodes, tickets};
use crate::config::{Sweep, SweepSettings};
use crate::job::{JobId, SweepReport};
use crate::ledger;
use crate::nomad::{Error, Put, VariableStub};
use crate::render;
use crate::telemetry::{Leftover, chain};

/// How often is swept.
const EVERY: Duration = Duration::from_hours(1);

/// How long after a sweep that failed the next one is tried.
const AGAIN: Duration = Duration::from_mins(1);

/// Where `doctor` tries what the service's token may.
const CHECKS: &str = "nomad-build/doctor/";

/// How old a ticket is that whoever made it has not removed.
const TICKETS: Duration = Duration::from_mins(5);

const DAY: Duration = Duration::from_hours(24);

pub(super) struct Sweeper<'a> {
    pub(super) tenant: &'a Tenant,
    pub(super) on_duty: watch::Receiver<bool>,
}

impl Sweeper<'_> {
    /// Sweeps while this replica is on duty; ends only by being dropped.
    pub(super) async fn run(mut self) {
        if self.tenant.config.sweep.sweep == Sweep::Off {
            return;
        }
        while self.on_duty.wait_for(|on| *on).await.is_ok() {
            let swept = async {
                self.sweep().await?;
                nodes::sweep(self.tenant, &self.on_duty).await
            };
            let pause = match swept.await {
                Ok(()) => EVERY,
                Err(error) => {
                    tracing::warn!(
                        error = chain(&error),
                        "leftovers could not be swept; will be tried again"
                    );
                    AGAIN
                }
            };
            tokio::time::sleep(pause).await;
        }
    }

    async fn sweep(&self) -> Result<(), Error> {
        let Tenant { nomad, namespace, store, config, telemetry, .. } = self.tenant;
        // The jobs last: one that is registered meanwhile needs what was written for it.
        let mut variables = nomad.variables(namespace, ledger::PREFIX).await?.value;
        variables.extend(nomad.variables(namespace, &format!("nomad/jobs/{}", JobId::PREFIX)).await?.value);
        let jobs = nomad.jobs(namespace, JobId::PREFIX).await?.value;
        let jobs: HashSet<JobId> = jobs.iter().filter_map(|job| job.id.parse().ok()).collect();
        let need = |id: &JobId| match (jobs.contains(id), store.record(id)) {
            (false, _) => Need::Gone,
            (true, Some(record)) if record.status.is_final() => Need::Ended,
            (true, _) => Need::Live,
        };
        let found = leftovers(&variables, need, &config.sweep, Utc::now());
        for kind in [Leftover::Credentials, Leftover::Ledger] {
            let count = found.iter().filter(|(of, _)| *of == kind).count();
            telemetry.leftovers(kind, u64::try_from(count).unwrap_or(u64::MAX));
        }
        for (kind, variable) in found {
            if config.sweep.sweep == Sweep::DryRun {
                tracing::info!(variable = variable.path, kind = kind.as_str(), "a leftover would be removed");
                continue;
            }
            let removed = nomad.delete_variable_at(namespace, &variable.path, variable.modify_index).await?;
            if let Put::Written(_) = removed {
                tracing::info!(variable = variable.path, kind = kind.as_str(), "a leftover is removed");
                telemetry.all().leftovers_removed(kind, 1);
            }
        }
        Ok(())
    }
}

/// How much a job still needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Need {
    /// Nomad has it, and it has not ended.
    Live,
    /// Nomad has it, and it has ended.
    Ended,
    /// Nomad does not have it.
    Gone,
}

/// The Variables that no job needs.
fn leftovers<'a>(
    variables: &'a [VariableStub],
    need: impl Fn(&JobId) -> Need,
    settings: &SweepSettings,
    now: DateTime<Utc>,
) -> Vec<(Leftover, &'a VariableStub)> {
    let is_past = |time: i64, than: Duration| {
        let than = TimeDelta::from_std(than).unwrap_or(TimeDelta::MAX);
        now.signed_duration_since(DateTime::from_timestamp_nanos(time)) > than
    };
    let is_older = |variable: &VariableStub, than| is_past(variable.modify_time, than);
    // Half of a ledger tells another tale: both go by the later one.
    let mut changed = HashMap::<JobId, i64>::new();
    for variable in variables {
        if let Some((id, _)) = ledger::parse_path(&variable.path) {
            let latest = changed.entry(id).or_insert(variable.modify_time);
            *latest = variable.modify_time.max(*latest);
        }
    }
    let kind = |variable: &VariableStub| {
        if let Some(id) = render::job_of_task_variable(&variable.path) {
            let left = need(&id) != Need::Live && is_older(variable, settings.keep_credentials);
            return left.then_some(Leftover::Credentials);
        }
        // What it is good for ends within a minute, as does a check of `doctor`.
        if tickets::is_ticket(&variable.path) || variable.path.starts_with(CHECKS) {
            return is_older(variable, TICKETS).then_some(Leftover::Credentials);
        }
        // A node that is there replaces its report every hour.
        if variable.path.starts_with(SweepReport::PREFIX) {
            return is_older(variable, settings.keep_ledger.max(DAY)).then_some(Leftover::Ledger);
        }
        // A key's own job was made with it, and is as old.
        if keys::is_key(&variable.path) {
            return is_older(variable, settings.keep_ledger).then_some(Leftover::Ledger);
        }
        let (id, _) = ledger::parse_path(&variable.path)?;
        let latest = changed.get(&id).copied().unwrap_or(variable.modify_time);
        let left = need(&id) == Need::Gone && is_past(latest, settings.keep_ledger);
        left.then_some(Leftover::Ledger)
    };
    variables.iter().filter_map(|variable| Some((kind(variable)?, variable))).collect()
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    const SETTINGS: SweepSettings = SweepSettings {
        sweep: Sweep::On,
        keep_credentials: Duration::from_secs(10),
        keep_images: Duration::from_secs(10),
        keep_ledger: Duration::from_secs(100),
    };

    /// A Variable that was changed so many seconds ago.
    fn changed(path: String, age: i64, now: DateTime<Utc>) -> VariableStub {
        let modify_time = (now - TimeDelta::seconds(age)).timestamp_nanos_opt().unwrap();
        VariableStub { path, modify_time, ..VariableStub::default() }
    }

    #[test]
    fn only_what_is_old_and_belongs_to_no_job_that_needs_it_is_left_over() {
        use Leftover::{Credentials, Ledger};
        use Need::{Ended, Gone, Live};
        let id = JobId::from_uuid(Uuid::from_u128(1));
        let now = DateTime::from_timestamp(100_000, 0).unwrap();
        for (path, need, age, want) in [
            (format!("nomad/jobs/{id}/job/build"), Gone, 11, Some(Credentials)),
            (format!("nomad/jobs/{id}/job/build"), Ended, 11, Some(Credentials)),
            (format!("nomad/jobs/{id}/job/build"), Live, 11, None),
            (format!("nomad/jobs/{id}/job/build"), Gone, 9, None),
            (format!("nomad-build/claims/{id}"), Gone, 101, Some(Ledger)),
            (format!("nomad-build/outcomes/{id}"), Gone, 101, Some(Ledger)),
            ("nomad-build/keys/28900495-0bfd-50db-bc3b-c039a851cba0".to_owned(), Gone, 101, Some(Ledger)),
            ("nomad-build/keys/28900495-0bfd-50db-bc3b-c039a851cba0".to_owned(), Gone, 99, None),
            (format!("nomad-build/tickets/{}", "0a".repeat(16)), Gone, 301, Some(Credentials)),
            (format!("nomad-build/tickets/{}", "0a".repeat(16)), Gone, 299, None),
            ("nomad-build/doctor/x".to_owned(), Gone, 301, Some(Credentials)),
            ("nomad-build/tickets/other".to_owned(), Gone, 500, None),
            ("nomad-build/sweeps/b3b1cd4e".to_owned(), Gone, 86_401, Some(Ledger)),
            ("nomad-build/sweeps/b3b1cd4e".to_owned(), Gone, 86_399, None),
            ("nomad-build/keys/other".to_owned(), Gone, 500, None),
            (format!("nomad-build/claims/{id}"), Gone, 99, None),
            (format!("nomad-build/claims/{id}"), Ended, 101, None),
            (format!("nomad-build/claims/{id}"), Live, 101, None),
            // By a clock that is ahead of ours.
            (format!("nomad-build/claims/{id}"), Gone, -500, None),
            // Not ours.
            ("nomad-build/reporter".to_owned(), Gone, 500, None),
            ("nomad-build/claims/other".to_owned(), Gone, 500, None),
            ("nomad/jobs/nb-other/job/build".to_owned(), Gone, 500, None),
            (format!("nomad/jobs/{id}"), Gone, 500, None),
            (format!("creds/{id}"), Gone, 500, None),
        ] {
            let variables = [changed(path.clone(), age, now)];
            let found = leftovers(&variables, |_| need, &SETTINGS, now);
            assert_eq!(found.first().map(|(kind, _)| *kind), want, "{path} {need:?} {age}");
        }
    }

    #[test]
    fn a_jobs_ledger_goes_as_a_whole() {
        let id = JobId::from_uuid(Uuid::from_u128(1));
        let now = DateTime::from_timestamp(1000, 0).unwrap();
        for (ages, left) in [([101, 99], 0), ([99, 101], 0), ([102, 101], 2)] {
            let paths = [format!("nomad-build/claims/{id}"), format!("nomad-build/outcomes/{id}")];
            let variables: Vec<_> =
                paths.into_iter().zip(ages).map(|(path, age)| changed(path, age, now)).collect();
            assert_eq!(leftovers(&variables, |_| Need::Gone, &SETTINGS, now).len(), left, "{ages:?}");
        }
    }
}
