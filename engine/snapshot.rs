//! The registry as a whole, at one moment: every vmap, process and area, for a debugger, and to be compared with what
//! the kernel says in `/proc/PID/maps`.

use std::fmt;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use nix::sys::stat::fstat;

use crate::page::page_size;
use crate::process::ledger::Private;
use crate::space::mmap_vec::MmapVec;
use crate::space::stripes::is_stripe;
use crate::space::{AreaRecord, Space, SpaceId};
use crate::stats::SpaceCounters;
use crate::sys::Userfault;
use crate::vmap::core::VmapCore;
use crate::vmap::page_size::PageSize;
use crate::{Error, Result};

/// Lists what an engine serves ([`Engine::snapshot`](crate::Engine::snapshot)); as text, it is a table.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Snapshot {
    /// The vmaps that are alive, by their ids.
    pub vmaps: Vec<VmapSnapshot>,
    /// The processes that are served, the engine's own first.
    pub spaces: Vec<SpaceSnapshot>,
}

/// Describes a vmap.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct VmapSnapshot {
    /// Its id ([`Vmap::id`](crate::Vmap::id)).
    pub id: u64,
    /// The device of its memfd, as `/proc/PID/maps` shows it (`major:minor`).
    pub device: (u64, u64),
    /// The inode of its memfd, as `/proc/PID/maps` shows it.
    pub inode: u64,
    /// The byte of its memfd at which the first page of its list lies.
    pub offset: u64,
    /// The pages of its list.
    pub nr_pages: u64,
    /// The size of the pages that it consists of ([`VmapBuilder::page_size`](crate::VmapBuilder::page_size)).
    pub page_size: PageSize,
    /// The areas attached, in all processes.
    pub refcount: usize,
    /// The bytes that the pages of its memfd take, in memory or in swap.
    pub resident_bytes: u64,
    /// Where the engine's process maps it without access, to fill pages through; not an area.
    pub window: Option<Range<usize>>,
}

/// Describes a process that the engine serves.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct SpaceSnapshot {
    /// The process's id; 0 for a forked child that has not reported yet.
    pub pid: i32,
    /// Threads whose faults the engine has not read yet, as the kernel counts them (`pending` in the fdinfo of its
    /// userfaultfds).
    pub pending: u64,
    /// Threads that wait for a page, read or not (`total`).
    pub total: u64,
    /// Its areas, by address.
    pub areas: Vec<AreaSnapshot>,
}

/// Describes an area: a range of a process that shows pages of a vmap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct AreaSnapshot {
    /// The address of its first byte.
    pub start: usize,
    /// The address after its last byte.
    pub end: usize,
    /// The page of the list at `start`.
    pub pgoff: u64,
    /// The vmap's id.
    pub vmap: u64,
    /// The region's id ([`Region::id`](crate::Region::id)), unique in its process. A region that was split has an area
    /// for each piece.
    pub region: u64,
    /// It was attached read-write.
    pub writable: bool,
}

/// What the fault-handling thread knows, copied into memory that the asker provides.
pub(crate) struct View {
    pub(crate) spaces: MmapVec<SpaceView>,
    pub(crate) areas: MmapVec<AreaRecord>,
    /// Of this space only.
    only: Option<SpaceId>,
}

/// A space; its areas are the next `nr_areas` of the view.
pub(crate) struct SpaceView {
    counters: Arc<SpaceCounters>,
    uffd: Option<Arc<Private<Userfault>>>,
    nr_areas: usize,
}

impl View {
    pub(crate) const fn new() -> View {
        View { spaces: MmapVec::new(), areas: MmapVec::new(), only: None }
    }

    /// To be of one space.
    pub(crate) fn of(space: SpaceId) -> View {
        View { only: Some(space), ..View::new() }
    }

    /// Copies a space's state. Allocates by mmap only.
    pub(crate) fn add(&mut self, space: &Space) -> std::result::Result<(), nix::errno::Errno> {
        if self.only.is_some_and(|only| only != space.id) {
            return Ok(());
        }
        let nr_areas = space.table.len();
        self.areas.try_reserve(nr_areas)?;
        for area in space.table.iter() {
            self.areas.try_push(AreaRecord::of(area)).map_err(|(_, errno)| errno)?;
        }
        let view = SpaceView { counters: Arc::clone(&space.counters), uffd: space.uffd.clone(), nr_areas };
        self.spaces.try_push(view).map_err(|(_, errno)| errno)
    }
}

