//! Strays: faults on addresses that lie in no area of the table.
//!
//! Some are honest. The kernel sends no event when `mremap` grows a mapping in place, and does not say what else is
//! mapped after one that moved: that with `MREMAP_DONTUNMAP` the old range is left, where the new one ends, that with a
//! length of zero it is a second mapping. All these are registered like what they came from, and its own table knows
//! them. So the keeper looks an address up in `/proc/PID/maps`: at a touch, while the thread sleeps on; after a move; and
//! behind a region that is dropped. What shows pages of a vmap becomes an area; a touch of anything else is SIGBUS.
//!
//! What nobody may touch (PROT_NONE) may be the engine's own: a window, or the mapping of an attach that is under way. It is
//! an area only where an event has said that there is one, or where one mapping begins in an area and goes on behind its
//! end: the kernel keeps the engine's own apart from all others ([`Mapping::set_apart`]).
//!
//! [`Mapping::set_apart`]: crate::process::mapping::Mapping::set_apart

use std::ops::Range;

use nix::errno::Errno;

use super::fault::Fault;
use crate::page::page_size;
use crate::process::maps::{Maps, Vma};
use crate::space::mmap_vec::MmapVec;
use crate::space::stripes::is_same_process;
use crate::space::table::Area;
use crate::space::{Space, SpaceId, Target};
use crate::vmap::object::{FileId, Owner};

/// Addresses looked up at once for threads that wait there; threads at further ones touch again.
const LOOKUPS: usize = 64;

/// What the keeper found at an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Finding {
    /// Pages of a vmap.
    Vmap(Shown),
    /// Pages of a vmap that nobody may touch: perhaps the engine's own mapping.
    Hidden(Shown),
    /// Nothing: it was unmapped.
    Nothing,
    /// Memory that is not a vmap's, or not to be looked at.
    Foreign,
}

/// A range that shows pages of a vmap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Shown {
    pub(crate) range: Range<usize>,
    /// The page at its start.
    pub(crate) pgoff: u64,
    pub(crate) vmap: u64,
}

/// Looks an address up; `owner` tells which vmap a file backs, `details` opens the same table with details.
pub(crate) fn find(
    maps: &Maps,
    addr: usize,
    owner: impl FnOnce(FileId) -> Option<Owner>,
    details: impl FnOnce() -> Option<Maps>,
) -> Finding {
    let vma = match maps.find(addr) {
        Ok(None) => return Finding::Nothing,
        Ok(Some(vma)) => vma,
        Err(_) => return Finding::Foreign,
    };
    let Some(owner) = owner(vma.file) else {
        // Before its touch could be answered, its access was taken.
        return if vma.hidden { Finding::Nothing } else { Finding::Foreign };
    };
    let file = vma.file;
    if !owner.shared {
        return shown(vma, owner);
    }
    match details().map(|maps| maps.find_details(addr)) {
        // Not mapped any more, or by the memfd's owner, who needs nobody to serve it.
        Some(Ok(None)) => Finding::Nothing,
        Some(Ok(Some((vma, details)))) if vma.file != file || !details.is_registered => Finding::Nothing,
        Some(Ok(Some((vma, details)))) if details.is_not_inherited => shown(vma, owner),
        // Registered with another userfaultfd, or the application has changed what a child gets of it.
        Some(Ok(Some(_)) | Err(_)) | None => Finding::Foreign,
    }
}

fn shown(Vma { range, offset, hidden, .. }: Vma, owner: Owner) -> Finding {
    let Some(offset) = offset.checked_sub(owner.base) else { return Finding::Foreign };
    let shown = Shown { range, pgoff: offset / page_size() as u64, vmap: owner.vmap };
    if hidden { Finding::Hidden(shown) } else { Finding::Vmap(shown) }
}

/// Names a question, never used again: a finding must not answer a later question about the same address, which knows
/// nothing of what was unmapped before it.
pub(crate) type LookupId = u64;

