//! Forks by many threads and processes at once, among everything else that they do.

mod support;

use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use kiomap::{AttachOptions, Region, page_size};
use nix::unistd::getpid;
use support::scene::{Rng, Told, areas_of, at, child, settled, sourced_pages};
use support::truth::assert_count;
use support::{alone, engine_builder, eventually, mark, open_descriptors, pages, reap_ok, threads, touch};

/// T53: forks while four threads fault: every touch in every process is right, and nothing waits for ever.
#[test]
fn forks_while_threads_fault_lose_nothing() {
    needs_sources!();
    alone("forks_while_threads_fault_lose_nothing", || {
        const PAGES: u64 = 2048;
        let engine = engine_builder().fault_around_pages(2).build().unwrap();
        for list in [pages(PAGES), sourced_pages(PAGES)] {
            let vmap = engine.vmap(&list).unwrap();
            let region = vmap.attach(&AttachOptions::new()).unwrap();
            let left = AtomicUsize::new(4);
            std::thread::scope(|scope| {
                for seed in 0..4 {
                    let (region, left) = (&region, &left);
                    scope.spawn(move || {
                        let mut order: Vec<u64> = (0..PAGES).collect();
                        Rng::new(seed).shuffle(&mut order);
                        order.iter().for_each(|&page| assert_eq!(touch::read(at(region, page)), Ok(mark(page))));
                        left.fetch_sub(1, Ordering::Release);
                    });
                }
                let mut rng = Rng::new(77);
                while left.load(Ordering::Acquire) > 0 {
                    let seed = rng.next();
                    reap_ok(child(|| {
                        let mut rng = Rng::new(seed);
                        for _ in 0..32 {
                            let page = rng.below(PAGES);
                            assert_eq!(touch::read(at(&region, page)), Ok(mark(page)));
                        }
                    }));
                }
            });
            settled(&engine, &vmap, 1);
        }
    });
}

/// Forks from three threads at once, while others attach, detach and fault: the count comes back, nothing is leaked.
#[test]
fn fork_storms_among_attaches_detaches_and_faults_leave_nothing_behind() {
    alone("fork_storms_among_attaches_detaches_and_faults_leave_nothing_behind", || {
        const PAGES: u64 = 256;
        let engine = engine_builder().fault_around_pages(4).build().unwrap();
        let vmap = engine.vmap(&pages(PAGES)).unwrap();
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        let (fds, threads_before) = (open_descriptors(), threads().len());
        let forking = AtomicUsize::new(3);
        std::thread::scope(|scope| {
            for seed in 0..3 {
                let (vmap, region, forking) = (&vmap, &region, &forking);
                scope.spawn(move || {
                    let mut rng = Rng::new(seed);
                    for _ in 0..60 {
                        let page = rng.below(PAGES);
                        reap_ok(child(|| {
                            region.check().unwrap();
                            assert_eq!(touch::read(at(region, page)), Ok(mark(page)));
                            let own = vmap.attach(&AttachOptions::new().pgoff(page)).unwrap();
                            assert_eq!(touch::read(own.as_ptr()), Ok(mark(page)));
                        }));
                    }
                    forking.fetch_sub(1, Ordering::Release);
                });
            }
            for seed in 10..12 {
                let (vmap, engine, forking) = (&vmap, &engine, &forking);
                scope.spawn(move || {
                    let mut rng = Rng::new(seed);
                    while forking.load(Ordering::Acquire) > 0 {
                        let other = engine.vmap(&pages(8)).unwrap();
                        let (page, pgoff) = (rng.below(8), rng.below(PAGES));
                        let a = other.attach(&AttachOptions::new()).unwrap();
                        let b = vmap.attach(&AttachOptions::new().pgoff(pgoff)).unwrap();
                        assert_eq!(touch::read(at(&a, page)), Ok(mark(page)));
                        assert_eq!(touch::read(b.as_ptr()), Ok(mark(pgoff)));
                    }
                });
            }
        });
        settled(&engine, &vmap, 1);
        eventually("descriptors are back", || open_descriptors() == fds);
        eventually("threads are back", || threads().len() == threads_before);
        assert_eq!(areas_of(getpid()), 1);
    });
}

