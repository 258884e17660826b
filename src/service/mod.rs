//! Where jobs meet Nomad: submit, kill, clean up, the store of records and what keeps it true, and what sweeps up.

mod archivist;
mod authority;
mod cleanup;
mod credentials;
mod custodian;
mod duty;
mod freshness;
mod holders;
mod keys;
mod kill;
mod list;
mod logins;
pub mod logs;
mod memo;
mod nodes;
mod people;
mod store;
mod submit;
mod sweeper;
mod tenant;
mod tickets;
mod tokens;
mod translate;
mod undertaker;
mod watch;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use secrecy::SecretString;
use serde_json::Value;
use tokio::sync::Mutex;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::archive;
use crate::config::Config;
use crate::job::{Invalid, JobId, Spec};
use crate::nomad::{self, Client};
use crate::telemetry::Telemetry;

pub use authority::Denied;
pub use cleanup::CleanupError;
pub use keys::KeyError;
pub use kill::{KillError, Killed};
pub use list::Wanted;
pub use logins::{Caller, LoginError};
pub use people::{People, Shown};
pub use submit::SubmitError;
pub use tenant::{FindError, Tenant};
pub use tickets::{Ticket, TicketError};

use logins::Logins;
use tenant::Shared;

/// How long a caller's request keeps trying while Nomad gives passing errors.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long it is believed that Nomad answers.
const DOUBT: Duration = Duration::from_secs(1);

/// Longer than any service lives: the patience of what nobody else would end.
const FOR_EVER: Duration = Duration::from_hours(10 * 365 * 24);

/// The service: everything the API asks for.
pub struct Service {
    config: Arc<Config>,
    nomad: Client,
    logins: Logins,
    people: People,
    hub: logs::Hub,
    /// The namespaces of the builds; the first is that of a submission that names none.
    tenants: Vec<Arc<Tenant>>,
    first: Arc<Tenant>,
    /// Whether Nomad answered, and when it was asked.
    doubted: Mutex<Option<(Option<String>, Instant)>>,
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

impl Service {
    /// Sets the service up; nothing runs before [`Service::run`].
    pub fn new(config: Config, telemetry: Arc<Telemetry>) -> Result<Self, SetUpError> {
        let config = Arc::new(config);
        let nomad = Client::new(&config.nomad)?;
        let shared = Arc::new(Shared::new(&nomad));
        let tenant = |name: &str| Tenant::new(&config, name, &nomad, &shared, &telemetry).map(Arc::new);
        let first = tenant(&config.namespaces.first)?;
        let others = config.namespaces.others.iter().map(|name| tenant(name));
        let tenants = std::iter::once(Ok(Arc::clone(&first))).chain(others).collect::<Result<Vec<_>, _>>()?;
        let archive = |tenant: &Arc<Tenant>| Some((tenant.namespace.clone(), tenant.archive.clone()?));
        let archives = tenants.iter().filter_map(archive).collect();
        let settings = logs::Settings { archives, ..logs::Settings::default() };
        Ok(Self {
            logins: Logins::new(&nomad, config.jwt_auth_method.clone(), Arc::clone(&shared.holders)),
            people: People::new(&nomad, config.login_methods.clone()),
            hub: logs::Hub::new(nomad.clone(), settings),
            tenants,
            first,
            doubted: Mutex::default(),
            telemetry,
            config,
            nomad,
        })
    }

    /// Keeps what is known of every namespace true, until this replica retires.
    pub async fn run(&self, retired: CancellationToken) {
        let mut all = JoinSet::new();
        for tenant in &self.tenants {
            let (tenant, retired) = (Arc::clone(tenant), retired.clone());
            // Each by itself, so that what one has to do keeps no other waiting.
            all.spawn(async move { Box::pin(tenant.run(retired)).await });
        }
        let known = async {
            while let Some(ended) = all.join_next().await {
                if let Err(error) = ended {
                    tracing::error!(%error, "what keeps a namespace's jobs known has ended by a fault of the service");
                }
            }
        };
        tokio::select! {
            () = known => {}
            () = self.first.shared.rights.watch() => {}
        }
    }

    /// The configuration.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The namespaces of the builds.
    pub fn tenants(&self) -> &[Arc<Tenant>] {
        &self.tenants
    }

    /// That of a submission that names none.
    pub fn first(&self) -> &Arc<Tenant> {
        &self.first
    }

    /// The namespace in which a job is known to be, without asking anybody.
    pub fn home_of(&self, job: &JobId) -> Option<&Arc<Tenant>> {
        match &self.tenants[..] {
            [only] => Some(only),
            all => all.iter().find(|tenant| tenant.knows(job)),
        }
    }

    /// Checks a submission and does nothing else.
    pub fn validate(&self, body: Value) -> Result<Spec, Invalid> {
        Spec::from_json(body, &self.config.policy)
    }

    /// Who has a token: Nomad's, an identity provider's that is traded, or none.
    pub(crate) async fn caller(&self, token: Option<SecretString>) -> Result<Caller, LoginError> {
        self.logins.caller(token).await
    }

    /// The name of who has a token, which is no secret.
    pub(crate) async fn name_of(&self, token: Option<SecretString>) -> Option<String> {
        self.logins.name_of(token).await
    }

    /// Whether it is known that Nomad has ACLs.
    pub(crate) async fn is_guarded(&self) -> bool {
        self.first.authority.is_guarded().await
    }

    /// Logins of people.
    pub(crate) fn people(&self) -> &People {
        &self.people
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

    /// Why the service cannot do its work; none where it can. However many ask, Nomad is asked once a second.
    pub async fn doubt(&self) -> Option<String> {
        for tenant in &self.tenants {
            if let Some(why) = tenant.freshness.doubt() {
                if self.tenants.len() == 1 {
                    return Some(why);
                }
                // Whoever asks is nobody, and is not to know the names of namespaces.
                tracing::debug!(namespace = tenant.namespace, why, "not ready");
                return Some("what is known of a namespace is not current".to_owned());
            }
        }
        let mut known = self.doubted.lock().await;
        if let Some((doubt, _)) = known.as_ref().filter(|(_, at)| at.elapsed() < DOUBT) {
            return doubt.clone();
        }
        let doubt = self.nomad.leader().await.err().map(|error| error.to_string());
        *known = Some((doubt.clone(), Instant::now()));
        doubt
    }

    /// Takes a ticket for the log of a job: who asked for it.
    ///
    /// # Errors
    /// Where it is not good, or Nomad does not say.
    pub async fn redeem(&self, job: &JobId, ticket: &str) -> Result<Caller, TicketError> {
        // Everywhere, whatever is known of the job: how long it takes tells nothing of where that is.
        let all = self.tenants.iter().map(|tenant| tenant.redeem(job, ticket));
        let mut refused = TicketError::Unknown;
        for redeemed in futures_util::future::join_all(all).await {
            match redeemed {
                Ok(caller) => return Ok(caller),
                Err(TicketError::Unknown) => {}
                Err(error) => refused = error,
            }
        }
        Err(refused)
    }
}
