//! The inputs of the fuzz targets that are kept: those that reach much, and those that once broke something.

use std::path::Path;

use nomad_build::fuzz::TARGETS;

#[test]
fn every_input_that_is_kept_breaks_nothing() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus");
    for (name, target) in TARGETS {
        let inputs: Vec<_> =
            corpus.join(name).read_dir().unwrap().map(|entry| entry.unwrap().path()).collect();
        assert!(!inputs.is_empty(), "{name}");
        for input in inputs {
            target(&std::fs::read(&input).unwrap());
        }
    }
    assert_eq!(corpus.read_dir().unwrap().count(), TARGETS.len(), "a folder that is no target's");
}

#[test]
fn every_target_is_fuzzed() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/fuzz_targets");
    let mut files: Vec<_> = folder.read_dir().unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    let mut wanted = TARGETS.map(|(name, _)| folder.join(format!("{name}.rs")));
    wanted.sort();
    assert_eq!(files, wanted);
}
