//! Areas that nobody may touch (PROT_NONE) while `mremap` leaves, doubles or grows them: the engine maps hidden memory of its own, and
//! tells the two apart.

mod support;

use std::sync::atomic::{AtomicBool, Ordering};

use kiomap::{AttachOptions, page_size};
use support::raw::{self, assert_gone, assert_shows, in_both};
use support::scene::{Rng, child, settled};
use support::truth::{assert_count, assert_nobody_waits};
use support::{alone, engine_builder, pages, reap_ok};

/// Where the kernel puts nothing by itself.
const FAR: usize = 0x1000_0000_0000;
const ELSEWHERE: usize = 0x1000_4000_0000;
const DOUBLE: i32 = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | libc::MREMAP_DONTUNMAP;
const ALL: i32 = libc::PROT_READ | libc::PROT_WRITE;

fn long(nr_pages: u64) -> AttachOptions {
    AttachOptions::new().len_bytes(nr_pages as usize * page_size())
}

/// The address of page `n` from `base` on.
fn page(base: usize, n: u64) -> usize {
    base + n as usize * page_size()
}

/// T43: of an area without access, both ranges of a move that unmaps nothing are counted at once, and go with the region.
#[test]
fn a_hidden_area_moved_without_an_unmap_is_two_areas() {
    in_both("a_hidden_area_moved_without_an_unmap_is_two_areas", 16, |scene| {
        for len in [1, 8] {
            let region = scene.vmap.attach(&long(len).pgoff(3).at(FAR)).unwrap();
            raw::mprotect(FAR, len as usize, libc::PROT_NONE);
            assert_eq!(raw::mremap(FAR, len as usize, len as usize, DOUBLE, ELSEWHERE), ELSEWHERE);
            scene.count(2);
            raw::mprotect(FAR, len as usize, ALL);
            assert_shows(FAR, 3..3 + len);
            scene.count(2);
            raw::mprotect(ELSEWHERE, len as usize, ALL);
            assert_shows(ELSEWHERE, 3..3 + len);
            drop(region);
            scene.count(0);
            assert_gone(FAR, len as usize);
            assert_gone(ELSEWHERE, len as usize);
        }
    });
}

/// T43: the range that is left is counted whole, whatever access its parts are given right afterwards.
#[test]
fn a_range_that_is_left_is_counted_whole_whatever_its_access() {
    in_both("a_range_that_is_left_is_counted_whole_whatever_its_access", 8, |scene| {
        for (first, access) in [(0, libc::PROT_NONE), (5, libc::PROT_NONE), (2, libc::PROT_READ)] {
            let region = scene.vmap.attach(&long(8).at(FAR)).unwrap();
            assert_eq!(raw::mremap(FAR, 8, 8, DOUBLE, ELSEWHERE), ELSEWHERE);
            raw::mprotect(page(FAR, first), 3, access);
            scene.count(2);
            drop(region);
            scene.count(0);
            assert_gone(FAR, 8);
        }
    });
}

/// T43: a second mapping of an area without access is an area of its own.
#[test]
fn a_hidden_area_mapped_a_second_time_is_two_areas() {
    in_both("a_hidden_area_mapped_a_second_time_is_two_areas", 16, |scene| {
        let region = scene.vmap.attach(&long(8).pgoff(3).at(FAR)).unwrap();
        raw::mprotect(FAR, 8, libc::PROT_NONE);
        let second = raw::mremap(FAR, 0, 8, libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED, ELSEWHERE);
        assert_eq!(second, ELSEWHERE);
        scene.count(2);
        raw::mprotect(ELSEWHERE, 8, ALL);
        assert_shows(ELSEWHERE, 3..11);
        drop(region);
        scene.count(0);
        assert_gone(FAR, 8);
        assert_gone(ELSEWHERE, 8);
    });
}

