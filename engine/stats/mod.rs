//! Counters of what the engine did: written by the threads that do it, each fault-handling thread its own (`shards.rs`),
//! readable at any time.

pub(crate) mod latency;
pub(crate) mod shards;

use std::ops::Deref;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};

use crate::page::page_size;
use shards::Sharded;
pub(crate) use shards::{add, add_own};

macro_rules! counters {
    ($(#[$live_doc:meta])* $live:ident, $(#[$stats_doc:meta])* $stats:ident { $($(#[$doc:meta])* $name:ident,)* }) => {
        $(#[$live_doc])*
        #[derive(Debug, Default)]
        pub(crate) struct $live { $(pub(crate) $name: AtomicU64,)* }

        $(#[$stats_doc])*
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
        #[non_exhaustive]
        pub struct $stats { $($(#[$doc])* pub $name: u64,)* }

        impl Sharded<$live> {
            pub(crate) fn snapshot(&self) -> $stats {
                let mut sum = $stats::default();
                for shard in self.iter() {
                    $(sum.$name += shard.$name.load(Ordering::Relaxed);)*
                }
                sum
            }
        }
    };
}

/// As [`counters`], with those between that an engine and a vmap have alike.
macro_rules! page_counters {
    (
        $(#[$live_doc:meta])* $live:ident,
        $(#[$stats_doc:meta])* $stats:ident { $($before:tt)* } { $($after:tt)* }
    ) => {
        counters! { $(#[$live_doc])* $live, $(#[$stats_doc])* $stats {
            $($before)*
            /// Faults on pages of files and sources, and on those that are put together from parts.
            faults_read,
            /// Faults on pages of zeros.
            faults_zeroed,
            /// Faults on holes, and past the end of the list.
            faults_refused,
            /// Faults on pages that are there and not mapped ([`VmapBuilder::minor_faults`](crate::VmapBuilder::minor_faults)).
            faults_minor,
            /// Pages that were installed by UFFDIO_COPY.
            pages_copied,
            /// Those of them that the fault-handling thread had read or put together.
            pages_read,
            /// Those of them that a worker had read.
            pages_read_by_workers,
            /// Pages that were installed by UFFDIO_ZEROPAGE, because the list asks for zeros.
            pages_zeroed,
            /// Pages that were there and were mapped by UFFDIO_CONTINUE
            /// ([`VmapBuilder::minor_faults`](crate::VmapBuilder::minor_faults)).
            pages_continued,
            /// Pages, of either kind, that were filled through the vmap's window, because the address space went on changing.
            pages_aside,
            /// Resolutions that found the page present (EEXIST); each was followed by a wake-up.
            already_present,
            /// Reads that were handed to the worker threads, further tries included.
            worker_reads,
            /// Faults whose pages came to be read together with a neighbour's.
            reads_merged,
            /// Faults on pages that could not be had: a source failed, a file was shorter than its list, memory ran out. Threads
            /// that wait at the same address count once, as in `pages_poisoned`; pages that failed and that nobody waited for, not.
            source_errors,
            $($after)*
        } }
    };
}

/// The live counters of an engine.
pub(crate) type Counters = Sharded<EngineCounters>;

page_counters! {
    /// What one thread counts for an engine.
    EngineCounters,
    /// Holds the engine's counters as they were at one moment ([`Engine::stats`](crate::Engine::stats)).
    ///
    /// They can be read from any thread while faults are answered. A fault is counted when it is read, before it is
    /// answered. What became of it (pages, SIGBUS) is counted after the kernel has done it, so the thread that was woken may
    /// look before that; after [`Engine::settle`](crate::Engine::settle) everything that happened before is counted exactly.
    /// The numbers of one reading may be of moments that are a little apart.
    ///
    /// What is filled without a fault (by [`Vmap::read_at`](crate::Vmap::read_at),
    /// [`Vmap::write_at`](crate::Vmap::write_at) or a shutdown that fills) is not counted here.
    Stats {
        /// Page-fault messages that were read, and faults that the touching thread answered itself
        /// ([`Delivery::InThread`](crate::Delivery::InThread)). Each is of a missing page, or one of `faults_minor`.
        faults,
        /// Those of them that were writes; of in-thread faults only on x86-64.
        write_faults,
        /// Faults on pages that the list has in memory, ready to be copied. These and those that follow are counted once for each page that is
        /// looked up in a list, where `faults` counts every thread that waits for it.
        faults_copied,
        /// Read calls on userfaultfds that returned messages.
        reads,
    } {
        /// Pages that were answered by SIGBUS (UFFDIO_POISON, or what stands for it before Linux 6.6): holes, pages past the
        /// list, failed sources.
        pages_poisoned,
        /// Those of them that were masked, for want of UFFDIO_POISON.
        pages_masked,
        /// Resolutions that the kernel refused because the address space was changing (EAGAIN); they were tried again.
        changing,
        /// Resolutions that found nothing mapped (ENOENT): the unmap was reported later.
        unmapped,
        /// Faults that were put off, because the address space was changing (EAGAIN) or a resource was not free.
        parked,
        /// Explicit UFFDIO_WAKE calls.
        wakes,
        /// Faults on addresses outside every area that the engine knows or finds in the kernel's table; answered by SIGBUS.
        strays,
        /// Ranges that `mremap` added without an event (grown in place, left behind by `MREMAP_DONTUNMAP`, mapped a second
        /// time), found in the kernel's table when they were first touched. They are served from then on.
        adopted,
        /// Faults of a worker thread on a page that only a worker could have read, and of the thread that starts workers (where what
        /// a list keeps alive is dropped) while none was free for it; answered by SIGBUS.
        self_faults,
        /// Reads that failed and were tried again, or of which the pages that were asked for were read by themselves.
        reads_failed,
        /// Reads that were given up because their deadline had passed.
        reads_expired,
        /// Reads that were not made any more, because what had asked for them was gone.
        reads_cancelled,
        /// Bytes of memory that reads have by now, or that are kept for the next ones
        /// ([`EngineBuilder::read_buffer_bytes`](crate::EngineBuilder::read_buffer_bytes)).
        read_buffer_bytes,
        /// The most that they had at once.
        read_buffer_bytes_peak,
        /// Bytes beside them in which sources are still reading what nobody waits for any more, because the deadline has passed or
        /// the list was exchanged; at most 4 MiB for each of 68 threads.
        read_buffer_bytes_late,
        /// Panics of page sources and callbacks that were caught.
        panics,
        /// Unmap, remap and remove events that were applied.
        events,
        /// Processes that were noticed to be gone (exit, kill or exec).
        processes_gone,
        /// Connections to published vmaps that were cut, because what was said over them was wrong, or nothing in time.
        clients_shed,
        /// Areas, in any process, that were to be locked in memory if allowed
        /// ([`Residency::LockedIfAllowed`](crate::Residency::LockedIfAllowed)) and are not.
        lock_downgrades,
    }
}

impl Stats {
    /// Returns the faults that were reads.
    pub fn read_faults(&self) -> u64 {
        self.faults.saturating_sub(self.write_faults)
    }

    /// Returns the bytes that were installed: copied, or zeros.
    pub fn bytes_installed(&self) -> u64 {
        (self.pages_copied + self.pages_zeroed) * page_size() as u64
    }
}

page_counters! {
    /// What one thread counts for a vmap.
    VmapCounters,
    /// Holds the counters of one vmap, over all areas in all processes, as they were at one moment
    /// ([`Vmap::stats`](crate::Vmap::stats)).
    ///
    /// When they are exact is said at [`Stats`].
    VmapStats {
        /// Faults of writes, one for each page that was looked up.
        write_faults,
        /// Faults on pages that the list has in memory, ready to be copied.
        faults_copied,
    } {
        /// Pages that were answered by SIGBUS, one for each process that touched them.
        pages_poisoned,
    }
}

impl VmapStats {
    /// Returns the faults on its areas, one for each page that was looked up: threads that wait for the same page at once
    /// count once, where [`Stats::faults`] counts each.
    pub fn faults(&self) -> u64 {
        self.faults_copied + self.faults_read + self.faults_zeroed + self.faults_refused + self.faults_minor
    }

    /// Returns the bytes that were installed: copied, or zeros.
    pub fn bytes_installed(&self) -> u64 {
        (self.pages_copied + self.pages_zeroed) * page_size() as u64
    }
}

/// The live counters of one address space.
#[derive(Debug, Default)]
pub(crate) struct SpaceCounters {
    pub(crate) id: u64,
    pub(crate) pid: AtomicI32,
    pub(crate) areas: AtomicU64,
    pub(crate) answered: Sharded<Answered>,
}

/// What one thread counts for an address space.
#[derive(Debug, Default)]
pub(crate) struct Answered {
    pub(crate) faults: AtomicU64,
    pub(crate) pages: AtomicU64,
    pub(crate) poisoned: AtomicU64,
}

impl Deref for SpaceCounters {
    type Target = Answered;

    fn deref(&self) -> &Answered {
        &self.answered
    }
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

impl SpaceStats {
    /// Adds those of another part of the same process.
    pub(crate) fn add(&mut self, part: &SpaceStats) {
        self.areas += part.areas;
        self.faults += part.faults;
        self.pages_installed += part.pages_installed;
        self.pages_poisoned += part.pages_poisoned;
    }
}

impl SpaceCounters {
    pub(crate) fn snapshot(&self) -> SpaceStats {
        let sum =
            |of: fn(&Answered) -> &AtomicU64| self.answered.iter().map(|shard| of(shard).load(Ordering::Relaxed)).sum();
        SpaceStats {
            pid: self.pid.load(Ordering::Relaxed),
            areas: self.areas.load(Ordering::Relaxed),
            faults: sum(|shard| &shard.faults),
            pages_installed: sum(|shard| &shard.pages),
            pages_poisoned: sum(|shard| &shard.poisoned),
        }
    }
}
