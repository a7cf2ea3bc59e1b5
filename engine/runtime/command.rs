//! What other threads ask of the fault-handling thread, and what it tells them.

use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use nix::errno::Errno;

use super::buffers::ReadBuffer;
use super::call::Ticket;
use super::huge::HugeMemory;
use super::reads::{How, Outcome, Subject};
use super::strays::{Finding, LookupId};
use crate::process::ledger::Private;
use crate::snapshot::View;
use crate::space::mmap_vec::MmapVec;
use crate::space::table::{Area, InsertError};
use crate::space::{AreaRecord, Pieces, Space, SpaceId, Target};
use crate::stats::SpaceCounters;
use crate::sys::Userfault;
use crate::vmap::core::{Contents, VmapCore};
use crate::vmap::failure::Why;
use crate::vmap::page_size::PageSize;

/// The child's half of a fork, as the fault-handling thread sees it.
pub(crate) struct Forked {
    /// What the child shall map.
    pub(crate) records: MmapVec<AreaRecord>,
    pub(crate) outcome: Result<(), Errno>,
}

/// Why an area was not entered. It goes back: nothing is freed where that is said.
pub(crate) enum NotEntered {
    /// The table refused it.
    Table(InsertError<Target>),
    /// The engine was shut down, or the space is gone.
    Ended(#[expect(dead_code, reason = "dropped by the asker")] Area<Target>),
    /// Its address space is changing: to be asked again.
    Changing(#[expect(dead_code, reason = "dropped by the asker")] Area<Target>),
}

/// Why a range was not taken out of a child's areas.
pub(crate) enum NotCut {
    /// Its parent's address space is changing: to be asked again.
    Changing,
    /// `EEXIST`: it is the parent's area still. `ESRCH`: one of both is gone. `ENOMEM`. `EINVAL`.
    Refused(Errno),
}

/// An address space is changing: what was asked can't be said now, but soon.
pub(crate) struct Changing;

/// An address of a space. Spaces and addresses are gone through in this order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Place {
    pub(crate) space: SpaceId,
    pub(crate) addr: usize,
}

/// How far pages were mapped where they were SIGBUS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Healed {
    Everywhere,
    /// Before that place. The fault-handling thread has other things to do.
    Before(Place),
    /// The same, because its address space is changing: to be gone on with in a moment.
    Changing(Place),
}

/// A foreign space that is to be served.
pub(crate) struct NewForeign {
    pub(crate) space: Space,
    /// For the children that it may fork.
    pub(crate) spares: MmapVec<Arc<SpaceCounters>>,
}

/// What is done with pages of a foreign space that are missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bringing {
    Fill,
    /// They are made SIGBUS.
    Poison,
}

/// Addresses of a foreign space of which pages are to be brought.
pub(crate) struct Bring {
    pub(crate) space: SpaceId,
    pub(crate) addrs: Range<usize>,
    pub(crate) how: Bringing,
}

/// How far that came.
pub(crate) struct Brought {
    /// All before that is attended to.
    pub(crate) at: usize,
    /// Pages that could not be had.
    pub(crate) failed: u64,
    /// How often the process has moved memory.
    pub(crate) moves: u64,
    pub(crate) halt: Halt,
}

/// Why it came no further.
pub(crate) enum Halt {
    /// It is all.
    End,
    /// The fault-handling thread has other things to do.
    More,
    /// The address space is changing, or memory is short: to be gone on with in a moment.
    Changing,
    /// That page of a vmap has to be read first.
    Blocked(Arc<VmapCore>, u64),
    /// The process is gone, or the space was taken out.
    Gone,
}

