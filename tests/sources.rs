//! Page sources that fail, panic, are slow, or touch what they serve: the touch gets right bytes or SIGBUS, and in time.

mod support;

use std::io::{Error as IoError, ErrorKind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock};

use kiomap::{AttachOptions, Engine, EngineBuilder, Error, Features, Kiobuf, Region, Shutdown, Vmap, page_size};
use nix::errno::Errno;
use support::touch::Refused;
use support::{
    alone, assert_sigbus, engine_builder, eventually, in_page, mark, pages, read_page, settled_stats, source, touch,
};

fn attach(engine: &Engine, list: &Kiobuf) -> Region {
    engine.vmap(list).unwrap().attach(&AttachOptions::new()).unwrap()
}

/// A gate that a source waits at until the test opens it.
#[derive(Clone, Default)]
struct Gate(Arc<(Mutex<bool>, Condvar, AtomicU64)>);

impl Gate {
    fn pass(&self) {
        let (open, opened, waiting) = &*self.0;
        waiting.fetch_add(1, Ordering::SeqCst);
        drop(opened.wait_while(open.lock().unwrap(), |open| !*open).unwrap());
    }

    fn open(&self) {
        *self.0.0.lock().unwrap() = true;
        self.0.1.notify_all();
    }

    /// How many have come to the gate so far.
    fn came(&self) -> u64 {
        self.0.2.load(Ordering::SeqCst)
    }

    fn await_one(&self) {
        eventually("a read of the source", || self.came() > 0);
    }
}

/// T11, T12: a source's error, whatever it is, makes the touch SIGBUS; it is counted, and the pages around it are served.
#[test]
fn an_error_of_a_source_is_sigbus_for_its_page_only() {
    alone("an_error_of_a_source_is_sigbus_for_its_page_only", || {
        const BAD: u64 = 5;
        let errors: [fn() -> IoError; 5] = [
            || IoError::from_raw_os_error(libc::ENOMEM),
            || IoError::from_raw_os_error(libc::EAGAIN),
            || IoError::from_raw_os_error(libc::EINTR),
            || IoError::from(ErrorKind::UnexpectedEof),
            || IoError::other("lost"),
        ];
        for (n, error) in errors.into_iter().enumerate() {
            let engine = engine_builder().build().unwrap();
            let list = source(
                40,
                move |first, len| {
                    if (first..first + len as u64).contains(&BAD) { Err(error()) } else { Ok(()) }
                },
            );
            let region = attach(&engine, &list);
            assert_sigbus(&region, BAD);
            for page in (0..40).filter(|&page| page != BAD) {
                assert_eq!(read_page(&region, page), Ok(mark(page)), "error {n}");
            }
            assert_sigbus(&region, BAD);
            let stats = settled_stats(&engine);
            assert_eq!((stats.source_errors, stats.pages_poisoned, stats.panics), (1, 1, 0), "{stats:?}");
        }
    });
}

/// T12: a source that panics is caught and counted; the touch is SIGBUS, and every worker goes on.
#[test]
fn a_panic_of_a_source_is_sigbus_and_the_workers_live() {
    alone("a_panic_of_a_source_is_sigbus_and_the_workers_live", || {
        let engine = engine_builder().workers(2).fault_around_pages(1).build().unwrap();
        let list = source(40, |first, _| if first % 2 == 1 { panic!("page {first}") } else { Ok(()) });
        let region = attach(&engine, &list);
        for page in 0..40 {
            if page % 2 == 1 {
                assert_sigbus(&region, page);
            } else {
                assert_eq!(read_page(&region, page), Ok(mark(page)));
            }
        }
        let stats = settled_stats(&engine);
        // Each is tried three times.
        assert_eq!((stats.source_errors, stats.panics), (20, 60), "{stats:?}");
        assert_eq!(read_page(&attach(&engine, &pages(3)), 2), Ok(mark(2)));
    });
}

