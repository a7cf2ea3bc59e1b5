//! Which page of the list a touch gets, and where the list ends: right bytes inside, SIGBUS outside, nothing between.

mod support;

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use kiomap::{AttachOptions, Error, Kiobuf, page_size};
use nix::errno::Errno;
use support::{
    alone, assert_sigbus, engine_builder, holes, in_page, mark, pages, read_page, settled_stats, source, touch,
};

fn whole(nr_pages: u64) -> AttachOptions {
    AttachOptions::new().len_bytes(nr_pages as usize * page_size())
}

/// T1: the last byte of the last page is the list's, and costs one read of the source.
#[test]
fn the_last_byte_of_the_last_page_is_read_once() {
    alone("the_last_byte_of_the_last_page_is_read_once", || {
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        for nr_pages in [1, 2, 17, 100] {
            let calls = Arc::new(AtomicU64::new(0));
            let counted = Arc::clone(&calls);
            let list = source(nr_pages, move |first, len| {
                assert_eq!((first, len), (nr_pages - 1, 1));
                counted.fetch_add(1, Ordering::Relaxed);
                Ok(())
            });
            let region = engine.vmap(&list).unwrap().attach(&AttachOptions::new()).unwrap();
            let last = region.as_ptr().wrapping_add(region.len_bytes() - 1);
            for _ in 0..3 {
                assert_eq!(touch::read(last), Ok(mark(nr_pages - 1)));
            }
            assert_eq!(calls.load(Ordering::Relaxed), 1);
        }
    });
}

/// T2, T4, B1, B3: page n−1 is data; pages n and n+1 are SIGBUS, at the very byte, whether or not the list ends there
/// with its first extent.
#[test]
fn the_page_after_the_last_is_sigbus() {
    alone("the_page_after_the_last_is_sigbus", || {
        let engine = engine_builder().build().unwrap();
        for nr_pages in [1, 2, 17, 18, 100] {
            for list in [pages(nr_pages), source(nr_pages, |_, _| Ok(()))] {
                let region = engine.vmap(&list).unwrap().attach(&whole(nr_pages + 2)).unwrap();
                for page in [nr_pages + 1, nr_pages] {
                    assert_sigbus(&region, page);
                    for edge in [0, page_size() - 1] {
                        let at = region.as_ptr().wrapping_add(page as usize * page_size() + edge);
                        assert!(touch::read(at).unwrap_err().is_sigbus_at(at as usize));
                    }
                }
                assert_eq!(read_page(&region, nr_pages - 1), Ok(mark(nr_pages - 1)));
            }
        }
    });
}

/// T3: far past the end, also when the region begins there.
#[test]
fn far_past_the_end_is_sigbus() {
    alone("far_past_the_end_is_sigbus", || {
        const FAR: u64 = 1_000_000;
        let engine = engine_builder().build().unwrap();
        let vmap = engine.vmap(&pages(3)).unwrap();
        let long = vmap.attach(&whole(3 + FAR + 1)).unwrap();
        assert_sigbus(&long, 3 + FAR);
        let farther = vmap.attach(&whole(1).pgoff(3 + FAR)).unwrap();
        assert_sigbus(&farther, 0);
        let farthest = vmap.attach(&whole(1).pgoff(i64::MAX as u64 / page_size() as u64 - 1)).unwrap();
        assert_sigbus(&farthest, 0);
        assert_eq!(read_page(&long, 2), Ok(mark(2)));
    });
}

/// T4, B3: a region ten times the list attaches; the list's pages are data, all others SIGBUS.
#[test]
fn a_region_longer_than_the_list_attaches() {
    alone("a_region_longer_than_the_list_attaches", || {
        let engine = engine_builder().build().unwrap();
        let region = engine.vmap(&pages(7)).unwrap().attach(&whole(70)).unwrap();
        for page in 0..70 {
            if page < 7 {
                assert_eq!(read_page(&region, page), Ok(mark(page)));
            } else {
                assert_sigbus(&region, page);
            }
        }
    });
}

