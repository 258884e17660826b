//! `logs`: what a job wrote so far, or live.

use reqwest::Method;

use super::client::{Client, read};
use super::fields::{JobId, PHASES};
use super::follow::follow;
use super::harmless;
use super::output::{Colour, OutputError};
use super::stream::Wanted;
use super::wire::Logs;
use super::{Error, Exit, Format, Globals, Output};

/// The arguments of `logs`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The job
    #[arg(value_name = "ID")]
    job: JobId,
    /// Go on until the job ends, and end with its exit code
    #[arg(long, short = 'f')]
    follow: bool,
    /// Only this phase
    #[arg(long, value_parser = PHASES)]
    phase: Option<String>,
    /// Only the last lines
    #[arg(long, value_name = "LINES")]
    tail: Option<u64>,
    /// Go on behind the line with this cursor, as a follow that was left says
    #[arg(long, value_name = "CURSOR", requires = "follow", conflicts_with = "tail")]
    cursor: Option<String>,
    /// Let the log's control characters through to a terminal
    #[arg(long)]
    raw: bool,
}

/// Prints the log on stdout; headings and gaps go to stderr.
pub(super) async fn run(args: Args, globals: &Globals, output: &mut Output) -> Result<Exit, Error> {
    let client = Client::new(globals)?;
    if args.follow {
        // A service that is down or a job that is unknown is said at once: only what once worked is tried again.
        client.status(&args.job).await?;
        let Args { job, phase, tail, cursor, raw, .. } = args;
        return follow(&client, globals, Wanted { job, phase, tail, cursor }, raw, output).await;
    }
    let tail = args.tail.map(|lines| lines.to_string());
    let mut query = Vec::new();
    query.extend(args.phase.as_deref().map(|phase| ("phase", phase)));
    query.extend(tail.as_deref().map(|tail| ("tail", tail)));
    let doing = format!("asking {} for the log of {}", client.base(), args.job.as_str());
    let url = client.url(&["jobs", args.job.as_str(), "logs"], &query);
    let data = client.call(&doing, Method::GET, url, None).await?;
    match output.format() {
        Format::Json => output.json(&data)?,
        Format::Text => print(&read("the question for the log", &data)?, args.raw, output)?,
    }
    Ok(Exit::Success)
}

fn print(logs: &Logs, raw: bool, output: &mut Output) -> Result<(), OutputError> {
    let paint = output.paint_stderr();
    for (phase, log) in PHASES.into_iter().zip([&logs.build, &logs.test, &logs.publish]) {
        // What is left out or missing, the text says itself.
        let log = log.as_deref().unwrap_or_default();
        if log.is_empty() {
            continue;
        }
        output.note(&paint.text(Colour::Cyan, &format!("==> {phase}")));
        let as_it_is = raw || !output.stdout_is_terminal();
        let shown = if as_it_is { log.to_owned() } else { for_terminal(log, output.colours()) };
        output.write(&shown)?;
        if !shown.is_empty() && !shown.ends_with('\n') {
            output.write("\n")?;
        }
    }
    Ok(())
}

fn for_terminal(log: &str, colours: bool) -> String {
    log.lines().map(|line| harmless::line(line, colours) + "\n").collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn on_a_terminal_every_line_ends_also_the_last_one() {
        assert_eq!(for_terminal("a\n\nb\n", true), "a\n\nb\n");
        assert_eq!(for_terminal("a\nb", false), "a\nb\n");
        assert_eq!(for_terminal("", true), "");
    }
}
