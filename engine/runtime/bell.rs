//! The one way to wake a thread that waits in `epoll_wait`: an eventfd.

use std::os::fd::{AsFd, BorrowedFd};

use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::fork::ledger::Private;

/// An eventfd that any thread rings and one thread hears.
#[derive(Debug)]
pub(crate) struct Bell(Private<EventFd>);

impl Bell {
    pub(crate) fn new() -> Result<Bell, Errno> {
        Private::open(|| EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)).map(Bell)
    }

    /// Wakes the listener, now or at its next wait.
    pub(crate) fn ring(&self) {
        // EAGAIN means that the counter is full: it has been rung and not heard yet.
        let _ = self.0.write(1);
    }

    /// Takes note of every ring so far.
    pub(crate) fn hear(&self) {
        // EAGAIN means that nobody has rung.
        let _ = self.0.read();
    }
}

impl AsFd for Bell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
