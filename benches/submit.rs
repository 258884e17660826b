//! A submission beside the registration of the same job at Nomad, alone and with the Variable that a submission writes: its
//! ledger. No work starts: the jobs ask for more than a node has.

use std::time::{Duration, Instant};

use anyhow::Context as _;
use chrono::Utc;
use nomad_build::job::{JobId, Payload, Policy, Resources, Scheme, Spec};
use nomad_build::render::{Runner, Settings, TEMPLATES, Template, render};
use serde_json::{Value, json};

use crate::nomad;
use crate::sample::Sample;
use crate::stack::{MOST_CPU, PROGRAM, Stack};

/// In milliseconds.
#[derive(Default)]
pub(crate) struct Latencies {
    pub(crate) registered: Sample,
    pub(crate) bare: Sample,
    pub(crate) ours: Sample,
}

/// Measures each `times` times, in turn.
pub(crate) async fn measure(stack: &Stack, times: usize) -> anyhow::Result<Latencies> {
    let mut submission = stack.submission();
    submission["resources"] = json!({"build": {"cpu": MOST_CPU}});
    let mut latencies = Latencies::default();
    let mut made = Vec::new();
    for round in 0..times + WARM_UP {
        // What the service and Nomad still have to do of one slows the next, so each comes first as often.
        let (ours, (registered, bare, id)) = if round % 2 == 0 {
            let ours = submit(stack, &submission, &mut made).await?;
            (ours, register(stack, &submission).await?)
        } else {
            let bare = register(stack, &submission).await?;
            (submit(stack, &submission, &mut made).await?, bare)
        };
        made.push(id);
        if round >= WARM_UP {
            latencies.registered.push_ms(registered);
            latencies.bare.push_ms(bare);
            latencies.ours.push_ms(ours);
        }
    }
    for id in made {
        nomad::purge(stack, &id).await?;
    }
    Ok(latencies)
}

const WARM_UP: usize = 5;

async fn submit(stack: &Stack, submission: &Value, made: &mut Vec<String>) -> anyhow::Result<Duration> {
    let began = Instant::now();
    made.push(stack.submit(submission).await?);
    Ok(began.elapsed())
}

/// How long it took until the job was registered, and until its Variable was written, too.
async fn register(stack: &Stack, submission: &Value) -> anyhow::Result<(Duration, Duration, String)> {
    let id = JobId::from_uuid(uuid::Uuid::now_v7());
    let job = rendered(&stack.registry, &id, submission)?;
    let began = Instant::now();
    nomad::register(&stack.http, &stack.nomad, &job).await?;
    let registered = began.elapsed();
    let path = format!("nomad-build/bench/{id}");
    nomad::put_variable(&stack.http, &stack.nomad, &path, &job["Meta"]).await?;
    Ok((registered, began.elapsed(), id.to_string()))
}

/// The job that the service would register.
pub(crate) fn rendered(registry: &str, id: &JobId, submission: &Value) -> anyhow::Result<Value> {
    let policy = Policy {
        schemes: vec![Scheme::Https, Scheme::Ssh, Scheme::Http, Scheme::File],
        max_resources: Resources { cpu: MOST_CPU, ..Policy::default().max_resources },
        ..Policy::default()
    };
    let (_, template) = TEMPLATES.iter().find(|(name, _)| *name == "raw_exec").context("no such template")?;
    let settings = Settings {
        template: Template::new(*template)?,
        runner: Runner::Path(PROGRAM.to_owned()),
        engine_socket: "/var/run/docker.sock".to_owned(),
        mounts: Vec::new(),
        datacenters: vec!["*".to_owned()],
        node_pool: "default".to_owned(),
        disk_mb: 500,
        vault_role: None,
        archive: None,
    };
    let payload = Payload {
        job: id.clone(),
        spec: Spec::from_json(submission.clone(), &policy)?,
        policy,
        insecure_registries: vec![registry.to_owned()],
    };
    Ok(render(&payload, "default", Utc::now(), &settings)?)
}
