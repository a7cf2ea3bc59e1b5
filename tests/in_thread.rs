//! In-thread delivery: the thread that touches a missing page brings it itself. What it gets, what it costs, and what
//! becomes of it while address spaces change, processes fork and engines end.

mod support;

use std::collections::BTreeSet;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use kiomap::{
    Arena, AttachOptions, Delivery, Engine, EngineBuilder, Error, Features, Kiobuf, OpenWay, Placement, Revoke,
    Shutdown, page_size,
};
use nix::errno::Errno;
use nix::unistd::{read, write};
use support::raw::{self, ELSEWHERE, FAR, assert_gone, assert_shows, assert_sigbus_pages};
use support::scene::{Rng, at, child, settled};
use support::truth::assert_count;
use support::{
    alone, assert_sigbus, attached, engine_builder, eventually, holes, long, mark, pages, reap_ok, touch, within,
};

/// An engine whose own process brings its pages on the touching threads, behind the handler of refused touches.
fn builder() -> EngineBuilder {
    touch::prepare();
    engine_builder().delivery(Delivery::InThread)
}

fn zeros(nr_pages: u64) -> Kiobuf {
    let mut list = Kiobuf::new();
    list.map_zero(nr_pages).unwrap();
    list
}

fn user_mode_only() -> EngineBuilder {
    builder().open_ways(&[OpenWay::UserModeOnly])
}

/// T1, T5, T15: memory, an arena, pages with slack and zeros, in random order, with every size of fault-around: exactly the
/// right bytes, each page brought once, and no message read for any of them.
#[test]
fn every_page_shows_its_bytes() {
    alone("every_page_shows_its_bytes", || {
        let page = page_size();
        for (fault_around, way) in [(1, false), (16, true), (512, false), (7, true)] {
            let builder = if way { user_mode_only() } else { builder() };
            let engine = builder.fault_around_pages(fault_around).build().unwrap();
            assert!(engine.features().contains(Features::SIGBUS));
            let mut arena = Arena::new(40).unwrap();
            arena.iter_mut().enumerate().for_each(|(n, byte)| *byte = mark(1000 + (n / page) as u64));
            let mut list = pages(300);
            let mut part = Kiobuf::new();
            part.map_kernel(arena).unwrap();
            list.expand(&part).unwrap();
            list.expand(&zeros(20)).unwrap();
            let mut part = Kiobuf::new();
            // Its last page has slack.
            part.map_bytes(vec![0xaa; page + 100]).unwrap();
            list.expand(&part).unwrap();
            let (_vmap, region) = attached(&engine, &list);
            let expected = |n: u64, offset: usize| match n {
                0..300 => mark(n),
                300..340 => mark(1000 + n - 300),
                340..=359 => 0,
                361 if offset >= 100 => 0,
                _ => 0xaa,
            };
            let mut order: Vec<u64> = (0..region.len_bytes() as u64 / page as u64).collect();
            Rng::new(fault_around as u64).shuffle(&mut order);
            for n in order {
                for offset in [0, 99, 100, page - 1] {
                    assert_eq!(touch::read(at(&region, n).wrapping_add(offset)), Ok(expected(n, offset)), "page {n}");
                }
            }
            let stats = engine.stats();
            assert_eq!((stats.pages_copied, stats.pages_zeroed), (342, 20), "{stats:?}");
            assert_eq!((stats.reads, stats.strays, stats.source_errors), (0, 0, 0), "{stats:?}");
            assert!(fault_around > 1 || stats.faults == 362, "{stats:?}");
            assert_eq!(engine.spaces().unwrap()[0].faults, stats.faults);
        }
    });
}

/// The accessors that copy in user mode bring their pages; writes are seen by all, and counted as such.
#[test]
fn accessors_bring_their_pages() {
    alone("accessors_bring_their_pages", || {
        let engine = user_mode_only().fault_around_pages(1).build().unwrap();
        let (vmap, region) = attached(&engine, &pages(8));
        let mut bytes = vec![0; 2 * page_size()];
        region.read_at(page_size() / 2, &mut bytes).unwrap();
        assert_eq!((bytes[0], bytes[page_size()], bytes[2 * page_size() - 1]), (mark(0), mark(1), mark(2)));
        region.write_at(4 * page_size() + 5, b"new").unwrap();
        let mut three = [0; 5];
        vmap.read_at(4 * page_size() as u64 + 4, &mut three).unwrap();
        assert_eq!(three, [mark(4), b'n', b'e', b'w', mark(4)]);
        region.atomic_u64(5 * page_size()).unwrap().fetch_add(1, Ordering::Relaxed);
        assert_eq!(engine.stats().faults, 5);
        assert_eq!(engine.stats().write_faults, if cfg!(target_arch = "x86_64") { 2 } else { 0 });
    });
}

