//! What Nomad and its templates ask of Vault: a login by a JWT of Nomad's, which is held against Nomad's keys, and secrets, of which
//! each namespace may read its own. It says what Vault 1.21 says.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use aws_lc_rs::signature::{RSA_PKCS1_2048_8192_SHA256, RsaPublicKeyComponents};
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{any, get};
use axum::{Json, Router};
use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use serde_json::{Value, json};
use uuid::Uuid;

/// Whom a token is of: what Nomad says of a task.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Identity {
    pub(crate) namespace: String,
    pub(crate) job: String,
    pub(crate) task: String,
    pub(crate) role: String,
}

pub(crate) struct Vault {
    pub(crate) url: String,
    /// By path, behind `secret/data/`.
    secrets: BTreeMap<String, Value>,
    nomad: Mutex<String>,
    tokens: Mutex<BTreeMap<String, Identity>>,
    /// Who read what.
    reads: Mutex<Vec<(Identity, String)>>,
    /// While somebody has it, no secret is answered.
    pub(crate) silence: tokio::sync::RwLock<()>,
    /// The task that may read nothing.
    pub(crate) refused: Mutex<Option<&'static str>>,
}

impl Vault {
    /// Serves secrets as long as the test runs.
    pub(crate) async fn serve<const N: usize>(secrets: [(&str, Value); N]) -> Arc<Self> {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let vault = Arc::new(Self {
            url: format!("http://{}", listener.local_addr().unwrap()),
            secrets: secrets.into_iter().map(|(path, items)| (path.to_owned(), items)).collect(),
            nomad: Mutex::default(),
            tokens: Mutex::default(),
            reads: Mutex::default(),
            silence: tokio::sync::RwLock::default(),
            refused: Mutex::default(),
        });
        let routes = Router::new()
            .route("/v1/sys/seal-status", get(seal))
            .route("/v1/auth/jwt-nomad/login", any(login))
            .route("/v1/auth/token/{what}", any(token))
            .route("/v1/sys/internal/ui/mounts/{*path}", get(mount))
            .route("/v1/secret/data/{*path}", get(read))
            .with_state(Arc::clone(&vault));
        tokio::spawn(async move { axum::serve(listener, routes).await });
        vault
    }

    /// How Nomad is told of it, in its agent's configuration. A secret that cannot be read is asked for once more, and no longer.
    pub(crate) fn configuration(&self) -> String {
        format!(
            "vault {{\n enabled = true\n address = {:?}\n default_identity {{\n aud = [\"vault.io\"]\n ttl = \"1h\"\n }}\n}}\n\
             client {{\n template {{\n vault_retry {{\n attempts = 2\n backoff = \"100ms\"\n max_backoff = \"100ms\"\n }}\n }}\n}}",
            self.url
        )
    }

    /// Tells it where the keys are that it trusts.
    pub(crate) fn trust(&self, nomad: &str) {
        nomad.clone_into(&mut self.nomad.lock().unwrap());
    }

    /// Who read what, without those that read it again.
    pub(crate) fn reads(&self) -> Vec<(Identity, String)> {
        let mut reads = self.reads.lock().unwrap().clone();
        reads.sort();
        reads.dedup();
        reads
    }

    /// What a JWT says that one of the keys signed which Nomad has now.
    async fn claims(&self, jwt: &str) -> Option<Value> {
        let url = format!("{}/.well-known/jwks.json", self.nomad.lock().unwrap());
        let keys: Value = reqwest::get(url).await.ok()?.json().await.ok()?;
        let (signed, signature) = jwt.rsplit_once('.')?;
        let decode = |text: &str| BASE64_URL_SAFE_NO_PAD.decode(text).ok();
        let signature = decode(signature)?;
        let is_of = |key: &Value| {
            let (n, e) = (decode(key["n"].as_str()?)?, decode(key["e"].as_str()?)?);
            let key = RsaPublicKeyComponents { n, e };
            key.verify(&RSA_PKCS1_2048_8192_SHA256, signed.as_bytes(), &signature).ok()
        };
        keys["keys"].as_array()?.iter().find_map(is_of)?;
        let claims: Value = serde_json::from_slice(&decode(signed.split_once('.')?.1)?).ok()?;
        let now = chrono::Utc::now().timestamp();
        let is_good = claims["aud"] == "vault.io" && claims["exp"].as_i64()? > now;
        is_good.then_some(claims)
    }
}

