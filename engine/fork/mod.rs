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
//!   lifeline, and starts a guard.
//! - *parent*: closes the child's end of the lifeline.
//!
//! A child of a raw `clone` or `vfork` runs no handlers: it has no mapping of a region, rather than a wrong one.

pub(crate) mod guard;
pub(crate) mod link;
pub(crate) mod records;
pub(crate) mod wire;

use std::cell::RefCell;
use std::num::NonZeroUsize;
use std::os::fd::{AsRawFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, Once, PoisonError, RwLockWriteGuard, Weak};

use nix::errno::Errno;
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

use crate::page::page_size;
use crate::process::ledger::{self, Ledger, Private};
use crate::process::mapping::{Mapping, Placement};
use crate::process::{close_gate, descend, gate, open_pidfd};
use crate::runtime::children::fork_space;
use crate::runtime::shared::EngineShared;
use crate::runtime::threads::{self, Role};
use crate::space::mmap_vec::MmapVec;
use crate::space::{AreaRecord, OWN_SPACE};
use crate::sys::{MsgBuffer, Userfault};
use crate::{Error, Result};
use link::{Lifeline, Local};
use records::read_records;
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
    ledger::lock().prepare_spare().map_err(Error::sys("eventfd for forked children"))?;
    let _gate = gate();
    let mut engines = lock_engines();
    engines.retain(|engine| engine.strong_count() > 0);
    engines.push(Arc::downgrade(shared));
    Ok(())
}

/// The engines that this process has or inherited, alive ones only.
pub(crate) fn engines() -> Vec<Arc<EngineShared>> {
    let _gate = gate();
    lock_engines().iter().filter_map(Weak::upgrade).collect()
}

fn lock_engines() -> MutexGuard<'static, Vec<Weak<EngineShared>>> {
    ENGINES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a child will need of one engine.
struct Prepared {
    shared: Arc<EngineShared>,
    inheritance: Result<Inheritance>,
}

struct Inheritance {
    records: MmapVec<AreaRecord>,
    /// The child's end.
    lifeline: OwnedFd,
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
        let prepared = engines().into_iter().map(|shared| Prepared { inheritance: inherit(&shared), shared }).collect();
        let gate = close_gate();
        let ledger = ledger::lock();
        HELD.set(Some(Held { ledger, _gate: gate, prepared }));
    }));
}

extern "C" fn parent() {
    let _ = catch_unwind(|| {
        if let Some(Held { ledger, _gate: gate, prepared }) = HELD.take() {
            // The locks first: what is dropped here may need them.
            drop(ledger);
            drop(gate);
            drop(prepared);
        }
    });
}

extern "C" fn child() {
    let _ = catch_unwind(AssertUnwindSafe(|| {
        let Some(Held { ledger, _gate: gate, prepared }) = HELD.take() else { return };
        ledger.neutralise();
        // No other thread is here that the locks would keep away.
        drop(ledger);
        drop(gate);
        descend();
        for Prepared { shared, inheritance } in prepared {
            let local = match inheritance.and_then(|inheritance| reattach(&shared, inheritance)) {
                Ok(local) => local,
                Err(error) => Local::Lost { why: error.to_string() },
            };
            shared.become_child(local);
            // Its last reference may be ours, and its threads are not here: nothing of it may be torn down.
            std::mem::forget(shared);
        }
    }));
}

/// In the parent, before the fork: has the child's areas counted and its lifeline kept.
fn inherit(shared: &Arc<EngineShared>) -> Result<Inheritance> {
    if let Some(Role::Keeper | Role::Fault) = threads::current_role(shared.id) {
        return Err(Error::WouldDeadlock { what: "a fork", thread: "keeper" });
    }
    let (engine_end, child_end) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
        .map_err(Error::sys("socketpair for a child's lifeline"))?;
    match &*shared.local() {
        Local::Owner { .. } => {
            let engine_end = ledger::lock().adopt(engine_end);
            let records = fork_space(shared, OWN_SPACE, engine_end)?;
            Ok(Inheritance { records, lifeline: child_end })
        }
        Local::Child { lifeline, .. } => {
            let (reply, mut descriptors) = lifeline.ask(Ask::Fork, &[engine_end.as_raw_fd()])?;
            let (Reply::Forked, Some(memfd)) = (reply, descriptors.pop()) else {
                return Err(Error::sys("the answer to a fork")(Errno::EPROTO));
            };
            Ok(Inheritance { records: read_records(memfd)?, lifeline: child_end })
        }
        Local::Lost { why } => Err(Error::NotInherited { why: why.clone() }),
    }
}

