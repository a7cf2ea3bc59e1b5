//! What happens to an engine's memory over `fork`.
//!
//! A child must not inherit a region as it is: its mapping would not be registered, and a touch would put a zero page
//! into the shared object, for everyone. So every mapping carries MADV_DONTFORK, and `pthread_atfork` handlers make
//! the child's own before any of its code runs:
//!
//! - *prepare* (in the parent, before the fork): the engine counts every area of the child to be, and keeps one end
//!   of a new socket pair, the child's lifeline. From here on the child's end, whenever and however it comes, even if
//!   the fork fails, is a hang-up.
//! - *child*: maps the areas at their addresses, registers them with a userfaultfd of its own, sends that over its
//!   lifeline, and starts a guard. What other threads of the parent have put into the place of an area meanwhile stays,
//!   and the engine takes it out of the child's list.
//! - *parent*: closes the child's end of the lifeline.
//!
//! A child of a raw `clone` or `vfork` runs no handlers: it has no mapping of a region, rather than a wrong one.

pub(crate) mod guard;
pub(crate) mod link;
pub(crate) mod masks;
pub(crate) mod records;
mod taken;
pub(crate) mod wire;

use std::cell::RefCell;
use std::os::fd::{AsFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, Once, PoisonError, RwLockWriteGuard, Weak};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

use crate::process::ledger::{self, Ledger, Private};
use crate::process::mapping::{Mapping, Placement};
use crate::process::{close_gate, descend, gate, open_pidfd};
use crate::runtime::call::call;
use crate::runtime::children::{fork_space, inherited_areas};
use crate::runtime::patience::Patience;
use crate::runtime::shared::EngineShared;
use crate::runtime::threads::{self, Role, spawn_in_child};
use crate::space::mmap_vec::MmapVec;
use crate::space::{AreaRecord, OWN_SPACE};
use crate::sys::{Features, MsgBuffer, Userfault};
use crate::{Error, Result};
use link::{Lifeline, Local};
use records::read_records;
use taken::Taken;
use wire::{Ask, Reply};

/// Messages that a guard reads at once.
const GUARD_MESSAGES: usize = 16;

/// The engines of this process, and those that it inherited.
static ENGINES: Mutex<Vec<Weak<EngineShared>>> = Mutex::new(Vec::new());

/// Enters an engine, so that children inherit its areas. Installs the fork handlers, once per process.
pub(crate) fn enter(shared: &Arc<EngineShared>) -> Result<()> {
    static INSTALLED: Once = Once::new();
    let mut outcome = 0;
    // SAFETY: the handlers are functions of this library, which is never unloaded while its code runs; they don't
    // unwind (each catches).
    INSTALLED.call_once(|| outcome = unsafe { libc::pthread_atfork(Some(prepare), Some(parent), Some(child)) });
    if outcome != 0 {
        return Err(Error::sys("pthread_atfork")(Errno::from_raw(outcome)));
    }
    let _gate = gate();
    let mut engines = lock_engines();
    engines.retain(|engine| engine.strong_count() > 0);
    engines.push(Arc::downgrade(shared));
    Ok(())
}

/// The engines that this process has or inherited, alive ones only.
pub(crate) fn engines() -> Vec<Arc<EngineShared>> {
    let _gate = gate();
    engines_ungated()
}

/// As [`engines`]; the caller keeps forks away.
fn engines_ungated() -> Vec<Arc<EngineShared>> {
    lock_engines().iter().filter_map(Weak::upgrade).collect()
}

fn lock_engines() -> MutexGuard<'static, Vec<Weak<EngineShared>>> {
    ENGINES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a child will need of one engine.
struct Prepared {
    shared: Arc<EngineShared>,
    /// The areas that it inherits, or would if it could.
    records: MmapVec<AreaRecord>,
    /// In the child: what of their addresses is somebody else's, once all others are reserved.
    taken: Taken,
    reserved: std::result::Result<(), Errno>,
    /// The child's end of its lifeline; why it can't be served if there is none.
    lifeline: Result<OwnedFd>,
}

/// What the forking thread holds from *prepare* to *parent* or *child*. Dropped in this order.
struct Held {
    ledger: MutexGuard<'static, Ledger>,
    _gate: RwLockWriteGuard<'static, ()>,
    prepared: Vec<Prepared>,
}

