//! What the counters and the latency histogram say, and what they cost nobody.

mod support;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use kiomap::{AttachOptions, FailurePolicy, Kiobuf, page_size};
use support::scene::{at, child};
use support::slow::{Says, SlowSource};
use support::{
    alone, assert_sigbus, attached, engine_builder, eventually, holes, mark, pages, read_page, reap_ok, settled_stats,
    source, touch,
};

fn zeros(nr_pages: u64) -> Kiobuf {
    let mut list = Kiobuf::new();
    list.map_zero(nr_pages).unwrap();
    list
}

/// Memory, a cached file, zeros, a hole: eight pages each.
fn a_page_of_each() -> Kiobuf {
    use std::io::Write;
    let mut file = tempfile::tempfile().unwrap();
    (8..16).for_each(|page| file.write_all(&vec![mark(page); page_size()]).unwrap());
    let mut cached = Kiobuf::new();
    cached.map_file(&file, 0..8 * page_size() as u64).unwrap();
    let mut list = pages(8);
    for part in [cached, zeros(8), holes(8)] {
        list.expand(&part).unwrap();
    }
    list
}

/// T16: each fault and each page is counted once, as what it is, for the engine and for its vmap.
#[test]
fn faults_are_counted_by_what_answers_them() {
    alone("faults_are_counted_by_what_answers_them", || {
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        let (vmap, region) = attached(&engine, &a_page_of_each());
        let (other, elsewhere) = attached(&engine, &pages(3));
        for page in 0..8 {
            assert_eq!(read_page(&region, page), Ok(mark(page)));
            assert_eq!(read_page(&region, 8 + page), Ok(mark(8 + page)));
            touch::write(at(&region, 16 + page), 7).unwrap();
            assert_sigbus(&region, 24 + page);
        }
        assert_eq!(read_page(&elsewhere, 2), Ok(mark(2)));
        let stats = settled_stats(&engine);
        let own = vmap.stats();
        assert_eq!((own.faults_copied, own.faults_read, own.faults_refused), (8, 8, 8), "{own:?}");
        assert_eq!((own.pages_copied, own.pages_read, own.pages_read_by_workers), (16, 8, 0), "{own:?}");
        assert_eq!((own.pages_poisoned, own.pages_zeroed, own.pages_aside), (8, 8, 0), "{own:?}");
        assert_eq!((own.already_present, own.worker_reads, own.source_errors), (0, 0, 0), "{own:?}");
        // A write to a page of zeros faults once more where the kernel maps its own page of zeros first.
        assert!(own.faults_zeroed >= 8 && own.write_faults >= 8, "{own:?}");
        assert_eq!(own.bytes_installed(), 24 * page_size() as u64);
        let rest = other.stats();
        assert_eq!((rest.faults(), rest.faults_copied, rest.pages_copied), (1, 1, 1), "{rest:?}");
        assert_eq!((stats.faults, stats.write_faults), (own.faults() + 1, own.write_faults), "{stats:?}");
        assert_eq!(stats.read_faults(), stats.faults - stats.write_faults);
        assert_eq!((stats.faults_copied, stats.faults_read, stats.faults_refused), (9, 8, 8), "{stats:?}");
        assert_eq!(stats.faults_zeroed, own.faults_zeroed);
        assert_eq!((stats.pages_copied, stats.pages_read, stats.pages_zeroed), (17, 8, 8), "{stats:?}");
        assert_eq!(stats.pages_poisoned, 8);
        assert_eq!(stats.pages_masked, if stats_of_masks(&engine) { 8 } else { 0 });
        assert_eq!(stats.bytes_installed(), 25 * page_size() as u64);
        let spaces = engine.spaces().unwrap();
        assert_eq!((spaces.len(), spaces[0].faults, spaces[0].pages_installed), (1, stats.faults, 25), "{spaces:?}");
        assert_eq!((spaces[0].pages_poisoned, spaces[0].areas), (8, 2), "{spaces:?}");
    });
}

/// Whether an engine masks what it can't poison.
fn stats_of_masks(engine: &kiomap::Engine) -> bool {
    !engine.features().contains(kiomap::Features::POISON)
}

