//! Vmaps of huge pages: a touch brings a whole one, with the bytes of the list, zeros behind its end, or SIGBUS; what is
//! not whole huge pages is refused, and so is what the pool can't give.

mod support;

use std::fs::File;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use kiomap::{
    AttachOptions, Engine, Error, Features, Kiobuf, PageSize, Region, Residency, Revoke, Shutdown, Vmap, page_size,
};
use nix::errno::Errno;
use support::pool::{HUGE, free_pages, per_huge, pool, with_pool};
use support::raw::{ELSEWHERE, FAR, foreign};
use support::scene::{Told, at, child};
use support::truth::{assert_count, assert_nobody_waits, assert_truth};
use support::{
    alone, assert_sigbus, engine_builder, fill_marks, holes, mark, pages, read_page, reap_ok, settled_stats, source,
    taken_away, touch, without_poison,
};

fn publish(engine: &Engine, list: &Kiobuf) -> Vmap {
    engine.vmap_builder(list).page_size(PageSize::Huge2M).build().unwrap()
}

fn attached(engine: &Engine, list: &Kiobuf) -> (Vmap, Region) {
    let vmap = publish(engine, list);
    let region = vmap.attach(&AttachOptions::new()).unwrap();
    (vmap, region)
}

fn engine() -> Engine {
    engine_builder().build().unwrap()
}

/// Fails unless pages of a region are marked as those of the list.
#[track_caller]
fn assert_marked(region: &Region, pages: std::ops::Range<u64>) {
    for page in pages {
        assert_eq!(read_page(region, page), Ok(mark(page)), "page {page}");
    }
}

fn errno(result: i32) -> Result<(), Errno> {
    Errno::result(result).map(drop)
}

fn map(build: impl FnOnce(&mut Kiobuf)) -> Kiobuf {
    let mut list = Kiobuf::new();
    build(&mut list);
    list
}

/// A file of [`mark`]ed pages.
fn file(nr_pages: u64) -> File {
    let mut bytes = vec![0; nr_pages as usize * page_size()];
    fill_marks(0, &mut bytes);
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&bytes).unwrap();
    file
}

/// One fault for each huge page, wherever it is touched; the list's bytes, then zeros, then SIGBUS.
#[test]
fn one_touch_brings_a_whole_huge_page() {
    with_pool("one_touch_brings_a_whole_huge_page", || {
        let engine = engine();
        let nr_pages = 3 * per_huge() + 5;
        let vmap = publish(&engine, &pages(nr_pages));
        let region = vmap.attach(&AttachOptions::new().len_bytes(6 * HUGE)).unwrap();
        assert_eq!((vmap.nr_pages(), vmap.page_size()), (nr_pages, PageSize::Huge2M));
        assert_eq!(region.as_ptr() as usize % HUGE, 0);
        for huge in [2, 0, 3, 1] {
            // Its last byte, or one in the middle.
            let page = if huge == 3 { 4 } else { per_huge() / (huge + 1) - 1 };
            assert_marked(&region, huge * per_huge() + page..huge * per_huge() + page + 1);
        }
        assert_marked(&region, 0..nr_pages);
        for page in nr_pages..4 * per_huge() {
            assert_eq!(read_page(&region, page), Ok(0), "page {page}");
        }
        for page in [4 * per_huge(), 5 * per_huge() - 1, 6 * per_huge() - 1] {
            assert_sigbus(&region, page);
        }
        let stats = settled_stats(&engine);
        assert_eq!((stats.faults, stats.pages_copied), (4, 4 * per_huge()));
        let snapshot = engine.snapshot().unwrap();
        let shown = &snapshot.vmaps[0];
        assert_eq!((shown.page_size, shown.nr_pages), (PageSize::Huge2M, nr_pages));
        assert_eq!(shown.resident_bytes, 4 * HUGE as u64);
        assert!(snapshot.to_string().contains("in 2048 KiB"), "{snapshot}");
        assert_count(&engine, &vmap, 1);
        drop(region);
        assert_count(&engine, &vmap, 0);
    });
}

