//! SIGKILL at each phase of a process's life: before its greeting, in it, in a fault, in an attach, in a fork of its own.
//! What it had is counted out, whatever it was doing, and what its children have is theirs.

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use kiomap::{AttachOptions, Engine, Error, Kiobuf, Region, Vmap, page_size};
use nix::sys::signal::{Signal, raise};
use nix::sys::wait::WaitStatus;
use nix::unistd::Pid;
use support::scene::{GatedSource, Rng, Told, at, child, kill_and_reap, settled};
use support::truth::{assert_count, assert_nobody_waits, assert_truth};
use support::{alone, engine_builder, eventually, mark, open_descriptors, pages, reap, reap_ok, threads, touch};

/// At which of these calls of a fork handler the process is to die. Each process has its own.
static DIE_AT: AtomicU32 = AtomicU32::new(NEVER);
const NEVER: u32 = 0;
/// In a child, before the engine's handler: it has no area yet, and has said nothing.
const BEFORE_THE_GREETING: u32 = 1;
/// In a child, after the engine's handler.
const AFTER_THE_GREETING: u32 = 2;
/// In a process that forks, after the engine has counted the child, which will never be.
const CHILD_COUNTED: u32 = 3;
/// In a process that has forked, with the child's end of the lifeline still open.
const CHILD_MADE: u32 = 4;

fn die_at(phase: u32) {
    if DIE_AT.load(Ordering::Relaxed) == phase {
        raise(Signal::SIGKILL).unwrap();
    }
}

extern "C" fn first_in_child() {
    die_at(BEFORE_THE_GREETING);
}

extern "C" fn last_in_child() {
    die_at(AFTER_THE_GREETING);
}

extern "C" fn last_in_prepare() {
    die_at(CHILD_COUNTED);
}

extern "C" fn first_in_parent() {
    die_at(CHILD_MADE);
}

/// Builds the first engine of this process between two sets of fork handlers. Those of children and parents run in the
/// order in which they were installed, those before the fork in the opposite order.
fn engine_between_handlers() -> Engine {
    // SAFETY: the handlers make one system call.
    let installed = unsafe { libc::pthread_atfork(Some(last_in_prepare), Some(first_in_parent), Some(first_in_child)) };
    let engine = engine_builder().fault_around_pages(1).build().unwrap();
    // SAFETY: as above.
    assert_eq!((installed, unsafe { libc::pthread_atfork(None, None, Some(last_in_child)) }), (0, 0));
    engine
}

#[track_caller]
fn reap_killed(pid: Pid) {
    let status = reap(pid);
    assert!(matches!(status, WaitStatus::Signaled(_, Signal::SIGKILL, _)), "{status:?}");
}

/// Forks a child that dies at a phase; the phase is set for the child alone unless it is one of the child's start.
fn dying_child(phase: u32, body: impl FnOnce()) -> Pid {
    DIE_AT.store(phase, Ordering::Relaxed);
    let pid = child(|| {
        DIE_AT.store(NEVER, Ordering::Relaxed);
        body();
    });
    DIE_AT.store(NEVER, Ordering::Relaxed);
    pid
}

/// T50: a process that is killed in its own fork, on either side of its greeting, is counted out.
#[test]
fn a_child_killed_before_or_after_its_greeting_is_counted_out() {
    alone("a_child_killed_before_or_after_its_greeting_is_counted_out", || {
        let engine = engine_between_handlers();
        let vmap = engine.vmap(&pages(8)).unwrap();
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        let fds = open_descriptors();
        for round in 0..20 {
            for phase in [BEFORE_THE_GREETING, AFTER_THE_GREETING] {
                reap_killed(dying_child(phase, || unreachable!("it dies before")));
                settled(&engine, &vmap, 1);
                assert_count(&engine, &vmap, 1);
            }
            reap_ok(child(|| assert_eq!(touch::read(at(&region, round % 8)), Ok(mark(round % 8)))));
        }
        eventually("descriptors are back", || open_descriptors() == fds);
    });
}

