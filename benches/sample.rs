//! Some measurements of one thing.

use std::time::Duration;

/// Measurements, in whatever unit their maker uses.
#[derive(Default)]
pub(crate) struct Sample(Vec<f64>);

impl Sample {
    pub(crate) fn push(&mut self, value: f64) {
        let place = self.0.partition_point(|known| *known < value);
        self.0.insert(place, value);
    }

    pub(crate) fn push_ms(&mut self, time: Duration) {
        self.push(time.as_secs_f64() * 1000.0);
    }

    /// The middle one, or the mean of the two in the middle.
    pub(crate) fn median(&self) -> f64 {
        let middle = self.0.len() / 2;
        match (self.0.get(middle), self.0.len() % 2) {
            (None, _) => f64::NAN,
            (Some(value), 1) => *value,
            (Some(value), _) => f64::midpoint(self.0[middle - 1], *value),
        }
    }

    pub(crate) fn min(&self) -> f64 {
        self.0.first().copied().unwrap_or(f64::NAN)
    }

    pub(crate) fn max(&self) -> f64 {
        self.0.last().copied().unwrap_or(f64::NAN)
    }
}
