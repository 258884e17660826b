//! Logs, as readers of the API see them: by WebSocket, by server-sent events, and whole.

use futures_util::{SinkExt as _, StreamExt as _};
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::frame::Frame;
use tokio_tungstenite::tungstenite::protocol::frame::coding::{Data, OpCode};

use crate::support::agent::{Agent, wait_for};
use crate::support::openapi::errors_of;
use crate::support::{
    Api, Hold, Nomad, Service, Sleeper, World, crash_log, eventually, kilobytes, most_kilobytes, world,
};

type Socket = tokio_tungstenite::WebSocketStream<tokio_tungstenite::MaybeTlsStream<tokio::net::TcpStream>>;

async fn open(url: &str, id: &str, query: &str) -> Socket {
    let url = format!("{}/jobs/{id}/logs/stream{query}", url.replacen("http", "ws", 1));
    tokio_tungstenite::connect_async(url).await.unwrap().0
}

/// Opens a stream, and reads it until `enough` says so of a message, or until its end.
async fn read(url: &str, id: &str, query: &str, enough: impl FnMut(&Value) -> bool) -> Vec<Value> {
    read_on(&mut open(url, id, query).await, enough).await
}

/// The same of one that is open.
async fn read_on(socket: &mut Socket, mut enough: impl FnMut(&Value) -> bool) -> Vec<Value> {
    let mut messages = Vec::new();
    while let Some(message) = socket.next().await {
        let Message::Text(text) = message.unwrap() else { continue };
        let message: Value = serde_json::from_str(&text).unwrap();
        // Of lines there are too many.
        if message["type"] != "log" {
            assert_eq!(errors_of("Message", &message), [] as [&str; 0], "{message}");
        }
        messages.push(message);
        if enough(messages.last().unwrap()) {
            break;
        }
    }
    messages
}

pub(crate) async fn read_all(url: &str, id: &str, query: &str) -> Vec<Value> {
    read(url, id, query, |_| false).await
}

/// The lines of a phase, parts joined.
pub(crate) fn lines(messages: &[Value], phase: &str) -> Vec<String> {
    let mut lines = vec![String::new()];
    for message in messages.iter().filter(|m| m["type"] == "log" && m["phase"] == phase) {
        lines.last_mut().unwrap().push_str(message["line"].as_str().unwrap());
        if message["partial"] != true {
            lines.push(String::new());
        }
    }
    lines.pop();
    lines
}

/// What a test printed: the lines between its header and its result.
fn printed(messages: &[Value]) -> Vec<String> {
    lines(messages, "test").into_iter().filter(|line| line.starts_with("line ")).collect()
}

fn counting(world: &World, to: u32, pace: &str) -> (crate::support::Repository, Value) {
    let repository = world.repository("");
    let mut job = world.job(&repository);
    job["test_commands"] =
        json!([format!("i=0; while [ $i -lt {to} ]; do i=$((i+1)); echo \"line $i\"; {pace}; done")]);
    (repository, job)
}

fn expected(to: u32) -> Vec<String> {
    (1..=to).map(|i| format!("line {i}")).collect()
}

