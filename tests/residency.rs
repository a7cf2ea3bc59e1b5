//! Residency: what is to be locked in memory is locked when it comes, in every process, within what the system allows; and
//! an application that locks or populates memory itself gets right bytes or an error.

mod support;

use std::cell::Cell;
use std::fs;
use std::os::unix::fs::FileExt;
use std::sync::Once;

use kiomap::{AttachOptions, Engine, Error, Kiobuf, OpenWay, Region, Residency, Revoke, Shutdown, Vmap, page_size};
use nix::errno::Errno;
use nix::sys::mman::{MlockAllFlags, mlockall, munlockall};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use support::raw::{mlock, populated};
use support::scene::{Told, at, child, sourced_pages};
use support::truth::{assert_count, assert_nobody_waits};
use support::{
    alone, assert_sigbus, engine_builder, eventually, holes, long, mark, open_descriptors, pages, read_page, reap_ok,
    settled_stats, tell, touch, vmap_mappings,
};

/// An engine that brings one page for one fault.
fn engine() -> Engine {
    engine_builder().fault_around_pages(1).build().unwrap()
}

/// The same, where the kernel's own faults are not served.
fn user_mode_only() -> Engine {
    engine_builder().fault_around_pages(1).open_ways(&[OpenWay::UserModeOnly]).build().unwrap()
}

fn publish(engine: &Engine, list: &Kiobuf, residency: Residency) -> Vmap {
    engine.vmap_builder(list).residency(residency).build().unwrap()
}

/// The pages that this process has locked, as the kernel counts them: those that are to come included.
fn locked_pages() -> usize {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmLck:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 1024 / page_size()
}

/// What the kernel says of a region in this process.
#[derive(Debug, Default, PartialEq, Eq)]
struct Smaps {
    rss: usize,
    /// Pages that are here and locked; a page that n processes have counts as the n-th part of one.
    locked: usize,
    /// The mapping is to be locked.
    lo: bool,
}

fn smaps(region: &Region) -> Smaps {
    let text = fs::read_to_string("/proc/self/smaps").unwrap();
    let (start, end) = (region.as_ptr() as usize, region.as_ptr() as usize + region.len_bytes());
    let (mut within, mut found) = (false, Smaps::default());
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap();
        if let Some((from, to)) = first.split_once('-') {
            let [from, to] = [from, to].map(|hex| usize::from_str_radix(hex, 16).unwrap());
            within = start <= from && to <= end;
        } else if within {
            let mut pages = || words.next().unwrap().parse::<usize>().unwrap() * 1024 / page_size();
            match first {
                "Rss:" => found.rss += pages(),
                "Locked:" => found.locked += pages(),
                "VmFlags:" => found.lo = words.any(|flag| flag == "lo"),
                _ => {}
            }
        }
    }
    found
}

/// Tells whether the kernel holds the page at an address as locked; `None` where only a privileged user may know.
fn is_mlocked(addr: *const u8) -> Option<bool> {
    const PRESENT: u64 = 1 << 63;
    const FRAME: u64 = (1 << 55) - 1;
    const MLOCKED: u64 = 1 << 33;
    let word = |path: &str, index: u64| {
        let mut word = [0; 8];
        fs::File::open(path).ok()?.read_exact_at(&mut word, index * 8).ok()?;
        Some(u64::from_ne_bytes(word))
    };
    let entry = word("/proc/self/pagemap", (addr as usize / page_size()) as u64)?;
    assert_ne!(entry & PRESENT, 0, "nothing is mapped at {addr:?}");
    // Frames are shown as zero to the others.
    let frame = Some(entry & FRAME).filter(|&frame| frame != 0)?;
    Some(word("/proc/kpageflags", frame)? & MLOCKED != 0)
}

/// Fails unless the kernel holds the page as locked, or does not; says so if it does not tell.
#[track_caller]
fn assert_mlocked(addr: *const u8, expected: bool) {
    match is_mlocked(addr) {
        Some(mlocked) => assert_eq!(mlocked, expected),
        None => {
            static TOLD: Once = Once::new();
            TOLD.call_once(|| tell("the flags of pages are skipped, because this user may not see them"));
        }
    }
}

