//! The backing object of a vmap: a memfd of its own, or the memfd itself whose pages the list names.
//!
//! The latter is somebody else's too: its pages come and go without the engine, mappings of it need not be the engine's,
//! and page 0 of the list may lie anywhere in it. Pages that it holds the kernel maps by itself, without a message; its
//! holes are missing pages, and zeros.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::stat::fstat;

use super::page_size::PageSize;
use crate::kiobuf::MemfdRun;
use crate::page::page_size;
use crate::process::mapping::{Mapping, Placement};
use crate::process::size_memfd;
use crate::{Error, Result};

/// A device and inode, as `/proc/PID/maps` names a file.
pub(crate) type FileId = (libc::dev_t, libc::ino_t);

/// Says whether a vmap shows the pages of its list themselves ([`VmapBuilder::backing`](crate::VmapBuilder::backing)).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Backing {
    /// As [`Backing::Shared`] where that is possible, else as [`Backing::Copied`]. The default;
    /// [`Vmap::shares_pages`](crate::Vmap::shares_pages) tells which.
    #[default]
    SharedIfPossible,
    /// The memfd of the list is mapped itself: its owner and every region see the same pages, and nothing is copied. A
    /// list of which that is not possible is refused, with what stands in the way.
    Shared,
    /// Every page becomes one of the vmap's own, with the bytes that the list has for it when it is first touched.
    Copied,
}

/// Whose pages a mapping of a file shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Owner {
    pub(crate) vmap: u64,
    /// The byte of the file at which page 0 lies.
    pub(crate) base: u64,
    /// Mappings of the file need not be the engine's.
    pub(crate) shared: bool,
    /// Pages that the file holds are mapped by the engine.
    pub(crate) minor_faults: bool,
}

/// What a vmap's regions map.
pub(crate) struct Object {
    memfd: OwnedFd,
    /// The byte of the memfd at which page 0 of the list lies.
    base: u64,
    id: FileId,
    shared: bool,
    page: PageSize,
}

impl Object {
    /// Makes a memfd of exactly `nr_pages` pages, or the huge pages that these reach into, sealed against shrinking, and against growing unless it is to grow.
    pub(crate) fn new(nr_pages: u64, expandable: bool, page: PageSize) -> Result<Object> {
        let memfd = page.new_object(c"kiomap")?;
        resize(memfd.as_fd(), nr_pages, page)?;
        let mut seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_SEAL;
        if !expandable {
            seals |= SealFlag::F_SEAL_GROW;
        }
        fcntl(&memfd, FcntlArg::F_ADD_SEALS(seals)).map_err(Error::sys("sealing the memfd of a vmap"))?;
        Object::of(memfd, 0, false, page)
    }

    /// Takes a memfd whose pages are the list's.
    pub(crate) fn shared(run: MemfdRun) -> Result<Object> {
        Object::of(run.memfd, run.offset, true, PageSize::Base)
    }

    /// In a client: takes the memfd of a vmap that was offered.
    pub(crate) fn offered(memfd: OwnedFd, base: u64, shared: bool, page: PageSize) -> Result<Object> {
        Object::of(memfd, base, shared, page)
    }

    fn of(memfd: OwnedFd, base: u64, shared: bool, page: PageSize) -> Result<Object> {
        let stat = fstat(&memfd).map_err(Error::sys("fstat of the memfd of a vmap"))?;
        Ok(Object { memfd, base, id: (stat.st_dev, stat.st_ino), shared, page })
    }

    pub(crate) fn memfd(&self) -> BorrowedFd<'_> {
        self.memfd.as_fd()
    }

    /// As `/proc/PID/maps` names it.
    pub(crate) fn id(&self) -> FileId {
        self.id
    }

    /// Tells whether others may have it, and map it.
    pub(crate) fn is_shared(&self) -> bool {
        self.shared
    }

    /// The byte of the memfd at which page 0 of the list lies.
    pub(crate) fn base(&self) -> u64 {
        self.base
    }

    /// The byte of the memfd at which a page of the list, or one past its end, lies.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] where no file reaches.
    pub(crate) fn offset_of(&self, pgoff: u64) -> Result<u64> {
        let offset = pgoff.checked_mul(page_size() as u64).and_then(|offset| offset.checked_add(self.base));
        offset.filter(|&offset| i64::try_from(offset).is_ok()).ok_or(Error::Invalid {
            what: "pgoff",
            value: pgoff,
            rule: "pgoff plus length must be less than 2^63 bytes",
        })
    }

    /// Grows a memfd of the vmap's own.
    pub(crate) fn grow(&self, nr_pages: u64) -> Result<()> {
        resize(self.memfd(), nr_pages, self.page)
    }

    /// The size of its pages.
    pub(crate) fn page(&self) -> PageSize {
        self.page
    }

    /// Maps a part of it, with no access.
    pub(crate) fn map(&self, len: usize, offset: u64, placement: Placement) -> Result<Mapping> {
        // The window has reserved huge pages already.
        let map = if self.page.is_huge() { Mapping::hidden_unreserved } else { Mapping::hidden };
        map(self.memfd(), len, offset, placement)
    }
}

fn resize(memfd: BorrowedFd<'_>, nr_pages: u64, page: PageSize) -> Result<()> {
    let bytes = page
        .whole(nr_pages)
        .and_then(|whole| whole.checked_mul(page_size() as u64))
        .filter(|&bytes| i64::try_from(bytes).is_ok())
        .ok_or(Error::Overflow { what: "the size of a vmap in pages", base: nr_pages, len: page_size() as u64 })?;
    size_memfd(memfd, bytes)
}
