//! What a vmap is behind its handles: the backing object, the reference count, and the rules of its transitions.
//!
//! The count changes in three ways: an attach or a fork adds, the end of an area subtracts. `0 → 1` is *first*,
//! `1 → 0` owes one deref callback. Whoever attaches while a callback is owed waits until it has run (except the
//! callback itself), so that *first* and *deref* alternate strictly, as under the semaphore of `struct kiobuf_vmap`.

use std::any::Any;
use std::fmt;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::thread::ThreadId;

use crossbeam_channel::Sender;
use nix::errno::Errno;

use super::failure::{FailurePolicy, Failures, ReadFailed};
use super::object::{Object, Owner};
use super::page_size::PageSize;
use super::residency::Residency;
use super::window::Window;
use crate::fork::wire::Offer;
use crate::kiobuf::Kiobuf;
use crate::page::page_size;
use crate::process::mapping::Mapping;
use crate::stats::VmapCounters;
use crate::stats::shards::Sharded;
use crate::sys::{Ioctls, Opener, Userfault};
use crate::working_set::Identity;
use crate::working_set::recorder::Recorder;
use crate::{Error, Result};

pub(crate) type DerefFn = Box<dyn FnMut(&Arc<VmapCore>) + Send>;

/// What the callback thread is told.
pub(crate) enum Notice {
    /// The last area of a vmap is gone.
    Deref(Arc<VmapCore>),
    /// Pages of a vmap could not be read.
    Failed(Arc<VmapCore>, ReadFailed),
    /// Dropped when every notice before it was attended to.
    Settle(#[expect(dead_code, reason = "its drop is the answer")] Sender<()>),
    /// No area is left and none will come.
    End,
}

/// The page list of a vmap, and how often it was exchanged.
#[derive(Clone, Debug)]
pub(crate) struct Contents {
    pub(crate) list: Kiobuf,
    /// Covers the list; a list without pages has none.
    pub(crate) window: Option<Arc<Window>>,
    pub(crate) generation: u64,
    /// What lists from that generation on have, this one has too, at the same pages.
    pub(crate) kept_since: u64,
}

/// Says what an exchange of the list does to its pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exchange {
    /// All stay what they are; there may be more.
    Adds,
    /// Some are no longer what they were.
    TakesBack,
}

/// The shared state of a vmap.
pub(crate) struct VmapCore {
    pub(crate) id: u64,
    /// The backing object. Forked children keep it: they map it again.
    pub(crate) object: Object,
    nr_pages: AtomicU64,
    pub(crate) expandable: bool,
    /// What each mapping of it gets, in every process.
    pub(crate) residency: Residency,
    /// What its object holds is mapped by the engine, in answer to a minor fault.
    pub(crate) minor_faults: bool,
    /// This process may map it for reading only, and does that without the engine: every page is there.
    pub(crate) read_only: bool,
    /// Notes which pages are faulted on, if that is recorded.
    pub(crate) recorder: Option<Recorder>,
    /// Tells the contents from others, if that was settled when the vmap was built.
    pub(crate) identity: Option<Identity>,
    /// Its object may hold other bytes than the list has: it was mapped, or written to by the owner, or is somebody else's.
    diverges: AtomicBool,
    refcount: AtomicUsize,
    count: Mutex<Count>,
    /// Signalled when an owed callback has run or a transition closure has returned.
    settled: Condvar,
    /// Held for a moment only.
    contents: Mutex<Contents>,
    /// Held for reading while a few pages are filled that were read from the list, and for writing while it is exchanged.
    pub(super) exchange: RwLock<()>,
    pub(crate) failure_policy: FailurePolicy,
    pub(crate) failures: Failures,
    /// Held for reading by the owner's own reads and writes, for writing by an exchange of the list.
    pub(crate) in_use: RwLock<()>,
    /// If it is not 0, no page may be taken away: processes map them without the engine. Raised while `in_use` is held for
    /// writing; each publication for reading only counts.
    pub(crate) stays_whole: AtomicUsize,
    pub(crate) on_deref: Mutex<DerefSlot>,
    pub(crate) user_data: Option<Box<dyn Any + Send + Sync>>,
    pub(crate) counters: Sharded<VmapCounters>,
    notices: Sender<Notice>,
}

/// The deref callback; `version` tells a callback that was replaced while it ran.
#[derive(Default)]
pub(crate) struct DerefSlot {
    pub(crate) callback: Option<DerefFn>,
    pub(crate) version: u64,
}