/// Sets what this process may lock; without CAP_IPC_LOCK, which would lift the limit. A file of one thread: the calling one.
fn allow_locking(nr_pages: usize) {
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    const VERSION_3: u32 = 0x2008_0522;
    const CAP_IPC_LOCK: u32 = 14;
    let mut header = Header { version: VERSION_3, pid: 0 };
    // Effective, permitted, inheritable; twice.
    let mut sets = [[0u32; 3]; 2];
    // SAFETY: reads the sets of this thread into memory of their size.
    let read = unsafe { libc::syscall(libc::SYS_capget, &raw mut header, sets.as_mut_ptr()) };
    Errno::result(read).unwrap();
    sets[0][0] &= !(1 << CAP_IPC_LOCK);
    // SAFETY: takes a capability from this thread.
    let written = unsafe { libc::syscall(libc::SYS_capset, &raw mut header, sets.as_ptr()) };
    Errno::result(written).unwrap();
    let (_, hard) = getrlimit(Resource::RLIMIT_MEMLOCK).unwrap();
    let bytes = (nr_pages * page_size()) as u64;
    setrlimit(Resource::RLIMIT_MEMLOCK, bytes.min(hard), hard).unwrap();
}

fn advise(addr: *mut u8, nr_pages: usize, advice: i32) -> nix::Result<()> {
    // SAFETY: the range lies in a region, to whose pages no Rust reference exists.
    Errno::result(unsafe { libc::madvise(addr.cast(), nr_pages * page_size(), advice) }).map(drop)
}

fn mlock_on_fault(addr: *mut u8, nr_pages: usize) -> nix::Result<()> {
    // SAFETY: changes no byte.
    Errno::result(unsafe { libc::mlock2(addr.cast(), nr_pages * page_size(), libc::MLOCK_ONFAULT) }).map(drop)
}

fn munlock(addr: *mut u8, nr_pages: usize) {
    // SAFETY: changes no byte.
    Errno::result(unsafe { libc::munlock(addr.cast(), nr_pages * page_size()) }).unwrap();
}

#[track_caller]
fn assert_marks(region: &Region, pages: std::ops::Range<u64>) {
    pages.for_each(|page| assert_eq!(read_page(region, page), Ok(mark(page)), "page {page}"));
}

/// T62, B8, B9: a locked region brings no page; each is locked when it comes. The same holds in a child, in a grandchild and
/// for a child's own attach, each within its own account, and a detach gives the account back.
#[test]
fn pages_are_locked_as_they_come_in_every_process() {
    alone("pages_are_locked_as_they_come_in_every_process", || {
        let engine = engine();
        let vmap = publish(&engine, &pages(16), Residency::Locked);
        assert_eq!(vmap.residency(), Residency::Locked);
        let before = locked_pages();
        let region = vmap.attach(&long(18)).unwrap();
        assert!(region.is_locked());
        assert_eq!(locked_pages(), before + 18);
        assert_eq!(smaps(&region), Smaps { rss: 0, locked: 0, lo: true });
        assert_eq!(settled_stats(&engine).faults, 0);
        assert_marks(&region, 3..6);
        assert_eq!(smaps(&region), Smaps { rss: 3, locked: 3, lo: true });
        (3..6).for_each(|page| assert_mlocked(at(&region, page), true));
        assert_eq!(settled_stats(&engine).pages_copied, 3);
        assert_sigbus(&region, 16);
        assert_count(&engine, &vmap, 1);

        let (attached, seen) = (Told::new(), Told::new());
        let process = child(|| {
            assert_eq!(locked_pages(), 18);
            assert!(region.is_locked());
            assert!(smaps(&region).lo);
            assert_marks(&region, 8..10);
            (8..10).for_each(|page| assert_mlocked(at(&region, page), true));
            let another = vmap.attach(&long(2)).unwrap();
            assert!(another.is_locked());
            assert_eq!(locked_pages(), 20);
            attached.tell(1);
            seen.wait_for(1);
            reap_ok(child(|| {
                assert_eq!(locked_pages(), 20);
                assert!(region.is_locked() && another.is_locked());
                assert!(smaps(&region).lo && smaps(&another).lo);
                assert_marks(&region, 0..16);
            }));
            drop(another);
            assert_eq!(locked_pages(), 18);
            assert_marks(&region, 0..16);
        });
        attached.wait_for(1);
        assert_count(&engine, &vmap, 3);
        seen.tell(1);
        reap_ok(process);
        assert_count(&engine, &vmap, 1);
        assert_marks(&region, 0..16);
        assert_eq!(locked_pages(), before + 18);
        let region = Cell::new(Some(region));
        reap_ok(child(|| {
            drop(region.take());
            assert_eq!(locked_pages(), 0);
        }));
        assert_count(&engine, &vmap, 1);
        drop(region.take());
        assert_eq!(locked_pages(), before);
        assert_count(&engine, &vmap, 0);
        assert_eq!(settled_stats(&engine).lock_downgrades, 0);
    });
}

