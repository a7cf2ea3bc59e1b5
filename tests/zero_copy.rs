//! Lists that are a memfd: its pages are shown themselves, to the byte, in every process, and nothing else of it is.

mod support;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};

use kiomap::{
    Arena, AttachOptions, Backing, Engine, Error, ExtentKind, Kiobuf, Residency, Revoke, Shutdown, Vmap, page_size,
};
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, OFlag, SealFlag, fallocate, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use support::raw::{self, ELSEWHERE, FAR, assert_gone, assert_shows, assert_sigbus_pages, in_both_with, page};
use support::scene::{Rng, Told, at, child, settled};
use support::truth::{assert_count, assert_nobody_waits, assert_truth};
use support::{
    alone, assert_sigbus, engine_builder, eventually, in_page, long, mark, pages, read_page, reap_ok, settled_stats,
    threads, touch, without_poison,
};

fn bytes(nr_pages: u64) -> u64 {
    nr_pages * page_size() as u64
}

/// A memfd of `nr_pages` holes.
fn sparse(nr_pages: u64) -> File {
    let memfd = File::from(memfd_create(c"handed in", MFdFlags::MFD_ALLOW_SEALING | MFdFlags::MFD_CLOEXEC).unwrap());
    memfd.set_len(bytes(nr_pages)).unwrap();
    memfd
}

fn seal(memfd: &File, seals: SealFlag) {
    fcntl(memfd, FcntlArg::F_ADD_SEALS(seals)).unwrap();
}

/// Writes page `n` of a list that begins at page `base` of a memfd, as its owner.
fn put(memfd: &File, base: u64, n: u64, byte: u8) {
    memfd.write_all_at(&vec![byte; page_size()], bytes(base + n)).unwrap();
}

fn byte_at(memfd: &File, base: u64, n: u64) -> u8 {
    let mut byte = [0];
    memfd.read_exact_at(&mut byte, bytes(base + n) + 11).unwrap();
    byte[0]
}

/// A memfd that can't grow: `base` pages that no list has, then `nr_pages` [`mark`]ed ones.
fn marked(base: u64, nr_pages: u64) -> File {
    let memfd = sparse(base + nr_pages);
    (0..base).for_each(|n| put(&memfd, 0, n, 0xee));
    (0..nr_pages).for_each(|n| put(&memfd, base, n, mark(n)));
    seal(&memfd, SealFlag::F_SEAL_GROW);
    memfd
}

/// The list of a memfd from page `base` to its end.
fn list_of(memfd: &File, base: u64) -> Kiobuf {
    let mut list = Kiobuf::new();
    list.map_memfd(memfd, bytes(base)..memfd.metadata().unwrap().len()).unwrap();
    list
}

fn shared(engine: &Engine, list: &Kiobuf) -> Vmap {
    let vmap = engine.vmap_builder(list).backing(Backing::Shared).build().unwrap();
    assert!(vmap.shares_pages());
    vmap
}

/// A mapping of a part of a memfd that is its owner's, at an address.
fn map_own(memfd: &File, addr: usize, first: u64, nr_pages: u64) {
    assert!(try_map_own(memfd, addr, first, nr_pages));
}

/// As [`map_own`], if nothing is there.
fn try_map_own(memfd: &File, addr: usize, first: u64, nr_pages: u64) -> bool {
    let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_FIXED_NOREPLACE);
    let (len, offset) = (bytes(nr_pages) as usize, bytes(first) as i64);
    // SAFETY: a new mapping that replaces nothing.
    let mapped = unsafe { libc::mmap(addr as *mut libc::c_void, len, prot, flags, memfd.as_raw_fd(), offset) };
    assert!(mapped as usize == addr || Errno::last() == Errno::EEXIST);
    mapped as usize == addr
}

