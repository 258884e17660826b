//! What to type to go on where a command leaves off.
//!
//! Invariant: pure, and holds no token.

use std::borrow::Cow;

use clap::ValueEnum as _;

use super::fields::JobId;
use super::stream::Wanted;
use super::{Format, Globals};

/// The program with the flags in use, whoever set them.
#[derive(Debug)]
pub(super) struct Again(Vec<String>);

impl Again {
    /// The program as it was called.
    pub(super) fn new(globals: &Globals) -> Self {
        // Named one by one, so that a new flag is not forgotten. The token stays where it is kept.
        let Globals {
            url,
            cacert,
            client_cert,
            client_key,
            format,
            no_color,
            no_color_environment: _,
            nomad_token: _,
        } = globals;
        let mut words = vec!["nomad-build".to_owned(), "--url".to_owned(), url.clone()];
        let files = [("--cacert", cacert), ("--client-cert", client_cert), ("--client-key", client_key)];
        for (flag, file) in files {
            if let Some(file) = file {
                words.extend([flag.to_owned(), file.to_string_lossy().into_owned()]);
            }
        }
        if *format != Format::Text
            && let Some(format) = format.to_possible_value()
        {
            words.extend(["--output".to_owned(), format.get_name().to_owned()]);
        }
        words.extend(no_color.then(|| "--no-color".to_owned()));
        Self(words)
    }

    /// The command that follows a log from where it was left off.
    pub(super) fn follow(&self, wanted: &Wanted, raw: bool) -> String {
        let Wanted { job, phase, tail, cursor } = wanted;
        let mut words = vec!["logs", "-f"];
        words.extend(phase.iter().flat_map(|phase| ["--phase", phase]));
        words.extend(raw.then_some("--raw"));
        // What was shown of a tail counts, once something was.
        let tail = tail.filter(|_| cursor.is_none()).map(|lines| lines.to_string());
        words.extend(tail.iter().flat_map(|lines| ["--tail", lines]));
        words.extend(cursor.iter().flat_map(|cursor| ["--cursor", cursor]));
        words.push(job.as_str());
        self.with(&words)
    }

    /// The command that stops a job.
    pub(super) fn kill(&self, job: &JobId) -> String {
        self.with(&["kill", job.as_str()])
    }

    fn with(&self, words: &[&str]) -> String {
        let all = self.0.iter().map(String::as_str).chain(words.iter().copied());
        all.map(quoted).collect::<Vec<_>>().join(" ")
    }
}

/// A word as a shell takes it.
fn quoted(word: &str) -> Cow<'_, str> {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_./:@%+=,".contains(c);
    if !word.is_empty() && word.chars().all(is_plain) {
        return Cow::Borrowed(word);
    }
    Cow::Owned(format!("'{}'", word.replace('\'', r"'\''")))
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::cli::Cli;

    #[test]
    fn what_is_printed_has_the_flags_in_use_and_no_token() {
        let plain = ["--url", "http://127.0.0.1:8080"];
        let all = [
            "--url",
            "https://ci.example/it's",
            "--cacert",
            "/my files/ca.pem",
            "--client-cert",
            "c.pem",
            "--client-key=k.pem",
            "-o",
            "json",
            "--no-color",
        ];
        let plainly = "nomad-build --url http://127.0.0.1:8080";
        let fully = r"nomad-build --url 'https://ci.example/it'\''s' --cacert '/my files/ca.pem' --client-cert c.pem --client-key k.pem --output json --no-color";
        for (arguments, program) in [(&plain[..], plainly), (&all, fully)] {
            let token =
                ["nomad-build", "--nomad-token", "s3cret"].iter().chain(arguments).chain(&["version"]);
            let again = Again::new(&Cli::parse_from(token).globals);
            let job: JobId = "nb-1".parse().unwrap();
            assert_eq!(again.kill(&job), format!("{program} kill nb-1"));
            let mut wanted = Wanted { job, phase: None, tail: None, cursor: None };
            assert_eq!(again.follow(&wanted, false), format!("{program} logs -f nb-1"));
            wanted.phase = Some("test".to_owned());
            wanted.tail = Some(5);
            assert_eq!(again.follow(&wanted, false), format!("{program} logs -f --phase test --tail 5 nb-1"));
            wanted.cursor = Some("c1-a b".to_owned());
            let want = format!("{program} logs -f --phase test --raw --cursor 'c1-a b' nb-1");
            assert_eq!(again.follow(&wanted, true), want);
            assert!(Cli::try_parse_from(["nomad-build", "logs", "-f", "--cursor", "c", "nb-1"]).is_ok());
        }
    }
}
