//! The page list: which bytes lie behind each page of shared memory.
//!
//! A [`Kiobuf`] is a short list of *extents*, runs of pages of one kind, so that a terabyte of one file costs what a page
//! of it costs. It is immutable where it is shared: a clone is a snapshot, and whoever holds one looks pages up without
//! a lock while another handle is expanded or unmapped.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use crate::error::Result;

mod ahead;
mod arena;
mod extent;
pub(crate) mod file;
mod identity;
mod layer;
mod lock;
mod map;
mod maps;
mod memfd;
mod memory;
mod nopage;
mod outcome;
mod read;
mod sparse;

#[cfg(test)]
mod tests;
mod transfer;

pub use arena::Arena;
pub use extent::{ExtentInfo, ExtentKind};
pub use lock::{LockWait, PageLock};
pub(crate) use memfd::MemfdRun;
pub(crate) use nopage::{Nopage, ReadUnit};
pub(crate) use outcome::{ReadFailure, TryRead};

use extent::{Base, Extent, add_pages};

/// Holds an ordered list of pages: memory, files, page sources, zeros and holes, one after the other.
///
/// An empty list is [mapped](Kiobuf::map_slice) once, then perhaps [expanded](Kiobuf::expand); [`Kiobuf::concat`] strings
/// lists together. A clone is a snapshot that costs one atomic increment: changing one handle changes no other. What a
/// list borrows is given back when the last snapshot that names it is dropped, on the thread that drops it.
///
/// The pages are a template: shared memory made from the list gets its bytes by *copying* a page when it is first touched.
/// So one page may stand in several places of a list, and each place becomes a page of its own. The one exception is a list
/// that is a memfd to its end ([`map_memfd`](Kiobuf::map_memfd)): its pages can be shown themselves.
#[derive(Clone, Default)]
pub struct Kiobuf {
    inner: Arc<Inner>,
}

/// One snapshot.
#[derive(Clone, Default)]
struct Inner {
    /// In order and without gaps: each begins with the page after the last of the one before.
    extents: Vec<Extent>,
    /// The sum of the extents' pages; in bytes it fits in an `i64`.
    nr_pages: u64,
}

impl Inner {
    /// Appends extents, all or none.
    fn append(&mut self, extents: &[Extent]) -> Result<()> {
        let added = extents.iter().try_fold(0, |sum, extent| add_pages(sum, extent.nr_pages))?;
        add_pages(self.nr_pages, added)?;
        self.extents.reserve(extents.len());
        for extent in extents {
            self.extents.push(Extent { first_page: self.nr_pages, ..extent.clone() });
            self.nr_pages += extent.nr_pages;
        }
        Ok(())
    }
}

impl Kiobuf {
    /// Creates an empty list (`kiobuf_init`).
    pub fn new() -> Self {
        Self::default()
    }

    /// Returns the number of pages, holes included.
    pub fn nr_pages(&self) -> u64 {
        self.inner.nr_pages
    }

    /// Returns the byte of the first page at which the data starts.
    pub fn offset(&self) -> usize {
        self.inner.extents.first().map_or(0, |extent| extent.valid.start as usize)
    }

    /// Returns the bytes of data over all parts: zero pages count, slack and holes don't.
    pub fn length(&self) -> u64 {
        self.inner.extents.iter().map(Extent::data_len).sum()
    }

    /// Tells whether the list has pages.
    pub fn is_mapped(&self) -> bool {
        self.nr_pages() != 0
    }

    /// Returns the extents in order.
    pub fn extents(&self) -> impl Iterator<Item = ExtentInfo> + '_ {
        self.inner.extents.iter().map(Extent::info)
    }

    /// Appends the pages of `tail` (`expand_kiobuf`). Snapshots taken before keep the shorter list.
    ///
    /// # Errors
    ///
    /// [`Error::Overflow`](crate::Error::Overflow) (`EOVERFLOW`): the bytes of all pages together do not fit in 63 bits.
    pub fn expand(&mut self, tail: &Kiobuf) -> Result<()> {
        // Copies the extents, not their pages, and only if another snapshot has them too.
        Arc::make_mut(&mut self.inner).append(&tail.inner.extents)
    }

    /// Strings lists together, as a kiovec does: the pages of each part follow those of the part before.
    ///
    /// Each part keeps its own slack: data that ends within a page is followed by zeros up to the next part's first page.
    ///
    /// # Errors
    ///
    /// [`Error::Overflow`](crate::Error::Overflow) (`EOVERFLOW`): the bytes of all pages together do not fit in 63 bits.
    pub fn concat(parts: &[Kiobuf]) -> Result<Kiobuf> {
        let mut inner = Inner::default();
        for part in parts {
            inner.append(&part.inner.extents)?;
        }
        Ok(Kiobuf { inner: Arc::new(inner) })
    }

    /// Empties this handle (`unmap_kiobuf`), which can then be mapped again. Other snapshots keep their pages.
    pub fn unmap(&mut self) {
        *self = Self::new();
    }

    /// Describes the extent that holds a page.
    pub(crate) fn extent_at(&self, pgoff: u64) -> Option<ExtentInfo> {
        nopage::extent_at(&self.inner.extents, pgoff).map(Extent::info)
    }

    /// Looks a page up; no system call, no lock, no allocation.
    #[inline]
    pub(crate) fn nopage(&self, pgoff: u64) -> Nopage {
        nopage::nopage(&self.inner.extents, pgoff)
    }

    /// Looks up how a page is read by a worker; `None` past the end. As [`Kiobuf::nopage`], it only looks.
    pub(crate) fn read_unit(&self, pgoff: u64) -> Option<ReadUnit> {
        nopage::read_unit(&self.inner.extents, pgoff)
    }

    /// Widens a range of pages to what is best read together at both of its ends.
    pub(crate) fn whole_units(&self, pages: Range<u64>) -> Range<u64> {
        let unit = |pgoff| self.read_unit(pgoff).map(|unit| unit.pages);
        let start = unit(pages.start).map_or(pages.start, |unit| unit.start);
        let end = unit(pages.end - 1).map_or(pages.end, |unit| unit.end);
        start.min(pages.start)..end.max(pages.end)
    }

    /// Finds the first pages of a range that a page source makes.
    pub(crate) fn made_by_source(&self, pages: Range<u64>) -> Option<Range<u64>> {
        let extents = &self.inner.extents;
        let from = extents.partition_point(|extent| extent.pages().end <= pages.start);
        let mut within = extents[from..].iter().take_while(|extent| extent.first_page < pages.end);
        let made = within.find(|extent| matches!(extent.base, Base::Source(_)))?.pages();
        Some(made.start.max(pages.start)..made.end.min(pages.end))
    }

    /// Returns the addresses of the memory and the mapped files that the list reads.
    pub(crate) fn memory_ranges(&self) -> impl Iterator<Item = Range<usize>> + '_ {
        self.inner.extents.iter().filter_map(|extent| {
            let start = match &extent.base {
                Base::Memory(memory) => memory.as_ptr().addr(),
                Base::Mmap { map, at } => map.as_ptr().addr() + at,
                Base::File { .. } | Base::Memfd(_) | Base::Source { .. } | Base::Zero | Base::Hole => return None,
            };
            // The data is in memory, so that its length is an address difference.
            Some(start..start + extent.data_len() as usize)
        })
    }
}

impl fmt::Debug for Kiobuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Kiobuf")
            .field("nr_pages", &self.nr_pages())
            .field("offset", &self.offset())
            .field("length", &self.length())
            .field("extents", &self.extents().collect::<Vec<_>>())
            .finish()
    }
}
