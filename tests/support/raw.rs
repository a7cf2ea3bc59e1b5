//! What code does that does not know the engine: raw system calls on the memory of a region; and the scenes in which it
//! does so, in the engine's own process and in a forked child.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use kiomap::{Engine, Kiobuf, Vmap, page_size};
use libc::c_void;
use nix::errno::Errno;

use super::scene::{Told, child};
use super::truth::assert_count;
use super::{alone, engine_builder, eventually, mark, pages, reap_ok, touch};

/// A vmap of [`pages`] in which nothing is resident, in one process.
pub(crate) struct Scene<'a> {
    pub(crate) vmap: &'a Vmap,
    count: &'a dyn Fn(usize),
}

impl Scene<'_> {
    /// Fails unless that many areas are counted, by the engine and by the kernel, and the callback was called as often as
    /// this was 0, and not before.
    pub(crate) fn count(&self, refcount: usize) {
        (self.count)(refcount);
    }
}

/// The child's message that its scene is over.
const OVER: u8 = 255;
/// The child's message that it failed.
const FAILED: u8 = 254;

/// Runs a scene, with a list of `nr_pages` pages each, in the engine's own process and in a forked child.
pub(crate) fn in_both(name: &str, nr_pages: u64, scene: impl Fn(&Scene<'_>)) {
    in_both_with(name, || pages(nr_pages), scene);
}

/// As [`in_both`], with a list of [`mark`]ed pages that `list` makes.
pub(crate) fn in_both_with(name: &str, list: impl Fn() -> Kiobuf, scene: impl Fn(&Scene<'_>)) {
    alone(name, || {
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        on_stage(&engine, &list(), |vmap, count| scene(&Scene { vmap, count }));
        on_stage(&engine, &list(), |vmap, count| {
            let (asked, answered) = (Told::new(), Told::new());
            let pid = child(|| {
                let count = |refcount| {
                    asked.tell(u8::try_from(refcount).unwrap());
                    answered.wait();
                };
                let outcome = catch_unwind(AssertUnwindSafe(|| scene(&Scene { vmap, count: &count })));
                asked.tell(if outcome.is_ok() { OVER } else { FAILED });
                outcome.unwrap();
            });
            loop {
                match asked.wait() {
                    OVER => break,
                    FAILED => panic!("in the child"),
                    refcount => count(refcount.into()),
                }
                answered.tell(0);
            }
            reap_ok(pid);
        });
        assert_eq!(engine.stats().panics, 0);
    });
}

fn on_stage(engine: &Engine, list: &Kiobuf, play: impl FnOnce(&Vmap, &dyn Fn(usize))) {
    let derefs = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&derefs);
    let on_deref = move |_: &Vmap| {
        counted.fetch_add(1, Ordering::SeqCst);
    };
    let vmap = engine.vmap_builder(list).on_deref(on_deref).build().unwrap();
    let (before, ends) = (AtomicUsize::new(0), AtomicUsize::new(0));
    play(&vmap, &|refcount| {
        assert_count(engine, &vmap, refcount);
        if refcount == 0 && before.swap(refcount, Ordering::SeqCst) != 0 {
            let due = ends.fetch_add(1, Ordering::SeqCst) + 1;
            eventually("the callback", || derefs.load(Ordering::SeqCst) >= due);
        }
        before.store(refcount, Ordering::SeqCst);
        assert_eq!(derefs.load(Ordering::SeqCst), ends.load(Ordering::SeqCst), "callbacks");
    });
}

/// Unmaps pages.
pub(crate) fn munmap(addr: *mut u8, nr_pages: usize) {
    // SAFETY: the tests unmap ranges to which nothing refers.
    assert_eq!(unsafe { libc::munmap(addr.cast(), nr_pages * page_size()) }, 0);
}

/// Maps memory that is not the engine's over `nr_pages` pages, and fills it.
pub(crate) fn foreign(addr: usize, nr_pages: usize, byte: u8) {
    let (len, access) = (nr_pages * page_size(), libc::PROT_READ | libc::PROT_WRITE);
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
    // SAFETY: the tests map over ranges to which nothing refers; the bytes written are those just mapped.
    unsafe {
        assert_eq!(libc::mmap(addr as *mut c_void, len, access, flags, -1, 0) as usize, addr);
        std::ptr::write_bytes(addr as *mut u8, byte, len);
    }
}

/// Moves, grows or shrinks pages; answers where they are.
#[track_caller]
pub(crate) fn mremap(from: usize, old_pages: usize, new_pages: usize, flags: i32, to: usize) -> usize {
    let (old, new) = (old_pages * page_size(), new_pages * page_size());
    // SAFETY: nothing refers to the ranges of the tests.
    let addr = unsafe { libc::mremap(from as *mut c_void, old, new, flags, to as *mut c_void) };
    assert_ne!(addr, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
    addr as usize
}

/// Changes the access to pages.
pub(crate) fn mprotect(addr: usize, nr_pages: usize, access: i32) {
    // SAFETY: nothing refers to the ranges of the tests.
    assert_eq!(unsafe { libc::mprotect(addr as *mut c_void, nr_pages * page_size(), access) }, 0);
}

/// How many mappings the kernel has in a range.
pub(crate) fn mappings(start: usize, end: usize) -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let inside = |line: &&str| {
        let first = line.split_once('-').map(|(first, _)| usize::from_str_radix(first, 16).unwrap());
        first.is_some_and(|first| (start..end).contains(&first))
    };
    maps.lines().filter(inside).count()
}

/// Fails unless the pages from `addr` on show these pages of the list.
#[track_caller]
pub(crate) fn assert_shows(addr: usize, pgoffs: std::ops::Range<u64>) {
    for (n, pgoff) in pgoffs.enumerate() {
        for offset in [0, 11, page_size() - 1] {
            let byte = touch::read((addr + n * page_size() + offset) as *const u8);
            assert_eq!(byte, Ok(mark(pgoff)), "page {pgoff}, byte {offset}, at {addr:#x} + {n}");
        }
    }
}

/// Fails unless each of these pages is SIGBUS.
#[track_caller]
pub(crate) fn assert_sigbus_pages(addr: usize, nr_pages: usize) {
    for n in 0..nr_pages {
        let byte = addr + n * page_size() + 11;
        let outcome = touch::read(byte as *const u8);
        assert!(outcome.is_err_and(|refused| refused.is_sigbus_at(byte)), "{addr:#x} + {n}: {outcome:?}");
    }
}

/// Fails unless nothing is mapped in these pages.
#[track_caller]
pub(crate) fn assert_gone(addr: usize, nr_pages: usize) {
    for n in 0..nr_pages {
        let outcome = touch::read((addr + n * page_size()) as *const u8);
        assert!(outcome.is_err_and(|refused| refused.is_sigsegv()), "{addr:#x} + {n}: {outcome:?}");
    }
}

/// Where the kernel puts nothing by itself: what is unmapped stays so.
pub(crate) const FAR: usize = 0x1000_0000_0000;

pub(crate) const ELSEWHERE: usize = 0x1000_4000_0000;

/// The address of page `n` from `base` on.
pub(crate) fn page(base: usize, n: u64) -> usize {
    base + n as usize * page_size()
}

/// An anonymous mapping that is populated as soon as it is made; at an address, if that is free.
pub(crate) fn populated(addr: usize, nr_pages: usize) -> usize {
    let (prot, len) = (libc::PROT_READ | libc::PROT_WRITE, nr_pages * page_size());
    let fixed = if addr == 0 { 0 } else { libc::MAP_FIXED_NOREPLACE };
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_POPULATE | fixed;
    // SAFETY: a new mapping that replaces nothing.
    let mapped = unsafe { libc::mmap(addr as *mut libc::c_void, len, prot, flags, -1, 0) };
    assert!(mapped != libc::MAP_FAILED || Errno::last() == Errno::EEXIST);
    mapped as usize
}

/// Locks pages in memory, as an application does.
pub(crate) fn mlock(addr: *mut u8, nr_pages: usize) -> nix::Result<()> {
    // SAFETY: changes no byte that is there.
    Errno::result(unsafe { libc::mlock(addr.cast(), nr_pages * page_size()) }).map(drop)
}
