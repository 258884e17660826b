//! Where a registry is, and which URLs belong to it (pure).
//!
//! Invariant: a registry reached by HTTPS never leads to a plain-HTTP URL.

use std::collections::BTreeSet;

use reqwest::Url;

/// Which registries are spoken to without TLS: those on loopback, as a Docker Engine does, and those listed.
#[derive(Debug, Clone, Default)]
pub struct PlainHttp(BTreeSet<String>);

/// One registry's host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    host: String,
    base: Url,
    loopback: bool,
}

/// A text is not a registry's host.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a registry: `host` or `host:port` is expected")]
pub struct EndpointError(String);

/// A registry pointed to a URL that is not followed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum LocationError {
    #[error("it pointed to something that is no HTTP address")]
    NotHttp,
    #[error("it pointed to an address without TLS, although it is itself reached with TLS")]
    Downgrade,
}

impl PlainHttp {
    /// Allows the hosts listed, each as `host` or `host:port`, exactly as references write them.
    pub fn hosts(hosts: impl IntoIterator<Item = impl Into<String>>) -> Self {
        Self(hosts.into_iter().map(|host| host.into().to_ascii_lowercase()).collect())
    }
}

impl Endpoint {
    /// The registry `host[:port]`, as it stands in references; `docker.io` is Docker Hub.
    pub fn new(host: &str, plain: &PlainHttp) -> Result<Self, EndpointError> {
        let host = host.to_ascii_lowercase();
        let bad = || EndpointError(host.clone());
        let plausible = |c: char| c.is_ascii_alphanumeric() || "-._:[]".contains(c);
        if host.is_empty() || !host.chars().all(plausible) {
            return Err(bad());
        }
        let address = match host.as_str() {
            "docker.io" | "index.docker.io" => "registry-1.docker.io",
            other => other,
        };
        let with_tls = Url::parse(&format!("https://{address}/")).map_err(|_| bad())?;
        let loopback = is_loopback(&with_tls);
        if !loopback && !plain.0.contains(&host) {
            return Ok(Self { host, base: with_tls, loopback });
        }
        let base = Url::parse(&format!("http://{address}/")).map_err(|_| bad())?;
        Ok(Self { host, base, loopback })
    }

    /// The host as references write it.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// Whether the registry is on this machine, so that no proxy stands between.
    pub(super) fn is_loopback(&self) -> bool {
        self.loopback
    }

    /// The URL of `path`, which begins after the host's slash and holds only checked names.
    pub(super) fn url(&self, path: &str) -> Url {
        let mut url = self.base.clone();
        url.set_path(path);
        url
    }

    /// Whether credentials for this registry may go to `url`.
    pub(super) fn owns(&self, url: &Url) -> bool {
        self.base.origin() == url.origin()
    }

    /// Whether `url` is as well protected as the registry itself.
    pub(super) fn is_as_safe(&self, url: &Url) -> bool {
        url.scheme() == "https" || (url.scheme() == "http" && self.base.scheme() == "http")
    }

    /// The URL that a `Location` header leads to, when it came in an answer from `from`.
    ///
    /// A registry behind a proxy that ends TLS often names itself with `http:`; that is read as itself.
    pub(super) fn follow(&self, from: &Url, location: &str) -> Result<Url, LocationError> {
        let mut url = from.join(location).map_err(|_| LocationError::NotHttp)?;
        url.set_fragment(None);
        if !matches!(url.scheme(), "http" | "https") || !url.username().is_empty() || url.password().is_some()
        {
            return Err(LocationError::NotHttp);
        }
        if self.is_as_safe(&url) {
            return Ok(url);
        }
        let is_itself = url.host() == self.base.host() && url.port() == self.base.port();
        if is_itself && url.set_scheme("https").is_ok() { Ok(url) } else { Err(LocationError::Downgrade) }
    }
}