/// Why an address is looked up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cause {
    /// It was touched.
    Touch,
    /// An area ends there, and may have grown.
    Behind,
    /// A move began there. All that moved is still there too, unless an unmap of it is reported: the kernel reports that
    /// after the move, before it lets anything be installed.
    Left { len: usize },
    /// A mapping was made there by a move of nothing. It still is there, as above.
    Made,
}

/// An address that is being looked up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Lookup {
    id: LookupId,
    pub(crate) space: SpaceId,
    pub(crate) addr: usize,
    pub(crate) cause: Cause,
    /// The thread that waits there, if one does.
    pub(crate) fault: Option<Fault>,
    /// Around the address: what no event has unmapped or moved since the question. A finding may be older than that.
    pub(crate) untouched: Range<usize>,
}

/// Whether an address is to be looked up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Held {
    New(LookupId),
    /// Another thread waits for it already.
    Known,
    NoPlace,
}

/// The addresses that are being looked up.
pub(crate) struct Strays {
    lookups: MmapVec<Lookup>,
    next: LookupId,
}

impl Strays {
    pub(crate) fn new() -> Result<Strays, Errno> {
        let mut lookups = MmapVec::new();
        lookups.try_reserve(LOOKUPS)?;
        Ok(Strays { lookups, next: 0 })
    }

    /// Holds a fault while its address is looked up.
    pub(crate) fn hold(&mut self, fault: Fault) -> Held {
        let Fault { space, addr, .. } = fault;
        let covers = |lookup: &Lookup| lookup.fault.is_some() && lookup.space == space && lookup.addr == addr;
        if self.lookups.iter().any(covers) {
            return Held::Known;
        }
        if self.lookups.len() >= LOOKUPS {
            return Held::NoPlace;
        }
        self.enter(space, addr, Cause::Touch, Some(fault)).map_or(Held::NoPlace, Held::New)
    }

    /// Has an address looked up at which nobody waits, if there is memory for that. It is a question of its own: one that
    /// was asked before may not see what this is about.
    pub(crate) fn probe(&mut self, space: SpaceId, addr: usize, cause: Cause) -> Option<LookupId> {
        self.enter(space, addr, cause, None)
    }

    fn enter(&mut self, space: SpaceId, addr: usize, cause: Cause, fault: Option<Fault>) -> Option<LookupId> {
        let untouched = match cause {
            Cause::Left { len } => addr..addr + len,
            _ => 0..usize::MAX,
        };
        let id = self.next;
        self.lookups.try_push(Lookup { id, space, addr, cause, fault, untouched }).ok()?;
        self.next += 1;
        Some(id)
    }

    /// Tells a question; `None` when an event has answered it.
    pub(crate) fn get(&self, id: LookupId) -> Option<&Lookup> {
        self.lookups.iter().find(|lookup| lookup.id == id)
    }

    /// Takes a question out; `None` when an event has answered it.
    pub(crate) fn take(&mut self, id: LookupId) -> Option<Lookup> {
        let index = self.lookups.iter().position(|lookup| lookup.id == id)?;
        Some(self.lookups.swap_remove(index))
    }

    /// Takes any fault out, and forgets what nobody waits for.
    pub(crate) fn pop(&mut self) -> Option<Fault> {
        std::iter::from_fn(|| self.lookups.pop()).find_map(|lookup| lookup.fault)
    }

    /// Follows an unmap or a move away. Threads that wait in the range were woken: they are forgotten.
    pub(crate) fn unmapped(&mut self, space: SpaceId, gone: &Range<usize>) {
        if gone.is_empty() {
            return;
        }
        self.lookups.drain_where(|lookup| lookup.space == space && gone.contains(&lookup.addr), drop);
        // What goes on behind the address may be of another space of the process.
        let beside = |lookup: &&mut Lookup| is_same_process(lookup.space, space);
        for Lookup { addr, untouched, .. } in self.lookups.iter_mut().filter(beside) {
            if gone.contains(addr) {
                // Of the address itself its own space tells.
                *untouched = *addr..*addr;
            } else if gone.end <= *addr {
                untouched.start = untouched.start.max(gone.end);
            } else {
                untouched.end = untouched.end.min(gone.start);
            }
        }
    }

