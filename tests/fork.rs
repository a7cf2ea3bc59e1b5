//! Forked processes: one heap, a true count, and no page that is anything but right or refused.

mod support;

use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use kiomap::{AttachOptions, PageSource, Region, Shutdown, Vmap, page_size};
use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::{Pid, getpid};
use support::scene::{Told, areas_of, at, child, fill_marks, settled, sourced_pages};
use support::truth::assert_count;
use support::{alone, engine_builder, eventually, mark, open_descriptors, pages, reap_ok, touch};

/// T49: up to 16 processes share a heap: each sees what the others write, and each area of each is counted.
#[test]
fn forked_processes_share_one_heap_and_each_area_is_counted() {
    alone("forked_processes_share_one_heap_and_each_area_is_counted", || {
        const CHILDREN: u64 = 15;
        let engine = engine_builder().build().unwrap();
        let vmap = engine.vmap(&pages(CHILDREN + 2)).unwrap();
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        let second = vmap.attach(&AttachOptions::new().read_only().pgoff(1)).unwrap();
        let (ready, go, done, end) = (Told::new(), Told::new(), Told::new(), Told::new());
        let children: Vec<_> = (0..CHILDREN)
            .map(|n| {
                child(|| {
                    region.atomic_u8(n as usize * page_size() + 7).unwrap().store(200 + n as u8, Ordering::Release);
                    ready.tell(1);
                    go.wait_for(2);
                    for other in 0..CHILDREN {
                        assert_eq!(touch::read(at(&region, other).wrapping_add(7)), Ok(200 + other as u8));
                        assert_eq!(touch::read(at(&region, other)), Ok(mark(other)));
                    }
                    assert_eq!(touch::read(at(&second, CHILDREN)), Ok(mark(CHILDREN + 1)));
                    assert_count(&engine, &vmap, 2 * (CHILDREN as usize + 1));
                    done.tell(3);
                    end.wait_for(4);
                })
            })
            .collect();
        (0..CHILDREN).for_each(|_| ready.wait_for(1));
        (0..CHILDREN).for_each(|_| go.tell(2));
        (0..CHILDREN).for_each(|_| done.wait_for(3));
        let mapped: usize = children.iter().map(|&pid| areas_of(pid)).sum();
        assert_count(&engine, &vmap, mapped + areas_of(getpid()));
        assert_count(&engine, &vmap, 2 * (CHILDREN as usize + 1));
        let mut pids: Vec<_> = engine.spaces().unwrap().iter().map(|space| space.pid).collect();
        pids.sort_unstable();
        let mut expected: Vec<_> = children.iter().map(|pid| pid.as_raw()).chain([getpid().as_raw()]).collect();
        expected.sort_unstable();
        assert_eq!(pids, expected);
        (0..CHILDREN).for_each(|_| end.tell(4));
        children.into_iter().for_each(reap_ok);
        settled(&engine, &vmap, 2);
    });
}

/// T52: grandchildren to the fourth generation, each with an area of its own besides those that it inherits.
fn generation(depth: u32, vmap: &Vmap, inherited: &[Region], pids: &Region) {
    let own = vmap.attach(&AttachOptions::new().pgoff(u64::from(depth))).unwrap();
    assert_eq!(own.is_first(), depth == 0);
    assert_eq!(touch::read(at(&own, 0)), Ok(mark(depth.into())));
    for region in inherited {
        // A page that nobody touched before: each generation takes another.
        let page = 32 + u64::from(depth);
        assert_eq!(touch::read(at(region, page)), Ok(mark(region.pgoff() + page)));
    }
    pids.atomic_u32(depth as usize * 4).unwrap().store(getpid().as_raw() as u32, Ordering::Release);
    if depth == 4 {
        let living: Vec<_> =
            (0..=4).map(|d| Pid::from_raw(pids.atomic_u32(d * 4).unwrap().load(Ordering::Acquire) as i32)).collect();
        let mapped: usize = living.iter().map(|&pid| areas_of(pid)).sum();
        // Each generation has the list of pids, what it inherits, and its own.
        assert_eq!(mapped, (0..=4).map(|d| 1 + d + 1).sum::<usize>());
        assert_eq!(vmap.refcount().unwrap() + pids.vmap().refcount().unwrap(), mapped);
        return;
    }
    reap_ok(child(|| {
        // What the ancestors attached is here by the kernel's doing; the values that own it are theirs.
        let mut regions: Vec<&Region> = inherited.iter().collect();
        regions.push(&own);
        assert!(regions.iter().all(|region| region.check().is_ok()));
        for region in regions {
            let page = 48 + u64::from(depth);
            assert_eq!(touch::read(at(region, page)), Ok(mark(region.pgoff() + page)));
        }
        generation(depth + 1, vmap, std::slice::from_ref(&own), pids);
    }));
    drop(own);
}

