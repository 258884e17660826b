//! A followed job on the screen: the log on stdout, phases and progress on stderr.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use super::Format;
use super::harmless;
use super::lines::Joiner;
use super::output::{Colour, Output, OutputError};
use super::wire::Message;

/// Log text is collected up to this many bytes before it is written.
const BATCH: usize = 64 << 10;

/// Shows messages as they come.
#[derive(Debug)]
pub(super) struct Screen<'a> {
    output: &'a mut Output,
    /// Whether log lines are written with every byte that a terminal would obey.
    raw: bool,
    lines: Joiner,
    pending: String,
    /// Turns and counts seconds where stderr is a terminal, and is nothing elsewhere.
    spinner: ProgressBar,
}

impl<'a> Screen<'a> {
    /// An empty screen. A stdout that is no terminal gets the log's lines exactly as they were written.
    pub(super) fn new(output: &'a mut Output, raw: bool) -> Self {
        let raw = raw || !output.stdout_is_terminal();
        Self { output, raw, lines: Joiner::default(), pending: String::new(), spinner: spinner() }
    }

    /// Shows one message; `text` is its very words.
    pub(super) fn message(&mut self, message: Message, text: &str) -> Result<(), OutputError> {
        match self.output.format() {
            Format::Json => {
                if let Message::Status { status, .. } = &message {
                    self.progress(status);
                }
                self.json(text);
            }
            Format::Text => self.text(message),
        }
        if self.pending.len() >= BATCH { self.flush() } else { Ok(()) }
    }

    /// Says something beside the log, after what was logged before it.
    pub(super) fn note(&mut self, line: &str) -> Result<(), OutputError> {
        self.flush()?;
        let output = &*self.output;
        self.spinner.suspend(|| output.note(line));
        Ok(())
    }

    /// Writes what was collected.
    pub(super) fn flush(&mut self) -> Result<(), OutputError> {
        if self.pending.is_empty() {
            return Ok(());
        }
        let (output, pending) = (&mut *self.output, &self.pending);
        let written = self.spinner.suspend(|| output.write(pending));
        self.pending.clear();
        written
    }

    /// Whether something is there that somebody at a terminal does not see, as its line has no end.
    pub(super) fn hides(&self) -> bool {
        self.output.stdout_is_terminal() && self.lines.has_begun()
    }

    /// Shows that: what follows of it begins a line of its own.
    pub(super) fn show_begun(&mut self) {
        self.end_open_lines();
    }

    /// Leaves the screen to whoever comes next.
    pub(super) fn close(mut self) -> Result<(), OutputError> {
        self.end_open_lines();
        self.flush()?;
        self.spinner.finish_and_clear();
        Ok(())
    }

    fn json(&mut self, text: &str) {
        // A line break can only stand between tokens, where a space does as well.
        let text = text.replace(['\n', '\r'], " ");
        if self.output.stdout_is_terminal() {
            self.pending.push_str(&harmless::json(&text));
        } else {
            self.pending.push_str(&text);
        }
        self.pending.push('\n');
    }

    fn text(&mut self, message: Message) {
        match message {
            Message::Log(part) => {
                if let Some(line) = self.lines.push(part) {
                    self.line(&line);
                }
            }
            Message::Status { status, .. } => self.status(&status),
            Message::Gap { phase, message, .. } => {
                self.end_open_lines();
                let phase = phase.as_deref().unwrap_or("the");
                let why = message.as_deref().unwrap_or("lines are missing");
                self.say(Colour::Yellow, &format!("--- gap in {phase} log: {why}"));
            }
            Message::End { .. } => self.end_open_lines(),
            Message::Heartbeat {} | Message::Unknown => {}
        }
    }

    fn status(&mut self, status: &str) {
        self.progress(status);
        self.say(Colour::Cyan, &format!("==> {}", status.to_lowercase()));
    }

    fn progress(&self, status: &str) {
        self.spinner.set_message(harmless::text(status).to_lowercase());
        self.spinner.reset_elapsed();
    }

    fn say(&mut self, colour: Colour, line: &str) {
        let line = self.output.paint_stderr().text(colour, &harmless::text(line));
        // A stdout that fails here fails again at the next flush, which reports it.
        self.note(&line).ok();
    }

    fn end_open_lines(&mut self) {
        for line in self.lines.take_rest() {
            self.line(&line);
        }
    }

    fn line(&mut self, line: &str) {
        if self.raw {
            self.pending.push_str(line);
        } else {
            self.pending.push_str(&harmless::line(line, self.output.colours()));
        }
        self.pending.push('\n');
    }
}

fn spinner() -> ProgressBar {
    let spinner = ProgressBar::new_spinner();
    if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} {elapsed}") {
        spinner.set_style(style);
    }
    spinner.set_message("waiting");
    if !spinner.is_hidden() {
        spinner.enable_steady_tick(Duration::from_millis(120));
    }
    spinner
}
