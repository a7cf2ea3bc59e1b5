//! Faults that are answered by several threads at once.

mod support;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use kiomap::{AttachOptions, EngineBuilder, Error, Kiobuf, Shutdown, page_size};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use support::{
    alone, alone_for, attached, engine_builder, eventually, fork_child, in_page, mark, pages, read_page, reap_ok,
    settled_stats, threads, touch,
};

/// An address where the kernel puts nothing by itself.
const FAR: usize = 0x5000_0000_0000;

/// An engine whose crew is on all the time.
fn crewed() -> EngineBuilder {
    engine_builder().handlers(4).handlers_standing_by(true)
}

fn pin(cpu: usize) {
    let mut set = CpuSet::new();
    set.set(cpu).unwrap();
    sched_setaffinity(Pid::from_raw(0), &set).unwrap();
}

/// How long the members have run, together, in nanoseconds.
fn members_ran_ns() -> u64 {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap().map(|task| task.unwrap().path());
    let members = tasks.filter(|task| std::fs::read_to_string(task.join("comm")).is_ok_and(|c| c == "kiomap-crew\n"));
    let ran = |task: std::path::PathBuf| {
        let schedstat = std::fs::read_to_string(task.join("schedstat")).unwrap();
        schedstat.split(' ').next().unwrap().parse::<u64>().unwrap()
    };
    members.map(ran).sum()
}

#[test]
fn one_handler_has_no_crew_and_too_many_are_refused() {
    alone("one_handler_has_no_crew_and_too_many_are_refused", || {
        let members = || threads().iter().filter(|name| *name == "kiomap-crew").count();
        drop(engine_builder().handlers(1).build().unwrap());
        for (handlers, crew) in [(1, 0), (2, 2), (kiomap::HANDLERS_MAX, kiomap::HANDLERS_MAX)] {
            let engine = engine_builder().handlers(handlers).build().unwrap();
            assert_eq!(members(), crew);
            drop(engine);
            eventually("the members' ends", || members() == 0);
        }
        for handlers in [0, kiomap::HANDLERS_MAX + 1] {
            let refused = engine_builder().handlers(handlers).build().unwrap_err();
            assert!(matches!(refused, Error::Invalid { what: "handlers", value, .. } if value == handlers as u64));
        }
    });
}

#[test]
fn a_crew_brings_every_page_once_and_counts_it() {
    alone("a_crew_brings_every_page_once_and_counts_it", || {
        const PAGES: u64 = 2000;
        let engine = crewed().fault_around_pages(3).build().unwrap();
        let mut list = pages(PAGES / 2);
        let mut zeros = Kiobuf::new();
        zeros.map_zero(PAGES / 2).unwrap();
        list.expand(&zeros).unwrap();
        let (vmap, region) = attached(&engine, &list);
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let region = &region;
                scope.spawn(move || {
                    for n in 0..PAGES {
                        let page = (n * 7 + thread * 501) % PAGES;
                        let expected = if page < PAGES / 2 { mark(page) } else { 0 };
                        assert_eq!(read_page(region, page), Ok(expected), "page {page}");
                    }
                });
            }
        });
        let stats = settled_stats(&engine);
        assert_eq!((stats.pages_copied, stats.pages_zeroed, stats.pages_poisoned), (PAGES / 2, PAGES / 2, 0));
        assert_eq!((stats.panics, stats.strays), (0, 0));
        assert_eq!(vmap.refcount().unwrap(), 1);
        drop(region);
        assert_eq!(vmap.refcount().unwrap(), 0);
    });
}

