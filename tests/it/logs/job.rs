//! A job whose phases write what a test gives them, and a reader that notes what it saw.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};
use futures_util::StreamExt as _;
use futures_util::stream::BoxStream;
use nomad_build::job::{
    Git, Image, JobId, Labels, Line, LineTag, Location, Phase, Record, Status, Stream, Timestamps,
};
use nomad_build::nomad::Client;
use nomad_build::service::logs::{Cursor, EndReason, Hub, Message, Request, Settings};
use serde_json::json;
use tokio::sync::watch;
use uuid::Uuid;

use crate::support::agent::{Agent, wait_for};

/// A job whose tasks write what the test gives them.
pub(super) struct Job {
    pub(super) agent: Arc<Agent>,
    pub(super) nomad: Client,
    pub(super) id: JobId,
    pub(super) record: watch::Sender<Arc<Record>>,
    /// What each phase was given, so that the next line has the next number.
    pub(super) written: [u64; 3],
    pub(super) pipes: BTreeMap<Phase, File>,
}

pub(super) fn now() -> DateTime<Utc> {
    Utc::now()
}

/// The text of a line, told by its number.
pub(super) fn text(seq: u64) -> String {
    format!("line {seq} of many, as long as lines often are: {:x}", seq.wrapping_mul(0x9e37_79b9_7f4a_7c15))
}

impl Job {
    /// Registered, but of its record nothing is known yet but that it waits.
    pub(super) async fn new(files: u64, megabytes: u64) -> Self {
        Self::on(Agent::shared().await, files, megabytes).await
    }

    /// The same, on a given agent.
    pub(super) async fn on(agent: Arc<Agent>, files: u64, megabytes: u64) -> Self {
        let nomad = agent.client();
        let id = JobId::from_uuid(Uuid::new_v4());
        let tasks: Vec<_> = Phase::ALL
            .iter()
            .map(|phase| {
                let pipe = pipe(&agent, &id, *phase);
                assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
                let mut task = json!({
                    "Name": phase.as_str(), "Driver": "raw_exec",
                    "Config": {"command": "/bin/cat", "args": [pipe]},
                    "LogConfig": {"MaxFiles": files, "MaxFileSizeMB": megabytes},
                    "Resources": {"CPU": 20, "MemoryMB": 16},
                });
                if *phase == Phase::Build {
                    task["Lifecycle"] = json!({"Hook": "prestart", "Sidecar": false});
                }
                task
            })
            .collect();
        let job = json!({
            "ID": id.as_str(), "Name": id.as_str(), "Type": "batch", "Datacenters": ["*"],
            "TaskGroups": [{
                "Name": "job", "Count": 1, "Tasks": tasks,
                "RestartPolicy": {"Attempts": 0, "Mode": "fail"},
                "ReschedulePolicy": {"Attempts": 0, "Unlimited": false},
                "EphemeralDisk": {"SizeMB": 3 * files * megabytes + 10},
            }],
        });
        agent.owns(id.as_str());
        nomad.register("default", id.as_str(), &job).await.unwrap();
        let record = Record {
            remembered: false,
            id: id.clone(),
            labels: Labels { has_tests: true, ..Labels::default() },
            status: Status::Pending,
            phase: None,
            timestamps: Timestamps { job_start: Some(now()), ..Timestamps::default() },
            git: Git::default(),
            image: Image::default(),
            failure: None,
            placement: None,
            nomad: Location {
                namespace: "default".to_owned(),
                job: id.to_string(),
                allocation: None,
                node: None,
            },
            lines: [None; 3],
            ran_in: [const { None }; 3],
        };
        let record = watch::Sender::new(Arc::new(record));
        Self { agent, nomad, id, record, written: [0; 3], pipes: BTreeMap::new() }
    }

    /// One with only a build, placed and begun.
    pub(super) async fn building(files: u64, megabytes: u64) -> Self {
        Self::new(files, megabytes).await.begun().await
    }

    pub(super) async fn begun(mut self) -> Self {
        self.place().await;
        self.begin(Phase::Build).await;
        self
    }

    pub(super) fn change(&self, change: impl FnOnce(&mut Record)) {
        self.record.send_modify(|record| change(Arc::make_mut(record)));
    }

    /// Tells the record of the allocation.
    pub(super) async fn place(&self) {
        let found = wait_for("allocation", Duration::from_secs(30), async || {
            self.nomad.job_allocations("default", self.id.as_str()).await.ok()?.pop()
        });
        let found = found.await;
        self.change(|record| record.nomad.allocation = Some(found.id.clone()));
    }

    /// Waits for a phase's task.
    pub(super) async fn open(&mut self, phase: Phase) {
        let path = pipe(&self.agent, &self.id, phase);
        // Opens once the task reads.
        let open = tokio::task::spawn_blocking(move || File::options().write(true).open(path).unwrap());
        let pipe =
            tokio::time::timeout(Duration::from_secs(30), open).await.expect("the task starts").unwrap();
        self.pipes.insert(phase, pipe);
    }

    /// Waits for a phase's task, and tells the record.
    pub(super) async fn begin(&mut self, phase: Phase) {
        self.open(phase).await;
        self.change(|record| {
            record.status = phase.status();
            record.phase = Some(phase);
            let start = match phase {
                Phase::Build => &mut record.timestamps.build_start,
                Phase::Test => &mut record.timestamps.test_start,
                Phase::Publish => &mut record.timestamps.publish_start,
            };
            *start = Some(now());
        });
    }

