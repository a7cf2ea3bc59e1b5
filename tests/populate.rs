//! Bringing the pages of a region before they are touched: at once, and in the background.

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use kiomap::{AttachOptions, Engine, Error, Kiobuf, PageSize, PopulateOptions, Region, Revoke, Shutdown, page_size};
use nix::errno::Errno;
use support::pool::{HUGE, per_huge, with_pool};
use support::populating::{assert_marks, bytes, mapped, mapped_of, populate_amid_trouble, slow};
use support::raw::FAR;
use support::scene::{GatedSource, at, child, settled};
use support::{
    alone, assert_sigbus, attached, engine_builder, eventually, holes, mark, pages, read_page, reap_ok, settled_stats,
    source, threads, touch,
};

fn engine() -> Engine {
    engine_builder().fault_around_pages(1).build().unwrap()
}

#[track_caller]
fn assert_missing(outcome: kiomap::Result<()>, first: u64, number: u64) {
    match outcome {
        Err(error @ Error::NotPopulated { pgoff, missing, .. }) => {
            assert_eq!((pgoff, missing, error.errno()), (first, number, Errno::ENOMEM), "{error}");
        }
        other => panic!("{other:?}"),
    }
}

/// T16: what was populated is touched without a fault, has the right bytes, and nothing else came.
#[test]
fn populated_pages_are_touched_without_a_fault() {
    alone("populated_pages_are_touched_without_a_fault", || {
        let engine = engine();
        for list in [pages(3000), slow(3000)] {
            let (vmap, region) = attached(&engine, &list);
            let before = settled_stats(&engine);
            region.populate(bytes(100..2000)).unwrap();
            assert_eq!(mapped(&region), 1900);
            assert_marks(&region, 100..2000);
            touch::write_word(at(&region, 150), 7).unwrap();
            let after = settled_stats(&engine);
            assert_eq!(after.faults, before.faults);
            // Again, and over what is partly there.
            region.populate(0..region.len_bytes()).unwrap();
            assert_eq!(touch::read(at(&region, 150)), Ok(7));
            assert_eq!(mapped(&region), 3000);
            // What is there already is only mapped in another region of it.
            let other = vmap.attach(&AttachOptions::new().pgoff(1000)).unwrap();
            other.populate(1..1).unwrap();
            assert_eq!(mapped(&other), 0);
            other.populate(page_size() - 1..page_size() + 1).unwrap();
            // The kernel maps neighbours that are there along with them.
            assert!((2..2000).contains(&mapped(&other)));
            other.populate(0..other.len_bytes()).unwrap();
            assert_eq!(mapped(&other), 2000);
            assert_eq!(settled_stats(&engine).faults, before.faults);
        }
    });
}

/// T77, T5, T12: pages that can't be had are told and counted, and are SIGBUS; all others are there.
#[test]
fn what_can_not_be_had_is_an_error_and_the_rest_is_there() {
    alone("what_can_not_be_had_is_an_error_and_the_rest_is_there", || {
        let engine = engine();
        let failing = Arc::new(AtomicBool::new(true));
        let fails = Arc::clone(&failing);
        let mut list = pages(700);
        list.expand(&holes(50)).unwrap();
        list.expand(&pages(50)).unwrap();
        let with_sources = !support::taken_away().contains(kiomap::Features::THREAD_ID);
        if with_sources {
            let bad = source(100, move |first, len| {
                let hit = (first..first + len as u64).contains(&30) && fails.load(Ordering::SeqCst);
                if hit { Err(std::io::ErrorKind::InvalidInput.into()) } else { Ok(()) }
            });
            list.expand(&bad).unwrap();
        } else {
            list.expand(&pages(100)).unwrap();
        }
        let vmap = engine.vmap(&list).unwrap();
        let region = vmap.attach(&AttachOptions::new().len_bytes(1000 * page_size())).unwrap();
        // 50 of the hole, perhaps one of the source, 100 past the end.
        let bad = u64::from(with_sources);
        assert_missing(region.populate(0..region.len_bytes()), 700, 150 + bad);
        assert_eq!(mapped(&region), 850 - bad);
        assert_marks(&region, 0..700);
        [700, 749, 900, 999].into_iter().for_each(|page| assert_sigbus(&region, page));
        assert_missing(region.populate(bytes(720..760)), 720, 30);
        assert_missing(region.populate(bytes(950..951)), 950, 1);
        if with_sources {
            assert_sigbus(&region, 830);
            // What is SIGBUS since a touch comes when it can be had.
            failing.store(false, Ordering::SeqCst);
            if engine.features().contains(kiomap::Features::POISON) {
                region.populate(bytes(760..900)).unwrap();
                assert_eq!(read_page(&region, 830), Ok(mark(30)));
            }
        }
        for (start, end) in [(0, region.len_bytes() + 1), (2, 1), (usize::MAX, usize::MAX)] {
            assert_eq!(region.populate(start..end).unwrap_err().errno(), Errno::EINVAL);
        }
    });
}

