//! A Nomad that answers nothing, or late, and callers who have much to ask.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use reqwest::{Method, StatusCode};
use uuid::Uuid;

use super::{guard_by, trust, waiting};
use crate::support::{Api, Fault, Faults, Guarded, Issuer, NAMESPACE, Service, eventually, world};

/// A front of a Nomad that has ACLs, what is asked there, and a service behind it.
struct Fronted {
    nomad: Guarded,
    front: Faults,
    asked: Arc<Mutex<Vec<String>>>,
    service: Service,
    _token: tempfile::NamedTempFile,
}

impl Fronted {
    async fn start(namespaces: &str) -> Self {
        let nomad = Guarded::start().await;
        if let Some((_, other)) = namespaces.split_once(',') {
            nomad.add_namespace(other).await;
        }
        let front = Faults::before(&nomad.url).await;
        let variables = [("NOMAD_BUILD_NAMESPACES", namespaces)];
        let (service, token) = guard_by(&front.url, &nomad, &world().registry, &variables).await;
        let fronted = Self { nomad, front, asked: Arc::default(), service, _token: token };
        fronted.harm(|_| None);
        fronted
    }

    /// From now on requests are harmed, and those told of that tokens are tried by.
    fn harm(&self, mut plan: impl FnMut(&str) -> Option<Fault> + Send + 'static) {
        let asked = Arc::clone(&self.asked);
        self.front.harm(move |line| {
            asked.lock().unwrap().push(line.to_owned());
            plan(line)
        });
    }

    /// The requests by which something was found out of a token since the last time this was asked.
    fn tried(&self) -> Vec<String> {
        let mut asked = std::mem::take(&mut *self.asked.lock().unwrap());
        // The service itself asks whether there are ACLs, beside that.
        asked.retain(|line| is_about_tokens(line) && !line.contains("/self?stale=true"));
        asked
    }

    fn api(&self, token: &str) -> Api {
        Api::with_token(&self.service.url, token)
    }
}

/// The job that is not there, which tokens are tried on.
const NOBODY: &str = "nomad-build-nobody";

fn is_about_tokens(line: &str) -> bool {
    line.contains("/v1/acl/token/self") || line.contains(NOBODY)
}

async fn answered(api: &Api, id: &str) -> StatusCode {
    api.call(Method::GET, &format!("/jobs/{id}/status"), None).await.0
}

