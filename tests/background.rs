//! Populating in the background: who hears of it, how it is halted, and that a vmap which is full needs no engine.

mod support;

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use kiomap::{
    AttachOptions, Delivery, Engine, Kiobuf, PopulateEnd, PopulateOptions, PopulateProgress, Shutdown, page_size,
};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use support::populating::{assert_marks, bytes, mapped, slow};
use support::scene::{GatedSource, Told, at, child, kill_and_reap};
use support::{
    alone, assert_sigbus, attached, engine_builder, eventually, holes, mark, pages, read_page, reap_ok, settled_stats,
    threads, touch,
};

fn engine() -> Engine {
    engine_builder().fault_around_pages(1).build().unwrap()
}

/// What a listener has heard.
#[derive(Clone, Default)]
struct Heard {
    progress: Arc<Mutex<Vec<PopulateProgress>>>,
    ends: Arc<Mutex<Vec<(PopulateProgress, PopulateEnd)>>>,
}

impl Heard {
    fn listen(&self, options: PopulateOptions) -> PopulateOptions {
        let (progress, ends) = (Arc::clone(&self.progress), Arc::clone(&self.ends));
        options
            .on_progress(move |now| progress.lock().unwrap().push(now))
            .on_end(move |last, how| ends.lock().unwrap().push((last, how)))
    }

    /// How it ended: told once, and not before the last progress.
    #[track_caller]
    fn end(&self) -> PopulateEnd {
        let (progress, ends) = (self.progress.lock().unwrap(), self.ends.lock().unwrap());
        let [(last, how)] = ends[..] else { panic!("{ends:?}") };
        assert!(progress.iter().all(|before| before.pages_done <= last.pages_done));
        how
    }
}

/// Progress is told after each step, never goes back whatever the number of threads, and ends with all pages; the end is told
/// once, before whoever waits goes on. A panic of a listener is counted and changes nothing.
#[test]
fn progress_and_end_are_told() {
    alone("progress_and_end_are_told", || {
        let engine = engine();
        for threads in [1, 3] {
            let (_vmap, region) = attached(&engine, &Kiobuf::concat(&[slow(1000), holes(50), pages(30)]).unwrap());
            let heard = Heard::default();
            let options = heard.listen(PopulateOptions::new().step_bytes(16 * page_size()).threads(threads));
            let done = region.populate_in_background(0..region.len_bytes(), options).unwrap().wait().unwrap();
            assert_eq!((done.pages_done, done.pages_total, done.pages_failed), (1080, 1080, 50));
            assert_eq!(heard.end(), PopulateEnd::Complete);
            let progress = heard.progress.lock().unwrap();
            assert!(progress.len() > 1000 / 16 && progress.is_sorted_by_key(|now| now.pages_done));
            assert_eq!(progress.last(), Some(&done));
        }
        let (_vmap, region) = attached(&engine, &pages(300));
        let options = PopulateOptions::new().on_progress(|_| panic!("asked to")).on_end(|_, _| panic!("asked to"));
        let done = region.populate_in_background(0..region.len_bytes(), options).unwrap().wait().unwrap();
        assert_eq!((done.pages_done, mapped(&region)), (300, 300));
        assert!(settled_stats(&engine).panics >= 2);
    });
}

/// However it ends, it is told: cancelled, or stopped by a shutdown; not at all where it never began.
#[test]
fn every_end_is_told_once() {
    alone("every_end_is_told_once", || {
        let engine = engine();
        // A step in a hundred days.
        let limited = || PopulateOptions::new().bytes_per_second(1).step_bytes(page_size());
        let begin = |heard: &Heard| {
            let (_vmap, region) = attached(&engine, &pages(10));
            let populating = region.populate_in_background(0..region.len_bytes(), heard.listen(limited())).unwrap();
            eventually("the first step", || !heard.progress.lock().unwrap().is_empty());
            (region, populating)
        };
        let heard = Heard::default();
        let (_region, populating) = begin(&heard);
        populating.cancel();
        assert_eq!(populating.wait().unwrap().pages_done, 1);
        assert_eq!(heard.end(), PopulateEnd::Cancelled);
        // A region that is dropped has no pages left to be brought.
        let heard = Heard::default();
        let (region, populating) = begin(&heard);
        drop(region);
        let done = populating.wait().unwrap();
        assert_eq!((done.pages_done, done.pages_failed, heard.end()), (10, 9, PopulateEnd::Complete));
        let heard = Heard::default();
        let (region, populating) = begin(&heard);
        engine.shutdown(Shutdown::Poison).unwrap();
        // A step that was under way may end after it.
        assert_eq!(populating.wait().unwrap_err().errno(), Errno::ESHUTDOWN);
        assert_eq!(heard.end(), PopulateEnd::Stopped);
        let heard = Heard::default();
        let refused = region.populate_in_background(0..1, heard.listen(PopulateOptions::new())).map(drop);
        assert_eq!(refused.unwrap_err().errno(), Errno::ESHUTDOWN);
        assert!(heard.ends.lock().unwrap().is_empty());
    });
}

