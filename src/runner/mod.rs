//! What runs in the allocation: one task of a job.
//!
//! A task reads the ledger, asks the gate, does its work, writes its log and its outcome.
//! Invariant: a failed phase revokes the right to publish before anything else is told of it.

mod agents;
mod archiving;
mod bases;
mod build;
mod credentials;
mod finish;
mod gate;
mod log;
mod mask;
mod publish;
mod removal;
mod surroundings;
mod sweep;
mod test;
mod vault;

use std::fs::{File, TryLockError};
use std::future::Future;
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::engine::{DockerEngine, Engine as _, EngineError};
use crate::environment::Source;
use crate::job::{Claim, Outcome, Payload, PayloadError, Phase, Reason, State, Status, Task, Verdict};
use crate::ledger::LedgerError;
use crate::telemetry::chain;
use gate::{Gate, gate};
use log::Log;
#[cfg(feature = "fuzz")]
pub(crate) use log::fuzz_mask;
pub(crate) use surroundings::Lost;
use surroundings::{CONTAINER_LABEL, Surroundings};

/// How long a phase waits for what it made in the engine to be gone: well below the time that Nomad gives a stopped task.
const REMOVAL: Duration = Duration::from_secs(10);

/// How often a file is looked for, or its lock tried.
const LOOK: Duration = Duration::from_millis(10);

/// Of a long wait, the part that may pass until its end is seen: looking is not to take cpu from the tests that are waited for.
const LATE: u32 = 100;

/// However long it is.
const LATEST: Duration = Duration::from_millis(250);

/// How a task ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// As it should.
    Well,
    /// Otherwise; the ledger says how. Nomad then stops the job's other tasks.
    Badly,
}

