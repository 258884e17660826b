//! See `src/fuzz.rs`.

use chrono::DateTime;

use super::cursor::{Cursor, Position};
use super::decoder::{Decoder, Entry};
use crate::nomad::Frame;

/// A cursor is refused, or is the one spelling of what it says.
pub(crate) fn cursor(bytes: &[u8]) {
    let Ok(text) = str::from_utf8(bytes) else { return };
    if let Ok(cursor) = text.parse::<Cursor>() {
        assert!(cursor.to_string() == text, "{text:?}");
    }
}

/// However a log is cut up, it gives the same lines, in the order of their numbers. The first byte says how it is cut.
pub(crate) fn log(bytes: &[u8]) {
    let Some((&cut, log)) = bytes.split_first() else { return };
    let frame = |from: usize, data: &[u8]| Frame {
        data: data.to_vec(),
        file: "build.stdout.0".to_owned(),
        offset: u64::try_from(from + data.len()).unwrap_or(u64::MAX),
    };
    let whole = read([frame(0, log)]);
    let size = usize::from(cut) + 1;
    let pieces = read(log.chunks(size).enumerate().map(|(number, piece)| frame(number * size, piece)));
    assert!(whole == pieces, "cut by {size}: {whole:?} {pieces:?}");
    for pair in whole.windows(2) {
        assert!(pair[0].position < pair[1].position, "{pair:?}");
    }
}

fn read(frames: impl IntoIterator<Item = Frame>) -> Vec<Entry> {
    let mut decoder = Decoder::from_start(DateTime::UNIX_EPOCH);
    let mut entries = Vec::new();
    for frame in frames {
        decoder.feed(&frame, &mut entries);
    }
    decoder.finish(&mut entries);
    assert!(entries.iter().all(|entry| entry.position > Position::default() && !entry.text.contains('\n')));
    entries
}
