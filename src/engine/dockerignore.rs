//! The patterns of a `.dockerignore` file, read as Docker reads them.
//!
//! Invariant: pure; a path is slash-separated, clean and relative to the context.
//! Invariant: the last pattern that matches a path, or a directory above it, decides.
//!
//! The facts are those of moby/patternmatcher. Where that hands a pattern to a regular expression by accident (`\d` is
//! a digit there, `[*]` something odd), Go's documented `filepath.Match` holds here: `\d` is a `d`.

use std::iter::Peekable;
use std::str::Chars;

/// What is left out of a build context, and what is brought back.
#[derive(Debug, Default)]
pub(super) struct Patterns(Vec<Pattern>);

impl Patterns {
    /// Reads the text of a `.dockerignore` file; an error names the pattern and what is wrong with it.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        let lines = text.lines().filter(|line| !line.starts_with('#')).map(str::trim);
        lines.filter(|line| !line.is_empty()).map(Pattern::parse).collect::<Result<_, _>>().map(Self)
    }

    /// Whether the path stays out of the context.
    pub(super) fn excludes(&self, path: &str) -> bool {
        self.0.iter().rev().find(|pattern| pattern.covers(path)).is_some_and(|pattern| !pattern.exception)
    }

    /// Whether an exception may bring back something beneath a directory that is excluded: if not, nobody need look.
    pub(super) fn may_include_beneath(&self, dir: &str) -> bool {
        // What excludes the directory excludes all beneath it, so exceptions above that line are overruled.
        let decides = self.0.iter().rposition(|pattern| !pattern.exception && pattern.covers(dir));
        let later = &self.0[decides.map_or(0, |at| at + 1)..];
        later.iter().any(|pattern| pattern.exception && pattern.may_match_beneath(dir))
    }
}

/// One line: a glob, and whether it brings files back.
#[derive(Debug)]
struct Pattern {
    exception: bool,
    tokens: Vec<Token>,
}

impl Pattern {
    fn parse(line: &str) -> Result<Self, String> {
        let (exception, glob) = match line.strip_prefix('!') {
            Some(rest) => (true, rest.trim()),
            None => (false, line),
        };
        if glob.is_empty() {
            return Err("the pattern \"!\" names nothing to bring back".into());
        }
        let tokens =
            tokens(&clean(glob)).map_err(|why| format!("the pattern {line:?} is malformed: {why}"))?;
        Ok(Self { exception, tokens })
    }

    /// Whether the glob matches the path or a directory above it.
    fn covers(&self, path: &str) -> bool {
        let mut states = States::new(&self.tokens);
        for c in path.chars() {
            if c == '/' && states.accepting() {
                return true;
            }
            states.advance(c);
        }
        states.accepting()
    }

    /// Whether the glob matches the directory, one above it, or could match something beneath it.
    fn may_match_beneath(&self, dir: &str) -> bool {
        if self.covers(dir) {
            return true;
        }
        let mut states = States::new(&self.tokens);
        dir.chars().chain(['/']).for_each(|c| states.advance(c));
        states.alive()
    }
}

/// Go's `path.Clean`, and the leading slash dropped: patterns are relative to the context anyway.
fn clean(glob: &str) -> String {
    let rooted = glob.starts_with('/');
    let mut parts: Vec<&str> = Vec::new();
    for part in glob.split('/') {
        match part {
            "" | "." => {}
            ".." if parts.last().is_some_and(|last| *last != "..") => {
                parts.pop();
            }
            ".." if rooted => {}
            part => parts.push(part),
        }
    }
    match (parts.is_empty(), rooted) {
        // Neither is the path of anything within the context, so neither matches: nobody can exclude everything so.
        (true, true) => "/".into(),
        (true, false) => ".".into(),
        (false, _) => parts.join("/"),
    }
}

/// A piece of a glob.
#[derive(Debug)]
enum Token {
    Literal(char),
    /// `?`
    One,
    /// `*`
    Star,
    /// The start of an inner `**`: what follows it may begin at once, or past the next token.
    Fork,
    /// The rest of an inner `**`: all up to some slash.
    Through,
    /// A last `**`: all the rest.
    Rest,
    /// `[…]`: as in Go, a negated one matches a slash too.
    Class {
        negated: bool,
        ranges: Vec<(char, char)>,
    },
}