#[derive(Debug, Default)]
struct Count {
    /// The thread that makes the first area, or whose `attach_with` closure is running.
    transition: Option<ThreadId>,
    /// An attach was put off because of that transition.
    put_off: bool,
    /// Callbacks that are owed and have not returned.
    derefs_owed: u32,
    destroyed: bool,
}

impl Count {
    /// Tells whether an attach of this thread may be counted at once.
    fn is_open_to(&self, caller: Caller) -> Result<bool> {
        if self.destroyed {
            return Err(Error::Shutdown);
        }
        if self.transition == Some(std::thread::current().id()) {
            return Err(Error::WouldDeadlock { what: "an attach", thread: "attach_with" });
        }
        if self.derefs_owed > 0 && caller == Caller::OtherCallback {
            return Err(Error::WouldDeadlock {
                what: "an attach to a vmap whose callback is due next",
                thread: "callback",
            });
        }
        Ok(self.transition.is_none() && (self.derefs_owed == 0 || caller == Caller::ItsCallback))
    }
}

/// Who attaches: whether it may wait for a callback.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Caller {
    /// A thread that may.
    Any,
    /// The vmap's own callback, for which nobody needs to wait.
    ItsCallback,
    /// Another vmap's callback, on the thread that all wait for.
    OtherCallback,
}

/// Whether an attach may count itself now.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Opened {
    /// Counted; `first` when the count was 0.
    Counted { first: bool },
    /// A callback is owed or a closure runs: wait.
    Later,
}

impl VmapCore {
    /// Publishes a list in its backing object. Past its end the kernel itself raises SIGBUS, even when the engine is gone.
    pub(crate) fn new(
        opener: &Opener,
        id: u64,
        (list, object): (Kiobuf, Object),
        expandable: bool,
        on_deref: Option<DerefFn>,
        user_data: Option<Box<dyn Any + Send + Sync>>,
        notices: Sender<Notice>,
    ) -> Result<VmapCore> {
        let window = open_window(opener, &object, list.nr_pages())?;
        Ok(VmapCore {
            id,
            diverges: AtomicBool::new(object.is_shared()),
            object,
            nr_pages: AtomicU64::new(list.nr_pages()),
            expandable,
            residency: Residency::default(),
            minor_faults: false,
            read_only: false,
            recorder: None,
            identity: None,
            refcount: AtomicUsize::new(0),
            count: Mutex::default(),
            settled: Condvar::new(),
            contents: Mutex::new(Contents { list, window, generation: 0, kept_since: 0 }),
            exchange: RwLock::new(()),
            failure_policy: FailurePolicy::default(),
            failures: Failures::default(),
            in_use: RwLock::new(()),
            stays_whole: AtomicUsize::new(0),
            on_deref: Mutex::new(DerefSlot { callback: on_deref, version: 0 }),
            user_data,
            counters: Sharded::default(),
            notices,
        })
    }

    /// In a client: a vmap of an engine in another process. It has no list, as in that process alone one is looked into.
    pub(crate) fn offered(offer: &Offer, object: Object, residency: Residency, notices: Sender<Notice>) -> VmapCore {
        VmapCore {
            id: offer.vmap,
            diverges: AtomicBool::new(true),
            object,
            nr_pages: AtomicU64::new(offer.nr_pages),
            expandable: offer.expandable,
            residency,
            minor_faults: offer.minor_faults,
            read_only: offer.read_only,
            recorder: None,
            identity: None,
            refcount: AtomicUsize::new(0),
            count: Mutex::default(),
            settled: Condvar::new(),
            contents: Mutex::new(Contents { list: Kiobuf::new(), window: None, generation: 0, kept_since: 0 }),
            exchange: RwLock::new(()),
            failure_policy: FailurePolicy::default(),
            failures: Failures::default(),
            in_use: RwLock::new(()),
            stays_whole: AtomicUsize::new(0),
            on_deref: Mutex::default(),
            user_data: None,
            counters: Sharded::default(),
            notices,
        }
    }