/// What a worker reads is told from what the fault-handling thread reads.
#[test]
fn what_workers_read_is_counted_as_theirs() {
    alone("what_workers_read_is_counted_as_theirs", || {
        needs_sources!();
        let engine = engine_builder().fault_around_pages(4).build().unwrap();
        let (vmap, region) = attached(&engine, &source(16, |_, _| Ok(())));
        for page in 0..16 {
            assert_eq!(read_page(&region, page), Ok(mark(page)));
        }
        let (stats, own) = (settled_stats(&engine), vmap.stats());
        assert_eq!((own.faults(), own.faults_read, own.worker_reads), (4, 4, 4), "{own:?}");
        assert_eq!((own.pages_copied, own.pages_read, own.pages_read_by_workers), (16, 0, 16), "{own:?}");
        assert_eq!((stats.pages_read, stats.pages_read_by_workers), (0, 16), "{stats:?}");
    });
}

/// T12: a failed page is counted for the vmap that it belongs to.
#[test]
fn failed_sources_are_counted_for_their_vmap() {
    alone("failed_sources_are_counted_for_their_vmap", || {
        needs_sources!();
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        let (vmap, region) = attached(&engine, &source(4, |_, _| Err(std::io::ErrorKind::Other.into())));
        (0..4).for_each(|page| assert_sigbus(&region, page));
        settled_stats(&engine);
        let own = vmap.stats();
        // Each is tried three times.
        assert_eq!(
            (own.source_errors, own.pages_poisoned, own.worker_reads, own.pages_copied),
            (4, 4, 12, 0),
            "{own:?}"
        );
    });
}

/// A read that fails is counted for each address that waits for it, of which each is SIGBUS, not for the pages that nobody wants.
#[test]
fn a_failed_read_is_counted_for_those_who_wait() {
    alone("a_failed_read_is_counted_for_those_who_wait", || {
        needs_sources!();
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        let source = SlowSource::shut(Says { granule_pages: 16, ..Says::default() });
        source.fail(true);
        let once = FailurePolicy::default().retries(0);
        let vmap = engine.vmap_builder(&source.list(16)).failure_policy(once).build().unwrap();
        let regions = [(); 2].map(|()| vmap.attach(&AttachOptions::new()).unwrap());
        std::thread::scope(|scope| {
            for (region, page) in [(0, 1), (0, 1), (0, 4), (1, 1)] {
                let region = &regions[region];
                scope.spawn(move || assert_sigbus(region, page));
            }
            eventually("all faults", || engine.stats().faults == 4);
            engine.settle().unwrap();
            source.open();
        });
        let stats = settled_stats(&engine);
        assert_eq!((stats.worker_reads, stats.source_errors, stats.pages_poisoned), (1, 3, 3), "{stats:?}");
    });
}

/// A forked child's faults are its vmap's, and its own process's; the child itself has the numbers of the fork.
#[test]
fn a_childs_faults_are_counted_for_the_vmap_and_the_child() {
    alone("a_childs_faults_are_counted_for_the_vmap_and_the_child", || {
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        let (vmap, region) = attached(&engine, &pages(8));
        assert_eq!(read_page(&region, 0), Ok(mark(0)));
        assert_eq!(settled_stats(&engine).faults, 1);
        let told = support::scene::Told::new();
        let go_on = support::scene::Told::new();
        let pid = child(|| {
            (1..8).for_each(|page| assert_eq!(read_page(&region, page), Ok(mark(page))));
            assert_eq!((vmap.stats().faults(), engine.stats().faults, engine.fault_latency().count()), (1, 1, 1));
            told.tell(1);
            go_on.wait();
        });
        told.wait();
        assert_eq!((settled_stats(&engine).faults, vmap.stats().faults()), (8, 8));
        let spaces = engine.spaces().unwrap();
        assert_eq!((spaces.len(), spaces[0].faults, spaces[1].faults, spaces[1].pages_installed), (2, 1, 7, 7));
        go_on.tell(1);
        reap_ok(pid);
    });
}