/// T89: what the owner writes, by system call and by a mapping of his own, and what regions of any process write is one
/// memory, and nothing is copied.
#[test]
fn the_owner_and_every_region_have_the_same_pages() {
    alone("the_owner_and_every_region_have_the_same_pages", || {
        for base in [0, 5] {
            let engine = engine_builder().build().unwrap();
            let memfd = marked(base, 20);
            let vmap = shared(&engine, &list_of(&memfd, base));
            let regions = [vmap.attach(&AttachOptions::new()).unwrap(), vmap.attach(&long(6).pgoff(3)).unwrap()];
            map_own(&memfd, FAR, base, 20);
            for n in 0..20 {
                assert_eq!(read_page(&regions[0], n), Ok(mark(n)));
            }
            put(&memfd, base, 4, 0x77);
            assert_eq!((read_page(&regions[0], 4), read_page(&regions[1], 1)), (Ok(0x77), Ok(0x77)));
            touch::write((page(FAR, 5) + 11) as *mut u8, 0x78).unwrap();
            assert_eq!((read_page(&regions[0], 5), read_page(&regions[1], 2)), (Ok(0x78), Ok(0x78)));
            touch::write(in_page(&regions[1], 3), 0x79).unwrap();
            assert_eq!((byte_at(&memfd, base, 6), touch::read((page(FAR, 6) + 11) as *const u8)), (0x79, Ok(0x79)));
            let (done, go) = (Told::new(), Told::new());
            let pid = child(|| {
                assert_eq!(read_page(&regions[0], 4), Ok(0x77));
                touch::write(in_page(&regions[0], 7), 0x7a).unwrap();
                done.tell(1);
                go.wait_for(1);
                assert_eq!(read_page(&regions[1], 5), Ok(0x7b));
                put(&memfd, base, 9, 0x7c);
            });
            done.wait_for(1);
            assert_eq!((byte_at(&memfd, base, 7), read_page(&regions[1], 4)), (0x7a, Ok(0x7a)));
            touch::write(in_page(&regions[0], 8), 0x7b).unwrap();
            go.tell(1);
            reap_ok(pid);
            assert_eq!(read_page(&regions[0], 9), Ok(0x7c));
            raw::munmap(FAR as *mut u8, 20);
            settled(&engine, &vmap, 2);
            let stats = settled_stats(&engine);
            assert_eq!((stats.faults, stats.pages_copied, stats.pages_zeroed), (0, 0, 0));
            drop(regions);
            assert_count(&engine, &vmap, 0);
        }
    });
}

/// T16, T89, T90: a page that the memfd holds costs no fault in any region, however often it is read; a hole costs one in
/// all, and is zeros; past the end is SIGBUS, also where a region or mremap reaches further.
#[test]
fn held_pages_cost_no_fault_holes_one_and_the_end_is_sigbus() {
    alone("held_pages_cost_no_fault_holes_one_and_the_end_is_sigbus", || {
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        let memfd = sparse(8);
        (0..8).filter(|n| n % 2 == 0).for_each(|n| put(&memfd, 0, n, mark(n)));
        seal(&memfd, SealFlag::F_SEAL_GROW);
        let vmap = shared(&engine, &list_of(&memfd, 2));
        let region = vmap.attach(&long(10).at(FAR)).unwrap();
        let other = vmap.attach(&AttachOptions::new()).unwrap();
        for _ in 0..3 {
            for n in 0..6 {
                let byte = if n % 2 == 0 { mark(n + 2) } else { 0 };
                assert_eq!((read_page(&region, n), read_page(&other, n)), (Ok(byte), Ok(byte)), "page {n}");
            }
        }
        let stats = settled_stats(&engine);
        assert_eq!((stats.faults, stats.pages_zeroed, stats.pages_copied), (3, 3, 0));
        (6..10).for_each(|n| assert_sigbus(&region, n));
        assert_eq!(raw::mremap(FAR, 10, 14, 0, 0), FAR);
        assert_sigbus_pages(page(FAR, 6), 8);
        assert_eq!(settled_stats(&engine).faults, 3);
        // What was a hole is a page of the memfd by now.
        touch::write(in_page(&region, 1), 9).unwrap();
        assert_eq!(byte_at(&memfd, 2, 1), 9);
        assert_nobody_waits(&engine);
    });
}

/// T106: a page that stands in two places can't be one page in both: insisted upon it is refused, else each place has a
/// copy of its own.
#[test]
fn a_page_in_two_places_is_refused_or_copied() {
    let engine = engine_builder().build().unwrap();
    let memfd = marked(0, 4);
    let one = list_of(&memfd, 0);
    let list = Kiobuf::concat(&[one.clone(), one]).unwrap();
    let refused = engine.vmap_builder(&list).backing(Backing::Shared).build().unwrap_err();
    assert!(matches!(refused, Error::Invalid { what: "the extent at page", value: 4, .. }), "{refused}");
    let vmap = engine.vmap(&list).unwrap();
    assert!(!vmap.shares_pages());
    let region = vmap.attach(&AttachOptions::new()).unwrap();
    touch::write(in_page(&region, 1), 0x55).unwrap();
    for n in 0..8 {
        assert_eq!(read_page(&region, n), Ok(if n == 1 { 0x55 } else { mark(n % 4) }));
    }
    assert_eq!(byte_at(&memfd, 0, 1), mark(1));
    assert_truth(&engine);
}

