//! Addresses that change hands quickly: what the kernel reports late must not meet what is there by then.

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kiomap::{AttachOptions, Kiobuf, page_size};
use support::truth::assert_count;
use support::{alone, engine_builder, mark, pages, touch};

/// U5, T45: threads that attach, touch and drop at once are given each other's addresses before the kernel has reported
/// that they are free. No attach is refused for that, each region is served, and the count ends at zero.
#[test]
fn regions_that_take_over_addresses_are_served_and_counted() {
    alone("regions_that_take_over_addresses_are_served_and_counted", || {
        let engine = engine_builder().build().unwrap();
        let vmap = engine.vmap(&pages(4)).unwrap();
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let vmap = &vmap;
                scope.spawn(move || {
                    for round in 0..2000 {
                        let region = vmap.attach(&AttachOptions::new()).unwrap();
                        let page = (thread + round) % 4;
                        let byte = touch::read(region.as_ptr().wrapping_add(page * page_size()));
                        assert_eq!(byte, Ok(mark(page as u64)));
                        assert!(vmap.refcount().unwrap() > 0);
                    }
                });
            }
        });
        engine.settle().unwrap();
        assert_count(&engine, &vmap, 0);
        assert_eq!(engine.stats().strays, 0);
    });
}

/// T72: a thread that goes on touching an address whose region was dropped never spoils the next region there.
#[test]
fn a_dangling_touch_does_not_spoil_the_next_region() {
    alone("a_dangling_touch_does_not_spoil_the_next_region", || {
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        // Far from where the kernel puts what asks for no address.
        let place: usize = 0x1100_0000_0000;
        let end = Arc::new(AtomicBool::new(false));
        let dangling = {
            let end = Arc::clone(&end);
            std::thread::spawn(move || {
                while !end.load(Ordering::Relaxed) {
                    // Bytes, SIGSEGV, or SIGBUS of nobody's region: whatever is there.
                    let _ = touch::read(place as *const u8);
                }
            })
        };
        for _ in 0..3000 {
            // A new object each time, so that the page is missing each time.
            let vmap = engine.vmap(&pages(1)).unwrap();
            let region = vmap.attach(&AttachOptions::new().at(place)).unwrap();
            assert_eq!(touch::read(region.as_ptr()), Ok(mark(0)));
        }
        end.store(true, Ordering::Relaxed);
        dangling.join().unwrap();
    });
}

/// U5: one munmap that ends more areas than can be told at once. When counting has settled, all of them are counted.
#[test]
fn an_unmap_of_very_many_areas_is_counted_when_it_has_settled() {
    alone("an_unmap_of_very_many_areas_is_counted_when_it_has_settled", || {
        const AREAS: usize = 3000;
        let engine = engine_builder().build().unwrap();
        let mut list = Kiobuf::new();
        list.map_zero(1).unwrap();
        let vmap = engine.vmap(&list).unwrap();
        let len = AREAS * page_size();
        // Far from where the kernel puts what asks for no address.
        let base: usize = 0x1000_0000_0000;
        for area in 0..AREAS {
            std::mem::forget(vmap.attach(&AttachOptions::new().at(base + area * page_size())).unwrap());
        }
        assert_count(&engine, &vmap, AREAS);
        // SAFETY: exactly the regions' range; nothing refers to it.
        assert_eq!(unsafe { libc::munmap(base as *mut libc::c_void, len) }, 0);
        engine.settle().unwrap();
        assert_count(&engine, &vmap, 0);
    });
}

/// U5: the same in a forked child, whose own drop of a region waits until all of it is counted. Nobody waits for ever.
#[test]
fn an_unmap_of_very_many_areas_in_a_child_is_counted_when_a_drop_returns() {
    alone("an_unmap_of_very_many_areas_in_a_child_is_counted_when_a_drop_returns", || {
        const AREAS: usize = 3000;
        let engine = engine_builder().build().unwrap();
        let mut list = Kiobuf::new();
        list.map_zero(1).unwrap();
        let vmap = engine.vmap(&list).unwrap();
        let base: usize = 0x1000_0000_0000;
        let mut regions: Vec<_> =
            (0..AREAS).map(|area| vmap.attach(&AttachOptions::new().at(base + area * page_size())).unwrap()).collect();
        support::reap_ok(support::fork_child(|| {
            nix::unistd::alarm::set(support::DEADLINE.as_secs() as u32);
            assert_count(&engine, &vmap, 2 * AREAS);
            let kept = regions.pop().unwrap();
            regions.drain(..).for_each(std::mem::forget);
            let len = (AREAS - 1) * page_size();
            // SAFETY: exactly the range of the regions that were forgotten; nothing refers to it.
            assert_eq!(unsafe { libc::munmap(base as *mut libc::c_void, len) }, 0);
            drop(kept);
            assert_count(&engine, &vmap, AREAS);
        }));
        drop(regions);
        engine.settle().unwrap();
        assert_count(&engine, &vmap, 0);
    });
}
