//! `login` and `logout`: a token of Nomad's, by an identity provider in the browser.

use std::process::{Command, Stdio};
use std::time::Duration;

use axum::Router;
use axum::extract::{Query, State};
use axum::routing::get;
use chrono::{DateTime, Utc};
use reqwest::{Method, StatusCode, Url};
use secrecy::SecretString;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::mpsc;

use super::client::{Client, read};
use super::tokens::{Kept, Tokens, secret};
use super::{Error, Exit, Format, Globals, Output, harmless};

/// How long somebody may take in the browser: as long as Nomad remembers the login (1.11: 5 minutes).
const PATIENCE: Duration = Duration::from_mins(5);

/// The arguments of `login`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Nomad's auth method, where the service offers several
    #[arg(long, value_name = "NAME")]
    method: Option<String>,
    /// Where the browser comes back to; the auth method has to allow http://HOST:PORT/oidc/callback
    #[arg(long, default_value = "localhost:4649", value_name = "HOST:PORT")]
    callback: String,
    /// Open no browser: print the address only
    #[arg(long)]
    no_browser: bool,
}

#[derive(Deserialize)]
struct Methods {
    methods: Vec<Offered>,
}

#[derive(Deserialize)]
struct Offered {
    name: String,
    r#type: String,
}

#[derive(Deserialize)]
struct Address {
    auth_url: String,
}

#[derive(Deserialize)]
struct Made {
    #[serde(deserialize_with = "secret")]
    token: SecretString,
    #[serde(default)]
    accessor: String,
    expires_at: Option<DateTime<Utc>>,
}

/// What the identity provider has the browser bring.
#[derive(Debug, Deserialize)]
struct Answer {
    code: Option<String>,
    state: Option<String>,
    iss: Option<String>,
    error: Option<String>,
    error_description: Option<String>,
}

/// Logs in, and keeps the token for the commands after this one.
pub(super) async fn run(args: Args, globals: &Globals, output: &mut Output) -> Result<Exit, Error> {
    let client = Client::without_token(globals)?;
    let tokens = tokens()?;
    let method = method(&client, args.method).await?;
    let doing = format!("logging in at {} by {method}", client.base());
    let failed = || Error::new(Exit::Failure, &doing);
    let listener = TcpListener::bind(&args.callback).await.map_err(|source| {
        let doing = format!("listening on {} for the browser to come back", args.callback);
        Error::new(Exit::Failure, doing).caused_by(source).hint("--callback names another address")
    })?;
    let redirect_uri = format!("http://{}/oidc/callback", args.callback);
    let nonce = uuid::Uuid::new_v4().simple().to_string();
    let mut body =
        json!({ "method": method, "oidc": { "redirect_uri": redirect_uri, "client_nonce": nonce } });
    let url = || client.url(&["auth", "login"], &[]);
    let begun = client.call(&doing, Method::POST, url(), Some(&body)).await?;
    let Address { auth_url } = read("the login that was begun", &begun)?;
    output.note(&format!("open this in a browser, and log in:\n\n    {}\n", harmless::text(&auth_url)));
    if !args.no_browser {
        open_browser(&auth_url);
    }
    let answer = tokio::time::timeout(PATIENCE, come_back(listener, &auth_url)).await;
    let answer = answer.map_err(|_| failed().caused_by("nobody came back within 5 minutes"))??;
    let (Some(code), Some(state)) = (answer.code, answer.state) else {
        let said =
            [answer.error, answer.error_description].into_iter().flatten().collect::<Vec<_>>().join(": ");
        return Err(failed().caused_by(format!("the identity provider did not let anybody in ({said})")));
    };
    for (name, value) in [("code", Some(code)), ("state", Some(state)), ("iss", answer.iss)] {
        body["oidc"][name] = value.map_or(Value::Null, Value::String);
    }
    let made = client.call(&doing, Method::POST, url(), Some(&body)).await?;
    let Made { token, accessor, expires_at } = read("the login", &made)?;
    tokens.keep(client.base(), Kept { token, accessor: accessor.clone(), expires_at })?;
    let until =
        expires_at.map_or_else(String::new, |end| format!(" until {}", end.format("%Y-%m-%d %H:%M:%S UTC")));
    match output.format() {
        // The token itself is for no terminal and no log.
        Format::Json => {
            output.line(&json!({ "accessor": accessor, "expires_at": expires_at }).to_string())?;
        }
        Format::Text => output.note(&format!("logged in at {}{until}", client.base())),
    }
    Ok(Exit::Success)
}

