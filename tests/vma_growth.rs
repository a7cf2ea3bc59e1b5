//! What `mremap` adds without an event is found in the kernel's own table: by which process, under which load, and what
//! becomes of it when nobody can look.

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use kiomap::{AttachOptions, Features, Kiobuf, Region, Shutdown, Vmap, page_size};
use nix::unistd::geteuid;
use support::raw::{self, ELSEWHERE, FAR, assert_gone, assert_shows, assert_sigbus_pages, in_both, page};
use support::scene::{Rng, Told, child, settled, sourced_pages};
use support::truth::{assert_count, assert_nobody_waits};
use support::{
    alone, engine_builder, eventually, long, mark, pages, read_page, reap_ok, settled_stats, threads, touch,
};

/// A region of the first `attached` pages of the vmap, at [`FAR`], that was grown in place to `grown` pages.
fn grown(vmap: &Vmap, attached: u64, grown: u64) -> Region {
    let region = vmap.attach(&long(attached).at(FAR)).unwrap();
    assert_eq!(raw::mremap(FAR, attached as usize, grown as usize, 0, 0), FAR);
    region
}

/// T41: of what was grown in place and never touched, a move, an unmap and a shrink each leave the right pages.
#[test]
fn a_grown_part_that_is_moved_and_cut_before_it_is_known_stays_right() {
    in_both("a_grown_part_that_is_moved_and_cut_before_it_is_known_stays_right", 16, |scene| {
        let region = grown(scene.vmap, 2, 14);
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        assert_eq!(raw::mremap(FAR, 14, 14, flags, ELSEWHERE), ELSEWHERE);
        raw::munmap(page(ELSEWHERE, 5) as *mut u8, 2);
        assert_eq!(raw::mremap(page(ELSEWHERE, 7), 7, 4, 0, 0), page(ELSEWHERE, 7));
        assert_shows(page(ELSEWHERE, 9), 9..11);
        assert_shows(page(ELSEWHERE, 7), 7..9);
        assert_shows(ELSEWHERE, 0..5);
        assert_gone(page(ELSEWHERE, 5), 2);
        assert_gone(page(ELSEWHERE, 11), 3);
        assert_gone(FAR, 14);
        scene.count(2);
        drop(region);
        scene.count(0);
        assert_gone(ELSEWHERE, 14);
    });
}

/// T41, T63: more threads than are looked up at once, each at another page of a grown part and several at each: every touch is
/// right, and it is looked up, not refused.
#[test]
fn many_threads_in_a_grown_part_are_all_answered() {
    const THREADS: u64 = 150;
    alone("many_threads_in_a_grown_part_are_all_answered", || {
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        for list in [pages(THREADS + 1), sourced_pages(THREADS + 1)] {
            let vmap = engine.vmap(&list).unwrap();
            let region = grown(&vmap, 1, THREADS + 1);
            let start = std::sync::Barrier::new(THREADS as usize * 2);
            std::thread::scope(|scope| {
                for n in 0..THREADS * 2 {
                    let (start, region) = (&start, &region);
                    scope.spawn(move || {
                        let n = n / 2 + 1;
                        start.wait();
                        assert_eq!(read_page(region, n), Ok(mark(n)));
                    });
                }
            });
            assert_count(&engine, &vmap, 1);
            assert_nobody_waits(&engine);
            drop(region);
            assert_count(&engine, &vmap, 0);
        }
        let stats = settled_stats(&engine);
        assert_eq!((stats.adopted, stats.strays), (2, 0));
    });
}

