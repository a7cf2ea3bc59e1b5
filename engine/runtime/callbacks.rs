//! The thread on which deref callbacks run: outside every lock, one at a time, in the order in which they became due.

use std::sync::{Arc, PoisonError};

use crossbeam_channel::Receiver;

use super::handles::Request;
use super::shared::EngineShared;
use super::threads::contain;
use crate::vmap::core::{Notice, VmapCore};

/// Runs callbacks until told to end.
pub(crate) fn run(shared: &Arc<EngineShared>, notices: &Receiver<Notice>) {
    while let Ok(Notice::Deref(core)) = notices.recv() {
        // A callback that was replaced is dropped there, and what it captured may panic.
        contain(shared, || run_one(shared, &core));
        if shared.is_child() {
            // The callback forked and returned in the child: nothing of this loop belongs to it.
            return;
        }
        core.deref_done();
        // A child that asked to attach in the meantime may do so now.
        shared.keeper.send(Request::RetryDeferred);
        // Perhaps the last reference, to a list and to what it keeps alive.
        contain(shared, || drop(core));
    }
}

fn run_one(shared: &Arc<EngineShared>, core: &Arc<VmapCore>) {
    let slot = || core.on_deref.lock().unwrap_or_else(PoisonError::into_inner);
    // Taken out while it runs, so that it may replace itself.
    let (callback, version) = {
        let mut slot = slot();
        (slot.callback.take(), slot.version)
    };
    let Some(mut callback) = callback else { return };
    contain(shared, || callback(core));
    let mut slot = slot();
    if slot.version == version {
        slot.callback = Some(callback);
    }
}
