//! One namespace's builds: what is known of them, and what keeps it true.

use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};
use tokio::sync::watch::Receiver;
use tokio::sync::{Notify, Semaphore};
use tokio_util::sync::CancellationToken;

use super::archivist::Archivist;
use super::authority::{Authority, Open, Rights};
use super::custodian::Custodian;
use super::duty::Duty;
use super::freshness::Freshness;
use super::holders::Holders;
use super::keys::Keys;
use super::store::Store;
use super::sweeper::Sweeper;
use super::tickets::Outstanding;
use super::undertaker::Undertaker;
use super::watch::Watcher;
use super::{PATIENCE, SetUpError, cleanup, logs, translate};
use crate::archive::{self, Archive};
use crate::config::Config;
use crate::job::{JobId, Record};
use crate::ledger::{Ledger, LedgerError, Page};
use crate::nomad::{self, Client, Kind};
use crate::telemetry::{Share, Telemetry};

/// How long a phase that has ended its job is waited for to tell of itself.
const TOLD: Duration = Duration::from_secs(3);

/// What all namespaces have together: turns for what waits at Nomad, which allows so many connections, tickets, and what is known of
/// tokens.
pub(super) struct Shared {
    /// The turns of those who clean up.
    pub(super) cleanups: Semaphore,
    /// The turn of who sweeps the nodes.
    pub(super) sweeps: Semaphore,
    /// Tickets that may still be used.
    pub(super) tickets: Outstanding,
    /// Whose tokens are.
    pub(super) holders: Arc<Holders>,
    /// What tokens may do.
    pub(super) rights: Arc<Rights>,
}

impl Shared {
    pub(super) fn new(nomad: &Client) -> Self {
        let [cleanups, sweeps] = [cleanup::AT_ONCE, 1].map(Semaphore::new);
        let holders = Arc::new(Holders::new(nomad));
        let rights = Arc::new(Rights::new(nomad, Arc::clone(&holders)));
        Self { cleanups, sweeps, tickets: Outstanding::default(), holders, rights }
    }
}

/// The builds of one namespace. Namespaces know nothing of each other: what is done in one holds up no other, and what one is
/// asked for is not looked for in another.
pub struct Tenant {
    pub(super) config: Arc<Config>,
    pub(super) namespace: String,
    pub(super) nomad: Client,
    pub(super) ledger: Ledger,
    pub(super) keys: Keys,
    pub(super) authority: Authority,
    pub(super) store: Arc<Store>,
    pub(super) freshness: Arc<Freshness>,
    pub(super) archive: Option<Archive>,
    pub(super) shared: Arc<Shared>,
    pub(super) telemetry: Arc<Share>,
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

impl Tenant {
    /// Sets a namespace up; nothing runs before [`Tenant::run`].
    pub(super) fn new(
        config: &Arc<Config>,
        namespace: &str,
        nomad: &Client,
        shared: &Arc<Shared>,
        telemetry: &Arc<Telemetry>,
    ) -> Result<Self, SetUpError> {
        let nomad = nomad.clone();
        let archive =
            config.archive.as_ref().map(|settings| Archive::open(settings, namespace)).transpose()?;
        let open = match (config.open, config.listen.ip().is_loopback()) {
            (true, _) => Open::Everybody,
            (false, true) => Open::ThisMachine,
            (false, false) => Open::Nobody,
        };
        let freshness = Arc::<Freshness>::default();
        let telemetry = Arc::new(Share::new(Arc::clone(telemetry)));
        Ok(Self {
            namespace: namespace.to_owned(),
            ledger: Ledger::new(nomad.clone(), namespace, PATIENCE),
            keys: Keys { nomad: nomad.clone(), namespace: namespace.to_owned() },
            authority: Authority::new(Arc::clone(&shared.rights), namespace, open),
            store: Arc::new(Store::new(Arc::clone(&freshness), Arc::clone(&telemetry))),
            freshness,
            archive,
            shared: Arc::clone(shared),
            telemetry,
            config: Arc::clone(config),
            nomad,
        })
    }

    /// Keeps the store true, and ends what nobody else ends, until this replica retires: then it gives back what it holds.
    pub(super) async fn run(&self, retired: CancellationToken) {
        let watcher = Watcher {
            nomad: self.nomad.clone(),
            namespace: self.namespace.clone(),
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
            namespace: self.namespace.clone(),
            telemetry: Arc::clone(&self.telemetry),
            on,
            retired,
        };
        let sweeper = Sweeper { tenant: self, on_duty: on_duty.clone() };
        let custodian = Custodian { tenant: self, on_duty: on_duty.clone() };
        let archivist = Archivist { tenant: self, on_duty };
        tokio::select! {
            () = duty.run() => {}
            _ = async {
                tokio::join!(watcher.run(), undertaker.run(), sweeper.run(), custodian.run(), archivist.run())
            } => {}
        }
    }

    /// The namespace's name.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// What callers may do in it.
    pub(crate) fn authority(&self) -> &Authority {
        &self.authority
    }

    /// Whether a job is known to be in it.
    pub(super) fn knows(&self, id: &JobId) -> bool {
        self.store.knows(id)
    }

    /// How many of its jobs have not ended.
    pub fn live(&self) -> i64 {
        self.store.live()
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

    pub(super) async fn archived(&self, id: &JobId) -> Result<Option<Record>, FindError> {
        let Some(archive) = &self.archive else { return Ok(None) };
        archive.record(id).await.map_err(|error| FindError::Archive(id.clone(), error))
    }

    /// Asks Nomad for a job that the store does not know: it may have been submitted to another replica just now. One that
    /// Nomad has forgotten may still have its ledger.
    async fn look_up(&self, id: &JobId) -> Result<(), FindError> {
        let namespace = &self.namespace;
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
