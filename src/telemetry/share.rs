//! What one namespace adds to the metrics that all of them share.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};

use chrono::Utc;
use prometheus::IntGauge;

use super::{Leftover, Telemetry};
use crate::job::{Phase, Record};

/// One namespace's part of a gauge.
struct Part {
    whole: IntGauge,
    mine: AtomicI64,
}

impl Part {
    fn of(whole: IntGauge) -> Self {
        Self { whole, mine: AtomicI64::default() }
    }

    fn set(&self, value: i64) {
        self.whole.add(value - self.mine.swap(value, Ordering::Relaxed));
    }
}

/// What happens to the jobs of one namespace, counted where this replica is the one that counts it.
pub struct Share {
    all: Arc<Telemetry>,
    reports: AtomicBool,
    live: AtomicI64,
    concurrent: Part,
    leftovers: [(Leftover, Part); 4],
    archive_pending: Part,
}

impl Share {
    /// Another namespace's.
    pub fn new(all: Arc<Telemetry>) -> Self {
        let leftovers =
            Leftover::ALL.map(|kind| (kind, Part::of(all.leftovers.with_label_values(&[kind.as_str()]))));
        Self {
            reports: AtomicBool::default(),
            live: AtomicI64::default(),
            concurrent: Part::of(all.concurrent.clone()),
            leftovers,
            archive_pending: Part::of(all.archive_pending.clone()),
            all,
        }
    }

    /// What is counted whatever namespace it is of.
    pub fn all(&self) -> &Telemetry {
        &self.all
    }

    /// Sets whether this replica counts what happens to jobs.
    pub fn set_reports(&self, reports: bool) {
        self.reports.store(reports, Ordering::Relaxed);
        self.concurrent.set(if reports { self.live() } else { 0 });
        if !reports {
            // What it found on duty is for the next one to tell, or the replicas would add up to more than there is.
            for (_, part) in &self.leftovers {
                part.set(0);
            }
            self.archive_pending.set(0);
        }
    }

    fn reports(&self) -> bool {
        self.reports.load(Ordering::Relaxed)
    }

    /// How many jobs have not ended.
    pub fn live(&self) -> i64 {
        self.live.load(Ordering::Relaxed)
    }

    fn add_live(&self, change: i64) {
        let live = self.live.fetch_add(change, Ordering::Relaxed) + change;
        if self.reports() {
            self.concurrent.set(live);
        }
    }

    /// A job was heard of for the first time.
    pub fn job_seen(&self, record: &Record) {
        if !record.status.is_final() {
            self.add_live(1);
        }
    }

    /// A job's record is forgotten.
    pub fn job_forgotten(&self, record: &Record) {
        if !record.status.is_final() {
            self.add_live(-1);
        }
    }

    /// A job's record changed; whether that is news, or was put together of what happened before this replica began.
    pub fn job_changed(&self, before: &Record, now: &Record, is_news: bool) {
        let ended = now.status.is_final() && !before.status.is_final();
        if ended {
            self.add_live(-1);
        }
        if !is_news {
            return;
        }
        let (was, is) = (&before.timestamps, &now.timestamps);
        for phase in Phase::ALL {
            if let ((_, None), (Some(start), Some(end))) = (was.of(phase), is.of(phase)) {
                self.all.watch_lag.observe((Utc::now() - end).as_seconds_f64().max(0.0));
                if self.reports() {
                    let failed = ended && now.phase == Some(phase) && now.failure.is_some();
                    let result = if failed { "failed" } else { "succeeded" };
                    let seconds = (end - start).as_seconds_f64().max(0.0);
                    self.all.phase_seconds.with_label_values(&[phase.as_str(), result]).observe(seconds);
                }
            }
        }
        if !self.reports() {
            return;
        }
        if let (None, Some(start), Some(accepted)) = (was.build_start, is.build_start, is.job_start) {
            self.all.queue_wait.observe((start - accepted).as_seconds_f64().max(0.0));
        }
        if ended {
            self.all.jobs.with_label_values(&[now.status.as_str()]).inc();
        }
    }

    /// How many leftovers a sweep found.
    pub fn leftovers(&self, kind: Leftover, count: u64) {
        let part = self.leftovers.iter().find(|(of, _)| *of == kind);
        if let Some((_, part)) = part {
            part.set(i64::try_from(count).unwrap_or(i64::MAX));
        }
    }

    /// How many ended jobs wait to be archived.
    pub fn archive_pending(&self, jobs: usize) {
        self.archive_pending.set(i64::try_from(jobs).unwrap_or(i64::MAX));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn namespaces_add_up_and_one_whose_duty_ends_takes_back_its_own() {
        let all = Arc::new(Telemetry::new().unwrap());
        let [one, other] = [(); 2].map(|()| Share::new(Arc::clone(&all)));
        let told = |text: &str| all.text().unwrap().lines().any(|line| line == text);
        one.set_reports(true);
        one.add_live(2);
        other.add_live(3);
        assert!(told("nomad_build_concurrent_jobs 2"));
        other.set_reports(true);
        assert!(told("nomad_build_concurrent_jobs 5"));
        for (share, found) in [(&one, 7), (&other, 1), (&one, 4)] {
            share.leftovers(Leftover::Images, found);
            share.archive_pending(usize::try_from(found).unwrap());
        }
        assert!(told("nomad_build_leftovers{kind=\"images\"} 5") && told("nomad_build_archive_pending 5"));
        one.set_reports(false);
        assert!(told("nomad_build_leftovers{kind=\"images\"} 1") && told("nomad_build_archive_pending 1"));
        assert!(told("nomad_build_concurrent_jobs 3"));
        assert_eq!((one.live(), other.live()), (2, 3));
    }
}