/// A write comes where it was meant to go, all around it is the list, and other regions show it.
#[test]
fn a_write_touches_a_huge_page_as_a_read_does() {
    with_pool("a_write_touches_a_huge_page_as_a_read_does", || {
        let engine = engine();
        let (vmap, region) = attached(&engine, &pages(2 * per_huge()));
        let second = vmap.attach(&AttachOptions::new().pgoff(per_huge())).unwrap();
        assert_eq!(second.len_bytes(), HUGE);
        let page = per_huge() + 7;
        touch::write(at(&region, page), 0xee).unwrap();
        assert_eq!(touch::read(at(&second, 7)), Ok(0xee));
        assert_eq!(read_page(&second, 7), Ok(mark(page)));
        assert_eq!(read_page(&second, 8), Ok(mark(page + 1)));
        assert_eq!(settled_stats(&engine).faults, 1);
        // Advice that drops mappings loses no byte, and needs no message.
        for len in [page_size(), HUGE] {
            // SAFETY: no reference to the bytes is held.
            unsafe { libc::madvise(second.as_ptr().cast(), len, libc::MADV_DONTNEED) };
            assert_eq!(touch::read(at(&second, 7)), Ok(0xee));
        }
        assert_eq!(settled_stats(&engine).faults, 1);
    });
}

/// Memory that begins anywhere, zeros, files and sources, within one huge page: all of it is right, and composed by a worker
/// only where that may wait.
#[test]
fn a_huge_page_is_composed_of_what_the_list_has() {
    with_pool("a_huge_page_is_composed_of_what_the_list_has", || {
        let engine = engine();
        let page = page_size();
        let mut bytes = vec![0xaa; 100 * page];
        fill_marks(0, &mut bytes);
        let unaligned = map(|list| {
            let memory: Arc<[u8]> = vec![0x77; 10 * page].into();
            list.map_slice(memory.to_vec().leak()).unwrap();
        });
        let head = map(|list| list.map_bytes(bytes[..90 * page + 5].to_vec()).unwrap());
        let zeros = map(|list| list.map_zero(40).unwrap());
        let from_file = map(|list| list.map_file(&file(700), 0..700 * page as u64).unwrap());
        let parts = [head, zeros, from_file, unaligned, pages(3)];
        let list = Kiobuf::concat(&parts).unwrap();
        let mut expected = Vec::new();
        for part in &parts {
            let ordinary = engine.vmap(part).unwrap();
            let mut bytes = vec![0; part.nr_pages() as usize * page];
            ordinary.read_at(0, &mut bytes).unwrap();
            expected.extend(bytes);
        }
        expected.resize(expected.len().next_multiple_of(HUGE), 0);
        let (_vmap, region) = attached(&engine, &list);
        let mut found = vec![0xff; expected.len()];
        region.read_at(0, &mut found).unwrap();
        assert!(found == expected);
        assert_nobody_waits(&engine);
    });
}

/// A list that is all zeros is zeros, with one fault for each huge page.
#[test]
fn huge_pages_of_zeros_are_zeros() {
    with_pool("huge_pages_of_zeros_are_zeros", || {
        let engine = engine();
        let list = map(|list| list.map_zero(per_huge() + 1).unwrap());
        let (_vmap, region) = attached(&engine, &list);
        let mut found = vec![0xff; 2 * HUGE];
        region.read_at(0, &mut found).unwrap();
        assert!(found.iter().all(|&byte| byte == 0));
        let stats = settled_stats(&engine);
        assert_eq!((stats.faults, stats.pages_zeroed), (2, 2 * per_huge()));
        touch::write(at(&region, 3), 5).unwrap();
        assert_eq!(touch::read(at(&region, 3)), Ok(5));
    });
}

