//! Masks: what stands for UFFDIO_POISON on kernels before Linux 6.6.

mod support;

use std::io::Write;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use kiomap::{AttachOptions, Delivery, Region, Shutdown, page_size};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::WaitStatus;
use support::scene::{Told, at, child, settled};
use support::truth::{assert_count, assert_truth};
use support::{
    alone, assert_sigbus, attached, eventually, list_with_holes, mark, pages, read_page, reap, reap_ok, settled_stats,
    source, touch, vmap_mappings, without_poison,
};

/// T3, T5, T9, T12: without poison a hole is SIGBUS at the byte that was touched, for reads and writes, each time and
/// whatever advice is given; its neighbours are served, and a system call gets EFAULT.
#[test]
fn without_poison_holes_are_sigbus_and_their_neighbours_intact() {
    alone("without_poison_holes_are_sigbus_and_their_neighbours_intact", || {
        for around in [1, 16] {
            let engine = without_poison().fault_around_pages(around).build().unwrap();
            let (vmap, region) = attached(&engine, &list_with_holes(40, |page| page % 3 == 1));
            for round in 0..2 {
                for page in 0..40 {
                    if page % 3 == 1 {
                        assert_sigbus(&region, page);
                        let here = support::in_page(&region, page);
                        assert!(touch::write(here, 1).unwrap_err().is_sigbus_at(here as usize));
                        // SAFETY: the kernel reads the byte, which is not there: EFAULT.
                        let wrote = unsafe { libc::write(1, here.cast(), 1) };
                        assert_eq!((wrote, Errno::last()), (-1, Errno::EFAULT));
                    } else {
                        assert_eq!(read_page(&region, page), Ok(mark(page)));
                    }
                }
                if round == 0 {
                    // SAFETY: shared pages are only taken out of this mapping.
                    let advised =
                        unsafe { libc::madvise(region.as_ptr().cast(), region.len_bytes(), libc::MADV_DONTNEED) };
                    assert_eq!(advised, 0);
                }
            }
            assert_eq!(settled_stats(&engine).pages_poisoned, 13);
            assert_eq!(settled_stats(&engine).strays, 0);
            assert_count(&engine, &vmap, 1);
            drop(region);
            assert_count(&engine, &vmap, 0);
            assert_eq!(vmap_mappings(), Vec::<String>::new());
        }
    });
}

/// T7: many holes side by side are one mapping of the kernel, in whatever order they are touched, as mappings are scarce.
#[test]
fn masks_side_by_side_are_one_mapping() {
    alone("masks_side_by_side_are_one_mapping", || {
        let engine = without_poison().build().unwrap();
        let (_vmap, region) = attached(&engine, &list_with_holes(300, |page| (20..280).contains(&page)));
        for page in (20..280).filter(|page| page % 2 == 0).chain((20..280).rev().filter(|page| page % 2 == 1)) {
            assert_sigbus(&region, page);
        }
        assert_eq!(vmap_mappings().len(), 3);
        assert_truth(&engine);
    });
}

/// T33-T37: a range with masks in it is unmapped, in the middle and whole, and counted, like any other.
#[test]
fn unmaps_of_masks_are_counted() {
    alone("unmaps_of_masks_are_counted", || {
        let engine = without_poison().build().unwrap();
        let (vmap, region) = attached(&engine, &list_with_holes(12, |page| page % 2 == 1));
        (0..6).for_each(|n| assert_sigbus(&region, 2 * n + 1));
        let unmap = |page, nr_pages| {
            // SAFETY: pages of the region, to which nobody refers.
            assert_eq!(unsafe { libc::munmap(at(&region, page).cast(), nr_pages * page_size()) }, 0);
        };
        // A mask alone, from the middle of others: the kernel reports it although the page was mapped anew.
        unmap(3, 1);
        assert_count(&engine, &vmap, 2);
        assert!(read_page(&region, 3).unwrap_err().is_sigsegv());
        unmap(6, 3);
        assert_count(&engine, &vmap, 3);
        for page in [0, 2, 4, 10] {
            assert_eq!(read_page(&region, page), Ok(mark(page)));
        }
        [1, 5, 9, 11].into_iter().for_each(|page| assert_sigbus(&region, page));
        unmap(9, 3);
        assert_count(&engine, &vmap, 2);
        drop(region);
        assert_count(&engine, &vmap, 0);
        assert_eq!(vmap_mappings(), Vec::<String>::new());
    });
}