/// T2, T5, T9: holes and pages past the end are SIGBUS at the exact address, again and again, and their neighbours are not.
#[test]
fn holes_and_pages_past_the_end_are_sigbus() {
    alone("holes_and_pages_past_the_end_are_sigbus", || {
        let engine = builder().fault_around_pages(4).build().unwrap();
        let mut list = pages(3);
        list.expand(&holes(2)).unwrap();
        list.expand(&pages(1)).unwrap();
        let vmap = engine.vmap(&list).unwrap();
        let region = vmap.attach(&long(9)).unwrap();
        for _ in 0..3 {
            for n in [3, 4, 6, 7, 8] {
                assert_sigbus(&region, n);
            }
            assert_shows(region.as_ptr() as usize, 0..3);
            assert_eq!(touch::read(at(&region, 5)), Ok(mark(0)));
        }
        // Past the end the kernel itself refuses; the handler looks all the same.
        assert_eq!(engine.stats().pages_copied, 4);
    });
}

/// T13, T14: what the list gains is there at the next touch, and what it loses is SIGBUS at the next touch.
#[test]
fn a_changed_list_is_followed() {
    alone("a_changed_list_is_followed", || {
        let engine = builder().fault_around_pages(1).build().unwrap();
        let vmap = engine.vmap_builder(&pages(2)).expandable().build().unwrap();
        let region = vmap.attach(&long(4)).unwrap();
        assert_sigbus(&region, 2);
        vmap.expand(&pages(2)).unwrap();
        assert_eq!(touch::read(at(&region, 2)), Ok(mark(0)));
        assert_eq!(touch::read(at(&region, 0)), Ok(mark(0)));
        vmap.revoke(Revoke::Soft).unwrap();
        assert_sigbus(&region, 1);
        assert_sigbus(&region, 3);
        assert_eq!(touch::read(at(&region, 0)), Ok(mark(0)));
        vmap.revoke(Revoke::Hard).unwrap();
        assert_sigbus(&region, 0);
        assert_sigbus(&region, 2);
    });
}

/// T63, T96: many threads on the same pages and on different ones: each page is brought once, every touch gets its bytes.
#[test]
fn many_threads_bring_each_page_once() {
    alone("many_threads_bring_each_page_once", || {
        for fault_around in [1, 16] {
            let engine = builder().fault_around_pages(fault_around).build().unwrap();
            let (_vmap, region) = attached(&engine, &pages(4000));
            std::thread::scope(|scope| {
                for seed in 0..8 {
                    let region = &region;
                    scope.spawn(move || {
                        let mut order: Vec<u64> = (0..4000).collect();
                        Rng::new(seed % 4).shuffle(&mut order);
                        order.iter().for_each(|&n| assert_eq!(touch::read(at(region, n)), Ok(mark(n))));
                    });
                }
            });
            assert_eq!(engine.stats().pages_copied, 4000);
        }
    });
}

/// T33 to T41: code that does not know the engine cuts, moves, grows and doubles a region; what is left shows its pages.
#[test]
fn a_region_in_the_hands_of_others_shows_its_pages() {
    alone("a_region_in_the_hands_of_others_shows_its_pages", || {
        let engine = builder().fault_around_pages(4).build().unwrap();
        let vmap = engine.vmap(&pages(64)).unwrap();
        let region = vmap.attach(&long(16).at(FAR)).unwrap();
        raw::munmap(at(&region, 4), 2);
        assert_gone(raw::page(FAR, 4), 2);
        raw::foreign(raw::page(FAR, 8), 1, 0x5a);
        assert_eq!(touch::read(raw::page(FAR, 8) as *const u8), Ok(0x5a));
        assert_shows(FAR, 0..4);
        assert_shows(raw::page(FAR, 6), 6..8);
        assert_shows(raw::page(FAR, 9), 9..16);
        assert_count(&engine, &vmap, 3);
        drop(region);
        raw::munmap(raw::page(FAR, 8) as *mut u8, 1);
        assert_count(&engine, &vmap, 0);

        let region = vmap.attach(&long(8).pgoff(20).at(FAR)).unwrap();
        assert_eq!(raw::mremap(FAR, 8, 8, libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED, ELSEWHERE), ELSEWHERE);
        assert_gone(FAR, 8);
        assert_shows(ELSEWHERE, 20..28);
        // Grown in place: no event tells of it, so the thread asks.
        assert_eq!(raw::mremap(ELSEWHERE, 8, 12, 0, 0), ELSEWHERE);
        assert_shows(raw::page(ELSEWHERE, 8), 28..32);
        assert_eq!(engine.stats().adopted, 1);
        // Left behind.
        const DONTUNMAP: i32 = 4;
        raw::mremap(ELSEWHERE, 12, 12, libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | DONTUNMAP, FAR);
        assert_shows(FAR, 20..32);
        assert_shows(ELSEWHERE, 20..32);
        assert_count(&engine, &vmap, 2);
        drop(region);
        assert_count(&engine, &vmap, 0);
        assert_eq!(engine.stats().strays, 0);
    });
}

