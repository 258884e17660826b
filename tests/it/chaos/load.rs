//! Jobs: submitted, harmed, watched and read, wherever a replica answers.

use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::{Error, Message};

use super::Clock;
use super::arena::{Arena, REPLICAS};
use super::history::{Harm, Job, Plan, Seen};
use crate::support::agent::wait_for;
use crate::support::{Api, PHASES, Random, Repository, runner_of, world};

/// What all jobs of a run have in common.
pub(super) struct Load<'a> {
    pub(super) arena: &'a Arena,
    pub(super) clock: &'a Clock,
    pub(super) repository: &'a Repository,
    pub(super) image: &'a str,
}

/// Longer than whatever Nomad and the service wait for by themselves.
const PATIENCE: Duration = Duration::from_mins(3);

impl Load<'_> {
    fn body(&self, number: usize, plan: Plan, tag: &str) -> Value {
        let mut job = world().job(self.repository);
        job["image_name"] = json!(self.image);
        job["image_tags"] = json!([tag, "shared"]);
        job["build_args"]["ROUND"] = json!(format!("{}-{number}", self.image));
        job["build_args"]["STATUS"] = json!(if plan == Plan::FailsItsBuild { "1" } else { "0" });
        let seconds = if plan == Plan::TakesLong { 6 } else { 0 };
        let status = if plan == Plan::FailsItsTest { 7 } else { 0 };
        let count = "i=0; while [ $i -lt 50 ]; do i=$((i+1)); echo line $i; done";
        job["test_commands"] = json!([format!("{count}; sleep {seconds}; exit {status}")]);
        job
    }

    /// One job, from its submission to its end.
    pub(super) async fn run(&self, number: usize, mut random: Random) -> Job {
        let plans =
            [Plan::Succeeds, Plan::Succeeds, Plan::TakesLong, Plan::FailsItsTest, Plan::FailsItsBuild];
        let plan = random.one_of(&plans);
        let tag = format!("only-{number}");
        let body = self.body(number, plan, &tag);
        let mut job = self.submit(&format!("{}-{number}", self.image), plan, &tag, &body, &mut random).await;
        let harm = (!random.once_in(2)).then(|| {
            let harms = [
                Harm::Kill,
                Harm::Kill,
                Harm::Stop,
                Harm::Purge,
                Harm::StopAndStart,
                Harm::Restart,
                Harm::Crash,
            ];
            (random.one_of(&harms), Duration::from_millis(random.below(5000)))
        });
        let reads = random.once_in(2);
        let id = job.id.clone();
        let mut own = || Random::of(random.below(u64::MAX));
        let [first, second, third] = [own(), own(), own()];
        let (watched, harmed, read) = tokio::join!(
            self.watch(&id, first),
            async {
                match harm {
                    Some((harm, after)) => self.harm(&id, harm, after, second).await,
                    None => (Vec::new(), Vec::new()),
                }
            },
            async { if reads { Some(self.read(&id, third).await) } else { None } },
        );
        (job.seen, job.unknown) = watched;
        // Before Nomad collects them.
        let end = job.seen.last().map_or(Value::Null, |seen| seen.status.clone());
        if end["failure"]["reason"] == "runner_died"
            && let Some(allocation) = end["nomad"]["allocation"].as_str()
        {
            job.died = self.last_words(allocation).await;
        }
        (job.harms, job.kills) = harmed;
        job.read = read;
        job
    }

    /// A replica that is alive, by chance.
    fn some(&self, random: &mut Random) -> Option<(Api, (usize, usize))> {
        let number = usize::try_from(random.below(REPLICAS as u64)).unwrap();
        let (url, starts) = self.arena.address(number)?;
        Some((Api::new(&url), (number, starts)))
    }

    /// Submits until it is acknowledged, and then once more.
    async fn submit(&self, key: &str, plan: Plan, tag: &str, body: &Value, random: &mut Random) -> Job {
        let mut acknowledge = async || {
            wait_for("a submission that is acknowledged", PATIENCE, async || {
                let (api, _) = self.some(random)?;
                let (status, answer) = api.try_keyed(key, body).await?;
                let passing = status.is_server_error();
                assert!(status == StatusCode::OK || passing, "{key}: {status} {answer}");
                answer["data"]["job_id"].as_str().map(str::to_owned)
            })
            .await
        };
        let (id, again) = (acknowledge().await, acknowledge().await);
        let mut job = Job::new(&id, plan, tag);
        job.ids.push(again);
        job
    }

    /// Reads the job's status here and there until its end was told, or for as long as there is patience.
    async fn watch(&self, id: &str, mut random: Random) -> (Vec<Seen>, Vec<(u128, usize)>) {
        let (mut seen, mut unknown) = (Vec::<Seen>::new(), Vec::new());
        let until = Instant::now() + PATIENCE;
        while Instant::now() < until && !seen.last().is_some_and(|seen| is_final(&seen.status)) {
            tokio::time::sleep(Duration::from_millis(50 + random.below(200))).await;
            let Some((api, by)) = self.some(&mut random) else { continue };
            let path = format!("/jobs/{id}/status");
            let Some((status, answer)) = api.try_call(Method::GET, &path, None).await else { continue };
            if status == StatusCode::NOT_FOUND {
                unknown.push((self.clock.now(), by.0));
            }
            if answer["data"].is_object() {
                seen.push(Seen { at: self.clock.now(), by, status: answer["data"].clone() });
            }
        }
        (seen, unknown)
    }

    async fn harm(
        &self,
        id: &str,
        harm: Harm,
        after: Duration,
        mut random: Random,
    ) -> (Vec<(u128, Harm, String)>, Vec<bool>) {
        tokio::time::sleep(after).await;
        let at = self.clock.now();
        let mut kills = Vec::new();
        let nomad = |method: Method, path: String| async move { self.arena.nomad(method, &path, None).await };
        let done = match harm {
            Harm::Kill => {
                let answer = match self.some(&mut random) {
                    Some((api, _)) => api.try_call(Method::POST, &format!("/jobs/{id}/kill"), None).await,
                    None => None,
                };
                kills.extend(answer.as_ref().and_then(|(_, answer)| answer["data"]["success"].as_bool()));
                format!("{answer:?}")
            }
            Harm::Stop => format!("{:?}", nomad(Method::DELETE, format!("/v1/job/{id}")).await.is_some()),
            Harm::Purge => {
                format!("{:?}", nomad(Method::DELETE, format!("/v1/job/{id}?purge=true")).await.is_some())
            }
            Harm::StopAndStart => self.stop_and_start(id).await,
            Harm::Restart => {
                let allocations =
                    nomad(Method::GET, format!("/v1/job/{id}/allocations")).await.unwrap_or_default();
                match allocations[0]["ID"].as_str() {
                    Some(allocation) => {
                        let path = format!("/v1/client/allocation/{allocation}/restart");
                        let all = json!({"AllTasks": true});
                        format!("{:?}", self.arena.nomad(Method::PUT, &path, Some(&all)).await.is_some())
                    }
                    None => "nothing to restart".to_owned(),
                }
            }
            Harm::Crash => {
                let runner = PHASES.iter().rev().find_map(|phase| runner_of(id, phase));
                if let Some(pid) = runner {
                    let pid = nix::unistd::Pid::from_raw(pid);
                    // It may have ended by itself.
                    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).ok();
                }
                format!("{runner:?}")
            }
        };
        (vec![(at, harm, done)], kills)
    }

    /// What `nomad job stop` and `nomad job start` do.
    async fn stop_and_start(&self, id: &str) -> String {
        let path = format!("/v1/job/{id}");
        let Some(mut job) = self.arena.nomad(Method::GET, &path, None).await else {
            return "not there".to_owned();
        };
        let stopped = self.arena.nomad(Method::DELETE, &path, None).await.is_some();
        // As long as somebody takes who does it by hand.
        tokio::time::sleep(Duration::from_millis(300)).await;
        job["Stop"] = json!(false);
        let started = self.arena.nomad(Method::POST, "/v1/jobs", Some(&json!({"Job": job}))).await.is_some();
        format!("stopped {stopped}, started {started}")
    }

    /// Reads the job's log to its end, on another replica wherever it is cut off, for as long as there is patience.
    async fn read(&self, id: &str, mut random: Random) -> Vec<Value> {
        let mut messages: Vec<Value> = Vec::new();
        let reading = async {
            while messages.last().is_none_or(|message| message["type"] != "end") {
                tokio::time::sleep(Duration::from_millis(random.below(300))).await;
                if let Some((api, _)) = self.some(&mut random) {
                    read_on(&api, id, &mut messages).await;
                }
            }
        };
        // What was read by then has no end, which is found.
        tokio::time::timeout(PATIENCE, reading).await.ok();
        messages
    }

    /// What every replica says in the end, and what the registry serves.
    pub(super) async fn conclude(&self, job: &mut Job, until: Instant) {
        for number in 0..REPLICAS {
            let (url, _) = self.arena.address(number).unwrap();
            let told = self.last_word(&Api::new(&url), &job.id, until).await;
            if told.0.is_null() {
                job.unknown.push((self.clock.now(), number));
            } else {
                job.told.push(told);
            }
        }
        job.served = served(self.image, &job.tag).await;
    }

    async fn last_words(&self, allocation: &str) -> Vec<String> {
        let mut said = Vec::new();
        for task in PHASES.into_iter().chain(["finish"]) {
            let path = format!("/v1/client/fs/logs/{allocation}?task={task}&type=stderr&plain=true");
            said.extend(
                self.arena.nomad(Method::GET, &path, None).await.map(|text| format!("{task}: {text}")),
            );
        }
        said
    }

    /// Status and log of a job that has ended. What may yet be archived is waited for until then.
    async fn last_word(&self, api: &Api, id: &str, until: Instant) -> (Value, Value) {
        wait_for(&format!("last word on {id}"), PATIENCE, async || {
            let waits = Instant::now() < until;
            let status = api.try_call(Method::GET, &format!("/jobs/{id}/status"), None).await?;
            // One that does not end is found, too.
            if waits && !is_final(&status.1["data"]) {
                return None;
            }
            let log = api.try_call(Method::GET, &format!("/jobs/{id}/logs"), None).await?;
            let is_coming = log.1["data"]["missing"].to_string().contains("ask again");
            let is_there = (log.0.is_success() && !(is_coming && waits)) || log.0 == StatusCode::NOT_FOUND;
            is_there.then(|| (status.1["data"].clone(), log.1["data"].clone()))
        })
        .await
    }
}

