//! Filling an empty list: one function for each kind of page. All or nothing; none of them costs more for more pages.

use std::any::Any;
use std::fs::File;
use std::ops::Range;
use std::sync::Arc;

use memmap2::Mmap;

use super::extent::{Base, Extent, SourcePart};
use super::file::PagedFile;
use super::memfd::Memfd;
use super::memory::{Borrowed, Memory};
use super::{Arena, Inner, Kiobuf, maps};
use crate::error::{Error, Result};
use crate::page::page_size;
use crate::source::PageSource;

impl Kiobuf {
    /// Maps the bytes that `guard` lends, in place (`map_user_kiobuf`), and keeps `guard` until the last snapshot dies.
    ///
    /// The list's pages are the pages that the bytes lie on: [`offset`](Kiobuf::offset) is where in the first one they
    /// start, and the rest of the first and of the last page reads as zero. For a mapped file use
    /// [`map_mmap`](Kiobuf::map_mmap), which stands it being truncated.
    ///
    /// # Errors
    ///
    /// * [`Error::AlreadyMapped`] (`EINVAL`): the list has pages.
    /// * [`Error::Invalid`] (`EINVAL`): there are no bytes.
    pub fn map_slice<G: AsRef<[u8]> + Send + Sync + 'static>(&mut self, guard: G) -> Result<()> {
        self.fill(|| {
            let (borrowed, len) = Borrowed::from_guard(guard);
            let memory = Memory::Borrowed(borrowed);
            let head = page_offset(memory.as_ptr());
            Extent::of_bytes(Base::Memory(memory), head, len as u64)
        })
    }

    /// Maps owned bytes. They start on a page boundary of the list, wherever the vector lies; the slack at the end is zero.
    ///
    /// # Errors
    ///
    /// * [`Error::AlreadyMapped`] (`EINVAL`): the list has pages.
    /// * [`Error::Invalid`] (`EINVAL`): there are no bytes.
    pub fn map_bytes(&mut self, bytes: Vec<u8>) -> Result<()> {
        self.fill(|| {
            let (borrowed, len) = Borrowed::from_guard(bytes);
            Extent::of_bytes(Base::Memory(Memory::Borrowed(borrowed)), 0, len as u64)
        })
    }

    /// Maps raw memory in place (`map_user_kiobuf`), and keeps `guard` until the last snapshot dies.
    ///
    /// Pages and slack are as for [`map_slice`](Kiobuf::map_slice). Every page must be mapped readable now: checked
    /// against `/proc/self/maps`.
    ///
    /// # Errors
    ///
    /// * [`Error::AlreadyMapped`] (`EINVAL`): the list has pages.
    /// * [`Error::Invalid`] (`EINVAL`): `len` is zero.
    /// * [`Error::Overflow`] (`EOVERFLOW`): the range wraps around.
    /// * [`Error::Fault`] (`EFAULT`): a page is not mapped, or not readable.
    /// * [`Error::Sys`]: `/proc/self/maps` can't be read.
    ///
    /// # Safety
    ///
    /// Until the list has dropped `guard`, the `len` bytes at `ptr` stay mapped and readable (for a mapped file: it is
    /// not truncated), and no thread writes to them while a page of the list may be read.
    pub unsafe fn map_user(&mut self, ptr: *const u8, len: usize, guard: Arc<dyn Any + Send + Sync>) -> Result<()> {
        self.fill(|| {
            // SAFETY: the caller promises that the bytes stay readable and unwritten while `guard` is held.
            let memory = Memory::Borrowed(unsafe { Borrowed::new(ptr, guard) });
            let extent = Extent::of_bytes(Base::Memory(memory), page_offset(ptr), len as u64)?;
            maps::check_readable(ptr.addr(), len)?;
            Ok(extent)
        })
    }

    /// Maps the pages of an arena (`map_kernel_kiobuf`).
    ///
    /// Safe code can't write to them any more, except by [`read_from`](Kiobuf::read_from). An [`Arena::shared`] becomes an
    /// extent of its memfd, as from [`map_memfd`](Kiobuf::map_memfd): regions that show it themselves write to it, and
    /// every list that holds it sees that.
    ///
    /// # Errors
    ///
    /// * [`Error::AlreadyMapped`] (`EINVAL`): the list has pages.
    /// * [`Error::Sys`]: the descriptor of an [`Arena::shared`] can't be duplicated (`EMFILE`).
    pub fn map_kernel(&mut self, arena: Arena) -> Result<()> {
        self.fill(|| {
            let len = arena.len() as u64;
            let arena = match arena.into_memfd() {
                Ok(memfd) => return Extent::of_bytes(Base::Memfd(Memfd::open(&memfd, &(0..len))?), 0, len),
                Err(arena) => arena,
            };
            Extent::of_bytes(Base::Memory(Memory::Arena(Arc::new(arena))), 0, len)
        })
    }

    /// Maps the bytes `range.start..range.end` of a regular file or a block device; they are read when they are touched.
    ///
    /// The descriptor is duplicated, so that `file` may be closed. The data starts on a page boundary of the list, whatever
    /// `range.start` is. If the file is truncated later, what is gone is a SIGBUS. What the page cache holds is brought without
    /// a worker. For `O_DIRECT`, hints to the kernel or larger reads there is [`FileSource`](crate::FileSource).
    ///
    /// # Errors
    ///
    /// * [`Error::AlreadyMapped`] (`EINVAL`): the list has pages.
    /// * [`Error::Invalid`] (`EINVAL`): the range is empty or turned around; the file is neither a regular file nor a
    ///   block device, is not open for reading, or is open with `O_DIRECT`.
    /// * [`Error::Fault`] (`EFAULT`): the file ends before the range does.
    /// * [`Error::Overflow`] (`EOVERFLOW`): the range does not fit in 63 bits.
    /// * [`Error::Sys`]: the file can't be examined, or its descriptor not be duplicated (`EMFILE`).
    pub fn map_file(&mut self, file: &File, range: Range<u64>) -> Result<()> {
        self.fill(|| {
            let file = Arc::new(PagedFile::open(file, &range)?);
            Extent::of_bytes(Base::File { file, at: range.start }, 0, range.end - range.start)
        })
    }

    /// Maps the bytes `range.start..range.end` of a memfd, or of another file of tmpfs, so that a vmap can show its pages
    /// *themselves*: whoever writes to the memfd, by `write(2)` or through a mapping of his own, and every region see the
    /// same bytes, and nothing is copied.
    ///
    /// A vmap does so if the list is nothing but one run of the memfd up to its end, the memfd's size is a multiple of the
    /// page size, and it is sealed with F_SEAL_GROW: past the end of the list a touch is then SIGBUS, whatever becomes
    /// of a region or of the memfd. Other lists are copied page by page, as from [`map_file`](Kiobuf::map_file): what is
    /// written to the memfd after a page was touched is then not seen. [`VmapBuilder::backing`](crate::VmapBuilder::backing)
    /// insists on one or the other, [`Vmap::shares_pages`](crate::Vmap::shares_pages) tells. Pages that the memfd holds the
    /// kernel maps by itself, reads with neighbours, writes one by one; [`VmapBuilder::minor_faults`](crate::VmapBuilder::minor_faults)
    /// has the engine do it, many at once.
    ///
    /// A hole of the memfd is zeros, and gets a page when it is touched, as do the holes around it
    /// ([`fault_around_pages`](crate::EngineBuilder::fault_around_pages)); a shutdown that fills gives one to each. The descriptor is
    /// duplicated, so that `file` may be closed. If the memfd is truncated later, what is gone is a SIGBUS. If it is sealed
    /// against writing later, what is attached stays, and nothing more can be: an attach is `EPERM`, and a child that is forked has none
    /// of the engine's memory, as [`Region::check`](crate::Region::check) says.
    ///
    /// # Errors
    ///
    /// * [`Error::AlreadyMapped`] (`EINVAL`): the list has pages.
    /// * [`Error::Invalid`] (`EINVAL`): the range is empty or turned around, begins within a page, or ends within one before
    ///   the end of the file; the file is not one of tmpfs (hugetlbfs is another), is not open for reading and writing, is
    ///   open with `O_APPEND`, or is sealed against writing.
    /// * [`Error::Fault`] (`EFAULT`): the file ends before the range does.
    /// * [`Error::Sys`]: the file can't be examined, or its descriptor not be duplicated (`EMFILE`).
    pub fn map_memfd(&mut self, file: &File, range: Range<u64>) -> Result<()> {
        self.fill(|| Extent::of_bytes(Base::Memfd(Memfd::open(file, &range)?), 0, range.end - range.start))
    }

    /// Maps a file that is mapped into memory; its pages are read from disk when they are touched, if they must be.
    ///
    /// Pages and slack are as for [`map_slice`](Kiobuf::map_slice). A page of the mapping that vanishes because the file
    /// is truncated is a SIGBUS. Of the page in which a truncated file ends the kernel keeps the rest as zeros, which
    /// a mapping can't tell from data: use [`map_file`](Kiobuf::map_file) for files that others may truncate.
    ///
    /// # Errors
    ///
    /// * [`Error::AlreadyMapped`] (`EINVAL`): the list has pages.
    /// * [`Error::Invalid`] (`EINVAL`): the mapping is empty.
    pub fn map_mmap(&mut self, map: Mmap) -> Result<()> {
        self.fill(|| {
            let (head, len) = (page_offset(map.as_ptr()), map.len() as u64);
            Extent::of_bytes(Base::Mmap { map: Arc::new(map), at: 0 }, head, len)
        })
    }

    /// Maps `length_bytes` bytes that a page source makes when they are touched. What the source says of itself is asked now,
    /// once.
    ///
    /// # Errors
    ///
    /// * [`Error::AlreadyMapped`] (`EINVAL`): the list has pages.
    /// * [`Error::Invalid`] (`EINVAL`): `length_bytes` is zero, or the source's
    ///   [granule](PageSource::granule_bytes) is no power of two from the page size to
    ///   [`GRANULE_MAX_BYTES`](crate::GRANULE_MAX_BYTES).
    /// * [`Error::Fault`] (`EFAULT`): the source [ends](PageSource::len_bytes) before the list does.
    /// * [`Error::Overflow`] (`EOVERFLOW`): `length_bytes` does not fit in 63 bits.
    pub fn map_source(&mut self, source: Arc<dyn PageSource>, length_bytes: u64) -> Result<()> {
        self.fill(|| Extent::of_bytes(Base::Source(SourcePart::new(source, length_bytes)?), 0, length_bytes))
    }

    /// Maps pages of zeros, which need no memory until they are touched.
    ///
    /// # Errors
    ///
    /// * [`Error::AlreadyMapped`] (`EINVAL`): the list has pages.
    /// * [`Error::Invalid`] (`EINVAL`): `nr_pages` is zero.
    /// * [`Error::Overflow`] (`EOVERFLOW`): their bytes do not fit in 63 bits.
    pub fn map_zero(&mut self, nr_pages: u64) -> Result<()> {
        self.fill(|| Extent::zeros(nr_pages))
    }

    /// Maps pages that are not there (a NULL in the `maplist`): a touch is a SIGBUS.
    ///
    /// # Errors
    ///
    /// * [`Error::AlreadyMapped`] (`EINVAL`): the list has pages.
    /// * [`Error::Invalid`] (`EINVAL`): `nr_pages` is zero.
    /// * [`Error::Overflow`] (`EOVERFLOW`): their bytes would not fit in 63 bits.
    pub fn map_hole(&mut self, nr_pages: u64) -> Result<()> {
        self.fill(|| Extent::hole(nr_pages))
    }

    /// Makes one extent the whole list, if the list is empty and the extent can be built.
    fn fill(&mut self, build: impl FnOnce() -> Result<Extent>) -> Result<()> {
        if self.is_mapped() {
            return Err(Error::AlreadyMapped { nr_pages: self.nr_pages() });
        }
        let extent = build()?;
        self.inner = Arc::new(Inner { nr_pages: extent.nr_pages, extents: vec![extent] });
        Ok(())
    }
}

/// Returns how far into its page an address lies.
fn page_offset(ptr: *const u8) -> u64 {
    (ptr.addr() % page_size()) as u64
}
