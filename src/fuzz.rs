//! What strangers' bytes go through, each as a function of any bytes that panics where a promise does not hold.
//!
//! `make fuzz` runs each with inputs that are made up by what they reach; the inputs in `tests/corpus/` run with every test.

use crate::job::{Policy, Scheme, Spec};
use crate::registry::{Reference, Repository};

/// A target: its name, and what it does with an input.
pub type Target = (&'static str, fn(&[u8]));

/// All of them.
pub const TARGETS: [Target; 8] = [
    ("submission", submission),
    ("reference", reference),
    ("cursor", crate::service::logs::fuzz::cursor),
    ("log", crate::service::logs::fuzz::log),
    ("line", crate::job::fuzz_line),
    ("mask", crate::runner::fuzz_mask),
    ("progress", crate::engine::fuzz_progress),
    ("terminal", crate::cli::fuzz_terminal),
];

/// Gives an input to the target of a name.
pub fn run(name: &str, bytes: &[u8]) {
    for (_, target) in TARGETS.iter().filter(|(known, _)| *known == name) {
        target(bytes);
    }
}

/// A submission is refused with a field and a remedy, or reads back as what it was.
fn submission(bytes: &[u8]) {
    let Ok(body) = serde_json::from_slice(bytes) else { return };
    let policy = Policy { schemes: Scheme::ALL.to_vec(), ..Policy::default() };
    match Spec::from_json(body, &policy) {
        Ok(spec) => {
            let again = Spec::from_json(spec.to_json(), &policy);
            assert!(again.is_ok_and(|again| again == spec), "{spec:?}");
        }
        Err(invalid) => {
            assert!(!invalid.0.is_empty());
            assert!(invalid.0.iter().all(|error| !error.message.is_empty()), "{invalid:?}");
        }
    }
}

/// A name in a registry is refused, or can stand in a URL's path as it is, and reads back.
fn reference(bytes: &[u8]) {
    let Ok(text) = str::from_utf8(bytes) else { return };
    let is_plain = |text: &str| {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-/:".contains(&byte);
        text.bytes().all(plain) && text.split('/').all(|part| !matches!(part, "" | "." | ".."))
    };
    if let Ok(repository) = text.parse::<Repository>() {
        assert!(repository.to_string() == text && is_plain(text), "{text:?}");
    }
    if let Ok(reference) = text.parse::<Reference>() {
        assert!(reference.to_string() == text && is_plain(text), "{text:?}");
    }
}