fn is_final(status: &Value) -> bool {
    matches!(status["status"].as_str(), Some("SUCCEEDED" | "FAILED" | "KILLED" | "LOST"))
}

/// Reads from the last cursor to wherever the connection ends.
async fn read_on(api: &Api, id: &str, messages: &mut Vec<Value>) {
    let cursor = messages.iter().rev().find_map(|message| message["cursor"].as_str());
    let query = cursor.map_or_else(String::new, |cursor| format!("?cursor={cursor}"));
    let url = format!("{}/jobs/{id}/logs/stream{query}", api.url.replacen("http", "ws", 1));
    let (mut socket, _) = match tokio_tungstenite::connect_async(url).await {
        Ok(connected) => connected,
        // A cursor of a run that was replaced: from the beginning, as the error says.
        Err(Error::Http(answer)) if answer.status() == StatusCode::BAD_REQUEST => return messages.clear(),
        Err(_) => return,
    };
    while let Some(Ok(message)) = socket.next().await {
        let Message::Text(text) = message else { continue };
        let message: Value = serde_json::from_str(&text).unwrap();
        if matches!(message["type"].as_str(), Some("log" | "gap" | "end")) {
            messages.push(message);
        }
    }
}

/// The digest under a tag, and the job that its image says it is of.
pub(super) async fn served(image: &str, tag: &str) -> Option<(String, String)> {
    let digest = world().served(image, tag).await?;
    Some((digest, world().label(image, tag, "nomad-build.job").await.unwrap_or_default()))
}