/// T39: a mask is a mapping of its own for the kernel, which moves one at a time where somebody is told of moves: a range
/// over its border is refused whole, what lies between masks moves, and so does a mask.
#[test]
fn pieces_between_masks_move_and_masks_do() {
    alone("pieces_between_masks_move_and_masks_do", || {
        let engine = without_poison().fault_around_pages(1).build().unwrap();
        let (vmap, region) = attached(&engine, &list_with_holes(8, |page| page == 3));
        assert_sigbus(&region, 3);
        let bytes = |pages: u64| pages as usize * page_size();
        let move_to_free_place = |page, nr_pages| {
            // SAFETY: pages of the region, to which nobody refers, move to where the kernel finds room.
            let moved = unsafe {
                let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
                let place = libc::mmap(
                    std::ptr::null_mut(),
                    bytes(nr_pages),
                    libc::PROT_NONE,
                    libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                    -1,
                    0,
                );
                libc::mremap(at(&region, page).cast(), bytes(nr_pages), bytes(nr_pages), flags, place)
            };
            if moved == libc::MAP_FAILED { Err(Errno::last()) } else { Ok(moved.cast::<u8>()) }
        };
        match move_to_free_place(0, 8) {
            Err(errno) => assert_eq!(errno, Errno::EFAULT),
            Ok(_) => skip!("this kernel moves several mappings at once"),
        }
        assert_count(&engine, &vmap, 1);
        let tail = move_to_free_place(4, 4).unwrap();
        let mask = move_to_free_place(3, 1).unwrap();
        assert_count(&engine, &vmap, 3);
        for page in 4..8 {
            assert_eq!(touch::read(tail.wrapping_add(bytes(page - 4))), Ok(mark(page)));
        }
        assert!(touch::read(mask).unwrap_err().is_sigbus_at(mask as usize));
        assert_eq!(read_page(&region, 2), Ok(mark(2)));
        assert!(read_page(&region, 3).unwrap_err().is_sigsegv());
        drop(region);
        assert_count(&engine, &vmap, 0);
    });
}

/// T92, T49-T52: a mask is one process's own. A child begins without, down to the third generation, and is refused by
/// its own masks; what had failed once may be there for it.
#[test]
fn a_forked_child_begins_without_masks_and_makes_its_own() {
    alone("a_forked_child_begins_without_masks_and_makes_its_own", || {
        let engine = without_poison().fault_around_pages(1).build().unwrap();
        let (vmap, mut region) = attached(&engine, &list_with_holes(9, |page| page % 2 == 1));
        assert_sigbus(&region, 1);
        assert_sigbus(&region, 3);
        let check = |region: &Region| {
            assert_eq!(vmap_mappings().len(), 1, "the child begins without");
            for page in [5, 1, 3, 5] {
                assert_sigbus(region, page);
            }
            assert_eq!(read_page(region, 4), Ok(mark(4)));
        };
        let first = child(|| {
            check(&region);
            let second = child(|| {
                check(&region);
                let third = child(|| {
                    check(&region);
                    // The copy of this process; what the others have is theirs.
                    drop(std::mem::replace(&mut region, vmap.attach(&AttachOptions::new()).unwrap()));
                    assert_eq!(vmap_mappings().len(), 1);
                    // SAFETY: nobody refers to its pages.
                    let all = unsafe { libc::munmap(region.as_ptr().cast(), region.len_bytes()) };
                    assert_eq!(all, 0);
                    assert_eq!(vmap_mappings(), Vec::<String>::new());
                });
                reap_ok(third);
            });
            reap_ok(second);
            // SAFETY: pages of the region, to which nobody refers; one of them is a mask.
            assert_eq!(unsafe { libc::munmap(at(&region, 2).cast(), 2 * page_size()) }, 0);
            eventually("the split is counted", || vmap.refcount().unwrap() == 3);
        });
        reap_ok(first);
        settled(&engine, &vmap, 1);
        assert_truth(&engine);
    });
}

