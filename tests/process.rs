//! Unusual lives of processes: what starts them, how they end, and at which moment; the count is the kernel's own at
//! every step, and nobody waits for ever.

mod support;

use std::sync::atomic::{AtomicBool, Ordering};

use kiomap::{AttachOptions, page_size};
use support::scene::{Told, at, child, kill_and_reap, settled};
use support::truth::assert_count;
use support::{alone, engine_builder, mark, pages, reap_ok, touch};

/// A child that changes its address space without a pause, on several threads, while it attaches, is not waited for:
/// the engine counts and serves the others meanwhile.
#[test]
fn a_child_that_changes_without_a_pause_holds_nobody_up() {
    alone("a_child_that_changes_without_a_pause_holds_nobody_up", || {
        let engine = engine_builder().build().unwrap();
        let vmap = engine.vmap(&pages(64)).unwrap();
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        let (started, end) = (Told::new(), AtomicBool::new(false));
        let stormy = child(|| {
            std::thread::scope(|scope| {
                for thread in 0..4 {
                    let (region, end) = (&region, &end);
                    scope.spawn(move || {
                        while !end.load(Ordering::Relaxed) {
                            // SAFETY: drops pages of a shared object from this mapping; the object keeps them.
                            unsafe { libc::madvise(at(region, thread * 16).cast(), page_size(), libc::MADV_DONTNEED) };
                        }
                    });
                }
                started.tell(1);
                loop {
                    let own = vmap.attach(&AttachOptions::new()).unwrap();
                    assert_eq!(touch::read(at(&own, 3)), Ok(mark(3)));
                }
            });
        });
        started.wait_for(1);
        for round in 0..100 {
            engine.settle().unwrap();
            reap_ok(child(|| {
                assert_eq!(touch::read(at(&region, round % 64)), Ok(mark(round % 64)));
                assert!(vmap.refcount().unwrap() >= 3);
            }));
        }
        kill_and_reap(stormy);
        settled(&engine, &vmap, 1);
        assert_count(&engine, &vmap, 1);
    });
}
