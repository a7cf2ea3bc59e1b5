//! The vmap registry: every vmap of an engine, by its id.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::core::VmapCore;
use crate::process::gate;

/// Finds vmaps by id; does not keep them alive.
#[derive(Debug, Default)]
pub(crate) struct Registry(Mutex<HashMap<u64, Weak<VmapCore>>>);

impl Registry {
    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Weak<VmapCore>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn enter(&self, vmap: &Arc<VmapCore>) {
        // Under the gate, as a forked child looks vmaps up: no thread may hold the lock over a fork.
        let _gate = gate();
        let mut vmaps = self.lock();
        vmaps.retain(|_, vmap| vmap.strong_count() > 0);
        vmaps.insert(vmap.id, Arc::downgrade(vmap));
    }

    /// Finds a vmap. The caller keeps forks away, or is the only thread of a forked child.
    pub(crate) fn find_ungated(&self, id: u64) -> Option<Arc<VmapCore>> {
        self.lock().get(&id).and_then(Weak::upgrade)
    }

    pub(crate) fn find(&self, id: u64) -> Option<Arc<VmapCore>> {
        let _gate = gate();
        self.find_ungated(id)
    }

    /// Finds the vmap whose backing object has this device and inode.
    pub(crate) fn find_by_file(&self, file: (libc::dev_t, libc::ino_t)) -> Option<Arc<VmapCore>> {
        self.all().into_iter().find(|vmap| vmap.file == file)
    }

    /// Every vmap that is alive.
    pub(crate) fn all(&self) -> Vec<Arc<VmapCore>> {
        let _gate = gate();
        self.lock().values().filter_map(Weak::upgrade).collect()
    }
}
