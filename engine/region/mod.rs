//! The noun `Region`: one attachment of a vmap, mapped into this process.

mod access;
mod attach;
mod collapse;
pub(crate) mod populate;
mod prefault;

use std::sync::Arc;

use nix::errno::Errno;

pub use attach::{AttachOptions, Sharing};
pub use populate::{PopulateEnd, PopulateOptions, PopulateProgress, Populating};

use crate::fork::link::Local;
use crate::fork::wire::{Ask, Reply};
use crate::page::{is_aligned, page_size};
use crate::process::{depth, gate, mapping, maps, mask};
use crate::runtime::command::{Changing, Command};
use crate::runtime::patience::Patience;
use crate::runtime::shared::EngineShared;
use crate::runtime::strays::{Finding, find};
use crate::runtime::stripes::Stripes;
use crate::space::{OWN_SPACE, Pieces};
use crate::trace::tell;
use crate::vmap::Vmap;
use crate::vmap::core::VmapCore;
use crate::vmap::residency::Residency;
use crate::{Error, Result};

/// Holds a mapped range of a vmap in this process (`vm_area_struct` and `mmap_kiobuf`); dropping it unmaps the range.
///
/// A touch gets the right bytes, or SIGBUS for a page that can't be had: past the end of the list, a hole, a failed
/// source. Nothing is there until it is touched. A forked child has the same range at the same address, and its own
/// copy of this value: dropping that unmaps it there.
///
/// Code that does not know the engine may unmap, move, grow, shrink, double or protect any part of it by raw system calls: what is
/// mapped shows the right pages wherever it lies, and dropping this value unmaps what is left. Its address and length
/// are those of the attach all the same, and the safe accessors need that range as it was.
///
/// Other processes may write at any time. The safe accessors ([`Region::read_at`], [`Region::write_at`],
/// [`Region::atomic_u64`], …) allow for that.
pub struct Region {
    core: Arc<VmapCore>,
    shared: Arc<EngineShared>,
    id: u64,
    addr: usize,
    len: usize,
    pgoff: u64,
    writable: bool,
    inherit: bool,
    first: bool,
    /// In the process in which it was attached.
    locked: bool,
    /// The process in which it was attached.
    depth: u32,
    /// Other regions have them when this one is unmapped.
    _stripes: Option<Stripes>,
}

impl Region {
    /// Returns the address of the first byte. It stays the same in forked children.
    pub fn as_ptr(&self) -> *mut u8 {
        self.addr as *mut u8
    }

    /// Returns the number by which the engine knows the region ([`Engine::snapshot`](crate::Engine::snapshot)), unique in
    /// the process that attached it.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Returns the length in bytes, whole pages.
    pub fn len_bytes(&self) -> usize {
        self.len
    }

    /// Returns the page of the list that the region begins with.
    pub fn pgoff(&self) -> u64 {
        self.pgoff
    }

    /// Tells whether the region was attached read-write.
    pub fn is_writable(&self) -> bool {
        self.writable
    }

    /// Tells whether this attach was the first of its vmap: the count went from 0 to 1.
    pub fn is_first(&self) -> bool {
        self.first
    }

    /// Tells whether the engine has locked the region in this process: its pages are not swapped out once they have come
    /// here ([`Residency`]). What the application itself locks or unlocks is not asked for.
    pub fn is_locked(&self) -> bool {
        if depth() == self.depth {
            return self.locked;
        }
        match &*self.shared.local() {
            Local::Child { unlocked, .. } => {
                self.inherit && self.core.residency != Residency::Swappable && !unlocked.contains(&self.id)
            }
            Local::Owner { .. } | Local::Lost { .. } => false,
        }
    }

    /// Returns the vmap that is attached.
    pub fn vmap(&self) -> Vmap {
        Vmap { core: Arc::clone(&self.core), shared: Arc::clone(&self.shared) }
    }

