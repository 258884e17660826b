//! Events that are both a log line and a metric, and the registry they are counted in.
//!
//! What happens to jobs is seen by every replica. So that adding replicas up makes sense, only the replica that holds
//! the reporter's lock counts it; what a replica does itself (HTTP, logs, watching) every one counts for itself.

mod share;

use std::time::Duration;

use prometheus::core::Collector;
use prometheus::{
    Encoder, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry, TextEncoder,
};

use crate::job::{Record, Status};

pub use share::Share;
/// Which of the program's own log lines are written.
pub use tracing_subscriber::EnvFilter as LogFilter;

/// From a second to the longest timeout.
const PHASES: [f64; 12] = [0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 7200.0];
const WAITS: [f64; 12] = [0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0];
const FAST: [f64; 12] = [0.000_25, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 2.5, 10.0];

/// The service's metrics.
pub struct Telemetry {
    registry: Registry,
    phase_seconds: HistogramVec,
    jobs: IntCounterVec,
    concurrent: IntGauge,
    queue_wait: Histogram,
    watch_lag: Histogram,
    watch_breaks: IntCounterVec,
    watch_lists: HistogramVec,
    watch_corrections: IntCounterVec,
    leftovers: IntGaugeVec,
    leftovers_removed: IntCounterVec,
    archived: IntCounterVec,
    archive_pending: IntGauge,
    http_requests: IntCounterVec,
    http_seconds: HistogramVec,
    /// Upstreams of task logs that are open.
    pub log_followers: IntGauge,
    /// Readers of logs.
    pub log_readers: IntGauge,
    /// Bytes read from Nomad's log files.
    pub log_bytes: IntCounter,
}

fn registered<M: Collector + Clone + 'static>(
    registry: &Registry,
    metric: Result<M, prometheus::Error>,
) -> Result<M, prometheus::Error> {
    let metric = metric?;
    registry.register(Box::new(metric.clone()))?;
    Ok(metric)
}

fn options(name: &str, help: &str, buckets: &[f64]) -> HistogramOpts {
    HistogramOpts::new(name, help).buckets(buckets.to_vec())
}

impl Telemetry {
    /// Registers every metric.
    pub fn new() -> Result<Self, prometheus::Error> {
        let registry = Registry::new();
        #[cfg(target_os = "linux")]
        registry.register(Box::new(prometheus::process_collector::ProcessCollector::for_self()))?;
        let histogram = |name: &str, help: &str, buckets: &[f64], labels: &[&str]| {
            registered(&registry, HistogramVec::new(options(name, help, buckets), labels))
        };
        let wait =
            |name: &str, help: &str| registered(&registry, Histogram::with_opts(options(name, help, &WAITS)));
        let counter = |name: &str, help: &str, labels: &[&str]| {
            registered(&registry, IntCounterVec::new(Opts::new(name, help), labels))
        };
        let total = |name: &str, help: &str| registered(&registry, IntCounter::new(name, help));
        let gauge = |name: &str, help: &str| registered(&registry, IntGauge::new(name, help));
        let telemetry = Self {
            phase_seconds: histogram(
                "nomad_build_phase_duration_seconds",
                "How long phases took, by phase and by result: succeeded or failed.",
                &PHASES,
                &["phase", "result"],
            )?,
            jobs: counter(
                "nomad_build_jobs_total",
                "Jobs that ended while this replica was on duty, by final status.",
                &["status"],
            )?,
            concurrent: gauge("nomad_build_concurrent_jobs", "Jobs that have not ended.")?,
            queue_wait: wait(
                "nomad_build_queue_wait_seconds",
                "From the acceptance of a job to the start of its build.",
            )?,
            watch_lag: wait(
                "nomad_build_watch_lag_seconds",
                "From the end of a phase on its node to this replica's knowledge of it.",
            )?,
            watch_breaks: counter(
                "nomad_build_watch_reconnects_total",
                "How often watching Nomad broke and began anew.",
                &["part"],
            )?,
            watch_lists: histogram(
                "nomad_build_watch_list_duration_seconds",
                "How long it took to list everything and to take it in, by part.",
                &WAITS,
                &["part"],
            )?,
            watch_corrections: counter(
                "nomad_build_watch_corrections_total",
                "Facts that a list brought and the stream before it had not.",
                &["part"],
            )?,
            leftovers: registered(
                &registry,
                IntGaugeVec::new(
                    Opts::new(
                        "nomad_build_leftovers",
                        "What no job needs and the last sweep found, in Variables and on nodes.",
                    ),
                    &["kind"],
                ),
            )?,
            leftovers_removed: counter(
                "nomad_build_leftovers_removed_total",
                "What no job needed and was removed.",
                &["kind"],
            )?,
            archived: counter(
                "nomad_build_archived_jobs_total",
                "Ended jobs that the service archived because their finish task had not, or could not archive, and archived jobs that were kept long enough.",
                &["result"],
            )?,
            archive_pending: gauge(
                "nomad_build_archive_pending",
                "Ended jobs that are not wholly archived yet.",
            )?,
            http_requests: counter(
                "nomad_build_http_requests_total",
                "HTTP requests answered, by method, route and status.",
                &["method", "route", "status"],
            )?,
            http_seconds: histogram(
                "nomad_build_http_request_duration_seconds",
                "How long HTTP requests took until their answer began, by method and route.",
                &FAST,
                &["method", "route"],
            )?,
            log_followers: gauge("nomad_build_log_followers", "Task logs that are being followed.")?,
            log_readers: gauge("nomad_build_log_readers", "Readers of logs.")?,
            log_bytes: total("nomad_build_log_bytes_total", "Bytes of task logs read from Nomad.")?,
            registry,
        };
        telemetry.begin();
        Ok(telemetry)
    }

