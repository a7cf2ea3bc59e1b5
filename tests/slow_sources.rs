//! Pages that come slowly: how many reads are made and at once, whom they hold up, and what becomes of those that fail.
#![allow(clippy::single_range_in_vec_init, reason = "lists of page ranges, some of one")]

mod support;

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kiomap::{
    AttachOptions, Engine, Error, FailureCause, FailurePolicy, Features, GRANULE_MAX_BYTES, Kiobuf, PageSource,
    PopulateOptions, ReadFailed, Region, Revoke, Vmap, page_size,
};
use nix::errno::Errno;
use support::scene::{Rng, Told, child, kill_and_reap};
use support::slow::{Says, SlowSource};
use support::{
    alone, assert_sigbus, attached, engine_builder, eventually, mark, pages, read_page, reap_ok, settled_stats, touch,
};

/// A policy that gives a read up after its first failure.
fn once() -> FailurePolicy {
    FailurePolicy::default().retries(0)
}

fn region_of(engine: &Engine, list: &Kiobuf, policy: FailurePolicy) -> (Vmap, Region) {
    let vmap = engine.vmap_builder(list).failure_policy(policy).build().unwrap();
    let region = vmap.attach(&AttachOptions::new()).unwrap();
    (vmap, region)
}

/// Has a thread touch a page, and waits until its fault was looked at.
fn touches<'scope>(
    scope: &'scope std::thread::Scope<'scope, '_>,
    engine: &Engine,
    region: &'scope Region,
    page: u64,
) -> std::thread::ScopedJoinHandle<'scope, Result<u8, touch::Refused>> {
    let before = engine.stats().faults;
    let toucher = scope.spawn(move || read_page(region, page));
    eventually("the fault is read", || engine.stats().faults > before);
    engine.settle().unwrap();
    toucher
}

/// A source that takes 5 ms a read is read eight times at once, and faults on memory are answered while eight reads of it
/// are under way: none of them waits for a read.
#[test]
fn eight_reads_are_in_flight_and_memory_is_served_meanwhile() {
    alone("eight_reads_are_in_flight_and_memory_is_served_meanwhile", || {
        needs_sources!();
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        let slow = SlowSource::pausing(Says::default(), Duration::from_millis(5));
        let (_, region) = attached(&engine, &slow.list(1 << 16));
        std::thread::scope(|scope| {
            for seed in 0..8 {
                let (region, slow) = (&region, &slow);
                scope.spawn(move || {
                    let mut rng = Rng::new(seed);
                    while slow.inside().1 < 8 {
                        let page = rng.below(1 << 16);
                        assert_eq!(read_page(region, page), Ok(mark(page)));
                    }
                });
            }
        });
        let held = SlowSource::shut(Says::default());
        let (_, region) = attached(&engine, &held.list(1 << 16));
        let (_, memory) = attached(&engine, &pages(64));
        std::thread::scope(|scope| {
            for page in 0..8 {
                let region = &region;
                scope.spawn(move || assert_eq!(read_page(region, page * 1000), Ok(mark(page * 1000))));
            }
            held.wait_for_inside(8);
            (0..64).for_each(|page| assert_eq!(read_page(&memory, page), Ok(mark(page))));
            assert_eq!(held.inside(), (8, 8));
            held.open();
        });
        // Nobody has looked again and again whether a page is there.
        assert_eq!(settled_stats(&engine).parked, 0);
    });
}

/// A source that hangs leaves the others their threads: another is read, and one that waits for nothing too.
#[test]
fn a_source_that_hangs_takes_nothing_from_others() {
    alone("a_source_that_hangs_takes_nothing_from_others", || {
        needs_sources!();
        let engine = engine_builder().workers(2).fault_around_pages(1).build().unwrap();
        let hung = SlowSource::shut(Says::default());
        let (_, region) = attached(&engine, &hung.list(1000));
        std::thread::scope(|scope| {
            for page in 0..20 {
                let region = &region;
                scope.spawn(move || assert_eq!(read_page(region, page * 7), Ok(mark(page * 7))));
            }
            hung.wait_for_inside(2);
            eventually("all faults", || engine.stats().faults >= 20);
            for says in [Says::default(), Says { may_block: false, ..Says::default() }] {
                let (_, other) = attached(&engine, &SlowSource::new(says).list(40));
                (0..40).for_each(|page| assert_eq!(read_page(&other, page), Ok(mark(page))));
            }
            assert_eq!(hung.inside(), (2, 2));
            hung.open();
        });
    });
}

