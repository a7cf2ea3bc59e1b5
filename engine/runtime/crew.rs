//! The crew: threads that answer simple faults on several processors at once.
//!
//! One thread owns the areas and applies events. Where threads fault on several processors, it is one processor for all
//! of them, and half of each fault is a switch to another. So it calls a *crew*: threads, each pinned to a processor,
//! which then read the userfaultfds of the spaces whose threads fault there, and answer what is simple: a missing page of
//! a list whose bytes lie in memory, or are zeros. Everything else they leave to the owner. When faults come from one
//! processor only, or are not simple, the owner sends the crew to sleep and reads by itself again. A crew that sleeps
//! costs nothing.
//!
//! Two readers of one userfaultfd are dangerous: while one of them has looked an address up and is about to install its
//! page, the other may read the unmap of that address, whose thread runs on then and maps something else there. Three
//! rules keep the engine's promises.
//!
//! 1. *A member installs nothing at an address of which another member may read the unmap.* It either keeps others from
//!    reading until it has installed ([`Space::unheard`] is locked that long), which is done where it is the only one who
//!    waits for the space; what installs then wakes, too. Or it fills the page of the vmap through the vmap's window, whose
//!    addresses nobody else has, and wakes whoever waits at the address, who then maps what the vmap holds. So a lookup that
//!    is out of date brings a page of a vmap that nobody asked for, with the bytes of its list, and wakes a thread that
//!    faults again: no byte is wrong wherever it lands, whatever lies at the address by now, of this engine or not.
//! 2. *While the owner runs, no member does.* Members read, look up and fill inside a [`Crossing`], which is open while
//!    the owner waits for news. It closes it for its turn, then takes what was left aside, and only then does anything
//!    else. So whatever the owner does, it does as if it were alone: no event is read that it has not applied; nothing is
//!    read between its lookup and what it installs; a list that it has exchanged, an area that it has taken out, is used
//!    by nobody any more when it answers.
//! 3. *One member at a time reads from a space*, and none as long as a message of it lies aside: events are applied in the
//!    order in which the kernel told them.
//!
//! Where the process may, members step back behind the threads that fault (SCHED_IDLE; see [`placement`](super::placement)
//! for why). Then the owner looks after them now and then: what none of them has read by then it reads itself, and a
//! member that has not finished what it had begun one look before, or keeps the owner from its turn, gets the processor
//! like any other thread. Where that happens again, the crew is let go, and not called for a while; not so where it is only
//! that the thread which a member has woken took the processor before the member had left the crossing.

use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::errno::Errno;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::epoll::{EpollEvent, EpollFlags};
use nix::unistd::Pid;

use super::around::FaultAround;
use super::bell::{Bell, EpollFd};
use super::crew_roster::Roster;
use super::crossing::{Crossing, Inside};
use super::fault::Fault;
use super::placement::{move_thread_to, move_to};
use super::shared::EngineShared;
use super::watch::set_policy;
use crate::process::ledger::Private;
use crate::space::mmap_vec::MmapVec;
use crate::space::{Space, SpaceId};
use crate::stats::add_own;
use crate::sys::futex;
use crate::{Error, Result};

/// The token of the crew's bell in a member's epoll; spaces use their ids.
pub(super) const BELL_TOKEN: u64 = u64::MAX;
/// Added to the token of a space for which nobody else waits.
pub(super) const ALONE: u64 = 1 << 63;
/// The most threads that answer faults.
pub const HANDLERS_MAX: usize = 16;
/// How long the owner waits for members before it gives them the processor.
const PATIENCE: Duration = Duration::from_millis(1);
/// Faults that no member could fill and that wait for the owner.
const FAILED: usize = 64;
/// Threads that a member remembers.
pub(super) const REMEMBERED: usize = 4;