type Shared = State<Arc<Vault>>;

fn refused(status: StatusCode, why: &str) -> Response {
    (status, Json(json!({ "errors": [why] }))).into_response()
}

async fn seal() -> Json<Value> {
    Json(
        json!({ "initialized": true, "sealed": false, "type": "shamir", "t": 1, "n": 1, "progress": 0, "version": "1.21.4", "cluster_name": "it" }),
    )
}

fn auth(token: &str) -> Json<Value> {
    Json(json!({ "auth": {
        "client_token": token, "accessor": "none", "policies": ["builds"], "token_policies": ["builds"],
        "lease_duration": 3600, "renewable": true, "token_type": "service", "entity_id": "", "orphan": true,
    } }))
}

async fn login(State(vault): Shared, body: String) -> Response {
    let body: Value = serde_json::from_str(&body).unwrap_or_default();
    let Some(claims) = vault.claims(body["jwt"].as_str().unwrap_or_default()).await else {
        return refused(StatusCode::BAD_REQUEST, "error validating token");
    };
    let text = |of: &Value| of.as_str().unwrap_or_default().to_owned();
    let task = Identity {
        namespace: text(&claims["nomad_namespace"]),
        job: text(&claims["nomad_job_id"]),
        task: text(&claims["nomad_task"]),
        role: text(&body["role"]),
    };
    let token = format!("hvs.{}", Uuid::new_v4());
    vault.tokens.lock().unwrap().insert(token.clone(), task);
    auth(&token).into_response()
}

fn holder(vault: &Vault, headers: &HeaderMap) -> Option<(String, Identity)> {
    let token = headers.get("x-vault-token")?.to_str().ok()?.to_owned();
    let task = vault.tokens.lock().unwrap().get(&token).cloned()?;
    Some((token, task))
}

async fn token(State(vault): Shared, Path(what): Path<String>, headers: HeaderMap) -> Response {
    let Some((token, _)) = holder(&vault, &headers) else {
        return refused(StatusCode::FORBIDDEN, "permission denied");
    };
    match what.as_str() {
        "renew-self" => auth(&token).into_response(),
        "revoke-self" => {
            vault.tokens.lock().unwrap().remove(&token);
            StatusCode::NO_CONTENT.into_response()
        }
        _ => Json(json!({ "data": { "id": token, "ttl": 3600, "renewable": true, "policies": ["builds"] } }))
            .into_response(),
    }
}

async fn mount() -> Json<Value> {
    Json(json!({ "data": { "path": "secret/", "type": "kv", "options": { "version": "2" } } }))
}

async fn read(State(vault): Shared, Path(path): Path<String>, headers: HeaderMap) -> Response {
    let Some((_, task)) =
        holder(&vault, &headers).filter(|(_, task)| path.starts_with(&format!("{}/", task.namespace)))
    else {
        return refused(StatusCode::FORBIDDEN, "permission denied");
    };
    drop(vault.silence.read().await);
    if vault.refused.lock().unwrap().is_some_and(|refused| refused == task.task) {
        return refused(StatusCode::FORBIDDEN, "permission denied");
    }
    vault.reads.lock().unwrap().push((task, path.clone()));
    match vault.secrets.get(&path) {
        Some(items) => Json(json!({
            "request_id": "", "lease_id": "", "renewable": false, "lease_duration": 0,
            "data": { "data": items, "metadata": { "version": 1, "created_time": "2026-01-01T00:00:00Z", "deletion_time": "", "destroyed": false } },
        }))
        .into_response(),
        None => (StatusCode::NOT_FOUND, Json(json!({ "errors": [] }))).into_response(),
    }
}