/// The granule: one read brings all its pages, as far as the list goes, and whichever is touched first.
#[test]
fn a_touch_brings_the_granule() {
    alone("a_touch_brings_the_granule", || {
        needs_sources!();
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        let source = SlowSource::new(Says { granule_pages: 16, ..Says::default() });
        // A region that shows less than a granule, of a list that ends within one.
        let vmap = engine.vmap(&source.list(40)).unwrap();
        let region = vmap.attach(&AttachOptions::new().pgoff(3).len_bytes(30 * page_size())).unwrap();
        assert_eq!(read_page(&region, 4), Ok(mark(7)));
        (0..13).for_each(|page| assert_eq!(read_page(&region, page), Ok(mark(page + 3))));
        assert_eq!(source.asked(), [0..16]);
        let whole = vmap.attach(&AttachOptions::new()).unwrap();
        assert_eq!(read_page(&whole, 39), Ok(mark(39)));
        assert_eq!(source.asked(), [0..16, 32..40]);
        (0..40).for_each(|page| assert_eq!(read_page(&whole, page), Ok(mark(page))));
        assert_eq!(source.asked(), [0..16, 32..40, 16..32]);
        assert_eq!(settled_stats(&engine).pages_read_by_workers, 40);
    });
}

/// Eight threads that touch all pages of a few large granules: each granule is read once.
#[test]
fn a_granule_is_read_once_for_all_threads() {
    alone("a_granule_is_read_once_for_all_threads", || {
        needs_sources!();
        let engine = engine_builder().build().unwrap();
        let granule_pages = (GRANULE_MAX_BYTES / page_size()) as u64;
        let source = SlowSource::pausing(Says { granule_pages, ..Says::default() }, Duration::from_millis(1));
        let nr_pages = 4 * granule_pages;
        let (_, region) = attached(&engine, &source.list(nr_pages));
        std::thread::scope(|scope| {
            for seed in 0..8 {
                let region = &region;
                scope.spawn(move || {
                    let mut rng = Rng::new(seed);
                    for _ in 0..2000 {
                        let page = rng.below(nr_pages);
                        assert_eq!(read_page(region, page), Ok(mark(page)));
                    }
                });
            }
        });
        let mut asked = source.asked();
        asked.sort_unstable_by_key(|pages| pages.start);
        let expected: Vec<_> = (0..4).map(|n| n * granule_pages..(n + 1) * granule_pages).collect();
        assert_eq!(asked, expected);
        let stats = settled_stats(&engine);
        assert!(stats.read_buffer_bytes_peak <= 40 << 20, "{stats:?}");
    });
}

/// A granule that can't be one, and a list of more than its source holds, are refused when the list is made.
#[test]
fn a_source_that_does_not_fit_is_refused() {
    let source = |granule_bytes, len_bytes| Arc::new(Odd { granule_bytes, len_bytes }) as Arc<dyn PageSource>;
    let page = page_size();
    for granule in [0, 1, page / 2, page + 1, 3 * page, 2 * GRANULE_MAX_BYTES, usize::MAX] {
        let refused = Kiobuf::new().map_source(source(granule, None), 1).unwrap_err();
        assert!(matches!(refused, Error::Invalid { value, .. } if value == granule as u64), "{refused}");
        assert_eq!(refused.errno(), Errno::EINVAL);
    }
    for granule in [page, 2 * page, GRANULE_MAX_BYTES] {
        let mut list = Kiobuf::new();
        let refused = list.map_source(source(granule, Some(100_000)), 100_001).unwrap_err();
        assert!(matches!(refused, Error::Fault { at: 100_000, .. }), "{refused}");
        assert_eq!(refused.errno(), Errno::EFAULT);
        assert!(!list.is_mapped());
        list.map_source(source(granule, Some(100_000)), 100_000).unwrap();
    }
}

struct Odd {
    granule_bytes: usize,
    len_bytes: Option<u64>,
}

impl PageSource for Odd {
    fn read_at(&self, _: u64, _: &mut [u8]) -> std::io::Result<()> {
        Ok(())
    }

    fn granule_bytes(&self) -> usize {
        self.granule_bytes
    }

    fn len_bytes(&self) -> Option<u64> {
        self.len_bytes
    }
}

/// Bytes that a source says it has written and has not are zeros, not what another page has left in the buffer.
#[test]
fn what_a_source_leaves_out_is_nobody_elses() {
    alone("what_a_source_leaves_out_is_nobody_elses", || {
        needs_sources!();
        let engine = engine_builder().workers(1).fault_around_pages(1).build().unwrap();
        let (_, full) = attached(&engine, &SlowSource::new(Says::default()).list(4));
        (0..4).for_each(|page| assert_eq!(read_page(&full, page), Ok(mark(page))));
        let mut list = Kiobuf::new();
        list.map_source(Arc::new(Odd { granule_bytes: page_size(), len_bytes: None }), page_size() as u64).unwrap();
        let (_, region) = attached(&engine, &list);
        let mut bytes = vec![1; page_size()];
        region.read_at(0, &mut bytes).unwrap();
        assert!(bytes.iter().all(|&byte| byte == 0));
    });
}

