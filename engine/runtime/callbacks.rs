//! The thread on which deref callbacks run: outside every lock, one at a time, in the order in which they became due.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, PoisonError};

use crossbeam_channel::Receiver;

use super::handles::Request;
use super::shared::EngineShared;
use super::threads;
use crate::stats::add;
use crate::vmap::core::{Notice, VmapCore};

thread_local! {
    /// The vmap whose callback runs on this thread.
    static RUNNING: Cell<Option<u64>> = const { Cell::new(None) };
}

/// Tells the vmap whose callback runs on this thread.
pub(crate) fn running() -> Option<u64> {
    RUNNING.get()
}

/// Runs callbacks until told to end.
pub(crate) fn run(shared: &Arc<EngineShared>, notices: &Receiver<Notice>) {
    while let Ok(notice) = notices.recv() {
        match notice {
            Notice::Deref(core) => {
                guarded(shared, || run_one(&core));
                core.deref_done();
                // A child that asked to attach in the meantime may do so now.
                shared.keeper.send(Request::RetryDeferred);
                guarded(shared, || drop(core));
            }
            // Dropped, which tells who sent it.
            Notice::Settle(_) => {}
            Notice::End => return,
        }
    }
}

/// Runs code of the application: its panic is counted, and a fork of it that returns here in the child ends there.
fn guarded(shared: &EngineShared, code: impl FnOnce()) {
    if catch_unwind(AssertUnwindSafe(code)).is_err() {
        add(&shared.counters.panics, 1);
    }
    if shared.is_child() {
        threads::end_child();
    }
}

fn run_one(core: &Arc<VmapCore>) {
    let slot = || core.on_deref.lock().unwrap_or_else(PoisonError::into_inner);
    // Taken out while it runs, so that it may replace itself.
    let (callback, version) = {
        let mut slot = slot();
        (slot.callback.take(), slot.version)
    };
    let Some(mut callback) = callback else { return };
    RUNNING.set(Some(core.id));
    let outcome = catch_unwind(AssertUnwindSafe(|| callback(core)));
    RUNNING.set(None);
    {
        let mut slot = slot();
        if slot.version == version {
            slot.callback = Some(callback);
        }
        // Else it was replaced, and is dropped below, outside the lock.
    }
    if let Err(panic) = outcome {
        std::panic::resume_unwind(panic);
    }
}
