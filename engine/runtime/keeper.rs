//! The keeper: knows the forked processes, answers their requests, and counts down when they end.
//!
//! It may allocate, lock and wait for the fault-handling thread; it never waits for a process, a source or a callback.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
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
use crate::fork::records::write_records;
use crate::fork::wire::{self, AREAS_PER_ANSWER, Ask, Reply};
use crate::page::{is_aligned, page_size};
use crate::process::ledger::{self, Private};
use crate::process::maps::{self, Maps};
use crate::process::pid_of;
use crate::space::table::Area;
use crate::space::{AreaRecord, OWN_SPACE, SpaceId, Target};
use crate::stats::{SpaceCounters, add};
use crate::sys::{Liveness, Userfault};
use crate::trace::tell;
use crate::vmap::core::{Caller, Notice, Opened};
use crate::{Error, Result};

const BELL_TOKEN: u64 = u64::MAX;
/// A child that closed its lifeline itself is looked at this often: nothing tells when it execs.
const ORPHAN_LOOK_MS: u16 = 100;
/// Looks at an address whose space is changing, one after the other; between more of them there is a pause.
const EAGER_LOOKS: usize = 100;
/// That pause.
const LOOK_PAUSE_MS: u16 = 1;
/// Rounds of news after which a question whether all is counted is answered, even if more news keep coming.
const SETTLING_ROUNDS: usize = 1000;

/// A forked process.
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
    /// Nothing will tell of its end: it closed its lifeline, or it exited and left its address space to a clone.
    orphan: bool,
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
    /// Who waits for everything up to now to be counted.
    settling: Vec<Ticket<()>>,
    ended: bool,
}

fn lifeline_token(space: SpaceId) -> u64 {
    space * 2
}

