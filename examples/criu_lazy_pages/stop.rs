//! Being asked to stop, by SIGHUP, SIGINT or SIGTERM: looked at wherever the program waits.
//!
//! The signals are blocked from the start, so that none ends the program while tasks depend on it: their missing pages would
//! silently be zeros from then on.

use std::os::fd::{AsFd, BorrowedFd};

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

/// Knows whether the program was asked to stop.
pub(crate) struct Stop(SignalFd);

impl Stop {
    /// Blocks the signals, in threads that are started from here on too.
    pub(crate) fn install() -> Result<Stop> {
        let signals: SigSet = [Signal::SIGHUP, Signal::SIGINT, Signal::SIGTERM].into_iter().collect();
        signals.thread_block().context("blocking signals")?;
        let fd = SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK);
        Ok(Stop(fd.context("making a descriptor of signals")?))
    }

    /// Fails if the program was asked to stop.
    pub(crate) fn check(&self) -> Result<()> {
        ensure!(!self.is_asked()?, "asked to stop");
        Ok(())
    }

    /// Whether it was; once it was, this stays so.
    pub(crate) fn is_asked(&self) -> Result<bool> {
        let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::ZERO) {
            Ok(ready) => Ok(ready > 0),
            Err(Errno::EINTR) => Ok(false),
            Err(errno) => Err(errno).context("looking for signals"),
        }
    }

    /// Waits until something can be read, or taken; fails if the program is asked to stop.
    pub(crate) fn wait_readable(&self, fd: BorrowedFd<'_>) -> Result<()> {
        loop {
            let mut fds = [PollFd::new(fd, PollFlags::POLLIN), PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) if fds[1].any() == Some(true) => bail!("asked to stop"),
                Ok(_) | Err(Errno::EINTR) if fds[0].any() != Some(true) => {}
                Ok(_) => return Ok(()),
                Err(errno) => return Err(errno).context("waiting for the socket"),
            }
        }
    }
}