/// T53, T61: masks are made while other threads fork without a pause: each child gets every area, and its addresses are
/// not taken by a mask that it should not have.
#[test]
fn masks_among_forks_are_in_no_childs_way() {
    alone("masks_among_forks_are_in_no_childs_way", || {
        let engine = without_poison().fault_around_pages(1).build().unwrap();
        let vmap = engine.vmap(&list_with_holes(64, |page| page % 2 == 1)).unwrap();
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    // Each attach begins without masks.
                    let again = vmap.attach(&AttachOptions::new().inherit(false)).unwrap();
                    (0..32).for_each(|n| assert_sigbus(&again, 2 * n + 1));
                }
            });
            for round in 0..100 {
                let page = round % 32;
                reap_ok(child(|| {
                    region.check().unwrap();
                    assert_sigbus(&region, 2 * page + 1);
                    assert_eq!(read_page(&region, 2 * page), Ok(mark(2 * page)));
                }));
            }
            done.store(true, Ordering::Relaxed);
        });
        settled(&engine, &vmap, 1);
        assert_truth(&engine);
    });
}

/// T68, T72: masks are made while other threads unmap, map and attach at the same addresses: what others map there is
/// never touched, and every page is right or refused.
#[test]
fn masks_among_unmaps_leave_others_memory_alone() {
    alone("masks_among_unmaps_leave_others_memory_alone", || {
        const PAGES: u64 = 16;
        let engine = without_poison().fault_around_pages(1).build().unwrap();
        let vmap = engine.vmap(&list_with_holes(PAGES, |page| page % 2 == 1)).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&vec![0x77; page_size()]).unwrap();
        for round in 0..300_u64 {
            let region = vmap.attach(&AttachOptions::new()).unwrap();
            let started = AtomicBool::new(false);
            let foreign = std::thread::scope(|scope| {
                let (region, started) = (&region, &started);
                let touching = scope.spawn(move || {
                    started.store(true, Ordering::Release);
                    for page in 0..PAGES {
                        match read_page(region, page) {
                            Ok(0x77) => {}
                            Ok(byte) => assert!(page % 2 == 0 && byte == mark(page), "page {page}: {byte}"),
                            Err(refused) => assert!(refused.is_sigsegv() || page % 2 == 1, "page {page}: {refused:?}"),
                        }
                    }
                });
                // Its stacks are mapped by then, and don't take the address that is freed below.
                eventually("the thread has started", || started.load(Ordering::Acquire));
                (0..round % 50 * 40).for_each(|n| {
                    std::hint::black_box(n);
                });
                let page = (round * 7) % PAGES;
                let here = at(region, page);
                // SAFETY: a page of the region, to which nobody refers, and then memory of this test's own in its place.
                let foreign = unsafe {
                    assert_eq!(libc::munmap(here.cast(), page_size()), 0);
                    let flags = libc::MAP_PRIVATE | libc::MAP_FIXED_NOREPLACE;
                    libc::mmap(here.cast(), page_size(), libc::PROT_READ, flags, file.as_raw_fd(), 0)
                };
                if foreign == libc::MAP_FAILED {
                    // Somebody else's memory, of whose bytes nothing is known.
                    let _ = touching.join();
                    return None;
                }
                touching.join().unwrap();
                assert_eq!(touch::read(here), Ok(0x77));
                Some(foreign)
            });
            engine.settle().unwrap();
            drop(region);
            if let Some(foreign) = foreign {
                assert_eq!(touch::read(foreign.cast()), Ok(0x77), "a region's drop leaves it alone");
                // SAFETY: this test's own page.
                assert_eq!(unsafe { libc::munmap(foreign, page_size()) }, 0);
            }
            if round % 50 == 0 {
                assert_count(&engine, &vmap, 0);
            }
        }
        assert_count(&engine, &vmap, 0);
    });
}

