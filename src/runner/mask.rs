//! Hides the secrets that a task was given in what it writes, however they are written down.
//!
//! This is a backup: what keeps a secret is that user code is not given it. Known by sight are a secret as it is, in base64
//! at any place within other bytes, percent-encoded, and escaped as in JSON; of one of several lines, each line.
//!
//! Invariant: where a secret lies does not depend on how its bytes arrive.

use std::borrow::Cow;
use std::ops::Range;

use aho_corasick::{AhoCorasick, AhoCorasickKind, BuildError, MatchKind};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD;

/// What stands in a secret's place.
const MASK: &[u8] = b"***";

/// Shorter ones are not hidden: they are all over any text, and what is missing of it would tell them.
pub(super) const LEAST: usize = 6;

/// The longest secret, in bytes, of which every piece is known by sight in base64. Of a longer one only whole lines are, as programs
/// break them after so many characters: base64(1), and PEM.
const WINDOWED: usize = 16 << 10;
const WRAPS: [usize; 2] = [76, 64];

/// How many bytes one byte of a secret is written with at most: `\u0041`, and that may be percent-encoded.
const WIDEST: usize = 18;

/// Finds secrets in text.
pub(super) struct Masker {
    patterns: Option<AhoCorasick>,
    longest: usize,
}

impl Masker {
    /// One that knows these secrets.
    pub(super) fn new<'a>(secrets: impl IntoIterator<Item = &'a [u8]>) -> Result<Self, BuildError> {
        let mut patterns: Vec<Vec<u8>> = secrets.into_iter().flat_map(forms).collect();
        patterns.sort_unstable();
        patterns.dedup();
        let longest = patterns.iter().map(Vec::len).max().unwrap_or_default();
        if patterns.is_empty() {
            return Ok(Self { patterns: None, longest });
        }
        let built = AhoCorasick::builder()
            .match_kind(MatchKind::Standard)
            .kind(Some(AhoCorasickKind::ContiguousNFA))
            .build(&patterns)?;
        Ok(Self { patterns: Some(built), longest })
    }

    /// How much of a text that goes on has to be held back, as it may be the begin of a secret.
    pub(super) fn hold(&self) -> usize {
        (self.longest * WIDEST).saturating_sub(1)
    }

    /// A text without its secrets.
    pub(super) fn mask<'a>(&self, text: &'a [u8]) -> Cow<'a, [u8]> {
        let found = self.find_in(&views(text));
        if found.is_empty() {
            return Cow::Borrowed(text);
        }
        let mut out = Vec::with_capacity(text.len());
        let mut from = 0;
        for secret in found {
            out.extend_from_slice(&text[from..secret.start]);
            out.extend_from_slice(MASK);
            from = secret.end;
        }
        out.extend_from_slice(&text[from..]);
        Cow::Owned(out)
    }

    /// The last place up to `most` where a text can be cut without cutting a secret, or what is read as one; behind a secret that is
    /// longer than that. Where that is not known before more of the text is there, it is cut nowhere.
    pub(super) fn cut(&self, text: &[u8], most: usize) -> usize {
        let views = views(text);
        let found = self.find_in(&views);
        let may_wait = text.len() <= 2 * self.hold();
        let mut place = most;
        loop {
            // What is behind half an escape would be read otherwise.
            let is_between = |place: &usize| views.iter().all(|view| view.is_between(*place));
            match (1..=place).rev().find(is_between) {
                Some(between) => place = between,
                None if may_wait => return 0,
                None => {}
            }
            match found.iter().find(|secret| secret.start < place && place < secret.end) {
                None => return place,
                Some(secret) if secret.start > 0 => place = secret.start,
                // One that is still on its way may share bytes with it.
                Some(_) if may_wait => return 0,
                Some(secret) => return secret.end,
            }
        }
    }

    /// Where secrets are, in order and apart.
    fn find_in(&self, views: &[View<'_>]) -> Vec<Range<usize>> {
        let Some(patterns) = &self.patterns else { return Vec::new() };
        let mut found = Vec::new();
        for view in views {
            // Overlapping ones too: of two secrets that share bytes, nothing of either stays.
            found.extend(patterns.find_overlapping_iter(&view.bytes).map(|hit| view.origin(hit.range())));
        }
        found.sort_unstable_by_key(|secret| secret.start);
        let mut apart: Vec<Range<usize>> = Vec::new();
        for secret in found {
            match apart.last_mut() {
                Some(last) if secret.start <= last.end => last.end = last.end.max(secret.end),
                _ => apart.push(secret),
            }
        }
        apart
    }
}