/// Memory that is registered and shows no area of any region, as nobody knows its bytes: SIGBUS, as with any delivery.
#[test]
fn what_nobody_knows_is_sigbus() {
    alone("what_nobody_knows_is_sigbus", || {
        let engine = builder().build().unwrap();
        let vmap = engine.vmap(&pages(16)).unwrap();
        let region = vmap.attach(&long(4).at(FAR)).unwrap();
        // Beyond the end of the object it can't be mapped in, and nobody serves it.
        assert_eq!(raw::mremap(FAR, 4, 32, 0, 0), FAR);
        assert_shows(FAR, 0..16);
        assert_sigbus_pages(raw::page(FAR, 16), 16);
        drop(region);
        assert_count(&engine, &vmap, 0);
    });
}

/// T41: what one engine does not know may be another's: each of several finds the part that its region has grown by, and
/// none counts the others' as strays.
#[test]
fn what_one_engine_does_not_know_is_asked_of_the_next() {
    alone("what_one_engine_does_not_know_is_asked_of_the_next", || {
        let engines = [FAR, ELSEWHERE, ELSEWHERE + (1 << 36)].map(|base| {
            let engine = builder().fault_around_pages(1).build().unwrap();
            let vmap = engine.vmap(&pages(16)).unwrap();
            let region = vmap.attach(&long(4).at(base)).unwrap();
            (engine, region, base)
        });
        for (engine, _, base) in &engines {
            assert_eq!(raw::mremap(*base, 4, 12, 0, 0), *base);
            assert_shows(raw::page(*base, 4), 4..12);
            assert_eq!(engine.stats().adopted, 1);
        }
        assert!(engines.iter().all(|(engine, ..)| engine.stats().strays == 0));
    });
}

/// T33: an engine that has not read yet that its hole was unmapped refuses no page of another engine that lies there by now.
#[test]
fn a_hole_that_was_unmapped_refuses_nobody_else() {
    alone("a_hole_that_was_unmapped_refuses_nobody_else", || {
        let before = tids();
        let late = builder().placement(Placement::Pinned(vec![0])).handlers(1).build().unwrap();
        for tid in tids().difference(&before) {
            // SAFETY: a thread of this process gets the processor after all others.
            assert_eq!(unsafe { libc::setpriority(libc::PRIO_PROCESS, *tid as libc::id_t, 19) }, 0);
        }
        let other = builder().fault_around_pages(1).build().unwrap();
        let of_holes = late.vmap(&holes(4)).unwrap();
        // Keeps the first one's thread from its processor.
        let (busy, turns, ended) = (AtomicBool::new(false), AtomicU64::new(0), AtomicBool::new(false));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                pin_to_first_processor();
                while !ended.load(Ordering::Relaxed) {
                    while busy.load(Ordering::Relaxed) {
                        turns.fetch_add(1, Ordering::Relaxed);
                    }
                    std::thread::yield_now();
                }
            });
            for _ in 0..10 {
                // Of which nothing is there yet.
                let of_pages = other.vmap(&pages(4)).unwrap();
                let region = of_holes.attach(&long(4).at(FAR)).unwrap();
                assert_sigbus(&region, 0);
                let turn = turns.load(Ordering::Relaxed);
                busy.store(true, Ordering::Relaxed);
                while turns.load(Ordering::Relaxed) == turn {
                    std::thread::yield_now();
                }
                scope.spawn(|| raw::munmap(FAR as *mut u8, 4));
                let mine = loop {
                    // Refused as long as the holes are there.
                    if let Ok(mine) = of_pages.attach(&long(4).at(FAR)) {
                        break mine;
                    }
                };
                assert_shows(FAR, 0..4);
                busy.store(false, Ordering::Relaxed);
                drop((region, mine));
            }
            ended.store(true, Ordering::Relaxed);
        });
    });
}

