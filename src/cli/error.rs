//! What went wrong, for the person at the terminal: what was being done, why it failed, what to try.

use std::error::Error as StdError;

use super::exit::Exit;
use super::harmless;
use super::output::{Output, OutputError};

/// The failure of a command. `Display` says what was being done; the cause is its source.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub(crate) struct Error {
    kind: Kind,
    message: String,
    source: Option<Box<dyn StdError + Send + Sync>>,
    details: Vec<String>,
    hints: Vec<String>,
    /// Whether it may be otherwise in a moment.
    is_passing: bool,
}

#[derive(Debug)]
enum Kind {
    Exit(Exit),
    /// The reader of stdout went away, as `| head` does: not a failure, and nothing to say.
    ReaderGone,
}

impl Error {
    /// A failure that ends the process with `exit`.
    pub(crate) fn new(exit: Exit, message: impl Into<String>) -> Self {
        Self {
            kind: Kind::Exit(exit),
            message: message.into(),
            source: None,
            details: Vec::new(),
            hints: Vec::new(),
            is_passing: false,
        }
    }

    /// Says that it may be otherwise in a moment.
    pub(super) fn passing(mut self) -> Self {
        self.is_passing = true;
        self
    }

    /// Whether it may be otherwise in a moment.
    pub(super) fn is_passing(&self) -> bool {
        self.is_passing
    }

    /// Keeps what caused it.
    pub(crate) fn caused_by(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// Adds something the user can do about it.
    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hints.push(hint.into());
        self
    }

    /// Adds one of several particulars, such as a field that was refused.
    pub(super) fn detail(mut self, detail: impl Into<String>) -> Self {
        self.details.push(detail.into());
        self
    }

    /// Whether one of its particulars is about this field.
    pub(super) fn is_about(&self, field: &str) -> bool {
        self.details.iter().any(|detail| detail.split(':').next() == Some(field))
    }

    /// Prints the failure with its causes, particulars and hints, and says how the process ends.
    pub(super) fn report(&self, output: &Output) -> Exit {
        let Kind::Exit(exit) = self.kind else {
            return Exit::Success;
        };
        for line in self.lines() {
            output.note(&line);
        }
        exit
    }

    fn lines(&self) -> Vec<String> {
        let mut lines = vec![format!("error: {}", harmless::text(&self.message))];
        let mut cause = self.source();
        while let Some(error) = cause {
            lines.push(format!("  because: {}", harmless::text(&error.to_string())));
            cause = error.source();
        }
        lines.extend(self.details.iter().map(|detail| format!("  {}", harmless::text(detail))));
        lines.extend(self.hints.iter().map(|hint| format!("hint: {}", harmless::text(hint))));
        lines
    }
}

impl From<OutputError> for Error {
    fn from(error: OutputError) -> Self {
        let kind = match error {
            OutputError::ReaderGone(_) => Kind::ReaderGone,
            OutputError::Write(_) => Kind::Exit(Exit::Failure),
        };
        Self { kind, ..Self::new(Exit::Failure, "printing the result").caused_by(error) }
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[test]
    fn an_error_is_printed_with_its_causes_particulars_and_hints_and_with_nothing_a_terminal_obeys() {
        let error = Error::new(Exit::Usage, "submitting the build")
            .caused_by(io::Error::other("refused\x1b[2J"))
            .detail("owner: must not be empty")
            .hint("see --help");
        assert_eq!(
            error.lines(),
            [
                "error: submitting the build",
                "  because: refused\\x1b[2J",
                "  owner: must not be empty",
                "hint: see --help"
            ]
        );
    }
}
