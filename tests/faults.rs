//! Faults under pressure: many threads on one page, signals, slow sources, and what the engine's threads may drop.

mod support;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use kiomap::{AttachOptions, Engine, Kiobuf, PageSource, Region, Revoke, Shutdown, page_size};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use support::raw::FAR;
use support::scene::{GatedSource, Rng, Told, at, child, kill_and_reap, sourced_pages};
use support::truth::assert_count;
use support::{alone, engine_builder, eventually, mark, pages, touch};

/// An engine that brings one page for one fault.
fn single() -> Engine {
    engine_builder().fault_around_pages(1).build().unwrap()
}

/// T63: 32 threads on one page of a slow source: it is read once, and all of them see it.
#[test]
fn many_threads_on_one_page_ask_its_source_once() {
    alone("many_threads_on_one_page_ask_its_source_once", || {
        let engine = single();
        let gated = GatedSource::new();
        let vmap = engine.vmap(&gated.list(4)).unwrap();
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        for page in 0..4 {
            gated.shut();
            std::thread::scope(|scope| {
                for _ in 0..32 {
                    let region = &region;
                    scope.spawn(move || assert_eq!(touch::read(at(region, page)), Ok(mark(page))));
                }
                eventually("all have faulted", || engine.stats().faults >= 32 * (page + 1));
                gated.wait_for_held(1);
                gated.open();
            });
            assert_eq!(gated.calls() as u64, page + 1);
        }
        engine.settle().unwrap();
        assert_eq!(engine.stats().pages_copied, 4);
    });
}

/// T64: pages that the owner makes present by writing, while threads fault on them, wake those threads: none sleeps on,
/// and what was written is never overwritten by the list's bytes.
#[test]
fn pages_filled_from_the_side_wake_the_threads_that_wait_for_them() {
    alone("pages_filled_from_the_side_wake_the_threads_that_wait_for_them", || {
        const PAGES: u64 = 2000;
        let engine = single();
        for list in [pages(PAGES), sourced_pages(PAGES)] {
            let vmap = engine.vmap(&list).unwrap();
            let region = vmap.attach(&AttachOptions::new()).unwrap();
            let next = AtomicUsize::new(0);
            std::thread::scope(|scope| {
                let (vmap, next) = (&vmap, &next);
                scope.spawn(move || {
                    for page in 0..PAGES {
                        // Close behind or before the readers, whichever is faster.
                        while next.load(Ordering::Acquire) as u64 + 2 < page {
                            std::hint::spin_loop();
                        }
                        vmap.write_at(page * page_size() as u64 + 8, &[255]).unwrap();
                    }
                });
                for thread in 0..2 {
                    let region = &region;
                    scope.spawn(move || {
                        for page in 0..PAGES {
                            assert_eq!(touch::read(at(region, page)), Ok(mark(page)));
                            if thread == 0 {
                                next.store(page as usize, Ordering::Release);
                            }
                        }
                    });
                }
            });
            for page in 0..PAGES {
                assert_eq!(touch::read(at(&region, page).wrapping_add(8)), Ok(255));
            }
        }
    });
}

static HANDLED: AtomicUsize = AtomicUsize::new(0);

extern "C" fn count_signal(_: libc::c_int) {
    HANDLED.fetch_add(1, Ordering::Relaxed);
}

fn count_signals(signal: Signal) {
    let action = SigAction::new(SigHandler::Handler(count_signal), SaFlags::empty(), SigSet::empty());
    // SAFETY: the handler adds to an atomic.
    unsafe { sigaction(signal, &action) }.unwrap();
}