/// An arena of a memfd is shown itself: what was filled in before is not copied, and the list has what a region writes. One of
/// anonymous memory is a template, as ever.
#[test]
fn a_shared_arena_is_the_memory_of_its_regions() {
    let engine = engine_builder().build().unwrap();
    for shares in [true, false] {
        let mut arena = if shares { Arena::shared(6).unwrap() } else { Arena::new(6).unwrap() };
        (0..6).for_each(|n| arena[n as usize * page_size()..][..page_size()].fill(mark(n)));
        let mut list = Kiobuf::new();
        list.map_kernel(arena).unwrap();
        let before = settled_stats(&engine);
        let vmap = engine.vmap(&list).unwrap();
        assert_eq!(vmap.shares_pages(), shares);
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        (0..6).for_each(|n| assert_eq!(read_page(&region, n), Ok(mark(n))));
        let copied = settled_stats(&engine).pages_copied - before.pages_copied;
        assert_eq!(copied, if shares { 0 } else { 6 });
        touch::write(in_page(&region, 2), 0x33).unwrap();
        let file = tempfile::tempfile().unwrap();
        assert_eq!(list.write_to(&file, 0).unwrap(), bytes(6));
        assert_eq!(byte_at(&file, 0, 2), if shares { 0x33 } else { mark(2) });
        let refused = list.read_from(&file, 0).unwrap_err();
        assert!(matches!(refused, Error::Invalid { .. } | Error::Shared), "{refused}");
        assert_truth(&engine);
    }
}

/// Parts of one memfd that follow on are one run of it.
#[test]
fn parts_that_follow_on_are_shared() {
    let engine = engine_builder().build().unwrap();
    let memfd = marked(1, 9);
    let part = |first: u64, end: u64| {
        let mut list = Kiobuf::new();
        list.map_memfd(&memfd.try_clone().unwrap(), bytes(first)..bytes(end)).unwrap();
        list
    };
    let list = Kiobuf::concat(&[part(1, 4), part(4, 5), part(5, 10)]).unwrap();
    assert!(list.extents().all(|extent| extent.kind == ExtentKind::Memfd));
    let vmap = shared(&engine, &list);
    let region = vmap.attach(&AttachOptions::new()).unwrap();
    (0..9).for_each(|n| assert_eq!(read_page(&region, n), Ok(mark(n))));
    assert_eq!(settled_stats(&engine).faults, 0);
}

/// What stands in the way is named when it is insisted upon; otherwise the pages are copies, and are right.
#[test]
fn what_can_not_be_shared_is_refused_by_name_or_copied() {
    let engine = engine_builder().build().unwrap();
    let grows = sparse(4);
    (0..4).for_each(|n| put(&grows, 0, n, mark(n)));
    let whole = marked(0, 4);
    let mut short = Kiobuf::new();
    short.map_memfd(&whole, 0..bytes(3)).unwrap();
    let ends_within = sparse(4);
    ends_within.set_len(bytes(3) + 100).unwrap();
    (0..3).for_each(|n| put(&ends_within, 0, n, mark(n)));
    ends_within.write_all_at(&[mark(3); 100], bytes(3)).unwrap();
    seal(&ends_within, SealFlag::F_SEAL_GROW);
    let tail = Kiobuf::concat(&[list_of(&whole, 0), pages(1)]).unwrap();
    // Sealed after it was mapped.
    let sealed = [SealFlag::F_SEAL_WRITE, SealFlag::F_SEAL_FUTURE_WRITE].map(|against_writing| {
        let memfd = marked(0, 4);
        let list = list_of(&memfd, 0);
        seal(&memfd, against_writing);
        (list, "the memfd's seals (F_GET_SEALS)")
    });
    let cases = [
        (list_of(&grows, 0), "the memfd's seals (F_GET_SEALS)"),
        (short, "the end of the list in its memfd in bytes"),
        (list_of(&ends_within, 0), "the memfd's size in bytes"),
        (tail, "the extent at page"),
        (pages(4), "the extent at page"),
        (Kiobuf::new(), "the number of pages of the list"),
    ];
    for (list, named) in cases.into_iter().chain(sealed) {
        let refused = engine.vmap_builder(&list).backing(Backing::Shared).build().unwrap_err();
        assert!(matches!(refused, Error::Invalid { what, .. } if what == named), "{refused}");
        assert_eq!(refused.errno(), Errno::EINVAL);
        let vmap = engine.vmap(&list).unwrap();
        assert!(!vmap.shares_pages());
        let region = vmap.attach(&long(6)).unwrap();
        for n in 0..list.nr_pages() {
            assert_eq!(read_page(&region, n), Ok(mark(n % 4)), "{named}");
        }
        (list.nr_pages()..6).for_each(|n| assert_sigbus(&region, n));
    }
    let list = list_of(&whole, 0);
    let refused = engine.vmap_builder(&list).expandable().backing(Backing::Shared).build().unwrap_err();
    assert!(matches!(refused, Error::Invalid { what: "the vmap's capacity in pages", .. }), "{refused}");
    assert!(!engine.vmap_builder(&list).expandable().build().unwrap().shares_pages());
    let copied = engine.vmap_builder(&list).backing(Backing::Copied).build().unwrap();
    let region = copied.attach(&AttachOptions::new()).unwrap();
    touch::write(in_page(&region, 2), 1).unwrap();
    assert_eq!((copied.shares_pages(), byte_at(&whole, 0, 2)), (false, mark(2)));
    assert_truth(&engine);
}

