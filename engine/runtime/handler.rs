//! The fault-handling thread: reads userfaultfds, applies events, answers faults.
//!
//! It is the only writer of each area table, and the only reader of each userfaultfd but for the [crew](super::crew), which
//! works only while this thread waits. Between reading a fault and waking the thread that touched, it allocates nothing, takes
//! no lock that others hold while they wait, and logs nothing: another thread may hold the allocator's lock, or any other,
//! while it waits for this one.

use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use crossbeam_channel::Receiver;
use memmap2::MmapMut;
use nix::errno::Errno;
use nix::sys::epoll::{EpollEvent, EpollFlags, EpollTimeout};

use super::around::FaultAround;
use super::bell::{Bell, EpollFd};
use super::command::{Changing, Command, Forked, NotCut, NotEntered, Post, ReadDone, Stray};
use super::crew::{Crew, Lateness};
use super::crew_call::Caller;
use super::crew_roster::Roster;
use super::fault::Fault;
use super::handles::KeeperHandle;
use super::placement::{LONGEST_WAIT_MS, Placement, Placer};
use super::read_timer::ReadTimer;
use super::resolve::{Answer, Resolver};
use super::shared::EngineShared;
use super::slow::Slow;
use super::strays::{Cause, Finding, Held, Lookup, LookupId, Strays, adopt, uncover};
use crate::inthread::Desk;
use crate::page::{is_aligned, page_floor, page_size};
use crate::process::ledger::Private;
use crate::space::foreign::is_foreign;
use crate::space::mmap_vec::MmapVec;
use crate::space::stripes::{areas_of, is_own, is_striped, spaces_of};
use crate::space::table::{Area, AreaTable, Change, InsertError};
use crate::space::{AreaRecord, NO_SPACE, OWN_SPACE, Pieces, Space, SpaceId, Target};
use crate::stats::latency::Moment;
use crate::stats::{SpaceCounters, add};
use crate::sys::{FaultKind, Liveness, Message, MsgBuffer, Userfault};
use crate::{Error, Result};

mod busy;
mod crew;
mod foreign;
mod reads;

use busy::Said;

/// Messages read by one system call.
const MESSAGES_PER_READ: usize = 64;
/// Faults held at once; a thread whose fault finds no place is woken and faults again.
const FAULTS_HELD: usize = 1024;
/// Of these, how many may be of processes that are not the engine's: they must not take all.
const FAULTS_HELD_OF_OTHERS: usize = FAULTS_HELD / 2;
/// Retries of parked faults without a pause; afterwards the pause doubles from 1 ms to [`LONGEST_PAUSE_MS`].
const EAGER_RETRIES: u32 = 8;
const LONGEST_PAUSE_MS: u16 = 8;
/// Turns for one busy space before the bell and the others are looked at.
const TURNS_WITHOUT_A_LOOK: u32 = 16;
/// The bell's and the timer's tokens in epoll; spaces use their ids.
const BELL_TOKEN: u64 = u64::MAX;
const TIMER_TOKEN: u64 = u64::MAX - 1;

/// Everything that the thread works with; made before it starts, so that it allocates nothing.
pub(crate) struct Handler {
    /// Where threads that bring their own pages look at the table of the own process; `None` if they don't. Dropped before
    /// the table.
    desk: Option<Desk>,
    shared: Arc<EngineShared>,
    keeper: Arc<KeeperHandle>,
    spaces: MmapVec<Space>,
    /// For children of foreign spaces: without one, no fork is read.
    spares: MmapVec<Arc<SpaceCounters>>,
    /// Such children, until all messages are read.
    born: MmapVec<Space>,
    epoll: Arc<Private<EpollFd>>,
    placer: Placer,
    /// The one space whose faults were answered last: there may be more, which need no wait.
    busy: Option<SpaceId>,
    /// Turns without a look at everything.
    turns: u32,
    bell: Arc<Bell>,
    commands: Receiver<Command>,
    messages: MsgBuffer,
    /// Room for one message.
    message: MsgBuffer,
    /// The last read brought one message, of this thread (0 if it is not known): the next one asks for no more, which spares the
    /// kernel a second look.
    one_by_one: Option<i32>,
    /// Faults read and not answered yet.
    pending: MmapVec<Fault>,
    /// The page of a fault that is being answered and is not among them.
    in_hand: Option<(SpaceId, usize)>,
    /// Faults to be tried again: the address space is changing, or a resource is not free.
    parked: MmapVec<Fault>,
    strays: Strays,
    /// Posts that found the keeper's channel full.
    unsent: MmapVec<Post>,
    resolver: Resolver,
    done: Receiver<ReadDone>,
    read_timer: ReadTimer,
    /// It has rung.
    reads_due: bool,
    retired: bool,
    ending: Ending,
    /// Regions of the own process that are being dropped.
    leavers: usize,
    idle_rounds: u32,
    crew: Arc<Crew>,
    caller: Caller,
    /// Where to call the crew at the end of this turn.
    to_call: Option<Roster>,
    /// Whether a member of the crew had to be called forward for this turn.
    lateness: Lateness,
    /// Faults that this turn found and no member of the crew had read.
    found: usize,
}

/// How far the end of a retired thread without areas is prepared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ending {
    No,
    /// The keeper was asked whether anything is mapped that events did not tell of.
    Asked,
    /// It is not.
    Allowed,
}

/// What the handler needs of its surroundings.
pub(crate) struct Parts {
    pub(crate) shared: Arc<EngineShared>,
    pub(crate) commands: Receiver<Command>,
    pub(crate) bell: Arc<Bell>,
    pub(crate) keeper: Arc<KeeperHandle>,
    pub(crate) uffd: Arc<Private<Userfault>>,
    pub(crate) counters: Arc<SpaceCounters>,
    pub(crate) slow: Slow,
    pub(crate) done: Receiver<ReadDone>,
    pub(crate) fault_around: FaultAround,
    /// Threads that answer simple faults beside this one.
    pub(crate) crew: Arc<Crew>,
    /// They are to do so all the time.
    pub(crate) crew_always: bool,
}

