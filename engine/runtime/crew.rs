//! The crew: threads that answer simple faults on several processors at once.
//!
//! One thread owns the areas and applies events. Where threads fault on several processors, it is one processor for all
//! of them, and half of each fault is a switch to another. So it calls a *crew*: threads, each pinned to a processor,
//! which then read every userfaultfd and answer what is simple: a missing page of a list whose bytes lie in memory, or are
//! zeros. Everything else they hand to the owner, in the order of reading. When faults come from one processor only, or
//! are not simple, the owner sends the crew to sleep and reads by itself again. A crew that sleeps costs nothing.
//!
//! Two readers of one userfaultfd are dangerous: while one of them has looked an address up and is about to install its
//! page, the other may read the unmap of that address, whose thread runs on then and maps something else there. Three
//! rules keep the engine's promises.
//!
//! 1. *A member installs nothing at an address.* It fills the page of the vmap through the vmap's window, whose
//!    addresses nobody else has, and wakes whoever waits at the address, who then maps what the vmap holds. So a lookup
//!    that is out of date brings a page of a vmap that nobody asked for, with the bytes of its list, and wakes a thread
//!    that faults again: no byte is wrong wherever it lands, whatever lies at the address by now, of this engine or not.
//! 2. *While the owner runs, no member does.* Members read, look up and fill inside a [`Crossing`], which is open while
//!    the owner waits for news. It closes it for its turn, then takes what was handed on, and only then does anything
//!    else. So whatever the owner does, it does as if it were alone: no event is read that it has not applied; nothing is
//!    read between its lookup and what it installs; a list that it has exchanged, an area that it has taken out, is used
//!    by nobody any more when it answers.
//! 3. *One member reads at a time*, and hands on what it can't answer before the next one reads: events are applied in
//!    the order in which the kernel told them. As long as something waits to be taken, everything is handed on.

use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::sys::epoll::{EpollEvent, EpollFlags};

use super::around::FaultAround;
use super::bell::{Bell, EpollFd};
use super::crossing::{Crossing, Inside};
use super::fault::Fault;
use super::shared::EngineShared;
use crate::process::ledger::Private;
use crate::space::mmap_vec::MmapVec;
use crate::space::{Space, SpaceId};
use crate::sys::{Message, Userfault};
use crate::{Error, Result};

/// Messages that may wait to be taken by the owner; the kernel keeps the others.
pub(crate) const HANDED_ON: usize = 64;
/// The token of the crew's bell in a member's epoll; spaces use their ids.
pub(super) const BELL_TOKEN: u64 = u64::MAX;
/// The most threads that answer faults.
pub const HANDLERS_MAX: usize = 16;

/// What a member hands on to the owner.
pub(crate) enum HandedOn {
    /// What was read from a space.
    Message(SpaceId, Message),
    /// A fault whose page could not be filled.
    Failed(Fault),
}

/// One member, as the others see it.
pub(super) struct Member {
    pub(super) epoll: Private<EpollFd>,
    /// The processor where it shall be; [`NOWHERE`] if it is not called.
    pub(super) cpu: AtomicI32,
    /// Faults that it answered.
    pub(super) answered: AtomicU64,
    /// The thread whose fault it answered last.
    pub(super) thread: AtomicI32,
}

const NOWHERE: i32 = -1;

/// What the owner and the members share.
pub(crate) struct Crew {
    pub(super) shared: Arc<EngineShared>,
    pub(super) fault_around: FaultAround,
    crossing: Crossing,
    /// Held by who reads.
    reading: Mutex<MmapVec<HandedOn>>,
    /// The spaces as they lie while the crossing is open.
    spaces: UnsafeCell<*const [Space]>,
    /// Changed while the crossing is closed.
    on: AtomicBool,
    /// How often the crew was called or let go: members that sleep wait for a change of it.
    calls: AtomicU32,
    /// The owner has ended.
    over: AtomicBool,
    /// A member has panicked: nobody is called any more.
    broken: AtomicBool,
    pub(super) members: Box<[Member]>,
    /// Rung when the crew is sent to sleep.
    bell: Option<Bell>,
    owner_bell: Arc<Bell>,
    #[cfg(test)]
    pub(super) panic: AtomicBool,
}

