//! The table of one address space: which addresses show which pages of what.
//!
//! Pure data and logic. It makes no system call but for the growth of its storage, takes no lock and doesn't allocate,
//! because the thread that reads the space's userfaultfd looks up each fault here and follows each unmap and remap.
//! An *area* is what the kernel calls a vma: an attach adds one, an unmap of its middle leaves two. Two areas never
//! become one, even when addresses and pages follow on: each belongs to the attach that it came from.

use std::ops::Range;

use nix::errno::Errno;

use super::mmap_vec::MmapVec;
use crate::page::{is_aligned, page_size};

/// A range of addresses and the pages that it shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Area<T> {
    /// The first address, page-aligned.
    pub(crate) start: usize,
    /// The address after the last, page-aligned and above `start`.
    pub(crate) end: usize,
    /// The page of the target at `start`.
    pub(crate) pgoff: u64,
    /// The id of the attach that it came from.
    pub(crate) region: u64,
    /// Stores are allowed.
    pub(crate) writable: bool,
    /// Its owner is unmapping it: that it closes is no news.
    pub(crate) leaving: bool,
    /// What it shows; a clone must not allocate, so an `Arc` or a number.
    pub(crate) target: T,
}

impl<T> Area<T> {
    /// Returns the length in bytes.
    pub(crate) fn len_bytes(&self) -> usize {
        self.end - self.start
    }

    /// Tells whether `addr` lies in it.
    pub(crate) fn contains(&self, addr: usize) -> bool {
        self.start <= addr && addr < self.end
    }

    /// Returns the page that `addr`, an address of this area, shows.
    #[inline]
    pub(crate) fn pgoff_of(&self, addr: usize) -> u64 {
        debug_assert!(self.contains(addr));
        self.pgoff + ((addr - self.start) / page_size()) as u64
    }
}

/// Says what a change of the table means for the count of the areas that show a target.
///
/// Trimming an area and moving a whole one mean nothing, so they are not reported. [`Change::Split`] comes before any
/// [`Change::Closed`] of the same call: a count that goes both ways never passes through zero.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Change<T> {
    /// An area became two: one more shows this target.
    Split(T),
    /// The last of this area is gone: one fewer shows its target. It is given as it was, leaving or not.
    Closed(Area<T>),
}

/// Says why an area was not inserted, and gives it back.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum InsertError<T> {
    /// Some of its addresses belong to another area.
    Overlap(Area<T>),
    /// The table could not grow.
    NoMemory(Area<T>, Errno),
}

/// Finds the area that `addr` lies in, among the areas of a table.
#[inline]
pub(crate) fn find_in<T>(areas: &[Area<T>], addr: usize) -> Option<&Area<T>> {
    areas.get(areas.partition_point(|area| area.end <= addr)).filter(|area| area.contains(addr))
}

/// The areas of one address space.
pub(crate) struct AreaTable<T> {
    /// Sorted by address, disjoint, none empty, all page-aligned.
    areas: MmapVec<Area<T>>,
}

impl<T: Clone> AreaTable<T> {
    /// Makes an empty table.
    pub(crate) const fn new() -> Self {
        AreaTable { areas: MmapVec::new() }
    }

    /// Returns the number of areas.
    pub(crate) fn len(&self) -> usize {
        self.areas.len()
    }

    /// Tells whether there is no area.
    pub(crate) fn is_empty(&self) -> bool {
        self.areas.is_empty()
    }

    /// Makes room for more areas: that many inserts and splits can't fail for want of memory.
    pub(crate) fn try_reserve(&mut self, additional: usize) -> Result<(), Errno> {
        self.areas.try_reserve(additional)
    }