fn tids() -> BTreeSet<i32> {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    tasks.map(|task| task.unwrap().file_name().to_str().unwrap().parse().unwrap()).collect()
}

fn pin_to_first_processor() {
    let mut first = nix::sched::CpuSet::new();
    first.set(0).unwrap();
    nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &first).unwrap();
}

/// T70, T72: threads touch while others unmap, map over, move and attach anew at the same addresses: each touch finds the
/// bytes of what lies there, or that nothing does.
#[test]
fn changing_address_spaces_show_no_wrong_byte() {
    alone("changing_address_spaces_show_no_wrong_byte", || {
        const LEN: u64 = 32;
        let engine = builder().fault_around_pages(8).build().unwrap();
        // Page n of the first shows mark(n); of the second, other marks for the same pages.
        let one = engine.vmap(&pages(LEN)).unwrap();
        let mut shifted = pages(LEN + 100);
        shifted.unmap();
        shifted.map_bytes((0..LEN).flat_map(|n| vec![mark(n + 100); page_size()]).collect()).unwrap();
        let ended = AtomicBool::new(false);
        let touched = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for seed in 1..4 {
                let (ended, touched) = (&ended, &touched);
                scope.spawn(move || {
                    let mut rng = Rng::new(seed);
                    while !ended.load(Ordering::Relaxed) {
                        let n = rng.below(LEN);
                        let base = if rng.below(4) == 0 { ELSEWHERE } else { FAR };
                        match touch::read(raw::page(base, n) as *const u8) {
                            Ok(byte) => assert!(
                                byte == mark(n)
                                    || byte == mark(n + 100)
                                    // Foreign memory, before and after it is filled.
                                    || ((4..8).contains(&n) && (byte == 0x5a || byte == 0)),
                                "page {n} at {base:#x}: {byte}"
                            ),
                            // Hidden, or nothing there.
                            Err(refused) => assert!(refused.is_sigsegv(), "page {n} at {base:#x}: {refused:?}"),
                        }
                        touched.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
            let mut rng = Rng::new(77);
            for round in 0..400 {
                // Fresh, so that its pages are missing.
                let two = engine.vmap(&shifted).unwrap();
                let vmap = if round % 2 == 0 { &one } else { &two };
                let region = vmap.attach(&long(LEN).at(FAR)).unwrap();
                rng.dawdle(2000);
                match round % 5 {
                    0 => raw::munmap(at(&region, 8), 8),
                    1 => {
                        raw::foreign(raw::page(FAR, 4), 4, 0x5a);
                        rng.dawdle(500);
                        raw::munmap(raw::page(FAR, 4) as *mut u8, 4);
                    }
                    2 => {
                        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
                        assert_eq!(raw::mremap(FAR, LEN as usize, LEN as usize, flags, ELSEWHERE), ELSEWHERE);
                    }
                    3 => {
                        // SAFETY: drops mappings, not bytes.
                        unsafe { libc::madvise(FAR as *mut _, LEN as usize * page_size(), libc::MADV_DONTNEED) };
                    }
                    _ => {}
                }
                rng.dawdle(2000);
                drop(region);
            }
            ended.store(true, Ordering::Relaxed);
        });
        assert!(touched.load(Ordering::Relaxed) > 1000);
        assert_count(&engine, &one, 0);
        assert_eq!(engine.stats().panics, 0);
    });
}

/// T49, T51, T52: a forked child has the same pages, brought by the engine as ever; what it brings its parent sees, and the
/// parent goes on bringing its own. A touch that can't be had is SIGBUS there too.
#[test]
fn forked_children_are_served_as_ever() {
    alone("forked_children_are_served_as_ever", || {
        let engine = builder().fault_around_pages(1).build().unwrap();
        let mut list = pages(32);
        list.expand(&holes(1)).unwrap();
        let (vmap, region) = attached(&engine, &list);
        assert_shows(region.as_ptr() as usize, 0..4);
        let pid = child(|| {
            assert_shows(region.as_ptr() as usize, 0..8);
            assert_sigbus(&region, 32);
            touch::write(at(&region, 20), 0x77).unwrap();
            let grandchild = child(|| {
                assert_eq!(touch::read(at(&region, 20)), Ok(0x77));
                assert_shows(raw::page(region.as_ptr() as usize, 8), 8..12);
                assert_sigbus(&region, 32);
                match region.prefault(0..page_size()) {
                    Err(Error::NotOwner { .. }) if !engine.open_way().serves_kernel_faults() => {}
                    outcome => outcome.unwrap(),
                }
            });
            reap_ok(grandchild);
            // An engine of its own, delivered in its own threads.
            let own = builder().build().unwrap();
            let (_own_vmap, own_region) = attached(&own, &pages(5));
            assert_shows(own_region.as_ptr() as usize, 0..5);
            assert!(own.stats().faults > 0);
        });
        reap_ok(pid);
        assert_eq!(touch::read(at(&region, 20)), Ok(0x77));
        assert_shows(raw::page(region.as_ptr() as usize, 21), 21..32);
        settled(&engine, &vmap, 1);
    });
}

/// T53: forks while threads bring pages: nothing is lost, nobody waits for ever, in the parent or in a child.
#[test]
fn forks_among_faults_lose_nothing() {
    alone("forks_among_faults_lose_nothing", || {
        let engine = builder().fault_around_pages(2).build().unwrap();
        let ended = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let (engine, ended) = (&engine, &ended);
            for seed in 0..3 {
                scope.spawn(move || {
                    let mut rng = Rng::new(seed);
                    while !ended.load(Ordering::Relaxed) {
                        let (_vmap, region) = attached(engine, &pages(64));
                        for _ in 0..64 {
                            let n = rng.below(64);
                            assert_eq!(touch::read(at(&region, n)), Ok(mark(n)));
                        }
                    }
                });
            }
            let (_vmap, region) = attached(engine, &pages(64));
            for round in 0..40 {
                let n = round % 64;
                let pid = child(|| assert_eq!(touch::read(at(&region, n)), Ok(mark(n))));
                reap_ok(pid);
            }
            ended.store(true, Ordering::Relaxed);
        });
    });
}

