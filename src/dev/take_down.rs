//! Takes a stack down: the service, the jobs, the agent, and then by force whatever is left.
//!
//! Invariant: every stage has a bound and none is needed by the next, so that a part which hangs or is gone already
//! never keeps the rest up.

use std::time::Duration;

use nix::sys::signal::Signal;
use nix::unistd::Pid;

use super::control::Control;
use super::data_dir::{DataDir, State};
use super::error::Error;
use super::remains::Remains;
use super::wait::wait_for;

const SERVICE: Duration = Duration::from_secs(10);
const JOBS: Duration = Duration::from_secs(30);
const AGENT: Duration = Duration::from_secs(15);
const KILLED: Duration = Duration::from_secs(10);

/// Takes down what runs in the data directory. The caller holds its lock.
pub(super) async fn take_down(dir: &DataDir) -> Result<(), Error> {
    let remains = Remains::of(dir);
    if let Some(state) = dir.state() {
        if let Some(service) = state.service {
            end(&remains, Pid::from_raw(service), SERVICE).await;
        }
        let agent = Pid::from_raw(state.agent);
        if remains.is_ours(agent) {
            stop_jobs(&remains, &state).await;
            end(&remains, agent, AGENT).await;
        }
    }
    kill_processes(&remains).await;
    remains.remove_containers().await;
    remains.unmount();
    remains.remove_cgroups();
    if let Some(left) = left_behind(&remains) {
        return Err(Error::LeftBehind { path: dir.path().to_owned(), left });
    }
    dir.close()
}

/// Stops every job and waits for its tasks, those that run after the end included.
async fn stop_jobs(remains: &Remains<'_>, state: &State) {
    let Ok(control) = Control::new(&state.nomad) else { return };
    let stopped = stop_each(&control).await;
    if let Err(error) = stopped {
        // It may not have got as far as answering; its processes are found by their mark.
        tracing::debug!(%error, "cannot stop the jobs");
        return;
    }
    let ended = wait_for(JOBS, async || {
        let live = control.live_allocations().await.ok()?;
        let processes = remains.processes();
        (live == 0 && processes.iter().all(|pid| pid.as_raw() == state.agent)).then_some(())
    });
    if ended.await.is_none() {
        tracing::warn!(after = ?JOBS, "not every task has ended; the rest is killed");
    }
}

async fn stop_each(control: &Control) -> Result<(), Error> {
    for job in control.live_jobs().await? {
        tracing::debug!(job = job.id, "stopping a job");
        control.stop(&job).await?;
    }
    Ok(())
}

/// Asks a process to end, and no longer asks when it has not within `grace`.
async fn end(remains: &Remains<'_>, pid: Pid, grace: Duration) {
    remains.signal(pid, Signal::SIGTERM);
    if wait_for(grace, async || (!remains.is_ours(pid)).then_some(())).await.is_none() {
        tracing::warn!(%pid, after = ?grace, "a process did not end and is killed");
        remains.signal(pid, Signal::SIGKILL);
    }
}

/// What is killed may have started another just before: looks again until there is none.
async fn kill_processes(remains: &Remains<'_>) {
    let none_left = wait_for(KILLED, async || {
        let processes = remains.processes();
        for pid in &processes {
            remains.signal(*pid, Signal::SIGKILL);
        }
        processes.is_empty().then_some(())
    });
    none_left.await;
}

fn left_behind(remains: &Remains<'_>) -> Option<String> {
    let processes = remains.processes().into_iter().map(|pid| format!("process {pid}"));
    let mounts = remains.mounts().into_iter().map(|path| format!("mount {}", path.display()));
    let left: Vec<String> = processes.chain(mounts).collect();
    (!left.is_empty()).then(|| left.join(", "))
}
