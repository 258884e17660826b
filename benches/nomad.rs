//! The few calls to Nomad that a person with curl would make.

use anyhow::{Context as _, ensure};
use chrono::{DateTime, Utc};
use serde_json::Value;

use crate::stack::Stack;

/// Registers a job.
pub(crate) async fn register(http: &reqwest::Client, nomad: &str, job: &Value) -> anyhow::Result<()> {
    let body = serde_json::json!({"Job": job, "EnforceIndex": true, "JobModifyIndex": 0});
    let answer = http.put(format!("{nomad}/v1/jobs")).json(&body).send().await?;
    let (status, text) = (answer.status(), answer.text().await?);
    ensure!(status.is_success(), "registering a job by hand: {status}: {text}");
    Ok(())
}

/// Writes a Variable that is not there yet.
pub(crate) async fn put_variable(
    http: &reqwest::Client,
    nomad: &str,
    path: &str,
    items: &Value,
) -> anyhow::Result<()> {
    let body = serde_json::json!({"Path": path, "Items": items});
    http.put(format!("{nomad}/v1/var/{path}?cas=0")).json(&body).send().await?.error_for_status()?;
    Ok(())
}

/// Makes Nomad forget a job.
pub(crate) async fn purge(stack: &Stack, id: &str) -> anyhow::Result<()> {
    let url = format!("{}/v1/job/{id}?purge=true", stack.nomad);
    stack.http.delete(url).send().await?.error_for_status()?;
    Ok(())
}

/// Waits, by blocking queries, until a job's allocation has ended; returns it.
pub(crate) async fn ended_allocation(stack: &Stack, job: &str) -> anyhow::Result<Value> {
    let mut index = String::from("0");
    loop {
        let url = format!("{}/v1/job/{job}/allocations?index={index}&wait=60s", stack.nomad);
        let answer = stack.http.get(url).send().await?.error_for_status()?;
        if let Some(now) = answer.headers().get("X-Nomad-Index") {
            now.to_str()?.clone_into(&mut index);
        }
        let mut allocations: Vec<Value> = answer.json().await?;
        let Some(allocation) = allocations.pop() else { continue };
        match allocation["ClientStatus"].as_str() {
            Some("complete") => return Ok(allocation),
            Some("pending" | "running") => {}
            _ => anyhow::bail!("job {job} did not end well: {}", allocation["TaskStates"]),
        }
    }
}

/// When a task of an allocation finished.
pub(crate) fn finished_at(allocation: &Value, task: &str) -> anyhow::Result<DateTime<Utc>> {
    let time = allocation["TaskStates"][task]["FinishedAt"].as_str();
    let time = time.with_context(|| format!("{task} has not finished"))?;
    Ok(DateTime::parse_from_rfc3339(time)?.to_utc())
}
