#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| nomad_build::fuzz::run("cursor", bytes));
