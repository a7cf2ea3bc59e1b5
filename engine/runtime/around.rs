//! Fault-around: which pages are installed together with the one that faulted. Pure arithmetic.

use std::ops::Range;

use crate::page::page_size;
use crate::space::table::Area;

/// Chooses the block of at most `nr_pages` pages around `pgoff`: aligned to its size, as the kernel's own
/// fault-around is, and clipped to the area and to `run` (pages of one extent with one treatment). Aligned blocks
/// rarely meet pages that are present already.
pub(crate) fn around<T>(nr_pages: u64, area: &Area<T>, run: &Range<u64>, pgoff: u64) -> Range<u64> {
    let mapped = area.pgoff..area.pgoff + (area.len_bytes() / page_size()) as u64;
    let first = pgoff - pgoff % nr_pages.max(1);
    let start = first.max(mapped.start).max(run.start);
    let end = first.saturating_add(nr_pages.max(1)).min(mapped.end).min(run.end);
    debug_assert!((start..end).contains(&pgoff), "page {pgoff} faulted in {mapped:?} and {run:?}");
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
        fn the_window_holds_the_fault_and_nothing_outside(
            nr_pages in 0u64..70, area_at in 0u64..100, area_len in 1u64..100,
            run_at in 0u64..100, run_len in 1u64..100, pick in 0u64..1000,
        ) {
            let area = area(area_at, area_len);
            let run = run_at..run_at + run_len;
            let both = area_at.max(run.start)..(area_at + area_len).min(run.end);
            prop_assume!(!both.is_empty());
            let pgoff = both.start + pick % (both.end - both.start);
            let window = around(nr_pages, &area, &run, pgoff);
            prop_assert!(window.contains(&pgoff));
            prop_assert!(both.start <= window.start && window.end <= both.end);
            prop_assert!(window.end - window.start <= nr_pages.max(1));
        }
    }
}
