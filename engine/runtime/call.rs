//! One question to the thread that owns the answer: the asker waits on its own stack.
//!
//! A reply over a channel would free the channel in whichever thread drops it last. The fault-handling thread must
//! not free (or allocate) memory, so the answer is written into the asker's stack frame instead, and the asker is
//! woken by a futex.

use std::cell::UnsafeCell;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::sys::futex;

const WAITING: u32 = 0;
const ANSWERED: u32 = 1;
const ABANDONED: u32 = 2;

struct Slot<R> {
    state: AtomicU32,
    value: UnsafeCell<Option<R>>,
}

/// The right, and the duty, to answer one question; dropping it unanswered tells the asker so.
pub(crate) struct Ticket<R>(NonNull<Slot<R>>);

// SAFETY: the slot is written by the ticket's holder alone until it publishes the state, and read by the asker only
// after that; `R: Send` lets the value cross threads.
unsafe impl<R: Send> Send for Ticket<R> {}

impl<R> Ticket<R> {
    /// Answers the question and wakes the asker.
    pub(crate) fn answer(self, value: R) {
        // SAFETY: the asker keeps the slot alive until the state leaves WAITING, which only this ticket does.
        unsafe { *self.0.as_ref().value.get() = Some(value) };
        self.publish(ANSWERED);
        std::mem::forget(self);
    }

    fn publish(&self, state: u32) {
        // SAFETY: as above; after this store the slot may be gone, so only its address is used below.
        let word = unsafe {
            let slot = self.0.as_ref();
            let address = slot.state.as_ptr();
            slot.state.store(state, Ordering::Release);
            address
        };
        futex::wake(word, 1);
    }
}

impl<R> Drop for Ticket<R> {
    fn drop(&mut self) {
        self.publish(ABANDONED);
    }
}

/// Hands a ticket to `send` and waits for its answer; `None` when the ticket was dropped unanswered.
pub(crate) fn call<R: Send>(send: impl FnOnce(Ticket<R>)) -> Option<R> {
    let slot = Slot { state: AtomicU32::new(WAITING), value: UnsafeCell::new(None) };
    send(Ticket(NonNull::from(&slot)));
    while slot.state.load(Ordering::Acquire) == WAITING {
        futex::wait(&slot.state, WAITING);
    }
    slot.value.into_inner()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_from_another_thread_reaches_the_asker() {
        let (tx, rx) = crossbeam_channel::bounded::<Ticket<u32>>(1);
        let answerer = std::thread::spawn(move || {
            for ticket in rx {
                ticket.answer(7);
            }
        });
        for _ in 0..1000 {
            assert_eq!(call(|ticket| tx.send(ticket).unwrap()), Some(7));
        }
        drop(tx);
        answerer.join().unwrap();
    }

    #[test]
    fn a_dropped_ticket_releases_the_asker_without_an_answer() {
        assert_eq!(call::<u32>(drop), None);
        let (tx, rx) = crossbeam_channel::bounded::<Ticket<u32>>(1);
        let dropper = std::thread::spawn(move || drop(rx.recv()));
        assert_eq!(call(|ticket| tx.send(ticket).unwrap()), None);
        dropper.join().unwrap();
    }
}