/// T12: a source that can't be asked for many pages at once, though for each, still has all of them served.
#[test]
fn a_source_that_fails_for_many_pages_is_asked_for_one() {
    alone("a_source_that_fails_for_many_pages_is_asked_for_one", || {
        let engine = engine_builder().build().unwrap();
        let list = source(40, |_, len| if len > 1 { Err(ErrorKind::InvalidInput.into()) } else { Ok(()) });
        let region = attach(&engine, &list);
        (0..40).for_each(|page| assert_eq!(read_page(&region, page), Ok(mark(page))));
        assert_eq!(settled_stats(&engine).pages_poisoned, 0);
    });
}

/// T12, T63: while a source is slow, other pages are served; every thread that waits for one of its pages gets it, for
/// one read.
#[test]
fn a_slow_source_holds_up_nobody_else() {
    alone("a_slow_source_holds_up_nobody_else", || {
        let engine = engine_builder().fault_around_pages(16).build().unwrap();
        let (gate, calls) = (Gate::default(), Arc::new(AtomicU64::new(0)));
        let (passed, counted) = (gate.clone(), Arc::clone(&calls));
        let slow = source(16, move |_, _| {
            counted.fetch_add(1, Ordering::SeqCst);
            passed.pass();
            Ok(())
        });
        let region = attach(&engine, &slow);
        std::thread::scope(|scope| {
            for n in 0..32 {
                let region = &region;
                scope.spawn(move || assert_eq!(read_page(region, n % 16), Ok(mark(n % 16))));
            }
            gate.await_one();
            for list in [pages(40), source(40, |_, _| Ok(()))] {
                let other = attach(&engine, &list);
                (0..40).for_each(|page| assert_eq!(read_page(&other, page), Ok(mark(page))));
            }
            gate.open();
        });
        assert_eq!(calls.load(Ordering::SeqCst), 1);
    });
}

/// T12: more reads than workers and buffers: those that find no place wait for one and get their bytes.
#[test]
fn more_slow_reads_than_workers_are_all_served() {
    alone("more_slow_reads_than_workers_are_all_served", || {
        const THREADS: u64 = 24;
        let engine = engine_builder().workers(1).fault_around_pages(2).build().unwrap();
        let gate = Gate::default();
        let passed = gate.clone();
        let region = attach(
            &engine,
            &source(2 * THREADS, move |_, _| {
                passed.pass();
                Ok(())
            }),
        );
        std::thread::scope(|scope| {
            for n in 0..THREADS {
                let region = &region;
                scope.spawn(move || {
                    assert_eq!(read_page(region, 2 * n + 1), Ok(mark(2 * n + 1)));
                    assert_eq!(read_page(region, 2 * n), Ok(mark(2 * n)));
                });
            }
            gate.await_one();
            gate.open();
        });
    });
}

/// T16: a page is taken from its source once, whoever touches it, wherever, and however often; the owner's own reads and
/// writes count as touches.
#[test]
fn a_page_is_read_from_its_source_once() {
    alone("a_page_is_read_from_its_source_once", || {
        const PAGES: u64 = 12;
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        let calls: Arc<[AtomicU64]> = (0..PAGES).map(|_| AtomicU64::new(0)).collect();
        let counted = Arc::clone(&calls);
        let list = source(PAGES, move |first, len| {
            (first..first + len as u64).for_each(|page| {
                counted[page as usize].fetch_add(1, Ordering::SeqCst);
            });
            Ok(())
        });
        let vmap = engine.vmap(&list).unwrap();
        let regions = [0; 2].map(|_| vmap.attach(&AttachOptions::new()).unwrap());
        let byte_of = |page: u64| page * page_size() as u64 + 3;
        for round in 0..3 {
            for page in 0..PAGES {
                // Each page is first met in another way.
                let ways: [&dyn Fn(); 4] = [
                    &|| assert_eq!(read_page(&regions[0], page), Ok(mark(page))),
                    &|| {
                        let mut byte = [0];
                        vmap.read_at(byte_of(page), &mut byte).unwrap();
                        assert_eq!(byte, [mark(page)]);
                    },
                    &|| assert_eq!(read_page(&regions[1], page), Ok(mark(page))),
                    &|| vmap.write_at(byte_of(page), &[mark(page)]).unwrap(),
                ];
                (0..4).for_each(|n| ways[(n + page as usize) % 4]());
            }
            let counts: Vec<_> = calls.iter().map(|count| count.load(Ordering::SeqCst)).collect();
            assert_eq!(counts, [1; PAGES as usize], "round {round}");
        }
    });
}