#[tokio::test(flavor = "multi_thread")]
async fn while_nomad_hangs_who_was_known_reads_on_at_once_and_others_are_told_so_within_seconds() {
    let fronted = Fronted::start(NAMESPACE).await;
    let (known, late) = (fronted.nomad.builder().await, fronted.nomad.builder().await);
    let (api, stranger) = (fronted.api(&known.secret), fronted.api(&late.secret));
    let id = api.submit(&waiting()).await;
    fronted.nomad.owns(&id);
    assert_eq!(answered(&api, &id).await, StatusCode::OK);
    fronted.harm(|_| Some(Fault::Silent(0)));
    eventually("the token is tried again, and Nomad says nothing", async || {
        assert_eq!(answered(&api, &id).await, StatusCode::OK);
        fronted.tried().iter().any(|line| line.contains(NOBODY)).then_some(())
    })
    .await;
    let began = Instant::now();
    let told = join_all((0..100).map(|_| answered(&api, &id))).await;
    assert!(told.iter().all(|status| *status == StatusCode::OK), "{told:?}");
    assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());

    let began = Instant::now();
    let told = join_all((0..100).map(|_| answered(&stranger, &id))).await;
    assert!(told.iter().all(|status| *status == StatusCode::SERVICE_UNAVAILABLE), "{told:?}");
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());

    fronted.harm(|_| None);
    for api in [&api, &stranger] {
        eventually("Nomad answers again", async || {
            (answered(api, &id).await == StatusCode::OK).then_some(())
        })
        .await;
    }
    // What was believed meanwhile is not believed for longer than before.
    fronted.nomad.revoke(&known).await;
    eventually("it is shut out", async || (answered(&api, &id).await == StatusCode::NOT_FOUND).then_some(()))
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_made_up_token_costs_nomad_one_call_wherever_it_is_looked_for_and_a_good_one_two() {
    let fronted = Fronted::start("builds,team-b").await;
    let unknown = format!("nb-{}", Uuid::now_v7());
    let good = fronted.nomad.builder().await;
    for (token, wanted) in [(Uuid::new_v4().to_string(), 1), ("ab.cd.ef".to_owned(), 1)] {
        fronted.tried();
        let logs = format!("/jobs/{unknown}/logs");
        let api = fronted.api(&token);
        let told = join_all((0..20).map(|_| api.call(Method::GET, &logs, None))).await;
        assert!(told.iter().all(|(status, _)| *status == StatusCode::NOT_FOUND), "{told:?}");
        let tried = fronted.tried();
        assert_eq!(tried.len(), wanted, "{tried:?}");
    }
    let api = fronted.api(&good.secret);
    let jobs = format!("/jobs?namespace={NAMESPACE}");
    let told = join_all((0..20).map(|_| api.call(Method::GET, &jobs, None))).await;
    assert!(told.iter().all(|(status, _)| *status == StatusCode::OK), "{told:?}");
    let tried = fronted.tried();
    assert_eq!(tried.len(), 2, "{tried:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_made_up_tokens_keeps_no_submission_and_no_duty_waiting() {
    let fronted = Fronted::start(NAMESPACE).await;
    let builder = fronted.nomad.builder().await;
    let api = fronted.api(&builder.secret);
    // Its token is known.
    let (status, body) = api.call(Method::POST, "/jobs?dry_run=true", Some(&waiting())).await;
    assert_eq!(status, StatusCode::OK, "{body}");
    let renewed = Arc::new(Mutex::new(Vec::new()));
    let renewals = Arc::clone(&renewed);
    let asked_about = Arc::new(Mutex::new(0_usize));
    let count = Arc::clone(&asked_about);
    fronted.harm(move |line| {
        if line.contains("lock-renew") {
            renewals.lock().unwrap().push(Instant::now());
        }
        *count.lock().unwrap() += usize::from(is_about_tokens(line));
        is_about_tokens(line).then_some(Fault::Delay(Duration::from_secs(1)))
    });
    let renewals = || renewed.lock().unwrap().len();
    eventually("the service is on duty", async || (renewals() > 0).then_some(())).await;

    let url = &fronted.service.url;
    let flood = join_all((0..400).map(async |_| {
        loop {
            let api = Api::with_token(url, &Uuid::new_v4().to_string());
            api.try_call(Method::GET, "/jobs", None).await;
        }
    }));
    let honest = async {
        eventually("the flood has begun", async || (*asked_about.lock().unwrap() > 40).then_some(())).await;
        let (began, before) = (Instant::now(), renewals());
        for _ in 0..3 {
            let id = api.submit(&waiting()).await;
            fronted.nomad.owns(&id);
            assert_eq!(answered(&api, &id).await, StatusCode::OK);
        }
        let submitted = began.elapsed();
        assert!(submitted < Duration::from_secs(15), "{submitted:?}");
        eventually("the lock is renewed three times", async || (renewals() >= before + 3).then_some(()))
            .await;
        assert!(began.elapsed() < Duration::from_secs(25), "{:?}", began.elapsed());
    };
    tokio::select! {
        () = honest => {}
        _ = flood => {}
    }
    // It was on duty all the time.
    let renewed = renewed.lock().unwrap();
    let longest = renewed.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap();
    assert!(longest < Duration::from_secs(10), "{longest:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_would_wait_long_for_a_jwt_to_be_traded_is_told_to_come_again() {
    let fronted = Fronted::start(NAMESPACE).await;
    let (issuer, stranger) = (Issuer::new(), Issuer::new());
    trust(&fronted.nomad, &issuer, "acme/api").await;
    let trades = |line: &str| line.contains("/v1/acl/login");
    fronted.harm(move |line| trades(line).then_some(Fault::Delay(Duration::from_secs(1))));
    let http = reqwest::Client::builder().tls_certs_only([]).build().unwrap();
    let began = Instant::now();
    let told = join_all((0..200).map(async |_| {
        let request = http.get(format!("{}/jobs", fronted.service.url));
        let answer = request.bearer_auth(stranger.token("acme/api", 600)).send().await.unwrap();
        (answer.status(), answer.headers().get("retry-after").map(|wait| wait.to_str().unwrap().to_owned()))
    }))
    .await;
    // 200 by eight at once would take 25 s.
    assert!(began.elapsed() < Duration::from_secs(15), "{:?}", began.elapsed());
    let busy = told.iter().filter(|(status, _)| *status == StatusCode::SERVICE_UNAVAILABLE);
    assert!(busy.clone().all(|(_, wait)| wait.as_deref() == Some("1")), "{told:?}");
    assert!(busy.count() > 100, "{told:?}");
    assert!(told.iter().any(|(status, _)| *status == StatusCode::UNAUTHORIZED), "{told:?}");
    // Whoever comes again is let in.
    let good = fronted.api(&issuer.token("acme/api", 600));
    eventually("a JWT is traded", async || {
        let (status, _) = good.try_call(Method::GET, "/jobs", None).await?;
        (status == StatusCode::OK).then_some(())
    })
    .await;
}