impl Handler {
    pub(crate) fn new(parts: Parts) -> Result<Handler> {
        let no_memory = Error::sys("mmap for the fault-handling thread");
        let epoll = Arc::new(EpollFd::open().map_err(Error::sys("epoll_create1 for the fault-handling thread"))?);
        let readable = |token| EpollEvent::new(EpollFlags::EPOLLIN, token);
        epoll.0.add(&*parts.bell, readable(BELL_TOKEN)).map_err(Error::sys("epoll_ctl for the command bell"))?;
        epoll.0.add(&**parts.uffd, readable(OWN_SPACE)).map_err(Error::sys("epoll_ctl for a userfaultfd"))?;
        let window_bytes = parts.fault_around.read_pages() * page_size();
        let anonymous = |bytes| MmapMut::map_anon(bytes).map_err(Error::io("mmap of a read buffer"));
        let read_timer = ReadTimer::new().map_err(Error::sys("timerfd_create for the fault-handling thread"))?;
        epoll.0.add(&read_timer, readable(TIMER_TOKEN)).map_err(Error::sys("epoll_ctl for a timer"))?;
        let shared = &parts.shared;
        let desk =
            shared.delivers_in_thread().then(|| Desk::new(shared, &parts.uffd, &parts.counters, parts.fault_around));
        let mut spaces = MmapVec::new();
        let own = Space {
            id: OWN_SPACE,
            parent: OWN_SPACE,
            uffd: Some(parts.uffd),
            masks: None,
            aside: None,
            foreign: None,
            table: AreaTable::new(),
            counters: parts.counters,
            unheard: Mutex::new(None),
        };
        spaces.try_push(own).map_err(|(_, errno)| no_memory(errno))?;
        let caller = Caller::new(parts.crew_always);
        let held = || -> Result<MmapVec<Fault>> {
            let mut faults = MmapVec::new();
            faults.try_reserve(FAULTS_HELD).map_err(&no_memory)?;
            Ok(faults)
        };
        Ok(Handler {
            resolver: Resolver::new(
                Arc::clone(&parts.shared),
                anonymous(window_bytes)?,
                parts.slow,
                parts.fault_around,
            ),
            pending: held()?,
            in_hand: None,
            parked: held()?,
            strays: Strays::new().map_err(&no_memory)?,
            shared: parts.shared,
            keeper: parts.keeper,
            spaces,
            spares: MmapVec::new(),
            born: MmapVec::new(),
            epoll,
            bell: parts.bell,
            commands: parts.commands,
            messages: MsgBuffer::new(MESSAGES_PER_READ),
            message: MsgBuffer::new(1),
            one_by_one: None,
            unsent: MmapVec::new(),
            desk: desk.transpose()?,
            done: parts.done,
            read_timer,
            reads_due: false,
            retired: false,
            ending: Ending::No,
            leavers: 0,
            idle_rounds: 0,
            placer: Placer::new(Placement::Floating, None),
            busy: None,
            turns: 0,
            to_call: caller.at_start(),
            lateness: Lateness::None,
            found: 0,
            crew: parts.crew,
            caller,
        })
    }

    /// What the thread waits in.
    pub(crate) fn waits_in(&self) -> &Arc<Private<EpollFd>> {
        &self.epoll
    }

    /// Goes to its first place. Called once, on the thread itself.
    pub(crate) fn settle(&mut self, mut placer: Placer) {
        placer.start();
        self.placer = placer;
    }

    /// Serves until retired and empty.
    pub(crate) fn run(&mut self) {
        loop {
            self.open_desk();
            self.placer.turns();
            self.mind_the_crew();
            self.make_reads();
            let rung = self.read();
            // Events were applied while reading; only now are faults answered, by the table as it is.
            self.answer_pending();
            if rung {
                self.bell.hear();
                if self.crew.is_broken() {
                    // The member that panicked hands on what it held whenever it comes to it, and rings afterwards.
                    self.take_handed_on();
                    self.answer_pending();
                }
                self.end_finished_reads();
            }
            self.end_late_reads();
            self.retry_parked();
            self.flush_unsent();
            // Commands come last: a barrier then stands behind everything that was read before it.
            if rung {
                self.obey_commands();
            }
            if self.retired && self.is_finished() {
                return;
            }
        }
    }

    /// Reads what there is, and waits for something if there is nothing. Answers whether the bell was rung.
    fn read(&mut self) -> bool {
        // A thread that faults without a pause has faulted again by the time it has been answered.
        let busy = self.busy.take();
        let said = busy.map(|space| self.serve_busy(space));
        if said == Some(Said::Something) {
            self.busy = busy.filter(|_| self.turns < TURNS_WITHOUT_A_LOOK);
            return false;
        }
        let mut ready = [EpollEvent::empty(); 32];
        let woken = self.wait(&mut ready, said == Some(Said::Nothing));
        self.turns = 0;
        let is_one_thread = self.one_by_one.is_some_and(|thread| thread != 0);
        if said == Some(Said::Enough) && is_one_thread && woken == 1 && Some(ready[0].data()) == busy {
            // The others have nothing to say.
            self.busy = busy;
            return false;
        }
        self.one_by_one = None;
        self.take_handed_on();
        if self.crew.is_on() {
            // The kernel tells faults before events, and members read one at a time: where more threads fault than there
            // are members, no event would ever be read.
            let before = self.pending.len();
            for index in 0..self.spaces.len() {
                let id = self.spaces[index].id;
                if self.caller.roster().waiters(id) > 0 {
                    self.read_space(id);
                }
            }
            // An unmap takes faults out that were taken over from members.
            self.found = self.pending.len().saturating_sub(before);
        }
        let mut rung = false;
        let mut heard = 0;
        for event in &ready[..woken] {
            match event.data() {
                BELL_TOKEN => rung = true,
                TIMER_TOKEN => self.reads_due = true,
                space => {
                    if self.read_space(space) {
                        heard += 1;
                        self.busy = (heard == 1).then_some(space);
                    }
                }
            }
        }
        if rung || !self.parked.is_empty() {
            self.busy = None;
        }
        rung
    }

    /// Waits for news; answers how many there are. Says in `read` whether a read has just found nothing.
    fn wait(&mut self, ready: &mut [EpollEvent], read: bool) -> usize {
        self.open_desk();
        let pause = self.pause();
        if self.crew.is_on() {
            return self.wait_for_the_crew(ready, pause);
        }
        let Handler { epoll, placer, .. } = self;
        // EINTR can't come, as the thread blocks every signal, but a debugger may stop it: wait again.
        let mut wait = |pause| epoll.0.wait(ready, pause).unwrap_or(0);
        if pause != EpollTimeout::NONE {
            return wait(pause);
        }
        if let Some(spin) = placer.spin().filter(|_| read) {
            let start = Instant::now();
            while start.elapsed() < spin {
                let woken = wait(EpollTimeout::ZERO);
                if woken > 0 {
                    return woken;
                }
            }
        }
        if !placer.is_following() {
            return wait(EpollTimeout::NONE);
        }
        let woken = if read { 0 } else { wait(EpollTimeout::ZERO) };
        if woken > 0 {
            return woken;
        }
        placer.sleeps();
        let woken = wait(EpollTimeout::from(LONGEST_WAIT_MS));
        placer.wakes(woken == 0);
        // In vain: from here on without a limit.
        woken
    }

    /// Continues after a panic: every fault is answered by SIGBUS from now on.
    pub(crate) fn retire(&mut self) {
        self.retired = true;
        if let Some((space, addr)) = self.in_hand.take() {
            // There is room: then nothing was pending.
            let _ = self.pending.try_push(Fault::new(space, addr, 0, false, Moment::now()));
        }
        self.abandon_waits();
        // Commands whose ring was heard before the panic still wait.
        self.bell.ring();
    }

