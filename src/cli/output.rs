//! Stdout for data, stderr for the rest, and whether somebody is looking.

use std::io::{self, IsTerminal, Write};

use serde_json::value::RawValue;

use super::Format;
use super::harmless;

/// Where a command's words go.
#[derive(Debug)]
pub(crate) struct Output {
    format: Format,
    colours: bool,
    stdout: io::Stdout,
    stderr: io::Stderr,
    stdout_is_terminal: bool,
    stderr_is_terminal: bool,
}

/// Data that could not be printed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OutputError {
    /// The other end of the pipe was closed: who reads has enough.
    #[error("the reader of standard output is gone")]
    ReaderGone(#[source] io::Error),
    /// A full disk, for example.
    #[error("writing to standard output")]
    Write(#[source] io::Error),
}

/// The colours of our own words; the codes are those of ECMA-48's SGR.
#[derive(Clone, Copy, Debug)]
pub(super) enum Colour {
    Red = 31,
    Green = 32,
    Yellow = 33,
    Cyan = 36,
    Dim = 2,
    Bold = 1,
}

/// Colours words, or leaves them as they are.
#[derive(Clone, Copy, Debug)]
pub(super) struct Paint(pub(super) bool);

impl Paint {
    /// The text in that colour.
    pub(super) fn text(self, colour: Colour, text: &str) -> String {
        if self.0 { format!("\x1b[{}m{text}\x1b[0m", colour as u8) } else { text.to_owned() }
    }
}

impl Output {
    /// The process's own stdout and stderr.
    pub(crate) fn new(format: Format, colours: bool) -> Self {
        let (stdout, stderr) = (io::stdout(), io::stderr());
        let (stdout_is_terminal, stderr_is_terminal) = (stdout.is_terminal(), stderr.is_terminal());
        Self { format, colours, stdout, stderr, stdout_is_terminal, stderr_is_terminal }
    }

    /// What stdout carries.
    pub(crate) fn format(&self) -> Format {
        self.format
    }

    /// Whether colours are wanted, wherever there is a terminal.
    pub(super) fn colours(&self) -> bool {
        self.colours
    }

    /// Whether a person looks at stdout.
    pub(super) fn stdout_is_terminal(&self) -> bool {
        self.stdout_is_terminal
    }

    /// How to colour what goes to stdout.
    pub(super) fn paint_stdout(&self) -> Paint {
        Paint(self.colours && self.stdout_is_terminal)
    }

    /// How to colour what goes to stderr.
    pub(super) fn paint_stderr(&self) -> Paint {
        Paint(self.colours && self.stderr_is_terminal)
    }

    /// Writes data exactly as it is, at once.
    pub(crate) fn write(&mut self, data: &str) -> Result<(), OutputError> {
        let mut stdout = self.stdout.lock();
        stdout.write_all(data.as_bytes()).and_then(|()| stdout.flush()).map_err(|error| match error.kind() {
            io::ErrorKind::BrokenPipe => OutputError::ReaderGone(error),
            _ => OutputError::Write(error),
        })
    }

    /// Writes one line of data.
    pub(crate) fn line(&mut self, line: &str) -> Result<(), OutputError> {
        self.write(&format!("{line}\n"))
    }

    /// Writes the service's data as it came.
    pub(super) fn json(&mut self, data: &RawValue) -> Result<(), OutputError> {
        if self.stdout_is_terminal { self.line(&harmless::json(data.get())) } else { self.line(data.get()) }
    }

    /// Says something beside the data. Where stderr is closed there is nobody to tell, and the work goes on.
    pub(crate) fn note(&self, line: &str) {
        writeln!(self.stderr.lock(), "{line}").ok();
    }
}