// SAFETY: all but `spaces` is shared by its own type. `spaces` is written by the owner while the crossing is closed, and
// read, as what it points to, inside; the owner changes no space while the crossing is open.
unsafe impl Sync for Crew {}
// SAFETY: as above; nothing of it belongs to a thread.
unsafe impl Send for Crew {}

/// What members read may be read by several threads at once.
const _: fn() = || {
    fn is_sync<T: Sync + Send>() {}
    is_sync::<Space>();
    is_sync::<HandedOn>();
};

impl Crew {
    /// Makes a crew of so many members, who sleep.
    pub(crate) fn new(
        shared: &Arc<EngineShared>,
        owner_bell: &Arc<Bell>,
        fault_around: FaultAround,
        members: usize,
    ) -> Result<Arc<Crew>> {
        let failed = Error::sys("epoll or eventfd for threads that answer faults");
        // Without members nobody rings.
        let bell = if members > 0 { Some(Bell::new().map_err(&failed)?) } else { None };
        let mut reading = MmapVec::new();
        reading.try_reserve(HANDED_ON).map_err(Error::sys("mmap for threads that answer faults"))?;
        let member = |_| {
            let epoll = EpollFd::open().map_err(&failed)?;
            if let Some(bell) = &bell {
                epoll.0.add(bell, EpollEvent::new(EpollFlags::EPOLLIN, BELL_TOKEN)).map_err(&failed)?;
            }
            let (cpu, answered, thread) = (AtomicI32::new(NOWHERE), AtomicU64::new(0), AtomicI32::new(0));
            Ok(Member { epoll, cpu, answered, thread })
        };
        let members = (0..members).map(member).collect::<Result<_>>()?;
        Ok(Arc::new(Crew {
            shared: Arc::clone(shared),
            fault_around,
            crossing: Crossing::new(),
            reading: Mutex::new(reading),
            spaces: UnsafeCell::new(std::ptr::slice_from_raw_parts(std::ptr::null(), 0)),
            on: AtomicBool::new(false),
            calls: AtomicU32::new(0),
            over: AtomicBool::new(false),
            broken: AtomicBool::new(false),
            members,
            bell,
            owner_bell: Arc::clone(owner_bell),
            #[cfg(test)]
            panic: AtomicBool::new(false),
        }))
    }

    // What a member does.

    /// Sleeps until called; `None` when it is all over. Answers with the processor to be on.
    pub(super) fn sleep(&self, member: &Member) -> Option<i32> {
        loop {
            let calls = self.calls.load(Ordering::Acquire);
            if self.over.load(Ordering::Acquire) {
                return None;
            }
            let cpu = member.cpu.load(Ordering::Acquire);
            if cpu != NOWHERE && self.is_on() {
                return Some(cpu);
            }
            // SAFETY: the word outlives the call; whatever it returns for, the loop looks again.
            unsafe {
                libc::syscall(
                    libc::SYS_futex,
                    self.calls.as_ptr(),
                    libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG,
                    calls,
                    std::ptr::null::<libc::timespec>(),
                )
            };
        }
    }

