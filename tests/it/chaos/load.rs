//! Jobs: submitted, harmed, watched and read, wherever a replica answers.

use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::{Error, Message};
use tokio_util::sync::CancellationToken;

use super::Clock;
use super::arena::{Arena, REPLICAS};
use super::history::{Harm, Job, Plan, Seen};
use super::trouble::{CUT_OFF, REBOOT, Told};
use crate::support::agent::wait_for;
use crate::support::{Api, At, Front, PHASES, Random, Repository, runner_of, world};

/// What all jobs of a run have in common.
pub(super) struct Load<'a> {
    pub(super) arena: &'a Arena,
    pub(super) clock: &'a Clock,
    pub(super) repository: &'a Repository,
    pub(super) image: &'a str,
    pub(super) harms: Harms,
    /// One job in so many is read.
    pub(super) readers: u64,
    pub(super) troubles: &'a Told,
}

/// What is done to the jobs of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Harms {
    /// Something to every other job, at some time.
    Anytime,
    /// Something to every job, while it publishes.
    InPublish,
    /// Nothing.
    None,
}

/// Longer than whatever Nomad and the service wait for by themselves: a node that was rebooted has been seen to start a task
/// again after four minutes.
const PATIENCE: Duration = Duration::from_mins(6);

const ANYTIME: [Harm; 7] =
    [Harm::Kill, Harm::Kill, Harm::Stop, Harm::Purge, Harm::StopAndStart, Harm::Restart, Harm::Crash];

const IN_PUBLISH: [Harm; 9] = [
    Harm::Kill,
    Harm::Stop,
    Harm::Purge,
    Harm::StopAndStart,
    Harm::KillAndStart,
    Harm::Restart,
    Harm::Crash,
    Harm::Reboot,
    Harm::CutOff,
];