/// T73: after a shutdown what was brought stays, and what was not is SIGBUS for good: never zeros, not after the engine is
/// dropped either, nor after advice that drops mappings.
#[test]
fn after_a_shutdown_missing_pages_are_sigbus() {
    alone("after_a_shutdown_missing_pages_are_sigbus", || {
        for drop_it in [false, true] {
            let engine = builder().fault_around_pages(1).build().unwrap();
            let (vmap, region) = attached(&engine, &pages(8));
            assert_shows(region.as_ptr() as usize, 0..3);
            if drop_it {
                drop(engine);
            } else {
                engine.shutdown(Shutdown::Poison).unwrap();
                std::mem::forget(engine);
            }
            for _ in 0..2 {
                for n in 3..8 {
                    assert_sigbus(&region, n);
                }
                assert_shows(region.as_ptr() as usize, 0..3);
                // SAFETY: drops mappings, not bytes.
                unsafe { libc::madvise(region.as_ptr().cast(), region.len_bytes(), libc::MADV_DONTNEED) };
            }
            assert!(matches!(region.prefault(0..1), Err(Error::Shutdown)));
            drop((vmap, region));
        }
    });
}

/// T73: a shutdown that fills brings every page first, also while threads bring them.
#[test]
fn a_shutdown_that_fills_brings_all() {
    alone("a_shutdown_that_fills_brings_all", || {
        let engine = builder().fault_around_pages(1).build().unwrap();
        let (_vmap, region) = attached(&engine, &pages(3000));
        std::thread::scope(|scope| {
            let region = &region;
            scope.spawn(move || (0..3000).rev().for_each(|n| assert_eq!(touch::read(at(region, n)), Ok(mark(n)))));
            engine.shutdown(Shutdown::Fill).unwrap();
        });
        assert_shows(region.as_ptr() as usize, 0..3000);
    });
}