/// B8, B39: unless asked for, nothing is locked.
#[test]
fn a_vmap_is_swappable_unless_it_is_built_otherwise() {
    alone("a_vmap_is_swappable_unless_it_is_built_otherwise", || {
        let engine = engine();
        let vmap = engine.vmap(&pages(4)).unwrap();
        assert_eq!(vmap.residency(), Residency::Swappable);
        let before = locked_pages();
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        assert_marks(&region, 0..4);
        let look = || {
            assert!(!region.is_locked());
            assert_eq!((smaps(&region).lo, smaps(&region).locked), (false, 0));
            assert_mlocked(at(&region, 0), false);
        };
        look();
        assert_eq!(locked_pages(), before);
        reap_ok(child(|| {
            assert_marks(&region, 0..4);
            look();
            assert_eq!(locked_pages(), 0);
        }));
        assert_eq!(settled_stats(&engine).lock_downgrades, 0);
        assert_count(&engine, &vmap, 1);
    });
}

/// B39: a page that came without a region is not locked, until a locked region shows it.
#[test]
fn a_page_that_came_without_a_region_is_locked_when_it_is_mapped() {
    alone("a_page_that_came_without_a_region_is_locked_when_it_is_mapped", || {
        let engine = engine();
        let vmap = publish(&engine, &sourced_pages(8), Residency::Locked);
        let before = locked_pages();
        vmap.read_at(0, &mut vec![0; 8 * page_size()]).unwrap();
        assert_eq!(locked_pages(), before);
        let copied = settled_stats(&engine).pages_copied;
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        assert_eq!(smaps(&region), Smaps { rss: 0, locked: 0, lo: true });
        assert_marks(&region, 0..8);
        // Where they were filled they are mapped a second time.
        assert_eq!(smaps(&region), Smaps { rss: 8, locked: 4, lo: true });
        (0..8).for_each(|page| assert_mlocked(at(&region, page), true));
        assert_eq!(settled_stats(&engine).pages_copied, copied);
        // Nor is one that a shutdown fills.
        engine.shutdown(Shutdown::Fill).unwrap();
        assert_eq!(locked_pages(), before + 8);
    });
}

/// What a refused attach must leave as it was.
fn state(engine: &Engine) -> (usize, usize, Vec<String>, usize, String) {
    engine.settle().unwrap();
    let snapshot = engine.snapshot().unwrap().to_string();
    (locked_pages(), open_descriptors(), vmap_mappings(), engine.spaces().unwrap().len(), snapshot)
}

#[track_caller]
fn assert_refused(refused: Error, len: usize, limit: usize, errno: Errno) {
    assert_eq!(refused.errno(), errno, "{refused}");
    let text = refused.to_string();
    for part in ["RLIMIT_MEMLOCK", "ulimit -l", "CAP_IPC_LOCK", &(limit * page_size()).to_string()] {
        assert!(text.contains(part), "no {part} in: {text}");
    }
    let Error::MemoryLock { len: said, limit: allowed, .. } = refused else { panic!("{refused}") };
    assert_eq!((said, allowed), (len * page_size(), (limit * page_size()) as u64));
}

