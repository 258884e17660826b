//! People log in by an identity provider, and the commands after that have the token.

use std::io::{BufRead as _, BufReader, Read as _};
use std::path::Path;
use std::process::{Command, Stdio};

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use super::guarded_with;
use crate::support::provider::Provider;
use crate::support::{Api, Guarded, ports, world};

/// Has Nomad let in those whom a provider calls builders.
async fn trust(nomad: &Guarded, provider: &Provider, redirect: &str) {
    let method = provider.auth_method("people", &[redirect.to_owned()]);
    nomad.call(Method::POST, "acl/auth-method", &method).await;
    let policy = nomad.builders().await;
    let selector = "\"builders\" in list.groups";
    let rule =
        json!({ "AuthMethod": "people", "BindType": "policy", "BindName": policy, "Selector": selector });
    nomad.call(Method::POST, "acl/binding-rule", &rule).await;
}

/// A command of somebody who has a folder for what is kept, and no token in the environment.
fn command(service: &str, home: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nomad-build"));
    command.args(arguments).args(["--url", service]).env_remove("NOMAD_TOKEN").env("XDG_CONFIG_HOME", home);
    command
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn somebody_logs_in_in_a_browser_and_the_commands_after_that_have_the_token() {
    let provider = Provider::serve().await;
    let folder = tempfile::tempdir().unwrap();
    let audit = folder.path().join("audit.jsonl");
    let variables =
        [("NOMAD_BUILD_LOGIN_METHODS", "people"), ("NOMAD_BUILD_AUDIT_FILE", audit.to_str().unwrap())];
    let (nomad, service, _token) = guarded_with(&world().registry, &variables).await;
    let callback = format!("localhost:{}", ports::port());
    trust(&nomad, &provider, &format!("http://{callback}/oidc/callback")).await;
    let run = |arguments: &[&str]| command(&service.url, folder.path(), arguments).output().unwrap();
    let listed = run(&["list"]);
    let said = String::from_utf8(listed.stderr).unwrap();
    assert!(!listed.status.success() && said.contains("nomad-build login"), "{said}");

    let mut login = command(&service.url, folder.path(), &["login", "--no-browser", "--callback", &callback]);
    let mut login = login.stderr(Stdio::piped()).spawn().unwrap();
    let mut told = BufReader::new(login.stderr.take().unwrap());
    let address = loop {
        let mut line = String::new();
        assert!(told.read_line(&mut line).unwrap() > 0, "no address was told");
        if line.trim().starts_with("http") {
            break line.trim().to_owned();
        }
    };
    let browser = reqwest::Client::builder().tls_certs_only([]).build().unwrap();
    // What some page has the browser ask for is not taken for the answer.
    let stray = browser.get(format!("http://{callback}/oidc/callback?code=x&state=y")).send().await.unwrap();
    assert_eq!(stray.status(), StatusCode::BAD_REQUEST);
    let page = browser.get(&address).send().await.unwrap().text().await.unwrap();
    assert!(page.contains("Back to the terminal"), "{page}");
    let mut rest = String::new();
    told.read_to_string(&mut rest).unwrap();
    assert!(login.wait().unwrap().success(), "{rest}");

    assert!(run(&["list"]).status.success());
    let kept = std::fs::read_to_string(folder.path().join("nomad-build/tokens.json")).unwrap();
    let kept: Value = serde_json::from_str(&kept).unwrap();
    let (_, kept) = kept.as_object().unwrap().iter().next().unwrap();
    let token = kept["token"].as_str().unwrap();
    assert!(!rest.contains(token) && !kept["expires_at"].is_null());
    // It is one of those who build, and nobody else.
    let somebody = Api::with_token(&service.url, token);
    assert_eq!(
        somebody.call(Method::POST, "/jobs?dry_run=true", Some(&super::waiting())).await.0,
        StatusCode::OK
    );
    let told = std::fs::read_to_string(&audit).unwrap();
    assert!(!told.contains(token), "{told}");
    let logins = told.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let logins: Vec<_> = logins.filter(|line| line["action"] == "login").collect();
    assert_eq!(logins.last().unwrap()["who"], kept["accessor"], "{logins:?}");
    assert!(run(&["logout"]).status.success());
    assert!(!run(&["list"]).status.success());
}

#[tokio::test]
async fn a_login_that_is_not_good_gives_no_token_and_says_why() {
    let provider = Provider::serve().await;
    let (nomad, service, _token) =
        guarded_with(&world().registry, &[("NOMAD_BUILD_LOGIN_METHODS", "people")]).await;
    let redirect = "http://localhost:4649/oidc/callback";
    trust(&nomad, &provider, redirect).await;
    let nobody = Api::new(&service.url);
    let offered = nobody.get("/auth/login").await;
    assert_eq!(offered["methods"], json!([{ "name": "people", "type": "OIDC" }]));
    let log_in = async |body: Value| nobody.call(Method::POST, "/auth/login", Some(&body)).await;
    let oidc = |nonce: &str, further: Value| {
        let mut oidc = json!({ "redirect_uri": redirect, "client_nonce": nonce });
        oidc.as_object_mut().unwrap().extend(further.as_object().unwrap().clone());
        json!({ "method": "people", "oidc": oidc })
    };
    // Begins a login, and lets the provider say yes: what the browser brings back.
    let browser = reqwest::Client::builder().tls_certs_only([]);
    let browser = browser.redirect(reqwest::redirect::Policy::none()).build().unwrap();
    let begin = async |nonce: &str| {
        let (status, body) = log_in(oidc(nonce, json!({}))).await;
        assert_eq!(status, StatusCode::OK, "{body}");
        let address = body["data"]["auth_url"].as_str().unwrap();
        assert!(address.starts_with(&provider.url), "{address}");
        let sent_back = browser.get(address).send().await.unwrap();
        let back: reqwest::Url = sent_back.headers()["location"].to_str().unwrap().parse().unwrap();
        let of = |name: &str| back.query_pairs().find(|(of, _)| of == name).unwrap().1.into_owned();
        (of("state"), of("code"))
    };
    let refused = async |what: &str, body: Value| {
        let (status, body) = log_in(body).await;
        assert_eq!(status, StatusCode::UNAUTHORIZED, "{what}: {body}");
        assert_eq!(body["error"]["code"], "unauthorized", "{what}: {body}");
    };
    let (state, _) = begin("one").await;
    refused("a code that nobody gave", oidc("one", json!({ "state": state, "code": "made up" }))).await;
    let (_, code) = begin("two").await;
    refused("the state of no login", oidc("two", json!({ "state": "another", "code": code }))).await;
    let (state, code) = begin("three").await;
    refused("another nonce", oidc("four", json!({ "state": state, "code": code }))).await;
    let good = oidc("three", json!({ "state": state, "code": code }));
    let (status, body) = log_in(good.clone()).await;
    assert_eq!(status, StatusCode::OK, "{body}");
    refused("the same once more", good).await;
    refused("a JWT of nobody", json!({ "method": "people", "jwt": "a.b.c" })).await;
    let elsewhere = json!({ "redirect_uri": "https://evil.example/", "client_nonce": "five" });
    refused("a redirect to elsewhere", json!({ "method": "people", "oidc": elsewhere })).await;
    let (status, body) = log_in(json!({ "method": "ci", "jwt": "a.b.c" })).await;
    assert_eq!(status, StatusCode::BAD_REQUEST, "{body}");
    assert_eq!(body["error"]["details"][0]["field"], "method", "{body}");
    assert!(body.to_string().contains("people"), "{body}");
}
