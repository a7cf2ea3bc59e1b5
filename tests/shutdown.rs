//! A shutdown that fills tells how far it is, and leaves every page that can be had.

mod support;

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};

use kiomap::{AttachOptions, Engine, Error, FillProgress, Kiobuf, Region, Shutdown, Vmap};
use support::scene::{GatedSource, at, child, sourced_pages};
use support::truth::assert_count;
use support::{
    alone, assert_sigbus, engine_builder, eventually, holes, mark, pages, read_page, reap_ok, source, threads, touch,
};

/// What a shutdown tells, checked as it comes.
#[derive(Default)]
struct Told {
    all: Vec<FillProgress>,
}

impl Told {
    fn hear(&mut self, now: FillProgress) {
        match self.all.last() {
            None => assert_eq!((now.pages_done, now.pages_failed), (0, 0)),
            Some(before) => {
                assert!(before.pages_done < now.pages_done, "{before:?}, then {now:?}");
                assert!(before.pages_failed <= now.pages_failed, "{before:?}, then {now:?}");
                assert_eq!(before.pages_total, now.pages_total);
            }
        }
        assert!(now.pages_failed <= now.pages_done && now.pages_done <= now.pages_total, "{now:?}");
        self.all.push(now);
    }

    /// What came last: all pages are done.
    fn last(&self) -> FillProgress {
        let last = *self.all.last().unwrap();
        assert_eq!(last.pages_done, last.pages_total);
        last
    }
}

/// Shuts an engine down and answers what it told.
fn fill(engine: &Engine) -> Told {
    let mut told = Told::default();
    engine.shutdown_filling(|now| told.hear(now)).unwrap();
    told
}

fn attach(engine: &Engine, list: &Kiobuf) -> (Vmap, Region) {
    let vmap = engine.vmap(list).unwrap();
    let region = vmap.attach(&AttachOptions::new()).unwrap();
    (vmap, region)
}

fn no_thread_is_left() {
    eventually("the threads' ends", || threads().iter().all(|name| !name.starts_with("kiomap")));
}

/// T73: the progress grows from nothing to all pages of all attached vmaps, in bounded steps; afterwards each page is
/// there, holes and pages past the end are SIGBUS, and what nobody has attached was not read.
#[test]
fn filling_goes_from_nothing_to_all() {
    alone("filling_goes_from_nothing_to_all", || {
        let engine = engine_builder().build().unwrap();
        let (_, memory) = attach(&engine, &pages(1500));
        let (_, slow) = attach(&engine, &sourced_pages(700));
        let mixed = Kiobuf::concat(&[pages(3), holes(1_000_000), pages(5), holes(1), pages(1)]).unwrap();
        let (_, mixed) = attach(&engine, &mixed);
        let part = engine.vmap(&pages(40)).unwrap().attach(&AttachOptions::new().pgoff(30)).unwrap();
        let unread = GatedSource::new();
        let nobodys = engine.vmap(&unread.list(8)).unwrap();
        // Some are here already, and one was changed.
        touch::write(at(&memory, 700), 99).unwrap();
        assert_eq!(read_page(&slow, 3), Ok(mark(3)));
        let told = fill(&engine);
        let last = told.last();
        assert_eq!((last.pages_total, last.pages_failed), (1500 + 700 + 1_000_010 + 40, 0));
        // Three steps, two steps, one with the big hole and what it reaches, and so on; never a page at a time.
        assert!((7..=12).contains(&told.all.len()), "{:?}", told.all);
        (0..1500).filter(|&page| page != 700).for_each(|page| assert_eq!(read_page(&memory, page), Ok(mark(page))));
        assert_eq!(touch::read(at(&memory, 700)), Ok(99));
        (0..700).for_each(|page| assert_eq!(read_page(&slow, page), Ok(mark(page))));
        (0..3).for_each(|page| assert_eq!(read_page(&mixed, page), Ok(mark(page))));
        (0..5).for_each(|page| assert_eq!(read_page(&mixed, 1_000_003 + page), Ok(mark(page))));
        assert_eq!(read_page(&mixed, 1_000_009), Ok(mark(0)));
        [3, 4, 500_000, 1_000_002, 1_000_008].iter().for_each(|&page| assert_sigbus(&mixed, page));
        (0..10).for_each(|page| assert_eq!(read_page(&part, page), Ok(mark(30 + page))));
        assert_eq!(unread.calls(), 0);
        drop((memory, slow, mixed, part, nobodys));
        no_thread_is_left();
    });
}

/// T12, T73: pages whose source fails are told, and are SIGBUS; the others are there. With nothing attached, or nothing but
/// holes, there is one telling, or two.
#[test]
fn pages_that_fail_are_told() {
    alone("pages_that_fail_are_told", || {
        let engine = engine_builder().build().unwrap();
        let list = source(600, |first, nr_pages| {
            let broken = [5, 64, 599].iter().any(|&page| (first..first + nr_pages as u64).contains(&page));
            if broken { Err(std::io::ErrorKind::Other.into()) } else { Ok(()) }
        });
        let (_, region) = attach(&engine, &list);
        let last = fill(&engine).last();
        assert_eq!((last.pages_total, last.pages_failed), (600, 3));
        for page in 0..600 {
            match page {
                5 | 64 | 599 => assert_sigbus(&region, page),
                _ => assert_eq!(read_page(&region, page), Ok(mark(page))),
            }
        }
        let told = fill(&engine_builder().build().unwrap());
        assert_eq!((told.all.len(), told.last().pages_total), (1, 0));
        let engine = engine_builder().build().unwrap();
        let (_, region) = attach(&engine, &holes(1 << 30));
        let told = fill(&engine);
        assert_eq!((told.all.len(), told.last().pages_total, told.last().pages_failed), (2, 1 << 30, 0));
        assert_sigbus(&region, 77);
    });
}

