//! Memory that grows by `mremap` while it is locked: the kernel brings its pages before it reports anything.

mod support;

use kiomap::{Engine, Kiobuf, OpenWay, page_size};
use nix::errno::Errno;
use support::raw::{mlock, populated};
use support::scene::{at, sourced_pages};
use support::truth::{assert_count, assert_nobody_waits};
use support::{alone, engine_builder, holes, long, mark, pages, touch};

/// An engine that brings one page for one fault.
fn engine() -> Engine {
    engine_builder().fault_around_pages(1).build().unwrap()
}

/// The same, where the kernel's own faults are not served.
fn user_mode_only() -> Engine {
    engine_builder().fault_around_pages(1).open_ways(&[OpenWay::UserModeOnly]).build().unwrap()
}

/// T39, T41, T78: where a region grows that the application has locked, the kernel populates it before it tells of the move,
/// and while it installs nothing through the userfaultfd that reports the move: the pages come another way.
#[test]
fn a_region_that_grows_while_it_is_locked_is_served() {
    alone("a_region_that_grows_while_it_is_locked_is_served", || {
        for (list, engine) in [(pages(12), engine()), (sourced_pages(12), engine()), (pages(12), user_mode_only())] {
            let vmap = engine.vmap(&list).unwrap();
            let region = vmap.attach(&long(4)).unwrap();
            let locked = mlock(at(&region, 0), 4).is_ok();
            assert_eq!(locked, engine.open_way().serves_kernel_faults());
            let place = populated(0, 14);
            let (from, to) = (at(&region, 0).cast(), place as *mut libc::c_void);
            let (old, new) = (4 * page_size(), 14 * page_size());
            // SAFETY: moves the region to where this test has mapped pages of its own.
            let moved = unsafe { libc::mremap(from, old, new, libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED, to) };
            assert_eq!(moved, to, "{}", Errno::last());
            for page in 0..14 {
                let touched = touch::read(moved.cast::<u8>().wrapping_add(page * page_size()));
                if page < 12 {
                    assert_eq!(touched, Ok(mark(page as u64)), "page {page}");
                } else {
                    assert!(touched.is_err_and(|refused| refused.signal == libc::SIGBUS), "page {page}: {touched:?}");
                }
            }
            assert_nobody_waits(&engine);
            // What it grew by was there before it came itself: a piece of its own.
            assert_count(&engine, &vmap, if locked { 2 } else { 1 });
            drop(region);
            assert_count(&engine, &vmap, 0);
        }
    });
}

/// As above, over a page that can't be had: as long as the kernel brings the pages of what grew, it reports nothing, and
/// refuses to poison; the page is refused all the same, and nobody hangs.
#[test]
fn a_region_that_grows_over_a_hole_while_it_is_locked_does_not_hang() {
    alone("a_region_that_grows_over_a_hole_while_it_is_locked_does_not_hang", || {
        let engine = engine();
        let list = Kiobuf::concat(&[pages(6), holes(2), pages(4)]).unwrap();
        let vmap = engine.vmap(&list).unwrap();
        let region = vmap.attach(&long(4)).unwrap();
        if mlock(at(&region, 0), 4).is_err() {
            skip!("mlock brings no pages where {} serves no faults of the kernel", engine.open_way());
        }
        let place = populated(0, 14);
        let (from, to) = (at(&region, 0).cast(), place as *mut libc::c_void);
        let (old, new) = (4 * page_size(), 14 * page_size());
        // SAFETY: moves the region to where this test has mapped pages of its own.
        let moved = unsafe { libc::mremap(from, old, new, libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED, to) };
        assert_eq!(moved, to, "{}", Errno::last());
        for page in 0..14 {
            let touched = touch::read(moved.cast::<u8>().wrapping_add(page * page_size()));
            if [6, 7, 12, 13].contains(&page) {
                assert!(touched.is_err_and(|refused| refused.signal == libc::SIGBUS), "page {page}: {touched:?}");
            } else {
                let marked = if page < 6 { page } else { page - 8 };
                assert_eq!(touched, Ok(mark(marked as u64)), "page {page}");
            }
        }
        assert_nobody_waits(&engine);
        drop(region);
        engine.settle().unwrap();
        assert_eq!(vmap.refcount().unwrap(), 0);
    });
}
