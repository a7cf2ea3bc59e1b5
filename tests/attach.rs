//! Attaching is all or nothing, detaching leaves nothing, and a shutdown ends both; also when everything happens at once.

mod support;

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, Mutex};

use kiomap::{AttachOptions, Engine, Error, Kiobuf, Region, Shutdown, Vmap, page_size};
use nix::errno::Errno;
use nix::sys::mman::{MlockAllFlags, mlockall, munlockall};
use support::raw::FAR;
use support::touch::Refused;
use support::truth::assert_count;
use support::{
    alone, assert_sigbus, engine_builder, eventually, fork_child, in_page, long, mark, open_descriptors, pages,
    read_page, reap_ok, settled_stats, source, threads, touch, vmap_mappings,
};

fn whole() -> AttachOptions {
    AttachOptions::new()
}

/// Anonymous memory that nobody uses, for its address.
struct Reserved(usize, usize);

impl Reserved {
    fn new(nr_pages: usize) -> Reserved {
        let len = nr_pages * page_size();
        // SAFETY: a new mapping where the kernel likes.
        let addr = unsafe {
            libc::mmap(std::ptr::null_mut(), len, libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0)
        };
        assert_ne!(addr, libc::MAP_FAILED);
        Reserved(addr as usize, len)
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        // SAFETY: the mapping made above, of which no Rust value is a part.
        unsafe { libc::munmap(self.0 as *mut libc::c_void, self.1) };
    }
}

/// Waits for the last thread of every engine: one that was joined is still listed for a moment.
fn no_thread_is_left() {
    eventually("the threads' ends", || threads().iter().all(|name| !name.starts_with("kiomap")));
}

/// What a refused attach must leave as it was.
fn state(engine: &Engine, vmap: &Vmap) -> (usize, Vec<String>, usize, u64) {
    engine.settle().unwrap();
    let areas = engine.spaces().unwrap()[0].areas;
    (vmap.refcount().unwrap(), vmap_mappings(), open_descriptors(), areas)
}

/// T23, T83, T84, T115, B13: whatever an attach is refused for, the count, mappings, descriptors and areas are as before, no callback
/// is owed, and the next attach is the first.
#[test]
fn a_refused_attach_leaves_everything_as_it_was() {
    alone("a_refused_attach_leaves_everything_as_it_was", || {
        let engine = engine_builder().build().unwrap();
        let derefs = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&derefs);
        let on_deref = move |_: &Vmap| {
            counted.fetch_add(1, Ordering::SeqCst);
        };
        let vmap = engine.vmap_builder(&pages(4)).on_deref(on_deref).build().unwrap();
        let (taken, page) = (Reserved::new(8), page_size());
        let top = usize::MAX - page + 1;
        let refusals = [
            (long(0), Errno::EINVAL),
            (whole().pgoff(4), Errno::EINVAL),
            (whole().pgoff(u64::MAX), Errno::EINVAL),
            (whole().len_bytes(usize::MAX), Errno::EINVAL),
            (whole().len_bytes(1 << 62), Errno::ENOMEM),
            (whole().sharing(kiomap::Sharing::Private), Errno::EINVAL),
            (whole().at(0), Errno::EINVAL),
            (whole().at(taken.0 + 1), Errno::EINVAL),
            (whole().at(taken.0 + page - 1), Errno::EINVAL),
            (whole().at(taken.0), Errno::EEXIST),
            (whole().at(taken.0 + 7 * page), Errno::EEXIST),
            (whole().at(taken.0 - 3 * page), Errno::EEXIST),
            (whole().at(top), Errno::ENOMEM),
            (long(5).exact(), Errno::ENXIO),
            (long(1).pgoff(4).exact(), Errno::ENXIO),
            (long(2).pgoff(3).exact(), Errno::ENXIO),
        ];
        let before = state(&engine, &vmap);
        for (options, errno) in refusals {
            let called = AtomicBool::new(false);
            for refused in [
                vmap.attach(&options).unwrap_err(),
                vmap.attach_with(&options, |_| called.store(true, Ordering::SeqCst)).unwrap_err(),
            ] {
                assert_eq!(refused.errno(), errno, "{options:?}: {refused}");
            }
            assert!(!called.load(Ordering::SeqCst));
            assert_eq!(state(&engine, &vmap), before, "{options:?}");
        }
        assert_eq!(derefs.load(Ordering::SeqCst), 0);
        assert!(vmap.attach(&whole()).unwrap().is_first());
        eventually("its callback", || derefs.load(Ordering::SeqCst) == 1);
    });
}

