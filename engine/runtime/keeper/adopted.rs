//! The keeper's side of adopted processes: it takes them in, and those that they fork.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use nix::errno::Errno;
use nix::sys::epoll::{EpollEvent, EpollFlags};
use nix::sys::signal::Signal;

use super::{Keeper, Peer, pidfd_token};
use crate::adopt::{self, Family, Refusal};
use crate::page::{page_floor, page_size};
use crate::process::{ledger, pid_of, signal_by};
use crate::runtime::command::{Command, NewForeign};
use crate::space::SpaceId;
use crate::stats::SpaceCounters;
use crate::sys::{Message, MsgBuffer, Userfault};
use crate::trace::tell;
use crate::{Error, Result};

impl Keeper {
    /// Takes an adopted process in, all or nothing.
    pub(super) fn adopt(&mut self, new: NewForeign, family: Arc<Family>, pidfd: Option<OwnedFd>) -> Result<()> {
        let (space, counters) = (new.space.id, Arc::clone(&new.space.counters));
        if let Some(uffd) = &new.space.uffd
            && self.peers.values().filter_map(|peer| peer.uffd.as_ref()).any(|other| other.is_same_as(uffd))
        {
            // Each would get a part of what it says.
            return Err(Error::Invalid {
                what: "the descriptor of the userfaultfd",
                value: uffd.as_raw_fd() as u64,
                rule: "it must not be served already",
            });
        }
        let pidfd = match pidfd {
            Some(pidfd) => {
                let pid = pid_of(pidfd.as_fd()).ok_or(Error::Invalid {
                    what: "the descriptor of the process",
                    value: pidfd.as_raw_fd() as u64,
                    rule: "it must be a pidfd of a process that lives and can be seen from here",
                })?;
                counters.pid.store(pid, Ordering::Relaxed);
                Some(ledger::lock().adopt(pidfd))
            }
            None => None,
        };
        if let Some(pidfd) = &pidfd {
            if new.space.foreign.as_ref().is_some_and(|foreign| foreign.refusal == Refusal::Kill) {
                signal_by(pidfd.as_fd(), None).map_err(Error::sys("pidfd_send_signal to the process"))?;
            }
            let event = EpollEvent::new(EpollFlags::EPOLLIN, pidfd_token(space));
            self.epoll.0.add(&**pidfd, event).map_err(Error::sys("epoll_ctl for a pidfd"))?;
        }
        let uffd = new.space.uffd.clone();
        // An orphan: nothing tells of an exec.
        let peer =
            Peer { pidfd, uffd, orphan: true, family: Some(Arc::clone(&family)), ..Peer::new(Arc::clone(&counters)) };
        // Known before it is served: what is said of it is then of somebody.
        self.peers.insert(space, peer);
        match self.shared.handler.ask(|reply| Command::TakeForeign { new, reply }) {
            Ok(Ok(())) => {}
            refused => {
                self.peers.remove(&space);
                return Err(match refused {
                    Ok(Err((_, errno))) if errno != Errno::ESHUTDOWN => {
                        Error::sys("epoll_ctl for a userfaultfd")(errno)
                    }
                    _ => Error::Shutdown,
                });
            }
        }
        self.shared.spaces_push(Arc::clone(&counters));
        tell!(
            DEBUG,
            "kiomap::process",
            "is adopted",
            engine = self.shared.id,
            pid = counters.pid.load(Ordering::Relaxed)
        );
        family.enter(counters);
        Ok(())
    }

    /// Takes in a child of an adopted process, which waits for its first page perhaps.
    pub(super) fn take_born(&mut self, parent: SpaceId, counters: Arc<SpaceCounters>, uffd: Userfault) {
        let space = counters.id;
        let family = self.peers.get(&parent).and_then(|peer| peer.family.clone());
        let uffd = Arc::new(ledger::lock().adopt(uffd));
        let served = uffd.set_nonblocking_cloexec().and_then(|()| {
            let uffd = Arc::clone(&uffd);
            let adopted =
                self.shared.handler.ask(|reply| Command::Adopt { space, uffd, masks: None, aside: None, reply });
            adopted.unwrap_or(Err(Errno::ESHUTDOWN))
        });
        // For the one that was used, and those for which there was no memory.
        self.spares_owed += 1;
        if let Ok(spares) = adopt::spares(&self.shared, self.spares_owed) {
            self.spares_owed = 0;
            self.shared.handler.send(Command::Spares { spares });
        }
        if let Some(family) = &family {
            family.enter(Arc::clone(&counters));
        }
        self.shared.spaces_push(Arc::clone(&counters));
        let peer = Peer { uffd: Some(uffd), orphan: true, family, ..Peer::new(counters) };
        self.peers.insert(space, peer);
        if served.is_err() {
            // It can't be listened to. Kept open, its userfaultfd does not turn what is missing into zeros.
            tell!(WARN, "kiomap::process", "can't be served", engine = self.shared.id, space = space);
        }
    }

    /// Ends an adopted process for the page at an address, which can't be had.
    pub(super) fn kill(&self, space: SpaceId, addr: usize) {
        if let Some(Peer { pidfd: Some(pidfd), counters: _counters, .. }) = self.peers.get(&space) {
            tell!(
                WARN,
                "kiomap::process",
                "is killed",
                engine = self.shared.id,
                pid = _counters.pid.load(Ordering::Relaxed)
            );
            if signal_by(pidfd.as_fd(), Some(Signal::SIGKILL)).is_ok() {
                return;
            }
        }
        // It is not to be killed: by want of permission, or somebody else has its memory too.
        self.shared.handler.send(Command::Spare { space, addr });
    }

    /// Lets an adopted process go whose pages were attended to when it had moved memory that many times; answers whether it is
    /// gone. From here on it has its memory to itself.
    pub(in crate::runtime) fn release(&mut self, space: SpaceId, moves: u64) -> bool {
        // Its children are of its family as long as it is known, and their forks are read.
        let _ = self.sync();
        if !self.peers.contains_key(&space) {
            return true;
        }
        let Ok(Some(removed)) = self.shared.handler.ask(|reply| Command::Release { space, moves, reply }) else {
            return false;
        };
        if let Some(uffd) = &removed.uffd {
            let ranges: Vec<_> = removed.table.iter().map(|area| (area.start, area.len_bytes())).collect();
            let_go(uffd, &ranges);
        }
        self.forget(space, Some(removed));
        true
    }
}

/// Ends the registration of memory, of which nothing is missing any more, and what was said of it before. The process may keep
/// its descriptor: it would wait for an answer for ever.
fn let_go(uffd: &Userfault, ranges: &[(usize, usize)]) {
    for &(start, len) in ranges {
        // Where it was unmapped there is nothing to end.
        let _ = uffd.unregister(start, len);
    }
    let mut messages = MsgBuffer::new(16);
    let mut children = Vec::new();
    let each = |children: &mut Vec<Userfault>, message| match message {
        Message::Fault { addr, .. } => drop(uffd.wake(page_floor(addr), page_size())),
        Message::Fork(child) => children.push(child),
        // It took its registration along.
        Message::Remap { to, len, .. } => drop(uffd.unregister(to, len)),
        Message::Unmap { .. } | Message::Remove { .. } => {}
    };
    while uffd.read(&mut messages, |message| each(&mut children, message)).is_ok_and(|read| read > 0) {}
    children.iter().for_each(|child| let_go(child, ranges));
}
