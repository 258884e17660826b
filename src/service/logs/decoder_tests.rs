//! Bytes of a log, torn in every way and out of order.

use proptest::prelude::*;

use super::*;

fn now() -> DateTime<Utc> {
    DateTime::from_timestamp(1_700_000_000, 0).unwrap()
}

fn written(seq: u64, text: &str) -> String {
    format!("2023-11-14T22:13:20.000000Z {seq} o {text}\n")
}

fn frame(file: u64, data: &[u8]) -> Frame {
    Frame { data: data.to_vec(), file: format!("alloc/logs/build.stdout.{file}"), offset: 0 }
}

fn decode(decoder: &mut Decoder, frames: &[Frame]) -> Vec<Entry> {
    let mut out = Vec::new();
    for frame in frames {
        decoder.feed(frame, &mut out);
    }
    out
}

/// Positions and texts, short.
fn short(entries: &[Entry]) -> Vec<(u32, u64, u32, &str)> {
    let of = |entry: &Entry| (entry.position.run, entry.position.seq, entry.position.sub);
    entries
        .iter()
        .map(|entry| {
            let (run, seq, sub) = of(entry);
            (run, seq, sub, entry.text.as_str())
        })
        .collect()
}

#[test]
fn a_line_torn_across_files_is_one_line() {
    let line = written(1, "torn in the middle");
    let (head, tail) = line.as_bytes().split_at(35);
    let got = decode(&mut Decoder::from_start(now()), &[frame(0, head), frame(1, tail)]);
    assert_eq!(short(&got), [(0, 1, 0, "torn in the middle")]);
}

#[test]
fn a_file_that_was_rotated_away_tears_no_line_in_two() {
    let (one, three) = (written(1, "whole"), written(900, "later"));
    let head = [one.as_bytes(), b"2023-11-14T22:13:20.000000Z 2 o cut o"].concat();
    let tail = [b"ff here\n", three.as_bytes()].concat();
    let got = decode(&mut Decoder::from_start(now()), &[frame(0, &head), frame(2, &tail)]);
    assert_eq!(short(&got), [(0, 1, 0, "whole"), (0, 900, 0, "later")]);
}

#[test]
fn a_log_whose_beginning_is_gone_begins_with_a_whole_line() {
    let tail = format!("st of a line\n{}{}", written(8, "a"), written(9, "b"));
    let got = decode(&mut Decoder::from_start(now()), &[frame(3, tail.as_bytes())]);
    assert_eq!(short(&got), [(0, 8, 0, "a"), (0, 9, 0, "b")]);
    let whole = decode(&mut Decoder::from_start(now()), &[frame(3, written(8, "a").as_bytes())]);
    assert_eq!(short(&whole), [(0, 8, 0, "a")]);
}

#[test]
fn from_anywhere_the_first_line_of_the_runner_is_the_first() {
    let text = format!("rest\nforeign\n{}panic\n", written(8, "a"));
    let mut first = frame(0, text.as_bytes());
    first.offset = 1000 + text.len() as u64;
    let got = decode(&mut Decoder::from_anywhere(2, now()), &[first]);
    assert_eq!(short(&got), [(2, 8, 0, "a"), (2, 8, 1, "panic")]);
    assert_eq!(got[0].offset, Some(1013));
}

#[test]
fn lines_of_others_are_shown_between_and_numbering_may_begin_anew() {
    let text = format!("start\n{}panic: \u{e4}\n\n{}{}", written(1, "a"), written(2, "b"), written(1, "c"));
    let bytes = [text.as_bytes(), b"\xff\n"].concat();
    let got = decode(&mut Decoder::from_start(now()), &[frame(0, &bytes)]);
    let want = [
        (0, 0, 1, "start"),
        (0, 1, 0, "a"),
        (0, 1, 1, "panic: \u{e4}"),
        (0, 1, 2, ""),
        (0, 2, 0, "b"),
        (1, 1, 0, "c"),
        (1, 1, 1, "\\xff"),
    ];
    assert_eq!(short(&got), want);
}

