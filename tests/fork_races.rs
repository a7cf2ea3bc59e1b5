//! Forks while other threads unmap and map over parts of regions: the child has the rest, and the count is true.
//!
//! What happens between the list of a child's areas and the fork is made to happen there: *prepare* handlers of
//! `pthread_atfork` run in the reverse order, so that one registered before the engine's runs after it.

mod support;

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use kiomap::{AttachOptions, Engine, Error, Region, Vmap, page_size};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::WaitStatus;
use support::raw::{assert_gone, assert_shows, foreign, munmap};
use support::scene::{Rng, Told, child};
use support::truth::{assert_count, assert_truth};
use support::{alone, engine_builder, eventually, mark, pages, reap, reap_ok, touch};

/// Below all that the kernel maps of its own choice: what is unmapped here is taken by nobody else.
const SLOTS: usize = 0x7_0000_0000;
/// The pages of a slot.
const SLOT: usize = 8;
/// The byte of memory that is not the engine's.
const FOREIGN: u8 = 0xfe;

type Act = Box<dyn FnOnce() + Send>;

/// What is done by the next fork, between the engine's list of the child's areas and the fork itself.
static BEFORE: Mutex<Option<Act>> = Mutex::new(None);
/// What is done in the next child, before it maps anything.
static IN_CHILD: Mutex<Option<Act>> = Mutex::new(None);

fn act(what: &Mutex<Option<Act>>) {
    let act = what.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some(act) = act {
        act();
    }
}

extern "C" fn before() {
    act(&BEFORE);
}

extern "C" fn in_child() {
    act(&IN_CHILD);
}

fn before_the_fork(act: impl FnOnce() + Send + 'static) {
    *BEFORE.lock().unwrap() = Some(Box::new(act));
}

/// An engine whose fork handlers do not have the last word.
fn engine() -> Engine {
    // SAFETY: the handlers do not unwind.
    assert_eq!(unsafe { libc::pthread_atfork(Some(before), None, Some(in_child)) }, 0);
    engine_builder().fault_around_pages(1).build().unwrap()
}

fn addr(region: &Region, page: usize) -> usize {
    region.as_ptr() as usize + page * page_size()
}

#[track_caller]
fn assert_foreign(addr: usize, nr_pages: usize) {
    for n in 0..nr_pages {
        assert_eq!(touch::read((addr + n * page_size() + 11) as *const u8), Ok(FOREIGN), "{addr:#x} + {n}");
    }
}

/// Forks while pages of a region of 8, as many from each of these on, are mapped over: the child has the others, and dropping the region leaves the
/// memory there alone. The parent is left with `pieces`.
fn fork_while_mapped_over(engine: &Engine, over: &[(usize, usize)], pieces: usize) {
    let over = over.to_vec();
    let is_over = |page: &usize| over.iter().any(|&(first, nr_pages)| (first..first + nr_pages).contains(page));
    let derefs = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&derefs);
    let on_deref = move |_: &Vmap| {
        counted.fetch_add(1, Ordering::SeqCst);
    };
    let vmap = engine.vmap_builder(&pages(8)).on_deref(on_deref).build().unwrap();
    let mut region = Some(vmap.attach(&AttachOptions::new()).unwrap());
    let start = addr(region.as_ref().unwrap(), 0);
    let page = |n: usize| start + n * page_size();
    // One is resident, the others come in the child.
    assert_eq!(touch::read(page(5) as *const u8), Ok(mark(5)));
    let act = over.clone();
    before_the_fork(move || {
        act.iter().for_each(|&(first, nr_pages)| foreign(start + first * page_size(), nr_pages, FOREIGN))
    });
    let (looked, dropped, go) = (Told::new(), Told::new(), Told::new());
    let pid = child(|| {
        assert!(region.as_ref().unwrap().check().is_ok(), "{:?}", region.as_ref().unwrap().check());
        (0..8).filter(|n| !is_over(n)).for_each(|n| assert_shows(page(n), n as u64..n as u64 + 1));
        over.iter().for_each(|&(first, nr_pages)| assert_foreign(page(first), nr_pages));
        assert_eq!(vmap.refcount().unwrap(), 2 * pieces);
        looked.tell(1);
        go.wait();
        drop(region.take());
        (0..8).filter(|n| !is_over(n)).for_each(|n| assert_gone(page(n), 1));
        over.iter().for_each(|&(first, nr_pages)| assert_foreign(page(first), nr_pages));
        assert_eq!(vmap.refcount().unwrap(), pieces);
        // A process that is served.
        let again = vmap.attach(&AttachOptions::new().pgoff(2)).unwrap();
        assert_shows(addr(&again, 0), 2..8);
        drop(again);
        dropped.tell(2);
        go.wait();
    });
    looked.wait_for(1);
    assert_count(engine, &vmap, 2 * pieces);
    go.tell(0);
    dropped.wait_for(2);
    assert_count(engine, &vmap, pieces);
    go.tell(0);
    reap_ok(pid);
    assert_count(engine, &vmap, pieces);
    (0..8).filter(|n| !is_over(n)).for_each(|n| assert_shows(page(n), n as u64..n as u64 + 1));
    region.take();
    assert_count(engine, &vmap, 0);
    eventually("the callback", || derefs.load(Ordering::SeqCst) > 0);
    over.iter().for_each(|&(first, nr_pages)| munmap(page(first) as *mut u8, nr_pages));
}

