//! What the sweep of a node found, told to the service in a Variable.

use std::collections::BTreeMap;

/// Where the reports are, one for each node.
const REPORTS: &str = "nomad-build/sweeps/";

/// What ended jobs had left in a node's engine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SweepReport {
    /// Containers.
    pub containers: u64,
    /// Images with a name that the runner gave.
    pub images: u64,
    /// Containers that are gone now.
    pub removed_containers: u64,
    /// Images whose names are gone now.
    pub removed_images: u64,
}

impl SweepReport {
    /// The prefix of all reports.
    pub const PREFIX: &'static str = REPORTS;

    /// The Variable of a node's report.
    pub fn path(node: &str) -> String {
        format!("{REPORTS}{node}")
    }

    /// Reads a Variable's items; what is not a number is none.
    pub fn from_items(items: &BTreeMap<String, String>) -> Self {
        let number = |name: &str| items.get(name).and_then(|text| text.parse().ok()).unwrap_or(0);
        Self {
            containers: number("containers"),
            images: number("images"),
            removed_containers: number("removed_containers"),
            removed_images: number("removed_images"),
        }
    }

    /// The Variable's items.
    pub fn to_items(&self) -> BTreeMap<String, String> {
        let Self { containers, images, removed_containers, removed_images } = *self;
        let items = [
            ("containers", containers),
            ("images", images),
            ("removed_containers", removed_containers),
            ("removed_images", removed_images),
        ];
        items.map(|(name, number)| (name.to_owned(), number.to_string())).into()
    }
}

impl std::ops::AddAssign for SweepReport {
    fn add_assign(&mut self, other: Self) {
        self.containers = self.containers.saturating_add(other.containers);
        self.images = self.images.saturating_add(other.images);
        self.removed_containers = self.removed_containers.saturating_add(other.removed_containers);
        self.removed_images = self.removed_images.saturating_add(other.removed_images);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_survives_the_way_through_a_variable() {
        let report = SweepReport { containers: 1, images: 2, removed_containers: 3, removed_images: 4 };
        assert_eq!(SweepReport::from_items(&report.to_items()), report);
        assert_eq!(SweepReport::from_items(&BTreeMap::new()), SweepReport::default());
    }
}
