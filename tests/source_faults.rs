//! Fault injection: whatever a source does, a touch gets the right bytes or SIGBUS, in time.

mod support;

use std::sync::Arc;
use std::time::Duration;

use support::faulty::seeded_run;
use support::scene::Rng;
use support::slow::{Says, SlowSource};
use support::{alone_for, engine_builder, mark};

/// Seeds of an ordinary run; `KIOMAP_SOURCE_SEEDS` says how many instead.
const SEEDS: u64 = 150;
/// Runs that share an engine.
const RUNS_PER_ENGINE: u64 = 25;
const PAGES: u64 = 48;

fn seeds() -> u64 {
    std::env::var("KIOMAP_SOURCE_SEEDS").map_or(SEEDS, |seeds| seeds.parse().expect("KIOMAP_SOURCE_SEEDS is a number"))
}

/// Errors, short reads, wrong bytes, panics, stalls and pauses of a source, chosen by a seed: every byte that anybody sees is
/// right, everything else is SIGBUS, and when the source has come to its senses all of it can be had.
#[test]
fn faulty_sources_bring_right_bytes_or_sigbus() {
    alone_for(Duration::from_secs(1200), "faulty_sources_bring_right_bytes_or_sigbus", || {
        needs_sources!();
        let seeds = seeds();
        let mut refused = 0;
        for first in (0..seeds).step_by(RUNS_PER_ENGINE as usize) {
            let mut rng = Rng::new(first);
            let engine = engine_builder()
                .workers(1 + rng.below(8) as usize)
                .fault_around_pages([1, 4, 16][rng.below(3) as usize])
                .build()
                .unwrap();
            for seed in first..seeds.min(first + RUNS_PER_ENGINE) {
                let mut rng = Rng::new(seed);
                let says = Says { granule_pages: 1 << rng.below(4), may_block: rng.below(4) > 0, nr_pages: None };
                let is_right = |page, bytes: &[u8]| bytes.iter().all(|&byte| byte == mark(page));
                refused += seeded_run(&engine, seed, Arc::into_inner(SlowSource::new(says)).unwrap(), PAGES, is_right);
            }
        }
        // A run in which nothing failed would say nothing.
        assert!(refused > seeds / 10, "{refused} touches were refused in {seeds} runs");
        eprintln!("{refused} touches were refused in {seeds} runs, and all others got right bytes");
    });
}