thread_local! {
    static HELD: RefCell<Option<Held>> = const { RefCell::new(None) };
}

extern "C" fn prepare() {
    let _ = catch_unwind(AssertUnwindSafe(|| {
        // Closed before the engine is asked what the child inherits: what is attached, detached or forked by other
        // threads is then either before that or after the fork, and a descriptor made here is in no other child.
        let gate = close_gate();
        let inherited = engines_ungated().into_iter();
        let prepared = inherited.map(Prepared::new).collect();
        let ledger = ledger::lock();
        HELD.set(Some(Held { ledger, _gate: gate, prepared }));
    }));
}

extern "C" fn parent() {
    let _ = catch_unwind(|| {
        if let Some(Held { ledger, _gate: gate, prepared }) = HELD.take() {
            // The child's ends of the lifelines before another thread can fork: its child would hide the hang-up.
            let (engines, lifelines): (Vec<_>, Vec<_>) =
                prepared.into_iter().map(|prepared| (prepared.shared, prepared.lifeline)).unzip();
            drop(lifelines);
            drop(ledger);
            drop(gate);
            // After the locks, which it may need if this was the last reference.
            drop(engines);
        }
    });
}

extern "C" fn child() {
    let _ = catch_unwind(AssertUnwindSafe(|| {
        let Some(Held { mut ledger, _gate: gate, mut prepared }) = HELD.take() else { return };
        descend();
        ledger.close_all();
        // No other thread is here that the locks would keep away.
        drop(ledger);
        drop(gate);
        // Before anything else is mapped, by the allocator or for a thread's stack, of this engine or of another.
        prepared.iter_mut().for_each(Prepared::reserve);
        for mut prepared in prepared {
            let lifeline = std::mem::replace(&mut prepared.lifeline, Err(Error::Shutdown));
            let local = match lifeline.and_then(|lifeline| reattach(&prepared, lifeline)) {
                Ok(local) => local,
                Err(error) => Local::Lost { why: error.to_string() },
            };
            prepared.shared.become_child(local);
            // Its last reference may be ours, and its threads are not here: nothing of it may be torn down.
            std::mem::forget(prepared.shared);
        }
    }));
}

impl Prepared {
    /// In the parent, before the fork.
    fn new(shared: Arc<EngineShared>) -> Prepared {
        let (records, lifeline) = match inherit(&shared) {
            Ok((records, lifeline)) => (records, Ok(lifeline)),
            // At least their addresses stay free of anything else. When the engine is gone, nobody knows them.
            Err(why) => (would_inherit(&shared).unwrap_or_else(|_| MmapVec::new()), Err(why)),
        };
        Prepared { shared, records, taken: Taken::new(), reserved: Ok(()), lifeline }
    }

    /// In the child: keeps the addresses of its areas from being used for something else. A pointer into them must not
    /// meet foreign bytes, whether the areas can be mapped or not.
    fn reserve(&mut self) {
        self.reserved = self.taken.reserve_around(&self.records);
    }
}

/// Tells the areas of a child that can't be served. Takes no descriptor: want of them may be the cause.
fn would_inherit(shared: &EngineShared) -> Result<MmapVec<AreaRecord>> {
    match &*shared.local_ungated() {
        Local::Owner { .. } if threads::current_role(shared.id) == Some(Role::Fault) => Ok(MmapVec::new()),
        Local::Owner { .. } => inherited_areas(shared, OWN_SPACE, 0, usize::MAX),
        Local::Child { lifeline, .. } => {
            let mut records = MmapVec::new();
            loop {
                let (Reply::Areas(areas), _) = lifeline.ask(Ask::Inherited { skip: records.len() as u64 }, None)?
                else {
                    return Err(Error::sys("the answer about a child's areas")(Errno::EPROTO));
                };
                if areas.iter().flatten().count() == 0 {
                    return Ok(records);
                }
                for record in areas.into_iter().flatten() {
                    let no_memory = Error::sys("mmap for the areas of a child");
                    records.try_push(record).map_err(|(_, errno)| no_memory(errno))?;
                }
            }
        }
        // It has reservations itself, which a child inherits.
        Local::Lost { .. } => Ok(MmapVec::new()),
    }
}

