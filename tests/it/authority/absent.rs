//! What is not to be seen is answered for like what is not there: whole answers are compared, and not their codes alone.

use reqwest::Method;
use serde_json::Value;

use crate::support::Api;

/// What is asked of a job: by which method, where, and with which headers; and the capability that it needs.
type Asked = (Method, &'static str, &'static [(&'static str, &'static str)], &'static str);

const EVENTS: (&str, &str) = ("accept", "text/event-stream");

const ASKED: [Asked; 14] = [
    (Method::GET, "status", &[], "read-job"),
    (Method::HEAD, "status", &[], "read-job"),
    (Method::DELETE, "status", &[], "read-job"),
    (Method::GET, "logs", &[], "read-logs"),
    (Method::GET, "logs?tail=none", &[], "read-logs"),
    (Method::GET, "logs/stream", &[EVENTS], "read-logs"),
    (Method::GET, "logs/stream", &[], "read-logs"),
    (Method::GET, "logs/stream", &[EVENTS, ("last-event-id", "end")], "read-logs"),
    (Method::GET, "logs/stream?cursor=none", &[EVENTS], "read-logs"),
    (Method::GET, "logs/stream?ticket=none", &[EVENTS], "read-logs"),
    (
        Method::GET,
        "logs/stream",
        &[
            ("connection", "upgrade"),
            ("upgrade", "websocket"),
            ("sec-websocket-version", "13"),
            ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
        ],
        "read-logs",
    ),
    (Method::POST, "logs/tickets", &[], "read-logs"),
    (Method::POST, "kill", &[], "dispatch-job"),
    (Method::POST, "cleanup", &[], "dispatch-job"),
];

/// Asks for a job that is hidden and for one that is not there, by every request that needs what `lacks` says the caller lacks.
pub(super) async fn look_alike(
    api: &Api,
    hidden: &str,
    absent: &str,
    who: &str,
    lacks: impl Fn(&str) -> bool,
) {
    for (method, route, headers, _) in ASKED.into_iter().filter(|(.., capability)| lacks(capability)) {
        let ask = async |id: &str| {
            let answer = api.whole(&method, &format!("/jobs/{id}/{route}"), headers, None).await;
            answer.replace(id, "this job")
        };
        assert_eq!(ask(hidden).await, ask(absent).await, "{who}: {method} {route} {headers:?}");
    }
}

/// Asks for the jobs of a namespace in which the caller may nothing, and for those of one that is not there, and submits to both.
/// Their names are of one length.
pub(super) async fn namespaces_look_alike(api: &Api, hidden: &str, absent: &str, who: &str, job: &Value) {
    for (method, route) in
        [(Method::GET, "/jobs?namespace="), (Method::POST, "/jobs"), (Method::POST, "/jobs?dry_run=true")]
    {
        let ask = async |namespace: &str| {
            let named = if method == Method::GET { namespace } else { "" };
            let mut job = job.clone();
            job["namespace"] = namespace.into();
            let body = (method == Method::POST).then_some(&job);
            api.whole(&method, &format!("{route}{named}"), &[], body).await
        };
        let [told, wanted] = [ask(hidden).await, ask(absent).await];
        // Who may submit nowhere is told of the first namespace, whichever was named.
        if told != wanted {
            let like = |text: &str, name| text.replace(name, "this one");
            assert_eq!(like(&told, hidden), like(&wanted, absent), "{who}: {method} {route}");
        }
    }
}
