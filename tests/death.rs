//! Ends of processes and of the engine: by exit, exec, SIGKILL and shutdown, at the worst moment; the count stays true,
//! nothing is leaked, and nobody reads a zero page or sleeps for ever.

mod support;

use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use kiomap::{AttachOptions, Shutdown, Vmap, page_size};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::WaitStatus;
use support::scene::{GatedSource, Rng, Told, areas_of, at, child, kill_and_reap, settled, sourced_pages};
use support::truth::assert_count;
use support::{alone, engine_builder, eventually, mark, open_descriptors, pages, reap, reap_ok, threads, touch};

/// How soon a fault of a process whose engine has gone must be answered.
const PROMPT: Duration = Duration::from_secs(1);

/// A touch that must be refused by SIGBUS, promptly: neither a zero page nor a sleep.
#[track_caller]
fn refused_promptly(addr: *const u8) {
    let start = Instant::now();
    let refused = touch::read(addr).unwrap_err();
    assert!(refused.is_sigbus_at(addr as usize), "{refused:?}");
    assert!(start.elapsed() < PROMPT, "{:?}", start.elapsed());
}

/// The threads of this process, but for workers, which come when they are needed.
fn lasting_threads() -> usize {
    threads().into_iter().filter(|name| name != "kiomap-worker").count()
}

/// T50, T71: children killed a thousand times, before, in and after their faults, are counted out each time; the callback
/// comes exactly when the last area is gone; descriptors, threads and memory are as before.
#[test]
fn children_killed_in_the_middle_of_their_faults_leave_every_count_right() {
    alone("children_killed_in_the_middle_of_their_faults_leave_every_count_right", || {
        const PAGES: u64 = 256;
        let engine = engine_builder().fault_around_pages(2).build().unwrap();
        let (fds, nr_threads) = (open_descriptors(), lasting_threads());
        let mut rng = Rng::new(20_000);
        let derefs = Arc::new(AtomicUsize::new(0));
        let mut list = pages(PAGES);
        list.expand(&sourced_pages(PAGES)).unwrap();
        let mark_of = |page: u64| mark(page % PAGES);
        for batch in 0..20 {
            let counted = Arc::clone(&derefs);
            let count = move |_: &Vmap| {
                counted.fetch_add(1, Ordering::SeqCst);
            };
            let vmap = engine.vmap_builder(&list).on_deref(count).build().unwrap();
            let region = vmap.attach(&AttachOptions::new()).unwrap();
            for _ in 0..50 {
                let seed = rng.next();
                let pid = child(|| {
                    std::thread::scope(|scope| {
                        for thread in 0..2 {
                            let region = &region;
                            scope.spawn(move || {
                                let mut rng = Rng::new(seed + thread);
                                loop {
                                    let page = rng.below(2 * PAGES);
                                    assert_eq!(touch::read(at(region, page)), Ok(mark_of(page)));
                                }
                            });
                        }
                    });
                });
                rng.dawdle(400_000);
                kill_and_reap(pid);
            }
            assert_eq!(derefs.load(Ordering::SeqCst), batch, "the callback came while areas were attached");
            settled(&engine, &vmap, 1);
            for page in 0..2 * PAGES {
                assert_eq!(touch::read(at(&region, page)), Ok(mark_of(page)));
            }
            drop(region);
            settled(&engine, &vmap, 0);
            eventually("the callback has run", || derefs.load(Ordering::SeqCst) == batch + 1);
        }
        eventually("descriptors are back", || open_descriptors() == fds);
        assert_eq!(lasting_threads(), nr_threads);
        assert_eq!(engine.stats().panics, 0);
    });
}

