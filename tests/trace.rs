//! What the engine tells a subscriber of `tracing`, and that whoever listens can keep nobody waiting.
#![cfg(feature = "tracing")]

mod support;

use std::fmt::Write;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kiomap::{AttachOptions, Shutdown, page_size};
use support::scene::{at, child};
use support::{alone, attached, engine_builder, eventually, mark, pages, read_page, reap_ok, source, touch};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

/// Notes every event of the engine as a line, and which thread it came from.
#[derive(Clone, Default)]
struct Notes {
    lines: Arc<Mutex<Vec<String>>>,
    /// Whoever holds this keeps the subscriber from going on.
    held: Arc<Mutex<()>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Notes {
    fn subscribed() -> Notes {
        let notes = Notes::default();
        tracing::subscriber::set_global_default(notes.clone()).unwrap();
        notes
    }

    fn has(&self, what: &str) -> bool {
        lock(&self.lines).iter().any(|line| line.contains(what))
    }

    #[track_caller]
    fn wait_for(&self, what: &str) {
        eventually(what, || self.has(what));
    }
}

struct Line(String);

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        write!(self.0, " {}={value:?}", field.name()).unwrap();
    }
}

impl Subscriber for Notes {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target().starts_with("kiomap::")
    }
    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }
    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn event(&self, event: &Event<'_>) {
        let comm = std::fs::read_to_string("/proc/thread-self/comm").unwrap();
        assert_eq!(comm.trim(), "kiomap-trace");
        drop(lock(&self.held));
        let mut line = Line(format!("{} {}", event.metadata().level(), event.metadata().target()));
        event.record(&mut line);
        lock(&self.lines).push(line.0);
    }
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

/// What happens outside the way of a fault is told: by a thread of its own, with the level and target that are documented.
#[test]
fn the_life_of_an_engine_is_told() {
    alone("the_life_of_an_engine_is_told", || {
        let notes = Notes::subscribed();
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        notes.wait_for("INFO kiomap::engine message=built engine=1 way=");
        let vmap = engine.vmap_builder(&pages(4)).on_deref(|_| panic!("of the application")).build().unwrap();
        notes.wait_for("DEBUG kiomap::vmap message=published engine=1 vmap=1 nr_pages=4");
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        notes.wait_for("DEBUG kiomap::region message=attached engine=1 vmap=1 region=1 addr=");
        let pid = child(|| assert_eq!(read_page(&region, 1), Ok(mark(1))));
        reap_ok(pid);
        notes.wait_for(&format!("DEBUG kiomap::process message=is served engine=1 pid={pid}"));
        notes.wait_for(&format!("DEBUG kiomap::process message=is gone engine=1 pid={pid}"));
        drop(region);
        notes.wait_for("DEBUG kiomap::region message=dropped engine=1 vmap=1 region=1 pieces=1");
        notes.wait_for("ERROR kiomap::callback message=panicked engine=1 vmap=1");
        engine.shutdown(Shutdown::Poison).unwrap();
        notes.wait_for("INFO kiomap::engine message=shut down engine=1 areas_left=0");
        assert!(!notes.has("kiomap::trace"));
    });
}

/// A source that fails is told, with its vmap, page and error.
#[test]
fn a_source_that_fails_is_told() {
    alone("a_source_that_fails_is_told", || {
        needs_sources!();
        let notes = Notes::subscribed();
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        let (_vmap, region) = attached(&engine, &source(4, |_, _| Err(std::io::ErrorKind::Other.into())));
        support::assert_sigbus(&region, 2);
        notes.wait_for("WARN kiomap::source message=could not be read engine=1 vmap=1 page=2 nr_pages=1 why=");
        notes.wait_for("WARN kiomap::source message=given up engine=1 vmap=1 page=2 nr_pages=1 tries=3 why=");
    });
}