/// Neighbours that are asked for one by one while no worker is free are read together; what is far away is not.
#[test]
fn neighbours_in_the_queue_are_read_together() {
    alone("neighbours_in_the_queue_are_read_together", || {
        needs_sources!();
        let engine = engine_builder().workers(1).fault_around_pages(1).build().unwrap();
        let source = SlowSource::shut(Says::default());
        let (vmap, region) = attached(&engine, &source.list(100));
        std::thread::scope(|scope| {
            let touchers: Vec<_> =
                [0, 40, 41, 39, 60].map(|page| (page, touches(scope, &engine, &region, page))).into_iter().collect();
            source.wait_for_inside(1);
            source.open();
            for (page, toucher) in touchers {
                assert_eq!(toucher.join().unwrap(), Ok(mark(page)));
            }
        });
        assert_eq!(source.asked(), [0..1, 39..42, 60..61]);
        assert_eq!((settled_stats(&engine).reads_merged, vmap.stats().reads_merged), (2, 2));
    });
}

/// A read that nobody waits for any more is not made: its process was killed, its area unmapped, its list taken back.
#[test]
fn a_read_that_nobody_waits_for_is_not_made() {
    alone("a_read_that_nobody_waits_for_is_not_made", || {
        needs_sources!();
        let engine = engine_builder().workers(1).fault_around_pages(1).build().unwrap();
        let source = SlowSource::shut(Says::default());
        let (vmap, region) = attached(&engine, &source.list(100));
        let other = vmap.attach(&AttachOptions::new()).unwrap();
        std::thread::scope(|scope| {
            let first = touches(scope, &engine, &region, 0);
            source.wait_for_inside(1);
            let before = engine.stats().faults;
            let killed = child(|| panic!("{:?}", read_page(&region, 20)));
            eventually("the child's fault", || engine.stats().faults > before);
            engine.settle().unwrap();
            kill_and_reap(killed);
            eventually("its read is forgotten", || engine.stats().reads_cancelled == 1);
            let toucher = touches(scope, &engine, &other, 40);
            // SAFETY: a part of the region, which nobody has a reference to.
            unsafe { nix::sys::mman::munmap(std::ptr::NonNull::new(other.as_ptr()).unwrap().cast(), 50 * page_size()) }
                .unwrap();
            assert!(toucher.join().unwrap().unwrap_err().is_sigsegv());
            eventually("its read is forgotten", || engine.stats().reads_cancelled == 2);
            let toucher = touches(scope, &engine, &region, 60);
            vmap.revoke(Revoke::Soft).unwrap();
            // Both are SIGBUS while the source still holds the first read.
            for toucher in [first, toucher] {
                assert!(toucher.join().unwrap().is_err_and(|refused| refused.signal == libc::SIGBUS));
            }
            assert_eq!(source.inside().0, 1);
            source.open();
        });
        eventually("the source is left", || source.inside().0 == 0);
        assert_eq!(source.asked(), [0..1]);
        assert_sigbus(&region, 0);
    });
}

/// Appending to a list changes none of its pages: reads that are under way go on, those that wait are made, and fail, as if
/// nothing had been appended, and touches of the longer list join them.
#[test]
fn an_expand_takes_no_read_away() {
    alone("an_expand_takes_no_read_away", || {
        needs_sources!();
        let engine = engine_builder().workers(1).fault_around_pages(1).build().unwrap();
        let source = SlowSource::shut(Says::default());
        let vmap = engine.vmap_builder(&source.list(100)).failure_policy(once()).expandable().build().unwrap();
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        std::thread::scope(|scope| {
            let first = touches(scope, &engine, &region, 3);
            source.wait_for_inside(1);
            let queued = touches(scope, &engine, &region, 40);
            vmap.expand(&pages(1)).unwrap();
            let longer = Arc::new(vmap.attach(&AttachOptions::new()).unwrap());
            let joined = [3, 40].map(|page| {
                let (before, longer) = (engine.stats().faults, Arc::clone(&longer));
                let toucher = scope.spawn(move || read_page(&longer, page));
                eventually("the fault is read", || engine.stats().faults > before);
                (page, toucher)
            });
            vmap.expand(&pages(1)).unwrap();
            source.open();
            for (page, toucher) in [(3, first), (40, queued)].into_iter().chain(joined) {
                assert_eq!(toucher.join().unwrap(), Ok(mark(page)));
            }
        });
        assert_eq!(source.asked(), [3..4, 40..41]);
        let source = SlowSource::shut(Says::default());
        let vmap = engine.vmap_builder(&source.list(100)).failure_policy(once()).expandable().build().unwrap();
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        source.fail(true);
        std::thread::scope(|scope| {
            let toucher = touches(scope, &engine, &region, 3);
            source.wait_for_inside(1);
            vmap.expand(&pages(1)).unwrap();
            source.open();
            assert!(toucher.join().unwrap().is_err_and(|refused| refused.signal == libc::SIGBUS));
        });
        assert_eq!((source.asked().len(), vmap.stats().worker_reads), (1, 1));
    });
}

/// Threads of several processes wait for one read, and each gets the page.
#[test]
fn one_read_is_for_the_waiters_of_all_processes() {
    alone("one_read_is_for_the_waiters_of_all_processes", || {
        needs_sources!();
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        let source = SlowSource::shut(Says::default());
        let (_, region) = attached(&engine, &source.list(100));
        let children: Vec<_> = (0..3).map(|_| child(|| assert_eq!(read_page(&region, 20), Ok(mark(20))))).collect();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| assert_eq!(read_page(&region, 20), Ok(mark(20))));
            }
            eventually("all faults", || engine.stats().faults >= 7);
            source.wait_for_inside(1);
            source.open();
        });
        children.into_iter().for_each(reap_ok);
        assert_eq!(source.asked(), [20..21]);
    });
}