/// Engines come and go while threads touch others' regions: each touch finds its own engine.
#[test]
fn engines_that_come_and_go_do_not_meet() {
    alone("engines_that_come_and_go_do_not_meet", || {
        let steady = builder().fault_around_pages(1).build().unwrap();
        let ended = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let (steady, ended) = (&steady, &ended);
            scope.spawn(move || {
                while !ended.load(Ordering::Relaxed) {
                    let (_vmap, region) = attached(steady, &pages(16));
                    assert_shows(region.as_ptr() as usize, 0..16);
                }
            });
            for _ in 0..60 {
                let passing = builder().fault_around_pages(1).build().unwrap();
                let (_vmap, region) = attached(&passing, &pages(4));
                assert_shows(region.as_ptr() as usize, 0..4);
                // A fault that met what is left of the other's region at the address is counted there.
                assert_eq!(passing.stats().pages_copied, 4);
            }
            ended.store(true, Ordering::Relaxed);
        });
        // As many at once as there are places.
        let mut engines: Vec<Engine> = Vec::new();
        let refused = loop {
            match builder().workers(1).build() {
                Ok(engine) => engines.push(engine),
                Err(error) => break error,
            }
        };
        assert_eq!(engines.len(), 63);
        assert!(matches!(refused, Error::Invalid { value: 65, .. }), "{refused}");
        let (vmap, region) = attached(&engines[62], &pages(2));
        assert_shows(region.as_ptr() as usize, 0..2);
        // Its place is free when its last region is gone too.
        drop((region, vmap, engines.pop()));
        builder().build().unwrap();
    });
}

/// T76: a system call that meets a missing page answers EFAULT, and one that meets what was brought goes through.
#[test]
fn system_calls_need_their_pages_brought_first() {
    alone("system_calls_need_their_pages_brought_first", || {
        for way in [false, true] {
            let builder = if way { user_mode_only() } else { builder() };
            let engine = builder.fault_around_pages(1).build().unwrap();
            let (_vmap, region) = attached(&engine, &pages(8));
            let (told, tell) = nix::unistd::pipe().unwrap();
            // SAFETY: the bytes are handed to the kernel only.
            let page = |n: u64| unsafe { std::slice::from_raw_parts_mut(at(&region, n), page_size()) };
            assert_eq!(write(&tell, page(3)), Err(Errno::EFAULT));
            write(&tell, b"four").unwrap();
            assert_eq!(read(told.as_fd(), &mut page(4)[..4]), Err(Errno::EFAULT));
            region.prefault(3 * page_size() + 7..4 * page_size() + 1).unwrap();
            assert_eq!(read(told.as_fd(), &mut page(4)[..4]), Ok(4));
            assert_eq!(write(&tell, page(3)), Ok(page_size()));
            assert_eq!(touch::read(at(&region, 4)), Ok(b'f'));
            assert_eq!(touch::read(at(&region, 4).wrapping_add(4)), Ok(mark(4)));
            assert_eq!(write(&tell, page(5)), Err(Errno::EFAULT));
            assert_eq!(engine.stats().faults, 0);
        }
    });
}

/// With both deliveries: all of a range is brought, what can't be had is told by its page, and a bad range is refused.
#[test]
fn prefault_tells_what_can_not_be_had() {
    alone("prefault_tells_what_can_not_be_had", || {
        for builder in [builder(), engine_builder()] {
            let engine = builder.build().unwrap();
            let mut list = pages(3);
            list.expand(&holes(1)).unwrap();
            list.expand(&pages(1)).unwrap();
            let vmap = engine.vmap(&list).unwrap();
            let region = vmap.attach(&long(5).pgoff(1)).unwrap();
            let bytes = |pages: std::ops::Range<usize>| pages.start * page_size()..pages.end * page_size();
            region.prefault(bytes(0..2)).unwrap();
            region.prefault(5..5).unwrap();
            region.prefault(bytes(3..4)).unwrap();
            let no_page = |range, page| match region.prefault(range) {
                Err(error @ Error::NoPage { pgoff, .. }) => {
                    assert_eq!((pgoff, error.errno()), (page, Errno::EFAULT));
                }
                other => panic!("{other:?}"),
            };
            no_page(bytes(0..3), 3);
            no_page(bytes(2..3), 3);
            no_page(bytes(3..5), 5);
            no_page(bytes(4..5), 5);
            #[expect(clippy::reversed_empty_ranges, reason = "refused")]
            for bad in [0..5 * page_size() + 1, usize::MAX..usize::MAX, 7..3] {
                let refused = region.prefault(bad).unwrap_err();
                assert_eq!(refused.errno(), Errno::EINVAL, "{refused}");
            }
            assert_eq!(engine.stats().faults, 0);
        }
    });
}

