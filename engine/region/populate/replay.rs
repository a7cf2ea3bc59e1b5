//! Replaying a working set: its pages are brought before they are wanted, as the faults of the time brought them.

use std::ops::Range;

use super::background::Pace;
use super::{PopulateOptions, Populating, Region, STEP_PAGES, background};
use crate::Result;
use crate::kiobuf::{Kiobuf, Nopage};
use crate::page::page_size;
use crate::runtime::around::FaultAround;
use crate::runtime::readahead::Streams;
use crate::vmap::page_size::PageSize;
use crate::working_set::WorkingSet;

/// How pages are replayed that lie in memory, unless said otherwise.
const FROM_MEMORY: Pace = Pace { threads: 1, step_pages: 64, most_waits: 1 };
/// And those that have to be waited for: in steps so short that several threads keep the order.
const FROM_AFAR: Pace = Pace { threads: 4, step_pages: 16, most_waits: 1 };

impl Region {
    /// Brings the pages of a working set that lie in the region, on threads of the engine, before they are touched: in the order
    /// in which they were faulted on, and with each what a fault on it brings along
    /// ([`FaultAround`]).
    ///
    /// It is a [`Region::populate_in_background`] of just these pages, with the same handle and options. Neighbours among
    /// 512 pages of the set are brought together, and steps are no longer than that. Files and sources are told ahead what will
    /// be read. Unless [`PopulateOptions::threads`] says otherwise, 4 threads bring pages that may have to be waited
    /// for. A page that can't be had is counted, and brought no other way; its touch asks the list again.
    ///
    /// # Errors
    ///
    /// [`Error::WorkingSet`](crate::Error::WorkingSet) (`ESTALE`) for a set of another list or image; as
    /// [`Region::populate_in_background`] otherwise. [`Error::Sys`](crate::Error::Sys) also when a file of the list can't be
    /// examined.
    pub fn replay(&self, set: &WorkingSet, options: PopulateOptions) -> Result<Populating> {
        options.validate()?;
        let task = self.background_task(0..self.len)?;
        let contents = task.core.contents();
        set.check(task.core.nr_pages(), &task.core.identity()?)?;
        let pages = self.pgoff..self.pgoff + (self.len / page_size()) as u64;
        let windows = windows(set.pages(), &contents.list, pages, task.core.page(), self.shared.fault_around);
        let address = |pgoff: u64| self.addr + (pgoff - self.pgoff) as usize * page_size();
        let ranges = windows.into_iter().map(|window| address(window.start)..address(window.end)).collect();
        let pace = if contents.list.may_block() { FROM_AFAR } else { FROM_MEMORY };
        background::begin(task, ranges, options, pace)
    }
}

/// The runs of pages that faults on `set` in this order would bring, of those in `pages`, none twice. They keep the order
/// from one batch of a step to the next; within one they ascend.
pub(crate) fn windows(
    set: &[u64],
    list: &Kiobuf,
    pages: Range<u64>,
    page: PageSize,
    around: FaultAround,
) -> Vec<Range<u64>> {
    let streams = Streams::default();
    let mut planned = Planned::new(&pages);
    let mut windows: Vec<Range<u64>> = Vec::new();
    let mut in_region = set.iter().copied().filter(|pgoff| pages.contains(pgoff)).peekable();
    while in_region.peek().is_some() {
        let mut batch: Vec<Range<u64>> = Vec::new();
        let mut batch_pages = 0;
        while batch_pages < STEP_PAGES {
            let Some(pgoff) = in_region.next() else { break };
            // One that came with another would not have been faulted on.
            if planned.contains(pgoff) {
                continue;
            }
            let clip = |run: Range<u64>| run.start.max(pages.start)..run.end.min(pages.end);
            let window = match list.nopage(pgoff) {
                _ if page.is_huge() => {
                    let first = page.first_of(pgoff);
                    clip(first..first + page.base_pages())
                }
                Nopage::Direct { run, .. } | Nopage::Zero { run } => {
                    around.window_of(&streams, &clip(run), pgoff, pgoff == pages.start, false)
                }
                Nopage::Read { run, .. } => {
                    let window = around.window_of(&streams, &clip(run), pgoff, pgoff == pages.start, true);
                    clip(list.whole_units(window))
                }
                Nopage::Sigbus(_) => continue,
            };
            for run in planned.add(window) {
                batch_pages += run.end - run.start;
                batch.push(run);
            }
        }
        batch.sort_unstable_by_key(|run| run.start);
        for run in batch {
            match windows.last_mut() {
                Some(last) if last.end == run.start => last.end = run.end,
                _ => windows.push(run),
            }
        }
    }
    windows
}