/// What is no memfd that can be mapped shared is refused with the rule, and the list stays empty.
#[test]
fn what_is_no_memfd_of_whole_pages_is_refused() {
    let memfd = marked(0, 4);
    let reopened = |flags: OFlag| {
        let path = format!("/proc/self/fd/{}", memfd.as_raw_fd());
        File::from(nix::fcntl::open(path.as_str(), flags, nix::sys::stat::Mode::empty()).unwrap())
    };
    // Beside the binary, which is on a disk, unless only others may write there.
    let beside = std::env::current_exe().unwrap().parent().unwrap().to_owned();
    let ext = tempfile::tempfile_in(beside).or_else(|_| tempfile::tempfile()).unwrap();
    ext.set_len(bytes(4)).unwrap();
    let on_disk = nix::sys::statfs::fstatfs(&ext).unwrap().filesystem_type() != nix::sys::statfs::TMPFS_MAGIC;
    let sealed = sparse(4);
    seal(&sealed, SealFlag::F_SEAL_WRITE);
    let future = sparse(4);
    seal(&future, SealFlag::F_SEAL_FUTURE_WRITE);
    let mut cases = vec![
        (memfd.try_clone().unwrap(), 0..0, Errno::EINVAL),
        (memfd.try_clone().unwrap(), bytes(2)..bytes(1), Errno::EINVAL),
        (memfd.try_clone().unwrap(), 1..bytes(4), Errno::EINVAL),
        (memfd.try_clone().unwrap(), 0..bytes(4) - 1, Errno::EINVAL),
        (memfd.try_clone().unwrap(), 0..bytes(5), Errno::EFAULT),
        (memfd.try_clone().unwrap(), bytes(4)..bytes(5), Errno::EFAULT),
        (reopened(OFlag::O_RDONLY), 0..bytes(4), Errno::EINVAL),
        (reopened(OFlag::O_WRONLY), 0..bytes(4), Errno::EINVAL),
        (reopened(OFlag::O_RDWR | OFlag::O_APPEND), 0..bytes(4), Errno::EINVAL),
        (reopened(OFlag::O_PATH), 0..bytes(4), Errno::EINVAL),
        (sealed, 0..bytes(4), Errno::EINVAL),
        (future, 0..bytes(4), Errno::EINVAL),
        (File::open("/").unwrap(), 0..1, Errno::EINVAL),
    ];
    if on_disk {
        cases.push((ext, 0..bytes(4), Errno::EINVAL));
    }
    // Made without a huge page, which nobody touches.
    if let Ok(huge) = memfd_create(c"huge", MFdFlags::MFD_HUGETLB) {
        let huge = File::from(huge);
        huge.set_len(2 << 20).unwrap();
        cases.push((huge, 0..2 << 20, Errno::EINVAL));
    }
    let mut list = Kiobuf::new();
    for (file, range, errno) in cases {
        let refused = list.map_memfd(&file, range.clone()).unwrap_err();
        assert_eq!(refused.errno(), errno, "{range:?}: {refused}");
        assert!(!list.is_mapped());
    }
    list.map_memfd(&memfd, 0..bytes(4)).unwrap();
    let refused = list.map_memfd(&memfd, 0..bytes(4)).unwrap_err();
    assert!(matches!(refused, Error::AlreadyMapped { nr_pages: 4 }));
}

/// Which vmap an area shows must be told by its memfd: one vmap at a time shows it itself, over all engines.
#[test]
fn a_memfd_is_shown_itself_by_one_vmap_at_a_time() {
    alone("a_memfd_is_shown_itself_by_one_vmap_at_a_time", || {
        let engines = [engine_builder().build().unwrap(), engine_builder().build().unwrap()];
        let memfd = marked(3, 5);
        let (whole, part) = (list_of(&memfd, 0), list_of(&memfd, 3));
        let first = shared(&engines[0], &part);
        let region = first.attach(&AttachOptions::new()).unwrap();
        for engine in &engines {
            let refused = engine.vmap_builder(&whole).backing(Backing::Shared).build().unwrap_err();
            assert!(matches!(refused, Error::Invalid { what: "the inode of the memfd", .. }), "{refused}");
            let copy = engine.vmap(&whole).unwrap();
            let copied = copy.attach(&AttachOptions::new()).unwrap();
            assert!(!copy.shares_pages());
            assert_eq!((read_page(&copied, 4), read_page(&region, 1)), (Ok(mark(1)), Ok(mark(1))));
            touch::write(in_page(&copied, 4), 1).unwrap();
            assert_eq!(read_page(&region, 1), Ok(mark(1)));
        }
        drop(first);
        assert!(engines[1].vmap_builder(&whole).backing(Backing::Shared).build().is_err(), "a region keeps it");
        drop(region);
        // What the engine's threads hold of it they let go of by and by.
        let mut second = None;
        eventually("nobody has it", || {
            engines[0].settle().unwrap();
            second = engines[1].vmap_builder(&whole).backing(Backing::Shared).build().ok();
            second.is_some()
        });
        let region = second.unwrap().attach(&AttachOptions::new()).unwrap();
        assert_eq!(read_page(&region, 4), Ok(mark(1)));
        // A child that builds an engine of its own finds the vmap that it inherited.
        reap_ok(child(|| {
            let own = engine_builder().build().unwrap();
            assert!(own.vmap_builder(&whole).backing(Backing::Shared).build().is_err());
            assert!(!own.vmap(&whole).unwrap().shares_pages());
        }));
    });
}