/// The forms of a secret that are looked for in each view.
fn forms(secret: &[u8]) -> Vec<Vec<u8>> {
    let mut forms = vec![secret.to_vec()];
    let lines = secret.split(|&byte| byte == b'\n' || byte == b'\r');
    // The armour of a PEM file is the same in all of them.
    forms.extend(lines.filter(|line| !line.starts_with(b"-----")).map(<[u8]>::to_vec));
    // A text in base64 says nothing of where its line ended.
    let whole = secret.strip_suffix(b"\n").unwrap_or(secret);
    for aligned in (0..3).filter_map(|before| aligned_base64(whole, before)) {
        for text in [aligned.replace('+', "-").replace('/', "_"), aligned] {
            let bytes = text.as_bytes();
            if whole.len() <= WINDOWED {
                // Wherever lines are broken: what stands before the secret says where that is.
                forms.extend(bytes.windows(LEAST).map(<[u8]>::to_vec));
                continue;
            }
            for wrap in WRAPS {
                forms.extend(bytes.chunks(wrap).map(<[u8]>::to_vec));
            }
            forms.push(text.into_bytes());
        }
    }
    forms.retain(|form| form.len() >= LEAST);
    forms
}

/// What of a text in base64 depends on nothing but a secret that stands behind so many bytes.
fn aligned_base64(secret: &[u8], before: usize) -> Option<String> {
    let mut bytes = vec![0; before];
    bytes.extend_from_slice(secret);
    let encoded = STANDARD_NO_PAD.encode(&bytes);
    // A character is six bits, so one at either end may be made of others' bits, too.
    let from = (before * 8).div_ceil(6);
    let to = bytes.len() * 8 / 6;
    encoded.get(from..to).map(str::to_owned)
}

/// A text as somebody reads it who decodes it, and where each of its bytes comes from.
struct View<'a> {
    bytes: Cow<'a, [u8]>,
    /// The begin of each byte in the text, and the text's end; none where nothing is decoded.
    begins: Option<Vec<usize>>,
}

impl View<'_> {
    fn origin(&self, range: Range<usize>) -> Range<usize> {
        match &self.begins {
            Some(begins) => begins[range.start]..begins[range.end],
            None => range,
        }
    }

    /// Whether a place in the text is between what is read, and not within an escape.
    fn is_between(&self, place: usize) -> bool {
        self.begins.as_ref().is_none_or(|begins| begins.binary_search(&place).is_ok())
    }
}

/// A text as it is, and as it is read where it is percent-encoded, escaped as in JSON once or twice, or both, one within the other.
fn views(text: &[u8]) -> Vec<View<'_>> {
    let plain = View { bytes: Cow::Borrowed(text), begins: None };
    let is_escaped = |view: &View<'_>| view.bytes.contains(&b'\\');
    let is_encoded = text.iter().any(|byte| b"%+".contains(byte));
    let mut views = vec![plain];
    let mut twice = None;
    if is_escaped(&views[0]) {
        views.push(decoded(&views[0], json));
        twice = is_escaped(&views[1]).then(|| decoded(&views[1], json));
    }
    if is_encoded {
        for of in 0..views.len() {
            for decode in [percent, form] {
                let inner = decoded(&views[of], decode);
                if is_escaped(&inner) {
                    views.push(decoded(&inner, json));
                }
                views.push(inner);
            }
        }
    }
    views.extend(twice);
    views
}

/// Decodes what begins a text: how many bytes it is, and what it says.
type Decode = fn(&[u8]) -> (usize, Vec<u8>);

