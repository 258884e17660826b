//! What fails, by a schedule that a seed repeats.

use std::ops::RangeInclusive;
use std::sync::Mutex;
use std::time::Duration;

use reqwest::Method;
use tokio_util::sync::CancellationToken;

use super::Clock;
use super::arena::{Arena, REPLICAS};
use crate::support::{Fault, Random};

/// The quiet between two troubles, in milliseconds.
const QUIET: (u64, u64) = (500, 2500);

#[derive(Clone, Copy, Debug)]
enum Trouble {
    /// A replica is killed and started again.
    Replica,
    /// Every replica, one after the other.
    EveryReplica,
    /// Nomad's leader is killed and started again.
    Leader,
    /// Nomad's leader hangs, and goes on.
    LeaderHangs,
    /// The node's agent is killed and started again.
    Agent,
    /// The node's agent hangs, and goes on.
    AgentHangs,
    /// Nomad's leader reaches nobody, and is reached again.
    LeaderCutOff,
    /// The node's agent reaches no server, and is reached again.
    AgentCutOff,
    /// The node is rebooted.
    Node,
    /// Every server of Nomad is killed and started again.
    EveryServer,
    /// Answers of Nomad to a replica are cut, late, torn or silent.
    Way,
    /// Nomad collects what has ended.
    Collection,
}

const ALL: [Trouble; 12] = [
    Trouble::Replica,
    Trouble::EveryReplica,
    Trouble::Leader,
    Trouble::LeaderHangs,
    Trouble::Agent,
    Trouble::AgentHangs,
    Trouble::LeaderCutOff,
    Trouble::AgentCutOff,
    Trouble::Node,
    Trouble::EveryServer,
    Trouble::Way,
    Trouble::Collection,
];

/// What was made to fail, and when.
pub(super) type Told = Mutex<Vec<(u128, String)>>;

/// What fails in a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Troubles {
    /// Whatever can.
    All,
    /// Replicas, one after the other and then all at once, every five seconds.
    Replicas,
    /// Nothing by itself.
    None,
}

/// How the node's reboot is told of, and that somebody cut it off.
pub(super) const REBOOT: &str = "Node";
pub(super) const CUT_OFF: &str = "The node is cut off";

/// From when to when something lasted.
pub(super) fn spans<'a>(
    told: &'a [(u128, String)],
    what: &'a str,
) -> impl Iterator<Item = RangeInclusive<u128>> + 'a {
    let over = format!("{what} is over");
    let begun = told.iter().enumerate().filter(move |(_, (_, text))| text.starts_with(what));
    begun.filter_map(move |(index, (at, text))| {
        let mut later = told[index..].iter().filter(|(_, text)| text.starts_with(&over));
        (!text.starts_with(&over)).then(|| *at..=later.next().map_or(u128::MAX, |(at, _)| *at))
    })
}

/// Makes trouble until it is told to stop, and leaves everything well.
pub(super) async fn make(
    troubles: Troubles,
    arena: &Arena,
    clock: &Clock,
    random: Random,
    stop: &CancellationToken,
    told: &Told,
) {
    match troubles {
        Troubles::All => by_chance(arena, clock, random, stop, told).await,
        Troubles::Replicas => kill_replicas(arena, clock, stop, told).await,
        Troubles::None => {}
    }
}

async fn by_chance(arena: &Arena, clock: &Clock, mut random: Random, stop: &CancellationToken, told: &Told) {
    loop {
        let quiet = Duration::from_millis(QUIET.0 + random.below(QUIET.1 - QUIET.0));
        if stop.run_until_cancelled(tokio::time::sleep(quiet)).await.is_none() {
            return;
        }
        let trouble = random.one_of(&ALL);
        let number = usize::try_from(random.below(REPLICAS as u64)).unwrap();
        let lasts = Duration::from_millis(500 + random.below(3000));
        let say = |text: String| told.lock().unwrap().push((clock.now(), text));
        say(format!("{trouble:?}, {number} of what there are several, for {lasts:?}"));
        one(arena, trouble, number, lasts, &mut random).await;
        say(format!("{trouble:?} is over"));
    }
}

async fn kill_replicas(arena: &Arena, clock: &Clock, stop: &CancellationToken, told: &Told) {
    let all = || (0..REPLICAS).collect::<Vec<_>>();
    let mut turns = (0..REPLICAS).map(|number| vec![number]).chain([all()]).cycle();
    while stop.run_until_cancelled(tokio::time::sleep(Duration::from_secs(5))).await.is_some() {
        let numbers = turns.next().unwrap_or_default();
        let say =
            |text: &str| told.lock().unwrap().push((clock.now(), format!("replicas {numbers:?}{text}")));
        say("");
        for number in &numbers {
            arena.kill(*number);
        }
        for number in &numbers {
            arena.revive(*number);
        }
        say(" are over");
    }
}

async fn one(arena: &Arena, trouble: Trouble, number: usize, lasts: Duration, random: &mut Random) {
    let cluster = &arena.cluster;
    match trouble {
        Trouble::Replica => {
            arena.kill(number);
            tokio::time::sleep(lasts).await;
            arena.revive(number);
        }
        Trouble::EveryReplica => {
            for number in 0..REPLICAS {
                arena.kill(number);
                tokio::time::sleep(lasts / 3).await;
                arena.revive(number);
            }
        }
        Trouble::Leader => {
            let leader = cluster.leader(None).await;
            cluster.kill(leader);
            tokio::time::sleep(lasts).await;
            cluster.restart(leader).await;
        }
        Trouble::LeaderHangs => {
            let leader = cluster.leader(None).await;
            cluster.halt(leader, true);
            tokio::time::sleep(lasts).await;
            cluster.halt(leader, false);
        }
        Trouble::Agent => {
            cluster.kill_client();
            tokio::time::sleep(lasts / 2).await;
            cluster.restart_client().await;
        }
        Trouble::AgentHangs => {
            cluster.halt_client(true);
            tokio::time::sleep(lasts).await;
            cluster.halt_client(false);
        }
        Trouble::LeaderCutOff => {
            let leader = cluster.leader(None).await;
            cluster.cut_off(leader, true);
            tokio::time::sleep(lasts).await;
            cluster.cut_off(leader, false);
        }
        Trouble::AgentCutOff => arena.cut_node_off(lasts, |_| {}).await,
        Trouble::Node => arena.reboot(|_| {}).await,
        Trouble::EveryServer => cluster.restart_all(lasts).await,
        Trouble::Way => {
            let mut chance = random.clone();
            random.below(2);
            let late = Duration::from_millis(200);
            let kinds = [
                Fault::CutBefore,
                Fault::CutAfter,
                Fault::Truncated(100),
                Fault::Silent(50),
                Fault::Drip,
                Fault::Delay(late),
            ];
            arena.ways[number].harm(move |_| chance.once_in(3).then(|| chance.one_of(&kinds)));
            tokio::time::sleep(lasts).await;
            arena.ways[number].harm(|_| None);
        }
        Trouble::Collection => {
            arena.nomad(Method::PUT, "/v1/system/gc", None).await;
        }
    }
}
