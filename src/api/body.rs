//! The JSON that a request carries, within a time.

use std::time::Duration;

use axum::Json;
use axum::extract::{FromRequest, Request};
use serde_json::Value;

use super::App;
use super::answer::{Code, Problem};

/// How long a body may take.
const TAKES: Duration = Duration::from_secs(30);

/// A request's body.
pub(super) struct Sent(pub(super) Value);

impl FromRequest<App> for Sent {
    type Rejection = Problem;

    async fn from_request(request: Request, app: &App) -> Result<Self, Problem> {
        let read = tokio::time::timeout(TAKES, Json::from_request(request, app)).await;
        let late = || Problem::new(Code::RequestTimeout, "the body did not come within 30 s: send it again");
        let Json(body) = read.map_err(|_| late())??;
        Ok(Self(body))
    }
}
