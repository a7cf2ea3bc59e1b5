//! Regions in stripes: parts that have a userfaultfd each. Whatever is done to them, they are as one region.

mod support;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use kiomap::{
    AttachOptions, Delivery, Engine, EngineBuilder, Error, Features, Kiobuf, OpenWay, PageSize, Region, STRIPES_MAX,
    Shutdown, Vmap, page_size,
};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use support::pool::{HUGE, per_huge, with_pool};
use support::raw::{ELSEWHERE, FAR, assert_gone, assert_shows, assert_sigbus_pages, foreign, mremap, munmap};
use support::scene::{Rng, at};
use support::truth::{assert_count, assert_nobody_waits, assert_truth};
use support::{
    alone, assert_sigbus, eventually, fork_child, in_page, list_with_holes, mark, open_descriptors, pages, read_page,
    reap_ok, settled_stats, source, touch, vmap_mappings, without_poison,
};

/// Whatever delivery the suite runs with.
fn engine_builder() -> EngineBuilder {
    support::engine_builder().delivery(Delivery::Handler)
}

fn striped(stripes: usize) -> AttachOptions {
    AttachOptions::new().stripes(stripes)
}

fn attached(engine: &Engine, list: &Kiobuf, stripes: usize) -> (Vmap, Region) {
    let vmap = engine.vmap(list).unwrap();
    let region = vmap.attach(&striped(stripes)).unwrap();
    (vmap, region)
}

/// Touches all pages of a region, from several threads at once, each in an order of its own.
fn touch_all(region: &Region, nr_pages: u64, threads: u64) {
    std::thread::scope(|scope| {
        for seed in 0..threads {
            scope.spawn(move || {
                let mut order: Vec<u64> = (0..nr_pages).collect();
                Rng::new(seed + 1).shuffle(&mut order);
                for page in order {
                    assert_eq!(read_page(region, page), Ok(mark(page)), "page {page}");
                }
            });
        }
    });
}

/// One stripe is what a region is without asking; more are that many areas, each of which is counted, side by side and equal.
#[test]
fn stripes_are_counted_like_mappings_and_end_with_their_region() {
    alone("stripes_are_counted_like_mappings_and_end_with_their_region", || {
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        let derefs = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&derefs);
        let on_deref = move |_: &Vmap| {
            counted.fetch_add(1, Ordering::SeqCst);
        };
        let vmap = engine.vmap_builder(&pages(67)).on_deref(on_deref).build().unwrap();
        for (round, stripes) in [1, 2, 3, STRIPES_MAX, 67.min(STRIPES_MAX)].into_iter().enumerate() {
            let first = vmap.attach(&striped(stripes)).unwrap();
            assert!(first.is_first());
            assert_count(&engine, &vmap, stripes);
            let second = vmap.attach(&striped(2).pgoff(7).len_bytes(5 * page_size())).unwrap();
            assert!(!second.is_first());
            assert_count(&engine, &vmap, stripes + 2);
            let areas = &engine.snapshot().unwrap().spaces[0].areas;
            let lens: Vec<_> =
                areas.iter().filter(|area| area.region == first.id()).map(|area| area.nr_pages()).collect();
            assert_eq!((lens.len(), lens.iter().sum()), (stripes, 67));
            assert!(lens.iter().max().unwrap() - lens.iter().min().unwrap() <= 1, "{lens:?}");
            assert_eq!(engine.spaces().unwrap().len(), 1);
            assert_eq!(engine.spaces().unwrap()[0].areas as usize, stripes + 2);
            (0..67).for_each(|page| assert_eq!(read_page(&first, page), Ok(mark(page))));
            (0..5).for_each(|page| assert_eq!(read_page(&second, page), Ok(mark(page + 7))));
            drop(first);
            assert_count(&engine, &vmap, 2);
            assert_eq!(derefs.load(Ordering::SeqCst), round);
            drop(second);
            assert_count(&engine, &vmap, 0);
            eventually("the callback", || derefs.load(Ordering::SeqCst) == round + 1);
        }
        assert_eq!(settled_stats(&engine).strays, 0);
    });
}

