//! Containers.

use std::time::Duration;

use super::*;

#[tokio::test]
async fn a_command_that_begins_like_an_option_is_a_command() {
    let bench = Bench::new();
    let image = bench.image("").await;
    for command in ["-x", "+x", "--"] {
        assert_eq!(bench.shell(&image, &format!("{command} || echo none")).await, "none\n", "{command}");
    }
}

#[tokio::test]
async fn a_run_dropped_at_any_moment_leaves_no_container_that_removal_misses() {
    let bench = Bench::new();
    let image = bench.image("").await;
    for delay in (0..40).step_by(2) {
        let (output, _reader) = mpsc::channel(4);
        let run = bench.engine.run(bench.command(&image, "sleep 1000"), output);
        tokio::time::timeout(Duration::from_millis(delay), run).await.unwrap_err();
        bench.remove_containers().await;
        assert_eq!(bench.containers(), "", "dropped after {delay} ms");
    }
}

#[tokio::test]
async fn both_streams_arrive_once_and_whole_and_the_exit_code_is_told() {
    let bench = Bench::new();
    let image = bench.image("").await;
    for _ in 0..20 {
        let (exit, said) = bench.run(bench.command(&image, "echo out; echo err >&2; exit 7")).await;
        assert_eq!(exit.unwrap(), Exit { code: 7, out_of_memory: false });
        assert_eq!((said.stdout.as_slice(), said.stderr.as_slice()), (&b"out\n"[..], &b"err\n"[..]));
    }
    let long =
        bench.shell(&image, "head -c 5000000 /dev/zero | tr '\\0' x; yes 01234 | head -n 100000").await;
    assert!(long == "x".repeat(5_000_000) + &"01234\n".repeat(100_000), "{} bytes", long.len());
    assert_eq!(bench.containers(), "");
}

#[tokio::test]
async fn a_container_that_was_killed_for_lack_of_memory_says_so() {
    let bench = Bench::new();
    let image = bench.image("").await;
    let mut heard = Vec::new();
    // The engine loses word of it for one in eight, where others end at the same moment.
    while !heard.contains(&true) {
        let mut request = bench.command(&image, "exec tail -c 200000000 /dev/zero");
        request.memory_bytes = 32 << 20;
        let exit = bench.run(request).await.0.unwrap();
        assert_eq!(exit.code, 137);
        heard.push(exit.out_of_memory);
        assert!(heard.len() < 10, "the engine never says that a container ran out of memory");
    }
}