    /// How long to wait for news: for ever, unless something is to be tried again.
    fn pause(&mut self) -> EpollTimeout {
        // A retired thread that is empty and has not asked found the keeper's channel full.
        let unsaid = self.retired && self.ending != Ending::Asked && self.is_empty();
        if self.parked.is_empty() && self.unsent.is_empty() && !unsaid {
            self.idle_rounds = 0;
            return EpollTimeout::NONE;
        }
        self.idle_rounds = self.idle_rounds.saturating_add(1);
        if self.idle_rounds <= EAGER_RETRIES {
            // The thread whose event was read needs the processor to finish its change.
            std::thread::yield_now();
            return EpollTimeout::ZERO;
        }
        let doublings = (self.idle_rounds - EAGER_RETRIES - 1).min(3);
        EpollTimeout::from((1u16 << doublings).min(LONGEST_PAUSE_MS))
    }

    /// Keeps threads that bring their own pages away from the table until [`Handler::open_desk`]: before an event of the own
    /// process is read, and before its table changes.
    fn close_desk(&mut self) {
        if let Some(desk) = &mut self.desk {
            desk.close();
        }
    }

    fn open_desk(&mut self) {
        if let (Some(desk), Some(own)) = (&mut self.desk, self.spaces.first()) {
            desk.open(&own.table, !self.retired);
        }
    }

    fn index_of(&self, space: SpaceId) -> Option<usize> {
        self.spaces.binary_search_by_key(&space, |space| space.id).ok()
    }

    /// Reads what a space has to say: applies events at once, holds faults back. Answers whether there were any.
    fn read_space(&mut self, id: SpaceId) -> bool {
        let before = self.pending.len();
        self.read_messages(id, None);
        self.pending.len() > before
    }

    /// Takes a message that a member of the crew has read, or reads what there is.
    fn read_messages(&mut self, id: SpaceId, mut given: Option<Message>) {
        let Some(mut index) = self.index_of(id) else { return };
        let is_given = given.is_some();
        if id == OWN_SPACE {
            self.close_desk();
        }
        loop {
            // Each message may split an area, or have two addresses looked up. Without room for that, its event must not
            // be read: the thread that unmaps then waits, and nothing is lost.
            let table = &mut self.spaces[index].table;
            let most_posts = table.len() + 6 * MESSAGES_PER_READ;
            // For what a member reads, room was made before.
            if !is_given
                && (table.try_reserve(4 * MESSAGES_PER_READ).is_err() || self.unsent.try_reserve(most_posts).is_err())
            {
                // epoll goes on to report it: give others the processor, perhaps one of them frees some.
                std::thread::yield_now();
                return;
            }
            let held_at_most = if is_foreign(id) { FAULTS_HELD_OF_OTHERS } else { FAULTS_HELD };
            if !is_given && self.pending.len() + MESSAGES_PER_READ > held_at_most {
                return;
            }
            let at_once = self.forks_to_read(index);
            if at_once == 0 {
                // The keeper is about to make room for forks. Until then they wait.
                std::thread::yield_now();
                return;
            }
            let one_by_one = self.one_by_one.is_some() || at_once < MESSAGES_PER_READ;
            let Handler { spaces, pending, parked, strays, unsent, shared, resolver, ending, spares, born, .. } = self;
            let messages = if one_by_one { &mut self.message } else { &mut self.messages };
            let Space { uffd: Some(uffd), table, counters, foreign, .. } = &mut spaces[index] else { return };
            // One look at the clock for all that are read together.
            let mut since = None;
            let each = |message| match message {
                Message::Fault { addr, write, kind: kind @ (FaultKind::Missing | FaultKind::Minor), tid } => {
                    let minor = kind == FaultKind::Minor;
                    add(&shared.counters.faults, 1);
                    if write {
                        add(&shared.counters.write_faults, 1);
                    }
                    add(&counters.faults, 1);
                    let since = *since.get_or_insert_with(Moment::now);
                    let fault = Fault { minor, ..Fault::new(id, page_floor(addr), tid, write, since) };
                    // One answer is for all that wait for the page, except that a worker may be refused.
                    if resolver.is_worker(&fault)
                        || !pending.iter().any(|held| held.space == id && held.addr == fault.addr)
                    {
                        // There is room: checked above.
                        let _ = pending.try_push(fault);
                    }
                }
                event => {
                    let event = match foreign {
                        Some(foreign) => {
                            let followed = foreign::follow(event, (id, uffd), foreign, table, spares, born, unsent);
                            let Some(event) = followed else { return };
                            event
                        }
                        None => event,
                    };
                    let gone = match event {
                        Message::Unmap { start, end } => start..end,
                        Message::Remap { from, len, .. } => from..from + len,
                        _ => 0..0,
                    };
                    // What the event does not say: whether the old range is left, and where the new one ends.
                    let beside = match event {
                        // Its memory is no vmap's: there is nothing to be found.
                        _ if is_foreign(id) => [None, None],
                        Message::Remap { to, len: 0, .. } => [Some((to, Cause::Made)), None],
                        Message::Remap { from, to, len } => {
                            [Some((from, Cause::Left { len })), Some((to + len, Cause::Behind))]
                        }
                        _ => [None, None],
                    };
                    apply_event(shared, table, counters, uffd, event, unsent);
                    pending.drain_where(|fault| fault.space == id && gone.contains(&fault.addr), drop);
                    forget_unmapped(parked, resolver, strays, id, &gone);
                    // Perhaps it was of what is in no table.
                    *ending = Ending::No;
                    for (addr, cause) in beside.into_iter().flatten() {
                        // Without memory: when it is touched.
                        if let Some(lookup) = strays.probe(id, addr, cause)
                            && unsent.try_push(Post::Stray(Stray { space: id, addr, lookup })).is_err()
                        {
                            strays.take(lookup);
                        }
                    }
                }
            };
            if is_given {
                return given.take().map_or((), each);
            }
            let read = uffd.read(messages, each);
            self.enter_born();
            let Ok(n @ 1..) = read else { return };
            add(&self.shared.counters.reads, 1);
            self.one_by_one = (n == 1).then(|| self.pending.last().map_or(0, |fault| fault.tid));
            // A process that is not the engine's must not have others wait.
            if n < MESSAGES_PER_READ || is_foreign(id) {
                return;
            }
            // Those that were born may have come before it.
            let Some(index_now) = self.index_of(id) else { return };
            index = index_now;
        }
    }

    fn answer_pending(&mut self) {
        // Answered in the order of reading.
        for index in 0..self.pending.len() {
            let fault = self.pending[index];
            self.answer(fault);
            self.saw(fault.space, fault.tid, fault.minor);
        }
        self.pending.clear();
    }

    /// Notes whose fault was answered: to be where that thread is, and to call the crew if there are several.
    fn saw(&mut self, space: SpaceId, tid: i32, minor: bool) {
        // Where it would go, a member is.
        if !self.crew.is_on() {
            self.placer.saw(tid);
        }
        // Members answer missing pages only.
        if !self.crew.members.is_empty()
            && !minor
            && !is_foreign(space)
            && let roster @ Some(_) = self.caller.saw(space, tid, &self.crew)
        {
            self.to_call = roster;
        }
    }