/// T24, T62, B10: an attach that may not be locked is refused as a whole, in a child too, and fits again when there is room.
#[test]
fn a_locked_attach_over_the_limit_leaves_everything_as_it_was() {
    alone("a_locked_attach_over_the_limit_leaves_everything_as_it_was", || {
        let engine = engine();
        let vmap = publish(&engine, &pages(6), Residency::Locked);
        vmap.set_on_deref(|_| panic!("nothing was detached"));
        allow_locking(8);
        let refused_here = |why: Errno, limit| {
            let before = state(&engine);
            for refused in [
                vmap.attach(&AttachOptions::new()).unwrap_err(),
                vmap.attach_with(&AttachOptions::new(), |_| panic!("no attach")).unwrap_err(),
            ] {
                assert_refused(refused, 6, limit, why);
            }
            assert_eq!(state(&engine), before);
        };
        // What counts is the length of the region, not that of the list.
        assert_refused(vmap.attach(&long(9)).unwrap_err(), 9, 8, Errno::ENOMEM);
        assert_count(&engine, &vmap, 0);
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        assert!(region.is_first() && region.is_locked());
        refused_here(Errno::ENOMEM, 8);
        assert_count(&engine, &vmap, 1);
        let (refused, seen) = (Told::new(), Told::new());
        let process = child(|| {
            for _ in 0..2 {
                let before = (locked_pages(), open_descriptors(), vmap_mappings());
                assert_refused(vmap.attach(&AttachOptions::new()).unwrap_err(), 6, 8, Errno::ENOMEM);
                assert_eq!((locked_pages(), open_descriptors(), vmap_mappings()), before);
            }
            assert!(vmap.attach(&long(2)).unwrap().is_locked());
            assert_marks(&region, 0..6);
            refused.tell(1);
            seen.wait_for(1);
        });
        refused.wait_for(1);
        assert_count(&engine, &vmap, 2);
        seen.tell(1);
        reap_ok(process);
        // Without any allowance the kernel says EPERM.
        allow_locking(0);
        refused_here(Errno::EPERM, 0);
        allow_locking(8);
        assert_marks(&region, 0..6);
        assert_count(&engine, &vmap, 1);
        vmap.clear_on_deref();
        drop(region);
        assert!(vmap.attach(&AttachOptions::new()).unwrap().is_locked());
        assert_eq!(settled_stats(&engine).lock_downgrades, 0);
        assert_eq!(settled_stats(&engine).panics, 0);
    });
}

/// T24, T78: where the application has all future memory locked, a region that does not fit is refused by the kernel's own
/// answer, whatever the vmap's residency.
#[test]
fn an_attach_over_the_limit_is_refused_where_all_memory_is_locked() {
    alone("an_attach_over_the_limit_is_refused_where_all_memory_is_locked", || {
        let engine = engine();
        for residency in [Residency::Swappable, Residency::Locked, Residency::LockedIfAllowed] {
            let vmap = publish(&engine, &pages(6), residency);
            eventually("the end of the vmap before", || engine.snapshot().unwrap().vmaps.len() == 1);
            let before = state(&engine);
            allow_locking(256);
            mlockall(MlockAllFlags::MCL_FUTURE).unwrap();
            let refused = vmap.attach(&long(257)).unwrap_err();
            let after = state(&engine);
            let attached = vmap.attach(&long(8));
            munlockall().unwrap();
            assert_refused(refused, 257, 256, Errno::EAGAIN);
            assert_eq!(after, before);
            assert_marks(&attached.unwrap(), 0..6);
            assert_count(&engine, &vmap, 0);
        }
    });
}