/// Forgets the token of a service.
pub(super) fn log_out(globals: &Globals, output: &mut Output) -> Result<Exit, Error> {
    let client = Client::without_token(globals)?;
    let had = tokens()?.forget(client.base())?;
    let what =
        if had { "the token is forgotten; Nomad takes it until it expires" } else { "there is no token" };
    output.note(&format!("{}: {what}", client.base()));
    Ok(Exit::Success)
}

fn tokens() -> Result<Tokens, Error> {
    let nowhere =
        || Error::new(Exit::Usage, "finding a place for tokens: neither HOME nor XDG_CONFIG_HOME is set");
    Tokens::of_user().ok_or_else(nowhere)
}

/// The auth method to use: that which is named, or the only one.
async fn method(client: &Client, wanted: Option<String>) -> Result<String, Error> {
    let doing = format!("asking {} how to log in", client.base());
    let data = client.call(&doing, Method::GET, client.url(&["auth", "login"], &[]), None).await?;
    let Methods { mut methods } = read("the question how to log in", &data)?;
    methods.retain(|method| method.r#type == "OIDC");
    let names: Vec<_> = methods.iter().map(|method| method.name.as_str()).collect();
    let choice = wanted.or_else(|| if let [only] = names[..] { Some(only.to_owned()) } else { None });
    choice.ok_or_else(|| match names.join(", ") {
        names if names.is_empty() => Error::new(Exit::Failure, doing)
            .caused_by("nobody can log in there by a browser")
            .hint("its operator can offer an auth method of Nomad's (NOMAD_BUILD_LOGIN_METHODS); NOMAD_TOKEN takes a token that you have"),
        names => Error::new(Exit::Usage, doing).caused_by(format!("there are several auth methods: {names}")).hint("name one by --method"),
    })
}

/// What a page of ours needs to know.
#[derive(Clone)]
struct Awaited {
    came: mpsc::Sender<Answer>,
    /// By which an answer is known to be that of this login.
    state: Option<String>,
}

async fn answered(
    State(awaited): State<Awaited>,
    Query(answer): Query<Answer>,
) -> Result<&'static str, (StatusCode, &'static str)> {
    // Any page can have a browser ask for this address.
    if awaited.state.is_some() && answer.state != awaited.state {
        return Err((StatusCode::BAD_REQUEST, "This is not the login that was begun."));
    }
    // Whoever comes second is told the same.
    awaited.came.try_send(answer).ok();
    Ok("Back to the terminal: this page can be closed.")
}

/// Waits for the browser to come back from where it was sent.
async fn come_back(listener: TcpListener, from: &str) -> Result<Answer, Error> {
    let sent = Url::parse(from).ok();
    let state = sent.and_then(|url| {
        url.query_pairs().find(|(name, _)| name == "state").map(|(_, state)| state.into_owned())
    });
    let (came, mut comes) = mpsc::channel(1);
    let pages = Router::new().route("/oidc/callback", get(answered)).with_state(Awaited { came, state });
    let (done, is_done) = tokio::sync::oneshot::channel::<()>();
    let serving = axum::serve(listener, pages).with_graceful_shutdown(async move { drop(is_done.await) });
    #[expect(clippy::disallowed_methods, reason = "it is waited for below")]
    let serving = tokio::spawn(async move { serving.await });
    let answer = comes.recv().await;
    // The page is sent before this ends.
    drop(done);
    tokio::time::timeout(Duration::from_secs(1), serving).await.ok();
    answer.ok_or_else(|| Error::new(Exit::Failure, "waiting for the browser: the listener ended"))
}

/// Opens a browser, where there is a program for that. The address is printed anyway.
fn open_browser(address: &str) {
    let is_web = Url::parse(address).is_ok_and(|url| matches!(url.scheme(), "http" | "https"));
    if !is_web {
        return;
    }
    let program = if cfg!(target_os = "macos") { "open" } else { "xdg-open" };
    let mut command = Command::new(program);
    command.arg(address).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.spawn().map(drop).ok();
}
