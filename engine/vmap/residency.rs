//! Residency: whether pages of a vmap may be swapped out while a process has them mapped.
//!
//! `mmap_kiobuf` set VM_LOCKED, which made the kernel bring every page at once and went over RLIMIT_MEMLOCK, and which a
//! fork or a `munlock` took away again. Here it is a property of the vmap, set on each of its mappings in each process,
//! with `mlock2(MLOCK_ONFAULT)`: pages are locked when they come, and none is brought.

use crate::process::mapping::Mapping;
use crate::{Error, Result};

/// Says whether pages of a vmap may be swapped out ([`VmapBuilder::residency`](crate::VmapBuilder::residency)).
///
/// Locking concerns pages that a process has mapped: each is locked when it comes there, none is brought for it. A page
/// that no process has mapped any more, or that only [`Vmap::read_at`](crate::Vmap::read_at),
/// [`Vmap::write_at`](crate::Vmap::write_at) or a shutdown brought, can be swapped out until it is touched in a region.
///
/// The whole length of every region counts towards the RLIMIT_MEMLOCK of its process (`VmLck` in `/proc/PID/status`),
/// pages that never come included. CAP_IPC_LOCK lifts the limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Residency {
    /// They may. The default, because data that is larger than memory is what paging is for; the kernel then writes
    /// pages to swap, where there is some, and brings them back by itself, without a fault that the engine sees.
    #[default]
    Swappable,
    /// They may not. An attach that the kernel refuses to lock is refused ([`Error::MemoryLock`]); a forked child for
    /// which it does has none of the engine's memory, and [`Region::check`](crate::Region::check) says why.
    Locked,
    /// They may not where the kernel allows that to be asked. Elsewhere the region is attached all the same, unlocked:
    /// [`Region::is_locked`](crate::Region::is_locked) tells, and [`Stats::lock_downgrades`](crate::Stats) counts it.
    LockedIfAllowed,
}

impl Residency {
    /// All of them, by their numbers in an offer to an unrelated process.
    const NUMBERED: [Residency; 3] = [Residency::Swappable, Residency::Locked, Residency::LockedIfAllowed];

    pub(crate) fn number(self) -> u8 {
        self as u8
    }

    pub(crate) fn of_number(number: u8) -> Option<Residency> {
        Self::NUMBERED.get(usize::from(number)).copied()
    }

    /// Sets it on a new mapping; tells whether the mapping is locked.
    ///
    /// # Errors
    ///
    /// [`Error::MemoryLock`] for [`Residency::Locked`].
    pub(crate) fn apply(self, mapping: &Mapping) -> Result<bool> {
        match self {
            Residency::Swappable => Ok(false),
            Residency::Locked => {
                mapping.lock_on_fault().map_err(|errno| Error::memory_lock(mapping.len(), errno)).map(|()| true)
            }
            Residency::LockedIfAllowed => Ok(mapping.lock_on_fault().is_ok()),
        }
    }

    /// Tells whether a mapping that [`Residency::apply`] left unlocked was to be locked.
    pub(crate) fn is_downgraded(self, locked: bool) -> bool {
        self != Residency::Swappable && !locked
    }
}