/// T41, T68: parts are grown, shrunk and touched while other threads change the address space without a pause: no touch is
/// refused, and none sees another page.
#[test]
fn growing_among_unmaps_and_moves_of_others_is_right() {
    const PAGES: u64 = 64;
    alone("growing_among_unmaps_and_moves_of_others_is_right", || {
        let engine = engine_builder().fault_around_pages(2).build().unwrap();
        let vmap = engine.vmap(&pages(PAGES)).unwrap();
        let growing = AtomicUsize::new(2);
        std::thread::scope(|scope| {
            for thread in 0..2 {
                let (vmap, growing) = (&vmap, &growing);
                scope.spawn(move || {
                    let mut rng = Rng::new(thread + 1);
                    let base = FAR + thread as usize * (1 << 36);
                    for _ in 0..150 {
                        let pgoff = rng.below(PAGES - 16);
                        let region = vmap.attach(&long(4).pgoff(pgoff).at(base)).unwrap();
                        let mut len = 4;
                        for _ in 0..4 {
                            let to = 4 + rng.below(12);
                            assert_eq!(raw::mremap(base, len as usize, to as usize, 0, 0), base);
                            len = to;
                            for _ in 0..3 {
                                let n = rng.below(len);
                                assert_eq!(touch::read(page(base, n) as *const u8), Ok(mark(pgoff + n)));
                            }
                        }
                        if len < 16 {
                            assert_gone(page(base, len), 1);
                        }
                        drop(region);
                        assert_gone(base, 16);
                        // Missing again for the next round: punched through a region of its own.
                        let whole = vmap.attach(&AttachOptions::new()).unwrap();
                        // SAFETY: the range is the region's, to whose bytes nothing refers.
                        let punched =
                            unsafe { libc::madvise(whole.as_ptr().cast(), whole.len_bytes(), libc::MADV_REMOVE) };
                        assert_eq!(punched, 0);
                    }
                    growing.fetch_sub(1, Ordering::Release);
                });
            }
            let (vmap, growing) = (&vmap, &growing);
            scope.spawn(move || {
                let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
                while growing.load(Ordering::Acquire) > 0 {
                    let region = vmap.attach(&long(8)).unwrap();
                    let here = region.as_ptr() as usize;
                    assert_eq!(raw::mremap(here, 8, 8, flags, ELSEWHERE), ELSEWHERE);
                    raw::munmap(page(ELSEWHERE, 3) as *mut u8, 2);
                    assert_shows(page(ELSEWHERE, 6), 6..7);
                }
            });
        });
        assert_count(&engine, &vmap, 0);
        assert_nobody_waits(&engine);
        assert_eq!(engine.stats().strays, 0);
    });
}

/// T41, T49: a forked child has what of a grown part was known at the fork; of the rest it has nothing, rather than zeros.
#[test]
fn a_child_has_what_was_known_of_a_grown_part() {
    alone("a_child_has_what_was_known_of_a_grown_part", || {
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        let vmap = engine.vmap(&pages(16)).unwrap();
        let region = grown(&vmap, 2, 8);
        reap_ok(child(|| {
            assert_shows(FAR, 0..2);
            assert_gone(page(FAR, 2), 6);
        }));
        assert_shows(page(FAR, 5), 5..6);
        reap_ok(child(|| {
            assert_shows(FAR, 0..8);
            // It grows on where the parent did, and its child has that.
            assert_eq!(raw::mremap(FAR, 8, 12, 0, 0), FAR);
            assert_shows(page(FAR, 11), 11..12);
            reap_ok(child(|| assert_shows(FAR, 0..12)));
        }));
        assert_gone(page(FAR, 8), 4);
        settled(&engine, &vmap, 1);
        assert_count(&engine, &vmap, 1);
        drop(region);
        assert_count(&engine, &vmap, 0);
    });
}

/// T41: a process that nobody may look into, because it is not dumpable and the engine has no privilege, gets SIGBUS where
/// it would get pages otherwise; it does not wait for ever.
#[test]
fn a_process_that_is_not_to_be_looked_at_gets_sigbus_in_a_grown_part() {
    alone("a_process_that_is_not_to_be_looked_at_gets_sigbus_in_a_grown_part", || {
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        let vmap = engine.vmap(&pages(8)).unwrap();
        reap_ok(child(|| {
            nix::sys::prctl::set_dumpable(false).unwrap();
            let _region = grown(&vmap, 2, 8);
            if geteuid().is_root() {
                assert_shows(page(FAR, 2), 2..8);
            } else {
                assert_sigbus_pages(page(FAR, 2), 6);
            }
            assert_shows(FAR, 0..2);
        }));
        settled(&engine, &vmap, 0);
    });
}

/// T41: a child that calls itself by another number than the engine does is looked up as itself.
#[test]
fn a_child_in_a_pid_namespace_of_its_own_is_found() {
    alone("a_child_in_a_pid_namespace_of_its_own_is_found", || {
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        let vmap = engine.vmap(&pages(8)).unwrap();
        if let Err(errno) = nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWPID) {
            skip!("a PID namespace can't be made: {errno}");
        }
        reap_ok(child(|| {
            assert_eq!(nix::unistd::getpid().as_raw(), 1);
            let _region = grown(&vmap, 2, 8);
            assert_shows(page(FAR, 2), 2..8);
        }));
        settled(&engine, &vmap, 0);
        assert_eq!(settled_stats(&engine).adopted, 1);
    });
}