/// T12: the owner's read names the page that can't be had, and those before it are had.
#[test]
fn an_owners_read_names_the_page_that_fails() {
    alone("an_owners_read_names_the_page_that_fails", || {
        const BAD: u64 = 37;
        let engine = engine_builder().build().unwrap();
        let list =
            source(
                60,
                |first, len| {
                    if (first..first + len as u64).contains(&BAD) { Err(IoError::other("bad")) } else { Ok(()) }
                },
            );
        let vmap = engine.vmap(&list).unwrap();
        let mut bytes = vec![0; 60 * page_size()];
        let failed = vmap.read_at(0, &mut bytes).unwrap_err();
        assert!(matches!(failed, Error::NoPage { pgoff: BAD, .. }), "{failed}");
        for (first, len) in [(0, BAD), (BAD + 1, 59 - BAD)] {
            let bytes = &mut bytes[..len as usize * page_size()];
            vmap.read_at(first * page_size() as u64, bytes).unwrap();
            assert!((first..).zip(bytes.chunks(page_size())).all(|(n, page)| page.iter().all(|&b| b == mark(n))));
        }
        let panics = source(3, |_, _| panic!("on the owner's thread"));
        let failed = engine.vmap(&panics).unwrap().read_at(0, &mut [0]).unwrap_err();
        assert!(matches!(failed, Error::NoPage { pgoff: 0, .. }), "{failed}");
    });
}

/// Where a source finds the region that shows it, once there is one.
type Later<T> = Arc<OnceLock<T>>;

/// The outcomes of touches of the region that a source serves, made by the source itself.
struct SelfTouch {
    region: Later<Region>,
    outcomes: Arc<Mutex<Vec<Result<u8, Refused>>>>,
    engine: Engine,
}

/// A list whose source touches page `touched` of its own region, once it is asked for page `asked` on a thread other
/// than the one that builds this.
fn self_touching(builder: EngineBuilder, nr_pages: u64, asked: u64, touched: u64, gate: Option<Gate>) -> SelfTouch {
    let engine = builder.build().unwrap();
    let region: Later<Region> = Later::default();
    let outcomes = Arc::new(Mutex::new(Vec::new()));
    let (shown, noted) = (Arc::clone(&region), Arc::clone(&outcomes));
    let list = source(nr_pages, move |first, len| {
        if (first..first + len as u64).contains(&asked) {
            if let Some(gate) = &gate {
                gate.pass();
            }
            let outcome = read_page(shown.get().unwrap(), touched);
            noted.lock().unwrap().push(outcome);
        }
        Ok(())
    });
    assert!(region.set(attach(&engine, &list)).is_ok());
    SelfTouch { region, outcomes, engine }
}

/// T79, U24: a source that touches the very page that it is asked for does not wait for itself: its touch is SIGBUS, for
/// which an application may have a handler; what the source then makes is served.
#[test]
fn a_source_that_touches_the_page_it_makes_gets_sigbus() {
    alone("a_source_that_touches_the_page_it_makes_gets_sigbus", || {
        for (workers, around) in [(1, 1), (4, 1), (1, 16), (4, 16)] {
            let builder = engine_builder().workers(workers).fault_around_pages(around);
            let test = self_touching(builder, 16, 3, 3, None);
            let region = test.region.get().unwrap();
            // Its refusal is one for everybody who waits for the page, until the source has made it after all.
            let outcome = read_page(region, 3);
            let sigbus = |refused: Refused| refused.is_sigbus_at(in_page(region, 3) as usize);
            assert!(outcome == Ok(mark(3)) || outcome.is_err_and(sigbus), "{outcome:?}");
            if test.engine.features().contains(Features::POISON) {
                eventually("the page", || read_page(region, 3) == Ok(mark(3)));
            } else {
                // What takes the place of poison stays, for this process.
                eventually("the source goes on", || !test.outcomes.lock().unwrap().is_empty());
                assert_sigbus(region, 3);
            }
            let outcomes = test.outcomes.lock().unwrap();
            assert!(outcomes[0].unwrap_err().is_sigbus_at(in_page(region, 3) as usize), "{outcomes:?}");
            assert_eq!(settled_stats(&test.engine).self_faults, 1);
            drop(outcomes);
            assert_eq!(read_page(region, 4), Ok(mark(4)));
        }
    });
}

