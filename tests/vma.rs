//! The life of a mapping in the hands of code that does not know the engine: raw munmap, mremap, mprotect and MAP_FIXED
//! on a region. Whatever is left resolves with the right page, and the count is the kernel's.

mod support;

use std::ffi::c_void;

use kiomap::{Region, page_size};
use support::raw::{self, ELSEWHERE, FAR, Scene, assert_gone, assert_shows, assert_sigbus_pages, in_both, page};
use support::scene::{at, child, settled};
use support::truth::assert_count;
use support::{alone, engine_builder, long, mark, pages, reap_ok, touch};

/// Regions of `lens` pages side by side from [`FAR`] on, showing one page after the other.
fn side_by_side(scene: &Scene<'_>, lens: &[u64]) -> Vec<Region> {
    let mut pgoff = 0;
    let attach = |&len: &u64| {
        let region = scene.vmap.attach(&long(len).pgoff(pgoff).at(page(FAR, pgoff))).unwrap();
        pgoff += len;
        region
    };
    lens.iter().map(attach).collect()
}

/// T33: both ends of a region whose middle is unmapped resolve with their own pages; each is counted.
#[test]
fn an_unmapped_middle_leaves_both_ends_right() {
    in_both("an_unmapped_middle_leaves_both_ends_right", 16, |scene| {
        let region = scene.vmap.attach(&long(10).pgoff(3).at(FAR)).unwrap();
        raw::munmap(at(&region, 4), 3);
        scene.count(2);
        let base = region.as_ptr() as usize;
        assert_gone(page(base, 4), 3);
        assert_shows(base, 3..7);
        assert_shows(page(base, 7), 10..13);
        scene.count(2);
        drop(region);
        scene.count(0);
    });
}

/// T34, T35: what is left of a region whose head and tail are unmapped shows the same pages as before.
#[test]
fn a_trimmed_region_keeps_its_pages() {
    in_both("a_trimmed_region_keeps_its_pages", 16, |scene| {
        let region = scene.vmap.attach(&long(10).pgoff(3).at(FAR)).unwrap();
        let base = region.as_ptr() as usize;
        raw::munmap(at(&region, 0), 4);
        scene.count(1);
        assert_gone(base, 4);
        raw::munmap(at(&region, 8), 2);
        scene.count(1);
        assert_gone(page(base, 8), 2);
        assert_shows(page(base, 4), 7..11);
        drop(region);
        scene.count(0);
    });
}

/// T36: a region of which nothing is left is counted out, once, whether it went at once or piece by piece; dropping it
/// then touches nothing, not even what somebody else has put at its address.
#[test]
fn a_region_that_is_all_unmapped_is_counted_out_once() {
    in_both("a_region_that_is_all_unmapped_is_counted_out_once", 8, |scene| {
        let region = scene.vmap.attach(&long(8).at(FAR)).unwrap();
        assert_shows(FAR, 0..2);
        scene.count(1);
        raw::munmap(FAR as *mut u8, 8);
        scene.count(0);
        raw::munmap(FAR as *mut u8, 8);
        raw::foreign(FAR, 8, 0x5a);
        drop(region);
        scene.count(0);
        assert_eq!(touch::read(page(FAR, 5) as *const u8), Ok(0x5a));
        raw::munmap(FAR as *mut u8, 8);

        let region = scene.vmap.attach(&long(8).at(FAR)).unwrap();
        for (first, nr_pages, left) in [(3, 2, 2), (0, 3, 1), (7, 1, 1), (5, 2, 0)] {
            raw::munmap(page(FAR, first) as *mut u8, nr_pages);
            scene.count(left);
        }
        drop(region);
        scene.count(0);
    });
}

/// T37: one munmap over parts of several regions, what lies between them and other memory: each is cut or counted out
/// once, and what is outside stays.
#[test]
fn one_unmap_over_regions_and_gaps_cuts_each_once() {
    in_both("one_unmap_over_regions_and_gaps_cuts_each_once", 16, |scene| {
        let attach =
            |first, nr_pages, pgoff| scene.vmap.attach(&long(nr_pages).pgoff(pgoff).at(page(FAR, first))).unwrap();
        let regions = [attach(0, 4, 0), attach(6, 2, 9), attach(8, 4, 2), attach(14, 4, 12)];
        raw::foreign(page(FAR, 12), 1, 0x5a);
        scene.count(4);
        assert_shows(page(FAR, 7), 10..11);
        raw::munmap(page(FAR, 2) as *mut u8, 13);
        scene.count(2);
        assert_gone(page(FAR, 2), 13);
        assert_shows(FAR, 0..2);
        assert_shows(page(FAR, 15), 13..16);
        drop(regions);
        scene.count(0);
    });
}