    fn answer(&mut self, fault: Fault) {
        let Some(index) = self.index_of(fault.space) else { return };
        let space = &self.spaces[index];
        let answer =
            if self.retired { self.resolver.poison_in(space, &fault) } else { self.resolver.resolve(space, &fault) };
        self.follow(fault, answer);
    }

    /// Does what an answer asks for.
    fn follow(&mut self, fault: Fault, answer: Answer) {
        match answer {
            Answer::Done => self.shared.latency.record(fault.since),
            Answer::Handed => {}
            Answer::Later | Answer::Starved => {
                add(&self.shared.counters.parked, 1);
                let retries = fault.retries.saturating_add(1);
                let starved = fault.starved.saturating_add((answer == Answer::Starved).into());
                // A worker's fault is not to be taken for another thread's: it must not wait for a worker.
                let own = self.resolver.is_worker(&fault);
                let covers = |f: &Fault| f.space == fault.space && f.addr == fault.addr && (!own || f.tid == fault.tid);
                if let Some(held) = self.parked.iter_mut().find(|held| covers(held)) {
                    held.retries = held.retries.max(retries);
                    held.starved = held.starved.max(starved);
                    held.failed = held.failed.max(fault.failed);
                } else if self.parked.len() < if is_foreign(fault.space) { FAULTS_HELD_OF_OTHERS } else { FAULTS_HELD }
                {
                    // Reserved at the start.
                    let _ = self.parked.try_push(Fault { retries, starved, ..fault });
                } else if let Some(index) = self.index_of(fault.space) {
                    // No place to hold it: the thread faults again, and its new message waits in the kernel.
                    if let Some(uffd) = &self.spaces[index].uffd {
                        self.resolver.wake(uffd, fault.addr);
                    }
                }
            }
            Answer::Gone => self.post(Post::Gone(fault.space)),
            Answer::Stray => self.look_up(fault),
            Answer::Unmapped if self.unmapped_unseen(fault.space, fault.addr) => {}
            Answer::Unmapped => self.follow(fault, Answer::Later),
            // It waits for its end. Without room to ask for that: soon.
            Answer::Fatal => {
                let Fault { space, addr, .. } = fault;
                if self.keeper.try_post(Post::Fatal { space, addr }).is_err() {
                    self.follow(fault, Answer::Later);
                }
            }
        }
    }

    /// Has the keeper look a stray's address up; its thread sleeps until then.
    fn look_up(&mut self, fault: Fault) {
        let Fault { space, addr, .. } = fault;
        match self.strays.hold(fault) {
            // A worker must not wait as another thread would, perhaps for a worker: it faults again until the answer is there.
            Held::Known if self.resolver.is_worker(&fault) => {}
            Held::Known => return,
            Held::New(lookup) if self.keeper.try_post(Post::Stray(Stray { space, addr, lookup })).is_ok() => return,
            Held::New(lookup) => drop(self.strays.take(lookup)),
            Held::NoPlace => {}
        }
        if let Some(index) = self.index_of(space) {
            // The thread faults again, and its new message waits in the kernel.
            if let Some(uffd) = &self.spaces[index].uffd {
                self.resolver.wake(uffd, addr);
            }
        }
    }

    /// Follows what was found at an address, and answers the thread that waits there.
    ///
    /// # Errors
    ///
    /// [`Changing`]: what was found says nothing yet, it is to be looked up again.
    fn found(&mut self, lookup: LookupId, finding: Finding) -> std::result::Result<(), Changing> {
        let Some(&Lookup { space: id, addr, cause, .. }) = self.strays.get(lookup) else { return Ok(()) };
        let Some(index) = self.index_of(id) else { return Ok(()) };
        let (finding, doubtful) = uncover(&self.spaces[index], addr, cause, finding);
        // Where a process has stripes, what goes on in the same file may be another's, of which an event is not read yet.
        let doubtful = doubtful || (is_striped(&self.spaces, id) && matches!(finding, Finding::Vmap(_)));
        let changing = doubtful && spaces_of(&self.spaces, id).any(is_changing);
        let others = spaces_of(&self.spaces, id).filter(|other| other.id != id).map(|other| other.table.gap(addr));
        let free = others.fold(0..usize::MAX, |free, gap| free.start.max(gap.start)..free.end.min(gap.end));
        let space = &mut self.spaces[index];
        // Nothing can be entered without memory.
        let starved = matches!(finding, Finding::Vmap(_)) && space.table.try_reserve(1).is_err();
        // An event that is not read yet may be of the unmap after which somebody else has got the addresses.
        if starved || changing {
            return Err(Changing);
        }
        let Some(Lookup { fault, untouched, .. }) = self.strays.take(lookup) else { return Ok(()) };
        let known = match &finding {
            // An event that came meanwhile told of it.
            _ if space.table.find(addr).is_some() => Ok(true),
            // What was unmapped with a stripe beside it is asked about anew.
            _ if !untouched.contains(&addr) => Err(Errno::ENOENT),
            Finding::Vmap(shown) => adopt(space, addr, shown, &within(&untouched, &free)).inspect(|&adopted| {
                space.counters.areas.store(space.table.len() as u64, Ordering::Relaxed);
                add(&self.shared.counters.adopted, adopted.into());
            }),
            Finding::Nothing | Finding::Hidden(_) => Err(Errno::ENOENT),
            Finding::Foreign => Ok(false),
        };
        let (Some(fault), space) = (fault, &self.spaces[index]) else { return Ok(()) };
        match (known, &space.uffd) {
            (Ok(true), _) => self.answer(fault),
            (Ok(false), _) => {
                let answer = self.resolver.refuse_stray(space, &fault);
                self.follow(fault, answer);
            }
            // Unmapped, or no memory to enter it: if it is touched again, there will be a new message.
            (Err(_), Some(uffd)) => drop(self.resolver.wake(uffd, addr)),
            (Err(_), None) => {}
        }
        Ok(())
    }

    /// Has the addresses looked up that threads ask for which bring their own pages.
    fn hear_touchers(&mut self) {
        let Handler { desk: Some(desk), spaces, strays, keeper, retired: false, .. } = self else { return };
        let Some(own) = spaces.first() else { return };
        desk.hear(|addr| {
            if own.table.find(addr).is_some() {
                return None;
            }
            let lookup = strays.probe(OWN_SPACE, addr, Cause::Touch)?;
            if keeper.try_post(Post::Stray(Stray { space: OWN_SPACE, addr, lookup })).is_err() {
                strays.take(lookup);
                return None;
            }
            Some(lookup)
        });
    }

