//! Following one job to its end, or until the user leaves.

use std::pin::pin;
use std::time::Duration;

use backon::{ConstantBuilder, Retryable};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc::{self, Receiver};
use tokio::time::timeout;

use super::client::{Client, read_status};
use super::fields::JobId;
use super::output::{Colour, Output};
use super::report;
use super::screen::Screen;
use super::stream::{Event, Follower, Patience, Wanted};
use super::wire::{Message, Status};
use super::{Error, Exit};

/// Messages that wait for a slow stdout; past that the connection is not read any further.
const QUEUE: usize = 1024;
/// The end is known by then; what more there is to say is not worth a longer wait.
const LAST_WORD: Duration = Duration::from_secs(10);

/// How long a line's begin waits on a terminal for the rest of it: a question, or dots of progress.
const PAUSE: Duration = Duration::from_millis(500);

/// How a job's stream ended.
enum Ended {
    Job { status: String, reason: Option<String> },
    Detached,
}

/// Shows the job's log live and ends as the job does.
pub(super) async fn follow(
    client: &Client,
    wanted: Wanted,
    raw: bool,
    output: &mut Output,
) -> Result<Exit, Error> {
    let job = wanted.job.clone();
    let (sender, events) = mpsc::channel(QUEUE);
    let ended = {
        let mut shown = pin!(show(events, Screen::new(output, raw)));
        let follower = Follower::new(client, wanted, Patience::default());
        tokio::select! {
            biased;
            ended = &mut shown => ended,
            () = follower.run(sender) => shown.await,
        }?
    };
    match ended {
        Ended::Job { status, reason } => Ok(close(client, &job, &status, reason.as_deref(), output).await),
        Ended::Detached => {
            let job = job.as_str();
            output.note(&format!("detached: {job} goes on"));
            output.note(&format!("follow it again with: nomad-build logs -f {job}"));
            output.note(&format!("stop it with:         nomad-build kill {job}"));
            Ok(Exit::Detached)
        }
    }
}

async fn show(mut events: Receiver<Result<Event, Error>>, mut screen: Screen<'_>) -> Result<Ended, Error> {
    let mut interrupts = signal(SignalKind::interrupt())
        .map_err(|source| Error::new(Exit::Failure, "listening for Ctrl-C").caused_by(source))?;
    let mut was_cut = false;
    loop {
        let event = if let Ok(event) = events.try_recv() {
            Some(event)
        } else {
            screen.flush()?;
            tokio::select! {
                event = events.recv() => event,
                () = tokio::time::sleep(PAUSE), if screen.hides() => {
                    screen.show_begun();
                    continue;
                }
                _ = interrupts.recv() => {
                    screen.close()?;
                    return Ok(Ended::Detached);
                }
            }
        };
        match event {
            Some(Ok(Event::Message(message, text))) => {
                if std::mem::take(&mut was_cut) {
                    screen.note("--- connected again")?;
                }
                let ended = end_of(&message);
                screen.message(message, &text)?;
                if let Some(ended) = ended {
                    screen.close()?;
                    return Ok(ended);
                }
            }
            Some(Ok(Event::Cut(cut))) => {
                if !std::mem::replace(&mut was_cut, true) {
                    screen.note(&format!("--- {}; trying again", report::chain(&cut)))?;
                }
            }
            Some(Err(error)) => {
                screen.close()?;
                return Err(error);
            }
            None => {
                return Err(Error::new(Exit::Failure, "following the log ended without an end of the job"));
            }
        }
    }
}

fn end_of(message: &Message) -> Option<Ended> {
    match message {
        Message::End { status, reason } => {
            Some(Ended::Job { status: status.clone(), reason: reason.clone() })
        }
        _ => None,
    }
}

/// Says how the job ended. The stream names the end; the phase that failed and the digest stand in the status.
async fn close(client: &Client, job: &JobId, status: &str, reason: Option<&str>, output: &Output) -> Exit {
    let paint = output.paint_stderr();
    match final_status(client, job).await {
        Ok(last) => {
            for line in report::summary(&last, paint) {
                output.note(&line);
            }
            exit_of(&last)
        }
        Err(error) => {
            let exit = Exit::of_job(status, None, reason);
            output.note(&report::ending(status, exit, paint));
            output.note(&paint.text(Colour::Yellow, &format!("no more is known: {}", report::chain(&error))));
            exit
        }
    }
}

/// The end that a status stands for.
pub(super) fn exit_of(status: &Status) -> Exit {
    let failure = status.failure.as_ref();
    let phase = failure.and_then(|failure| failure.phase.as_deref());
    Exit::of_job(&status.status, phase, failure.and_then(|failure| failure.reason.as_deref()))
}

/// The final status; another replica may learn of it a moment after the stream has ended.
async fn final_status(client: &Client, job: &JobId) -> Result<Status, Error> {
    let ask = || async {
        let status = read_status(&client.status(job).await?)?;
        if status.is_final() {
            return Ok(status);
        }
        Err(Error::new(Exit::Failure, format!("the status of {} is still {}", job.as_str(), status.status)))
    };
    let asked =
        ask.retry(ConstantBuilder::default().with_delay(Duration::from_millis(250)).with_max_times(12));
    timeout(LAST_WORD, asked).await.unwrap_or_else(|source| {
        Err(Error::new(Exit::Failure, format!("asking for the final status of {}", job.as_str()))
            .caused_by(source))
    })
}