/// T38: what somebody maps over a part of a region is theirs: it is not paged in, and dropping the region leaves it.
#[test]
fn memory_mapped_over_a_part_is_left_alone() {
    in_both("memory_mapped_over_a_part_is_left_alone", 8, |scene| {
        let region = scene.vmap.attach(&long(8)).unwrap();
        let base = region.as_ptr() as usize;
        assert_shows(page(base, 3), 3..4);
        raw::foreign(page(base, 3), 2, 0x5a);
        scene.count(2);
        for n in 3..5 {
            assert_eq!(touch::read((page(base, n) + 7) as *const u8), Ok(0x5a));
        }
        assert_shows(base, 0..3);
        assert_shows(page(base, 5), 5..8);
        drop(region);
        scene.count(0);
        for n in 3..5 {
            assert_eq!(touch::read((page(base, n) + 7) as *const u8), Ok(0x5a));
        }
        raw::munmap(page(base, 3) as *mut u8, 2);
    });
}

/// T39: a region that is moved as a whole shows its pages at the new address, and is one area all the time. It is unmapped
/// there when it is dropped.
#[test]
fn a_moved_region_shows_its_pages_at_the_new_address() {
    in_both("a_moved_region_shows_its_pages_at_the_new_address", 16, |scene| {
        let region = scene.vmap.attach(&long(8).pgoff(3).at(FAR)).unwrap();
        assert_shows(FAR, 3..5);
        assert_eq!(raw::mremap(FAR, 8, 8, libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED, ELSEWHERE), ELSEWHERE);
        scene.count(1);
        assert_gone(FAR, 8);
        assert_shows(ELSEWHERE, 3..11);
        drop(region);
        scene.count(0);
        assert_gone(ELSEWHERE, 8);
    });
}

/// T39: the middle of a region is moved over the end of another: three pieces of the one, a shorter other.
#[test]
fn a_part_moved_over_another_region_takes_its_pages_along() {
    in_both("a_part_moved_over_another_region_takes_its_pages_along", 32, |scene| {
        let region = scene.vmap.attach(&long(8).at(FAR)).unwrap();
        let other = scene.vmap.attach(&long(8).pgoff(16).at(ELSEWHERE)).unwrap();
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        assert_eq!(raw::mremap(page(FAR, 2), 4, 4, flags, page(ELSEWHERE, 6)), page(ELSEWHERE, 6));
        scene.count(4);
        assert_gone(page(FAR, 2), 4);
        assert_shows(FAR, 0..2);
        assert_shows(page(FAR, 6), 6..8);
        assert_shows(ELSEWHERE, 16..22);
        assert_shows(page(ELSEWHERE, 6), 2..6);
        drop(region);
        scene.count(1);
        assert_shows(ELSEWHERE, 16..22);
        drop(other);
        scene.count(0);
    });
}

/// T41, B38: a region that is grown where it is, of which no event tells, shows the pages of the list behind its end, and
/// SIGBUS past the list. It is the same area, unmapped when the region is dropped.
#[test]
fn a_region_grown_in_place_shows_the_pages_behind_its_end() {
    in_both("a_region_grown_in_place_shows_the_pages_behind_its_end", 10, |scene| {
        let region = scene.vmap.attach(&long(3).pgoff(1).at(FAR)).unwrap();
        assert_shows(FAR, 1..2);
        assert_eq!(raw::mremap(FAR, 3, 12, 0, 0), FAR);
        // The last first: what lies in between is found with it.
        assert_shows(page(FAR, 8), 9..10);
        scene.count(1);
        assert_shows(FAR, 1..10);
        assert_sigbus_pages(page(FAR, 9), 3);
        touch::write(page(FAR, 4) as *mut u8, 0xee).unwrap();
        scene.count(1);
        drop(region);
        assert_gone(FAR, 12);
        scene.count(0);
    });
}

