//! A crossing: many may be inside at once, until one closes it.
//!
//! Threads that look something up are *inside*. The one thread that changes it *closes* the crossing, which waits until
//! nobody is inside and lets nobody in, and *opens* it afterwards. Neither allocates, and all of it may be done in a
//! signal handler: it is one word, looked at for a moment and then slept on. It is not a lock for long: whoever is inside
//! must not wait for the thread that closes.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use crate::sys::futex;

/// The crossing is closed, or somebody waits until it is empty.
const CLOSED: u32 = 1 << 31;
/// Somebody sleeps until it is open.
const SLEEPERS: u32 = 1 << 30;
/// How many are inside.
const INSIDE: u32 = SLEEPERS - 1;
/// Looks before a sleep; together about as long as a system call takes.
const LOOKS: u32 = 100;

/// Keeps those who look apart from the one who changes.
///
/// Whoever goes in and out writes to it: nothing else is in its cache lines.
#[derive(Debug)]
#[repr(align(128))]
pub(crate) struct Crossing(AtomicU32);

/// Being inside; it ends when dropped.
#[derive(Debug)]
pub(crate) struct Inside<'a>(&'a Crossing);

impl Crossing {
    /// Makes one that is open: all of its bytes are zero.
    pub(crate) const fn new() -> Crossing {
        Crossing(AtomicU32::new(0))
    }

    /// Goes inside, when the crossing is open.
    pub(crate) fn enter(&self) -> Inside<'_> {
        let mut looks = 0;
        loop {
            let state = self.0.load(Ordering::Relaxed);
            if state & CLOSED == 0 {
                if self.exchange(state, state + 1) {
                    return Inside(self);
                }
            } else if looks < LOOKS {
                looks += 1;
                std::hint::spin_loop();
            } else if state & SLEEPERS != 0 || self.exchange(state, state | SLEEPERS) {
                futex::wait(&self.0, state | SLEEPERS);
            }
        }
    }

    /// Closes the crossing and waits until nobody is inside. Done by one thread, which is not inside, and not twice.
    pub(crate) fn close(&self) {
        self.close_with(Duration::MAX, || {});
    }

    /// As [`Crossing::close`]; if somebody is still inside after `patience`, does `late` and waits on.
    pub(crate) fn close_with(&self, patience: Duration, late: impl FnOnce()) {
        let mut state = self.0.fetch_or(CLOSED, Ordering::Acquire) | CLOSED;
        let mut looks = 0;
        let mut late = Some(late);
        // Until when it is waited without being late.
        let mut until = None;
        while state & INSIDE != 0 {
            if looks < LOOKS {
                looks += 1;
                std::hint::spin_loop();
            } else if late.is_none() || patience == Duration::MAX {
                futex::wait(&self.0, state);
            } else {
                let until = *until.get_or_insert_with(|| Instant::now() + patience);
                match until.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
                    Some(left) => futex::wait_for(&self.0, state, left),
                    None => late.take().into_iter().for_each(|late| late()),
                }
            }
            state = self.0.load(Ordering::Acquire);
        }
    }

    /// Lets in who waits, and everybody from now on.
    pub(crate) fn open(&self) {
        if self.0.fetch_and(!(CLOSED | SLEEPERS), Ordering::Release) & SLEEPERS != 0 {
            self.wake();
        }
    }

    fn exchange(&self, from: u32, to: u32) -> bool {
        self.0.compare_exchange_weak(from, to, Ordering::Acquire, Ordering::Relaxed).is_ok()
    }

    fn leave(&self) {
        // What was read inside was read before this.
        let state = self.0.fetch_sub(1, Ordering::Release);
        // The last one inside tells who closes. Those who wait for the opening look, and sleep again.
        if state & CLOSED != 0 && state & INSIDE == 1 {
            self.wake();
        }
    }

    fn wake(&self) {
        futex::wake(self.0.as_ptr(), i32::MAX);
    }
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.0.leave();
    }
}

#[cfg(test)]
mod tests {
    use std::cell::UnsafeCell;
    use std::sync::atomic::{AtomicBool, AtomicUsize};

    use super::*;

    struct Guarded(UnsafeCell<[u64; 4]>);

    // SAFETY: written by the thread that has closed the crossing, read inside.
    unsafe impl Sync for Guarded {}

    #[test]
    fn many_are_inside_at_once() {
        let crossing = Crossing::new();
        let first = crossing.enter();
        let second = crossing.enter();
        drop(first);
        drop(second);
        crossing.close();
        crossing.open();
        drop(crossing.enter());
    }

    #[test]
    fn who_closes_waits_for_who_is_inside_and_others_wait_outside() {
        let crossing = Crossing::new();
        let (closed, entered) = (AtomicBool::new(false), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            let inside = crossing.enter();
            scope.spawn(|| {
                crossing.close();
                closed.store(true, Ordering::SeqCst);
                while entered.load(Ordering::SeqCst) == 0 {
                    std::thread::yield_now();
                }
                crossing.open();
            });
            while crossing.0.load(Ordering::SeqCst) & CLOSED == 0 {
                std::thread::yield_now();
            }
            let late = [(); 3].map(|()| {
                scope.spawn(|| {
                    let _inside = crossing.enter();
                    assert!(closed.load(Ordering::SeqCst));
                    assert_ne!(entered.load(Ordering::SeqCst), 0);
                })
            });
            // They have looked in vain and sleep.
            while crossing.0.load(Ordering::SeqCst) & SLEEPERS == 0 {
                std::thread::yield_now();
            }
            assert!(!closed.load(Ordering::SeqCst));
            drop(inside);
            while !closed.load(Ordering::SeqCst) {
                std::thread::yield_now();
            }
            entered.store(1, Ordering::SeqCst);
            for thread in late {
                thread.join().unwrap();
            }
        });
        assert_eq!(crossing.0.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn nobody_inside_sees_a_change_half_done() {
        let (crossing, data) = (Crossing::new(), Guarded(UnsafeCell::new([0; 4])));
        let (over, seen) = (AtomicBool::new(false), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    let data = &data;
                    while !over.load(Ordering::Relaxed) {
                        let _inside = crossing.enter();
                        // SAFETY: nobody writes while anybody is inside.
                        let [a, b, c, d] = unsafe { *data.0.get() };
                        assert!(a == b && b == c && c == d);
                        seen.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
            let enough = if cfg!(miri) { 10 } else { 10_000 };
            for n in 1.. {
                crossing.close();
                // SAFETY: nobody is inside.
                unsafe { *data.0.get() = [n; 4] };
                crossing.open();
                if seen.load(Ordering::Relaxed) > enough {
                    break;
                }
                std::thread::yield_now();
            }
            over.store(true, Ordering::Relaxed);
        });
    }
}
