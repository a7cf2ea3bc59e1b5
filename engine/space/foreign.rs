//! What is particular to an address space whose userfaultfd another process made and handed over.
//!
//! Its memory is private to that process: pages are copied in, and belong to no vmap's object. The features of its
//! userfaultfd are the maker's choice, so that any event may come or not come.

use std::ops::Range;

use memmap2::MmapMut;
use nix::errno::Errno;

use super::SpaceId;
use super::mmap_vec::MmapVec;
use super::table::Area;
use crate::adopt::{Outside, Refusal};
use crate::page::page_size;

/// Marks the ids of foreign spaces, which come after all others.
pub(crate) const FOREIGN: SpaceId = 1 << 61;

/// Tells whether a space is foreign.
pub(crate) fn is_foreign(space: SpaceId) -> bool {
    space & FOREIGN != 0
}

/// The rules of a foreign space, and what it has given up.
pub(crate) struct Foreign {
    pub(crate) outside: Outside,
    pub(crate) refusal: Refusal,
    /// Its userfaultfd reports forks, each of which makes a space.
    pub(crate) forks: bool,
    /// How often it has moved memory.
    pub(crate) moves: u64,
    /// For each area, by its region.
    entries: MmapVec<Entry>,
    /// A bit for each page that an area was adopted with: its process has given it up (`MADV_DONTNEED`, `MADV_REMOVE`), so that
    /// it is zeros from then on. Memory is taken when a bit is set.
    bits: Option<MmapMut>,
    /// Some are.
    any: bool,
}

/// Where the bits of an area are.
#[derive(Clone, Copy, Debug)]
struct Entry {
    region: u64,
    /// The pages that it was adopted with.
    first: u64,
    nr_pages: u64,
    /// The bit of the first.
    at: usize,
}

impl Foreign {
    pub(crate) fn new(outside: Outside, refusal: Refusal, forks: bool) -> Foreign {
        Foreign { outside, refusal, forks, moves: 0, entries: MmapVec::new(), bits: None, any: false }
    }

    /// Makes room for what areas may give up, before they are served: of regions in ascending order, with their pages.
    pub(crate) fn enter(&mut self, areas: impl Iterator<Item = (u64, Range<u64>)>) -> Result<(), Errno> {
        let mut at = 0_usize;
        for (region, pages) in areas {
            let nr_pages = pages.end - pages.start;
            let entry = Entry { region, first: pages.start, nr_pages, at };
            self.entries.try_push(entry).map_err(|(_, errno)| errno)?;
            // Each begins with a byte of its own.
            let bits = usize::try_from(nr_pages).ok().and_then(|bits| bits.checked_next_multiple_of(8));
            at = bits.and_then(|bits| at.checked_add(bits)).ok_or(Errno::ENOMEM)?;
        }
        self.bits = if at == 0 { None } else { Some(anonymous(at / 8)?) };
        Ok(())
    }

    fn entry(&self, region: u64) -> Option<Entry> {
        let index = self.entries.binary_search_by_key(&region, |entry| entry.region).ok()?;
        Some(self.entries[index])
    }

    /// Notes that an address range of an area was given up.
    pub(crate) fn give_up<T>(&mut self, area: &Area<T>, addrs: Range<usize>) {
        let (start, end) = (area.start.max(addrs.start), area.end.min(addrs.end));
        if start >= end {
            return;
        }
        let first = area.pgoff_of(start);
        let pages = first..first + ((end - start).div_ceil(page_size())) as u64;
        if let (Some(entry), Some(bits)) = (self.entry(area.region), &mut self.bits) {
            self.any |= set(bits, entry.bits_of(pages));
        }
    }

    /// Tells whether a page of an area was given up.
    pub(crate) fn has_given_up<T>(&self, area: &Area<T>, pgoff: u64) -> bool {
        self.any && self.entry(area.region).is_some_and(|entry| self.has(entry, pgoff))
    }

    fn has(&self, entry: Entry, pgoff: u64) -> bool {
        let bit = entry.bits_of(pgoff..pgoff + 1).next();
        self.bits.as_ref().zip(bit).is_some_and(|(bits, bit)| bits[bit / 8] & 1 << (bit % 8) != 0)
    }

    /// The pages around `pgoff`, of `window`, of which none was given up, as it was not.
    pub(crate) fn kept<T>(&self, area: &Area<T>, window: Range<u64>, pgoff: u64) -> Range<u64> {
        let Some(entry) = self.entry(area.region).filter(|_| self.any) else { return window };
        let start =
            (window.start..pgoff).rev().find(|&page| self.has(entry, page)).map_or(window.start, |page| page + 1);
        let end = (pgoff..window.end).find(|&page| self.has(entry, page)).unwrap_or(window.end);
        start..end
    }

