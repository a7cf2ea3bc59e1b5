//! The page lock (`lock_kiovec`): nobody else's lock on the same pages, and no swapping out, while it is held.

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::fmt;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use nix::sys::mman::{mlock, munlock};

use super::Kiobuf;
use crate::error::{Error, Result};
use crate::page::{page_floor, page_size};

/// Says what to do when another lock holds a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LockWait {
    /// Answer [`Error::PageLocked`] at once.
    No,
    /// Wait until the page is free, for as long as that takes.
    Yes,
}

/// Holds the source pages of a list locked until it is dropped (`unlock_kiovec`).
///
/// It counts as a snapshot of the list.
pub struct PageLock {
    /// The locked pages, as `REGISTRY` has them.
    ranges: Vec<Range<usize>>,
    /// How many of the ranges `mlock` was called for.
    nr_mlocked: usize,
    /// Keeps the pages mapped. Dropped last: it may run the drop code of what the list borrows.
    _kiobuf: Kiobuf,
}

impl Kiobuf {
    /// Locks the pages of memory that the list reads, those of mapped files included, all of them or none.
    ///
    /// A lock excludes every other lock of this process on a page, of whatever list; pages are whole ones, so that two
    /// vectors which share a page conflict. Locked pages are in memory and stay there (`mlock`), which a forked child
    /// does not inherit. `mlock` does not nest: pages that the program had locked itself are unlocked with the rest.
    /// With [`LockWait::Yes`] a thread that holds a lock on one of the pages waits for itself.
    ///
    /// # Errors
    ///
    /// * [`Error::PageLocked`] (`EINVAL`): the list has a page twice.
    /// * [`Error::PageLocked`] (`EAGAIN`): another lock holds a page, and `wait` is [`LockWait::No`].
    /// * [`Error::Sys`]: `mlock` fails with `ENOMEM` (`RLIMIT_MEMLOCK`, or a truncated mapped file) or `EPERM`.
    pub fn lock(&self, wait: LockWait) -> Result<PageLock> {
        let ranges = locked_ranges(self)?;
        REGISTRY.claim(&ranges, wait)?;
        // From here on the drop of `lock` undoes whatever was done.
        let mut lock = PageLock { ranges, nr_mlocked: 0, _kiobuf: self.clone() };
        for range in &lock.ranges {
            // Counted first: where mlock fails to read a page in, it leaves the area marked as locked.
            lock.nr_mlocked += 1;
            if let Some((addr, len)) = address(range) {
                // SAFETY: changes no byte; the range is whole pages that hold data of the list, which `lock` keeps mapped.
                unsafe { mlock(addr, len) }.map_err(Error::sys("mlock of the pages of a list"))?;
            }
        }
        Ok(lock)
    }
}

impl Drop for PageLock {
    fn drop(&mut self) {
        for range in &self.ranges[..self.nr_mlocked] {
            if let Some((addr, len)) = address(range) {
                // SAFETY: as for mlock, and `REGISTRY` says that no other lock relies on these pages. It fails only if
                // they are not mapped, when there is nothing left to unlock.
                let _ = unsafe { munlock(addr, len) };
            }
        }
        REGISTRY.release(&self.ranges);
    }
}

impl fmt::Debug for PageLock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PageLock").field("ranges", &self.ranges).finish_non_exhaustive()
    }
}

fn address(range: &Range<usize>) -> Option<(NonNull<c_void>, usize)> {
    Some((NonNull::new(std::ptr::without_provenance_mut(range.start))?, range.len()))
}

/// Returns the whole pages that the list's memory lies on, in ascending order; refuses a list that has one twice.
fn locked_ranges(kiobuf: &Kiobuf) -> Result<Vec<Range<usize>>> {
    let whole = |bytes: Range<usize>| page_floor(bytes.start)..page_floor(bytes.end - 1) + page_size();
    let mut ranges: Vec<_> = kiobuf.memory_ranges().map(whole).collect();
    ranges.sort_unstable_by_key(|range| range.start);
    match ranges.windows(2).find(|pair| pair[1].start < pair[0].end) {
        Some(pair) => Err(Error::PageLocked { addr: pair[1].start, duplicate: true }),
        None => Ok(ranges),
    }
}

/// The pages of this process that are locked, over all lists.
static REGISTRY: Registry = Registry { held: Mutex::new(Held(BTreeMap::new())), released: Condvar::new() };

struct Registry {
    held: Mutex<Held>,
    released: Condvar,
}

impl Registry {
    fn held(&self) -> MutexGuard<'_, Held> {
        // Nothing that runs under this mutex leaves the map half changed.
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Claims all ranges at once: two claims can't hold half each and wait for each other.
    fn claim(&self, ranges: &[Range<usize>], wait: LockWait) -> Result<()> {
        let mut held = self.held();
        while let Some(addr) = ranges.iter().find_map(|range| held.conflict(range)) {
            if wait == LockWait::No {
                return Err(Error::PageLocked { addr, duplicate: false });
            }
            held = self.released.wait(held).unwrap_or_else(PoisonError::into_inner);
        }
        held.0.extend(ranges.iter().map(|range| (range.start, range.end)));
        Ok(())
    }

    fn release(&self, ranges: &[Range<usize>]) {
        let mut held = self.held();
        for range in ranges {
            held.0.remove(&range.start);
        }
        drop(held);
        self.released.notify_all();
    }
}

/// Disjoint ranges of addresses: start → end.
struct Held(BTreeMap<usize, usize>);

impl Held {
    /// Returns the first address of `range` that is held, if one is.
    fn conflict(&self, range: &Range<usize>) -> Option<usize> {
        if let Some((_, &end)) = self.0.range(..=range.start).next_back()
            && end > range.start
        {
            return Some(range.start);
        }
        self.0.range(range.clone()).next().map(|(&start, _)| start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conflicts_name_the_first_held_address() {
        let held = Held(BTreeMap::from([(10, 20), (20, 30), (40, 50)]));
        for (range, conflict) in [
            (0..10, None),
            (0..11, Some(10)),
            (15..16, Some(15)),
            (29..60, Some(29)),
            (30..40, None),
            (30..41, Some(40)),
            (50..60, None),
            (0..100, Some(10)),
        ] {
            assert_eq!(held.conflict(&range), conflict, "{range:?}");
        }
    }
}
