//! The keeper: knows the forked processes, answers their requests, and counts down when they end.
//!
//! It may allocate, lock and wait for the fault-handling thread; it never waits for a process, a source or a callback.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use nix::errno::Errno;
use nix::sys::epoll::{EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{Shutdown, shutdown};

use super::bell::EpollFd;
use super::call::Ticket;
use super::children::{fork_space, inherited_areas};
use super::command::{Changing, Command, Failed, NotCut, Post, Stray};
use super::handles::{Inbox, Request};
use super::insert::{Inserted, NewArea, insert};
use super::shared::EngineShared;
use super::strays::{Finding, find};
use super::threads;
use super::workers::Pool;
use crate::adopt::Family;
use crate::fork::new_lifeline;
use crate::fork::records::write_records;
use crate::fork::wire::{self, AREAS_PER_ANSWER, Ask, Failed as NotReceived, Reply};
use crate::page::{is_aligned, page_size};
use crate::process::ledger::{self, Private};
use crate::process::maps::{self, Maps};
use crate::process::pid_of;
use crate::publish::outsider::{Misdeed, Outsider, Publication, ReadOnlyRegion};
use crate::publish::{discard_of, tell_shed};
use crate::space::foreign::is_foreign;
use crate::space::stripes::is_own;
use crate::space::table::Area;
use crate::space::{AreaRecord, Pieces, Space, SpaceId, Target};
use crate::stats::{SpaceCounters, add};
use crate::sys::{Features, Liveness, Userfault};
use crate::trace::tell;
use crate::vmap::core::{Caller, Notice, Opened, VmapCore};
use crate::{Error, Result};

mod adopted;

const BELL_TOKEN: u64 = u64::MAX;
/// A child that closed its lifeline itself is looked at this often: nothing tells when it execs.
const ORPHAN_LOOK_MS: u16 = 100;
/// Looks at an address whose space is changing, one after the other; between more of them there is a pause.
const EAGER_LOOKS: usize = 100;
/// That pause.
const LOOK_PAUSE_MS: u16 = 1;
/// Rounds of news after which a question whether all is counted is answered, even if more news keep coming.
const SETTLING_ROUNDS: usize = 1000;
/// Messages of a process that is not trusted that are heard before others are.
const HEARD_AT_ONCE: usize = 16;

/// A forked process, or an adopted one.
struct Peer {
    counters: Arc<SpaceCounters>,
    /// `None` when the child closed it itself but lives.
    lifeline: Option<Private<OwnedFd>>,
    /// Watched beside the lifeline; it comes before the greeting.
    pidfd: Option<Private<OwnedFd>>,
    /// Comes before the greeting too, from a child that masks pages.
    masks: Option<Arc<Private<OwnedFd>>>,
    /// The same, where there are minor faults.
    aside: Option<Arc<Private<Userfault>>>,
    /// From its greeting.
    uffd: Option<Arc<Private<Userfault>>>,
    /// Nothing will tell of its end: it closed its lifeline, it exited and left its address space to a clone, or it is an adopted
    /// process without a pidfd.
    orphan: bool,
    /// It is not trusted.
    outsider: Option<Box<Outsider>>,
    /// Of an adopted process: itself, and those that were forked from it.
    family: Option<Arc<Family>>,
}

impl Peer {
    /// One of which nothing is known yet but its counters.
    fn new(counters: Arc<SpaceCounters>) -> Peer {
        Peer {
            counters,
            lifeline: None,
            pidfd: None,
            masks: None,
            aside: None,
            uffd: None,
            orphan: false,
            outsider: None,
            family: None,
        }
    }

    /// Tells whether it is still to greet, within a certain time.
    fn is_awaited(&self) -> bool {
        self.uffd.is_none() && self.outsider.as_ref().is_some_and(|outsider| outsider.due.is_some())
    }

    /// Tells whether a message may be acted on.
    fn check(&self, ask: &Ask, descriptor: Option<&OwnedFd>) -> std::result::Result<(), Misdeed> {
        let Some(outsider) = &self.outsider else { return Ok(()) };
        outsider.check(ask, descriptor, self.uffd.is_some(), self.counters.areas.load(Ordering::Relaxed))
    }
}

/// Takes the userfaultfd of a process that is not trusted.
fn distrusted(uffd: Private<Userfault>, features: Features) -> std::result::Result<Private<Userfault>, Misdeed> {
    let mut checked = Ok(());
    let uffd = uffd.map(|mut uffd| {
        checked = uffd.distrust();
        uffd
    });
    checked.map_err(Misdeed::Userfault)?;
    match uffd.features().map_err(Misdeed::Userfault)? {
        theirs if theirs == features => Ok(uffd),
        theirs => Err(Misdeed::Features(theirs)),
    }
}

/// The keeper's state.
pub(crate) struct Keeper {
    shared: Arc<EngineShared>,
    inbox: Inbox,
    notices: Sender<Notice>,
    pool: Pool,
    epoll: Private<EpollFd>,
    peers: HashMap<SpaceId, Peer>,
    /// Attaches of children that wait for a callback.
    deferred: Vec<(SpaceId, AreaRecord)>,
    /// Addresses to be looked up again, because their space was changing.
    later: Vec<Stray>,
    /// Userfaultfds of departed processes by which somebody may be waking a thread.
    departed: Vec<Arc<Private<Userfault>>>,
    /// Counters that the fault-handling thread is to get for children of adopted processes.
    spares_owed: usize,
    /// Who waits for everything up to now to be counted.
    settling: Vec<Ticket<()>>,
    /// What listens for unrelated processes.
    publications: Vec<Weak<Publication>>,
    ended: bool,
}

fn lifeline_token(space: SpaceId) -> u64 {
    space * 2
}

fn pidfd_token(space: SpaceId) -> u64 {
    space * 2 + 1
}

/// Watches a descriptor no more. Closing it would not do: what it stands for may be open elsewhere too, in the process that sent
/// it, and would be reported for ever.
fn ignore(epoll: &EpollFd, fd: &Private<OwnedFd>) {
    let _ = epoll.0.delete(&**fd);
}

impl Keeper {
    pub(crate) fn new(shared: Arc<EngineShared>, inbox: Inbox, notices: Sender<Notice>, pool: Pool) -> Result<Keeper> {
        let epoll = EpollFd::open().map_err(Error::sys("epoll_create1 for the keeper"))?;
        epoll
            .0
            .add(&*inbox.bell, EpollEvent::new(EpollFlags::EPOLLIN, BELL_TOKEN))
            .map_err(Error::sys("epoll_ctl for the keeper's bell"))?;
        Ok(Keeper {
            shared,
            inbox,
            notices,
            pool,
            epoll,
            peers: HashMap::new(),
            deferred: Vec::new(),
            later: Vec::new(),
            departed: Vec::new(),
            spares_owed: 0,
            settling: Vec::new(),
            publications: Vec::new(),
            ended: false,
        })
    }

    /// What starts workers.
    pub(crate) fn pool(&self) -> &Pool {
        &self.pool
    }

    /// Keeps until the fault-handling thread has ended.
    pub(crate) fn run(&mut self) {
        self.shared.keeper.is_here();
        // After a panic: what it was woken for still waits.
        self.inbox.bell.ring();
        let mut looked = Instant::now();
        while !self.ended {
            let orphans = self.peers.values().any(|peer| peer.orphan || peer.is_awaited());
            self.attend(match (self.later.is_empty(), orphans) {
                (false, _) => EpollTimeout::from(LOOK_PAUSE_MS),
                (true, true) => EpollTimeout::from(ORPHAN_LOOK_MS),
                (true, false) => EpollTimeout::NONE,
            });
            if self.shared.is_child() {
                // What was dropped here forked and returned in the child.
                threads::end_child();
            }
            if orphans && looked.elapsed() >= Duration::from_millis(ORPHAN_LOOK_MS.into()) {
                looked = Instant::now();
                self.shed_silent();
                let orphans: Vec<_> =
                    self.peers.iter().filter(|(_, peer)| peer.orphan).map(|(&space, _)| space).collect();
                orphans.into_iter().for_each(|space| self.look_after(space));
            }
            for stray in std::mem::take(&mut self.later) {
                self.look_up(stray);
            }
            self.close_departed();
            // An area that could not be told yet is counted first.
            if !self.settling.is_empty() && self.later.is_empty() {
                // What the kernel had to report when the question came is reported by now.
                for _ in 0..SETTLING_ROUNDS {
                    if self.attend(EpollTimeout::ZERO) == 0 {
                        break;
                    }
                }
                self.count_posts();
                // What was looked up for that.
                let _ = self.shared.handler.ask(|reply| Command::Barrier { reply });
                if self.later.is_empty() {
                    self.settling.drain(..).for_each(|reply| reply.answer(()));
                }
            }
        }
        let _ = self.notices.send(Notice::End);
    }

    /// Waits for news and attends to it; answers how many there were.
    fn attend(&mut self, pause: EpollTimeout) -> usize {
        let mut ready = [EpollEvent::empty(); 32];
        let woken = self.epoll.0.wait(&mut ready, pause).unwrap_or(0);
        for event in &ready[..woken] {
            match event.data() {
                BELL_TOKEN => {
                    self.inbox.bell.hear();
                    self.start_worker();
                    self.count_posts();
                    self.obey_requests();
                }
                token if token % 2 == 0 => self.listen(token / 2),
                token => self.exited(token / 2),
            }
        }
        woken
    }

    /// Starts one more worker, if it is asked for.
    fn start_worker(&self) {
        if self.pool.roll.take_call()
            && let Err(_error) = self.pool.start(&self.shared)
        {
            tell!(WARN, "kiomap::source", "no more workers", engine = self.shared.id, why = _error.to_string());
        }
    }

    /// Counts what the fault-handling thread saw end.
    fn count_posts(&mut self) {
        while let Ok(post) = self.inbox.posts.try_recv() {
            match post {
                Post::Closed(area) => self.close(area),
                Post::Gone(space) => self.look_after(space),
                Post::Stray(stray) => self.look_up(stray),
                // If something is, the thread asks again when it is told of an unmap.
                Post::Failed(failed) => self.note_failed(failed),
                Post::Born { parent, counters, uffd } => self.take_born(parent, counters, uffd),
                Post::Fatal { space, addr } => self.kill(space, addr),
                Post::Empty if self.shared.vmaps.is_any_mapped() => {}
                Post::Empty => self.shared.handler.send(Command::End),
                Post::HandlerEnded => self.ended = true,
            }
        }
    }

    /// Notes that pages could not be read, and has it reported.
    fn note_failed(&self, Failed { vmap, pages, why, tries }: Failed) {
        vmap.failures.note(pages.clone());
        tell!(
            WARN,
            "kiomap::source",
            "given up",
            engine = self.shared.id,
            vmap = vmap.id,
            page = pages.start,
            nr_pages = pages.end - pages.start,
            tries = tries,
            why = format!("{why:?}")
        );
        match vmap.failures.report(pages, &why, tries) {
            Some(report) => drop(self.notices.send(Notice::Failed(vmap, report))),
            None => drop(threads::contain(&self.shared, || drop(vmap))),
        }
    }

    /// Counts an area down. What its list keeps alive may end with it, by code of the application: a panic of that must
    /// not keep others from being counted.
    fn close(&self, area: Area<Target>) {
        area.target.vmap.close(1);
        threads::contain(&self.shared, || drop(area));
    }

    /// Tells whether a process is not trusted. Its files in `/proc` are not read: it can have that wait for as long as it likes, by
    /// an exec that takes its time.
    fn is_outsider(&self, space: SpaceId) -> bool {
        self.peers.get(&space).is_some_and(|peer| peer.outsider.is_some())
    }

    /// Looks an address up at which nobody waits; what is there is in the table when this returns, unless the space is
    /// changing.
    fn probe(&self, space: SpaceId, addr: usize) -> Result<Reply> {
        if is_aligned(addr)
            && !self.is_outsider(space)
            && let Some(lookup) = self.shared.handler.ask(|reply| Command::Probe { space, addr, reply })?
            && let Err(Changing) = self.tell(Stray { space, addr, lookup })?
        {
            // It is asked again.
            let finding = Finding::Nothing;
            let _ = self.shared.handler.ask(|reply| Command::Found { lookup, finding, reply })?;
            return Ok(Reply::Later);
        }
        Ok(Reply::Done)
    }

    /// Tells the fault-handling thread that a page of a child was unmapped, unless it was attached anew since: that is
    /// entered by this thread, before it can be touched.
    fn unmapped(&self, space: SpaceId, addr: usize) {
        let is_ours = matches!(self.find(space, addr), Finding::Vmap(_) | Finding::Hidden(_));
        if is_aligned(addr) && !is_ours {
            self.shared.handler.send(Command::Unmapped { space, addr });
        }
    }

    /// Looks an address up, now or later.
    fn look_up(&mut self, stray: Stray) {
        for _ in 0..EAGER_LOOKS {
            let Ok(Err(Changing)) = self.tell(stray) else { return };
            // The thread that changes it needs the processor to finish.
            std::thread::yield_now();
        }
        self.later.push(stray);
    }

    /// Looks an address up, and tells the fault-handling thread.
    fn tell(&self, Stray { space, addr, lookup }: Stray) -> Result<std::result::Result<(), Changing>> {
        let finding = self.find(space, addr);
        tell!(
            DEBUG,
            "kiomap::stray",
            "looked up",
            engine = self.shared.id,
            space = space,
            addr = addr,
            finding = format!("{finding:?}")
        );
        self.shared.handler.ask(|reply| Command::Found { lookup, finding, reply })
    }

    /// Looks an address up in the kernel's own table of a process.
    fn find(&self, space: SpaceId, addr: usize) -> Finding {
        if self.is_outsider(space) {
            return Finding::Foreign;
        }
        // What can't be opened belongs to another user, or there is no descriptor left: nobody knows what it is.
        let Some(maps) = self.open_maps(space, maps::open_own, maps::open) else { return Finding::Foreign };
        let details = || self.open_maps(space, maps::open_own_details, maps::open_details);
        find(&maps, addr, |file| self.shared.vmaps.owner_of(file), details)
    }

    fn open_maps(
        &self,
        space: SpaceId,
        own: impl FnOnce() -> io::Result<Maps>,
        of: impl FnOnce(libc::pid_t) -> io::Result<Maps>,
    ) -> Option<Maps> {
        if is_own(space) {
            return own().ok();
        }
        let pidfd = self.peers.get(&space)?.pidfd.as_ref()?;
        let pid = pid_of(pidfd.as_fd())?;
        let maps = of(pid).ok()?;
        // It still is: the number was not another process's meanwhile.
        (pid_of(pidfd.as_fd())? == pid).then_some(maps)
    }

    fn obey_requests(&mut self) {
        while let Ok(request) = self.inbox.requests.try_recv() {
            match request {
                Request::Nascent { counters, lifeline, outsider } => self.admit(counters, lifeline, outsider),
                Request::Published { publication } => self.enter_publication(publication),
                Request::RetryDeferred => self.retry_deferred(),
                subject @ Request::Drop { .. } => drop(threads::contain(&self.shared, || drop(subject))),
                Request::Settle { reply } => self.settling.push(reply),
                Request::Adopt { new, family, pidfd, reply } => reply.answer(self.adopt(new, family, pidfd)),
                Request::Release { space, moves, reply } => reply.answer(self.release(space, moves)),
                Request::DropPeers { reply } => {
                    self.publications.drain(..).filter_map(|one| one.upgrade()).for_each(|one| one.stop());
                    // No guard is in adopted processes: the fault-handling thread goes on to answer them.
                    let spaces: Vec<_> = self.peers.keys().copied().filter(|&space| !is_foreign(space)).collect();
                    spaces.into_iter().for_each(|space| self.part_with(space));
                    if let Some(reply) = reply {
                        reply.answer(());
                    }
                }
            }
        }
    }

    /// Notes that a publication is to end with the engine.
    fn enter_publication(&mut self, publication: Weak<Publication>) {
        self.publications.retain(|one| one.strong_count() > 0);
        if !self.shared.retired.load(Ordering::SeqCst) {
            self.publications.push(publication);
        } else if let Some(publication) = publication.upgrade() {
            publication.stop();
        }
    }

    /// Takes a child-to-be in, or an unrelated process.
    fn admit(
        &mut self,
        counters: Arc<SpaceCounters>,
        lifeline: Private<OwnedFd>,
        outsider: Option<Box<(Outsider, Option<Private<OwnedFd>>)>>,
    ) {
        let space = counters.id;
        let watched = self.epoll.0.add(&*lifeline, EpollEvent::new(EpollFlags::EPOLLIN, lifeline_token(space)));
        self.shared.spaces_push(Arc::clone(&counters));
        let (outsider, pidfd) = outsider.map_or((None, None), |both| (Some(Box::new(both.0)), both.1));
        self.peers.insert(space, Peer { lifeline: Some(lifeline), outsider, ..Peer::new(counters) });
        if pidfd.is_some() {
            self.watch(space, pidfd);
        }
        if watched.is_err() || self.shared.retired.load(Ordering::SeqCst) {
            // Its end would never be noticed, or the others were let go already. It is told by its lifeline.
            self.part_with(space);
        }
    }

    /// Reads what a process says, to the end; of one that is not trusted, some of it.
    fn listen(&mut self, space: SpaceId) {
        for heard in 0.. {
            let Some(peer @ Peer { lifeline: Some(lifeline), outsider, .. }) = self.peers.get(&space) else { return };
            if outsider.is_some() && heard == HEARD_AT_ONCE {
                return;
            }
            // Received under the ledger's lock, so that no child is forked while a new descriptor isn't entered.
            let mut ledger = ledger::lock();
            let received = match wire::receive_ask(lifeline.as_fd()) {
                Ok(Some((ask, descriptor))) => match peer.check(&ask, descriptor.as_ref()) {
                    Ok(()) => Ok(Some((ask, descriptor.map(|fd| ledger.adopt(fd))))),
                    Err(misdeed) => {
                        if let Some(descriptor) = descriptor {
                            discard_of(descriptor, outsider.as_ref().map(|outsider| Arc::clone(&outsider.place)));
                        }
                        Err(misdeed)
                    }
                },
                Ok(None) => Ok(None),
                Err(NotReceived::Sys(Errno::EAGAIN)) => return,
                Err(NotReceived::Sys(_)) => Ok(None),
                Err(NotReceived::Frame(fault)) => Err(fault.into()),
            };
            drop(ledger);
            match received {
                Ok(Some((ask, descriptor))) => self.serve(space, ask, descriptor),
                Ok(None) => return self.hung_up(space),
                // Not our protocol: no such child of ours. Its guard answers its faults from now on.
                Err(misdeed) => return self.shed(space, misdeed),
            }
        }
    }

    /// Cuts a process off, and tells why if it is an unrelated one.
    fn shed(&mut self, space: SpaceId, misdeed: Misdeed) {
        if let Some(Peer { outsider: Some(outsider), counters, .. }) = self.peers.get(&space) {
            let pid = counters.pid.load(Ordering::Relaxed);
            tell_shed(&self.shared, outsider.place.publication.vmap, pid, misdeed);
        }
        self.part_with(space);
    }

    /// Cuts off who was to greet by now.
    fn shed_silent(&mut self) {
        let now = Instant::now();
        let is_late = |peer: &Peer| {
            peer.is_awaited()
                && peer.outsider.as_ref().is_some_and(|outsider| outsider.due.is_some_and(|due| due <= now))
        };
        let late: Vec<_> = self.peers.iter().filter(|(_, peer)| is_late(peer)).map(|(&space, _)| space).collect();
        late.into_iter().for_each(|space| self.shed(space, Misdeed::Silent));
    }

    fn serve(&mut self, space: SpaceId, ask: Ask, descriptor: Option<Private<OwnedFd>>) {
        let reply = match ask {
            Ask::Watch => return self.watch(space, descriptor),
            Ask::Masks => {
                if let Some(peer) = self.peers.get_mut(&space) {
                    peer.masks = descriptor.map(Arc::new);
                }
                return;
            }
            Ask::Aside => {
                if let Some(peer) = self.peers.get_mut(&space) {
                    peer.aside = descriptor.map(|fd| Arc::new(fd.map(Userfault::from)));
                }
                return;
            }
            Ask::Hello { pid, errno, nr_unlocked } => {
                let areas = self.peers.get(&space).map_or(0, |peer| peer.counters.areas.load(Ordering::Relaxed));
                add(&self.shared.counters.lock_downgrades, nr_unlocked.min(areas));
                return self.introduce(space, pid, errno, descriptor);
            }
            Ask::Unmapped { addr } => return self.unmapped(space, addr as usize),
            Ask::Attach(record) => match self.attach(space, &record) {
                Ok(Some(reply)) => Ok(reply),
                Ok(None) => return self.defer(space, record),
                Err(error) => Err(error),
            },
            Ask::Pieces { region } if self.is_read_only(space) => Ok(self.read_only_pieces(space, region)),
            Ask::Detached { region } => {
                self.detach_read_only(space, region);
                Ok(Reply::Done)
            }
            Ask::Bye => match self.is_empty(space) {
                Ok(true) => {
                    self.reply(space, Reply::Done, None);
                    return self.part_with(space);
                }
                Ok(false) => Err(Error::sys("the end of a connection")(Errno::EBUSY)),
                Err(error) => Err(error),
            },
            Ask::Pieces { region } => {
                self.shared.handler.ask(|reply| Command::Pieces { space, region, reply }).map(Reply::Pieces)
            }
            Ask::LookUp { addr } => self.probe(space, addr as usize),
            Ask::Sync => self.sync().map(|()| Reply::Done),
            Ask::Refcount { vmap } => match self.shared.vmaps.find(vmap) {
                Some(core) => Ok(Reply::Count(core.refcount() as u64)),
                None => Err(Error::Invalid { what: "a vmap's id", value: vmap, rule: "it must exist" }),
            },
            Ask::Inherited { skip } => self.inherited(space, skip),
            Ask::Taken { start, end } => self.cut(space, start as usize, end as usize),
            Ask::Fork => match self.fork(space) {
                Ok((memfd, lifeline)) => {
                    self.reply(space, Reply::Forked, Some(memfd.as_fd()));
                    return self.reply(space, Reply::Lifeline, Some(lifeline.as_fd()));
                }
                Err(error) => Err(error),
            },
        };
        let reply = reply.unwrap_or_else(|error| Reply::Refused(error.errno() as i32));
        self.reply(space, reply, None);
    }

    fn reply(&mut self, space: SpaceId, reply: Reply, descriptor: Option<BorrowedFd<'_>>) {
        let Some(Peer { lifeline: Some(lifeline), .. }) = self.peers.get(&space) else { return };
        if let Err(Errno::EAGAIN) = wire::send_reply(lifeline.as_fd(), reply, descriptor) {
            // It asks and does not listen. Nobody waits for that.
            self.shed(space, Misdeed::Deaf);
        }
        // Any other error is its hang-up, which epoll reports.
    }

    /// Takes a child's greeting: from here on its faults are answered.
    fn introduce(&mut self, space: SpaceId, pid: i32, errno: i32, descriptor: Option<Private<OwnedFd>>) {
        let Some(peer) = self.peers.get_mut(&space) else { return };
        let known_here = peer.pidfd.as_ref().and_then(|pidfd| pid_of(pidfd.as_fd()));
        peer.counters.pid.store(known_here.unwrap_or(pid), Ordering::Relaxed);
        let complete = peer.pidfd.is_some() && (self.shared.poisons() || peer.masks.is_some());
        if !complete && errno == 0 && peer.outsider.is_some() {
            return self.shed(space, Misdeed::Untimely);
        }
        let (Some(uffd), true, 0) = (descriptor, complete, errno) else {
            // The child could not map its areas: it has none.
            tell!(WARN, "kiomap::process", "has no regions", engine = self.shared.id, pid = pid, errno = errno);
            return self.part_with(space);
        };
        let uffd = uffd.map(Userfault::from);
        let uffd = match &peer.outsider {
            None => uffd,
            Some(_) => match distrusted(uffd, self.shared.child_features()) {
                Ok(uffd) => uffd,
                Err(misdeed) => return self.shed(space, misdeed),
            },
        };
        let uffd = Arc::new(uffd);
        let (masks, aside) = (peer.masks.clone(), peer.aside.clone());
        let handed_over = uffd.set_nonblocking_cloexec().and_then(|()| {
            let uffd = Arc::clone(&uffd);
            let adopted = self.shared.handler.ask(|reply| Command::Adopt { space, uffd, masks, aside, reply });
            adopted.unwrap_or(Err(Errno::ESHUTDOWN))
        });
        match handed_over {
            Ok(()) => {
                tell!(DEBUG, "kiomap::process", "is served", engine = self.shared.id, pid = pid);
                peer.uffd = Some(uffd);
                self.reply(space, Reply::Done, None);
            }
            Err(_) => self.part_with(space),
        }
    }

    /// Watches a child's pidfd. It has one: a second would take the place of one that is watched.
    fn watch(&mut self, space: SpaceId, descriptor: Option<Private<OwnedFd>>) {
        if self.peers.get(&space).is_some_and(|peer| peer.pidfd.is_some()) {
            return self.shed(space, Misdeed::Untimely);
        }
        let (Some(peer), Some(pidfd)) = (self.peers.get_mut(&space), descriptor) else { return };
        let watched = self.epoll.0.add(&*pidfd, EpollEvent::new(EpollFlags::EPOLLIN, pidfd_token(space)));
        // Without it the greeting is refused.
        peer.pidfd = watched.is_ok().then_some(pidfd);
    }

    /// Counts everything that the fault-handling thread has read by now.
    fn sync(&mut self) -> Result<()> {
        loop {
            let all_posted = self.shared.handler.ask(|reply| Command::Barrier { reply })?;
            // Makes room for the posts that found none.
            self.count_posts();
            if all_posted {
                return Ok(());
            }
        }
    }

    /// Attaches an area that a child has mapped; `None` when a callback must run before. A child whose address space is
    /// changing is told to ask again: to wait for it here would be to let all others wait.
    fn attach(&mut self, space: SpaceId, record: &AreaRecord) -> Result<Option<Reply>> {
        let (start, len) = (record.start as usize, record.len as usize);
        let end = start.checked_add(len).filter(|_| len > 0 && is_aligned(start) && is_aligned(len));
        let last = record.pgoff.checked_add((len / page_size()) as u64);
        let (Some(end), Some(_)) = (end, last) else {
            return Err(Error::Invalid { what: "an area's range", value: record.start, rule: "whole pages" });
        };
        let vmap = self.shared.vmaps.find(record.vmap);
        let vmap = vmap.ok_or(Error::Invalid { what: "a vmap's id", value: record.vmap, rule: "it must exist" })?;
        if vmap.page().is_huge() {
            let size = vmap.page().bytes() as u64;
            if [record.start, record.len].iter().any(|value| !value.is_multiple_of(size)) {
                return Err(Error::Misaligned { what: "an area's range", value: record.start, multiple: size });
            }
            vmap.page().check_multiple("pgoff", record.pgoff, page_size())?;
        }
        let Opened::Counted { first } = vmap.try_open(Caller::Any, false)? else { return Ok(None) };
        if self.is_read_only(space) {
            if first {
                vmap.transition_done();
            }
            return Ok(Some(self.attach_read_only(space, record, vmap, first)));
        }
        let inherit = record.flags & AreaRecord::INHERIT != 0;
        let area =
            NewArea { start, end, pgoff: record.pgoff, region: record.region, writable: record.is_writable(), inherit };
        let inserted = insert(&self.shared, space, &vmap, area);
        if !matches!(inserted, Ok(Inserted::Served)) {
            vmap.take_back(first);
        }
        if first {
            // Only this thread puts attaches off, and it did not meanwhile.
            vmap.transition_done();
        }
        if matches!(inserted, Ok(Inserted::Served)) && record.flags & AreaRecord::UNLOCKED != 0 {
            add(&self.shared.counters.lock_downgrades, 1);
        }
        inserted.map(|inserted| match inserted {
            Inserted::Served => Some(Reply::Attached { first }),
            Inserted::Later => Some(Reply::Later),
        })
    }

    /// Puts an attach off until a callback has run.
    fn defer(&mut self, space: SpaceId, record: AreaRecord) {
        if let Some(Peer { outsider: Some(outsider), .. }) = self.peers.get_mut(&space) {
            outsider.is_waiting = true;
        }
        self.deferred.push((space, record));
    }

    /// Tells whether a process may read only: its regions are mapped without the engine.
    fn is_read_only(&self, space: SpaceId) -> bool {
        let outsider = self.peers.get(&space).and_then(|peer| peer.outsider.as_ref());
        outsider.is_some_and(|outsider| outsider.read_only)
    }

    /// Enters a region of a process that may read only, which was counted.
    fn attach_read_only(&mut self, space: SpaceId, record: &AreaRecord, vmap: Arc<VmapCore>, first: bool) -> Reply {
        let range = (record.start as usize, (record.start + record.len) as usize);
        if let Some(Peer { outsider: Some(outsider), .. }) = self.peers.get_mut(&space)
            && let Some(before) = outsider.regions.insert(record.region, ReadOnlyRegion { range, vmap })
        {
            before.vmap.close(1);
        }
        Reply::Attached { first }
    }

    fn read_only_pieces(&self, space: SpaceId, region: u64) -> Reply {
        let outsider = self.peers.get(&space).and_then(|peer| peer.outsider.as_ref());
        let mut pieces = Pieces::default();
        if let Some(ReadOnlyRegion { range, .. }) = outsider.and_then(|outsider| outsider.regions.get(&region)) {
            pieces.push(range.0, range.1);
        }
        Reply::Pieces(pieces)
    }

    fn detach_read_only(&mut self, space: SpaceId, region: u64) {
        if let Some(Peer { outsider: Some(outsider), .. }) = self.peers.get_mut(&space)
            && let Some(ReadOnlyRegion { vmap, .. }) = outsider.regions.remove(&region)
        {
            vmap.close(1);
            threads::contain(&self.shared, || drop(vmap));
        }
    }

    /// Tells whether a process has no area.
    fn is_empty(&mut self, space: SpaceId) -> Result<bool> {
        self.sync()?;
        let Some(peer) = self.peers.get(&space) else { return Ok(true) };
        let regions = peer.outsider.as_ref().map_or(0, |outsider| outsider.regions.len());
        Ok(regions == 0 && peer.counters.areas.load(Ordering::Relaxed) == 0)
    }

    fn retry_deferred(&mut self) {
        for (space, record) in std::mem::take(&mut self.deferred) {
            let Some(peer) = self.peers.get_mut(&space) else { continue };
            if let Some(outsider) = &mut peer.outsider {
                outsider.is_waiting = false;
            }
            match self.attach(space, &record) {
                Ok(None) => self.defer(space, record),
                Ok(Some(reply)) => self.reply(space, reply, None),
                Err(error) => self.reply(space, Reply::Refused(error.errno() as i32), None),
            }
        }
    }

    /// A child forks: makes the grandchild's space, and tells the child what it will have to map.
    /// Answers with the file of that, and the grandchild's end of its lifeline.
    fn fork(&mut self, parent: SpaceId) -> Result<(OwnedFd, Private<OwnedFd>)> {
        let (lifeline, child_end) = {
            // No child that is forked meanwhile has either: it would hide the hang-up.
            let mut ledger = ledger::lock();
            let (engine_end, child_end) = new_lifeline()?;
            (ledger.adopt(engine_end), ledger.adopt(child_end))
        };
        // The lifeline reaches this thread as a request; it is admitted before the next message is served, because
        // requests are obeyed at the bell and the grandchild greets only after this answer.
        let outsider = match self.peers.get(&parent).and_then(|peer| peer.outsider.as_ref()) {
            Some(outsider) => {
                let counters = self.shared.new_space_counters();
                let place = outsider.place.admit_forked(&counters);
                let place = place.ok_or(Error::sys("a place for one more process")(Errno::EAGAIN))?;
                Some((counters, outsider.forked(place)))
            }
            None => None,
        };
        let records = fork_space(&self.shared, parent, lifeline, outsider)?;
        self.obey_requests();
        Ok((write_records(&records)?, child_end))
    }

    /// Tells a child some of the areas that a child of it would inherit.
    fn inherited(&self, space: SpaceId, skip: u64) -> Result<Reply> {
        let records = inherited_areas(&self.shared, space, skip as usize, AREAS_PER_ANSWER)?;
        Ok(Reply::Areas(std::array::from_fn(|n| records.get(n).copied())))
    }

    /// A child that was just forked can't have a range of its areas.
    fn cut(&mut self, space: SpaceId, start: usize, end: usize) -> Result<Reply> {
        match self.shared.handler.ask(|reply| Command::Cut { space, start, end, reply })? {
            Ok(()) => {
                // It asks for the count next, perhaps.
                self.sync()?;
                Ok(Reply::Done)
            }
            Err(NotCut::Changing) => Ok(Reply::Later),
            Err(NotCut::Refused(errno)) => Err(Error::sys("taking a range out of a child's areas")(errno)),
        }
    }

    /// The child's end of the lifeline is closed: it exited, was killed, called exec, never came to be, or closed a
    /// descriptor that it did not know.
    fn hung_up(&mut self, space: SpaceId) {
        if let Some(peer) = self.peers.get_mut(&space) {
            if let Some(lifeline) = peer.lifeline.take() {
                ignore(&self.epoll, &lifeline);
            }
            peer.orphan = true;
            self.look_after(space);
        }
    }

    /// The child has exited; a clone of it may still use its address space.
    fn exited(&mut self, space: SpaceId) {
        if let Some(Peer { pidfd: Some(pidfd), orphan, .. }) = self.peers.get_mut(&space) {
            // Its pidfd stays readable: without this, it would be reported for ever.
            ignore(&self.epoll, pidfd);
            *orphan = true;
            self.look_after(space);
        }
    }

    /// Parts with a child if its address space is gone; ESRCH is the proof.
    fn look_after(&mut self, space: SpaceId) {
        let Some(peer) = self.peers.get(&space) else { return };
        let gone = match &peer.uffd {
            Some(uffd) => uffd.liveness() == Liveness::Gone,
            // It never mapped anything, or told nobody.
            None => peer.orphan,
        };
        if gone {
            add(&self.shared.counters.processes_gone, 1);
            tell!(
                DEBUG,
                "kiomap::process",
                "is gone",
                engine = self.shared.id,
                pid = peer.counters.pid.load(Ordering::Relaxed)
            );
            self.part_with(space);
        }
    }

    /// Forgets a child: its areas are counted down, and closing its lifeline sets its guard to work if it lives.
    fn part_with(&mut self, space: SpaceId) {
        if is_foreign(space) {
            // Its children are of its family as long as it is known, and their forks are read.
            let _ = self.sync();
        }
        if !self.peers.contains_key(&space) {
            return;
        }
        let removed = self.shared.handler.ask(|reply| Command::Remove { space, reply });
        self.forget(space, removed.ok().flatten());
    }

    /// Forgets a process whose space was taken out: what it had is counted down.
    fn forget(&mut self, space: SpaceId, removed: Option<Space>) {
        let Some(mut peer) = self.peers.remove(&space) else { return };
        if let Some(lifeline) = &peer.lifeline {
            // Closing it would not be noticed where a raw clone left a copy of it.
            let _ = shutdown(lifeline.as_raw_fd(), Shutdown::Both);
            ignore(&self.epoll, lifeline);
        }
        if let Some(pidfd) = &peer.pidfd {
            ignore(&self.epoll, pidfd);
        }
        self.shared.spaces_remove(space);
        for (_, ReadOnlyRegion { vmap, .. }) in peer.outsider.iter_mut().flat_map(|outsider| outsider.regions.drain()) {
            vmap.close(1);
            threads::contain(&self.shared, || drop(vmap));
        }
        if let Some(mut removed) = removed {
            // Areas that ended by an event before are among the posts.
            self.count_posts();
            while let Some(area) = removed.table.pop() {
                self.close(area);
            }
            self.departed.extend(removed.uffd.take());
        }
        let family = peer.family.clone();
        drop(peer);
        self.close_departed();
        if let Some(family) = family {
            family.leave(space);
        }
    }

    /// Closes the userfaultfds of departed processes that nobody is waking threads by any more: who answers faults must not
    /// come to be the one who closes.
    fn close_departed(&mut self) {
        self.departed.retain(|uffd| Arc::strong_count(uffd) > 1);
    }
}
