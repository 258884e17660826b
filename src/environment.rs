//! The process's environment: read here and nowhere else, through a source that tests replace by a map.

use std::path::PathBuf;
use std::str::FromStr;

/// Where variables come from.
pub type Source<'a> = &'a dyn Fn(&str) -> Option<String>;

/// The process's own environment. A value that is not UTF-8 is as good as none.
#[expect(clippy::disallowed_methods, reason = "the one place where the environment is read")]
pub fn process(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// Everything that is wrong with the configuration.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("the configuration is not usable:\n  {}", .0.join("\n  "))]
pub struct BadConfiguration(pub Vec<String>);

/// Reads variables, keeping every error instead of the first.
pub struct Reader<'a> {
    source: Source<'a>,
    errors: Vec<String>,
}

impl<'a> Reader<'a> {
    /// Begins to read.
    pub fn new(source: Source<'a>) -> Self {
        Self { source, errors: Vec::new() }
    }

    /// Notes what is wrong with a variable.
    pub fn wrong(&mut self, name: &str, why: &str) {
        self.errors.push(format!("{name} {why}"));
    }

    /// A variable as it is.
    pub fn text(&mut self, name: &str) -> Option<String> {
        (self.source)(name)
    }

    /// A variable that must be there.
    pub fn required(&mut self, name: &str) -> String {
        let value = self.text(name);
        if value.is_none() {
            self.wrong(name, "is not set");
        }
        value.unwrap_or_default()
    }

    /// A path that must be there.
    pub fn path(&mut self, name: &str) -> PathBuf {
        self.required(name).into()
    }

    /// A variable with a grammar.
    pub fn parsed<T: FromStr>(&mut self, name: &str, wanted: &str) -> Option<T> {
        let text = self.text(name)?;
        let value = text.parse().ok();
        if value.is_none() {
            self.wrong(name, &format!("is {text:?}: {wanted} is wanted"));
        }
        value
    }

    /// A list, separated by commas.
    pub fn list<T: FromStr>(&mut self, name: &str, wanted: &str) -> Option<Vec<T>> {
        let text = self.text(name)?;
        let mut values = Vec::new();
        for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            match part.parse() {
                Ok(value) => values.push(value),
                Err(_) => self.wrong(name, &format!("has {part:?}: {wanted} is wanted")),
            }
        }
        Some(values)
    }

    /// What was read, or all that is wrong with it.
    pub fn finish<T>(self, value: T) -> Result<T, BadConfiguration> {
        if self.errors.is_empty() { Ok(value) } else { Err(BadConfiguration(self.errors)) }
    }
}
