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
use crate::runtime::command::Command;
use crate::runtime::reads::Subject;
use crate::runtime::shared::EngineShared;
use crate::{Error, Result};

/// Pages that are asked for together, or a granule if that is more.
const CHUNK_PAGES: u64 = 64;
/// How often a list may be exchanged while its pages are read.
const EXCHANGES: u32 = 16;

/// Brings pages of a range from its start on, as long as page sources make them; answers how far it came: to the first page that
/// none makes. Tells of pages that can't be had, in order.
///
/// The caller holds nothing of the vmap.
///
/// # Errors
///
/// [`Error::Shutdown`].
pub(crate) fn fetch(
    shared: &EngineShared,
    core: &Arc<VmapCore>,
    pages: Range<u64>,
    mut refused: impl FnMut(Range<u64>, &Why),
) -> Result<u64> {
    let (mut at, mut exchanges) = (pages.start, 0);
    while at < pages.end {
        let contents = core.contents();
        let (Some(window), Some(chunk)) = (&contents.window, chunk(core, &contents.list, at..pages.end)) else { break };
        let end = chunk.end.min(pages.end);
        let Some(missing) = missing(core, window, chunk) else {
            at = end;
            continue;
        };
        match read(shared, core, &contents, missing.clone())? {
            Ok(()) => {}
            // What the list has there now is not known.
            Err(_) if core.generation() != contents.generation && exchanges < EXCHANGES => {
                exchanges += 1;
                continue;
            }
            // A source that did not answer in time will not for each of them.
            Err(why) if why.cause == FailureCause::Deadline || is_unit(core, &contents, &missing) => {
                refused(missing.start.max(at)..missing.end.min(end), &why);
            }
            // One of them may be all that is wrong.
            Err(_) => fetch_apart(shared, core, &contents, missing, pages.end, &mut refused)?,
        }
        at = end;
    }
    Ok(at)
}

/// Tells whether pages come or fail together.
fn is_unit(core: &VmapCore, contents: &Contents, pages: &Range<u64>) -> bool {
    core.page().is_huge() || contents.list.read_unit(pages.start).is_some_and(|unit| pages.end <= unit.pages.end)
}

/// Brings pages that could not be had together, up to `end` and what comes with that.
fn fetch_apart(
    shared: &EngineShared,
    core: &Arc<VmapCore>,
    contents: &Contents,
    pages: Range<u64>,
    end: u64,
    refused: &mut impl FnMut(Range<u64>, &Why),
) -> Result<()> {
    let mut at = pages.start;
    while at < pages.end.min(end) {
        let Some(unit) = contents.list.read_unit(at) else { break };
        let next = unit.pages.end.min(pages.end);
        if let Err(why) = read(shared, core, contents, at..next)? {
            refused(at..next.min(end), &why);
        }
        at = next;
    }
    Ok(())
}

/// The pages that are best asked for together, from the first of a range on, if a page source makes that; they may reach
/// behind it.
fn chunk(core: &VmapCore, list: &Kiobuf, pages: Range<u64>) -> Option<Range<u64>> {
    let page = core.page();
    if page.is_huge() {
        let first = page.first_of(pages.start);
        let whole = first..(first + page.base_pages()).min(list.nr_pages());
        return list.made_by_source(whole.clone()).map(|_| whole);
    }
    let made = list.made_by_source(pages.clone()).filter(|made| made.start == pages.start)?;
    let mut end = list.read_unit(made.start)?.pages.end;
    while end < made.end && end - made.start < CHUNK_PAGES {
        end = list.read_unit(end)?.pages.end;
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

fn read(
    shared: &EngineShared,
    core: &Arc<VmapCore>,
    contents: &Contents,
    pages: Range<u64>,
) -> Result<std::result::Result<(), Why>> {
    let subject = Subject { vmap: Arc::clone(core), list: contents.list.clone(), window: contents.window.clone() };
    let generation = contents.generation;
    shared.handler.ask(|reply| Command::Read { subject, generation, pages, reply })
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
