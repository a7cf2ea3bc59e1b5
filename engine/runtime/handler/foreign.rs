//! The owner's side of foreign spaces: takes them in, follows their events, and brings their pages before they are touched.

use std::sync::{Arc, Mutex};

use nix::errno::Errno;

use super::{Handler, MESSAGES_PER_READ, is_changing};
use crate::adopt::Refusal;
use crate::page::{page_floor, page_size};
use crate::runtime::command::{Bring, Brought, Halt, NewForeign, Post};
use crate::runtime::foreign::At;
use crate::space::foreign::Foreign;
use crate::space::mmap_vec::MmapVec;
use crate::space::table::AreaTable;
use crate::space::{Space, SpaceId, Target};
use crate::stats::SpaceCounters;
use crate::sys::{FaultKind, Message, Userfault};
use crate::vmap::page_size::PageSize;

/// Pages that are brought by one command: faults wait for it.
const BROUGHT_AT_ONCE: u64 = 128;

impl Handler {
    /// Serves a foreign space from here on.
    #[allow(clippy::result_large_err, reason = "what is refused is given back; a box would be freed")]
    pub(super) fn take_foreign(&mut self, new: NewForeign) -> Result<(), (NewForeign, Errno)> {
        if self.retired {
            return Err((new, Errno::ESHUTDOWN));
        }
        if let Err(errno) = self.spaces.try_reserve(1).and_then(|()| self.spares.try_reserve(new.spares.len())) {
            return Err((new, errno));
        }
        let NewForeign { space, spares } = new;
        let index = self.enter_space(space);
        if let Err(errno) = self.hear(index) {
            return Err((NewForeign { space: self.spaces.remove(index), spares }, errno));
        }
        self.take_spares(spares);
        Ok(())
    }

    /// Keeps counters for the children of foreign spaces: there must be some before their forks can be read.
    pub(super) fn take_spares(&mut self, mut spares: MmapVec<Arc<SpaceCounters>>) {
        while let Some(spare) = spares.pop() {
            // What finds no place is one fewer; the keeper sends another for each fork.
            let _ = self.spares.try_push(spare);
        }
    }

    /// Enters the spaces of children whose forks were read. They are served when the keeper has their userfaultfds.
    pub(super) fn enter_born(&mut self) {
        while let Some(space) = self.born.pop() {
            // Room for it was made before its fork was read.
            self.enter_space(space);
        }
    }

    /// How many messages of a space may be read at once: all, one, or none for now. Each may be a fork.
    pub(super) fn forks_to_read(&mut self, index: usize) -> usize {
        if !self.spaces[index].foreign.as_ref().is_some_and(|foreign| foreign.forks) {
            return MESSAGES_PER_READ;
        }
        let room = self.spaces.try_reserve(MESSAGES_PER_READ).and_then(|()| self.born.try_reserve(MESSAGES_PER_READ));
        match self.spares.len() {
            0 => 0,
            _ if room.is_err() => 0,
            spares if spares < MESSAGES_PER_READ => 1,
            _ => MESSAGES_PER_READ,
        }
    }

    /// Brings pages of a foreign space, a few.
    pub(super) fn bring(&mut self, bring: &Bring) -> Brought {
        let at = bring.addrs.start;
        let halted = |halt| Brought { at, failed: 0, moves: 0, halt };
        let Some(index) = self.index_of(bring.space) else { return halted(Halt::Gone) };
        let space = &self.spaces[index];
        let (Some(uffd), Some(foreign)) = (&space.uffd, &space.foreign) else { return halted(Halt::Changing) };
        let mut brought = Brought { moves: foreign.moves, ..halted(Halt::End) };
        let mut left = BROUGHT_AT_ONCE;
        for area in space.table.overlapping(bring.addrs.start, bring.addrs.end) {
            brought.at = brought.at.max(area.start);
            let end = area.end.min(bring.addrs.end);
            while brought.at < end {
                if left == 0 {
                    brought.halt = Halt::More;
                    return brought;
                }
                let pgoff = area.pgoff_of(brought.at);
                let most = left.min(((end - brought.at) / page_size()) as u64).max(1);
                let step = self.resolver.bring_some(At { space, uffd, foreign }, area, pgoff..pgoff + most, bring.how);
                match step {
                    Ok(step) => {
                        brought.at += step.pages as usize * page_size();
                        brought.failed += step.failed;
                        left = left.saturating_sub(step.pages);
                    }
                    Err(halt) => {
                        brought.halt = halt;
                        return brought;
                    }
                }
            }
        }
        brought.at = bring.addrs.end;
        brought
    }
}

