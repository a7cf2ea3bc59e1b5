//! The fault-handling thread: reads userfaultfds, applies events, answers faults.
//!
//! It is the only reader of each userfaultfd and the only writer of each area table. Between reading a fault and
//! waking the thread that touched, it allocates nothing, takes no lock and logs nothing: another thread may hold the
//! allocator's lock, or any other, while it waits for this one.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crossbeam_channel::{Receiver, Sender};
use memmap2::MmapMut;
use nix::errno::Errno;
use nix::sys::epoll::{EpollEvent, EpollFlags, EpollTimeout};

use super::bell::{Bell, EpollFd};
use super::command::{Changing, Command, Forked, NotCut, NotEntered, Post, ReadBuffer, ReadDone, ReadJob};
use super::fault::Fault;
use super::handles::KeeperHandle;
use super::resolve::{Answer, Resolver};
use super::shared::EngineShared;
use super::strays::{Finding, Held, Lookup, LookupId, Strays, adopt};
use super::workers::WorkerIds;
use crate::page::{is_aligned, page_floor, page_size};
use crate::process::ledger::Private;
use crate::space::mmap_vec::MmapVec;
use crate::space::table::{Area, AreaTable, Change};
use crate::space::{AreaRecord, OWN_SPACE, Pieces, Space, SpaceId, Target};
use crate::stats::{SpaceCounters, add};
use crate::sys::{FaultKind, Liveness, Message, MsgBuffer, Userfault};
use crate::{Error, Result};

/// Messages read by one system call.
const MESSAGES_PER_READ: usize = 64;
/// Faults held at once; a thread whose fault finds no place is woken and faults again.
const FAULTS_HELD: usize = 1024;
/// Retries of parked faults without a pause; afterwards the pause doubles from 1 ms to [`LONGEST_PAUSE_MS`].
const EAGER_RETRIES: u32 = 8;
const LONGEST_PAUSE_MS: u16 = 8;
/// The bell's token in epoll; spaces use their ids.
const BELL_TOKEN: u64 = u64::MAX;

/// Everything that the thread works with; made before it starts, so that it allocates nothing.
pub(crate) struct Handler {
    shared: Arc<EngineShared>,
    keeper: Arc<KeeperHandle>,
    spaces: MmapVec<Space>,
    epoll: Private<EpollFd>,
    bell: Arc<Bell>,
    commands: Receiver<Command>,
    messages: MsgBuffer,
    /// Faults read and not answered yet.
    pending: MmapVec<Fault>,
    /// Faults to be tried again: the address space is changing, or a resource is not free.
    parked: MmapVec<Fault>,
    strays: Strays,
    /// Posts that found the keeper's channel full.
    unsent: MmapVec<Post>,
    resolver: Resolver,
    done: Receiver<ReadDone>,
    retired: bool,
    ending: Ending,
    /// Regions of the own process that are being dropped.
    leavers: usize,
    idle_rounds: u32,
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
    pub(crate) jobs: Sender<ReadJob>,
    pub(crate) done: Receiver<ReadDone>,
    pub(crate) workers: WorkerIds,
    pub(crate) fault_around_pages: usize,
    pub(crate) read_buffers: usize,
}

impl Handler {
    pub(crate) fn new(parts: Parts) -> Result<Handler> {
        let no_memory = Error::sys("mmap for the fault-handling thread");
        let epoll = EpollFd::open().map_err(Error::sys("epoll_create1 for the fault-handling thread"))?;
        let readable = |token| EpollEvent::new(EpollFlags::EPOLLIN, token);
        epoll.0.add(&*parts.bell, readable(BELL_TOKEN)).map_err(Error::sys("epoll_ctl for the command bell"))?;
        epoll.0.add(&**parts.uffd, readable(OWN_SPACE)).map_err(Error::sys("epoll_ctl for a userfaultfd"))?;
        let window_bytes = parts.fault_around_pages * page_size();
        let anonymous = |bytes| MmapMut::map_anon(bytes).map_err(Error::io("mmap of a read buffer"));
        let mut buffers = MmapVec::new();
        buffers.try_reserve(parts.read_buffers).map_err(&no_memory)?;
        for _ in 0..parts.read_buffers {
            buffers.try_push(ReadBuffer(anonymous(window_bytes)?)).map_err(|(_, errno)| no_memory(errno))?;
        }
        let mut spaces = MmapVec::new();
        let own = Space {
            id: OWN_SPACE,
            parent: OWN_SPACE,
            uffd: Some(parts.uffd),
            masks: None,
            table: AreaTable::new(),
            counters: parts.counters,
        };
        spaces.try_push(own).map_err(|(_, errno)| no_memory(errno))?;
        let held = || -> Result<MmapVec<Fault>> {
            let mut faults = MmapVec::new();
            faults.try_reserve(FAULTS_HELD).map_err(&no_memory)?;
            Ok(faults)
        };
        Ok(Handler {
            resolver: Resolver::new(
                Arc::clone(&parts.shared),
                anonymous(window_bytes)?,
                buffers,
                parts.jobs,
                parts.workers,
                parts.fault_around_pages,
                parts.read_buffers,
            )
            .map_err(&no_memory)?,
            pending: held()?,
            parked: held()?,
            strays: Strays::new().map_err(&no_memory)?,
            shared: parts.shared,
            keeper: parts.keeper,
            spaces,
            epoll,
            bell: parts.bell,
            commands: parts.commands,
            messages: MsgBuffer::new(MESSAGES_PER_READ),
            unsent: MmapVec::new(),
            done: parts.done,
            retired: false,
            ending: Ending::No,
            leavers: 0,
            idle_rounds: 0,
        })
    }