/// T79: the same for another page of the same read, and for one that another worker would have to read; also when
/// other threads wait for that page already.
#[test]
fn a_source_that_touches_another_slow_page_gets_sigbus() {
    alone("a_source_that_touches_another_slow_page_gets_sigbus", || {
        for (around, touched) in [(16, 7), (1, 7), (16, 30)] {
            for waiters in [0, 3] {
                let gate = Gate::default();
                let builder = engine_builder().fault_around_pages(around).workers(2);
                let test = self_touching(builder, 32, 3, touched, Some(gate.clone()));
                let region = test.region.get().unwrap();
                std::thread::scope(|scope| {
                    scope.spawn(|| assert_eq!(read_page(region, 3), Ok(mark(3))));
                    gate.await_one();
                    let faults = test.engine.stats().faults;
                    for _ in 0..waiters {
                        scope.spawn(|| {
                            let outcome = read_page(region, touched);
                            let sigbus = |refused: Refused| refused.is_sigbus_at(in_page(region, touched) as usize);
                            assert!(outcome == Ok(mark(touched)) || outcome.is_err_and(sigbus), "{outcome:?}");
                        });
                    }
                    if waiters > 0 {
                        eventually("a waiter", || test.engine.stats().faults > faults);
                    }
                    gate.open();
                });
                let outcome = test.outcomes.lock().unwrap()[0];
                let sigbus = |refused: Refused| refused.is_sigbus_at(in_page(region, touched) as usize);
                // A waiter may have had the page read before the source touched it.
                assert!(outcome.is_err_and(sigbus) || (waiters > 0 && outcome == Ok(mark(touched))), "{outcome:?}");
            }
        }
    });
}

/// T79: memory of the engine that needs no worker may be touched by a source: it is served.
#[test]
fn a_source_may_touch_what_needs_no_worker() {
    alone("a_source_may_touch_what_needs_no_worker", || {
        let engine = engine_builder().workers(1).build().unwrap();
        let plain = attach(&engine, &pages(40));
        let region = attach(
            &engine,
            &source(40, move |first, _| {
                assert_eq!(read_page(&plain, first), Ok(mark(first)));
                Ok(())
            }),
        );
        (0..40).for_each(|page| assert_eq!(read_page(&region, page), Ok(mark(page))));
        assert_eq!(settled_stats(&engine).self_faults, 0);
    });
}

/// T79: a source that asks for its own vmap's bytes, on a worker or on the thread that reads without a region, is
/// told so.
#[test]
fn a_source_that_reads_its_own_vmap_is_refused() {
    alone("a_source_that_reads_its_own_vmap_is_refused", || {
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        let (own, refusals): (Later<Vmap>, Arc<Mutex<Vec<Errno>>>) = Default::default();
        let (asked, noted) = (Arc::clone(&own), Arc::clone(&refusals));
        let list = source(4, move |_, _| {
            let refused = asked.get().unwrap().read_at(0, &mut [0]).unwrap_err();
            noted.lock().unwrap().push(refused.errno());
            let refused = asked.get().unwrap().write_at(page_size() as u64, &[0]).unwrap_err();
            noted.lock().unwrap().push(refused.errno());
            Ok(())
        });
        let vmap = engine.vmap(&list).unwrap();
        assert!(own.set(vmap.clone()).is_ok());
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        assert_eq!(read_page(&region, 2), Ok(mark(2)));
        vmap.read_at(3 * page_size() as u64, &mut [0]).unwrap();
        assert_eq!(*refusals.lock().unwrap(), [Errno::EDEADLK; 4]);
    });
}