/// T52: the count is that of the mappings of all living processes, in every generation.
#[test]
fn nested_forks_are_counted_and_served_to_the_fourth_generation() {
    alone("nested_forks_are_counted_and_served_to_the_fourth_generation", || {
        let engine = engine_builder().build().unwrap();
        let vmap = engine.vmap(&pages(64)).unwrap();
        let slots = engine.vmap(&pages(1)).unwrap();
        let pids = slots.attach(&AttachOptions::new()).unwrap();
        for _ in 0..5 {
            generation(0, &vmap, &[], &pids);
            settled(&engine, &vmap, 0);
            assert_eq!(slots.refcount().unwrap(), 1);
        }
    });
}

/// T50, T52: a child that drops what it inherited, attaches anew and forks on changes the count by exactly that.
#[test]
fn a_child_that_detaches_attaches_and_forks_on_is_counted() {
    alone("a_child_that_detaches_attaches_and_forks_on_is_counted", || {
        let engine = engine_builder().build().unwrap();
        let vmap = engine.vmap(&pages(40)).unwrap();
        let mut region = Some(vmap.attach(&AttachOptions::new()).unwrap());
        let (told, go) = (Told::new(), Told::new());
        let pid = child(|| {
            region.take();
            assert_count(&engine, &vmap, 1);
            let one = vmap.attach(&AttachOptions::new().pgoff(3)).unwrap();
            let two = vmap.attach(&AttachOptions::new().inherit(false)).unwrap();
            assert_count(&engine, &vmap, 3);
            reap_ok(child(|| {
                assert_count(&engine, &vmap, 4);
                assert_eq!(touch::read(at(&one, 9)), Ok(mark(12)));
                assert!(two.check().is_err());
                assert!(touch::read(two.as_ptr()).unwrap_err().is_sigsegv());
                // The copy of this process: the parent still has its own.
                // SAFETY: a copy that is read bitwise stands for the value that this process never drops.
                drop(unsafe { std::ptr::read(&one) });
                assert_count(&engine, &vmap, 3);
                let three = vmap.attach(&AttachOptions::new().pgoff(7)).unwrap();
                assert_eq!(touch::read(at(&three, 9)), Ok(mark(16)));
                assert_count(&engine, &vmap, 4);
            }));
            eventually("the grandchild is counted out", || vmap.refcount().unwrap() == 3);
            told.tell(1);
            go.wait_for(2);
        });
        told.wait_for(1);
        assert_eq!((areas_of(pid), vmap.refcount().unwrap()), (2, 3));
        // The last of the parent's own goes first: no callback is due, since the child has areas.
        region.take();
        assert_count(&engine, &vmap, 2);
        go.tell(2);
        reap_ok(pid);
        settled(&engine, &vmap, 0);
    });
}

/// T51: what a child touches first is filled from the list for everyone; it is never a zero page.
#[test]
fn a_page_that_a_child_touches_first_is_right_for_everyone() {
    needs_sources!();
    alone("a_page_that_a_child_touches_first_is_right_for_everyone", || {
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        for list in [pages(64), sourced_pages(64)] {
            let vmap = engine.vmap(&list).unwrap();
            let region = vmap.attach(&AttachOptions::new()).unwrap();
            reap_ok(child(|| {
                for page in (0..64).step_by(2) {
                    assert_eq!(touch::read(at(&region, page)), Ok(mark(page)));
                    assert_eq!(touch::write(at(&region, page), 255), Ok(()));
                }
            }));
            for page in 0..64 {
                let expected = if page % 2 == 0 { 255 } else { mark(page) };
                assert_eq!(touch::read(at(&region, page)), Ok(expected));
                assert_eq!(touch::read(at(&region, page).wrapping_add(1)), Ok(mark(page)));
            }
        }
    });
}