/// T41: what an area without access has grown by goes with its region, in place and elsewhere.
#[test]
fn a_hidden_area_that_grew_goes_with_its_region() {
    in_both("a_hidden_area_that_grew_goes_with_its_region", 16, |scene| {
        for (flags, base) in [(0, FAR), (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED, ELSEWHERE)] {
            let region = scene.vmap.attach(&long(4).pgoff(2).at(FAR)).unwrap();
            scene.count(1);
            raw::mprotect(FAR, 4, libc::PROT_NONE);
            assert_eq!(raw::mremap(FAR, 4, 12, flags, base), base);
            // Grown in place, it is not known yet.
            if base != FAR {
                scene.count(1);
            }
            drop(region);
            scene.count(0);
            assert_eq!(raw::mappings(FAR, page(FAR, 12)), 0);
            assert_eq!(raw::mappings(ELSEWHERE, page(ELSEWHERE, 12)), 0);
        }
    });
}

/// T41, T49: what an area without access has grown by as it moved is known at once: a forked child has it.
#[test]
fn a_child_has_what_a_hidden_area_grew_by_as_it_moved() {
    alone("a_child_has_what_a_hidden_area_grew_by_as_it_moved", || {
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        let vmap = engine.vmap(&pages(16)).unwrap();
        let region = vmap.attach(&long(4).at(FAR)).unwrap();
        raw::mprotect(FAR, 4, libc::PROT_NONE);
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        assert_eq!(raw::mremap(FAR, 4, 12, flags, ELSEWHERE), ELSEWHERE);
        assert_count(&engine, &vmap, 1);
        reap_ok(child(|| assert_shows(ELSEWHERE, 0..12)));
        settled(&engine, &vmap, 1);
        drop(region);
        assert_count(&engine, &vmap, 0);
    });
}

/// T43, T68: areas without access move, with an unmap and without, while other threads attach wherever there is room, also
/// where one has just been: no attach is refused, and each area is counted once.
#[test]
fn hidden_areas_that_move_are_not_taken_for_attaches_under_way() {
    alone("hidden_areas_that_move_are_not_taken_for_attaches_under_way", || {
        let engine = engine_builder().build().unwrap();
        let vmap = engine.vmap(&pages(16)).unwrap();
        let moving = AtomicBool::new(true);
        let attach_beside = &|seed| {
            let mut rng = Rng::new(seed);
            while moving.load(Ordering::Acquire) {
                let (pgoff, len) = (rng.below(8), 4 + rng.below(5));
                let region = vmap.attach(&long(len).pgoff(pgoff)).unwrap();
                assert_shows(region.as_ptr() as usize, pgoff..pgoff + 2);
            }
        };
        let move_about = &|seed| {
            let mut rng = Rng::new(seed);
            for round in 0..400 {
                let (pgoff, len) = (rng.below(8), 4 + rng.below(5));
                let region = vmap.attach(&long(len).pgoff(pgoff)).unwrap();
                let (here, len) = (region.as_ptr() as usize, len as usize);
                raw::mprotect(here, len, libc::PROT_NONE);
                let flags = if round % 3 == 0 { DOUBLE } else { libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED };
                let grown = if round % 3 == 2 { len + 2 } else { len };
                assert_eq!(raw::mremap(here, len, grown, flags, ELSEWHERE), ELSEWHERE);
            }
        };
        std::thread::scope(|scope| {
            let beside = [1, 2].map(|seed| scope.spawn(move || attach_beside(seed)));
            let moved = scope.spawn(move || move_about(3)).join();
            moving.store(false, Ordering::Release);
            beside.into_iter().for_each(|thread| thread.join().unwrap());
            moved.unwrap();
        });
        assert_count(&engine, &vmap, 0);
        assert_eq!(raw::mappings(ELSEWHERE, page(ELSEWHERE, 16)), 0);
        assert_nobody_waits(&engine);
        assert_eq!(engine.stats().strays, 0);
    });
}
