//! Counters of what the engine did: written with relaxed stores by the thread that does it, readable at any time.

use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// The live counters.
        #[derive(Debug, Default)]
        pub(crate) struct Counters { $(pub(crate) $name: AtomicU64,)* }

        /// Holds the engine's counters as they were at one moment ([`Engine::stats`](crate::Engine::stats)).
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
        #[non_exhaustive]
        pub struct Stats { $($(#[$doc])* pub $name: u64,)* }

        impl Counters {
            pub(crate) fn snapshot(&self) -> Stats {
                Stats { $($name: self.$name.load(Ordering::Relaxed),)* }
            }
        }
    };
}

counters! {
    /// Page-fault messages that were read.
    faults,
    /// Those of them that were writes.
    write_faults,
    /// Pages that were installed by UFFDIO_COPY.
    pages_copied,
    /// Pages that were installed by UFFDIO_ZEROPAGE, because the list asks for zeros.
    pages_zeroed,
    /// Pages that were answered by SIGBUS (UFFDIO_POISON, or what stands for it before Linux 6.6): holes, pages past the
    /// list, failed sources.
    pages_poisoned,
    /// Resolutions that found the page present (EEXIST); each was followed by a wake-up.
    already_present,
    /// Faults that were put off, because the address space was changing (EAGAIN) or a resource was not free.
    parked,
    /// Explicit UFFDIO_WAKE calls.
    wakes,
    /// Faults on addresses outside every area that the engine knows or finds in the kernel's table; answered by SIGBUS.
    strays,
    /// Ranges that `mremap` added without an event (grown in place, left behind by `MREMAP_DONTUNMAP`, mapped a second
    /// time), found in the kernel's table when they were first touched. They are served from then on.
    adopted,
    /// Faults of a worker thread on a page that only a worker could have read; answered by SIGBUS.
    self_faults,
    /// Reads that were handed to the worker threads.
    worker_reads,
    /// Pages that could not be had: a source failed, a file was shorter than its list, memory ran out.
    source_errors,
    /// Panics of page sources and callbacks that were caught.
    panics,
    /// Unmap, remap and remove events that were applied.
    events,
    /// Read calls on userfaultfds that returned messages.
    reads,
    /// Processes that were noticed to be gone (exit, kill or exec).
    processes_gone,
    /// Areas, in any process, that were to be locked in memory if allowed
    /// ([`Residency::LockedIfAllowed`](crate::Residency::LockedIfAllowed)) and are not.
    lock_downgrades,
}

/// Adds to a counter.
pub(crate) fn add(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Ordering::Relaxed);
}

/// The live counters of one address space.
#[derive(Debug, Default)]
pub(crate) struct SpaceCounters {
    pub(crate) id: u64,
    pub(crate) pid: AtomicI32,
    pub(crate) areas: AtomicU64,
    pub(crate) faults: AtomicU64,
    pub(crate) pages: AtomicU64,
    pub(crate) poisoned: AtomicU64,
}

/// Describes one process that the engine serves ([`Engine::spaces`](crate::Engine::spaces)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct SpaceStats {
    /// The process's id; 0 for a forked child that has not reported yet.
    pub pid: i32,
    /// Areas attached there.
    pub areas: u64,
    /// Page-fault messages from there.
    pub faults: u64,
    /// Pages installed there.
    pub pages_installed: u64,
    /// Pages answered there by SIGBUS.
    pub pages_poisoned: u64,
}

impl SpaceCounters {
    pub(crate) fn snapshot(&self) -> SpaceStats {
        SpaceStats {
            pid: self.pid.load(Ordering::Relaxed),
            areas: self.areas.load(Ordering::Relaxed),
            faults: self.faults.load(Ordering::Relaxed),
            pages_installed: self.pages.load(Ordering::Relaxed),
            pages_poisoned: self.poisoned.load(Ordering::Relaxed),
        }
    }
}