#[tokio::test]
async fn a_stream_opened_before_anything_is_placed_carries_all_phases_in_order_to_the_end() {
    let world = world();
    // A node of its own, as a job that fills one keeps every other job waiting.
    let agent = Agent::with_memory(3000).await;
    let nomad = format!("http://{}", agent.address());
    let service = Service::start(&nomad, &world.registry, &[]);
    let (api, nomad) = (Api::new(&service.url), Nomad::new(&nomad));
    let resources = json!({"build": {"cpu": 100, "memory_mb": 2000}, "test": {"cpu": 100}});
    let mut first = Sleeper::in_phase("build");
    first.job["resources"] = resources.clone();
    let filling = first.submit(&api).await;
    let (_repository, mut job) = counting(world, 200, ":");
    job["resources"] = resources;
    let id = api.submit(&job).await;
    agent.owns(&filling);
    agent.owns(&id);

    let mut socket = open(&service.url, &id, "").await;
    let mut messages = read_on(&mut socket, |_| true).await;
    assert_eq!((&messages[0]["type"], &messages[0]["status"]), (&json!("status"), &json!("PENDING")));
    let waits = |status: &Value| status["placement"].is_string();
    let status = api.wait_until(&id, "why it waits", waits).await;
    assert!(status["placement"].as_str().unwrap().contains("without enough memory"), "{status:#}");
    assert_eq!((&status["status"], &status["nomad"]["allocation"]), (&json!("PENDING"), &Value::Null));
    assert_eq!(nomad.get(&format!("/v1/job/{id}/allocations")).await, json!([]));
    // The end of the one makes room for the other.
    assert_eq!(api.post(&format!("/jobs/{filling}/kill")).await["success"], true);
    messages.extend(read_on(&mut socket, |_| false).await);

    assert_eq!(messages.last().unwrap()["type"], "end");
    assert_eq!(messages.last().unwrap()["status"], "SUCCEEDED", "{:#}", api.status(&id).await);
    assert!(messages.iter().all(|message| message["type"] != "gap"), "{messages:#?}");
    let phases: Vec<_> =
        messages.iter().filter(|m| m["type"] == "log").map(|m| m["phase"].as_str().unwrap()).collect();
    let mut sorted = phases.clone();
    sorted.sort_by_key(|phase| ["build", "test", "publish"].iter().position(|p| p == phase));
    assert_eq!(phases, sorted);
    assert_eq!(printed(&messages), expected(200), "{messages:#?}");
    // The whole log says the same.
    let whole = api.logs(&id).await;
    for phase in ["build", "test", "publish"] {
        let want: String = lines(&messages, phase).iter().map(|line| format!("{line}\n")).collect();
        assert_eq!(whole[phase], want.as_str(), "{phase}");
    }
}

#[tokio::test]
async fn a_reader_that_is_cut_off_resumes_on_another_replica_with_no_line_lost_or_doubled() {
    let world = world();
    let other = Service::start(&world.nomad, &world.registry, &[]);
    let (_repository, job) = counting(world, 400, "usleep 5000");
    let id = world.api().submit(&job).await;
    let (mut seen, mut query) = (Vec::new(), String::new());
    for turn in 0.. {
        let url = if turn % 2 == 0 { &world.service.url } else { &other.url };
        let mut left = 37 + turn * 11;
        let part = read(url, &id, &query, |message| {
            left -= i32::from(message["type"] == "log");
            left == 0
        })
        .await;
        let cursor = part.iter().rev().find_map(|message| message["cursor"].as_str());
        if let Some(cursor) = cursor {
            query = format!("?cursor={cursor}");
        }
        seen.extend(part);
        if seen.last().unwrap()["type"] == "end" {
            break;
        }
    }
    let arrived = printed(&seen) == expected(400);
    assert!(arrived, "{}", world.known_of(&id, &seen).await);
    assert!(seen.iter().all(|message| message["type"] != "gap"));
}

#[tokio::test]
async fn a_reader_after_the_end_gets_a_replay_and_a_tail_is_its_last_lines() {
    let world = world();
    let (_repository, job) = counting(world, 50, ":");
    let (id, status) = world.api().run(&job).await;
    assert_eq!(status["status"], "SUCCEEDED", "{status:#}");
    let all = read_all(&world.service.url, &id, "").await;
    assert_eq!(printed(&all), expected(50));
    let tail = read_all(&world.service.url, &id, "?phase=test&tail=5").await;
    let whole = lines(&all, "test");
    assert_eq!(lines(&tail, "test"), whole[whole.len() - 5..]);
    assert!(lines(&tail, "build").is_empty());
}

#[tokio::test]
async fn a_text_that_is_asked_for_as_soon_as_a_job_has_failed_is_whole() {
    let (world, api) = (world(), world().api());
    let repository = world.repository("");
    let mut job = world.job(&repository);
    job["test_commands"] = json!(["echo last words; exit 3"]);
    // A failed phase ends its job, and tells of itself behind that.
    for _ in 0..5 {
        let (id, status) = api.run(&job).await;
        assert_eq!(status["failure"]["reason"], "test_failed", "{status:#}");
        let log = api.logs(&id).await["test"].as_str().unwrap().to_owned();
        assert!(log.contains("last words\n") && log.trim_end().ends_with("with exit code 3"), "{log}");
    }
}

#[tokio::test]
async fn server_sent_events_say_the_same_as_the_websocket() {
    let world = world();
    let (_repository, job) = counting(world, 20, ":");
    let id = world.api().submit(&job).await;
    let url = format!("{}/jobs/{id}/logs/stream", world.service.url);
    let http = reqwest::Client::builder().tls_certs_only([]).build().unwrap();
    let text =
        http.get(url).header("Accept", "text/event-stream").send().await.unwrap().text().await.unwrap();
    let events: Vec<Value> =
        text.lines().filter_map(|line| serde_json::from_str(line.strip_prefix("data: ")?).ok()).collect();
    let socket = read_all(&world.service.url, &id, "").await;
    for phase in ["build", "test", "publish"] {
        assert_eq!(lines(&events, phase), lines(&socket, phase));
    }
    assert_eq!(events.last().unwrap()["type"], "end");
}