/// What a member has looked up may be unmapped, moved or another vmap's by the time it fills: no byte of one vmap is
/// ever seen in another.
#[test]
fn addresses_that_change_hands_under_a_crew_show_their_own_bytes() {
    alone("addresses_that_change_hands_under_a_crew_show_their_own_bytes", || {
        const PAGES: u64 = 32;
        let engine = crewed().build().unwrap();
        let full = |byte: u8| {
            let mut list = Kiobuf::new();
            list.map_bytes(vec![byte; PAGES as usize * page_size()]).unwrap();
            engine.vmap(&list).unwrap()
        };
        let over = AtomicBool::new(false);
        let seen = AtomicU64::new(0);
        let start = Instant::now();
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    let mut page = 0;
                    while !over.load(Ordering::Relaxed) {
                        page = (page + 5) % PAGES as usize;
                        // Whatever is there is whole: a page shows one vmap's bytes, never a zero.
                        let at = (FAR + page * page_size()) as *mut u8;
                        if let Ok(byte) = touch::read(at) {
                            assert_ne!(byte, 0);
                            seen.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                });
            }
            let mut byte = 0;
            while start.elapsed() < Duration::from_secs(3) {
                byte = byte % 250 + 1;
                let vmap = full(byte);
                let region = vmap.attach(&AttachOptions::new().at(FAR)).unwrap();
                for page in 0..PAGES {
                    assert_eq!(read_page(&region, page), Ok(byte));
                }
                if byte % 3 == 0 {
                    // Its place is taken by nothing, by an event.
                    // SAFETY: the region's own range.
                    unsafe { libc::munmap(region.as_ptr().cast(), PAGES as usize / 2 * page_size()) };
                }
                drop(region);
                assert_eq!(vmap.refcount().unwrap(), 0);
            }
            over.store(true, Ordering::Relaxed);
        });
        assert!(seen.load(Ordering::Relaxed) > 0);
        assert_eq!(settled_stats(&engine).panics, 0);
    });
}

#[test]
fn moves_and_unmaps_of_several_threads_are_followed_in_order() {
    alone("moves_and_unmaps_of_several_threads_are_followed_in_order", || {
        const PAGES: u64 = 16;
        let engine = crewed().build().unwrap();
        let vmaps: Vec<_> = (0..3).map(|_| engine.vmap(&pages(PAGES)).unwrap()).collect();
        std::thread::scope(|scope| {
            for (n, vmap) in vmaps.iter().enumerate() {
                scope.spawn(move || {
                    let (here, there) = (FAR + ((2 * n) << 30), FAR + ((2 * n + 1) << 30));
                    for _ in 0..150 {
                        let region = vmap.attach(&AttachOptions::new().at(here)).unwrap();
                        assert_eq!(read_page(&region, 3), Ok(mark(3)));
                        let len = PAGES as usize * page_size();
                        // SAFETY: moves the region to where nothing is.
                        let moved = unsafe {
                            let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
                            libc::mremap(here as *mut libc::c_void, len, len, flags, there as *mut libc::c_void)
                        };
                        assert_eq!(moved as usize, there);
                        for page in 0..PAGES {
                            let at = (there + page as usize * page_size()) as *mut u8;
                            assert_eq!(touch::read(at), Ok(mark(page)));
                        }
                        drop(region);
                        assert_eq!(vmap.refcount().unwrap(), 0);
                    }
                });
            }
        });
        assert_eq!(settled_stats(&engine).panics, 0);
    });
}

#[test]
fn a_crew_serves_children_and_notices_their_ends() {
    alone("a_crew_serves_children_and_notices_their_ends", || {
        const PAGES: u64 = 500;
        let engine = crewed().fault_around_pages(1).build().unwrap();
        let (vmap, region) = attached(&engine, &pages(PAGES));
        for _ in 0..5 {
            let children = [0, 1, 2].map(|_| {
                fork_child(|| (0..PAGES).for_each(|page| assert_eq!(read_page(&region, page), Ok(mark(page)))))
            });
            (0..PAGES).for_each(|page| assert_eq!(read_page(&region, page), Ok(mark(page))));
            children.into_iter().for_each(reap_ok);
            eventually("the children's ends are counted", || vmap.refcount().unwrap() == 1);
        }
    });
}