/// A region takes descriptors once: those of one that is gone are the next one's.
#[test]
fn stripes_of_a_region_that_is_gone_are_used_again() {
    alone("stripes_of_a_region_that_is_gone_are_used_again", || {
        let before = open_descriptors();
        let engine = engine_builder().build().unwrap();
        let vmap = engine.vmap(&pages(64)).unwrap();
        drop(vmap.attach(&striped(8)).unwrap());
        let open = open_descriptors();
        for stripes in [8, 3, 1, 8] {
            let region = vmap.attach(&striped(stripes)).unwrap();
            touch_all(&region, 64, 2);
            drop(region);
            assert_eq!(open_descriptors(), open);
        }
        let (one, other) = (vmap.attach(&striped(8)).unwrap(), vmap.attach(&striped(8)).unwrap());
        assert_eq!(open_descriptors(), open + 8);
        drop((one, other));
        drop(vmap);
        drop(engine);
        eventually("the descriptors are closed", || open_descriptors() == before);
    });
}

#[test]
fn what_can_not_be_striped_is_refused_and_leaves_nothing() {
    alone("what_can_not_be_striped_is_refused_and_leaves_nothing", || {
        let engine = engine_builder().build().unwrap();
        let vmap = engine.vmap(&pages(5)).unwrap();
        let mappings = vmap_mappings();
        let refused = |options: AttachOptions| {
            let error = vmap.attach(&options).unwrap_err();
            assert_eq!(error.errno(), Errno::EINVAL);
            assert!(matches!(error, Error::Invalid { what: "the stripes of a region", .. }), "{error}");
        };
        for stripes in [0, 6, STRIPES_MAX + 1, usize::MAX] {
            refused(striped(stripes));
        }
        refused(striped(2).len_bytes(1));
        refused(striped(STRIPES_MAX + 1).len_bytes(page_size() * 1000));
        assert_eq!(vmap_mappings(), mappings);
        assert_count(&engine, &vmap, 0);
        let region = vmap.attach(&striped(5)).unwrap();
        // Another is where it should be.
        let taken = vmap.attach(&striped(2).at(region.as_ptr() as usize)).unwrap_err();
        assert!(matches!(taken, Error::AddressTaken { .. }));
        reap_ok(fork_child(|| {
            let error = vmap.attach(&striped(2)).unwrap_err();
            assert!(matches!(error, Error::NotOwner { .. }), "{error}");
            let region = vmap.attach(&striped(1)).unwrap();
            assert_eq!(read_page(&region, 4), Ok(mark(4)));
        }));
        engine.shutdown(Shutdown::Poison).unwrap();
        assert!(matches!(vmap.attach(&striped(2)), Err(Error::Shutdown)));
    });
}

#[test]
fn threads_that_bring_their_own_pages_need_no_stripes() {
    alone("threads_that_bring_their_own_pages_need_no_stripes", || {
        // Ours first: the engine passes on to it what is not its own.
        touch::prepare();
        let Ok(engine) = support::engine_builder().delivery(Delivery::InThread).build() else { return };
        let vmap = engine.vmap(&pages(4)).unwrap();
        let error = vmap.attach(&striped(2)).unwrap_err();
        assert!(matches!(error, Error::Invalid { what: "the stripes of a region", value: 2, .. }), "{error}");
        assert_eq!(read_page(&vmap.attach(&striped(1)).unwrap(), 3), Ok(mark(3)));
    });
}

/// From several threads that go over every border, with and without a crew: every page once, and the right bytes.
#[test]
fn threads_in_all_stripes_see_the_right_bytes() {
    alone("threads_in_all_stripes_see_the_right_bytes", || {
        const PAGES: u64 = 1500;
        for (handlers, always) in [(1, false), (4, false), (4, true)] {
            let builder = engine_builder().handlers(handlers).handlers_standing_by(always);
            let engine = builder.fault_around_pages(4).build().unwrap();
            let (vmap, region) = attached(&engine, &pages(PAGES), 7);
            touch_all(&region, PAGES, 4);
            let stats = settled_stats(&engine);
            assert_eq!((stats.pages_copied, stats.pages_poisoned, stats.strays, stats.panics), (PAGES, 0, 0, 0));
            let own = engine.spaces().unwrap()[0];
            assert_eq!((own.faults, own.pages_installed), (stats.faults, PAGES));
            assert_nobody_waits(&engine);
            drop(region);
            assert_count(&engine, &vmap, 0);
        }
    });
}