/// The events of a log with their IDs.
fn events(text: &str) -> Vec<(String, Value)> {
    let mut events = Vec::new();
    for event in text.split("\n\n") {
        let field = |name: &str| event.lines().find_map(|line| line.strip_prefix(name));
        let Some(data) = field("data: ") else { continue };
        events.push((field("id: ").unwrap_or_default().to_owned(), serde_json::from_str(data).unwrap()));
    }
    events
}

#[tokio::test]
async fn an_event_source_resumes_behind_the_last_event_that_came_whatever_it_was_opened_with() {
    let world = world();
    let api = world.api();
    let (_repository, job) = counting(world, 20, ":");
    let (id, status) = api.run(&job).await;
    assert_eq!(status["status"], "SUCCEEDED", "{status:#}");
    let whole = events(&api.stream(&id, "").await.text().await.unwrap());
    let logs: Vec<_> = whole.iter().filter(|(_, message)| message["type"] == "log").collect();
    let (first, middle) = (&logs[0].0, &logs[logs.len() / 2].0);
    let url = format!("{}/jobs/{id}/logs/stream", world.service.url);
    let http = reqwest::Client::builder().tls_certs_only([]).build().unwrap();
    let resume = async |query: &str, last: &str| {
        let request = http.get(format!("{url}{query}")).header("accept", "text/event-stream");
        request.header("last-event-id", last).send().await.unwrap()
    };
    for query in ["", &format!("?cursor={first}")] {
        let answer = resume(query, middle).await;
        assert_eq!(answer.headers()["x-accel-buffering"], "no");
        let resumed = events(&answer.text().await.unwrap());
        let behind = |events: &[(String, Value)]| -> Vec<Value> {
            let logs = events.iter().filter(|(_, message)| message["type"] == "log");
            logs.map(|(_, message)| message["line"].clone()).collect()
        };
        let from = whole.iter().position(|(cursor, _)| cursor == middle).unwrap();
        assert_eq!(behind(&resumed), behind(&whole[from + 1..]), "{query}");
    }
    // It opens again what has ended, until it is told that there is no more.
    assert_eq!(whole.last().unwrap().0, "end");
    for query in ["", &format!("?cursor={first}")] {
        assert_eq!(resume(query, "end").await.status(), 204);
    }
    let unknown = format!("{}/jobs/nb-{}/logs/stream", world.service.url, uuid::Uuid::now_v7());
    let unknown = http.get(unknown).header("accept", "text/event-stream").header("last-event-id", "end");
    assert_eq!(unknown.send().await.unwrap().status(), 404);
    let refused = resume("", "nonsense").await;
    assert_eq!(refused.status(), 400);
    let body: Value = refused.json().await.unwrap();
    assert_eq!(body["error"]["details"][0]["field"], "Last-Event-ID", "{body}");
}

#[tokio::test]
async fn what_has_no_line_end_is_told_while_the_line_goes_on() {
    let world = world();
    let repository = world.repository("");
    let mut job = world.job(&repository);
    job["test_commands"] = json!(["printf 'ready? '; sleep 600"]);
    let id = world.api().submit(&job).await;
    let seen = |message: &Value| message["line"] == "ready? " && message["partial"] == true;
    let read = read(&world.service.url, &id, "?phase=test", seen);
    let messages = tokio::time::timeout(std::time::Duration::from_mins(2), read).await.unwrap();
    assert!(seen(messages.last().unwrap()), "{messages:#?}");
    world.api().post(&format!("/jobs/{id}/kill")).await;
}