/// T66: a thread that is blocked in a fault runs its signal handlers; the surplus messages of its repeated fault are
/// answered by one read and one fill.
#[test]
fn a_signal_during_a_blocked_fault_is_handled_and_the_page_filled_once() {
    alone("a_signal_during_a_blocked_fault_is_handled_and_the_page_filled_once", || {
        use std::os::unix::thread::JoinHandleExt;
        count_signals(Signal::SIGUSR1);
        let engine = single();
        let gated = GatedSource::new();
        let region = engine.vmap(&gated.list(2)).unwrap().attach(&AttachOptions::new()).unwrap();
        let addr = at(&region, 1) as usize;
        let thread = std::thread::spawn(move || touch::read(addr as *const u8));
        gated.wait_for_held(1);
        for n in 1..=20 {
            // SAFETY: the thread has not been joined.
            assert_eq!(unsafe { libc::pthread_kill(thread.as_pthread_t(), libc::SIGUSR1) }, 0);
            eventually("the handler has run", || HANDLED.load(Ordering::Relaxed) == n);
        }
        eventually("the fault is repeated", || engine.stats().faults >= 2);
        gated.open();
        assert_eq!(thread.join().unwrap(), Ok(mark(1)));
        // The counters are written after the thread is awake.
        engine.settle().unwrap();
        assert_eq!((gated.calls(), engine.stats().pages_copied), (1, 1));
    });
}

/// T67: a timer that fires every 100 µs, without SA_RESTART, among faults of every kind: all of them come back right.
#[test]
fn a_storm_of_timer_signals_hinders_no_fault() {
    alone("a_storm_of_timer_signals_hinders_no_fault", || {
        const PAGES: u64 = 600;
        count_signals(Signal::SIGALRM);
        let engine = single();
        let mut list = pages(PAGES);
        list.expand(&sourced_pages(PAGES)).unwrap();
        let vmap = engine.vmap(&list).unwrap();
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        let period = libc::timeval { tv_sec: 0, tv_usec: 100 };
        let storm = libc::itimerval { it_interval: period, it_value: period };
        // SAFETY: the argument is valid; the old value is not asked for.
        assert_eq!(unsafe { libc::setitimer(libc::ITIMER_REAL, &storm, std::ptr::null_mut()) }, 0);
        std::thread::scope(|scope| {
            for seed in 0..3 {
                let region = &region;
                scope.spawn(move || {
                    let mut order: Vec<u64> = (0..2 * PAGES).collect();
                    Rng::new(seed).shuffle(&mut order);
                    for page in order {
                        assert_eq!(touch::read(at(region, page)), Ok(mark(page % PAGES)));
                    }
                });
            }
            for _ in 0..200 {
                drop(vmap.attach(&AttachOptions::new()).unwrap());
            }
        });
        // SAFETY: as above.
        unsafe { libc::setitimer(libc::ITIMER_REAL, &std::mem::zeroed(), std::ptr::null_mut()) };
        assert!(HANDLED.load(Ordering::Relaxed) > 0);
        engine.settle().unwrap();
        assert_count(&engine, &vmap, 1);
    });
}

/// T85: more messages at once than one read returns: all are answered.
#[test]
fn a_burst_of_more_faults_than_one_read_returns_is_answered() {
    alone("a_burst_of_more_faults_than_one_read_returns_is_answered", || {
        const THREADS: u64 = 200;
        let engine = single();
        let vmap = engine.vmap(&pages(THREADS)).unwrap();
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        for _ in 0..5 {
            vmap.revoke(Revoke::Hard).unwrap();
            let fresh = engine.vmap(&pages(THREADS)).unwrap();
            let other = fresh.attach(&AttachOptions::new()).unwrap();
            let barrier = std::sync::Barrier::new(THREADS as usize);
            std::thread::scope(|scope| {
                for page in 0..THREADS {
                    let (barrier, region, other) = (&barrier, &region, &other);
                    scope.spawn(move || {
                        barrier.wait();
                        assert_eq!(touch::read(at(other, page)), Ok(mark(page)));
                        let gone = at(region, page);
                        assert!(touch::read(gone).unwrap_err().is_sigbus_at(gone as usize));
                    });
                }
            });
        }
        assert!(engine.stats().faults >= 5 * THREADS);
    });
}