/// Why a task could not even tell how it ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Fatal {
    #[error("{0:?} is no task: build, test, publish, finish or sweep")]
    Task(String),
    #[error("the task does not know where it is")]
    Lost(#[from] Lost),
    #[error("the payload at {0} cannot be read")]
    NoPayload(std::path::PathBuf, #[source] std::io::Error),
    #[error("the payload cannot be used")]
    Payload(#[from] PayloadError),
    #[error("the outcome could not be written")]
    Ledger(#[from] LedgerError),
    #[error("what the job left in the engine could not be removed")]
    Engine(#[from] EngineError),
    #[error("the log could not be written")]
    Log(#[source] std::io::Error),
    #[error("{0}, the lock of this phase, could not be taken")]
    Lock(std::path::PathBuf, #[source] std::io::Error),
    #[error("{0}, the sign for the tasks that wait, could not be written")]
    Sign(std::path::PathBuf, #[source] std::io::Error),
    #[error(
        "{phase} failed, but the right to publish is claimed: finish brings the tags to what was claimed ({why})"
    )]
    Claimed { phase: Phase, why: String },
    #[error("what the sweep found could not be reported")]
    Report(#[source] crate::nomad::Error),
    #[error("signals could not be listened to")]
    Signals(#[source] std::io::Error),
}

/// Why a phase failed.
struct Failure {
    reason: Reason,
    exit_code: Option<i64>,
    message: String,
}

impl Failure {
    fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self { reason, exit_code: None, message: message.into() }
    }

    /// A failure told by an error and its causes.
    fn of(reason: Reason, error: &dyn std::error::Error) -> Self {
        Self::new(reason, chain(error))
    }
}

/// A task of a job, with all it needs.
struct Runner {
    around: Surroundings,
    payload: Payload,
    engine: DockerEngine,
    log: Log,
    /// Cancelled by SIGINT and SIGTERM.
    stop: CancellationToken,
}

/// How a phase's work ended.
enum Work {
    Done(Outcome),
    Failed(Outcome, Failure),
    /// The right to publish was claimed, and what follows failed: no revocation.
    FailedAfterClaim(Outcome, Failure),
    /// Stopped by a signal or by a revoked claim.
    Stopped(Outcome, String),
    /// The job was cleaned up meanwhile: there is nobody to tell.
    Removed,
}

impl Work {
    /// What is told of it holds no secret either.
    fn masked(self, log: &Log) -> Self {
        let masked = |failure: Failure| Failure { message: log.masked(&failure.message), ..failure };
        match self {
            Self::Failed(outcome, failure) => Self::Failed(outcome, masked(failure)),
            Self::FailedAfterClaim(outcome, failure) => Self::FailedAfterClaim(outcome, masked(failure)),
            work => work,
        }
    }
}

/// Runs one task.
pub(crate) async fn run(name: &str, source: Source<'_>) -> Result<Ended, Fatal> {
    if name == "sweep" {
        return Box::pin(sweep::sweep(source)).await;
    }
    let task: Task = name.parse().map_err(|_| Fatal::Task(name.to_owned()))?;
    let around = Surroundings::read(source)?;
    let payload = read_payload(&around).await;
    match task {
        Task::Finish => {
            let keeper = archiving::Keeper::read(source);
            Box::pin(finish::finish(around, payload.ok(), keeper)).await
        }
        Task::Phase(phase) => Box::pin(run_phase(phase, around, payload)).await,
    }
}

async fn read_payload(around: &Surroundings) -> Result<Payload, Fatal> {
    let path = around.shared("payload");
    let text = tokio::fs::read_to_string(&path).await.map_err(|error| Fatal::NoPayload(path, error))?;
    Ok(Payload::decode(&text)?)
}

async fn run_phase(
    phase: Phase,
    around: Surroundings,
    payload: Result<Payload, Fatal>,
) -> Result<Ended, Fatal> {
    let (log, writer) =
        log::open(log::is_torn(&around.shared("logs"), phase.as_str())).map_err(Fatal::Log)?;
    let ended = try_phase(phase, around, payload, log.clone()).await;
    if let Err(fatal) = &ended {
        log.say(&format!("{phase} cannot go on: {}", chain(fatal))).await;
    }
    drop(log);
    // What counts is told by now: that the log's thread had a fault is no reason to fail a build that is done.
    writer.finish().await.ok();
    ended
}

async fn try_phase(
    phase: Phase,
    around: Surroundings,
    payload: Result<Payload, Fatal>,
    log: Log,
) -> Result<Ended, Fatal> {
    let payload = match payload {
        Ok(payload) => payload,
        Err(fatal) => {
            let verdict = verdict(phase, &Failure::of(Reason::VersionMismatch, &fatal), Utc::now());
            around.put_away(&log).await;
            around.decide(&Claim::revoked(verdict)).await?;
            return Err(fatal);
        }
    };
    let engine = DockerEngine::new(&around.engine_socket);
    let stop = listen_to_signals().map_err(Fatal::Signals)?;
    Box::pin(Runner { around, payload, engine, log, stop }.run(phase)).await
}

/// Tells the ledger how a phase ended, and the shared folder.
async fn end(phase: Phase, around: &Surroundings, work: Work, lines: Option<u64>) -> Result<Ended, Fatal> {
    let now = Utc::now();
    let (mut outcome, ended) = match work {
        Work::Done(outcome) => (outcome.succeeded(now), Ended::Well),
        Work::Failed(outcome, failure) => {
            // The same moment for job and phase: what is told at once does not change when the phase tells of itself.
            let revoked = Claim::revoked(verdict(phase, &failure, now));
            let decision = around.decide(&revoked).await?;
            // Its answer was lost. An outcome would keep `finish` from bringing the tags to what was claimed.
            if let Claim::Claimed { .. } = decision.claim {
                return Err(Fatal::Claimed { phase, why: failure.message });
            }
            (outcome.failed(now, failure.reason, failure.exit_code, &failure.message), Ended::Badly)
        }
        Work::FailedAfterClaim(outcome, failure) => {
            (outcome.failed(now, failure.reason, failure.exit_code, &failure.message), Ended::Badly)
        }
        Work::Stopped(outcome, why) => (outcome.failed(now, Reason::Killed, None, &why), Ended::Badly),
        Work::Removed => return Ok(Ended::Badly),
    };
    outcome.lines = lines;
    around.tell(phase, &outcome).await?;
    around.sign(phase, outcome.state).await.map_err(|error| Fatal::Sign(around.sign_of(phase), error))?;
    Ok(ended)
}

fn verdict(phase: Phase, failure: &Failure, at: DateTime<Utc>) -> Verdict {
    let verdict = Verdict::new(Status::Failed, Some(phase), failure.reason, &failure.message, at);
    Verdict { exit_code: failure.exit_code, ..verdict }
}

fn listen_to_signals() -> std::io::Result<CancellationToken> {
    let stop = CancellationToken::new();
    let (mut int, mut term) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let stopped = stop.clone();
    #[expect(clippy::disallowed_methods, reason = "it listens for as long as the process lives")]
    tokio::spawn(async move {
        tokio::select! {
            _ = int.recv() => {}
            _ = term.recv() => {}
        }
        stopped.cancel();
    });
    Ok(stop)
}

impl Runner {
    async fn run(self, phase: Phase) -> Result<Ended, Fatal> {
        // Held to the end.
        let Some(_alone) = self.alone(phase).await? else { return Ok(Ended::Badly) };
        let ended = Box::pin(self.run_alone(phase)).await;
        // Also what it never came to read.
        self.around.put_away(&self.log).await;
        ended
    }

    async fn run_alone(&self, phase: Phase) -> Result<Ended, Fatal> {
        let claimed = match self.pass_gate(phase).await? {
            Some(Gate::Run) => None,
            Some(Gate::Repair { digest }) => Some(digest),
            // Stopped while it waited: this phase never began.
            None => return Ok(Ended::Badly),
            Some(Gate::Done) => return Ok(Ended::Well),
            Some(Gate::Revoked(verdict)) => {
                return Ok(self.leave(&format!("the job has ended ({})", verdict.message)).await);
            }
            Some(Gate::Blocked(before)) => return Ok(self.leave(&format!("{before} did not succeed")).await),
        };
        let begun = Outcome::begun(&self.around.allocation, Utc::now());
        let work = async {
            match (claimed, phase) {
                (Some(digest), _) => self.repair(begun.clone(), &digest).await,
                (None, Phase::Build) => self.build(begun.clone()).await,
                (None, Phase::Test) => self.test(begun.clone()).await,
                (None, Phase::Publish) => self.publish(begun.clone()).await,
            }
        };
        // That the phase has begun is told while it works.
        let (work, told) = tokio::join!(work, self.around.tell(phase, &begun));
        if let Err(error) = told {
            self.log.say(&format!("the start of {phase} could not be told: {}", chain(&error))).await;
        }
        self.log.settled().await;
        let work = self.say_end(phase, work).await;
        end(phase, &self.around, work, self.log.lines().await).await
    }

    /// Waits until no other run of this task is at work in the allocation; none when stopped meanwhile.
    ///
    /// A client of Nomad that is killed just after it started a task starts it again, beside the first one, which it does not
    /// know any more. The kernel frees the lock however who holds it ends.
    async fn alone(&self, phase: Phase) -> Result<Option<File>, Fatal> {
        let path = self.around.shared(&format!("{phase}.lock"));
        let failed = |error| Fatal::Lock(path.clone(), error);
        let lock = File::create(&path).map_err(failed)?;
        loop {
            match lock.try_lock() {
                Ok(()) => return Ok(Some(lock)),
                Err(TryLockError::WouldBlock) => {}
                Err(TryLockError::Error(error)) => return Err(failed(error)),
            }
            tokio::select! {
                () = self.stop.cancelled() => return Ok(None),
                () = tokio::time::sleep(LOOK) => {}
            }
        }
    }

    /// Asks the gate until it says something other than to wait; none when stopped while waiting.
    async fn pass_gate(&self, phase: Phase) -> Result<Option<Gate>, Fatal> {
        let (job, ledger) = (&self.around.job, &self.around.ledger);
        loop {
            let (claim, progress) = tokio::join!(ledger.claim(job), ledger.progress(job));
            let (claim, (_, progress)) = (claim?, progress?);
            let claim = claim.as_ref().map(|(_, claim)| claim);
            if let Some(gate) = gate(phase, self.payload.spec.has_tests(), &progress, claim) {
                return Ok(Some(gate));
            }
            tokio::select! {
                () = self.stop.cancelled() => return Ok(None),
                () = self.wait_for(Phase::Test) => {}
            }
            // Its task is about to fail, and of a task that failed Nomad takes the allocation for ended: nothing is read any more.
            if self.around.signed(Phase::Test).await == Some(State::Failed) {
                return Ok(Some(Gate::Blocked(Phase::Test)));
            }
        }
    }

    /// Ends a task whose phase never begins, and says why.
    async fn leave(&self, why: &str) -> Ended {
        self.log.say(&format!("nothing to do: {why}")).await;
        Ended::Badly
    }

    /// Waits for the sign that another task of this allocation is over: a file, looked for the less often the longer it takes.
    async fn wait_for(&self, phase: Phase) {
        let (sign, begun) = (self.around.sign_of(phase), Instant::now());
        while !tokio::fs::try_exists(&sign).await.unwrap_or(false) {
            tokio::time::sleep((begun.elapsed() / LATE).clamp(LOOK, LATEST)).await;
        }
    }

    /// Does a phase's work until its timeout, or until it is told to stop. What it started is stopped with it.
    async fn within_limits<T>(
        &self,
        phase: Phase,
        work: impl Future<Output = Result<T, Failure>>,
    ) -> Result<T, Interrupted> {
        let timeout = *self.payload.spec.timeouts.of(phase);
        let interrupted = tokio::select! {
            done = work => return done.map_err(Interrupted::Failed),
            () = self.stop.cancelled() => Interrupted::Stopped,
            () = tokio::time::sleep(timeout) => Interrupted::Failed(Failure::new(
                Reason::Timeout,
                format!("{phase} took longer than its timeout of {} s", timeout.as_secs()),
            )),
        };
        // The work is dropped: its processes and its build are gone, its containers are removed here.
        let label = (CONTAINER_LABEL, self.around.job.as_str());
        let removal = self.engine.remove_containers(label, removal::is_our_container);
        if let Err(error) = self.engine.within(REMOVAL, removal).await {
            let left = "containers may be left behind, for finish or a cleanup to remove";
            self.log.say(&format!("{left}: {}", chain(&error))).await;
        }
        Err(interrupted)
    }

    /// The last line of a phase's log.
    async fn say_end(&self, phase: Phase, work: Work) -> Work {
        let text = match &work {
            Work::Done(_) => format!("{phase} succeeded"),
            Work::Failed(_, failure) | Work::FailedAfterClaim(_, failure) => {
                format!("{phase} failed ({}): {}", failure.reason, failure.message)
            }
            Work::Stopped(_, why) => format!("{phase} was stopped: {why}"),
            Work::Removed => "nothing to do: the job was cleaned up".to_owned(),
        };
        self.log.say(&text).await;
        work.masked(&self.log)
    }
}

/// How work ended that did not get to its end.
enum Interrupted {
    Failed(Failure),
    Stopped,
}

impl Interrupted {
    fn into_work(self, outcome: Outcome) -> Work {
        match self {
            Self::Failed(failure) => Work::Failed(outcome, failure),
            Self::Stopped => Work::Stopped(outcome, "the task was told to stop".to_owned()),
        }
    }
}