    /// Forgets a space that is gone.
    pub(crate) fn forget(&mut self, space: SpaceId) {
        self.lookups.drain_where(|lookup| lookup.space == space, drop);
    }
}

/// Tells what a finding says of areas, and whether it says so only in a space that is not changing. Hidden memory is an
/// area's, or nothing to the engine.
pub(crate) fn uncover(space: &Space, addr: usize, cause: Cause, finding: Finding) -> (Finding, bool) {
    let found = match (finding, cause) {
        // One mapping moved, so one was left, whatever access its parts have by now.
        (Finding::Vmap(shown) | Finding::Hidden(shown), Cause::Left { len }) => {
            let range = shown.range.start..shown.range.end.max(addr + len);
            Shown { range, ..shown }
        }
        (Finding::Hidden(shown), Cause::Made) => shown,
        // An attach that is under way is in no mapping that is an area's too.
        (Finding::Hidden(shown), Cause::Behind) if shown.range.start < addr && space.table.find(addr - 1).is_some() => {
            shown
        }
        (Finding::Hidden(_), _) => return (Finding::Nothing, false),
        (finding, _) => return (finding, false),
    };
    (Finding::Vmap(found), true)
}

/// Makes what was found around `addr` part of the table, as far as it is no area yet and `untouched`; answers whether it
/// did.
///
/// What goes on where an area ends is that area, grown. Anything else is one more area of the region that shows the
/// same pages, and counted. Without such a region there is nobody who would ever unmap it: it is refused.
pub(crate) fn adopt(space: &mut Space, addr: usize, shown: &Shown, untouched: &Range<usize>) -> Result<bool, Errno> {
    let table = &mut space.table;
    let gap = table.gap(addr);
    let start = shown.range.start.max(untouched.start).max(gap.start);
    let end = shown.range.end.min(untouched.end).min(gap.end);
    if !(start..end).contains(&addr) {
        return Ok(false);
    }
    let page = page_size();
    let pgoff = shown.pgoff + ((start - shown.range.start) / page) as u64;
    let last = pgoff + ((end - start) / page) as u64;
    // Huge pages come to no other address without an event: they can't be grown, doubled, or left behind.
    let ours = || table.iter().filter(|area| area.target.vmap.id == shown.vmap && !area.target.page.is_huge());
    // Where page 0 would be: the same for all that is left of one mapping.
    let base = |start: usize, pgoff: u64| start.wrapping_sub((pgoff as usize).wrapping_mul(page));
    let below = ours().rfind(|area| area.end <= start && base(area.start, area.pgoff) == base(start, pgoff));
    let overlapping = || {
        let pages = |area: &Area<Target>| area.pgoff..area.pgoff + (area.len_bytes() / page) as u64;
        ours().find(|area| pages(area).start < last && pgoff < pages(area).end)
    };
    let Some(origin) = below.or_else(overlapping) else { return Ok(false) };
    if origin.end == start && below.is_some() {
        table.grow(start, end);
        return Ok(true);
    }
    let area = Area { start, end, pgoff, ..origin.clone() };
    // Whoever drops a leaving region has counted it as it was.
    let counted = (!area.leaving).then(|| area.target.clone());
    table.try_reserve(1)?;
    if table.insert(area).is_ok()
        && let Some(target) = counted
    {
        target.vmap.open_again();
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stats::latency::Moment;

    fn fault(space: SpaceId, addr: usize) -> Fault {
        Fault {
            space,
            addr,
            tid: 0,
            write: false,
            minor: false,
            since: Moment::UNKNOWN,
            retries: 0,
            starved: 0,
            alone: false,
            failed: None,
        }
    }

    fn new(held: Held) -> LookupId {
        let Held::New(id) = held else { panic!("{held:?}") };
        id
    }

    #[test]
    fn an_address_is_looked_up_once_and_taken_once() {
        let mut strays = Strays::new().unwrap();
        let id = new(strays.hold(fault(1, 0x5000)));
        assert_eq!(strays.hold(fault(1, 0x5000)), Held::Known);
        let other = new(strays.hold(fault(2, 0x5000)));
        let taken = strays.take(id).unwrap();
        assert_eq!((taken.space, taken.addr, taken.fault), (1, 0x5000, Some(fault(1, 0x5000))));
        assert_eq!(taken.untouched, 0..usize::MAX);
        assert_eq!(strays.take(id), None);
        strays.forget(2);
        assert_eq!(strays.take(other), None);
        assert_eq!(strays.pop(), None);
    }

    #[test]
    fn only_threads_share_a_question() {
        let mut strays = Strays::new().unwrap();
        let first = strays.probe(1, 0x5000, Cause::Behind).unwrap();
        let second = strays.probe(1, 0x5000, Cause::Left { len: 0x3000 }).unwrap();
        let third = new(strays.hold(fault(1, 0x5000)));
        assert_eq!(strays.hold(fault(1, 0x5000)), Held::Known);
        assert_eq!(strays.take(first).unwrap().untouched, 0..usize::MAX);
        assert_eq!(strays.get(first), None);
        assert_eq!(strays.take(second).unwrap().untouched, 0x5000..0x8000);
        assert_eq!(strays.take(third).unwrap().fault, Some(fault(1, 0x5000)));
    }

    #[test]
    fn what_nobody_waits_for_is_forgotten_on_the_way_to_a_fault() {
        let mut strays = Strays::new().unwrap();
        new(strays.hold(fault(1, 0x7000)));
        strays.probe(1, 0x8000, Cause::Behind).unwrap();
        assert_eq!(strays.pop(), Some(fault(1, 0x7000)));
        assert_eq!(strays.pop(), None);
    }

    /// What was found before an unmap, and is told after it, is no answer to who asks about the address anew.
    #[test]
    fn a_finding_answers_its_own_question_only() {
        let mut strays = Strays::new().unwrap();
        let before = new(strays.hold(fault(1, 0x5000)));
        strays.unmapped(1, &(0x5000..0x6000));
        let after = new(strays.hold(fault(1, 0x5000)));
        assert_eq!(strays.take(before), None);
        assert_eq!(strays.take(after).unwrap().fault, Some(fault(1, 0x5000)));
    }

    #[test]
    fn more_than_the_places_are_not_held() {
        let mut strays = Strays::new().unwrap();
        for n in 0..LOOKUPS {
            new(strays.hold(fault(0, n * 0x1000)));
        }
        assert_eq!(strays.hold(fault(0, LOOKUPS * 0x1000)), Held::NoPlace);
        assert!(strays.pop().is_some());
        new(strays.hold(fault(0, LOOKUPS * 0x1000)));
    }

    /// What is unmapped while an address is looked up is no part of the finding; a thread that waits in it is forgotten.
    #[test]
    fn an_unmap_narrows_the_findings_of_its_space() {
        let mut strays = Strays::new().unwrap();
        let asked = [(1, 0x5000), (1, 0x9000), (2, 0x5000)];
        let [narrowed, gone, elsewhere] = asked.map(|(space, addr)| new(strays.hold(fault(space, addr))));
        strays.unmapped(1, &(0x7000..0x7000));
        strays.unmapped(1, &(0x8000..0xa000));
        strays.unmapped(1, &(0x1000..0x2000));
        strays.unmapped(1, &(0x2000..0x3000));
        strays.unmapped(1, &(0xb000..0xc000));
        assert_eq!(strays.take(gone), None);
        assert_eq!(strays.take(narrowed).unwrap().untouched, 0x3000..0x8000);
        assert_eq!(strays.take(elsewhere).unwrap().untouched, 0..usize::MAX);
    }
}