/// More slow faults than workers, buffers and places in the queue: each comes back, with its bytes.
#[test]
fn more_slow_faults_than_workers_and_buffers_all_come_back() {
    alone("more_slow_faults_than_workers_and_buffers_all_come_back", || {
        const THREADS: u64 = 64;
        let engine = engine_builder().fault_around_pages(4).workers(2).build().unwrap();
        let gated = GatedSource::new();
        let vmap = engine.vmap(&gated.list(4 * THREADS)).unwrap();
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        std::thread::scope(|scope| {
            let region = &region;
            // Faults that find no worker at all are merged into one read, as far as they lie side by side.
            scope.spawn(move || assert_eq!(touch::read(at(region, 0)), Ok(mark(0))));
            gated.wait_for_held(1);
            for thread in 0..THREADS {
                scope.spawn(move || {
                    // Neighbours of one block in different threads, and blocks of their own.
                    for page in [thread, 4 * thread + thread % 4] {
                        assert_eq!(touch::read(at(region, page)), Ok(mark(page)));
                    }
                });
            }
            gated.wait_for_held(2);
            // Memory is served while every worker is busy.
            let quick = engine.vmap(&pages(64)).unwrap().attach(&AttachOptions::new()).unwrap();
            let start = Instant::now();
            (0..64).for_each(|page| assert_eq!(touch::read(at(&quick, page)), Ok(mark(page))));
            assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
            gated.open();
        });
        assert_eq!(engine.stats().pages_poisoned, 0);
    });
}

/// A list that is taken back while its source is being read: the page that arrives afterwards is not shown.
#[test]
fn a_page_that_arrives_after_a_revoke_is_not_shown() {
    alone("a_page_that_arrives_after_a_revoke_is_not_shown", || {
        for how in [Revoke::Soft, Revoke::Hard] {
            let engine = single();
            let gated = GatedSource::new();
            let vmap = engine.vmap(&gated.list(4)).unwrap();
            let region = vmap.attach(&AttachOptions::new()).unwrap();
            let addr = at(&region, 2) as usize;
            let thread = std::thread::spawn(move || touch::read(addr as *const u8));
            gated.wait_for_held(1);
            vmap.revoke(how).unwrap();
            gated.open();
            assert!(thread.join().unwrap().unwrap_err().is_sigbus_at(addr));
            assert_eq!(engine.stats().pages_copied, 0);
        }
    });
}

/// A forked process that dies while a page is read for it leaves the read, its buffer and its worker as they should be.
#[test]
fn a_process_that_dies_while_its_page_is_read_leaves_the_workers_usable() {
    alone("a_process_that_dies_while_its_page_is_read_leaves_the_workers_usable", || {
        let engine = engine_builder().fault_around_pages(1).workers(1).build().unwrap();
        let gated = GatedSource::new();
        let vmap = engine.vmap(&gated.list(64)).unwrap();
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        for page in 0..20 {
            gated.shut();
            let pid = child(|| assert!(touch::read(at(&region, page)).is_err(), "killed before"));
            gated.wait_for_held(1);
            // The same page is waited for here too: its read is claimed by the dead.
            let addr = at(&region, page) as usize;
            let waits = std::thread::spawn(move || touch::read(addr as *const u8));
            eventually("both have faulted", || engine.stats().faults > 2 * page + 1);
            kill_and_reap(pid);
            gated.open();
            assert_eq!(waits.join().unwrap(), Ok(mark(page)));
        }
    });
}

extern "C" fn never(_: libc::c_int) {
    // SAFETY: ends the process: this handler must never run.
    unsafe { libc::_exit(99) };
}