/// A touch waits no longer than the deadline, whether its read hangs or has found no thread; what comes later is right, and
/// the page is SIGBUS where it was touched until it is asked for again.
#[test]
fn a_stalled_source_is_sigbus_at_the_deadline() {
    alone("a_stalled_source_is_sigbus_at_the_deadline", || {
        needs_sources!();
        let engine = engine_builder().workers(1).fault_around_pages(1).build().unwrap();
        let source = SlowSource::shut(Says::default());
        let reports = Reports::default();
        let vmap = reports.vmap(&engine, &source.list(100), once().deadline(Duration::from_millis(50)));
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        assert_sigbus(&region, 20);
        assert_sigbus(&region, 30);
        assert_eq!(source.asked(), [20..21]);
        let stats = settled_stats(&engine);
        assert_eq!((stats.reads_expired, stats.source_errors, stats.pages_poisoned), (2, 2, 2), "{stats:?}");
        let told: Vec<_> = reports.wait_for(2).into_iter().map(|r| (r.pages, r.cause, r.tries)).collect();
        assert_eq!(told, [(20..21, FailureCause::Deadline, 1), (30..31, FailureCause::Deadline, 0)]);
        source.open();
        eventually("the source is left", || source.inside().0 == 0);
        assert_sigbus(&region, 20);
        assert_eq!(read_page(&vmap.attach(&AttachOptions::new()).unwrap(), 20), Ok(mark(20)), "refused elsewhere");
        assert_eq!(read_page(&region, 40), Ok(mark(40)));
        if !engine.features().contains(Features::POISON) {
            skip!("without POISON a page that was refused stays so");
        }
        vmap.retry(0..100).unwrap();
        for page in [20, 30] {
            assert_eq!(read_page(&region, page), Ok(mark(page)));
        }
    });
}

/// What a vmap reports.
#[derive(Clone, Default)]
struct Reports(Arc<Mutex<Vec<ReadFailed>>>);

impl Reports {
    fn vmap(&self, engine: &Engine, list: &Kiobuf, policy: FailurePolicy) -> Vmap {
        let reports = Arc::clone(&self.0);
        let note = move |_: &Vmap, report| reports.lock().unwrap().push(report);
        engine.vmap_builder(list).failure_policy(policy).on_read_failed(note).build().unwrap()
    }

    fn wait_for(&self, n: usize) -> Vec<ReadFailed> {
        eventually("reports", || self.0.lock().unwrap().len() >= n);
        self.0.lock().unwrap().clone()
    }
}

/// A failure is tried as often as was asked, and reported with its pages, its cause and the tries.
#[test]
fn failures_are_tried_again_and_reported() {
    alone("failures_are_tried_again_and_reported", || {
        needs_sources!();
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        let policy = FailurePolicy::default().retries(3).backoff(Duration::from_millis(1));
        let source = SlowSource::new(Says { granule_pages: 4, ..Says::default() });
        source.fail(true);
        let reports = Reports::default();
        let region = reports.vmap(&engine, &source.list(40), policy).attach(&AttachOptions::new()).unwrap();
        assert_sigbus(&region, 5);
        assert_eq!(source.asked(), vec![4..8; 4]);
        let told = reports.wait_for(1);
        assert_eq!((&told[0].pages, told[0].cause, told[0].tries), (&(4..8), FailureCause::Error(Errno::EIO), 4));
        assert!(told[0].message.contains("told to fail"), "{}", told[0].message);
        assert_eq!(settled_stats(&engine).reads_failed, 3);

        // One that comes to its senses in time is not told of.
        let calls = Arc::new(AtomicU64::new(0));
        let counted = Arc::clone(&calls);
        let list = support::source(40, move |_, _| match counted.fetch_add(1, Ordering::SeqCst) {
            0 => Err(std::io::ErrorKind::TimedOut.into()),
            1 => panic!("once"),
            _ => Ok(()),
        });
        let region = reports.vmap(&engine, &list, policy).attach(&AttachOptions::new()).unwrap();
        assert_eq!(read_page(&region, 5), Ok(mark(5)));
        assert_eq!(calls.load(Ordering::SeqCst), 3);

        let list = support::source(40, |_, _| panic!("always"));
        let region = reports.vmap(&engine, &list, once()).attach(&AttachOptions::new()).unwrap();
        assert_sigbus(&region, 5);
        let told = reports.wait_for(2);
        assert_eq!((told.len(), &told[1].pages, told[1].cause, told[1].tries), (2, &(5..6), FailureCause::Panicked, 1));
    });
}