/// T28, T73: while a shutdown tells, faults are answered; every attach is refused, and so is another shutdown; what is
/// dropped is gone; a child has nothing, rather than something wrong.
#[test]
fn progress_may_use_what_is_there() {
    alone("progress_may_use_what_is_there", || {
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        let (vmap, region) = attach(&engine, &sourced_pages(1200));
        let other = Cell::new(Some(vmap.attach(&AttachOptions::new()).unwrap()));
        let (mut told, mut asked) = (Told::default(), 0);
        engine
            .shutdown_filling(|now| {
                told.hear(now);
                asked += 1;
                // Pages that are filled later.
                let page = 1199 - asked;
                assert_eq!(read_page(&region, page), Ok(mark(page)));
                assert!(matches!(vmap.attach(&AttachOptions::new()), Err(Error::Shutdown)));
                assert!(matches!(engine.shutdown(Shutdown::Fill), Err(Error::Shutdown)));
                assert!(matches!(engine.shutdown(Shutdown::Poison), Err(Error::Shutdown)));
                assert!(matches!(vmap.revoke(kiomap::Revoke::Soft), Err(Error::Shutdown)));
                drop(other.take());
                assert_count(&engine, &vmap, 1);
                reap_ok(child(|| {
                    assert!(region.check().is_err());
                    assert!(read_page(&region, page).is_err_and(|refused| refused.is_sigsegv()));
                }));
            })
            .unwrap();
        assert_eq!((told.last().pages_total, asked), (1200, told.all.len() as u64));
        (0..1200).for_each(|page| assert_eq!(read_page(&region, page), Ok(mark(page))));
        assert_eq!(vmap.refcount().unwrap(), 1);
        drop(region);
        assert_eq!(vmap.refcount().unwrap(), 0);
        no_thread_is_left();
    });
}

/// T27, T73: a panic of the progress goes on to the caller, and leaves the engine shut down: what was filled is there, the
/// rest is SIGBUS, nobody waits, and nothing is left behind.
#[test]
fn a_panic_of_the_progress_leaves_the_engine_shut_down() {
    alone("a_panic_of_the_progress_leaves_the_engine_shut_down", || {
        for steps in [0, 1, 2] {
            let engine = engine_builder().fault_around_pages(1).build().unwrap();
            let gated = GatedSource::new();
            let (vmap, region) = attach(&engine, &pages(1024));
            let waited_for = engine.vmap(&gated.list(1)).unwrap().attach(&AttachOptions::new()).unwrap();
            let filled = std::thread::scope(|scope| {
                // A fault that waits meanwhile is answered too.
                let waiter = scope.spawn(|| read_page(&waited_for, 0));
                gated.wait_for_held(1);
                let mut so_far = 0;
                let panicked = catch_unwind(AssertUnwindSafe(|| {
                    engine.shutdown_filling(|now| {
                        so_far = now.pages_done;
                        assert_ne!(now.pages_done, steps * 512, "as it was told to");
                    })
                }));
                assert!(panicked.is_err());
                assert!(waiter.join().unwrap().is_err());
                gated.open();
                so_far
            });
            assert_eq!(filled, steps * 512);
            (0..filled).for_each(|page| assert_eq!(read_page(&region, page), Ok(mark(page))));
            (filled..1024).for_each(|page| assert_sigbus(&region, page));
            assert!(matches!(engine.shutdown(Shutdown::Poison), Err(Error::Shutdown)));
            assert!(matches!(engine.settle(), Ok(()) | Err(Error::Shutdown)));
            assert_eq!(vmap.refcount().unwrap(), 1);
            drop((region, waited_for));
            assert_eq!(vmap.refcount().unwrap(), 0);
            drop(engine);
            no_thread_is_left();
        }
    });
}

/// T60: a process that the progress forks and lets return is told that the engine is not its own; the other goes on.
#[test]
fn a_child_of_the_progress_does_not_shut_down() {
    alone("a_child_of_the_progress_does_not_shut_down", || {
        let engine = engine_builder().build().unwrap();
        let (_, region) = attach(&engine, &pages(1200));
        let mut forked = None;
        let outcome = engine.shutdown_filling(|now| {
            if now.pages_done == 512 {
                // SAFETY: this process runs this test only; the child leaves by `_exit`.
                forked = Some(unsafe { nix::unistd::fork() }.unwrap());
            }
        });
        match forked.unwrap() {
            nix::unistd::ForkResult::Child => {
                let refused = matches!(outcome, Err(Error::NotOwner { .. }));
                // SAFETY: ends the child.
                unsafe { libc::_exit(i32::from(!refused || region.check().is_ok())) }
            }
            nix::unistd::ForkResult::Parent { child } => {
                outcome.unwrap();
                reap_ok(child);
                (0..1200).for_each(|page| assert_eq!(read_page(&region, page), Ok(mark(page))));
            }
        }
    });
}
