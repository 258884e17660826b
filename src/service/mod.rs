//! Where jobs meet Nomad: submit, kill, clean up, the store of records and what keeps it true, and what sweeps up.

mod archivist;
mod authority;
mod cleanup;
mod credentials;
mod duty;
mod freshness;
mod keys;
mod kill;
mod logins;
pub mod logs;
mod nodes;
mod store;
mod submit;
mod sweeper;
mod tickets;
mod tokens;
mod translate;
mod undertaker;
mod watch;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use secrecy::SecretString;
use tokio::sync::watch::Receiver;
use tokio::sync::{Mutex, Notify, Semaphore};
use tokio_util::sync::CancellationToken;

use crate::archive::{self, Archive};
use crate::config::Config;
use crate::job::{JobId, Record};
use crate::ledger::{Ledger, LedgerError, Page};
use crate::nomad::{self, Client, Kind};
use crate::telemetry::Telemetry;

pub use authority::Denied;
pub use cleanup::CleanupError;
pub use keys::KeyError;
pub use kill::{KillError, Killed};
pub use logins::{Caller, LoginError};
pub use submit::SubmitError;
pub use tickets::{Ticket, TicketError};

use archivist::Archivist;
use authority::{Authority, Open};
use duty::Duty;
use freshness::Freshness;
use keys::Keys;
use logins::Logins;
use store::Store;
use sweeper::Sweeper;
use tickets::Outstanding;
use undertaker::Undertaker;
use watch::Watcher;

/// How long a caller's request keeps trying while Nomad gives passing errors.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long a phase that has ended its job is waited for to tell of itself.
const TOLD: Duration = Duration::from_secs(3);

/// How long it is believed that Nomad answers.
const DOUBT: Duration = Duration::from_secs(1);

/// Longer than any service lives: the patience of what nobody else would end.
const FOR_EVER: Duration = Duration::from_hours(10 * 365 * 24);

/// The service: everything the API asks for.
pub struct Service {
    config: Config,
    nomad: Client,
    ledger: Ledger,
    keys: Keys,
    authority: Authority,
    logins: Logins,
    store: Arc<Store>,
    freshness: Arc<Freshness>,
    hub: logs::Hub,
    archive: Option<Archive>,
    /// The turns of those who clean up.
    cleanups: Semaphore,
    /// Whether Nomad answered, and when it was asked.
    doubted: Mutex<Option<(Option<String>, Instant)>>,
    /// Tickets that may still be used.
    tickets: Outstanding,
    telemetry: Arc<Telemetry>,
}