/// T33, T39, T41, T43: raw system calls on a region that shows a memfd: pages and counts stay right.
#[test]
fn raw_system_calls_leave_pages_and_counts_right() {
    let list = || list_of(&marked(3, 16), 3);
    in_both_with("raw_system_calls_leave_pages_and_counts_right", list, |scene| {
        let region = scene.vmap.attach(&long(10).pgoff(3).at(FAR)).unwrap();
        assert_shows(FAR, 3..13);
        raw::munmap(at(&region, 4), 3);
        scene.count(2);
        assert_gone(page(FAR, 4), 3);
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        assert_eq!(raw::mremap(FAR, 4, 4, flags, ELSEWHERE), ELSEWHERE);
        scene.count(2);
        assert_shows(ELSEWHERE, 3..7);
        let flags = flags | libc::MREMAP_DONTUNMAP;
        assert_eq!(raw::mremap(ELSEWHERE, 4, 4, flags, page(ELSEWHERE, 16)), page(ELSEWHERE, 16));
        assert_shows(ELSEWHERE, 3..7);
        assert_shows(page(ELSEWHERE, 16), 3..7);
        scene.count(3);
        raw::munmap(ELSEWHERE as *mut u8, 4);
        scene.count(2);
        drop(region);
        scene.count(0);
        assert_gone(page(FAR, 7), 3);
        assert_gone(page(ELSEWHERE, 16), 4);

        // Held pages of what was grown need nobody, and the region takes them along all the same.
        let region = scene.vmap.attach(&long(2).pgoff(8).at(FAR)).unwrap();
        scene.count(1);
        assert_eq!(raw::mremap(FAR, 2, 12, 0, 0), FAR);
        assert_shows(FAR, 8..16);
        assert_sigbus_pages(page(FAR, 8), 4);
        drop(region);
        scene.count(0);
        assert_gone(FAR, 12);
    });
}

/// T41: a hole in what was grown in place is found in the kernel's table, where the memfd's owner maps it too.
#[test]
fn holes_in_what_was_grown_are_served_and_counted() {
    let list = || {
        let memfd = sparse(3 + 16);
        put(&memfd, 3, 1, mark(1));
        seal(&memfd, SealFlag::F_SEAL_GROW);
        list_of(&memfd, 3)
    };
    in_both_with("holes_in_what_was_grown_are_served_and_counted", list, |scene| {
        let region = scene.vmap.attach(&long(2).at(FAR)).unwrap();
        assert_eq!(raw::mremap(FAR, 2, 10, 0, 0), FAR);
        assert_eq!(touch::read(page(FAR, 7) as *const u8), Ok(0));
        scene.count(1);
        touch::write(page(FAR, 9) as *mut u8, 5).unwrap();
        assert_eq!(touch::read(page(FAR, 9) as *const u8), Ok(5));
        assert_shows(page(FAR, 1), 1..2);
        // A second mapping, of which no event tells what it shows.
        let second = raw::mremap(FAR, 0, 10, libc::MREMAP_MAYMOVE, 0);
        assert_eq!(touch::read(page(second, 6) as *const u8), Ok(0));
        scene.count(2);
        drop(region);
        scene.count(0);
        assert_gone(FAR, 10);
        assert_gone(second, 10);
    });
}

