//! The service's API as a caller sees it.

use std::time::Duration;

use reqwest::{Method, StatusCode};
use serde_json::Value;

use super::{asking_every, eventually, openapi};

/// A client.
#[derive(Clone)]
pub(crate) struct Api {
    pub(crate) url: String,
    http: reqwest::Client,
}

impl Api {
    pub(crate) fn new(url: &str) -> Self {
        Self { url: url.to_owned(), http: reqwest::Client::builder().tls_certs_only([]).build().unwrap() }
    }

    /// The client of a caller who has a Nomad token.
    pub(crate) fn with_token(url: &str, token: &str) -> Self {
        Self::showing(url, "x-nomad-token", token)
    }

    /// The same, which shows it as a scheme of `Authorization`: `Bearer`, in upper or lower case.
    pub(crate) fn with_bearer(url: &str, scheme: &str, token: &str) -> Self {
        Self::showing(url, "authorization", &format!("{scheme} {token}"))
    }

    fn showing(url: &str, header: &'static str, value: &str) -> Self {
        let mut value = reqwest::header::HeaderValue::from_str(value).unwrap();
        value.set_sensitive(true);
        let headers = [(reqwest::header::HeaderName::from_static(header), value)];
        let http =
            reqwest::Client::builder().tls_certs_only([]).default_headers(headers.into_iter().collect());
        Self { url: url.to_owned(), http: http.build().unwrap() }
    }

    /// Opens a job's log as server-sent events.
    pub(crate) async fn stream(&self, id: &str, query: &str) -> reqwest::Response {
        let request = self.http.get(format!("{}/jobs/{id}/logs/stream{query}", self.url));
        request.header("Accept", "text/event-stream").send().await.unwrap()
    }

    /// All that is answered to a request, as a text of its status, headers and body, but the time. It must end by itself.
    pub(crate) async fn whole(
        &self,
        method: &Method,
        path: &str,
        headers: &[(&str, &str)],
        body: Option<&Value>,
    ) -> String {
        let mut request = self.http.request(method.clone(), format!("{}{path}", self.url));
        request = request.header("x-request-id", "whole").timeout(Duration::from_secs(30));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        if let Some(body) = body {
            request = request.json(body);
        }
        let answer = request.send().await.unwrap();
        let mut whole = format!("{:?} {}\n", answer.version(), answer.status());
        for (name, value) in answer.headers().iter().filter(|(name, _)| *name != "date") {
            whole += &format!("{name}: {}\n", value.to_str().unwrap());
        }
        let body = answer.text().await.unwrap();
        let told = serde_json::from_str(&body).unwrap_or(Value::Null);
        whole + &told["timestamp"].as_str().map_or_else(|| body.clone(), |time| body.replace(time, ""))
    }

    /// Sends a request and reads its answer, whatever it is.
    pub(crate) async fn call(&self, method: Method, path: &str, body: Option<&Value>) -> (StatusCode, Value) {
        let mut request = self.http.request(method.clone(), format!("{}{path}", self.url));
        if let Some(body) = body {
            request = request.json(body);
        }
        let (status, body) = Self::answer(request).await;
        openapi::check(&method, path, status, &body);
        (status, body)
    }