/// T5, B4: every second page is a hole. Holes are SIGBUS, their neighbours intact, and each hole is counted once.
#[test]
fn holes_are_sigbus_and_their_neighbours_intact() {
    alone("holes_are_sigbus_and_their_neighbours_intact", || {
        const PAIRS: u64 = 64;
        for from_source in [false, true] {
            let engine = engine_builder().build().unwrap();
            let parts: Vec<Kiobuf> = (0..PAIRS)
                .flat_map(|n| {
                    let page = vec![mark(2 * n); page_size()];
                    let mut list = Kiobuf::new();
                    if from_source {
                        list = source(1, |_, _| Ok(()));
                    } else {
                        list.map_bytes(page).unwrap();
                    }
                    [list, holes(1)]
                })
                .collect();
            let vmap = engine.vmap(&Kiobuf::concat(&parts).unwrap()).unwrap();
            let region = vmap.attach(&AttachOptions::new()).unwrap();
            for round in 0..2 {
                for n in (0..PAIRS).rev() {
                    assert_sigbus(&region, 2 * n + 1);
                    // A source's page 0 is marked as such.
                    let expected = if from_source { mark(0) } else { mark(2 * n) };
                    assert_eq!(read_page(&region, 2 * n), Ok(expected), "round {round}");
                }
            }
            assert_eq!(settled_stats(&engine).pages_poisoned, PAIRS);
            assert_eq!(settled_stats(&engine).pages_copied, PAIRS);
        }
    });
}

/// T6, B5: a region that begins at page k shows page k+i; one that begins at the end is all SIGBUS.
#[test]
fn pgoff_shifts_the_list() {
    alone("pgoff_shifts_the_list", || {
        const PAGES: u64 = 40;
        let engine = engine_builder().build().unwrap();
        for list in [pages(PAGES), source(PAGES, |_, _| Ok(()))] {
            for pgoff in [0, 1, 15, 16, 17, 39] {
                let vmap = engine.vmap(&list).unwrap();
                let region = vmap.attach(&AttachOptions::new().pgoff(pgoff)).unwrap();
                assert_eq!((region.pgoff(), region.len_bytes() as u64), (pgoff, (PAGES - pgoff) * page_size() as u64));
                for page in (0..PAGES - pgoff).rev() {
                    assert_eq!(read_page(&region, page), Ok(mark(pgoff + page)));
                }
            }
            let region = engine.vmap(&list).unwrap().attach(&whole(3).pgoff(PAGES)).unwrap();
            (0..3).for_each(|page| assert_sigbus(&region, page));
        }
    });
}

/// T6, H19: offsets that wrap around are refused, whichever sum it is that wraps.
#[test]
fn a_pgoff_that_wraps_is_refused() {
    alone("a_pgoff_that_wraps_is_refused", || {
        let engine = engine_builder().build().unwrap();
        let vmap = engine.vmap(&pages(2)).unwrap();
        let limit = i64::MAX as u64 / page_size() as u64;
        for pgoff in [limit, limit + 1, u64::MAX / page_size() as u64, u64::MAX - 1, u64::MAX] {
            for options in [whole(2).pgoff(pgoff), whole(2).pgoff(pgoff).exact()] {
                let refused = vmap.attach(&options).unwrap_err();
                assert!(matches!(refused, Error::Invalid { what: "pgoff", .. }), "{refused}");
                assert_eq!(refused.errno(), Errno::EINVAL);
            }
        }
        assert_eq!(vmap.refcount().unwrap(), 0);
    });
}

/// T7: a write past the end is SIGBUS and changes neither the size nor the contents; so is one to a hole.
#[test]
fn a_write_past_the_end_changes_nothing() {
    alone("a_write_past_the_end_changes_nothing", || {
        let engine = engine_builder().build().unwrap();
        let vmap = engine.vmap(&Kiobuf::concat(&[pages(3), holes(1)]).unwrap()).unwrap();
        let region = vmap.attach(&whole(6)).unwrap();
        for page in [5, 4, 3] {
            for at in [in_page(&region, page), region.as_ptr().wrapping_add(page as usize * page_size())] {
                assert!(touch::write(at, 0x77).unwrap_err().is_sigbus_at(at as usize));
            }
        }
        assert_eq!(vmap.nr_pages(), 4);
        let mut bytes = vec![0; 3 * page_size()];
        vmap.read_at(0, &mut bytes).unwrap();
        for (page, bytes) in (0..).zip(bytes.chunks(page_size())) {
            assert!(bytes.iter().all(|&byte| byte == mark(page)));
        }
        assert!(vmap.read_at(0, &mut vec![0; 4 * page_size()]).is_err());
        assert!(vmap.read_at(3 * page_size() as u64, &mut [0; 1]).is_err());
    });
}

/// Calls write(2) from, and read(2) into, the page.
fn system_calls_on(at: *mut u8) -> [Result<usize, Errno>; 2] {
    let (out, into) = nix::unistd::pipe().unwrap();
    nix::unistd::write(&into, &[9; 4]).unwrap();
    let (into, out) = (into.as_raw_fd(), out.as_raw_fd());
    // SAFETY: the kernel checks both ranges itself and answers EFAULT; no Rust value lies there.
    unsafe {
        [
            Errno::result(libc::write(into, at.cast(), 4)).map(|n| n as usize),
            Errno::result(libc::read(out, at.cast(), 4)).map(|n| n as usize),
        ]
    }
}

