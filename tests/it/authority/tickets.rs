//! A ticket opens the log of one job once, as its holder's token would.

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use super::{guarded_with, run_something, waiting};
use crate::support::{Api, eventually, world};

#[tokio::test]
async fn a_ticket_opens_one_stream_of_one_job_once_and_for_no_longer_than_its_holder_may_read() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("audit.jsonl");
    let variables = [("NOMAD_BUILD_AUDIT_FILE", file.to_str().unwrap())];
    let (nomad, service, _token) = guarded_with(&world().registry, &variables).await;
    run_something(&nomad).await;
    let builder = nomad.builder().await;
    let (api, nobody) = (Api::with_token(&service.url, &builder.secret), Api::new(&service.url));
    let (id, other) = (api.submit(&waiting()).await, api.submit(&waiting()).await);
    nomad.owns(&id);
    nomad.owns(&other);
    let tickets = format!("/jobs/{id}/logs/tickets");
    assert_eq!(nobody.call(Method::POST, &tickets, None).await.0, StatusCode::UNAUTHORIZED);
    let gone = "/jobs/nb-0193a1c2-7e57-7000-8000-000000000000/logs/tickets";
    assert_eq!(api.call(Method::POST, gone, None).await.0, StatusCode::NOT_FOUND);
    let stranger = nomad.caller("namespace \"builds\" { capabilities = [\"read-job\"] }").await;
    let stranger = Api::with_token(&service.url, &stranger.secret);
    assert_eq!(stranger.call(Method::POST, &tickets, None).await.0, StatusCode::FORBIDDEN);
    let ticket = async || api.post(&tickets).await["ticket"].as_str().unwrap().to_owned();
    let opens = async |id: &str, ticket: &str| nobody.stream(id, &format!("?ticket={ticket}")).await;

    // Its Variable does not tell the token.
    let first = ticket().await;
    let listed =
        nomad.call(Method::GET, "vars?namespace=builds&prefix=nomad-build/tickets/", &Value::Null).await;
    let path = listed[0]["Path"].as_str().unwrap().to_owned();
    let variable = nomad.call(Method::GET, &format!("var/{path}?namespace=builds"), &Value::Null).await;
    assert!(!variable.to_string().contains(&builder.secret) && !variable.to_string().contains(&first));
    assert_eq!(opens(&other, &first).await.status(), StatusCode::UNAUTHORIZED, "another job's log");
    // A mistake does not use it up.
    let wrong = nobody.stream(&id, &format!("?ticket={first}&cursor=none")).await;
    assert_eq!(wrong.status(), StatusCode::BAD_REQUEST);
    let mut stream = opens(&id, &first).await;
    assert_eq!(stream.status(), StatusCode::OK);
    assert!(stream.chunk().await.unwrap().is_some());
    assert_eq!(opens(&id, &first).await.status(), StatusCode::UNAUTHORIZED, "used");
    let both = api.stream(&id, &format!("?ticket={}", ticket().await)).await;
    assert_eq!(both.status(), StatusCode::BAD_REQUEST);
    // Of many that come with it at once, one is let in.
    let second = ticket().await;
    let at_once = futures_util::future::join_all((0..8).map(|_| opens(&id, &second))).await;
    let let_in = at_once.iter().filter(|answer| answer.status() == StatusCode::OK).count();
    assert_eq!(let_in, 1);
    drop(at_once);
    let told = std::fs::read_to_string(&file).unwrap();
    let line = |action: &str, status: u16| {
        let of = |line: &str| serde_json::from_str::<Value>(line).unwrap();
        told.lines().map(of).find(|line| line["action"] == action && line["status"] == status).unwrap()
    };
    assert_eq!(line("follow_logs", 200)["who"], json!(builder.accessor));
    assert_eq!(line("ticket", 200)["who"], json!(builder.accessor));
    assert!(!told.contains(&first) && !told.contains(&builder.secret));

    // Whoever holds it loses the stream with the right to read.
    nomad.call(Method::DELETE, &format!("acl/token/{}", builder.accessor), &Value::Null).await;
    let ended = async { while stream.chunk().await.unwrap().is_some() {} };
    tokio::time::timeout(std::time::Duration::from_mins(1), ended).await.expect("the stream ends");
    eventually("no ticket's Variable is left", async || {
        let left =
            nomad.call(Method::GET, "vars?namespace=builds&prefix=nomad-build/tickets/", &Value::Null).await;
        left.as_array().is_none_or(Vec::is_empty).then_some(())
    })
    .await;
}