    /// Walks over the areas by address.
    pub(crate) fn iter(&self) -> std::slice::Iter<'_, Area<T>> {
        self.areas.iter()
    }

    /// Walks over the areas by address; `start` and `end` must stay as they are.
    pub(crate) fn iter_mut(&mut self) -> std::slice::IterMut<'_, Area<T>> {
        self.areas.iter_mut()
    }

    /// Takes the last area out.
    pub(crate) fn pop(&mut self) -> Option<Area<T>> {
        self.areas.pop()
    }

    /// Finds the area that `addr` lies in.
    #[inline]
    pub(crate) fn find(&self, addr: usize) -> Option<&Area<T>> {
        find_in(&self.areas, addr)
    }

    /// Finds the area that `addr` lies in; `start` and `end` must stay as they are.
    pub(crate) fn find_mut(&mut self, addr: usize) -> Option<&mut Area<T>> {
        let index = self.index_after(addr);
        self.areas.get_mut(index).filter(|area| area.contains(addr))
    }

    /// Walks over the areas that have an address in `start..end`, by address.
    pub(crate) fn overlapping(&self, start: usize, end: usize) -> impl Iterator<Item = &Area<T>> {
        self.areas[self.index_after(start)..].iter().take_while(move |area| area.start < end)
    }

    /// Adds an area.
    ///
    /// # Errors
    ///
    /// [`InsertError::Overlap`] or [`InsertError::NoMemory`], with the area; the table is as before.
    pub(crate) fn insert(&mut self, area: Area<T>) -> Result<(), InsertError<T>> {
        debug_assert!(area.start < area.end && is_aligned(area.start) && is_aligned(area.end));
        let index = self.index_after(area.start);
        if self.areas.get(index).is_some_and(|next| next.start < area.end) {
            return Err(InsertError::Overlap(area));
        }
        self.areas.try_insert(index, area).map_err(|(area, errno)| InsertError::NoMemory(area, errno))
    }

    /// Tells the addresses around `addr` that belong to no area, as itself doesn't.
    pub(crate) fn gap(&self, addr: usize) -> Range<usize> {
        let next = self.index_after(addr);
        let start = next.checked_sub(1).map_or(0, |before| self.areas[before].end);
        let end = self.areas.get(next).map_or(usize::MAX, |area| area.start);
        start..end.max(start)
    }

    /// Lets the area that ends at `at` reach to `end`, as mremap(2) does in place; does nothing if no area ends there or
    /// another is in the way.
    pub(crate) fn grow(&mut self, at: usize, end: usize) {
        let next = self.index_after(at);
        let free = self.areas.get(next).is_none_or(|next| end <= next.start);
        let before = next.checked_sub(1).map(|before| &mut self.areas[before]);
        if let Some(area) = before.filter(|area| area.end == at && at < end && free) {
            area.end = end;
        }
    }

    /// Follows an unmap of `start..end` by the kernel: trims, splits and removes what lies in it.
    ///
    /// The range is what was asked of munmap(2), rounded to pages: it may reach over holes and several areas.
    ///
    /// # Errors
    ///
    /// What mmap(2) answers when a split needs memory for the piece more; the table is as before.
    pub(crate) fn unmap(&mut self, start: usize, end: usize, mut change: impl FnMut(Change<T>)) -> Result<(), Errno> {
        if start >= end {
            return Ok(());
        }
        if self.find(start).is_some_and(|area| area.start < start && end < area.end) {
            self.split(end, &mut change)?;
        }
        if let Some(area) = self.find_mut(start).filter(|area| area.start < start) {
            area.end = start;
        }
        if let Some(area) = self.find_mut(end).filter(|area| area.start < end) {
            area.pgoff = area.pgoff_of(end);
            area.start = end;
        }
        self.areas.drain_where(|area| start <= area.start && area.end <= end, |area| change(Change::Closed(area)));
        Ok(())
    }

    /// Follows a move of `len` bytes at `from` to `to` by mremap(2).
    ///
    /// Only what is in the table moves, split at the borders of the range; each page keeps its offset. What lay at the
    /// destination is removed as by [`AreaTable::unmap`], since the kernel unmapped it first. The kernel then reports
    /// an unmap of the old range, which finds nothing there, or, after `MREMAP_DONTUNMAP`, no unmap at all.
    ///
    /// # Errors
    ///
    /// What mmap(2) answers when a split needs memory for the pieces more; `EINVAL` for a range that wraps around.
    /// The table is as before.
    pub(crate) fn remap(
        &mut self,
        from: usize,
        to: usize,
        len: usize,
        mut change: impl FnMut(Change<T>),
    ) -> Result<(), Errno> {
        let from_end = from.checked_add(len).ok_or(Errno::EINVAL)?;
        let to_end = to.checked_add(len).ok_or(Errno::EINVAL)?;
        if from == to || len == 0 {
            return Ok(());
        }
        // All the memory that the splits below can need: after this none of them fails, so nothing ends half-done.
        self.areas.try_reserve([from, from_end, to].into_iter().filter(|&addr| self.is_inside(addr)).count())?;
        self.split(from, &mut change)?;
        self.split(from_end, &mut change)?;
        // The kernel refuses a destination that overlaps the source; should it come all the same, what moves is spared.
        if from < to {
            self.unmap(to.max(from_end), to_end, &mut change)?;
        } else {
            self.unmap(to, to_end.min(from), &mut change)?;
        }
        let first = self.index_after(from);
        let last = first + self.areas[first..].partition_point(|area| area.start < from_end);
        for area in &mut self.areas[first..last] {
            area.start = area.start - from + to;
            area.end = area.end - from + to;
        }
        // The destination is free, so what moved stays together: it changes places with the areas that it jumped over.
        if from < to {
            let jumped = self.areas[last..].partition_point(|area| area.start < to);
            self.areas[first..last + jumped].rotate_right(jumped);
        } else {
            let landing = self.areas[..first].partition_point(|area| area.start < to);
            self.areas[landing..last].rotate_left(first - landing);
        }
        Ok(())
    }

    /// Walks over what is left of one attach, by address.
    pub(crate) fn pieces_of(&self, region: u64) -> impl Iterator<Item = &Area<T>> {
        self.iter().filter(move |area| area.region == region)
    }

    /// Notes that the owner of one attach is about to unmap all of it; returns of how many pieces it consists.
    pub(crate) fn mark_leaving(&mut self, region: u64) -> usize {
        self.iter_mut().filter(|area| area.region == region).map(|area| area.leaving = true).count()
    }

    /// Returns the index of the first area that ends after `addr`: the one that contains it, or else the next.
    fn index_after(&self, addr: usize) -> usize {
        self.areas.partition_point(|area| area.end <= addr)
    }

    /// Tells whether a border at `addr` would cut an area in two.
    fn is_inside(&self, addr: usize) -> bool {
        self.find(addr).is_some_and(|area| area.start < addr)
    }

    /// Cuts the area around `addr` in two there; does nothing where there is a border or no area.
    fn split(&mut self, addr: usize, change: &mut impl FnMut(Change<T>)) -> Result<(), Errno> {
        let index = self.index_after(addr);
        let Some(area) = self.areas.get(index).filter(|area| area.start < addr) else {
            return Ok(());
        };
        let tail = Area { start: addr, pgoff: area.pgoff_of(addr), ..area.clone() };
        // Whoever unmaps a leaving area has counted it as it was.
        let counted = (!area.leaving).then(|| area.target.clone());
        self.areas.try_insert(index + 1, tail).map_err(|(_, errno)| errno)?;
        self.areas[index].end = addr;
        if let Some(target) = counted {
            change(Change::Split(target));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, HashMap};
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::super::mmap_vec::tests::GROWTH_REFUSED;
    use super::*;

    /// The address of a page, counted from far enough above zero that no test gets below it.
    fn at(page: usize) -> usize {
        (0x1000 + page) * page_size()
    }

    fn area(pages: std::ops::Range<usize>, pgoff: u64, region: u64) -> Area<u64> {
        Area {
            start: at(pages.start),
            end: at(pages.end),
            pgoff,
            region,
            writable: true,
            leaving: false,
            target: region,
        }
    }

    fn table(areas: impl IntoIterator<Item = Area<u64>>) -> AreaTable<u64> {
        let mut table = AreaTable::new();
        areas.into_iter().for_each(|area| table.insert(area).unwrap());
        table
    }

    fn areas(table: &AreaTable<u64>) -> Vec<Area<u64>> {
        table.iter().cloned().collect()
    }

    /// Unmaps pages and returns what was reported.
    fn unmap(table: &mut AreaTable<u64>, pages: std::ops::Range<usize>) -> Vec<Change<u64>> {
        let mut changes = Vec::new();
        table.unmap(at(pages.start), at(pages.end), |change| changes.push(change)).unwrap();
        changes
    }

    /// Moves pages and returns what was reported.
    fn remap(table: &mut AreaTable<u64>, from: std::ops::Range<usize>, to: usize) -> Vec<Change<u64>> {
        let mut changes = Vec::new();
        table.remap(at(from.start), at(to), from.len() * page_size(), |change| changes.push(change)).unwrap();
        changes
    }

    /// (T33)
    #[test]
    fn unmap_of_the_middle_leaves_two_areas_with_their_own_pgoff() {
        let mut table = table([area(0..10, 100, 1)]);
        assert_eq!(unmap(&mut table, 3..5), [Change::Split(1)]);
        assert_eq!(areas(&table), [area(0..3, 100, 1), area(5..10, 105, 1)]);
        assert_eq!(table.find(at(2) + 17).map(|area| area.pgoff_of(at(2) + 17)), Some(102));
        assert_eq!(table.find(at(3)), None);
        assert_eq!(table.find(at(5) - 1), None);
        assert_eq!(table.find(at(5)).map(|area| area.pgoff_of(at(5))), Some(105));
    }

    /// (T34)
    #[test]
    fn unmap_of_the_head_leaves_the_pgoff_of_the_rest() {
        let mut table = table([area(0..10, 100, 1)]);
        assert_eq!(unmap(&mut table, 0..4), []);
        assert_eq!(areas(&table), [area(4..10, 104, 1)]);
        assert_eq!(table.find(at(3)), None);
        assert_eq!(table.find(at(9)).map(|area| area.pgoff_of(at(9))), Some(109));
    }

    /// (T35)
    #[test]
    fn unmap_of_the_tail_leaves_the_rest() {
        let mut table = table([area(0..10, 100, 1)]);
        assert_eq!(unmap(&mut table, 7..10), []);
        assert_eq!(areas(&table), [area(0..7, 100, 1)]);
    }

    /// (T36) The range that is reported may be larger than the area.
    #[test]
    fn unmap_of_all_closes_the_area_once() {
        for pages in [2..10, 0..10, 2..12, 0..12] {
            let mut table = table([area(2..10, 100, 1)]);
            assert_eq!(unmap(&mut table, pages.clone()), [Change::Closed(area(2..10, 100, 1))]);
            assert!(table.is_empty());
            assert_eq!(unmap(&mut table, pages), []);
        }
    }

    /// (T36)
    #[test]
    fn an_area_unmapped_piece_by_piece_closes_with_its_last_piece() {
        let mut table = table([area(0..5, 0, 1)]);
        assert_eq!(unmap(&mut table, 2..3), [Change::Split(1)]);
        assert_eq!(unmap(&mut table, 0..2), [Change::Closed(area(0..2, 0, 1))]);
        assert_eq!(unmap(&mut table, 3..4), []);
        assert_eq!(unmap(&mut table, 4..5), [Change::Closed(area(4..5, 4, 1))]);
        assert!(table.is_empty());
    }

    /// (T37)
    #[test]
    fn one_unmap_over_two_areas_and_a_gap_closes_both_once() {
        let mut table = table([area(0..4, 0, 1), area(4..6, 9, 3), area(8..12, 50, 2)]);
        let closed = [Change::Closed(area(4..6, 9, 3)), Change::Closed(area(8..12, 50, 2))];
        assert_eq!(unmap(&mut table, 4..12), closed);
        assert_eq!(areas(&table), [area(0..4, 0, 1)]);
    }

    /// (T37)
    #[test]
    fn one_unmap_over_two_areas_and_a_gap_trims_both() {
        let mut table = table([area(0..4, 0, 1), area(8..12, 50, 2)]);
        assert_eq!(unmap(&mut table, 3..9), []);
        assert_eq!(areas(&table), [area(0..3, 0, 1), area(9..12, 51, 2)]);
        assert_eq!(unmap(&mut table, 3..9), []);
        assert_eq!(table.len(), 2);
    }

    /// (T41)
    #[test]
    fn an_area_grows_into_the_gap_behind_it_and_no_further() {
        let mut table = table([area(2..4, 7, 1), area(8..9, 0, 2)]);
        assert_eq!(table.gap(at(5)), at(4)..at(8));
        assert_eq!(table.gap(at(4)), at(4)..at(8));
        assert_eq!(table.gap(at(20)), at(9)..usize::MAX);
        assert_eq!(table.gap(at(1)), 0..at(2));
        for (from, to) in [(5, 6), (4, 9), (0, 1), (3, 5), (8, 10)] {
            table.grow(at(from), at(to));
            assert_eq!(areas(&table), [area(2..4, 7, 1), area(8..9, 0, 2)], "{from} to {to}");
        }
        table.grow(at(4), at(6));
        table.grow(at(6), at(8));
        table.grow(at(9), at(11));
        assert_eq!(areas(&table), [area(2..8, 7, 1), area(8..11, 0, 2)]);
        assert_eq!(unmap(&mut table, 7..11), [Change::Closed(area(8..11, 0, 2))]);
        assert_eq!(areas(&table), [area(2..7, 7, 1)]);
    }

    #[test]
    fn an_empty_unmap_changes_nothing() {
        let mut table = table([area(0..4, 0, 1)]);
        assert_eq!(unmap(&mut table, 2..2), []);
        assert_eq!(table.unmap(at(3), at(1), |_| panic!("nothing changes")), Ok(()));
        assert_eq!(areas(&table), [area(0..4, 0, 1)]);
    }

    /// (T39)
    #[test]
    fn a_moved_area_is_found_at_its_new_address_and_the_unmap_of_the_old_finds_nothing() {
        for to in [20, 2] {
            let mut table = table([area(0..2, 7, 2), area(8..12, 100, 1), area(16..18, 7, 3)]);
            assert_eq!(remap(&mut table, 8..12, to), []);
            assert_eq!(unmap(&mut table, 8..12), []);
            assert_eq!(table.find(at(9)), None);
            assert_eq!(table.find(at(to + 3)), Some(&area(to..to + 4, 100, 1)));
            assert_eq!(table.len(), 3);
        }
    }

    /// (T39) The pieces that the move adds are reported before anything closes.
    #[test]
    fn a_move_of_the_middle_splits_twice_and_takes_the_pgoff_along() {
        let mut table = table([area(0..10, 100, 1), area(22..23, 0, 2)]);
        let expected = [Change::Split(1), Change::Split(1), Change::Closed(area(22..23, 0, 2))];
        assert_eq!(remap(&mut table, 4..7, 20), expected);
        assert_eq!(unmap(&mut table, 4..7), []);
        assert_eq!(areas(&table), [area(0..4, 100, 1), area(7..10, 107, 1), area(20..23, 104, 1)]);
    }

    /// (T39)
    #[test]
    fn a_move_onto_an_area_replaces_the_part_that_it_covers() {
        let mut table = table([area(0..2, 0, 1), area(10..20, 50, 2)]);
        assert_eq!(remap(&mut table, 0..2, 14), [Change::Split(2)]);
        assert_eq!(areas(&table), [area(10..14, 50, 2), area(14..16, 0, 1), area(16..20, 56, 2)]);
    }

    /// (T39)
    #[test]
    fn a_move_of_a_range_with_holes_moves_what_is_there() {
        let mut table = table([area(1..2, 0, 1), area(4..5, 5, 2), area(6..8, 9, 3)]);
        assert_eq!(remap(&mut table, 0..6, 30), []);
        assert_eq!(areas(&table), [area(6..8, 9, 3), area(31..32, 0, 1), area(34..35, 5, 2)]);
        assert_eq!(remap(&mut table, 30..36, 0), []);
        assert_eq!(areas(&table), [area(1..2, 0, 1), area(4..5, 5, 2), area(6..8, 9, 3)]);
    }

    /// (T39) What the table doesn't know still overwrites what it does.
    #[test]
    fn a_move_of_nothing_known_clears_its_destination() {
        let mut table = table([area(0..2, 0, 1), area(4..6, 5, 2)]);
        assert_eq!(remap(&mut table, 10..15, 0), [Change::Closed(area(0..2, 0, 1))]);
        assert_eq!(areas(&table), [area(5..6, 6, 2)]);
    }

    #[test]
    fn a_move_that_wraps_around_is_refused() {
        let mut table = table([area(0..2, 0, 1)]);
        let len = 2 * page_size();
        assert_eq!(table.remap(at(0), usize::MAX - len + 1, len, |_| panic!("nothing changes")), Err(Errno::EINVAL));
        assert_eq!(areas(&table), [area(0..2, 0, 1)]);
    }

    /// (T41) The kernel reports no growth in place, and a moving growth with the old length.
    #[test]
    fn addresses_past_the_recorded_end_find_nothing() {
        let mut table = table([area(0..4, 100, 1)]);
        assert!(table.find(at(4) - 1).is_some());
        assert_eq!(table.find(at(4)), None);
        assert_eq!(table.find(at(0) - 1), None);
        remap(&mut table, 0..4, 50);
        assert!(table.find(at(54) - 1).is_some());
        assert_eq!(table.find(at(54)), None);
    }

    /// (T42) A shrinking mremap(2) is reported as an unmap of the tail.
    #[test]
    fn a_shrink_cuts_the_tail_and_no_count() {
        let mut table = table([area(0..8, 100, 1), area(8..9, 0, 2)]);
        assert_eq!(unmap(&mut table, 2..8), []);
        assert_eq!(areas(&table), [area(0..2, 100, 1), area(8..9, 0, 2)]);
    }

    /// (T43) `MREMAP_DONTUNMAP`: the kernel reports the move and no unmap.
    #[test]
    fn a_move_without_an_unmap_leaves_nothing_at_the_old_address() {
        let mut table = table([area(0..4, 100, 1)]);
        assert_eq!(remap(&mut table, 0..4, 8), []);
        assert_eq!(table.find(at(0)), None);
        assert_eq!(areas(&table), [area(8..12, 100, 1)]);
        table.insert(area(0..4, 100, 2)).unwrap();
        assert_eq!(table.find(at(1)).map(|area| area.region), Some(2));
    }

    /// (T45)
    #[test]
    fn adjacent_areas_with_contiguous_pgoff_stay_apart() {
        let mut table = table([area(0..4, 0, 1), area(4..8, 4, 2)]);
        assert_eq!(table.len(), 2);
        assert_eq!(unmap(&mut table, 0..4).len(), 1);
        assert_eq!(areas(&table), [area(4..8, 4, 2)]);
        table.insert(area(0..4, 0, 3)).unwrap();
        assert_eq!(unmap(&mut table, 0..8).len(), 2);
    }

    /// (T102)
    #[test]
    fn the_first_and_last_byte_of_64_adjacent_areas_find_their_own() {
        // Inserted in an order that is not theirs.
        let mut table = table((0..64).map(|i| i * 37 % 64).map(|i| area(3 * i..3 * i + 3, 1000 * i as u64, i as u64)));
        for i in 0..64 {
            for addr in [at(3 * i), at(3 * i + 3) - 1] {
                let found = table.find(addr).unwrap();
                assert_eq!((found.region, found.len_bytes()), (i as u64, 3 * page_size()));
                assert_eq!(found.pgoff_of(addr), 1000 * i as u64 + u64::from(addr != at(3 * i)) * 2);
            }
        }
        assert_eq!(table.find(at(0) - 1), None);
        assert_eq!(table.find(at(192)), None);
        table.find_mut(at(100)).unwrap().writable = false;
        assert_eq!(table.iter().filter(|area| !area.writable).map(|area| area.region).collect::<Vec<_>>(), [33]);
    }

    #[test]
    fn an_area_that_overlaps_comes_back() {
        let mut table = table([area(4..8, 0, 1)]);
        for pages in [4..8, 3..5, 7..9, 5..6, 0..20] {
            let refused = area(pages, 0, 2);
            assert_eq!(table.insert(refused.clone()), Err(InsertError::Overlap(refused)));
        }
        table.insert(area(0..4, 0, 2)).unwrap();
        table.insert(area(8..9, 0, 3)).unwrap();
        assert_eq!(table.iter().map(|area| area.region).collect::<Vec<_>>(), [2, 1, 3]);
    }

    #[test]
    fn a_leaving_area_closes_and_says_so() {
        let mut table = table([area(0..4, 0, 1), area(4..8, 0, 2)]);
        unmap(&mut table, 1..2);
        table.mark_leaving(1);
        assert_eq!(
            table.pieces_of(1).map(|area| (area.start, area.leaving)).collect::<Vec<_>>(),
            [(at(0), true), (at(2), true)]
        );
        let closed =
            |change: &Change<u64>| matches!(change, Change::Closed(area) if area.leaving == (area.region == 1));
        let changes = unmap(&mut table, 0..8);
        assert!(changes.len() == 3 && changes.iter().all(closed), "{changes:?}");
    }

    #[test]
    fn without_memory_nothing_changes_and_what_needs_none_still_works() {
        // Fills the table to the last place of its mapping.
        let mut table = AreaTable::new();
        table.insert(area(0..3, 0, 0)).unwrap();
        GROWTH_REFUSED.set(true);
        let full = (1..).map(|i| area(4 * i..4 * i + 3, 0, i as u64)).find_map(|area| table.insert(area).err());
        let Some(InsertError::NoMemory(refused, Errno::ENOMEM)) = full else { panic!("{full:?}") };
        let (before, count) = (areas(&table), table.len());
        assert_eq!(refused, area(4 * count..4 * count + 3, 0, count as u64));

        let page = page_size();
        assert_eq!(table.unmap(at(1), at(2), |_| panic!("nothing changes")), Err(Errno::ENOMEM));
        assert_eq!(table.remap(at(1), at(3), page, |_| panic!("nothing changes")), Err(Errno::ENOMEM));
        assert_eq!(table.remap(at(0), at(3), page, |_| panic!("nothing changes")), Err(Errno::ENOMEM));
        assert_eq!(table.remap(at(0), at(5), page, |_| panic!("nothing changes")), Err(Errno::ENOMEM));
        assert_eq!(areas(&table), before);

        // One place becomes free: enough for one split, not for the two of a move.
        assert_eq!(unmap(&mut table, 4..7).len(), 1);
        let before = areas(&table);
        for (from, to) in [(1, 4), (0, 9), (2, 9)] {
            assert_eq!(table.remap(at(from), at(to), page, |_| panic!("nothing changes")), Err(Errno::ENOMEM));
        }
        assert_eq!(areas(&table), before);
        assert_eq!(unmap(&mut table, 1..2), [Change::Split(0)]);
        assert_eq!(remap(&mut table, 8..11, 4), []);
        assert_eq!(unmap(&mut table, 4..5), []);
        GROWTH_REFUSED.set(false);
    }

    /// What a page shows: its offset, the attach, and the area, by a number that no two areas have.
    type Shown = (u64, u64, usize);

    /// The table as the plainest thing that it could be: each page by itself.
    #[derive(Default)]
    struct Model {
        pages: BTreeMap<usize, Shown>,
        areas: usize,
    }

    impl Model {
        fn insert(&mut self, first: usize, len: usize, pgoff: u64, region: u64) -> bool {
            let free = self.pages.range(first..first + len).next().is_none();
            if free {
                self.areas += 1;
                self.pages.extend((0..len).map(|i| (first + i, (pgoff + i as u64, region, self.areas))));
            }
            free
        }

        fn remap(&mut self, from: usize, to: usize, len: usize) {
            let moved: Vec<_> = (0..len).filter_map(|i| Some((to + i, self.pages.remove(&(from + i))?))).collect();
            self.pages.retain(|page, _| !(to..to + len).contains(page));
            // What moves is an area of its own from now on, wherever it lands.
            let mut renumbered = HashMap::new();
            for (page, (pgoff, region, area)) in moved {
                let area = *renumbered.entry(area).or_insert_with(|| {
                    self.areas += 1;
                    self.areas
                });
                self.pages.insert(page, (pgoff, region, area));
            }
        }

        /// Counts the areas of each attach: runs of pages that belong to the same one.
        fn counts(&self) -> HashMap<u64, i64> {
            let mut counts = HashMap::new();
            for (page, &(_, region, area)) in &self.pages {
                if self.pages.get(&(page.wrapping_sub(1))).is_none_or(|before| before.2 != area) {
                    *counts.entry(region).or_default() += 1;
                }
            }
            counts
        }
    }

    #[derive(Clone, Debug)]
    enum Step {
        Insert { first: usize, len: usize, pgoff: u64, region: u64 },
        Unmap { first: usize, len: usize },
        Remap { from: usize, to: usize, len: usize },
    }

    const PAGES: usize = 64;
    const LONGEST: usize = 24;
    const REGIONS: u64 = 12;

    fn step() -> impl Strategy<Value = Step> {
        let page = || 0..PAGES;
        let insert = (page(), 1..12_usize, 0..100_u64, 0..REGIONS);
        prop_oneof![
            6 => insert.prop_map(|(first, len, pgoff, region)| Step::Insert { first, len, pgoff, region }),
            4 => (page(), 0..LONGEST).prop_map(|(first, len)| Step::Unmap { first, len }),
            4 => (page(), page(), 0..LONGEST).prop_map(|(from, to, len)| Step::Remap { from, to, len }),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig {
            cases: if cfg!(miri) { 4 } else { 512 },
            failure_persistence: None,
            ..ProptestConfig::default()
        })]

        /// Any sequence of steps leaves what a map of single pages would hold, and reports exactly the counts.
        #[test]
        fn it_shows_what_a_map_of_single_pages_would(
            steps in prop::collection::vec(step(), 1..if cfg!(miri) { 20 } else { 120 }),
        ) {
            let targets: Vec<_> = (0..REGIONS).map(Arc::new).collect();
            let mut table = AreaTable::new();
            let mut model = Model::default();
            for step in steps {
                let (pages_before, counts_before) = (model.pages.clone(), model.counts());
                let mut changes = Vec::new();
                match step.clone() {
                    Step::Insert { first, len, pgoff, region } => {
                        let target = targets[region as usize].clone();
                        let (start, end) = (at(first), at(first + len));
                        let area = Area { start, end, pgoff, region, writable: true, leaving: false, target };
                        prop_assert_eq!(table.insert(area).is_ok(), model.insert(first, len, pgoff, region));
                    }
                    Step::Unmap { first, len } => {
                        table.unmap(at(first), at(first + len), |change| changes.push(change)).unwrap();
                        model.pages.retain(|page, _| !(first..first + len).contains(page));
                    }
                    Step::Remap { from, to, len } => {
                        table.remap(at(from), at(to), len * page_size(), |change| changes.push(change)).unwrap();
                        if from != to {
                            model.remap(from, to, len);
                        }
                    }
                }

                let shown = |addr| table.find(addr).map(|area| (area.pgoff_of(addr), area.region));
                for page in 0..PAGES + LONGEST {
                    let expected = model.pages.get(&page).map(|shown| (shown.0, shown.1));
                    prop_assert_eq!(shown(at(page)), expected, "page {} after {:?}", page, step);
                    prop_assert_eq!(shown(at(page + 1) - 1), expected);
                }
                prop_assert!(table.iter().all(|area| area.start < area.end));
                prop_assert!(table.iter().zip(table.iter().skip(1)).all(|(area, next)| area.end <= next.start));
                prop_assert!(table.iter().all(|area| *area.target == area.region && is_aligned(area.start | area.end)));

                let counts = model.counts();
                prop_assert_eq!(table.len() as i64, counts.values().sum::<i64>());
                if matches!(step, Step::Unmap { .. } | Step::Remap { .. }) {
                    let mut reported = counts_before;
                    let mut closed_one = false;
                    for change in &changes {
                        match change {
                            Change::Split(target) => {
                                prop_assert!(!closed_one);
                                *reported.entry(**target).or_default() += 1;
                            }
                            Change::Closed(area) => {
                                closed_one = true;
                                let page = area.start / page_size() - 0x1000;
                                let before = pages_before.get(&page).map(|shown| (shown.0, shown.1));
                                prop_assert_eq!(before, Some((area.pgoff, area.region)));
                                *reported.entry(area.region).or_default() -= 1;
                            }
                        }
                    }
                    reported.retain(|_, count| *count != 0);
                    prop_assert_eq!(reported, counts);
                }

                // No reference to a target is lost or left over.
                drop(changes);
                for target in &targets {
                    prop_assert_eq!(Arc::strong_count(target) - 1, table.pieces_of(**target).count());
                }
            }
        }
    }
}