/// Bytes whose drop touches an address, and keeps what came of it.
struct Toucher(Vec<u8>, usize, Arc<AtomicUsize>);

impl AsRef<[u8]> for Toucher {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Drop for Toucher {
    fn drop(&mut self) {
        let outcome = touch::read(self.1 as *const u8);
        self.2.store(if outcome.is_err_and(|refused| refused.is_sigbus_at(self.1)) { 1 } else { 2 }, Ordering::SeqCst);
    }
}

/// T79: code of the application that the keeper runs, as it drops the last of a list, and that touches a grown part which
/// only the keeper could look up, is told so by SIGBUS; the keeper goes on.
#[test]
fn the_keeper_does_not_wait_for_itself() {
    alone("the_keeper_does_not_wait_for_itself", || {
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        let vmap = engine.vmap(&pages(8)).unwrap();
        let region = grown(&vmap, 2, 8);
        let told = Arc::new(AtomicUsize::new(0));
        let mut list = Kiobuf::new();
        list.map_slice(Toucher(vec![7; page_size()], page(FAR, 5), Arc::clone(&told))).unwrap();
        let other = engine.vmap(&list).unwrap();
        let leaves = other.attach(&AttachOptions::new()).unwrap();
        let (forked, leave) = (Told::new(), Told::new());
        let pid = child(|| {
            forked.tell(1);
            leave.wait_for(2);
        });
        forked.wait_for(1);
        // From here on the child's area is all that keeps the list.
        drop((list, other, leaves));
        leave.tell(2);
        reap_ok(pid);
        eventually("the list is dropped", || told.load(Ordering::SeqCst) != 0);
        assert_shows(page(FAR, 6), 6..8);
        // Where another thread dropped it, the keeper has looked the page up. Without poison, what the keeper was told by is a
        // mask: a mapping that parts the grown one, of which what lies behind is then an area of its own.
        let is_parted = told.load(Ordering::SeqCst) == 1 && !engine.features().contains(Features::POISON);
        if is_parted {
            // Where the mask is, and before it, nobody knows of a mapping: the kernel's table is not what the engine's is.
            engine.settle().unwrap();
            assert_eq!(vmap.refcount().unwrap(), 2);
        } else {
            assert_count(&engine, &vmap, 1);
        }
        drop(region);
    });
}

/// T73: a grown part that outlives everything of its engine, which nobody knows of, is SIGBUS where its pages are missing:
/// it does not read zeros, and nobody sleeps on. The engine's threads stay for that, and end when it is unmapped.
#[test]
fn a_grown_part_that_outlives_its_engine_fails_closed() {
    alone("a_grown_part_that_outlives_its_engine_fails_closed", || {
        for dropped_first in [false, true] {
            let engine = engine_builder().fault_around_pages(1).build().unwrap();
            let vmap = engine.vmap(&pages(8)).unwrap();
            let region = grown(&vmap, 2, 8);
            // Resident: it stays.
            vmap.write_at(5 * page_size() as u64, &[0xee]).unwrap();
            raw::munmap(FAR as *mut u8, 2);
            engine.settle().unwrap();
            assert_eq!(vmap.refcount().unwrap(), 0);
            if dropped_first {
                drop((region, vmap));
                drop(engine);
            } else {
                engine.shutdown(Shutdown::Poison).unwrap();
                drop((engine, vmap, region));
            }
            assert_sigbus_pages(page(FAR, 2), 3);
            assert_eq!(touch::read(page(FAR, 5) as *const u8), Ok(0xee));
            assert_sigbus_pages(page(FAR, 6), 2);
            assert!(threads().iter().any(|name| name.starts_with("kiomap")));
            raw::munmap(page(FAR, 2) as *mut u8, 4);
            assert_sigbus_pages(page(FAR, 6), 2);
            raw::munmap(page(FAR, 6) as *mut u8, 2);
            eventually("the threads' ends", || threads().iter().all(|name| !name.starts_with("kiomap")));
        }
    });
}