/// A source is asked for a whole huge page, by a worker; one that fails makes all of the huge page a SIGBUS and no other, until
/// it is asked again and has it.
#[test]
fn a_source_that_fails_refuses_the_whole_huge_page() {
    needs_sources!();
    with_pool("a_source_that_fails_refuses_the_whole_huge_page", || {
        let engine = engine();
        let (calls, failing) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(true)));
        let (counted, fails) = (Arc::clone(&calls), Arc::clone(&failing));
        let bad = per_huge() + 100;
        let list = source(3 * per_huge(), move |first, nr_pages| {
            counted.fetch_add(1, Ordering::Relaxed);
            let fails = fails.load(Ordering::Relaxed);
            if fails && (first..first + nr_pages as u64).contains(&bad) {
                Err(std::io::Error::other("no"))
            } else {
                Ok(())
            }
        });
        let (vmap, region) = attached(&engine, &list);
        assert_marked(&region, 2 * per_huge()..3 * per_huge());
        for page in [per_huge(), bad, 2 * per_huge() - 1] {
            assert_sigbus(&region, page);
        }
        assert_marked(&region, 0..per_huge());
        // The bad one is tried three times.
        assert_eq!(calls.load(Ordering::Relaxed), 5);
        let stats = settled_stats(&engine);
        assert_eq!((stats.worker_reads, stats.source_errors), (5, 1));
        let refused = vmap.read_at(bad * page_size() as u64, &mut [0]).unwrap_err();
        assert!(matches!(&refused, Error::NoPage { pgoff, .. } if *pgoff == bad), "{refused}");
        assert_nobody_waits(&engine);
        if engine.features().contains(Features::POISON) {
            assert!(matches!(vmap.retry(bad..bad + 1), Err(Error::NoPage { .. })));
            assert_sigbus(&region, bad);
            failing.store(false, Ordering::Relaxed);
            vmap.retry(bad..bad + 1).unwrap();
            assert_marked(&region, 0..3 * per_huge());
        }
    });
}

/// Several threads on one huge page that a worker composes, in two processes: one read, right bytes for all.
#[test]
fn one_read_serves_all_who_wait_for_a_huge_page() {
    needs_sources!();
    with_pool("one_read_serves_all_who_wait_for_a_huge_page", || {
        let engine = engine();
        let gated = support::scene::GatedSource::new();
        let (vmap, region) = attached(&engine, &gated.list(2 * per_huge()));
        let pid = child(|| assert_marked(&region, 5..6));
        std::thread::scope(|scope| {
            for thread in 0..6 {
                let region = &region;
                scope.spawn(move || assert_marked(region, thread * 50..thread * 50 + 1));
            }
            gated.wait_for_held(1);
            gated.open();
        });
        reap_ok(pid);
        assert_marked(&region, 0..2 * per_huge());
        assert_eq!(gated.calls(), 2);
        assert_count(&engine, &vmap, 1);
    });
}

/// A hole of whole huge pages is SIGBUS in every process; one that is a part of a huge page is refused, with its page.
#[test]
fn holes_are_whole_huge_pages_or_refused() {
    with_pool("holes_are_whole_huge_pages_or_refused", || {
        let engine = engine();
        let n = per_huge();
        let list = Kiobuf::concat(&[pages(n), holes(2 * n), pages(7)]).unwrap();
        let (_vmap, region) = attached(&engine, &list);
        let pid = child(|| {
            [n, 3 * n - 1].into_iter().for_each(|page| assert_sigbus(&region, page));
            assert_marked(&region, n - 1..n);
        });
        reap_ok(pid);
        for page in [n, n + 1, 3 * n - 1, n] {
            assert_sigbus(&region, page);
        }
        assert_marked(&region, 0..n);
        assert_eq!(read_page(&region, 3 * n + 6), Ok(mark(6)));
        // Two in each process.
        assert_eq!(settled_stats(&engine).pages_poisoned, 4);
        for (bad, page) in [([pages(1), holes(1)], 1), ([holes(n), holes(1)], 0), ([holes(n + 1), pages(1)], n + 1)] {
            let list = Kiobuf::concat(&bad).unwrap();
            match engine.vmap_builder(&list).page_size(PageSize::Huge2M).build() {
                // Only holes.
                Ok(vmap) => assert_eq!((page, vmap.nr_pages()), (0, n + 1)),
                Err(error) => {
                    assert!(matches!(error, Error::Misaligned { value, .. } if value == page), "{error}");
                    assert_eq!(error.errno(), Errno::EINVAL);
                    assert!(error.to_string().contains(&n.to_string()), "{error}");
                }
            }
        }
    });
}

