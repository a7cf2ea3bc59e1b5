//! The thread on which deref callbacks run: outside every lock, one at a time, in the order in which they became due.

use std::cell::Cell;
use std::sync::{Arc, PoisonError};

use crossbeam_channel::Receiver;

use super::handles::Request;
use super::shared::EngineShared;
use super::threads::{self, Role, contain};
use crate::trace::tell;
use crate::vmap::core::{Caller, Notice, VmapCore};
use crate::vmap::failure::ReadFailed;

thread_local! {
    /// The vmap whose callback runs on this thread.
    static RUNNING: Cell<Option<u64>> = const { Cell::new(None) };
}

/// Tells the vmap whose callback runs on this thread.
pub(crate) fn running() -> Option<u64> {
    RUNNING.get()
}

/// Says who attaches to a vmap here: whether it may wait for a callback.
pub(crate) fn caller(shared: &EngineShared, core: &VmapCore) -> Caller {
    match running() {
        _ if threads::current_role(shared.id) != Some(Role::Callback) => Caller::Any,
        Some(vmap) if vmap == core.id => Caller::ItsCallback,
        _ => Caller::OtherCallback,
    }
}

/// Runs callbacks until told to end.
pub(crate) fn run(shared: &Arc<EngineShared>, notices: &Receiver<Notice>) {
    while let Ok(notice) = notices.recv() {
        match notice {
            Notice::Deref(core) => {
                run_one(shared, &core);
                core.deref_done();
                // A child that asked to attach in the meantime may do so now.
                shared.keeper.send(Request::RetryDeferred);
                // Perhaps the last reference, to a list and to what it keeps alive.
                contain(shared, || drop(core));
            }
            Notice::Failed(core, report) => {
                report_failed(shared, &core, report);
                contain(shared, || drop(core));
            }
            // Dropped, which tells who sent it.
            Notice::Settle(_) => {}
            Notice::End => return,
        }
    }
}

/// Tells a vmap's callback of pages that could not be read.
fn report_failed(shared: &EngineShared, core: &Arc<VmapCore>, report: ReadFailed) {
    core.failures.reported();
    let slot = || core.failures.callback.lock().unwrap_or_else(PoisonError::into_inner);
    // Taken out while it runs: no lock is held over it.
    let Some(mut callback) = slot().take() else { return };
    if contain(shared, || callback(core, report)).is_none() {
        tell!(ERROR, "kiomap::callback", "panicked", engine = shared.id, vmap = core.id);
    }
    if shared.is_child() {
        threads::end_child();
    }
    *slot() = Some(callback);
}

/// Calls the callback of a vmap.
fn run_one(shared: &EngineShared, core: &Arc<VmapCore>) {
    let slot = || core.on_deref.lock().unwrap_or_else(PoisonError::into_inner);
    // Taken out while it runs, so that it may replace itself.
    let (callback, version) = {
        let mut slot = slot();
        (slot.callback.take(), slot.version)
    };
    let Some(mut callback) = callback else { return };
    RUNNING.set(Some(core.id));
    if contain(shared, || callback(core)).is_none() {
        tell!(ERROR, "kiomap::callback", "panicked", engine = shared.id, vmap = core.id);
    }
    tell!(DEBUG, "kiomap::callback", "has run", engine = shared.id, vmap = core.id);
    RUNNING.set(None);
    if shared.is_child() {
        threads::end_child();
    }
    let mut slot = slot();
    if slot.version == version {
        slot.callback = Some(callback);
    } else {
        drop(slot);
        // Replaced meanwhile. What it captured is the application's.
        contain(shared, || drop(callback));
    }
}