/// T62, B9: a child that may not lock what it inherits has none of it, knows why, and is not counted.
#[test]
fn a_child_that_may_not_lock_its_areas_has_none() {
    alone("a_child_that_may_not_lock_its_areas_has_none", || {
        let engine = engine();
        let vmap = publish(&engine, &pages(6), Residency::Locked);
        let swappable = engine.vmap(&pages(2)).unwrap();
        let other = swappable.attach(&AttachOptions::new()).unwrap();
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        assert_marks(&region, 0..2);
        allow_locking(5);
        let (told, seen) = (Told::new(), Told::new());
        let process = child(|| {
            let lost = region.check().unwrap_err();
            assert!(matches!(&lost, Error::NotInherited { why } if why.contains("RLIMIT_MEMLOCK")), "{lost}");
            assert!(other.check().is_err() && !region.is_locked());
            assert_eq!(locked_pages(), 0);
            assert_eq!(vmap_mappings(), Vec::<String>::new());
            for page in 0..6 {
                assert!(touch::read(at(&region, page)).is_err_and(|refused| refused.is_sigsegv()));
            }
            told.tell(1);
            seen.wait_for(1);
        });
        told.wait_for(1);
        assert_count(&engine, &vmap, 1);
        assert_count(&engine, &swappable, 1);
        seen.tell(1);
        reap_ok(process);
        allow_locking(6);
        reap_ok(child(|| {
            assert!(region.is_locked());
            assert_marks(&region, 0..6);
        }));
        assert_count(&engine, &vmap, 1);
        assert_marks(&region, 0..6);
    });
}

/// T62, B10: what is to be locked if allowed is attached in any case; what is not locked says so, and is counted, in
/// whatever process.
#[test]
fn a_downgrade_is_reported() {
    alone("a_downgrade_is_reported", || {
        let engine = engine();
        let vmap = publish(&engine, &pages(6), Residency::LockedIfAllowed);
        allow_locking(8);
        let before = locked_pages();
        let regions = [&AttachOptions::new(); 2].map(|options| vmap.attach(options).unwrap());
        assert_eq!(regions.each_ref().map(Region::is_locked), [true, false]);
        assert_eq!(regions.each_ref().map(|region| smaps(region).lo), [true, false]);
        assert_eq!(locked_pages(), before + 6);
        assert_eq!(settled_stats(&engine).lock_downgrades, 1);
        let (told, seen) = (Told::new(), Told::new());
        let process = child(|| {
            // One of them fits.
            assert_eq!(locked_pages(), 6);
            let locked = regions.each_ref().map(Region::is_locked);
            assert_ne!(locked[0], locked[1]);
            assert_eq!(regions.each_ref().map(|region| smaps(region).lo), locked);
            let another = vmap.attach(&AttachOptions::new()).unwrap();
            assert!(!another.is_locked() && !smaps(&another).lo);
            regions.iter().chain([&another]).for_each(|region| assert_marks(region, 0..6));
            told.tell(1);
            seen.wait_for(1);
        });
        told.wait_for(1);
        assert_count(&engine, &vmap, 5);
        assert_eq!(settled_stats(&engine).lock_downgrades, 3);
        seen.tell(1);
        reap_ok(process);
        allow_locking(0);
        reap_ok(child(|| {
            assert!(regions.iter().all(|region| !region.is_locked() && !smaps(region).lo && region.check().is_ok()));
            assert_eq!(locked_pages(), 0);
            regions.iter().for_each(|region| assert_marks(region, 0..6));
        }));
        assert_count(&engine, &vmap, 2);
        assert_eq!(settled_stats(&engine).lock_downgrades, 5);
        // What a process has locked stays locked there.
        assert_eq!(locked_pages(), before + 6);
        let third = vmap.attach(&AttachOptions::new()).unwrap();
        assert!(!third.is_locked());
        assert_eq!(settled_stats(&engine).lock_downgrades, 6);
        assert_count(&engine, &vmap, 3);
    });
}