/// T56: processes that are started without the fork handlers change no count and wait for nobody.
#[test]
fn a_command_changes_no_count() {
    alone("a_command_changes_no_count", || {
        let engine = engine_builder().build().unwrap();
        let vmap = engine.vmap(&pages(4)).unwrap();
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        let before = open_descriptors();
        for round in 0..20 {
            // posix_spawn: no handler runs.
            assert!(Command::new("true").status().unwrap().success());
            assert_count(&engine, &vmap, 1);
            // fork and exec: counted from the fork to the exec.
            let mut command = Command::new("true");
            // SAFETY: the closure makes no call at all.
            unsafe { command.pre_exec(|| Ok(())) };
            let mut started = command.spawn().unwrap();
            // spawn returns when exec has happened.
            settled(&engine, &vmap, 1);
            assert!(started.wait().unwrap().success());
            assert_eq!(touch::read(at(&region, round % 4)), Ok(mark(round % 4)));
        }
        eventually("descriptors are back", || open_descriptors() == before);
    });
}

/// T57: what a child is not to inherit it does not have, and nor has a child of a raw clone anything.
#[test]
fn a_region_that_is_not_inherited_is_no_memory_in_the_child() {
    alone("a_region_that_is_not_inherited_is_no_memory_in_the_child", || {
        let engine = engine_builder().build().unwrap();
        let vmap = engine.vmap(&pages(4)).unwrap();
        let kept = vmap.attach(&AttachOptions::new().inherit(false)).unwrap();
        let shared = vmap.attach(&AttachOptions::new()).unwrap();
        reap_ok(child(|| {
            assert_count(&engine, &vmap, 3);
            assert_eq!(kept.check().unwrap_err().errno(), Errno::ENXIO);
            assert!(kept.read_at(0, &mut [0]).is_err());
            assert!(touch::read(kept.as_ptr()).unwrap_err().is_sigsegv());
            assert_eq!(touch::read(shared.as_ptr()), Ok(mark(0)));
        }));
        settled(&engine, &vmap, 2);
        // SAFETY: as a fork without handlers; the child makes only system calls and touches, and ends.
        let pid = unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) } as i32;
        if pid == 0 {
            let refused = [&kept, &shared].iter().all(|r| touch::read(at(r, 1)).is_err_and(|e| e.is_sigsegv()));
            // SAFETY: ends this process at once.
            unsafe { libc::_exit(if refused { 0 } else { 1 }) };
        }
        assert_count(&engine, &vmap, 2);
        reap_ok(Pid::from_raw(pid));
        (0..4).for_each(|page| assert_eq!(touch::read(at(&shared, page)), Ok(mark(page))));
        settled(&engine, &vmap, 2);
    });
}

/// What a child of an unusual forker must find: its bytes.
fn fork_and_touch(region: &Region, page: u64) {
    reap_ok(child(|| assert_eq!(touch::read(at(region, page)), Ok(mark(page)))));
}

/// T60: a fork from a deref callback is served.
#[test]
fn a_fork_from_a_callback_is_served() {
    alone("a_fork_from_a_callback_is_served", || {
        let engine = engine_builder().build().unwrap();
        let other = engine.vmap(&pages(8)).unwrap();
        let region = Arc::new(other.attach(&AttachOptions::new()).unwrap());
        let forked = Told::new();
        let forked = Arc::new(forked);
        let vmap = engine
            .vmap_builder(&pages(1))
            .on_deref({
                let (region, forked) = (Arc::clone(&region), Arc::clone(&forked));
                move |vmap| {
                    fork_and_touch(&region, 3);
                    // An area of the very vmap that is being counted out.
                    let again = vmap.attach(&AttachOptions::new()).unwrap();
                    assert!(again.is_first());
                    fork_and_touch(&again, 0);
                    vmap.clear_on_deref();
                    drop(again);
                    forked.tell(1);
                }
            })
            .build()
            .unwrap();
        drop(vmap.attach(&AttachOptions::new()).unwrap());
        forked.wait_for(1);
        settled(&engine, &vmap, 0);
        assert_eq!((engine.stats().panics, other.refcount().unwrap()), (0, 1));
    });
}