/// Why a service could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum SetUpError {
    /// Nomad's client.
    #[error("Nomad's client could not be set up")]
    Nomad(#[from] nomad::Error),
    /// The archive.
    #[error("the archive could not be opened")]
    Archive(#[from] archive::Error),
}

/// Why a job could not be found.
#[derive(Debug, thiserror::Error)]
pub enum FindError {
    /// Neither here nor in Nomad.
    #[error("there is no job {0}")]
    Unknown(JobId),
    /// Nomad could not be asked.
    #[error("job {0} could not be looked up")]
    Nomad(JobId, #[source] nomad::Error),
    /// Its ledger could not be read.
    #[error("job {0} could not be looked up")]
    Ledger(JobId, #[source] LedgerError),
    /// Nomad does not have it, and the archive could not be asked.
    #[error("job {0} could not be looked up")]
    Archive(JobId, #[source] archive::Error),
}

impl Service {
    /// Sets the service up; nothing runs before [`Service::run`].
    pub fn new(config: Config, telemetry: Arc<Telemetry>) -> Result<Self, SetUpError> {
        let nomad = Client::new(&config.nomad)?;
        let archive = config.archive.as_ref();
        let archive = archive.map(|settings| Archive::open(settings, &config.namespace)).transpose()?;
        let ledger = Ledger::new(nomad.clone(), &config.namespace, PATIENCE);
        let keys = Keys { nomad: nomad.clone(), namespace: config.namespace.clone() };
        let open = match (config.open, config.listen.ip().is_loopback()) {
            (true, _) => Open::Everybody,
            (false, true) => Open::ThisMachine,
            (false, false) => Open::Nobody,
        };
        let authority = Authority::new(nomad.clone(), &config.namespace, open);
        let logins = Logins::new(nomad.clone(), config.jwt_auth_method.clone());
        let freshness = Arc::<Freshness>::default();
        let store = Arc::new(Store::new(Arc::clone(&freshness), Arc::clone(&telemetry)));
        let settings = logs::Settings { archive: archive.clone(), ..logs::Settings::default() };
        let hub = logs::Hub::new(nomad.clone(), settings);
        let cleanups = Semaphore::new(cleanup::AT_ONCE);
        Ok(Self {
            config,
            nomad,
            ledger,
            keys,
            authority,
            logins,
            store,
            freshness,
            hub,
            archive,
            cleanups,
            doubted: Mutex::default(),
            tickets: Outstanding::default(),
            telemetry,
        })
    }

    /// Keeps the store true, and ends what nobody else ends, until this replica retires: then it gives back what it holds.
    pub async fn run(&self, retired: CancellationToken) {
        let watcher = Watcher {
            nomad: self.nomad.clone(),
            namespace: self.config.namespace.clone(),
            ledger: self.ledger.clone(),
            store: Arc::clone(&self.store),
            freshness: Arc::clone(&self.freshness),
            telemetry: Arc::clone(&self.telemetry),
            began: Notify::new(),
        };
        let undertaker = Undertaker::new(self);
        let (on, on_duty) = tokio::sync::watch::channel(false);
        let duty = Duty {
            nomad: self.nomad.clone(),
            namespace: self.config.namespace.clone(),
            telemetry: Arc::clone(&self.telemetry),
            on,
            retired,
        };
        let sweeper = Sweeper { service: self, on_duty: on_duty.clone() };
        let archivist = Archivist { service: self, on_duty };
        tokio::select! {
            () = duty.run() => {}
            _ = async { tokio::join!(watcher.run(), undertaker.run(), sweeper.run(), archivist.run()) } => {}
        }
    }

    /// The configuration.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Who has a token: Nomad's, an identity provider's that is traded, or none.
    pub(crate) async fn caller(&self, token: Option<SecretString>) -> Result<Caller, LoginError> {
        self.logins.caller(token).await
    }

    /// The name of who has a token, which is no secret.
    pub(crate) async fn name_of(&self, token: Option<SecretString>) -> Option<String> {
        self.logins.name_of(token).await
    }

    /// What callers may do.
    pub(crate) fn authority(&self) -> &Authority {
        &self.authority
    }

    /// Logs, for many readers.
    pub fn hub(&self) -> &logs::Hub {
        &self.hub
    }

    /// Everything counted, in Prometheus' text format.
    pub fn metrics(&self) -> Result<String, prometheus::Error> {
        let counters = self.hub.counters();
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        self.telemetry.log_followers.set(counters.followers.load(Ordering::Relaxed));
        self.telemetry.log_readers.set(counters.readers.load(Ordering::Relaxed));
        // The hub's own counter is the truth, this one follows it.
        let bytes = load(&counters.bytes).saturating_sub(self.telemetry.log_bytes.get());
        self.telemetry.log_bytes.inc_by(bytes);
        self.telemetry.text()
    }

    /// Metrics.
    pub fn telemetry(&self) -> &Arc<Telemetry> {
        &self.telemetry
    }

    /// How many jobs have not ended.
    pub fn live(&self) -> i64 {
        self.store.live()
    }

    /// Why the service cannot do its work; none where it can. However many ask, Nomad is asked once a second.
    pub async fn doubt(&self) -> Option<String> {
        if let Some(why) = self.freshness.doubt() {
            return Some(why);
        }
        let mut known = self.doubted.lock().await;
        if let Some((doubt, _)) = known.as_ref().filter(|(_, at)| at.elapsed() < DOUBT) {
            return doubt.clone();
        }
        let doubt = self.nomad.leader().await.err().map(|error| error.to_string());
        *known = Some((doubt.clone(), Instant::now()));
        doubt
    }

    /// When what is shown was last known to be all there is: seconds ago, and longer where Nomad does not answer.
    pub fn as_of(&self) -> DateTime<Utc> {
        // Before everything was listed, each read asks Nomad.
        self.freshness.as_of().unwrap_or_else(Utc::now)
    }

    /// A job's record. One that is known costs no call to Nomad; one that Nomad has forgotten is read from the archive.
    pub async fn record(&self, id: &JobId) -> Result<Arc<Record>, FindError> {
        match self.store.record(id).filter(|record| self.freshness.is_complete() && !record.remembered) {
            Some(record) => Ok(record),
            None => Ok(self.follow(id).await?.borrow().clone()),
        }
    }

    /// The same, for who reads the job's log: where its last phase ended the job just now, once that has told how long the log
    /// is. Of a runner that died it is what is known after a moment.
    pub async fn record_for_logs(&self, id: &JobId) -> Result<Arc<Record>, FindError> {
        let record = self.record(id).await?;
        if !record.is_about_to_tell(Utc::now()) {
            return Ok(record);
        }
        let mut record = self.follow(id).await?;
        let told = record.wait_for(|record| !record.is_about_to_tell(Utc::now()));
        // Whether it told or not, what is known now is the most there is.
        tokio::time::timeout(TOLD, told).await.map(drop).ok();
        Ok(record.borrow().clone())
    }

    /// A job's record as it changes.
    pub async fn follow(&self, id: &JobId) -> Result<Receiver<Arc<Record>>, FindError> {
        match self.store.follow(id) {
            // Half of what is to be known would tell a job that has ended as one that waits.
            known @ Some(_) if self.freshness.is_complete() => self.or_archived(id, known).await,
            _ => self.follow_anew(id).await,
        }
    }

    /// The same, once everything that Nomad says of the job now is taken in.
    pub async fn follow_anew(&self, id: &JobId) -> Result<Receiver<Arc<Record>>, FindError> {
        match self.look_up(id).await {
            // What is known of a job may outlive it in Nomad.
            Ok(()) | Err(FindError::Unknown(_)) => {}
            // What is archived is final, whatever Nomad would say.
            Err(error) => return self.archived(id).await.ok().flatten().map(fixed).ok_or(error),
        }
        self.or_archived(id, self.store.follow(id)).await
    }

    /// What is known of a job, or what was archived of one that Nomad has forgotten: that says more than its ledger.
    async fn or_archived(
        &self,
        id: &JobId,
        known: Option<Receiver<Arc<Record>>>,
    ) -> Result<Receiver<Arc<Record>>, FindError> {
        if let Some(known) = known.as_ref().filter(|known| !known.borrow().remembered) {
            return Ok(known.clone());
        }
        match known {
            // An archive that does not say is as good as none.
            Some(known) => {
                let asked = tokio::time::timeout(logs::ARCHIVE_ASKED, self.archived(id)).await;
                Ok(asked.ok().and_then(Result::ok).flatten().map_or(known, fixed))
            }
            None => self.archived(id).await?.map(fixed).ok_or_else(|| FindError::Unknown(id.clone())),
        }
    }

    async fn archived(&self, id: &JobId) -> Result<Option<Record>, FindError> {
        let Some(archive) = &self.archive else { return Ok(None) };
        archive.record(id).await.map_err(|error| FindError::Archive(id.clone(), error))
    }

    /// Asks Nomad for a job that the store does not know: it may have been submitted to another replica just now. One that
    /// Nomad has forgotten may still have its ledger.
    async fn look_up(&self, id: &JobId) -> Result<(), FindError> {
        let namespace = &self.config.namespace;
        let failed = |error: nomad::Error| match error.kind {
            Kind::NotFound => FindError::Unknown(id.clone()),
            _ => FindError::Nomad(id.clone(), error),
        };
        let facts = match self.nomad.job(namespace, id.as_str()).await {
            Ok(job) => Some(translate::job(&job).ok_or_else(|| FindError::Unknown(id.clone()))?.1),
            Err(error) if error.kind == Kind::NotFound => None,
            Err(error) => return Err(failed(error)),
        };
        let (pages, allocations) =
            tokio::join!(self.ledger.pages(id), self.nomad.job_allocations(namespace, id.as_str()));
        let pages = pages.map_err(|error| FindError::Ledger(id.clone(), error))?;
        let allocations = allocations.map_err(failed)?;
        if facts.is_none() && !pages.iter().any(Page::has_labels) {
            return Err(FindError::Unknown(id.clone()));
        }
        self.store.see(id, |known| {
            let mut news = facts.is_some_and(|facts| known.see_job(facts));
            for (_, allocation) in allocations.iter().filter_map(translate::allocation) {
                news |= known.see_allocation(allocation);
            }
            pages.into_iter().fold(news, |news, page| page.tell(namespace, known) || news)
        });
        Ok(())
    }
}

/// A record that never changes: nobody holds the other end.
fn fixed(archived: Record) -> Receiver<Arc<Record>> {
    tokio::sync::watch::channel(Arc::new(archived)).1
}
