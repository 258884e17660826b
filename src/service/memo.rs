//! What Nomad was asked about tokens, and what came of it: asked by one at a time, and kept for a while, in bounded memory.
//!
//! Invariant: however many ask the same at one moment, Nomad is asked once. What was refused drives out nothing that was granted:
//! callers can make up tokens.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use tokio::sync::Mutex as Turn;

use super::tokens::lock;
use crate::nomad::Error;

/// The most of each kind that is kept.
const MOST: usize = 10_000;

/// How long Nomad is not asked again what it did not answer: whoever waited meanwhile need not wait anew.
pub(super) const AGAIN: Duration = Duration::from_secs(1);

/// What may be kept.
pub(super) trait Answer: Clone {
    /// How long it is believed.
    fn kept(&self) -> Duration;

    /// Whether it lets nobody do anything.
    fn is_refusal(&self) -> bool;
}

/// Values, each with the time it came at.
type Timed<K, V> = HashMap<K, (V, Instant)>;

/// Keeps one more, and where there is no room the older half no more.
fn put<K: Hash + Eq, V>(all: &mut Timed<K, V>, key: K, value: V, now: Instant) {
    if all.len() >= MOST && !all.contains_key(&key) {
        let mut times: Vec<_> = all.values().map(|(_, at)| *at).collect();
        let (_, middle, _) = times.select_nth_unstable(MOST / 2);
        all.retain(|_, (_, at)| *at > *middle);
    }
    all.insert(key, (value, now));
}

struct Answers<K, V> {
    granted: Timed<K, V>,
    refused: Timed<K, V>,
    /// What Nomad did not answer the last time.
    failed: Timed<K, Arc<Error>>,
}

impl<K: Hash + Eq + Clone, V: Answer> Answers<K, V> {
    fn keep(&mut self, key: &K, answer: &Result<V, Arc<Error>>, now: Instant) {
        let answer = match answer {
            Ok(answer) => answer,
            Err(error) => return put(&mut self.failed, key.clone(), Arc::clone(error), now),
        };
        let (to, other) = if answer.is_refusal() {
            (&mut self.refused, &mut self.granted)
        } else {
            (&mut self.granted, &mut self.refused)
        };
        put(to, key.clone(), answer.clone(), now);
        other.remove(key);
        self.failed.remove(key);
    }

    fn last(&self, key: &K, now: Instant) -> Option<(&V, Duration)> {
        let (answer, at) = self.granted.get(key).or_else(|| self.refused.get(key))?;
        Some((answer, now.saturating_duration_since(*at)))
    }

    fn current(&self, key: &K, now: Instant) -> Option<V> {
        let (answer, age) = self.last(key, now)?;
        (age < answer.kept()).then(|| answer.clone())
    }

    /// What need not be asked now.
    fn settled(&self, key: &K, now: Instant) -> Option<Result<V, Arc<Error>>> {
        let failed = self.failed.get(key).filter(|(_, at)| now.saturating_duration_since(*at) < AGAIN);
        self.current(key, now).map(Ok).or_else(|| failed.map(|(error, _)| Err(Arc::clone(error))))
    }
}

/// The answers to one kind of question.
pub(super) struct Memo<K, V> {
    answers: Mutex<Answers<K, V>>,
    turns: Turns<K>,
}

impl<K, V> Default for Memo<K, V> {
    fn default() -> Self {
        let answers = Answers { granted: HashMap::new(), refused: HashMap::new(), failed: HashMap::new() };
        Self { answers: Mutex::new(answers), turns: Turns::default() }
    }
}

impl<K: Hash + Eq + Clone, V: Answer> Memo<K, V> {
    /// What is believed without asking.
    pub(super) fn current(&self, key: &K) -> Option<V> {
        lock(&self.answers).current(key, Instant::now())
    }

    /// The last answer, where it is not older than that.
    pub(super) fn last(&self, key: &K, most: Duration) -> Option<V> {
        let answers = lock(&self.answers);
        answers.last(key, Instant::now()).filter(|(_, age)| *age < most).map(|(answer, _)| answer.clone())
    }

    /// Whether Nomad did not answer the last time, and may the next time.
    pub(super) fn is_away(&self, key: &K) -> bool {
        lock(&self.answers).failed.get(key).is_some_and(|(error, _)| error.is_passing())
    }

    /// Takes in an answer.
    pub(super) fn keep(&self, key: &K, answer: &Result<V, Arc<Error>>) {
        lock(&self.answers).keep(key, answer, Instant::now());
    }