/// When a job is harmed.
enum When {
    After(Duration),
    /// When its publish is held there, and a moment before it goes on or behind that.
    Held(Front, Duration),
}

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

    /// What is done to a job, and when. The first one is left alone, so that something is published.
    async fn harm_of(&self, number: usize, random: &mut Random) -> Option<(Harm, When)> {
        match self.harms {
            _ if number == 0 => None,
            Harms::None => None,
            Harms::Anytime => (!random.once_in(2)).then(|| {
                let harm = random.one_of(&ANYTIME);
                (harm, When::After(Duration::from_millis(random.below(5000))))
            }),
            Harms::InPublish => {
                let at = random.one_of(&[At::Everything, At::Digest, At::Tag, At::ReadBack]);
                let harm = random.one_of(&IN_PUBLISH);
                let moment = Duration::from_millis(random.below(1000));
                Some((harm, When::Held(Front::holding(&world().registry, at).await, moment)))
            }
        }
    }

    /// One job, from its submission to its end.
    pub(super) async fn run(&self, number: usize, mut random: Random) -> Job {
        let plans =
            [Plan::Succeeds, Plan::Succeeds, Plan::TakesLong, Plan::FailsItsTest, Plan::FailsItsBuild];
        let plan = if number == 0 { Plan::Succeeds } else { random.one_of(&plans) };
        let tag = format!("only-{number}");
        let mut body = self.body(number, plan, &tag);
        let harm = self.harm_of(number, &mut random).await;
        if let Some((_, When::Held(front, _))) = &harm {
            body["registry_url"] = json!(front.host);
        }
        let mut job = self.submit(&format!("{}-{number}", self.image), plan, &tag, &body, &mut random).await;
        let reads = random.once_in(self.readers);
        let id = job.id.clone();
        let mut own = || Random::of(random.below(u64::MAX));
        let [first, second, third] = [own(), own(), own()];
        let ended = CancellationToken::new();
        let (watched, harmed, read) = tokio::join!(
            async {
                let watched = self.watch(&id, first).await;
                ended.cancel();
                watched
            },
            async {
                match harm {
                    Some((harm, when)) => self.harm_at(&id, harm, when, &ended, second).await,
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

    /// Harms a job when it is time to.
    async fn harm_at(
        &self,
        id: &str,
        harm: Harm,
        when: When,
        ended: &CancellationToken,
        mut random: Random,
    ) -> (Vec<(u128, Harm, String)>, Vec<bool>) {
        let (front, moment) = match when {
            When::After(time) => {
                tokio::time::sleep(time).await;
                return self.harm(id, harm, random).await;
            }
            When::Held(front, moment) => (front, moment),
        };
        // One that fails before never publishes.
        if ended.run_until_cancelled(front.holds_within(PATIENCE)).await.is_none() {
            return (Vec::new(), Vec::new());
        }
        if random.once_in(3) {
            front.let_go();
            return self.harm(id, harm, random).await;
        }
        let go_on = async {
            tokio::time::sleep(moment).await;
            front.let_go();
        };
        tokio::join!(self.harm(id, harm, random), go_on).0
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

    async fn harm(&self, id: &str, harm: Harm, mut random: Random) -> (Vec<(u128, Harm, String)>, Vec<bool>) {
        let at = self.clock.now();
        let mut kills = Vec::new();
        let lasts = Duration::from_millis(500 + random.below(5000));
        let done = match harm {
            Harm::Kill => self.kill(id, &mut random, &mut kills).await,
            Harm::KillAndStart => {
                let killed = self.kill(id, &mut random, &mut kills).await;
                format!("{killed}, {}", self.start(id).await)
            }
            Harm::Stop => self.stop(id, "").await,
            Harm::Purge => self.stop(id, "?purge=true").await,
            Harm::StopAndStart => format!("{}, {}", self.stop(id, "").await, self.start(id).await),
            Harm::Restart => self.restart(id).await,
            Harm::Crash => {
                let runner = PHASES.iter().rev().find_map(|phase| runner_of(id, phase));
                if let Some(pid) = runner {
                    let pid = nix::unistd::Pid::from_raw(pid);
                    // It may have ended by itself.
                    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).ok();
                }
                format!("{runner:?}")
            }
            Harm::Reboot => {
                self.arena.reboot(|when| self.tell(REBOOT, when, id)).await;
                String::new()
            }
            Harm::CutOff => {
                self.arena.cut_node_off(lasts, |when| self.tell(CUT_OFF, when, id)).await;
                format!("for {lasts:?}")
            }
        };
        (vec![(at, harm, done)], kills)
    }

    /// Tells what is done to all jobs on the node for the sake of one.
    fn tell(&self, what: &str, when: &str, id: &str) {
        self.troubles.lock().unwrap().push((self.clock.now(), format!("{what}{when}, for {id}")));
    }

    async fn kill(&self, id: &str, random: &mut Random, kills: &mut Vec<bool>) -> String {
        let answer = match self.some(random) {
            Some((api, _)) => api.try_call(Method::POST, &format!("/jobs/{id}/kill"), None).await,
            None => None,
        };
        kills.extend(answer.as_ref().and_then(|(_, answer)| answer["data"]["success"].as_bool()));
        format!("{answer:?}")
    }

    /// What `nomad job stop` does.
    async fn stop(&self, id: &str, query: &str) -> String {
        let stopped = self.arena.nomad(Method::DELETE, &format!("/v1/job/{id}{query}"), None).await.is_some();
        format!("stopped {stopped}")
    }

    /// What `nomad job start` does, after as long as somebody takes who does it by hand.
    async fn start(&self, id: &str) -> String {
        tokio::time::sleep(Duration::from_millis(300)).await;
        let Some(mut job) = self.arena.nomad(Method::GET, &format!("/v1/job/{id}"), None).await else {
            return "not there".to_owned();
        };
        job["Stop"] = json!(false);
        let started = self.arena.nomad(Method::POST, "/v1/jobs", Some(&json!({"Job": job}))).await.is_some();
        format!("started {started}")
    }

    /// What `nomad alloc restart` does.
    async fn restart(&self, id: &str) -> String {
        let path = format!("/v1/job/{id}/allocations");
        let allocations = self.arena.nomad(Method::GET, &path, None).await.unwrap_or_default();
        let Some(allocation) = allocations[0]["ID"].as_str() else { return "nothing to restart".to_owned() };
        let path = format!("/v1/client/allocation/{allocation}/restart");
        let restarted =
            self.arena.nomad(Method::PUT, &path, Some(&json!({"AllTasks": true}))).await.is_some();
        format!("restarted {restarted}")
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
