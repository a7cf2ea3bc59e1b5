//! Fault injection: whatever a source does, a touch gets the right bytes or SIGBUS, in time.

mod support;

use std::sync::Arc;
use std::time::Duration;

use kiomap::{AttachOptions, Engine, FailurePolicy, Features, Kiobuf, PageSource, page_size};
use support::faulty::{Faulty, Odds};
use support::scene::Rng;
use support::slow::{Says, SlowSource};
use support::{alone_for, engine_builder, in_page, mark, read_page};

/// Seeds of an ordinary run; `KIOMAP_SOURCE_SEEDS` says how many instead.
const SEEDS: u64 = 150;
/// Runs that share an engine.
const RUNS_PER_ENGINE: u64 = 25;
const PAGES: u64 = 48;

fn seeds() -> u64 {
    std::env::var("KIOMAP_SOURCE_SEEDS").map_or(SEEDS, |seeds| seeds.parse().expect("KIOMAP_SOURCE_SEEDS is a number"))
}

/// The source of the seeded runs, as a tuple field: reads are those of the marked source within.
struct Inner(Arc<SlowSource>);

impl PageSource for Inner {
    fn read_at(&self, offset_bytes: u64, buf: &mut [u8]) -> std::io::Result<()> {
        self.0.read_at(offset_bytes, buf)
    }

    fn granule_bytes(&self) -> usize {
        self.0.granule_bytes()
    }

    fn may_block(&self) -> bool {
        self.0.may_block()
    }
}

/// Reads a whole page: what is there must be right in every byte.
#[track_caller]
fn check(region: &kiomap::Region, page: u64, seed: u64) -> bool {
    match read_page(region, page) {
        Ok(byte) => {
            assert_eq!(byte, mark(page), "seed {seed}, page {page}");
            let mut bytes = vec![0; page_size()];
            region.read_at(page as usize * page_size(), &mut bytes).unwrap();
            assert!(bytes.iter().all(|&byte| byte == mark(page)), "seed {seed}, page {page}");
            true
        }
        Err(refused) => {
            assert!(refused.is_sigbus_at(in_page(region, page) as usize), "seed {seed}, page {page}: {refused:?}");
            false
        }
    }
}

/// One seeded run; answers the pages that were refused.
fn run(engine: &Engine, seed: u64) -> u64 {
    let mut rng = Rng::new(seed);
    let mut odds = |most| if rng.below(3) == 0 { 0 } else { rng.below(most) };
    let odds = Odds {
        errors: odds(200),
        short: odds(150),
        corrupt: odds(150),
        panics: odds(100),
        slow: odds(200),
        // Each takes as long as the deadline.
        stalls: odds(15),
    };
    let says = Says { granule_pages: 1 << rng.below(4), may_block: rng.below(4) > 0, nr_pages: None };
    let policy = FailurePolicy::default()
        .retries(rng.below(3) as u32)
        .backoff(Duration::from_micros(rng.below(800)))
        .deadline(Duration::from_millis(10 + rng.below(30)));
    let source = Arc::new(Faulty::new(Inner(SlowSource::new(says)), seed, odds));
    let mut list = Kiobuf::new();
    list.map_source(Arc::clone(&source) as Arc<dyn PageSource>, PAGES * page_size() as u64).unwrap();
    let vmap = engine.vmap_builder(&list).failure_policy(policy).build().unwrap();
    let regions = [0; 2].map(|_| vmap.attach(&AttachOptions::new()).unwrap());
    let touches = 10 + rng.below(20);
    let refused: u64 = std::thread::scope(|scope| {
        let touchers: Vec<_> = (0..3)
            .map(|toucher| {
                let (region, vmap) = (&regions[toucher as usize % 2], &vmap);
                scope.spawn(move || {
                    let mut rng = Rng::new(seed.wrapping_mul(7) + toucher);
                    let mut refused = 0;
                    for _ in 0..touches {
                        refused += u64::from(!check(region, rng.below(PAGES), seed));
                        if rng.below(20) == 0 {
                            let start = rng.below(PAGES);
                            // It may fail again, as any touch.
                            let _ = vmap.retry(start..start + 4);
                        }
                    }
                    refused
                })
            })
            .collect();
        touchers.into_iter().map(|toucher| toucher.join().unwrap()).sum()
    });
    source.calm();
    if engine.features().contains(Features::POISON) {
        // What stalled may be late for a while.
        while let Err(error) = vmap.retry(0..PAGES) {
            assert!(matches!(error, kiomap::Error::NoPage { .. }), "seed {seed}: {error}");
        }
        for region in &regions {
            (0..PAGES).for_each(|page| assert!(check(region, page, seed), "seed {seed}, page {page} is refused still"));
        }
    }
    refused
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
                refused += run(&engine, seed);
            }
        }
        // A run in which nothing failed would say nothing.
        assert!(refused > seeds / 10, "{refused} touches were refused in {seeds} runs");
        eprintln!("{refused} touches were refused in {seeds} runs, and all others got right bytes");
    });
}