fn decoded(of: &View<'_>, decode: Decode) -> View<'static> {
    let mut bytes = Vec::with_capacity(of.bytes.len());
    let mut begins = Vec::with_capacity(of.bytes.len() + 1);
    let mut at = 0;
    while at < of.bytes.len() {
        let (length, said) = decode(&of.bytes[at..]);
        begins.extend(std::iter::repeat_n(of.origin(at..at).start, said.len()));
        bytes.extend(said);
        at += length;
    }
    begins.push(of.origin(at..at).start);
    View { bytes: Cow::Owned(bytes), begins: Some(begins) }
}

fn percent(text: &[u8]) -> (usize, Vec<u8>) {
    match text {
        [b'%', high, low, ..] => match (hexadecimal(*high), hexadecimal(*low)) {
            (Some(high), Some(low)) => (3, vec![high << 4 | low]),
            _ => (1, vec![b'%']),
        },
        _ => (1, vec![text[0]]),
    }
}

/// The same as a form has it.
fn form(text: &[u8]) -> (usize, Vec<u8>) {
    if text[0] == b'+' { (1, vec![b' ']) } else { percent(text) }
}

fn json(text: &[u8]) -> (usize, Vec<u8>) {
    let [b'\\', kind, rest @ ..] = text else { return (1, vec![text[0]]) };
    let said = match kind {
        b'n' => b'\n',
        b'r' => b'\r',
        b't' => b'\t',
        b'b' => 8,
        b'f' => 12,
        b'"' | b'\\' | b'/' | b'\'' => *kind,
        b'u' => return unicode(rest).unwrap_or((1, vec![b'\\'])),
        _ => return (1, vec![b'\\']),
    };
    (2, vec![said])
}

/// What stands behind `\u`: four digits, or those and another such escape for a character that needs two.
fn unicode(rest: &[u8]) -> Option<(usize, Vec<u8>)> {
    let unit = |from: usize| -> Option<u16> {
        let digits = rest.get(from..from + 4)?;
        digits.iter().try_fold(0, |sum, digit| Some(sum << 4 | u16::from(hexadecimal(*digit)?)))
    };
    let first = unit(0)?;
    let second = (rest.get(4..6) == Some(b"\\u")).then(|| unit(6)).flatten();
    let (length, units) = match second {
        Some(second) if (0xd800..0xdc00).contains(&first) => (12, vec![first, second]),
        _ => (6, vec![first]),
    };
    Some((length, String::from_utf16(&units).ok()?.into_bytes()))
}

fn hexadecimal(digit: u8) -> Option<u8> {
    char::from(digit).to_digit(16).and_then(|digit| u8::try_from(digit).ok())
}

#[cfg(test)]
mod tests {
    use base64::engine::general_purpose::URL_SAFE_NO_PAD;
    use proptest::prelude::*;

    use super::*;

    fn masked(secrets: &[&str], text: &str) -> String {
        let masker = Masker::new(secrets.iter().map(|secret| secret.as_bytes())).unwrap();
        String::from_utf8(masker.mask(text.as_bytes()).into_owned()).unwrap()
    }

    #[test]
    fn a_secret_is_hidden_however_it_is_written_down() {
        let secret = "s3cr\u{e9}t \"/+%&\\ key";
        let json = serde_json::to_string(secret).unwrap();
        let ascii: String = secret.encode_utf16().map(|unit| format!("\\u{unit:04x}")).collect();
        let every: String = secret.bytes().map(|byte| format!("%{byte:02x}")).collect();
        let few: String = secret.replace('%', "%25").replace(' ', "%20").replace('"', "%22");
        let form = few.replace('+', "%2B").replace("%20", "+");
        for written in
            [secret, &json, &ascii, &every, &every.to_uppercase().replace("%C3", "%c3"), &few, &form]
        {
            let line = format!("before {written} behind");
            let quoted = if written == json { "before \"***\" behind" } else { "before *** behind" };
            assert_eq!(masked(&[secret], &line), quoted, "{written}");
        }
        let in_url: String = json.bytes().map(|byte| format!("%{byte:02X}")).collect();
        assert_eq!(masked(&[secret], &in_url), "%22***%22");
    }

    #[test]
    fn what_is_not_secret_stays_as_it_is() {
        for line in ["", "plain", "100 % \\o/ \\u12 %zz +", "c2VjcmV0LXRoYXQtbm9ib2R5LWhhcw=="] {
            assert_eq!(masked(&["s3cr3t-key"], line), line);
            assert_eq!(masked(&[], line), line);
        }
        // Too short to be hidden.
        assert_eq!(masked(&["abc", ""], "abc"), "abc");
    }

    #[test]
    fn secrets_that_share_bytes_leave_nothing_of_each_other() {
        assert_eq!(masked(&["abcdef", "defghi"], "<abcdefghi>"), "<***>");
        assert_eq!(masked(&["abcdef", "abcdefghi"], "<abcdefghi>"), "<***>");
        assert_eq!(masked(&["abcdef"], "abcdefabcdef"), "***");
    }

    #[test]
    fn each_line_of_a_secret_is_one_and_its_armour_is_none() {
        let key = "-----BEGIN KEY-----\nb3BlbnNzaC1r\nZXktdjEAAAAA\n-----END KEY-----\n";
        for line in key.lines() {
            let hidden = if line.starts_with('-') { line } else { "***" };
            assert_eq!(masked(&[key], line), hidden);
        }
        let wrapped = STANDARD_NO_PAD.encode(key.repeat(4));
        for line in wrapped.as_bytes().chunks(76) {
            let line = std::str::from_utf8(line).unwrap();
            let seen = masked(&[&key.repeat(4)], line);
            assert!(seen.starts_with("***") && seen.len() < 8, "{line} {seen}");
        }
    }

    proptest! {
        #[test]
        fn of_base64_no_piece_is_left_wherever_its_lines_are_broken(
            before in prop::collection::vec(any::<u8>(), 0..100),
            secret in "[ -~]{8,60}",
            behind in prop::collection::vec(any::<u8>(), 0..40),
            width in 20_usize..100,
        ) {
            let encoded = STANDARD_NO_PAD.encode([before.as_slice(), secret.as_bytes(), behind.as_slice()].concat());
            let aligned = aligned_base64(secret.as_bytes(), before.len() % 3).unwrap();
            let masker = Masker::new([secret.as_bytes()]).unwrap();
            for line in encoded.as_bytes().chunks(width) {
                let seen = masker.mask(line).into_owned();
                for piece in aligned.as_bytes().windows(LEAST) {
                    prop_assert!(!seen.windows(LEAST).any(|left| left == piece), "{}", String::from_utf8_lossy(&seen));
                }
            }
        }

        #[test]
        fn urls_and_json_hide_it_whatever_it_is(
            secret in "[ -~]{3,20}\\PC{3,20}", before in "[a-z\"%\\\\ +&]{0,9}", behind in "[a-z ]{0,9}",
        ) {
            let percent = |text: &str, plain: fn(u8) -> bool| {
                let one = |byte: u8| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") };
                text.bytes().map(one).collect::<String>()
            };
            let json = |text: &str| {
                let quoted = serde_json::to_string(text).unwrap();
                quoted[1..quoted.len() - 1].to_owned()
            };
            let unreserved = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
            for encode in [
                &(|text: &str| percent(text, unreserved)) as &dyn Fn(&str) -> String,
                &|text| percent(text, |_| false),
                &|text| percent(text, unreserved).replace("%20", "+"),
                &|text| json(text),
                &|text| percent(&json(text), unreserved),
            ] {
                let [one, two, three] = [before.as_str(), &secret, &behind].map(encode);
                let seen = masked(&[&secret], &format!("{one}{two}{three}"));
                prop_assert!(seen.contains("***") && !seen.contains(&two), "{one} {two} {three}: {seen}");
            }
        }

        #[test]
        fn base64_hides_it_at_every_place(
            before in prop::collection::vec(any::<u8>(), 0..40),
            secret in "[ -~]{8,60}",
            behind in prop::collection::vec(any::<u8>(), 0..40),
        ) {
            let all = [before.as_slice(), secret.as_bytes(), behind.as_slice()].concat();
            let masker = Masker::new([secret.as_bytes()]).unwrap();
            for encoded in [STANDARD_NO_PAD.encode(&all), URL_SAFE_NO_PAD.encode(&all)] {
                let seen = masker.mask(encoded.as_bytes()).into_owned();
                let at = seen.windows(3).position(|three| three == MASK);
                prop_assert!(at.is_some(), "{encoded}");
                // Nothing of it is left but what bytes beside it are in, too.
                let kept = seen.len() - MASK.len();
                prop_assert!(kept * 6 <= (before.len() + behind.len()) * 8 + 4 * 6, "{encoded}");
            }
        }

        #[test]
        fn a_text_is_never_cut_within_a_secret(
            before in 0_usize..30,
            behind in 0_usize..30,
            most in 1_usize..60,
        ) {
            let masker = Masker::new([&b"0123456789"[..]]).unwrap();
            let text = ["x".repeat(before), "0123456789".to_owned(), "y".repeat(behind)].concat();
            let most = most.min(text.len());
            let cut = masker.cut(text.as_bytes(), most);
            prop_assert!(cut <= before || (before + 10..=text.len()).contains(&cut));
            // All of it but a secret that it begins with.
            prop_assert!(cut == most || (cut == before && most < before + 10));
            let (head, tail) = text.as_bytes().split_at(cut);
            let joined = [masker.mask(head), masker.mask(tail)].concat();
            prop_assert_eq!(joined, masker.mask(text.as_bytes()).into_owned());
        }
    }
}
