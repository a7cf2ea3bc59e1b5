//! Applications that close descriptors which are not their own, as daemons do, and what must not come of it.

mod support;

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::Ordering;

use kiomap::{AttachOptions, Region, Shutdown, page_size};
use support::truth::assert_count;
use support::{alone, engine_builder, eventually, fork_child, mark, pages, reap_ok, touch};

/// The address of byte 9 of a page of a region.
fn at(region: &Region, page: usize) -> *mut u8 {
    region.as_ptr().wrapping_add(page * page_size() + 9)
}

/// Closes every descriptor but the standard ones and `kept`.
fn close_everything_but(kept: &OwnedFd) {
    let kept = kept.as_raw_fd() as u32;
    for (from, to) in [(3, kept - 1), (kept + 1, u32::MAX)] {
        if from <= to {
            // SAFETY: what a daemon does; that others own some of them is what this test is about.
            unsafe { libc::syscall(libc::SYS_close_range, from, to, 0) };
        }
    }
}

/// A pair of pipes between a parent and a child: who closes its end lets the other go on.
fn pipe() -> (OwnedFd, OwnedFd) {
    nix::unistd::pipe().unwrap()
}

/// Waits until the other end is closed.
fn wait_for_end(end: &OwnedFd) {
    assert_eq!(nix::unistd::read(end, &mut [0]), Ok(0));
}

/// U15, U17: a child that closes every descriptor is served as before; when the engine then ends, its missing pages are
/// SIGBUS and not zeros, neither for it nor, through it, for others. It is counted down when it exits.
#[test]
fn a_child_that_closes_everything_is_served_counted_and_guarded() {
    alone("a_child_that_closes_everything_is_served_counted_and_guarded", || {
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        let vmap = engine.vmap(&pages(8)).unwrap();
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        for ends_first in [false, true] {
            let (at_end, end) = pipe();
            let served = region.atomic_u64(7 * page_size()).unwrap();
            served.store(0, Ordering::SeqCst);
            let first = if ends_first { 4 } else { 0 };
            let child = fork_child(|| {
                close_everything_but(&at_end);
                assert_eq!(touch::read(at(&region, first)), Ok(mark(first as u64)));
                served.store(1, Ordering::SeqCst);
                wait_for_end(&at_end);
                let later = touch::read(at(&region, first + 1));
                if ends_first {
                    assert!(later.unwrap_err().is_sigbus_at(at(&region, first + 1) as usize), "{later:?}");
                    assert_eq!(touch::read(at(&region, first)), Ok(mark(first as u64)));
                } else {
                    assert_eq!(later, Ok(mark(first as u64 + 1)));
                }
                // What it owns of the library has no descriptors any more; ending must not close those of others.
                // SAFETY: ends the child without running drops of values whose descriptors it closed itself.
                unsafe { libc::_exit(0) }
            });
            drop(at_end);
            eventually("the child has touched", || served.load(Ordering::SeqCst) == 1);
            assert_count(&engine, &vmap, 2);
            if ends_first {
                engine.shutdown(Shutdown::Poison).unwrap();
            }
            drop(end);
            reap_ok(child);
            eventually("the child is counted down", || vmap.refcount().unwrap() == 1);
        }
        // The owner is not shown a page of zeros that the child's touch made.
        assert!(touch::read(at(&region, 5)).unwrap_err().is_sigbus_at(at(&region, 5) as usize));
    });
}

/// What an application opens under the numbers of descriptors that it closed is its own: a fork leaves it alone.
#[test]
fn files_under_recycled_numbers_survive_a_fork() {
    alone("files_under_recycled_numbers_survive_a_fork", || {
        let engine = engine_builder().build().unwrap();
        let vmap = engine.vmap(&pages(4)).unwrap();
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        let child = fork_child(|| {
            let keep: OwnedFd = std::fs::File::open("/dev/null").unwrap().into();
            close_everything_but(&keep);
            let file = tempfile::tempfile().unwrap();
            let inode = file.metadata().unwrap().ino();
            // Every number that was closed, and more.
            let copies: Vec<_> = (0..64).map(|_| file.try_clone().unwrap()).collect();
            let grandchild = fork_child(|| {
                for copy in &copies {
                    assert_eq!(copy.metadata().unwrap().ino(), inode);
                }
                assert!(region.check().is_err(), "nobody can say what it would have inherited");
            });
            reap_ok(grandchild);
            assert!(copies.iter().all(|copy| copy.metadata().unwrap().ino() == inode));
            // SAFETY: as above.
            unsafe { libc::_exit(0) }
        });
        reap_ok(child);
        assert_eq!(touch::read(at(&region, 0)), Ok(mark(0)));
        drop(region);
        eventually("the child is counted down", || vmap.refcount().unwrap() == 0);
    });
}

/// A guard keeps nothing of the application's open: the other end of a pipe sees it close.
#[test]
fn the_guard_keeps_no_descriptor_of_the_application() {
    alone("the_guard_keeps_no_descriptor_of_the_application", || {
        let engine = engine_builder().build().unwrap();
        let vmap = engine.vmap(&pages(1)).unwrap();
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        let (read_end, write_end) = pipe();
        let child = fork_child(|| {
            // SAFETY: the child's copy, which it uses no more.
            assert_eq!(unsafe { libc::close(write_end.as_raw_fd()) }, 0);
            wait_for_end(&read_end);
            assert_eq!(touch::read(at(&region, 0)), Ok(mark(0)));
            // SAFETY: ends the child without dropping what it closed itself.
            unsafe { libc::_exit(0) }
        });
        drop(write_end);
        reap_ok(child);
    });
}