/// T113: the application's handlers, alternate stack and mask are its own; the engine's threads block every signal.
#[test]
fn handlers_stacks_and_masks_of_the_application_are_untouched() {
    alone("handlers_stacks_and_masks_of_the_application_are_untouched", || {
        fn state() -> (Vec<usize>, libc::stack_t, SigSet) {
            let handlers = [libc::SIGBUS, libc::SIGSEGV, libc::SIGCHLD, libc::SIGUSR2, libc::SIGPIPE, libc::SIGALRM];
            let handlers = handlers.map(|signal| {
                // SAFETY: asks for the current action, into memory of our own.
                unsafe {
                    let mut now: libc::sigaction = std::mem::zeroed();
                    libc::sigaction(signal, std::ptr::null(), &mut now);
                    now.sa_sigaction
                }
            });
            // SAFETY: asks for the current stack, into memory of our own.
            let stack = unsafe {
                let mut now: libc::stack_t = std::mem::zeroed();
                libc::sigaltstack(std::ptr::null(), &mut now);
                now
            };
            (handlers.to_vec(), stack, SigSet::thread_get_mask().unwrap())
        }
        let mut mask = SigSet::empty();
        mask.add(Signal::SIGUSR2);
        mask.thread_block().unwrap();
        let action = SigAction::new(SigHandler::Handler(never), SaFlags::empty(), SigSet::empty());
        for signal in [Signal::SIGBUS, Signal::SIGSEGV] {
            // SAFETY: the handler ends the process.
            unsafe { sigaction(signal, &action) }.unwrap();
        }
        let before = state();
        let same = |when: &str| {
            let now = state();
            assert_eq!(now.0, before.0, "handlers, {when}");
            assert_eq!((now.1.ss_sp, now.1.ss_size), (before.1.ss_sp, before.1.ss_size), "stack, {when}");
            assert_eq!(now.2, before.2, "mask, {when}");
        };
        let engine = single();
        same("after building an engine");
        let vmap = engine.vmap(&sourced_pages(8)).unwrap();
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        let mut byte = [0];
        region.read_at(page_size(), &mut byte).unwrap();
        assert_eq!(byte, [mark(1)]);
        let pid = child(|| {
            same("in a forked child");
            region.read_at(2 * page_size(), &mut [0]).unwrap();
            engine_threads_block_everything(1);
        });
        support::reap_ok(pid);
        // Fault, keeper, callback, a worker; and those that some placements and several handlers have besides.
        engine_threads_block_everything(4);
        drop(region);
        engine.shutdown(Shutdown::Poison).unwrap();
        same("after the shutdown");
    });
}

/// Checks the masks of the threads of this process that bear the engine's names.
fn engine_threads_block_everything(at_least: usize) {
    let mut seen = 0;
    for task in std::fs::read_dir("/proc/self/task").unwrap() {
        let task = task.unwrap().path();
        let name = std::fs::read_to_string(task.join("comm")).unwrap();
        if !name.starts_with("kiomap-") {
            continue;
        }
        seen += 1;
        let status = std::fs::read_to_string(task.join("status")).unwrap();
        let blocked = status.lines().find_map(|line| line.strip_prefix("SigBlk:")).unwrap();
        let blocked = u64::from_str_radix(blocked.trim(), 16).unwrap();
        // All but SIGKILL and SIGSTOP, which nobody can block, and the two that the C library keeps for itself.
        let unblockable = [9, 19, 32, 33].iter().fold(0u64, |bits, signal| bits | 1 << (signal - 1));
        // Where the application's code runs (sources, callbacks, drops), what that code itself raises stays open: a
        // SIGBUS that is blocked would end the process whatever handler it has.
        let raised = [libc::SIGBUS, libc::SIGSEGV, libc::SIGFPE, libc::SIGILL, libc::SIGTRAP, libc::SIGSYS];
        let bare = ["kiomap-fault", "kiomap-crew", "kiomap-watch", "kiomap-guard"].contains(&name.trim());
        let open = if bare { 0 } else { raised.iter().fold(0, |bits, s| bits | 1u64 << (s - 1)) };
        assert_eq!(blocked | unblockable, !open | unblockable, "{name}: {blocked:x}");
        assert_eq!(blocked & open, 0, "{name}: {blocked:x}");
    }
    assert!(seen >= at_least, "{seen} threads of the engine");
}

/// Something that a page list keeps alive, and that owns parts of the engine itself.
struct Owner {
    inner: Arc<GatedSource>,
    owned: Mutex<Option<(Region, Arc<Told>)>>,
    engine: Mutex<Option<Arc<Engine>>>,
}

impl PageSource for Owner {
    fn read_at(&self, offset_bytes: u64, buf: &mut [u8]) -> std::io::Result<()> {
        self.inner.read_at(offset_bytes, buf)
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        let name = std::thread::current().name().unwrap_or_default().to_owned();
        assert_ne!(name, "kiomap-fault", "code of the application on the fault-handling thread");
        if let Some((region, told)) = self.owned.get_mut().unwrap().take() {
            drop(region);
            drop(self.engine.get_mut().unwrap().take());
            told.tell(1);
        }
    }
}