/// A source that may wait, holes, and what lies behind the end of the list.
#[test]
fn pages_that_are_slow_or_missing_are_so_in_every_stripe() {
    alone("pages_that_are_slow_or_missing_are_so_in_every_stripe", || {
        let engine = engine_builder().build().unwrap();
        let slow = source(90, |_, _| Ok(()));
        let (_, region) = attached(&engine, &slow, 4);
        touch_all(&region, 90, 3);
        let holes = list_with_holes(30, |page| page % 3 == 0);
        let vmap = engine.vmap(&holes).unwrap();
        let region = vmap.attach(&striped(5).len_bytes(40 * page_size())).unwrap();
        for page in 0..40 {
            if page % 3 == 0 || page >= 30 {
                assert_sigbus(&region, page);
            } else {
                assert_eq!(read_page(&region, page), Ok(mark(page)));
            }
        }
        assert_nobody_waits(&engine);
    });
}

/// Unmaps within a stripe, of a whole one, and over borders: what is left is there, what is gone is not, and each is counted.
#[test]
fn unmaps_over_borders_are_followed() {
    alone("unmaps_over_borders_are_followed", || {
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        // Stripes of ten pages.
        for (first, nr_pages, areas) in
            [(3, 4, 5), (10, 10, 3), (5, 10, 4), (5, 30, 2), (0, 15, 3), (25, 15, 3), (0, 40, 0), (9, 22, 2)]
        {
            let (vmap, region) = attached(&engine, &pages(40), 4);
            let base = region.as_ptr() as usize;
            (0..40).step_by(3).for_each(|page| assert_eq!(read_page(&region, page), Ok(mark(page))));
            munmap(at(&region, first), nr_pages);
            assert_count(&engine, &vmap, areas);
            let end = first + nr_pages as u64;
            assert_shows(base, 0..first);
            assert_gone(at(&region, first) as usize, nr_pages);
            assert_shows(at(&region, end) as usize, end..40);
            // The addresses are another's by now, who is left alone.
            foreign(at(&region, first) as usize, nr_pages, 9);
            drop(region);
            assert_count(&engine, &vmap, 0);
            assert_eq!(touch::read((base + first as usize * page_size()) as *const u8), Ok(9));
            munmap((base + first as usize * page_size()) as *mut u8, nr_pages);
        }
        assert_eq!(settled_stats(&engine).strays, 0);
    });
}

/// A part of a stripe moves, grows and shrinks as a part of any region. Two stripes are two mappings for the kernel.
#[test]
fn moves_within_a_stripe_are_followed_and_over_a_border_refused() {
    alone("moves_within_a_stripe_are_followed_and_over_a_border_refused", || {
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        let vmap = engine.vmap(&pages(40)).unwrap();
        let region = vmap.attach(&striped(4).at(FAR)).unwrap();
        let page = page_size();
        assert_eq!(mremap(FAR + 12 * page, 5, 5, libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED, ELSEWHERE), ELSEWHERE);
        assert_count(&engine, &vmap, 6);
        assert_shows(ELSEWHERE, 12..17);
        assert_shows(FAR + 17 * page, 17..40);
        // SAFETY: nothing refers to the region.
        let over = unsafe {
            let to = (ELSEWHERE + 64 * page) as *mut libc::c_void;
            let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
            libc::mremap((FAR + 25 * page) as *mut libc::c_void, 10 * page, 10 * page, flags, to)
        };
        // Since Linux 6.17 the kernel moves several mappings, but none with a userfaultfd.
        assert_eq!((over, Errno::last()), (libc::MAP_FAILED, Errno::EFAULT));
        assert_shows(FAR + 20 * page, 20..40);
        assert_count(&engine, &vmap, 6);
        drop(region);
        assert_count(&engine, &vmap, 0);
        assert_gone(ELSEWHERE, 5);
    });
}