/// Lengths, offsets and addresses that are not whole huge pages are refused, and nothing is left of the attempt.
#[test]
fn attaching_parts_of_huge_pages_is_refused() {
    with_pool("attaching_parts_of_huge_pages_is_refused", || {
        let engine = engine();
        let vmap = publish(&engine, &pages(3 * per_huge()));
        let options = AttachOptions::new();
        for bad in [
            options.len_bytes(HUGE + page_size()),
            options.len_bytes(1),
            options.pgoff(1),
            options.pgoff(per_huge() + 8).len_bytes(HUGE),
            options.at(FAR + page_size()),
        ] {
            let error = vmap.attach(&bad).unwrap_err();
            assert!(matches!(error, Error::Misaligned { .. }), "{error}");
        }
        assert_count(&engine, &vmap, 0);
        let region = vmap.attach(&options.at(FAR).pgoff(per_huge()).len_bytes(HUGE).exact()).unwrap();
        assert_eq!(read_page(&region, 3), Ok(mark(per_huge() + 3)));
        let past = vmap.attach(&options.len_bytes(4 * HUGE).exact()).unwrap_err();
        assert_eq!(past.errno(), Errno::ENXIO);
        // The end of the list, rounded up, is no part outside of it.
        publish(&engine, &pages(5)).attach(&options.exact()).unwrap();
        assert_truth(&engine);
    });
}

/// Forked processes share huge pages, to the third generation, and are counted.
#[test]
fn forked_processes_share_huge_pages() {
    with_pool("forked_processes_share_huge_pages", || {
        let engine = engine();
        let (vmap, region) = attached(&engine, &pages(4 * per_huge()));
        touch::write(at(&region, 1), 0x11).unwrap();
        let reserved = pool("resv_hugepages");
        let told = Told::new();
        let pid = child(|| {
            assert_eq!(touch::read(at(&region, 1)), Ok(0x11));
            assert_marked(&region, per_huge()..per_huge() + 3);
            touch::write(at(&region, per_huge()), 0x22).unwrap();
            let grandchild = child(|| {
                assert_eq!(touch::read(at(&region, per_huge())), Ok(0x22));
                touch::write(at(&region, 2 * per_huge()), 0x33).unwrap();
                let mine = vmap.attach(&AttachOptions::new().pgoff(3 * per_huge())).unwrap();
                assert_eq!(read_page(&mine, 9), Ok(mark(3 * per_huge() + 9)));
                assert_eq!(vmap.refcount().unwrap(), 4);
                drop(mine);
            });
            reap_ok(grandchild);
            told.tell(1);
        });
        told.wait_for(1);
        reap_ok(pid);
        assert_eq!(touch::read(at(&region, 2 * per_huge())), Ok(0x33));
        assert_eq!(settled_stats(&engine).faults, 4);
        // No mapping but the vmap's own reserves any.
        assert_eq!(pool("resv_hugepages"), reserved - 3);
        support::scene::settled(&engine, &vmap, 1);
    });
}

/// A child gets what is left of a region of which its parent has unmapped a huge page, and mapped a part of it over.
#[test]
fn a_child_of_a_region_mapped_over_has_whole_huge_pages() {
    with_pool("a_child_of_a_region_mapped_over_has_whole_huge_pages", || {
        let engine = engine();
        let vmap = publish(&engine, &pages(5 * per_huge()));
        let region = vmap.attach(&AttachOptions::new().at(FAR)).unwrap();
        for huge in [1, 3] {
            // SAFETY: no reference to the bytes is held.
            errno(unsafe { libc::munmap(at(&region, huge * per_huge()).cast(), HUGE) }).unwrap();
        }
        foreign(FAR + HUGE + 5 * page_size(), 2, 0x99);
        assert_count(&engine, &vmap, 3);
        let pid = child(|| {
            region.check().unwrap();
            for huge in [0, 2, 4] {
                assert_marked(&region, huge * per_huge()..huge * per_huge() + 2);
            }
            assert_eq!(touch::read((FAR + HUGE + 5 * page_size()) as *const u8), Ok(0x99));
            assert!(touch::read((FAR + HUGE) as *const u8).unwrap_err().is_sigsegv());
            assert_eq!(vmap.refcount().unwrap(), 6);
        });
        reap_ok(pid);
        support::scene::settled(&engine, &vmap, 3);
    });
}