/// The owner's mappings of a memfd are his: not counted, not unmapped with a region that they follow, not taken for one
/// that moved away, and none keeps the engine's threads.
#[test]
fn mappings_of_the_owner_are_left_alone() {
    alone("mappings_of_the_owner_are_left_alone", || {
        let before = threads().len();
        let engine = engine_builder().build().unwrap();
        let memfd = marked(2, 16);
        let vmap = shared(&engine, &list_of(&memfd, 2));
        let counted = |refcount| {
            engine.settle().unwrap();
            assert_eq!(vmap.refcount().unwrap(), refcount);
            let snapshot = engine.snapshot().unwrap();
            assert_eq!(snapshot.spaces[0].areas.len(), refcount, "{snapshot}");
        };
        // As if the region had grown.
        let region = vmap.attach(&long(4).at(FAR)).unwrap();
        map_own(&memfd, page(FAR, 4), 2 + 4, 4);
        drop(region);
        counted(0);
        assert_gone(FAR, 4);
        assert_shows(page(FAR, 4), 4..8);
        // In the place of what moved away, and behind where it went.
        let region = vmap.attach(&long(4).at(FAR)).unwrap();
        map_own(&memfd, page(ELSEWHERE, 4), 2 + 4, 4);
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        assert_eq!(raw::mremap(FAR, 4, 4, flags, ELSEWHERE), ELSEWHERE);
        map_own(&memfd, FAR, 2, 4);
        counted(1);
        drop(region);
        counted(0);
        assert_shows(FAR, 0..8);
        assert_shows(page(ELSEWHERE, 4), 4..8);
        assert_gone(ELSEWHERE, 4);
        // In a child too.
        let region = vmap.attach(&long(4).at(ELSEWHERE)).unwrap();
        reap_ok(child(|| {
            drop(region);
            assert_shows(FAR, 0..8);
            assert_shows(page(ELSEWHERE, 4), 4..8);
            assert_gone(ELSEWHERE, 4);
        }));
        drop(vmap);
        engine.shutdown(Shutdown::Poison).unwrap();
        drop(engine);
        eventually("the threads end", || threads().len() == before);
        assert_shows(FAR, 0..8);
    });
}

/// T73: after the engine's end the memfd's pages stay and go on to be shared; its holes are SIGBUS, in children too.
#[test]
fn after_a_shutdown_held_pages_stay_and_holes_are_sigbus() {
    alone("after_a_shutdown_held_pages_stay_and_holes_are_sigbus", || {
        for poisons in [true, false] {
            let builder = if poisons { engine_builder() } else { without_poison() };
            let engine = builder.fault_around_pages(1).build().unwrap();
            let memfd = sparse(4);
            (0..2).for_each(|n| put(&memfd, 0, n, mark(n)));
            seal(&memfd, SealFlag::F_SEAL_GROW);
            let vmap = shared(&engine, &list_of(&memfd, 0));
            let region = vmap.attach(&long(5)).unwrap();
            assert_eq!(read_page(&region, 0), Ok(mark(0)));
            let (ready, go) = (Told::new(), Told::new());
            let look = || {
                for _ in 0..2 {
                    assert_eq!((read_page(&region, 0), read_page(&region, 1)), (Ok(mark(0)), Ok(mark(1))));
                    (2..5).for_each(|n| assert_sigbus(&region, n));
                }
            };
            let pid = child(|| {
                ready.tell(1);
                go.wait_for(1);
                look();
            });
            ready.wait_for(1);
            engine.shutdown(Shutdown::Poison).unwrap();
            look();
            go.tell(1);
            reap_ok(pid);
            touch::write(in_page(&region, 1), 9).unwrap();
            assert_eq!(byte_at(&memfd, 0, 1), 9);
            // The memfd was not given pages by that.
            let mut page = vec![1; page_size()];
            memfd.read_exact_at(&mut page, bytes(3)).unwrap();
            assert!(page.iter().all(|&byte| byte == 0));
        }
    });
}

/// What a shutdown fills are the memfd's holes.
#[test]
fn a_shutdown_that_fills_fills_the_holes() {
    alone("a_shutdown_that_fills_fills_the_holes", || {
        let engine = engine_builder().build().unwrap();
        let memfd = sparse(6);
        put(&memfd, 1, 2, mark(2));
        seal(&memfd, SealFlag::F_SEAL_GROW);
        let vmap = shared(&engine, &list_of(&memfd, 1));
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        engine.shutdown(Shutdown::Fill).unwrap();
        for n in 0..5 {
            assert_eq!(read_page(&region, n), Ok(if n == 2 { mark(2) } else { 0 }));
        }
    });
}

/// The owner punches holes into his memfd and truncates it: zeros, and SIGBUS.
#[test]
fn what_the_owner_takes_away_is_zeros_or_sigbus() {
    alone("what_the_owner_takes_away_is_zeros_or_sigbus", || {
        for poisons in [true, false] {
            let builder = if poisons { engine_builder() } else { without_poison() };
            let engine = builder.build().unwrap();
            let memfd = marked(1, 8);
            let vmap = shared(&engine, &list_of(&memfd, 1));
            let region = vmap.attach(&AttachOptions::new()).unwrap();
            (0..8).for_each(|n| assert_eq!(read_page(&region, n), Ok(mark(n))));
            let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            fallocate(&memfd, punch, bytes(1 + 2) as i64, bytes(2) as i64).unwrap();
            for n in 0..8 {
                assert_eq!(read_page(&region, n), Ok(if n == 2 || n == 3 { 0 } else { mark(n) }));
            }
            memfd.set_len(bytes(1 + 5)).unwrap();
            (0..2).for_each(|n| assert_eq!(read_page(&region, n), Ok(mark(n))));
            (5..8).for_each(|n| assert_sigbus(&region, n));
            let mut buf = vec![0; 3 * page_size()];
            assert!(vmap.read_at(bytes(4), &mut buf).is_err());
            vmap.read_at(bytes(4), &mut buf[..page_size()]).unwrap();
            assert_eq!(buf[0], mark(4));
            assert!(vmap.write_at(bytes(6), &[1]).is_err());
            assert_eq!(memfd.metadata().unwrap().len(), bytes(6));
            assert_truth(&engine);
            assert_nobody_waits(&engine);
        }
    });
}