/// T46, T48, U22: what would drop or swap out a locked page is refused by the kernel; MADV_DONTNEED_LOCKED takes the
/// mapping and not the bytes, and the engine's own revoke takes locked pages too.
#[test]
fn advice_on_a_locked_region_loses_no_byte() {
    alone("advice_on_a_locked_region_loses_no_byte", || {
        let engine = engine();
        let vmap = publish(&engine, &pages(8), Residency::Locked);
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        touch::write(at(&region, 1), 77).unwrap();
        assert_marks(&region, 2..4);
        for advice in [libc::MADV_DONTNEED, libc::MADV_PAGEOUT, libc::MADV_REMOVE] {
            assert_eq!(advise(at(&region, 0), 8, advice), Err(Errno::EINVAL), "{advice}");
            assert_eq!(smaps(&region), Smaps { rss: 3, locked: 3, lo: true });
        }
        advise(at(&region, 0), 8, libc::MADV_DONTNEED_LOCKED).unwrap();
        assert_eq!(smaps(&region), Smaps { rss: 0, locked: 0, lo: true });
        assert_eq!(touch::read(at(&region, 1)), Ok(77));
        assert_marks(&region, 2..8);
        assert_eq!(settled_stats(&engine).pages_copied, 7);
        vmap.revoke(Revoke::Hard).unwrap();
        assert_eq!(smaps(&region), Smaps { rss: 0, locked: 0, lo: true });
        (0..8).for_each(|page| assert_sigbus(&region, page));
        assert_count(&engine, &vmap, 1);
    });
}

/// B9: the application may unlock a region in its process, which concerns no other: a child's is locked again. A region that
/// is moved, or is one of several pieces, stays as it was.
#[test]
fn unlocking_concerns_one_process() {
    alone("unlocking_concerns_one_process", || {
        let engine = engine();
        let vmap = publish(&engine, &pages(8), Residency::Locked);
        let before = locked_pages();
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        munlock(at(&region, 2), 4);
        assert_eq!(locked_pages(), before + 4);
        assert_marks(&region, 0..8);
        assert_mlocked(at(&region, 1), true);
        assert_mlocked(at(&region, 3), false);
        reap_ok(child(|| {
            assert_eq!(locked_pages(), 8);
            assert!(region.is_locked());
            assert_marks(&region, 0..8);
            assert_mlocked(at(&region, 3), true);
        }));
        // In pieces: the middle is gone.
        // SAFETY: two pages of the region, to which no Rust reference exists.
        Errno::result(unsafe { libc::munmap(at(&region, 3).cast(), 2 * page_size()) }).unwrap();
        assert_eq!(locked_pages(), before + 4);
        assert_count(&engine, &vmap, 2);
        reap_ok(child(|| assert_eq!(locked_pages(), 6)));
        let elsewhere = populated(0, 2) as *mut libc::c_void;
        let (from, len) = (at(&region, 0).cast(), 2 * page_size());
        // SAFETY: moves two pages of the region to where this test has mapped two of its own.
        let moved = unsafe { libc::mremap(from, len, len, libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED, elsewhere) };
        assert_eq!(moved, elsewhere);
        assert_eq!(locked_pages(), before + 4);
        for page in 0..2 {
            assert_eq!(touch::read(moved.cast::<u8>().wrapping_add(page * page_size())), Ok(mark(page as u64)));
        }
        drop(region);
        assert_eq!(locked_pages(), before);
        assert_count(&engine, &vmap, 0);
    });
}

/// T77, B8: an application that locks or populates a region whose tail can't be had gets an error and the pages before it;
/// MLOCK_ONFAULT brings nothing and succeeds. Where the kernel's faults are not served, it gets the error alone.
#[test]
fn locking_and_populating_over_a_tail_is_an_error() {
    alone("locking_and_populating_over_a_tail_is_an_error", || {
        let both = [Residency::Swappable, Residency::Locked];
        for (open, residency) in
            [engine, user_mode_only].iter().flat_map(|open| both.map(|residency| (open, residency)))
        {
            let engine: Engine = open();
            let served = engine.open_way().serves_kernel_faults();
            // Two pages past the end; a hole and a page past it.
            let holed = Kiobuf::concat(&[pages(6), holes(1)]).unwrap();
            for list in [pages(6), sourced_pages(6), holed] {
                for what in ["mlock", "mlock2", "MADV_POPULATE_READ", "MADV_POPULATE_WRITE"] {
                    let vmap = publish(&engine, &list, residency);
                    let region = vmap.attach(&long(8)).unwrap();
                    let start = at(&region, 0);
                    let outcome = match what {
                        "mlock" => mlock(start, 8),
                        "mlock2" => mlock_on_fault(start, 8),
                        "MADV_POPULATE_READ" => advise(start, 8, libc::MADV_POPULATE_READ),
                        _ => advise(start, 8, libc::MADV_POPULATE_WRITE),
                    };
                    let told = format!("{what}, {residency:?}, {}: {outcome:?}", engine.open_way());
                    let here = match (what, residency) {
                        ("mlock2", _) => {
                            assert_eq!(outcome, Ok(()), "{told}");
                            0
                        }
                        ("mlock", _) => {
                            assert_eq!(outcome, Err(Errno::ENOMEM), "{told}");
                            6 * usize::from(served)
                        }
                        _ => {
                            assert!(matches!(outcome, Err(Errno::EFAULT | Errno::EHWPOISON)), "{told}");
                            6 * usize::from(served)
                        }
                    };
                    assert_eq!(smaps(&region).rss, here, "{told}");
                    assert_marks(&region, 0..6);
                    (6..8).for_each(|page| assert_sigbus(&region, page));
                    assert_nobody_waits(&engine);
                    assert_count(&engine, &vmap, 1);
                    munlock(start, 8);
                }
            }
        }
    });
}