/// An error whose words or whose end panic is a failure like others: it is tried again, and its worker goes on.
#[test]
fn an_error_that_panics_is_a_failure_like_others() {
    alone("an_error_that_panics_is_a_failure_like_others", || {
        needs_sources!();
        for (told, dropped) in [(true, false), (false, true), (true, true)] {
            // The only worker.
            let engine = engine_builder().workers(1).fault_around_pages(1).build().unwrap();
            let calls = AtomicU64::new(0);
            let list = support::source(40, move |_, _| match calls.fetch_add(1, Ordering::SeqCst) {
                0 | 1 => Err(std::io::Error::other(Touchy { told, dropped })),
                _ => Ok(()),
            });
            let (vmap, region) = region_of(&engine, &list, FailurePolicy::default().deadline(Duration::from_secs(10)));
            (1..4).for_each(|page| assert_eq!(read_page(&region, page), Ok(mark(page))));
            let stats = settled_stats(&engine);
            let panics = 2 * (u64::from(told) + u64::from(dropped));
            assert_eq!((stats.reads_failed, stats.worker_reads, stats.panics), (2, 5, panics), "{stats:?}");
            assert_eq!(vmap.stats().worker_reads, 5);
        }
    });
}

/// An error that panics when it is put in words, or dropped.
#[derive(Debug)]
struct Touchy {
    told: bool,
    dropped: bool,
}

impl std::fmt::Display for Touchy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        assert!(!self.told, "told");
        f.write_str("touchy")
    }
}

impl std::error::Error for Touchy {}

impl Drop for Touchy {
    fn drop(&mut self) {
        assert!(!self.dropped, "dropped");
    }
}

/// A source that forks and returns in the child: there nothing more is done of the read, not even that its error is told.
#[test]
fn a_child_in_which_a_source_returns_ends_at_once() {
    alone("a_child_in_which_a_source_returns_ends_at_once", || {
        needs_sources!();
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        let forked = Arc::new(Mutex::new(None));
        let forking = Arc::clone(&forked);
        let owner = nix::unistd::getpid();
        let list = support::source(40, move |_, _| {
            if forking.lock().unwrap().is_some() {
                return Ok(());
            }
            // SAFETY: the child returns to the engine, which ends it.
            if let nix::unistd::ForkResult::Parent { child } = unsafe { nix::unistd::fork() }.unwrap() {
                *forking.lock().unwrap() = Some(child);
            }
            Err(std::io::Error::other(ToldInOwner(owner)))
        });
        let (_vmap, region) = region_of(&engine, &list, FailurePolicy::default());
        assert_eq!(read_page(&region, 5), Ok(mark(5)));
        let child = forked.lock().unwrap().unwrap();
        reap_ok(child);
    });
}

/// An error that ends other processes than its own in which it is put in words, with 1.
#[derive(Debug)]
struct ToldInOwner(nix::unistd::Pid);

impl std::fmt::Display for ToldInOwner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if nix::unistd::getpid() != self.0 {
            // SAFETY: ends the child without the parent's exit handlers.
            unsafe { libc::_exit(1) };
        }
        f.write_str("told")
    }
}

impl std::error::Error for ToldInOwner {}

/// `retry` makes what was refused readable in every process that was refused it, and only what can be had.
#[test]
fn a_retry_heals_pages_in_all_processes() {
    alone("a_retry_heals_pages_in_all_processes", || {
        needs_sources!();
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        if !engine.features().contains(Features::POISON) {
            let (vmap, _region) = region_of(&engine, &pages(1), once());
            assert!(matches!(vmap.retry(0..1), Err(Error::Unsupported { .. })));
            return;
        }
        let source = SlowSource::new(Says::default());
        let (vmap, region) = region_of(&engine, &source.list(1000), once());
        let other = vmap.attach(&AttachOptions::new()).unwrap();
        source.fail(true);
        let refused = [3, 4, 5, 700, 999];
        let (ready, go_on) = (Told::new(), Told::new());
        let pid = child(|| {
            refused.iter().for_each(|&page| assert_sigbus(&region, page));
            ready.tell(1);
            go_on.wait();
            refused.iter().for_each(|&page| assert_eq!(read_page(&region, page), Ok(mark(page))));
        });
        ready.wait();
        for page in refused {
            assert_sigbus(&region, page);
            assert_sigbus(&other, page);
        }
        // Still nothing to be had: all stays as it is.
        let failed = vmap.retry(0..1000).unwrap_err();
        assert!(matches!(failed, Error::NoPage { pgoff: 3, .. }), "{failed}");
        assert_sigbus(&region, 4);
        source.fail(false);
        let asked = source.asked().len();
        // Those of a part only.
        vmap.retry(0..5).unwrap();
        assert_eq!(read_page(&region, 4), Ok(mark(4)));
        assert_sigbus(&region, 5);
        vmap.retry(0..u64::MAX).unwrap();
        for page in refused {
            assert_eq!(read_page(&region, page), Ok(mark(page)));
            assert_eq!(read_page(&other, page), Ok(mark(page)));
        }
        go_on.tell(1);
        reap_ok(pid);
        let pages: BTreeSet<u64> = source.asked()[asked..].iter().cloned().flatten().collect();
        assert_eq!(pages, BTreeSet::from(refused), "nobody has touched others");
        vmap.retry(0..1000).unwrap();
    });
}

