//! A large range is brought by several threads: what comes, what is told, and that nothing of them stays.

mod support;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::available_parallelism;

use kiomap::{AttachOptions, Error, page_size};
use nix::errno::Errno;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::{ForkResult, Pid, fork};
use support::populating::{assert_marks, bytes, populate_amid_trouble};
use support::raw::FAR;
use support::scene::{at, settled};
use support::{
    DEADLINE, alone, assert_sigbus, attached, engine_builder, holes, list_with_holes, mark, pages, reap_ok, source,
    threads, touch,
};

/// More than what one thread brings alone.
const MANY: u64 = 9_000;

fn has_two_processors() -> bool {
    available_parallelism().is_ok_and(|processors| processors.get() > 1)
}

/// Binds this thread to one of its processors while it does something.
fn on_one_processor<T>(body: impl FnOnce() -> T) -> T {
    let me = Pid::from_raw(0);
    let before = sched_getaffinity(me).unwrap();
    let mut one = CpuSet::new();
    one.set((0..CpuSet::count()).find(|&cpu| before.is_set(cpu).unwrap()).unwrap()).unwrap();
    sched_setaffinity(me, &one).unwrap();
    let done = body();
    sched_setaffinity(me, &before).unwrap();
    done
}

/// What a populating that brought not all says.
#[track_caller]
fn missing(outcome: kiomap::Result<()>) -> (u64, u64, u64, String) {
    match outcome {
        Err(Error::NotPopulated { pgoff, missing, wanted, why }) => (pgoff, missing, wanted, why),
        other => panic!("{other:?}"),
    }
}

fn helpers() -> usize {
    threads().iter().filter(|name| *name == "kiomap-populate").count()
}

/// The reads of a source that are made at once.
#[derive(Default)]
struct InFlight {
    now_and_most: Mutex<(usize, usize)>,
    news: Condvar,
}

impl InFlight {
    /// Is in flight until there have been `wanted` at once.
    fn pass(&self, wanted: usize) {
        let mut state = self.now_and_most.lock().unwrap();
        state.0 += 1;
        state.1 = state.1.max(state.0);
        self.news.notify_all();
        let (mut state, waited) = self.news.wait_timeout_while(state, DEADLINE, |state| state.1 < wanted).unwrap();
        state.0 -= 1;
        assert!(!waited.timed_out(), "{wanted} reads were to be made at once");
    }

    fn most(&self) -> usize {
        self.now_and_most.lock().unwrap().1
    }
}

/// T16: several threads bring a large range, at once, and have ended when the call returns; one alone where the caller may use
/// one processor, or the range is small.
#[test]
fn threads_share_a_large_range_and_end_with_the_call() {
    alone("threads_share_a_large_range_and_end_with_the_call", || {
        needs_sources!();
        let engine = engine_builder().build().unwrap();
        let all = if has_two_processors() { 2 } else { 1 };
        let populate = |range: std::ops::Range<u64>, wanted: usize| {
            let in_flight = Arc::new(InFlight::default());
            let its = Arc::clone(&in_flight);
            let list = source(MANY, move |_, _| {
                its.pass(wanted);
                Ok(())
            });
            let (_vmap, region) = attached(&engine, &list);
            region.populate(bytes(range.clone())).unwrap();
            assert_eq!(helpers(), 0);
            assert_marks(&region, range);
            in_flight.most()
        };
        assert!((all..=4).contains(&populate(0..MANY, all)));
        assert_eq!(populate(0..8192, 1), 1);
        assert_eq!(on_one_processor(|| populate(0..MANY, 1)), 1);
    });
}

/// T77: holes in several steps, a failed source, what is unmapped and what lies past the end are told as by one thread: the first
/// page, how many, why.
#[test]
fn what_can_not_be_had_is_told_as_by_one_thread() {
    alone("what_can_not_be_had_is_told_as_by_one_thread", || {
        let engine = engine_builder().build().unwrap();
        let is_hole = |page: u64| page >= 1000 && page % 700 < 30;
        let list = || {
            let mut list = list_with_holes(MANY, is_hole);
            // What would take hours if it were looked at page by page.
            list.expand(&holes(1 << 28)).unwrap();
            list.expand(&pages(3000)).unwrap();
            list
        };
        let tell = |cut: Option<u64>| {
            let vmap = engine.vmap(&list()).unwrap();
            let pages = vmap.nr_pages() + 5000;
            let options = AttachOptions::new().len_bytes(pages as usize * page_size()).at(FAR);
            let region = vmap.attach(&options).unwrap();
            if let Some(page) = cut {
                // SAFETY: nothing refers to the pages.
                assert_eq!(unsafe { libc::munmap(at(&region, page).cast(), 600 * page_size()) }, 0);
            }
            let told = missing(region.populate(0..region.len_bytes()));
            let is_there = |page: &u64| !is_hole(*page) && !cut.is_some_and(|cut| (cut..cut + 600).contains(page));
            (0..MANY).filter(is_there).for_each(|page| assert_eq!(touch::read(at(&region, page)), Ok(mark(page))));
            assert_sigbus(&region, 4900);
            told
        };
        for cut in [None, Some(0), Some(500), Some(8200)] {
            let told = tell(cut);
            assert_eq!(told, on_one_processor(|| tell(cut)), "{cut:?}");
            let first = (0..MANY).find(|&page| is_hole(page)).unwrap();
            assert_eq!(told.0, cut.map_or(first, |cut| first.min(cut)));
        }
    });
}

