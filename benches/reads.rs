//! Status reads beside a bare handler that answers the same bytes.
//!
//! The load is a loop of our own on kept connections, so that both are asked by the same, cheap means.

use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use axum::Router;
use axum::http::header::CONTENT_TYPE;
use axum::routing::get;
use bytes::Bytes;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::{Child, Command};

use crate::BARE;
use crate::sample::Sample;
use crate::stack::Stack;

/// How many connections ask at once.
pub(crate) const READERS: usize = 32;

/// How long each is asked, and how often, in turn.
const TURN: Duration = Duration::from_secs(3);
const TURNS: usize = 3;

/// Answers per second.
pub(crate) struct Rates {
    pub(crate) bare: Sample,
    pub(crate) ours: Sample,
}

/// Measures reads of one job's status.
pub(crate) async fn measure(stack: &Stack, job: &str) -> anyhow::Result<Rates> {
    let path = format!("/jobs/{job}/status");
    let body =
        stack.http.get(format!("{}{path}", stack.api)).send().await?.error_for_status()?.bytes().await?;
    let bare = Bare::start(&body).await?;
    let service = stack.api.strip_prefix("http://").context("the API speaks plain HTTP")?;
    let mut rates = Rates { bare: Sample::default(), ours: Sample::default() };
    for _ in 0..TURNS {
        rates.bare.push(rate(&bare.address, &path).await?);
        rates.ours.push(rate(service, &path).await?);
    }
    bare.stop().await?;
    Ok(rates)
}

async fn rate(address: &str, path: &str) -> anyhow::Result<f64> {
    let began = Instant::now();
    let mut readers = tokio::task::JoinSet::new();
    for _ in 0..READERS {
        readers.spawn(read(address.to_owned(), path.to_owned(), began + TURN));
    }
    let mut answers: u32 = 0;
    while let Some(count) = readers.join_next().await {
        answers += count??;
    }
    Ok(f64::from(answers) / began.elapsed().as_secs_f64())
}

/// Asks on one connection until it is time; returns how often it was answered.
async fn read(address: String, path: String, until: Instant) -> anyhow::Result<u32> {
    let stream = TcpStream::connect(&address).await?;
    stream.set_nodelay(true)?;
    let mut stream = BufReader::new(stream);
    let request = format!("GET {path} HTTP/1.1\r\nHost: {address}\r\n\r\n");
    let (mut line, mut body, mut answers) = (String::new(), Vec::new(), 0);
    while Instant::now() < until {
        stream.write_all(request.as_bytes()).await?;
        line.clear();
        stream.read_line(&mut line).await?;
        ensure!(line.starts_with("HTTP/1.1 200"), "{address} answered {line:?}");
        let mut length = 0;
        while line != "\r\n" {
            line.clear();
            ensure!(stream.read_line(&mut line).await? > 0, "{address} hung up");
            if let Some(value) = line.strip_prefix("content-length:") {
                length = value.trim().parse()?;
            }
        }
        body.resize(length, 0);
        stream.read_exact(&mut body).await?;
        answers += 1;
    }
    Ok(answers)
}

/// The bare handler, in a process of its own as the service is.
struct Bare {
    program: Child,
    address: String,
}

impl Bare {
    async fn start(body: &[u8]) -> anyhow::Result<Self> {
        let mut program = Command::new(std::env::current_exe()?)
            .arg(BARE)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let stdin = program.stdin.as_mut().context("the bare handler has no stdin")?;
        // JSON on one line.
        stdin.write_all(body).await?;
        stdin.write_all(b"\n").await?;
        let mut address = String::new();
        let stdout = program.stdout.take().context("the bare handler has no stdout")?;
        BufReader::new(stdout).read_line(&mut address).await?;
        Ok(Self { program, address: address.trim().to_owned() })
    }

    async fn stop(mut self) -> anyhow::Result<()> {
        drop(self.program.stdin.take());
        let status = self.program.wait().await?;
        ensure!(status.success(), "the bare handler ended with {status}");
        Ok(())
    }
}

/// The bare handler: reads its answer as a line of stdin, prints its address, and serves until stdin ends.
pub(crate) async fn serve_bare() -> anyhow::Result<()> {
    let mut body = String::new();
    std::io::stdin().read_line(&mut body)?;
    let body = Bytes::from(body.trim_end().to_owned());
    let handler = get(move || {
        let body = body.clone();
        async move { ([(CONTENT_TYPE, "application/json")], body) }
    });
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    println!("{}", listener.local_addr()?);
    let router = Router::new().route("/jobs/{id}/status", handler);
    let closed = tokio::task::spawn_blocking(|| std::io::stdin().read_line(&mut String::new()));
    // However it ends, it is the end.
    axum::serve(listener, router).with_graceful_shutdown(async { drop(closed.await) }).await?;
    Ok(())
}
