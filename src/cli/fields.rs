//! Values of arguments that are more than a string.

use std::str::FromStr;

/// A job's ID, checked only as far as it stands in a URL: what IDs look like is the service's business.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct JobId(String);

impl JobId {
    /// The ID as text.
    pub(super) fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for JobId {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_');
        if text.is_empty() || text.len() > 128 || !text.chars().all(fits) {
            return Err("a job ID is made of letters, digits and hyphens".to_owned());
        }
        Ok(Self(text.to_owned()))
    }
}

/// The phases of a job, in their order.
pub(super) const PHASES: [&str; 3] = ["build", "test", "publish"];

/// `KEY=VALUE`; the value may hold more equals signs, or nothing.
pub(super) fn pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("expected KEY=VALUE".to_owned()),
    }
}

/// `PHASE=VALUE`.
pub(super) fn of_phase(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((phase, value)) if PHASES.contains(&phase) => Ok((phase.to_owned(), value.to_owned())),
        _ => Err(format!("expected PHASE=VALUE, where PHASE is one of {}", PHASES.join(", "))),
    }
}

/// `PHASE=NUMBER`.
pub(super) fn number_of_phase(text: &str) -> Result<(String, u64), String> {
    let (phase, number) = of_phase(text)?;
    let number = number.parse().map_err(|_| format!("{number:?} is not a whole number"))?;
    Ok((phase, number))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pair_is_split_at_its_first_equals_sign() {
        for (text, expected) in [
            ("A=b", Some(("A", "b"))),
            ("A=", Some(("A", ""))),
            ("A=b=c", Some(("A", "b=c"))),
            ("A= $(id) ", Some(("A", " $(id) "))),
            ("A", None),
            ("=b", None),
        ] {
            assert_eq!(pair(text).ok(), expected.map(|(k, v)| (k.to_owned(), v.to_owned())), "{text}");
        }
    }

    #[test]
    fn a_number_of_a_phase_names_a_phase_and_a_number() {
        assert_eq!(number_of_phase("test=512"), Ok(("test".to_owned(), 512)));
        for text in ["deploy=1", "test", "test=much", "test=-1", "=1"] {
            assert!(number_of_phase(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_job_id_cannot_leave_its_place_in_a_url() {
        assert!("nb-0193a1c2-7e57-7000-8000-000000000000".parse::<JobId>().is_ok());
        for text in ["", "..", "a/b", "a?b", "a b", "a%2fb", "ä"] {
            assert!(text.parse::<JobId>().is_err(), "{text}");
        }
    }
}
