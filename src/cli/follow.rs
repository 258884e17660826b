//! Following one job to its end, or until the user leaves.

use std::pin::pin;
use std::time::Duration;

use backon::{ConstantBuilder, Retryable};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc::{self, Receiver};
use tokio::time::timeout;

use super::again::Again;
use super::client::{Client, read_status};
use super::fields::JobId;
use super::output::{Colour, Output};
use super::report;
use super::screen::Screen;
use super::stream::{Event, Follower, Patience, Wanted};
use super::wire::{Message, Status};
use super::{Error, Exit, Globals};

/// Messages that wait for a slow stdout; past that the connection is not read any further.
const QUEUE: usize = 1024;
/// The end is known by then; what more there is to say is not worth a longer wait.
const LAST_WORD: Duration = Duration::from_secs(10);

/// How long a line's begin waits on a terminal for the rest of it: a question, or dots of progress.
const PAUSE: Duration = Duration::from_millis(500);

/// How a job's stream ended.
enum Ended {
    Job(Box<Status>),
    Detached,
}

/// Shows the job's log live and ends as the job does.
pub(super) async fn follow(
    client: &Client,
    globals: &Globals,
    wanted: Wanted,
    raw: bool,
    output: &mut Output,
) -> Result<Exit, Error> {
    let mut left = wanted.clone();
    let (sender, events) = mpsc::channel(QUEUE);
    let ended = {
        let mut shown = pin!(show(events, Screen::new(output, raw), &mut left));
        let follower = Follower::new(client, wanted, Patience::default());
        tokio::select! {
            biased;
            ended = &mut shown => ended,
            () = follower.run(sender) => shown.await,
        }
    };
    let again = Again::new(globals);
    match ended {
        Ok(Ended::Job(told)) => Ok(close(client, &left.job, *told, output).await),
        Ok(Ended::Detached) => {
            output.note(&format!("detached: {} goes on", left.job.as_str()));
            output.note(&format!("follow it again with: {}", again.follow(&left, raw)));
            output.note(&format!("stop it with:         {}", again.kill(&left.job)));
            Ok(Exit::Detached)
        }
        Err(error) if error.is_passing() => Err(error.hint(format!(
            "the job itself is not affected; follow it again with: {}",
            again.follow(&left, raw)
        ))),
        Err(error) => Err(error),
    }
}

/// Shows what comes; what is left to show is told behind it, whatever ends it.
async fn show(
    mut events: Receiver<Result<Event, Error>>,
    mut screen: Screen<'_>,
    left: &mut Wanted,
) -> Result<Ended, Error> {
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
                let cursor = message.cursor().map(str::to_owned);
                let ended = end_of(&message, &left.job);
                screen.message(message, &text)?;
                left.cursor = cursor.or_else(|| left.cursor.take());
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

fn end_of(message: &Message, job: &JobId) -> Option<Ended> {
    match message {
        Message::End { status, failure } => {
            let told = Status::told(job.as_str(), status.clone(), failure.clone());
            Some(Ended::Job(Box::new(told)))
        }
        _ => None,
    }
}

/// Says how the job ended. The stream told the end and why; the digest and the tags stand in the status, which may be gone.
async fn close(client: &Client, job: &JobId, told: Status, output: &Output) -> Exit {
    let paint = output.paint_stderr();
    let (last, unknown) = match final_status(client, job).await {
        Ok(last) => (last, None),
        Err(error) => (told, Some(format!("no more is known: {}", report::chain(&error)))),
    };
    for line in report::summary(&last, paint) {
        output.note(&line);
    }
    if let Some(unknown) = unknown {
        output.note(&paint.text(Colour::Yellow, &unknown));
    }
    exit_of(&last)
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