/// T8, B6: a system call on a page that can't be had answers EFAULT; the process lives.
#[test]
fn a_system_call_on_a_sigbus_page_is_efault() {
    alone("a_system_call_on_a_sigbus_page_is_efault", || {
        let engine = engine_builder().build().unwrap();
        let list = Kiobuf::concat(&[pages(1), holes(1), source(1, |_, _| Err(std::io::Error::other("no")))]).unwrap();
        let region = engine.vmap(&list).unwrap().attach(&whole(5)).unwrap();
        for page in 1..5 {
            // Once before and once after the page is known to be none.
            for _ in 0..2 {
                assert_eq!(system_calls_on(in_page(&region, page)), [Err(Errno::EFAULT); 2], "page {page}");
            }
            assert_sigbus(&region, page);
            assert_eq!(system_calls_on(in_page(&region, page)), [Err(Errno::EFAULT); 2], "page {page}");
        }
        assert_eq!(read_page(&region, 0), Ok(mark(0)));
    });
}

/// T8: where kernel faults are served, a system call on a missing page of the list gets its bytes.
#[test]
fn a_system_call_on_a_missing_page_gets_its_bytes() {
    alone("a_system_call_on_a_missing_page_gets_its_bytes", || {
        let engine = engine_builder().build().unwrap();
        let region = engine.vmap(&pages(40)).unwrap().attach(&AttachOptions::new()).unwrap();
        if !engine.open_way().serves_kernel_faults() {
            assert_eq!(system_calls_on(in_page(&region, 0)), [Err(Errno::EFAULT); 2]);
            assert_eq!(read_page(&region, 0), Ok(mark(0)));
            skip!("faults of the kernel are not served by {}", engine.open_way());
        }
        for page in [39, 16, 0] {
            assert_eq!(system_calls_on(in_page(&region, page)), [Ok(4); 2]);
            // What the pipe held before comes out first.
            assert_eq!(read_page(&region, page), Ok(9));
        }
    });
}

/// T9: SIGBUS is sticky: each touch is one signal, and only the first is a fault that the engine sees. Other threads
/// go on meanwhile.
#[test]
fn sigbus_is_sticky_and_one_signal_a_touch() {
    alone("sigbus_is_sticky_and_one_signal_a_touch", || {
        let engine = engine_builder().build().unwrap();
        let list = Kiobuf::concat(&[holes(1), pages(200)]).unwrap();
        let region = engine.vmap(&list).unwrap().attach(&AttachOptions::new()).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| (1..201).for_each(|page| assert_eq!(read_page(&region, page), Ok(mark(page - 1)))));
            for _ in 0..500 {
                assert_sigbus(&region, 0);
            }
        });
        let stats = settled_stats(&engine);
        assert_eq!(stats.pages_poisoned, 1);
        assert!(stats.faults <= 201, "{stats:?}");
    });
}

/// T10, B2: a list without pages, whether never filled or unmapped again, is SIGBUS from page 0 on.
#[test]
fn an_empty_list_is_sigbus_everywhere() {
    alone("an_empty_list_is_sigbus_everywhere", || {
        let engine = engine_builder().build().unwrap();
        let mut unmapped = pages(3);
        unmapped.unmap();
        for list in [Kiobuf::new(), unmapped] {
            let vmap = engine.vmap(&list).unwrap();
            assert_eq!(vmap.nr_pages(), 0);
            assert_eq!(vmap.attach(&AttachOptions::new()).unwrap_err().errno(), Errno::EINVAL);
            let region = vmap.attach(&whole(2)).unwrap();
            for _ in 0..2 {
                (0..2).for_each(|page| assert_sigbus(&region, page));
            }
            vmap.read_at(0, &mut []).unwrap();
            assert_eq!(vmap.read_at(0, &mut [0]).unwrap_err().errno(), Errno::EINVAL);
        }
    });
}

/// T10: a handle that is unmapped after its list was published takes nothing back: the vmap has its own snapshot.
#[test]
fn unmapping_a_handle_leaves_what_was_published() {
    alone("unmapping_a_handle_leaves_what_was_published", || {
        let engine = engine_builder().build().unwrap();
        let mut list = pages(2);
        let region = engine.vmap(&list).unwrap().attach(&AttachOptions::new()).unwrap();
        list.unmap();
        assert_eq!(read_page(&region, 1), Ok(mark(1)));
    });
}