    pub(crate) fn memfd(&self) -> BorrowedFd<'_> {
        self.object.memfd()
    }

    /// What a mapping of its backing object says of the pages that it shows.
    pub(crate) fn owner(&self) -> Owner {
        Owner {
            vmap: self.id,
            base: self.object.base(),
            shared: self.object.is_shared(),
            minor_faults: self.minor_faults,
        }
    }

    pub(crate) fn nr_pages(&self) -> u64 {
        self.nr_pages.load(Ordering::Acquire)
    }

    pub(crate) fn page(&self) -> PageSize {
        self.object.page()
    }

    /// The bytes of the backing object that are the list's: whole pages, as many as it reaches into.
    pub(crate) fn object_bytes(&self) -> u64 {
        let nr_pages = self.nr_pages();
        self.page().whole(nr_pages).unwrap_or(nr_pages) * page_size() as u64
    }

    /// Registers a new mapping of its backing object.
    pub(crate) fn register(&self, uffd: &Userfault, start: usize, len: usize) -> std::result::Result<Ioctls, Errno> {
        let register =
            if self.minor_faults { Userfault::register_missing_and_minor } else { Userfault::register_missing };
        register(uffd, start, len)
    }

    /// Sets the residency on a new mapping; tells whether its pages stay in memory once they are there.
    pub(crate) fn lock(&self, mapping: &Mapping) -> Result<bool> {
        if self.page().is_huge() {
            // They are never swapped, and mlock2(MLOCK_ONFAULT) would bring them all at once.
            return Ok(self.residency != Residency::Swappable);
        }
        self.residency.apply(mapping)
    }

    fn lock_contents(&self) -> MutexGuard<'_, Contents> {
        self.contents.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The list as it is now.
    pub(crate) fn contents(&self) -> Contents {
        self.lock_contents().clone()
    }

    /// Tells whether its object may hold other bytes for a page than the list has.
    pub(crate) fn diverges(&self) -> bool {
        self.diverges.load(Ordering::Acquire)
    }

    /// Notes that from here on it may: before anybody can write to it.
    pub(crate) fn set_diverging(&self) {
        self.diverges.store(true, Ordering::Release);
    }

    /// Tells the contents of the list from any others', as far as they are known: as it was named, or is now.
    pub(crate) fn identity(&self) -> Result<Identity> {
        match self.identity {
            Some(identity) => Ok(identity),
            None => self.contents().list.identity(),
        }
    }

    /// Tells whether the list still has what it had in a generation.
    pub(super) fn keeps(&self, generation: u64) -> bool {
        self.lock_contents().kept_since <= generation
    }

    /// Tells whether an address is the window's: nothing else is mapped there.
    pub(crate) fn is_in_window(&self, addr: usize) -> bool {
        self.lock_contents().window.as_ref().is_some_and(|window| window.range().contains(&addr))
    }

    /// Opens a window for when the object has `nr_pages` pages.
    pub(crate) fn open_window(&self, opener: &Opener, nr_pages: u64) -> Result<Option<Arc<Window>>> {
        open_window(opener, &self.object, nr_pages)
    }

    /// Exchanges the list and its window, and returns those before.
    pub(crate) fn set_list(&self, list: Kiobuf, window: Option<Arc<Window>>, exchange: Exchange) -> Contents {
        let _exchanging = self.exchange.write().unwrap_or_else(PoisonError::into_inner);
        let mut contents = self.lock_contents();
        let generation = contents.generation + 1;
        let kept_since = match exchange {
            Exchange::Adds => contents.kept_since,
            Exchange::TakesBack => generation,
        };
        std::mem::replace(&mut *contents, Contents { list, window, generation, kept_since })
    }

    /// Grows the backing object; the list that covers the new pages is published before.
    pub(crate) fn grow(&self, nr_pages: u64) -> Result<()> {
        self.object.grow(nr_pages)?;
        self.nr_pages.store(nr_pages, Ordering::Release);
        Ok(())
    }

    pub(crate) fn refcount(&self) -> usize {
        self.refcount.load(Ordering::Acquire)
    }

    fn count(&self) -> MutexGuard<'_, Count> {
        self.count.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts one more area as `vm_ops->open` does: of a vmap that has areas already, so no transition. Takes no
    /// lock: the fault-handling thread calls it.
    pub(crate) fn open_again(&self) {
        let before = self.refcount.fetch_add(1, Ordering::AcqRel);
        debug_assert!(before > 0, "an inherited or split area is counted while its origin is");
    }

    /// Counts an attach if it needn't wait. `transition`: the caller goes on to run a closure. After that, and always after a first area, it
    /// calls [`VmapCore::transition_done`]: until a first area is known to be, or not to be, nobody else is counted, so
    /// that each deref callback has its first.
    ///
    /// # Errors
    ///
    /// [`Error::WouldDeadlock`] when called from within the closure of an `attach_with` on the same vmap, or from the
    /// callback of another vmap while this one's is due;
    /// [`Error::Shutdown`] when the vmap was destroyed.
    pub(crate) fn try_open(&self, caller: Caller, transition: bool) -> Result<Opened> {
        let mut count = self.count();
        let opened = self.try_open_locked(&mut count, caller, transition);
        count.put_off |= matches!(opened, Ok(Opened::Later)) && count.transition.is_some();
        opened
    }

    fn try_open_locked(&self, count: &mut Count, caller: Caller, transition: bool) -> Result<Opened> {
        if !count.is_open_to(caller)? {
            return Ok(Opened::Later);
        }
        let me = std::thread::current().id();
        let first = self.refcount.fetch_add(1, Ordering::AcqRel) == 0;
        if transition || first {
            count.transition = Some(me);
        }
        Ok(Opened::Counted { first })
    }

    /// As [`VmapCore::try_open`], but waits; answers whether this is the first area.
    pub(crate) fn open(&self, caller: Caller, transition: bool) -> Result<bool> {
        let mut count = self.count();
        loop {
            match self.try_open_locked(&mut count, caller, transition)? {
                Opened::Counted { first } => return Ok(first),
                Opened::Later => count = self.settled.wait(count).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    /// Waits until an attach need not wait, counting nothing.
    ///
    /// # Errors
    ///
    /// As [`VmapCore::try_open`].
    pub(crate) fn wait_to_open(&self, caller: Caller) -> Result<()> {
        let mut count = self.count();
        while !count.is_open_to(caller)? {
            count = self.settled.wait(count).unwrap_or_else(PoisonError::into_inner);
        }
        Ok(())
    }

    /// Ends the transition that [`VmapCore::open`] began; tells whether [`VmapCore::try_open`] put an attach off for it.
    pub(crate) fn transition_done(&self) -> bool {
        let mut count = self.count();
        count.transition = None;
        let put_off = std::mem::take(&mut count.put_off);
        drop(count);
        self.settled.notify_all();
        put_off
    }

    /// Takes back a count whose attach failed: when it was the first, no callback is owed for it.
    pub(crate) fn take_back(self: &Arc<Self>, first: bool) {
        let mut count = self.count();
        if self.subtract(1) && !first {
            self.owe_deref(&mut count);
        }
    }

    /// Counts `n` areas less as `vm_ops->close` does; at 0 one deref callback is owed.
    pub(crate) fn close(self: &Arc<Self>, n: usize) {
        let mut count = self.count();
        if self.subtract(n) {
            self.owe_deref(&mut count);
        }
    }

    /// Subtracts and tells whether that reached 0. Never goes below zero: an underflow would be a bug of ours, and a
    /// count that stays at 0 is the harmless side of it.
    fn subtract(&self, n: usize) -> bool {
        let result =
            self.refcount.fetch_update(Ordering::AcqRel, Ordering::Acquire, |before| Some(before.saturating_sub(n)));
        let before = result.unwrap_or_else(|unchanged| unchanged);
        debug_assert!(before >= n, "the count of vmap {} is {before}, {n} areas closed", self.id);
        n > 0 && before > 0 && before <= n
    }

    fn owe_deref(self: &Arc<Self>, count: &mut Count) {
        count.derefs_owed += 1;
        if self.notices.send(Notice::Deref(Arc::clone(self))).is_err() {
            // The callback thread is gone, which it is only after the last area: nobody is left to wait.
            count.derefs_owed -= 1;
        }
    }

    /// Records that an owed callback has run.
    pub(crate) fn deref_done(&self) {
        self.count().derefs_owed -= 1;
        self.settled.notify_all();
    }

    /// Refuses every later attach, if no area is attached and no callback owed.
    pub(crate) fn destroy(&self) -> Result<()> {
        let mut count = self.count();
        let refcount = self.refcount();
        if refcount > 0 || count.derefs_owed > 0 || count.transition.is_some() {
            return Err(Error::Busy { refcount });
        }
        count.destroyed = true;
        Ok(())
    }
}

impl fmt::Debug for VmapCore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vmap")
            .field("id", &self.id)
            .field("nr_pages", &self.nr_pages())
            .field("refcount", &self.refcount())
            .finish_non_exhaustive()
    }
}

/// Opens the window of a list of `nr_pages` pages; of none if there are none.
fn open_window(opener: &Opener, object: &Object, nr_pages: u64) -> Result<Option<Arc<Window>>> {
    if nr_pages == 0 { Ok(None) } else { Window::open(opener, object, nr_pages).map(|window| Some(Arc::new(window))) }
}
