//! What the engine tells a subscriber of the crate `tracing`, with the feature of that name. Without it, none of this is
//! compiled.
//!
//! Events come from a thread of their own, `kiomap-trace`, which starts with the first event that somebody wants to hear. So
//! a subscriber, which is code of the application, may take locks, wait, and touch regions: no fault, no process and no
//! callback waits for it. The fault-handling threads tell nothing, and neither do forked children, except of engines that
//! they build themselves. When 1024 events wait, further ones are lost and counted.
//!
//! | target | level | when |
//! |---|---|---|
//! | `kiomap::engine` | INFO | an engine was built, or was shut down |
//! | `kiomap::vmap` | DEBUG | a list was published |
//! | `kiomap::region` | DEBUG | a region was attached, or dropped, in the process of the engine |
//! | `kiomap::region` | WARN | a region that was to be locked in memory if allowed is not |
//! | `kiomap::process` | DEBUG | a forked process is served from now on, or is gone |
//! | `kiomap::process` | WARN | a forked process could not have its regions |
//! | `kiomap::callback` | DEBUG | a deref callback has run |
//! | `kiomap::callback` | ERROR | it panicked |
//! | `kiomap::source` | WARN | a worker could not read pages; they were given up; no more workers can be started |
//! | `kiomap::publish` | INFO | a vmap is listened for at a socket, or no longer; a process was refused |
//! | `kiomap::publish` | WARN | a connection was cut, and why |
//! | `kiomap::stray` | DEBUG | an address was looked up that no event told of |
//! | `kiomap::trace` | WARN | events were lost |

/// Tells of something, if somebody wants to hear it: level, target, message, and values, which are moved to another thread.
#[cfg(feature = "tracing")]
macro_rules! tell {
    ($level:ident, $target:literal, $message:literal, $($name:ident = $value:expr),+ $(,)?) => {
        // Asks no subscriber: that would be its code, here.
        if tracing::level_filters::LevelFilter::current() >= tracing::Level::$level {
            let ($($name,)+) = ($($value,)+);
            crate::trace::send(Box::new(move || {
                tracing::event!(target: $target, tracing::Level::$level, $($name,)+ $message);
            }));
        }
    };
}

#[cfg(not(feature = "tracing"))]
macro_rules! tell {
    ($($event:tt)*) => {{}};
}

pub(crate) use tell;

#[cfg(feature = "tracing")]
pub(crate) use teller::{process_builds, send};

/// Events that may wait for a subscriber.
#[cfg(feature = "tracing")]
const WAITING: usize = 1024;

#[cfg(feature = "tracing")]
mod teller {
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::ptr;
    use std::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, Ordering};

    use crossbeam_channel::{Receiver, Sender};

    use super::WAITING;
    use crate::process::depth;
    use crate::runtime::threads::{self, Role};

    type Event = Box<dyn FnOnce() + Send>;

    struct Teller {
        /// The [`depth`] of the process in which its thread is. Process ids would not tell: each namespace has its own.
        process: u32,
        events: Sender<Event>,
    }

    /// Never freed: a forked child may still look at its parent's, and others at one that they have just found.
    static TELLER: AtomicPtr<Teller> = AtomicPtr::new(ptr::null_mut());
    const NOBODY: u32 = u32::MAX;
    /// The depth of the process that builds engines: a forked child that only uses its parent's gets no thread for this.
    static BUILDS: AtomicU32 = AtomicU32::new(NOBODY);
    static LOST: AtomicU64 = AtomicU64::new(0);

    /// Says that this process builds an engine: it tells of it.
    pub(crate) fn process_builds() {
        BUILDS.store(depth(), Ordering::Relaxed);
    }

    /// Has an event told.
    pub(crate) fn send(event: Event) {
        let process = depth();
        if BUILDS.load(Ordering::Relaxed) != process {
            return;
        }
        let sent = match teller(process) {
            Some(teller) => teller.events.try_send(event).is_ok(),
            None => false,
        };
        if !sent {
            LOST.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// This process's teller, which is started if there is none; `None` if that can't be.
    fn teller(process: u32) -> Option<&'static Teller> {
        let found = TELLER.load(Ordering::Acquire);
        // SAFETY: what is stored there came from `Box::into_raw` and is never freed.
        if let Some(teller) = unsafe { found.as_ref() }.filter(|teller| teller.process == process) {
            return Some(teller);
        }
        let (events, inbox) = crossbeam_channel::bounded(WAITING);
        let new = Box::into_raw(Box::new(Teller { process, events }));
        match TELLER.compare_exchange(found, new, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => {
                // Not one engine's: it stays.
                if threads::spawn(Role::Trace, 0, move || run(process, &inbox)).is_err() {
                    // Tried again with the next event. The box stays: somebody may have found it.
                    TELLER.store(ptr::null_mut(), Ordering::Release);
                    return None;
                }
                // SAFETY: it was just made, and is never freed.
                Some(unsafe { &*new })
            }
            Err(other) => {
                // SAFETY: nobody has seen it.
                drop(unsafe { Box::from_raw(new) });
                // SAFETY: as for `found`.
                unsafe { other.as_ref() }.filter(|teller| teller.process == process)
            }
        }
    }

    fn run(process: u32, inbox: &Receiver<Event>) {
        while let Ok(event) = inbox.recv() {
            // A subscriber that panics loses this event, and no other.
            let told = catch_unwind(AssertUnwindSafe(event));
            let lost = LOST.swap(0, Ordering::Relaxed) + u64::from(told.is_err());
            if lost > 0 {
                let told = catch_unwind(|| tracing::warn!(target: "kiomap::trace", lost, "events were lost"));
                if told.is_err() {
                    LOST.fetch_add(lost, Ordering::Relaxed);
                }
            }
            if depth() != process {
                // The subscriber forked and returned in the child.
                threads::end_child();
            }
        }
    }
}