/// T77: what is SIGBUS since a touch, because its source failed then, is there after a prefault.
#[test]
fn prefault_brings_what_was_refused_before() {
    alone("prefault_brings_what_was_refused_before", || {
        needs_sources!();
        let engine = engine();
        let failing = Arc::new(AtomicBool::new(true));
        let fails = Arc::clone(&failing);
        let list = source(10, move |_, _| {
            if fails.load(Ordering::SeqCst) { Err(std::io::ErrorKind::InvalidInput.into()) } else { Ok(()) }
        });
        let (_vmap, region) = attached(&engine, &list);
        assert_sigbus(&region, 4);
        assert!(matches!(region.prefault(bytes(4..6)), Err(Error::NoPage { pgoff: 4, .. })));
        failing.store(false, Ordering::SeqCst);
        // A mask is taken off by a touch, of which a system call is none.
        if engine.features().contains(kiomap::Features::POISON) {
            region.prefault(bytes(3..6)).unwrap();
            assert_marks(&region, 3..6);
        }
    });
}

/// The list may end within a huge page: that is there to its end, however it is brought, and the next one is not.
#[test]
fn the_last_huge_page_is_brought_as_a_whole() {
    with_pool("the_last_huge_page_is_brought_as_a_whole", || {
        let (engine, huge) = (engine(), per_huge());
        let attach = |list: &Kiobuf| {
            let vmap = engine.vmap_builder(list).page_size(PageSize::Huge2M).build().unwrap();
            vmap.attach(&AttachOptions::new().len_bytes(3 * HUGE)).unwrap()
        };
        let list = pages(huge + 5);
        for first in [0, huge, huge + 4, huge + 5, 2 * huge - 1] {
            attach(&list).populate(bytes(first..2 * huge)).unwrap();
            attach(&list).prefault(bytes(first..2 * huge)).unwrap();
            let region = attach(&list);
            let populating = region.populate_in_background(bytes(first..3 * huge), PopulateOptions::new()).unwrap();
            let done = populating.wait().unwrap();
            assert_eq!((done.pages_done, done.pages_failed), (3 * huge - first, huge));
            // It is there, and in a list that was taken back too.
            assert_missing(region.populate(bytes(first..3 * huge)), 2 * huge, huge);
            region.vmap().revoke(Revoke::Soft).unwrap();
            assert_missing(region.populate(bytes(first..3 * huge)), 2 * huge, huge);
            assert_eq!(read_page(&region, 2 * huge - 1), Ok(0));
            assert_sigbus(&region, 2 * huge);
        }
        // A hole at its end is a whole huge page too.
        let list = Kiobuf::concat(&[pages(huge), holes(3)]).unwrap();
        for first in [0, huge, huge + 2, huge + 3, 2 * huge - 1] {
            let missing = first.max(huge);
            assert_missing(attach(&list).populate(bytes(first..2 * huge)), missing, 2 * huge - missing);
        }
    });
}

