//! What of a child's addresses belongs to somebody else.
//!
//! Between the list of a child's areas and the fork, other threads of the parent run on: they may unmap a part of an
//! area, and have other memory there, which the child then inherits at that place. It is left alone, and the area
//! consists of the rest.

use nix::errno::Errno;

use crate::page::{page_floor, page_size};
use crate::process::mapping::{is_all_mapped, reserve};
use crate::space::AreaRecord;

/// Ranges of one engine that are noted; a child that meets more is not served.
const MOST_RANGES: usize = 64;

/// Ranges that are taken: disjoint, apart, ascending. It allocates nothing: what would be mapped for that could take the
/// place of an area that is not reserved yet.
pub(crate) struct Taken {
    ranges: [(usize, usize); MOST_RANGES],
    len: usize,
}

impl Taken {
    pub(crate) const fn new() -> Taken {
        Taken { ranges: [(0, 0); MOST_RANGES], len: 0 }
    }

    pub(crate) fn as_slice(&self) -> &[(usize, usize)] {
        &self.ranges[..self.len]
    }

    /// Reserves what is free of a child's areas, which ascend, and notes what is not.
    ///
    /// # Errors
    ///
    /// `EEXIST` when there is no place to note more. The areas that are wholly free are reserved all the same.
    pub(crate) fn reserve_around(&mut self, records: &[AreaRecord]) -> Result<(), Errno> {
        let mut outcome = Ok(());
        for record in records {
            let (start, end) = (record.start as usize, (record.start + record.len) as usize);
            outcome = outcome.and(self.reserve(start, end, record.page_bytes()));
        }
        outcome
    }

    /// By halves, as many as there are borders between the free and the taken.
    fn reserve(&mut self, start: usize, end: usize, granule: usize) -> Result<(), Errno> {
        match reserve(start, end - start) {
            Err(Errno::EEXIST) if is_all_mapped(start, end - start) => self.note(start, end, granule),
            Err(Errno::EEXIST) if end - start > page_size() && self.len < MOST_RANGES => {
                let middle = page_floor(start + (end - start) / 2);
                self.reserve(start, middle, granule)?;
                self.reserve(middle, end, granule)
            }
            other => other,
        }
    }

    /// A huge page that is taken in part is taken: its owner has unmapped all of it.
    fn note(&mut self, start: usize, end: usize, granule: usize) -> Result<(), Errno> {
        let (start, end) = (start & !(granule - 1), end.next_multiple_of(granule));
        if let Some(last) = self.ranges[..self.len].last_mut()
            && last.1 >= start
        {
            last.1 = last.1.max(end);
            return Ok(());
        }
        *self.ranges.get_mut(self.len).ok_or(Errno::EEXIST)? = (start, end);
        self.len += 1;
        Ok(())
    }

    /// The parts of an area that are not taken.
    pub(crate) fn free_of(&self, area: &AreaRecord) -> impl Iterator<Item = AreaRecord> {
        let (mut start, end) = (area.start as usize, (area.start + area.len) as usize);
        let taken = self.as_slice().iter().copied().filter(move |&(from, to)| from < end && start < to);
        taken.chain([(end, end)]).filter_map(move |(from, to)| {
            let part = (start < from).then(|| AreaRecord {
                start: start as u64,
                len: (from - start) as u64,
                pgoff: area.pgoff + ((start as u64 - area.start) / page_size() as u64),
                ..*area
            });
            start = start.max(to);
            part
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::mapping::unmap;

    /// Where nothing is, and the kernel maps nothing of its own choice, in threads of other tests: two places.
    const FREE: [usize; 2] = [0x1_0000_0000, 0x2_0000_0000];

    /// What is noted, and what is left.
    type Reserved = (Vec<(usize, usize)>, Vec<u64>);

    fn record(start: usize, nr_pages: usize) -> AreaRecord {
        let len = (nr_pages * page_size()) as u64;
        AreaRecord { start: start as u64, len, pgoff: 100, region: 1, vmap: 2, flags: 0 }
    }

    /// Reserves areas of these numbers of pages, next to each other, of which some pages are taken. All in pages.
    fn reserve_pages(base: usize, areas: &[usize], taken_pages: &[usize]) -> Result<Reserved, Errno> {
        let page = page_size();
        let nr_pages = areas.iter().sum::<usize>();
        taken_pages.iter().for_each(|n| reserve(base + n * page, page).unwrap());
        let mut records = Vec::new();
        for len in areas {
            let before: u64 = records.iter().map(|record: &AreaRecord| record.len).sum();
            records.push(record(base + before as usize, *len));
        }
        let mut taken = Taken::new();
        let outcome = taken.reserve_around(&records);
        let noted = taken.as_slice().iter().map(|&(from, to)| ((from - base) / page, (to - base) / page)).collect();
        let mut left = Vec::new();
        for part in records.iter().flat_map(|record| taken.free_of(record).map(move |part| (record, part))) {
            let (record, part) = part;
            assert_eq!((part.pgoff - record.pgoff) * page as u64, part.start - record.start);
            left.extend((0..part.len / page as u64).map(|n| (part.start - base as u64) / page as u64 + n));
        }
        assert_eq!(outcome.is_ok(), is_all_mapped(base, nr_pages * page));
        unmap(base, nr_pages * page).unwrap();
        outcome.map(|()| (noted, left))
    }

    #[test]
    fn what_is_free_is_reserved_and_what_is_taken_is_noted() {
        assert_eq!(reserve_pages(FREE[0], &[4], &[]), Ok((vec![], vec![0, 1, 2, 3])));
        assert_eq!(reserve_pages(FREE[0], &[8], &[3]), Ok((vec![(3, 4)], vec![0, 1, 2, 4, 5, 6, 7])));
        assert_eq!(reserve_pages(FREE[0], &[7], &[0, 3, 4, 6]), Ok((vec![(0, 1), (3, 5), (6, 7)], vec![1, 2, 5])));
        assert_eq!(reserve_pages(FREE[0], &[1, 2], &[0, 1]), Ok((vec![(0, 2)], vec![2])));
        assert_eq!(reserve_pages(FREE[0], &[3], &[0, 1, 2]), Ok((vec![(0, 3)], vec![])));
    }

    #[test]
    fn more_ranges_than_can_be_noted_are_an_error() {
        let every_other = |nr_ranges| (0..nr_ranges).map(|n| 2 * n).collect::<Vec<_>>();
        let (noted, left) = reserve_pages(FREE[1], &[2 * MOST_RANGES], &every_other(MOST_RANGES)).unwrap();
        assert_eq!((noted.len(), left.len()), (MOST_RANGES, MOST_RANGES));
        assert_eq!(reserve_pages(FREE[1], &[2 * MOST_RANGES + 2], &every_other(MOST_RANGES + 1)), Err(Errno::EEXIST));
    }
}
