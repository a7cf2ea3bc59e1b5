//! How a process reaches the engine that serves its memory: a channel in the engine's own process, a lifeline in a
//! forked child.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use nix::errno::Errno;

use super::guard::Stopper;
use super::wire::{self, Ask, Reply};
use crate::process::ledger::Private;
use crate::process::maps;
use crate::sys::Userfault;
use crate::vmap::object::FileId;
use crate::{Error, Result};

/// What this process has of an engine.
pub(crate) enum Local {
    /// This process created the engine.
    Owner { uffd: Arc<Private<Userfault>> },
    /// This process was forked from one that the engine serves.
    Child {
        uffd: Arc<Private<Userfault>>,
        lifeline: Lifeline,
        /// The regions of which a part was to be locked if allowed, and is not in this process.
        unlocked: Vec<u64>,
    },
    /// This process was forked, but could not be connected.
    Lost { why: String },
}

/// A child's end of its socket to the engine; one question at a time.
pub(crate) struct Lifeline {
    socket: Arc<Private<OwnedFd>>,
    turn: Mutex<()>,
    /// Of an unrelated client: its guard ends with it. That of a forked child lasts as long as the process.
    guard: Option<Stopper>,
    /// The file of which nothing may be mapped when the guard ends; `None` where mappings need no guard.
    guarded: Option<FileId>,
}

impl Lifeline {
    pub(crate) fn new(socket: Arc<Private<OwnedFd>>) -> Lifeline {
        Lifeline { socket, turn: Mutex::new(()), guard: None, guarded: None }
    }

    /// Has the guard end with the connection, if nothing of a file that it guards is mapped then.
    pub(crate) fn end_with(&mut self, guard: Stopper, guarded: Option<FileId>) {
        (self.guard, self.guarded) = (Some(guard), guarded);
    }

    /// Asks the engine and waits for the answer.
    ///
    /// # Errors
    ///
    /// [`Error::Shutdown`] when the engine is gone; what it refuses, with its errno.
    pub(crate) fn ask(&self, ask: Ask, descriptor: Option<BorrowedFd<'_>>) -> Result<(Reply, Option<OwnedFd>)> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        self.ask_in_turn(ask, descriptor)
    }

    /// Asks for what a child will need: answers with the file of its areas, and its end of its lifeline.
    ///
    /// # Errors
    ///
    /// As [`ask`](Self::ask); EPROTO when a descriptor did not come along, perhaps for want of room.
    pub(crate) fn ask_fork(&self) -> Result<(OwnedFd, OwnedFd)> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let (forked, records) = self.ask_in_turn(Ask::Fork, None)?;
        let failed = Error::sys("the answer to a fork");
        if !matches!(forked, Reply::Forked) {
            return Err(failed(Errno::EPROTO));
        }
        // Also where the first came without its own: the next question's answer comes behind it.
        match (records, wire::receive_reply(self.socket.as_fd())) {
            (Some(records), Ok(Some((Reply::Lifeline, Some(lifeline))))) => Ok((records, lifeline)),
            (_, Ok(Some(_)) | Err(wire::Failed::Frame(_))) => Err(failed(Errno::EPROTO)),
            (_, Ok(None) | Err(wire::Failed::Sys(_))) => Err(Error::Shutdown),
        }
    }

    fn ask_in_turn(&self, ask: Ask, descriptor: Option<BorrowedFd<'_>>) -> Result<(Reply, Option<OwnedFd>)> {
        if !self.socket.is_intact() {
            // The application closed it: the number may be anything by now.
            return Err(Error::NotInherited {
                why: "the connection to the engine was closed by the application".into(),
            });
        }
        let socket = self.socket.as_fd();
        let sent = wire::send_ask(socket, ask, descriptor).map_err(wire::Failed::Sys);
        match sent.and_then(|()| wire::receive_reply(socket)) {
            Ok(Some((Reply::Refused(errno), _))) => Err(Error::sys("the engine refused")(Errno::from_raw(errno))),
            Ok(Some(answer)) => Ok(answer),
            // A reset or broken pipe is how the engine's end looks when it went away in the middle.
            Ok(None) | Err(_) => Err(Error::Shutdown),
        }
    }

    /// Waits for the answer to the greeting: the engine serves this process now.
    pub(crate) fn welcomed(&self) -> Result<()> {
        match wire::receive_reply(self.socket.as_fd()) {
            Ok(Some((Reply::Done, _))) => Ok(()),
            _ => Err(Error::NotInherited {
                why: "the engine is gone, or has no descriptor or memory to serve it".into(),
            }),
        }
    }

    /// Sends the greeting.
    pub(crate) fn greet(&self, hello: Ask, descriptor: Option<BorrowedFd<'_>>) -> Result<()> {
        wire::send_ask(self.socket.as_fd(), hello, descriptor).map_err(|_| Error::Shutdown)
    }
}

impl Drop for Lifeline {
    fn drop(&mut self) {
        let Some(guard) = self.guard.take() else { return };
        // In a child that was forked meanwhile there is no guard.
        if !guard.is_here() {
            return std::mem::forget(guard);
        }
        guard.hesitate();
        match self.ask(Ask::Bye, None) {
            // The engine knows only what events told: a mapping that grew in place, of which it then lost the rest, is none
            // of its areas. So the kernel is asked, too.
            Ok((Reply::Done, _)) if self.guarded.is_none_or(is_unmapped) => guard.stop(),
            // While the engine knows areas here, or nobody knows whether there are any: what is missing would be zeros.
            _ => {
                guard.stay();
                std::mem::forget(guard);
            }
        }
    }
}

/// Tells whether nothing of a file is mapped in this process, as far as that can be known.
fn is_unmapped(file: FileId) -> bool {
    let Ok(maps) = maps::open_own() else { return false };
    maps.vmas().all(|vma| vma.is_ok_and(|vma| vma.file != file))
}
