//! The mapping of a part of a vmap: hidden first, registered, and only then revealed.
//!
//! Between `mmap` and UFFDIO_REGISTER a touch would fill the shared object with a zero page for everyone, and
//! `mlockall(MCL_FUTURE)` makes the kernel itself touch every page in `mmap`. A mapping that starts as PROT_NONE can't
//! be touched. It is not inherited over fork either: a child would have it without its registration.

use std::num::NonZeroUsize;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;

use nix::errno::Errno;
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, mmap_anonymous, mprotect, munmap};

use super::depth;
use crate::page::page_size;
use crate::{Error, Result};

/// Where a mapping shall lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Placement {
    /// Where the kernel likes.
    Anywhere,
    /// At this address or not at all.
    At(usize),
    /// In the place of a reservation that this thread has just made there ([`reserve`]).
    Reserved(usize),
}

/// A shared mapping; when dropped by the process that made it, it is unmapped, or becomes the reservation again that it
/// took the place of.
#[derive(Debug)]
pub(crate) struct Mapping {
    addr: usize,
    len: usize,
    /// A forked child has a copy of this value but not the mapping: its addresses may be anything there.
    depth: u32,
    from_reservation: bool,
}

impl Mapping {
    /// Maps `len` bytes of the object from byte `offset` on, with no access and not inherited over fork.
    pub(crate) fn hidden(memfd: BorrowedFd<'_>, len: usize, offset: u64, placement: Placement) -> Result<Mapping> {
        // Nothing is reserved for a memfd of base pages. MAP_NORESERVE would set these mappings apart from their masks.
        Mapping::map(memfd, len, offset, placement, MapFlags::empty())
    }

    /// As [`Mapping::hidden`], and reserves no huge pages.
    pub(crate) fn hidden_unreserved(
        memfd: BorrowedFd<'_>,
        len: usize,
        offset: u64,
        placement: Placement,
    ) -> Result<Mapping> {
        Mapping::map(memfd, len, offset, placement, MapFlags::MAP_NORESERVE)
    }

    fn map(memfd: BorrowedFd<'_>, len: usize, offset: u64, placement: Placement, reserve: MapFlags) -> Result<Mapping> {
        let Some(length) = NonZeroUsize::new(len) else {
            return Err(Error::Invalid { what: "the length of a mapping", value: 0, rule: "it must not be zero" });
        };
        let offset = libc::off_t::try_from(offset).map_err(|_| Error::Overflow {
            what: "the offset of a mapping",
            base: offset,
            len: len as u64,
        })?;
        let (hint, fixed) = match placement {
            Placement::Anywhere => (None, MapFlags::empty()),
            Placement::At(addr) => (NonZeroUsize::new(addr), MapFlags::MAP_FIXED_NOREPLACE),
            Placement::Reserved(addr) => (NonZeroUsize::new(addr), MapFlags::MAP_FIXED),
        };
        // SAFETY: nothing is replaced but a reservation, which holds nobody's memory.
        let mapped =
            unsafe { mmap(hint, length, ProtFlags::PROT_NONE, MapFlags::MAP_SHARED | reserve | fixed, memfd, offset) };
        let addr = match (mapped, placement) {
            (Ok(addr), _) => addr.as_ptr() as usize,
            (Err(Errno::EEXIST), Placement::At(addr)) => return Err(Error::AddressTaken { addr, len }),
            // The application has asked for all memory to be locked (MCL_FUTURE).
            (Err(Errno::EAGAIN), _) => return Err(Error::memory_lock(len, Errno::EAGAIN)),
            (Err(errno), _) => return Err(Error::sys("mmap of a vmap")(errno)),
        };
        let from_reservation = matches!(placement, Placement::Reserved(_));
        let mapping = Mapping { addr, len, depth: depth(), from_reservation };
        if let Placement::At(wanted) = placement
            && wanted != addr
        {
            // Kernels before 4.17 take the flag for a hint.
            return Err(Error::AddressTaken { addr: wanted, len });
        }
        // SAFETY: the range is the mapping just made.
        unsafe { madvise(mapping.pointer(), len, MmapAdvise::MADV_DONTFORK) }
            .map_err(Error::sys("madvise(MADV_DONTFORK)"))?;
        Ok(mapping)
    }

    /// Keeps the kernel from making this mapping one with a neighbour that goes on in the same object, until
    /// [`Mapping::join`]. What it advises matters to nobody: pages of a memfd are not read ahead.
    pub(crate) fn set_apart(&self) -> Result<()> {
        // SAFETY: changes no byte; the range is this mapping.
        unsafe { madvise(self.pointer(), self.len, MmapAdvise::MADV_RANDOM) }
            .map_err(Error::sys("madvise(MADV_RANDOM)"))
    }