/// What the kernel does with huge pages behind the engine's back: whole ones are unmapped and moved, parts are refused, and
/// nothing grows or doubles.
#[test]
fn raw_calls_move_and_unmap_whole_huge_pages() {
    with_pool("raw_calls_move_and_unmap_whole_huge_pages", || {
        let engine = engine();
        let vmap = publish(&engine, &pages(4 * per_huge()));
        let region = vmap.attach(&AttachOptions::new().at(FAR)).unwrap();
        assert_marked(&region, 5..6);
        let page = |n: usize| (FAR + n * HUGE) as *mut libc::c_void;
        // SAFETY: nothing refers to the bytes of the region.
        unsafe {
            assert_eq!(errno(libc::munmap(page(0), page_size())), Err(Errno::EINVAL));
            let far = ELSEWHERE as *mut libc::c_void;
            for (old, new, flags) in [
                (4 * HUGE, 5 * HUGE, 0),
                (4 * HUGE, 5 * HUGE, libc::MREMAP_MAYMOVE),
                (0, 4 * HUGE, libc::MREMAP_MAYMOVE),
                (HUGE, HUGE, libc::MREMAP_MAYMOVE | libc::MREMAP_DONTUNMAP),
            ] {
                assert_eq!(libc::mremap(page(0), old, new, flags, far), libc::MAP_FAILED);
                assert_eq!(Errno::last(), Errno::EINVAL);
            }
            // One that is there, and one that is missing.
            let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
            assert_eq!(libc::mremap(page(0), 2 * HUGE, 2 * HUGE, flags, far), far);
            errno(libc::munmap(page(3), HUGE)).unwrap();
        }
        assert_count(&engine, &vmap, 2);
        for (n, pgoff) in [(0, 5), (0, 6), (HUGE, per_huge()), (HUGE, 2 * per_huge() - 1)] {
            let addr = ELSEWHERE + n + (pgoff % per_huge()) as usize * page_size();
            assert_eq!(touch::read(addr as *const u8), Ok(mark(pgoff)));
        }
        assert_marked(&region, 2 * per_huge()..3 * per_huge());
        drop(region);
        assert_count(&engine, &vmap, 0);
        assert!(touch::read(ELSEWHERE as *const u8).unwrap_err().is_sigsegv());
    });
}

/// The owner reads and writes without a region; what is not touched by that comes from the list.
#[test]
fn the_owner_reads_and_writes_huge_pages() {
    with_pool("the_owner_reads_and_writes_huge_pages", || {
        let engine = engine();
        let vmap = publish(&engine, &pages(per_huge() + 9));
        let mut byte = [0];
        vmap.read_at(5 * page_size() as u64, &mut byte).unwrap();
        assert_eq!(byte, [mark(5)]);
        // Over the border of two huge pages, one of which is missing.
        vmap.write_at(HUGE as u64 - 3, &[1, 2, 3, 4, 5]).unwrap();
        let mut around = [0; 7];
        vmap.read_at(HUGE as u64 - 4, &mut around).unwrap();
        assert_eq!(around, [mark(per_huge() - 1), 1, 2, 3, 4, 5, mark(per_huge())]);
        let past = vmap.write_at((per_huge() + 9) * page_size() as u64, &[1]).unwrap_err();
        assert_eq!(past.errno(), Errno::EINVAL);
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        assert_eq!(touch::read(at(&region, per_huge())), Ok(4));
        assert_marked(&region, 0..per_huge() + 9);
        assert_eq!(settled_stats(&engine).faults, 0);
        assert_count(&engine, &vmap, 1);
    });
}

/// T52: taken back softly, what is resident stays; taken back hard, all of it is SIGBUS, the last huge page included.
#[test]
fn huge_pages_that_are_taken_back_are_sigbus() {
    with_pool("huge_pages_that_are_taken_back_are_sigbus", || {
        let engine = engine();
        let (vmap, region) = attached(&engine, &pages(2 * per_huge() + 3));
        assert_marked(&region, 2 * per_huge()..2 * per_huge() + 1);
        vmap.revoke(Revoke::Soft).unwrap();
        assert_marked(&region, 2 * per_huge()..2 * per_huge() + 3);
        assert_sigbus(&region, 7);
        let mut byte = [0];
        vmap.read_at(2 * HUGE as u64, &mut byte).unwrap();
        assert_eq!(byte, [mark(2 * per_huge())]);
        assert!(matches!(vmap.read_at(HUGE as u64, &mut byte), Err(Error::NoPage { .. })));
        vmap.revoke(Revoke::Hard).unwrap();
        for page in [0, per_huge(), 2 * per_huge(), 3 * per_huge() - 1] {
            assert_sigbus(&region, page);
        }
        assert_eq!(engine.snapshot().unwrap().vmaps[0].resident_bytes, 0);
    });
}