impl Snapshot {
    /// Puts together what the fault-handling thread told, what the registry knows, and what the kernel counts.
    pub(crate) fn of(vmaps: &[Arc<VmapCore>], view: &View) -> Result<Snapshot> {
        let mut vmaps = vmaps.iter().map(|vmap| VmapSnapshot::of(vmap)).collect::<Result<Vec<_>>>()?;
        vmaps.sort_by_key(|vmap| vmap.id);
        let mut areas = view.areas.iter();
        let mut spaces = Vec::<SpaceSnapshot>::new();
        for space in view.spaces.iter() {
            let snapshot = SpaceSnapshot::of(space, areas.by_ref())?;
            match spaces.first_mut() {
                // The own process comes first.
                Some(own) if is_stripe(space.counters.id) => own.add(snapshot),
                _ => spaces.push(snapshot),
            }
        }
        if let Some(own) = spaces.first_mut() {
            own.areas.sort_unstable_by_key(|area| area.start);
        }
        Ok(Snapshot { vmaps, spaces })
    }
}

impl VmapSnapshot {
    fn of(vmap: &VmapCore) -> Result<VmapSnapshot> {
        let stat = fstat(vmap.memfd()).map_err(Error::sys("fstat of the memfd of a vmap"))?;
        Ok(VmapSnapshot {
            id: vmap.id,
            device: (nix::sys::stat::major(stat.st_dev), nix::sys::stat::minor(stat.st_dev)),
            inode: stat.st_ino,
            offset: vmap.object.base(),
            nr_pages: vmap.nr_pages(),
            page_size: vmap.page(),
            refcount: vmap.refcount(),
            resident_bytes: stat.st_blocks as u64 * 512,
            window: vmap.contents().window.map(|window| window.range()),
        })
    }
}

impl SpaceSnapshot {
    fn of<'a>(space: &SpaceView, areas: &mut impl Iterator<Item = &'a AreaRecord>) -> Result<SpaceSnapshot> {
        let (pending, total) = match &space.uffd {
            Some(uffd) => waiting(uffd)?,
            None => (0, 0),
        };
        let areas = areas.take(space.nr_areas).map(AreaSnapshot::of).collect();
        Ok(SpaceSnapshot { pid: space.counters.pid.load(Ordering::Relaxed), pending, total, areas })
    }
}

impl SpaceSnapshot {
    /// Adds what another space of the same process has.
    fn add(&mut self, stripe: SpaceSnapshot) {
        self.pending += stripe.pending;
        self.total += stripe.total;
        self.areas.extend(stripe.areas);
    }
}

impl AreaSnapshot {
    fn of(record: &AreaRecord) -> AreaSnapshot {
        AreaSnapshot {
            start: record.start as usize,
            end: (record.start + record.len) as usize,
            pgoff: record.pgoff,
            vmap: record.vmap,
            region: record.region,
            writable: record.is_writable(),
        }
    }

    /// Returns the length in pages.
    pub fn nr_pages(&self) -> u64 {
        ((self.end - self.start) / page_size()) as u64
    }
}

/// The kernel's count of waiting threads: those not read, and all.
fn waiting(uffd: &Userfault) -> Result<(u64, u64)> {
    let path = format!("/proc/thread-self/fdinfo/{}", uffd.as_raw_fd());
    let text = std::fs::read_to_string(path).map_err(Error::io("read of a userfaultfd's fdinfo"))?;
    let number = |key| text.lines().find_map(|line| line.strip_prefix(key)).and_then(|n| n.trim().parse().ok());
    match (number("pending:"), number("total:")) {
        (Some(pending), Some(total)) => Ok((pending, total)),
        _ => Err(Error::sys("the fdinfo of a userfaultfd")(nix::errno::Errno::EPROTO)),
    }
}

impl fmt::Display for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for vmap in &self.vmaps {
            let VmapSnapshot {
                id, device: (major, minor), inode, nr_pages, page_size, refcount, resident_bytes, ..
            } = vmap;
            let huge =
                if page_size.is_huge() { format!(" in {} KiB", page_size.bytes() / 1024) } else { String::new() };
            let kib = resident_bytes / 1024;
            writeln!(
                f,
                "vmap {id}: {nr_pages} pages{huge}, {kib} KiB resident, {refcount} areas, memfd {major:02x}:{minor:02x} {inode}"
            )?;
        }
        for SpaceSnapshot { pid, pending, total, areas } in &self.spaces {
            writeln!(f, "process {pid}: {} areas, {total} threads waiting, {pending} of them unread", areas.len())?;
            for area in areas {
                let AreaSnapshot { start, end, pgoff, vmap, region, writable } = area;
                let access = if *writable { "rw" } else { "r-" };
                let last = pgoff + area.nr_pages();
                writeln!(f, "  {start:012x}-{end:012x} {access} vmap {vmap} pages {pgoff}..{last} region {region}")?;
            }
        }
        Ok(())
    }
}
