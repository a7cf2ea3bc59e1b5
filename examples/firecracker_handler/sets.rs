//! Working sets: which pages VMs fault on, kept for the next ones.

use std::path::{Path, PathBuf};
use std::sync::Mutex;

use anyhow::{Context, Result};
use kiomap::{Vmap, WorkingSet};
use nix::errno::Errno;

pub(crate) struct Sets {
    /// Where what is recorded is kept; one save at a time.
    record: Option<Mutex<PathBuf>>,
    replayed: Option<WorkingSet>,
}

impl Sets {
    /// Loads what is to be replayed, of a vmap that records.
    pub(crate) fn open(record: Option<PathBuf>, replay: Option<&Path>, vmap: &Vmap) -> Result<Sets> {
        let replayed = match replay {
            None => None,
            Some(path) => match WorkingSet::load(path) {
                // The first time.
                Err(error) if error.errno() == Errno::ENOENT && record.as_deref() == Some(path) => None,
                loaded => {
                    let shown = path.display();
                    let set = loaded.with_context(|| format!("loading the working set {shown}"))?;
                    // Whether it is of this memory file is to be known before a VM comes.
                    let now = vmap.working_set().context("taking the working set")?;
                    set.clone().include(&now).with_context(|| format!("replaying {shown}"))?;
                    Some(set)
                }
            },
        };
        Ok(Sets { record: record.map(Mutex::new), replayed })
    }

    /// The set that each VM begins with.
    pub(crate) fn replayed(&self) -> Option<&WorkingSet> {
        self.replayed.as_ref()
    }

    /// Saves what was faulted on so far, behind what was replayed.
    pub(crate) fn save(&self, vmap: &Vmap) -> Result<()> {
        let Some(record) = &self.record else { return Ok(()) };
        let path = record.lock().expect("nobody panics while saving");
        let now = vmap.working_set().context("taking the working set")?;
        let set = match &self.replayed {
            None => now,
            Some(replayed) => {
                let mut set = replayed.clone();
                set.include(&now).context("adding to the working set that was replayed")?;
                set
            }
        };
        set.save(&*path).with_context(|| format!("saving the working set {}", path.display()))
    }
}
