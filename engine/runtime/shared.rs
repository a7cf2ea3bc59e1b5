//! What an engine's threads and handles share.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use crossbeam_channel::Sender;

use super::around::FaultAround;
use super::bell::Bell;
use super::command::Command;
use super::handles::{HandlerHandle, KeeperHandle, Request, handler_handle, keeper_channel};
use super::jobs::Jobs;
use super::stripes::IdleStripes;
use crate::fork::link::Local;
use crate::process::gate;
use crate::space::OWN_SPACE;
use crate::space::foreign::FOREIGN;
use crate::space::stripes::STRIPE;
use crate::stats::latency::Counts;
use crate::stats::shards::{Owners, Sharded};
use crate::stats::{Counters, SpaceCounters};
use crate::sys::{Features, OpenWay, Opener};
use crate::vmap::core::Notice;
use crate::vmap::registry::Registry;
use crate::{Error, Result};

/// What an engine's threads and handles share. In a forked child it is a copy in which only `local`, `opener`,
/// `vmaps` and the plain values mean anything: the threads stayed in the parent.
pub(crate) struct EngineShared {
    pub(crate) id: u64,
    pub(crate) opener: Opener,
    pub(crate) way: OpenWay,
    pub(crate) features: Features,
    pub(crate) fault_around: FaultAround,
    /// Readable when the process that created the engine has exited. Children inherit it.
    pub(crate) owner_pidfd: OwnedFd,
    /// How this process reaches the engine; exchanged in a forked child.
    pub(super) local: RwLock<Arc<Local>>,
    pub(super) child: AtomicBool,
    /// The engine is in a process that is not an ancestor: what it says of this process's memory is not to be believed.
    pub(crate) of_client: bool,
    pub(crate) handler: HandlerHandle,
    pub(crate) keeper: Arc<KeeperHandle>,
    pub(crate) notices: Sender<Notice>,
    pub(crate) vmaps: Registry,
    pub(crate) counters: Counters,
    pub(crate) latency: Sharded<Counts>,
    /// Which threads have counters of their own.
    pub(super) shard_owners: Owners,
    pub(super) spaces: Mutex<Vec<Arc<SpaceCounters>>>,
    pub(super) next_space: AtomicU64,
    pub(super) next_region: AtomicU64,
    pub(super) next_vmap: AtomicU64,
    pub(crate) idle_stripes: IdleStripes,
    /// What is done in the background.
    pub(crate) jobs: Jobs,
    /// No attach, no fill any more.
    pub(crate) retired: AtomicBool,
    /// Attaches that began before that and have not ended: they may count, so the threads stay.
    pub(super) attaching: AtomicUsize,
}

/// An attach that is under way.
pub(crate) struct Attaching<'a>(&'a EngineShared);

impl Drop for Attaching<'_> {
    fn drop(&mut self) {
        self.0.attaching.fetch_sub(1, Ordering::SeqCst);
        if self.0.retired.load(Ordering::SeqCst) {
            self.0.handler.nudge();
        }
    }
}

/// What differs between the engine's own process and a client of it.
pub(super) struct Setup {
    pub(super) opener: Opener,
    pub(super) way: OpenWay,
    pub(super) features: Features,
    pub(super) fault_around: FaultAround,
    pub(super) owner_pidfd: OwnedFd,
    pub(super) local: Local,
    pub(super) is_client: bool,
    pub(super) handler: HandlerHandle,
    pub(super) keeper: Arc<KeeperHandle>,
    pub(super) notices: Sender<Notice>,
    pub(super) spaces: Vec<Arc<SpaceCounters>>,
}

/// Numbers an engine, in this process and its forked children.
fn new_engine_id() -> u64 {
    static NEXT_ENGINE: AtomicU64 = AtomicU64::new(1);
    NEXT_ENGINE.fetch_add(1, Ordering::Relaxed)
}

impl EngineShared {
    /// Makes what an engine's threads and handles share.
    pub(super) fn new(setup: Setup) -> EngineShared {
        EngineShared {
            id: new_engine_id(),
            opener: setup.opener,
            way: setup.way,
            features: setup.features,
            fault_around: setup.fault_around,
            owner_pidfd: setup.owner_pidfd,
            local: RwLock::new(Arc::new(setup.local)),
            child: AtomicBool::new(setup.is_client),
            of_client: setup.is_client,
            handler: setup.handler,
            keeper: setup.keeper,
            notices: setup.notices,
            vmaps: Registry::default(),
            counters: Counters::default(),
            latency: Sharded::default(),
            shard_owners: Owners::default(),
            spaces: Mutex::new(setup.spaces),
            next_space: AtomicU64::new(OWN_SPACE + 1),
            next_region: AtomicU64::new(1),
            next_vmap: AtomicU64::new(1),
            idle_stripes: IdleStripes::default(),
            jobs: Jobs::default(),
            retired: AtomicBool::new(false),
            attaching: AtomicUsize::new(0),
        }
    }