/// T78, U22: with all future memory locked, and neighbours that are populated, an attach brings no page and no zero page is
/// ever seen: not here, not in a child, not by another attach.
#[test]
fn locking_all_memory_makes_no_zero_page() {
    alone("locking_all_memory_makes_no_zero_page", || {
        let all = [MlockAllFlags::MCL_FUTURE, MlockAllFlags::MCL_FUTURE | ON_FAULT];
        let residencies = [Residency::Swappable, Residency::Locked, Residency::LockedIfAllowed];
        for (flags, residency) in all.into_iter().flat_map(|flags| residencies.map(|residency| (flags, residency))) {
            for (list, engine) in [(pages(24), engine()), (sourced_pages(24), engine()), (pages(24), user_mode_only())]
            {
                let vmap = publish(&engine, &list, residency);
                mlockall(flags).unwrap();
                let region = vmap.attach(&long(25)).unwrap();
                let neighbours = [at(&region, 25) as usize, at(&region, 0) as usize - page_size()];
                for addr in neighbours {
                    populated(addr, 1);
                }
                assert_eq!(settled_stats(&engine).faults, 0, "{flags:?}");
                assert_eq!(smaps(&region), Smaps { rss: 0, locked: 0, lo: true });
                assert_marks(&region, 0..8);
                reap_ok(child(|| {
                    mlockall(flags).unwrap();
                    let another = vmap.attach(&AttachOptions::new()).unwrap();
                    assert_marks(&another, 8..12);
                    assert_marks(&region, 4..16);
                }));
                let another = vmap.attach(&AttachOptions::new()).unwrap();
                munlockall().unwrap();
                assert_marks(&another, 0..24);
                assert_marks(&region, 0..24);
                assert_sigbus(&region, 24);
                assert_nobody_waits(&engine);
                assert_count(&engine, &vmap, 2);
            }
        }
    });
}

/// As nix names it not.
const ON_FAULT: MlockAllFlags = MlockAllFlags::from_bits_retain(libc::MCL_ONFAULT);

/// T78: locking all present memory brings what can be had, past what can't, or nothing where the kernel's faults are not
/// served.
#[test]
fn locking_what_is_mapped_makes_no_zero_page() {
    alone("locking_what_is_mapped_makes_no_zero_page", || {
        let engine = engine();
        let vmap = engine.vmap(&pages(8)).unwrap();
        let region = vmap.attach(&long(10)).unwrap();
        match mlockall(MlockAllFlags::MCL_CURRENT) {
            Ok(()) => {
                let expected = if engine.open_way().serves_kernel_faults() { 8 } else { 0 };
                assert_eq!(smaps(&region).rss, expected);
            }
            // A user without privileges may lock little.
            Err(errno) => assert_eq!(errno, Errno::ENOMEM),
        }
        munlockall().unwrap();
        assert_marks(&region, 0..8);
        (8..10).for_each(|page| assert_sigbus(&region, page));
        assert_nobody_waits(&engine);
        assert_count(&engine, &vmap, 1);
    });
}
