//! What names are taken, and what is refused.

use proptest::prelude::*;

use super::*;

fn accepts<T: FromStr>(good: &[&str], bad: &[&str]) {
    for text in good {
        assert!(text.parse::<T>().is_ok(), "{text:?} was refused");
    }
    for text in bad {
        assert!(text.parse::<T>().is_err(), "{text:?} was accepted");
    }
}

const HOSTILE: [&str; 9] =
    ["", "-x", "a b", "a\0b", "a\nb", "%{http_code}", "{{ env \"X\" }}", "\"", "a`id`"];

#[test]
fn names_are_plain() {
    accepts::<Name>(&["acme", "a.b_c@d/e+f-g", "0"], &HOSTILE);
    accepts::<Name>(&[], &["$(id)", "_a", &"x".repeat(129)]);
}

#[test]
fn tags_are_oci_tags() {
    accepts::<Tag>(&["v1", "_x", "1.0-rc.1", &"x".repeat(128)], &HOSTILE);
    accepts::<Tag>(&[], &[".x", "a:b", "a/b", "$(id)", &"x".repeat(129)]);
}

#[test]
fn image_names_are_oci_names() {
    accepts::<ImageName>(&["a", "a/b", "a-b", "a--b", "a__b", "a.b/c_d", "0a"], &HOSTILE);
    accepts::<ImageName>(&[], &["A", "a_", "_a", "a..b", "a___b", "a//b", "a/", "/a", "a-.b", "$(id)"]);
}

#[test]
fn registries_are_hosts_with_an_optional_path() {
    accepts::<RegistryUrl>(
        &["ghcr.io", "localhost:5000", "127.0.0.1:5000/team/app", "[::1]:5000/a", "Registry.example.com/x"],
        &HOSTILE,
    );
    accepts::<RegistryUrl>(
        &[],
        &[
            "https://ghcr.io",
            "u:p@ghcr.io",
            "host:0",
            "host:99999",
            "host:",
            "host/",
            "host/A",
            "-h",
            "h..x",
            "[x]",
        ],
    );
    let url: RegistryUrl = "ghcr.io:443/acme/api".parse().unwrap();
    assert_eq!((url.host(), url.path()), ("ghcr.io:443", Some("acme/api")));
}

#[test]
fn refs_are_git_refs() {
    accepts::<GitRef>(
        &[
            "main",
            "feature/a/b",
            "v1.0",
            "refs/heads/x",
            "abc123",
            "$(id)",
            "${NOMAD_TOKEN}",
            "%{x}",
            "gr\u{fc}n",
        ],
        &[
            "",
            "-x",
            "--upload-pack=x",
            "a b",
            "a\0b",
            "a..b",
            "a.lock",
            "a/",
            "/a",
            "a//b",
            ".a",
            "a@{1}",
            "@",
            "a^",
            "a:b",
        ],
    );
}

#[test]
fn paths_stay_inside() {
    accepts::<RelativePath>(
        &["Dockerfile", "a/b", ".", "-x", "$(id)", "a b", "..x/y", "%{x}"],
        &["", "/etc", "..", "a/../b", "a\0b", "a\nb"],
    );
}

#[test]
fn variable_paths_are_nomads() {
    accepts::<VariablePath>(
        &["creds/team-a/git", "a_b~c", "-x"],
        &["", "a b", "a\0b", "a.b", "$(id)", "/a", "a//b", "a/", &"x".repeat(129)],
    );
}

#[test]
fn repositories_are_reached_by_known_transports_and_without_passwords() {
    accepts::<RepoUrl>(
        &[
            "https://example.com/a.git",
            "ssh://git@example.com:22/a",
            "git@example.com:team/a.git",
            "http://127.0.0.1:80/a",
            "file:///srv/a",
            "https://example.com/$(id)",
        ],
        &HOSTILE,
    );
    accepts::<RepoUrl>(
        &[],
        &[
            "ext::sh -c id",
            "ext::sh",
            "git@h:-oProxyCommand=x",
            "git://example.com/a",
            "https://u:p@example.com/a",
            "https://token@example.com/a",
            "https:///a",
            "https://example.com",
            "file://a",
            "/srv/a",
            "https://e.com/a?x=1",
            "ssh://-oProxyCommand=x/a",
            "git@-oProxyCommand=x:a",
            "git@h:acme/../other/a.git",
            "git@h:../a.git",
            "https://e.com/a/%2E%2e/b",
            "ssh://git@h/acme/a.git%2F..%2fother/b.git",
            "file:///srv/git/a%2f..%2fother",
        ],
    );
    let url: RepoUrl = "git@example.com:team/Some.Repo.git".parse().unwrap();
    assert_eq!((url.scheme(), url.repository_name()), (Scheme::Ssh, "Some.Repo"));
}

proptest! {
    #[test]
    fn what_is_accepted_is_carried_verbatim(text in "\\PC{0,40}") {
        if let Ok(path) = text.parse::<RelativePath>() {
            prop_assert_eq!(path.as_str(), &text);
        }
        if let Ok(name) = text.parse::<GitRef>() {
            prop_assert_eq!(name.to_string(), text);
        }
    }

    #[test]
    fn a_path_component_is_what_the_specification_says(text in "[a-z0-9._-]{0,8}") {
        // The specification's own expression, tried by hand: no leading, trailing or mixed separators.
        let words: Vec<&str> = text.split(|c: char| c.is_ascii_alphanumeric()).filter(|s| !s.is_empty()).collect();
        let good = !text.is_empty()
            && text.starts_with(|c: char| c.is_ascii_alphanumeric())
            && text.ends_with(|c: char| c.is_ascii_alphanumeric())
            && words.iter().all(|s| matches!(*s, "." | "_" | "__") || s.bytes().all(|b| b == b'-'));
        prop_assert_eq!(is_path_component(&text), good);
    }
}