/// While a subscriber waits for a lock that the application holds, faults, sources, processes, callbacks and attaches go on:
/// else a page of a failing source that is printed would be the end of the program.
#[test]
fn a_subscriber_that_waits_keeps_nobody_waiting() {
    alone("a_subscriber_that_waits_keeps_nobody_waiting", || {
        needs_sources!();
        let notes = Notes::subscribed();
        let (done, is_done) = std::sync::mpsc::channel();
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        let failing =
            engine.vmap(&source(8, |page, _| if page == 3 { Err(std::io::ErrorKind::Other.into()) } else { Ok(()) }));
        let failing = failing.unwrap();
        {
            let _held = lock(&notes.held);
            let vmap = engine.vmap_builder(&pages(4)).on_deref(move |_| done.send(()).unwrap()).build().unwrap();
            let region = vmap.attach(&AttachOptions::new()).unwrap();
            let slow = failing.attach(&AttachOptions::new()).unwrap();
            assert_eq!(read_page(&slow, 2), Ok(mark(2)));
            support::assert_sigbus(&slow, 3);
            reap_ok(child(|| assert_eq!(read_page(&region, 1), Ok(mark(1)))));
            // An address that the keeper has to look up, and tells of.
            // SAFETY: a second mapping of memory to which no reference exists.
            let again = unsafe { libc::mremap(region.as_ptr().cast(), 0, page_size(), libc::MREMAP_MAYMOVE) };
            assert_ne!(again, libc::MAP_FAILED);
            assert_eq!(touch::read(again.cast()), Ok(mark(0)));
            // SAFETY: as above.
            assert_eq!(unsafe { libc::munmap(again, page_size()) }, 0);
            drop(region);
            engine.settle().unwrap();
            is_done.recv().unwrap();
        }
        notes.wait_for("kiomap::source");
        notes.wait_for("kiomap::stray");
        notes.wait_for("kiomap::callback");
    });
}

/// A process whose id is its parent's, in a namespace of its own, tells of its engines by a thread of its own.
#[test]
fn a_process_of_the_same_id_tells_for_itself() {
    alone("a_process_of_the_same_id_tells_for_itself", || {
        let first_of_a_namespace = |body: &dyn Fn()| {
            // SAFETY: concerns the processes that are forked from now on.
            if unsafe { libc::unshare(libc::CLONE_NEWPID) } != 0 {
                skip!("this user may make no namespace of process ids");
            }
            reap_ok(child(|| {
                assert_eq!(std::process::id(), 1);
                body();
            }));
        };
        let notes = Notes::subscribed();
        let build = |id: u64| {
            let engine = engine_builder().build().unwrap();
            notes.wait_for(&format!("INFO kiomap::engine message=built engine={id}"));
            engine
        };
        first_of_a_namespace(&|| {
            let _engine = build(1);
            first_of_a_namespace(&|| drop(build(2)));
        });
    });
}

/// More events than may wait are lost, which is told; the engine does not wait.
#[test]
fn events_that_nobody_hears_are_lost_and_counted() {
    alone("events_that_nobody_hears_are_lost_and_counted", || {
        let notes = Notes::subscribed();
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        let vmap = engine.vmap(&pages(1)).unwrap();
        {
            let _held = lock(&notes.held);
            (0..700).for_each(|_| drop(vmap.attach(&AttachOptions::new()).unwrap()));
        }
        notes.wait_for("WARN kiomap::trace message=events were lost lost=");
    });
}

/// A subscriber that touches a region, of whatever pages, is answered as anybody is.
#[test]
fn a_subscriber_may_touch_regions() {
    alone("a_subscriber_may_touch_regions", || {
        needs_sources!();
        struct Toucher(usize);
        impl Subscriber for Toucher {
            fn enabled(&self, metadata: &Metadata<'_>) -> bool {
                metadata.target() == "kiomap::vmap"
            }
            fn new_span(&self, _: &Attributes<'_>) -> Id {
                Id::from_u64(1)
            }
            fn record(&self, _: &Id, _: &Record<'_>) {}
            fn record_follows_from(&self, _: &Id, _: &Id) {}
            fn event(&self, _: &Event<'_>) {
                assert_eq!(touch::read(self.0 as *mut u8), Ok(mark(2)));
            }
            fn enter(&self, _: &Id) {}
            fn exit(&self, _: &Id) {}
        }
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        let (_vmap, region) = attached(&engine, &source(4, |_, _| Ok(())));
        let faults = engine.stats().faults;
        tracing::subscriber::set_global_default(Toucher(at(&region, 2) as usize)).unwrap();
        let _other = engine.vmap(&pages(1)).unwrap();
        eventually("the subscriber's fault", || engine.stats().faults > faults && engine.stats().pages_copied > 0);
    });
}
