//! What a registry asks for when it answers 401 (pure; RFC 9110 section 11.6.1).
//!
//! Invariant: any header whatever is read without a panic; what cannot be understood is no challenge.

use reqwest::Url;

/// A header longer than this is not looked at.
const LONGEST_HEADER: usize = 8 * 1024;

/// A way to prove who is asking.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Challenge {
    /// User name and password with every request.
    Basic,
    /// A token, to be had at `realm`.
    Bearer {
        /// Where tokens are given out.
        realm: Url,
        /// What the token is for.
        service: Option<String>,
    },
}

impl Challenge {
    /// The best of all that the `WWW-Authenticate` headers offer: a token before a password.
    pub(super) fn choose<'a>(headers: impl IntoIterator<Item = &'a str>) -> Option<Self> {
        let offers: Vec<Offer> = headers.into_iter().flat_map(offers).collect();
        let bearer = offers.iter().find_map(Offer::bearer);
        let basic =
            || offers.iter().any(|offer| offer.scheme.eq_ignore_ascii_case("basic")).then_some(Self::Basic);
        bearer.or_else(basic)
    }
}

#[derive(Debug)]
struct Offer {
    scheme: String,
    parameters: Vec<(String, String)>,
}

impl Offer {
    fn parameter(&self, name: &str) -> Option<&str> {
        self.parameters
            .iter()
            .find(|(key, _)| key.eq_ignore_ascii_case(name))
            .map(|(_, value)| value.as_str())
    }

    fn bearer(&self) -> Option<Challenge> {
        if !self.scheme.eq_ignore_ascii_case("bearer") {
            return None;
        }
        let realm = Url::parse(self.parameter("realm")?).ok()?;
        let plain = realm.username().is_empty() && realm.password().is_none() && realm.has_host();
        plain.then(|| Challenge::Bearer { realm, service: self.parameter("service").map(str::to_owned) })
    }
}

/// The offers of one header, as far as it can be read.
fn offers(header: &str) -> Vec<Offer> {
    let mut found: Vec<Offer> = Vec::new();
    let mut rest = if header.len() > LONGEST_HEADER { "" } else { header };
    loop {
        rest = rest.trim_start_matches([' ', '\t', ',']);
        let Some((name, after)) = token(rest) else { return found };
        let Some(value) = after.trim_start_matches([' ', '\t']).strip_prefix('=') else {
            found.push(Offer { scheme: name.to_owned(), parameters: Vec::new() });
            rest = after;
            continue;
        };
        let value = value.trim_start_matches([' ', '\t']);
        let (Some((value, after)), Some(offer)) = (quoted(value).or_else(|| bare(value)), found.last_mut())
        else {
            return found;
        };
        offer.parameters.push((name.to_owned(), value));
        rest = after;
    }
}

fn token(text: &str) -> Option<(&str, &str)> {
    let is_token = |c: char| c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~/".contains(c);
    let end = text.find(|c| !is_token(c)).unwrap_or(text.len());
    (end > 0).then(|| text.split_at(end))
}

fn bare(text: &str) -> Option<(String, &str)> {
    token(text).map(|(value, rest)| (value.to_owned(), rest))
}

/// A quoted string, which has to be closed.
fn quoted(text: &str) -> Option<(String, &str)> {
    let mut characters = text.strip_prefix('"')?.char_indices();
    let mut value = String::new();
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => return Some((value, &text[at + 2..])),
            '\\' => value.push(characters.next()?.1),
            other => value.push(other),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bearer(realm: &str, service: Option<&str>) -> Challenge {
        Challenge::Bearer { realm: realm.parse().unwrap(), service: service.map(str::to_owned) }
    }

    #[test]
    fn the_challenges_of_real_registries_are_understood() {
        let hub = r#"Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:a/b:pull,push""#;
        let cases = [
            (vec![hub], Some(bearer("https://auth.docker.io/token", Some("registry.docker.io")))),
            (vec![r#"Basic realm="x, y""#], Some(Challenge::Basic)),
            (vec!["basic"], Some(Challenge::Basic)),
            (vec![r#"BEARER Realm = "https://a/" , Service=b"#], Some(bearer("https://a/", Some("b")))),
            (vec![r#"Basic realm="r", Bearer realm="https://a/t""#], Some(bearer("https://a/t", None))),
            (vec!["Basic realm=r", r#"Bearer realm="https://a/t""#], Some(bearer("https://a/t", None))),
            (vec!["Negotiate abc==, Basic realm=r"], None),
            (vec![r#"Bearer realm="https://a/\"q\"""#], Some(bearer("https://a/\"q\"", None))),
        ];
        for (headers, expected) in cases {
            assert_eq!(Challenge::choose(headers.iter().copied()), expected, "{headers:?}");
        }
    }

    #[test]
    fn hostile_challenges_are_none() {
        let long = format!("Bearer realm=\"https://a/{}\"", "x".repeat(LONGEST_HEADER));
        let cases = [
            "",
            ",,,",
            "=",
            "realm=\"https://a/\"",
            "Bearer",
            "Bearer realm",
            "Bearer realm=",
            "Bearer realm=\"https://a/",
            "Bearer realm=\"https://a/\\",
            "Bearer realm=\"not a url\"",
            "Bearer realm=\"data:text/plain,x\"",
            "Bearer realm=\"https://user:pass@a/\"",
            "Bearer \u{1F980}=\"x\"",
            "\"Bearer\" realm=\"https://a/\"",
            &long,
        ];
        for header in cases {
            assert_eq!(Challenge::choose([header]), None, "{header}");
        }
    }

    proptest::proptest! {
        #[test]
        fn any_header_is_read_without_a_panic(header in ".*", tail in "[ ,=\"\\\\a-zé]*") {
            Challenge::choose([header.as_str(), &format!("Bearer {tail}")]);
        }
    }
}