    /// Tells whether a huge page was given up as a whole; `None` if a part of it was, which is no huge page then.
    pub(crate) fn has_given_up_all<T>(&self, area: &Area<T>, pages: Range<u64>) -> Option<bool> {
        let Some(entry) = self.entry(area.region).filter(|_| self.any) else { return Some(false) };
        let given_up = self.has(entry, pages.start);
        pages.into_iter().all(|page| self.has(entry, page) == given_up).then_some(given_up)
    }

    /// Rules by which everything is refused.
    pub(crate) fn refusing(&self) -> Foreign {
        Foreign::new(Outside::Sigbus, Refusal::Sigbus, self.forks)
    }

    /// The same for a child that was just forked. It is never killed for a page: nothing is known by which to kill it.
    pub(crate) fn forked(&self) -> Result<Foreign, Errno> {
        let mut child = self.refusing();
        child.outside = self.outside;
        child.entries.try_reserve(self.entries.len())?;
        for entry in self.entries.iter() {
            child.entries.try_push(*entry).map_err(|(_, errno)| errno)?;
        }
        if let Some(bits) = &self.bits {
            let mut copy = anonymous(bits.len())?;
            if self.any {
                copy.copy_from_slice(bits);
            }
            (child.bits, child.any) = (Some(copy), self.any);
        }
        Ok(child)
    }
}

impl Entry {
    /// The bits of pages, as far as there are some.
    fn bits_of(&self, pages: Range<u64>) -> Range<usize> {
        let bit = |pgoff: u64| self.at + pgoff.saturating_sub(self.first).min(self.nr_pages) as usize;
        bit(pages.start)..bit(pages.end)
    }
}

/// Sets bits; tells whether there were any.
fn set(bits: &mut [u8], Range { mut start, end }: Range<usize>) -> bool {
    let any = start < end;
    while start < end {
        // Whole bytes at once: it may be all memory of a machine.
        let bytes = if start.is_multiple_of(8) { (end - start) / 8 } else { 0 };
        if bytes > 0 {
            bits[start / 8..start / 8 + bytes].fill(0xff);
            start += bytes * 8;
        } else {
            bits[start / 8] |= 1 << (start % 8);
            start += 1;
        }
    }
    any
}

fn anonymous(bytes: usize) -> Result<MmapMut, Errno> {
    MmapMut::map_anon(bytes).map_err(|error| error.raw_os_error().map_or(Errno::ENOMEM, Errno::from_raw))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn area(start_page: usize, nr_pages: usize, pgoff: u64, region: u64) -> Area<()> {
        let start = start_page * page_size();
        Area { start, end: start + nr_pages * page_size(), pgoff, region, writable: true, leaving: false, target: () }
    }

    #[test]
    fn what_is_given_up_splits_windows_and_stays_with_the_pages() {
        let mut foreign = Foreign::new(Outside::Sigbus, Refusal::Sigbus, true);
        foreign.enter([(3, 0..10), (7, 100..200)].into_iter()).unwrap();
        let whole = area(1000, 100, 100, 7);
        assert_eq!(foreign.kept(&whole, 120..150, 130), 120..150);
        let page = page_size();
        foreign.give_up(&whole, 1025 * page..1026 * page);
        foreign.give_up(&whole, 1040 * page..1041 * page);
        assert_eq!(foreign.kept(&whole, 120..150, 130), 126..140);
        assert!(foreign.has_given_up(&whole, 125) && !foreign.has_given_up(&whole, 126));
        // A part of it that moved elsewhere.
        let moved = area(5000, 50, 120, 7);
        assert!(foreign.has_given_up(&moved, 125) && foreign.has_given_up(&moved, 140));
        foreign.give_up(&whole, 1050 * page..1077 * page);
        for at in [49, 50, 55, 56, 63, 64, 71, 72, 76, 77] {
            assert_eq!(foreign.has_given_up(&whole, 100 + at), (50..77).contains(&at), "page {at}");
        }
        assert_eq!(foreign.has_given_up_all(&whole, 150..170), Some(true));
        assert_eq!(
            (foreign.has_given_up_all(&whole, 126..140), foreign.has_given_up_all(&whole, 120..130)),
            (Some(false), None)
        );
        let child = foreign.forked().unwrap();
        foreign.give_up(&moved, 5000 * page..6000 * page);
        assert!(
            foreign.has_given_up(&moved, 120) && !child.has_given_up(&moved, 120) && child.has_given_up(&moved, 125)
        );
        assert!(!foreign.has_given_up(&whole, 190) && !foreign.has_given_up(&area(0, 10, 0, 3), 5));
    }
}