/// T33, T14: what other code unmapped is not there, what a revoke left is, and after a shutdown nothing comes.
#[test]
fn unmapped_revoked_and_ended_regions_are_told() {
    alone("unmapped_revoked_and_ended_regions_are_told", || {
        let engine = engine();
        let vmap = engine.vmap(&pages(2000)).unwrap();
        let region = vmap.attach(&AttachOptions::new().at(FAR)).unwrap();
        let middle = at(&region, 600);
        // SAFETY: nothing refers to the pages.
        assert_eq!(unsafe { libc::munmap(middle.cast(), 100 * page_size()) }, 0);
        assert_missing(region.populate(bytes(0..1000)), 600, 100);
        assert_marks(&region, 0..600);
        assert_marks(&region, 700..1000);
        vmap.revoke(Revoke::Soft).unwrap();
        region.populate(bytes(700..1000)).unwrap();
        assert_missing(region.populate(bytes(900..1100)), 1000, 100);
        vmap.revoke(Revoke::Hard).unwrap();
        assert_missing(region.populate(bytes(0..500)), 0, 500);
        engine.shutdown(Shutdown::Poison).unwrap();
        assert_eq!(region.populate(bytes(0..1)).unwrap_err().errno(), Errno::ESHUTDOWN);
    });
}

/// T49: in a child the engine brings them, and counts what can't be had; without faults of the kernel it says so.
#[test]
fn a_child_populates_too() {
    alone("a_child_populates_too", || {
        let engine = engine_builder().build().unwrap();
        let mut list = pages(1500);
        list.expand(&holes(3)).unwrap();
        let (vmap, region) = attached(&engine, &list);
        let serves = engine.open_way().serves_kernel_faults();
        reap_ok(child(|| {
            if serves {
                region.populate(bytes(200..1500)).unwrap();
                // Neighbours of what was asked for may have come with it.
                assert_eq!(mapped_of(&region, 200..1500), 1300);
                assert_marks(&region, 0..1500);
                assert_missing(region.populate(bytes(1400..1503)), 1500, 3);
            } else {
                assert_eq!(region.populate(bytes(0..10)).unwrap_err().errno(), Errno::EPERM);
            }
            let refused = region.populate_in_background(bytes(0..10), PopulateOptions::new()).unwrap_err();
            assert_eq!(refused.errno(), Errno::EPERM);
        }));
        settled(&engine, &vmap, 1);
    });
}

/// T65, T107: populating among faults, unmaps, exchanged lists and revokes: each page is right or SIGBUS, and nobody hangs.
#[test]
fn populating_among_faults_unmaps_and_revokes_brings_no_wrong_byte() {
    alone("populating_among_faults_unmaps_and_revokes_brings_no_wrong_byte", || {
        const PAGES: u64 = 1200;
        let engine = engine_builder().build().unwrap();
        for seed in 0..30 {
            let (vmap, _region) = populate_amid_trouble(&engine, PAGES, 50, seed);
            settled(&engine, &vmap, 2);
        }
    });
}

/// In the background: step by step, told and counted; the thread comes with the work and goes with it.
#[test]
fn the_background_brings_all_and_ends() {
    alone("the_background_brings_all_and_ends", || {
        let engine = engine();
        let is_there = || threads().iter().any(|name| name == "kiomap-populate");
        let mut list = pages(1000);
        list.expand(&holes(24)).unwrap();
        list.expand(&pages(10)).unwrap();
        let (_vmap, region) = attached(&engine, &list);
        assert!(!is_there());
        let options = PopulateOptions::new().step_bytes(16 * page_size());
        let populating = region.populate_in_background(0..region.len_bytes(), options.clone()).unwrap();
        assert_eq!(populating.progress().pages_total, 1034);
        let done = populating.wait().unwrap();
        assert_eq!((done.pages_done, done.pages_failed, done.pages_total), (1034, 24, 1034));
        assert_eq!(mapped(&region), 1010);
        let before = settled_stats(&engine);
        assert_marks(&region, 0..1000);
        assert_eq!(settled_stats(&engine).faults, before.faults);
        eventually("the thread ends", || !is_there());
        // Another comes for more work, also without a handle.
        let (_other, more) = attached(&engine, &pages(300));
        more.populate_in_background(0..more.len_bytes(), PopulateOptions::new()).unwrap().detach();
        eventually("all came", || mapped(&more) == 300);
        for refused in [
            options.clone().step_bytes(0),
            options.clone().step_bytes(100),
            options.clone().step_bytes(513 * page_size()),
            options.clone().bytes_per_second(0),
        ] {
            assert_eq!(region.populate_in_background(0..1, refused).unwrap_err().errno(), Errno::EINVAL);
        }
    });
}