struct Forking {
    region: Region,
    outcome: AtomicUsize,
}

impl PageSource for Forking {
    fn read_at(&self, offset_bytes: u64, buf: &mut [u8]) -> std::io::Result<()> {
        fork_and_touch(&self.region, offset_bytes / page_size() as u64);
        self.outcome.fetch_add(1, Ordering::Relaxed);
        fill_marks(offset_bytes, buf);
        Ok(())
    }
}

/// T60: a fork from a page source, on a worker, is served: also while the page that it reads is waited for.
#[test]
fn a_fork_from_a_page_source_is_served() {
    needs_sources!();
    alone("a_fork_from_a_page_source_is_served", || {
        let engine = engine_builder().fault_around_pages(1).workers(2).build().unwrap();
        let memory = engine.vmap(&pages(16)).unwrap();
        let region = memory.attach(&AttachOptions::new()).unwrap();
        let source = Arc::new(Forking { region, outcome: AtomicUsize::new(0) });
        let mut list = kiomap::Kiobuf::new();
        list.map_source(Arc::clone(&source) as Arc<dyn PageSource>, 16 * page_size() as u64).unwrap();
        let vmap = engine.vmap(&list).unwrap();
        let forked = vmap.attach(&AttachOptions::new()).unwrap();
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let forked = &forked;
                scope.spawn(move || {
                    // None is next to another, with which it might be read.
                    for page in [2 * thread, 2 * thread + 8] {
                        assert_eq!(touch::read(at(forked, page)), Ok(mark(page)));
                    }
                });
            }
        });
        assert_eq!(source.outcome.load(Ordering::Relaxed), 8);
        settled(&engine, &memory, 1);
        assert_count(&engine, &vmap, 1);
    });
}

/// A guard of memory that forks when it is dropped.
struct ForkOnDrop {
    bytes: Vec<u8>,
    region: Arc<Region>,
    told: Arc<Told>,
}

