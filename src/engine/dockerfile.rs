//! What a Dockerfile says that it takes from elsewhere: the program that reads it, and what `ADD` downloads.
//!
//! BuildKit tells of these only as it takes them, if at all, and which frontend reads the file is not known here. So this finds
//! whatever any of them may take for one, and rather too much: a comment or a text of a shell that looks like it counts.
//!
//! Invariant: pure; nothing is put in for a variable.

use std::collections::BTreeSet;

use serde_json::Value;

/// What a Dockerfile takes from elsewhere.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Named {
    /// The image that is to read it, as it is written there.
    pub frontends: BTreeSet<String>,
    /// What is downloaded: addresses, and words with a variable, which may be one.
    pub downloads: BTreeSet<String>,
}

impl Named {
    pub(super) fn by(text: &str) -> Self {
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        let mut named = Self::default();
        named.frontends.extend(directives(text).chain(object(text)));
        // Which one it is, is said by a directive, as a frontend reads it.
        for escape in ['\\', '`'] {
            for line in joined(text, escape) {
                named.downloads.extend(downloads(&line));
            }
        }
        named
    }
}

/// The values of `syntax` in the lines before the first that is none of a comment.
fn directives(text: &str) -> impl Iterator<Item = String> {
    let comments = text.lines().map(str::trim).map_while(|line| {
        let comment = line.strip_prefix('#').or_else(|| line.strip_prefix("//"));
        comment.or_else(|| line.is_empty().then_some(""))
    });
    comments.filter_map(|comment| {
        let (name, value) = comment.split_once('=')?;
        name.trim().eq_ignore_ascii_case("syntax").then(|| first_word(value)).flatten()
    })
}

/// The value of `syntax` where the whole file, or its begin, is an object.
fn object(text: &str) -> Option<String> {
    let after = match text.strip_prefix("#!") {
        Some(rest) => rest.split_once('\n').map_or("", |(_, rest)| rest),
        None => text,
    };
    let first = serde_json::Deserializer::from_str(after).into_iter::<Value>().next()?.ok()?;
    first
        .as_object()?
        .iter()
        .find(|(name, _)| name.eq_ignore_ascii_case("syntax"))?
        .1
        .as_str()
        .and_then(first_word)
}

fn first_word(text: &str) -> Option<String> {
    text.split_whitespace().next().map(str::to_owned)
}

/// The lines, those that go on put together, as Docker reads them: comments and empty lines between them count for nothing.
fn joined(text: &str, escape: char) -> Vec<String> {
    let (mut lines, mut line) = (Vec::new(), String::new());
    for part in text.lines() {
        if part.trim_start().starts_with('#') || (part.trim().is_empty() && !line.is_empty()) {
            continue;
        }
        match part.trim_end().strip_suffix(escape) {
            Some(begin) => line.push_str(begin),
            None => lines.push(std::mem::take(&mut line) + part),
        }
    }
    lines.push(line);
    lines
}

/// What an instruction downloads, if it is an `ADD`, now or when the image is built from.
fn downloads(line: &str) -> Vec<String> {
    let (mut name, mut rest) = instruction(line);
    if name.eq_ignore_ascii_case("ONBUILD") {
        (name, rest) = instruction(rest);
    }
    if !name.eq_ignore_ascii_case("ADD") {
        return Vec::new();
    }
    let words: Vec<String> = match serde_json::from_str(without_flags(rest)) {
        Ok(words) => words,
        // Quotes and escapes are taken out of a word before it is looked at.
        Err(_) => rest.split_whitespace().map(|word| word.replace(['"', '\'', '\\', '`'], "")).collect(),
    };
    words.into_iter().filter(|word| !word.starts_with("--") && may_be_download(word)).collect()
}

fn instruction(line: &str) -> (&str, &str) {
    let line = line.trim_start();
    line.split_once(char::is_whitespace).unwrap_or((line, ""))
}

fn without_flags(mut rest: &str) -> &str {
    loop {
        rest = rest.trim_start();
        if !rest.starts_with("--") {
            return rest;
        }
        rest = rest.split_once(char::is_whitespace).map_or("", |(_, rest)| rest);
    }
}

/// An address, `user@host:path`, which is git's, or what a variable may make one of. A variable behind a path's begin makes none.
fn may_be_download(word: &str) -> bool {
    let is_gits = word
        .split_once('@')
        .and_then(|(_, rest)| rest.split_once(':'))
        .is_some_and(|(host, _)| !host.contains('/'));
    let begins = word.split('/').next().unwrap_or(word);
    word.contains("://") || is_gits || begins.contains('$')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(words: &[&str]) -> BTreeSet<String> {
        words.iter().map(|word| (*word).to_owned()).collect()
    }

    #[test]
    fn whatever_may_read_a_dockerfile_is_found() {
        for (text, frontends) in [
            ("FROM a", &[][..]),
            ("# syntax=docker/dockerfile:1\nFROM a", &["docker/dockerfile:1"]),
            ("#syntax = docker/dockerfile:1 x\nFROM a", &["docker/dockerfile:1"]),
            ("\u{feff}# escape=`\n# SYNTAX=a/b\nFROM a", &["a/b"]),
            ("#!/usr/bin/env x\n# syntax=a/b\nFROM a", &["a/b"]),
            ("//syntax=a/b\n", &["a/b"]),
            ("{\"syntax\": \"a/b\"}", &["a/b"]),
            ("#!x\n{\"syntax\": \"a/b x\"} more", &["a/b"]),
            ("FROM a\n# syntax=a/b\n", &[]),
            ("# syntax=\nFROM a", &[]),
            ("# about syntax\nFROM a", &[]),
        ] {
            assert_eq!(Named::by(text).frontends, set(frontends), "{text}");
        }
    }

    #[test]
    fn whatever_may_be_downloaded_is_found() {
        for (text, downloads) in [
            ("ADD a.tar b /", &[][..]),
            ("ADD http://h/x /x", &["http://h/x"]),
            ("  add --chown=1:2 --checksum=sha256:a https://h/x /x", &["https://h/x"]),
            ("ADD [\"https://h/a b\", \"c\", \"/x\"]", &["https://h/a b"]),
            ("ADD --chown=1 [\"https://h/a\", \"/x\"]", &["https://h/a"]),
            ("ADD a \\\n# a comment\n\n  http://h/x /x", &["http://h/x"]),
            ("# escape=`\nADD a `\n http://h/x /x", &["http://h/x"]),
            ("ADD ht\\tp\"://h\"'/x' /x", &["http://h/x"]),
            ("ONBUILD ADD http://h/x /x", &["http://h/x"]),
            ("ADD git@h:a/b.git /x", &["git@h:a/b.git"]),
            ("ADD https://h/a.git#v1 /x", &["https://h/a.git#v1"]),
            ("ADD $URL /x", &["$URL"]),
            ("ADD ${A}://h /x", &["${A}://h"]),
            ("ADD dir/$FILE /x", &[]),
            ("ADD a@b/c:d /x", &[]),
            ("RUN echo ADD http://h/x /x", &[]),
            ("COPY http://h/x /x", &[]),
            ("# ADD http://h/x /x", &[]),
        ] {
            assert_eq!(Named::by(text).downloads, set(downloads), "{text}");
        }
    }
}