    /// Has Nomad run a phase's task once more in its allocation, as a node does that was rebooted.
    pub(super) async fn run_again(&mut self, phase: Phase) {
        let allocation = self.record.borrow().nomad.allocation.clone().unwrap();
        let url = format!("http://{}/v1/client/allocation/{allocation}/restart", self.agent.address());
        let body = json!({ "TaskName": phase.as_str() });
        reqwest::Client::new().put(url).json(&body).send().await.unwrap().error_for_status().unwrap();
        wait_for("second run", Duration::from_secs(30), async || {
            let found = self.nomad.allocation("default", &allocation).await.ok()?;
            let task = found.task_states.get(phase.as_str())?;
            let starts = task.events.iter().filter(|event| event.kind == "Started").count();
            (starts == 2 && task.state == "running").then_some(())
        })
        .await;
        self.written[phase as usize] = 0;
    }

    pub(super) async fn raw(&mut self, phase: Phase, bytes: Vec<u8>) {
        let mut pipe = self.pipes[&phase].try_clone().unwrap();
        tokio::task::spawn_blocking(move || pipe.write_all(&bytes).unwrap()).await.unwrap();
    }

    /// Writes lines with the given texts.
    pub(super) async fn write(&mut self, phase: Phase, texts: impl IntoIterator<Item = (String, bool)>) {
        let mut out = String::new();
        for (text, partial) in texts {
            let seq = &mut self.written[phase as usize];
            *seq += 1;
            let tag = LineTag { stream: Stream::Stdout, partial };
            Line { time: now(), seq: *seq, tag, text }.write_to(&mut out);
            if out.len() > 1 << 20 {
                self.raw(phase, std::mem::take(&mut out).into_bytes()).await;
            }
        }
        self.raw(phase, out.into_bytes()).await;
    }

    /// Writes lines of these numbers, in this order.
    pub(super) async fn numbered(&mut self, phase: Phase, seqs: &[u64]) {
        let mut out = String::new();
        for &seq in seqs {
            let tag = LineTag { stream: Stream::Stdout, partial: false };
            Line { time: now(), seq, tag, text: text(seq) }.write_to(&mut out);
            self.written[phase as usize] = self.written[phase as usize].max(seq);
        }
        self.raw(phase, out.into_bytes()).await;
    }

    /// Writes so many lines more.
    pub(super) async fn lines(&mut self, phase: Phase, count: u64) {
        let from = self.written[phase as usize] + 1;
        self.write(phase, (from..from + count).map(|seq| (text(seq), false))).await;
    }

    /// The phase's task ends, and says how many lines it wrote.
    pub(super) fn end(&mut self, phase: Phase) {
        self.pipes.remove(&phase);
        let lines = self.written[phase as usize];
        self.change(|record| record.lines[phase as usize] = Some(lines));
    }

    /// The job ends.
    pub(super) fn finish(&mut self, status: Status) {
        self.pipes.clear();
        self.change(|record| {
            record.status = status;
            record.timestamps.job_end = Some(now());
        });
    }

    /// Everything of a build that succeeds, and then fails.
    pub(super) fn end_build(&mut self) {
        self.end(Phase::Build);
        self.finish(Status::Failed);
        // Nothing else is to run: its tasks would wait for the test.
        self.change(|record| record.lines = [record.lines[0], Some(0), Some(0)]);
    }

    pub(super) fn hub(&self) -> Hub {
        Hub::new(self.nomad.clone(), Settings { patience: Duration::from_secs(10), ..Settings::default() })
    }

    pub(super) fn read(&self, hub: &Hub, request: Request) -> BoxStream<'static, Message> {
        hub.read(self.record.subscribe(), request).unwrap()
    }
}

pub(super) fn pipe(agent: &Agent, id: &JobId, phase: Phase) -> PathBuf {
    agent.dir().join(format!("{id}.{phase}"))
}

/// What a reader saw.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Seen {
    pub(super) statuses: Vec<Status>,
    pub(super) lines: Vec<(Phase, String)>,
    pub(super) gaps: Vec<(Phase, String)>,
    pub(super) end: Option<(Status, Option<EndReason>)>,
    pub(super) last: Option<Cursor>,
}

impl Seen {
    pub(super) fn take(&mut self, message: Message) {
        assert_eq!(self.end, None, "nothing follows an end");
        self.last = message.cursor().cloned().or(self.last.take());
        match message {
            Message::Status { status, .. } => self.statuses.push(status),
            Message::Log { phase, line, .. } => self.lines.push((phase, line)),
            Message::Gap { phase, message, .. } => self.gaps.push((phase, message)),
            Message::End { status, reason, .. } => self.end = Some((status, reason)),
            Message::Heartbeat { .. } => panic!("the hub makes no heartbeats"),
        }
    }

    pub(super) fn numbered(&self, phase: Phase, first: u64, last: u64) {
        let got: Vec<_> =
            self.lines.iter().filter(|line| line.0 == phase).map(|line| line.1.clone()).collect();
        let want: Vec<_> = (first..=last).map(text).collect();
        let differs = got.iter().zip(&want).position(|(got, want)| got != want);
        assert_eq!((differs, got.len()), (None, want.len()), "{phase}: {:?}", self.gaps);
    }
}

/// Reads to the end.
pub(super) async fn all(mut stream: BoxStream<'static, Message>) -> Seen {
    let mut seen = Seen::default();
    let end = async {
        while let Some(message) = stream.next().await {
            seen.take(message);
        }
    };
    let in_time = tokio::time::timeout(Duration::from_secs(90), end).await;
    assert!(in_time.is_ok() && seen.end.is_some(), "no end: {:?} {} lines", seen.gaps, seen.lines.len());
    seen
}

pub(super) fn phase_only(phase: Phase) -> Request {
    Request { phases: Some(vec![phase]), ..Request::default() }
}
