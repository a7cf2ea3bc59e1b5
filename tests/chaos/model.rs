//! What each process should have mapped: page by page, and which pages belong to one area.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::script::{Access, VMAPS};

/// What a page of an address space should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cell {
    Page {
        vmap: usize,
        pgoff: u64,
        /// Pages of one area follow one another and have one number, unique in the process.
        area: u64,
        region: u32,
        access: Access,
        writable: bool,
        inherit: bool,
    },
    Foreign(u8),
}

impl Cell {
    pub(crate) fn area(self) -> Option<u64> {
        match self {
            Cell::Page { area, .. } => Some(area),
            Cell::Foreign(_) => None,
        }
    }
}

/// The cells of one process by page number.
#[derive(Debug, Clone, Default)]
pub(crate) struct AddressSpace {
    pub(crate) cells: BTreeMap<usize, Cell>,
    next_area: u64,
}

impl AddressSpace {
    pub(crate) fn new_area(&mut self) -> u64 {
        self.next_area += 1;
        self.next_area
    }

    fn area_at(&self, page: usize) -> Option<u64> {
        self.cells.get(&page)?.area()
    }

    /// Makes a border: what follows is another area.
    pub(crate) fn split(&mut self, at: usize) {
        let Some(area) = self.area_at(at).filter(|_| at > 0 && self.area_at(at - 1) == self.area_at(at)) else {
            return;
        };
        let new = self.new_area();
        for (_, cell) in self.cells.range_mut(at..).take_while(|(_, cell)| cell.area() == Some(area)) {
            if let Cell::Page { area, .. } = cell {
                *area = new;
            }
        }
    }

    /// Takes everything out of a range.
    pub(crate) fn unmap(&mut self, range: Range<usize>) {
        self.split(range.start);
        self.split(range.end);
        let inside: Vec<usize> = self.cells.range(range).map(|(&page, _)| page).collect();
        for page in inside {
            self.cells.remove(&page);
        }
    }

    pub(crate) fn remap(&mut self, from: Range<usize>, to: usize) {
        self.unmap(to..to + from.len());
        self.split(from.start);
        self.split(from.end);
        let moved: Vec<(usize, Cell)> = self.cells.range(from.clone()).map(|(&page, &cell)| (page, cell)).collect();
        for (page, _) in &moved {
            self.cells.remove(page);
        }
        self.cells.extend(moved.into_iter().map(|(page, cell)| (page - from.start + to, cell)));
    }

    /// Makes an area that ends at `end` longer.
    pub(crate) fn grow(&mut self, end: usize, new_end: usize) {
        let Some(&Cell::Page { vmap, pgoff, area, region, access, writable, inherit }) = self.cells.get(&(end - 1))
        else {
            return;
        };
        let more = (end..new_end).zip(pgoff + 1..);
        self.cells.extend(
            more.map(|(page, pgoff)| (page, Cell::Page { vmap, pgoff, area, region, access, writable, inherit })),
        );
    }

    /// Maps a whole area a second time.
    pub(crate) fn double(&mut self, area: Range<usize>, to: usize) {
        let second = self.new_area();
        let pages: Vec<(usize, Cell)> = self.cells.range(area.clone()).map(|(&page, &cell)| (page, cell)).collect();
        for (page, mut cell) in pages {
            if let Cell::Page { area, .. } = &mut cell {
                *area = second;
            }
            self.cells.insert(page - area.start + to, cell);
        }
    }

    /// What a forked child has: what is inherited, with the access that it was attached with.
    pub(crate) fn forked(&self) -> AddressSpace {
        let mut child = self.clone();
        child.cells.retain(|_, cell| !matches!(cell, Cell::Page { inherit: false, .. }));
        for cell in child.cells.values_mut() {
            if let Cell::Page { access, writable, .. } = cell {
                *access = if *writable { Access::Write } else { Access::Read };
            }
        }
        child
    }

    /// The areas of each vmap.
    pub(crate) fn counts(&self) -> [usize; VMAPS] {
        let mut counts = [0; VMAPS];
        let mut before = None;
        for (&page, &cell) in &self.cells {
            if let Cell::Page { vmap, area, .. } = cell {
                if before != Some((page, area)) {
                    counts[vmap] += 1;
                }
                before = Some((page + 1, area));
            }
        }
        counts
    }

    /// Stretches of pages that are alike, of one area.
    pub(crate) fn runs(&self) -> Vec<(Range<usize>, Cell)> {
        let mut runs: Vec<(Range<usize>, Cell)> = Vec::new();
        for (&page, &cell) in &self.cells {
            if let Some((range, first)) = runs.last_mut()
                && range.end == page
                && follows(first, range.len(), &cell)
            {
                range.end += 1;
            } else {
                runs.push((page..page + 1, cell));
            }
        }
        runs
    }

    /// The part of `range` from its start on that is one run; empty where nothing of a vmap is.
    pub(crate) fn run_at(&self, range: Range<usize>) -> Range<usize> {
        let Some(first @ Cell::Page { .. }) = self.cells.get(&range.start) else { return range.start..range.start };
        let len = range
            .clone()
            .take_while(|page| self.cells.get(page).is_some_and(|cell| follows(first, page - range.start, cell)));
        range.start..range.start + len.count()
    }
}

fn follows(first: &Cell, distance: usize, cell: &Cell) -> bool {
    match (*first, *cell) {
        (Cell::Foreign(a), Cell::Foreign(b)) => a == b,
        (Cell::Page { pgoff, .. }, Cell::Page { pgoff: other, .. }) => {
            let Cell::Page { vmap, area, region, access, writable, inherit, .. } = *cell else { return false };
            other == pgoff + distance as u64
                && *first == Cell::Page { vmap, pgoff, area, region, access, writable, inherit }
        }
        _ => false,
    }
}
