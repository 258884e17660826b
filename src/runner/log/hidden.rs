//! What a log shows of a text with a secret in it, in any form and however its bytes arrive: for tests, and for `make fuzz`.
//!
//! Invariant: what is left of a secret is found by how it was written down, not by what hides it.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE};

use super::super::mask::{LEAST, Masker};
use super::Message;
use super::lines::Lines;
use crate::job::{Line, Stream};

/// Writes a text down.
type Encode = fn(&str) -> String;

/// Those that write two texts side by side as they write each.
const APART: [Encode; 9] = [
    str::to_owned,
    json,
    |text| json(&json(text)),
    ascii,
    |text| percent(text, |_| false),
    |text| percent(text, is_unreserved),
    |text| percent(text, is_unreserved).replace("%20", "+"),
    |text| percent(&json(text), is_unreserved),
    |text| percent(&ascii(text), |_| false),
];

/// Those whose characters depend on what stands before.
const BASE64: [Encode; 4] = [
    |text| STANDARD.encode(text),
    |text| URL_SAFE.encode(text),
    |text| percent(&STANDARD.encode(text), is_unreserved),
    |text| {
        let text = STANDARD.encode(text).into_bytes();
        text.chunks(20).map(String::from_utf8_lossy).collect::<Vec<_>>().join("\n")
    },
];

/// How many forms there are.
const FORMS: usize = APART.len() + BASE64.len();

fn json(text: &str) -> String {
    let quoted = serde_json::Value::from(text).to_string();
    quoted[1..quoted.len() - 1].to_owned()
}

fn ascii(text: &str) -> String {
    text.encode_utf16().map(|unit| format!("\\u{unit:04x}")).collect()
}

fn percent(text: &str, is_plain: fn(u8) -> bool) -> String {
    let one = |byte| if is_plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") };
    text.bytes().map(one).collect()
}

fn is_unreserved(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-._~".contains(&byte)
}

/// A secret, what stands before and behind it, and which form all of it is written in.
#[derive(Debug)]
struct Told<'a> {
    secret: &'a str,
    before: &'a str,
    behind: &'a str,
    form: usize,
}

impl Told<'_> {
    fn all(&self) -> String {
        format!("{}{}{}", self.before, self.secret, self.behind)
    }

    fn is_base64(&self) -> bool {
        self.form >= APART.len()
    }

    fn encode(&self, text: &str) -> String {
        APART.iter().chain(&BASE64).nth(self.form).map_or_else(String::new, |encode| encode(text))
    }

    /// What must not be seen of it.
    fn pieces(&self) -> Vec<String> {
        if self.is_base64() {
            let whole = self.secret.strip_suffix('\n').unwrap_or(self.secret);
            let (from, to) = (self.before.len(), self.before.len() + whole.len());
            let all = STANDARD.encode(self.all());
            // What is made of its bits alone.
            let own = &all.as_bytes()[(from * 8).div_ceil(6)..to * 8 / 6];
            return own.windows(LEAST).map(|piece| String::from_utf8_lossy(piece).into_owned()).collect();
        }
        if self.form > 0 {
            return vec![self.encode(self.secret)];
        }
        let lines = self.secret.split(['\n', '\r']).filter(|line| line.len() >= LEAST);
        // What fences a key is in all of them.
        lines.filter(|line| !line.starts_with("-----")).map(str::to_owned).collect()
    }

    /// What a log shows of it that arrives in pieces of a size. Where it is asked at once, each is shown as far as it may be.
    fn shown(&self, size: usize, at_once: bool) -> String {
        let masker = Arc::<OnceLock<Masker>>::default();
        let Ok(of_secret) = Masker::new([self.secret.as_bytes()]) else { return String::new() };
        masker.get_or_init(|| of_secret);
        let mut out = Vec::new();
        let mut lines = Lines::new(&mut out, false, masker);
        for bytes in self.encode(&self.all()).as_bytes().chunks(size.max(1)) {
            lines.take(Message::Output(Stream::Stdout, bytes.to_vec()));
            if at_once {
                lines.show_open(Instant::now() + Duration::from_hours(1));
            }
        }
        lines.flush_open();
        lines.flush();
        drop(lines);
        let written = String::from_utf8_lossy(&out);
        let lines = written.lines().filter_map(Line::parse);
        lines.map(|line| line.text + if line.tag.partial { "" } else { "\n" }).collect()
    }

    /// What is shown of it as a whole and of pieces of a size, with nothing of the secret in either.
    fn check(&self, size: usize) -> (String, String) {
        let (whole, cut) = (self.shown(usize::MAX, false), self.shown(size, true));
        for shown in [&whole, &cut] {
            let plain = if self.is_base64() {
                // Of either alphabet, and as URLs have it.
                shown.replace("%2B", "+").replace("%2F", "/").replace('-', "+").replace('_', "/")
            } else {
                shown.clone()
            };
            let left = self.pieces().into_iter().find(|piece| plain.contains(piece.as_str()));
            assert!(left.is_none(), "{self:?} in {size}: {left:?} is left of it: {shown}");
        }
        (whole, cut)
    }
}