fn is_loopback(url: &Url) -> bool {
    let Some(host) = url.host_str() else { return false };
    let address = host.trim_start_matches('[').trim_end_matches(']').parse::<std::net::IpAddr>();
    host == "localhost" || address.is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint(host: &str) -> Endpoint {
        Endpoint::new(host, &PlainHttp::hosts(["plain.lan:5000"])).unwrap()
    }

    #[test]
    fn only_loopback_and_listed_hosts_do_without_tls() {
        let cases = [
            ("ghcr.io", "https://ghcr.io/v2/"),
            ("docker.io", "https://registry-1.docker.io/v2/"),
            ("index.docker.io", "https://registry-1.docker.io/v2/"),
            ("reg.example:8443", "https://reg.example:8443/v2/"),
            ("localhost:5000", "http://localhost:5000/v2/"),
            ("127.0.0.1:80", "http://127.0.0.1/v2/"),
            ("127.8.0.1:5000", "http://127.8.0.1:5000/v2/"),
            ("[::1]:5000", "http://[::1]:5000/v2/"),
            ("PLAIN.lan:5000", "http://plain.lan:5000/v2/"),
            ("plain.lan:5001", "https://plain.lan:5001/v2/"),
            ("localhost.evil.example", "https://localhost.evil.example/v2/"),
            ("127.0.0.1.evil.example", "https://127.0.0.1.evil.example/v2/"),
        ];
        for (host, expected) in cases {
            assert_eq!(endpoint(host).url("v2/").as_str(), expected);
        }
    }

    #[test]
    fn a_host_is_only_a_host() {
        for bad in
            ["", "a/b", "https://a", "user@a", "a?b", "a#b", "a b", "a:port", "a:99999", "[::1", "a\\b"]
        {
            assert!(Endpoint::new(bad, &PlainHttp::default()).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_location_is_followed_as_far_as_it_is_safe() {
        let upload = "v2/app/blobs/uploads/1";
        let cases = [
            ("reg.example", "/v2/u/2?_state=a%2Bb", Ok("https://reg.example/v2/u/2?_state=a%2Bb")),
            ("reg.example", "2?x=1", Ok("https://reg.example/v2/app/blobs/uploads/2?x=1")),
            ("reg.example", "https://cdn.example/u?sig=1", Ok("https://cdn.example/u?sig=1")),
            ("reg.example", "//cdn.example/u", Ok("https://cdn.example/u")),
            ("reg.example", "http://reg.example/v2/u", Ok("https://reg.example/v2/u")),
            ("reg.example:8443", "http://reg.example:8443/u", Ok("https://reg.example:8443/u")),
            ("reg.example:8443", "http://reg.example/u", Err(LocationError::Downgrade)),
            ("reg.example", "http://cdn.example/u", Err(LocationError::Downgrade)),
            ("reg.example", "http://reg.example:8080/u", Err(LocationError::Downgrade)),
            ("reg.example", "ftp://reg.example/u", Err(LocationError::NotHttp)),
            ("reg.example", "https://a:b@reg.example/u", Err(LocationError::NotHttp)),
            ("reg.example", "https://", Err(LocationError::NotHttp)),
            ("localhost:5000", "http://127.0.0.1:5001/u#x", Ok("http://127.0.0.1:5001/u")),
            ("localhost:5000", "https://cdn.example/u", Ok("https://cdn.example/u")),
        ];
        for (host, location, expected) in cases {
            let endpoint = endpoint(host);
            let followed = endpoint.follow(&endpoint.url(upload), location);
            assert_eq!(followed.as_ref().map(Url::as_str), expected.as_ref().copied(), "{host} {location}");
        }
    }

    #[test]
    fn credentials_belong_to_one_origin() {
        let endpoint = endpoint("reg.example");
        let cases = [
            ("https://reg.example/x", true),
            ("https://reg.example:443/x", true),
            ("https://reg.example:8443/x", false),
            ("http://reg.example/x", false),
            ("https://reg.example.evil/x", false),
        ];
        for (url, owned) in cases {
            assert_eq!(endpoint.owns(&url.parse().unwrap()), owned, "{url}");
        }
    }
}
