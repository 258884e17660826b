//! The namespaces of the builds.

use std::str::FromStr;

use crate::environment::Reader;

const NAME: &str = "NOMAD_BUILD_NAMESPACES";

/// The namespaces that builds are taken for, each of them once: at least one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Namespaces {
    /// That of a submission that names none.
    pub first: String,
    /// The others.
    pub others: Vec<String>,
}

impl Namespaces {
    pub(super) fn read(reader: &mut Reader<'_>) -> Self {
        let read: Vec<Name> = reader.list(NAME, "a namespace's name").unwrap_or_default();
        let mut names: Vec<String> = Vec::new();
        for Name(name) in read {
            if names.contains(&name) {
                reader.wrong(NAME, &format!("has {name:?} twice"));
            } else {
                names.push(name);
            }
        }
        let mut names = names.into_iter();
        let first = names.next().unwrap_or_else(|| "default".to_owned());
        Self { first, others: names.collect() }
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &str> {
        std::iter::once(&self.first).chain(&self.others).map(String::as_str)
    }
}

/// What Nomad takes as the name of one.
struct Name(String);

impl FromStr for Name {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
        let fits = (1..=128).contains(&text.len()) && text.bytes().all(is_plain);
        fits.then(|| Self(text.to_owned())).ok_or(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::environment::BadConfiguration;

    fn read(value: Option<&str>) -> Result<Vec<String>, BadConfiguration> {
        let source = |name: &str| value.filter(|_| name == NAME).map(str::to_owned);
        let mut reader = Reader::new(&source);
        let namespaces = Namespaces::read(&mut reader);
        reader.finish(namespaces.iter().map(str::to_owned).collect())
    }

    #[test]
    fn the_first_one_is_that_of_whoever_names_none() {
        assert_eq!(read(None).unwrap(), ["default"]);
        assert_eq!(read(Some(" , ")).unwrap(), ["default"]);
        assert_eq!(read(Some("builds")).unwrap(), ["builds"]);
        assert_eq!(read(Some("team-b, team-a")).unwrap(), ["team-b", "team-a"]);
    }

    #[test]
    fn what_nomad_would_not_take_as_a_name_stops_the_start() {
        for (value, why) in
            [("a,*", "\"*\""), ("a b", "\"a b\""), ("a,b,a", "\"a\" twice"), ("a/b", "\"a/b\"")]
        {
            let BadConfiguration(errors) = read(Some(value)).unwrap_err();
            assert!(errors.len() == 1 && errors[0].contains(why), "{errors:?}");
        }
    }
}