impl Handler {
    /// Takes a foreign space out whose pages were attended to when it had moved memory that many times.
    pub(super) fn release(&mut self, id: SpaceId, moves: u64) -> Option<Space> {
        let space = &self.spaces[self.index_of(id)?];
        let is_same = space.foreign.as_ref().is_some_and(|foreign| foreign.moves == moves);
        if is_same && !is_changing(space) { self.remove(id) } else { None }
    }

    /// From here on makes what can't be had a SIGBUS in a foreign space. Who waited for its end at an address touches again.
    pub(super) fn spare(&mut self, id: SpaceId, addr: usize) {
        let Some(index) = self.index_of(id) else { return };
        let Space { uffd: Some(uffd), foreign: Some(foreign), .. } = &mut self.spaces[index] else { return };
        foreign.refusal = Refusal::Sigbus;
        let _ = uffd.wake(addr, page_size());
    }
}

/// Lets a page be written to that its maker protects, as there is nobody else to do it.
fn unprotect(uffd: &Userfault, addr: usize) {
    for page in [PageSize::Base].into_iter().chain(PageSize::HUGE) {
        match uffd.unprotect(page.floor(addr), page.bytes()) {
            Ok(()) => return,
            Err(Errno::EINVAL) => {}
            Err(_) => break,
        }
    }
    // It touches again, and there is a new message.
    let _ = uffd.wake(page_floor(addr), page_size());
}

/// Follows an event of a foreign space that means something else there; `None` when there is nothing more to do.
pub(super) fn follow(
    event: Message,
    (parent, uffd): (SpaceId, &Userfault),
    foreign: &mut Foreign,
    table: &AreaTable<Target>,
    spares: &mut MmapVec<Arc<SpaceCounters>>,
    born: &mut MmapVec<Space>,
    unsent: &mut MmapVec<Post>,
) -> Option<Message> {
    match event {
        Message::Remove { start, end } => {
            for area in table.overlapping(start, end) {
                foreign.give_up(area, start..end);
            }
            Some(event)
        }
        Message::Remap { .. } => {
            foreign.moves += 1;
            Some(event)
        }
        Message::Fault { addr, kind: FaultKind::WriteProtected, .. } => {
            unprotect(uffd, addr);
            None
        }
        Message::Fork(child) => {
            // There is one: no fork is read otherwise.
            if let Some(counters) = spares.pop() {
                let (table, foreign) = inherited(table, foreign);
                counters.areas.store(table.len() as u64, std::sync::atomic::Ordering::Relaxed);
                let space = Space {
                    id: counters.id,
                    parent,
                    uffd: None,
                    masks: None,
                    aside: None,
                    foreign: Some(foreign),
                    table,
                    counters: Arc::clone(&counters),
                    unheard: Mutex::new(None),
                };
                // Room for both was made before.
                let _ = born.try_push(space);
                let _ = unsent.try_push(Post::Born { parent, counters, uffd: child });
            }
            None
        }
        event => Some(event),
    }
}

/// What a forked child has of its parent's areas. Without memory for that it has none, and whatever is missing there is SIGBUS.
fn inherited(table: &AreaTable<Target>, foreign: &Foreign) -> (AreaTable<Target>, Foreign) {
    let copy = || -> Result<_, Errno> {
        let mut copy = AreaTable::new();
        copy.try_reserve(table.len())?;
        for area in table.iter() {
            copy.insert(area.clone()).map_err(|_| Errno::ENOMEM)?;
        }
        Ok((copy, foreign.forked()?))
    };
    match copy() {
        Ok((copy, foreign)) => {
            copy.iter().for_each(|area| area.target.vmap.open_again());
            (copy, foreign)
        }
        Err(_) => (AreaTable::new(), foreign.refusing()),
    }
}
