//! Where pages of a vmap are filled without a region.
//!
//! Filling through `pwrite` would race with a fault: between "is it missing?" and the write, the page may have been
//! installed and changed. UFFDIO_COPY is atomic (EEXIST when the page is there), so pages are filled through it, onto
//! a mapping that nobody can touch: PROT_NONE, with a userfaultfd of its own that reports no events. That it reports
//! none has another use: while an address space is changing, the kernel installs nothing through the userfaultfd that
//! reports the change (EAGAIN), for as long as somebody goes on changing; through this one it does.

use std::cell::Cell;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::OnceLock;

use memmap2::MmapMut;
use nix::unistd::{Whence, lseek};

use super::object::Object;
use super::page_size::PageSize;
use super::readable::Readable;
use crate::kiobuf::{Kiobuf, Nopage};
use crate::page::page_size;
use crate::process::ledger::Private;
use crate::process::mapping::{Mapping, Placement};
use crate::sys::{Features, Install, Opener, Stop, Userfault};
use crate::{Error, Result};

/// Pages composed at once when they can't be copied straight from memory.
const BOUNCE_PAGES: u64 = 64;

/// A mapping of a whole vmap for filling it. It never changes: a vmap that grows gets another.
#[derive(Debug)]
pub(crate) struct Window {
    /// Declared before the descriptor: unmapping comes before closing, which would unregister.
    mapping: Mapping,
    uffd: Private<Userfault>,
    /// Base pages, of whole pages.
    nr_pages: u64,
    pub(super) page: PageSize,
    /// Made when pages of the vmap are first wanted elsewhere than in its mappings.
    readable: OnceLock<Readable>,
}

impl Window {
    /// Opens a window on an object of `nr_pages` pages, or one that is about to grow to them.
    pub(crate) fn open(opener: &Opener, object: &Object, nr_pages: u64) -> Result<Window> {
        let (page, size) = (page_size(), object.page());
        let uffd = Private::open(|| opener.open(Features::from_bits(0)).map(|(uffd, _)| uffd))?;
        let overflow = || Error::Overflow { what: "the size of a vmap in pages", base: nr_pages, len: page as u64 };
        let whole = size.whole(nr_pages).ok_or_else(overflow)?;
        let len = usize::try_from(whole).ok().and_then(|n| n.checked_mul(page)).ok_or_else(overflow)?;
        // Of huge pages, it is the one mapping that reserves them.
        let mapping =
            Mapping::hidden(object.memfd(), len, object.base(), Placement::Anywhere).map_err(|error| match error {
                Error::Sys { errno, .. } if size.is_huge() => size.not_to_be_had((len / size.bytes()) as u64, errno),
                error => error,
            })?;
        uffd.register_missing(mapping.addr(), len).map_err(Error::sys("UFFDIO_REGISTER for filling a vmap"))?;
        Ok(Window { mapping, uffd, nr_pages: whole, page: size, readable: OnceLock::new() })
    }

    /// Sees to it that the bytes of resident pages can be read.
    pub(crate) fn make_readable(&self, opener: &Opener, object: &Object) -> Result<()> {
        if self.readable.get().is_none() {
            // If another thread was faster, this one is dropped.
            let _ = self.readable.set(Readable::open(opener, object, self.nr_pages)?);
        }
        Ok(())
    }

    /// Where the bytes of resident pages are read, if that was seen to.
    pub(crate) fn readable(&self) -> Option<&Readable> {
        self.readable.get()
    }

    /// The addresses that it takes.
    pub(crate) fn range(&self) -> Range<usize> {
        self.mapping.addr()..self.mapping.addr() + self.mapping.len()
    }

    /// The address of a page here.
    fn page_at(&self, pgoff: u64) -> usize {
        self.mapping.addr() + pgoff as usize * page_size()
    }

    /// Fills missing pages from `pgoff` on with bytes from `src`.
    ///
    /// # Safety
    ///
    /// `len` bytes can be read at `src`.
    pub(crate) unsafe fn copy(&self, pgoff: u64, src: *const u8, len: usize) -> Install {
        debug_assert!(pgoff < self.nr_pages);
        // SAFETY: the source is the caller's promise; the destination is this window, of which no Rust value is a part.
        unsafe { self.uffd.copy(self.page_at(pgoff), src, len) }
    }