/// A vmap of whole huge pages grows under its regions; behind a last page that is not full there are zeros already.
#[test]
fn a_vmap_grows_by_whole_huge_pages() {
    with_pool("a_vmap_grows_by_whole_huge_pages", || {
        let engine = engine();
        let builder = |list: &Kiobuf| engine.vmap_builder(list).page_size(PageSize::Huge2M).expandable();
        let vmap = builder(&pages(per_huge())).build().unwrap();
        let region = vmap.attach(&AttachOptions::new().len_bytes(3 * HUGE)).unwrap();
        assert_sigbus(&region, per_huge());
        vmap.expand(&pages(3)).unwrap();
        assert_eq!(read_page(&region, per_huge() + 2), Ok(mark(2)));
        assert_eq!(read_page(&region, per_huge() + 3), Ok(0));
        assert_sigbus(&region, 2 * per_huge());
        let refused = vmap.expand(&pages(1)).unwrap_err();
        assert!(matches!(refused, Error::Misaligned { value, .. } if value == per_huge() + 3), "{refused}");
        let much = map(|list| list.map_zero((pool("nr_hugepages") + 1) * per_huge()).unwrap());
        let full = builder(&pages(per_huge())).build().unwrap();
        let refused = full.expand(&much).unwrap_err();
        assert!(matches!(refused, Error::HugePages { .. }), "{refused}");
        assert_eq!(full.nr_pages(), per_huge());
        assert_count(&engine, &vmap, 1);
    });
}

/// A shutdown that fills leaves every page; one that does not leaves SIGBUS for what is missing, in children too.
#[test]
fn a_shutdown_fills_or_refuses_huge_pages() {
    with_pool("a_shutdown_fills_or_refuses_huge_pages", || {
        for how in [Shutdown::Fill, Shutdown::Poison] {
            let engine = engine();
            let n = per_huge();
            let list = Kiobuf::concat(&[pages(2 * n), holes(n), pages(9)]).unwrap();
            let (_vmap, region) = attached(&engine, &list);
            assert_marked(&region, 0..1);
            let (ready, go) = (Told::new(), Told::new());
            let pid = child(|| {
                ready.tell(1);
                go.wait_for(1);
                assert_marked(&region, 0..n);
                match how {
                    Shutdown::Fill => assert_marked(&region, n..2 * n),
                    _ => assert_sigbus(&region, n + 4),
                }
                assert_sigbus(&region, 2 * n + 4);
            });
            ready.wait_for(1);
            let mut last = None;
            match how {
                Shutdown::Fill => engine.shutdown_filling(|so_far| last = Some(so_far)).unwrap(),
                how => engine.shutdown(how).unwrap(),
            }
            go.tell(1);
            reap_ok(pid);
            assert_marked(&region, 0..n);
            assert_sigbus(&region, 2 * n);
            if how == Shutdown::Fill {
                assert_marked(&region, n..2 * n);
                assert_eq!(read_page(&region, 3 * n + 8), Ok(mark(8)));
                let last = last.unwrap();
                assert_eq!((last.pages_done, last.pages_total, last.pages_failed), (3 * n + 9, 3 * n + 9, 0));
            } else {
                assert_sigbus(&region, n);
                assert_sigbus(&region, 3 * n);
            }
        }
    });
}

/// A failing source costs a shutdown that fills one huge page, tried as often as for a touch.
#[test]
fn a_shutdown_tries_a_huge_page_as_a_touch_does() {
    needs_sources!();
    with_pool("a_shutdown_tries_a_huge_page_as_a_touch_does", || {
        let engine = engine();
        let calls = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&calls);
        let list = source(2 * per_huge(), move |first, _| {
            counted.fetch_add(1, Ordering::Relaxed);
            if first == 0 { Err(std::io::Error::other("no")) } else { Ok(()) }
        });
        let (_vmap, region) = attached(&engine, &list);
        let mut failed = 0;
        engine.shutdown_filling(|so_far| failed = so_far.pages_failed).unwrap();
        assert_eq!((failed, calls.load(Ordering::Relaxed)), (per_huge(), 3 + 1));
        assert_sigbus(&region, 1);
        assert_marked(&region, per_huge()..2 * per_huge());
    });
}