/// One member, as the others see it. What it writes with each fault is in no cache line of another one.
#[repr(align(128))]
pub(super) struct Member {
    pub(super) epoll: Private<EpollFd>,
    /// The processor where it shall be; [`NOWHERE`] if it is not called.
    pub(super) cpu: AtomicI32,
    /// Faults that it answered.
    pub(super) answered: AtomicU64,
    /// Odd while it has a fault.
    pub(super) turn: AtomicU32,
    /// It brings pages by a system call that wakes: the thread that waited for them may have the processor since.
    is_waking: AtomicBool,
    /// Its thread.
    pub(super) thread: AtomicI32,
    /// It may be on any processor, until it goes back to its own.
    is_loose: AtomicBool,
    /// It has stepped back behind the threads that fault.
    pub(super) is_back: AtomicBool,
    /// Whose faults it answered: what is noted inside, and looked at and forgotten while the crossing is closed.
    pub(super) seen: [Seen; REMEMBERED],
}

/// A thread that has faulted.
#[derive(Debug, Default)]
pub(super) struct Seen {
    pub(super) space: AtomicU64,
    /// 0 is nobody.
    pub(super) thread: AtomicI32,
}

impl Seen {
    fn is(&self, space: SpaceId, thread: i32) -> bool {
        self.thread.load(Ordering::Relaxed) == thread && self.space.load(Ordering::Relaxed) == space
    }
}

impl Member {
    /// Notes whose fault it answered.
    pub(super) fn saw(&self, space: SpaceId, thread: i32, _inside: &Inside<'_>) {
        if self.seen.iter().any(|seen| seen.is(space, thread)) {
            return;
        }
        if let Some(free) = self.seen.iter().find(|seen| seen.thread.load(Ordering::Relaxed) == 0) {
            free.space.store(space, Ordering::Relaxed);
            free.thread.store(thread, Ordering::Relaxed);
        }
    }

    /// Tells whose faults it answered, space and thread (0: nobody), and forgets it. Called while the crossing is closed.
    pub(super) fn forget_seen(&self) -> impl Iterator<Item = (SpaceId, i32)> {
        self.seen.iter().map(|seen| match seen.thread.swap(0, Ordering::Relaxed) {
            0 => (0, 0),
            thread => (seen.space.load(Ordering::Relaxed), thread),
        })
    }

    /// It has a fault from now on.
    pub(super) fn begins(&self) {
        self.turns();
    }

    /// Only the member itself writes there.
    fn turns(&self) {
        self.turn.store(self.turn.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
    }

    /// It has answered a fault.
    pub(super) fn answers(&self) {
        add_own(&self.answered, 1);
    }

    /// It begins to bring pages by system calls that wake whoever waits for them, or by others.
    pub(super) fn wakes(&self, wakes: bool) {
        self.is_waking.store(wakes, Ordering::Relaxed);
    }

    /// It has none any more.
    pub(super) fn ends(&self) {
        self.is_waking.store(false, Ordering::Relaxed);
        self.turns();
    }

    /// Goes back to its processor, if it was let go elsewhere.
    pub(super) fn goes_back(&self, cpu: i32) {
        if self.is_loose.load(Ordering::Relaxed) && self.is_loose.swap(false, Ordering::Relaxed) {
            move_to(cpu as usize);
        }
    }

    /// Lets it go to any of these processors: on its own a real-time thread may run.
    fn lets_loose(&self, anywhere: &CpuSet) {
        let thread = self.thread.load(Ordering::Relaxed);
        if thread != 0 && sched_setaffinity(Pid::from_raw(thread), anywhere).is_ok() {
            self.is_loose.store(true, Ordering::Relaxed);
        }
    }

    /// Has it step back behind the threads on its processor, or gives it the processor like any other thread; tells
    /// whether that changed anything. Only the owner does that.
    pub(super) fn step(&self, back: bool) -> bool {
        let thread = self.thread.load(Ordering::Relaxed);
        let changes = thread != 0 && self.is_back.load(Ordering::Relaxed) != back;
        if changes && set_policy(thread, if back { libc::SCHED_IDLE } else { libc::SCHED_OTHER }).is_ok() {
            self.is_back.store(back, Ordering::Relaxed);
        }
        changes
    }
}

const NOWHERE: i32 = -1;

/// Why a member was late when the owner wanted its turn.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Lateness {
    /// None was.
    #[default]
    None,
    /// The thread that it has woken took the processor, as it should.
    HasWoken,
    /// It does not get a processor.
    Hindered,
}

