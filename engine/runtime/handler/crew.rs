//! The owner's side of the crew: when the fault-handling thread calls it, lets it work, looks after it and takes what it left.

use std::sync::PoisonError;

use nix::sys::epoll::{EpollEvent, EpollFlags, EpollTimeout};

use super::Handler;
use crate::runtime::crew_call::Review;
use crate::runtime::crew_roster::Roster;
use crate::space::Space;

impl Handler {
    /// Waits while the crew serves, and looks after it now and then.
    pub(super) fn wait_for_the_crew(&mut self, ready: &mut [EpollEvent], pause: EpollTimeout) -> usize {
        let tick = self.caller.tick_ms().map_or(EpollTimeout::NONE, EpollTimeout::from);
        let pause = if pause == EpollTimeout::NONE { tick } else { pause };
        if !self.has_room_for_the_crew() {
            self.let_the_crew_go();
            return 0;
        }
        self.crew.open(&self.spaces);
        let woken = self.epoll.0.wait(ready, pause).unwrap_or(0);
        self.lateness = self.crew.close();
        woken
    }

    /// Calls the crew, lets it go, or has it change places.
    pub(super) fn mind_the_crew(&mut self) {
        let unfit = self.retired || self.crew.is_broken();
        if !self.crew.is_on() {
            if let Some(roster) = self.to_call.take().filter(|_| !unfit && !self.crew.members.is_empty()) {
                self.call_the_crew(roster);
            }
            return;
        }
        let (lateness, found) = (std::mem::take(&mut self.lateness), std::mem::take(&mut self.found));
        if unfit {
            return self.let_the_crew_go();
        }
        match self.caller.review(&self.crew, lateness, found) {
            Review::GoOn => {}
            Review::LetGo => self.let_the_crew_go(),
            Review::Direct(roster) => {
                let from = *self.caller.roster();
                self.listen(&from, EpollFlags::EPOLLIN);
                if self.crew.direct(&from, &roster, &self.spaces, self.may_step_back(&roster)).is_err() {
                    return self.let_the_crew_go();
                }
                self.listen(&roster, EpollFlags::empty());
                self.caller.called(roster, &self.crew);
            }
        }
    }

    fn call_the_crew(&mut self, roster: Roster) {
        // Members that were let go may look once more; nobody goes in any more until they are called.
        self.crew.close();
        let back = self.may_step_back(&roster);
        if !self.has_room_for_the_crew() || self.crew.call(&roster, &self.spaces, back).is_err() {
            return self.crew.open(&self.spaces);
        }
        self.listen(&roster, EpollFlags::empty());
        self.caller.called(roster, &self.crew);
        self.busy = None;
        // Where it followed a thread, a member is now.
        self.placer.stop();
    }

    /// Tells whether members are to step back. As long as they don't, their processors are not taken for idle ones: threads
    /// that are on one processor then come apart.
    fn may_step_back(&self, roster: &Roster) -> bool {
        !self.caller.is_always() && !roster.crowded && self.placer.may_step_back()
    }

    pub(super) fn let_the_crew_go(&mut self) {
        self.take_handed_on();
        let roster = self.caller.let_go();
        self.crew.let_go(&roster, &self.spaces);
        self.to_call = None;
        self.listen(&roster, EpollFlags::EPOLLIN);
        self.answer_pending();
    }

    /// Has epoll tell of the messages of spaces that the crew waits for by a roster, or not.
    fn listen(&self, roster: &Roster, flags: EpollFlags) {
        for Space { id, uffd, .. } in &*self.spaces {
            if let Some(uffd) = uffd.as_ref().filter(|_| roster.waiters(*id) > 0) {
                // It was added, and changing that takes no memory. If the application has closed it, nobody serves it.
                let _ = self.epoll.0.modify(&**uffd, &mut EpollEvent::new(flags, *id));
            }
        }
    }

    /// Makes room for what members may read before this thread takes it, as before a read of its own: a message of each space.
    fn has_room_for_the_crew(&mut self) -> bool {
        let posts = self.spaces.iter().map(|space| space.table.len() + 6).sum();
        self.spaces.iter_mut().all(|space| space.table.try_reserve(4).is_ok()) && self.unsent.try_reserve(posts).is_ok()
    }

    /// Takes what members have read and not answered.
    pub(super) fn take_handed_on(&mut self) {
        if !self.crew.is_on() && !self.crew.is_broken() {
            return;
        }
        for index in 0..self.spaces.len() {
            let space = &mut self.spaces[index];
            let id = space.id;
            // Nobody is inside: nobody has it locked.
            if let Some(message) = space.unheard.get_mut().unwrap_or_else(PoisonError::into_inner).take() {
                self.caller.took();
                self.read_messages(id, Some(message));
            }
        }
        while let Some(failed) = self.crew.take_failed() {
            self.caller.took();
            // There is room: faults are answered before more are read.
            let _ = self.pending.try_push(failed);
        }
    }
}