/// A vmap that the pool is too small for is refused when it is built, with the number that is needed, the number that is free
/// and the knob.
#[test]
fn a_pool_that_is_too_small_is_said_when_a_vmap_is_built() {
    with_pool("a_pool_that_is_too_small_is_said_when_a_vmap_is_built", || {
        let engine = engine();
        let free = free_pages();
        let first = publish(&engine, &pages(4 * per_huge()));
        assert_eq!(free_pages(), free - 4);
        let list = map(|list| list.map_zero((free - 3) * per_huge() - 1).unwrap());
        let error = engine.vmap_builder(&list).page_size(PageSize::Huge2M).build().unwrap_err();
        let Error::HugePages { bytes, needed, free: left, errno } = error else { panic!("{error}") };
        assert_eq!((bytes, needed, left, errno), (HUGE, free - 3, free - 4, Errno::ENOMEM));
        assert!(error.to_string().contains("hugepages-2048kB/nr_hugepages"), "{error}");
        // Regions of what was built find their pages, however many there are, also past the end.
        let regions: Vec<_> =
            (0..5).map(|_| first.attach(&AttachOptions::new().len_bytes(100 * HUGE)).unwrap()).collect();
        assert_eq!(free_pages(), free - 4);
        assert_marked(&regions[3], 0..4 * per_huge());
        drop((regions, first));
        support::eventually("the pages are given back", || free_pages() == free);
    });
}

/// Huge pages that others take while none is promised to the vmap any more: SIGBUS after some patience, no hang, and right
/// bytes when there is one again.
#[test]
fn a_huge_page_that_is_not_to_be_had_is_sigbus() {
    with_pool("a_huge_page_that_is_not_to_be_had_is_sigbus", || {
        let engine = engine();
        let (_vmap, region) = attached(&engine, &pages(2 * per_huge()));
        assert_marked(&region, 0..1);
        // Punched out: with the page goes its reservation.
        // SAFETY: nothing refers to the bytes.
        errno(unsafe { libc::madvise(region.as_ptr().cast(), HUGE, libc::MADV_REMOVE) }).unwrap();
        let taken = free_pages() as usize * HUGE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB | libc::MAP_POPULATE;
        // SAFETY: a new mapping.
        let others =
            unsafe { libc::mmap(std::ptr::null_mut(), taken, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
        assert_ne!(others, libc::MAP_FAILED);
        assert_eq!(free_pages(), 0);
        assert_sigbus(&region, 5);
        // The page that is promised still is one.
        assert_marked(&region, per_huge()..per_huge() + 3);
        assert_sigbus(&region, 5);
        // SAFETY: the mapping made above; no reference to the region's bytes.
        unsafe {
            errno(libc::munmap(others, taken)).unwrap();
            errno(libc::madvise(region.as_ptr().cast(), HUGE, libc::MADV_DONTNEED)).unwrap();
        }
        assert_marked(&region, 0..per_huge());
        assert_nobody_waits(&engine);
    });
}

/// Huge pages are never swapped: a vmap that is to be locked is attached whatever RLIMIT_MEMLOCK says, and brings nothing.
#[test]
fn a_vmap_of_huge_pages_that_is_to_be_locked_brings_none() {
    with_pool("a_vmap_of_huge_pages_that_is_to_be_locked_brings_none", || {
        use nix::sys::resource::{Resource, setrlimit};
        setrlimit(Resource::RLIMIT_MEMLOCK, 4096, 4096).unwrap();
        let engine = engine();
        for residency in [Residency::Locked, Residency::LockedIfAllowed, Residency::Swappable] {
            let builder = engine.vmap_builder(&pages(2 * per_huge())).page_size(PageSize::Huge2M);
            let vmap = builder.residency(residency).build().unwrap();
            let region = vmap.attach(&AttachOptions::new()).unwrap();
            assert_eq!(region.is_locked(), residency != Residency::Swappable);
            let pid = child(|| assert_eq!(region.is_locked(), residency != Residency::Swappable));
            reap_ok(pid);
            assert_eq!(settled_stats(&engine).faults, 0);
        }
        assert_eq!(settled_stats(&engine).lock_downgrades, 0);
    });
}

/// Locking all memory afterwards brings the pages of the list, and no zeros.
#[test]
fn locking_all_memory_brings_right_huge_pages() {
    with_pool("locking_all_memory_brings_right_huge_pages", || {
        use nix::sys::mman::{MlockAllFlags, mlockall};
        if !support::serves_kernel_faults() {
            skip!("the kernel's own faults are not served");
        }
        let engine = engine();
        let (_vmap, region) = attached(&engine, &pages(2 * per_huge()));
        if mlockall(MlockAllFlags::MCL_CURRENT | MlockAllFlags::MCL_FUTURE).is_err() {
            skip!("this user may not lock all memory");
        }
        let (_second, later) = attached(&engine, &pages(per_huge() + 1));
        assert_marked(&region, 0..2 * per_huge());
        assert_marked(&later, 0..per_huge() + 1);
    });
}

/// Threads that unmap and map without a pause, next to huge pages that are touched: all of them are right.
#[test]
fn huge_pages_are_right_while_the_address_space_changes() {
    with_pool("huge_pages_are_right_while_the_address_space_changes", || {
        let engine = engine();
        let other = engine.vmap(&pages(64)).unwrap();
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while !stop.load(Ordering::Relaxed) {
                        let region = other.attach(&AttachOptions::new()).unwrap();
                        let _ = read_page(&region, 3);
                    }
                });
            }
            for _ in 0..20 {
                let n = per_huge();
                let list = Kiobuf::concat(&[pages(2 * n), holes(n)]).unwrap();
                let (_vmap, region) = attached(&engine, &list);
                assert_marked(&region, 0..2 * n);
                assert_sigbus(&region, 2 * n + 1);
            }
            stop.store(true, Ordering::Relaxed);
        });
        assert_truth(&engine);
        assert_nobody_waits(&engine);
    });
}