    /// Has the counters of few labels begin at zero: of one that appears at its first event, no increase is seen.
    fn begin(&self) {
        for part in ["jobs", "ledger"] {
            self.watch_breaks.with_label_values(&[part]);
        }
        for status in [Status::Succeeded, Status::Failed, Status::Killed, Status::Lost] {
            self.jobs.with_label_values(&[status.as_str()]);
        }
        for kind in Leftover::ALL {
            self.leftovers_removed.with_label_values(&[kind.as_str()]);
        }
        for result in [Archived::Written, Archived::Failed, Archived::Expired] {
            self.archived.with_label_values(&[result.as_str()]);
        }
    }

    /// Watching broke.
    pub fn watch_broken(&self, part: &str, error: &dyn std::error::Error) {
        self.watch_breaks.with_label_values(&[part]).inc();
        tracing::warn!(part, error = chain(error), "watching Nomad broke; everything will be listed again");
    }

    /// Everything was listed and taken in.
    pub fn listed(&self, part: &str, took: Duration) {
        self.watch_lists.with_label_values(&[part]).observe(took.as_secs_f64());
        tracing::debug!(part, ?took, "listed");
    }

    /// A list brought facts that were lost on their way.
    pub fn corrected(&self, part: &str, facts: u64) {
        self.watch_corrections.with_label_values(&[part]).inc_by(facts);
    }

    /// Leftovers were removed.
    pub fn leftovers_removed(&self, kind: Leftover, count: u64) {
        self.leftovers_removed.with_label_values(&[kind.as_str()]).inc_by(count);
    }

    /// The service archived a job, or could not, or let go of one.
    pub fn archived(&self, result: Archived) {
        self.archived.with_label_values(&[result.as_str()]).inc();
    }

    /// A request was answered. The route is the pattern, never the path.
    pub fn answered(&self, method: &str, route: &str, status: u16, seconds: f64) {
        self.http_requests.with_label_values(&[method, route, &status.to_string()]).inc();
        self.http_seconds.with_label_values(&[method, route]).observe(seconds);
    }

    /// Everything, in Prometheus' text format.
    pub fn text(&self) -> Result<String, prometheus::Error> {
        let mut bytes = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut bytes)?;
        String::from_utf8(bytes).map_err(|error| prometheus::Error::Msg(error.to_string()))
    }
}

/// What may be left over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leftover {
    /// A copy of credentials.
    Credentials,
    /// A claim, an outcome, a key or a node's report.
    Ledger,
    /// A container in a node's engine.
    Containers,
    /// An image in a node's engine.
    Images,
}

impl Leftover {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Credentials, Self::Ledger, Self::Containers, Self::Images];

    /// Its name, as a label.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Credentials => "credentials",
            Self::Ledger => "ledger",
            Self::Containers => "containers",
            Self::Images => "images",
        }
    }
}

/// What became of a job in the archive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Archived {
    /// The service archived it.
    Written,
    /// It could not.
    Failed,
    /// It was kept long enough, and is removed.
    Expired,
}

impl Archived {
    fn as_str(self) -> &'static str {
        match self {
            Self::Written => "written",
            Self::Failed => "failed",
            Self::Expired => "expired",
        }
    }
}

/// A job reached its final status.
pub struct JobEnded<'a> {
    /// Its record.
    pub record: &'a Record,
}

impl JobEnded<'_> {
    /// Tells it.
    pub fn emit(&self) {
        let Record { id, status, image, failure, .. } = self.record;
        let reason = failure.as_ref().map(|failure| failure.reason.as_str());
        tracing::info!(job = %id, %status, digest = image.digest, reason, "job ended");
    }
}

/// An error and everything that caused it, on one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

/// How log lines are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Format {
    /// For a person.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

impl std::str::FromStr for Format {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            _ => Err(()),
        }
    }
}

/// Sends log lines to standard error.
pub fn init(format: Format, filter: Option<LogFilter>) {
    // bollard logs every line of an engine's answer at DEBUG.
    let filter = filter.unwrap_or_else(|| LogFilter::new("info,bollard=warn,hyper=warn"));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    // A second initialisation in one process is a test's; the first one stands.
    let done = match format {
        Format::Text => builder.with_ansi(false).try_init(),
        Format::Json => builder.json().try_init(),
    };
    drop(done);
}
