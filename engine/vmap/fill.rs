//! Filling all pages of vmaps before a shutdown, after which nobody would bring them.

use std::ops::ControlFlow;
use std::sync::{Arc, PoisonError};

use super::core::{Contents, VmapCore};
use crate::kiobuf::ExtentKind;
use crate::{Error, Kiobuf};

/// Pages filled in one step.
const STEP_PAGES: u64 = 512;

/// Says how far a shutdown has filled ([`Engine::shutdown_filling`](crate::Engine::shutdown_filling)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct FillProgress {
    /// Pages that are attended to: filled, there already, holes, or failed.
    pub pages_done: u64,
    /// Pages of the lists of all vmaps with areas.
    pub pages_total: u64,
    /// Pages that could not be had, of those done: their source failed, or memory ran out. Holes are none of them.
    pub pages_failed: u64,
}

/// Fills every page that can be had. Calls `progress` at the start and after each step, holding no lock, until it breaks.
pub(crate) fn fill_all(vmaps: &[Arc<VmapCore>], mut progress: impl FnMut(FillProgress) -> ControlFlow<()>) {
    // As long as they are now: what is appended from here on is not attended to.
    let lengths: Vec<u64> = vmaps.iter().map(|vmap| vmap.contents().list.nr_pages()).collect();
    let mut so_far = FillProgress { pages_done: 0, pages_total: lengths.iter().sum(), pages_failed: 0 };
    if progress(so_far).is_break() {
        return;
    }
    for (vmap, nr_pages) in vmaps.iter().zip(lengths) {
        let mut pgoff = 0;
        while pgoff < nr_pages {
            let (next, failed) = fill_step(vmap, pgoff, nr_pages);
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
fn fill_step(core: &VmapCore, first: u64, end: u64) -> (u64, u64) {
    // A list that is being taken back must not be filled from: taken back is then either before this step or after it.
    let _in_use = core.in_use.read().unwrap_or_else(PoisonError::into_inner);
    let Contents { list, window: Some(window), .. } = core.contents() else { return (end, end - first) };
    let until = end.min(first.saturating_add(STEP_PAGES));
    let (mut pgoff, mut failed) = (first, 0);
    while pgoff < until {
        pgoff = match window.fill(&list, core.memfd(), pgoff, until) {
            Ok(()) => until,
            Err(Error::NoPage { pgoff, .. }) => hole_end(&list, pgoff).unwrap_or_else(|| {
                failed += 1;
                pgoff + 1
            }),
            Err(_) => {
                failed += until - pgoff;
                until
            }
        };
    }
    // A hole may reach past the step: it takes no time.
    (pgoff.min(end), failed)
}

/// Where the hole ends that a page lies in.
fn hole_end(list: &Kiobuf, pgoff: u64) -> Option<u64> {
    let extent = list.extent_at(pgoff).filter(|extent| extent.kind == ExtentKind::Hole)?;
    Some(extent.first_page + extent.nr_pages)
}