    /// Ends what [`Mapping::set_apart`] began.
    pub(crate) fn join(&self) -> Result<()> {
        // SAFETY: changes no byte; the range is this mapping.
        unsafe { madvise(self.pointer(), self.len, MmapAdvise::MADV_NORMAL) }
            .map_err(Error::sys("madvise(MADV_NORMAL)"))
    }

    /// Has each page locked in memory when it comes; brings none.
    pub(crate) fn lock_on_fault(&self) -> std::result::Result<(), Errno> {
        // SAFETY: changes no byte; the range is this mapping.
        Errno::result(unsafe { libc::mlock2(self.pointer().as_ptr(), self.len, libc::MLOCK_ONFAULT) }).map(drop)
    }

    /// Gives the mapping its access, after it was registered.
    pub(crate) fn reveal(&self, writable: bool) -> Result<()> {
        let prot = if writable { ProtFlags::PROT_READ | ProtFlags::PROT_WRITE } else { ProtFlags::PROT_READ };
        // SAFETY: the range is this mapping, of which no Rust value is a part yet.
        unsafe { mprotect(self.pointer(), self.len, prot) }.map_err(Error::sys("mprotect of a new region"))
    }

    /// Takes the access away again.
    ///
    /// # Errors
    ///
    /// [`Error::Sys`] in a forked child too, which has no such mapping.
    pub(crate) fn hide(&self) -> Result<()> {
        if self.depth != depth() {
            return Err(Error::sys("mprotect of a region")(Errno::ECHILD));
        }
        // SAFETY: the range is this mapping, of which no Rust value is a part yet.
        unsafe { mprotect(self.pointer(), self.len, ProtFlags::PROT_NONE) }.map_err(Error::sys("mprotect of a region"))
    }

    pub(crate) fn addr(&self) -> usize {
        self.addr
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    fn pointer(&self) -> NonNull<libc::c_void> {
        NonNull::new(self.addr as *mut libc::c_void).unwrap_or(NonNull::dangling())
    }

    /// Gives the mapping up without unmapping it.
    pub(crate) fn release(self) {
        std::mem::forget(self);
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if self.depth != depth() {
            return;
        }
        // In one step: in between, the memory of another thread could take the place.
        if !self.from_reservation || reserve_with(self.addr, self.len, MapFlags::MAP_FIXED).is_err() {
            // A whole mapping of ours can always be unmapped; at the worst the range stays taken.
            let _ = unmap(self.addr, self.len);
        }
    }
}

/// Keeps addresses from being used for anything: a touch there is SIGSEGV. Allocates nothing.
///
/// # Errors
///
/// `EEXIST` when something is mapped there, which is left alone.
pub(crate) fn reserve(addr: usize, len: usize) -> std::result::Result<(), Errno> {
    reserve_with(addr, len, MapFlags::MAP_FIXED_NOREPLACE)
}

fn reserve_with(addr: usize, len: usize, fixed: MapFlags) -> std::result::Result<(), Errno> {
    let (Some(start), Some(length)) = (NonZeroUsize::new(addr), NonZeroUsize::new(len)) else {
        return Err(Errno::EINVAL);
    };
    let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE | fixed;
    // SAFETY: MAP_FIXED_NOREPLACE replaces nothing; MAP_FIXED is asked for by the one caller that owns what is there.
    unsafe { mmap_anonymous(Some(start), length, ProtFlags::PROT_NONE, flags) }.map(drop)
}

/// Tells whether anything is mapped at a page.
pub(crate) fn is_mapped(addr: usize) -> bool {
    let mut resident = 0;
    // SAFETY: mincore(2) writes one byte for the one page asked about, to `resident`.
    unsafe { libc::mincore(addr as *mut libc::c_void, page_size(), &raw mut resident) == 0 }
}

/// Tells whether every page of a range is mapped, in one call.
pub(crate) fn is_all_mapped(addr: usize, len: usize) -> bool {
    // SAFETY: MS_ASYNC does nothing (since Linux 2.6.19) but look whether all of the range is mapped.
    unsafe { libc::msync(addr as *mut libc::c_void, len, libc::MS_ASYNC) == 0 }
}

/// Unmaps a range that is known to be ours.
pub(crate) fn unmap(addr: usize, len: usize) -> Result<()> {
    let pointer = NonNull::new(addr as *mut libc::c_void).ok_or(Error::sys("munmap")(Errno::EINVAL))?;
    // SAFETY: the caller owns the range.
    unsafe { munmap(pointer, len) }.map_err(Error::sys("munmap of a region"))
}
