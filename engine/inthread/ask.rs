//! What touching threads ask the fault-handling thread: about addresses that no event told of (`runtime/strays.rs`).
//!
//! A touch outside every area, of memory that is registered all the same, is held while the keeper looks the address up.
//! The thread puts the address into a slot, rings, and sleeps on the slot. Slots are part of a place and outlive every
//! engine, so that a thread may sleep there while its engine ends.

use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use crate::runtime::strays::LookupId;
use crate::sys::futex;

/// Threads that wait at once; more try again.
pub(super) const ASKS: usize = 16;

const FREE: u32 = 0;
/// A thread writes its address.
const TAKEN: u32 = 1;
const ASKED: u32 = 2;
/// The keeper looks.
const LOOKING: u32 = 3;
/// To be touched again: it is an area now, or unmapped.
const AGAIN: u32 = 4;
/// Memory whose bytes nobody knows.
const UNKNOWN: u32 = 5;

/// One question. All of its bytes zero is a free slot.
pub(super) struct Ask {
    state: AtomicU32,
    addr: AtomicUsize,
}

impl Ask {
    /// Takes the slot for a question, if it is free.
    pub(super) fn put(&self, addr: usize) -> bool {
        if self.state.compare_exchange(FREE, TAKEN, Ordering::Acquire, Ordering::Relaxed).is_err() {
            return false;
        }
        self.addr.store(addr, Ordering::Relaxed);
        self.state.store(ASKED, Ordering::Release);
        true
    }

    /// Waits for the answer to a question that this thread has put, and frees the slot; tells whether to touch again.
    pub(super) fn wait(&self) -> bool {
        loop {
            let state = self.state.load(Ordering::Acquire);
            if state == AGAIN || state == UNKNOWN {
                self.state.store(FREE, Ordering::Release);
                return state == AGAIN;
            }
            futex::wait(&self.state, state);
        }
    }

    fn answer(&self, again: bool) {
        self.state.store(if again { AGAIN } else { UNKNOWN }, Ordering::Release);
        futex::wake(self.state.as_ptr(), 1);
    }
}

/// The fault-handling thread's side of a place's questions.
pub(super) struct Asked {
    asks: &'static [Ask; ASKS],
    /// Which lookup answers which.
    lookups: [Option<LookupId>; ASKS],
}

impl Asked {
    pub(super) fn new(asks: &'static [Ask; ASKS]) -> Asked {
        Asked { asks, lookups: [None; ASKS] }
    }

    /// Begins with every new question: `look_up` has an address looked up, or answers `None` if the thread is to touch
    /// again.
    pub(super) fn hear(&mut self, mut look_up: impl FnMut(usize) -> Option<LookupId>) {
        for (ask, lookup) in self.asks.iter().zip(&mut self.lookups) {
            if ask.state.load(Ordering::Acquire) != ASKED {
                continue;
            }
            ask.state.store(LOOKING, Ordering::Relaxed);
            *lookup = look_up(ask.addr.load(Ordering::Relaxed));
            if lookup.is_none() {
                ask.answer(true);
            }
        }
    }

    /// Answers the thread that waits for a lookup, if one does.
    pub(super) fn found(&mut self, lookup: LookupId, again: bool) {
        if let Some(index) = self.lookups.iter().position(|held| *held == Some(lookup)) {
            self.lookups[index] = None;
            self.asks[index].answer(again);
        }
    }

    /// Refuses whoever waits: nothing is served any more.
    pub(super) fn refuse_all(&mut self) {
        self.lookups = [None; ASKS];
        for ask in self.asks {
            if matches!(ask.state.load(Ordering::Acquire), ASKED | LOOKING) {
                ask.answer(false);
            }
        }
    }
}