/// A guard over a region's bytes, to offer them as a source.
struct Lent(Region, usize);

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: nobody writes to the region in these tests, and it stays mapped as long as the guard lives.
        unsafe { &self.0.as_slice()[self.1..] }
    }
}

/// T80, U24: memory that an engine pages in is refused as a source, by that engine and by any other: a copy from it could
/// wait for the thread that copies. What was there is as before.
#[test]
fn a_source_in_a_region_is_refused() {
    alone("a_source_in_a_region_is_refused", || {
        let (engine, other) = (engine_builder().build().unwrap(), engine_builder().build().unwrap());
        for skipped in [0, page_size() + 100] {
            let region = attach(&engine, &pages(3));
            let (start, vmap) = (region.as_ptr() as usize, region.vmap());
            let mut list = Kiobuf::new();
            list.map_slice(Lent(region, skipped)).unwrap();
            for asked in [&engine, &other] {
                let refused = asked.vmap(&list).unwrap_err();
                assert!(matches!(refused, Error::SourceInRegion { addr } if addr == start + skipped), "{refused}");
                assert_eq!(refused.errno(), Errno::EINVAL);
                let longer = Kiobuf::concat(&[pages(1), list.clone()]).unwrap();
                assert!(matches!(asked.vmap(&longer), Err(Error::SourceInRegion { .. })));
                let expandable = asked.vmap_builder(&pages(1)).expandable().build().unwrap();
                assert!(matches!(expandable.expand(&list), Err(Error::SourceInRegion { .. })));
                assert_eq!(expandable.nr_pages(), 1);
            }
            assert_eq!(vmap.refcount().unwrap(), 1);
            drop(list);
            assert_eq!(vmap.refcount().unwrap(), 0);
        }
    });
}

/// T113: an application's handler for SIGBUS also runs for what its callbacks touch.
#[test]
fn a_callback_that_touches_a_hole_gets_its_signal_handled() {
    alone("a_callback_that_touches_a_hole_gets_its_signal_handled", || {
        let engine = engine_builder().build().unwrap();
        let hole = attach(&engine, &support::holes(1));
        let refused = Arc::new(AtomicBool::new(false));
        let noted = Arc::clone(&refused);
        let vmap = engine.vmap_builder(&pages(1)).on_deref(move |_| {
            assert_sigbus(&hole, 0);
            noted.store(true, Ordering::SeqCst);
        });
        drop(vmap.build().unwrap().attach(&AttachOptions::new()).unwrap());
        eventually("the callback", || refused.load(Ordering::SeqCst));
    });
}

/// T73: a shutdown answers the touch that waits for a source, even if the source never comes back: SIGBUS, at once.
#[test]
fn a_shutdown_answers_a_touch_whose_source_is_stuck() {
    alone("a_shutdown_answers_a_touch_whose_source_is_stuck", || {
        let engine = engine_builder().fault_around_pages(16).build().unwrap();
        let gate = Gate::default();
        let passed = gate.clone();
        let region = attach(
            &engine,
            &source(40, move |_, _| {
                passed.pass();
                Ok(())
            }),
        );
        std::thread::scope(|scope| {
            // In the same read as each other, and in a read of its own.
            let touchers: Vec<_> = [3, 4, 38]
                .map(|page| {
                    scope.spawn({
                        let region = &region;
                        move || assert_sigbus(region, page)
                    })
                })
                .into();
            eventually("reads of the source", || gate.came() == 2 && engine.stats().faults >= 3);
            engine.shutdown(Shutdown::Poison).unwrap();
            touchers.into_iter().for_each(|toucher| toucher.join().unwrap());
            gate.open();
        });
        assert_sigbus(&region, 3);
        assert_sigbus(&region, 39);
    });
}

