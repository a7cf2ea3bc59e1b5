//! What the engine's threads wait in, and the one way to wake them: epoll and an eventfd.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::process::ledger::Private;

/// An eventfd that any thread rings and one thread hears.
#[derive(Debug)]
pub(crate) struct Bell(Private<EventFd>);

impl Bell {
    pub(crate) fn new() -> Result<Bell, Errno> {
        Private::open(|| EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)).map(Bell)
    }

    /// Wakes the listener, now or at its next wait.
    pub(crate) fn ring(&self) {
        // In a forked child nobody listens, and the number may be anything. EAGAIN means that the counter is full: it
        // has been rung and not heard yet.
        if self.0.is_here() {
            let one = 1u64.to_ne_bytes();
            // By the system call: write(2) of the C library is a place where a thread can be cancelled, and one that touches rings too.
            // SAFETY: the bytes live as long as the call.
            unsafe { libc::syscall(libc::SYS_write, self.0.as_raw_fd(), one.as_ptr(), one.len()) };
        }
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

/// An epoll instance, as something with a descriptor number.
pub(crate) struct EpollFd(pub(crate) Epoll);

impl AsRawFd for EpollFd {
    fn as_raw_fd(&self) -> RawFd {
        self.0.0.as_fd().as_raw_fd()
    }
}

impl EpollFd {
    pub(crate) fn open() -> Result<Private<EpollFd>, Errno> {
        Private::open(|| Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map(EpollFd))
    }
}
