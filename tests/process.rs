//! Unusual lives of processes: what starts them, how they end, and at which moment; the count is the kernel's own at
//! every step, and nobody waits for ever.

mod support;

use std::ffi::CString;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use kiomap::{AttachOptions, Engine, Kiobuf, Vmap, page_size};
use nix::unistd::Pid;
use support::scene::{GatedSource, Told, areas_of, at, child, kill_and_reap, settled};
use support::truth::{assert_count, assert_nobody_waits, assert_truth};
use support::{alone, engine_builder, eventually, mark, open_descriptors, pages, reap_ok, touch};

type Body<'a> = Box<dyn FnMut() -> i32 + 'a>;

extern "C" fn run_body(body: *mut libc::c_void) -> i32 {
    // SAFETY: `raw_clone` passes a box that it has leaked.
    unsafe { (*body.cast::<Body<'_>>())() }
}

/// Starts a process without the fork handlers, in an address space of its own or (`CLONE_VM`) in this one.
fn raw_clone(flags: i32, body: impl FnMut() -> i32) -> Pid {
    // Neither is given back: a process that shares the address space may run on them until this one ends.
    let stack = Box::leak(vec![0u128; 16 << 10].into_boxed_slice());
    let body: &mut Body<'_> = Box::leak(Box::new(Box::new(body)));
    // SAFETY: the callers wait for the process or never return, so that what `body` borrows outlives it; it makes
    // system calls and touches, and ends.
    let pid = unsafe {
        libc::clone(run_body, stack.as_mut_ptr_range().end.cast(), flags | libc::SIGCHLD, (&raw mut *body).cast())
    };
    Pid::from_raw(nix::errno::Errno::result(pid).unwrap())
}

/// A vmap whose callback counts its calls.
fn counted(engine: &Engine, list: &Kiobuf) -> (Vmap, Arc<AtomicUsize>) {
    let derefs = Arc::new(AtomicUsize::new(0));
    let calls = Arc::clone(&derefs);
    let count = move |_: &Vmap| {
        calls.fetch_add(1, Ordering::SeqCst);
    };
    (engine.vmap_builder(list).on_deref(count).build().unwrap(), derefs)
}

/// T56: vfork shares the address space until it execs or exits: its touches are this process's, it is not counted, and
/// it waits for nobody. The same for a process that shares it for longer.
#[test]
fn processes_that_share_the_address_space_are_served_and_not_counted() {
    alone("processes_that_share_the_address_space_are_served_and_not_counted", || {
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        let vmap = engine.vmap(&pages(64)).unwrap();
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        for flags in [libc::CLONE_VM | libc::CLONE_VFORK, libc::CLONE_VM] {
            for page in 0..8 {
                let page = page + if flags & libc::CLONE_VFORK != 0 { 0 } else { 8 };
                let pid = raw_clone(flags, || {
                    // No thread-local state: the cells are those of the thread that waits, or runs beside it.
                    // SAFETY: a page of the region, which is mapped and whose bytes can be had.
                    let byte = unsafe { at(&region, page).read_volatile() };
                    if byte == mark(page) { 0 } else { 1 }
                });
                assert_eq!(vmap.refcount().unwrap(), 1);
                reap_ok(pid);
                assert_count(&engine, &vmap, 1);
            }
        }
        // vfork and exec, as shells do.
        let (path, argument) = (CString::new("/bin/true").unwrap(), CString::new("true").unwrap());
        for _ in 0..8 {
            let arguments = [argument.as_ptr(), std::ptr::null()];
            let pid = raw_clone(libc::CLONE_VM | libc::CLONE_VFORK, || {
                // SAFETY: null-terminated strings and arrays of them.
                unsafe { libc::execv(path.as_ptr(), arguments.as_ptr()) }
            });
            assert_count(&engine, &vmap, 1);
            reap_ok(pid);
        }
        assert_eq!(support::settled_stats(&engine).faults, 16);
        assert_nobody_waits(&engine);
    });
}

/// T56: posix_spawn runs no fork handler: no count, no wait, no descriptor.
#[test]
fn a_posix_spawn_changes_nothing() {
    alone("a_posix_spawn_changes_nothing", || {
        let engine = engine_builder().build().unwrap();
        let vmap = engine.vmap(&pages(4)).unwrap();
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        let fds = open_descriptors();
        let path = CString::new("/bin/true").unwrap();
        for round in 0..20 {
            let mut pid = 0;
            let mut arguments = [path.as_ptr().cast_mut(), std::ptr::null_mut()];
            let none = [std::ptr::null_mut()];
            // SAFETY: null-terminated strings and arrays of them; no actions and no attributes.
            let outcome = unsafe {
                libc::posix_spawn(
                    &mut pid,
                    path.as_ptr(),
                    std::ptr::null(),
                    std::ptr::null(),
                    arguments.as_mut_ptr(),
                    none.as_ptr(),
                )
            };
            assert_eq!(outcome, 0);
            assert_count(&engine, &vmap, 1);
            reap_ok(Pid::from_raw(pid));
            assert_eq!(touch::read(at(&region, round % 4)), Ok(mark(round % 4)));
        }
        assert_eq!((open_descriptors(), engine.stats().processes_gone), (fds, 0));
    });
}

/// T56: a raw clone has copies of every descriptor and no area. It is not counted, its ends are nobody's, and it holds
/// nobody up, not even as long as it lives.
#[test]
fn a_raw_clone_has_no_area_and_holds_nobody_up() {
    alone("a_raw_clone_has_no_area_and_holds_nobody_up", || {
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        let vmap = engine.vmap(&pages(64)).unwrap();
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        let (looked, go) = (Told::new(), Told::new());
        for round in 0..8 {
            let pid = raw_clone(0, || {
                let refused = (0..64).all(|page| touch::read(at(&region, page)).is_err_and(|e| e.is_sigsegv()));
                looked.tell(u8::from(refused));
                go.wait_for(2);
                0
            });
            looked.wait_for(1);
            assert_eq!(areas_of(pid), 0);
            assert_count(&engine, &vmap, 1);
            for page in 8 * round..8 * round + 8 {
                assert_eq!(touch::read(at(&region, page)), Ok(mark(page)));
            }
            reap_ok(child(|| assert_eq!(touch::read(at(&region, 63)), Ok(mark(63)))));
            drop(vmap.attach(&AttachOptions::new()).unwrap());
            settled(&engine, &vmap, 1);
            assert_count(&engine, &vmap, 1);
            go.tell(2);
            reap_ok(pid);
        }
        assert_eq!(engine.stats().processes_gone, 8);
    });
}

/// T71: a child that left copies of its descriptors to a raw clone dies; its lifeline does not hang up, and it is counted
/// out all the same.
#[test]
fn a_child_that_dies_before_its_raw_clone_is_counted_out() {
    alone("a_child_that_dies_before_its_raw_clone_is_counted_out", || {
        let engine = engine_builder().build().unwrap();
        let (vmap, derefs) = counted(&engine, &pages(8));
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        let (told, end) = (Told::new(), Told::new());
        let pid = child(|| {
            assert_eq!(touch::read(at(&region, 1)), Ok(mark(1)));
            raw_clone(0, || {
                end.wait_for(2);
                0
            });
            told.tell(1);
            std::thread::park();
        });
        told.wait_for(1);
        drop(region);
        assert_count(&engine, &vmap, 1);
        assert_eq!(derefs.load(Ordering::SeqCst), 0);
        kill_and_reap(pid);
        settled(&engine, &vmap, 0);
        assert_truth(&engine);
        eventually("the callback has run", || derefs.load(Ordering::SeqCst) == 1);
        end.tell(2);
    });
}

/// T71: a process that exits and leaves its address space to a clone has its areas as long as that lives.
#[test]
fn an_address_space_that_outlives_its_process_stays_counted_and_served() {
    alone("an_address_space_that_outlives_its_process_stays_counted_and_served", || {
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        let (vmap, derefs) = counted(&engine, &pages(8));
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        let [looked, go] = std::array::from_fn(|_| Told::new());
        let pid = child(|| {
            raw_clone(libc::CLONE_VM, || {
                for page in 2..6 {
                    go.wait_for(1);
                    // SAFETY: a page of the region, which is mapped and whose bytes can be had.
                    looked.tell(unsafe { at(&region, page).read_volatile() });
                }
                go.wait_for(2);
                0
            });
            // SAFETY: ends this process and not its clone.
            unsafe { libc::_exit(0) };
        });
        reap_ok(pid);
        drop(region);
        for page in 2..6 {
            go.tell(1);
            looked.wait_for(mark(page));
            engine.settle().unwrap();
            assert_eq!((vmap.refcount().unwrap(), derefs.load(Ordering::SeqCst)), (1, 0));
        }
        go.tell(2);
        settled(&engine, &vmap, 0);
        eventually("the callback has run", || derefs.load(Ordering::SeqCst) == 1);
        assert_truth(&engine);
    });
}

/// Forks a daemon as daemons fork themselves: twice, with a session of its own. Answers its process id.
fn daemonise(body: impl FnOnce()) -> Pid {
    let (read_end, write_end) = nix::unistd::pipe().unwrap();
    let first = child(|| {
        nix::unistd::setsid().unwrap();
        let daemon = child(body);
        nix::unistd::write(&write_end, &daemon.as_raw().to_ne_bytes()).unwrap();
    });
    reap_ok(first);
    let mut pid = [0; 4];
    assert_eq!(nix::unistd::read(&read_end, &mut pid), Ok(4));
    Pid::from_raw(i32::from_ne_bytes(pid))
}

/// T54: a daemon, whose parent has exited, goes on faulting; when everybody else has detached, its end is the last, and
/// the callback comes then, once.
#[test]
fn a_daemon_is_served_and_counted_to_the_last() {
    alone("a_daemon_is_served_and_counted_to_the_last", || {
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        let (vmap, derefs) = counted(&engine, &pages(32));
        for round in 1..6 {
            let region = vmap.attach(&AttachOptions::new()).unwrap();
            assert!(region.is_first());
            let (told, go) = (Told::new(), Told::new());
            let daemon = daemonise(|| {
                told.tell(1);
                for page in [3, 9, 27] {
                    go.wait_for(1);
                    assert_eq!(touch::read(at(&region, page)), Ok(mark(page)));
                    // Its own descendants are served too, whoever has gone.
                    reap_ok(child(|| assert_eq!(touch::read(at(&region, page + 1)), Ok(mark(page + 1)))));
                    told.tell(2);
                }
                go.wait_for(3);
            });
            told.wait_for(1);
            eventually("its parent is counted out", || engine.spaces().unwrap().len() == 2);
            assert_count(&engine, &vmap, 2);
            drop(region);
            for _ in 0..3 {
                go.tell(1);
                told.wait_for(2);
                eventually("its child is counted out", || vmap.refcount().unwrap() == 1);
                assert_count(&engine, &vmap, 1);
            }
            assert_eq!((areas_of(daemon), derefs.load(Ordering::SeqCst)), (1, round - 1));
            go.tell(3);
            eventually("the callback has run", || derefs.load(Ordering::SeqCst) == round);
            settled(&engine, &vmap, 0);
            assert_truth(&engine);
        }
    });
}

/// T54: a daemon whose engine's process dies fails closed: what is resident stays, what is not is SIGBUS, and nobody
/// waits for ever.
#[test]
fn a_daemon_fails_closed_when_the_owner_dies() {
    alone("a_daemon_fails_closed_when_the_owner_dies", || {
        let [started, gone, done] = std::array::from_fn(|_| Told::new());
        let owner = child(|| {
            let engine = engine_builder().fault_around_pages(1).build().unwrap();
            let gated = GatedSource::new();
            let slow = engine.vmap(&gated.list(4)).unwrap().attach(&AttachOptions::new()).unwrap();
            let vmap = engine.vmap(&pages(32)).unwrap();
            let region = vmap.attach(&AttachOptions::new()).unwrap();
            let daemon = daemonise(|| {
                assert_eq!(touch::read(at(&region, 4)), Ok(mark(4)));
                let blocked = at(&slow, 1) as usize;
                let waits = std::thread::spawn(move || touch::read(blocked as *const u8));
                started.tell(1);
                gone.wait_for(2);
                assert!(waits.join().unwrap().unwrap_err().is_sigbus_at(blocked));
                for page in (0..32).filter(|&page| page != 4) {
                    assert!(touch::read(at(&region, page)).unwrap_err().is_sigbus_at(at(&region, page) as usize));
                }
                assert_eq!(touch::read(at(&region, 4)), Ok(mark(4)));
                assert_eq!(vmap.refcount().unwrap_err().errno(), nix::errno::Errno::ESHUTDOWN);
                done.tell(3);
            });
            gated.wait_for_held(1);
            assert_eq!(areas_of(daemon), 2);
            started.tell(4);
            std::thread::park();
        });
        assert_eq!(started.wait() + started.wait(), 5);
        kill_and_reap(owner);
        gone.tell(2);
        done.wait_for(3);
    });
}

/// A child that changes its address space without a pause, on several threads, while it attaches, is not waited for:
/// the engine counts and serves the others meanwhile.
#[test]
fn a_child_that_changes_without_a_pause_holds_nobody_up() {
    alone("a_child_that_changes_without_a_pause_holds_nobody_up", || {
        let engine = engine_builder().build().unwrap();
        let vmap = engine.vmap(&pages(64)).unwrap();
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        let (started, end) = (Told::new(), AtomicBool::new(false));
        let stormy = child(|| {
            std::thread::scope(|scope| {
                for thread in 0..4 {
                    let (region, end) = (&region, &end);
                    scope.spawn(move || {
                        while !end.load(Ordering::Relaxed) {
                            // SAFETY: drops pages of a shared object from this mapping; the object keeps them.
                            unsafe { libc::madvise(at(region, thread * 16).cast(), page_size(), libc::MADV_DONTNEED) };
                        }
                    });
                }
                started.tell(1);
                loop {
                    let own = vmap.attach(&AttachOptions::new()).unwrap();
                    assert_eq!(touch::read(at(&own, 3)), Ok(mark(3)));
                }
            });
        });
        started.wait_for(1);
        for round in 0..100 {
            engine.settle().unwrap();
            reap_ok(child(|| {
                assert_eq!(touch::read(at(&region, round % 64)), Ok(mark(round % 64)));
                assert!(vmap.refcount().unwrap() >= 3);
            }));
        }
        kill_and_reap(stormy);
        settled(&engine, &vmap, 1);
        assert_count(&engine, &vmap, 1);
    });
}
