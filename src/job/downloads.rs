//! What the engine may download for an `ADD`. It does so as a program of its node, whose loopback interface and metadata service it
//! reaches, and steps of a build do not.

use std::net::{IpAddr, Ipv6Addr};

use super::allowed::{Address, Allowed, held};

impl Allowed {
    /// Whether the engine may download something for an `ADD`: an address, or a word with a variable in it.
    ///
    /// # Errors
    /// Why not.
    pub fn download(&self, address: &str) -> Result<(), String> {
        let host_and_path = Download::of(address);
        if self.downloads.is_empty() {
            return match host_and_path {
                Some(at) if at.is_of_the_node() => Err("is the node's own".to_owned()),
                _ => Ok(()),
            };
        }
        // What a variable makes of it, nobody knows before it is built.
        match host_and_path.filter(|_| !address.contains('$')) {
            Some(at) => held(&self.downloads, |rule| rule.covers(&at.path()), "hosts to download from"),
            None => Err("may be any address: write it out, without a variable".to_owned()),
        }
    }
}

/// What is downloaded.
struct Download<'a> {
    /// With its port, if that is not the scheme's own.
    host: String,
    path: &'a str,
}

impl<'a> Download<'a> {
    /// Of `scheme://[user@]host[:port]/path`, or `user@host:path`.
    fn of(address: &'a str) -> Option<Self> {
        if !address.contains("://") && !address.contains('@') {
            return None;
        }
        // What is behind it is none of the path.
        let address = address.split(['?', '#']).next().unwrap_or(address);
        let Address { host, path, .. } = Address::of(address);
        Some(Self { host, path })
    }

    fn path(&self) -> String {
        // A path that goes up is below nothing.
        if self.path.split('/').any(|part| part == "..") {
            String::new()
        } else {
            format!("{}/{}", self.host, self.path)
        }
    }

    /// Whether that is the machine itself, or who tells machines of a cloud what they may, as far as its name shows that.
    fn is_of_the_node(&self) -> bool {
        let bare = self.host.strip_prefix('[').and_then(|host| host.split_once(']')).map(|(host, _)| host);
        let host = bare.unwrap_or_else(|| self.host.split(':').next().unwrap_or_default());
        let host = host.strip_suffix('.').unwrap_or(host);
        let is_number = |part: &str| part.parse::<u64>().is_ok() || part.starts_with("0x");
        match host.parse::<IpAddr>().map(|address| address.to_canonical()) {
            Ok(IpAddr::V4(it)) => it.is_loopback() || it.is_unspecified() || it.is_link_local(),
            Ok(IpAddr::V6(it)) => {
                it.is_loopback() || it.is_unspecified() || it.is_unicast_link_local() || it == METADATA
            }
            // Some resolvers take other spellings of an address, and no name of a host is one.
            Err(_) => {
                let is_named = |name: &str| {
                    host == name || host.strip_suffix(name).is_some_and(|rest| rest.ends_with('.'))
                };
                host.is_empty()
                    || host.split('.').all(is_number)
                    || is_named("localhost")
                    || is_named("metadata.google.internal")
            }
        }
    }
}

/// Amazon's metadata service, where it is reached by IPv6.
const METADATA: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_downloaded_is_not_the_node_s_own_and_on_the_list_where_there_is_one() {
        let none = Allowed::default();
        for (address, want) in [
            ("https://example.com/a.tgz", true),
            ("$URL", true),
            ("git@github.com:acme/api.git", true),
            ("http://127.0.0.1:4646/v1/vars", false),
            ("http://127.1/", false),
            ("http://2130706433/", false),
            ("http://0x7f000001/", false),
            ("http://localhost:8080/jobs", false),
            ("http://a.LocalHost./", false),
            ("http://user@[::1]:80/", false),
            ("http://[::ffff:127.0.0.1]/", false),
            ("http://0.0.0.0/", false),
            ("http://169.254.169.254/latest/meta-data/", false),
            ("http://[fd00:ec2::254]/", false),
            ("http://metadata.google.internal/", false),
            ("http://169.254.169.254.example.com/", true),
            ("http:///x", false),
        ] {
            assert_eq!(none.download(address).is_ok(), want, "{address}");
        }
        let rules = ["example.com", "ghcr.io/acme"].map(|rule| rule.parse().unwrap()).into();
        let some = Allowed { downloads: rules, ..Allowed::default() };
        for (address, want) in [
            ("https://example.com/a.tgz?x=/y#z", true),
            ("https://example.com:443/a.tgz", true),
            ("https://example.com:8443/a.tgz", false),
            ("https://ghcr.io/acme/a", true),
            ("https://ghcr.io/acme/../evil/a", false),
            ("https://ghcr.io/evil/a", false),
            ("https://example.com@evil.example/a", false),
            ("https://example.com.evil.example/a", false),
            ("https://example.com/$FILE", false),
            ("$URL", false),
            ("git@example.com:a/b.git", true),
        ] {
            assert_eq!(some.download(address).is_ok(), want, "{address}");
        }
    }
}