/// T8: a page whose source fails is SIGBUS, by and by in each process; its neighbours are served.
#[test]
fn without_poison_a_failing_source_is_sigbus_for_its_page() {
    needs_sources!();
    alone("without_poison_a_failing_source_is_sigbus_for_its_page", || {
        let fails = |first: u64, nr: usize| {
            let failing = (first..first + nr as u64).contains(&5);
            if failing { Err(std::io::Error::other("page 5")) } else { Ok(()) }
        };
        let engine = without_poison().fault_around_pages(4).build().unwrap();
        let (vmap, region) = attached(&engine, &source(16, fails));
        for page in (0..16).chain(0..16) {
            match page {
                5 => assert_sigbus(&region, 5),
                _ => assert_eq!(read_page(&region, page), Ok(mark(page))),
            }
        }
        assert!(vmap.read_at(5 * page_size() as u64, &mut [0]).is_err());
        assert_truth(&engine);
    });
}

/// T95: the pages around a masked one are not read again and again for it.
#[test]
fn pages_around_a_mask_are_read_once() {
    needs_sources!();
    alone("pages_around_a_mask_are_read_once", || {
        let (asked, fails) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(true)));
        let list = source(16, {
            let (asked, fails) = (Arc::clone(&asked), Arc::clone(&fails));
            move |first, nr| {
                asked.fetch_add(1, Ordering::SeqCst);
                let fails = fails.load(Ordering::SeqCst) && (first..first + nr as u64).contains(&5);
                if fails { Err(std::io::Error::other("page 5")) } else { Ok(()) }
            }
        });
        let engine = without_poison().fault_around_pages(16).build().unwrap();
        let (_vmap, region) = attached(&engine, &list);
        assert_sigbus(&region, 5);
        fails.store(false, Ordering::SeqCst);
        let before = asked.load(Ordering::SeqCst);
        assert_eq!(read_page(&region, 9), Ok(mark(9)));
        engine.settle().unwrap();
        for page in (0..16).filter(|&page| page != 5) {
            assert_eq!(read_page(&region, page), Ok(mark(page)));
        }
        assert_eq!(asked.load(Ordering::SeqCst), before + 1);
        assert_sigbus(&region, 5);
    });
}

/// T73: without poison a shutdown answers blocked faults by SIGBUS too, and later touches; what is resident stays, and
/// the region can be dropped.
#[test]
fn without_poison_a_shutdown_leaves_resident_pages_and_sigbus() {
    alone("without_poison_a_shutdown_leaves_resident_pages_and_sigbus", || {
        let engine = without_poison().fault_around_pages(1).build().unwrap();
        let (_vmap, region) = attached(&engine, &pages(8));
        assert_eq!(read_page(&region, 2), Ok(mark(2)));
        engine.shutdown(Shutdown::Poison).unwrap();
        for page in [0, 1, 3, 7, 1] {
            assert_sigbus(&region, page);
        }
        assert_eq!(read_page(&region, 2), Ok(mark(2)));
        drop(region);
        assert_eq!(vmap_mappings(), Vec::<String>::new());
    });
}

/// T54, T55: without poison a child whose engine goes away, by a kill or a shutdown, finds what is resident, and SIGBUS
/// elsewhere, promptly; it can still unmap.
#[test]
fn without_poison_a_child_fails_closed_when_its_engine_is_gone() {
    alone("without_poison_a_child_fails_closed_when_its_engine_is_gone", || {
        for killed in [true, false] {
            let (ready, gone, done) = (Told::new(), Told::new(), Told::new());
            let owner = child(|| {
                let engine = without_poison().fault_around_pages(1).build().unwrap();
                let (_vmap, region) = attached(&engine, &list_with_holes(8, |page| page == 6));
                child(|| {
                    assert_eq!(read_page(&region, 2), Ok(mark(2)));
                    assert_sigbus(&region, 6);
                    ready.tell(1);
                    gone.wait_for(2);
                    let start = Instant::now();
                    eventually("the guard is at work", || read_page(&region, 3).is_err());
                    for page in [6, 0, 1, 3, 7, 1] {
                        assert_sigbus(&region, page);
                    }
                    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
                    assert_eq!(read_page(&region, 2), Ok(mark(2)));
                    // SAFETY: pages of the region, to which nobody refers; the guard reads the event.
                    assert_eq!(unsafe { libc::munmap(at(&region, 6).cast(), 2 * page_size()) }, 0);
                    done.tell(3);
                });
                if killed {
                    std::thread::park();
                }
                ready.wait_for(1);
                engine.shutdown(Shutdown::Poison).unwrap();
                gone.tell(2);
                std::thread::park();
            });
            if killed {
                ready.wait_for(1);
                kill(owner, Signal::SIGKILL).unwrap();
                reap(owner);
                gone.tell(2);
            }
            done.wait_for(3);
            if !killed {
                kill(owner, Signal::SIGKILL).unwrap();
                reap(owner);
            }
        }
    });
}