/// The pages of a region that are in a plan: a bit for each.
struct Planned {
    first: u64,
    bits: Vec<u64>,
}

impl Planned {
    fn new(pages: &Range<u64>) -> Planned {
        Planned { first: pages.start, bits: vec![0; (pages.end - pages.start).div_ceil(64) as usize] }
    }

    fn place(&self, pgoff: u64) -> (usize, u64) {
        let at = pgoff - self.first;
        ((at / 64) as usize, 1 << (at % 64))
    }

    fn contains(&self, pgoff: u64) -> bool {
        let (word, bit) = self.place(pgoff);
        self.bits[word] & bit != 0
    }

    /// Enters a run; answers with the parts of it that were not there.
    fn add(&mut self, run: Range<u64>) -> Vec<Range<u64>> {
        let mut parts: Vec<Range<u64>> = Vec::new();
        for pgoff in run {
            let (word, bit) = self.place(pgoff);
            if self.bits[word] & bit != 0 {
                continue;
            }
            self.bits[word] |= bit;
            match parts.last_mut() {
                Some(last) if last.end == pgoff => last.end += 1,
                _ => parts.push(pgoff..pgoff + 1),
            }
        }
        parts
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NR_PAGES: u64 = 5000;

    fn planned(set: &[u64], pages: Range<u64>, around: FaultAround) -> Vec<Range<u64>> {
        let mut list = Kiobuf::new();
        list.map_zero(NR_PAGES).unwrap();
        windows(set, &list, pages, PageSize::Base, around)
    }

    /// A walk that was recorded is brought whole, as its windows were, and not in the single pages that it faulted on.
    #[test]
    fn a_walk_is_brought_with_its_windows() {
        let streams = Streams::default();
        let around = FaultAround::default();
        let (mut faulted, mut end) = (Vec::new(), 100);
        while end < 1100 {
            faulted.push(end);
            end = around.window_of(&streams, &(0..NR_PAGES), end, false, false).end;
        }
        assert!(faulted.len() < 20);
        let planned_with = |around| planned(&faulted, 0..NR_PAGES, around);
        assert!(matches!(&planned_with(around)[..], [one] if *one == (100..end)));
        let single = planned_with(FaultAround::Fixed(1));
        assert_eq!(single.iter().map(|run| run.end - run.start).sum::<u64>(), faulted.len() as u64);
    }

    /// Early pages come early, whatever their addresses.
    #[test]
    fn batches_keep_the_order() {
        let set: Vec<u64> = (0..NR_PAGES / 2).map(|n| NR_PAGES - 2 - 2 * n).collect();
        let windows = planned(&set, 0..NR_PAGES, FaultAround::Fixed(1));
        assert_eq!(windows.len(), set.len());
        for (batch, wanted) in windows.chunks(STEP_PAGES as usize).zip(set.chunks(STEP_PAGES as usize)) {
            let brought: Vec<u64> = batch.iter().map(|run| run.start).collect();
            assert!(brought.is_sorted());
            assert!(brought.iter().rev().eq(wanted));
        }
    }

    proptest! {
        /// What is planned is each page of the set once, with neighbours, and nothing outside the region.
        #[test]
        fn each_page_is_planned_once(
            set in proptest::collection::vec(0..NR_PAGES + 10, 0..800), first in 0..NR_PAGES, len in 1..NR_PAGES,
            around in prop_oneof![
                Just(FaultAround::default()), (1usize..40).prop_map(FaultAround::Fixed),
            ],
        ) {
            let pages = first..(first + len).min(NR_PAGES);
            let mut brought = vec![0u8; NR_PAGES as usize];
            for window in planned(&set, pages.clone(), around) {
                prop_assert!(window.start < window.end && pages.start <= window.start && window.end <= pages.end);
                window.for_each(|pgoff| brought[pgoff as usize] += 1);
            }
            prop_assert!(brought.iter().all(|&times| times <= 1));
            prop_assert!(set.iter().filter(|pgoff| pages.contains(pgoff)).all(|&pgoff| brought[pgoff as usize] == 1));
        }
    }
}