/// T115: an exact attach that fits is one; `ENXIO` otherwise, as `vm_map_pages` answers.
#[test]
fn an_exact_attach_fits_or_is_refused() {
    alone("an_exact_attach_fits_or_is_refused", || {
        let engine = engine_builder().build().unwrap();
        let vmap = engine.vmap(&pages(4)).unwrap();
        for (pgoff, len) in [(0, 4), (0, 1), (3, 1), (1, 3)] {
            let region = vmap.attach(&long(len).pgoff(pgoff).exact()).unwrap();
            (0..len).for_each(|page| assert_eq!(read_page(&region, page), Ok(mark(pgoff + page))));
        }
        for (pgoff, len) in [(0, 5), (4, 1), (1, 4), (100, 1)] {
            let refused = vmap.attach(&long(len).pgoff(pgoff).exact()).unwrap_err();
            assert!(matches!(refused, Error::OutsideList { nr_pages: 4, .. }), "{refused}");
        }
        assert!(vmap.attach(&whole().exact()).is_ok());
    });
}

/// T83, U23: two engines can't serve one range: the second is refused and the first serves on. What is free is attached
/// exactly there.
#[test]
fn two_engines_on_one_range_are_refused() {
    alone("two_engines_on_one_range_are_refused", || {
        let (first, second) = (engine_builder().build().unwrap(), engine_builder().build().unwrap());
        let vmap = second.vmap(&pages(4)).unwrap();
        let region = first.vmap(&pages(4)).unwrap().attach(&whole()).unwrap();
        let start = region.as_ptr() as usize;
        for shift in [0, page_size(), 3 * page_size()] {
            let refused = vmap.attach(&whole().at(start + shift)).unwrap_err();
            assert!(matches!(refused, Error::AddressTaken { addr, .. } if addr == start + shift), "{refused}");
        }
        (0..4).for_each(|page| assert_eq!(read_page(&region, page), Ok(mark(page))));
        assert_eq!(vmap.refcount().unwrap(), 0);
        drop(region);
        let region = vmap.attach(&whole().at(start)).unwrap();
        assert_eq!((region.as_ptr() as usize, read_page(&region, 3)), (start, Ok(mark(3))));
    });
}

/// T102: engines side by side serve one range of memory, each its part, for threads that go over all of it, and in a child; when
/// one part goes, the others stay.
#[test]
fn engines_side_by_side_serve_one_range() {
    alone("engines_side_by_side_serve_one_range", || {
        const PARTS: usize = 3;
        const PART_PAGES: usize = 40;
        let list = pages((PARTS * PART_PAGES) as u64);
        let engines = [(); PARTS].map(|()| engine_builder().build().unwrap());
        let vmaps = engines.each_ref().map(|engine| engine.vmap(&list).unwrap());
        let start = FAR;
        let regions: Vec<Region> = (0..PARTS)
            .map(|part| {
                let options = long(PART_PAGES as u64).pgoff((part * PART_PAGES) as u64);
                vmaps[part].attach(&options.at(start + part * PART_PAGES * page_size())).unwrap()
            })
            .collect();
        let read = |page: usize| touch::read((start + page * page_size()) as *const u8);
        let all = 0..PARTS * PART_PAGES;
        std::thread::scope(|scope| {
            for first in [0, 7] {
                let all = all.clone();
                scope.spawn(move || {
                    // In steps over the borders, back and forth.
                    for page in all.map(|page| (first + page * 53) % (PARTS * PART_PAGES)) {
                        assert_eq!(read(page), Ok(mark(page as u64)), "page {page}");
                    }
                });
            }
        });
        let child = fork_child(|| all.clone().for_each(|page| assert_eq!(read(page), Ok(mark(page as u64)))));
        reap_ok(child);
        let mut regions = regions;
        drop(regions.remove(1));
        for page in (0..PART_PAGES).chain(2 * PART_PAGES..3 * PART_PAGES) {
            assert_eq!(read(page), Ok(mark(page as u64)), "page {page}");
        }
        for (vmap, count) in vmaps.iter().zip([1, 0, 1]) {
            eventually("the child's end", || vmap.refcount().unwrap() == count);
        }
    });
}

