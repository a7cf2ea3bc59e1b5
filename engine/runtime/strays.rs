//! Strays: faults on addresses that lie in no area of the table.
//!
//! Some are honest. The kernel sends no event when `mremap` grows a mapping in place, and does not say what else is
//! mapped after one that moved: that with `MREMAP_DONTUNMAP` the old range is left, where the new one ends, that with a
//! length of zero it is a second mapping. All these are registered like what they came from, and its own table knows
//! them. So the keeper looks an address up in `/proc/PID/maps`: at a touch, while the thread sleeps on; after a move; and
//! behind a region that is dropped. What shows pages of a vmap becomes an area; a touch of anything else is SIGBUS.

use std::ops::Range;

use nix::errno::Errno;

use super::fault::Fault;
use crate::page::page_size;
use crate::process::maps::{Maps, Vma};
use crate::space::mmap_vec::MmapVec;
use crate::space::table::Area;
use crate::space::{Space, SpaceId, Target};

/// Addresses looked up at once; threads at further ones touch again.
const LOOKUPS: usize = 64;

/// What the keeper found at an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Finding {
    /// Pages of a vmap.
    Vmap(Shown),
    /// Nothing that could be touched now: it was unmapped, or its access taken.
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

/// Looks an address up; `vmap` tells which vmap a file backs.
pub(crate) fn find(maps: &Maps, addr: usize, vmap: impl FnOnce((libc::dev_t, libc::ino_t)) -> Option<u64>) -> Finding {
    match maps.find(addr) {
        Ok(None | Some(Vma { hidden: true, .. })) => Finding::Nothing,
        Ok(Some(Vma { range, offset, file, .. })) => match vmap(file) {
            Some(vmap) => Finding::Vmap(Shown { range, pgoff: offset / page_size() as u64, vmap }),
            None => Finding::Foreign,
        },
        Err(_) => Finding::Foreign,
    }
}

/// Names a question, never used again: a finding must not answer a later question about the same address, which knows
/// nothing of what was unmapped before it.
pub(crate) type LookupId = u64;

/// An address that is being looked up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Lookup {
    id: LookupId,
    pub(crate) space: SpaceId,
    pub(crate) addr: usize,
    /// The thread that waits there, if one does.
    pub(crate) fault: Option<Fault>,
    /// Around the address: what no event has unmapped or moved since the question. A finding may be older than that.
    pub(crate) untouched: Range<usize>,
}

/// Whether an address is to be looked up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Held {
    New(LookupId),
    /// It is being looked up already.
    Known(LookupId),
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
        self.enter(fault.space, fault.addr, Some(fault))
    }

    /// Has an address looked up at which nobody waits.
    pub(crate) fn probe(&mut self, space: SpaceId, addr: usize) -> Held {
        self.enter(space, addr, None)
    }

    fn enter(&mut self, space: SpaceId, addr: usize, fault: Option<Fault>) -> Held {
        if let Some(known) = self.lookups.iter_mut().find(|known| known.space == space && known.addr == addr) {
            known.fault = known.fault.or(fault);
            return Held::Known(known.id);
        }
        let id = self.next;
        let lookup = Lookup { id, space, addr, fault, untouched: 0..usize::MAX };
        if self.lookups.len() == LOOKUPS || self.lookups.try_push(lookup).is_err() {
            return Held::NoPlace;
        }
        self.next += 1;
        Held::New(id)
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
        for Lookup { addr, untouched, .. } in self.lookups.iter_mut().filter(|lookup| lookup.space == space) {
            if gone.end <= *addr {
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
    let ours = || table.iter().filter(|area| area.target.vmap.id == shown.vmap);
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

    fn fault(space: SpaceId, addr: usize) -> Fault {
        Fault { space, addr, tid: 0, retries: 0, starved: 0, alone: false }
    }

    fn new(held: Held) -> LookupId {
        let Held::New(id) = held else { panic!("{held:?}") };
        id
    }

    #[test]
    fn an_address_is_looked_up_once_and_taken_once() {
        let mut strays = Strays::new().unwrap();
        let id = new(strays.hold(fault(1, 0x5000)));
        assert_eq!(strays.hold(fault(1, 0x5000)), Held::Known(id));
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
    fn a_thread_waits_for_the_look_that_was_taken_before_it_came() {
        let mut strays = Strays::new().unwrap();
        let id = new(strays.probe(1, 0x5000));
        new(strays.probe(1, 0x6000));
        assert_eq!(strays.hold(fault(1, 0x5000)), Held::Known(id));
        assert_eq!(strays.probe(1, 0x5000), Held::Known(id));
        assert_eq!(strays.take(id).unwrap().fault, Some(fault(1, 0x5000)));
        new(strays.hold(fault(1, 0x7000)));
        new(strays.probe(1, 0x8000));
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
