//! What one namespace adds to the metrics that all of them share.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};

use chrono::Utc;
use prometheus::IntGauge;

use super::{Leftover, Telemetry};
use crate::job::{Phase, Progress, Record, State};

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

/// How a phase went that is over, by its own word: where its job ended and it told nothing yet, it was broken off.
fn result(progress: &Progress, phase: Phase) -> &'static str {
    match progress.of(phase).map(|outcome| outcome.state) {
        Some(State::Succeeded) => "succeeded",
        Some(State::Running | State::Failed) | None => "failed",
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

    /// A job's record changed, as its phases tell; whether that is news, or was put together of what happened before this replica
    /// began.
    pub fn job_changed(&self, before: &Record, now: &Record, progress: &Progress, is_news: bool) {
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
                    let labels = [phase.as_str(), result(progress, phase)];
                    let seconds = (end - start).as_seconds_f64().max(0.0);
                    self.all.phase_seconds.with_label_values(&labels).observe(seconds);
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
    use chrono::DateTime;
    use uuid::Uuid;

    use super::*;
    use crate::job::{Claim, Facts, JobFacts, JobId, Labels, Outcome, Reason, Status, Verdict};

    fn at(seconds: i64) -> DateTime<Utc> {
        DateTime::from_timestamp(1_700_000_000 + seconds, 0).unwrap()
    }

    /// What is heard of a job, one after the other.
    enum Heard {
        Progress(Phase, Outcome),
        Claim(Claim),
    }

    fn begun() -> Outcome {
        Outcome::begun("a", at(1))
    }

    fn runs(phase: Phase) -> Heard {
        Heard::Progress(phase, begun())
    }

    fn done(phase: Phase) -> Heard {
        Heard::Progress(phase, begun().succeeded(at(5)))
    }

    fn broken(phase: Phase, reason: Reason) -> Heard {
        Heard::Progress(phase, begun().failed(at(6), reason, None, "x"))
    }

    fn ended(status: Status, phase: Phase, reason: Reason) -> Heard {
        Heard::Claim(Claim::revoked(Verdict::new(status, Some(phase), reason, "x", at(9))))
    }

    /// The phases that were counted, each with its result.
    fn counted(heard: Vec<Heard>) -> Vec<(Phase, &'static str)> {
        let all = Arc::new(Telemetry::new().unwrap());
        let share = Share::new(Arc::clone(&all));
        share.set_reports(true);
        let mut facts = Facts::new(JobId::from_uuid(Uuid::from_u128(1)));
        facts.see_job(JobFacts::new(1, "ci", Labels { has_tests: true, ..Labels::default() }));
        let mut before = Record::of(&facts).unwrap();
        for (index, heard) in (2..).zip(heard) {
            match heard {
                Heard::Progress(phase, outcome) => {
                    let mut progress = facts.progress.1.clone();
                    progress.set(phase, outcome);
                    facts.see_progress(index, progress);
                }
                Heard::Claim(claim) => drop(facts.see_claim(index, claim)),
            }
            let now = Record::of(&facts).unwrap();
            share.job_changed(&before, &now, &facts.progress.1, true);
            before = now;
        }
        let text = all.text().unwrap();
        let count = |phase: &Phase, result: &str| {
            let name =
                format!("nomad_build_phase_duration_seconds_count{{phase=\"{phase}\",result=\"{result}\"}} ");
            text.lines().find_map(|line| line.strip_prefix(&name)).map_or(0, |count| count.parse().unwrap())
        };
        let each = Phase::ALL.into_iter().flat_map(|phase| ["succeeded", "failed"].map(|of| (phase, of)));
        each.flat_map(|(phase, result)| std::iter::repeat_n((phase, result), count(&phase, result))).collect()
    }

    #[test]
    fn a_phase_is_counted_once_by_its_own_word_however_its_job_ended() {
        use Phase::{Build, Publish, Test};
        let claimed = || Heard::Claim(Claim::claimed("a", "sha256:00", at(8)));
        for (what, heard, want) in [
            (
                "published",
                vec![done(Build), done(Test), runs(Publish), claimed(), done(Publish)],
                vec![(Build, "succeeded"), (Test, "succeeded"), (Publish, "succeeded")],
            ),
            (
                "a test that failed, and ended the job first",
                vec![
                    done(Build),
                    runs(Test),
                    ended(Status::Failed, Test, Reason::TestFailed),
                    broken(Test, Reason::TestFailed),
                ],
                vec![(Build, "succeeded"), (Test, "failed")],
            ),
            (
                "a test that failed and told so first",
                vec![
                    runs(Test),
                    broken(Test, Reason::TestFailed),
                    ended(Status::Failed, Test, Reason::TestFailed),
                ],
                vec![(Test, "failed")],
            ),
            (
                "killed by a replica that had not heard of the test",
                vec![done(Build), runs(Test), ended(Status::Killed, Build, Reason::Killed)],
                vec![(Build, "succeeded"), (Test, "failed")],
            ),
            (
                "lost, and its node comes back and tells that it was stopped",
                vec![
                    done(Build),
                    runs(Test),
                    ended(Status::Lost, Test, Reason::NodeLost),
                    broken(Test, Reason::Killed),
                ],
                vec![(Build, "succeeded"), (Test, "failed")],
            ),
            (
                "lost, and its node comes back and tells what was done before",
                vec![runs(Build), ended(Status::Lost, Build, Reason::NodeLost), done(Build)],
                vec![(Build, "succeeded")],
            ),
            (
                "claimed, and not published",
                vec![done(Build), runs(Publish), claimed(), broken(Publish, Reason::PushFailed)],
                vec![(Build, "succeeded"), (Publish, "failed")],
            ),
        ] {
            assert_eq!(counted(heard), want, "{what}");
        }
    }

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