/// T116, B12: every mapping of a vmap is a shared one, also the owner's own.
#[test]
fn every_mapping_is_shared() {
    alone("every_mapping_is_shared", || {
        let engine = engine_builder().build().unwrap();
        let vmap = engine.vmap(&pages(4)).unwrap();
        let _regions =
            [whole(), whole().read_only(), long(9), whole().inherit(false)].map(|o| vmap.attach(&o).unwrap());
        vmap.read_at(0, &mut [0]).unwrap();
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut of_vmap = false;
        let mut seen = 0;
        for line in smaps.lines() {
            if line.split(' ').next().is_some_and(|first| first.contains('-')) {
                of_vmap = line.contains("/memfd:kiomap ");
            } else if let Some(flags) = line.strip_prefix("VmFlags:").filter(|_| of_vmap) {
                assert!(flags.split(' ').any(|flag| flag == "sh"), "{flags}");
                assert!(flags.split(' ').any(|flag| flag == "dc"), "inherited by a fork: {flags}");
                seen += 1;
            }
        }
        assert_eq!(seen, 5);
    });
}

/// T78: where the process locks all future memory, a region still shows no zero page.
#[test]
fn locked_future_memory_shows_no_zero_page() {
    alone("locked_future_memory_shows_no_zero_page", || {
        let engine = engine_builder().build().unwrap();
        let vmap = engine.vmap(&pages(40)).unwrap();
        if let Err(errno) = mlockall(MlockAllFlags::MCL_FUTURE) {
            skip!("mlockall: {errno}");
        }
        let attached = vmap.attach(&long(42));
        munlockall().unwrap();
        match attached {
            Ok(region) => {
                (0..40).for_each(|page| assert_eq!(read_page(&region, page), Ok(mark(page))));
                assert_sigbus(&region, 40);
            }
            // A user without privileges may lock little.
            Err(refused) => assert!([Errno::EAGAIN, Errno::ENOMEM].contains(&refused.errno()), "{refused}"),
        }
    });
}

/// T28: after a shutdown every way in is refused at once.
#[test]
fn everything_is_refused_after_a_shutdown() {
    alone("everything_is_refused_after_a_shutdown", || {
        for how in [Shutdown::Poison, Shutdown::Fill] {
            let engine = engine_builder().build().unwrap();
            let vmap = engine.vmap_builder(&pages(2)).expandable().build().unwrap();
            let region = vmap.attach(&whole()).unwrap();
            engine.shutdown(how).unwrap();
            let refusals = [
                vmap.attach(&whole()).map(drop),
                vmap.attach_with(&whole(), |_| panic!("no attach")).map(drop),
                engine.vmap(&pages(1)).map(drop),
                vmap.expand(&pages(1)),
                vmap.revoke(kiomap::Revoke::Hard),
                vmap.read_at(0, &mut [0]),
                vmap.write_at(0, &[0]),
                engine.shutdown(how),
                engine.shutdown(Shutdown::Fill),
            ];
            for refused in refusals {
                let refused = refused.unwrap_err();
                assert!(matches!(refused, Error::Shutdown), "{refused}");
                assert_eq!(refused.errno(), Errno::ESHUTDOWN);
            }
            assert_count(&engine, &vmap, 1);
            drop(region);
            assert_eq!(vmap.refcount().unwrap(), 0);
        }
    });
}