/// T37, T50: memory that another thread maps over a part of a region during a fork is the child's as it is the parent's, and
/// the child has the rest of the region.
#[test]
fn a_fork_while_memory_is_mapped_over_a_part_leaves_the_rest() {
    alone("a_fork_while_memory_is_mapped_over_a_part_leaves_the_rest", || {
        let engine = engine();
        fork_while_mapped_over(&engine, &[(3, 1)], 2);
        fork_while_mapped_over(&engine, &[(0, 1)], 1);
        fork_while_mapped_over(&engine, &[(6, 2)], 1);
        fork_while_mapped_over(&engine, &[(0, 1), (2, 3), (7, 1)], 2);
        fork_while_mapped_over(&engine, &[(0, 8)], 0);
    });
}

/// T37, T50: one mapping over the end of a region and the start of the next is taken from both.
#[test]
fn a_fork_while_memory_is_mapped_over_two_regions_leaves_the_rest_of_both() {
    alone("a_fork_while_memory_is_mapped_over_two_regions_leaves_the_rest_of_both", || {
        let engine = engine();
        let vmap = engine.vmap(&pages(8)).unwrap();
        let attach = |n: usize| {
            let options = AttachOptions::new().at(SLOTS + n * 4 * page_size()).len_bytes(4 * page_size());
            vmap.attach(&options.pgoff(n as u64)).unwrap()
        };
        let (low, high) = (attach(0), attach(1));
        before_the_fork(|| foreign(SLOTS + 3 * page_size(), 2, FOREIGN));
        let (looked, go) = (Told::new(), Told::new());
        let pid = child(|| {
            low.check().unwrap();
            assert_shows(addr(&low, 0), 0..3);
            assert_foreign(addr(&low, 3), 2);
            assert_shows(addr(&high, 1), 2..5);
            looked.tell(1);
            go.wait();
        });
        looked.wait_for(1);
        assert_count(&engine, &vmap, 4);
        go.tell(0);
        reap_ok(pid);
        assert_count(&engine, &vmap, 2);
    });
}

/// T33, T50: a part that another thread unmaps during a fork is the child's, as it was listed, when nothing takes its place.
#[test]
fn a_fork_while_a_part_is_unmapped_leaves_the_child_all_of_it() {
    alone("a_fork_while_a_part_is_unmapped_leaves_the_child_all_of_it", || {
        let engine = engine();
        let vmap = engine.vmap(&pages(8)).unwrap();
        let mut region = Some(vmap.attach(&AttachOptions::new()).unwrap());
        let start = addr(region.as_ref().unwrap(), 0);
        before_the_fork(move || munmap((start + 3 * page_size()) as *mut u8, 1));
        let (looked, go) = (Told::new(), Told::new());
        let pid = child(|| {
            region.as_ref().unwrap().check().unwrap();
            assert_shows(start, 0..8);
            assert_eq!(vmap.refcount().unwrap(), 3);
            looked.tell(1);
            go.wait();
            region.take();
            assert_gone(start, 8);
            assert_eq!(vmap.refcount().unwrap(), 2);
        });
        looked.wait_for(1);
        assert_count(&engine, &vmap, 3);
        go.tell(0);
        reap_ok(pid);
        assert_count(&engine, &vmap, 2);
        assert_gone(start + 3 * page_size(), 1);
    });
}

/// T52: in a child that forks it is the same: the grandchild has the rest of the rest.
#[test]
fn a_grandchild_has_what_is_left_of_what_the_child_had() {
    alone("a_grandchild_has_what_is_left_of_what_the_child_had", || {
        let engine = engine();
        let vmap = engine.vmap(&pages(8)).unwrap();
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        let start = addr(&region, 0);
        before_the_fork(move || foreign(start + page_size(), 1, FOREIGN));
        let (looked, go) = (Told::new(), Told::new());
        let pid = child(|| {
            before_the_fork(move || foreign(start + 5 * page_size(), 2, FOREIGN));
            let pid = child(|| {
                region.check().unwrap();
                assert_foreign(start + page_size(), 1);
                assert_foreign(start + 5 * page_size(), 2);
                assert_shows(start, 0..1);
                assert_shows(start + 2 * page_size(), 2..5);
                assert_shows(start + 7 * page_size(), 7..8);
                looked.tell(1);
                go.wait();
            });
            reap_ok(pid);
            assert_shows(start + 2 * page_size(), 2..5);
            looked.tell(2);
            go.wait();
        });
        looked.wait_for(1);
        assert_count(&engine, &vmap, 2 + 3 + 3);
        go.tell(0);
        looked.wait_for(2);
        assert_count(&engine, &vmap, 2 + 3);
        go.tell(0);
        reap_ok(pid);
        assert_count(&engine, &vmap, 2);
    });
}

