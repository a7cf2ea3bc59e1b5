//! What lies where in the heap, so that every word of it has exactly one right value at every step.
//!
//! - Page 0: word 0 is the shared counter, the next words are a mark of each process.
//! - Every other page: word 0 is the mark of the process that the page belongs to.
//! - All other words stay the fill for ever.

use std::sync::atomic::Ordering;

use anyhow::{Context, Result, ensure};
use kiomap::{Region, Vmap, page_size};

/// The byte that the heap is filled with, as in the sample driver.
pub(crate) const FILL_BYTE: u8 = 0xff;
/// A word of fill. The counter starts at it: bumping wraps around.
const FILL: u64 = u64::from_ne_bytes([FILL_BYTE; WORD]);
const WORD: usize = size_of::<u64>();

/// Says which page belongs to which process.
#[derive(Clone, Copy)]
pub(crate) struct Layout {
    pub(crate) nr_pages: u64,
    pub(crate) processes: u64,
    /// Pages that one fault brings. Pages belong to processes in whole blocks: no process's fault then brings a page of
    /// another, and who faults what is exactly known.
    pub(crate) block_pages: u64,
}

impl Layout {
    fn owner_of(&self, page: u64) -> u64 {
        page / self.block_pages % self.processes
    }

    /// The pages that belong to a process.
    pub(crate) fn pages_of(self, index: u64) -> impl Iterator<Item = u64> {
        (0..self.nr_pages).filter(move |&page| self.owner_of(page) == index)
    }

    /// The blocks that belong to a process: the faults that it takes to get all of its pages.
    pub(crate) fn blocks_of(&self, index: u64) -> u64 {
        let blocks = self.nr_pages.div_ceil(self.block_pages);
        (blocks + self.processes - 1 - index) / self.processes
    }

    /// The mark that a process puts on a page: never the fill, and different on each.
    fn mark(index: u64, page: u64) -> u64 {
        (index + 1) << 32 | page
    }

    /// How often the counter was bumped, read without a region.
    pub(crate) fn counter_of(&self, vmap: &Vmap) -> Result<u64> {
        let mut word = [0; WORD];
        vmap.read_at(0, &mut word).context("reading the counter")?;
        Ok(u64::from_ne_bytes(word).wrapping_sub(FILL))
    }
}

/// The heap as one process has it.
pub(crate) struct Heap<'a> {
    pub(crate) region: &'a Region,
    pub(crate) layout: Layout,
}

impl Heap<'_> {
    /// Touches the pages that belong to a process, first of all; every byte must be the fill.
    pub(crate) fn fault_in(&self, index: u64) -> Result<()> {
        let mut bytes = vec![0; page_size()];
        for page in self.layout.pages_of(index) {
            self.region.read_at(page as usize * page_size(), &mut bytes)?;
            let wrong = bytes.iter().position(|&byte| byte != FILL_BYTE);
            ensure!(
                wrong.is_none(),
                "page {page} is not filled: byte {} is {:#04x}",
                wrong.unwrap(),
                bytes[wrong.unwrap()]
            );
        }
        Ok(())
    }

    /// Every page of every process begins and ends with the fill, as long as nobody has marked any.
    pub(crate) fn check_fill(&self) -> Result<()> {
        for page in 0..self.layout.nr_pages {
            self.check(page, 0, FILL)?;
            self.check(page, last_word(), FILL)?;
        }
        Ok(())
    }

    /// Marks the pages that belong to a process, and its place in page 0.
    pub(crate) fn mark(&self, index: u64) -> Result<()> {
        self.set(0, 1 + index as usize, Layout::mark(index, 0))?;
        for page in self.layout.pages_of(index).filter(|&page| page != 0) {
            self.set(page, 0, Layout::mark(index, page))?;
        }
        Ok(())
    }

    /// Bumps the counter that all processes share.
    pub(crate) fn bump_counter(&self, rounds: u64) -> Result<()> {
        let counter = self.region.atomic_u64(0)?;
        for _ in 0..rounds {
            counter.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Finds the count, the mark of every process, and the fill behind them.
    pub(crate) fn check_marks(&self, rounds: u64) -> Result<()> {
        let Layout { nr_pages, processes, .. } = self.layout;
        self.check(0, 0, FILL.wrapping_add(processes * rounds))?;
        for index in 0..processes {
            self.check(0, 1 + index as usize, Layout::mark(index, 0))?;
        }
        self.check(0, last_word(), FILL)?;
        (1..nr_pages).try_for_each(|page| self.check_mark(page))
    }

    /// Finds the mark on a page other than the first, and the fill behind it.
    pub(crate) fn check_mark(&self, page: u64) -> Result<()> {
        self.check(page, 0, Layout::mark(self.layout.owner_of(page), page))?;
        self.check(page, last_word(), FILL)
    }

    fn check(&self, page: u64, word: usize, expected: u64) -> Result<()> {
        let found = self.region.atomic_u64(offset(page, word))?.load(Ordering::Relaxed);
        ensure!(found == expected, "word {word} of page {page} is {found:#x}, not {expected:#x}");
        Ok(())
    }

    fn set(&self, page: u64, word: usize, value: u64) -> Result<()> {
        self.region.atomic_u64(offset(page, word))?.store(value, Ordering::Relaxed);
        Ok(())
    }
}

fn offset(page: u64, word: usize) -> usize {
    page as usize * page_size() + word * WORD
}

fn last_word() -> usize {
    page_size() / WORD - 1
}