/// A request to the fault-handling thread. It answers without allocating or freeing memory: whatever is to be
/// dropped goes back in the answer, or is kept alive by the asker.
pub(crate) enum Command {
    /// Adds an area to a space, unless that is changing at this moment.
    Insert { space: SpaceId, area: Area<Target>, reply: Ticket<Result<(), NotEntered>> },
    /// Tells pieces of a region.
    Pieces { space: SpaceId, region: u64, reply: Ticket<Pieces> },
    /// Tells the first range of `start..end` that is a region's of the own process, and the page at its start.
    Piece { region: u64, start: usize, end: usize, reply: Ticket<Option<(Range<usize>, u64)>> },
    /// Marks a region of the own process, and tells of how many pieces it consists: their end will not be reported, and
    /// a split of them not be counted. The asker counts them, and says `Left`.
    Leave { region: u64, reply: Ticket<usize> },
    /// A region that was left is counted.
    Left,
    /// Tells the start of an area of the own process that overlaps a range.
    Overlap { start: usize, end: usize, reply: Ticket<Result<Option<usize>, Changing>> },
    /// Makes the space of a child that is about to be forked from `parent`, and counts its areas.
    Fork { parent: SpaceId, child: Arc<SpaceCounters>, records: MmapVec<AreaRecord>, reply: Ticket<Forked> },
    /// Tells the areas that a child of a space would inherit, from the `skip`ped on, `most` of them.
    Inherited { parent: SpaceId, skip: usize, most: usize, records: MmapVec<AreaRecord>, reply: Ticket<Forked> },
    /// Takes a range out of the areas of a child that has not greeted yet: something else lies there since the fork, and
    /// its parent has no longer got it either.
    Cut { space: SpaceId, start: usize, end: usize, reply: Ticket<Result<(), NotCut>> },
    /// Gives a child's space its userfaultfd, and what it needs besides. The asker keeps all of it.
    Adopt {
        space: SpaceId,
        uffd: Arc<Private<Userfault>>,
        masks: Option<Arc<Private<OwnedFd>>>,
        aside: Option<Arc<Private<Userfault>>>,
        reply: Ticket<Result<(), Errno>>,
    },
    /// Serves a stripe, which has no area yet; it goes back if that can't be.
    #[allow(clippy::type_complexity, reason = "what is refused is given back")]
    TakeStripe { space: Space, reply: Ticket<Result<(), (Space, Errno)>> },
    /// Serves a foreign space; it goes back if that can't be.
    #[allow(clippy::type_complexity, reason = "what is refused is given back")]
    TakeForeign { new: NewForeign, reply: Ticket<Result<(), (NewForeign, Errno)>> },
    /// Gives counters for children that foreign spaces may fork.
    Spares { spares: MmapVec<Arc<SpaceCounters>> },
    /// Brings pages of a foreign space, or refuses those that are missing: a few.
    Bring { bring: Bring, reply: Ticket<Brought> },
    /// Takes a foreign space out, unless it has moved memory since it had done so that many times, or is changing.
    Release { space: SpaceId, moves: u64, reply: Ticket<Option<Space>> },
    /// The process of a foreign space can't be killed for its pages: they are SIGBUS instead, first of all the one at an address.
    Spare { space: SpaceId, addr: usize },
    /// Takes a space out.
    Remove { space: SpaceId, reply: Ticket<Option<Space>> },
    /// Exchanges the page list of a vmap in every space, wherever an older one is used.
    SetList { vmap: u64, contents: Contents, reply: Ticket<()> },
    /// Reads pages as a touch of them would, all of one extent or of one huge page, and answers with what came of it. The asker keeps
    /// the subject alive, and answers for no other part of the list.
    Read { subject: Subject, generation: u64, pages: Range<u64>, reply: Ticket<How> },
    /// Has some pages of a vmap that its object holds be mapped where they were SIGBUS, from a place on.
    Heal { vmap: u64, pages: Range<u64>, from: Place, reply: Ticket<Healed> },
    /// Copies every space and its areas into the asker's memory.
    View { view: View, reply: Ticket<(View, Result<(), Errno>)> },
    /// The asker is about to look an address up; answers with what to tell the finding by, if it should.
    Probe { space: SpaceId, addr: usize, reply: Ticket<Option<LookupId>> },
    /// Tells what was found at an address.
    Found { lookup: LookupId, finding: Finding, reply: Ticket<Result<(), Changing>> },
    /// A page was unmapped, and no event says so.
    Unmapped { space: SpaceId, addr: usize },
    /// Answers when everything read so far is done, and whether all of it is posted to the keeper by now. It does not wait
    /// for that: the keeper, which makes room for posts, may be the asker.
    Barrier { reply: Ticket<bool> },
    /// From now on every fault is answered by SIGBUS; the thread ends when no area is left.
    Retire { reply: Ticket<()> },
    /// The answer to [`Post::Empty`]: nothing is mapped any more that could fault.
    End,
    /// Gives memory for huge pages of a size; answers with it if there is some already, or if the thread only guards.
    Huge { memory: HugeMemory, reply: Ticket<Option<HugeMemory>> },
    /// Panics, to test what happens then.
    #[cfg(test)]
    Panic,
}

/// An address that the keeper shall look up.
#[derive(Clone, Copy)]
pub(crate) struct Stray {
    pub(crate) space: SpaceId,
    pub(crate) addr: usize,
    pub(crate) lookup: LookupId,
}

/// What the fault-handling thread tells the keeper.
pub(crate) enum Post {
    /// An area ended by an event, not by its owner's hand.
    Closed(Area<Target>),
    /// A space's process seems to be gone (ESRCH).
    Gone(SpaceId),
    /// A foreign space has forked: its child's space is there, and this is its userfaultfd.
    Born { parent: SpaceId, counters: Arc<SpaceCounters>, uffd: Userfault },
    /// A page of a foreign space can't be had, and its process shall end for it.
    Fatal { space: SpaceId, addr: usize },
    /// Look an address up: a thread touched it and no event told of it, or something next to it moved.
    Stray(Stray),
    /// Pages could not be read.
    Failed(Failed),
    /// After a shutdown no area is left that the fault-handling thread knows: may it end?
    Empty,
    /// The thread has ended: no area is left and none will come.
    HandlerEnded,
}

/// Pages to be read by a worker, installed, and told of.
pub(crate) struct ReadJob {
    /// Names the read.
    pub(crate) id: u64,
    /// Dropped by the worker: it may be the last to hold what the list keeps alive.
    pub(crate) subject: Subject,
    /// The list's.
    pub(crate) generation: u64,
    /// The pages to read, all of one extent unless they are a huge page.
    pub(crate) pages: Range<u64>,
    pub(crate) lent: Lent,
}

/// A buffer that a worker reads into, and whose it is.
pub(crate) struct Lent {
    pub(crate) buffer: ReadBuffer,
    /// It is one of those for huge pages of a size.
    pub(crate) huge: Option<PageSize>,
    /// It is for a read that waits for nothing.
    pub(crate) is_quick: bool,
}

/// A [`ReadJob`] that was done.
pub(crate) struct ReadDone {
    pub(crate) id: u64,
    pub(crate) lent: Lent,
    pub(crate) outcome: Outcome,
}

/// Pages that could not be read.
pub(crate) struct Failed {
    pub(crate) vmap: Arc<VmapCore>,
    pub(crate) pages: Range<u64>,
    pub(crate) why: Why,
    pub(crate) tries: u32,
}