/// The owner's reads and writes without a region are of the list's pages, wherever it begins, and a position of the memfd
/// stays where it is.
#[test]
fn reads_and_writes_without_a_region_are_the_memfds() {
    use std::io::{Seek, SeekFrom};
    let engine = engine_builder().build().unwrap();
    let mut memfd = marked(3, 4);
    memfd.seek(SeekFrom::Start(1234)).unwrap();
    let vmap = shared(&engine, &list_of(&memfd, 3));
    let mut buf = vec![0; 2 * page_size()];
    vmap.read_at(bytes(1), &mut buf).unwrap();
    assert_eq!((buf[0], buf[page_size()]), (mark(1), mark(2)));
    vmap.write_at(bytes(2) + 11, &[0x41]).unwrap();
    assert_eq!(byte_at(&memfd, 3, 2), 0x41);
    vmap.revoke(Revoke::Soft).unwrap();
    vmap.read_at(bytes(2), &mut buf).unwrap();
    assert_eq!(buf[11], 0x41);
    assert!(matches!(vmap.read_at(bytes(3), &mut buf), Err(Error::Invalid { .. })));
    assert_eq!(memfd.stream_position().unwrap(), 1234);
    let snapshot = engine.snapshot().unwrap();
    assert_eq!(snapshot.vmaps[0].offset, bytes(3));
}

/// A soft revoke takes the holes, which were promised by the list only; a hard one would take the owner's bytes, and is
/// refused.
#[test]
fn a_revoke_takes_holes_and_never_the_owners_bytes() {
    let engine = engine_builder().fault_around_pages(1).build().unwrap();
    let memfd = sparse(4);
    put(&memfd, 0, 1, mark(1));
    seal(&memfd, SealFlag::F_SEAL_GROW);
    let vmap = shared(&engine, &list_of(&memfd, 0));
    let region = vmap.attach(&AttachOptions::new()).unwrap();
    assert_eq!(vmap.revoke(Revoke::Hard).unwrap_err().errno(), Errno::EINVAL);
    assert_eq!((read_page(&region, 0), read_page(&region, 1)), (Ok(0), Ok(mark(1))));
    vmap.revoke(Revoke::Soft).unwrap();
    assert_eq!((read_page(&region, 0), read_page(&region, 1)), (Ok(0), Ok(mark(1))));
    assert_sigbus(&region, 2);
    memfd.set_len(0).unwrap();
    (0..4).for_each(|n| assert_sigbus(&region, n));
}

/// A memfd that is sealed against writing when it is attached can't be registered any more: what is attached stays, and
/// what is refused is refused whole.
#[test]
fn a_memfd_that_is_sealed_later_is_attached_no_more() {
    alone("a_memfd_that_is_sealed_later_is_attached_no_more", || {
        let engine = engine_builder().build().unwrap();
        let memfd = marked(0, 4);
        let vmap = shared(&engine, &list_of(&memfd, 0));
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        seal(&memfd, SealFlag::F_SEAL_FUTURE_WRITE);
        assert_eq!(vmap.attach(&AttachOptions::new()).unwrap_err().errno(), Errno::EPERM);
        assert_eq!(vmap.write_at(0, &[1]).unwrap_err().errno(), Errno::EPERM);
        (0..4).for_each(|n| assert_eq!(read_page(&region, n), Ok(mark(n))));
        touch::write(in_page(&region, 1), 7).unwrap();
        assert_eq!(byte_at(&memfd, 0, 1), 7);
        reap_ok(child(|| {
            assert!(matches!(region.check(), Err(Error::NotInherited { .. })));
            assert!(read_page(&region, 1).unwrap_err().is_sigsegv());
        }));
        settled(&engine, &vmap, 1);
    });
}

