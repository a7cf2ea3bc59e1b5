//! Fault-around: which pages are installed together with the one that faulted. Pure arithmetic, but for what an area
//! remembers of its last faults.

use std::ops::Range;

use super::readahead::Streams;
use crate::page::page_size;
use crate::space::Target;
use crate::space::table::Area;
use crate::{Error, Result};

/// The most pages that a fault may bring: one page table's worth.
pub const FAULT_AROUND_MAX_PAGES: usize = 512;
/// The most pages of a file or a source that an adaptive window has: 256 KiB where pages are of 4. More would be a long
/// wait for a disk, and a buffer that no cache holds.
const ADAPTIVE_READ_PAGES: usize = 64;

/// Says how many pages one fault brings ([`EngineBuilder::fault_around`](crate::EngineBuilder::fault_around)).
///
/// Whatever it says, only pages come that the region shows, of the same extent of the list as the page that was touched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum FaultAround {
    /// An aligned block of this many pages around the one that was touched, from 1 to [`FAULT_AROUND_MAX_PAGES`].
    Fixed(usize),
    /// One page for a touch anywhere, more where a region is walked through: 4 pages when a touch goes on where an earlier
    /// one ended, forward or backward, then 8, and so on. A walk that begins at a region's first page begins with 4. A
    /// region may be walked through in several places at once. The default, with [`FaultAround::default`].
    Adaptive {
        /// The most pages that a walk brings with one fault, from 1 to [`FAULT_AROUND_MAX_PAGES`]. Of files and sources
        /// at most 64 come at once.
        max_pages: usize,
    },
}

impl Default for FaultAround {
    fn default() -> Self {
        FaultAround::Adaptive { max_pages: 128 }
    }
}

impl FaultAround {
    /// The most pages of a window.
    fn max_pages(self) -> usize {
        match self {
            FaultAround::Fixed(pages) | FaultAround::Adaptive { max_pages: pages } => pages,
        }
    }

    /// The most pages of a window that has to be read.
    pub(crate) fn read_pages(self) -> usize {
        match self {
            FaultAround::Fixed(pages) => pages,
            FaultAround::Adaptive { max_pages } => max_pages.min(ADAPTIVE_READ_PAGES),
        }
    }

    /// Checks what the user gave.
    pub(crate) fn validate(self) -> Result<()> {
        let pages = self.max_pages();
        if (1..=FAULT_AROUND_MAX_PAGES).contains(&pages) {
            return Ok(());
        }
        Err(Error::Invalid { what: "fault_around_pages", value: pages as u64, rule: "it must be from 1 to 512" })
    }

    /// Chooses the pages that come with page `pgoff` of an area, of `run` (pages of one extent with one treatment), which
    /// are to be read before they are installed, or not.
    #[inline]
    pub(crate) fn window(self, area: &Area<Target>, run: &Range<u64>, pgoff: u64, read: bool) -> Range<u64> {
        self.window_of(&area.target.streams, &clip(area, run), pgoff, pgoff == area.pgoff, read)
    }

    /// As [`FaultAround::window`], of pages within `bounds`, by what is remembered of faults before; `at_start` says that it is
    /// the first page of what is mapped.
    #[inline]
    pub(crate) fn window_of(
        self,
        streams: &Streams,
        bounds: &Range<u64>,
        pgoff: u64,
        at_start: bool,
        read: bool,
    ) -> Range<u64> {
        match self {
            FaultAround::Fixed(pages) => block(pages as u64, bounds, pgoff),
            FaultAround::Adaptive { max_pages } => {
                let most = if read { self.read_pages() } else { max_pages };
                streams.window(pgoff, bounds, at_start, most as u64)
            }
        }
    }
}

/// The pages of `run` that an area shows.
#[inline]
pub(crate) fn clip<T>(area: &Area<T>, run: &Range<u64>) -> Range<u64> {
    let mapped = area.pgoff..area.pgoff + (area.len_bytes() / page_size()) as u64;
    run.start.max(mapped.start)..run.end.min(mapped.end)
}

/// Chooses the block of at most `nr_pages` pages around `pgoff`: aligned to its size, as the kernel's own fault-around is,
/// and clipped to `bounds`. Aligned blocks rarely meet pages that are present already.
fn block(nr_pages: u64, bounds: &Range<u64>, pgoff: u64) -> Range<u64> {
    let first = pgoff - pgoff % nr_pages.max(1);
    let start = first.max(bounds.start);
    let end = first.saturating_add(nr_pages.max(1)).min(bounds.end);
    debug_assert!((start..end).contains(&pgoff), "page {pgoff} faulted in {bounds:?}");
    start..end
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn area(pgoff: u64, nr_pages: u64) -> Area<()> {
        let start = 0x10_0000;
        let end = start + nr_pages as usize * page_size();
        Area { start, end, pgoff, region: 1, writable: true, leaving: false, target: () }
    }

    proptest! {
        /// T95: nothing outside the mapping, the extent or the list is ever chosen, and the faulting page always is.
        #[test]
        fn the_block_holds_the_fault_and_nothing_outside(
            nr_pages in 0u64..70, area_at in 0u64..100, area_len in 1u64..100,
            run_at in 0u64..100, run_len in 1u64..100, pick in 0u64..1000,
        ) {
            let area = area(area_at, area_len);
            let run = run_at..run_at + run_len;
            let both = area_at.max(run.start)..(area_at + area_len).min(run.end);
            prop_assume!(!both.is_empty());
            prop_assert_eq!(clip(&area, &run), both.clone());
            let pgoff = both.start + pick % (both.end - both.start);
            let window = block(nr_pages, &both, pgoff);
            prop_assert!(window.contains(&pgoff));
            prop_assert!(both.start <= window.start && window.end <= both.end);
            prop_assert!(window.end - window.start <= nr_pages.max(1));
        }
    }

    #[test]
    fn what_is_read_comes_in_smaller_windows() {
        assert_eq!(FaultAround::Adaptive { max_pages: 512 }.read_pages(), ADAPTIVE_READ_PAGES);
        assert_eq!(FaultAround::Adaptive { max_pages: 8 }.read_pages(), 8);
        assert_eq!(FaultAround::Fixed(512).read_pages(), 512);
    }
}
