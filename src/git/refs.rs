//! Which of a repository's refs is meant.

use std::collections::BTreeSet;

/// The longest name of a ref that is told, in bytes: that of a submission.
const LONGEST: usize = 255;

/// The digits of a hash by SHA-256.
const SHA256: usize = 64;

/// What `git ls-remote --symref` says.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Remote {
    /// The ref that HEAD stands for.
    head: Option<String>,
    refs: BTreeSet<String>,
    sha256: bool,
}

/// What to fetch.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Wanted {
    /// A ref, by its full name.
    Named(String),
    /// Something that may be a commit.
    Commit(String),
    /// Nothing there is.
    Nothing(String),
}

impl Remote {
    pub(super) fn parse(said: &str) -> Self {
        let mut remote = Self::default();
        for line in said.lines() {
            let Some((value, name)) = line.split_once('\t') else { continue };
            match value.strip_prefix("ref: ") {
                Some(target) if name == "HEAD" => remote.head = Some(target.to_owned()),
                Some(_) => {}
                None => {
                    remote.sha256 |= value.len() == SHA256;
                    remote.refs.insert(name.to_owned());
                }
            }
        }
        remote
    }

    /// Whether its objects are named by SHA-256, and not by SHA-1.
    pub(super) fn is_sha256(&self) -> bool {
        self.sha256
    }

    fn named(&self, reference: &str) -> Option<Wanted> {
        self.refs.contains(reference).then(|| Wanted::Named(reference.to_owned()))
    }

    /// Looks a name up in git's own order: a full ref, a tag, a branch, then a commit.
    pub(super) fn resolve(&self, wanted: Option<&str>) -> Wanted {
        let Some(wanted) = wanted.filter(|wanted| *wanted != "HEAD") else {
            // A name that nobody could submit is not told as the job's.
            let head = self.head.as_deref().filter(|head| head.len() <= LONGEST);
            let head = head.and_then(|head| self.named(head)).or_else(|| self.named("HEAD"));
            return head.unwrap_or_else(|| Wanted::Nothing("HEAD".to_owned()));
        };
        let names = [
            wanted.to_owned(),
            format!("refs/{wanted}"),
            format!("refs/tags/{wanted}"),
            format!("refs/heads/{wanted}"),
        ];
        let is_hash = (4..=64).contains(&wanted.len()) && wanted.bytes().all(|b| b.is_ascii_hexdigit());
        names.iter().find_map(|name| self.named(name)).unwrap_or_else(|| {
            if is_hash { Wanted::Commit(wanted.to_owned()) } else { Wanted::Nothing(wanted.to_owned()) }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAID: &str = "ref: refs/heads/main\tHEAD\n1111\tHEAD\n1111\trefs/heads/main\n2222\trefs/heads/feature/a/b\n\
                        3333\trefs/tags/v1\n4444\trefs/tags/v1^{}\n5555\trefs/heads/v1\n6666\trefs/pull/7/head\n";

    fn named(reference: &str) -> Wanted {
        Wanted::Named(reference.to_owned())
    }

    #[test]
    fn names_are_looked_up_in_gits_order() {
        let remote = Remote::parse(SAID);
        for (wanted, want) in [
            (None, named("refs/heads/main")),
            (Some("HEAD"), named("refs/heads/main")),
            (Some("main"), named("refs/heads/main")),
            (Some("feature/a/b"), named("refs/heads/feature/a/b")),
            // A tag comes before a branch of the same name.
            (Some("v1"), named("refs/tags/v1")),
            (Some("heads/v1"), named("refs/heads/v1")),
            (Some("refs/pull/7/head"), named("refs/pull/7/head")),
            (Some("abc123"), Wanted::Commit("abc123".to_owned())),
            (Some("nothing"), Wanted::Nothing("nothing".to_owned())),
        ] {
            assert_eq!(remote.resolve(wanted), want, "{wanted:?}");
        }
    }

    #[test]
    fn a_default_branch_with_an_endless_name_is_taken_without_it() {
        let long = format!("refs/heads/{}", "x".repeat(65_000));
        let remote = Remote::parse(&format!("ref: {long}\tHEAD\n1111\tHEAD\n1111\t{long}\n"));
        assert_eq!(remote.resolve(None), named("HEAD"));
    }

    #[test]
    fn the_length_of_a_hash_tells_its_kind() {
        let said = |digits| format!("ref: refs/heads/main\tHEAD\n{}\tHEAD\n", "1".repeat(digits));
        assert!(!Remote::parse(&said(40)).is_sha256());
        assert!(Remote::parse(&said(64)).is_sha256());
    }

    #[test]
    fn an_empty_repository_has_no_head() {
        assert_eq!(Remote::parse("").resolve(None), Wanted::Nothing("HEAD".to_owned()));
    }
}