/// Lists that would have to be waited for are refused, with the page and what to do instead; also as a tail.
#[test]
fn lists_that_must_be_waited_for_are_refused() {
    alone("lists_that_must_be_waited_for_are_refused", || {
        use std::io::Write;
        let engine = builder().build().unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&vec![7; 3 * page_size()]).unwrap();
        let mut of_file = Kiobuf::new();
        of_file.map_file(&file, 0..3 * page_size() as u64).unwrap();
        let vmap = engine.vmap_builder(&pages(2)).expandable().build().unwrap();
        for slow in [of_file, support::source(2, |_, _| Ok(()))] {
            let mut list = pages(4);
            list.expand(&slow).unwrap();
            let refused = engine.vmap(&list).unwrap_err();
            assert!(matches!(refused, Error::Invalid { value: 4, .. }), "{refused}");
            assert!(refused.to_string().contains("Delivery::Handler"), "{refused}");
            vmap.expand(&slow).unwrap_err();
        }
        assert_eq!(vmap.nr_pages(), 2);
    });
}

/// A kernel without the feature: a typed refusal, and nothing is left behind.
#[test]
fn a_kernel_without_the_feature_is_refused() {
    alone("a_kernel_without_the_feature_is_refused", || {
        let refused = engine_builder()
            .without(support::taken_away() | Features::SIGBUS)
            .delivery(Delivery::InThread)
            .build()
            .unwrap_err();
        assert!(matches!(refused, Error::Unsupported { missing: Features::SIGBUS, .. }), "{refused}");
        assert!(!kiomap::in_thread::is_installed() && !kiomap::in_thread::reinstall());
    });
}

/// Without POISON, which nobody's own touches need, all is as with it.
#[test]
fn without_poison_all_is_as_with_it() {
    alone("without_poison_all_is_as_with_it", || {
        let engine = builder().without(support::taken_away() | Features::POISON).build().unwrap();
        let mut list = pages(4);
        list.expand(&holes(2)).unwrap();
        let (vmap, region) = attached(&engine, &list);
        assert_sigbus(&region, 4);
        let pid = child(|| {
            assert_shows(region.as_ptr() as usize, 0..4);
            assert_sigbus(&region, 5);
        });
        reap_ok(pid);
        assert_shows(region.as_ptr() as usize, 0..4);
        settled(&engine, &vmap, 1);
        engine.shutdown(Shutdown::Poison).unwrap();
        assert_sigbus(&region, 4);
    });
}

/// T63, T68: a thread that changes the address space without a pause keeps nobody from bringing pages.
#[test]
fn constant_change_keeps_nobody_from_bringing_pages() {
    alone("constant_change_keeps_nobody_from_bringing_pages", || {
        let engine = Arc::new(builder().fault_around_pages(1).build().unwrap());
        let (_vmap, region) = attached(&engine, &pages(2000));
        let (_busy_vmap, busy) = attached(&engine, &pages(4));
        let ended = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while !ended.load(Ordering::Relaxed) {
                        // SAFETY: drops mappings, not bytes.
                        unsafe { libc::madvise(busy.as_ptr().cast(), busy.len_bytes(), libc::MADV_DONTNEED) };
                    }
                });
            }
            (0..2000).for_each(|n| assert_eq!(touch::read(at(&region, n)), Ok(mark(n))));
            ended.store(true, Ordering::Relaxed);
        });
    });
}

/// T3, T8: an attach, its end and its faults on a thread with little stack, and many of them at once, end in time.
#[test]
fn regions_come_and_go_on_many_threads() {
    alone("regions_come_and_go_on_many_threads", || {
        let engine = Arc::new(builder().build().unwrap());
        let vmap = engine.vmap(&pages(64)).unwrap();
        within(support::DEADLINE, move || {
            std::thread::scope(|scope| {
                for seed in 0..6 {
                    let vmap = &vmap;
                    let body = move || {
                        let mut rng = Rng::new(seed);
                        for _ in 0..150 {
                            let region = vmap.attach(&AttachOptions::new()).unwrap();
                            let n = rng.below(64);
                            assert_eq!(touch::read(at(&region, n)), Ok(mark(n)));
                        }
                    };
                    std::thread::Builder::new().stack_size(64 << 10).spawn_scoped(scope, body).unwrap();
                }
            });
            eventually("all are gone", || vmap.refcount().unwrap() == 0);
        });
    });
}
