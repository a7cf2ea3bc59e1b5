//! What wakes the fault-handling thread when a read is to be tried again, or is late.
//!
//! Not the pause of its waiting: a thread that waits with a limit can't follow the one that faults.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

use nix::errno::Errno;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

use crate::process::ledger::Private;
use crate::stats::latency::Moment;

struct Timer(TimerFd);

impl AsRawFd for Timer {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

/// A timer that is set to the earliest of the moments it was told, and never put off: one that comes too early costs little.
pub(crate) struct ReadTimer {
    timer: Private<Timer>,
    set_to: Option<Moment>,
}

impl ReadTimer {
    pub(crate) fn new() -> Result<ReadTimer, Errno> {
        let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
        let timer = Private::open(|| TimerFd::new(ClockId::CLOCK_MONOTONIC, flags).map(Timer))?;
        Ok(ReadTimer { timer, set_to: None })
    }

    /// Has it ring at that moment, or before.
    pub(crate) fn wake_at(&mut self, moment: Moment) {
        if self.set_to.is_none_or(|set_to| moment < set_to) {
            let expiration = Expiration::OneShot(moment.as_timespec());
            // Neither the clock nor a time of its can be wrong.
            if self.timer.0.set(expiration, TimerSetTimeFlags::TFD_TIMER_ABSTIME).is_ok() {
                self.set_to = Some(moment);
            }
        }
    }

    /// Takes note that it has rung.
    pub(crate) fn hear(&mut self) {
        // EAGAIN: it has not.
        if self.timer.0.wait().is_ok() {
            self.set_to = None;
        }
    }
}

impl AsFd for ReadTimer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.timer.0.as_fd()
    }
}
