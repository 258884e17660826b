//! `make bench`: what the service costs beside the bare things it is made of.
//!
//! Everything compared runs in turn in one run, on one stack that this program starts and that ends with it. Nothing is
//! asserted: a shared machine's times are its own.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a report is printed")]

mod bare_job;
mod cluster;
mod end_to_end;
mod fleet;
mod nomad;
mod reads;
mod sample;
mod stack;
mod submit;

use std::io::Write as _;

use anyhow::Context as _;

use sample::Sample;
use stack::Stack;

/// The argument by which this program runs itself as the bare handler.
const BARE: &str = "--bare-handler";

const READ_ME: &str = "\
How to read it: a row's ratio is its median over the median of the row it names, of this run alone. Times of one run say
little about another machine, or about this one under another load; ratios say more. \"At most\" is what is promised.";

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.iter().any(|argument| argument == BARE) {
        return reads::serve_bare().await;
    }
    // cargo adds `--bench` of its own.
    let rounds = arguments.iter().find(|argument| !argument.starts_with('-'));
    let rounds = rounds.map_or(Ok(10), |text| text.parse()).context("ROUNDS is a number")?;
    let stack = Stack::start().await?;
    let measured = measure(&stack, rounds).await;
    stack.stop().await?;
    measured?;
    eprintln!("bench: a replica beside {} jobs", fleet::JOBS);
    print_fleet(&fleet::measure().await?)
}

async fn measure(stack: &Stack, rounds: usize) -> anyhow::Result<()> {
    eprintln!("bench: end to end, {rounds} rounds after one to warm up");
    let ended = end_to_end::measure(stack, rounds).await?;
    eprintln!("bench: status reads");
    let reads = reads::measure(stack, &ended.job).await?;
    eprintln!("bench: submissions");
    let submit = submit::measure(stack, rounds * 10).await?;
    print(&ended, &reads, &submit)
}

fn print(ended: &end_to_end::Times, reads: &reads::Rates, submit: &submit::Latencies) -> anyhow::Result<()> {
    let cores = std::thread::available_parallelism()?;
    println!("\n{cores} cores");
    println!("\nEnd to end, in ms: clone, build (cached), one test, push       median      min      max");
    let published = ended.ours.published.median();
    row("bare: git and docker by hand", &ended.bare);
    row("hand-written Nomad job, until publish has finished", &ended.job_by_hand.published);
    row("hand-written Nomad job, until its allocation is complete", &ended.job_by_hand.over);
    row("nomad-build, until the final status is read", &ended.ours.published);
    row("nomad-build, until its allocation is complete", &ended.ours.over);
    ratio("final status : bare", published, ended.bare.median());
    let by_hand = ended.job_by_hand.published.median();
    ratio("final status : hand-written, publish finished (at most 1.25)", published, by_hand);
    ratio("final status : hand-written, complete", published, ended.job_by_hand.over.median());
    ratio("complete : complete", ended.ours.over.median(), ended.job_by_hand.over.median());
    println!("\nnomad-build's phases, in ms, as its status tells them");
    for (phase, times) in &ended.phases {
        row(phase, times);
    }
    println!("\nSubmit, in ms                                                  median      min      max");
    row("bare: the same job registered at Nomad", &submit.registered);
    row("bare: the same, and its Variable written", &submit.bare);
    row("nomad-build: POST /jobs", &submit.ours);
    println!(
        "  {:<58} {:>+8.2} ms",
        "added, p50 (at most 2 ms)",
        submit.ours.median() - submit.bare.median()
    );
    println!(
        "\nStatus reads, per second, {} connections                        median      min      max",
        reads::READERS
    );
    row("bare: a handler of axum that answers the same bytes", &reads.bare);
    row("nomad-build: GET /jobs/{id}/status", &reads.ours);
    ratio("nomad-build : bare", reads.ours.median(), reads.bare.median());
    std::io::stdout().flush()?;
    Ok(())
}

fn print_fleet(times: &fleet::Times) -> anyhow::Result<()> {
    println!(
        "\nA replica beside {} jobs and allocations, in ms              median      min      max",
        fleet::JOBS
    );
    row("bare: the lists of jobs and allocations fetched", &times.bare);
    row("from its start until it is ready, jobs that wait", &times.waiting);
    row("its lists fetched and taken in, of that", &times.waiting_listed);
    row("bare: the claims of all jobs read", &times.bare_claims);
    row("from its start until it is ready, jobs that have ended", &times.ended);
    row("its lists fetched and taken in, of that", &times.ended_listed);
    ratio("start beside jobs that wait : bare lists", times.waiting.median(), times.bare.median());
    ratio(
        "start beside jobs that have ended : bare claims",
        times.ended.median(),
        times.bare_claims.median(),
    );
    row("a job's end is told behind its claim, empty ledger", &times.heard);
    row("a job's end is told behind its claim, ledgers of all", &times.heard_beside_all);
    println!("  {:<58} {:>8.1} MiB", "its memory", times.memory.median());
    println!("\n{READ_ME}");
    std::io::stdout().flush()?;
    Ok(())
}

fn row(name: &str, sample: &Sample) {
    println!("  {name:<58} {:>8.1} {:>8.1} {:>8.1}", sample.median(), sample.min(), sample.max());
}

fn ratio(name: &str, of: f64, to: f64) {
    println!("  {name:<58} {:>8.2} times", of / to);
}