#[tokio::test]
async fn what_a_reader_of_a_log_says_is_not_kept() {
    let world = world();
    let (_repository, job) = counting(world, 10_000, "sleep 0.1");
    let id = world.api().submit(&job).await;
    let url = format!("{}/jobs/{id}/logs/stream", world.service.url.replacen("http", "ws", 1));
    let frame = |text: &str, is_last: bool, code| {
        Message::Frame(Frame::message(text.to_owned(), OpCode::Data(code), is_last))
    };
    let small = vec![Message::text("hello"); 2000];
    let large = vec![Message::text("x".repeat(5000))];
    // Never ended: a service that waits for the end keeps it all.
    let mut endless = vec![frame("x", false, Data::Text)];
    endless.extend((0..10).map(|_| frame(&"x".repeat(1000), false, Data::Continue)));
    for (said, goes_on) in [(small, true), (large, false), (endless, false)] {
        let (mut socket, _) = tokio_tungstenite::connect_async(&url).await.unwrap();
        for message in said {
            // Who is hung up on cannot go on.
            if socket.send(message).await.is_err() {
                break;
            }
        }
        let mut lines = 0;
        let ended = loop {
            match socket.next().await {
                None | Some(Err(_) | Ok(Message::Close(_))) => break true,
                Some(Ok(Message::Text(text))) => lines += usize::from(text.contains("\"line 5")),
                Some(Ok(_)) => {}
            }
            if lines == 3 {
                break false;
            }
        };
        assert_eq!(ended, !goes_on);
    }
    world.api().post(&format!("/jobs/{id}/kill")).await;
}

#[tokio::test]
async fn a_log_of_50_mb_with_a_line_of_5_mb_arrives_whole_and_its_text_says_what_it_leaves_out() {
    let world = world();
    let repository = world.repository("");
    let mut job = world.job(&repository);
    job["test_commands"] = json!([
        "yes 'line of a log that is longer than most readers would like it to be' | head -n 650000",
        "head -c 5000000 /dev/zero | tr '\\0' x; echo",
    ]);
    let id = world.api().submit(&job).await;
    let messages = read_all(&world.service.url, &id, "?phase=test").await;
    assert_eq!(messages.last().unwrap()["status"], "SUCCEEDED", "{:#}", world.api().status(&id).await);
    assert!(messages.iter().all(|message| message["type"] != "gap"));
    let lines = lines(&messages, "test");
    assert_eq!(lines.iter().filter(|line| line.starts_with("line of a log")).count(), 650_000);
    assert_eq!(
        lines.iter().filter(|line| line.len() == 5_000_000 && line.bytes().all(|b| b == b'x')).count(),
        1
    );
    let whole = world.api().logs(&id).await;
    let omitted = whole["truncated"]["test"]["omitted_bytes"].as_u64().unwrap();
    let (text, limit) = (whole["test"].as_str().unwrap(), 16 << 20);
    assert!(text.len() <= limit + 500 && text.len() > limit / 2, "{}", text.len());
    assert!(omitted > 20 << 20, "{omitted}");
    assert!(text.lines().next().unwrap().contains("logs/stream"), "{}", &text[..200]);
}

#[tokio::test(flavor = "multi_thread")]
async fn callers_that_take_nothing_of_long_logs_are_held_in_bounded_memory_and_let_go() {
    let world = world();
    let service = Service::start(&world.nomad, &world.registry, &[]);
    let api = Api::new(&service.url);
    let repository = world.repository("");
    let mut job = world.job(&repository);
    job["test_commands"] = json!([format!("yes '{}' | head -c 18000000", "a line of a log ".repeat(8))]);
    let (id, status) = api.run(&job).await;
    assert_eq!(status["status"], "SUCCEEDED", "{status:#}");
    let idle = kilobytes(service.process()) >> 10;
    let mut callers = Vec::new();
    for path in ["logs", "logs/stream"].iter().cycle().take(24) {
        let mut caller = std::net::TcpStream::connect(service.url.strip_prefix("http://").unwrap()).unwrap();
        let request =
            format!("GET /jobs/{id}/{path} HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\n\r\n");
        std::io::Write::write_all(&mut caller, request.as_bytes()).unwrap();
        callers.push(caller);
    }
    // As many as are let have their answers ready, and take no more of them than the kernel does.
    wait_for("the answers to callers who do not read", std::time::Duration::from_mins(3), async || {
        let has_begun = |caller: &&std::net::TcpStream| {
            let mut begin = [0; 15];
            caller.set_nonblocking(true).unwrap();
            caller.peek(&mut begin).is_ok() && begin == *b"HTTP/1.1 200 OK"
        };
        (callers.iter().step_by(2).filter(has_begun).count() >= 4).then_some(())
    })
    .await;
    // Who reads gets an answer, once some of the others were let go; until then it is told to ask again.
    let logs = wait_for("answer to who reads it", std::time::Duration::from_mins(3), async || {
        let (status, body) = api.call(reqwest::Method::GET, &format!("/jobs/{id}/logs?tail=1"), None).await;
        assert!(status.is_success() || body["error"]["code"] == "busy", "{status} {body}");
        status.is_success().then_some(body)
    })
    .await;
    assert!(logs["data"]["test"].as_str().unwrap().contains("test succeeded"), "{logs:#}");
    let most = most_kilobytes(service.process()) >> 10;
    assert!(most < idle + 400, "{idle} MiB grew to {most}");
    drop(callers);
}