/// T117: a source that owns a region and the engine, and is dropped by whichever thread had it last: by a worker that
/// has just read for an area that is gone, or by the one that counts areas. None of them waits for itself.
#[test]
fn what_a_list_keeps_alive_may_own_regions_and_the_engine() {
    alone("what_a_list_keeps_alive_may_own_regions_and_the_engine", || {
        for (in_flight, own_engine) in [(true, false), (true, true), (false, false), (false, true)] {
            let engine = Arc::new(engine_builder().fault_around_pages(1).workers(1).build().unwrap());
            let other = engine.vmap(&pages(2)).unwrap();
            let told = Arc::new(Told::new());
            let gated = GatedSource::new();
            let source = Owner {
                inner: Arc::clone(&gated),
                owned: Mutex::new(Some((other.attach(&AttachOptions::new()).unwrap(), Arc::clone(&told)))),
                engine: Mutex::new(own_engine.then(|| Arc::clone(&engine))),
            };
            let mut list = Kiobuf::new();
            list.map_source(Arc::new(source), 4 * page_size() as u64).unwrap();
            let vmap = engine.vmap(&list).unwrap();
            drop(list);
            // Where the kernel puts nothing else, as soon as it is free.
            let region = vmap.attach(&AttachOptions::new().at(FAR)).unwrap();
            drop(vmap);
            let kept = (!own_engine).then(|| Arc::clone(&engine));
            drop(engine);
            let (addr, len) = (region.as_ptr() as usize, region.len_bytes());
            if in_flight {
                let thread = std::thread::spawn(move || touch::read(addr as *const u8));
                gated.wait_for_held(1);
                drop(region);
                assert!(thread.join().unwrap().unwrap_err().is_sigsegv());
            } else {
                // SAFETY: nothing refers to the range.
                assert_eq!(unsafe { libc::munmap(addr as *mut libc::c_void, len) }, 0);
                drop(region);
            }
            gated.open();
            told.wait_for(1);
            eventually("the region is counted out", || other.refcount().unwrap() == 0);
            if let Some(engine) = kept {
                engine.settle().unwrap();
                engine.shutdown(Shutdown::Poison).unwrap();
            }
        }
    });
}

/// A source whose end panics.
struct PanicsOnDrop(Arc<GatedSource>, Arc<AtomicBool>);

impl PageSource for PanicsOnDrop {
    fn read_at(&self, offset_bytes: u64, buf: &mut [u8]) -> std::io::Result<()> {
        self.0.read_at(offset_bytes, buf)
    }
}

impl Drop for PanicsOnDrop {
    fn drop(&mut self) {
        self.1.store(true, Ordering::Release);
        panic!("asked to");
    }
}

/// A source that panics when a worker drops it costs the engine nothing: its only worker goes on.
#[test]
fn a_source_that_panics_when_it_is_dropped_does_not_end_a_worker() {
    alone("a_source_that_panics_when_it_is_dropped_does_not_end_a_worker", || {
        let engine = engine_builder().fault_around_pages(1).workers(1).build().unwrap();
        for _ in 0..4 {
            let (gated, dropped) = (GatedSource::new(), Arc::new(AtomicBool::new(false)));
            let mut list = Kiobuf::new();
            let source = Arc::new(PanicsOnDrop(Arc::clone(&gated), Arc::clone(&dropped)));
            list.map_source(source, page_size() as u64).unwrap();
            let vmap = engine.vmap(&list).unwrap();
            drop(list);
            // Where the kernel puts nothing else, as soon as it is free.
            let region = vmap.attach(&AttachOptions::new().at(FAR)).unwrap();
            drop(vmap);
            let addr = region.as_ptr() as usize;
            let thread = std::thread::spawn(move || touch::read(addr as *const u8));
            gated.wait_for_held(1);
            drop(region);
            assert!(thread.join().unwrap().unwrap_err().is_sigsegv());
            engine.settle().unwrap();
            gated.open();
            eventually("the source is dropped", || dropped.load(Ordering::Acquire));
        }
        let vmap = engine.vmap(&sourced_pages(8)).unwrap();
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        (0..8).for_each(|page| assert_eq!(touch::read(at(&region, page)), Ok(mark(page))));
    });
}
