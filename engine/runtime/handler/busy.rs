//! The space of a thread that faults without a pause: its faults are answered as they are read, one by one, as long as they are
//! simple. Most faults of most applications are answered here, so it does nothing that could be done now and then.

use super::{Handler, MESSAGES_PER_READ, TURNS_WITHOUT_A_LOOK};
use crate::page::page_floor;
use crate::runtime::fault::Fault;
use crate::runtime::simple::Simple;
use crate::space::SpaceId;
use crate::stats::add_own;
use crate::stats::latency::Moment;
use crate::sys::{FaultKind, Message};

/// What a busy space had to say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Said {
    /// Nothing more.
    Nothing,
    /// Something that the rest of the turn deals with.
    Something,
    /// So much that it is time for a look at the others.
    Enough,
}

impl Handler {
    /// Reads what a busy space has to say, and answers what is simple.
    pub(super) fn serve_busy(&mut self, id: SpaceId) -> Said {
        let Some(index) = self.index_of(id).filter(|&index| self.is_plain(index)) else {
            self.turns += 1;
            return if self.read_space(id) { Said::Something } else { Said::Nothing };
        };
        while self.turns < TURNS_WITHOUT_A_LOOK {
            self.placer.turns();
            let Handler { spaces, message, shared, pending, resolver, in_hand, .. } = self;
            let space = &spaces[index];
            let Some(uffd) = &space.uffd else { return Said::Nothing };
            let Ok(Some(message)) = uffd.read_one(message) else { return Said::Nothing };
            self.turns += 1;
            let (counters, answered) = (shared.counters.first(), space.counters.answered.first());
            add_own(&counters.reads, 1);
            let Message::Fault { addr, write, kind: FaultKind::Missing, tid } = message else {
                self.read_messages(id, Some(message));
                return Said::Something;
            };
            let (addr, since) = (page_floor(addr), Moment::now());
            *in_hand = Some((id, addr));
            #[cfg(test)]
            assert!(!self.crew.owner_panic.swap(false, std::sync::atomic::Ordering::SeqCst), "asked to");
            add_own(&counters.faults, 1);
            add_own(&answered.faults, 1);
            if write {
                add_own(&counters.write_faults, 1);
            }
            let simple = Simple::of(resolver.fault_around, space, addr);
            let mut counted = false;
            if let Some(simple) = &simple {
                let own = simple.area.target.vmap.counters.first();
                simple.count(counters, own, write, add_own);
                let install = simple.install(uffd);
                simple.source.count(install, counters, own, answered, add_own);
                if install.stop.is_none() {
                    shared.latency.first().record(since);
                    *in_hand = None;
                    self.saw(id, tid, false);
                    if self.one_by_one != Some(tid) {
                        // Several threads fault: it is worth while to ask for more than one message.
                        self.one_by_one = None;
                        return Said::Something;
                    }
                    if self.to_call.is_some() {
                        return Said::Something;
                    }
                    continue;
                }
                counted = true;
            }
            // There is room: nothing is pending.
            let _ = pending.try_push(Fault { retries: counted.into(), ..Fault::new(id, addr, tid, write, since) });
            *in_hand = None;
            return Said::Something;
        }
        Said::Enough
    }

    /// Tells whether faults of a space may be answered one by one, and makes room for what else may be read from it.
    fn is_plain(&mut self, index: usize) -> bool {
        let space = &mut self.spaces[index];
        self.one_by_one.is_some()
            && space.foreign.is_none()
            && self.desk.is_none()
            && self.parked.is_empty()
            && self.pending.is_empty()
            && self.unsent.is_empty()
            && !self.retired
            && !self.crew.is_on()
            && space.table.try_reserve(4).is_ok()
            && self.unsent.try_reserve(space.table.len() + 6 * MESSAGES_PER_READ).is_ok()
    }
}