    /// Serves until retired and empty.
    pub(crate) fn run(&mut self) {
        let mut ready = [EpollEvent::empty(); 32];
        loop {
            // EINTR can't come, as the thread blocks every signal, but a debugger may stop it: wait again.
            let pause = self.pause();
            let woken = self.epoll.0.wait(&mut ready, pause).unwrap_or(0);
            let mut rung = false;
            for event in &ready[..woken] {
                match event.data() {
                    BELL_TOKEN => rung = true,
                    space => self.read_space(space),
                }
            }
            // Events were applied while reading; only now are faults answered, by the table as it is.
            self.answer_pending();
            if rung {
                self.bell.hear();
                self.install_finished_reads();
            }
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

    /// Continues after a panic: every fault is answered by SIGBUS from now on.
    pub(crate) fn retire(&mut self) {
        self.retired = true;
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

    fn index_of(&self, space: SpaceId) -> Option<usize> {
        self.spaces.binary_search_by_key(&space, |space| space.id).ok()
    }

    /// Reads what a space has to say: applies events at once, holds faults back.
    fn read_space(&mut self, id: SpaceId) {
        let Some(index) = self.index_of(id) else { return };
        loop {
            // Each message may split an area. Without room for that, its event must not be read: the thread that
            // unmaps then waits, and nothing is lost.
            let table = &mut self.spaces[index].table;
            let most_areas = table.len() + 4 * MESSAGES_PER_READ;
            if table.try_reserve(4 * MESSAGES_PER_READ).is_err() || self.unsent.try_reserve(most_areas).is_err() {
                // epoll goes on to report it: give others the processor, perhaps one of them frees some.
                std::thread::yield_now();
                return;
            }
            if self.pending.len() + MESSAGES_PER_READ > FAULTS_HELD {
                return;
            }
            let Handler { spaces, messages, pending, parked, strays, unsent, shared, keeper, resolver, ending, .. } =
                self;
            let space = &mut spaces[index];
            let Some(uffd) = space.uffd.clone() else { return };
            let read = uffd.read(messages, |message| match message {
                Message::Fault { addr, write, kind: FaultKind::Missing, tid } => {
                    add(&shared.counters.faults, 1);
                    add(&shared.counters.write_faults, write.into());
                    space.counters.faults.fetch_add(1, Ordering::Relaxed);
                    let fault = Fault { space: id, addr: page_floor(addr), tid, retries: 0, starved: 0, alone: false };
                    // One answer is for all that wait for the page, except that a worker may be refused.
                    if resolver.is_worker(&fault)
                        || !pending.iter().any(|held| held.space == id && held.addr == fault.addr)
                    {
                        // There is room: checked above.
                        let _ = pending.try_push(fault);
                    }
                }
                event => {
                    let gone = match event {
                        Message::Unmap { start, end } => start..end,
                        Message::Remap { from, len, .. } => from..from + len,
                        _ => 0..0,
                    };
                    // What the event does not say: whether the old range is left, and where the new one ends.
                    let beside = match event {
                        Message::Remap { from, to, len } => Some([from, to + len]),
                        _ => None,
                    };
                    apply_event(shared, space, &uffd, event, unsent);
                    // Their threads were woken. Answered later, they might meet another region at the address.
                    for faults in [&mut *pending, &mut *parked] {
                        faults.drain_where(|fault| fault.space == id && gone.contains(&fault.addr), drop);
                    }
                    strays.unmapped(id, &gone);
                    // Perhaps it was of what is in no table.
                    *ending = Ending::No;
                    if let Some(beside) = beside {
                        for addr in beside {
                            // Without place or room: when it is touched.
                            if let Held::New(lookup) = strays.probe(id, addr)
                                && keeper.try_post(Post::Stray { space: id, addr, lookup }).is_err()
                            {
                                strays.take(lookup);
                            }
                        }
                    }
                }
            });
            match read {
                Ok(0) | Err(_) => return,
                Ok(n) => {
                    add(&self.shared.counters.reads, 1);
                    if n < MESSAGES_PER_READ {
                        return;
                    }
                }
            }
        }
    }

    fn answer_pending(&mut self) {
        // Answered in the order of reading.
        for index in 0..self.pending.len() {
            let fault = self.pending[index];
            self.answer(fault);
        }
        self.pending.clear();
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
            Answer::Done => {}
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
                } else if self.parked.len() < FAULTS_HELD {
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
        }
    }

    /// Has the keeper look a stray's address up; its thread sleeps until then.
    fn look_up(&mut self, fault: Fault) {
        let Fault { space, addr, .. } = fault;
        match self.strays.hold(fault) {
            // A worker must not wait as another thread would, perhaps for a worker: it faults again until the answer is there.
            Held::Known(_) if self.resolver.is_worker(&fault) => {}
            Held::Known(_) => return,
            Held::New(lookup) if self.keeper.try_post(Post::Stray { space, addr, lookup }).is_ok() => return,
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
    fn found(&mut self, lookup: LookupId, finding: &Finding) {
        let Some(Lookup { space: id, addr, fault, untouched, .. }) = self.strays.take(lookup) else { return };
        let Some(index) = self.index_of(id) else { return };
        let space = &mut self.spaces[index];
        let known = match finding {
            // An event that came meanwhile told of it.
            _ if space.table.find(addr).is_some() => Ok(true),
            Finding::Vmap(shown) => adopt(space, addr, shown, &untouched).inspect(|&adopted| {
                space.counters.areas.store(space.table.len() as u64, Ordering::Relaxed);
                add(&self.shared.counters.adopted, adopted.into());
            }),
            Finding::Nothing => Err(Errno::ENOENT),
            Finding::Foreign => Ok(false),
        };
        let (Some(fault), space) = (fault, &self.spaces[index]) else { return };
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
    }

    /// Does what the event of a page's unmap would have done, which the kernel did not report.
    /// Answers `false` for want of memory.
    fn unmapped_unseen(&mut self, space: SpaceId, addr: usize) -> bool {
        let Some(index) = self.index_of(space) else { return true };
        let Handler { spaces, unsent, shared, .. } = self;
        let space = &mut spaces[index];
        let Some(uffd) = space.uffd.clone() else { return true };
        if space.table.try_reserve(1).is_err() || unsent.try_reserve(1).is_err() {
            return false;
        }
        let event = Message::Unmap { start: addr, end: addr + page_size() };
        apply_event(shared, space, &uffd, event, unsent);
        true
    }

    fn retry_parked(&mut self) {
        for _ in 0..self.parked.len() {
            // From the front; what has to wait again goes to the back.
            let fault = self.parked.remove(0);
            self.answer(fault);
        }
    }

    /// Answers the faults that wait for a worker, whose source may never come back, or for the keeper.
    fn abandon_waits(&mut self) {
        while let Some(fault) = self.resolver.abandon_read().or_else(|| self.strays.pop()) {
            self.answer(fault);
        }
    }

    fn install_finished_reads(&mut self) {
        while let Ok(ReadDone { order, outcome }) = self.done.try_recv() {
            match self.index_of(order.space) {
                Some(index) if !self.retired => {
                    let (fault, answer) = self.resolver.finish_read(&self.spaces[index], order, outcome);
                    self.follow(fault, answer);
                }
                _ => {
                    let fault = order.fault();
                    self.resolver.discard(order);
                    self.answer(fault);
                }
            }
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
        while let Ok(command) = self.commands.try_recv() {
            self.obey(command);
        }
    }

    /// Tells whether nothing is left to guard or to report.
    fn is_empty(&self) -> bool {
        self.leavers == 0
            && !self.shared.is_attaching()
            && self.spaces.iter().all(|space| space.table.is_empty())
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
                if let Some(index) = self.index_of(space) {
                    for area in self.spaces[index].table.pieces_of(region) {
                        pieces.push(area.start, area.end);
                    }
                }
                reply.answer(pieces);
            }
            Command::Leave { region, reply } => {
                self.leavers += 1;
                let table = self.index_of(OWN_SPACE).map(|index| &mut self.spaces[index].table);
                reply.answer(table.map_or(0, |table| table.mark_leaving(region)));
            }
            Command::Left => self.leavers -= 1,
            Command::Overlap { start, end, reply } => {
                let own = self.index_of(OWN_SPACE).map(|index| &self.spaces[index]);
                let mut areas = own.into_iter().flat_map(|own| own.table.overlapping(start, end));
                let hit = areas.next().map(|area| area.start.max(start));
                // As for a new area: the one that was hit may have ended, and the addresses be somebody else's.
                let unsure = hit.is_some() && own.is_some_and(is_changing);
                reply.answer(if unsure { Err(Changing) } else { Ok(hit) });
            }
            Command::Fork { parent, child, mut records, reply } => {
                let outcome = self.fork(parent, child, &mut records);
                reply.answer(Forked { records, outcome });
            }
            Command::Inherited { parent, skip, most, mut records, reply } => {
                let table = self.index_of(parent).map(|index| &self.spaces[index].table);
                let mut wanted = table.into_iter().flat_map(inherited).skip(skip).take(most);
                let outcome = wanted.try_for_each(|area| records.try_push(AreaRecord::of(area)));
                reply.answer(Forked { records, outcome: outcome.map_err(|(_, errno)| errno) });
            }
            Command::Cut { space, start, end, reply } => reply.answer(self.cut(space, start, end)),
            Command::Adopt { space, uffd, masks, reply } => {
                let outcome = match self.index_of(space) {
                    Some(index) => {
                        let added = self.epoll.0.add(&**uffd, EpollEvent::new(EpollFlags::EPOLLIN, space));
                        if added.is_ok() {
                            self.spaces[index].uffd = Some(uffd);
                            self.spaces[index].masks = masks;
                        }
                        added
                    }
                    None => Err(Errno::ESRCH),
                };
                reply.answer(outcome);
            }
            Command::Remove { space, reply } => reply.answer(self.remove(space)),
            Command::SetList { vmap, contents, reply } => {
                let targets =
                    self.spaces.iter_mut().flat_map(|space| space.table.iter_mut()).map(|area| &mut area.target);
                for target in targets.filter(|target| target.vmap.id == vmap) {
                    if target.generation < contents.generation {
                        // The asker keeps both lists alive until it is answered: nothing is freed here.
                        target.list = contents.list.clone();
                        target.window = contents.window.clone();
                        target.generation = contents.generation;
                    }
                }
                drop(contents);
                reply.answer(());
            }
            Command::View { mut view, reply } => {
                let outcome = self.spaces.iter().try_for_each(|space| view.add(space));
                reply.answer((view, outcome));
            }
            Command::Probe { space, addr, reply } => {
                let known = self.index_of(space).is_none_or(|index| self.spaces[index].table.find(addr).is_some());
                let held = if known { Held::NoPlace } else { self.strays.probe(space, addr) };
                reply.answer(match held {
                    Held::New(lookup) | Held::Known(lookup) => Some(lookup),
                    Held::NoPlace => None,
                });
            }
            Command::Found { lookup, finding, reply } => {
                self.found(lookup, &finding);
                if let Some(reply) = reply {
                    reply.answer(());
                }
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
            Command::End => self.ending = Ending::Allowed,
            #[cfg(test)]
            Command::Panic => panic!("asked to"),
        }
    }

    fn insert(&mut self, space: SpaceId, area: Area<Target>) -> std::result::Result<(), NotEntered> {
        let Some(index) = self.index_of(space).filter(|_| !self.retired) else { return Err(NotEntered::Ended(area)) };
        let space = &mut self.spaces[index];
        // The kernel gives addresses up first and reports it then. Until every report is read, one of them may be of
        // the very addresses that the new area has by now, and would be taken for its end.
        if is_changing(space) {
            return Err(NotEntered::Changing(area));
        }
        space.table.insert(area).map_err(NotEntered::Table)?;
        space.counters.areas.store(space.table.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    /// Makes the space of a child: every area that it inherits, counted from now on.
    fn fork(
        &mut self,
        parent_id: SpaceId,
        child: Arc<SpaceCounters>,
        records: &mut MmapVec<AreaRecord>,
    ) -> std::result::Result<(), Errno> {
        let index = self.index_of(parent_id).filter(|_| !self.retired).ok_or(Errno::ESHUTDOWN)?;
        let mut table = AreaTable::new();
        self.spaces.try_reserve(1)?;
        let parent = &self.spaces[index].table;
        let nr_areas = inherited(parent).count();
        records.try_reserve(nr_areas)?;
        table.try_reserve(nr_areas)?;
        for area in inherited(parent) {
            records.try_push(AreaRecord::of(area)).map_err(|(_, errno)| errno)?;
            table.insert(area.clone()).map_err(|_| Errno::ENOMEM)?;
        }
        for area in table.iter() {
            area.target.vmap.open_again();
        }
        child.areas.store(nr_areas as u64, Ordering::Relaxed);
        let space = Space { id: child.id, parent: parent_id, uffd: None, masks: None, table, counters: child };
        let at = self.spaces.partition_point(|other| other.id < space.id);
        self.spaces.try_insert(at, space).map_err(|(_, errno)| errno)
    }

    /// Takes a range out of a child's areas, as an unmap of it would.
    fn cut(&mut self, child: SpaceId, start: usize, end: usize) -> std::result::Result<(), NotCut> {
        let refused = |errno| Err(NotCut::Refused(errno));
        let Some(index) = self.index_of(child) else { return refused(Errno::ESRCH) };
        let Some(parent) = self.index_of(self.spaces[index].parent) else { return refused(Errno::ESRCH) };
        if self.spaces[index].uffd.is_some() || !is_aligned(start) || !is_aligned(end) {
            return refused(Errno::EINVAL);
        }
        let parent = &self.spaces[parent];
        let has = |area: &Area<Target>| {
            let (from, to) = (area.start.max(start), area.end.min(end));
            parent.table.overlapping(from, to).any(|other| other.region == area.region)
        };
        if self.spaces[index].table.overlapping(start, end).any(has) {
            // The parent may have lost it before the fork, by an event that is not read yet.
            return if is_changing(parent) { Err(NotCut::Changing) } else { refused(Errno::EEXIST) };
        }
        let Handler { spaces, unsent, .. } = self;
        let space = &mut spaces[index];
        unsent.try_reserve(space.table.len() + 1).map_err(NotCut::Refused)?;
        space.table.unmap(start, end, |change| note(change, unsent)).map_err(NotCut::Refused)?;
        space.counters.areas.store(space.table.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    fn remove(&mut self, space: SpaceId) -> Option<Space> {
        let index = self.index_of(space)?;
        let removed = self.spaces.remove(index);
        if let Some(uffd) = &removed.uffd {
            let _ = self.epoll.0.delete(&***uffd);
        }
        for faults in [&mut self.pending, &mut self.parked] {
            faults.drain_where(|fault| fault.space == space, drop);
        }
        self.strays.forget(space);
        Some(removed)
    }
}

/// The areas that a child inherits.
fn inherited(table: &AreaTable<Target>) -> impl Iterator<Item = &Area<Target>> {
    table.iter().filter(|area| area.target.inherit && !area.leaving)
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

/// Applies an event of the kernel to a space's table, and tells the keeper what ended.
fn apply_event(shared: &EngineShared, space: &mut Space, uffd: &Userfault, event: Message, unsent: &mut MmapVec<Post>) {
    add(&shared.counters.events, 1);
    // Room for both kinds of change was reserved before the event was read, so the table can't refuse.
    let change = |change| note(change, unsent);
    match event {
        Message::Unmap { start, end } => {
            let _ = space.table.unmap(start, end, change);
            // A thread that waits for a page of a range that is gone sleeps until it is woken; then it gets SIGSEGV.
            let _ = uffd.wake(start, end - start);
            add(&shared.counters.wakes, 1);
        }
        Message::Remap { from, to, len } => {
            let _ = space.table.remap(from, to, len, change);
            let _ = uffd.wake(from, len);
            add(&shared.counters.wakes, 1);
        }
        // The pages are gone, or only their mappings; the next touch asks the list again.
        Message::Remove { .. } => {}
        // Not asked for: spaces are registered for missing pages, without fork events. Its descriptor is closed here.
        Message::Fork(_) | Message::Fault { .. } => {}
    }
    space.counters.areas.store(space.table.len() as u64, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use crate::runtime::command::Command;
    use crate::{AttachOptions, Engine, Kiobuf, Shutdown};

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
}
