//! How a process reaches the engine that serves its memory: a channel in the engine's own process, a lifeline in a
//! forked child.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use super::wire::{self, Ask, Reply};
use crate::process::ledger::Private;
use crate::sys::Userfault;
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
}

impl Lifeline {
    pub(crate) fn new(socket: Arc<Private<OwnedFd>>) -> Lifeline {
        Lifeline { socket, turn: Mutex::new(()) }
    }

    /// Asks the engine and waits for the answer.
    ///
    /// # Errors
    ///
    /// [`Error::Shutdown`] when the engine is gone; what it refuses, with its errno.
    pub(crate) fn ask(&self, ask: Ask, descriptor: Option<BorrowedFd<'_>>) -> Result<(Reply, Option<OwnedFd>)> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.socket.is_intact() {
            // The application closed it: the number may be anything by now.
            return Err(Error::NotInherited {
                why: "the connection to the engine was closed by the application".into(),
            });
        }
        let socket = self.socket.as_fd();
        let answer = wire::send_ask(socket, ask, descriptor).and_then(|()| wire::receive_reply(socket));
        match answer {
            Ok(Some((Reply::Refused(errno), _))) => Err(Error::sys("the engine refused")(errno)),
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
