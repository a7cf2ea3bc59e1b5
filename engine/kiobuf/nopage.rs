//! The lookup: which bytes belong to a page of the list. A binary search over extents; no system call, no lock, no
//! allocation, nothing but the list itself.

use std::ops::Range;
use std::sync::Arc;

use super::extent::{Base, Extent};
use super::memfd::Memfd;

/// Says how a page of the list is had. Every run contains the page asked for, within one extent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Nopage {
    /// Whole pages in plain memory, ready to be copied.
    Direct {
        /// The address of the first byte of page `run.start`; it need not be aligned.
        src: *const u8,
        /// The pages that lie there one after the other.
        run: Range<u64>,
    },
    /// Pages whose bytes `try_read_pages` or `read_pages` composes.
    Read {
        /// The pages that are read alike.
        run: Range<u64>,
        /// Reading may wait for a disk or a page source.
        may_block: bool,
    },
    /// Pages of zeros.
    Zero {
        /// The pages that are zero.
        run: Range<u64>,
    },
    /// No page: a touch is a SIGBUS.
    Sigbus(NoPageWhy),
}

/// Says why there is no page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NoPageWhy {
    /// The list ends before it.
    PastEnd,
    /// The list has a hole there.
    Hole,
}

impl std::fmt::Display for NoPageWhy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            NoPageWhy::PastEnd => "the list ends before it",
            NoPageWhy::Hole => "the list has a hole there",
        })
    }
}

/// Says how pages are read that a worker reads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ReadUnit {
    /// The pages that are best read together, the one that was asked for among them.
    pub(crate) pages: Range<u64>,
    /// The pages of the list that may be read together with them.
    pub(crate) run: Range<u64>,
    /// Tells what they are read from apart from all else that is there.
    pub(crate) medium: usize,
    /// Reading them waits for nothing.
    pub(crate) is_quick: bool,
}

/// Looks up how a page is read.
pub(super) fn read_unit(extents: &[Extent], pgoff: u64) -> Option<ReadUnit> {
    let extent = extent_at(extents, pgoff)?;
    let (medium, is_quick) = match &extent.base {
        Base::Source(part) => (Arc::as_ptr(&part.source).cast::<()>().addr(), !part.may_block),
        Base::File { file, .. } | Base::Memfd(Memfd { file, .. }) => (Arc::as_ptr(file).addr(), false),
        Base::Mmap { map, .. } => (Arc::as_ptr(map).addr(), false),
        Base::Memory(_) | Base::Zero | Base::Hole => (0, true),
    };
    Some(ReadUnit { pages: extent.unit_of(pgoff), run: extent.pages(), medium, is_quick })
}

/// Finds the extent that holds a page. `extents` are ordered and leave no gap.
#[inline]
pub(super) fn extent_at(extents: &[Extent], pgoff: u64) -> Option<&Extent> {
    let after = extents.partition_point(|extent| extent.first_page <= pgoff);
    let extent = &extents[..after].last()?;
    extent.pages().contains(&pgoff).then_some(extent)
}

/// Looks a page up.
#[inline]
pub(super) fn nopage(extents: &[Extent], pgoff: u64) -> Nopage {
    let Some(extent) = extent_at(extents, pgoff) else {
        return Nopage::Sigbus(NoPageWhy::PastEnd);
    };
    match &extent.base {
        Base::Memory(memory) => {
            let run = extent.whole_pages();
            if !run.contains(&pgoff) {
                return Nopage::Read { run: pgoff..pgoff + 1, may_block: false };
            }
            // A position in data that is in memory is an address difference: it fits.
            let src = memory.as_ptr().wrapping_add(extent.data_position(run.start) as usize);
            Nopage::Direct { src, run }
        }
        Base::Mmap { .. } | Base::File { .. } | Base::Memfd(_) | Base::Source { .. } => {
            Nopage::Read { run: extent.pages(), may_block: true }
        }
        Base::Zero => Nopage::Zero { run: extent.pages() },
        Base::Hole => Nopage::Sigbus(NoPageWhy::Hole),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(sizes: &[u64]) -> Vec<Extent> {
        let mut first_page = 0;
        let mut place = |(index, &size): (usize, &u64)| {
            let made = if index % 2 == 0 { Extent::zeros(size) } else { Extent::hole(size) };
            let extent = Extent { first_page, ..made.unwrap() };
            first_page += size;
            extent
        };
        sizes.iter().enumerate().map(&mut place).collect()
    }

    /// T2, T10: a page at the end or past it is never looked up in the list (`>=`, not `>`).
    #[test]
    fn the_page_at_the_end_is_past_the_end() {
        assert_eq!(nopage(&[], 0), Nopage::Sigbus(NoPageWhy::PastEnd));
        for nr_pages in [1, 2, 17, 18, 100] {
            let extents = list(&[nr_pages]);
            assert_eq!(nopage(&extents, nr_pages - 1), Nopage::Zero { run: 0..nr_pages });
            for past in [nr_pages, nr_pages + 1, nr_pages + 1_000_000, u64::MAX] {
                assert_eq!(nopage(&extents, past), Nopage::Sigbus(NoPageWhy::PastEnd));
            }
        }
    }

    /// T5: a hole is a SIGBUS, its neighbours are not.
    #[test]
    fn every_page_is_found_in_its_own_extent() {
        let extents = list(&[3, 2, 1, 1, 5]);
        for (pages, expected) in [
            (0..3, Nopage::Zero { run: 0..3 }),
            (3..5, Nopage::Sigbus(NoPageWhy::Hole)),
            (5..6, Nopage::Zero { run: 5..6 }),
            (6..7, Nopage::Sigbus(NoPageWhy::Hole)),
            (7..12, Nopage::Zero { run: 7..12 }),
            (12..13, Nopage::Sigbus(NoPageWhy::PastEnd)),
        ] {
            for pgoff in pages {
                assert_eq!(nopage(&extents, pgoff), expected, "page {pgoff}");
            }
        }
    }
}