/// T41: where there is no room a growing region moves; both the pages that it had and those behind them resolve there.
#[test]
fn a_region_that_moves_to_grow_shows_all_its_pages() {
    in_both("a_region_that_moves_to_grow_shows_all_its_pages", 10, |scene| {
        let region = scene.vmap.attach(&long(3).pgoff(1).at(FAR)).unwrap();
        raw::foreign(page(FAR, 3), 1, 0x5a);
        let to = raw::mremap(FAR, 3, 12, libc::MREMAP_MAYMOVE, 0);
        assert_ne!(to, FAR);
        assert_gone(FAR, 3);
        for n in (0..9).rev() {
            assert_shows(page(to, n), n + 1..n + 2);
        }
        assert_sigbus_pages(page(to, 9), 3);
        scene.count(1);
        drop(region);
        scene.count(0);
        raw::munmap(page(FAR, 3) as *mut u8, 1);
    });
}

/// T41, T33: a grown part that is cut off before anybody touched it is a piece of its region; so is one whose access was
/// changed.
#[test]
fn a_grown_part_that_is_cut_off_is_a_piece_of_its_region() {
    in_both("a_grown_part_that_is_cut_off_is_a_piece_of_its_region", 16, |scene| {
        let region = scene.vmap.attach(&long(4).at(FAR)).unwrap();
        assert_eq!(raw::mremap(FAR, 4, 16, 0, 0), FAR);
        raw::mprotect(page(FAR, 10), 2, libc::PROT_READ);
        raw::munmap(page(FAR, 2) as *mut u8, 4);
        assert_shows(page(FAR, 15), 15..16);
        scene.count(2);
        assert_shows(page(FAR, 6), 6..16);
        assert_shows(FAR, 0..2);
        assert!(touch::write(page(FAR, 10) as *mut u8, 1).unwrap_err().is_sigsegv());
        scene.count(2);
        drop(region);
        scene.count(0);
        assert_gone(FAR, 16);
    });
}

/// T41: a part that was grown in place and never touched, or whose pages are all resident so that no touch of it is a
/// fault, goes with its region.
#[test]
fn a_grown_part_that_nobody_faulted_on_goes_with_its_region() {
    in_both("a_grown_part_that_nobody_faulted_on_goes_with_its_region", 8, |scene| {
        let whole = scene.vmap.attach(&long(8)).unwrap();
        for touched in [false, true] {
            let region = scene.vmap.attach(&long(4).at(FAR)).unwrap();
            scene.count(2);
            assert_eq!(raw::mremap(FAR, 4, 8, 0, 0), FAR);
            if touched {
                assert_shows(whole.as_ptr() as usize, 0..8);
                assert_shows(FAR, 0..8);
            }
            drop(region);
            scene.count(1);
            assert_gone(FAR, 8);
        }
        drop(whole);
        scene.count(0);
    });
}

/// T41: a part that was grown in place and outlives what it grew from is SIGBUS where its pages are missing, not zeros,
/// and nobody sleeps on; the count is not disturbed.
#[test]
fn a_grown_part_that_outlives_its_region_is_no_zero_page() {
    in_both("a_grown_part_that_outlives_its_region_is_no_zero_page", 8, |scene| {
        let region = scene.vmap.attach(&long(4).at(FAR)).unwrap();
        let whole = scene.vmap.attach(&long(8)).unwrap();
        touch::read(at(&whole, 5)).unwrap();
        scene.count(2);
        assert_eq!(raw::mremap(FAR, 4, 8, 0, 0), FAR);
        raw::munmap(FAR as *mut u8, 4);
        drop(whole);
        assert_gone(FAR, 4);
        assert_shows(page(FAR, 5), 5..6);
        assert_sigbus_pages(page(FAR, 4), 1);
        assert_sigbus_pages(page(FAR, 7), 1);
        raw::munmap(page(FAR, 4) as *mut u8, 4);
        scene.count(0);
        drop(region);
        scene.count(0);
    });
}

