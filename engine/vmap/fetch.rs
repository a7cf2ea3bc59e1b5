//! Having page sources read for whoever wants pages without touching them: populating, a replay, a shutdown that fills, and the
//! owner's own reads and writes.
//!
//! Workers read, as for a touch. So a source that fails is asked again, as the vmap's policy says, one that hangs is waited for
//! until the deadline and no longer, and nobody holds the list meanwhile, which can be exchanged or taken back.

use std::ops::Range;
use std::sync::Arc;

use super::core::{Contents, VmapCore};
use super::failure::{FailureCause, Why};
use super::window::{Window, is_resident};
use crate::kiobuf::Kiobuf;
use crate::page::page_size;
use crate::runtime::command::Command;
use crate::runtime::reads::{How, Subject};
use crate::runtime::shared::EngineShared;
use crate::source::GRANULE_MAX_BYTES;
use crate::{Error, Result};

/// Pages that are asked for together, or a granule if that is more.
const CHUNK_PAGES: u64 = 64;

/// Asks page sources for pages, as long as they answer in time.
#[derive(Clone, Debug, Default)]
pub(crate) struct Fetcher {
    /// What has let a deadline pass, and is asked for nothing more.
    hung: Vec<usize>,
}

impl Fetcher {
    /// Brings pages of a range from its start on, as long as page sources make them; answers how far it came: to the first page
    /// that none makes. Tells of pages that can't be had, in order.
    ///
    /// The caller holds nothing of the vmap.
    ///
    /// # Errors
    ///
    /// [`Error::Shutdown`].
    pub(crate) fn fetch(
        &mut self,
        shared: &EngineShared,
        core: &Arc<VmapCore>,
        pages: Range<u64>,
        mut refused: impl FnMut(Range<u64>, &Why),
    ) -> Result<u64> {
        let mut at = pages.start;
        // Up to here pages are asked for by their granules: together they failed.
        let mut alone_until = at;
        while at < pages.end {
            let contents = core.contents();
            let Some(window) = &contents.window else { break };
            let Some(chunk) = chunk(core, &contents.list, at..pages.end, at < alone_until) else { break };
            let end = chunk.end.min(pages.end);
            let Some(missing) = missing(core, window, chunk) else {
                at = end;
                continue;
            };
            match self.read(shared, core, &contents, missing.clone())? {
                How::Installed => at = end,
                // The list was taken back: the one of now is asked.
                How::Again { alone: false } => {}
                How::Again { alone: true } => alone_until = end,
                How::Failed { why, .. } => {
                    refused(missing.start.max(at)..missing.end.min(end), &why);
                    at = end;
                }
            }
        }
        Ok(at)
    }

    /// Notes what others found.
    pub(crate) fn absorb(&mut self, other: &Fetcher) {
        for medium in &other.hung {
            if !self.hung.contains(medium) {
                self.hung.push(*medium);
            }
        }
    }

    /// Has a worker read pages of one extent, or a huge page, unless what they are read from has let a deadline pass.
    pub(super) fn read(
        &mut self,
        shared: &EngineShared,
        core: &Arc<VmapCore>,
        contents: &Contents,
        pages: Range<u64>,
    ) -> Result<How> {
        let Contents { list, window, generation, .. } = contents;
        let generation = *generation;
        let medium = list.read_unit(pages.start).map_or(0, |unit| unit.medium);
        if self.hung.contains(&medium) {
            return Ok(How::Failed { vmap: core.id, generation, pages, why: Why::deadline(), tries: 0 });
        }
        let subject = Subject { vmap: Arc::clone(core), list: list.clone(), window: window.clone() };
        let how = shared.handler.ask(|reply| Command::Read { subject, generation, pages, reply })?;
        if let How::Failed { why: Why { cause: FailureCause::Deadline, .. }, .. } = how {
            self.hung.push(medium);
        }
        Ok(how)
    }
}

/// The pages that are best asked for together, or `alone`, from the first of a range on, if a page source makes that; they may
/// reach behind it.
fn chunk(core: &VmapCore, list: &Kiobuf, pages: Range<u64>, alone: bool) -> Option<Range<u64>> {
    let page = core.page();
    if page.is_huge() {
        let first = page.first_of(pages.start);
        let whole = first..(first + page.base_pages()).min(list.nr_pages());
        return list.made_by_source(whole.clone()).map(|_| whole);
    }
    let made = list.made_by_source(pages.clone()).filter(|made| made.start == pages.start)?;
    let enough = if alone { 1 } else { CHUNK_PAGES };
    // No read is larger.
    let most = (GRANULE_MAX_BYTES / page_size()) as u64;
    let mut end = list.read_unit(made.start)?.pages.end;
    while end < made.end && end - made.start < enough {
        let next = list.read_unit(end)?.pages.end;
        if next - made.start > most {
            break;
        }
        end = next;
    }
    Some(made.start..end)
}

/// From the first page that is missing to the last.
fn missing(core: &VmapCore, window: &Window, pages: Range<u64>) -> Option<Range<u64>> {
    let is_missing = |page: &u64| !is_resident(&core.object, window, *page);
    if core.page().is_huge() {
        return is_missing(&pages.start).then_some(pages);
    }
    let first = pages.clone().find(is_missing)?;
    let last = (first..pages.end).rev().find(is_missing)?;
    Some(first..last + 1)
}

/// The first page from `first` on that a page source makes, or `end`.
pub(crate) fn made_from(core: &VmapCore, first: u64, end: u64) -> u64 {
    let list = core.contents().list;
    let page = core.page();
    list.made_by_source(first..end).map_or(end, |made| page.first_of(made.start).max(first))
}

/// The error of a page that a source did not bring.
pub(crate) fn not_brought(pages: &Range<u64>, why: &Why) -> Error {
    Error::NoPage { pgoff: pages.start, why: why.message().to_owned() }
}