/// What grew without an event is looked up in the kernel's table, where stripes side by side look like one mapping: it is
/// the grown one's up to the next, and no further.
#[test]
fn what_grew_beside_a_stripe_is_not_taken_for_the_next() {
    alone("what_grew_beside_a_stripe_is_not_taken_for_the_next", || {
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        if !engine.features().contains(Features::THREAD_ID) {
            // What grew is SIGBUS then.
            return;
        }
        let (vmap, region) = attached(&engine, &pages(40), 4);
        let (base, page) = (region.as_ptr() as usize, page_size());
        // The second stripe loses its first five pages, and the first one grows over three of them.
        munmap((base + 10 * page) as *mut u8, 5);
        assert_eq!(mremap(base, 10, 13, 0, 0), base);
        assert_shows(base, 0..13);
        assert_gone(base + 13 * page, 2);
        assert_shows(base + 15 * page, 15..40);
        assert_count(&engine, &vmap, 4);
        // And over the rest: no gap is left, and the kernel's table shows one range.
        assert_eq!(mremap(base, 13, 15, 0, 0), base);
        assert_shows(base, 0..40);
        assert_count(&engine, &vmap, 4);
        // Each is unmapped by itself, and the others stay.
        munmap((base + 15 * page) as *mut u8, 5);
        assert_shows(base, 0..15);
        assert_shows(base + 20 * page, 20..40);
        assert_count(&engine, &vmap, 3);
        munmap(base as *mut u8, 15);
        assert_count(&engine, &vmap, 2);
        drop(region);
        assert_count(&engine, &vmap, 0);
        assert_eq!(settled_stats(&engine).panics, 0);
    });
}

/// Dropping a region of which nobody knew that it had grown takes that along too.
#[test]
fn what_grew_beside_a_stripe_ends_with_the_region() {
    alone("what_grew_beside_a_stripe_ends_with_the_region", || {
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        let vmap = engine.vmap(&pages(40)).unwrap();
        let region = vmap.attach(&striped(4).at(FAR)).unwrap();
        let (base, page) = (FAR, page_size());
        munmap((base + 10 * page) as *mut u8, 5);
        assert_eq!(mremap(base, 10, 13, 0, 0), base);
        drop(region);
        assert_count(&engine, &vmap, 0);
        assert_gone(base, 40);
    });
}

#[test]
fn advice_over_borders_brings_pages_back() {
    alone("advice_over_borders_brings_pages_back", || {
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        let (vmap, region) = attached(&engine, &pages(40), 4);
        (0..40).for_each(|page| assert_eq!(touch::write(in_page(&region, page), 200), Ok(())));
        let advise = |first: u64, nr_pages: usize, advice| {
            // SAFETY: a range of the region, to which nothing refers.
            let answer = unsafe { libc::madvise(at(&region, first).cast(), nr_pages * page_size(), advice) };
            assert_eq!(answer, 0);
        };
        // The mappings go, the object keeps what was written.
        advise(5, 20, libc::MADV_DONTNEED);
        (0..40).for_each(|page| assert_eq!(read_page(&region, page), Ok(200)));
        // The object gives it up: the list is asked again.
        advise(15, 20, libc::MADV_REMOVE);
        for page in 0..40 {
            let expected = if (15..35).contains(&page) { mark(page) } else { 200 };
            assert_eq!(read_page(&region, page), Ok(expected), "page {page}");
        }
        drop(region);
        assert_count(&engine, &vmap, 0);
    });
}