/// T50: a child that execs, exits, or is killed has no area from then on, whenever that happens.
#[test]
fn every_way_to_end_a_process_counts_it_out() {
    alone("every_way_to_end_a_process_counts_it_out", || {
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        let gated = GatedSource::new();
        let vmap = engine.vmap(&gated.list(64)).unwrap();
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        let second = vmap.attach(&AttachOptions::new().pgoff(2)).unwrap();
        let told = Told::new();
        for round in 0..5 {
            // Before its faults.
            let pid = child(|| {
                told.tell(1);
                std::thread::park();
            });
            told.wait_for(1);
            assert_eq!((vmap.refcount().unwrap(), areas_of(pid)), (4, 2));
            kill_and_reap(pid);
            settled(&engine, &vmap, 2);
            // Blocked in one: the source has it.
            gated.shut();
            let pid = child(|| assert!(touch::read(at(&region, 10 + round)).is_err(), "it is killed before"));
            gated.wait_for_held(1);
            assert_count(&engine, &vmap, 4);
            kill_and_reap(pid);
            settled(&engine, &vmap, 2);
            gated.open();
            // After them, by exit and by exec.
            let pid = child(|| assert_eq!(touch::read(at(&region, 20 + round)), Ok(mark(20 + round))));
            reap_ok(pid);
            settled(&engine, &vmap, 2);
            let pid = child(|| {
                assert_eq!(touch::read(at(&second, 30 + round)), Ok(mark(32 + round)));
                panic!("{}", Command::new("sleep").arg("50").exec());
            });
            settled(&engine, &vmap, 2);
            assert_eq!(areas_of(pid), 0);
            kill_and_reap(pid);
            // What the killed one had asked for is there for others, or asked for again.
            assert_eq!(touch::read(at(&region, 10 + round)), Ok(mark(10 + round)));
        }
    });
}

/// T50: an exec with threads blocked in faults counts the process out too, and nothing waits for them.
#[test]
fn an_exec_while_other_threads_are_blocked_in_faults_goes_through() {
    alone("an_exec_while_other_threads_are_blocked_in_faults_goes_through", || {
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        let gated = GatedSource::new();
        let vmap = engine.vmap(&gated.list(8)).unwrap();
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        let address = region.as_ptr() as usize;
        let go = Told::new();
        let pid = child(|| {
            for page in [0, 2, 4] {
                std::thread::spawn(move || touch::read((address + page * page_size()) as *const u8));
            }
            go.wait_for(1);
            panic!("{}", Command::new("true").exec());
        });
        gated.wait_for_held(3);
        go.tell(1);
        reap_ok(pid);
        settled(&engine, &vmap, 1);
        gated.open();
        assert_eq!(touch::read(at(&region, 0)), Ok(mark(0)));
    });
}

/// How an owner goes while its child lives.
#[derive(Clone, Copy, PartialEq)]
enum End {
    Shutdown,
    Drop,
    Exit,
    Kill,
}

/// Builds owner and child; when the engine has gone by `end`, the child finds: resident pages stay, and a thread that is
/// blocked in a fault, as every later touch of a missing page, is SIGBUS within a second.
fn child_fails_closed_after(end: End) {
    let [started, ended, gone, done, bye] = std::array::from_fn(|_| Told::new());
    let owner = child(|| {
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        let gated = GatedSource::new();
        let slow = engine.vmap(&gated.list(4)).unwrap().attach(&AttachOptions::new()).unwrap();
        let vmap = engine.vmap(&pages(16)).unwrap();
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        child(|| {
            assert_eq!(touch::read(at(&region, 1)), Ok(mark(1)));
            assert_eq!(touch::write(at(&region, 2), 99), Ok(()));
            let blocked = at(&slow, 0) as usize;
            let thread = std::thread::spawn(move || touch::read(blocked as *const u8));
            started.tell(1);
            gone.wait_for(2);
            let start = Instant::now();
            assert!(thread.join().unwrap().unwrap_err().is_sigbus_at(blocked));
            assert!(start.elapsed() < PROMPT, "{:?}", start.elapsed());
            for page in [0, 3, 15, 0] {
                refused_promptly(at(&region, page));
            }
            assert_eq!(touch::read(at(&region, 1)), Ok(mark(1)));
            assert_eq!(touch::read(at(&region, 2)), Ok(99));
            assert_eq!(vmap.attach(&AttachOptions::new()).unwrap_err().errno(), Errno::ESHUTDOWN);
            assert_eq!(vmap.refcount().unwrap_err().errno(), Errno::ESHUTDOWN);
            // A child of it has nothing, rather than something wrong.
            reap_ok(child(|| assert!(touch::read(at(&region, 5)).is_err())));
            // SAFETY: nothing refers to the pages.
            assert_eq!(unsafe { libc::munmap(at(&region, 8).cast(), 2 * page_size()) }, 0);
            assert!(touch::read(at(&region, 8)).unwrap_err().is_sigsegv());
            // SAFETY: a copy that is read bitwise stands for the value that this process does not drop.
            drop(unsafe { std::ptr::read(&region) });
            done.tell(3);
        });
        started.wait_for(1);
        gated.wait_for_held(1);
        match end {
            End::Shutdown => engine.shutdown(Shutdown::Poison).unwrap(),
            End::Drop => {
                // The threads that serve this process's own regions live on; the children are let go.
                drop(engine);
            }
            // SAFETY: ends the process without unwinding, in the middle of what its threads do.
            End::Exit => unsafe { libc::_exit(0) },
            End::Kill => {
                ended.tell(4);
                std::thread::park();
            }
        }
        ended.tell(4);
        bye.wait_for(5);
        gated.open();
    });
    let reaped = match end {
        End::Kill => {
            ended.wait_for(4);
            kill_and_reap(owner);
            true
        }
        End::Exit => {
            reap_ok(owner);
            true
        }
        End::Shutdown | End::Drop => {
            ended.wait_for(4);
            false
        }
    };
    gone.tell(2);
    done.wait_for(3);
    if !reaped {
        bye.tell(5);
        reap_ok(owner);
    }
}