    /// Makes what a process has of an engine in another process that is not an ancestor. It is as in a forked child, and
    /// connected by [`EngineShared::connect`].
    pub(crate) fn of_client(opener: Opener, way: OpenWay, features: Features, owner_pidfd: OwnedFd) -> Result<Self> {
        let (commands, unheard) = crossbeam_channel::bounded(1);
        let bell = Arc::new(Bell::new().map_err(Error::sys("eventfd for a client"))?);
        let (keeper, _) = keeper_channel().map_err(Error::sys("eventfd for a client"))?;
        let (notices, _) = crossbeam_channel::unbounded();
        let shared = EngineShared::new(Setup {
            opener,
            way,
            features,
            fault_around: FaultAround::default(),
            owner_pidfd,
            local: Local::Lost { why: "it is not connected yet".into() },
            is_client: true,
            handler: handler_handle(commands, unheard, bell),
            keeper: Arc::new(keeper),
            notices,
            spaces: Vec::new(),
        });
        // There is no such thread: whoever asks it is told so.
        shared.handler.close();
        Ok(shared)
    }

    /// In a client: sets the way to the engine.
    pub(crate) fn connect(&self, local: Local) {
        let _gate = gate();
        *self.local.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(local);
    }

    /// Begins an attach; `None` after a shutdown.
    pub(crate) fn begin_attach(&self) -> Option<Attaching<'_>> {
        // Counted before the flag is looked at: either this finds the flag, or the fault-handling thread the count.
        self.attaching.fetch_add(1, Ordering::SeqCst);
        let attaching = Attaching(self);
        (!self.retired.load(Ordering::SeqCst)).then_some(attaching)
    }

    /// Tells whether an attach is under way.
    pub(crate) fn is_attaching(&self) -> bool {
        self.attaching.load(Ordering::SeqCst) > 0
    }

    /// Waits until everything that has happened by now is counted. Not on the keeper.
    pub(crate) fn settle(&self) -> Result<()> {
        while !self.handler.ask(|reply| Command::Barrier { reply })? {
            // The keeper makes room for the posts that found none.
            std::thread::yield_now();
        }
        super::call::call(|reply| self.keeper.send(Request::Settle { reply })).ok_or(Error::Shutdown)
    }

    /// How this process reaches the engine.
    pub(crate) fn local(&self) -> Arc<Local> {
        let _gate = gate();
        self.local_ungated()
    }

    /// As [`EngineShared::local`]; the caller keeps forks away.
    pub(crate) fn local_ungated(&self) -> Arc<Local> {
        Arc::clone(&self.local.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Tells whether pages are refused by UFFDIO_POISON; if not, by masks.
    pub(crate) fn poisons(&self) -> bool {
        self.features.contains(Features::POISON)
    }

    /// Tells whether the engine's own process brings its pages on the threads that touch them.
    pub(crate) fn delivers_in_thread(&self) -> bool {
        self.features.contains(Features::SIGBUS)
    }

    /// The features of a forked child's userfaultfd.
    pub(crate) fn child_features(&self) -> Features {
        self.features.difference(Features::SIGBUS)
    }

    /// Tells whether a fault of a worker is known as one, so that it is never made to wait for a worker.
    pub(crate) fn recognises_workers(&self) -> bool {
        self.features.contains(Features::THREAD_ID)
    }

    /// Tells whether this process inherited the engine by fork.
    pub(crate) fn is_child(&self) -> bool {
        self.child.load(Ordering::Acquire)
    }

    /// In a forked child, in its fork handler: exchanges the way to the engine.
    pub(crate) fn become_child(&self, local: Local) {
        self.child.store(true, Ordering::Release);
        let before =
            std::mem::replace(&mut *self.local.write().unwrap_or_else(PoisonError::into_inner), Arc::new(local));
        // The parent's threads, which are not here, hold it too: what is in it belongs to them.
        std::mem::forget(before);
    }

    pub(crate) fn new_space_counters(&self) -> Arc<SpaceCounters> {
        let id = self.next_space.fetch_add(1, Ordering::Relaxed);
        Arc::new(SpaceCounters { id, ..SpaceCounters::default() })
    }

    /// For a part of this process.
    pub(crate) fn new_stripe_counters(&self) -> Arc<SpaceCounters> {
        let id = self.next_space.fetch_add(1, Ordering::Relaxed) | STRIPE;
        let pid = AtomicI32::new(nix::unistd::getpid().as_raw());
        Arc::new(SpaceCounters { id, pid, ..SpaceCounters::default() })
    }

    /// For a process whose memory is not the engine's.
    pub(crate) fn new_foreign_counters(&self) -> Arc<SpaceCounters> {
        let id = self.next_space.fetch_add(1, Ordering::Relaxed) | FOREIGN;
        Arc::new(SpaceCounters { id, ..SpaceCounters::default() })
    }

    pub(crate) fn new_region_id(&self) -> u64 {
        self.next_region.fetch_add(1, Ordering::Relaxed)
    }

    pub(crate) fn new_vmap_id(&self) -> u64 {
        self.next_vmap.fetch_add(1, Ordering::Relaxed)
    }

    pub(crate) fn spaces(&self) -> MutexGuard<'_, Vec<Arc<SpaceCounters>>> {
        self.spaces.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn spaces_push(&self, counters: Arc<SpaceCounters>) {
        self.spaces().push(counters);
    }

    pub(crate) fn spaces_remove(&self, id: u64) {
        self.spaces().retain(|counters| counters.id != id);
    }
}
