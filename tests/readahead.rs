//! How many pages a fault brings when a region is walked through, and when it is touched here and there.

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use kiomap::{AttachOptions, Engine, FaultAround, Kiobuf, Region, page_size};
use support::scene::{Rng, at, child, settled};
use support::{
    alone, attached, engine_builder, holes, list_with_holes, mark, pages, reap_ok, settled_stats, source, touch,
};

fn adaptive(max_pages: usize) -> Engine {
    engine_builder().fault_around(FaultAround::Adaptive { max_pages }).build().unwrap()
}

#[track_caller]
fn assert_marks(region: &Region, wanted: impl IntoIterator<Item = u64>) {
    wanted.into_iter().for_each(|page| assert_eq!(touch::read(at(region, page)), Ok(mark(page)), "page {page}"));
}

/// Walks forward and backward fault once for a window, and bring every page once.
#[test]
fn a_walk_takes_few_faults() {
    alone("a_walk_takes_few_faults", || {
        const PAGES: u64 = 4096;
        for (most, backward) in [(512, false), (64, false), (64, true), (1, false)] {
            let engine = adaptive(most);
            let (_vmap, region) = attached(&engine, &pages(PAGES));
            if backward {
                assert_marks(&region, (0..PAGES).rev());
            } else {
                assert_marks(&region, 0..PAGES);
            }
            let stats = settled_stats(&engine);
            assert_eq!((stats.pages_copied, stats.already_present), (PAGES, 0));
            let most_faults = PAGES / most as u64 + if most == 1 { 0 } else { 10 };
            assert!(stats.faults <= most_faults, "{} faults, windows of {most}, backward: {backward}", stats.faults);
        }
    });
}

/// Touches here and there bring their own pages only.
#[test]
fn touches_here_and_there_bring_single_pages() {
    alone("touches_here_and_there_bring_single_pages", || {
        let engine = adaptive(512);
        let (_vmap, region) = attached(&engine, &pages(8192));
        let mut places: Vec<u64> = (1..800).map(|n| 10 * n).collect();
        Rng::new(95).shuffle(&mut places);
        assert_marks(&region, places.iter().copied());
        let stats = settled_stats(&engine);
        assert_eq!((stats.faults, stats.pages_copied), (799, 799));
        // The rest is right all the same, with what is there in the middle.
        assert_marks(&region, 0..8192);
        assert_eq!(settled_stats(&engine).pages_copied, 8192);
    });
}

/// Threads that walk through parts of one region are several streams.
#[test]
fn walks_through_parts_of_one_region_are_kept_apart() {
    alone("walks_through_parts_of_one_region_are_kept_apart", || {
        const PART: u64 = 2048;
        let engine = adaptive(128);
        let (_vmap, region) = attached(&engine, &pages(4 * PART));
        std::thread::scope(|scope| {
            for part in 0..4 {
                let region = &region;
                scope.spawn(move || assert_marks(region, part * PART..(part + 1) * PART));
            }
        });
        let stats = settled_stats(&engine);
        assert_eq!(stats.pages_copied, 4 * PART);
        assert!(stats.faults <= 4 * (PART / 128 + 10), "{} faults", stats.faults);
    });
}

/// T95, T5: windows end at the borders of extents, holes, the region and the list: nothing outside comes.
#[test]
fn windows_end_where_the_region_or_the_extent_does() {
    alone("windows_end_where_the_region_or_the_extent_does", || {
        let engine = adaptive(512);
        let mut list = pages(300);
        list.expand(&holes(3)).unwrap();
        let mut zeros = Kiobuf::new();
        zeros.map_zero(200).unwrap();
        list.expand(&zeros).unwrap();
        list.expand(&list_with_holes(90, |page| page % 7 == 3)).unwrap();
        let vmap = engine.vmap(&list).unwrap();
        let len = 500 * page_size();
        let region = vmap.attach(&AttachOptions::new().pgoff(60).len_bytes(len)).unwrap();
        let expected = |page: u64| match page {
            0..300 => Some(mark(page)),
            300..303 => None,
            303..503 => Some(0),
            page => ((page - 503) % 7 != 3).then(|| mark(page - 503)),
        };
        for page in 0..500 {
            let read = touch::read(at(&region, page));
            let sigbus = |refused: touch::Refused| assert!(refused.is_sigbus_at(at(&region, page) as usize));
            assert_eq!(read.map_err(sigbus).ok(), expected(60 + page), "page {page}");
        }
        let had = |from, to| (from..to).filter(|&page| expected(page).is_some()).count() as u64;
        let stats = settled_stats(&engine);
        assert_eq!((stats.pages_copied, stats.pages_zeroed), (had(60, 300) + had(503, 560), 200));
    });
}

