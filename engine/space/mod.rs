//! One address space that the engine serves: its userfaultfd and its table of areas.
//!
//! The engine's own process, a forked child, and a process that handed its userfaultfd over (`foreign.rs`) are all spaces; so is
//! each part of a region that has a userfaultfd of its own (`stripes.rs`).

pub(crate) mod foreign;
pub(crate) mod mmap_vec;
pub(crate) mod stripes;
pub(crate) mod table;

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

use crate::kiobuf::Kiobuf;
use crate::page::page_size;
use crate::process::ledger::Private;
use crate::runtime::readahead::Streams;
use crate::stats::SpaceCounters;
use crate::sys::{Message, Userfault};
use crate::vmap::core::VmapCore;
use crate::vmap::page_size::PageSize;
use crate::vmap::window::Window;
use foreign::Foreign;
use table::AreaTable;

/// Names a space; never used again within an engine.
pub(crate) type SpaceId = u64;

/// The space of the process that created the engine.
pub(crate) const OWN_SPACE: SpaceId = 0;

/// Stands for the parent of a process that was not forked from one that is served.
pub(crate) const NO_SPACE: SpaceId = SpaceId::MAX;

/// What the pages of an area are.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    pub(crate) vmap: Arc<VmapCore>,
    /// The page list as of `generation`.
    pub(crate) list: Kiobuf,
    /// Where its pages are filled while this address space is changing.
    pub(crate) window: Option<Arc<Window>>,
    pub(crate) generation: u64,
    /// What lists from that generation on have, this one has too.
    pub(crate) kept_since: u64,
    /// The vmap's.
    pub(crate) page: PageSize,
    /// A forked child gets this area too.
    pub(crate) inherit: bool,
    /// What its last faults say about the next.
    pub(crate) streams: Streams,
}

impl Target {
    /// Tells whether its list has what that of a vmap had in a generation.
    pub(crate) fn keeps(&self, vmap: u64, generation: u64) -> bool {
        self.vmap.id == vmap && (self.kept_since..=self.generation).contains(&generation)
    }
}

/// One served address space; only the fault-handling thread changes it. Different threads may lock what is unheard of two that
/// lie side by side: each has cache lines of its own.
#[repr(align(128))]
pub(crate) struct Space {
    pub(crate) id: SpaceId,
    /// That from which it was forked.
    pub(crate) parent: SpaceId,
    /// `None` until a forked child has sent its descriptor.
    pub(crate) uffd: Option<Arc<Private<Userfault>>>,
    /// Where a forked child's guard takes orders to mask pages; `None` for the own process, and where nobody needs to.
    pub(crate) masks: Option<Arc<Private<OwnedFd>>>,
    /// Another userfaultfd of a forked child, which reports no changes, so that pages can be mapped while the first does. `None`
    /// for the own process, which has the vmaps' windows for that, and where no vmap has minor faults.
    pub(crate) aside: Option<Arc<Private<Userfault>>>,
    /// What is particular to it if its memory is not the engine's.
    pub(crate) foreign: Option<Foreign>,
    pub(crate) table: AreaTable<Target>,
    pub(crate) counters: Arc<SpaceCounters>,
    /// A message that a member of the crew has read and can't answer, for the owner. Locked by who reads.
    pub(crate) unheard: Mutex<Option<Message>>,
}

/// An area as it is told to the process that shall map it. Plain numbers: it crosses process borders.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[repr(C)]
pub(crate) struct AreaRecord {
    pub(crate) start: u64,
    pub(crate) len: u64,
    pub(crate) pgoff: u64,
    pub(crate) region: u64,
    pub(crate) vmap: u64,
    /// A set of [`AreaRecord::WRITABLE`], [`AreaRecord::INHERIT`] and [`AreaRecord::UNLOCKED`]; the upper half is the size of
    /// a huge page in bytes, or 0.
    pub(crate) flags: u64,
}

impl AreaRecord {
    pub(crate) const BYTES: usize = size_of::<AreaRecord>();
    /// The mapping is read-write.
    pub(crate) const WRITABLE: u64 = 1;
    /// A forked child gets the area too.
    pub(crate) const INHERIT: u64 = 2;
    /// In an attach of a child: the mapping was to be locked if allowed, and is not.
    pub(crate) const UNLOCKED: u64 = 4;

    pub(crate) const WORDS: usize = Self::BYTES / 8;

    pub(crate) fn to_words(self) -> [u64; Self::WORDS] {
        [self.start, self.len, self.pgoff, self.region, self.vmap, self.flags]
    }

    pub(crate) fn from_words([start, len, pgoff, region, vmap, flags]: [u64; Self::WORDS]) -> AreaRecord {
        AreaRecord { start, len, pgoff, region, vmap, flags }
    }

    pub(crate) fn flags(writable: bool, inherit: bool) -> u64 {
        (Self::WRITABLE * u64::from(writable)) | (Self::INHERIT * u64::from(inherit))
    }

    fn page_flags(page: PageSize) -> u64 {
        if page.is_huge() { (page.bytes() as u64) << 32 } else { 0 }
    }

    /// The size of its pages in bytes.
    pub(crate) fn page_bytes(&self) -> usize {
        match self.flags >> 32 {
            0 => page_size(),
            huge => huge as usize,
        }
    }

    pub(crate) fn nr_pages(&self) -> u64 {
        self.len / page_size() as u64
    }

    pub(crate) fn is_writable(&self) -> bool {
        self.flags & Self::WRITABLE != 0
    }

    pub(crate) fn of(area: &table::Area<Target>) -> AreaRecord {
        AreaRecord {
            start: area.start as u64,
            len: area.len_bytes() as u64,
            pgoff: area.pgoff,
            region: area.region,
            vmap: area.target.vmap.id,
            flags: AreaRecord::flags(area.writable, area.target.inherit) | AreaRecord::page_flags(area.target.page),
        }
    }
}

/// At most this many pieces of a region are told in one answer.
pub(crate) const PIECES_PER_ANSWER: usize = 8;

/// Some of the ranges that a region still consists of.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Pieces {
    pub(crate) ranges: [(usize, usize); PIECES_PER_ANSWER],
    pub(crate) len: usize,
}

impl Pieces {
    pub(crate) fn as_slice(&self) -> &[(usize, usize)] {
        self.ranges.get(..self.len).unwrap_or(&self.ranges)
    }

    pub(crate) fn push(&mut self, start: usize, end: usize) {
        if let Some(slot) = self.ranges.get_mut(self.len) {
            *slot = (start, end);
            self.len += 1;
        }
    }
}