/// T65, T107: populating among faults, unmaps, exchanged lists and revokes: each page is right or SIGBUS, and nobody hangs.
#[test]
fn among_faults_unmaps_and_revokes_no_wrong_byte_comes() {
    alone("among_faults_unmaps_and_revokes_no_wrong_byte_comes", || {
        let engine = engine_builder().build().unwrap();
        for seed in 0..6 {
            let (vmap, _region) = populate_amid_trouble(&engine, MANY, 500, seed);
            assert_eq!(helpers(), 0);
            settled(&engine, &vmap, 2);
        }
    });
}

/// T98: where no thread can be started, the caller does it all.
#[test]
fn without_room_for_threads_the_caller_brings_all() {
    alone("without_room_for_threads_the_caller_brings_all", || {
        let engine = engine_builder().build().unwrap();
        let (_vmap, region) = attached(&engine, &pages(MANY));
        let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
        let size = statm.split(' ').next().unwrap().parse::<u64>().unwrap() * page_size() as u64;
        let (soft, hard) = getrlimit(Resource::RLIMIT_AS).unwrap();
        // Less than a stack more.
        setrlimit(Resource::RLIMIT_AS, size + (256 << 10), hard).unwrap();
        let outcome = region.populate(0..region.len_bytes());
        setrlimit(Resource::RLIMIT_AS, soft, hard).unwrap();
        outcome.unwrap();
        assert_marks(&region, 0..MANY);
    });
}

/// A source of which a call fails ends nothing else; one that ends the engine ends the call, on every thread.
#[test]
fn a_shutdown_meanwhile_ends_the_call() {
    alone("a_shutdown_meanwhile_ends_the_call", || {
        needs_sources!();
        let engine = Arc::new(engine_builder().build().unwrap());
        let begun = Arc::new((Mutex::new(false), Condvar::new()));
        let its = Arc::clone(&begun);
        let list = source(MANY, move |_, _| {
            *its.0.lock().unwrap() = true;
            its.1.notify_all();
            Ok(())
        });
        let (_vmap, region) = attached(&engine, &list);
        let outcome = std::thread::scope(|scope| {
            let populating = scope.spawn(|| region.populate(0..region.len_bytes()));
            drop(begun.1.wait_while(begun.0.lock().unwrap(), |begun| !*begun).unwrap());
            engine.shutdown(kiomap::Shutdown::Poison).unwrap();
            populating.join().unwrap()
        });
        match outcome {
            Ok(()) | Err(Error::NotPopulated { .. }) => {}
            Err(error) => assert_eq!(error.errno(), Errno::ESHUTDOWN),
        }
        assert_eq!(helpers(), 0);
    });
}

/// T74: a source that forks, and returns in the child, is no trouble: the child ends, and the pages come.
#[test]
fn a_source_that_forks_leaves_nobody_waiting() {
    alone("a_source_that_forks_leaves_nobody_waiting", || {
        needs_sources!();
        let engine = engine_builder().build().unwrap();
        let (forked, child) = (AtomicBool::new(false), Arc::new(AtomicU64::new(0)));
        let its_child = Arc::clone(&child);
        let list = source(MANY, move |_, _| {
            if !forked.swap(true, Ordering::SeqCst) {
                // SAFETY: the child returns to the library, which ends it.
                if let ForkResult::Parent { child } = unsafe { fork() }.unwrap() {
                    its_child.store(child.as_raw() as u64, Ordering::SeqCst);
                }
            }
            Ok(())
        });
        let (_vmap, region) = attached(&engine, &list);
        region.populate(0..region.len_bytes()).unwrap();
        assert_eq!(helpers(), 0);
        assert_marks(&region, 0..MANY);
        reap_ok(Pid::from_raw(child.load(Ordering::SeqCst) as i32));
    });
}