    /// Fills missing pages from `pgoff` on with zeros.
    pub(crate) fn zeropage(&self, pgoff: u64, len: usize) -> Install {
        self.uffd.zeropage(self.page_at(pgoff), len)
    }

    /// Tells whether the object holds a page, by mapping it here.
    pub(crate) fn holds(&self, pgoff: u64) -> bool {
        let addr = self.page.floor(self.page_at(pgoff));
        pgoff < self.nr_pages
            && matches!(self.uffd.r#continue(addr, self.page.bytes()).stop, None | Some(Stop::Present))
    }

    /// Maps a page of the object at an address of this process that is registered, whatever its address space is doing. It
    /// wakes nobody. Other memory is left as it is.
    pub(crate) fn map_at(&self, addr: usize) -> Install {
        self.uffd.r#continue(addr, self.page.bytes())
    }

    /// Looks which pages from `pgoff` on are in memory, as far as one answer tells: lseek(SEEK_HOLE) would look at all that
    /// follow, however many. A page that is swapped out is not.
    fn in_memory(&self, pgoff: u64, end: u64) -> impl Iterator<Item = bool> {
        let mut there = [0u8; 512];
        let pages = (end.min(self.nr_pages).saturating_sub(pgoff)).min(there.len() as u64) as usize;
        // SAFETY: mincore(2) writes a byte for each of the pages, which lie in this window, to `there`.
        let answer =
            unsafe { libc::mincore(self.page_at(pgoff) as *mut libc::c_void, pages * page_size(), there.as_mut_ptr()) };
        let pages = if answer == 0 { pages } else { 0 };
        there.into_iter().take(pages).map(|page| page & 1 == 1)
    }

    /// Says how many pages from `pgoff` on are there already, if an ioctl that begins there found the first to be: at least
    /// that one.
    fn present(&self, install: Install, pgoff: u64, end: u64) -> Option<u64> {
        let present = install.bytes == 0 && install.stop == Some(Stop::Present);
        present.then(|| self.in_memory(pgoff, end).take_while(|&there| there).count().max(1) as u64)
    }

    /// Walks over the pages of a range that the object holds, in runs.
    pub(crate) fn resident(&self, object: &Object, pages: Range<u64>) -> impl Iterator<Item = Range<u64>> {
        let (mut at, end) = (pages.start, pages.end.min(self.nr_pages));
        std::iter::from_fn(move || {
            if self.page.is_huge() {
                // Of these, lseek says that all are data, and mincore only whether they are mapped here.
                let page = |at: u64| self.page_end(at).min(end);
                while at < end && !self.holds(at) {
                    at = page(at);
                }
                let start = at;
                while at < end && self.holds(at) {
                    at = page(at);
                }
                return (start < at).then_some(start..at);
            }
            loop {
                // Looking with lseek would move the position of whoever else has the descriptor.
                let sought = if object.is_shared() { Some(at) } else { next_resident(object, at) };
                let start = sought.filter(|&start| start < end)?;
                let run = self.in_memory(start, end).take_while(|&there| there).count() as u64;
                // What lseek has found and is not in memory is swapped out.
                let run = if object.is_shared() { run } else { run.max(1) };
                if run > 0 {
                    at = start + run;
                    return Some(start..at);
                }
                at = start + self.in_memory(start, end).take_while(|&there| !there).count().max(1) as u64;
            }
        })
    }

    /// Fills the missing pages of `first..end`; present ones stay as they are.
    ///
    /// # Errors
    ///
    /// [`Error::NoPage`] at the first page that can't be had; those before it are filled.
    pub(crate) fn fill(&self, list: &Kiobuf, object: &Object, first: u64, end: u64) -> Result<()> {
        if self.page.is_huge() {
            return self.fill_huge(list, first, end);
        }
        let page = page_size() as u64;
        let mut bounce: Option<MmapMut> = None;
        let mut pgoff = first;
        // Up to here pages are read one by one: together they failed.
        let mut alone_until = first;
        while pgoff < end {
            let done = match list.nopage(pgoff) {
                Nopage::Direct { src, run } => {
                    let pages = run.end.min(end) - pgoff;
                    let src = src.wrapping_add(((pgoff - run.start) * page) as usize);
                    // SAFETY: the list holds `pages` whole pages at `src` and keeps them alive.
                    let install = unsafe { self.copy(pgoff, src, (pages * page) as usize) };
                    self.present(install, pgoff, end).map_or_else(|| progress(install, pgoff, pages), Ok)?
                }
                Nopage::Read { run, .. } => {
                    // What is there is not read again.
                    let missing_until = next_resident(object, pgoff).unwrap_or(end);
                    if missing_until == pgoff {
                        pgoff += 1;
                        continue;
                    }
                    let most = if pgoff < alone_until { 1 } else { BOUNCE_PAGES };
                    let pages = (run.end.min(end).min(missing_until) - pgoff).min(most);
                    let bytes = (pages * page) as usize;
                    let buffer = match &mut bounce {
                        Some(buffer) => buffer,
                        None => {
                            let buffer = MmapMut::map_anon(BOUNCE_PAGES as usize * page_size());
                            bounce.insert(buffer.map_err(Error::io("mmap of a bounce buffer"))?)
                        }
                    };
                    match read(list, pgoff, &mut buffer[..bytes]) {
                        Err(_) if pages > 1 => {
                            alone_until = pgoff + pages;
                            continue;
                        }
                        outcome => outcome?,
                    }
                    // SAFETY: `bytes` bytes of the bounce buffer, which the kernel only reads.
                    let install = unsafe { self.copy(pgoff, buffer.as_ptr(), bytes) };
                    progress(install, pgoff, pages)?
                }
                Nopage::Zero { run } => {
                    let pages = run.end.min(end) - pgoff;
                    let install = self.zeropage(pgoff, (pages * page) as usize);
                    self.present(install, pgoff, end).map_or_else(|| progress(install, pgoff, pages), Ok)?
                }
                Nopage::Sigbus(why) => return Err(Error::NoPage { pgoff, why: why.to_string() }),
            };
            pgoff += done;
        }
        Ok(())
    }
}

impl Window {
    /// The first base page after the page that a base page is a part of.
    pub(super) fn page_end(&self, pgoff: u64) -> u64 {
        self.page.first_of(pgoff) + self.page.base_pages()
    }
}

thread_local! {
    static READING: Cell<bool> = const { Cell::new(false) };
}

/// Tells whether the current thread is in the middle of reading pages for a window.
pub(super) fn is_reading() -> bool {
    READING.get()
}

/// Reads pages of a list on this thread; a panic of a page source is its failure.
pub(super) fn read(list: &Kiobuf, pgoff: u64, buf: &mut [u8]) -> Result<()> {
    READING.set(true);
    let outcome = catch_unwind(AssertUnwindSafe(|| list.read_pages(pgoff, buf)));
    READING.set(false);
    let why = match outcome {
        Ok(Ok(())) => return Ok(()),
        Ok(Err(failure)) => failure.to_string(),
        Err(_) => "its source panicked".into(),
    };
    Err(Error::NoPage { pgoff, why })
}

/// Tells whether the backing object holds a page already. Not for the fault-handling thread: it takes the object's lock.
pub(super) fn is_resident(object: &Object, window: &Window, pgoff: u64) -> bool {
    // Looking with lseek would move the position of whoever else has the descriptor, and of huge pages says that they are.
    if object.is_shared() || window.page.is_huge() {
        window.holds(pgoff)
    } else {
        next_resident(object, pgoff) == Some(pgoff)
    }
}

/// Finds the first page from `pgoff` on that the backing object holds.
fn next_resident(object: &Object, pgoff: u64) -> Option<u64> {
    debug_assert!(!object.is_shared(), "a shared object's position is not ours to move");
    let page = page_size() as u64;
    let offset = object.offset_of(pgoff).ok()? as i64;
    // ENXIO says that there is none.
    Some((lseek(object.memfd(), offset, Whence::SeekData).ok()? as u64 - object.base()) / page)
}

/// Says how many pages from `pgoff` on are present after an ioctl over `pages` pages. A page that stops it is either
/// there already, or tried again alone, where the kernel names the reason.
fn progress(install: Install, pgoff: u64, pages: u64) -> Result<u64> {
    let done = (install.bytes / page_size()) as u64;
    match install.stop {
        None => Ok(pages),
        Some(Stop::Present) => Ok(done + 1),
        Some(_) if done > 0 => Ok(done),
        Some(Stop::Changing) => Ok(0),
        Some(stop) => Err(Error::NoPage { pgoff, why: stop.to_string() }),
    }
}
