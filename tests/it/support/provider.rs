//! An identity provider for people, by OIDC: whoever comes is let in at once, as one of those who build.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Redirect, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use reqwest::Url;
use serde_json::{Value, json};
use uuid::Uuid;

use super::Issuer;

/// The client that Nomad is to it.
pub(crate) const CLIENT: &str = "nomad";

pub(crate) struct Provider {
    pub(crate) url: String,
    issuer: Issuer,
    /// The nonces of logins, by the codes that were given out for them.
    codes: Mutex<HashMap<String, String>>,
}

type Parameters = HashMap<String, String>;

impl Provider {
    pub(crate) async fn serve() -> Arc<Self> {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let provider = Arc::new(Self { url, issuer: Issuer::new(), codes: Mutex::default() });
        let routes = Router::new()
            .route("/.well-known/openid-configuration", get(configuration))
            .route("/jwks", get(keys))
            .route("/authorize", get(authorize))
            .route("/token", post(token))
            .with_state(Arc::clone(&provider));
        tokio::spawn(async move { axum::serve(listener, routes).await });
        provider
    }

    /// What Nomad has to know of it, where people come back to these addresses.
    pub(crate) fn auth_method(&self, name: &str, redirects: &[String]) -> Value {
        let config = json!({
            "OIDCDiscoveryURL": self.url, "OIDCClientID": CLIENT, "OIDCClientSecret": "s3cret",
            "OIDCDisableUserInfo": true, "BoundAudiences": [CLIENT], "AllowedRedirectURIs": redirects,
            "SigningAlgs": ["ES256"], "ListClaimMappings": { "groups": "groups" },
        });
        json!({ "Name": name, "Type": "OIDC", "TokenLocality": "local", "MaxTokenTTL": "10m", "Config": config })
    }
}

async fn configuration(State(provider): State<Arc<Provider>>) -> Json<Value> {
    let at = |path: &str| format!("{}/{path}", provider.url);
    Json(json!({
        "issuer": provider.url, "authorization_endpoint": at("authorize"), "token_endpoint": at("token"),
        "jwks_uri": at("jwks"), "response_types_supported": ["code"], "subject_types_supported": ["public"],
        "id_token_signing_alg_values_supported": ["ES256"],
    }))
}

async fn keys(State(provider): State<Arc<Provider>>) -> Json<Value> {
    Json(json!({ "keys": [provider.issuer.jwk()] }))
}

async fn authorize(State(provider): State<Arc<Provider>>, Query(of): Query<Parameters>) -> Redirect {
    let code = Uuid::new_v4().to_string();
    provider.codes.lock().unwrap().insert(code.clone(), of["nonce"].clone());
    let mut back = of["redirect_uri"].parse::<Url>().unwrap();
    back.query_pairs_mut().extend_pairs([("code", &code), ("state", &of["state"])]);
    Redirect::to(back.as_str())
}

async fn token(State(provider): State<Arc<Provider>>, body: String) -> Response {
    let form = Url::parse(&format!("http://form/?{body}")).unwrap();
    let code = form.query_pairs().find(|(name, _)| name == "code").map(|(_, code)| code.into_owned());
    let Some(nonce) = code.and_then(|code| provider.codes.lock().unwrap().remove(&code)) else {
        return (StatusCode::BAD_REQUEST, Json(json!({ "error": "invalid_grant" }))).into_response();
    };
    let now = chrono::Utc::now().timestamp();
    let claims = json!({
        "iss": provider.url, "aud": CLIENT, "sub": "alice", "nonce": nonce, "groups": ["builders"],
        "iat": now, "exp": now + 600,
    });
    let token = provider.issuer.sign(&claims);
    Json(json!({ "access_token": "for nothing", "token_type": "Bearer", "expires_in": 600, "id_token": token }))
        .into_response()
}