    /// Answers the thread that has asked for a lookup: it touches again, unless something unknown is at `addr`.
    fn tell_toucher(&mut self, lookup: LookupId, addr: Option<usize>) {
        let Handler { desk: Some(desk), spaces, .. } = self else { return };
        let known = |addr| spaces.first().is_some_and(|own| own.table.find(addr).is_some());
        let again = addr.is_none_or(known);
        desk.found(lookup, again);
    }

    /// Does what the event of a page's unmap would have done, which the kernel did not report.
    /// Answers `false` for want of memory.
    fn unmapped_unseen(&mut self, space: SpaceId, addr: usize) -> bool {
        let Some(index) = self.index_of(space) else { return true };
        self.close_desk();
        let Handler { spaces, unsent, shared, parked, resolver, strays, .. } = self;
        let Space { uffd: Some(uffd), table, counters, .. } = &mut spaces[index] else { return true };
        if table.try_reserve(1).is_err() || unsent.try_reserve(1).is_err() {
            return false;
        }
        let gone = addr..addr + page_size();
        let event = Message::Unmap { start: gone.start, end: gone.end };
        apply_event(shared, table, counters, uffd, event, unsent);
        // What is pending is answered before anything else can come to be at the address.
        forget_unmapped(parked, resolver, strays, space, &gone);
        true
    }

    fn retry_parked(&mut self) {
        for _ in 0..self.parked.len() {
            // An answer may find that others are of what was unmapped.
            if self.parked.is_empty() {
                return;
            }
            // From the front; what has to wait again goes to the back.
            let fault = self.parked.remove(0);
            self.answer(fault);
        }
    }

    /// Answers the faults that wait for a worker, whose source may never come back, or for the keeper.
    fn abandon_waits(&mut self) {
        self.close_desk();
        if let Some(desk) = &mut self.desk {
            desk.refuse_all();
        }
        self.abandon_reads();
        while let Some(fault) = self.strays.pop() {
            self.answer(fault);
        }
    }

    fn post(&mut self, post: Post) {
        // The keeper drains its channel as long as this thread lives; a full one is tried again.
        if let Err(post) = self.keeper.try_post(post)
            && self.unsent.try_push(post).is_err()
        {
            // Only a repeatable post comes here without room reserved: the next fault of that space repeats it.
        }
    }

    fn flush_unsent(&mut self) {
        while !self.unsent.is_empty() {
            let post = self.unsent.remove(0);
            if let Err(post) = self.keeper.try_post(post) {
                // Room is there: one was just taken out.
                let _ = self.unsent.try_insert(0, post);
                return;
            }
        }
    }

    fn obey_commands(&mut self) {
        self.close_desk();
        self.hear_touchers();
        while let Ok(command) = self.commands.try_recv() {
            self.obey(command);
        }
    }

    /// Tells whether nothing is left to guard or to report.
    fn is_empty(&self) -> bool {
        self.leavers == 0
            && !self.shared.is_attaching()
            // Whatever a foreign one has registered is to be answered, until it is taken out.
            && self.spaces.iter().all(|space| space.table.is_empty() && space.foreign.is_none())
            && self.unsent.is_empty()
    }

    /// Tells whether the thread may end; the keeper then knows.
    fn is_finished(&mut self) -> bool {
        if !self.is_empty() {
            return false;
        }
        match self.ending {
            Ending::No => {
                if self.keeper.try_post(Post::Empty).is_ok() {
                    self.ending = Ending::Asked;
                }
                false
            }
            Ending::Asked => false,
            Ending::Allowed => self.keeper.try_post(Post::HandlerEnded).is_ok(),
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Insert { space, area, reply } => reply.answer(self.insert(space, area)),
            Command::Pieces { space, region, reply } => {
                let mut pieces = Pieces::default();
                for area in spaces_of(&self.spaces, space).flat_map(|space| space.table.pieces_of(region)) {
                    pieces.push(area.start, area.end);
                }
                reply.answer(pieces);
            }
            Command::Piece { region, start, end, reply } => {
                let own = spaces_of(&self.spaces, OWN_SPACE).flat_map(|space| space.table.overlapping(start, end));
                let pieces = own.filter(|area| area.region == region && !area.leaving);
                let piece = pieces.min_by_key(|area| area.start);
                reply.answer(piece.map(|area| {
                    let range = area.start.max(start)..area.end.min(end);
                    let pgoff = area.pgoff_of(range.start);
                    (range, pgoff)
                }));
            }
            Command::Leave { region, reply } => {
                self.leavers += 1;
                let own = self.spaces.iter_mut().filter(|space| is_own(space.id));
                reply.answer(own.map(|space| space.table.mark_leaving(region)).sum());
            }
            Command::Left => self.leavers -= 1,
            Command::Overlap { start, end, reply } => {
                let own = spaces_of(&self.spaces, OWN_SPACE).flat_map(|space| space.table.overlapping(start, end));
                let hit = own.map(|area| area.start.max(start)).min();
                // As for a new area: the one that was hit may have ended, and the addresses be somebody else's.
                let unsure = hit.is_some() && spaces_of(&self.spaces, OWN_SPACE).any(is_changing);
                reply.answer(if unsure { Err(Changing) } else { Ok(hit) });
            }
            Command::Fork { parent, child, mut records, reply } => {
                self.catch_up(parent);
                let outcome = self.fork(parent, child, &mut records);
                reply.answer(Forked { records, outcome });
            }
            Command::Inherited { parent, skip, most, mut records, reply } => {
                self.catch_up(parent);
                let mut wanted = areas_of(&self.spaces, parent).filter(is_inherited).skip(skip).take(most);
                let outcome = wanted.try_for_each(|area| records.try_push(AreaRecord::of(area)));
                reply.answer(Forked { records, outcome: outcome.map_err(|(_, errno)| errno) });
            }
            Command::Cut { space, start, end, reply } => reply.answer(self.cut(space, start, end)),
            Command::Adopt { space, uffd, masks, aside, reply } => {
                let outcome = match self.index_of(space) {
                    Some(index) => {
                        let entry = &mut self.spaces[index];
                        (entry.uffd, entry.masks, entry.aside) = (Some(uffd), masks, aside);
                        let heard = self.hear(index);
                        if heard.is_err() {
                            let entry = &mut self.spaces[index];
                            (entry.uffd, entry.masks, entry.aside) = (None, None, None);
                        }
                        heard
                    }
                    None => Err(Errno::ESRCH),
                };
                reply.answer(outcome);
            }
            Command::TakeStripe { space, reply } => reply.answer(self.take_stripe(space)),
            Command::TakeForeign { new, reply } => reply.answer(self.take_foreign(new)),
            Command::Spares { spares } => self.take_spares(spares),
            Command::Bring { bring, reply } => reply.answer(self.bring(&bring)),
            Command::Release { space, moves, reply } => reply.answer(self.release(space, moves)),
            Command::Spare { space, addr } => self.spare(space, addr),
            Command::Remove { space, reply } => reply.answer(self.remove(space)),
            Command::SetList { vmap, contents, reply } => {
                let targets =
                    self.spaces.iter_mut().flat_map(|space| space.table.iter_mut()).map(|area| &mut area.target);
                for target in targets.filter(|target| target.vmap.id == vmap) {
                    if target.generation < contents.generation {
                        // The asker keeps both lists alive until it is answered: nothing is freed here.
                        target.list = contents.list.clone();
                        target.window = contents.window.clone();
                        (target.generation, target.kept_since) = (contents.generation, contents.kept_since);
                    }
                }
                let kept_since = contents.kept_since;
                drop(contents);
                self.end_outdated_reads(vmap, kept_since);
                reply.answer(());
            }
            Command::Read { subject, generation, pages, reply } if !self.retired => {
                self.resolver.ask_for(subject, generation, pages, reply);
            }
            Command::Read { subject, reply, .. } => {
                // The asker keeps what it refers to as long as it waits.
                drop(subject);
                drop(reply);
            }
            Command::Heal { vmap, pages, from, reply } => reply.answer(self.heal(vmap, &pages, from)),
            Command::View { mut view, reply } => {
                let outcome = self.spaces.iter().try_for_each(|space| view.add(space));
                reply.answer((view, outcome));
            }
            Command::Probe { space, addr, reply } => {
                let knows = |space: &Space, addr| space.table.find(addr).is_some();
                let known =
                    self.index_of(space).is_none() || spaces_of(&self.spaces, space).any(|space| knows(space, addr));
                // It is about what ends there, which may be a stripe's.
                let before = spaces_of(&self.spaces, space).find(|space| knows(space, addr.wrapping_sub(1)));
                let space = before.map_or(space, |before| before.id);
                reply.answer(if known { None } else { self.strays.probe(space, addr, Cause::Behind) });
            }
            Command::Found { lookup, finding, reply } => {
                let addr = self.strays.get(lookup).map(|lookup| lookup.addr);
                let unmapped = matches!(finding, Finding::Nothing | Finding::Hidden(_));
                let outcome = self.found(lookup, finding);
                if outcome.is_ok() {
                    self.tell_toucher(lookup, addr.filter(|_| !unmapped));
                }
                reply.answer(outcome);
            }
            Command::Unmapped { space, addr } => {
                // Without memory the page stays in the table, as if its process had not told.
                let _ = self.unmapped_unseen(space, addr);
            }
            Command::Barrier { reply } => reply.answer(self.unsent.is_empty()),
            Command::Retire { reply } => {
                self.retired = true;
                self.abandon_waits();
                reply.answer(());
            }
            Command::Huge { memory, reply } => reply.answer(self.resolver.take_huge(memory)),
            Command::End => self.ending = Ending::Allowed,
            #[cfg(test)]
            Command::Panic => panic!("asked to"),
        }
    }