/// A retry waits for a source that hangs once, however many of its pages have failed, and brings what others have.
#[test]
fn a_retry_waits_for_one_deadline_of_a_source() {
    alone("a_retry_waits_for_one_deadline_of_a_source", || {
        needs_sources!();
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        if !engine.features().contains(Features::POISON) {
            skip!("without POISON a page that was refused stays so");
        }
        let (hung, failing) = (SlowSource::shut(Says::default()), SlowSource::new(Says::default()));
        let mut list = hung.list(20);
        list.expand(&failing.list(20)).unwrap();
        let (vmap, region) = region_of(&engine, &list, once().deadline(Duration::from_millis(50)));
        failing.fail(true);
        let refused = [2, 3, 4, 15, 17, 25, 30];
        refused.iter().for_each(|&page| assert_sigbus(&region, page));
        failing.fail(false);
        let before = engine.stats().reads_expired;
        let failed = vmap.retry(0..40).unwrap_err();
        assert!(matches!(failed, Error::NoPage { pgoff: 2, .. }), "{failed}");
        assert_eq!(engine.stats().reads_expired - before, 1);
        [25, 30].iter().for_each(|&page| assert_eq!(read_page(&region, page), Ok(mark(page - 20))));
        [2, 3, 4, 15, 17].iter().for_each(|&page| assert_sigbus(&region, page));
        hung.open();
        eventually("the source is left", || hung.inside().0 == 0);
        vmap.retry(0..40).unwrap();
        [2, 3, 4, 15, 17].iter().for_each(|&page| assert_eq!(read_page(&region, page), Ok(mark(page))));
    });
}

/// Two who ask at once for the same pages both have them when they are told so, also over an expand.
#[test]
fn two_retries_at_once_both_bring_the_pages() {
    alone("two_retries_at_once_both_bring_the_pages", || {
        needs_sources!();
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        if !engine.features().contains(Features::POISON) {
            skip!("without POISON a page that was refused stays so");
        }
        let source = SlowSource::new(Says::default());
        let vmap = engine.vmap_builder(&source.list(20)).failure_policy(once()).expandable().build().unwrap();
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        source.fail(true);
        assert_sigbus(&region, 5);
        source.fail(false);
        source.shut_again();
        std::thread::scope(|scope| {
            let retry = || {
                vmap.retry(0..20).unwrap();
                assert_eq!(read_page(&region, 5), Ok(mark(5)));
            };
            let first = scope.spawn(retry);
            source.wait_for_inside(1);
            let second = scope.spawn(retry);
            eventually("the second asks too", || source.inside().0 == 2 || second.is_finished());
            vmap.expand(&pages(1)).unwrap();
            source.open();
            [first, second].into_iter().for_each(|retry| retry.join().unwrap());
        });
    });
}

/// It may be called where the failure is told.
#[test]
fn a_report_may_ask_again() {
    alone("a_report_may_ask_again", || {
        needs_sources!();
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        if !engine.features().contains(Features::POISON) {
            skip!("without POISON a page that was refused stays so");
        }
        let source = SlowSource::new(Says::default());
        source.fail(true);
        let mended = Arc::clone(&source);
        let vmap = engine
            .vmap_builder(&source.list(10))
            .failure_policy(once())
            .on_read_failed(move |vmap, report| {
                mended.fail(false);
                vmap.retry(report.pages).unwrap();
            })
            .build()
            .unwrap();
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        // It is told before the page is refused, and may be there by then.
        let first = read_page(&region, 5);
        assert!(first == Ok(mark(5)) || first.is_err_and(|refused| refused.signal == libc::SIGBUS), "{first:?}");
        eventually("the page is there", || read_page(&region, 5) == Ok(mark(5)));
        assert_eq!(source.asked().len(), 2);
    });
}

/// An engine whose source never comes back can be dropped, and so can its region.
#[test]
fn an_engine_ends_without_a_source_that_hangs() {
    alone("an_engine_ends_without_a_source_that_hangs", || {
        needs_sources!();
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        let hung = SlowSource::shut(Says::default());
        let (vmap, region) = region_of(&engine, &hung.list(10), once().deadline(Duration::from_millis(20)));
        assert_sigbus(&region, 5);
        assert_eq!(hung.inside().0, 1);
        drop((region, vmap));
        drop(engine);
        let left = || support::threads().into_iter().filter(|name| name.starts_with("kiomap-worker")).count();
        assert_eq!((hung.inside().0, left()), (1, 1));
        hung.open();
        eventually("its thread ends", || left() == 0);
    });
}

/// Policies and bounds out of range are refused.
#[test]
fn settings_out_of_range_are_refused() {
    let engine = engine_builder().build().unwrap();
    for policy in [once().deadline(Duration::ZERO), once().deadline(Duration::MAX), once().backoff(Duration::MAX)] {
        let refused = engine.vmap_builder(&pages(1)).failure_policy(policy).build().unwrap_err();
        assert!(matches!(refused, Error::Invalid { .. }), "{refused}");
    }
    let refused = engine_builder().read_buffer_bytes((8 << 20) - 1).build().unwrap_err();
    assert!(matches!(refused, Error::Invalid { what: "read_buffer_bytes", .. }), "{refused}");
    engine_builder().read_buffer_bytes(8 << 20).build().unwrap();
}