/// T42: a region that is shrunk has lost its tail, and nothing else.
#[test]
fn a_shrunk_region_loses_its_tail_only() {
    in_both("a_shrunk_region_loses_its_tail_only", 8, |scene| {
        let region = scene.vmap.attach(&long(8).at(FAR)).unwrap();
        assert_eq!(raw::mremap(FAR, 8, 3, 0, 0), FAR);
        scene.count(1);
        assert_shows(FAR, 0..3);
        assert_gone(page(FAR, 3), 5);
        // And grown again over what it lost.
        assert_eq!(raw::mremap(FAR, 3, 6, 0, 0), FAR);
        assert_shows(FAR, 0..6);
        scene.count(1);
        drop(region);
        scene.count(0);
    });
}

/// T43: after MREMAP_DONTUNMAP both ranges resolve, to the same pages, and both are counted. The region's end is the end of
/// both.
#[test]
fn both_ranges_of_a_move_that_unmaps_nothing_resolve() {
    in_both("both_ranges_of_a_move_that_unmaps_nothing_resolve", 16, |scene| {
        let region = scene.vmap.attach(&long(8).pgoff(3).at(FAR)).unwrap();
        touch::write(page(FAR, 1) as *mut u8, 0xee).unwrap();
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | libc::MREMAP_DONTUNMAP;
        assert_eq!(raw::mremap(FAR, 8, 8, flags, ELSEWHERE), ELSEWHERE);
        scene.count(2);
        assert_shows(page(ELSEWHERE, 5), 8..11);
        assert_shows(page(FAR, 2), 5..11);
        scene.count(2);
        assert_eq!(touch::read(page(FAR, 1) as *const u8), Ok(0xee));
        touch::write(page(FAR, 7) as *mut u8, 0xdd).unwrap();
        assert_eq!(touch::read(page(ELSEWHERE, 7) as *const u8), Ok(0xdd));
        assert_shows(page(ELSEWHERE, 2), 5..10);
        drop(region);
        scene.count(0);
        assert_gone(FAR, 8);
        assert_gone(ELSEWHERE, 8);
    });
}

/// T43: of the middle of a region; each of the four ranges is what it should be, and goes with the region or before.
#[test]
fn a_middle_moved_without_an_unmap_resolves_in_both_places() {
    in_both("a_middle_moved_without_an_unmap_resolves_in_both_places", 8, |scene| {
        let region = scene.vmap.attach(&long(8).at(FAR)).unwrap();
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | libc::MREMAP_DONTUNMAP;
        assert_eq!(raw::mremap(page(FAR, 2), 3, 3, flags, ELSEWHERE), ELSEWHERE);
        assert_shows(ELSEWHERE, 2..5);
        assert_shows(FAR, 0..8);
        scene.count(3);
        raw::munmap(ELSEWHERE as *mut u8, 3);
        scene.count(2);
        drop(region);
        scene.count(0);
        assert_gone(FAR, 8);
    });
}

/// T43: a length of zero maps shared memory a second time, of which no event tells where it ends. It resolves, is counted,
/// and its pages are the same.
#[test]
fn a_region_mapped_a_second_time_by_mremap_resolves() {
    in_both("a_region_mapped_a_second_time_by_mremap_resolves", 16, |scene| {
        let region = scene.vmap.attach(&long(8).pgoff(3).at(FAR)).unwrap();
        let second = raw::mremap(FAR, 0, 8, libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED, ELSEWHERE);
        scene.count(2);
        assert_shows(second, 3..11);
        touch::write(page(second, 3) as *mut u8, 0xee).unwrap();
        assert_eq!(touch::read(page(FAR, 3) as *const u8), Ok(0xee));
        raw::munmap(FAR as *mut u8, 8);
        scene.count(1);
        assert_shows(second, 3..6);
        drop(region);
        scene.count(0);
        assert_gone(second, 8);
    });
}