/// T73: resident pages stay, to be read and written; the others are SIGBUS, or filled; holes and the end are SIGBUS. A
/// region that is dropped after its engine still fires the callback, and then nothing of the engine is left.
#[test]
fn a_region_outlives_its_engine() {
    alone("a_region_outlives_its_engine", || {
        // The first engine of a process makes what every later one shares.
        drop(engine_builder().build().unwrap());
        let fds = open_descriptors();
        for how in [Some(Shutdown::Poison), Some(Shutdown::Fill), None] {
            for list in [pages(100), source(100, |_, _| Ok(()))] {
                let engine = engine_builder().fault_around_pages(1).build().unwrap();
                let derefs = Arc::new(AtomicUsize::new(0));
                let counted = Arc::clone(&derefs);
                let list = Kiobuf::concat(&[list, support::holes(1)]).unwrap();
                let builder = engine.vmap_builder(&list).on_deref(move |_| {
                    counted.fetch_add(1, Ordering::SeqCst);
                });
                let region = builder.build().unwrap().attach(&long(103)).unwrap();
                drop(list);
                (0..100).step_by(2).for_each(|page| assert_eq!(read_page(&region, page), Ok(mark(page))));
                let filled = how == Some(Shutdown::Fill);
                match how {
                    Some(how) => engine.shutdown(how).unwrap(),
                    None => drop(engine),
                }
                for page in 0..103 {
                    if page < 100 && (filled || page % 2 == 0) {
                        assert_eq!(read_page(&region, page), Ok(mark(page)), "{how:?}");
                        touch::write(in_page(&region, page), 9).unwrap();
                        assert_eq!(read_page(&region, page), Ok(9));
                    } else {
                        assert_sigbus(&region, page);
                    }
                }
                assert_eq!(derefs.load(Ordering::SeqCst), 0);
                drop(region);
                eventually("the callback", || derefs.load(Ordering::SeqCst) == 1);
            }
        }
        no_thread_is_left();
        eventually("the descriptors' ends", || open_descriptors() == fds);
        assert_eq!(vmap_mappings(), Vec::<String>::new());
    });
}

/// T29: a region that is leaked stays counted and stays memory; the process ends cleanly.
#[test]
fn a_leaked_region_is_still_counted() {
    alone("a_leaked_region_is_still_counted", || {
        let engine = engine_builder().build().unwrap();
        let vmap = engine.vmap(&pages(3)).unwrap();
        let region = vmap.attach(&whole()).unwrap();
        let at = in_page(&region, 2);
        std::mem::forget(region);
        drop(vmap.attach(&whole()).unwrap());
        engine.settle().unwrap();
        assert_count(&engine, &vmap, 1);
        assert_eq!(touch::read(at), Ok(mark(2)));
        assert!(matches!(vmap.destroy(), Err(Error::Busy { refcount: 1 })));
        drop((vmap, engine));
        assert_eq!(touch::read(at), Ok(mark(2)));
    });
}

/// T111, B28: three hundred cycles of everything leave descriptors, mappings and threads as they were.
#[test]
fn whole_lives_leave_nothing() {
    alone("whole_lives_leave_nothing", || {
        let life = |cycle: u64| {
            let engine = engine_builder().build().unwrap();
            let list = if cycle.is_multiple_of(2) { pages(20) } else { source(20, |_, _| Ok(())) };
            let vmap = engine.vmap(&list).unwrap();
            let region = vmap.attach(&long(21)).unwrap();
            assert_eq!(read_page(&region, cycle % 20), Ok(mark(cycle % 20)));
            if cycle.is_multiple_of(3) {
                vmap.write_at(0, &[1]).unwrap();
                assert_sigbus(&region, 20);
            }
            match cycle % 4 {
                0 => drop((region, vmap, engine)),
                1 => {
                    drop(engine);
                    drop((vmap, region));
                }
                2 => {
                    engine.shutdown(Shutdown::Fill).unwrap();
                    drop((vmap, engine, region));
                }
                _ => {
                    drop(region);
                    engine.shutdown(Shutdown::Poison).unwrap();
                    drop((engine, vmap));
                }
            }
        };
        let mappings = || std::fs::read_to_string("/proc/self/maps").unwrap().lines().count();
        // Stacks of threads are kept for the next, a few or many.
        (0..40).for_each(life);
        no_thread_is_left();
        let (fds, maps) = (open_descriptors(), mappings());
        (0..300).for_each(life);
        no_thread_is_left();
        eventually("the descriptors' ends", || open_descriptors() == fds);
        assert_eq!(vmap_mappings(), Vec::<String>::new());
        // What is lost in each cycle would be 300; the stacks that are kept are fewer.
        eventually("the mappings' ends", || mappings() <= maps + 200);
    });
}

/// Many threads attach, touch and detach at once, each its own region: all addresses are soon somebody else's, and each
/// touch is right.
#[test]
fn attaches_and_detaches_of_many_threads_do_not_meet() {
    alone("attaches_and_detaches_of_many_threads_do_not_meet", || {
        let engine = engine_builder().build().unwrap();
        let vmaps = [engine.vmap(&pages(33)).unwrap(), engine.vmap(&source(33, |_, _| Ok(()))).unwrap()];
        std::thread::scope(|scope| {
            for thread in 0..8_u64 {
                let vmaps = &vmaps;
                scope.spawn(move || {
                    for n in 0..400 {
                        let pgoff = (n * 7 + thread) % 32;
                        let vmap = &vmaps[((n + thread) % 2) as usize];
                        let region = vmap.attach(&long(1 + (n + thread) % 3).pgoff(pgoff)).unwrap();
                        assert_eq!(read_page(&region, 0), Ok(mark(pgoff)));
                    }
                });
            }
        });
        assert_eq!(settled_stats(&engine).pages_poisoned, 0);
        assert!(vmaps.iter().all(|vmap| vmap.refcount().unwrap() == 0));
    });
}