/// Takes mappings until the kernel has no more for this process.
fn take_every_mapping() -> bool {
    let limit: u64 = std::fs::read_to_string("/proc/sys/vm/max_map_count").unwrap().trim().parse().unwrap();
    if limit > 300_000 {
        return false;
    }
    for n in 0.. {
        // Neighbours that differ stay apart.
        let prot = if n % 2 == 0 { libc::PROT_READ } else { libc::PROT_NONE };
        // SAFETY: new memory, used by nobody.
        let memory = unsafe {
            libc::mmap(std::ptr::null_mut(), page_size(), prot, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0)
        };
        if memory == libc::MAP_FAILED {
            assert_eq!(Errno::last(), Errno::ENOMEM);
            break;
        }
    }
    true
}

/// T62: in a locked region, up to RLIMIT_MEMLOCK, a hole is SIGBUS too, and nothing else is lost for it.
#[test]
fn without_poison_a_hole_in_locked_memory_is_sigbus() {
    alone("without_poison_a_hole_in_locked_memory_is_sigbus", || {
        use nix::sys::resource::{Resource, getrlimit, setrlimit};
        let engine = without_poison().build().unwrap();
        let (_vmap, region) = attached(&engine, &list_with_holes(8, |page| page % 4 == 1));
        let (_, most) = getrlimit(Resource::RLIMIT_MEMLOCK).unwrap();
        if most < region.len_bytes() as u64 {
            skip!("RLIMIT_MEMLOCK is {most}");
        }
        setrlimit(Resource::RLIMIT_MEMLOCK, region.len_bytes() as u64, most).unwrap();
        // SAFETY: locking what is there and what comes changes no bytes.
        let locked = unsafe { libc::mlock2(region.as_ptr().cast(), region.len_bytes(), libc::MLOCK_ONFAULT) };
        assert_eq!(locked, 0, "{}", Errno::last());
        for page in 0..8 {
            if page % 4 == 1 {
                assert_sigbus(&region, page);
            } else {
                assert_eq!(read_page(&region, page), Ok(mark(page)));
            }
        }
        assert_truth(&engine);
    });
}

/// When the kernel has no mapping more (vm.max_map_count), a page that can't be masked is refused with all of its area:
/// by SIGBUS, or by SIGSEGV at the worst; never a hang, never other bytes. In the engine's process and in a child.
#[test]
fn without_poison_and_without_room_for_a_mask_the_area_fails_closed() {
    alone("without_poison_and_without_room_for_a_mask_the_area_fails_closed", || {
        // Of three stripes the last is first read when no mapping is left.
        for (in_child, stripes) in [(false, 1), (true, 1), (false, 3)] {
            let engine_made = child(|| {
                let engine = without_poison().delivery(Delivery::Handler).fault_around_pages(1).build().unwrap();
                let vmap = engine.vmap(&list_with_holes(32, |page| page % 2 == 1)).unwrap();
                let region = vmap.attach(&AttachOptions::new().stripes(stripes)).unwrap();
                let body = || {
                    assert_eq!(read_page(&region, 2), Ok(mark(2)));
                    if !take_every_mapping() {
                        return;
                    }
                    for page in [5, 9, 13, 5] {
                        let refused = read_page(&region, page).unwrap_err();
                        let here = support::in_page(&region, page) as usize;
                        assert!(refused.is_sigbus_at(here) || refused.is_sigsegv(), "page {page}: {refused:?}");
                    }
                    for page in [2, 4] {
                        assert!(
                            read_page(&region, page).is_ok_and(|byte| byte == mark(page))
                                || read_page(&region, page).is_err()
                        );
                    }
                };
                if in_child { reap_ok(child(body)) } else { body() }
            });
            let status = reap(engine_made);
            assert!(matches!(status, WaitStatus::Exited(_, 0)), "in a child: {in_child}: {status:?}");
        }
    });
}
