//! Which jobs there are, for whoever has lost an ID.

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::support::{numbered, world};

/// The IDs that a list has.
fn ids(listed: &Value) -> Vec<&str> {
    listed["jobs"].as_array().unwrap().iter().map(|job| job["job_id"].as_str().unwrap()).collect()
}

#[tokio::test]
async fn jobs_are_listed_the_newest_first_by_what_is_asked_for_and_a_page_at_a_time() {
    let api = world().api();
    let owner = format!("list-{}", uuid::Uuid::new_v4().simple());
    let mut made = Vec::new();
    for number in 0..5 {
        let mut job = numbered(&owner, number);
        // No node can take it.
        job["resources"] = json!({ "build": { "cpu": 60_000 } });
        made.insert(0, api.submit(&job).await);
    }
    let of = async |query: &str| api.get(&format!("/jobs?owner={owner}{query}")).await;
    let all = of("").await;
    assert_eq!(ids(&all), made);
    assert_eq!(all["next"], Value::Null);
    let latest = &all["jobs"][0];
    assert_eq!(latest["git_ref"], "refs/heads/4");
    assert_eq!((&latest["owner"], &latest["status"]), (&json!(owner), &json!("PENDING")));
    assert_eq!((&latest["image_tags"], &latest["job_end"]), (&json!(["one"]), &Value::Null));
    // Every page, and nothing twice.
    let mut paged = Vec::new();
    let mut before = String::new();
    loop {
        let page = of(&format!("&limit=2{before}")).await;
        paged.extend(ids(&page).iter().map(|&id| id.to_owned()));
        let Some(next) = page["next"].as_str() else { break };
        before = format!("&before={next}");
    }
    assert_eq!(paged, made);
    assert_eq!(ids(&of("&git_ref=refs/heads/2").await), [&*made[2]]);
    assert_eq!(ids(&of("&repo_url=https://git.example.com/other").await), [""; 0]);
    assert_eq!(ids(&of("&namespace=default&limit=1").await), [&*made[0]]);
    assert_eq!(api.post(&format!("/jobs/{}/kill", made[3])).await["success"], true);
    let killed = of("&status=KILLED,FAILED").await;
    assert_eq!(ids(&killed), [&*made[3]]);
    assert_eq!(killed["jobs"][0]["reason"], "killed");
    assert_eq!(ids(&of("&status=PENDING").await), [&*made[0], &*made[1], &*made[2], &*made[4]]);
    let listed = |arguments: &[&str]| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_nomad-build"));
        command.args(["list", "--url", &api.url, "--owner", &owner]).args(arguments);
        let output = command.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let lines = listed(&["--limit", "3"]);
    let firsts: Vec<_> = lines.lines().map(|line| line.split(' ').next().unwrap()).collect();
    assert_eq!(firsts, made[..3]);
    let answer: Value = serde_json::from_str(&listed(&["-o", "json", "--status", "killed"])).unwrap();
    assert_eq!(ids(&answer), [&*made[3]]);
    for id in made {
        api.post(&format!("/jobs/{id}/kill")).await;
    }
}

#[tokio::test]
async fn what_is_wrong_with_a_question_is_told_by_its_parameter() {
    let api = world().api();
    for (query, field) in [
        ("limit=0", "limit"),
        ("limit=1001", "limit"),
        ("limit=many", "limit"),
        ("status=pending", "status"),
        ("status=PENDING,", "status"),
        ("before=yesterday", "before"),
        ("namespace=nowhere", "namespace"),
    ] {
        let (status, body) = api.call(Method::GET, &format!("/jobs?{query}"), None).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{query} {body}");
        assert_eq!(body["error"]["details"][0]["field"], field, "{query} {body}");
    }
    let (status, body) = api.call(Method::GET, "/jobs?colour=blue", None).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    assert!(body["error"]["message"].as_str().unwrap().contains("colour"), "{body}");
}