/// T73: a shutdown that fills gives a waiting touch the bytes that it filled in, not SIGBUS.
#[test]
fn a_filling_shutdown_serves_the_touches_that_wait() {
    alone("a_filling_shutdown_serves_the_touches_that_wait", || {
        let engine = engine_builder().build().unwrap();
        let (gate, first) = (Gate::default(), AtomicBool::new(true));
        let passed = gate.clone();
        // Only the first read is slow: the one for the touch.
        let region = attach(
            &engine,
            &source(40, move |_, _| {
                if first.swap(false, Ordering::SeqCst) {
                    passed.pass();
                }
                Ok(())
            }),
        );
        std::thread::scope(|scope| {
            for page in [3, 4] {
                let region = &region;
                scope.spawn(move || assert_eq!(read_page(region, page), Ok(mark(page))));
            }
            gate.await_one();
            eventually("both touches", || engine.stats().faults >= 2);
            engine.shutdown(Shutdown::Fill).unwrap();
            gate.open();
        });
        (0..40).for_each(|page| assert_eq!(read_page(&region, page), Ok(mark(page))));
    });
}

/// T73, T12: one page that can't be had keeps no other from being filled.
#[test]
fn a_filling_shutdown_fills_around_a_page_that_fails() {
    alone("a_filling_shutdown_fills_around_a_page_that_fails", || {
        let engine = engine_builder().build().unwrap();
        let list = source(200, |first, len| {
            let pages = first..first + len as u64;
            if pages.contains(&37) { Err(IoError::other("bad")) } else { Ok(()) }
        });
        let region = attach(&engine, &list);
        engine.shutdown(Shutdown::Fill).unwrap();
        for page in 0..200 {
            if page == 37 {
                assert_sigbus(&region, page);
            } else {
                assert_eq!(read_page(&region, page), Ok(mark(page)));
            }
        }
    });
}

/// A write whose bytes come from missing memory of the same vmap is served: nothing that the kernel holds meanwhile is
/// needed to serve it, however many pages wait.
#[test]
fn a_write_from_missing_memory_of_the_same_vmap_is_served() {
    alone("a_write_from_missing_memory_of_the_same_vmap_is_served", || {
        const PAGES: usize = 64;
        for _ in 0..20 {
            let engine = engine_builder().workers(1).fault_around_pages(2).build().unwrap();
            let vmap = engine.vmap(&source(PAGES as u64, |_, _| Ok(()))).unwrap();
            let region = vmap.attach(&AttachOptions::new()).unwrap();
            let from = 8 * page_size();
            std::thread::scope(|scope| {
                for half in 0..2 {
                    let region = &region;
                    scope.spawn(move || {
                        for page in (8..PAGES as u64).filter(|page| page % 2 == half) {
                            assert_eq!(read_page(region, page), Ok(mark(page)));
                        }
                    });
                }
                // SAFETY: nobody writes to these pages while the slice lives.
                let missing = unsafe { &region.as_slice()[from..from + 48 * page_size()] };
                match vmap.write_at(0, &missing[..8 * page_size()]) {
                    Ok(()) => assert_eq!(read_page(&region, 0), Ok(mark(8))),
                    Err(error) => {
                        assert!(!engine.open_way().serves_kernel_faults());
                        assert_eq!(error.errno(), Errno::EFAULT);
                    }
                }
            });
        }
    });
}

/// U18: a waiting thread that is interrupted and touches again waits for the same read.
#[test]
fn many_touches_of_a_stuck_page_end_with_it() {
    alone("many_touches_of_a_stuck_page_end_with_it", || {
        let engine = engine_builder().workers(1).build().unwrap();
        let gate = Gate::default();
        let passed = gate.clone();
        let failing = source(16, move |_, _| {
            passed.pass();
            Err(IoError::other("never was any good"))
        });
        let region = attach(&engine, &failing);
        std::thread::scope(|scope| {
            for n in 0..8 {
                let region = &region;
                scope.spawn(move || assert_sigbus(region, n % 2));
            }
            gate.await_one();
            gate.open();
        });
        // No page of this list is ever data.
        assert!(touch::read(in_page(&region, 15)).is_err());
    });
}