/// T50, T52: a process that is killed in a fork of its own: the grandchild that was counted and never came to be is
/// counted out, the one that came to be lives on.
#[test]
fn a_child_killed_in_a_fork_of_its_own_takes_nothing_from_the_grandchild() {
    alone("a_child_killed_in_a_fork_of_its_own_takes_nothing_from_the_grandchild", || {
        let engine = engine_between_handlers();
        let vmap = engine.vmap(&pages(64)).unwrap();
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        let fds = open_descriptors();
        for round in 0..10 {
            reap_killed(child(|| {
                DIE_AT.store(CHILD_COUNTED, Ordering::Relaxed);
                child(|| unreachable!("its parent dies before"));
            }));
            settled(&engine, &vmap, 1);
            assert_count(&engine, &vmap, 1);

            let (started, go) = (Told::new(), Told::new());
            reap_killed(child(|| {
                DIE_AT.store(CHILD_MADE, Ordering::Relaxed);
                child(|| {
                    DIE_AT.store(NEVER, Ordering::Relaxed);
                    started.tell(1);
                    go.wait_for(2);
                    assert_eq!(touch::read(at(&region, 6 * round)), Ok(mark(6 * round)));
                    started.tell(3);
                    go.wait_for(4);
                });
            }));
            started.wait_for(1);
            eventually("the child is counted out", || vmap.refcount().unwrap() == 2);
            assert_count(&engine, &vmap, 2);
            go.tell(2);
            started.wait_for(3);
            go.tell(4);
            settled(&engine, &vmap, 1);

            reap_ok(child(|| {
                // A grandchild that dies in its own start.
                reap_killed(dying_child(BEFORE_THE_GREETING, || unreachable!("it dies before")));
                reap_killed(dying_child(AFTER_THE_GREETING, || unreachable!("it dies before")));
                eventually("both are counted out", || vmap.refcount().unwrap() == 2);
                assert_eq!(touch::read(at(&region, 6 * round + 1)), Ok(mark(6 * round + 1)));
            }));
            settled(&engine, &vmap, 1);
            assert_truth(&engine);
        }
        eventually("descriptors are back", || open_descriptors() == fds);
    });
}

/// How far a child has come; the kernel keeps it when the child is killed.
struct Progress(std::ptr::NonNull<AtomicU32>);

impl Progress {
    fn new() -> Progress {
        use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous};
        let len = std::num::NonZeroUsize::new(page_size()).unwrap();
        // SAFETY: a new mapping, which replaces nothing.
        let shared =
            unsafe { mmap_anonymous(None, len, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_SHARED) };
        Progress(shared.unwrap().cast())
    }

    fn at(&self) -> &AtomicU32 {
        // SAFETY: mapped as long as the process lives, and aligned.
        unsafe { self.0.as_ref() }
    }
}

/// A short life with everything in it; tells where it is.
fn life(vmap: &Vmap, region: &Region, progress: &Progress, page: u64) {
    let phase = |n| progress.at().store(n, Ordering::Release);
    phase(1);
    assert_eq!(touch::read(at(region, page)), Ok(mark(page)));
    phase(2);
    let own = vmap.attach(&AttachOptions::new().pgoff(1)).unwrap();
    phase(3);
    assert_eq!(touch::read(at(&own, page)), Ok(mark(page + 1)));
    phase(4);
    let grandchild = child(|| assert_eq!(touch::read(at(&own, page + 1)), Ok(mark(page + 2))));
    phase(5);
    reap_ok(grandchild);
    phase(6);
    drop(own);
    phase(7);
}

/// T50, T52, T71: killed at any moment of such a life, hundreds of times, each phase among them.
#[test]
fn a_process_killed_at_any_moment_of_its_life_is_counted_out() {
    alone("a_process_killed_at_any_moment_of_its_life_is_counted_out", || {
        const PAGES: u64 = 512;
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        let progress = Progress::new();
        let mut rng = Rng::new(50);
        let fds = open_descriptors();
        let mut died_in = [0u32; 8];
        let mut kills = 0;
        // Pages are missing only once: a new vmap for each batch.
        while kills < 150 || died_in[..7].contains(&0) {
            let vmap = engine.vmap(&pages(PAGES)).unwrap();
            let region = vmap.attach(&AttachOptions::new()).unwrap();
            let whole: Vec<Duration> = (0..3)
                .map(|n| {
                    let start = Instant::now();
                    reap_ok(child(|| life(&vmap, &region, &progress, 4 * n)));
                    start.elapsed()
                })
                .collect();
            let whole = whole.iter().min().unwrap().as_nanos() as u64;
            for n in 3..53 {
                progress.at().store(0, Ordering::Release);
                let delay = Duration::from_nanos(rng.below(whole));
                let pid = child(|| {
                    life(&vmap, &region, &progress, 4 * n);
                    std::thread::park();
                });
                let start = Instant::now();
                while start.elapsed() < delay {
                    std::hint::spin_loop();
                }
                kill_and_reap(pid);
                died_in[progress.at().load(Ordering::Acquire) as usize] += 1;
                kills += 1;
                // A grandchild may live a moment longer.
                settled(&engine, &vmap, 1);
                assert_count(&engine, &vmap, 1);
            }
            for page in 0..PAGES {
                assert_eq!(touch::read(at(&region, page)), Ok(mark(page)));
            }
            assert_nobody_waits(&engine);
        }
        eventually("descriptors are back", || open_descriptors() == fds);
        assert_eq!(engine.stats().panics, 0);
    });
}

