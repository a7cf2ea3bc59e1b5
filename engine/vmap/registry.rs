//! The vmap registry: every vmap of an engine, by its id, and the backing objects that may still be mapped.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::core::VmapCore;
use super::object::{FileId, Owner};
use super::readable;
use crate::process::gate;
use crate::process::maps::{open_own, open_own_details};

/// Backing objects, and whether others may map each too.
type Objects = HashMap<FileId, bool>;

/// Objects of vmaps that are gone are looked for among the mappings whenever that many more have gathered.
const GONE: usize = if cfg!(test) { 4 } else { 1024 };

/// Finds vmaps by id; does not keep them alive.
#[derive(Debug, Default)]
pub(crate) struct Registry(Mutex<Entries>);

#[derive(Debug, Default)]
struct Entries {
    vmaps: HashMap<u64, (Weak<VmapCore>, FileId, Owner)>,
    /// The objects of vmaps that are gone, as far as they may still be mapped.
    gone: Objects,
    /// How many of those may gather.
    most_gone: usize,
}

impl Registry {
    fn lock(&self) -> MutexGuard<'_, Entries> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn enter(&self, vmap: &Arc<VmapCore>) {
        // Under the gate, as a forked child looks vmaps up: no thread may hold the lock over a fork.
        let _gate = gate();
        let mut entries = self.lock();
        let Entries { vmaps, gone, most_gone } = &mut *entries;
        let ended = vmaps.extract_if(|_, (vmap, ..)| vmap.strong_count() == 0);
        gone.extend(ended.map(|(_, (_, file, owner))| (file, owner.shared)));
        if gone.len() > *most_gone {
            *gone = mapped(gone);
            *most_gone = gone.len() + GONE;
        }
        vmaps.insert(vmap.id, (Arc::downgrade(vmap), vmap.object.id(), vmap.owner()));
    }

    /// Finds a vmap. The caller keeps forks away, or is the only thread of a forked child.
    pub(crate) fn find_ungated(&self, id: u64) -> Option<Arc<VmapCore>> {
        self.lock().vmaps.get(&id).and_then(|(vmap, ..)| vmap.upgrade())
    }

    /// Tells whether minor faults of any vmap are the engine's to answer. The caller is the only thread of a forked child.
    pub(crate) fn has_minor_faults(&self) -> bool {
        self.lock().vmaps.values().any(|(.., owner)| owner.minor_faults)
    }

    pub(crate) fn find(&self, id: u64) -> Option<Arc<VmapCore>> {
        let _gate = gate();
        self.find_ungated(id)
    }

    /// Finds the vmap whose backing object this is. It may be about to go.
    pub(crate) fn owner_of(&self, file: FileId) -> Option<Owner> {
        let _gate = gate();
        let entries = self.lock();
        let mut alive = entries.vmaps.values().filter(|(vmap, ..)| vmap.strong_count() > 0);
        alive.find(|(_, of, _)| *of == file).map(|&(.., owner)| owner)
    }

    /// Every vmap that is alive.
    pub(crate) fn all(&self) -> Vec<Arc<VmapCore>> {
        let _gate = gate();
        self.lock().vmaps.values().filter_map(|(vmap, ..)| vmap.upgrade()).collect()
    }

    /// Tells whether this process maps, with access, a page of any vmap that there ever was.
    pub(crate) fn is_any_mapped(&self) -> bool {
        let files: Objects = {
            let _gate = gate();
            let entries = self.lock();
            let alive = entries.vmaps.values().map(|&(_, file, owner)| (file, owner.shared));
            alive.chain(entries.gone.iter().map(|(&file, &shared)| (file, shared))).collect()
        };
        !mapped(&files).is_empty()
    }
}

/// Those of some files that this process maps with access. The engine's own windows have none, and where it reads is known.
fn mapped(files: &Objects) -> Objects {
    let own = readable::ranges();
    // Where it can't be read, what is mapped is known from events only.
    let Ok(maps) = open_own() else { return Objects::new() };
    let is_own = |range: &Range<usize>| own.iter().any(|own| own.start <= range.start && range.end <= own.end);
    let vmas = maps.vmas().filter_map(Result::ok).filter(|vma| !vma.hidden && !is_own(&vma.range));
    let mut mapped: Objects = vmas.filter_map(|vma| Some((vma.file, *files.get(&vma.file)?))).collect();
    if mapped.values().any(|&shared| shared) {
        // Those may be the owner's mappings only, which are nothing to the engine.
        let ours: Vec<FileId> = open_own_details().map_or_else(
            |_| Vec::new(),
            |maps| {
                maps.detailed()
                    .filter_map(Result::ok)
                    .filter(|(vma, details)| !vma.hidden && !is_own(&vma.range) && details.is_registered)
                    .map(|(vma, _)| vma.file)
                    .collect()
            },
        );
        mapped.retain(|file, shared| !*shared || ours.contains(file));
    }
    mapped
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{AttachOptions, Engine, Kiobuf, page_size};

    /// T111: of vmaps that are gone, only those are remembered that something still maps.
    #[test]
    fn objects_that_nobody_maps_are_forgotten() {
        let engine = Engine::new().unwrap();
        let shared = engine.shared_for_tests();
        let vmap = || {
            let mut list = Kiobuf::new();
            list.map_zero(2).unwrap();
            engine.vmap(&list).unwrap()
        };
        let first = vmap();
        let region = first.attach(&AttachOptions::new().len_bytes(page_size()).at(0x2000_0000_0000)).unwrap();
        let (addr, page) = (region.as_ptr().cast::<libc::c_void>(), page_size());
        assert!(shared.vmaps.is_any_mapped());
        // Grown, and what it grew from unmapped: a page that is in no table.
        // SAFETY: nothing refers to the region's range, nor lies behind it.
        unsafe {
            assert_eq!(libc::mremap(addr, page, 2 * page, 0), addr);
            assert_eq!(libc::munmap(addr, page), 0);
        }
        drop((region, first));
        (0..5 * GONE).for_each(|_| drop(vmap()));
        assert!(shared.vmaps.lock().gone.len() <= GONE + 2);
        assert!(shared.vmaps.is_any_mapped());
        // SAFETY: as above.
        unsafe { assert_eq!(libc::munmap(addr.byte_add(page), page), 0) };
        assert!(!shared.vmaps.is_any_mapped());
    }
}
