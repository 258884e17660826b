//! The listener's edges: TLS, and what keeps one caller from being everybody's.

use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use reqwest::{Certificate, Identity, StatusCode};
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};
use tokio_tungstenite::connect_async;

use crate::support::{Api, Authority, Service, Sleeper, eventually, ports, world};

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// The variables of a service that has a certificate of an authority.
fn tls(authority: &Authority) -> [(&'static str, String); 2] {
    let file = |name| text(&authority.path(name)).to_owned();
    [("NOMAD_BUILD_TLS_CERT", file("service.pem")), ("NOMAD_BUILD_TLS_KEY", file("service.key"))]
}

fn started(variables: &[(&'static str, String)]) -> Service {
    let variables: Vec<_> = variables.iter().map(|(name, value)| (*name, value.as_str())).collect();
    Service::start_unready(&world().nomad, &world().registry, &variables)
}

/// A client that trusts an authority, and has a certificate of it where one is named.
fn client(authority: &Authority, own: Option<&str>) -> reqwest::Client {
    client_of(authority, own.map(|name| (authority, name)))
}

/// A client that trusts an authority, and has a certificate, of any authority.
fn client_of(authority: &Authority, own: Option<(&Authority, &str)>) -> reqwest::Client {
    let trusted = Certificate::from_pem(&std::fs::read(authority.file()).unwrap()).unwrap();
    let mut client = reqwest::Client::builder().tls_certs_only([trusted]).tls_info(true);
    if let Some((issuer, name)) = own {
        let read = |kind: &str| std::fs::read(issuer.path(&format!("{name}.{kind}"))).unwrap();
        let pem = [read("pem"), read("key")].concat();
        client = client.identity(Identity::from_pem(&pem).unwrap());
    }
    // A connection is made for each request, as of another caller.
    client.pool_max_idle_per_host(0).build().unwrap()
}

fn by_tls(service: &Service) -> String {
    service.url.replace("http://", "https://")
}

/// The certificate that a service shows.
async fn shown(client: &reqwest::Client, url: &str) -> reqwest::Result<Vec<u8>> {
    let answer = client.get(format!("{url}/health")).send().await?.error_for_status()?;
    let info = answer.extensions().get::<reqwest::tls::TlsInfo>().unwrap();
    Ok(info.peer_certificate().unwrap().to_vec())
}

#[tokio::test]
async fn a_certificate_is_shown_that_is_in_its_file_now_and_a_broken_one_changes_nothing() {
    let authority = Authority::new();
    let first = authority.issue("service");
    let service = started(&tls(&authority));
    let (client, url) = (client(&authority, None), by_tls(&service));
    assert_eq!(shown(&client, &url).await.unwrap(), first);
    assert!(client.get(format!("{}/health", service.url)).send().await.is_err(), "plain HTTP is not served");
    // A certificate without its key.
    let key = std::fs::read(authority.path("service.key")).unwrap();
    let second = authority.issue("service");
    let new_key = std::fs::read(authority.path("service.key")).unwrap();
    std::fs::write(authority.path("service.key"), key).unwrap();
    let until = Instant::now() + Duration::from_secs(2);
    while Instant::now() < until {
        assert_eq!(shown(&client, &url).await.unwrap(), first);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    std::fs::write(authority.path("service.key"), new_key).unwrap();
    eventually("the new certificate is shown", async || {
        (shown(&client, &url).await.unwrap() == second).then_some(())
    })
    .await;
}

#[tokio::test]
async fn who_has_no_certificate_where_callers_need_one_is_served_nothing_and_probes_need_none() {
    let (authority, other) = (Authority::new(), Authority::new());
    authority.issue("service");
    authority.issue("caller");
    other.issue("caller");
    let mut variables = tls(&authority).to_vec();
    variables.push(("NOMAD_BUILD_TLS_CLIENT_CA", text(&authority.file()).to_owned()));
    let probes = format!("127.0.0.1:{}", ports::port());
    variables.push(("NOMAD_BUILD_METRICS_LISTEN", probes.clone()));
    let service = started(&variables);
    let url = by_tls(&service);
    assert!(shown(&client(&authority, Some("caller")), &url).await.is_ok());
    assert!(shown(&client(&authority, None), &url).await.is_err());
    assert!(shown(&client_of(&authority, Some((&other, "caller"))), &url).await.is_err());
    let plain = Api::new(&format!("http://{probes}"));
    eventually("the service is ready", async || {
        let (status, _) = plain.try_call(reqwest::Method::GET, "/ready", None).await?;
        status.is_success().then_some(())
    })
    .await;
    plain.get("/health").await;
    let (status, _) = plain.try_call(reqwest::Method::POST, "/jobs", Some(&json!({}))).await.unwrap();
    assert_eq!(status, StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn callers_are_told_by_the_authorities_that_are_in_their_file_now() {
    let (authority, first, second) = (Authority::new(), Authority::new(), Authority::new());
    authority.issue("service");
    let clients = [&first, &second].map(|callers| {
        callers.issue("caller");
        client_of(&authority, Some((callers, "caller")))
    });
    let mut variables = tls(&authority).to_vec();
    variables.push(("NOMAD_BUILD_TLS_CLIENT_CA", text(&first.file()).to_owned()));
    let service = started(&variables);
    let url = by_tls(&service);
    let served = async || [shown(&clients[0], &url).await.is_ok(), shown(&clients[1], &url).await.is_ok()];
    assert_eq!(served().await, [true, false]);
    for (file, wanted) in [
        // Of both, as when one takes over from the other.
        (
            [std::fs::read(first.file()).unwrap(), std::fs::read(second.file()).unwrap()].concat(),
            [true, true],
        ),
        (std::fs::read(second.file()).unwrap(), [false, true]),
    ] {
        std::fs::write(first.file(), file).unwrap();
        eventually("the authorities are those of the file", async || {
            (served().await == wanted).then_some(())
        })
        .await;
    }
    std::fs::write(first.file(), "no certificate").unwrap();
    let until = Instant::now() + Duration::from_secs(2);
    while Instant::now() < until {
        assert_eq!(served().await, [false, true], "a file that cannot be used changes nothing");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test]
async fn every_answer_tells_a_browser_what_to_make_of_it_and_to_ask_by_tls_alone_where_there_is_any() {
    let authority = Authority::new();
    authority.issue("service");
    let rate = ("NOMAD_BUILD_MAX_RATE", "500".to_owned());
    let (safe, plain) =
        (started(&[tls(&authority).as_slice(), std::slice::from_ref(&rate)].concat()), started(&[rate]));
    let client = client(&authority, None);
    for (url, wanted) in [(by_tls(&safe), Some("max-age=31536000")), (plain.url.clone(), None)] {
        let told = async |route: &str, origin: Option<&str>| {
            let asked = client.get(format!("{url}{route}"));
            let asked = origin.into_iter().fold(asked, |asked, origin| asked.header("origin", origin));
            let answer = asked.send().await.unwrap();
            let header = |name: &str| answer.headers().get(name).map(|value| value.to_str().unwrap());
            assert_eq!(header("strict-transport-security"), wanted, "{url}{route}");
            assert_eq!(header("x-content-type-options"), Some("nosniff"), "{url}{route}");
            answer.status()
        };
        assert_eq!(told("/health", None).await, StatusCode::OK);
        assert_eq!(told("/health", Some("https://evil.example")).await, StatusCode::FORBIDDEN);
        assert_eq!(told("/other", None).await, StatusCode::NOT_FOUND);
        let at_once = join_all((0..20).map(|_| told("/auth/login", None))).await;
        assert!(at_once.contains(&StatusCode::TOO_MANY_REQUESTS), "{at_once:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_is_submitted_and_followed_over_tls_with_a_certificate_of_ones_own() {
    let (world, authority) = (world(), Authority::new());
    authority.issue("service");
    authority.issue("caller");
    let mut variables = tls(&authority).to_vec();
    variables.push(("NOMAD_BUILD_TLS_CLIENT_CA", text(&authority.file()).to_owned()));
    let service = started(&variables);
    let repository = world.repository("");
    let file = authority.path("job.json");
    std::fs::write(&file, world.job(&repository).to_string()).unwrap();
    let command = |arguments: &[&str], identity: bool| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_nomad-build"));
        command.args(arguments).env("NOMAD_BUILD_URL", by_tls(&service)).stdin(Stdio::null());
        command.env("NOMAD_BUILD_CACERT", authority.file()).env_remove("NOMAD_TOKEN");
        if identity {
            command.env("NOMAD_BUILD_CLIENT_CERT", authority.path("caller.pem"));
            command.env("NOMAD_BUILD_CLIENT_KEY", authority.path("caller.key"));
        }
        tokio::task::spawn_blocking(move || command.output().unwrap())
    };
    let submit = ["submit", "--file", text(&file), "--follow"];
    let followed = eventually("a service that knows its Nomad", async || {
        let output = command(&submit, true).await.unwrap();
        output.status.success().then_some(output)
    })
    .await;
    let said =
        format!("{}{}", String::from_utf8_lossy(&followed.stdout), String::from_utf8_lossy(&followed.stderr));
    assert!(said.contains("sha256:"), "{said}");
    let refused = command(&["status", "nb-0193a1c2-7e57-7000-8000-000000000000"], false).await.unwrap();
    assert!(!refused.status.success());
}

/// Whether the other side hangs up within a time; what it said before.
async fn hangs_up(stream: &mut TcpStream, within: Duration) -> Option<Vec<u8>> {
    let mut said = Vec::new();
    match tokio::time::timeout(within, stream.read_to_end(&mut said)).await {
        Ok(Ok(_)) => Some(said),
        Ok(Err(error)) if error.kind() == ErrorKind::ConnectionReset => Some(said),
        Ok(Err(error)) => panic!("{error}"),
        Err(_) => None,
    }
}

#[tokio::test]
async fn who_does_not_go_on_is_hung_up_on_and_the_others_are_served() {
    let authority = Authority::new();
    authority.issue("service");
    let (plain, tls) = (started(&[]), started(&tls(&authority)));
    let address = |service: &Service| service.url.strip_prefix("http://").unwrap().to_owned();
    let within = Duration::from_mins(1);
    let slow = async |service: &Service, says: &[u8]| {
        let mut stream = TcpStream::connect(address(service)).await.unwrap();
        stream.write_all(says).await.unwrap();
        let began = Instant::now();
        let said = hangs_up(&mut stream, within).await.expect("the service hangs up");
        (String::from_utf8(said).unwrap(), began.elapsed().as_secs())
    };
    let body = b"POST /jobs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{";
    let login = String::from_utf8_lossy(body).replace("POST /jobs ", "POST /auth/login ");
    let others = async {
        for _ in 0..25 {
            Api::new(&plain.url).get("/health").await;
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    };
    let (head, nothing, handshake, job, login, ()) = tokio::join!(
        slow(&plain, b"GET /health HTTP/1.1\r\nHost: loc"),
        slow(&plain, b""),
        slow(&tls, b"\x16\x03\x01"),
        slow(&plain, body),
        slow(&plain, login.as_bytes()),
        others,
    );
    for ((said, after), least) in [(head, 29), (nothing, 29), (handshake, 9)] {
        assert!(said.is_empty() && after >= least, "{said} after {after} s");
    }
    for (late, after) in [job, login] {
        assert!(late.starts_with("HTTP/1.1 408") && late.contains("request_timeout"), "{late}");
        assert!(after >= 29, "{after}");
    }
}

#[tokio::test]
async fn the_head_of_a_request_has_a_limit_that_tokens_stay_below() {
    let service = started(&[]);
    let address = service.url.strip_prefix("http://").unwrap();
    let asked = async |headers: String, is_whole: bool| {
        let end = if is_whole { "Connection: close\r\n\r\n" } else { "" };
        let mut stream = TcpStream::connect(address).await.unwrap();
        let head = format!("GET /health HTTP/1.1\r\nHost: localhost\r\n{headers}{end}");
        // Who is answered before its head is whole may not get rid of the rest.
        let sent = stream.write_all(head.as_bytes()).await;
        let said = hangs_up(&mut stream, Duration::from_secs(20)).await.expect("an answer, and its end");
        let said = String::from_utf8(said).unwrap();
        (said.lines().next().unwrap_or_default().to_owned(), sent.is_ok())
    };
    let token = |kib: usize| format!("X-Nomad-Token: {}\r\n", "t".repeat(kib * 1024));
    let many = |of: usize| (0..of).map(|number| format!("X-Of-Many-{number}: x\r\n")).collect::<String>();
    assert_eq!(asked(token(60), true).await, ("HTTP/1.1 200 OK".to_owned(), true));
    assert_eq!(asked(many(90), true).await, ("HTTP/1.1 200 OK".to_owned(), true));
    let too_large = "HTTP/1.1 431 Request Header Fields Too Large";
    for (headers, is_whole) in
        [(token(64), true), (token(64), false), (token(4096), false), (many(101), true)]
    {
        let long = headers.len();
        assert_eq!(asked(headers, is_whole).await.0, too_large, "{long} bytes, whole: {is_whole}");
    }
    // The others are served on.
    assert_eq!(asked(token(1), true).await.0, "HTTP/1.1 200 OK");
}

#[tokio::test]
async fn a_connection_is_kept_for_longer_than_clients_keep_theirs_and_not_for_ever() {
    let service = started(&[]);
    let address = service.url.strip_prefix("http://").unwrap();
    let health = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n";
    let asks = async |stream: &mut TcpStream| {
        stream.write_all(health).await.unwrap();
        let mut said = vec![0; 4096];
        let length = stream.read(&mut said).await.unwrap();
        assert!(
            said[..length].starts_with(b"HTTP/1.1 200 "),
            "{:?}",
            String::from_utf8_lossy(&said[..length])
        );
    };
    let used = async || {
        let mut stream = TcpStream::connect(address).await.unwrap();
        asks(&mut stream).await;
        stream
    };
    let idle = async {
        let mut stream = used().await;
        // Go's and reqwest's clients let go of a connection after 90 s.
        assert_eq!(hangs_up(&mut stream, Duration::from_secs(91)).await, None);
        asks(&mut stream).await;
    };
    let slow = async {
        let mut stream = used().await;
        stream.write_all(&health[..20]).await.unwrap();
        let began = Instant::now();
        assert_eq!(hangs_up(&mut stream, Duration::from_mins(3)).await, Some(Vec::new()));
        assert!(began.elapsed() > Duration::from_secs(95), "{:?}", began.elapsed());
    };
    tokio::join!(idle, slow);
}

#[tokio::test]
async fn an_address_logs_in_more_rarely_than_it_may_ask_for_other_things() {
    let service = started(&[("NOMAD_BUILD_MAX_RATE", "500".to_owned())]);
    let http = reqwest::Client::builder().tls_certs_only([]).build().unwrap();
    let asked = async |path: &str| http.get(format!("{}{path}", service.url)).send().await.unwrap().status();
    let refused = eventually("a refusal", async || {
        let status = asked("/auth/login").await;
        (status != StatusCode::OK).then_some(status)
    });
    assert_eq!(refused.await, StatusCode::TOO_MANY_REQUESTS);
    assert_eq!(asked("/openapi.json").await, StatusCode::OK);
}

#[tokio::test]
async fn an_address_that_asks_too_fast_is_told_when_to_ask_again_and_probes_are_always_answered() {
    let service = started(&[("NOMAD_BUILD_MAX_RATE", "5".to_owned())]);
    let http = reqwest::Client::builder().tls_certs_only([]).build().unwrap();
    let url = format!("{}/openapi.json", service.url);
    let mut refused = http.get(&url).send().await.unwrap();
    let deadline = Instant::now() + Duration::from_secs(90);
    while refused.status() == StatusCode::OK && Instant::now() < deadline {
        refused = http.get(&url).send().await.unwrap();
    }
    assert_eq!(refused.status(), StatusCode::TOO_MANY_REQUESTS);
    let wait: u64 = refused.headers()["retry-after"].to_str().unwrap().parse().unwrap();
    assert_eq!(refused.json::<serde_json::Value>().await.unwrap()["error"]["code"], "too_many_requests");
    for _ in 0..20 {
        Api::new(&service.url).get("/health").await;
    }
    tokio::time::sleep(Duration::from_secs(wait)).await;
    assert_eq!(http.get(&url).send().await.unwrap().status(), StatusCode::OK);
}

/// Connects from an address of this machine, and sees whether a request is answered.
async fn connects(from: &str, to: SocketAddr) -> io::Result<Option<TcpStream>> {
    let socket = TcpSocket::new_v4()?;
    socket.bind(format!("{from}:0").parse().unwrap())?;
    let mut stream = socket.connect(to).await?;
    stream.write_all(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n").await?;
    let mut first = [0; 12];
    let answered = match stream.read_exact(&mut first).await {
        Ok(_) => &first == b"HTTP/1.1 200",
        Err(_) => false,
    };
    Ok(answered.then_some(stream))
}

#[tokio::test]
async fn an_address_has_so_many_connections_and_those_of_streams_count() {
    let service = started(&[("NOMAD_BUILD_MAX_CONNECTIONS_PER_ADDRESS", "2".to_owned())]);
    let address: SocketAddr = service.url.strip_prefix("http://").unwrap().parse().unwrap();
    let sleeper = Sleeper::in_phase("build");
    let id = sleeper.submit(&world().api()).await;
    eventually("the service knows the job", async || {
        let answer = reqwest::get(format!("{}/jobs/{id}/status", service.url)).await.ok()?;
        answer.status().is_success().then_some(())
    })
    .await;
    let url = format!("ws://{address}/jobs/{id}/logs/stream");
    let (stream, _) = eventually("a stream", async || connect_async(url.as_str()).await.ok()).await;
    let first = eventually("a place", async || connects("127.0.0.1", address).await.unwrap()).await;
    assert!(!matches!(connects("127.0.0.1", address).await, Ok(Some(_))), "the third one is hung up on");
    assert!(
        matches!(connects("127.0.0.2", address).await, Ok(Some(_))),
        "another address has places of its own"
    );
    drop(first);
    eventually("its place is given back", async || connects("127.0.0.1", address).await.ok().flatten()).await;
    drop(stream);
    world().api().post(&format!("/jobs/{id}/kill")).await;
}

#[tokio::test]
async fn who_comes_when_every_place_is_taken_waits_for_one() {
    let service = started(&[("NOMAD_BUILD_MAX_CONNECTIONS", "1".to_owned())]);
    let address: SocketAddr = service.url.strip_prefix("http://").unwrap().parse().unwrap();
    let first = eventually("the only place", async || connects("127.0.0.1", address).await.unwrap()).await;
    let second = tokio::spawn(connects("127.0.0.1", address));
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(!second.is_finished());
    drop(first);
    assert!(second.await.unwrap().unwrap().is_some());
}