/// T50, T52: a process that is killed while a nested fork copies its memory and its other threads fault in it.
#[test]
fn a_process_killed_with_threads_in_faults_and_in_forks_is_counted_out() {
    alone("a_process_killed_with_threads_in_faults_and_in_forks_is_counted_out", || {
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        let gated = GatedSource::new();
        let slow = engine.vmap(&gated.list(64)).unwrap();
        let blocked = slow.attach(&AttachOptions::new()).unwrap();
        let vmap = engine.vmap(&pages(64)).unwrap();
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        for round in 0..10 {
            gated.shut();
            let started = Told::new();
            let pid = child(|| {
                std::thread::scope(|scope| {
                    // Not next to each other: they would be read together.
                    for page in [0, 2] {
                        let addr = at(&blocked, 4 * round + page) as usize;
                        scope.spawn(move || touch::read(addr as *const u8));
                    }
                    for page in 0..2 {
                        let (region, started) = (&region, &started);
                        scope.spawn(move || {
                            loop {
                                reap_ok(child(|| assert_eq!(touch::read(at(region, page)), Ok(mark(page)))));
                                started.tell(1);
                            }
                        });
                    }
                });
            });
            gated.wait_for_held(2);
            (0..4).for_each(|_| started.wait_for(1));
            kill_and_reap(pid);
            settled(&engine, &vmap, 1);
            gated.open();
            assert_count(&engine, &vmap, 1);
            assert_count(&engine, &slow, 1);
        }
        assert_eq!(touch::read(at(&blocked, 63)), Ok(mark(63)));
    });
}

/// Memory whose owner forks when it is dropped.
struct ForksOnDrop {
    bytes: Vec<u8>,
    region: Arc<Region>,
    by_the_keeper: Arc<AtomicUsize>,
}

impl AsRef<[u8]> for ForksOnDrop {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for ForksOnDrop {
    fn drop(&mut self) {
        let keeper = std::thread::current().name() == Some("kiomap-keeper");
        let region = &self.region;
        reap_ok(child(|| {
            if keeper {
                let why = region.check().unwrap_err();
                assert!(matches!(&why, Error::NotInherited { why } if why.contains("wait for itself")), "{why}");
                assert!(touch::read(at(region, 5)).unwrap_err().is_sigsegv());
            } else {
                assert_eq!(touch::read(at(region, 5)), Ok(mark(5)));
            }
        }));
        self.by_the_keeper.fetch_add(usize::from(keeper), Ordering::SeqCst);
    }
}

/// T60: the thread that keeps the processes can't be forked from, as the child would wait for it: the child is told so,
/// by an error, and has nothing. It waits for nobody, and the engine goes on.
#[test]
fn a_fork_from_the_engines_own_keeper_is_refused() {
    alone("a_fork_from_the_engines_own_keeper_is_refused", || {
        let engine = engine_builder().build().unwrap();
        let memory = engine.vmap(&pages(8)).unwrap();
        let region = Arc::new(memory.attach(&AttachOptions::new()).unwrap());
        let by_the_keeper = Arc::new(AtomicUsize::new(0));
        let nr_threads = threads().len();
        // Who drops a list last is the engine's business: until the keeper was it.
        while by_the_keeper.load(Ordering::SeqCst) < 3 {
            let mut list = Kiobuf::new();
            let owner = ForksOnDrop {
                bytes: vec![9; page_size()],
                region: Arc::clone(&region),
                by_the_keeper: Arc::clone(&by_the_keeper),
            };
            list.map_slice(owner).unwrap();
            let vmap = engine.vmap(&list).unwrap();
            drop(list);
            let area = vmap.attach(&AttachOptions::new()).unwrap();
            // The list begins where the memory does, somewhere in its first page.
            let pid = child(|| assert_eq!(touch::read(area.as_ptr().wrapping_add(page_size() - 1)), Ok(9)));
            drop((area, vmap));
            reap_ok(pid);
            settled(&engine, &memory, 1);
        }
        assert_count(&engine, &memory, 1);
        assert_eq!((threads().len(), engine.stats().panics), (nr_threads, 0));
        reap_ok(child(|| assert_eq!(touch::read(at(&region, 6)), Ok(mark(6)))));
    });
}