/// Forks a child that must have none of a region, and say why; the memory at its page 3 is not the region's.
fn fork_without(engine: &Engine, vmap: &Vmap, region: &Region, count: usize) {
    let (looked, go) = (Told::new(), Told::new());
    let pid = child(|| {
        let why = region.check().unwrap_err();
        assert!(matches!(why, Error::NotInherited { .. }), "{why}");
        assert_foreign(addr(region, 3), 1);
        assert_gone(addr(region, 0), 1);
        looked.tell(1);
        go.wait();
    });
    looked.wait_for(1);
    assert_count(engine, vmap, count);
    go.tell(0);
    reap_ok(pid);
    assert_count(engine, vmap, count);
}

/// T50: addresses that are given away in the child itself are not the parent's doing, which goes on to have all of the
/// region: the child has none of it, rather than one of which nobody knows that a part is foreign.
#[test]
fn a_child_in_which_others_took_addresses_has_no_region_and_says_so() {
    alone("a_child_in_which_others_took_addresses_has_no_region_and_says_so", || {
        let engine = engine();
        let vmap = engine.vmap(&pages(8)).unwrap();
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        let start = addr(&region, 0);
        for count in [1, 2] {
            *IN_CHILD.lock().unwrap() = Some(Box::new(move || foreign(start + 3 * page_size(), 1, FOREIGN)));
            if count == 2 {
                // The parent loses another part of the same region meanwhile.
                before_the_fork(move || foreign(start + 5 * page_size(), 1, FOREIGN));
            }
            fork_without(&engine, &vmap, &region, count);
            IN_CHILD.lock().unwrap().take();
        }
        assert_shows(start, 0..5);
    });
}

/// T50: more holes than a child has place to note are as none: it has no region, and says so.
#[test]
fn a_child_of_a_region_with_very_many_holes_has_none_and_says_so() {
    alone("a_child_of_a_region_with_very_many_holes_has_none_and_says_so", || {
        const HOLES: usize = 200;
        let engine = engine();
        let vmap = engine.vmap(&pages(2 * HOLES as u64)).unwrap();
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        let start = addr(&region, 0);
        before_the_fork(move || (0..HOLES).for_each(|n| foreign(start + (2 * n + 1) * page_size(), 1, FOREIGN)));
        let pid = child(|| {
            let why = region.check().unwrap_err();
            assert!(matches!(why, Error::NotInherited { .. }), "{why}");
            for n in 0..HOLES {
                assert_foreign(addr(&region, 2 * n + 1), 1);
                assert_gone(addr(&region, 2 * n), 1);
            }
        });
        reap_ok(pid);
        assert_count(&engine, &vmap, HOLES);
        // The next child has what is left.
        reap_ok(child(|| {
            region.check().unwrap();
            (0..HOLES).for_each(|n| assert_shows(addr(&region, 2 * n), 2 * n as u64..2 * n as u64 + 1));
        }));
        assert_count(&engine, &vmap, HOLES);
    });
}

/// T53: a child that is killed at any moment, while it tells what it can't have too, is counted out.
#[test]
fn a_child_killed_while_it_tells_what_is_taken_is_counted_out() {
    alone("a_child_killed_while_it_tells_what_is_taken_is_counted_out", || {
        let engine = engine();
        let mut rng = Rng::new(53);
        for _ in 0..100 {
            let vmap = engine.vmap(&pages(8)).unwrap();
            let region = vmap.attach(&AttachOptions::new()).unwrap();
            let start = addr(&region, 0);
            let over = move || [1, 3, 5].iter().for_each(|n| foreign(start + n * page_size(), 1, FOREIGN));
            before_the_fork(over);
            let pid = child(|| {
                for page in (0..8).cycle() {
                    assert_ne!(touch::read(addr(&region, page) as *const u8), Ok(0));
                }
            });
            rng.dawdle(200_000);
            kill(pid, Signal::SIGKILL).unwrap();
            let status = reap(pid);
            assert!(matches!(status, WaitStatus::Signaled(_, Signal::SIGKILL, _)), "{status:?}");
            eventually("the child is counted out", || {
                engine.settle().unwrap();
                vmap.refcount().unwrap() == 4
            });
            assert_count(&engine, &vmap, 4);
            drop(region);
            assert_count(&engine, &vmap, 0);
            [1, 3, 5].iter().for_each(|n| munmap((start + n * page_size()) as *mut u8, 1));
        }
    });
}

