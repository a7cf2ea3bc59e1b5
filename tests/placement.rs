//! Where the fault-handling thread runs, and that it does not stay in anybody's shadow.

mod support;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use kiomap::{AttachOptions, EngineBuilder, Error, Kiobuf, Placement, Region, page_size};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::{Pid, Uid, setresgid, setresuid};
use support::{alone, engine_builder, eventually};

/// The id of the fault-handling thread of the one engine of this process.
fn handler() -> Pid {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let named = |task: &std::fs::DirEntry| {
        std::fs::read_to_string(task.path().join("comm")).is_ok_and(|name| name == "kiomap-fault\n")
    };
    let task = tasks.map(Result::unwrap).find(named).expect("there is a fault-handling thread");
    Pid::from_raw(task.file_name().to_str().unwrap().parse().unwrap())
}

fn policy(thread: Pid) -> i32 {
    // SAFETY: a question about a thread.
    unsafe { libc::sched_getscheduler(thread.as_raw()) }
}

fn me() -> Pid {
    Pid::from_raw(0)
}

fn allowed(set: &CpuSet) -> Vec<usize> {
    (0..CpuSet::count()).filter(|&cpu| set.is_set(cpu).unwrap()).collect()
}

fn only(cpu: usize) -> CpuSet {
    let mut set = CpuSet::new();
    set.set(cpu).unwrap();
    set
}

/// A long list of one byte, to fault in page by page.
fn long_region(engine: &kiomap::Engine) -> Region {
    let mut list = Kiobuf::new();
    list.map_bytes(vec![7; page_size() << 14]).unwrap();
    engine.vmap(&list).unwrap().attach(&AttachOptions::new()).unwrap()
}

/// Touches missing pages without a pause until `done`; answers how many.
fn fault_until(region: &Region, mut done: impl FnMut() -> bool) -> usize {
    for page in 0..region.len_bytes() / page_size() {
        let mut byte = [0];
        region.read_at(page * page_size(), &mut byte).unwrap();
        assert_eq!(byte, [7]);
        if done() {
            return page + 1;
        }
    }
    region.len_bytes() / page_size()
}

fn following() -> EngineBuilder {
    engine_builder().handlers(1).fault_around_pages(1).placement(Placement::Follow)
}

fn may_follow() -> bool {
    Uid::effective().is_root()
}

/// A thread that faults without a pause has the handler behind it, on its processor; when it stops, the handler is a
/// thread like any other again, wherever it may run.
#[test]
fn the_handler_follows_a_thread_that_faults_without_a_pause() {
    if !may_follow() {
        skip!("leaving SCHED_IDLE needs CAP_SYS_NICE");
    }
    alone("the_handler_follows_a_thread_that_faults_without_a_pause", || {
        let engine = following().build().unwrap();
        let region = long_region(&engine);
        let (handler, before) = (handler(), sched_getaffinity(me()).unwrap());
        for cpu in allowed(&before) {
            sched_setaffinity(me(), &only(cpu)).unwrap();
            let mut followed = false;
            // Read by pread: it faults in the kernel, which is a fault of this thread too.
            fault_until(&region, || {
                followed = policy(handler) == libc::SCHED_IDLE && sched_getaffinity(handler).unwrap() == only(cpu);
                followed
            });
            assert!(followed, "on processor {cpu}");
            // Nothing is to be seen of it afterwards.
            eventually("the handler is a thread like any other", || {
                policy(handler) == libc::SCHED_OTHER && sched_getaffinity(handler).unwrap() == before
            });
            unmap_and_map_again(&region);
        }
    });
}

/// Makes every page of the region missing again.
fn unmap_and_map_again(region: &Region) {
    // SAFETY: the pages are asked for again when they are touched.
    let outcome = unsafe { libc::madvise(region.as_ptr().cast(), region.len_bytes(), libc::MADV_REMOVE) };
    assert_eq!(outcome, 0);
}

/// The thread that was followed goes on computing, on the only processor where the handler could run: a handler that
/// stayed behind it would be starved, and with it everybody who waits for an answer.
#[test]
fn a_thread_that_computes_does_not_starve_the_handler_behind_it() {
    if !may_follow() {
        skip!("leaving SCHED_IDLE needs CAP_SYS_NICE");
    }
    alone("a_thread_that_computes_does_not_starve_the_handler_behind_it", || {
        let engine = following().build().unwrap();
        let region = long_region(&engine);
        let (handler, before) = (handler(), sched_getaffinity(me()).unwrap());
        let over = AtomicBool::new(false);
        // Every processor is wanted by somebody, all the time.
        std::thread::scope(|scope| {
            for cpu in allowed(&before) {
                let over = &over;
                scope.spawn(move || {
                    sched_setaffinity(me(), &only(cpu)).unwrap();
                    while !over.load(Ordering::Relaxed) {
                        std::hint::spin_loop();
                    }
                });
            }
            let mut faulted = 0;
            for _ in 0..50 {
                faulted += fault_until(&region, || policy(handler) == libc::SCHED_IDLE);
                let start = Instant::now();
                while start.elapsed() < Duration::from_millis(3) {
                    std::hint::spin_loop();
                }
                // An answer to a command, and to an unmap, is an answer of the handler.
                engine.settle().unwrap();
                if faulted * page_size() >= region.len_bytes() {
                    break;
                }
                unmap_and_map_again(&region);
            }
            over.store(true, Ordering::Relaxed);
        });
        eventually("the handler is a thread like any other", || policy(handler) == libc::SCHED_OTHER);
        drop(region);
    });
}

/// A process that gave its privileges up could not take the handler out of SCHED_IDLE: it never goes there.
#[test]
fn a_process_without_privileges_is_not_followed() {
    alone("a_process_without_privileges_is_not_followed", || {
        let engine = following().build().unwrap();
        let region = long_region(&engine);
        let handler = handler();
        if Uid::effective().is_root() {
            let nobody = 65534;
            setresgid(nobody.into(), nobody.into(), nobody.into()).unwrap();
            setresuid(nobody.into(), nobody.into(), nobody.into()).unwrap();
        }
        let mut faults = 0;
        fault_until(&region, || {
            faults += 1;
            assert_eq!(policy(handler), libc::SCHED_OTHER);
            faults == 4096
        });
    });
}

#[test]
fn the_handler_stays_on_the_processors_that_were_named() {
    alone("the_handler_stays_on_the_processors_that_were_named", || {
        let before = sched_getaffinity(me()).unwrap();
        for cpu in allowed(&before) {
            let engine = engine_builder().placement(Placement::Pinned(vec![cpu])).build().unwrap();
            let region = long_region(&engine);
            fault_until(&region, || false);
            assert_eq!(sched_getaffinity(handler()).unwrap(), only(cpu));
        }
        for placement in [Placement::Floating, Placement::Spin(Duration::from_micros(50))] {
            let engine = engine_builder().fault_around_pages(1).placement(placement).build().unwrap();
            let region = long_region(&engine);
            fault_until(&region, || {
                assert_eq!((policy(handler()), sched_getaffinity(handler()).unwrap()), (libc::SCHED_OTHER, before));
                false
            });
        }
    });
}

#[test]
fn a_place_that_is_none_is_refused() {
    for placement in
        [Placement::Pinned(vec![]), Placement::Pinned(vec![0, usize::MAX]), Placement::Spin(Duration::from_secs(2))]
    {
        let refused = engine_builder().placement(placement).build().unwrap_err();
        assert!(matches!(refused, Error::Invalid { .. }), "{refused}");
    }
}