/// What the owner and the members share.
pub(crate) struct Crew {
    pub(super) shared: Arc<EngineShared>,
    pub(super) fault_around: FaultAround,
    crossing: Crossing,
    /// The spaces as they lie while the crossing is open.
    spaces: UnsafeCell<*const [Space]>,
    failed: Mutex<MmapVec<Fault>>,
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
    /// The processors where members may be.
    anywhere: CpuSet,
    #[cfg(test)]
    pub(super) panic: AtomicBool,
    /// The same for the owner.
    #[cfg(test)]
    pub(super) owner_panic: AtomicBool,
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
        let mut unfilled = MmapVec::new();
        unfilled.try_reserve(FAILED).map_err(Error::sys("mmap for threads that answer faults"))?;
        let member = |_| {
            let epoll = EpollFd::open().map_err(&failed)?;
            if let Some(bell) = &bell {
                epoll.0.add(bell, EpollEvent::new(EpollFlags::EPOLLIN, BELL_TOKEN)).map_err(&failed)?;
            }
            Ok(Member {
                epoll,
                cpu: AtomicI32::new(NOWHERE),
                answered: AtomicU64::new(0),
                turn: AtomicU32::new(0),
                is_waking: AtomicBool::new(false),
                thread: AtomicI32::new(0),
                is_loose: AtomicBool::new(false),
                is_back: AtomicBool::new(false),
                seen: Default::default(),
            })
        };
        let members = (0..members).map(member).collect::<Result<_>>()?;
        Ok(Arc::new(Crew {
            shared: Arc::clone(shared),
            fault_around,
            crossing: Crossing::new(),
            spaces: UnsafeCell::new(std::ptr::slice_from_raw_parts(std::ptr::null(), 0)),
            failed: Mutex::new(unfilled),
            on: AtomicBool::new(false),
            calls: AtomicU32::new(0),
            over: AtomicBool::new(false),
            broken: AtomicBool::new(false),
            members,
            bell,
            owner_bell: Arc::clone(owner_bell),
            // Without it they stay where they are.
            anywhere: sched_getaffinity(Pid::from_raw(0)).unwrap_or_default(),
            #[cfg(test)]
            panic: AtomicBool::new(false),
            #[cfg(test)]
            owner_panic: AtomicBool::new(false),
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
            futex::wait(&self.calls, calls);
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

    /// Tells the owner that something was left aside.
    pub(super) fn ring_for_the_owner(&self) {
        self.owner_bell.ring();
    }

    /// Leaves a fault to the owner; `false` if there is no place. Done inside, or by a member that has panicked: otherwise
    /// the owner may have let the crew go, and looks no more.
    pub(super) fn leave(&self, fault: Fault) -> bool {
        let mut failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
        // There is room for so many: reserved at the start.
        let left = failed.len() < FAILED && failed.try_push(fault).is_ok();
        drop(failed);
        self.owner_bell.ring();
        left
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

    /// Waits until no member is reading, looking up or filling; tells whether one had to be called forward for that.
    pub(crate) fn close(&self) -> Lateness {
        let mut lateness = Lateness::None;
        self.crossing.close_with(PATIENCE, || {
            self.members.iter().for_each(|member| member.lets_loose(&self.anywhere));
            let has_woken = self.members.iter().any(|member| member.is_waking.load(Ordering::Relaxed));
            lateness = match self.call_forward() {
                false => Lateness::None,
                true if has_woken => Lateness::HasWoken,
                true => Lateness::Hindered,
            };
        });
        lateness
    }

    /// Gives every member the processor like any other thread.
    fn call_forward(&self) -> bool {
        self.members.iter().filter(|member| member.step(false)).count() > 0
    }

    /// Takes a fault that a member could not fill.
    pub(crate) fn take_failed(&self) -> Option<Fault> {
        let mut failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
        (!failed.is_empty()).then(|| failed.remove(0))
    }

    /// Calls members to their places; `back`: they are to step back there. The crossing is closed. If a userfaultfd can't
    /// be waited for, nobody is called.
    pub(crate) fn call(&self, roster: &Roster, spaces: &[Space], back: bool) -> std::result::Result<(), Errno> {
        self.bell.iter().for_each(Bell::hear);
        self.direct(&Roster::EMPTY, roster, spaces, back)?;
        self.on.store(true, Ordering::Relaxed);
        self.wake_up();
        Ok(())
    }

    /// Has the members be in other places, as [`Crew::call`].
    pub(crate) fn direct(
        &self,
        from: &Roster,
        to: &Roster,
        spaces: &[Space],
        back: bool,
    ) -> std::result::Result<(), Errno> {
        self.wait_no_more(from, spaces);
        let waiting = spaces.iter().try_for_each(|space| self.wait_for(to, space));
        if let Err(errno) = waiting {
            self.wait_no_more(to, spaces);
            return Err(errno);
        }
        let cpus = to.posts().iter().map(|post| post.cpu).chain(std::iter::repeat(NOWHERE));
        for (member, cpu) in self.members.iter().zip(cpus) {
            member.cpu.store(cpu, Ordering::Release);
            // It goes there itself when it runs. Stepping back, it might not, where it is.
            let thread = member.thread.load(Ordering::Relaxed);
            if cpu != NOWHERE && thread != 0 {
                move_thread_to(thread, cpu as usize);
            }
            member.step(back && cpu != NOWHERE);
        }
        self.wake_up();
        Ok(())
    }

    /// Sends the members to sleep; the crossing is closed, and what was left aside taken.
    pub(crate) fn let_go(&self, roster: &Roster, spaces: &[Space]) {
        self.on.store(false, Ordering::Relaxed);
        self.bell.iter().for_each(Bell::ring);
        self.wait_no_more(roster, spaces);
        self.call_forward();
        self.crossing.open();
    }

    /// Has members wait for a space.
    pub(crate) fn wait_for(&self, roster: &Roster, space: &Space) -> std::result::Result<(), Errno> {
        let (waiters, Some(uffd)) = (roster.waiters(space.id), &space.uffd) else { return Ok(()) };
        let token = if waiters == 1 { space.id | ALONE } else { space.id };
        for (post, member) in self.members.iter().enumerate() {
            if roster.waits_at(post, space.id) {
                member.epoll.0.add(&**uffd, EpollEvent::new(EpollFlags::EPOLLIN, token))?;
            }
        }
        Ok(())
    }

    /// Has nobody wait for a space any more.
    pub(crate) fn wait_no_more_for(&self, roster: &Roster, space: &Space) {
        let Some(uffd) = &space.uffd else { return };
        for (post, member) in self.members.iter().enumerate() {
            if roster.waits_at(post, space.id) {
                // It may not have come to waiting for it.
                let _ = member.epoll.0.delete(&**uffd);
            }
        }
    }

    fn wait_no_more(&self, roster: &Roster, spaces: &[Space]) {
        spaces.iter().for_each(|space| self.wait_no_more_for(roster, space));
    }

    fn wake_up(&self) {
        self.calls.fetch_add(1, Ordering::Release);
        futex::wake(self.calls.as_ptr(), i32::MAX);
    }

    /// The owner has ended: so do the members.
    pub(crate) fn end(&self) {
        self.over.store(true, Ordering::Release);
        self.on.store(false, Ordering::Relaxed);
        self.bell.iter().for_each(Bell::ring);
        self.call_forward();
        self.crossing.open();
        self.wake_up();
    }
}