/// Whoever reads the counters while faults run sees each of them only grow, and all of them at the end.
#[test]
fn counters_can_be_read_while_faults_run() {
    alone("counters_can_be_read_while_faults_run", || {
        const PAGES: u64 = 4000;
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        let (vmap, region) = attached(&engine, &pages(PAGES));
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let (mut before, mut counted) = (vmap.stats(), engine.fault_latency().count());
                while !done.load(Ordering::Relaxed) {
                    let (now, faults) = (vmap.stats(), engine.fault_latency().count());
                    assert!(now.pages_copied >= before.pages_copied && now.faults() >= before.faults());
                    assert!(faults >= counted && faults <= PAGES);
                    (before, counted) = (now, faults);
                }
            });
            let touching: Vec<_> = (0..4)
                .map(|n| {
                    let region = &region;
                    scope.spawn(move || {
                        (n..PAGES).step_by(4).for_each(|page| assert_eq!(read_page(region, page), Ok(mark(page))));
                    })
                })
                .collect();
            let touched: Vec<_> = touching.into_iter().map(|thread| thread.join()).collect();
            done.store(true, Ordering::Relaxed);
            touched.into_iter().for_each(|outcome| outcome.unwrap());
        });
        let stats = settled_stats(&engine);
        assert_eq!((stats.faults, stats.pages_copied, vmap.stats().pages_copied), (PAGES, PAGES, PAGES));
        assert_eq!(engine.fault_latency().count(), PAGES);
    });
}

/// The histogram has each fault once, and its numbers are in order.
#[test]
fn the_histogram_has_every_fault_once() {
    alone("the_histogram_has_every_fault_once", || {
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        assert_eq!((engine.fault_latency().count(), engine.fault_latency().max()), (0, None));
        assert_eq!(engine.fault_latency().to_string(), "no faults");
        let (_vmap, region) = attached(&engine, &a_page_of_each());
        for page in 0..24 {
            touch::read(at(&region, page)).unwrap();
        }
        (24..32).for_each(|page| assert_sigbus(&region, page));
        settled_stats(&engine);
        let latency = engine.fault_latency();
        assert_eq!(latency.count(), 32);
        let (p50, p99, max) = (latency.p50().unwrap(), latency.p99().unwrap(), latency.max().unwrap());
        // An answer is a system call at least.
        assert!(Duration::from_nanos(50) < p50 && p50 <= p99 && p99 <= max && max < support::DEADLINE, "{latency}");
        assert_eq!(latency.buckets().map(|(_, faults)| faults).sum::<u64>(), 32);
        assert!(latency.to_string().starts_with("32 faults, p50 "), "{latency}");
    });
}

/// What a worker takes is in the latency of its fault, which is counted when it is answered and not when it is handed on.
#[test]
fn a_fault_that_a_worker_answers_takes_as_long_as_the_source() {
    alone("a_fault_that_a_worker_answers_takes_as_long_as_the_source", || {
        needs_sources!();
        const TAKES: Duration = Duration::from_millis(20);
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        let slow = source(1, |_, _| {
            // The time is what is measured.
            std::thread::sleep(TAKES);
            Ok(())
        });
        let (_vmap, region) = attached(&engine, &slow);
        assert_eq!(read_page(&region, 0), Ok(mark(0)));
        settled_stats(&engine);
        let latency = engine.fault_latency();
        assert_eq!(latency.count(), 1);
        assert!(latency.max().unwrap() >= TAKES && latency.p50() == latency.max(), "{latency}");
    });
}

/// Counters outlive what they count: after a shutdown, and after the regions are gone.
#[test]
fn the_numbers_stay_after_a_shutdown() {
    alone("the_numbers_stay_after_a_shutdown", || {
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        let vmap = engine.vmap(&pages(4)).unwrap();
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        (0..3).for_each(|page| assert_eq!(read_page(&region, page), Ok(mark(page))));
        engine.shutdown(kiomap::Shutdown::Poison).unwrap();
        // The guard answers, and counts.
        assert_sigbus(&region, 3);
        drop(region);
        assert_eq!((vmap.stats().faults(), vmap.stats().pages_copied, engine.stats().faults), (3, 3, 4));
        assert_eq!(engine.stats().pages_poisoned, 1);
    });
}