/// T55: an orderly shutdown while a forked child lives.
#[test]
fn a_child_fails_closed_when_the_engine_is_shut_down() {
    alone("a_child_fails_closed_when_the_engine_is_shut_down", || child_fails_closed_after(End::Shutdown));
}

/// T55: the engine's handle is dropped while a forked child lives.
#[test]
fn a_child_fails_closed_when_the_engine_is_dropped() {
    alone("a_child_fails_closed_when_the_engine_is_dropped", || child_fails_closed_after(End::Drop));
}

/// T54: the creator exits first.
#[test]
fn a_child_fails_closed_when_the_owner_exits() {
    alone("a_child_fails_closed_when_the_owner_exits", || child_fails_closed_after(End::Exit));
}

/// T54: the creator is killed.
#[test]
fn a_child_fails_closed_when_the_owner_is_killed() {
    alone("a_child_fails_closed_when_the_owner_is_killed", || child_fails_closed_after(End::Kill));
}

/// T54: the owner is killed in the middle of serving: every touch of a child is right or refused, and comes back.
#[test]
fn an_owner_killed_in_the_middle_of_serving_leaves_right_bytes_or_sigbus() {
    alone("an_owner_killed_in_the_middle_of_serving_leaves_right_bytes_or_sigbus", || {
        const PAGES: u64 = 1024;
        let mut rng = Rng::new(3);
        for round in 0..60 {
            let (started, outcome) = (Told::new(), Told::new());
            let owner = child(|| {
                let engine = engine_builder().fault_around_pages(1 + round % 3).build().unwrap();
                let list = if round % 2 == 0 { pages(PAGES) } else { sourced_pages(PAGES) };
                let vmap = engine.vmap(&list).unwrap();
                let region = vmap.attach(&AttachOptions::new()).unwrap();
                for generation in 0..2 {
                    child(|| {
                        // The grandchild too is served by the one who dies.
                        let faulter = || {
                            let mut order: Vec<u64> = (0..PAGES).collect();
                            Rng::new(round as u64).shuffle(&mut order);
                            for page in order {
                                match touch::read(at(&region, page)) {
                                    Ok(byte) => assert_eq!(byte, mark(page)),
                                    // Forked when the owner was dead already.
                                    Err(refused) if region.check().is_err() => assert!(refused.is_sigsegv()),
                                    Err(refused) => assert!(refused.is_sigbus_at(at(&region, page) as usize)),
                                }
                            }
                            outcome.tell(1);
                        };
                        started.tell(1);
                        if generation == 1 {
                            child(faulter);
                        } else {
                            faulter();
                        }
                    });
                }
                std::thread::park();
            });
            (0..2).for_each(|_| started.wait_for(1));
            rng.dawdle(300_000);
            kill_and_reap(owner);
            (0..2).for_each(|_| outcome.wait_for(1));
        }
    });
}

/// T73: a shutdown with threads blocked in faults answers them by SIGBUS, and later touches likewise: never by zeros.
#[test]
fn a_shutdown_answers_blocked_faults_by_sigbus() {
    alone("a_shutdown_answers_blocked_faults_by_sigbus", || {
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        let gated = GatedSource::new();
        let vmap = engine.vmap(&gated.list(48)).unwrap();
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        std::thread::scope(|scope| {
            // More than are read at once, and none next to another: some wait.
            let faulters: Vec<_> = (0..16)
                .map(|page| {
                    let addr = at(&region, 2 * page) as usize;
                    scope.spawn(move || touch::read(addr as *const u8).is_err_and(|refused| refused.is_sigbus_at(addr)))
                })
                .collect();
            gated.wait_for_held(4);
            eventually("all fault", || engine.stats().faults >= 16);
            engine.shutdown(Shutdown::Poison).unwrap();
            for page in 32..48 {
                refused_promptly(at(&region, page));
            }
            for faulter in faulters {
                assert!(faulter.join().unwrap());
            }
            // Only now: a source that never returns must not keep anyone waiting.
            gated.open();
        });
        assert_eq!(engine.shutdown(Shutdown::Poison).unwrap_err().errno(), Errno::ESHUTDOWN);
    });
}

