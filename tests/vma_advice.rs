//! Advice on a region by code that does not know the engine: what only drops mappings loses no byte, what drops pages makes
//! the next touch ask the list again, and no touch ever sees a zero page that the list did not ask for.

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use kiomap::{AttachOptions, Kiobuf, Revoke, page_size};
use nix::errno::Errno;
use support::raw::{assert_shows, assert_sigbus_pages, in_both};
use support::scene::{Rng, Told, at, child};
use support::truth::{assert_count, assert_nobody_waits};
use support::{alone, engine_builder, holes, mark, pages, reap_ok, source, touch};

/// Gives advice on pages.
fn advise(addr: *mut u8, nr_pages: usize, advice: i32) -> Result<(), Errno> {
    // SAFETY: a range of a region, to whose bytes nothing refers; what becomes of them is what is tested.
    let advised = unsafe { libc::madvise(addr.cast(), nr_pages * page_size(), advice) };
    Errno::result(advised).map(drop)
}

/// Fails unless the byte of each page is `byte`.
#[track_caller]
fn assert_all(addr: *mut u8, nr_pages: u64, byte: u8) {
    for n in 0..nr_pages as usize {
        assert_eq!(touch::read(addr.wrapping_add(n * page_size() + 11)), Ok(byte), "page {n}");
    }
}

/// T46, T48: advice that the memory is not needed, or not soon, changes no byte, whether written, resident or missing; nor
/// the count. The kernel refuses to free shared memory (`EINVAL`).
#[test]
fn advice_that_pages_are_not_needed_loses_no_byte() {
    in_both("advice_that_pages_are_not_needed_loses_no_byte", 16, |scene| {
        let region = scene.vmap.attach(&AttachOptions::new()).unwrap();
        let other = scene.vmap.attach(&AttachOptions::new().pgoff(2)).unwrap();
        scene.count(2);
        let base = region.as_ptr() as usize;
        for (round, advice) in
            [libc::MADV_DONTNEED, libc::MADV_COLD, libc::MADV_PAGEOUT, libc::MADV_FREE, libc::MADV_WILLNEED]
                .into_iter()
                .enumerate()
        {
            // Written, read, missing: three pages of each a round.
            let first = round as u64 * 3;
            touch::write(at(&region, first), 0xe0 + round as u8).unwrap();
            assert_shows(base + (first as usize + 1) * page_size(), first + 1..first + 2);
            let advised = advise(at(&region, 0), 16, advice);
            assert_eq!(advised.err(), (advice == libc::MADV_FREE).then_some(Errno::EINVAL), "advice {advice}");
            scene.count(2);
            for before in 0..=round as u64 {
                assert_eq!(touch::read(at(&region, before * 3)), Ok(0xe0 + before as u8), "advice {advice}");
            }
            for missing_or_read in [first + 1, first + 2] {
                assert_shows(base + missing_or_read as usize * page_size(), missing_or_read..missing_or_read + 1);
            }
        }
        // The other area was not advised on, and shows the same bytes.
        for (page, byte) in [(1, 0xe1), (4, 0xe2), (7, 0xe3), (10, 0xe4)] {
            assert_eq!(touch::read(at(&other, page)), Ok(byte));
        }
        drop((region, other));
        scene.count(0);
    });
}

/// T46, T92: a page that is SIGBUS is SIGBUS again after the kernel has forgotten that it was, in each process.
#[test]
fn a_sigbus_page_is_one_again_after_advice() {
    alone("a_sigbus_page_is_one_again_after_advice", || {
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        let mut list = pages(2);
        list.expand(&holes(2)).unwrap();
        let vmap = engine.vmap(&list).unwrap();
        let region = vmap.attach(&AttachOptions::new().len_bytes(6 * page_size())).unwrap();
        let scene = || {
            for advice in [libc::MADV_DONTNEED, libc::MADV_REMOVE, libc::MADV_DONTNEED] {
                assert_sigbus_pages(region.as_ptr() as usize + 2 * page_size(), 4);
                advise(at(&region, 0), 6, advice).unwrap();
            }
            assert_shows(region.as_ptr() as usize, 0..2);
            assert_sigbus_pages(region.as_ptr() as usize + 2 * page_size(), 4);
        };
        scene();
        reap_ok(child(scene));
        assert_count(&engine, &vmap, 1);
    });
}