/// A region that exists when another thread forks exists in the child with its own bytes, or says that it does not:
/// it is never somebody else's memory.
#[test]
fn a_region_attached_during_another_threads_fork_is_its_own_in_the_child() {
    alone("a_region_attached_during_another_threads_fork_is_its_own_in_the_child", || {
        let engine = engine_builder().build().unwrap();
        // Each vmap has its own bytes, so that a stale mapping at a reused address shows.
        let vmaps: Vec<_> = (0..8u8)
            .map(|n| {
                let mut list = kiomap::Kiobuf::new();
                list.map_bytes(vec![n + 1; 2 * page_size()]).unwrap();
                engine.vmap(&list).unwrap()
            })
            .collect();
        let slot: Mutex<Option<(u8, Region)>> = Mutex::new(None);
        let forking = AtomicBool::new(true);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for n in (0..8u8).cycle() {
                    if !forking.load(Ordering::Acquire) {
                        break;
                    }
                    // The old one goes before the new one comes, which then takes its address.
                    let mut slot = slot.lock().unwrap();
                    *slot = None;
                    *slot = Some((n + 1, vmaps[n as usize].attach(&AttachOptions::new()).unwrap()));
                }
            });
            let look = |rounds| {
                for _ in 0..rounds {
                    reap_ok(child(|| {
                        // Locked by the other thread at the moment of the fork: not a region yet.
                        let Ok(slot) = slot.try_lock() else { return };
                        let Some((byte, region)) = &*slot else { return };
                        region.check().unwrap();
                        assert_eq!(touch::read(region.as_ptr()), Ok(*byte));
                        assert_eq!(touch::read(at(region, 1)), Ok(*byte));
                    }));
                }
            };
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| look(400)));
            forking.store(false, Ordering::Release);
            if let Err(panic) = outcome {
                std::panic::resume_unwind(panic);
            }
        });
        slot.lock().unwrap().take();
        eventually("the children are gone", || engine.spaces().unwrap().len() == 1);
        engine.settle().unwrap();
        vmaps.iter().for_each(|vmap| assert_count(&engine, vmap, 0));
    });
}

/// A lifeline is nobody's but its child's: a child that execs is counted out although a sibling, forked at the same
/// moment by another thread, lives on.
#[test]
fn siblings_forked_at_the_same_moment_do_not_hide_each_others_end() {
    alone("siblings_forked_at_the_same_moment_do_not_hide_each_others_end", || {
        let engine = engine_builder().build().unwrap();
        let vmap = engine.vmap(&pages(4)).unwrap();
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        for _ in 0..30 {
            let (end, started) = (Told::new(), Told::new());
            let pids = Mutex::new(Vec::new());
            std::thread::scope(|scope| {
                // Two that stay, two that exec.
                for stays in [true, false, true, false] {
                    let (end, started, region, pids) = (&end, &started, &region, &pids);
                    scope.spawn(move || {
                        let pid = child(|| {
                            assert_eq!(touch::read(at(region, 1)), Ok(mark(1)));
                            started.tell(1);
                            if stays {
                                end.wait_for(2);
                            } else {
                                let why = Command::new("sleep").arg("60").exec();
                                panic!("{why}");
                            }
                        });
                        pids.lock().unwrap().push((stays, pid));
                    });
                }
            });
            (0..4).for_each(|_| started.wait_for(1));
            // Itself and the two that stay.
            eventually("those that exec are counted out", || vmap.refcount().unwrap() == 3);
            (0..2).for_each(|_| end.tell(2));
            for (stays, pid) in pids.into_inner().unwrap() {
                if stays { reap_ok(pid) } else { support::scene::kill_and_reap(pid) }
            }
            settled(&engine, &vmap, 1);
        }
    });
}

/// T53: a fork while other threads start and end: the standard library's lock on what it knows of its threads may be held
/// at that moment, and is never released in the child.
#[test]
fn forks_while_other_threads_start_and_end_come_back() {
    alone("forks_while_other_threads_start_and_end_come_back", || {
        let engine = engine_builder().build().unwrap();
        let vmap = engine.vmap(&pages(4)).unwrap();
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        let forking = AtomicBool::new(true);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while forking.load(Ordering::Acquire) {
                        std::thread::spawn(|| {}).join().unwrap();
                    }
                });
            }
            for _ in 0..400 {
                reap_ok(child(|| assert_eq!(touch::read(at(&region, 2)), Ok(mark(2)))));
            }
            forking.store(false, Ordering::Release);
        });
        settled(&engine, &vmap, 1);
    });
}