/// Threads that touch pages of a source in the smallest memory that may be set all get them.
#[test]
fn reads_wait_for_room() {
    alone("reads_wait_for_room", || {
        needs_sources!();
        let engine = engine_builder().read_buffer_bytes(8 << 20).build().unwrap();
        let granule_pages = (GRANULE_MAX_BYTES / page_size()) as u64;
        let source = SlowSource::shut(Says { granule_pages, ..Says::default() });
        let quick = SlowSource::new(Says { granule_pages, may_block: false, ..Says::default() });
        let (_, region) = attached(&engine, &source.list(8 * granule_pages));
        let (_, other) = attached(&engine, &quick.list(2 * granule_pages));
        std::thread::scope(|scope| {
            for n in 0..8 {
                let region = &region;
                scope.spawn(move || {
                    assert_eq!(read_page(region, n * granule_pages + n), Ok(mark(n * granule_pages + n)))
                });
            }
            source.wait_for_inside(1);
            eventually("all faults", || engine.stats().faults >= 8);
            // What waits for nothing has room of its own.
            assert_eq!(read_page(&other, 3 + granule_pages), Ok(mark(3 + granule_pages)));
            source.open();
        });
        assert_eq!(source.inside(), (0, 1));
        let stats = settled_stats(&engine);
        assert_eq!(stats.read_buffer_bytes_peak, 8 << 20, "{stats:?}");
        eventually("what is not needed is given back", || engine.stats().read_buffer_bytes <= 2 << 20);
    });
}

/// Whoever wants pages without touching them waits for a source that hangs no longer than a touch would: populating, the owner's
/// reads, a shutdown that fills. The list can be taken back meanwhile, and the engine ends.
#[test]
fn a_source_that_hangs_holds_up_no_filling_for_ever() {
    alone("a_source_that_hangs_holds_up_no_filling_for_ever", || {
        needs_sources!();
        let engine = engine_builder().build().unwrap();
        let hung = SlowSource::shut(Says::default());
        let list = Kiobuf::concat(&[pages(4), hung.list(4), pages(4)]).unwrap();
        let (vmap, region) = region_of(&engine, &list, once().deadline(Duration::from_millis(50)));
        let missing = region.populate(0..region.len_bytes()).unwrap_err();
        assert!(matches!(missing, Error::NotPopulated { pgoff: 4, missing: 4, wanted: 12, .. }), "{missing}");
        for page in [0, 3, 8, 11] {
            assert_eq!(read_page(&region, page), Ok(mark(page % 8)));
        }
        let refused = vmap.read_at(5 * page_size() as u64, &mut [0]).unwrap_err();
        assert!(matches!(refused, Error::NoPage { pgoff: 5, .. }), "{refused}");

        let patient = region_of(&engine, &hung.list(8), once().deadline(Duration::from_secs(3600)));
        let before = hung.inside().0;
        let populating = patient.1.populate_in_background(0..patient.1.len_bytes(), PopulateOptions::new()).unwrap();
        hung.wait_for_inside(before + 1);
        // While it waits for a read that never ends.
        patient.0.revoke(Revoke::Soft).unwrap();
        populating.cancel();
        let again = region_of(&engine, &hung.list(8), once().deadline(Duration::from_secs(3600)));
        let filling = again.1.populate_in_background(0..again.1.len_bytes(), PopulateOptions::new()).unwrap();
        hung.wait_for_inside(before + 2);
        drop((populating, filling, patient, again));
        engine.shutdown_filling(|_| {}).unwrap();
        drop((vmap, region));
        drop(engine);
        hung.open();
    });
}

/// Filling without a touch asks a source as a touch does: in its granules, once, and again when it fails.
#[test]
fn filling_asks_a_source_as_a_touch_does() {
    alone("filling_asks_a_source_as_a_touch_does", || {
        needs_sources!();
        let engine = engine_builder().build().unwrap();
        let source = SlowSource::new(Says { granule_pages: 128, ..Says::default() });
        let (vmap, region) = region_of(&engine, &source.list(500), FailurePolicy::default());
        vmap.read_at(130 * page_size() as u64, &mut [0]).unwrap();
        assert_eq!(source.asked(), [130..256]);
        region.populate(0..region.len_bytes()).unwrap();
        assert_eq!(source.asked(), [130..256, 0..128, 128..130, 256..384, 384..500]);
        (0..500).for_each(|page| assert_eq!(read_page(&region, page), Ok(mark(page))));
        assert_eq!(source.asked().len(), 5);

        // No read is larger than the largest granule, in the smallest memory that may be set.
        let small = engine_builder().read_buffer_bytes(8 << 20).build().unwrap();
        let granule_pages = (GRANULE_MAX_BYTES / page_size()) as u64;
        let large = SlowSource::new(Says { granule_pages, ..Says::default() });
        let (_, region) = region_of(&small, &large.list(3 * granule_pages), once().deadline(Duration::from_secs(20)));
        let from = (granule_pages - 8) as usize * page_size();
        region.populate(from..region.len_bytes()).unwrap();
        assert_eq!(large.asked().len(), 3);
        assert!(large.asked().iter().all(|pages| pages.end - pages.start <= granule_pages), "{:?}", large.asked());

        let failing = SlowSource::new(Says::default());
        failing.fail(true);
        let (_, region) = region_of(&engine, &failing.list(3), FailurePolicy::default().backoff(Duration::ZERO));
        let missing = region.populate(0..region.len_bytes()).unwrap_err();
        assert!(matches!(missing, Error::NotPopulated { pgoff: 0, missing: 3, .. }), "{missing}");
        // Together, and then each alone, three times.
        assert_eq!(failing.asked().len(), 1 + 3 * 3);
        failing.fail(false);
        region.populate(0..region.len_bytes()).unwrap();
        (0..3).for_each(|page| assert_eq!(read_page(&region, page), Ok(mark(page))));
    });
}

