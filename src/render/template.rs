//! A job template: the operator's text, compiled once for all jobs.

use minijinja::{Environment, Error, UndefinedBehavior, Value};

/// Its ending has every value written as JSON.
const NAME: &str = "job.json";

/// How much a template may do, in its engine's steps: one that never ends would hold a submission for ever.
const STEPS: u64 = 1_000_000;

/// A job template. The default is none, and fills in nothing.
#[derive(Clone, Debug, Default)]
pub struct Template {
    environment: Environment<'static>,
}

impl Template {
    /// Compiles a template.
    pub fn new(text: impl Into<String>) -> Result<Self, Error> {
        let mut environment = Environment::new();
        environment.set_undefined_behavior(UndefinedBehavior::Strict);
        environment.set_fuel(Some(STEPS));
        environment.add_template_owned(NAME, text.into())?;
        Ok(Self { environment })
    }

    /// Fills it in.
    pub(super) fn fill(&self, context: Value) -> Result<String, Error> {
        self.environment.get_template(NAME)?.render(context)
    }
}