/// In the parent, before the fork: has the child's areas counted and its lifeline kept. Answers with the areas and the
/// child's end.
fn inherit(shared: &Arc<EngineShared>) -> Result<(MmapVec<AreaRecord>, OwnedFd)> {
    if let Some(Role::Keeper | Role::Fault) = threads::current_role(shared.id) {
        return Err(Error::WouldDeadlock { what: "a fork", thread: "keeper" });
    }
    match &*shared.local_ungated() {
        Local::Owner { .. } => {
            let (engine_end, child_end) = new_lifeline()?;
            let engine_end = ledger::lock().adopt(engine_end);
            let records = fork_space(shared, OWN_SPACE, engine_end, None)?;
            Ok((records, child_end))
        }
        Local::Child { lifeline, .. } => {
            let (memfd, child_end) = lifeline.ask_fork()?;
            Ok((read_records(memfd)?, child_end))
        }
        Local::Lost { why } => Err(Error::NotInherited { why: why.clone() }),
    }
}

/// Makes a lifeline: the engine's end and the child's.
pub(crate) fn new_lifeline() -> Result<(OwnedFd, OwnedFd)> {
    socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
        .map_err(Error::sys("socketpair for a child's lifeline"))
}

/// In the child: maps and registers what it inherits, starts the guard, greets the engine. All or nothing: when any
/// step fails the engine is told so, takes the count back, and the child has none of the areas.
fn reattach(prepared: &Prepared, lifeline: OwnedFd) -> Result<Local> {
    let Prepared { shared, records, taken, reserved, .. } = prepared;
    let socket = Arc::new(ledger::lock().adopt(lifeline));
    let lifeline = Lifeline::new(Arc::clone(&socket));
    let pid = nix::unistd::getpid().as_raw();
    let attempt = reserved
        .map_err(Error::sys("reserving the addresses of the areas"))
        .and_then(|()| tell_taken(&lifeline, taken))
        .and_then(|()| map_all(shared, records, taken));
    let outcome = attempt.and_then(|mut attached| {
        let newcomer = Newcomer {
            shared,
            socket: &socket,
            lifeline: &lifeline,
            uffd: &attached.uffd,
            pidfd: Some(open_pidfd(pid)?),
            nr_unlocked: attached.unlocked.len(),
        };
        // The guard lasts as long as the process.
        drop(newcomer.introduce()?);
        std::mem::take(&mut attached.mappings).into_iter().for_each(Mapping::release);
        Ok((Arc::clone(&attached.uffd), std::mem::take(&mut attached.unlocked)))
    });
    match outcome {
        Ok((uffd, unlocked)) => Ok(Local::Child { uffd, lifeline, unlocked }),
        Err(error) => {
            let _ = lifeline.greet(Ask::Hello { pid, errno: error.errno() as i32, nr_unlocked: 0 }, None);
            Err(error)
        }
    }
}

/// A process that the engine is to serve from now on: a forked child, or an unrelated client.
pub(crate) struct Newcomer<'a> {
    pub(crate) shared: &'a Arc<EngineShared>,
    pub(crate) socket: &'a Arc<Private<OwnedFd>>,
    pub(crate) lifeline: &'a Lifeline,
    pub(crate) uffd: &'a Arc<Private<Userfault>>,
    /// Its own, unless the engine has it already.
    pub(crate) pidfd: Option<OwnedFd>,
    /// The areas that were to be locked if allowed, and are not.
    pub(crate) nr_unlocked: usize,
}

