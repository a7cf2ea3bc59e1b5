//! What the fault-handling threads do not do: allocate or free memory, or make more calls than a fault needs.

#[allow(dead_code, reason = "the floor of the benchmarks, of which a part is used")]
#[path = "../bench/common/raw.rs"]
mod floor;
mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};

use floor::{Memory, Message, Waiting};
use kiomap::{
    AdoptOptions, Adopted, AdoptedArea, AttachOptions, Engine, Kiobuf, OpenWay, PageSize, Refusal, Region, Revoke,
    page_size,
};
use support::calls::{Calls, calls_of};
use support::peer::{MEMORY, Peer};
use support::pool::{per_huge, with_pool};
use support::scene::{Rng, at, child};
use support::{alone, assert_sigbus, engine_builder, holes, mark, pages, reap_ok, touch};
use userfaultfd::FeatureFlags;

/// The threads that are watched; 0 for none.
static WATCHED: [AtomicI32; 8] = [const { AtomicI32::new(0) }; 8];
static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);
static FREES: AtomicU64 = AtomicU64::new(0);

/// Counts what some threads ask of the allocator. It looks at the thread's id by a system call: a thread-local variable
/// may itself allocate.
struct Counting;

fn count(counter: &AtomicU64) {
    if WATCHED[0].load(Ordering::Relaxed) == 0 {
        return;
    }
    let this = nix::unistd::gettid().as_raw();
    if WATCHED.iter().any(|watched| watched.load(Ordering::Relaxed) == this) {
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

// SAFETY: hands every request on to the system's allocator, unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(&ALLOCATIONS);
        // SAFETY: the caller's promises are the system allocator's conditions.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(&ALLOCATIONS);
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(&ALLOCATIONS);
        // SAFETY: as above.
        unsafe { System.realloc(pointer, layout, size) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(&FREES);
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The ids of the engine's fault-handling threads.
fn fault_threads() -> Vec<i32> {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let found = tasks.filter_map(|task| {
        let task = task.unwrap();
        let comm = std::fs::read_to_string(task.path().join("comm")).unwrap_or_default();
        comm.starts_with(FAULT_THREAD).then(|| task.file_name().to_str().unwrap().parse().unwrap())
    });
    found.collect()
}

/// What the names of fault-handling threads begin with.
const FAULT_THREAD: &str = "kiomap-fault";

/// Watches these threads and no others.
fn watch(threads: &[i32]) {
    assert!(threads.len() <= WATCHED.len());
    for (n, watched) in WATCHED.iter().enumerate() {
        watched.store(threads.get(n).copied().unwrap_or(0), Ordering::Relaxed);
    }
}

/// Runs `body` and says how often the fault-handling threads allocated and freed meanwhile.
fn watching(engine: &Engine, body: impl FnOnce()) -> (u64, u64) {
    // Whatever the thread does once, at its start, is behind it.
    engine.settle().unwrap();
    ALLOCATIONS.store(0, Ordering::Relaxed);
    FREES.store(0, Ordering::Relaxed);
    let threads = fault_threads();
    assert!(!threads.is_empty(), "the engine has a fault-handling thread");
    watch(&threads);
    body();
    engine.settle().unwrap();
    watch(&[]);
    (ALLOCATIONS.load(Ordering::Relaxed), FREES.load(Ordering::Relaxed))
}

fn touch_all(region: &Region, nr_pages: u64) {
    (0..nr_pages).for_each(|page| assert_eq!(touch::read(at(region, page)), Ok(mark(page))));
}

const PAGES: u64 = 10_000;

/// The counter itself counts: what a thread that is watched allocates and frees is seen.
#[test]
fn the_counting_allocator_sees_a_watched_thread() {
    alone("the_counting_allocator_sees_a_watched_thread", || {
        watch(&[nix::unistd::gettid().as_raw()]);
        drop(std::hint::black_box(vec![1u8; 100]));
        watch(&[]);
        assert_eq!((ALLOCATIONS.load(Ordering::Relaxed), FREES.load(Ordering::Relaxed)), (1, 1));
        std::thread::spawn(|| drop(std::hint::black_box(vec![1u8; 100]))).join().unwrap();
        assert_eq!((ALLOCATIONS.load(Ordering::Relaxed), FREES.load(Ordering::Relaxed)), (1, 1));
    });
}

/// Ten thousand faults on memory: no allocation.
#[test]
fn faults_on_memory_allocate_nothing() {
    alone("faults_on_memory_allocate_nothing", || {
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        let region = engine.vmap(&pages(PAGES)).unwrap().attach(&AttachOptions::new()).unwrap();
        assert_eq!(watching(&engine, || touch_all(&region, PAGES)), (0, 0));
        assert_eq!(engine.stats().faults, PAGES);
    });
}

/// Ten thousand faults that are recorded: no allocation.
#[test]
fn recorded_faults_allocate_nothing() {
    alone("recorded_faults_allocate_nothing", || {
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        let vmap = engine.vmap_builder(&pages(PAGES)).record_working_set().build().unwrap();
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        assert_eq!(watching(&engine, || touch_all(&region, PAGES)), (0, 0));
        assert!(vmap.working_set().unwrap().pages().iter().copied().eq(0..PAGES));
    });
}

/// A list of `nr_pages` marked pages of a file that the page cache holds.
fn cached_file(nr_pages: u64) -> Kiobuf {
    use std::io::Write;
    let mut file = tempfile::tempfile().unwrap();
    for page in 0..nr_pages {
        file.write_all(&vec![mark(page); page_size()]).unwrap();
    }
    let mut list = Kiobuf::new();
    list.map_file(&file, 0..nr_pages * page_size() as u64).unwrap();
    list
}

fn zeros(nr_pages: u64) -> Kiobuf {
    let mut list = Kiobuf::new();
    list.map_zero(nr_pages).unwrap();
    list
}

/// Engines as they are by default, and those of two settings, with every kind of page, touched by several threads at once
/// in an order of their own: no allocation.
#[test]
fn faults_of_every_kind_at_default_settings_allocate_nothing() {
    alone("faults_of_every_kind_at_default_settings_allocate_nothing", || {
        const EACH: u64 = 2000;
        let mut list = pages(EACH);
        for part in [cached_file(EACH), zeros(EACH), holes(EACH)] {
            list.expand(&part).unwrap();
        }
        for builder in [engine_builder(), engine_builder().fault_around_pages(64), engine_builder().workers(1)] {
            let engine = builder.build().unwrap();
            let region = engine.vmap(&list).unwrap().attach(&AttachOptions::new()).unwrap();
            let watched = watching(&engine, || {
                std::thread::scope(|scope| {
                    for seed in 0..3 {
                        let region = &region;
                        scope.spawn(move || {
                            let mut order: Vec<u64> = (0..4 * EACH).collect();
                            Rng::new(seed).shuffle(&mut order);
                            for page in order {
                                match page / EACH {
                                    0 => assert_eq!(touch::read(at(region, page)), Ok(mark(page))),
                                    1 => assert_eq!(touch::read(at(region, page)), Ok(mark(page - EACH))),
                                    2 => assert_eq!(touch::read(at(region, page)), Ok(0)),
                                    _ => assert_sigbus(region, page),
                                }
                            }
                        });
                    }
                });
            });
            assert_eq!(watched, (0, 0));
        }
    });
}

/// Ten thousand faults that the touching thread answers itself, in a signal handler: it allocates nothing.
#[test]
fn faults_that_their_own_thread_answers_allocate_nothing() {
    alone("faults_that_their_own_thread_answers_allocate_nothing", || {
        touch::prepare();
        let builder = engine_builder().delivery(kiomap::Delivery::InThread);
        let engine = builder.fault_around_pages(1).build().unwrap();
        let region = engine.vmap(&pages(PAGES)).unwrap().attach(&AttachOptions::new()).unwrap();
        ALLOCATIONS.store(0, Ordering::Relaxed);
        FREES.store(0, Ordering::Relaxed);
        WATCHED[0].store(nix::unistd::gettid().as_raw(), Ordering::Relaxed);
        touch_all(&region, PAGES);
        WATCHED[0].store(0, Ordering::Relaxed);
        assert_eq!((ALLOCATIONS.load(Ordering::Relaxed), FREES.load(Ordering::Relaxed)), (0, 0));
        assert_eq!(engine.stats().faults, PAGES);
        // The fault-handling thread, which reads what changes, none either.
        let region = engine.vmap(&pages(PAGES)).unwrap().attach(&AttachOptions::new()).unwrap();
        assert_eq!(watching(&engine, || touch_all(&region, PAGES)), (0, 0));
    });
}

/// Ten thousand faults on a file that the page cache holds: no allocation.
#[test]
fn faults_on_a_cached_file_allocate_nothing() {
    alone("faults_on_a_cached_file_allocate_nothing", || {
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        let region = engine.vmap(&cached_file(PAGES)).unwrap().attach(&AttachOptions::new()).unwrap();
        assert_eq!(watching(&engine, || touch_all(&region, PAGES)), (0, 0));
        assert_eq!(engine.stats().faults, PAGES);
    });
}

/// Reads by workers, holes, and pages past the end: no allocation on the fault-handling thread.
#[test]
fn slow_faults_and_refused_ones_allocate_nothing() {
    alone("slow_faults_and_refused_ones_allocate_nothing", || {
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        let mut list = support::scene::sourced_pages(1000);
        let mut hole = Kiobuf::new();
        hole.map_hole(100).unwrap();
        list.expand(&hole).unwrap();
        let vmap = engine.vmap(&list).unwrap();
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        let watched = watching(&engine, || {
            touch_all(&region, 1000);
            for page in 1000..1100 {
                assert!(touch::read(at(&region, page)).unwrap_err().is_sigbus_at(at(&region, page) as usize));
            }
        });
        assert_eq!(watched, (0, 0));
    });
}

/// Faults on huge pages, copied straight, composed at once or by a worker, or refused: no allocation.
#[test]
fn faults_on_huge_pages_allocate_nothing() {
    with_pool("faults_on_huge_pages_allocate_nothing", || {
        let engine = engine_builder().build().unwrap();
        let n = per_huge();
        let part = |build: &dyn Fn(&mut Kiobuf)| {
            let mut list = Kiobuf::new();
            build(&mut list);
            list
        };
        let zeros = part(&|list| list.map_zero(n + 5).unwrap());
        let holes = part(&|list| list.map_hole(n).unwrap());
        let mut parts = vec![pages(2 * n), zeros, pages(n - 5), holes];
        if !support::taken_away().contains(kiomap::Features::THREAD_ID) {
            parts.push(support::source(2 * n, |_, _| Ok(())));
        }
        let list = Kiobuf::concat(&parts).unwrap();
        let vmap = engine.vmap_builder(&list).page_size(PageSize::Huge2M).build().unwrap();
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        let touch = || {
            for page in (0..list.nr_pages()).step_by(n as usize) {
                assert_eq!(touch::read(at(&region, page)).is_err(), page == 4 * n, "page {page}");
            }
        };
        assert_eq!(watching(&engine, touch), (0, 0));
        assert_eq!(engine.stats().faults, list.nr_pages() / n);
    });
}

/// Attaches, detaches, unmaps of every kind, revokes, new lists, forks and deaths: no allocation on the fault-handling
/// thread, and nothing is freed by it, though lists and vmaps end meanwhile.
#[test]
fn events_and_commands_allocate_nothing() {
    alone("events_and_commands_allocate_nothing", || {
        let engine = engine_builder().fault_around_pages(2).build().unwrap();
        let vmap = engine.vmap_builder(&pages(64)).expandable().build().unwrap();
        let kept = vmap.attach(&AttachOptions::new()).unwrap();
        let watched = watching(&engine, || {
            std::thread::scope(|scope| {
                for seed in 0..3 {
                    let (engine, vmap) = (&engine, &vmap);
                    scope.spawn(move || {
                        let mut rng = Rng::new(seed);
                        for round in 0..200 {
                            let list = if round % 2 == 0 { pages(16) } else { support::scene::sourced_pages(16) };
                            let own = engine.vmap(&list).unwrap();
                            drop(list);
                            let region = own.attach(&AttachOptions::new()).unwrap();
                            let again = vmap.attach(&AttachOptions::new().pgoff(rng.below(32))).unwrap();
                            assert_eq!(touch::read(at(&region, 5)), Ok(mark(5)));
                            match rng.below(4) {
                                // SAFETY: nothing refers to the pages.
                                0 => drop(unsafe { libc::munmap(at(&region, 7).cast(), 2 * page_size()) }),
                                // SAFETY: as above.
                                1 => drop(unsafe { libc::munmap(region.as_ptr().cast(), region.len_bytes()) }),
                                2 => own.revoke(Revoke::Hard).unwrap(),
                                _ => own.revoke(Revoke::Soft).unwrap(),
                            }
                            drop(own);
                            drop(again);
                            drop(region);
                        }
                    });
                }
                for _ in 0..10 {
                    vmap.expand(&pages(4)).unwrap();
                }
            });
            for n in 0..40 {
                let pid = child(|| {
                    assert_eq!(touch::read(at(&kept, n)), Ok(mark(n)));
                    let own = vmap.attach(&AttachOptions::new().pgoff(n)).unwrap();
                    assert_eq!(touch::read(own.as_ptr()), Ok(mark(n)));
                    if n % 2 == 0 {
                        drop(own);
                    } else {
                        std::mem::forget(own);
                    }
                });
                reap_ok(pid);
            }
        });
        assert_eq!(watched, (0, 0));
    });
}

/// Serves the first pages of another process by those of a list.
fn adopt(engine: &Engine, peer: &Peer, uffd: OwnedFd, list: &Kiobuf) -> Adopted {
    let pidfd = support::pidfd(peer.pid);
    // Pages that can't be had are poisoned where the kernel has that.
    let poisons = engine.features().contains(kiomap::Features::POISON);
    let refusal = if poisons { Refusal::Sigbus } else { Refusal::Kill };
    let addrs = MEMORY..MEMORY + list.nr_pages() as usize * page_size();
    let area = AdoptedArea::new(addrs, &engine.vmap(list).unwrap(), 0);
    engine.adopt(uffd, &[area], AdoptOptions::new().pidfd(pidfd).refusal(refusal)).unwrap()
}

/// Faults of another process on every kind of page, its moves, its unmaps, what it gives up, and its forks: no allocation.
#[test]
fn faults_and_events_of_an_adopted_process_allocate_nothing() {
    alone("faults_and_events_of_an_adopted_process_allocate_nothing", || {
        const EACH: u64 = 1000;
        let events = FeatureFlags::EVENT_REMOVE | FeatureFlags::EVENT_UNMAP | FeatureFlags::EVENT_REMAP;
        let nr_mapped = 6 * EACH as usize;
        // Reports of forks take a privilege.
        let forking = Peer::start(events | FeatureFlags::EVENT_FORK, nr_mapped, false);
        let forks = forking.is_some();
        let Some((peer, uffd)) = forking.or_else(|| Peer::start(events, nr_mapped, false)) else {
            skip!("a userfaultfd with {events:?} is not to be had");
        };
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        let mut list = pages(EACH);
        for part in [cached_file(EACH), zeros(EACH), holes(EACH)] {
            list.expand(&part).unwrap();
        }
        if !support::taken_away().contains(kiomap::Features::THREAD_ID) {
            list.expand(&support::scene::sourced_pages(EACH)).unwrap();
        }
        let poisons = engine.features().contains(kiomap::Features::POISON);
        let adopted = adopt(&engine, &peer, uffd, &list);
        let watched = watching(&engine, || {
            for page in 0..list.nr_pages() - 100 {
                match page / EACH {
                    2 => assert_eq!(peer.read(page), Ok(0)),
                    3 if poisons => assert_eq!(peer.read(page), Err(libc::SIGBUS)),
                    3 => {}
                    part => assert_eq!(peer.read(page), Ok(mark(page - part * EACH)), "page {page}"),
                }
            }
            peer.give_up(100, 50);
            assert_eq!(peer.read(120), Ok(0));
            peer.unmap(200, 50);
            peer.remap(300, 50, nr_mapped as u64);
            assert_eq!(peer.read(nr_mapped as u64), Ok(mark(300)));
            for n in 0..if forks { 20 } else { 0 } {
                let child = peer.fork();
                let page = list.nr_pages() - 100 + n;
                assert_eq!(child.read(page), Ok(mark(page % EACH)), "page {page}");
                child.exit();
            }
        });
        assert_eq!(watched, (0, 0));
        assert!(!adopted.is_gone());
    });
}

/// A fault by itself costs one read and one copy: no wake-up, no second try. (A read that found nothing is not counted,
/// nor is the wait for news.)
#[test]
fn a_fault_by_itself_costs_one_read_and_one_copy() {
    alone("a_fault_by_itself_costs_one_read_and_one_copy", || {
        // A member of a crew wakes by itself.
        let engine = engine_builder().handlers(1).fault_around_pages(1).build().unwrap();
        let region = engine.vmap(&pages(PAGES)).unwrap().attach(&AttachOptions::new()).unwrap();
        let before = engine.stats();
        touch_all(&region, PAGES);
        engine.settle().unwrap();
        let after = engine.stats();
        assert_eq!(after.faults - before.faults, PAGES);
        assert_eq!(after.reads - before.reads, PAGES);
        assert_eq!(after.pages_copied - before.pages_copied, PAGES);
        assert_eq!((after.wakes, after.already_present, after.parked), (before.wakes, 0, 0));
    });
}

/// Faults whose calls are counted.
const TRACED: u64 = 1000;

/// The calls of the fault-handling threads of an engine while each page of a list is touched once, at the settings of
/// `builder`; the first page of the list was touched before.
fn calls_of_engine(list: &Kiobuf, builder: impl Fn() -> kiomap::EngineBuilder) -> nix::Result<Calls> {
    calls_of(FAULT_THREAD, || {
        let engine = builder().build().unwrap();
        let region = engine.vmap(list).unwrap().attach(&AttachOptions::new()).unwrap();
        let _ = touch::read(at(&region, 0));
        engine.settle().unwrap();
        move || {
            (1..=TRACED).for_each(|page| _ = touch::read(at(&region, page)));
            // It lives until the process ends.
            std::mem::forget(engine);
        }
    })
}

/// The same of an engine that has adopted a process, which touches the pages.
fn calls_of_adopted(list: &Kiobuf) -> nix::Result<Calls> {
    /// Touches that the process is told of ahead, so that it does not pause between two.
    const AHEAD: u64 = 64;
    calls_of(FAULT_THREAD, || {
        let (peer, uffd) = Peer::start(FeatureFlags::empty(), TRACED as usize + 1, false).unwrap();
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        adopt(&engine, &peer, uffd, list);
        let _ = peer.read(0);
        engine.settle().unwrap();
        move || {
            (1..=AHEAD).for_each(|page| peer.begin_read(page));
            for page in 1..=TRACED {
                let _ = peer.outcome().unwrap();
                if page + AHEAD <= TRACED {
                    peer.begin_read(page + AHEAD);
                }
            }
            // It lives until the process ends.
            std::mem::forget(engine);
        }
    })
}

/// The calls of a bare loop, which reads a fault and copies a page.
fn calls_of_the_floor() -> nix::Result<Calls> {
    const FLOOR: &str = "floor";
    calls_of(FLOOR, || {
        let uffd = floor::Uffd::open(OpenWay::UserModeOnly, Waiting::Read).unwrap();
        let nr_pages = TRACED as usize + 1;
        let memory = floor::Mapping::new(Memory::Memfd, nr_pages, nr_pages).unwrap();
        uffd.register(&memory).unwrap();
        let start = memory.addr();
        // Both live until the process ends.
        std::mem::forget(memory);
        let source = vec![7u8; page_size()];
        let answer = move || {
            let mut messages = [Message::default(); 16];
            loop {
                uffd.wait(&mut messages, |addr| {
                    // SAFETY: the page is missing, of a mapping to which no reference exists.
                    unsafe { uffd.copy(addr & !(page_size() - 1), source.as_ptr(), page_size()) }.unwrap();
                })
                .unwrap();
            }
        };
        std::thread::Builder::new().name(FLOOR.into()).spawn(answer).unwrap();
        let touch = move |page: u64| assert_eq!(touch::read((start + page as usize * page_size()) as *mut u8), Ok(7));
        touch(0);
        move || (1..=TRACED).for_each(touch)
    })
}

/// Whether this run of the suite sets how many handlers an engine has, and more than one.
fn has_several_handlers() -> bool {
    std::env::var("KIOMAP_TEST_HANDLERS").is_ok_and(|handlers| handlers != "1")
}

/// What a fault costs in system calls, by the kernel's own count: a bare loop makes two for each fault, a read and a copy.
#[test]
fn a_bare_loop_makes_two_calls_for_each_fault() {
    alone("a_bare_loop_makes_two_calls_for_each_fault", || {
        let calls = skip_untraceable!(calls_of_the_floor());
        assert_eq!(calls.of(libc::SYS_ioctl), TRACED, "{calls:?}");
        // The last read is the one in which it waits; the first was entered before.
        assert!((TRACED..=TRACED + 1).contains(&calls.of(libc::SYS_read)), "{calls:?}");
        assert!(calls.all() <= 2 * TRACED + 1, "{calls:?}");
    });
}

/// As the bare loop, but for less than one: a read and the ioctl that installs and wakes, while a thread faults without a pause; and now and then a
/// look at everything else. A page of a file takes one call more, which reads it.
#[test]
fn an_engine_makes_the_calls_of_a_bare_loop_and_few_more() {
    alone("an_engine_makes_the_calls_of_a_bare_loop_and_few_more", || {
        if has_several_handlers() {
            skip!("what is counted is the calls of one handler by itself");
        }
        let one_by_one = || engine_builder().fault_around_pages(1);
        let nr_pages = TRACED + 1;
        for (what, list, file_reads) in
            [("memory", pages(nr_pages), 0), ("zeros", zeros(nr_pages), 0), ("a cached file", cached_file(nr_pages), 1)]
        {
            let count = || {
                let calls = calls_of_engine(&list, one_by_one)?;
                assert_eq!(calls.of(libc::SYS_preadv2), file_reads * TRACED, "{what}: {calls:?}");
                Ok(calls)
            };
            skip_untraceable!(assert_few_more(what, 2 + file_reads, count));
        }
    });
}

/// For another process as well: its userfaultfd is read by another call, but by one, if the kernel knows that.
#[test]
fn an_engine_makes_no_more_calls_for_an_adopted_process() {
    alone("an_engine_makes_no_more_calls_for_an_adopted_process", || {
        if has_several_handlers() {
            skip!("what is counted is the calls of one handler by itself");
        }
        let nr_pages = TRACED + 1;
        for (what, list, file_reads) in
            [("memory", pages(nr_pages), 0), ("zeros", zeros(nr_pages), 0), ("a cached file", cached_file(nr_pages), 1)]
        {
            // Where a read can't say that it does not wait, it is a plain one, and the flags are looked at before each.
            let looks_at_flags = skip_untraceable!(calls_of_adopted(&list)).of(libc::SYS_read) >= TRACED;
            let per_fault = 2 + file_reads + u64::from(looks_at_flags);
            skip_untraceable!(assert_few_more(what, per_fault, || calls_of_adopted(&list)));
        }
    });
}

/// Asserts that each fault takes so many calls, one of them an ioctl, and less than one more; one that a pause follows, not
/// more than two. Where others leave the touching thread no processor, there are pauses everywhere.
fn assert_few_more(what: &str, per_fault: u64, count: impl Fn() -> nix::Result<Calls>) -> nix::Result<()> {
    // The touching thread may lose its processor and so pause, which this is not about: the best of some tries.
    let mut tries = Vec::new();
    for _ in 0..10 {
        let calls = count()?;
        // Never a second try, nor a wake-up by itself.
        assert!((TRACED..TRACED + 8).contains(&calls.of(libc::SYS_ioctl)), "{what}: {calls:?}");
        assert!(calls.all() < (per_fault + 2) * TRACED + 100, "{what}: {calls:?}");
        let more = calls.all() - per_fault * TRACED;
        if more < TRACED {
            return Ok(());
        }
        tries.push(more);
    }
    support::tell(&format!(
        "{what}: skipped, because the touching thread paused between most faults in every try: {tries:?} calls more"
    ));
    Ok(())
}

/// A page that can't be had takes one call more than a page: the kernel is asked first whether it came meanwhile.
#[test]
fn a_hole_costs_one_call_more_than_a_page() {
    alone("a_hole_costs_one_call_more_than_a_page", || {
        if has_several_handlers() {
            skip!("what is counted is the calls of one handler by itself");
        }
        if support::taken_away().contains(kiomap::Features::POISON) {
            skip!("a page is masked in more calls than it is poisoned");
        }
        let one_by_one = || engine_builder().fault_around_pages(1);
        let calls = skip_untraceable!(calls_of_engine(&holes(TRACED + 1), one_by_one));
        assert!((2 * TRACED..2 * TRACED + 8).contains(&calls.of(libc::SYS_ioctl)), "{calls:?}");
        assert!(calls.all() < 5 * TRACED + 100, "{calls:?}");
    });
}

/// A fault by itself, after which nothing comes: the wait that it ends, a read, the ioctl, and a read that finds nothing more.
#[test]
fn a_fault_by_itself_costs_four_calls() {
    alone("a_fault_by_itself_costs_four_calls", || {
        if has_several_handlers() {
            skip!("what is counted is the calls of one handler by itself");
        }
        let calls = calls_of(FAULT_THREAD, || {
            let engine = slow_to_follow();
            let region = engine.vmap(&pages(ALONE)).unwrap().attach(&AttachOptions::new()).unwrap();
            one_after_the_other(engine, move |page| assert_eq!(touch::read(at(&region, page)), Ok(mark(page))))
        });
        assert_four_calls_each(&skip_untraceable!(calls), 0);
    });
}

/// The same of another process.
#[test]
fn a_fault_by_itself_of_an_adopted_process_costs_four_calls() {
    alone("a_fault_by_itself_of_an_adopted_process_costs_four_calls", || {
        if has_several_handlers() {
            skip!("what is counted is the calls of one handler by itself");
        }
        let calls = calls_of(FAULT_THREAD, || {
            let (peer, uffd) = Peer::start(FeatureFlags::empty(), ALONE as usize, false).unwrap();
            let engine = slow_to_follow();
            adopt(&engine, &peer, uffd, &pages(ALONE));
            one_after_the_other(engine, move |page| assert_eq!(peer.read(page), Ok(mark(page))))
        });
        let calls = skip_untraceable!(calls);
        let looks_at_flags = if calls.of(libc::SYS_read) >= ALONE { 2 } else { 0 };
        assert_four_calls_each(&calls, looks_at_flags);
    });
}

/// Faults that come by themselves.
const ALONE: u64 = 100;

/// An engine that neither follows nor spins: those look more than once before they sleep.
fn slow_to_follow() -> Engine {
    engine_builder().fault_around_pages(1).placement(kiomap::Placement::Floating).build().unwrap()
}

/// Touches each page when the handlers sleep. The engine lives until the process ends.
fn one_after_the_other(engine: Engine, touch: impl Fn(u64)) -> impl FnOnce() {
    engine.settle().unwrap();
    let handlers = fault_threads();
    move || {
        for page in 0..ALONE {
            // It waits; what stops it for being traced is another state.
            support::eventually("the handler sleeps", || handlers.iter().all(|&thread| is_asleep(thread)));
            touch(page);
        }
        std::mem::forget(engine);
    }
}

fn assert_four_calls_each(calls: &Calls, more: u64) {
    assert!((ALONE..ALONE + 2).contains(&calls.of(libc::SYS_ioctl)), "{calls:?}");
    assert!(calls.all() <= (4 + more) * ALONE + 32, "{calls:?}");
}

fn is_asleep(thread: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/self/task/{thread}/stat")).unwrap();
    stat.rsplit(')').next().unwrap().trim_start().starts_with('S')
}