    /// What is believed, or else what Nomad answers now, to whoever asked first.
    pub(super) async fn ask(
        &self,
        key: &K,
        asked: impl Future<Output = Result<V, Error>>,
    ) -> Result<V, Arc<Error>> {
        if let Some(answer) = self.current(key) {
            return Ok(answer);
        }
        let turn = self.turns.of(key);
        let _turn = turn.lock().await;
        self.settle(key, asked).await
    }

    /// Asks, unless somebody is at it.
    pub(super) async fn ask_alone(&self, key: &K, asked: impl Future<Output = Result<V, Error>>) {
        let turn = self.turns.of(key);
        if let Ok(_turn) = turn.try_lock() {
            // Kept, for whoever asks next.
            self.settle(key, asked).await.map(drop).ok();
        }
    }

    async fn settle(&self, key: &K, asked: impl Future<Output = Result<V, Error>>) -> Result<V, Arc<Error>> {
        if let Some(settled) = lock(&self.answers).settled(key, Instant::now()) {
            return settled;
        }
        let answer = asked.await.map_err(Arc::new);
        self.keep(key, &answer);
        answer
    }
}

/// The turns of those who ask the same.
struct Turns<K>(Mutex<HashMap<K, Weak<Turn<()>>>>);

impl<K> Default for Turns<K> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<K: Hash + Eq + Clone> Turns<K> {
    fn of(&self, key: &K) -> Arc<Turn<()>> {
        let mut turns = lock(&self.0);
        if let Some(turn) = turns.get(key).and_then(Weak::upgrade) {
            return turn;
        }
        if turns.len() >= MOST {
            turns.retain(|_, turn| turn.strong_count() > 0);
        }
        let turn = Arc::default();
        turns.insert(key.clone(), Arc::downgrade(&turn));
        turn
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

    use futures_util::future::join_all;

    use super::*;

    impl Answer for u32 {
        fn kept(&self) -> Duration {
            Duration::from_secs(10)
        }

        fn is_refusal(&self) -> bool {
            *self == 0
        }
    }

    fn failure() -> Error {
        Error::older("asking", 1, 2)
    }

    fn answers() -> Answers<u32, u32> {
        Memo::default().answers.into_inner().unwrap()
    }

    #[test]
    fn an_answer_is_believed_for_its_time_and_outlives_a_failure() {
        let (mut answers, began) = (answers(), Instant::now());
        let at = |seconds| began + Duration::from_secs(seconds);
        answers.keep(&7, &Ok(1), at(0));
        answers.keep(&7, &Err(Arc::new(failure())), at(12));
        for (seconds, current) in [(9, Some(1)), (10, None)] {
            assert_eq!(answers.current(&7, at(seconds)), current, "{seconds}");
        }
        for (seconds, settled) in [(12, Some(false)), (13, None)] {
            assert_eq!(answers.settled(&7, at(seconds)).map(|of| of.is_ok()), settled, "{seconds}");
        }
        assert_eq!(answers.last(&7, at(60)), Some((&1, Duration::from_mins(1))));
        // It takes the place of what was granted.
        answers.keep(&7, &Ok(0), at(61));
        assert_eq!(answers.last(&7, at(61)), Some((&0, Duration::ZERO)));
        assert!(answers.failed.is_empty());
    }

    #[test]
    fn however_many_tokens_are_made_up_memory_is_bounded_and_what_was_granted_stays() {
        let (mut answers, now) = (answers(), Instant::now());
        answers.keep(&u32::MAX, &Ok(1), now);
        let many = u32::try_from(3 * MOST).unwrap();
        for key in 0..many {
            let now = now + Duration::from_nanos(key.into());
            answers.keep(&key, &Ok(0), now);
            answers.keep(&key, &Err(Arc::new(failure())), now);
            assert!(answers.refused.len() <= MOST && answers.failed.len() <= MOST);
        }
        assert_eq!(answers.current(&u32::MAX, now), Some(1));
        // The newest are there still.
        assert!(answers.last(&(many - 1), now).is_some() && answers.last(&0, now).is_none());
    }

    #[tokio::test]
    async fn however_many_ask_at_one_moment_one_question_is_asked_and_all_have_its_answer() {
        for answered in [true, false] {
            let (memo, count) = (Memo::<u32, u32>::default(), AtomicU32::new(0));
            let asked = || async {
                count.fetch_add(1, Relaxed);
                tokio::task::yield_now().await;
                if answered { Ok(1) } else { Err(failure()) }
            };
            let told = join_all((0..100).map(|_| memo.ask(&7, asked()))).await;
            assert!(told.iter().all(|told| told.is_ok() == answered));
            assert_eq!(count.load(Relaxed), 1);
            memo.ask_alone(&7, asked()).await;
            assert_eq!(count.load(Relaxed), 1, "what is settled is not asked");
        }
    }
}