/// Memory that was a region a moment ago is memory like any other: it may be a source.
#[test]
fn memory_that_was_a_region_may_be_a_source() {
    alone("memory_that_was_a_region_may_be_a_source", || {
        const BYTES: usize = 1 << 20;
        let engine = engine_builder().build().unwrap();
        let vmap = engine.vmap(&pages(BYTES as u64 / page_size() as u64)).unwrap();
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while !done.load(Ordering::SeqCst) {
                        drop(vmap.attach(&whole()).unwrap());
                    }
                });
            }
            for _ in 0..1500 {
                // Large enough to be a mapping of its own, where a region has just been.
                let mut list = Kiobuf::new();
                list.map_bytes(vec![1; BYTES]).unwrap();
                let outcome = engine.vmap(&list);
                done.store(outcome.is_err(), Ordering::SeqCst);
                outcome.unwrap();
            }
            done.store(true, Ordering::SeqCst);
        });
    });
}

/// T70, T72: a region is dropped while its pages are still being read, and the next one lies at the same address: a touch
/// of that gets its bytes, never a SIGBUS that was meant for the one before, never its bytes.
#[test]
fn a_late_answer_does_not_hit_the_next_region() {
    alone("a_late_answer_does_not_hit_the_next_region", || {
        let engine = engine_builder().workers(2).build().unwrap();
        let fast = engine.vmap(&pages(32)).unwrap();
        for round in 0..400_u32 {
            // Each read fails after a while that differs from round to round.
            let slow = engine
                .vmap(&source(32, move |_, _| {
                    (0..(round * 37) % 400).for_each(|_| std::thread::yield_now());
                    Err(std::io::Error::other("too late anyway"))
                }))
                .unwrap();
            let region = slow.attach(&whole()).unwrap();
            let start = region.as_ptr() as usize;
            let (ready, dropping) = (Barrier::new(4), AtomicBool::new(false));
            std::thread::scope(|scope| {
                for page in [3, 4, 20] {
                    let (ready, dropping) = (&ready, &dropping);
                    scope.spawn(move || {
                        ready.wait();
                        let at = (start + page * page_size() + 11) as *const u8;
                        match touch::read(at) {
                            // There are none, but what may lie there after the drop.
                            Ok(byte) => assert!(dropping.load(Ordering::SeqCst), "page {page}: {byte}"),
                            Err(Refused { signal, .. }) => assert!([libc::SIGBUS, libc::SIGSEGV].contains(&signal)),
                        }
                    });
                }
                ready.wait();
                let faults = engine.stats().faults;
                if round.is_multiple_of(2) {
                    (0..round % 64).for_each(|_| std::thread::yield_now());
                }
                assert!(engine.stats().faults >= faults);
                dropping.store(true, Ordering::SeqCst);
                drop(region);
            });
            let region = match fast.attach(&whole().at(start)) {
                // A thread's memory lies there by now.
                Err(Error::AddressTaken { .. }) => continue,
                region => region.unwrap(),
            };
            for page in [3, 4, 20] {
                assert_eq!(read_page(&region, page), Ok(mark(page)), "round {round}");
            }
        }
    });
}