/// A child has all of it, by address, also where stripes were moved, and lie in another order than they were made in.
#[test]
fn children_inherit_every_stripe_in_order() {
    alone("children_inherit_every_stripe_in_order", || {
        let engine = engine_builder().build().unwrap();
        let vmap = engine.vmap(&pages(60)).unwrap();
        // The stripes of the second region are older than those of the first are by now, and lie behind them.
        drop(vmap.attach(&striped(3)).unwrap());
        let behind = vmap.attach(&striped(3).at(FAR + 100 * page_size())).unwrap();
        let plain = vmap.attach(&AttachOptions::new().at(FAR + 60 * page_size()).len_bytes(20 * page_size())).unwrap();
        let before = vmap.attach(&striped(6).at(FAR)).unwrap();
        let private = vmap.attach(&striped(4).inherit(false)).unwrap();
        // The last stripe of one comes to lie before all.
        let (moved, page) = (FAR - 50 * page_size(), page_size());
        assert_eq!(mremap(FAR + 50 * page, 10, 10, libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED, moved), moved);
        let (own, inherited) = (3 + 1 + 6 + 4, 3 + 1 + 6);
        assert_count(&engine, &vmap, own);
        assert_eq!(read_page(&before, 3), Ok(mark(3)));
        for _ in 0..10 {
            let child = fork_child(|| {
                assert!(private.check().is_err());
                assert_eq!(vmap.refcount().unwrap(), own + inherited);
                assert_shows(FAR, 0..50);
                assert_shows(moved, 50..60);
                assert_shows(FAR + 100 * page, 0..60);
                assert_shows(FAR + 60 * page, 0..20);
                // As pieces of one region there, too.
                munmap(at(&before, 5), 12);
                assert_shows(FAR + 17 * page, 17..50);
                let grandchild = fork_child(|| {
                    assert_shows(FAR, 0..5);
                    assert_gone(FAR + 5 * page, 12);
                    assert_shows(FAR + 17 * page, 17..50);
                    assert_shows(FAR + 100 * page, 0..60);
                });
                reap_ok(grandchild);
                // SAFETY: each is dropped once here, and its parent has its own.
                unsafe {
                    drop(std::ptr::read(&raw const before));
                    drop(std::ptr::read(&raw const behind));
                }
                assert_gone(FAR, 50);
                assert_gone(moved, 10);
                assert_gone(FAR + 100 * page, 60);
                assert_shows(FAR + 60 * page, 0..20);
            });
            reap_ok(child);
            eventually("the child's end is counted", || vmap.refcount().unwrap() == own);
        }
        assert_truth(&engine);
        drop((before, behind, plain, private));
        assert_count(&engine, &vmap, 0);
    });
}

/// Children are forked while threads fault in all stripes, and others unmap and attach.
#[test]
fn forks_amid_faults_and_unmaps_of_stripes_are_served() {
    alone("forks_amid_faults_and_unmaps_of_stripes_are_served", || {
        const PAGES: u64 = 400;
        let engine = engine_builder().handlers(4).handlers_standing_by(true).fault_around_pages(1).build().unwrap();
        let (vmap, region) = attached(&engine, &pages(PAGES), 4);
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    let churned = vmap.attach(&striped(3)).unwrap();
                    assert_eq!(read_page(&churned, PAGES / 2), Ok(mark(PAGES / 2)));
                    munmap(at(&churned, PAGES / 3 - 2), 5);
                    assert_eq!(read_page(&churned, PAGES - 1), Ok(mark(PAGES - 1)));
                }
            });
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    touch_all(&region, PAGES, 2);
                    // SAFETY: the region's own range; the object keeps its pages.
                    unsafe { libc::madvise(region.as_ptr().cast(), region.len_bytes(), libc::MADV_DONTNEED) };
                }
            });
            for _ in 0..20 {
                let child = fork_child(|| {
                    (0..PAGES).for_each(|page| assert_eq!(read_page(&region, page), Ok(mark(page))));
                });
                reap_ok(child);
            }
            over.store(true, Ordering::Relaxed);
        });
        assert_eq!(settled_stats(&engine).panics, 0);
        drop(region);
        eventually("all is counted", || vmap.refcount().unwrap() == 0);
        assert_truth(&engine);
    });
}