/// A shutdown while threads fault through a crew: each touch is the right byte or SIGBUS, and all threads end.
#[test]
fn a_shutdown_amid_faults_of_a_crew_leaves_right_bytes_or_sigbus() {
    alone("a_shutdown_amid_faults_of_a_crew_leaves_right_bytes_or_sigbus", || {
        const PAGES: u64 = 3000;
        for _ in 0..5 {
            let engine = crewed().fault_around_pages(1).build().unwrap();
            let (_vmap, region) = attached(&engine, &pages(PAGES));
            std::thread::scope(|scope| {
                for thread in 0..3 {
                    let region = &region;
                    scope.spawn(move || {
                        for n in 0..PAGES {
                            let page = (n + thread * 1000) % PAGES;
                            match read_page(region, page) {
                                Ok(byte) => assert_eq!(byte, mark(page)),
                                Err(refused) => assert!(refused.is_sigbus_at(in_page(region, page) as usize)),
                            }
                        }
                    });
                }
                eventually("faults", || engine.stats().faults > 200);
                engine.shutdown(Shutdown::Poison).unwrap();
            });
            drop(region);
            drop(engine);
            eventually("the threads' ends", || threads().iter().all(|name| !name.starts_with("kiomap")));
        }
    });
}

/// Members that were not called cost nothing, however much one thread faults.
#[test]
fn a_crew_that_was_not_called_sleeps() {
    alone("a_crew_that_was_not_called_sleeps", || {
        let engine = engine_builder().handlers(3).handlers_standing_by(false).fault_around_pages(1).build().unwrap();
        let (_vmap, region) = attached(&engine, &pages(3000));
        let before = members_ran_ns();
        assert_ne!(before, 0);
        (0..3000).for_each(|page| assert_eq!(read_page(&region, page), Ok(mark(page))));
        assert_eq!(members_ran_ns(), before);
    });
}

/// Threads that fault on two processors without a pause have the crew called, which is let go when they end.
#[test]
fn a_crew_is_called_when_two_processors_fault_and_let_go_after() {
    alone("a_crew_is_called_when_two_processors_fault_and_let_go_after", || {
        let allowed = nix::sched::sched_getaffinity(Pid::from_raw(0)).unwrap();
        let mut cpus = (0..CpuSet::count()).filter(|&cpu| allowed.is_set(cpu).unwrap());
        let (Some(one), Some(other)) = (cpus.next(), cpus.next()) else { skip!("there is one processor only") };
        let engine = engine_builder().handlers(2).handlers_standing_by(false).fault_around_pages(1).build().unwrap();
        if !engine.features().contains(kiomap::Features::THREAD_ID) {
            skip!("threads are not known without THREAD_ID");
        }
        let before = members_ran_ns();
        let start = Instant::now();
        while members_ran_ns() == before {
            assert!(start.elapsed() < support::DEADLINE, "never called");
            let (_vmap, region) = attached(&engine, &pages(4000));
            std::thread::scope(|scope| {
                for (first, cpu) in [(0, one), (2000, other)] {
                    let region = &region;
                    scope.spawn(move || {
                        pin(cpu);
                        (first..first + 2000).for_each(|page| assert_eq!(read_page(region, page), Ok(mark(page))));
                    });
                }
            });
        }
        // They are let go at a look, and sleep on.
        let mut last = 0;
        eventually("the members sleep", || {
            let asleep = last == members_ran_ns();
            last = members_ran_ns();
            std::thread::sleep(Duration::from_millis(120));
            asleep
        });
        let (_vmap, region) = attached(&engine, &pages(100));
        (0..100).for_each(|page| assert_eq!(read_page(&region, page), Ok(mark(page))));
        assert_eq!(members_ran_ns(), last);
    });
}

/// Members step back behind other threads where they may. Where those leave them no processor, the owner answers, and nobody
/// waits for long.
#[test]
fn threads_that_compute_beside_a_crew_keep_no_fault_waiting() {
    alone("threads_that_compute_beside_a_crew_keep_no_fault_waiting", || {
        let cpus = std::thread::available_parallelism().unwrap().get();
        let engine = engine_builder().handlers(2).handlers_standing_by(false).fault_around_pages(1).build().unwrap();
        const PAGES: u64 = 3000;
        let (_vmap, region) = attached(&engine, &pages(2 * PAGES));
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..2 * cpus {
                scope.spawn(|| {
                    while !over.load(Ordering::Relaxed) {
                        std::hint::spin_loop();
                    }
                });
            }
            let faulting = [0, PAGES].map(|first| {
                let region = &region;
                scope.spawn(move || {
                    (first..first + PAGES).for_each(|page| assert_eq!(read_page(region, page), Ok(mark(page))));
                })
            });
            faulting.into_iter().for_each(|thread| thread.join().unwrap());
            over.store(true, Ordering::Relaxed);
        });
        assert_eq!(settled_stats(&engine).panics, 0);
    });
}