/// T72, U9: a thread that waits for a page of a region which is dropped gets SIGSEGV, at once.
#[test]
fn a_drop_frees_the_threads_that_wait() {
    alone("a_drop_frees_the_threads_that_wait", || {
        let engine = engine_builder().fault_around_pages(16).build().unwrap();
        let (stuck, waiting) = (Arc::new(AtomicBool::new(true)), Arc::new(AtomicU64::new(0)));
        let (still, came) = (Arc::clone(&stuck), Arc::clone(&waiting));
        let list = source(64, move |_, _| {
            came.fetch_add(1, Ordering::SeqCst);
            while still.load(Ordering::SeqCst) {
                std::thread::yield_now();
            }
            Ok(())
        });
        // Where the kernel puts nothing else, as soon as it is free.
        let region = engine.vmap(&list).unwrap().attach(&whole().at(FAR)).unwrap();
        let start = region.as_ptr() as usize;
        std::thread::scope(|scope| {
            let touchers: Vec<_> = [1, 2, 40]
                .map(|page| scope.spawn(move || touch::read((start + page * page_size()) as *const u8)))
                .into();
            eventually("reads", || waiting.load(Ordering::SeqCst) == 2 && engine.stats().faults >= 3);
            drop(region);
            touchers.into_iter().for_each(|toucher| assert!(toucher.join().unwrap().unwrap_err().is_sigsegv()));
            stuck.store(false, Ordering::SeqCst);
        });
    });
}

/// T73, T28: a shutdown races attaches, touches and detaches: each attach succeeds or is refused by name, each touch is
/// bytes or SIGBUS, firsts and derefs stay paired, and nothing is left.
#[test]
fn a_shutdown_races_attaches_and_touches() {
    alone("a_shutdown_races_attaches_and_touches", || {
        drop(engine_builder().build().unwrap());
        let fds = open_descriptors();
        for round in 0..60_u64 {
            let how = if round.is_multiple_of(2) { Shutdown::Poison } else { Shutdown::Fill };
            let engine = engine_builder().build().unwrap();
            let list = if round % 4 < 2 { pages(64) } else { source(64, |_, _| Ok(())) };
            let (balance, touched) = (Arc::new(Mutex::new(0_i32)), AtomicU64::new(0));
            let ended = Arc::clone(&balance);
            let vmap = engine.vmap_builder(&list).on_deref(move |_| *ended.lock().unwrap() -= 1).build().unwrap();
            std::thread::scope(|scope| {
                for thread in 0..4_u64 {
                    let (vmap, balance, touched) = (&vmap, &balance, &touched);
                    scope.spawn(move || {
                        loop {
                            let region: Region = match vmap.attach(&whole()) {
                                Ok(region) => region,
                                Err(Error::Shutdown) => return,
                                Err(error) => panic!("{error}"),
                            };
                            *balance.lock().unwrap() += i32::from(region.is_first());
                            let page = (touched.fetch_add(1, Ordering::SeqCst) * 11 + thread) % 64;
                            match read_page(&region, page) {
                                Ok(byte) => assert_eq!(byte, mark(page)),
                                Err(refused) => assert!(refused.is_sigbus_at(in_page(&region, page) as usize)),
                            }
                        }
                    });
                }
                eventually("touches", || touched.load(Ordering::SeqCst) > round % 20);
                engine.shutdown(how).unwrap();
            });
            assert_eq!(vmap.refcount().unwrap(), 0);
            drop((vmap, engine));
            eventually("as many derefs as firsts", || *balance.lock().unwrap() == 0);
        }
        no_thread_is_left();
        eventually("the descriptors' ends", || open_descriptors() == fds);
        assert_eq!(vmap_mappings(), Vec::<String>::new());
    });
}

/// T22, B32: a forked process's attach that meets a transition of the owner's goes on as soon as that is over, and needs
/// no callback for it.
#[test]
fn a_childs_attach_goes_on_after_the_owners_transition() {
    alone("a_childs_attach_goes_on_after_the_owners_transition", || {
        let engine = engine_builder().build().unwrap();
        let vmap = engine.vmap(&pages(3)).unwrap();
        let (out, into) = nix::unistd::pipe().unwrap();
        let child = fork_child(|| {
            nix::unistd::write(&into, &[1]).unwrap();
            let region = vmap.attach(&whole()).unwrap();
            assert_eq!(read_page(&region, 2), Ok(mark(2)));
        });
        let region = vmap.attach_with(&whole(), |first| {
            assert!(first);
            nix::unistd::read(&out, &mut [0]).unwrap();
            let waits = || std::fs::read_to_string(format!("/proc/{child}/stat")).unwrap().contains(") S ");
            // Often enough that it is no short wait for a lock.
            eventually("that the child waits", || (0..1000).all(|_| waits()));
            assert_eq!(vmap.refcount().unwrap(), 1);
        });
        reap_ok(child);
        assert_eq!(read_page(&region.unwrap(), 1), Ok(mark(1)));
    });
}
