//! Where pages of a vmap are filled without a region.
//!
//! Filling through `pwrite` would race with a fault: between "is it missing?" and the write, the page may have been
//! installed and changed. UFFDIO_COPY is atomic (EEXIST when the page is there), so pages are filled through it, onto
//! a mapping that nobody can touch: PROT_NONE, with a userfaultfd of its own that reports no events. That it reports
//! none has another use: while an address space is changing, the kernel installs nothing through the userfaultfd that
//! reports the change (EAGAIN), for as long as somebody goes on changing; through this one it does.

use std::cell::Cell;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};

use memmap2::MmapMut;
use nix::unistd::{Whence, lseek};

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
    nr_pages: u64,
}

impl Window {
    /// Opens a window on an object of `nr_pages` pages, or one that is about to grow to them.
    pub(crate) fn open(opener: &Opener, memfd: BorrowedFd<'_>, nr_pages: u64) -> Result<Window> {
        let page = page_size();
        let uffd = Private::open(|| opener.open(Features::from_bits(0)).map(|(uffd, _)| uffd))?;
        let len = usize::try_from(nr_pages).ok().and_then(|n| n.checked_mul(page)).ok_or(Error::Overflow {
            what: "the size of a vmap in pages",
            base: nr_pages,
            len: page as u64,
        })?;
        let mapping = Mapping::hidden(memfd, len, 0, Placement::Anywhere)?;
        uffd.register_missing(mapping.addr(), len).map_err(Error::sys("UFFDIO_REGISTER for filling a vmap"))?;
        Ok(Window { mapping, uffd, nr_pages })
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
        pgoff < self.nr_pages
            && matches!(self.uffd.r#continue(self.page_at(pgoff), page_size()).stop, None | Some(Stop::Present))
    }

    /// Fills the missing pages of `first..end`; present ones stay as they are.
    ///
    /// # Errors
    ///
    /// [`Error::NoPage`] at the first page that can't be had; those before it are filled.
    pub(crate) fn fill(&self, list: &Kiobuf, memfd: BorrowedFd<'_>, first: u64, end: u64) -> Result<()> {
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
                    progress(install, pgoff, pages)?
                }
                Nopage::Read { run, .. } => {
                    // What is there is not read again.
                    let missing_until = next_resident(memfd, pgoff).unwrap_or(end);
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
                    progress(self.zeropage(pgoff, (pages * page) as usize), pgoff, pages)?
                }
                Nopage::Sigbus(why) => return Err(Error::NoPage { pgoff, why: why.to_string() }),
            };
            pgoff += done;
        }
        Ok(())
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
fn read(list: &Kiobuf, pgoff: u64, buf: &mut [u8]) -> Result<()> {
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
pub(super) fn is_resident(memfd: BorrowedFd<'_>, pgoff: u64) -> bool {
    next_resident(memfd, pgoff) == Some(pgoff)
}

/// Finds the first page from `pgoff` on that the backing object holds.
fn next_resident(memfd: BorrowedFd<'_>, pgoff: u64) -> Option<u64> {
    let page = page_size() as u64;
    let offset = i64::try_from(pgoff.checked_mul(page)?).ok()?;
    // ENXIO says that there is none.
    Some(lseek(memfd, offset, Whence::SeekData).ok()? as u64 / page)
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
