//! Addresses that a region has just left, given to somebody else before the kernel has reported that they are free.

mod support;

use std::sync::atomic::{AtomicBool, Ordering};

use kiomap::{Arena, AttachOptions, Kiobuf};
use support::truth::assert_count;
use support::{alone, engine_builder, pages};

/// U5: memory that takes over a region's addresses may be listed at once: it is not taken for the region.
#[test]
fn memory_at_addresses_that_a_region_left_can_be_listed() {
    alone("memory_at_addresses_that_a_region_left_can_be_listed", || {
        const PAGES: u64 = 4;
        let engine = engine_builder().build().unwrap();
        let vmap = engine.vmap(&pages(PAGES)).unwrap();
        let end = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while !end.load(Ordering::Relaxed) {
                        drop(vmap.attach(&AttachOptions::new()).unwrap());
                    }
                });
            }
            let list = || {
                for _ in 0..5_000 {
                    let mut list = Kiobuf::new();
                    list.map_kernel(Arena::new(PAGES as usize).unwrap()).unwrap();
                    engine.vmap(&list).unwrap();
                }
            };
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(list));
            end.store(true, Ordering::Relaxed);
            if let Err(panic) = outcome {
                std::panic::resume_unwind(panic);
            }
        });
        assert_count(&engine, &vmap, 0);
    });
}
