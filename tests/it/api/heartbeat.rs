//! A stream is never silent for long.

use std::pin::pin;
use std::time::Duration;

use futures_util::{Stream, StreamExt as _};
use serde_json::Value;
use tokio::time::{Instant, timeout};
use tokio_tungstenite::tungstenite::Message;

use crate::support::{Sleeper, world};

/// How long a stream is silent before a heartbeat.
const SILENCE: Duration = Duration::from_secs(15);

/// Reads messages until two heartbeats in turn have come, each after so long a silence.
async fn beats(messages: impl Stream<Item = Value>) {
    let (mut messages, mut last, mut beats) = (pin!(messages), Instant::now(), 0);
    while beats < 2 {
        // Twice as long, on a machine that has much to do.
        let message = timeout(2 * SILENCE, messages.next()).await.expect("a heartbeat").unwrap();
        if message["type"] == "heartbeat" {
            // What came before may have come a moment late.
            let silent = last.elapsed() + Duration::from_secs(3);
            assert!(silent > SILENCE, "{silent:?} after the message before");
            let time: chrono::DateTime<chrono::Utc> = message["time"].as_str().unwrap().parse().unwrap();
            assert!((chrono::Utc::now() - time).abs() < chrono::Duration::seconds(10), "{message}");
            beats += 1;
        } else {
            beats = 0;
        }
        last = Instant::now();
    }
}

#[tokio::test]
async fn a_reader_of_a_job_that_says_nothing_gets_heartbeats_by_a_websocket_and_by_events() {
    let (world, sleeper) = (world(), Sleeper::in_phase("build"));
    let id = sleeper.submit(&world.api()).await;
    let url = format!("{}/jobs/{id}/logs/stream", world.service.url.replacen("http", "ws", 1));
    let (socket, _) = tokio_tungstenite::connect_async(url).await.unwrap();
    let by_socket = socket.filter_map(async |frame| match frame.unwrap() {
        Message::Text(text) => Some(serde_json::from_str::<Value>(&text).unwrap()),
        _ => None,
    });
    let pieces = world.api().stream(&id, "").await.bytes_stream();
    let mut rest = String::new();
    let by_events = pieces.flat_map(move |piece| {
        rest.push_str(std::str::from_utf8(&piece.unwrap()).unwrap());
        let end = rest.rfind('\n').map_or(0, |end| end + 1);
        let whole: String = rest.drain(..end).collect();
        let data = whole.lines().filter_map(|line| line.strip_prefix("data: "));
        let messages: Vec<_> = data.map(|data| serde_json::from_str::<Value>(data).unwrap()).collect();
        futures_util::stream::iter(messages)
    });
    tokio::join!(beats(by_socket), beats(by_events));
    world.api().post(&format!("/jobs/{id}/kill")).await;
}