/// See `src/fuzz.rs`: nothing is left of a secret of six bytes or more, in any form and however it arrives, and nothing is lost of
/// what is none. The first byte says how long the secret is, which comes next. Of the text behind, the first three say its form,
/// what it comes in, and where the secret stands.
#[cfg(feature = "fuzz")]
pub(crate) fn fuzz_mask(bytes: &[u8]) {
    let Some((&length, rest)) = bytes.split_first() else { return };
    let Some((secret, text)) = rest.split_at_checked(usize::from(length)) else { return };
    let Ok(masker) = Masker::new([secret]) else { return };
    let (whole, place) = (masker.mask(text), masker.cut(text, text.len() / 2));
    assert!(place <= text.len(), "{place}");
    // What stands on both sides of a cut is masked as the whole was.
    let halves = [masker.mask(&text[..place]), masker.mask(&text[place..])].concat();
    assert!(halves == *whole, "{secret:?} {text:?} {place}");
    // Among masks it could not be told from them.
    if secret.len() < LEAST || secret.contains(&b'*') {
        return;
    }
    assert!(!whole.windows(secret.len()).any(|window| window == secret), "{secret:?} {text:?}");
    let ([form, size, place, text @ ..], Ok(secret)) = (text, str::from_utf8(secret)) else { return };
    let text = String::from_utf8_lossy(text);
    let place = (0..=usize::from(*place).min(text.len())).rev().find(|&at| text.is_char_boundary(at));
    let (before, behind) = text.split_at(place.unwrap_or(0));
    let told = Told { secret, before, behind, form: usize::from(*form) % FORMS };
    let (whole, cut) = told.check(usize::from(*size));
    // A longer row of secrets is cut somewhere, as what is kept of a line is bounded.
    if told.encode(&told.all()).len() <= 2 * masker.hold() {
        assert!(whole == cut, "{told:?} in {size}: {cut}, and at once {whole}");
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::job::PART;

    #[test]
    fn a_secret_is_hidden_in_every_form_at_every_small_size_and_wherever_it_is_cut() {
        // Behind half an escape it would begin with a tab.
        let secret = "t\u{e9}/\"\\n";
        for form in 0..FORMS {
            for before in ["", "\\"] {
                let told = |behind| Told { secret, before, behind, form };
                // As much as may be held back, so that all of it is shown before the line's end.
                let one = told("").encode("x").len();
                let behind = "x".repeat(secret.len() * 18 / one + 9);
                let told = told(&behind);
                for size in 1..20 {
                    let (whole, cut) = told.check(size);
                    assert!(whole.contains("***") && whole == cut, "{told:?} in {size}: {cut}, {whole}");
                }
            }
        }
    }

    #[test]
    fn a_long_line_is_cut_beside_a_secret_and_not_within_it() {
        let secret = "t/k+\"e\\n";
        let hold = secret.len() * 18 - 1;
        for form in [3, 8, 9] {
            let one = Told { secret, before: "", behind: "", form };
            let (unit, length) = (one.encode("x").len(), one.encode(secret).len());
            for back in [0, length / 2, length] {
                // The first cut is where so many bytes stand behind it.
                let before = "x".repeat((PART + hold + 1 - back) / unit);
                let behind = "y".repeat(3 * hold / unit);
                let told = Told { before: &before, behind: &behind, ..one };
                for size in [1000, PART + 2 * hold + 1] {
                    let (whole, cut) = (told.shown(usize::MAX, false), told.shown(size, false));
                    assert!(whole.contains("***") && whole == cut, "{form} {back} {size}");
                }
            }
        }
    }

    proptest! {
        #[test]
        fn whatever_a_secret_is_nothing_of_it_is_left(
            secret in "[ -)+-~]{6,9}|[^*\\pC]{6,7}|[a-z\"]{6,8}\n[a-z\\\\]{1,8}\n",
            before in "[\\\\%+a\" ]{0,9}|\\PC{0,9}",
            behind in "[\\\\%+a\" ]{0,200}|\\PC{0,200}",
            form in 0..FORMS,
            size in 1_usize..40,
        ) {
            let told = Told { secret: &secret, before: &before, behind: &behind, form };
            let (whole, cut) = told.check(size);
            prop_assert_eq!(whole, cut);
        }
    }
}