impl AsRef<[u8]> for ForkOnDrop {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for ForkOnDrop {
    fn drop(&mut self) {
        let region = Arc::clone(&self.region);
        let pid = child(|| {
            // Served with the right bytes, or refused: which thread drops a list is the engine's business.
            match touch::read(at(&region, 5)) {
                Ok(byte) => assert_eq!(byte, mark(5)),
                Err(refused) => assert!(refused.is_sigsegv() || refused.signal == libc::SIGBUS),
            }
        });
        reap_ok(pid);
        self.told.tell(1);
    }
}

/// T60: a fork from whatever thread drops a page list last is served or refused, never waited for.
#[test]
fn a_fork_from_a_guard_that_the_engine_drops_does_not_wait_for_itself() {
    alone("a_fork_from_a_guard_that_the_engine_drops_does_not_wait_for_itself", || {
        let engine = engine_builder().build().unwrap();
        let memory = engine.vmap(&pages(8)).unwrap();
        let region = Arc::new(memory.attach(&AttachOptions::new()).unwrap());
        let told = Arc::new(Told::new());
        let mut list = kiomap::Kiobuf::new();
        let guard = ForkOnDrop { bytes: vec![9; page_size()], region: Arc::clone(&region), told: Arc::clone(&told) };
        list.map_slice(guard).unwrap();
        let vmap = engine.vmap(&list).unwrap();
        drop(list);
        let forgotten = vmap.attach(&AttachOptions::new()).unwrap();
        drop(vmap);
        let (start, len) = (forgotten.as_ptr(), forgotten.len_bytes());
        // The region's own handle on the vmap is kept from living on: its value is leaked only after a bitwise look.
        // SAFETY: nothing refers to the range any more.
        assert_eq!(unsafe { libc::munmap(start.cast(), len) }, 0);
        drop(forgotten);
        told.wait_for(1);
        settled(&engine, &memory, 1);
        assert_eq!(touch::read(at(&region, 6)), Ok(mark(6)));
    });
}

/// T58, T59: a child for which descriptors run out, at whatever step, in the parent or in the child, has none of the
/// memory and is not counted; later children have it.
#[test]
fn a_child_without_descriptors_is_refused_and_not_counted() {
    alone("a_child_without_descriptors_is_refused_and_not_counted", || {
        let engine = engine_builder().build().unwrap();
        let vmap = engine.vmap(&pages(64)).unwrap();
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        let told = Told::new();
        let before = open_descriptors() - 1;
        // Descriptors are numbered without gaps: the limit is on the numbers.
        let next = nix::unistd::dup(std::io::stderr()).unwrap();
        let first_free = std::os::fd::AsRawFd::as_raw_fd(&next) as u64;
        drop(next);
        let (mut lost, mut served) = (0, 0);
        for spare in 0..12 {
            setrlimit(Resource::RLIMIT_NOFILE, first_free + spare, hard).unwrap();
            let pid = child(|| match region.check() {
                Ok(()) => {
                    assert_eq!(touch::read(at(&region, spare)), Ok(mark(spare)));
                    assert_count(&engine, &vmap, 2);
                    told.tell(1);
                }
                Err(why) => {
                    assert_eq!(why.errno(), Errno::ENXIO, "{why}");
                    assert!(touch::read(at(&region, spare)).unwrap_err().is_sigsegv());
                    assert!(vmap.refcount().is_err());
                    assert!(vmap.attach(&AttachOptions::new()).is_err());
                    told.tell(0);
                }
            });
            reap_ok(pid);
            if told.wait() == 1 {
                served += 1
            } else {
                lost += 1
            }
            setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
            settled(&engine, &vmap, 1);
        }
        assert!(lost >= 3 && served >= 3, "{lost} lost, {served} served");
        eventually("descriptors are back", || open_descriptors() - 1 == before);
        fork_and_touch(&region, 63);
    });
}

/// T61: a fork that fails is counted neither up nor down.
#[test]
fn a_fork_that_fails_changes_no_count() {
    alone("a_fork_that_fails_changes_no_count", || {
        if nix::unistd::geteuid().is_root() {
            // The limit does not bind root: become somebody whom it does.
            nix::unistd::setgid(65533.into()).unwrap();
            nix::unistd::setuid(65533.into()).unwrap();
            nix::sys::prctl::set_dumpable(true).unwrap();
        }
        let engine = engine_builder().build().unwrap();
        let derefs = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&derefs);
        let vmap = engine
            .vmap_builder(&pages(4))
            .on_deref(move |_| {
                counted.fetch_add(1, Ordering::Relaxed);
            })
            .build()
            .unwrap();
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        let before = open_descriptors();
        let (_, hard) = getrlimit(Resource::RLIMIT_NPROC).unwrap();
        setrlimit(Resource::RLIMIT_NPROC, 1, hard).unwrap();
        for _ in 0..200 {
            // SAFETY: it fails; should it not, the child ends at once.
            match unsafe { nix::unistd::fork() } {
                Err(errno) => assert_eq!(errno, Errno::EAGAIN),
                Ok(nix::unistd::ForkResult::Parent { child }) => {
                    reap_ok(child);
                    skip!("RLIMIT_NPROC does not bind this user");
                }
                // SAFETY: as above.
                Ok(nix::unistd::ForkResult::Child) => unsafe { libc::_exit(0) },
            }
        }
        setrlimit(Resource::RLIMIT_NPROC, hard, hard).unwrap();
        settled(&engine, &vmap, 1);
        eventually("descriptors are back", || open_descriptors() == before);
        fork_and_touch(&region, 2);
        settled(&engine, &vmap, 1);
        assert_eq!(derefs.load(Ordering::Relaxed), 0);
        drop(region);
        engine.settle().unwrap();
        engine.shutdown(Shutdown::Poison).unwrap();
        assert_eq!(derefs.load(Ordering::Relaxed), 1);
    });
}

