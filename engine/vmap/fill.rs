//! Filling all pages of vmaps before a shutdown, after which nobody would bring them.

use std::ops::{ControlFlow, Range};
use std::sync::{Arc, PoisonError};

use super::core::{Contents, VmapCore};
use super::failure::Why;
use super::fetch::{Fetcher, made_from};
use super::page_size::PageSize;
use crate::kiobuf::ExtentKind;
use crate::runtime::shared::EngineShared;
use crate::{Error, Kiobuf};

/// Pages filled in one step.
const STEP_PAGES: u64 = 512;

/// Says how far a shutdown has filled ([`Engine::shutdown_filling`](crate::Engine::shutdown_filling)), or the filling of an adopted
/// process ([`Adopted::fill`](crate::Adopted::fill)).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct FillProgress {
    /// Pages that are attended to: filled, there already, holes, or failed.
    pub pages_done: u64,
    /// Pages of the lists of all vmaps with areas, and of the areas of adopted processes.
    pub pages_total: u64,
    /// Pages that could not be had, of those done: their source failed, or memory ran out. Holes are none of them.
    pub pages_failed: u64,
}

impl FillProgress {
    /// Both together.
    pub(crate) fn and(self, other: FillProgress) -> FillProgress {
        FillProgress {
            pages_done: self.pages_done + other.pages_done,
            pages_total: self.pages_total + other.pages_total,
            pages_failed: self.pages_failed + other.pages_failed,
        }
    }
}

/// Fills every page that can be had. Calls `progress` at the start and after each step, holding no lock, until it breaks.
pub(crate) fn fill_all(
    shared: &EngineShared,
    vmaps: &[Arc<VmapCore>],
    mut progress: impl FnMut(FillProgress) -> ControlFlow<()>,
) {
    // As long as they are now: what is appended from here on is not attended to.
    let lengths: Vec<u64> = vmaps.iter().map(|vmap| vmap.contents().list.nr_pages()).collect();
    let mut fetcher = Fetcher::default();
    let mut so_far = FillProgress { pages_done: 0, pages_total: lengths.iter().sum(), pages_failed: 0 };
    if progress(so_far).is_break() {
        return;
    }
    for (vmap, nr_pages) in vmaps.iter().zip(lengths) {
        let mut pgoff = 0;
        while pgoff < nr_pages {
            let (next, failed) = fill_step(shared, &mut fetcher, vmap, pgoff, nr_pages);
            so_far.pages_done += next - pgoff;
            so_far.pages_failed += failed;
            pgoff = next;
            if progress(so_far).is_break() {
                return;
            }
        }
    }
}

/// Fills some pages from `first` on; answers how far it came, and how many pages could not be had.
fn fill_step(shared: &EngineShared, fetcher: &mut Fetcher, core: &Arc<VmapCore>, first: u64, end: u64) -> (u64, u64) {
    let mut failed = 0;
    let count = |pages: Range<u64>, _: &Why| failed += pages.end - pages.start;
    match fetcher.fetch(shared, core, first..end.min(first.saturating_add(STEP_PAGES)), count) {
        Ok(next) if next > first => return (next, failed),
        Ok(_) => {}
        // The fault-handling thread has ended.
        Err(_) => return (end, end - first),
    }
    let end = made_from(core, first, end);
    // A list that is being taken back must not be filled from: taken back is then either before this step or after it.
    let _in_use = core.in_use.read().unwrap_or_else(PoisonError::into_inner);
    let next = fill_some(core, &core.contents(), first, STEP_PAGES, end, |pages, refusal| {
        failed += if matches!(refusal, Refusal::Hole) { 0 } else { pages.end - pages.start };
    });
    (next, failed)
}

/// Why pages were not filled.
pub(crate) enum Refusal {
    /// The list has a hole there.
    Hole,
    /// The list ends before them.
    PastEnd,
    /// They can't be had now, for this reason.
    Failed(String),
}

/// Fills the missing pages of `most` from `first` on, up to `end`, and tells of each range that is not filled, in order.
/// Answers how far it came: a hole may reach further, as it takes no time.
///
/// The caller holds `in_use` of the vmap, whose contents these are.
pub(crate) fn fill_some(
    core: &VmapCore,
    contents: &Contents,
    first: u64,
    most: u64,
    end: u64,
    mut refused: impl FnMut(Range<u64>, Refusal),
) -> u64 {
    let Contents { list, window, .. } = contents;
    let page = core.page();
    // The last huge page may reach behind the list.
    let end_of_list = page.whole(list.nr_pages()).unwrap_or(u64::MAX);
    let until = end.min(first.saturating_add(most));
    let mut pgoff = first;
    while pgoff < until {
        let Some(window) = window.as_ref().filter(|_| pgoff < end_of_list) else {
            refused(pgoff..end, Refusal::PastEnd);
            return end;
        };
        let filled = window.fill(list, &core.object, pgoff, until);
        let (stopped, next, refusal) = match filled {
            Ok(()) => break,
            Err(Error::NoPage { pgoff: at, .. }) if at >= end_of_list => (at, end, Refusal::PastEnd),
            Err(Error::NoPage { pgoff: at, why }) => match hole_end(list, page, at) {
                Some(next) => (at, next.min(end), Refusal::Hole),
                // One page that can't be had, of whatever size.
                None => (at, window.page_end(at).min(end), Refusal::Failed(why)),
            },
            Err(error) => (pgoff, until, Refusal::Failed(error.to_string())),
        };
        refused(stopped..next, refusal);
        pgoff = next;
    }
    pgoff.max(until)
}

/// Where the pages end that the list has nothing for, if a page is one of them.
pub(crate) fn nothing_until(list: &Kiobuf, page: PageSize, pgoff: u64) -> Option<u64> {
    let end = page.whole(list.nr_pages()).unwrap_or(u64::MAX);
    if pgoff < end { hole_end(list, page, pgoff) } else { Some(u64::MAX) }
}

/// Where the hole ends that a page lies in, or the huge page in which the list ends with a hole.
fn hole_end(list: &Kiobuf, page: PageSize, pgoff: u64) -> Option<u64> {
    let extent = list.extent_at(page.first_of(pgoff)).filter(|extent| extent.kind == ExtentKind::Hole)?;
    page.whole(extent.first_page + extent.nr_pages)
}