/// One thread's place: a region is attached there, cut, mapped over, dropped and attached again.
fn change(vmap: &Vmap, memory: impl AsFd, slot: usize, seed: u64, end: &AtomicBool) {
    let page = page_size();
    let base = SLOTS + slot * 2 * SLOT * page;
    let mut rng = Rng::new(seed);
    let access = nix::sys::mman::ProtFlags::PROT_READ;
    let flags = nix::sys::mman::MapFlags::MAP_SHARED;
    let map = |addr: Option<usize>, nr_pages: usize| {
        let (place, fixed) = match addr {
            Some(addr) => (std::num::NonZeroUsize::new(addr), nix::sys::mman::MapFlags::MAP_FIXED),
            None => (None, nix::sys::mman::MapFlags::empty()),
        };
        let len = std::num::NonZeroUsize::new(nr_pages * page).unwrap();
        // SAFETY: what is replaced is this thread's slot, to which nothing refers. Its bytes are there at once.
        unsafe { nix::sys::mman::mmap(place, len, access, flags | fixed, &memory, 0) }.unwrap()
    };
    while !end.load(Ordering::Relaxed) {
        let region = vmap.attach(&AttachOptions::new().at(base).len_bytes(SLOT * page)).unwrap();
        assert_eq!(touch::read(base as *const u8), Ok(mark(0)));
        for _ in 0..3 {
            let first = rng.below(SLOT as u64) as usize;
            let nr_pages = 1 + rng.below((SLOT - first) as u64) as usize;
            if rng.below(2) == 0 {
                map(Some(base + first * page), nr_pages);
            } else {
                munmap((base + first * page) as *mut u8, nr_pages);
            }
            rng.dawdle(2000);
        }
        drop(region);
        munmap(base as *mut u8, SLOT);
        // Where the kernel likes: what is unmapped there is taken by the next who asks for as much.
        let region = vmap.attach(&AttachOptions::new().len_bytes(3 * page)).unwrap();
        munmap(addr(&region, 1) as *mut u8, 1);
        let taken = map(None, 1);
        rng.dawdle(2000);
        drop(region);
        munmap(taken.as_ptr().cast(), 1);
    }
}

/// T37, T50, T66: forks while other threads map over, unmap and attach anew: each page of a child is the list's, the other
/// memory's, or not there, and never zeros; and in the end all is counted.
#[test]
fn forks_while_regions_are_mapped_over_unmapped_and_attached_anew_are_served_and_counted() {
    alone("forks_while_regions_are_mapped_over_unmapped_and_attached_anew_are_served_and_counted", || {
        const THREADS: usize = 3;
        const FORKS: u64 = 300;
        let engine = engine_builder().build().unwrap();
        let vmap = engine.vmap(&pages(SLOT as u64)).unwrap();
        let steady = vmap.attach(&AttachOptions::new()).unwrap();
        let memory = nix::sys::memfd::memfd_create(c"other", nix::sys::memfd::MFdFlags::MFD_CLOEXEC).unwrap();
        nix::unistd::write(&memory, &vec![FOREIGN; SLOT * page_size()]).unwrap();
        let end = AtomicBool::new(false);
        let look = || {
            steady.check().unwrap();
            assert_shows(addr(&steady, 0), 0..SLOT as u64);
            for page in (0..THREADS).flat_map(|slot| (0..SLOT).map(move |page| (slot, page))) {
                let at = SLOTS + (page.0 * 2 * SLOT + page.1) * page_size() + 11;
                match touch::read(at as *const u8) {
                    Ok(byte) => assert!(byte == mark(page.1 as u64) || byte == FOREIGN, "{page:?} is {byte:#x}"),
                    Err(refused) => assert!(refused.is_sigsegv(), "{page:?}: {refused:?}"),
                }
            }
        };
        std::thread::scope(|scope| {
            for slot in 0..THREADS {
                let (vmap, memory, end) = (&vmap, &memory, &end);
                scope.spawn(move || change(vmap, memory, slot, 7 + slot as u64, end));
            }
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                for n in 0..FORKS {
                    reap_ok(child(|| {
                        look();
                        if n % 8 == 0 {
                            reap_ok(child(look));
                        }
                    }));
                }
            }));
            end.store(true, Ordering::Relaxed);
            outcome.unwrap();
        });
        eventually("every child is counted out", || {
            engine.settle().unwrap();
            vmap.refcount().unwrap() == 1
        });
        assert_count(&engine, &vmap, 1);
        assert_truth(&engine);
        assert_eq!(engine.stats().panics, 0);
    });
}