fn pidfd_token(space: SpaceId) -> u64 {
    space * 2 + 1
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
            settling: Vec::new(),
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
            let orphans = self.peers.values().any(|peer| peer.orphan);
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

    /// Looks an address up at which nobody waits; what is there is in the table when this returns, unless the space is
    /// changing.
    fn probe(&self, space: SpaceId, addr: usize) -> Result<Reply> {
        if is_aligned(addr)
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
        if space == OWN_SPACE {
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
                Request::Nascent { counters, lifeline } => self.admit(counters, lifeline),
                Request::RetryDeferred => self.retry_deferred(),
                subject @ Request::Drop { .. } => drop(threads::contain(&self.shared, || drop(subject))),
                Request::Settle { reply } => self.settling.push(reply),
                Request::DropPeers { reply } => {
                    let spaces: Vec<_> = self.peers.keys().copied().collect();
                    spaces.into_iter().for_each(|space| self.part_with(space));
                    if let Some(reply) = reply {
                        reply.answer(());
                    }
                }
            }
        }
    }

    /// Takes a child-to-be in.
    fn admit(&mut self, counters: Arc<SpaceCounters>, lifeline: Private<OwnedFd>) {
        let space = counters.id;
        let watched = self.epoll.0.add(&*lifeline, EpollEvent::new(EpollFlags::EPOLLIN, lifeline_token(space)));
        self.shared.spaces_push(Arc::clone(&counters));
        self.peers.insert(
            space,
            Peer {
                counters,
                lifeline: Some(lifeline),
                pidfd: None,
                masks: None,
                aside: None,
                uffd: None,
                orphan: false,
            },
        );
        if watched.is_err() || self.shared.retired.load(Ordering::SeqCst) {
            // Its end would never be noticed, or the others were let go already. It is told by its lifeline.
            self.part_with(space);
        }
    }

    /// Reads what a child says, to the end.
    fn listen(&mut self, space: SpaceId) {
        loop {
            let Some(Peer { lifeline: Some(lifeline), .. }) = self.peers.get(&space) else { return };
            // Received under the ledger's lock, so that no child is forked while a new descriptor isn't entered.
            let mut ledger = ledger::lock();
            let received = wire::receive_ask(lifeline.as_fd())
                .map(|message| message.map(|(ask, fd)| (ask, fd.map(|fd| ledger.adopt(fd)))));
            drop(ledger);
            match received {
                Ok(Some((ask, descriptor))) => self.serve(space, ask, descriptor),
                Ok(None) => return self.hung_up(space),
                Err(Errno::EAGAIN) => return,
                // Not our protocol: no such child of ours. Its guard answers its faults from now on.
                Err(_) => return self.part_with(space),
            }
        }
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
                add(&self.shared.counters.lock_downgrades, nr_unlocked);
                return self.introduce(space, pid, errno, descriptor);
            }
            Ask::Unmapped { addr } => return self.unmapped(space, addr as usize),
            Ask::Attach(record) => match self.attach(space, &record) {
                Ok(Some(reply)) => Ok((reply, None)),
                Ok(None) => {
                    self.deferred.push((space, record));
                    return;
                }
                Err(error) => Err(error),
            },
            Ask::Pieces { region } => self
                .shared
                .handler
                .ask(|reply| Command::Pieces { space, region, reply })
                .map(|pieces| (Reply::Pieces(pieces), None)),
            Ask::LookUp { addr } => self.probe(space, addr as usize).map(|reply| (reply, None)),
            Ask::Sync => self.sync().map(|()| (Reply::Done, None)),
            Ask::Refcount { vmap } => match self.shared.vmaps.find(vmap) {
                Some(core) => Ok((Reply::Count(core.refcount() as u64), None)),
                None => Err(Error::Invalid { what: "a vmap's id", value: vmap, rule: "it must exist" }),
            },
            Ask::Inherited { skip } => self.inherited(space, skip).map(|reply| (reply, None)),
            Ask::Taken { start, end } => self.cut(space, start as usize, end as usize).map(|reply| (reply, None)),
            Ask::Fork => self.fork(space, descriptor).map(|memfd| (Reply::Forked, Some(memfd))),
        };
        let (reply, descriptor) = reply.unwrap_or_else(|error| (Reply::Refused(error.errno()), None));
        self.reply(space, reply, descriptor.as_ref());
    }

    fn reply(&mut self, space: SpaceId, reply: Reply, descriptor: Option<&OwnedFd>) {
        let Some(Peer { lifeline: Some(lifeline), .. }) = self.peers.get(&space) else { return };
        if let Err(Errno::EAGAIN) = wire::send_reply(lifeline.as_fd(), reply, descriptor.map(AsFd::as_fd)) {
            // It asks and does not listen. Nobody waits for that.
            self.part_with(space);
        }
        // Any other error is its hang-up, which epoll reports.
    }

    /// Takes a child's greeting: from here on its faults are answered.
    fn introduce(&mut self, space: SpaceId, pid: i32, errno: i32, descriptor: Option<Private<OwnedFd>>) {
        let Some(peer) = self.peers.get_mut(&space) else { return };
        let known_here = peer.pidfd.as_ref().and_then(|pidfd| pid_of(pidfd.as_fd()));
        peer.counters.pid.store(known_here.unwrap_or(pid), Ordering::Relaxed);
        let complete = peer.pidfd.is_some() && (self.shared.poisons() || peer.masks.is_some());
        let (Some(uffd), true, 0) = (descriptor, complete, errno) else {
            // The child could not map its areas: it has none.
            tell!(WARN, "kiomap::process", "has no regions", engine = self.shared.id, pid = pid, errno = errno);
            return self.part_with(space);
        };
        let uffd = Arc::new(uffd.map(Userfault::from));
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

    /// Watches a child's pidfd.
    fn watch(&mut self, space: SpaceId, descriptor: Option<Private<OwnedFd>>) {
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
    fn attach(&self, space: SpaceId, record: &AreaRecord) -> Result<Option<Reply>> {
        let (start, len) = (record.start as usize, record.len as usize);
        let end = start.checked_add(len).filter(|_| len > 0 && is_aligned(start) && is_aligned(len));
        let last = record.pgoff.checked_add((len / page_size()) as u64);
        let (Some(end), Some(_)) = (end, last) else {
            return Err(Error::Invalid { what: "an area's range", value: record.start, rule: "whole pages" });
        };
        let vmap = self.shared.vmaps.find(record.vmap);
        let vmap = vmap.ok_or(Error::Invalid { what: "a vmap's id", value: record.vmap, rule: "it must exist" })?;
        let Opened::Counted { first } = vmap.try_open(Caller::Any, false)? else { return Ok(None) };
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

    fn retry_deferred(&mut self) {
        for (space, record) in std::mem::take(&mut self.deferred) {
            if !self.peers.contains_key(&space) {
                continue;
            }
            match self.attach(space, &record) {
                Ok(None) => self.deferred.push((space, record)),
                Ok(Some(reply)) => self.reply(space, reply, None),
                Err(error) => self.reply(space, Reply::Refused(error.errno()), None),
            }
        }
    }

    /// A child forks: makes the grandchild's space, and tells the child what it will have to map.
    fn fork(&mut self, parent: SpaceId, descriptor: Option<Private<OwnedFd>>) -> Result<OwnedFd> {
        let lifeline = descriptor.ok_or(Error::Invalid {
            what: "a fork's descriptors",
            value: 0,
            rule: "one lifeline must come along",
        })?;
        // The lifeline reaches this thread as a request; it is admitted before the next message is served, because
        // requests are obeyed at the bell and the grandchild greets only after this answer.
        let records = fork_space(&self.shared, parent, lifeline)?;
        self.obey_requests();
        write_records(&records)
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
            peer.lifeline = None;
            peer.orphan = true;
            self.look_after(space);
        }
    }

    /// The child has exited; a clone of it may still use its address space.
    fn exited(&mut self, space: SpaceId) {
        if let Some(Peer { pidfd: Some(pidfd), orphan, .. }) = self.peers.get_mut(&space) {
            // Its pidfd stays readable: without this, it would be reported for ever.
            let _ = self.epoll.0.delete(&**pidfd);
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
        let Some(peer) = self.peers.remove(&space) else { return };
        if let Some(lifeline) = &peer.lifeline {
            // Closing it would not be noticed where a raw clone left a copy of it.
            let _ = shutdown(lifeline.as_raw_fd(), Shutdown::Both);
        }
        self.shared.spaces_remove(space);
        if let Ok(Some(mut removed)) = self.shared.handler.ask(|reply| Command::Remove { space, reply }) {
            // Areas that ended by an event before are among the posts.
            self.count_posts();
            while let Some(area) = removed.table.pop() {
                self.close(area);
            }
            self.departed.extend(removed.uffd.take());
        }
        drop(peer);
        self.close_departed();
    }

    /// Closes the userfaultfds of departed processes that nobody is waking threads by any more: who answers faults must not
    /// come to be the one who closes.
    fn close_departed(&mut self) {
        self.departed.retain(|uffd| Arc::strong_count(uffd) > 1);
    }
}
