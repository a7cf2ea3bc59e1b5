//! What the fault-handling thread does not do: allocate or free memory, or make more calls than a fault needs.

mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};

use kiomap::{AttachOptions, Engine, Kiobuf, Region, Revoke, page_size};
use support::scene::{Rng, at, child};
use support::{alone, engine_builder, mark, pages, reap_ok, touch};

/// The thread that is watched; 0 when none is.
static WATCHED: AtomicI32 = AtomicI32::new(0);
static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);
static FREES: AtomicU64 = AtomicU64::new(0);

/// Counts what one thread asks of the allocator. It looks at the thread's id by a system call: a thread-local variable
/// may itself allocate.
struct Counting;

fn count(counter: &AtomicU64) {
    let watched = WATCHED.load(Ordering::Relaxed);
    if watched != 0 && nix::unistd::gettid().as_raw() == watched {
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

/// The id of the engine's fault-handling thread.
fn fault_thread() -> i32 {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let mut found = tasks.filter_map(|task| {
        let task = task.unwrap();
        let comm = std::fs::read_to_string(task.path().join("comm")).unwrap_or_default();
        (comm.trim() == "kiomap-fault").then(|| task.file_name().to_str().unwrap().parse().unwrap())
    });
    let thread = found.next().expect("the engine has a fault-handling thread");
    assert_eq!(found.next(), None);
    thread
}

/// Runs `body` and says how often the fault-handling thread allocated and freed meanwhile.
fn watching(engine: &Engine, body: impl FnOnce()) -> (u64, u64) {
    // Whatever the thread does once, at its start, is behind it.
    engine.settle().unwrap();
    ALLOCATIONS.store(0, Ordering::Relaxed);
    FREES.store(0, Ordering::Relaxed);
    WATCHED.store(fault_thread(), Ordering::Relaxed);
    body();
    engine.settle().unwrap();
    WATCHED.store(0, Ordering::Relaxed);
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
        WATCHED.store(nix::unistd::gettid().as_raw(), Ordering::Relaxed);
        drop(std::hint::black_box(vec![1u8; 100]));
        WATCHED.store(0, Ordering::Relaxed);
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

/// Ten thousand faults on a file that the page cache holds: no allocation.
#[test]
fn faults_on_a_cached_file_allocate_nothing() {
    alone("faults_on_a_cached_file_allocate_nothing", || {
        use std::io::Write;
        let mut file = tempfile::tempfile().unwrap();
        for page in 0..PAGES {
            file.write_all(&vec![mark(page); page_size()]).unwrap();
        }
        let mut list = Kiobuf::new();
        list.map_file(&file, 0..PAGES * page_size() as u64).unwrap();
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        let region = engine.vmap(&list).unwrap().attach(&AttachOptions::new()).unwrap();
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

/// A fault by itself costs one read and one copy: no wake-up, no second try. (A read that found nothing is not counted,
/// nor is the wait for news.)
#[test]
fn a_fault_by_itself_costs_one_read_and_one_copy() {
    alone("a_fault_by_itself_costs_one_read_and_one_copy", || {
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
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