/// T44: a store to a page without write access is SIGSEGV, not SIGBUS, resident or not; the count stays; what was missing
/// meanwhile resolves right when access is back.
#[test]
fn a_page_without_access_is_sigsegv_and_resolves_afterwards() {
    in_both("a_page_without_access_is_sigsegv_and_resolves_afterwards", 8, |scene| {
        let region = scene.vmap.attach(&long(8)).unwrap();
        let base = region.as_ptr() as usize;
        assert_shows(page(base, 2), 2..3);
        for (access, readable) in [(libc::PROT_READ, true), (libc::PROT_NONE, false)] {
            // Page 2 is resident, page 3 is not.
            raw::mprotect(page(base, 2), 2, access);
            scene.count(1);
            for n in 2..4 {
                assert!(touch::write(page(base, n) as *mut u8, 1).unwrap_err().is_sigsegv());
            }
            assert_eq!(touch::read(page(base, 2) as *const u8).is_ok(), readable);
            if !readable {
                assert!(touch::read(page(base, 3) as *const u8).unwrap_err().is_sigsegv());
            }
            raw::mprotect(page(base, 2), 2, libc::PROT_READ | libc::PROT_WRITE);
        }
        touch::write(page(base, 3) as *mut u8, mark(3)).unwrap();
        assert_shows(base, 0..8);
        scene.count(1);
        drop(region);
        scene.count(0);
    });
}

/// T45, B37: regions that lie side by side and show one page after the other, which the kernel makes one mapping, end each
/// by itself.
#[test]
fn regions_that_the_kernel_merges_end_each_by_itself() {
    in_both("regions_that_the_kernel_merges_end_each_by_itself", 12, |scene| {
        let mut regions = side_by_side(scene, &[4, 4, 4]);
        assert_eq!(raw::mappings(FAR, page(FAR, 12)), 1);
        scene.count(3);
        assert_shows(page(FAR, 3), 3..5);
        drop(regions.remove(1));
        scene.count(2);
        assert_gone(page(FAR, 4), 4);
        assert_shows(FAR, 0..4);
        assert_shows(page(FAR, 8), 8..12);
        drop(regions.remove(0));
        scene.count(1);
        assert_gone(FAR, 4);
        assert_shows(page(FAR, 8), 8..12);
        drop(regions);
        scene.count(0);
    });
}

/// T45, T39: one move of what the kernel has merged moves each of the regions; a later unmap over their border cuts both.
#[test]
fn a_move_over_two_merged_regions_keeps_both_right() {
    in_both("a_move_over_two_merged_regions_keeps_both_right", 12, |scene| {
        let mut regions = side_by_side(scene, &[4, 4]);
        assert_eq!(raw::mappings(FAR, page(FAR, 8)), 1);
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        assert_eq!(raw::mremap(FAR, 8, 8, flags, ELSEWHERE), ELSEWHERE);
        scene.count(2);
        assert_shows(page(ELSEWHERE, 3), 3..5);
        raw::munmap(page(ELSEWHERE, 2) as *mut u8, 4);
        scene.count(2);
        assert_shows(ELSEWHERE, 0..2);
        assert_shows(page(ELSEWHERE, 6), 6..8);
        // Grown: the part behind is the second one's.
        assert_eq!(raw::mremap(page(ELSEWHERE, 6), 2, 6, 0, 0), page(ELSEWHERE, 6));
        assert_shows(page(ELSEWHERE, 8), 8..12);
        scene.count(2);
        drop(regions.remove(0));
        scene.count(1);
        assert_gone(ELSEWHERE, 2);
        assert_shows(page(ELSEWHERE, 6), 6..12);
        drop(regions);
        scene.count(0);
        assert_gone(ELSEWHERE, 12);
    });
}

/// T102: of 64 regions side by side, in an order of their own, the first and the last byte of each are its own.
#[test]
fn the_first_and_last_byte_of_each_of_64_regions_are_its_own() {
    in_both("the_first_and_last_byte_of_each_of_64_regions_are_its_own", 128, |scene| {
        // Every other one goes on where the one before ends; the next jumps.
        let pgoff = |n: u64| if n % 4 < 2 { n * 2 } else { 126 - n * 2 };
        let attach = |n| scene.vmap.attach(&long(2).pgoff(pgoff(n)).at(page(FAR, n * 2))).unwrap();
        let regions: Vec<Region> = (0..64).map(attach).collect();
        scene.count(64);
        for (n, region) in (0..64).zip(&regions) {
            let first = region.as_ptr() as usize;
            let last = first + region.len_bytes() - 1;
            assert_eq!(touch::read(last as *const u8), Ok(mark(pgoff(n) + 1)), "the last byte of region {n}");
            assert_eq!(touch::read(first as *const u8), Ok(mark(pgoff(n))), "the first byte of region {n}");
        }
        scene.count(64);
        // One out of the middle, and one munmap over the borders of three.
        let mut regions = regions;
        drop(regions.remove(31));
        raw::munmap(page(FAR, 81) as *mut u8, 4);
        scene.count(62);
        assert_gone(page(FAR, 62), 2);
        assert_shows(page(FAR, 60), pgoff(30)..pgoff(30) + 2);
        assert_shows(page(FAR, 80), pgoff(40)..pgoff(40) + 1);
        assert_shows(page(FAR, 85), pgoff(42) + 1..pgoff(42) + 2);
        drop(regions);
        scene.count(0);
    });
}