/// A source that hangs keeps its buffers from others until the deadline of its reads, and no longer; what is kept for the next
/// reads is given back though it still hangs.
#[test]
fn a_source_that_hangs_gives_up_its_buffers_at_the_deadline() {
    alone("a_source_that_hangs_gives_up_its_buffers_at_the_deadline", || {
        needs_sources!();
        let granule_pages = (GRANULE_MAX_BYTES / page_size()) as u64;
        let large = || Says { granule_pages, ..Says::default() };
        for (bytes, nr_hung) in [(8 << 20, 1), (40 << 20, 2)] {
            let engine = engine_builder().fault_around_pages(1).read_buffer_bytes(bytes).build().unwrap();
            let hung: Vec<_> = (0..nr_hung).map(|_| SlowSource::shut(large())).collect();
            let policy = once().deadline(Duration::from_millis(300));
            let hung_regions: Vec<_> =
                hung.iter().map(|hung| region_of(&engine, &hung.list(8 * granule_pages), policy)).collect();
            std::thread::scope(|scope| {
                for (_, region) in &hung_regions {
                    (0..8).for_each(|n| drop(scope.spawn(move || assert_sigbus(region, n * granule_pages))));
                }
            });
            let late = settled_stats(&engine).read_buffer_bytes_late;
            assert!((bytes as u64 / 2..=nr_hung * (32 << 20)).contains(&late), "{late} bytes");
            // More than all that may be lent at once.
            let healthy = SlowSource::new(large());
            let (_vmap, region) = attached(&engine, &healthy.list(20 * granule_pages));
            (0..20).for_each(|n| assert_eq!(read_page(&region, n * granule_pages), Ok(mark(n * granule_pages))));
            eventually("what is not needed is given back", || engine.stats().read_buffer_bytes <= 2 << 20);
            let stats = engine.stats();
            assert!(stats.read_buffer_bytes_late == late && stats.read_buffer_bytes_peak <= bytes as u64, "{stats:?}");
            hung.iter().for_each(|hung| hung.open());
            eventually("all buffers are back", || engine.stats().read_buffer_bytes_late == 0);
            eventually("and given back", || engine.stats().read_buffer_bytes <= 2 << 20);
        }
    });
}

/// A read that waits for room is not overtaken by smaller ones, which would never leave it any; what waits for nothing has
/// room of its own.
#[test]
fn a_large_read_is_not_overtaken() {
    alone("a_large_read_is_not_overtaken", || {
        needs_sources!();
        let engine = engine_builder().fault_around_pages(1).read_buffer_bytes(8 << 20).build().unwrap();
        let granule_pages = (GRANULE_MAX_BYTES / page_size()) as u64;
        let (first, later) = (SlowSource::shut(Says::default()), Arc::new(Mutex::new(None)));
        let large = SlowSource::new(Says { granule_pages, ..Says::default() });
        let (asking, note) = (Arc::clone(&large), Arc::clone(&later));
        let small = support::source(100, move |_, _| {
            note.lock().unwrap().get_or_insert(asking.asked().len());
            Ok(())
        });
        let quick = SlowSource::new(Says { may_block: false, ..Says::default() });
        let regions =
            [first.list(100), large.list(granule_pages), small, quick.list(100)].map(|l| attached(&engine, &l));
        let [first_region, large_region, small_region, quick_region] = regions.each_ref().map(|(_, region)| region);
        std::thread::scope(|scope| {
            let touchers = [first_region, large_region, small_region].map(|region| touches(scope, &engine, region, 5));
            first.wait_for_inside(1);
            assert_eq!(read_page(quick_region, 5), Ok(mark(5)));
            assert!(large.asked().is_empty());
            first.open();
            touchers.into_iter().for_each(|toucher| assert_eq!(toucher.join().unwrap(), Ok(mark(5))));
        });
        assert_eq!(*later.lock().unwrap(), Some(1), "reads of the large source when the small one was asked");
    });
}