#[test]
fn a_line_without_an_end_takes_bounded_memory() {
    let mut decoder = Decoder::from_start(now());
    let mut out = Vec::new();
    for _ in 0..20 {
        decoder.feed(&frame(0, &vec![b'x'; 64 * 1024]), &mut out);
        assert!(decoder.pending.len() <= LONGEST);
    }
    decoder.feed(&frame(0, written(1, "not parsed: it is the end of the line").as_bytes()), &mut out);
    decoder.feed(&frame(0, written(1, "a").as_bytes()), &mut out);
    let total: usize = out.iter().filter(|entry| entry.position.seq == 0).map(|e| e.text.len()).sum();
    assert_eq!(total, 20 * 64 * 1024 + written(1, "not parsed: it is the end of the line").len() - 1);
    assert_eq!(out.iter().filter(|entry| !entry.partial).count(), 2);
    assert_eq!(out.last().unwrap().position, Position::after(1));
}

#[test]
fn what_a_killed_runner_left_without_an_end_is_shown_in_the_end() {
    let mut decoder = Decoder::from_start(now());
    let mut out = decode(&mut decoder, &[frame(0, b"2023-11-14T22:13:20.000000Z 1 e half")]);
    assert_eq!(short(&out), []);
    decoder.finish(&mut out);
    assert_eq!(short(&out), [(0, 1, 0, "half")]);
}

#[test]
fn lines_that_two_collectors_wrote_out_stand_in_their_order() {
    let seqs = [1, 2, 5, 3, 4, 6, 8, 7];
    let log: String = seqs.iter().map(|&seq| written(seq, &format!("line {seq}"))).collect();
    let got = decode(&mut Decoder::from_start(now()), &[frame(0, log.as_bytes())]);
    assert_eq!(got.iter().map(|entry| entry.position.seq).collect::<Vec<_>>(), [1, 2, 3, 4, 5, 6, 7, 8]);
    assert!(got.iter().all(|entry| entry.position.run == 0));
    // Who begins where one of them lies misses none of those that come after it.
    for (index, entry) in got.iter().enumerate() {
        let Some(offset) = entry.offset else { continue };
        let rest = frame(0, &log.as_bytes()[usize::try_from(offset).unwrap()..]);
        let again = decode(&mut Decoder::from_line(entry.position, offset, now()), &[rest]);
        assert_eq!(short(&again), short(&got[index..]));
    }
    assert!(got[1].offset.is_some() && got[5].offset.is_some(), "{got:?}");
}

#[test]
fn lines_that_are_lost_are_waited_for_in_bounds() {
    let mut decoder = Decoder::from_start(now());
    let log = [written(1, "a"), written(4, "d"), "panic\n".to_owned()].concat();
    let mut got = decode(&mut decoder, &[frame(0, log.as_bytes())]);
    assert_eq!((short(&got), decoder.waits_for()), (vec![(0, 1, 0, "a")], Some((0, 1))));
    decoder.release(&mut got);
    assert_eq!(short(&got), [(0, 1, 0, "a"), (0, 4, 0, "d"), (0, 4, 1, "panic")]);
    // Another run is not held back by it.
    let log = [written(9, "x"), written(1, "again")].concat();
    let got = decode(&mut decoder, &[frame(0, log.as_bytes())]);
    assert_eq!(short(&got), [(0, 9, 0, "x"), (1, 1, 0, "again")]);
    let many: String = (10..3000).map(|seq| written(seq, &"x".repeat(100))).collect();
    let got = decode(&mut decoder, &[frame(0, many.as_bytes())]);
    assert!(got.len() > 1000 && got[0].position.seq == 10, "{}", got.len());
}

