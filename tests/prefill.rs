//! Pages that are filled from two sides at once, by the owner's reads and by faults; and what the counters say of it.

mod support;

use kiomap::{AttachOptions, Kiobuf, Revoke, page_size};
use support::scene::{Rng, at, child, sourced_pages};
use support::truth::{assert_count, assert_nobody_waits};
use support::{alone, engine_builder, mark, pages, reap_ok, settled_stats, touch};

/// T65: a million pages, each filled by the owner's reading or by a fault, whichever comes first, in this process and in
/// a child. No thread is stuck, no byte is wrong, and the kernel counts nobody who waits.
#[test]
fn a_million_pages_filled_from_both_sides_leave_nobody_waiting() {
    alone("a_million_pages_filled_from_both_sides_leave_nobody_waiting", || {
        const PAGES: u64 = 1 << 16;
        const ROUNDS: u64 = 16;
        let mut list = pages(PAGES / 2);
        list.expand(&sourced_pages(PAGES / 2)).unwrap();
        let byte = |page: u64| mark(page % (PAGES / 2));
        let mut rng = Rng::new(65);
        for around in [1, 4, 16, 64] {
            let engine = engine_builder().fault_around_pages(around).build().unwrap();
            for _ in 0..ROUNDS / 4 {
                let vmap = engine.vmap(&list).unwrap();
                let region = vmap.attach(&AttachOptions::new()).unwrap();
                let faulter = |seed| {
                    let mut rng = Rng::new(seed);
                    // Every page once: a block at random, its pages in turn.
                    let mut blocks: Vec<u64> = (0..PAGES / 64).collect();
                    rng.shuffle(&mut blocks);
                    for page in blocks.into_iter().flat_map(|block| 64 * block..64 * block + 64) {
                        assert_eq!(touch::read(at(&region, page)), Ok(byte(page)), "page {page}");
                    }
                };
                let seeds = [rng.next(), rng.next()];
                let pid = child(|| faulter(seeds[0]));
                std::thread::scope(|scope| {
                    scope.spawn(|| faulter(seeds[1]));
                    // The prefiller, from the far end on, so that they meet.
                    let mut buf = vec![0; 128 * page_size()];
                    for first in (0..PAGES / 128).rev().map(|block| 128 * block) {
                        vmap.read_at(first * page_size() as u64, &mut buf).unwrap();
                        for (n, bytes) in buf.chunks(page_size()).enumerate() {
                            assert_eq!(
                                (bytes[0], bytes[page_size() - 1]),
                                (byte(first + n as u64), byte(first + n as u64))
                            );
                        }
                    }
                });
                reap_ok(pid);
                support::scene::settled(&engine, &vmap, 1);
                assert_nobody_waits(&engine);
                assert_count(&engine, &vmap, 1);
                // What is given back now need not be given back by the next.
                vmap.revoke(Revoke::Hard).unwrap();
            }
            assert_eq!(settled_stats(&engine).pages_poisoned, 0);
        }
    });
}

/// T110: at rest the kernel counts nobody who waits, and the counters are what was touched: by four threads here and in
/// a child, each page by one of them, with neighbours brought along or not, in memory, zeros, sources and holes.
#[test]
fn counters_at_rest_are_what_was_touched() {
    alone("counters_at_rest_are_what_was_touched", || {
        const PART: u64 = 512;
        for around in [1u64, 16] {
            let engine = engine_builder().fault_around_pages(around as usize).build().unwrap();
            let mut list = pages(PART);
            let mut zeros = Kiobuf::new();
            zeros.map_zero(PART).unwrap();
            let mut holes = Kiobuf::new();
            holes.map_hole(PART).unwrap();
            [&zeros, &sourced_pages(PART), &holes].iter().for_each(|part| list.expand(part).unwrap());
            let vmap = engine.vmap(&list).unwrap();
            let region = vmap.attach(&AttachOptions::new()).unwrap();
            let expected = |page: u64| match page / PART {
                1 => Ok(0),
                3 => Err(()),
                _ => Ok(mark(page % PART)),
            };
            let touch_quarter = |quarter: u64| {
                for block in (0..4 * PART / 16).filter(|block| block % 8 == quarter) {
                    for page in 16 * block..16 * block + 16 {
                        let read = touch::read(at(&region, page));
                        assert_eq!(
                            read.map_err(|refused| assert!(refused.is_sigbus_at(at(&region, page) as usize))),
                            expected(page)
                        );
                    }
                }
            };
            std::thread::scope(|scope| {
                (0..4).for_each(|quarter| drop(scope.spawn(move || touch_quarter(quarter))));
                reap_ok(child(|| {
                    std::thread::scope(|scope| {
                        (4..8).for_each(|quarter| drop(scope.spawn(move || touch_quarter(quarter))))
                    });
                }));
            });
            support::scene::settled(&engine, &vmap, 1);
            assert_nobody_waits(&engine);
            assert_count(&engine, &vmap, 1);
            let stats = settled_stats(&engine);
            // Each block is touched by one thread in ascending order: one message brings all of it, but for holes.
            let faults = 3 * PART / around + PART;
            assert_eq!((stats.faults, stats.write_faults), (faults, 0), "{stats:?}");
            assert_eq!((stats.pages_copied, stats.pages_zeroed), (2 * PART, PART), "{stats:?}");
            assert_eq!((stats.pages_poisoned, stats.source_errors, stats.strays), (PART, 0, 0), "{stats:?}");
            assert_eq!((stats.worker_reads + stats.reads_merged, stats.self_faults), (PART / around, 0), "{stats:?}");
            assert_eq!((stats.processes_gone, stats.panics), (1, 0), "{stats:?}");
            let resident = engine.snapshot().unwrap().vmaps[0].resident_bytes;
            assert_eq!(resident, 3 * PART * page_size() as u64);
        }
    });
}