/// Listeners may do what they like: attach, populate, drop the region, cancel, shut the engine down.
#[test]
fn listeners_may_do_what_they_like() {
    alone("listeners_may_do_what_they_like", || {
        let engine = Arc::new(engine());
        let (vmap, region) = attached(&engine, &pages(500));
        let region = Arc::new(Mutex::new(Some(region)));
        let its = Arc::clone(&region);
        let other = engine.vmap(&pages(20)).unwrap();
        let attaching = move |_: PopulateProgress| {
            let attached = other.attach(&AttachOptions::new()).unwrap();
            attached.populate(0..attached.len_bytes()).unwrap();
            assert_eq!(touch::read(at(&attached, 19)), Ok(mark(19)));
            drop(its.lock().unwrap().take());
        };
        let options = PopulateOptions::new().step_bytes(100 * page_size()).on_progress(attaching);
        let begun = {
            let region = region.lock().unwrap();
            let region = region.as_ref().unwrap();
            region.populate_in_background(0..region.len_bytes(), options).unwrap()
        };
        let done = begun.wait().unwrap();
        assert_eq!((done.pages_done, done.pages_failed), (500, 400));
        assert_eq!(settled_stats(&engine).panics, 0);
        assert_eq!(vmap.refcount().unwrap(), 0);

        let (_vmap, region) = attached(&engine, &pages(500));
        let (shut_down, its) = (Arc::new(AtomicUsize::new(0)), Arc::clone(&engine));
        let counted = Arc::clone(&shut_down);
        let options = PopulateOptions::new().step_bytes(100 * page_size()).on_progress(move |_| {
            if its.shutdown(Shutdown::Poison).is_ok() {
                counted.fetch_add(1, Ordering::SeqCst);
            }
        });
        let populating = region.populate_in_background(0..region.len_bytes(), options).unwrap();
        assert_eq!(populating.wait().unwrap_err().errno(), Errno::ESHUTDOWN);
        assert_eq!(shut_down.load(Ordering::SeqCst), 1);
        assert_marks(&region, 0..100);
        assert_sigbus(&region, 499);
    });
}

/// A pause takes effect after the step that is being made, and nothing is brought until it is resumed; a cancel, the end of the
/// region and a shutdown end it all the same.
#[test]
fn a_pause_halts_it_and_nothing_else() {
    alone("a_pause_halts_it_and_nothing_else", || {
        needs_sources!();
        let engine = engine_builder().delivery(Delivery::Handler).fault_around_pages(1).build().unwrap();
        let gate = GatedSource::new();
        let (_vmap, region) = attached(&engine, &gate.list(100));
        let options = PopulateOptions::new().step_bytes(10 * page_size());
        let populating = region.populate_in_background(bytes(0..100), options.clone()).unwrap();
        gate.wait_for_held(1);
        populating.pause();
        populating.pause();
        assert!(populating.is_paused());
        gate.open();
        eventually("the step that was being made", || populating.progress().pages_done == 10);
        // The thread takes turns: whatever it does after this, it has looked at the one that is paused.
        for _ in 0..3 {
            let (_other, others) = attached(&engine, &pages(200));
            others.populate_in_background(bytes(0..200), options.clone()).unwrap().wait().unwrap();
        }
        assert_eq!((populating.progress().pages_done, gate.calls(), populating.is_finished()), (10, 1, false));
        // A touch is answered as ever.
        assert_eq!(read_page(&region, 50), Ok(mark(50)));
        populating.resume();
        assert!(!populating.is_paused());
        assert_eq!(populating.wait().unwrap().pages_done, 100);
        assert_marks(&region, 0..100);

        let paused = || {
            let (_vmap, region) = attached(&engine, &pages(100));
            let heard = Heard::default();
            let options = heard.listen(PopulateOptions::new().bytes_per_second(1).step_bytes(page_size()));
            let populating = region.populate_in_background(bytes(0..100), options).unwrap();
            eventually("the first step", || !heard.progress.lock().unwrap().is_empty());
            populating.pause();
            (region, populating)
        };
        let (_region, populating) = paused();
        populating.cancel();
        assert_eq!(populating.wait().unwrap().pages_done, 1);
        let (region, populating) = paused();
        drop(region);
        assert_eq!(populating.wait().unwrap().pages_failed, 99);
        let (_region, populating) = paused();
        engine.shutdown(Shutdown::Poison).unwrap();
        assert_eq!(populating.wait().unwrap_err().errno(), Errno::ESHUTDOWN);
    });
}