/// An attach past what a file can hold is refused wherever the list begins; a locked vmap locks the memfd's pages.
#[test]
fn offsets_and_residency_are_the_memfds() {
    let engine = engine_builder().build().unwrap();
    let memfd = marked(3, 4);
    let list = list_of(&memfd, 3);
    let builder = engine.vmap_builder(&list).backing(Backing::Shared).residency(Residency::LockedIfAllowed);
    let vmap = builder.build().unwrap();
    let most = i64::MAX as u64 / page_size() as u64;
    for pgoff in [most - 3, most, u64::MAX] {
        let refused = vmap.attach(&long(1).pgoff(pgoff)).unwrap_err();
        assert!(matches!(refused, Error::Invalid { what: "pgoff", .. }), "{refused}");
    }
    let far = vmap.attach(&long(1).pgoff(1 << 30)).unwrap();
    assert_sigbus(&far, 0);
    let region = vmap.attach(&AttachOptions::new().read_only()).unwrap();
    (0..4).for_each(|n| assert_eq!(read_page(&region, n), Ok(mark(n))));
    assert!(touch::write(in_page(&region, 0), 1).unwrap_err().is_sigsegv());
}

/// The owner writes, punches and shrinks while threads of two processes touch: each sees a page as it was at some time, or
/// SIGBUS for what was truncated, and nobody sleeps on.
#[test]
fn touches_that_race_the_owner_see_a_page_of_some_time() {
    const PAGES: u64 = 64;
    alone("touches_that_race_the_owner_see_a_page_of_some_time", || {
        let engine = engine_builder().build().unwrap();
        let memfd = marked(2, PAGES);
        let vmap = shared(&engine, &list_of(&memfd, 2));
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        let other = |n| mark(n) ^ 0x80;
        let touch_all = |seed| {
            let mut rng = Rng::new(seed);
            for _ in 0..20_000 {
                let n = rng.below(PAGES);
                match read_page(&region, n) {
                    Ok(byte) => assert!([0, mark(n), other(n)].contains(&byte), "page {n}: {byte}"),
                    Err(refused) => {
                        assert!(
                            n >= PAGES - 8 && refused.is_sigbus_at(in_page(&region, n) as usize),
                            "{n}: {refused:?}"
                        );
                    }
                }
            }
        };
        let pid = child(|| touch_all(1));
        std::thread::scope(|scope| {
            scope.spawn(|| touch_all(2));
            let mut rng = Rng::new(3);
            for round in 0..2_000 {
                let n = rng.below(PAGES - 8);
                match rng.below(3) {
                    0 => put(&memfd, 2, n, mark(n)),
                    1 => put(&memfd, 2, n, other(n)),
                    _ => {
                        let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
                        fallocate(&memfd, punch, bytes(2 + n) as i64, bytes(1) as i64).unwrap();
                    }
                }
                if round % 250 == 249 {
                    memfd.set_len(bytes(2 + PAGES - round / 250 - 1)).unwrap();
                }
            }
        });
        reap_ok(pid);
        (PAGES - 8..PAGES).for_each(|n| assert_sigbus(&region, n));
        settled(&engine, &vmap, 1);
        assert_nobody_waits(&engine);
    });
}

/// The owner maps and unmaps his memfd right behind, and in the place of, regions that come, move, are cut and go: his
/// mappings stay until he unmaps them, and every region is counted out.
#[test]
fn mappings_of_the_owner_among_regions_that_come_and_go_stay() {
    alone("mappings_of_the_owner_among_regions_that_come_and_go_stay", || {
        let engine = engine_builder().build().unwrap();
        let memfd = marked(1, 16);
        let vmap = shared(&engine, &list_of(&memfd, 1));
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut rng = Rng::new(7);
                while !done.load(Ordering::Relaxed) {
                    // What a region there would go on with.
                    let first = 2 + rng.below(6);
                    if !try_map_own(&memfd, page(FAR, first), 1 + first, 2) {
                        continue;
                    }
                    for _ in 0..rng.below(20) {
                        assert_shows(page(FAR, first), first..first + 2);
                    }
                    raw::munmap(page(FAR, first) as *mut u8, 2);
                }
            });
            let mut rng = Rng::new(8);
            for _ in 0..1_500 {
                let len = 2 + rng.below(4);
                let region = match vmap.attach(&long(len).at(FAR)) {
                    Ok(region) => region,
                    Err(Error::AddressTaken { .. }) => continue,
                    Err(error) => panic!("{error}"),
                };
                match rng.below(4) {
                    0 => raw::munmap(at(&region, 1), 1),
                    1 => {
                        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
                        raw::mremap(FAR, len as usize, len as usize, flags, ELSEWHERE);
                        assert_shows(ELSEWHERE, 0..len);
                    }
                    2 => {
                        let grown = bytes(len + 1) as usize;
                        // SAFETY: in place, if nothing is behind.
                        let _ = unsafe { libc::mremap(FAR as *mut libc::c_void, bytes(len) as usize, grown, 0) };
                        assert_shows(FAR, 0..len);
                    }
                    _ => assert_shows(FAR, 0..len),
                }
                drop(region);
            }
            done.store(true, Ordering::Relaxed);
        });
        assert_count(&engine, &vmap, 0);
        assert_nobody_waits(&engine);
        assert_eq!(engine.stats().strays, 0);
    });
}