/// A forked child may build an engine of its own, beside the one that it inherits.
#[test]
fn a_child_has_its_own_engine_beside_the_inherited_one() {
    needs_sources!();
    alone("a_child_has_its_own_engine_beside_the_inherited_one", || {
        let engine = engine_builder().build().unwrap();
        let vmap = engine.vmap(&pages(8)).unwrap();
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        reap_ok(child(|| {
            let own_engine = engine_builder().fault_around_pages(1).build().unwrap();
            let own_vmap = own_engine.vmap(&sourced_pages(8)).unwrap();
            let own = own_vmap.attach(&AttachOptions::new()).unwrap();
            assert_eq!(touch::read(at(&own, 2)), Ok(mark(2)));
            reap_ok(child(|| {
                own.check().unwrap();
                region.check().unwrap();
                assert_eq!(touch::read(at(&own, 3)), Ok(mark(3)));
                assert_eq!(touch::read(at(&region, 3)), Ok(mark(3)));
                assert_eq!((vmap.refcount().unwrap(), own_vmap.refcount().unwrap()), (3, 2));
            }));
            settled(&own_engine, &own_vmap, 1);
            own_engine.shutdown(Shutdown::Poison).unwrap();
            assert!(touch::read(at(&own, 7)).unwrap_err().is_sigbus_at(at(&own, 7) as usize));
            assert_eq!(touch::read(at(&region, 7)), Ok(mark(7)));
        }));
        settled(&engine, &vmap, 1);
    });
}

/// A child in a process-id namespace of its own has threads whose ids are also those of the engine's workers.
#[test]
fn a_child_in_another_pid_namespace_is_served_by_the_workers() {
    needs_sources!();
    alone("a_child_in_another_pid_namespace_is_served_by_the_workers", || {
        use nix::sched::{CloneFlags, unshare};
        if unshare(CloneFlags::CLONE_NEWPID).is_err()
            && unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWPID).is_err()
        {
            skip!("process-id namespaces are not to be had");
        }
        // Process 1 of the first namespace: its workers have small ids.
        reap_ok(child(|| {
            let engine = engine_builder().fault_around_pages(1).build().unwrap();
            let vmap = engine.vmap(&sourced_pages(64)).unwrap();
            let region = vmap.attach(&AttachOptions::new()).unwrap();
            unshare(CloneFlags::CLONE_NEWPID).unwrap();
            reap_ok(child(|| {
                std::thread::scope(|scope| {
                    for page in 0..16 {
                        let region = &region;
                        scope.spawn(move || assert_eq!(touch::read(at(region, page)), Ok(mark(page))));
                    }
                });
            }));
            assert_eq!(engine.stats().self_faults, 0);
            // Not held against /proc, which is the first namespace's.
            eventually("the child is counted out", || {
                engine.settle().unwrap();
                engine.spaces().unwrap().len() == 1 && vmap.refcount().unwrap() == 1
            });
        }));
    });
}

/// A count and a deref callback follow forked processes even when the first process has detached long ago.
#[test]
fn the_last_process_to_detach_fires_the_callback() {
    alone("the_last_process_to_detach_fires_the_callback", || {
        let engine = engine_builder().build().unwrap();
        let derefs = Arc::new(Told::new());
        let fired = Arc::clone(&derefs);
        let vmap = engine.vmap_builder(&pages(4)).on_deref(move |_| fired.tell(9)).build().unwrap();
        for _ in 0..20 {
            let region = vmap.attach(&AttachOptions::new()).unwrap();
            assert!(region.is_first());
            let (started, end) = (Told::new(), Told::new());
            let pid = child(|| {
                started.tell(1);
                end.wait_for(2);
                assert_eq!(touch::read(at(&region, 3)), Ok(mark(3)));
            });
            started.wait_for(1);
            drop(region);
            assert_count(&engine, &vmap, 1);
            assert_eq!(vmap.destroy().unwrap_err().errno(), Errno::EBUSY);
            end.tell(2);
            reap_ok(pid);
            support::within(Duration::from_secs(20), {
                let derefs = Arc::clone(&derefs);
                move || derefs.wait_for(9)
            });
            assert_count(&engine, &vmap, 0);
        }
    });
}