/// Pages a second of some threads, or processes, that touch `nr_pages` pages in a random order.
fn speed(
    threads: usize,
    processes: bool,
    pinned: bool,
    apart: bool,
    nr_pages: u64,
    around: usize,
    handlers: bool,
) -> f64 {
    let mut builder = engine_builder();
    // With one, the engine as it is by default.
    builder = builder.handlers(if handlers { 2 } else { 1 });
    builder = builder.fault_around_pages(around);
    let engine = builder.build().unwrap();
    let mut list = Kiobuf::new();
    list.map_bytes(vec![7; nr_pages as usize * page_size()]).unwrap();
    let (_vmap, region) = attached(&engine, &list);
    let touched = AtomicU64::new(0);
    let walk = |thread: usize, of: u64, first: u64| {
        if pinned {
            pin(thread % 2);
        }
        let mut page = thread as u64 * 77;
        for _ in 0..of {
            page = (page + 1_299_709) % of;
            // SAFETY: a byte of the region.
            assert_eq!(unsafe { in_page(&region, first + page).read_volatile() }, 7);
        }
        touched.fetch_add(of, Ordering::Relaxed);
    };
    let part = |thread: usize| {
        if apart { (nr_pages / threads as u64, thread as u64 * (nr_pages / threads as u64)) } else { (nr_pages, 0) }
    };
    let children: Vec<_> = if processes { (1..threads).collect() } else { Vec::new() };
    // Children start touching together.
    let (ready_out, ready_in) = nix::unistd::pipe().unwrap();
    let pids: Vec<_> = children
        .iter()
        .map(|&thread| {
            fork_child(|| {
                let mut byte = [0];
                nix::unistd::read(&ready_out, &mut byte).unwrap();
                let (of, first) = part(thread);
                walk(thread, of, first);
            })
        })
        .collect();
    let start = Instant::now();
    nix::unistd::write(&ready_in, &[0; 8]).unwrap();
    if processes {
        let (of, first) = part(0);
        walk(0, of, first);
        pids.into_iter().for_each(reap_ok);
    } else {
        std::thread::scope(|scope| {
            for thread in 0..threads {
                let walk = &walk;
                let (of, first) = part(thread);
                scope.spawn(move || walk(thread, of, first));
            }
        });
    }
    nr_pages as f64 / start.elapsed().as_secs_f64()
}

/// Prints how much faster two threads, or two processes, are than one. Not a test: it needs a quiet machine.
#[test]
#[ignore = "it measures"]
fn two_are_faster_than_one() {
    alone_for(Duration::from_secs(140), "two_are_faster_than_one", || {
        for around in [1, 16] {
            for pinned in [true, false] {
                let nr_pages = if around == 1 { 20_000 } else { 60_000 };
                let median = |threads, processes, apart, handlers| {
                    let mut runs: Vec<f64> =
                        (0..3).map(|_| speed(threads, processes, pinned, apart, nr_pages, around, handlers)).collect();
                    runs.sort_by(f64::total_cmp);
                    runs[1]
                };
                let one = median(1, false, true, false);
                let line = [(false, true), (false, false), (true, true)].map(|(processes, apart)| {
                    let [alone, crew] = [false, true].map(|handlers| median(2, processes, apart, handlers) / one);
                    format!("{alone:.2} -> {crew:.2}")
                });
                support::tell(&format!(
                    "around {around}, pinned {pinned}, {:.2} us a page: two apart, together, processes: {}",
                    1e6 / one,
                    line.join(", ")
                ));
            }
        }
    });
}