    /// Goes where reading and looking up is allowed, if it is.
    pub(super) fn enter(&self) -> Option<Inside<'_>> {
        let inside = self.crossing.enter();
        self.is_on().then_some(inside)
    }

    /// The space of an id.
    pub(super) fn space<'a>(&self, id: SpaceId, _inside: &'a Inside<'_>) -> Option<&'a Space> {
        // SAFETY: the owner published its spaces before it opened the crossing, and changes none before it has closed it,
        // for which it waits until nobody is inside.
        let spaces = unsafe { &**self.spaces.get() };
        spaces.binary_search_by_key(&id, |space| space.id).ok().map(|index| &spaces[index])
    }

    /// Becomes the one who reads.
    pub(super) fn reading(&self) -> MutexGuard<'_, MmapVec<HandedOn>> {
        self.reading.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands something on to the owner; gives it back if there is no place.
    pub(super) fn hand_on(&self, reading: &mut MmapVec<HandedOn>, what: HandedOn) -> std::result::Result<(), HandedOn> {
        if reading.len() >= HANDED_ON {
            return Err(what);
        }
        let first = reading.is_empty();
        // There is room: reserved at the start.
        let _ = reading.try_push(what);
        if first {
            self.owner_bell.ring();
        }
        Ok(())
    }

    #[cfg(test)]
    pub(super) fn panic_if_asked(&self) {
        assert!(!self.panic.swap(false, Ordering::SeqCst), "asked to");
    }

    /// A member has panicked: the owner shall do without.
    pub(super) fn breaks(&self) {
        self.broken.store(true, Ordering::Release);
        self.owner_bell.ring();
    }

    // What both ask.

    /// Tells whether the crew was called.
    pub(crate) fn is_on(&self) -> bool {
        self.on.load(Ordering::Relaxed)
    }

    // What the owner does.

    /// Tells whether it can't be called any more.
    pub(crate) fn is_broken(&self) -> bool {
        self.broken.load(Ordering::Acquire)
    }

    /// Lets the members go on.
    pub(crate) fn open(&self, spaces: &[Space]) {
        // SAFETY: the crossing is closed: nobody looks.
        unsafe { *self.spaces.get() = spaces };
        self.crossing.open();
    }

    /// Waits until no member is reading, looking up or filling.
    pub(crate) fn close(&self) {
        self.crossing.close();
    }

    /// Takes what was handed on first.
    pub(crate) fn take(&self) -> Option<HandedOn> {
        let mut reading = self.reading();
        (!reading.is_empty()).then(|| reading.remove(0))
    }

    /// Calls members to some processors, at most one for each; the crossing is closed. If a userfaultfd can't be waited
    /// for there, nobody is called.
    pub(crate) fn call(&self, cpus: &[i32], spaces: &[Space]) -> std::result::Result<(), Errno> {
        let watched = spaces.iter().try_for_each(|space| match &space.uffd {
            Some(uffd) => self.watch(uffd, space.id),
            None => Ok(()),
        });
        if let Err(errno) = watched {
            self.unwatch_all(spaces);
            return Err(errno);
        }
        self.direct(cpus);
        self.bell.iter().for_each(Bell::hear);
        self.on.store(true, Ordering::Relaxed);
        self.wake_up();
        Ok(())
    }

    /// Has the members be on other processors.
    pub(crate) fn direct(&self, cpus: &[i32]) {
        let cpus = cpus.iter().copied().chain(std::iter::repeat(NOWHERE));
        for (member, cpu) in self.members.iter().zip(cpus) {
            member.cpu.store(cpu, Ordering::Release);
        }
        self.wake_up();
    }

    /// Sends the members to sleep; the crossing is closed, and what was handed on taken.
    pub(crate) fn let_go(&self, spaces: &[Space]) {
        self.on.store(false, Ordering::Relaxed);
        self.bell.iter().for_each(Bell::ring);
        self.unwatch_all(spaces);
        self.crossing.open();
    }

    /// Has the members wait for a space too.
    pub(crate) fn watch(&self, uffd: &Private<Userfault>, space: SpaceId) -> std::result::Result<(), Errno> {
        let event = EpollEvent::new(EpollFlags::EPOLLIN, space);
        self.members.iter().try_for_each(|member| member.epoll.0.add(uffd, event))
    }

    /// Has the members wait for a space no longer.
    pub(crate) fn unwatch(&self, uffd: &Private<Userfault>) {
        for member in &self.members {
            // It may not have been watched.
            let _ = member.epoll.0.delete(uffd);
        }
    }

    fn unwatch_all(&self, spaces: &[Space]) {
        spaces.iter().filter_map(|space| space.uffd.as_ref()).for_each(|uffd| self.unwatch(uffd));
    }

    fn wake_up(&self) {
        self.calls.fetch_add(1, Ordering::Release);
        // SAFETY: FUTEX_WAKE takes the address as a key.
        unsafe {
            libc::syscall(libc::SYS_futex, self.calls.as_ptr(), libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG, i32::MAX)
        };
    }

    /// The owner has ended: so do the members.
    pub(crate) fn end(&self) {
        self.over.store(true, Ordering::Release);
        self.on.store(false, Ordering::Relaxed);
        self.bell.iter().for_each(Bell::ring);
        self.crossing.open();
        self.wake_up();
    }
}