/// Addresses go from hand to hand between stripes and regions without any, by moves over one another and unmaps: each shows
/// its own bytes.
#[test]
fn addresses_that_change_hands_between_stripes_show_their_own_bytes() {
    alone("addresses_that_change_hands_between_stripes_show_their_own_bytes", || {
        const PAGES: usize = 12;
        let engine = engine_builder().handlers(4).handlers_standing_by(true).build().unwrap();
        let vmaps: Vec<_> = (0..3).map(|_| engine.vmap(&pages(PAGES as u64)).unwrap()).collect();
        let page = page_size();
        std::thread::scope(|scope| {
            for (n, vmap) in vmaps.iter().enumerate() {
                let engine = &engine;
                scope.spawn(move || {
                    let (here, there) = (FAR + ((2 * n) << 30), FAR + ((2 * n + 1) << 30));
                    for round in 0..120 {
                        let region = vmap.attach(&striped(1 + round % 4).at(here)).unwrap();
                        assert_eq!(read_page(&region, 3), Ok(mark(3)));
                        let stripe = PAGES / (1 + round % 4);
                        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
                        // The last stripe over the place of the one before, or away.
                        assert_eq!(mremap(here + (PAGES - stripe) * page, stripe, stripe, flags, there), there);
                        assert_shows(there, (PAGES - stripe) as u64..PAGES as u64);
                        if round % 4 > 1 {
                            let second = here + (PAGES - 2 * stripe) * page;
                            assert_eq!(mremap(there, stripe, stripe, flags, second), second);
                            assert_shows(second, (PAGES - stripe) as u64..PAGES as u64);
                            assert_shows(here, 0..(PAGES - 2 * stripe) as u64);
                        }
                        drop(region);
                        // What one was moved over is counted by its event.
                        engine.settle().unwrap();
                        assert_eq!(vmap.refcount().unwrap(), 0);
                    }
                });
            }
        });
        assert_eq!(settled_stats(&engine).panics, 0);
        assert_truth(&engine);
    });
}

#[test]
fn populating_goes_over_borders() {
    alone("populating_goes_over_borders", || {
        let engine = engine_builder().build().unwrap();
        let (_, region) = attached(&engine, &pages(300), 7);
        region.populate(20 * page_size()..250 * page_size()).unwrap();
        let faults = settled_stats(&engine).faults;
        (20..250).for_each(|page| assert_eq!(read_page(&region, page), Ok(mark(page))));
        assert_eq!(settled_stats(&engine).faults, faults);
        touch_all(&region, 300, 2);
    });
}

/// What a memfd holds is mapped in windows, which end at borders.
#[test]
fn pages_that_a_memfd_holds_are_mapped_in_every_stripe() {
    alone("pages_that_a_memfd_holds_are_mapped_in_every_stripe", || {
        const PAGES: u64 = 200;
        let memfd = memfd_create(c"handed in", MFdFlags::MFD_ALLOW_SEALING | MFdFlags::MFD_CLOEXEC).unwrap();
        let memfd = File::from(memfd);
        for page in 0..PAGES {
            memfd.write_all_at(&vec![mark(page); page_size()], page * page_size() as u64).unwrap();
        }
        fcntl(&memfd, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_GROW)).unwrap();
        let mut list = Kiobuf::new();
        list.map_memfd(&memfd, 0..PAGES * page_size() as u64).unwrap();
        let engine = engine_builder().build().unwrap();
        let vmap = engine.vmap_builder(&list).minor_faults().build().unwrap();
        let region = vmap.attach(&striped(6)).unwrap();
        touch_all(&region, PAGES / 2, 2);
        region.populate(0..region.len_bytes()).unwrap();
        let faults = settled_stats(&engine).faults;
        touch_all(&region, PAGES, 2);
        assert_eq!(settled_stats(&engine).faults, faults);
        reap_ok(fork_child(|| touch_all(&region, PAGES, 1)));
        drop(region);
        eventually("all is counted", || vmap.refcount().unwrap() == 0);
        assert_truth(&engine);
    });
}