impl Newcomer<'_> {
    /// Starts the guard and greets the engine; answers when the engine serves this process.
    pub(crate) fn introduce(self) -> Result<guard::Stopper> {
        let Newcomer { shared, socket, lifeline, uffd, pidfd, nr_unlocked } = self;
        let (masks, orders) = if shared.poisons() {
            (None, None)
        } else {
            let (engine_end, guard_end) = masks::pair()?;
            (Some(engine_end), Some(Arc::new(guard_end)))
        };
        let aside = if shared.vmaps.has_minor_faults() {
            Some(Arc::new(Private::open(|| shared.opener.open(Features::empty()).map(|(uffd, _)| uffd))?))
        } else {
            None
        };
        let owner = Private::open(|| shared.owner_pidfd.try_clone()).map_err(Error::io("dup of the owner's pidfd"))?;
        let mut guard = guard::Guard {
            lifeline: Arc::clone(socket),
            owner: Arc::new(owner),
            uffd: Arc::clone(uffd),
            aside: aside.clone(),
            messages: MsgBuffer::new(GUARD_MESSAGES),
            orders,
            starved: 0,
            need: Arc::default(),
            ended: None,
        };
        let stopper = guard::Stopper::of(&mut guard);
        // A client that is not served has nothing mapped that the guard could be for.
        let is_client = pidfd.is_none();
        if is_client {
            stopper.hesitate();
        }
        let served = (|| {
            // The application may close every descriptor that it can, as daemons do: not before the guard has its own.
            let mut started = Ok(());
            call(|ready| started = spawn_in_child(Role::Guard, shared.id, move || guard.run(|| ready.answer(()))));
            started?;
            if let Some(pidfd) = &pidfd {
                lifeline.greet(Ask::Watch, Some(pidfd.as_fd()))?;
            }
            if let Some(masks) = &masks {
                lifeline.greet(Ask::Masks, Some(masks.as_fd()))?;
            }
            if let Some(aside) = &aside {
                lifeline.greet(Ask::Aside, Some(aside.as_fd()))?;
            }
            let pid = nix::unistd::getpid().as_raw();
            lifeline.greet(Ask::Hello { pid, errno: 0, nr_unlocked: nr_unlocked as u64 }, Some(uffd.as_fd()))?;
            lifeline.welcomed()
        })();
        match served {
            Ok(()) => {
                stopper.stay();
                Ok(stopper)
            }
            Err(error) => {
                if is_client {
                    stopper.stop();
                }
                Err(error)
            }
        }
    }
}

/// In the child: has the engine take out of its list what is somebody else's.
///
/// # Errors
///
/// Where it is no longer the parent's area, a thread of the parent has put something there. Where it is, that was done
/// in the child: an area of which nobody knows that a part is missing would show foreign bytes.
fn tell_taken(lifeline: &Lifeline, taken: &Taken) -> Result<()> {
    for &(start, end) in taken.as_slice() {
        let mut patience = Patience::new();
        while let (Reply::Later, _) = lifeline.ask(Ask::Taken { start: start as u64, end: end as u64 }, None)? {
            patience.wait()?;
        }
    }
    Ok(())
}

/// A child's areas, mapped and registered.
struct Reattached {
    uffd: Arc<Private<Userfault>>,
    mappings: Vec<Mapping>,
    /// For each area that was to be locked if allowed, and is not: its region.
    unlocked: Vec<u64>,
}

impl Drop for Reattached {
    /// Takes back what was not kept. An unmap of a registered range waits until its event is read, and perhaps nobody
    /// reads: so it is taken out of the userfaultfd first, and hidden before that.
    fn drop(&mut self) {
        for mapping in &self.mappings {
            if mapping.hide().is_ok() {
                let _ = self.uffd.unregister(mapping.addr(), mapping.len());
            }
        }
    }
}

fn map_all(shared: &Arc<EngineShared>, records: &[AreaRecord], taken: &Taken) -> Result<Reattached> {
    let uffd = Private::open(|| shared.opener.open(shared.child_features()).map(|(uffd, _)| uffd))?;
    let mut attached =
        Reattached { uffd: Arc::new(uffd), mappings: Vec::with_capacity(records.len()), unlocked: Vec::new() };
    for record in records.iter().flat_map(|record| taken.free_of(record)) {
        let vmap =
            shared.vmaps.find_ungated(record.vmap).ok_or(Error::NotInherited { why: "a vmap is unknown".into() })?;
        let (start, len) = (record.start as usize, record.len as usize);
        let offset = vmap.object.offset_of(record.pgoff)?;
        let mapping = vmap.object.map(len, offset, Placement::Reserved(start))?;
        attached.mappings.push(mapping);
        if let Some(mapping) = attached.mappings.last() {
            let registered = vmap.register(&attached.uffd, mapping.addr(), mapping.len());
            registered.map_err(Error::sys("UFFDIO_REGISTER in a forked child"))?;
            if vmap.residency.is_downgraded(vmap.lock(mapping)?) {
                attached.unlocked.push(record.region);
            }
            mapping.reveal(record.is_writable())?;
        }
        // The child's copy of the table holds it too; one reference must outlive the child's handles.
        std::mem::forget(vmap);
    }
    Ok(attached)
}