/// An engine without poison has no way to refuse a huge page, and says so; nothing else of it is refused.
#[test]
fn huge_pages_need_poison() {
    alone("huge_pages_need_poison", || {
        let engine = without_poison().build().unwrap();
        let error = engine.vmap_builder(&pages(1)).page_size(PageSize::Huge2M).build().unwrap_err();
        assert!(matches!(error, Error::Unsupported { missing, .. } if missing == Features::POISON), "{error}");
        engine.vmap_builder(&pages(1)).page_size(PageSize::Base).build().unwrap();
    });
}

/// Pages of 1 GiB, where there is one.
#[test]
fn huge_pages_of_one_gibibyte_work_or_are_refused() {
    if taken_away().contains(Features::POISON) {
        skip!("without POISON there are no vmaps of huge pages");
    }
    alone("huge_pages_of_one_gibibyte_work_or_are_refused", || {
        let engine = engine();
        match engine.vmap_builder(&pages(700)).page_size(PageSize::Huge1G).build() {
            Ok(vmap) => {
                let region = vmap.attach(&AttachOptions::new()).unwrap();
                assert_marked(&region, 0..700);
                assert_eq!(settled_stats(&engine).faults, 1);
            }
            Err(error) => {
                assert!(matches!(error, Error::HugePages { bytes, .. } if bytes == 1 << 30), "{error}");
                skip!("there is no huge page of 1 GiB: {error}");
            }
        }
    });
}

/// A signal handler has no buffer for a huge page: where it is to bring pages, vmaps of huge ones are refused.
#[test]
fn huge_pages_are_refused_where_a_signal_handler_brings_pages() {
    with_pool("huge_pages_are_refused_where_a_signal_handler_brings_pages", || {
        let engine = engine_builder().delivery(kiomap::Delivery::InThread).build().unwrap();
        let list = pages(per_huge());
        let refused = engine.vmap_builder(&list).page_size(PageSize::Huge2M).build().unwrap_err();
        assert!(matches!(refused, Error::Invalid { .. }), "{refused}");
    });
}
