//! Prometheus' text format, checked as far as its documentation goes.

use std::collections::BTreeMap;

/// Checks a text; returns the values of every label, by family.
pub(super) fn check(text: &str) -> BTreeMap<String, Vec<String>> {
    let (mut help, mut types) = (BTreeMap::new(), BTreeMap::new());
    let mut families: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for line in text.lines() {
        if let Some((name, what)) = line.strip_prefix("# HELP ").and_then(|rest| rest.split_once(' ')) {
            assert!(!what.is_empty() && help.insert(name, what).is_none(), "{line}");
        } else if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' '))
        {
            assert!(["counter", "gauge", "histogram"].contains(&kind), "{line}");
            assert!(types.insert(name, kind).is_none(), "{line}");
            check_name(name, kind);
            families.entry(name.to_owned()).or_default();
        } else {
            let (sample, value) = line.rsplit_once(' ').unwrap();
            assert!(value.parse::<f64>().is_ok(), "{line}");
            let (name, labels) = sample.split_once('{').unwrap_or((sample, ""));
            let family = family(name, &types);
            families.get_mut(family).unwrap().extend(values(labels));
        }
    }
    assert!(types.keys().eq(help.keys()), "{types:?} {help:?}");
    families
}

fn check_name(name: &str, kind: &str) {
    assert!(name.starts_with("nomad_build_") || name.starts_with("process_"), "{name}");
    assert!(name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_'), "{name}");
    assert_eq!(kind == "counter", name.ends_with("_total"), "{name} is a {kind}");
    assert!(kind != "histogram" || name.ends_with("_seconds"), "{name} has no unit");
}

/// The family that a sample belongs to, which must have been declared before it.
fn family<'a>(sample: &'a str, types: &BTreeMap<&str, &str>) -> &'a str {
    let of_histogram = ["_bucket", "_sum", "_count"].iter().find_map(|suffix| sample.strip_suffix(suffix));
    let name = of_histogram.filter(|name| types.get(name) == Some(&"histogram")).unwrap_or(sample);
    assert!(types.contains_key(name), "{sample} was not declared");
    name
}

/// The values of `a="x",b="y"}`.
fn values(labels: &str) -> impl Iterator<Item = String> {
    labels.split('"').skip(1).step_by(2).map(ToOwned::to_owned)
}