/// T73: a shutdown that fills gives threads that fault meanwhile the bytes of the list.
#[test]
fn a_shutdown_that_fills_refuses_no_page_that_can_be_had() {
    alone("a_shutdown_that_fills_refuses_no_page_that_can_be_had", || {
        const PAGES: u64 = 256;
        for round in 0..20 {
            let engine = engine_builder().fault_around_pages(1).build().unwrap();
            let list = if round % 2 == 0 { pages(PAGES) } else { sourced_pages(PAGES) };
            let vmap = engine.vmap(&list).unwrap();
            let region = vmap.attach(&AttachOptions::new()).unwrap();
            std::thread::scope(|scope| {
                for seed in 0..3 {
                    let region = &region;
                    scope.spawn(move || {
                        let mut order: Vec<u64> = (0..PAGES).collect();
                        Rng::new(round * 3 + seed).shuffle(&mut order);
                        order.iter().for_each(|&page| assert_eq!(touch::read(at(region, page)), Ok(mark(page))));
                    });
                }
                engine.shutdown(Shutdown::Fill).unwrap();
                (0..PAGES).for_each(|page| assert_eq!(touch::read(at(&region, page)), Ok(mark(page))));
            });
        }
    });
}

/// T81: abort() with a core to be written and pages missing ends within a second: the kernel's dumper is not made to wait.
#[test]
fn an_abort_with_missing_pages_and_a_core_to_write_ends() {
    alone("an_abort_with_missing_pages_and_a_core_to_write_ends", || {
        use nix::sys::resource::{Resource, getrlimit, setrlimit};
        let dir = tempfile::tempdir().unwrap();
        std::env::set_current_dir(dir.path()).unwrap();
        let (_, hard) = getrlimit(Resource::RLIMIT_CORE).unwrap();
        setrlimit(Resource::RLIMIT_CORE, hard, hard).unwrap();
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        let gated = GatedSource::new();
        let vmap = engine.vmap(&gated.list(64)).unwrap();
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        // A child, whose faults another process serves; and an owner, whose threads die with it.
        let abort = |owner: bool| {
            let told = Told::new();
            let pid = child(|| {
                let own = owner.then(|| {
                    let engine = engine_builder().build().unwrap();
                    let region = engine.vmap(&gated.list(64)).unwrap().attach(&AttachOptions::new()).unwrap();
                    (engine, region)
                });
                let addr = at(own.as_ref().map_or(&region, |(_, region)| region), 3) as usize;
                std::thread::spawn(move || touch::read(addr as *const u8));
                if let Some((engine, _)) = &own {
                    eventually("the thread faults", || engine.stats().faults > 0);
                }
                told.tell(1);
                std::process::abort();
            });
            told.wait_for(1);
            let start = Instant::now();
            let status = reap(pid);
            assert!(matches!(status, WaitStatus::Signaled(_, Signal::SIGABRT, _)), "{status:?}");
            assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
        };
        abort(false);
        settled(&engine, &vmap, 1);
        abort(true);
        gated.open();
        std::env::set_current_dir("/").unwrap();
    });
}

/// T82: exit() ends a process that has a thread blocked in a fault: the engine's own, and a forked one.
#[test]
fn an_exit_with_a_thread_blocked_in_a_fault_ends_the_process() {
    alone("an_exit_with_a_thread_blocked_in_a_fault_ends_the_process", || {
        reap_ok(child(|| {
            let engine = engine_builder().fault_around_pages(1).build().unwrap();
            let gated = GatedSource::new();
            let vmap = engine.vmap(&gated.list(8)).unwrap();
            let region = vmap.attach(&AttachOptions::new()).unwrap();
            let block = |page| {
                let addr = at(&region, page) as usize;
                std::thread::spawn(move || touch::read(addr as *const u8));
            };
            let pid = child(|| {
                block(1);
                eventually("the fault is served", || vmap.refcount().unwrap() == 2);
                std::process::exit(0);
            });
            reap_ok(pid);
            block(2);
            gated.wait_for_held(1);
            std::process::exit(0);
        }));
    });
}