    /// Checks that the region is there in this process: always, except in a forked child that was not to inherit it,
    /// could not be connected to the engine, or gave some of the addresses away before the engine's fork handler ran.
    /// Parts that were unmapped, or mapped over, are not looked for.
    ///
    /// # Errors
    ///
    /// [`Error::NotInherited`] with the cause.
    pub fn check(&self) -> Result<()> {
        if depth() == self.depth {
            return Ok(());
        }
        if !self.inherit {
            let why = if self.core.read_only {
                "what may be read only is mapped without the engine, in one process"
            } else {
                "the region was attached with inherit(false)"
            };
            return Err(Error::NotInherited { why: why.into() });
        }
        match &*self.shared.local() {
            Local::Lost { why } => Err(Error::NotInherited { why: why.clone() }),
            Local::Owner { .. } | Local::Child { .. } => Ok(()),
        }
    }

    /// Looks whether a piece that ends at `addr` was grown in place, of which no event tells. What it grew by is then a
    /// piece too.
    fn look_behind(&self, local: &Local, addr: usize) -> Result<()> {
        let ends_the_list = self.pgoff + (self.len / page_size()) as u64 >= self.core.nr_pages();
        // Past the end of the list there is nothing to be served, ever.
        let nothing_behind = addr == self.addr + self.len && ends_the_list && !self.core.expandable;
        // Huge pages don't grow.
        if nothing_behind || self.core.read_only || self.core.page().is_huge() || !mapping::is_mapped(addr) {
            return Ok(());
        }
        match local {
            Local::Owner { .. } => {
                let handler = &self.shared.handler;
                // Not by the keeper: it may be dropping what waits for the caller.
                if self.core.is_in_window(addr) {
                    return Ok(());
                }
                let probed = handler.ask(|reply| Command::Probe { space: OWN_SPACE, addr, reply })?;
                let Some(lookup) = probed else { return Ok(()) };
                let ours = |file| (file == self.core.object.id()).then(|| self.core.owner());
                let details = || maps::open_own_details().ok();
                let mut patience = Patience::new();
                loop {
                    let finding = match maps::open_own().map(|maps| find(&maps, addr, ours, details)) {
                        // Another vmap's, perhaps: not for this thread to say. Who waits there touches again.
                        Err(_) | Ok(Finding::Foreign) => Finding::Nothing,
                        Ok(finding) => finding,
                    };
                    let told = handler.ask(|reply| Command::Found { lookup, finding, reply })?;
                    let Err(Changing) = told else { return Ok(()) };
                    if let Err(error) = patience.wait() {
                        let _ = handler.ask(|reply| Command::Found { lookup, finding: Finding::Nothing, reply });
                        return Err(error);
                    }
                }
            }
            Local::Child { lifeline, .. } => {
                let mut patience = Patience::new();
                while let (Reply::Later, _) = lifeline.ask(Ask::LookUp { addr: addr as u64 }, None)? {
                    patience.wait()?;
                }
                Ok(())
            }
            Local::Lost { .. } => Ok(()),
        }
    }

    /// In a client that may read only: unmaps the region, and tells the engine.
    fn unmap_read_only(&self, local: &Local, pieces: Pieces) -> Result<()> {
        for &(start, end) in pieces.as_slice() {
            mapping::unmap(start, end - start)?;
        }
        match local {
            Local::Child { lifeline, .. } => lifeline.ask(Ask::Detached { region: self.id }, None).map(drop),
            Local::Owner { .. } | Local::Lost { .. } => Ok(()),
        }
    }