/// T33: what is left of a region whose middle was unmapped is walked through on both sides.
#[test]
fn a_walk_goes_on_in_the_pieces_of_a_region() {
    alone("a_walk_goes_on_in_the_pieces_of_a_region", || {
        let engine = adaptive(512);
        let (vmap, region) = attached(&engine, &pages(3000));
        assert_marks(&region, 0..400);
        let start = region.as_ptr().wrapping_add(1000 * page_size());
        // SAFETY: nothing refers to the pages.
        assert_eq!(unsafe { libc::munmap(start.cast(), 1000 * page_size()) }, 0);
        assert_marks(&region, 400..1000);
        assert_marks(&region, 2000..3000);
        settled(&engine, &vmap, 2);
        let stats = engine.stats();
        assert!(stats.pages_copied <= 2000 && stats.faults < 40, "{stats:?}");
    });
}

/// T69: pages that somebody wrote before are passed over, and stay as they were written.
#[test]
fn pages_that_are_there_in_the_middle_of_a_window_stay() {
    alone("pages_that_are_there_in_the_middle_of_a_window_stay", || {
        let engine = adaptive(512);
        let (vmap, region) = attached(&engine, &pages(2000));
        let written = |page: u64| page % 50 == 20 || (600..700).contains(&page);
        for page in (0..2000).filter(|&page| written(page)) {
            vmap.write_at(page * page_size() as u64, &vec![255; page_size()]).unwrap();
        }
        for page in 0..2000 {
            let expected = if written(page) { 255 } else { mark(page) };
            assert_eq!(touch::read(at(&region, page)), Ok(expected), "page {page}");
        }
    });
}

/// T63: a source is asked for at most 64 pages at once, and for more than one on a walk.
#[test]
fn reads_of_a_walk_are_of_a_sensible_size() {
    alone("reads_of_a_walk_are_of_a_sensible_size", || {
        needs_sources!();
        let engine = adaptive(512);
        let (calls, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let (counted, seen) = (Arc::clone(&calls), Arc::clone(&most));
        let list = source(1000, move |_, len| {
            counted.fetch_add(1, Ordering::Relaxed);
            seen.fetch_max(len, Ordering::Relaxed);
            Ok(())
        });
        let (_vmap, region) = attached(&engine, &list);
        assert_marks(&region, 0..1000);
        assert_eq!(most.load(Ordering::Relaxed), 64);
        assert!(calls.load(Ordering::Relaxed) < 30);
    });
}

/// T49: a child walks with streams of its own, which begin with its parent's.
#[test]
fn a_child_walks_on() {
    alone("a_child_walks_on", || {
        let engine = adaptive(128);
        let (vmap, region) = attached(&engine, &pages(4000));
        assert_marks(&region, 0..1000);
        let before = settled_stats(&engine);
        reap_ok(child(|| assert_marks(&region, 0..4000)));
        settled(&engine, &vmap, 1);
        let after = engine.stats();
        assert!(after.faults - before.faults < 40, "{} faults", after.faults - before.faults);
        assert_eq!(after.pages_copied, 4000);
    });
}

/// T63, T96: threads that walk through the same pages at once all see them, and each page comes once.
#[test]
fn walks_through_the_same_pages_meet() {
    alone("walks_through_the_same_pages_meet", || {
        for seed in 0..4 {
            let engine = adaptive(512);
            let (vmap, region) = attached(&engine, &pages(3000));
            let walk = |thread: u64| {
                let mut rng = Rng::new(10 * seed + thread);
                (0..3000).for_each(|page| {
                    assert_eq!(touch::read(at(&region, page)), Ok(mark(page)));
                    rng.dawdle(100);
                });
            };
            let pid = child(|| walk(9));
            std::thread::scope(|scope| (0..4).for_each(|thread| drop(scope.spawn(move || walk(thread)))));
            reap_ok(pid);
            settled(&engine, &vmap, 1);
            assert_eq!(engine.stats().pages_copied, 3000);
        }
    });
}

/// Windows of no pages, and of too many, are refused.
#[test]
fn a_window_out_of_range_is_refused() {
    for around in [0, kiomap::FAULT_AROUND_MAX_PAGES + 1, usize::MAX] {
        for around in [FaultAround::Fixed(around), FaultAround::Adaptive { max_pages: around }] {
            let refused = engine_builder().fault_around(around).build().unwrap_err();
            assert_eq!(refused.errno(), nix::errno::Errno::EINVAL, "{around:?}: {refused}");
        }
    }
}