#[test]
fn what_others_say_behind_a_line_that_is_held_takes_bounded_memory() {
    let mut decoder = Decoder::from_start(now());
    let head = [written(1, "a"), written(3, "c")].concat();
    let mut got = decode(&mut decoder, &[frame(0, head.as_bytes())]);
    assert_eq!(got.len(), 1);
    let panic = ["x".repeat(1 << 16), "\n".to_owned()].concat();
    for _ in 0..10 {
        got.extend(decode(&mut decoder, &[frame(0, panic.as_bytes())]));
    }
    assert_eq!(decoder.waits_for(), None);
    assert_eq!((got.len(), got[1].position), (12, Position::after(3)));
    assert!(got.is_sorted_by_key(|entry| entry.position));
}

#[test]
fn a_line_that_is_late_begins_no_run() {
    let later = |seq: u64, text: &str| written(seq, text).replace("22:13", "22:14");
    let mut decoder = Decoder::from_start(now());
    let mut got = decode(&mut decoder, &[frame(0, [written(1, "a"), written(3, "c")].concat().as_bytes())]);
    decoder.release(&mut got);
    // It was not waited for any longer.
    got.extend(decode(&mut decoder, &[frame(0, [written(2, "b"), written(4, "d")].concat().as_bytes())]));
    let want = [(0, 1, 0, "a"), (0, 3, 0, "c"), (0, 3, 1, "b"), (0, 4, 0, "d")];
    assert_eq!(short(&got), want);
    // Another run may be out of order, too.
    let again = [later(2, "f"), later(1, "e"), later(3, "g")].concat();
    let got = decode(&mut decoder, &[frame(0, again.as_bytes())]);
    assert_eq!(short(&got), [(1, 1, 0, "e"), (1, 2, 0, "f"), (1, 3, 0, "g")]);
    // From anywhere, what belongs before the first line that counts does not.
    let text: String = [9, 7, 10, 8, 11].iter().map(|&seq| written(seq, "x")).collect();
    let got = decode(&mut Decoder::from_anywhere(0, now()), &[frame(1, text.as_bytes())]);
    assert_eq!(short(&got), [(0, 9, 0, "x"), (0, 10, 0, "x"), (0, 11, 0, "x")]);
}

proptest! {
    #[test]
    fn lines_are_the_same_however_the_bytes_are_torn(
        texts in proptest::collection::vec("[a-z \u{e4}]{0,40}", 1..30), foreign in 0..30_usize,
        cuts in proptest::collection::vec(0..3000_usize, 0..12),
    ) {
        let mut log = String::new();
        for (index, text) in texts.iter().enumerate() {
            if index == foreign { log.push_str("panicked at\n") }
            log.push_str(&written(index as u64 + 1, text));
        }
        let whole = decode(&mut Decoder::from_start(now()), &[frame(0, log.as_bytes())]);
        let mut cuts: Vec<_> = cuts.into_iter().map(|cut| cut.min(log.len())).collect();
        cuts.extend([0, log.len()]);
        cuts.sort_unstable();
        let frames: Vec<_> = (0..).zip(cuts.windows(2))
            .map(|(file, cut)| frame(file, &log.as_bytes()[cut[0]..cut[1]])).collect();
        // An empty piece is a heartbeat, and must not count as a file.
        let frames: Vec<_> = (0..).zip(frames.into_iter().filter(|frame| !frame.data.is_empty()))
            .map(|(file, piece)| frame(file, &piece.data)).collect();
        prop_assert_eq!(&decode(&mut Decoder::from_start(now()), &frames), &whole);

        // Every line's offset is where decoding can begin again.
        for (index, entry) in whole.iter().enumerate().filter(|(_, entry)| entry.position.sub == 0) {
            let offset = entry.offset.unwrap();
            let rest = frame(0, &log.as_bytes()[usize::try_from(offset).unwrap()..]);
            let again = decode(&mut Decoder::from_line(entry.position, offset, now()), &[rest]);
            prop_assert_eq!(again, &whole[index..]);
        }
    }
}