/// T47: pages that were punched out are what the list says, not what was written: memory again from memory, a source is
/// asked again, zeros are zeros, a hole is SIGBUS. In every area of every process, whoever punched.
#[test]
fn punched_pages_are_what_the_list_says() {
    alone("punched_pages_are_what_the_list_says", || {
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        let asked = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&asked);
        let mut list = pages(3);
        let from_source = source(3, move |_, nr_pages| {
            counted.fetch_add(nr_pages, Ordering::SeqCst);
            Ok(())
        });
        list.expand(&from_source).unwrap();
        let mut zeros = Kiobuf::new();
        zeros.map_zero(3).unwrap();
        list.expand(&zeros).unwrap();
        list.expand(&holes(3)).unwrap();
        let vmap = engine.vmap(&list).unwrap();
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        let other = vmap.attach(&AttachOptions::new()).unwrap();
        let fresh = |addr: *mut u8| {
            let page = |n: usize| addr.wrapping_add(n * page_size());
            assert_shows(addr as usize, 0..3);
            assert_shows(page(3) as usize, 0..3);
            assert_all(page(6), 3, 0);
            assert_sigbus_pages(page(9) as usize, 3);
        };
        let write = |addr: *mut u8| {
            (0..9).for_each(|n| touch::write(addr.wrapping_add(n * page_size() + 11), 0xee).unwrap());
            assert_all(addr, 9, 0xee);
        };
        fresh(other.as_ptr());
        assert_eq!(asked.load(Ordering::SeqCst), 3);
        // By the engine's process, seen in both areas.
        write(region.as_ptr());
        assert_all(other.as_ptr(), 9, 0xee);
        advise(region.as_ptr(), 12, libc::MADV_REMOVE).unwrap();
        fresh(other.as_ptr());
        fresh(region.as_ptr());
        assert_eq!(asked.load(Ordering::SeqCst), 6);
        // By a child, seen in both processes.
        let (punched, done) = (Told::new(), Told::new());
        let pid = child(|| {
            write(region.as_ptr());
            advise(at(&region, 1), 7, libc::MADV_REMOVE).unwrap();
            punched.tell(1);
            done.wait_for(2);
            assert_eq!(touch::read(at(&other, 0).wrapping_add(11)), Ok(0xee));
            assert_shows(at(&other, 3) as usize, 0..3);
        });
        punched.wait_for(1);
        assert_count(&engine, &vmap, 4);
        assert_eq!(touch::read(at(&region, 0).wrapping_add(11)), Ok(0xee));
        assert_shows(at(&region, 1) as usize, 1..3);
        assert_shows(at(&region, 3) as usize, 0..3);
        assert_all(at(&region, 6), 2, 0);
        assert_eq!(touch::read(at(&region, 8).wrapping_add(11)), Ok(0xee));
        done.tell(2);
        reap_ok(pid);
        assert_eq!(asked.load(Ordering::SeqCst), 9);
        // A list that was taken back has nothing to show any more.
        vmap.revoke(Revoke::Soft).unwrap();
        advise(region.as_ptr(), 9, libc::MADV_REMOVE).unwrap();
        assert_sigbus_pages(other.as_ptr() as usize, 12);
        assert_eq!(engine.stats().strays, 0);
    });
}

/// T47, T48: touches that race punching and every other advice, from two processes, see the list's bytes each time, never a
/// zero page; and nobody is left waiting.
#[test]
fn touches_that_race_advice_never_see_zeros() {
    const PAGES: u64 = 64;
    alone("touches_that_race_advice_never_see_zeros", || {
        let engine = engine_builder().fault_around_pages(4).build().unwrap();
        for list in [pages(PAGES), source(PAGES, |_, _| Ok(()))] {
            let vmap = engine.vmap(&list).unwrap();
            let region = vmap.attach(&AttachOptions::new()).unwrap();
            let other = vmap.attach(&AttachOptions::new()).unwrap();
            let race = |seed: u64| {
                let touching = AtomicUsize::new(2);
                let failed = AtomicBool::new(false);
                std::thread::scope(|scope| {
                    for thread in 0..2 {
                        let (touching, failed, regions) = (&touching, &failed, [&region, &other]);
                        scope.spawn(move || {
                            let mut rng = Rng::new(seed + thread);
                            for _ in 0..2000 {
                                let page = rng.below(PAGES);
                                let byte = touch::read(at(regions[rng.below(2) as usize], page));
                                failed.fetch_or(byte != Ok(mark(page)), Ordering::Relaxed);
                            }
                            touching.fetch_sub(1, Ordering::Release);
                        });
                    }
                    let mut rng = Rng::new(seed + 7);
                    while touching.load(Ordering::Acquire) > 0 {
                        let advices = [
                            libc::MADV_REMOVE,
                            libc::MADV_REMOVE,
                            libc::MADV_DONTNEED,
                            libc::MADV_COLD,
                            libc::MADV_PAGEOUT,
                        ];
                        let advice = advices[rng.below(5) as usize];
                        advise(at(&region, rng.below(PAGES - 8)), 8, advice).unwrap();
                    }
                });
                assert!(!failed.load(Ordering::Relaxed));
            };
            let pid = child(|| race(100));
            race(200);
            reap_ok(pid);
            support::scene::settled(&engine, &vmap, 2);
            assert_nobody_waits(&engine);
            assert_count(&engine, &vmap, 2);
        }
        assert_eq!(engine.stats().strays, 0);
    });
}