/// The event of an end is readable after it and not before, whenever it is asked for.
#[test]
fn an_event_loop_can_wait_for_the_end() {
    alone("an_event_loop_can_wait_for_the_end", || {
        let engine = engine();
        let is_readable = |event: std::os::fd::BorrowedFd<'_>, timeout| {
            let mut polled = [PollFd::new(event, PollFlags::POLLIN)];
            poll(&mut polled, timeout).unwrap() == 1
        };
        let (_vmap, region) = attached(&engine, &pages(100));
        let options = PopulateOptions::new().bytes_per_second(1).step_bytes(page_size());
        let populating = region.populate_in_background(bytes(0..100), options).unwrap();
        let event = populating.event().unwrap();
        assert!(!is_readable(event.as_fd(), PollTimeout::ZERO));
        populating.cancel();
        assert!(is_readable(event.as_fd(), PollTimeout::NONE));
        assert!(populating.is_finished());
        let done = region.populate_in_background(bytes(0..100), PopulateOptions::new()).unwrap();
        eventually("its end", || done.is_finished());
        assert!(is_readable(done.event().unwrap(), PollTimeout::ZERO));
        reap_ok(child(|| assert_eq!(done.event().unwrap_err().errno(), Errno::EPERM)));
    });
}

/// The last step of a fill is the last that is asked of the engine: after it was shut down without filling anything, its threads
/// have nothing to do with any page, here and in a child, mapped already or not.
#[test]
fn a_full_vmap_needs_no_engine() {
    alone("a_full_vmap_needs_no_engine", || {
        const PAGES: u64 = 2000;
        for threads in [1, 4] {
            let engine = engine();
            let list = Kiobuf::concat(&[slow(PAGES - 500), pages(500)]).unwrap();
            let mark_of = |page: u64| mark(page % (PAGES - 500));
            let (vmap, region) = attached(&engine, &list);
            let later = vmap.attach(&AttachOptions::new()).unwrap();
            touch::write(at(&region, 1234), 77).unwrap();
            let expected = |page| if page == 1234 { 77 } else { mark_of(page) };
            let options = PopulateOptions::new().threads(threads);
            let done = region.populate_in_background(0..region.len_bytes(), options).unwrap().wait().unwrap();
            assert_eq!((done.pages_done, done.pages_failed), (PAGES, 0));
            let faults = settled_stats(&engine).faults;
            let (here, go) = (Told::new(), Told::new());
            let inherited = child(|| {
                region.check().unwrap();
                here.tell(1);
                go.wait_for(1);
                (0..PAGES).for_each(|page| assert_eq!(touch::read(at(&region, page)), Ok(expected(page)), "{page}"));
            });
            here.wait_for(1);
            engine.shutdown(Shutdown::Poison).unwrap();
            go.tell(1);
            reap_ok(inherited);
            for region in [&region, &later] {
                // As if it had never been mapped: the object still has it.
                // SAFETY: the memory is shared, so no byte of it changes.
                let unmapped =
                    unsafe { libc::madvise(region.as_ptr().cast(), region.len_bytes(), libc::MADV_DONTNEED) };
                assert_eq!(unmapped, 0);
                for page in 0..PAGES {
                    assert_eq!(touch::read(at(region, page)), Ok(expected(page)), "page {page}");
                }
                touch::write(at(region, 0), 5).unwrap();
                touch::write(at(region, 0), mark(0)).unwrap();
            }
            assert_eq!(engine.stats().faults, faults);
        }
        eventually("the threads' ends", || threads().iter().all(|name| !name.starts_with("kiomap")));
    });
}

/// Nor does it need the process that had the engine: when that is killed, a child finds every page.
#[test]
fn a_full_vmap_outlives_its_owner() {
    alone("a_full_vmap_outlives_its_owner", || {
        let (filled, dead, seen) = (Told::new(), Told::new(), Told::new());
        let owner = child(|| {
            let engine = engine();
            let (_vmap, region) = attached(&engine, &pages(1500));
            let done = region.populate_in_background(0..region.len_bytes(), PopulateOptions::new()).unwrap();
            assert_eq!(done.wait().unwrap().pages_failed, 0);
            child(|| {
                filled.tell(1);
                dead.wait_for(2);
                let all = (0..1500).all(|page| touch::read(at(&region, page)) == Ok(mark(page)));
                seen.tell(if all { 3 } else { 4 });
            });
            loop {
                nix::unistd::pause();
            }
        });
        filled.wait_for(1);
        kill_and_reap(owner);
        dead.tell(2);
        seen.wait_for(3);
    });
}
