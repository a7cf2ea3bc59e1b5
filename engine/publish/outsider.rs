//! What is known of the processes that are served over a socket, and what they may say.
//!
//! A forked child is a copy of the engine's own program. An unrelated process may be anything: each frame of it is looked at
//! before the keeper acts on it, and the first that is wrong ends the connection. Its guard, if it has one, then answers its
//! faults.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::descriptor::{Kind, kind_of};
use crate::fork::wire::{Ask, FrameFault};
use crate::page::{is_aligned, page_size};
use crate::runtime::bell::Bell;
use crate::space::{AreaRecord, SpaceId};
use crate::stats::SpaceCounters;
use crate::sys::Features;
use crate::vmap::core::VmapCore;
use crate::{Error, Result};

/// The most areas that a process may have when it attaches one more over a socket. By unmapping parts of them it can get more,
/// as many as the kernel lets it have mappings (`vm.max_map_count`).
pub const CLIENT_AREAS_MAX: usize = 4096;

/// Beyond the addresses of applications on every architecture.
const ADDRESSES_END: u64 = 1 << 56;

/// Who connects, as the kernel says ([`PublishOptions::policy`](crate::PublishOptions::policy)).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct PeerCredentials {
    /// The process that connected, as this process's namespace numbers it; 0 if it can't be seen from here.
    pub pid: i32,
    /// Its effective user, when it connected.
    pub uid: u32,
    /// Its effective group, when it connected.
    pub gid: u32,
}

/// How many processes are served.
#[derive(Clone, Copy, Debug)]
pub(super) struct Most {
    pub(super) processes: usize,
    pub(super) of_a_client: usize,
}

/// A vmap at a socket, as its listener, the keeper and the handle share it.
#[derive(Debug)]
pub(crate) struct Publication {
    pub(crate) vmap: u64,
    /// Processes at the most, and how many of them one that connects may come to.
    most: Most,
    /// How long a connection may say nothing.
    pub(crate) greeting: Duration,
    served: Mutex<Vec<Arc<SpaceCounters>>>,
    pub(super) bell: Bell,
    stopped: AtomicBool,
}

impl Publication {
    pub(super) fn new(vmap: u64, most: Most, greeting: Duration) -> Result<Publication> {
        let bell = Bell::new().map_err(Error::sys("eventfd for a published vmap"))?;
        Ok(Publication { vmap, most, greeting, served: Mutex::default(), bell, stopped: AtomicBool::new(false) })
    }

    pub(super) fn served(&self) -> MutexGuard<'_, Vec<Arc<SpaceCounters>>> {
        self.served.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives a process that connects a place, if there is one.
    pub(crate) fn admit(self: &Arc<Self>, counters: &Arc<SpaceCounters>) -> Option<Place> {
        self.place(counters, Arc::default())
    }

    fn place(self: &Arc<Self>, counters: &Arc<SpaceCounters>, family: Arc<()>) -> Option<Place> {
        let mut served = self.served();
        // One reference is in hand. Whoever leaves meanwhile may be counted still.
        if served.len() >= self.most.processes || Arc::strong_count(&family) > self.most.of_a_client {
            return None;
        }
        served.push(Arc::clone(counters));
        Some(Place { publication: Arc::clone(self), space: counters.id, family })
    }

    /// Has the listener end.
    pub(crate) fn stop(&self) {
        self.stopped.store(true, Ordering::SeqCst);
        self.bell.ring();
    }

    pub(super) fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::SeqCst)
    }
}

/// A process's place among those that may be served.
#[derive(Debug)]
pub(crate) struct Place {
    pub(crate) publication: Arc<Publication>,
    space: SpaceId,
    /// The process that connected and those that descend from it have one reference each.
    family: Arc<()>,
}

impl Place {
    /// Gives a process that this one forks a place, if there is one, and one for its family.
    pub(crate) fn admit_forked(&self, counters: &Arc<SpaceCounters>) -> Option<Place> {
        self.publication.place(counters, Arc::clone(&self.family))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.publication.served().retain(|counters| counters.id != self.space);
    }
}

/// Why a connection was cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Misdeed {
    #[error("a frame is wrong: {0}")]
    Frame(#[from] FrameFault),
    #[error("no greeting came in time")]
    Silent,
    #[error("it does not read its answers")]
    Deaf,
    #[error("that can't be said before the greeting, or not after it")]
    Untimely,
    #[error("a descriptor is missing, is not due, or is of another kind")]
    Descriptor,
    #[error("it was not given vmap {0}")]
    Vmap(u64),
    #[error("{start:#x}, {len:#x} bytes: no range of whole pages, of the vmap or of addresses")]
    Range { start: u64, len: u64 },
    #[error("the flags {0:#x} are not known")]
    Flags(u64),
    #[error("it may read only")]
    ReadOnly,
    #[error("it has {0} areas")]
    TooMany(u64),
    #[error("it attaches again before it was answered")]
    Impatient,
    #[error("its userfaultfd can't be used: {0}")]
    Userfault(Errno),
    #[error("its userfaultfd has the features {0}")]
    Features(Features),
}

