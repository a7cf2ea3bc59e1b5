//! How other threads reach the fault-handling thread and the keeper.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Arc, Weak};

use crossbeam_channel::{Receiver, Sender, TrySendError};
use nix::errno::Errno;

use super::bell::Bell;
use super::call::{self, Ticket};
use super::command::{Command, NewForeign, Post};
use super::reads::Subject;
use crate::adopt::Family;
use crate::process::ledger::Private;
use crate::publish::outsider::{Outsider, Publication};
use crate::space::SpaceId;
use crate::stats::SpaceCounters;
use crate::{Error, Result};

/// How other threads reach the fault-handling thread.
pub(crate) struct HandlerHandle {
    commands: Sender<Command>,
    /// To drop what nobody will obey any more.
    unheard: Receiver<Command>,
    bell: Arc<Bell>,
    closed: AtomicBool,
}

impl HandlerHandle {
    /// Has the thread look whether it is finished.
    pub(crate) fn nudge(&self) {
        self.bell.ring();
    }

    /// Sends a command; when the thread has ended the command is dropped, and its ticket tells the asker.
    pub(crate) fn send(&self, command: Command) {
        if self.commands.send(command).is_ok() {
            self.bell.ring();
        }
        // A command that was sent after the thread took its last look would lie there for ever. Either this finds
        // the flag, or the command was there when `close` drained.
        if self.closed.load(Ordering::SeqCst) {
            self.drop_unheard();
        }
    }

    /// Called when the thread has ended: whoever waits for an answer is told.
    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
        self.drop_unheard();
    }

    fn drop_unheard(&self) {
        self.unheard.try_iter().for_each(drop);
    }

    /// Asks and waits for the answer.
    ///
    /// # Errors
    ///
    /// [`Error::Shutdown`] when the thread has ended.
    pub(crate) fn ask<R: Send>(&self, command: impl FnOnce(Ticket<R>) -> Command) -> Result<R> {
        call::call(|ticket| self.send(command(ticket))).ok_or(Error::Shutdown)
    }
}

/// Makes the sending side of the handler's commands.
pub(crate) fn handler_handle(commands: Sender<Command>, unheard: Receiver<Command>, bell: Arc<Bell>) -> HandlerHandle {
    HandlerHandle { commands, unheard, bell, closed: AtomicBool::new(false) }
}

/// What other threads of the engine's process ask of the keeper.
#[allow(clippy::large_enum_variant, reason = "they are few, and taken out at once")]
pub(crate) enum Request {
    /// A process has handed its userfaultfd over: it is to be served, and watched by its pidfd if there is one.
    Adopt { new: NewForeign, family: Arc<Family>, pidfd: Option<OwnedFd>, reply: Ticket<Result<()>> },
    /// An adopted process is to be let go, unless it has moved memory since it had done so that many times; answers whether it was.
    Release { space: SpaceId, moves: u64, reply: Ticket<bool> },
    /// A child is about to be forked, or an unrelated process to be served, whose pidfd comes along; this is the engine's end of
    /// its lifeline.
    Nascent {
        counters: Arc<SpaceCounters>,
        lifeline: Private<OwnedFd>,
        outsider: Option<Box<(Outsider, Option<Private<OwnedFd>>)>>,
    },
    /// A vmap is published; the listening is to end with the engine.
    Published { publication: Weak<Publication> },
    /// A deref callback has run: attaches that waited for it may go on.
    RetryDeferred,
    /// Answers when every post before it is counted.
    Settle { reply: Ticket<()> },
    /// Drops a list and its vmap, whose end may run code of the application.
    Drop { _subject: Subject },
    /// Lets go of every child: their guards take over.
    DropPeers { reply: Option<Ticket<()>> },
}

/// How other threads reach the keeper.
pub(crate) struct KeeperHandle {
    requests: Sender<Request>,
    posts: Sender<Post>,
    bell: Arc<Bell>,
    /// The keeper's thread id, as a fault message names it; 0 before it runs.
    tid: AtomicI32,
}

/// The receiving side.
pub(crate) struct Inbox {
    pub(super) requests: Receiver<Request>,
    pub(super) posts: Receiver<Post>,
    pub(super) bell: Arc<Bell>,
}

/// Posts that may wait at once; more wait in the fault-handling thread.
const POSTS: usize = 1024;

/// Makes both ends of the way to the keeper.
pub(crate) fn keeper_channel() -> std::result::Result<(KeeperHandle, Inbox), Errno> {
    let bell = Arc::new(Bell::new()?);
    // Unbounded: a fork handler sends to it while it holds what the keeper may be waiting for.
    let (requests, request_inbox) = crossbeam_channel::unbounded();
    let (posts, post_inbox) = crossbeam_channel::bounded(POSTS);
    let handle = KeeperHandle { requests, posts, bell: Arc::clone(&bell), tid: AtomicI32::new(0) };
    Ok((handle, Inbox { requests: request_inbox, posts: post_inbox, bell }))
}

impl KeeperHandle {
    /// Called by the keeper: it is the current thread.
    pub(super) fn is_here(&self) {
        self.tid.store(nix::unistd::gettid().as_raw(), Ordering::Relaxed);
    }

    /// Tells whether the keeper is thread `tid` of the engine's process.
    pub(crate) fn is_thread(&self, tid: i32) -> bool {
        tid != 0 && self.tid.load(Ordering::Relaxed) == tid
    }

    /// Has the keeper look what is asked of it.
    pub(crate) fn nudge(&self) {
        self.bell.ring();
    }

    /// Sends a request; when the keeper has ended it is dropped, and its ticket tells the asker.
    pub(crate) fn send(&self, request: Request) {
        if self.requests.send(request).is_ok() {
            self.bell.ring();
        }
    }

    /// From the fault-handling thread: neither waits nor allocates; gives the post back when it does not fit.
    #[allow(clippy::result_large_err, reason = "what is refused is given back; a box would be allocated")]
    pub(crate) fn try_post(&self, post: Post) -> std::result::Result<(), Post> {
        match self.posts.try_send(post) {
            Err(TrySendError::Full(post)) => Err(post),
            // The keeper ends after this thread: nobody is left to tell.
            Err(TrySendError::Disconnected(_)) | Ok(()) => {
                self.bell.ring();
                Ok(())
            }
        }
    }
}