    /// In a client: refuses to unmap what is no memory of the vmap, whatever the engine says. Tells whether any of it is mapped.
    fn check_pieces(&self, pieces: &Pieces) -> Result<bool> {
        let refused = |&(start, _): &(usize, usize)| Error::Invalid {
            what: "the start of a piece of a region, as the server has it",
            value: start as u64,
            rule: "it must be whole pages of the vmap's own memory: the server is not what it should be",
        };
        let is_range = |&(start, end): &(usize, usize)| start < end && is_aligned(start) && is_aligned(end);
        if let Some(piece) = pieces.as_slice().iter().find(|piece| !is_range(piece)) {
            return Err(refused(piece));
        }
        let unreadable = "reading what this process has mapped";
        let mut any = false;
        for vma in maps::open_own().map_err(Error::io(unreadable))?.vmas() {
            let vma = vma.map_err(Error::io(unreadable))?;
            let within = |&&(start, end): &&(usize, usize)| start < vma.range.end && vma.range.start < end;
            if let Some(piece) = pieces.as_slice().iter().find(within) {
                if vma.file != self.core.object.id() {
                    return Err(refused(piece));
                }
                any = true;
            }
        }
        Ok(any)
    }

    /// Unmaps what is left of the region.
    fn unmap(&self, local: &Local) -> Result<()> {
        let mut patience = Patience::new();
        loop {
            let pieces = match local {
                Local::Owner { .. } => {
                    let region = self.id;
                    self.shared.handler.ask(|reply| Command::Pieces { space: OWN_SPACE, region, reply })?
                }
                Local::Child { lifeline, .. } => match lifeline.ask(Ask::Pieces { region: self.id }, None)? {
                    (Reply::Pieces(pieces), _) => pieces,
                    _ => return Err(Error::sys("the answer about a region")(Errno::EPROTO)),
                },
                Local::Lost { why } => return Err(Error::NotInherited { why: why.clone() }),
            };
            if pieces.as_slice().is_empty() {
                return Ok(());
            }
            if self.shared.of_client && !self.check_pieces(&pieces)? {
                // Another thread has unmapped it, and the engine hears of that soon.
                patience.wait()?;
                continue;
            }
            if self.core.read_only {
                // No event will tell.
                return self.unmap_read_only(local, pieces);
            }
            for &(start, end) in pieces.as_slice() {
                // If it can't be looked at, what lies behind stays: a touch of it is resident bytes or SIGBUS.
                let _ = self.look_behind(local, end);
                // Only what the table says is still this region's: the rest may be somebody else's by now.
                mapping::unmap(start, end - start)?;
            }
        }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        if self.check().is_err() {
            return;
        }
        let local = self.shared.local();
        // A child that another thread forks has all of the area or nothing.
        let _gate = gate();
        match &*local {
            Local::Owner { .. } => {
                let region = self.id;
                // While it is leaving, its end is not reported by the kernel's event but counted here, after the
                // unmap: the callback then finds it gone.
                if let Ok(pieces) = self.shared.handler.ask(|reply| Command::Leave { region, reply }) {
                    // munmap is refused only for want of mappings (vm.max_map_count), when the kernel has merged the
                    // range with a neighbour's. What is still mapped is still counted.
                    if self.unmap(&local).is_ok() {
                        tell!(
                            DEBUG,
                            "kiomap::region",
                            "dropped",
                            engine = self.shared.id,
                            vmap = self.core.id,
                            region = self.id,
                            pieces = pieces
                        );
                        self.core.close(pieces);
                    }
                    self.shared.handler.send(Command::Left);
                    // What is brought for it in the background ends.
                    self.shared.jobs.nudge();
                }
            }
            Local::Child { lifeline, .. } => {
                mask::settle();
                // The engine counts by the unmap events, so that a death in between loses nothing. When it is gone,
                // the range stays mapped: which parts of it are still ours, only the engine knew.
                if self.unmap(&local).is_ok() {
                    let _ = lifeline.ask(Ask::Sync, None);
                }
            }
            Local::Lost { .. } => {}
        }
    }
}

impl std::fmt::Debug for Region {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Region")
            .field("addr", &format_args!("{:#x}", self.addr))
            .field("len_bytes", &self.len)
            .field("pgoff", &self.pgoff)
            .field("writable", &self.writable)
            .finish_non_exhaustive()
    }
}