/// Steps are made in order, of the size asked for; a cancel ends it after the step that is being made, and so does dropping
/// the handle.
#[test]
fn a_cancelled_background_makes_no_further_step() {
    alone("a_cancelled_background_makes_no_further_step", || {
        needs_sources!();
        let engine = engine();
        for drops in [false, true] {
            let gate = GatedSource::new();
            let (_vmap, region) = attached(&engine, &gate.list(100));
            let options = PopulateOptions::new().step_bytes(10 * page_size());
            let populating = region.populate_in_background(bytes(0..100), options).unwrap();
            gate.wait_for_held(1);
            assert_eq!((populating.progress().pages_done, populating.is_finished()), (0, false));
            if drops {
                drop(populating);
                gate.open();
                eventually("the thread ends", || !threads().iter().any(|name| name == "kiomap-populate"));
            } else {
                populating.cancel();
                gate.open();
                assert_eq!(populating.wait().unwrap().pages_done, 10);
            }
            assert_eq!((gate.calls(), mapped(&region)), (1, 10));
        }
    });
}

/// A limit holds further steps back; a cancel, the end of the region and a shutdown are not held back by it.
#[test]
fn a_limited_background_waits_and_ends_at_once() {
    alone("a_limited_background_waits_and_ends_at_once", || {
        let engine = engine();
        // A step in a hundred days.
        let options = PopulateOptions::new().bytes_per_second(1).step_bytes(64 * page_size());
        let (_vmap, region) = attached(&engine, &pages(1000));
        let begin = |region: &Region| {
            let populating = region.populate_in_background(0..region.len_bytes(), options.clone()).unwrap();
            eventually("the first step", || populating.progress().pages_done == 64);
            populating
        };
        let populating = begin(&region);
        assert!(!populating.is_finished());
        // One that is held back holds nobody else back.
        let (_other, fast) = attached(&engine, &pages(600));
        let done = fast.populate_in_background(0..fast.len_bytes(), PopulateOptions::new()).unwrap().wait().unwrap();
        assert_eq!(done.pages_done, 600);
        populating.cancel();
        assert_eq!(populating.wait().unwrap().pages_done, 64);
        let populating = begin(&fast.vmap().attach(&AttachOptions::new()).unwrap());
        let ended = populating.wait().unwrap();
        assert_eq!((ended.pages_done, ended.pages_failed), (600, 536));
        let populating = begin(&region);
        engine.shutdown(Shutdown::Poison).unwrap();
        assert_eq!(populating.wait().unwrap_err().errno(), Errno::ESHUTDOWN);
        assert_eq!(
            region.populate_in_background(0..1, options.clone()).map(drop).unwrap_err().errno(),
            Errno::ESHUTDOWN
        );
        assert_marks(&region, 0..64);
        assert_sigbus(&region, 900);
    });
}

/// Faults come first, and the background gets on all the same.
#[test]
fn faults_come_first() {
    alone("faults_come_first", || {
        let engine = engine();
        let (_vmap, region) = attached(&engine, &pages(2000));
        let (_other, touched) = attached(&engine, &pages(20_000));
        let stop = AtomicBool::new(false);
        let touches = AtomicU64::new(0);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for page in (0..20_000).take_while(|_| !stop.load(Ordering::Relaxed)) {
                    assert_eq!(touch::read(at(&touched, page)), Ok(mark(page)));
                    touches.fetch_add(1, Ordering::Relaxed);
                }
            });
            eventually("touches begin", || touches.load(Ordering::Relaxed) > 0);
            let populating = region.populate_in_background(0..region.len_bytes(), PopulateOptions::new()).unwrap();
            assert_eq!(populating.wait().unwrap().pages_done, 2000);
            stop.store(true, Ordering::Relaxed);
        });
        assert_eq!(mapped(&region), 2000);
    });
}