/// Borders lie between huge pages.
#[test]
fn stripes_of_huge_pages_are_whole_huge_pages() {
    with_pool("stripes_of_huge_pages_are_whole_huge_pages", || {
        let engine = engine_builder().build().unwrap();
        let nr_pages = 7 * per_huge();
        let vmap = engine.vmap_builder(&pages(nr_pages)).page_size(PageSize::Huge2M).build().unwrap();
        let error = vmap.attach(&striped(8)).unwrap_err();
        assert!(matches!(error, Error::Invalid { what: "the stripes of a region", value: 8, .. }), "{error}");
        let region = vmap.attach(&striped(3)).unwrap();
        assert_count(&engine, &vmap, 3);
        let areas = engine.snapshot().unwrap().spaces[0].areas.clone();
        assert!(areas.iter().all(|area| area.start % HUGE == 0 && area.end % HUGE == 0), "{areas:?}");
        (0..nr_pages).step_by(97).for_each(|page| assert_eq!(read_page(&region, page), Ok(mark(page))));
        reap_ok(fork_child(|| assert_eq!(read_page(&region, nr_pages - 1), Ok(mark(nr_pages - 1)))));
        eventually("the child's end is counted", || vmap.refcount().unwrap() == 3);
        // The second of the first stripe, and all of the next.
        munmap(at(&region, per_huge()), 3 * per_huge() as usize);
        assert_count(&engine, &vmap, 2);
        drop(region);
        assert_count(&engine, &vmap, 0);
    });
}

/// What a kernel lacks, or a user may not have, is made up for in each stripe as anywhere.
#[test]
fn stripes_work_without_poison_and_in_user_mode_only() {
    alone("stripes_work_without_poison_and_in_user_mode_only", || {
        let user_mode = engine_builder().open_ways(&[OpenWay::UserModeOnly]);
        for builder in [without_poison().delivery(Delivery::Handler), user_mode] {
            let engine = builder.fault_around_pages(1).build().unwrap();
            let list = list_with_holes(30, |page| page % 4 == 1);
            let vmap = engine.vmap(&list).unwrap();
            let region = vmap.attach(&striped(4).len_bytes(32 * page_size()).at(FAR)).unwrap();
            let judge = || {
                for page in 0..32 {
                    if page % 4 == 1 || page >= 30 {
                        assert_sigbus(&region, page);
                    } else {
                        assert_eq!(read_page(&region, page), Ok(mark(page)));
                    }
                }
            };
            judge();
            reap_ok(fork_child(judge));
            judge();
            munmap(at(&region, 6), 12);
            assert_gone(at(&region, 6) as usize, 12);
            drop(region);
            assert_gone(FAR, 32);
            eventually("all is counted", || vmap.refcount().unwrap() == 0);
            assert_nobody_waits(&engine);
        }
    });
}

/// After the engine's end what is there stays, and what is missing is SIGBUS, in every stripe.
#[test]
fn a_shutdown_leaves_right_bytes_or_sigbus_in_every_stripe() {
    alone("a_shutdown_leaves_right_bytes_or_sigbus_in_every_stripe", || {
        for how in [Shutdown::Poison, Shutdown::Fill] {
            let engine = engine_builder().fault_around_pages(1).build().unwrap();
            let (_, region) = attached(&engine, &pages(20), 4);
            (0..20).step_by(2).for_each(|page| assert_eq!(read_page(&region, page), Ok(mark(page))));
            engine.shutdown(how).unwrap();
            for page in 0..20 {
                if page % 2 == 0 || how == Shutdown::Fill {
                    assert_eq!(read_page(&region, page), Ok(mark(page)));
                } else {
                    assert_sigbus(&region, page);
                }
            }
            munmap(at(&region, 4), 7);
            assert_gone(at(&region, 4) as usize, 7);
            drop(engine);
            let base = region.as_ptr() as usize;
            if how == Shutdown::Poison {
                assert_sigbus_pages(base + 11 * page_size(), 1);
            }
            drop(region);
            assert_gone(base, 20);
        }
    });
}