#[tokio::test]
async fn what_is_asked_wrongly_of_a_log_is_told_by_its_field() {
    let world = world();
    let (_repository, job) = counting(world, 1, ":");
    let id = world.api().submit(&job).await;
    for (query, field) in [
        ("logs?phase=deploy", "phase"),
        ("logs?tail=many", "tail"),
        ("logs/stream?cursor=nonsense", "cursor"),
        ("logs?cursor=x", "cursor"),
    ] {
        let (status, body) =
            world.api().call(reqwest::Method::GET, &format!("/jobs/{id}/{query}"), None).await;
        assert_eq!(status, reqwest::StatusCode::BAD_REQUEST, "{query}");
        assert_eq!(body["error"]["details"][0]["field"], field, "{query}: {body}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_phase_is_read_from_the_allocation_that_it_ran_in_though_nomad_replaced_that_one() {
    let (world, api) = (world(), world().api());
    let sleeper = Sleeper::in_phase("test");
    let id = sleeper.submit(&api).await;
    // From the beginning to where it is cut off, in the build's log.
    let before = read(&world.service.url, &id, "", |message| message["type"] == "log").await;
    let cursor = before.last().unwrap()["cursor"].as_str().unwrap().to_owned();
    assert_eq!(api.post(&format!("/jobs/{id}/kill")).await, json!({"success": true}));
    // Nomad makes another one, in which nothing is done.
    let (started, said) = world.nomad_program(&["job", "start", "-detach", &id]);
    assert!(started, "{said}");
    world.nomad_api().ran_twice(&id).await;

    let all = read_all(&world.service.url, &id, "").await;
    assert!(all.iter().all(|message| message["type"] != "gap"), "{all:#?}");
    let [build, test] = ["build", "test"].map(|phase| lines(&all, phase));
    assert!(test.last().unwrap().contains("told to stop"), "{all:#?}");
    let rest = read_all(&world.service.url, &id, &format!("?cursor={cursor}")).await;
    assert_eq!(lines(&[before, rest].concat(), "build"), build);
    let logs = api.logs(&id).await;
    assert!(logs["missing"].is_null(), "{logs:#}");
    for (phase, lines) in [("build", build), ("test", test)] {
        assert_eq!(logs[phase], lines.iter().map(|line| format!("{line}\n")).collect::<String>(), "{phase}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_runner_says_while_nobody_takes_it_is_a_gap_that_is_named() {
    let (world, api) = (world(), world().api());
    let repository = world.repository("");
    let mut job = world.job(&repository);
    let hold = Hold::new();
    job["test_commands"] = json!(["echo before", hold.command(), "echo behind"]);
    let id = api.submit(&job).await;
    eventually("the first test's output", async || {
        let logs = api.logs(&id).await;
        logs["test"].as_str().unwrap().contains("\nbefore\n").then_some(())
    })
    .await;
    let status = api.status(&id).await;
    crash_log(status["nomad"]["allocation"].as_str().unwrap(), "test");
    hold.let_go().await;
    // A log is no reason to fail what is well.
    assert_eq!(api.wait_for_end(&id).await["status"], "SUCCEEDED");
    let logs = eventually("a text that is final", async || {
        let logs = api.logs(&id).await;
        (!logs["missing"].to_string().contains("ask again")).then_some(logs)
    })
    .await;
    let missing = logs["missing"]["test"].as_str().unwrap();
    assert!(missing.starts_with("lines ") && missing.contains("are missing"), "{logs:#}");
    assert!(!logs["test"].as_str().unwrap().contains("behind"), "{logs:#}");
    let messages = read_all(&world.service.url, &id, "").await;
    let gaps: Vec<_> = messages.iter().filter(|message| message["type"] == "gap").collect();
    assert_eq!(gaps.len(), 1, "{messages:#?}");
    assert_eq!((&gaps[0]["phase"], &gaps[0]["message"]), (&json!("test"), &json!(missing)));
    assert_eq!(messages.last().unwrap()["type"], "end");
}