/// A range that moved has its waiters woken: those see SIGSEGV, or what was put there instead; the page that they waited
/// for is at the new address.
#[test]
fn threads_that_wait_in_a_range_that_goes_are_woken() {
    support::alone("threads_that_wait_in_a_range_that_goes_are_woken", || {
        let engine = support::engine_builder().fault_around_pages(1).build().unwrap();
        let moved: fn() = || {
            raw::mremap(FAR, 8, 8, libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED, ELSEWHERE);
        };
        let shrunk: fn() = || {
            raw::mremap(FAR, 8, 2, 0, 0);
        };
        let replaced: fn() = || raw::foreign(page(FAR, 4), 2, 0x5a);
        for (change, replaces) in [(moved, false), (shrunk, false), (replaced, true)] {
            let gated = support::scene::GatedSource::new();
            let vmap = engine.vmap(&gated.list(8)).unwrap();
            let region = vmap.attach(&long(8).at(FAR)).unwrap();
            let waiter = std::thread::spawn(|| touch::read(page(FAR, 5) as *const u8));
            gated.wait_for_held(1);
            change();
            match waiter.join().unwrap() {
                // What is there now, before or after it was filled.
                Ok(byte) => assert!(replaces && [0, 0x5a].contains(&byte), "{byte}"),
                Err(refused) => assert!(refused.is_sigsegv()),
            }
            gated.open();
            let left = if raw::mappings(ELSEWHERE, page(ELSEWHERE, 8)) > 0 { ELSEWHERE } else { FAR };
            assert_shows(left, 0..2);
            if left == ELSEWHERE {
                assert_shows(left, 0..8);
            }
            drop(region);
            support::truth::assert_count(&engine, &vmap, 0);
            // What was put there is nobody's.
            // SAFETY: the test's own range, of which no Rust value is a part.
            unsafe { libc::munmap(FAR as *mut c_void, 8 * page_size()) };
        }
        assert_eq!(engine.stats().strays, 0);
    });
}

/// T49: a forked child has each area with the access that it was attached with, whatever the parent has changed since by
/// `mprotect`: unlike memory that the kernel copies.
#[test]
fn a_child_has_the_access_of_the_attach() {
    alone("a_child_has_the_access_of_the_attach", || {
        let engine = engine_builder().build().unwrap();
        let vmap = engine.vmap(&pages(8)).unwrap();
        let region = vmap.attach(&long(8).at(FAR)).unwrap();
        let read_only = vmap.attach(&long(8).at(ELSEWHERE).read_only()).unwrap();
        raw::mprotect(FAR, 2, libc::PROT_NONE);
        raw::mprotect(page(FAR, 2), 2, libc::PROT_READ);
        raw::mprotect(ELSEWHERE, 4, libc::PROT_NONE);
        raw::mprotect(page(ELSEWHERE, 4), 4, libc::PROT_READ | libc::PROT_WRITE);
        reap_ok(child(|| {
            assert_shows(FAR, 0..8);
            assert_shows(ELSEWHERE, 0..8);
            for n in 0..8 {
                touch::write(page(FAR, n) as *mut u8, mark(n)).unwrap();
                assert!(touch::write(page(ELSEWHERE, n) as *mut u8, 1).is_err_and(|refused| refused.is_sigsegv()));
            }
        }));
        assert_gone(FAR, 2);
        assert_gone(ELSEWHERE, 4);
        settled(&engine, &vmap, 2);
        drop((region, read_only));
        assert_count(&engine, &vmap, 0);
    });
}
