//! Where a process is unusual in a way that the kernel's own files show: its first thread has ended, or it is the last of
//! many generations; and what is unmapped in the very moment in which it is refused.

mod support;

use std::sync::Arc;

use kiomap::{AttachOptions, Features, Kiobuf, PageSource, Shutdown, page_size};
use support::{alone, engine_builder, fork_child, mark, open_descriptors, pages, raw, reap_ok, touch};

/// Where the kernel puts nothing by itself.
const FAR: usize = 0x1000_0000_0000;

/// Runs `body` on a second thread of this process, of which the first ends meanwhile; then ends the process.
fn without_first_thread(body: impl FnOnce() + Send + 'static) -> ! {
    std::thread::spawn(|| {
        let first = format!("/proc/self/task/{}/stat", std::process::id());
        support::eventually("the first thread has ended", || {
            std::fs::read_to_string(&first).is_ok_and(|stat| stat.contains(") Z "))
        });
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body));
        // SAFETY: ends the process without the exit handlers of its parent.
        unsafe { libc::_exit(if outcome.is_ok() { 0 } else { 101 }) }
    });
    // SAFETY: ends this thread alone; what it has on its stack stays.
    unsafe { libc::syscall(libc::SYS_exit, 0) };
    unreachable!("the thread has ended")
}

/// T41: a child whose first thread has ended has no `/proc/PID/maps` to look into, but other threads have one.
#[test]
fn what_grew_in_a_child_without_its_first_thread_is_found() {
    alone("what_grew_in_a_child_without_its_first_thread_is_found", || {
        let engine = engine_builder().build().unwrap();
        let vmap = engine.vmap(&pages(8)).unwrap();
        let region = vmap.attach(&AttachOptions::new().len_bytes(page_size()).at(FAR)).unwrap();
        reap_ok(fork_child(|| {
            without_first_thread(|| {
                assert_eq!(raw::mremap(FAR, 1, 4, 0, 0), FAR);
                for page in 0..4_u64 {
                    let at = (FAR + page as usize * page_size()) as *const u8;
                    assert_eq!(touch::read(at), Ok(mark(page)));
                }
            })
        }));
        drop(region);
    });
}

/// A snapshot is to be had in a process whose first thread has ended.
#[test]
fn a_snapshot_needs_no_first_thread() {
    alone("a_snapshot_needs_no_first_thread", || {
        reap_ok(fork_child(|| {
            without_first_thread(|| {
                let engine = engine_builder().build().unwrap();
                let vmap = engine.vmap(&pages(2)).unwrap();
                let _region = vmap.attach(&AttachOptions::new()).unwrap();
                assert_eq!(engine.snapshot().unwrap().spaces[0].areas.len(), 1);
            })
        }));
    });
}

/// T111: each of many generations has as many descriptors as the one before.
#[test]
fn descriptors_do_not_gather_over_generations() {
    const GENERATIONS: usize = 6;
    fn generation(left: usize, first: Option<usize>) {
        let here = open_descriptors();
        let first = first.unwrap_or(here);
        assert_eq!(here, first, "{} generations later", GENERATIONS - left);
        if left > 0 {
            reap_ok(fork_child(|| generation(left - 1, Some(first))));
        }
    }
    alone("descriptors_do_not_gather_over_generations", || {
        let engine = engine_builder().build().unwrap();
        let vmap = engine.vmap(&pages(2)).unwrap();
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        reap_ok(fork_child(|| generation(GENERATIONS, None)));
        drop(region);
    });
}

/// T36, T92: a page of a child that is unmapped in the very moment in which its guard masks it is nobody's afterwards: foreign
/// memory that takes its place is left alone when the region is dropped, and the drop ends.
#[test]
fn an_unmap_that_meets_the_mask_of_its_page_is_known() {
    const ROUNDS: usize = 3000;
    alone("an_unmap_that_meets_the_mask_of_its_page_is_known", || {
        let engine = engine_builder().without(support::taken_away() | Features::POISON).build().unwrap();
        let vmap = engine.vmap(&support::holes(1)).unwrap();
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        reap_ok(fork_child(|| {
            for round in 0..ROUNDS {
                let region = vmap.attach(&AttachOptions::new().at(FAR)).unwrap();
                let toucher = std::thread::spawn(|| {
                    let _ = touch::read(FAR as *const u8);
                });
                let since = std::time::Instant::now();
                while since.elapsed() < std::time::Duration::from_nanos((round as u64 * 37 % 300) * 1000) {
                    std::hint::spin_loop();
                }
                raw::munmap(FAR as *mut u8, 1);
                raw::foreign(FAR, 1, 0x5a);
                drop(region);
                let there = touch::read(FAR as *const u8);
                assert_eq!(there, Ok(0x5a), "round {round}");
                toucher.join().unwrap();
                raw::munmap(FAR as *mut u8, 1);
            }
        }));
        drop(region);
    });
}

/// A source whose end panics.
struct Bad;

impl PageSource for Bad {
    fn read_at(&self, _: u64, buf: &mut [u8]) -> std::io::Result<()> {
        buf.fill(1);
        Ok(())
    }
}

impl Drop for Bad {
    fn drop(&mut self) {
        panic!("asked to");
    }
}

/// T27, T50: what a page list keeps alive may panic when it ends, on whichever thread of the engine that is: the others of
/// the same process end too, all are counted, and the engine shuts down.
#[test]
fn sources_that_panic_at_their_end_do_not_stop_the_counting() {
    const VMAPS: u64 = 20;
    alone("sources_that_panic_at_their_end_do_not_stop_the_counting", || {
        needs_sources!();
        std::panic::set_hook(Box::new(|_| {}));
        let engine = engine_builder().build().unwrap();
        let good = engine.vmap(&pages(1)).unwrap();
        let region = good.attach(&AttachOptions::new()).unwrap();
        let mut attached = Vec::new();
        for _ in 0..VMAPS {
            let mut list = Kiobuf::new();
            list.map_source(Arc::new(Bad), page_size() as u64).unwrap();
            let vmap = engine.vmap(&list).unwrap();
            attached.push(vmap.attach(&AttachOptions::new()).unwrap());
        }
        let children = [0, 1].map(|_| support::scene::child(nix::unistd::pause));
        for region in attached {
            let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| drop(region)));
        }
        assert_eq!(good.refcount().unwrap(), 3);
        engine.shutdown(Shutdown::Poison).unwrap();
        assert_eq!(good.refcount().unwrap(), 1);
        children.into_iter().for_each(support::scene::kill_and_reap);
        assert_eq!(engine.stats().panics, VMAPS);
        drop(region);
    });
}