/// In the child: maps and registers what it inherits, greets the engine, starts the guard. All or nothing: when any
/// step fails the engine is told so, takes the count back, and the child has none of the areas.
fn reattach(shared: &Arc<EngineShared>, inheritance: Inheritance) -> Result<Local> {
    let Inheritance { records, lifeline } = inheritance;
    let socket = Arc::new(ledger::lock().adopt(lifeline));
    let lifeline = Lifeline::new(Arc::clone(&socket));
    let pid = nix::unistd::getpid().as_raw();
    let attempt = map_all(shared, &records);
    let outcome = attempt.and_then(|(mappings, uffd)| {
        let connect = || {
            let pidfd = open_pidfd(pid)?;
            let guard = guard::Guard {
                lifeline: socket,
                owner: shared.owner_pidfd.try_clone().map_err(Error::io("dup of the owner's pidfd"))?,
                uffd: Arc::clone(&uffd),
                messages: MsgBuffer::new(GUARD_MESSAGES),
            };
            threads::spawn(Role::Guard, shared.id, move || guard.run())?;
            lifeline.greet(Ask::Hello { pid, errno: 0 }, &[&**uffd, &pidfd])
        };
        if let Err(error) = connect() {
            // Unmapping what is registered waits until somebody reads of it, and nobody does.
            for mapping in &mappings {
                let _ = uffd.unregister(mapping.addr(), mapping.len());
            }
            return Err(error);
        }
        mappings.into_iter().for_each(Mapping::release);
        Ok(uffd)
    });
    match outcome {
        Ok(uffd) => Ok(Local::Child { uffd, lifeline }),
        Err(error) => {
            let _ = lifeline.greet(Ask::Hello { pid, errno: error.errno() as i32 }, &[]);
            reserve(&records);
            Err(error)
        }
    }
}

/// Keeps the addresses of areas that could not be mapped from being used for something else: a pointer into them must
/// not meet foreign bytes.
fn reserve(records: &[AreaRecord]) {
    for record in records {
        let (Some(addr), Some(len)) =
            (NonZeroUsize::new(record.start as usize), NonZeroUsize::new(record.len as usize))
        else {
            continue;
        };
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE | MapFlags::MAP_FIXED_NOREPLACE;
        // SAFETY: MAP_FIXED_NOREPLACE replaces nothing; if the range is taken, it is left alone.
        let _ = unsafe { mmap_anonymous(Some(addr), len, ProtFlags::PROT_NONE, flags) };
    }
}

type Reattached = (Vec<Mapping>, Arc<Private<Userfault>>);

fn map_all(shared: &Arc<EngineShared>, records: &[AreaRecord]) -> Result<Reattached> {
    // Dropped after the userfaultfd when a later step fails: unmapping what is registered waits until somebody reads of
    // it, and nobody does.
    let mut mappings = Vec::with_capacity(records.len());
    let uffd = Private::open(|| shared.opener.open(shared.features).map(|(uffd, _)| uffd))?;
    for record in records {
        let vmap =
            shared.vmaps.find_ungated(record.vmap).ok_or(Error::NotInherited { why: "a vmap is unknown".into() })?;
        let (start, len) = (record.start as usize, record.len as usize);
        let offset = record.pgoff * page_size() as u64;
        mappings.push(Mapping::hidden(vmap.memfd(), len, offset, Placement::At(start))?);
        uffd.register_missing(start, len).map_err(Error::sys("UFFDIO_REGISTER in a forked child"))?;
        mappings.last().map_or(Ok(()), |mapping| mapping.reveal(record.is_writable()))?;
        // The child's copy of the table holds it too; one reference must outlive the child's handles.
        std::mem::forget(vmap);
    }
    Ok((mappings, Arc::new(uffd)))
}
