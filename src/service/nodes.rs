//! What ended jobs left in nodes' engines: a small Nomad job goes to every node, removes it and reports.
//!
//! It looks into the ledger by itself, with its own identity: only there it is written which job has ended.

use std::time::Duration;

use tokio::sync::watch;

use super::{Tenant, translate};
use crate::config::Sweep;
use crate::job::SweepReport;
use crate::nomad::{Error, Kind};
use crate::render::{self, RenderError};
use crate::telemetry::Leftover;

/// The one sweep of a namespace. Unlike that of a job it says nothing of what was done, so it may be replaced.
const ID: &str = "nomad-build-sweep-nodes";

/// How long the nodes are waited for.
const WAIT: Duration = Duration::from_mins(2);

/// Why leftovers were not swept.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unswept {
    #[error(transparent)]
    Nomad(#[from] Error),
    #[error("the job that sweeps the nodes could not be rendered")]
    Render(#[from] RenderError),
}

/// Sweeps every node, and tells of what was found, unless another replica has gone on duty meanwhile and tells of it.
pub(super) async fn sweep(tenant: &Tenant, on_duty: &watch::Receiver<bool>) -> Result<(), Unswept> {
    let Tenant { nomad, namespace, config, telemetry, .. } = tenant;
    let dry_run = config.sweep.sweep == Sweep::DryRun;
    let ended = config.sweep.keep_images.as_secs();
    // The semaphore is never closed.
    let _turn = tenant.shared.sweeps.acquire().await.ok();
    let job = render::render_node_sweep(ID, namespace, ended, dry_run, &config.render)?;
    nomad.stop(namespace, ID, true).await?;
    let since = match nomad.register(namespace, ID, &job).await {
        Ok(registration) => registration.job_modify_index,
        // The replica that was on duty before is at it.
        Err(Error { kind: Kind::Conflict, .. }) => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    // A node that does not do its part in time does it at the next sweep.
    if let Ok(done) = tokio::time::timeout(WAIT, wait(tenant, since)).await {
        done?;
    }
    let mut all = SweepReport::default();
    for stub in nomad.variables(namespace, SweepReport::PREFIX).await?.value {
        if stub.modify_index > since
            && let Some(variable) = nomad.variable(namespace, &stub.path).await?
        {
            all += SweepReport::from_items(&variable.items);
        }
    }
    if !*on_duty.borrow() {
        return Ok(());
    }
    telemetry.leftovers(Leftover::Containers, all.containers);
    telemetry.leftovers(Leftover::Images, all.images);
    telemetry.all().leftovers_removed(Leftover::Containers, all.removed_containers);
    telemetry.all().leftovers_removed(Leftover::Images, all.removed_images);
    Ok(())
}

/// Waits until the sweep that was registered at an index has ended on every node.
async fn wait(tenant: &Tenant, since: u64) -> Result<(), Error> {
    let Tenant { nomad, namespace, .. } = tenant;
    let mut index = 0;
    loop {
        let listed = nomad.job_allocations_after(namespace, ID, index, WAIT).await?;
        let mut ours = listed.value.iter().filter(|allocation| allocation.create_index > since).peekable();
        if ours.peek().is_some() && !ours.any(translate::may_still_work) {
            return Ok(());
        }
        index = listed.index.max(1);
    }
}