    /// The same; none where there is no answer.
    pub(crate) async fn try_call(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> Option<(StatusCode, Value)> {
        let mut request = self.http.request(method, format!("{}{path}", self.url));
        if let Some(body) = body {
            request = request.json(body);
        }
        Self::try_answer(request).await
    }

    /// Submits a job with a key; none where there is no answer.
    pub(crate) async fn try_keyed(&self, key: &str, job: &Value) -> Option<(StatusCode, Value)> {
        let request = self.http.post(format!("{}/jobs", self.url)).header("Idempotency-Key", key).json(job);
        Self::try_answer(request).await
    }

    async fn try_answer(request: reqwest::RequestBuilder) -> Option<(StatusCode, Value)> {
        let response = request.timeout(std::time::Duration::from_secs(30)).send().await.ok()?;
        let status = response.status();
        let text = response.text().await.ok()?;
        Some((status, serde_json::from_str(&text).unwrap_or(Value::String(text))))
    }

    /// Submits a job with a key, and reads the answer, whatever it is.
    pub(crate) async fn keyed(&self, key: &str, job: &Value) -> (StatusCode, Value) {
        let request = self.http.post(format!("{}/jobs", self.url)).header("Idempotency-Key", key).json(job);
        Self::answer(request).await
    }

    /// Submits a job with a key, again and again until it is accepted; returns its ID.
    pub(crate) async fn submit_keyed(&self, key: &str, job: &Value) -> String {
        eventually("a submission that is accepted", async || {
            let (status, body) = self.keyed(key, job).await;
            assert!(status.is_success() || status == StatusCode::SERVICE_UNAVAILABLE, "{status} {body}");
            body["data"]["job_id"].as_str().map(str::to_owned)
        })
        .await
    }

    async fn answer(request: reqwest::RequestBuilder) -> (StatusCode, Value) {
        let response = request.send().await.unwrap();
        let status = response.status();
        let text = response.text().await.unwrap();
        (status, serde_json::from_str(&text).unwrap_or(Value::String(text)))
    }

    /// Reads a path whose answer must be 200; returns its data.
    pub(crate) async fn get(&self, path: &str) -> Value {
        let (status, body) = self.call(Method::GET, path, None).await;
        assert_eq!(status, StatusCode::OK, "{path}: {body}");
        body["data"].clone()
    }

    /// Posts to a path whose answer must be 200; returns its data.
    pub(crate) async fn post(&self, path: &str) -> Value {
        let (status, body) = self.call(Method::POST, path, None).await;
        assert_eq!(status, StatusCode::OK, "{path}: {body}");
        body["data"].clone()
    }

    /// Submits a job that must be accepted; returns its ID.
    pub(crate) async fn submit(&self, job: &Value) -> String {
        let (status, body) = self.call(Method::POST, "/jobs", Some(job)).await;
        assert_eq!(status, StatusCode::OK, "{body}");
        body["data"]["job_id"].as_str().unwrap().to_owned()
    }

    pub(crate) async fn status(&self, id: &str) -> Value {
        self.get(&format!("/jobs/{id}/status")).await
    }

    /// Waits until a job's status satisfies `holds`.
    pub(crate) async fn wait_until(&self, id: &str, what: &str, holds: impl Fn(&Value) -> bool) -> Value {
        eventually(what, async || Some(self.status(id).await).filter(|status| holds(status))).await
    }

    /// Waits for a job's final status.
    pub(crate) async fn wait_for_end(&self, id: &str) -> Value {
        self.ends_within(Duration::from_secs(90), id).await
    }

    /// The same for a job that is to end by a timeout, and the minute after it.
    pub(crate) async fn wait_for_late_end(&self, id: &str) -> Value {
        self.ends_within(Duration::from_mins(4), id).await
    }

    /// All tests together ask so often that asking takes a good part of the machine; an end stays.
    async fn ends_within(&self, most: Duration, id: &str) -> Value {
        let ended = async || Some(self.status(id).await).filter(has_ended);
        asking_every(Duration::from_millis(300), most, "the end of the job", ended).await
    }

    /// Submits a job and waits for its end; returns its ID and last status.
    pub(crate) async fn run(&self, job: &Value) -> (String, Value) {
        let id = self.submit(job).await;
        let status = self.wait_for_end(&id).await;
        (id, status)
    }

    /// A job's whole log.
    pub(crate) async fn logs(&self, id: &str) -> Value {
        self.get(&format!("/jobs/{id}/logs")).await
    }
}

fn has_ended(status: &Value) -> bool {
    matches!(status["status"].as_str(), Some("SUCCEEDED" | "FAILED" | "KILLED" | "LOST"))
}