/// A region of a process that may read only, which is mapped without the engine.
pub(crate) struct ReadOnlyRegion {
    pub(crate) range: (usize, usize),
    pub(crate) vmap: Arc<VmapCore>,
}

/// A process that is not trusted: an unrelated one, or one that was forked from such.
pub(crate) struct Outsider {
    pub(crate) place: Arc<Place>,
    pub(crate) read_only: bool,
    /// It was forked from another: it brings its own pidfd.
    pub(crate) is_forked: bool,
    /// When it must have greeted.
    pub(crate) due: Option<Instant>,
    /// By their numbers. Areas that the fault-handling thread knows are not here.
    pub(crate) regions: HashMap<u64, ReadOnlyRegion>,
    /// An attach of it waits for a callback.
    pub(crate) is_waiting: bool,
}

impl Outsider {
    pub(crate) fn new(place: Place, read_only: bool) -> Outsider {
        let due = Some(Instant::now() + place.publication.greeting);
        let place = Arc::new(place);
        Outsider { place, read_only, is_forked: false, due, regions: HashMap::new(), is_waiting: false }
    }

    /// What a process is that this one forks.
    pub(crate) fn forked(&self, place: Place) -> Outsider {
        Outsider { is_forked: true, due: None, ..Outsider::new(place, self.read_only) }
    }

    /// Tells whether a message may be acted on. `greeted`: it is served by now. `areas`: so many of it are known.
    ///
    /// # Errors
    ///
    /// What is wrong with it.
    pub(crate) fn check(
        &self,
        ask: &Ask,
        descriptor: Option<&OwnedFd>,
        greeted: bool,
        areas: u64,
    ) -> std::result::Result<(), Misdeed> {
        let due = match ask {
            Ask::Watch => Some(Kind::Pidfd),
            Ask::Masks => Some(Kind::Lifeline),
            Ask::Aside => Some(Kind::Userfaultfd),
            Ask::Hello { errno: 0, .. } => Some(Kind::Userfaultfd),
            _ => None,
        };
        if descriptor.is_some() != due.is_some() || descriptor.and_then(kind_of) != due {
            return Err(Misdeed::Descriptor);
        }
        let timely = match ask {
            // Who connected is known by the socket.
            Ask::Watch | Ask::Taken { .. } => !greeted && self.is_forked,
            Ask::Masks | Ask::Aside | Ask::Hello { .. } => !greeted,
            Ask::Detached { .. } => greeted && self.read_only,
            _ => greeted,
        };
        if !timely {
            return Err(Misdeed::Untimely);
        }
        match *ask {
            Ask::Attach(record) => self.check_attach(&record, areas),
            Ask::Refcount { vmap } if vmap != self.place.publication.vmap => Err(Misdeed::Vmap(vmap)),
            Ask::Taken { start, end } => {
                let len = end.checked_sub(start).filter(|&len| len > 0).ok_or(Misdeed::Range { start, len: 0 })?;
                range(start, len)
            }
            Ask::LookUp { addr } | Ask::Unmapped { addr } => range(addr, page_size() as u64),
            _ => Ok(()),
        }
    }

    fn check_attach(&self, record: &AreaRecord, areas: u64) -> std::result::Result<(), Misdeed> {
        let AreaRecord { start, len, pgoff, vmap, flags, .. } = *record;
        if vmap != self.place.publication.vmap {
            return Err(Misdeed::Vmap(vmap));
        }
        if self.is_waiting {
            return Err(Misdeed::Impatient);
        }
        if flags & !(AreaRecord::WRITABLE | AreaRecord::INHERIT | AreaRecord::UNLOCKED) != 0 {
            return Err(Misdeed::Flags(flags));
        }
        if self.read_only && record.is_writable() {
            return Err(Misdeed::ReadOnly);
        }
        let known = areas + self.regions.len() as u64;
        if known >= CLIENT_AREAS_MAX as u64 {
            return Err(Misdeed::TooMany(known));
        }
        range(start, len)?;
        // No byte of it lies where no file reaches.
        let end = pgoff.checked_add(len / page_size() as u64).and_then(|end| end.checked_mul(page_size() as u64));
        end.filter(|&end| end <= i64::MAX as u64).map(drop).ok_or(Misdeed::Range { start: pgoff, len })
    }
}

/// Refuses what is no range of whole pages where an application can have some.
fn range(start: u64, len: u64) -> std::result::Result<(), Misdeed> {
    let whole = start > 0 && len > 0 && is_aligned(start as usize) && is_aligned(len as usize);
    let end = start.checked_add(len).filter(|&end| end <= ADDRESSES_END);
    if whole && end.is_some() { Ok(()) } else { Err(Misdeed::Range { start, len }) }
}