fn tokens(glob: &str) -> Result<Vec<Token>, &'static str> {
    let mut tokens = Vec::new();
    let mut chars = glob.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '*' if chars.next_if_eq(&'*').is_some() => {
                let first = tokens.is_empty();
                let slash = chars.next_if_eq(&'/').is_some();
                let plain = !chars.clone().any(|c| matches!(c, '*' | '?' | '[' | ']' | '\\'));
                // `**name` with nothing special after it is a mere suffix to Docker: it matches `a-name` too.
                if chars.peek().is_none() || (first && !slash && plain) {
                    tokens.push(Token::Rest);
                } else {
                    tokens.extend([Token::Fork, Token::Through]);
                }
            }
            '*' => tokens.push(Token::Star),
            '?' => tokens.push(Token::One),
            '[' => tokens.push(class(&mut chars)?),
            '\\' => tokens.push(Token::Literal(chars.next().ok_or("it ends in a backslash")?)),
            c => tokens.push(Token::Literal(c)),
        }
    }
    Ok(tokens)
}

/// The rest of a class, whose `[` is read.
fn class(chars: &mut Peekable<Chars<'_>>) -> Result<Token, &'static str> {
    let negated = chars.next_if_eq(&'^').is_some();
    let mut ranges = Vec::new();
    while ranges.is_empty() || chars.next_if_eq(&']').is_none() {
        let low = class_member(chars)?;
        let high = if chars.next_if_eq(&'-').is_some() { class_member(chars)? } else { low };
        if high < low {
            return Err("a range in brackets runs backwards");
        }
        ranges.push((low, high));
    }
    Ok(Token::Class { negated, ranges })
}

fn class_member(chars: &mut Peekable<Chars<'_>>) -> Result<char, &'static str> {
    let member = match chars.next() {
        Some('-' | ']') => return Err("a \"-\" or \"]\" in brackets needs a backslash before it"),
        Some('\\') => chars.next(),
        member => member,
    };
    member.ok_or("a bracket is not closed")
}

/// All the places in a glob that a path read so far may have led to: linear in the path, whatever the glob.
struct States<'a> {
    tokens: &'a [Token],
    /// One for each token, and the end.
    at: Vec<bool>,
}

impl<'a> States<'a> {
    fn new(tokens: &'a [Token]) -> Self {
        let mut states = Self { tokens, at: vec![false; tokens.len() + 1] };
        states.at[0] = true;
        states.skip();
        states
    }

    fn accepting(&self) -> bool {
        self.at[self.tokens.len()]
    }

    fn alive(&self) -> bool {
        self.at.contains(&true)
    }

    /// Follows the ways that need no character; they all lead forward.
    fn skip(&mut self) {
        for (i, token) in self.tokens.iter().enumerate() {
            if self.at[i] {
                match token {
                    Token::Star | Token::Rest => self.at[i + 1] = true,
                    Token::Fork => {
                        self.at[i + 1] = true;
                        self.at[i + 2] = true;
                    }
                    _ => {}
                }
            }
        }
    }

    fn advance(&mut self, c: char) {
        let mut next = vec![false; self.at.len()];
        for (i, token) in self.tokens.iter().enumerate().filter(|(i, _)| self.at[*i]) {
            match token {
                Token::Literal(literal) => next[i + 1] |= *literal == c,
                Token::One => next[i + 1] |= c != '/',
                Token::Star => next[i] |= c != '/',
                Token::Fork => {}
                Token::Through => {
                    next[i] = true;
                    next[i + 1] |= c == '/';
                }
                Token::Rest => next[i] = true,
                Token::Class { negated, ranges } => {
                    let within = ranges.iter().any(|(low, high)| (*low..=*high).contains(&c));
                    next[i + 1] |= within != *negated;
                }
            }
        }
        self.at = next;
        self.skip();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn patterns(text: &str) -> Patterns {
        Patterns::parse(text).unwrap()
    }

    #[test]
    fn a_pattern_matches_what_docker_matches() {
        for (pattern, path, expected) in [
            ("**", "file", true),
            ("**/", "dir/file", true),
            ("**/**", "dir/file", true),
            ("dir/**", "dir/dir2/file", true),
            ("abc/**", "abc", false),
            ("**/dir", "dir", true),
            ("**/dir", "dir/file", true),
            ("**/dir2/*", "dir/dir2/file", true),
            ("**/dir2/**", "dir/dir2/dir3/file", true),
            ("**file", "dir/dir/file", true),
            ("**file", "dir/a-file", true),
            ("**/file", "dir/a-file", false),
            ("**file*", "dir/a-file", false),
            ("**/file*.txt*", "dir/dir/file.txt", true),
            ("**/**/*.txt", "file.txt", true),
            ("**/**/*.txt2", "dir/dir/file.txt", false),
            ("a**/*.txt", "a/dir/dir/file.txt", true),
            ("a**b", "ab", true),
            ("a**b", "ax/b", true),
            ("a**b", "axb", false),
            ("a/*.txt", "a/dir/file.txt", false),
            ("a/*.txt**", "a/file.txt", true),
            ("*", "a/b/c", true),
            ("a*", "ab/c", true),
            ("a*/b", "a/c/b", false),
            ("a*b?c*x", "abxbbxdbxebxczzx", true),
            ("a*b?c*x", "abxbbxdbxebxczzy", false),
            ("a?b", "a☺b", true),
            ("a???b", "a☺b", false),
            ("a?b", "a/b", false),
            ("a*b", "a/b", false),
            ("a[b-d]e", "ace", true),
            ("a[b-d]e", "aae", false),
            ("a[^b-d]e", "aze", true),
            ("a[^b]c", "a/c", true),
            ("[a-ζ]*", "α", true),
            (r"[\]a]", "]", true),
            (r"[x\-]", "-", true),
            (r"[\-x]", "a", false),
            ("[!a]", "b", false),
            ("[*]", "*", true),
            (r"a\*b", "a*b", true),
            (r"a\*b", "axb", false),
            (r"a\\", r"a\", true),
            ("abc.def", "abcZdef", false),
            ("a.|)$(}+{bc", "a.|)$(}+{bc", true),
            (".*", "foo", false),
            ("**/.foo", "bar.foo", false),
            ("docs", "docs/a/b", true),
            ("docs", "docs2", false),
            ("docs", "a/docs", false),
        ] {
            assert_eq!(patterns(pattern).excludes(path), expected, "{pattern:?} on {path:?}");
        }
    }

    #[test]
    fn a_line_is_trimmed_cleaned_and_relative_to_the_context() {
        for (text, path, expected) in [
            ("# a\n\n  \nb", "# a", false),
            (" # a", "# a", true),
            ("  a  \r\n", "a", true),
            ("\u{feff}a", "a", true),
            ("/a", "a", true),
            ("//a//b/", "a/b", true),
            ("./a/./b", "a/b", true),
            ("a/../b", "b", true),
            ("/../a", "a", true),
            ("../a", "a", false),
            (".", "a", false),
            ("/", "a", false),
            ("*\n! /a", "a", false),
            ("*\n!!a", "!a", false),
            (r"\#a", "#a", true),
            (r"\!a", "!a", true),
        ] {
            assert_eq!(patterns(text).excludes(path), expected, "{text:?} on {path:?}");
        }
    }

    #[test]
    fn the_last_pattern_that_matches_decides() {
        for (text, path, expected) in [
            ("*.go\n!a.go", "a.go", false),
            ("!a.go\n*.go", "a.go", true),
            ("docs/\n!docs/README.md", "docs/README.md", false),
            ("docs/*\n!docs/README.md", "docs/b", true),
            ("**\n!util/docker/web", "util/docker/web/foo", false),
            ("**\n!util/docker/web\nutil/docker/web/foo", "util/docker/web/foo", true),
            ("**\n!dist/*.whl", "dist/a-2.4.0+g0-none.whl", false),
            ("*\n!a/b\na/b/c", "a/b/c/d", true),
        ] {
            assert_eq!(patterns(text).excludes(path), expected, "{text:?} on {path:?}");
        }
    }

    #[test]
    fn a_malformed_pattern_is_refused_and_named() {
        for pattern in [
            "!", "[", "[^", "[^bc", "a[", "[]a]", "[-]", "[x-]", "[-x]", "[a-b-c]", "[z-a]", r"\", "b/[",
            "*\n![",
        ] {
            assert!(Patterns::parse(pattern).is_err(), "{pattern:?}");
        }
        let error = Patterns::parse("ok\n!a[").unwrap_err();
        assert_eq!(error, "the pattern \"!a[\" is malformed: a bracket is not closed");
    }

    #[test]
    fn an_excluded_directory_is_searched_only_when_an_exception_may_be_beneath() {
        for (text, dir, expected) in [
            ("a", "a", false),
            ("a\n!a/b", "a", true),
            ("a\n!a/b/c", "a/b", true),
            ("a\n!a/b/c", "a/x", false),
            ("a\n!ab", "a", false),
            ("*\n!b", "a", false),
            ("*\n!**/keep", "a/b", true),
            ("*\n!*/keep", "a", true),
            ("*\n!*/keep", "a/b", false),
            ("*\n!a\na/b", "a/b", false),
            ("!a/b\na", "a", false),
        ] {
            assert_eq!(patterns(text).may_include_beneath(dir), expected, "{text:?} in {dir:?}");
        }
    }
}
