//! Recording which pages of a vmap are faulted on, on the way of the fault.
//!
//! All of it is made beforehand, in memory of its own: a bit for each page, and a place for each of the first pages in the
//! order in which they came. A fault sets its bit, by an atomic operation of which nobody waits for anybody; only the first
//! fault on a page takes a place. Threads of the engine and signal handlers do that alike.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use nix::errno::Errno;

use super::PAGES_MAX;
use crate::space::mmap_vec::MmapVec;
use crate::{Error, Result};

/// The pages of a list that can be recorded: the bits of more would take more than 128 MiB.
const LIST_PAGES_MAX: u64 = 1 << 30;
/// The pages whose order is kept. More are kept without it.
const ORDERED_MAX: u64 = 1 << 20;
const BITS: u64 = u64::BITS as u64;

/// The pages of one vmap that were faulted on.
pub(crate) struct Recorder {
    nr_pages: u64,
    seen: MmapVec<AtomicU64>,
    /// The pages in the order of their first faults, each plus one; 0 is not written yet.
    order: MmapVec<AtomicU64>,
    /// How many places were taken; also those that are not there.
    taken: AtomicUsize,
}

impl Recorder {
    /// Makes the memory for a list of `nr_pages` pages.
    pub(crate) fn new(nr_pages: u64) -> Result<Recorder> {
        if nr_pages > LIST_PAGES_MAX {
            return Err(Error::Invalid {
                what: "the number of pages of a list whose working set is recorded",
                value: nr_pages,
                rule: "it must be at most 2^30: a bit is kept for each",
            });
        }
        let failed = Error::sys("mmap for recording a working set");
        Ok(Recorder {
            nr_pages,
            seen: zeros(nr_pages.div_ceil(BITS)).map_err(&failed)?,
            order: zeros(nr_pages.min(ORDERED_MAX)).map_err(&failed)?,
            taken: AtomicUsize::new(0),
        })
    }

    /// Notes a fault. No lock, no allocation, and no wait.
    pub(crate) fn note(&self, pgoff: u64) {
        if pgoff >= self.nr_pages {
            return;
        }
        let word = &self.seen[(pgoff / BITS) as usize];
        let bit = 1 << (pgoff % BITS);
        if word.load(Ordering::Relaxed) & bit != 0 || word.fetch_or(bit, Ordering::Relaxed) & bit != 0 {
            return;
        }
        let place = self.taken.fetch_add(1, Ordering::Relaxed);
        if let Some(slot) = self.order.get(place) {
            slot.store(pgoff + 1, Ordering::Relaxed);
        }
    }

    /// The pages faulted on so far: in the order of their first faults, then those beyond what is ordered.
    pub(crate) fn pages(&self) -> Vec<u64> {
        let taken = self.taken.load(Ordering::Relaxed).min(self.order.len());
        let placed = self.order[..taken].iter().map(|slot| slot.load(Ordering::Relaxed));
        let mut pages: Vec<u64> = placed.filter(|&page| page != 0).map(|page| page - 1).collect();
        let mut unordered: Vec<u64> = self.seen.iter().map(|word| word.load(Ordering::Relaxed)).collect();
        for page in &pages {
            unordered[(page / BITS) as usize] &= !(1 << (page % BITS));
        }
        for (word, first) in unordered.into_iter().zip((0..).step_by(BITS as usize)) {
            pages.extend((0..BITS).filter(|bit| word >> bit & 1 == 1).map(|bit| first + bit));
        }
        pages.truncate(PAGES_MAX as usize);
        pages
    }
}

/// Words of zeros, each of them written once: the kernel has given the memory by now.
fn zeros(len: u64) -> std::result::Result<MmapVec<AtomicU64>, Errno> {
    let mut words = MmapVec::new();
    words.try_reserve(len as usize)?;
    for _ in 0..len {
        words.try_push(AtomicU64::new(0)).map_err(|(_, errno)| errno)?;
    }
    Ok(words)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_kept_once_and_in_the_order_of_their_first_faults() {
        let recorder = Recorder::new(1000).unwrap();
        assert!(recorder.pages().is_empty());
        for pgoff in [999, 0, 63, 64, 0, 999, 512, 1000, 1024, u64::MAX] {
            recorder.note(pgoff);
        }
        assert_eq!(recorder.pages(), [999, 0, 63, 64, 512]);
    }

    #[test]
    fn many_threads_lose_no_page() {
        const PAGES: u64 = 100_000;
        let recorder = Recorder::new(PAGES).unwrap();
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let recorder = &recorder;
                scope.spawn(move || (0..PAGES).for_each(|n| recorder.note((n * 7919 + thread * 31) % PAGES)));
            }
        });
        let mut pages = recorder.pages();
        assert_eq!(pages.len() as u64, PAGES);
        pages.sort_unstable();
        assert!(pages.into_iter().eq(0..PAGES));
    }

    #[test]
    fn pages_beyond_the_order_are_kept_in_ascending_order() {
        let nr_pages = ORDERED_MAX + 100;
        let recorder = Recorder::new(nr_pages).unwrap();
        (0..nr_pages).rev().for_each(|pgoff| recorder.note(pgoff));
        let expected = (100..nr_pages).rev().chain(0..100);
        assert!(recorder.pages().into_iter().eq(expected));
        assert!(matches!(Recorder::new(LIST_PAGES_MAX + 1), Err(Error::Invalid { .. })));
    }
}