/// A SIGSTOPped child, which can neither answer nor be answered, holds nobody up.
#[test]
fn a_stopped_child_holds_nobody_up() {
    alone("a_stopped_child_holds_nobody_up", || {
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        let vmap = engine.vmap(&pages(64)).unwrap();
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        let told = Told::new();
        let stopped = child(|| {
            told.tell(1);
            loop {
                (0..64).for_each(|page| assert_eq!(touch::read(at(&region, page)), Ok(mark(page))));
            }
        });
        told.wait_for(1);
        kill(stopped, Signal::SIGSTOP).unwrap();
        for page in 0..64 {
            assert_eq!(touch::read(at(&region, page)), Ok(mark(page)));
        }
        reap_ok(child(|| assert_eq!(touch::read(at(&region, 9)), Ok(mark(9)))));
        engine.settle().unwrap();
        drop(vmap.attach(&AttachOptions::new()).unwrap());
        kill_and_reap(stopped);
        settled(&engine, &vmap, 1);
    });
}

/// A child that dies with an attach of its own under way, or with detaches, leaves a true count.
#[test]
fn children_killed_in_attaches_and_detaches_leave_every_count_right() {
    alone("children_killed_in_attaches_and_detaches_leave_every_count_right", || {
        let engine = engine_builder().build().unwrap();
        let vmap = engine.vmap(&pages(16)).unwrap();
        let mut rng = Rng::new(5);
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        let fds = open_descriptors();
        for _ in 0..200 {
            let seed = rng.next();
            let pid = child(|| {
                let mut rng = Rng::new(seed);
                let mut held = Vec::new();
                loop {
                    if held.len() < 4 || rng.below(2) == 0 {
                        held.push(vmap.attach(&AttachOptions::new().pgoff(rng.below(16))).unwrap());
                    } else {
                        held.swap_remove(rng.below(held.len() as u64) as usize);
                    }
                    if rng.below(4) == 0 {
                        // A grandchild that dies with it or after it.
                        child(|| {
                            let _ = touch::read(at(&region, rng.below(16)));
                        });
                    }
                }
            });
            rng.dawdle(2_000_000);
            kill_and_reap(pid);
        }
        settled(&engine, &vmap, 1);
        eventually("descriptors are back", || open_descriptors() == fds);
    });
}

/// T113-like at the end: the exit status of a process is its own, whatever the engine's threads were doing.
#[test]
fn an_exit_status_is_not_changed_by_the_engine() {
    alone("an_exit_status_is_not_changed_by_the_engine", || {
        for code in [0, 7, 101] {
            let pid = child(|| {
                let engine = engine_builder().build().unwrap();
                let region = engine.vmap(&sourced_pages(8)).unwrap().attach(&AttachOptions::new()).unwrap();
                assert_eq!(touch::read(at(&region, 3)), Ok(mark(3)));
                std::process::exit(code);
            });
            assert_eq!(reap(pid), WaitStatus::Exited(pid, code));
        }
        let status = Command::new("sh").args(["-c", "kill -9 $$"]).status().unwrap();
        assert_eq!(status.signal(), Some(9));
    });
}

/// T55: a process that was cloned without the fork handlers, and so holds copies of every descriptor, does not hide a
/// shutdown from the engine's children.
#[test]
fn a_raw_clone_that_lives_on_does_not_hide_a_shutdown() {
    alone("a_raw_clone_that_lives_on_does_not_hide_a_shutdown", || {
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        let vmap = engine.vmap(&pages(8)).unwrap();
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        let (started, gone) = (Told::new(), Told::new());
        let pid = child(|| {
            assert_eq!(touch::read(at(&region, 1)), Ok(mark(1)));
            started.tell(1);
            gone.wait_for(2);
            refused_promptly(at(&region, 2));
            assert_eq!(touch::read(at(&region, 1)), Ok(mark(1)));
        });
        started.wait_for(1);
        // SAFETY: as a fork without handlers; the child only waits, by a system call.
        let clone = unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) } as i32;
        if clone == 0 {
            loop {
                // SAFETY: waits for the signal that ends it.
                unsafe { libc::pause() };
            }
        }
        engine.shutdown(Shutdown::Poison).unwrap();
        gone.tell(2);
        reap_ok(pid);
        kill_and_reap(nix::unistd::Pid::from_raw(clone));
    });
}