    #[allow(clippy::result_large_err, reason = "what is refused is given back; a box would be allocated")]
    fn insert(&mut self, space: SpaceId, area: Area<Target>) -> std::result::Result<(), NotEntered> {
        let Some(index) = self.index_of(space).filter(|_| !self.retired) else { return Err(NotEntered::Ended(area)) };
        // The kernel gives addresses up first and reports it then. Until every report is read, one of them may be of
        // the very addresses that the new area has by now, and would be taken for its end.
        if spaces_of(&self.spaces, space).any(is_changing) {
            return Err(NotEntered::Changing(area));
        }
        let space = &mut self.spaces[index];
        space.table.insert(area).map_err(NotEntered::Table)?;
        space.counters.areas.store(space.table.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    /// Serves a stripe from here on.
    #[allow(clippy::result_large_err, reason = "what is refused is given back; a box would be freed")]
    fn take_stripe(&mut self, mut space: Space) -> std::result::Result<(), (Space, Errno)> {
        // As much as a read of it asks for, and some areas: when its first fault comes, no mapping may be left.
        if let Err(errno) = space.table.try_reserve(5 * MESSAGES_PER_READ) {
            return Err((space, errno));
        }
        if self.retired {
            return Err((space, Errno::ESHUTDOWN));
        }
        if let Err(errno) = self.spaces.try_reserve(1) {
            return Err((space, errno));
        }
        let index = self.enter_space(space);
        self.hear(index).map_err(|errno| (self.spaces.remove(index), errno))
    }

    /// Enters a space in its place, for which room was made; answers where that is.
    fn enter_space(&mut self, space: Space) -> usize {
        let index = self.spaces.partition_point(|other| other.id < space.id);
        let _ = self.spaces.try_insert(index, space);
        index
    }

    /// Reads all that a process of several spaces has to say: each tells its events in order, but one may have told of an
    /// address that it has got before another has told that it has lost it.
    fn catch_up(&mut self, space: SpaceId) {
        if is_striped(&self.spaces, space) {
            for index in 0..self.spaces.len() {
                let id = self.spaces[index].id;
                if is_own(id) {
                    self.read_space(id);
                }
            }
            self.answer_pending();
        }
    }

    /// Makes the space of a child: every area that it inherits, counted from now on.
    fn fork(
        &mut self,
        parent_id: SpaceId,
        child: Arc<SpaceCounters>,
        records: &mut MmapVec<AreaRecord>,
    ) -> std::result::Result<(), Errno> {
        let index = self.index_of(parent_id);
        if self.retired || (index.is_none() && parent_id != NO_SPACE) {
            return Err(Errno::ESHUTDOWN);
        }
        let mut table = AreaTable::new();
        self.spaces.try_reserve(1)?;
        let nr_areas = areas_of(&self.spaces, parent_id).filter(is_inherited).count();
        records.try_reserve(nr_areas)?;
        table.try_reserve(nr_areas)?;
        // By address, whichever space they are of: so the child goes over its own.
        for area in areas_of(&self.spaces, parent_id).filter(is_inherited) {
            records.try_push(AreaRecord::of(area)).map_err(|(_, errno)| errno)?;
            table.insert(area.clone()).map_err(|refused| match refused {
                // A stripe has got addresses of which another has not told yet that it has lost them.
                InsertError::Overlap(_) => Errno::EAGAIN,
                InsertError::NoMemory(_, errno) => errno,
            })?;
        }
        for area in table.iter() {
            area.target.vmap.open_again();
        }
        child.areas.store(nr_areas as u64, Ordering::Relaxed);
        let space = Space {
            id: child.id,
            parent: parent_id,
            uffd: None,
            masks: None,
            aside: None,
            foreign: None,
            table,
            counters: child,
            unheard: Mutex::new(None),
        };
        self.enter_space(space);
        Ok(())
    }

    /// Takes a range out of a child's areas, as an unmap of it would.
    fn cut(&mut self, child: SpaceId, start: usize, end: usize) -> std::result::Result<(), NotCut> {
        let refused = |errno| Err(NotCut::Refused(errno));
        let Some(index) = self.index_of(child) else { return refused(Errno::ESRCH) };
        let parent = self.spaces[index].parent;
        if self.index_of(parent).is_none() {
            return refused(Errno::ESRCH);
        }
        if self.spaces[index].uffd.is_some() || !is_aligned(start) || !is_aligned(end) {
            return refused(Errno::EINVAL);
        }
        let parents = || spaces_of(&self.spaces, parent);
        let has = |area: &Area<Target>| {
            let (from, to) = (area.start.max(start), area.end.min(end));
            parents().flat_map(|parent| parent.table.overlapping(from, to)).any(|other| other.region == area.region)
        };
        if self.spaces[index].table.overlapping(start, end).any(has) {
            // The parent may have lost it before the fork, by an event that is not read yet.
            return if parents().any(is_changing) { Err(NotCut::Changing) } else { refused(Errno::EEXIST) };
        }
        let Handler { spaces, unsent, .. } = self;
        let space = &mut spaces[index];
        unsent.try_reserve(space.table.len() + 1).map_err(NotCut::Refused)?;
        space.table.unmap(start, end, |change| note(change, unsent)).map_err(NotCut::Refused)?;
        space.counters.areas.store(space.table.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    /// Waits for what a space says; its crew does, where that is on.
    fn hear(&self, index: usize) -> std::result::Result<(), Errno> {
        let space = &self.spaces[index];
        let Some(uffd) = &space.uffd else { return Err(Errno::EBADF) };
        let crewed = self.crew.is_on() && self.caller.roster().waiters(space.id) > 0;
        let flags = if crewed { EpollFlags::empty() } else { EpollFlags::EPOLLIN };
        let added = self.epoll.0.add(&***uffd, EpollEvent::new(flags, space.id));
        let heard = added.and_then(|()| self.crew.wait_for(self.caller.roster(), space));
        if heard.is_err() {
            self.deafen(index);
        }
        heard
    }

    /// Waits for nothing of a space any more.
    fn deafen(&self, index: usize) {
        let space = &self.spaces[index];
        if let Some(uffd) = &space.uffd {
            let _ = self.epoll.0.delete(&***uffd);
            self.crew.wait_no_more_for(self.caller.roster(), space);
        }
    }

    fn remove(&mut self, space: SpaceId) -> Option<Space> {
        let index = self.index_of(space)?;
        self.deafen(index);
        let removed = self.spaces.remove(index);
        for faults in [&mut self.pending, &mut self.parked] {
            faults.drain_where(|fault| fault.space == space, drop);
        }
        self.resolver.forget_faults(|fault| fault.space == space);
        self.strays.forget(space);
        Some(removed)
    }
}

impl Drop for Handler {
    fn drop(&mut self) {
        self.crew.end();
    }
}

/// Tells whether a child inherits an area.
fn is_inherited(area: &&Area<Target>) -> bool {
    area.target.inherit && !area.leaving
}

/// What two ranges have in common.
fn within(one: &Range<usize>, other: &Range<usize>) -> Range<usize> {
    one.start.max(other.start)..one.end.min(other.end)
}

/// Tells whether an event of a space is not read yet, or its thread has not run on since.
fn is_changing(space: &Space) -> bool {
    space.uffd.as_ref().is_some_and(|uffd| uffd.liveness() == Liveness::Changing)
}

/// Counts a change of a table: an area more at once, an area less by the keeper. Room for that is reserved.
fn note(change: Change<Target>, unsent: &mut MmapVec<Post>) {
    match change {
        Change::Split(target) => target.vmap.open_again(),
        // Its owner holds what it refers to, and counts it.
        Change::Closed(area) if area.leaving => {}
        // Sent after the batch, in order.
        Change::Closed(area) => {
            let _ = unsent.try_push(Post::Closed(area));
        }
    }
}

/// Forgets faults at addresses that were unmapped. Their threads were woken; answered later, they might meet another region there.
fn forget_unmapped(
    parked: &mut MmapVec<Fault>,
    resolver: &mut Resolver,
    strays: &mut Strays,
    space: SpaceId,
    gone: &Range<usize>,
) {
    let is_gone = |fault: &Fault| fault.space == space && gone.contains(&fault.addr);
    parked.drain_where(|fault| is_gone(fault), drop);
    if !gone.is_empty() {
        resolver.forget_faults(is_gone);
    }
    strays.unmapped(space, gone);
}

/// Applies an event of the kernel to a space's table, and tells the keeper what ended.
fn apply_event(
    shared: &EngineShared,
    table: &mut AreaTable<Target>,
    counters: &SpaceCounters,
    uffd: &Userfault,
    event: Message,
    unsent: &mut MmapVec<Post>,
) {
    add(&shared.counters.events, 1);
    // Room for both kinds of change was reserved before the event was read, so the table can't refuse.
    let change = |change| note(change, unsent);
    match event {
        Message::Unmap { start, end } => {
            let _ = table.unmap(start, end, change);
            // A thread that waits for a page of a range that is gone sleeps until it is woken; then it gets SIGSEGV.
            let _ = uffd.wake(start, end - start);
            add(&shared.counters.wakes, 1);
        }
        Message::Remap { from, to, len } => {
            let _ = table.remap(from, to, len, change);
            let _ = uffd.wake(from, len);
            add(&shared.counters.wakes, 1);
        }
        // The pages are gone, or only their mappings; the next touch asks the list again.
        Message::Remove { .. } => {}
        // Not asked for: spaces are registered for missing pages and minor faults, without fork events. Its descriptor is
        // closed here.
        Message::Fork(_) | Message::Fault { .. } => {}
    }
    counters.areas.store(table.len() as u64, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::{Duration, Instant};

    use crate::runtime::command::{Command, Healed, Place};
    use crate::space::OWN_SPACE;
    use crate::{AttachOptions, Engine, Kiobuf, Shutdown, page_size};

    /// Mapping pages where they were refused is done in small steps, each of which goes on where the one before it ended.
    #[test]
    fn pages_are_healed_in_small_steps() {
        const PAGES: u64 = 50;
        let engine = Engine::builder().fault_around_pages(1).build().unwrap();
        let mut list = Kiobuf::new();
        list.map_bytes(vec![7; PAGES as usize * page_size()]).unwrap();
        let vmap = engine.vmap(&list).unwrap();
        let regions: Vec<_> = (0..5).map(|_| vmap.attach(&AttachOptions::new()).unwrap()).collect();
        let mut bytes = vec![0; PAGES as usize * page_size()];
        regions[0].read_at(0, &mut bytes).unwrap();
        let heal = |from| {
            let (vmap, pages) = (vmap.id(), 0..PAGES);
            engine.shared_for_tests().handler.ask(|reply| Command::Heal { vmap, pages, from, reply }).unwrap()
        };
        let mut steps = vec![Place::default()];
        while let Healed::Before(place) = heal(steps[steps.len() - 1]) {
            assert!(place > steps[steps.len() - 1], "{steps:?}");
            steps.push(place);
        }
        // 250 pages, 64 in a step, and none left out.
        assert_eq!(steps.len(), 4);
        let faults = engine.stats().faults;
        regions.iter().for_each(|region| region.read_at(0, &mut bytes).unwrap());
        assert_eq!(engine.stats().faults, faults);
    }

    /// A page that was unmapped without an event: who waited for its read is woken, and no read is made for nobody. A thread that
    /// finds the page mapped after all asks anew.
    #[test]
    fn waits_for_what_was_unmapped_unseen_end() {
        let (opened, gate) = crossbeam_channel::bounded::<()>(0);
        let source = move |_: u64, buf: &mut [u8]| {
            // Open when the sender is gone.
            let _ = gate.recv();
            buf.fill(7);
            Ok(())
        };
        let engine = Engine::builder().workers(1).fault_around_pages(1).build().unwrap();
        let mut list = Kiobuf::new();
        list.map_source(Arc::new(Held(source)), 9 * page_size() as u64).unwrap();
        let vmap = engine.vmap(&list).unwrap();
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        let wait_for = |what: fn(&crate::Stats) -> bool| {
            let start = Instant::now();
            while !what(&engine.stats()) {
                assert!(start.elapsed() < Duration::from_secs(30), "{:?}", engine.stats());
                std::thread::yield_now();
            }
        };
        std::thread::scope(|scope| {
            let touch = |page: usize| {
                let mut byte = [0];
                region.read_at(page * page_size(), &mut byte).unwrap();
                byte[0]
            };
            let made = scope.spawn(move || touch(1));
            wait_for(|stats| stats.worker_reads == 1);
            let queued = scope.spawn(move || touch(5));
            wait_for(|stats| stats.faults == 2);
            engine.settle().unwrap();
            let addr = region.as_ptr().addr() + 5 * page_size();
            engine.shared_for_tests().handler.send(Command::Unmapped { space: OWN_SPACE, addr });
            wait_for(|stats| stats.reads_cancelled == 1 && stats.adopted == 1);
            drop(opened);
            assert_eq!([made, queued].map(|toucher| toucher.join().unwrap()), [7, 7]);
        });
    }

    struct Held<F>(F);

    impl<F: Fn(u64, &mut [u8]) -> std::io::Result<()> + Send + Sync + 'static> crate::PageSource for Held<F> {
        fn read_at(&self, offset_bytes: u64, buf: &mut [u8]) -> std::io::Result<()> {
            self.0(offset_bytes, buf)
        }
    }

    /// T74: as below, where the threads that touch bring their pages themselves.
    #[test]
    fn a_panicked_handler_has_missing_pages_be_sigbus_in_thread_too() {
        let engine = Engine::builder().fault_around_pages(1).delivery(crate::Delivery::InThread).build().unwrap();
        let mut list = Kiobuf::new();
        list.map_bytes(vec![7; 3 * crate::page_size()]).unwrap();
        let vmap = engine.vmap(&list).unwrap();
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        let mut byte = [0];
        region.read_at(0, &mut byte).unwrap();
        engine.shared_for_tests().handler.send(Command::Panic);
        assert_eq!(vmap.attach(&AttachOptions::new()).unwrap_err().errno(), nix::errno::Errno::ESHUTDOWN);
        region.read_at(1, &mut byte).unwrap();
        assert_eq!(byte, [7]);
        // The kernel has this process touch the page, which it survives.
        let missing = region.as_ptr().wrapping_add(crate::page_size());
        // SAFETY: brings a page, or not.
        let touched = unsafe { libc::madvise(missing.cast(), 1, libc::MADV_POPULATE_READ) };
        assert_eq!(nix::errno::Errno::result(touched), Err(nix::errno::Errno::EFAULT));
        drop(region);
        assert_eq!(vmap.refcount().unwrap(), 0);
        engine.shutdown(Shutdown::Poison).unwrap();
    }

    /// T74: a panic of the fault-handling thread is a bug, and must be neither a zero page nor a hang: what was
    /// resident stays, a region can still be dropped and is counted, and the engine still shuts down.
    #[test]
    fn a_panicked_handler_goes_on_as_a_guard() {
        let engine = Engine::builder().fault_around_pages(1).build().unwrap();
        let mut list = Kiobuf::new();
        list.map_bytes(vec![7; 3 * crate::page_size()]).unwrap();
        let vmap = engine.vmap(&list).unwrap();
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        let mut byte = [0];
        region.read_at(0, &mut byte).unwrap();
        engine.shared_for_tests().handler.send(Command::Panic);
        let refused = vmap.attach(&AttachOptions::new()).unwrap_err();
        assert_eq!(refused.errno(), nix::errno::Errno::ESHUTDOWN);
        region.read_at(1, &mut byte).unwrap();
        assert_eq!(byte, [7]);
        // A missing page is SIGBUS now; a system call sees the same as EFAULT, which this process survives.
        let (read_end, write_end) = nix::unistd::pipe().unwrap();
        // SAFETY: the bytes are only read by the kernel, which answers EFAULT where it can't.
        let page = unsafe { std::slice::from_raw_parts(region.as_ptr().add(crate::page_size()), 1) };
        assert_eq!(nix::unistd::write(&write_end, page), Err(nix::errno::Errno::EFAULT));
        drop((read_end, region));
        assert_eq!(vmap.refcount().unwrap(), 0);
        engine.shutdown(Shutdown::Poison).unwrap();
    }

    /// T74: a panic between a fault and its answer leaves no thread asleep: its page is SIGBUS.
    #[test]
    fn a_panic_in_the_middle_of_an_answer_leaves_no_thread_asleep() {
        let engine = Engine::builder().fault_around_pages(1).build().unwrap();
        if !engine.open_way().serves_kernel_faults() {
            eprintln!("skipped, because this user may not have faults of system calls served");
            return;
        }
        let nr_pages = 4096;
        let mut list = Kiobuf::new();
        list.map_bytes(vec![7; nr_pages * crate::page_size()]).unwrap();
        let region = engine.vmap(&list).unwrap().attach(&AttachOptions::new()).unwrap();
        let asked = &engine.crew_for_tests().owner_panic;
        let (read_end, write_end) = nix::unistd::pipe().unwrap();
        asked.store(true, std::sync::atomic::Ordering::SeqCst);
        let mut refused = None;
        for page in 0..nr_pages {
            // SAFETY: the byte is read by the kernel alone, which answers EFAULT where it can't.
            let byte = unsafe { std::slice::from_raw_parts(region.as_ptr().add(page * crate::page_size()), 1) };
            match nix::unistd::write(&write_end, byte) {
                Ok(_) => assert_eq!(nix::unistd::read(&read_end, &mut [0]), Ok(1)),
                Err(errno) => {
                    refused = Some(errno);
                    break;
                }
            }
        }
        assert_eq!(refused, Some(nix::errno::Errno::EFAULT));
        assert!(!asked.load(std::sync::atomic::Ordering::SeqCst));
        drop(region);
        engine.shutdown(Shutdown::Poison).unwrap();
    }
}
