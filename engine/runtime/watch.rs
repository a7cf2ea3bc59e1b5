//! The thread that takes the fault-handling thread out of SCHED_IDLE when it makes no progress there.

use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicI64, AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::timerfd::{ClockId as TimerClock, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use nix::unistd::{Pid, gettid};

use super::bell::EpollFd;
use crate::process::ledger::Private;
use crate::sys::clock::now_ns;

/// How long the handler may go without a step.
const PATIENCE: Duration = Duration::from_millis(5);
/// After so long, in nanoseconds, the handler says anew that it makes steps.
const NEWS_NS: i64 = 2_000_000;
/// Steps without a look at the clock.
const STEPS_PER_LOOK: u32 = 8;

/// The handler follows nobody.
const ASLEEP: u32 = 0;
/// It follows, in SCHED_IDLE.
const AWAKE: u32 = 1;
/// It is being taken out.
const TAKING: u32 = 2;
/// It has ended.
const ENDED: u32 = 3;

/// What the handler and its watch share.
///
/// The watch sleeps as long as the handler goes on putting its alarm off: were it to wake now and then to look, each
/// sleep of it would have the scheduler look for something to run on its processor, and take the thread that is followed.
pub(crate) struct Watch {
    state: AtomicU32,
    /// Wakes the watch.
    alarm: Private<Alarm>,
    /// When the handler put it off.
    put_off_ns: AtomicI64,
    /// Counts the handler's steps; odd while it works.
    steps: AtomicU32,
    /// The watch took it out, and it has not noticed yet.
    taken: AtomicBool,
    handler: AtomicI32,
    /// The process had CAP_SYS_NICE when it was tried whether SCHED_IDLE can be left.
    privileged: AtomicBool,
    anywhere: OnceLock<CpuSet>,
    /// What the handler waits in: readable if there is something to do.
    waits_in: Arc<Private<EpollFd>>,
}

struct Alarm(TimerFd);

impl AsRawFd for Alarm {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

impl Watch {
    /// Makes one for a handler.
    pub(super) fn new(waits_in: Arc<Private<EpollFd>>) -> Result<Watch, Errno> {
        let alarm = || TimerFd::new(TimerClock::CLOCK_MONOTONIC, TimerFlags::TFD_CLOEXEC).map(Alarm);
        Ok(Watch {
            state: AtomicU32::new(ASLEEP),
            alarm: Private::open(alarm)?,
            put_off_ns: AtomicI64::new(0),
            steps: AtomicU32::new(0),
            taken: AtomicBool::new(false),
            handler: AtomicI32::new(0),
            privileged: AtomicBool::new(false),
            anywhere: OnceLock::new(),
            waits_in,
        })
    }

    /// The current thread is the handler, and `anywhere` is where it may run.
    pub(super) fn enter(&self, anywhere: CpuSet) {
        let _ = self.anywhere.set(anywhere);
        self.handler.store(gettid().as_raw(), Ordering::Relaxed);
    }

    /// Tells whether a thread of the engine that steps back could be taken out again: a process that gave up its privileges
    /// could not.
    pub(super) fn may_begin(&self) -> bool {
        has_sys_nice() == self.privileged.load(Ordering::Relaxed)
    }

    /// Lets the handler step back behind the thread on whose processor it is; answers whether it may.
    pub(super) fn begin(&self) -> bool {
        if !self.may_begin() {
            return false;
        }
        // A take-out of before may not have ended.
        self.become_state(ASLEEP);
        self.taken.store(false, Ordering::Relaxed);
        self.steps.store(self.steps.load(Ordering::Relaxed) | 1, Ordering::Relaxed);
        // Without an alarm it would be alone; one of before, that goes off now, finds that it was put off.
        let begun = self.put_off() && {
            self.state.store(AWAKE, Ordering::Release);
            set_policy(0, libc::SCHED_IDLE).is_ok()
        };
        if !begun {
            self.end();
        }
        begun
    }

    /// The handler stops following; answers when the watch touches it no more.
    pub(super) fn end(&self) {
        self.become_state(ASLEEP);
        let _ = self.alarm.0.unset();
    }

    /// The handler ends.
    pub(super) fn leave(&self) {
        self.become_state(ENDED);
        let _ = self.set_alarm(Duration::from_nanos(1));
    }

    fn become_state(&self, to: u32) {
        let change = |from| (from != TAKING).then_some(to);
        while self.state.fetch_update(Ordering::AcqRel, Ordering::Acquire, change).is_err() {
            std::thread::yield_now();
        }
    }

    /// The handler goes on to the next turn; answers whether it was taken out meanwhile.
    pub(super) fn turns(&self) -> bool {
        let steps = self.steps.load(Ordering::Relaxed).wrapping_add(2);
        self.steps.store(steps, Ordering::Relaxed);
        if steps % STEPS_PER_LOOK < 2 && now_ns() - self.put_off_ns.load(Ordering::Relaxed) > NEWS_NS {
            let _ = self.put_off();
        }
        self.taken.load(Ordering::Acquire)
    }

    /// The handler is about to sleep, or has slept.
    pub(super) fn sleeps_or_wakes(&self) {
        self.steps.store(self.steps.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
    }

    fn put_off(&self) -> bool {
        self.put_off_ns.store(now_ns(), Ordering::Relaxed);
        self.set_alarm(PATIENCE).is_ok()
    }

    fn set_alarm(&self, from_now: Duration) -> Result<(), Errno> {
        self.alarm.0.set(Expiration::OneShot(from_now.into()), TimerSetTimeFlags::empty())
    }

    /// Tells whether a thread of this process may go to SCHED_IDLE and back (sched(7)), by trying it with the watch's own.
    pub(super) fn try_policies(&self) -> bool {
        self.privileged.store(has_sys_nice(), Ordering::Relaxed);
        set_policy(0, libc::SCHED_IDLE).and_then(|()| set_policy(0, libc::SCHED_OTHER)).is_ok()
    }

    /// The thread's body: sleeps until the alarm.
    pub(super) fn run(&self) {
        loop {
            match self.alarm.0.wait() {
                Ok(()) | Err(Errno::EINTR) => {}
                // Somebody closed it. Nobody is followed any more.
                Err(_) => {
                    self.privileged.store(!has_sys_nice(), Ordering::Relaxed);
                    return self.take_out();
                }
            }
            match self.state.load(Ordering::Acquire) {
                ENDED => return,
                AWAKE => {
                    // Put off just when it went off?
                    let late = now_ns() - self.put_off_ns.load(Ordering::Relaxed) > NEWS_NS;
                    let works = self.steps.load(Ordering::Relaxed) % 2 == 1;
                    if late && (works || self.is_wanted()) {
                        self.take_out();
                    } else {
                        let _ = self.set_alarm(PATIENCE);
                    }
                }
                _ => {}
            }
        }
    }

    /// Tells whether something waits for the handler.
    fn is_wanted(&self) -> bool {
        let mut fds = [PollFd::new(self.waits_in.0.0.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }

    /// Gives the handler the processor like any other thread, wherever one is free.
    fn take_out(&self) {
        if self.state.compare_exchange(AWAKE, TAKING, Ordering::AcqRel, Ordering::Relaxed).is_err() {
            return;
        }
        // The handler can't end now: it waits for the state to change.
        let handler = self.handler.load(Ordering::Relaxed);
        let _ = set_policy(handler, libc::SCHED_OTHER);
        if let Some(anywhere) = self.anywhere.get() {
            let _ = sched_setaffinity(Pid::from_raw(handler), anywhere);
        }
        self.taken.store(true, Ordering::Release);
        self.state.store(ASLEEP, Ordering::Release);
    }
}

/// Sets the scheduling policy of a thread; 0 is the current one. Its nice value stays.
pub(super) fn set_policy(thread: i32, policy: i32) -> Result<(), Errno> {
    // By the system call: musl's function of the name refuses.
    let priority = libc::sched_param { sched_priority: 0 };
    // SAFETY: the parameters live as long as the call.
    let outcome = unsafe { libc::syscall(libc::SYS_sched_setscheduler, thread, policy, &raw const priority) };
    Errno::result(outcome).map(drop)
}

/// Tells whether the current thread has CAP_SYS_NICE.
fn has_sys_nice() -> bool {
    const VERSION_3: u32 = 0x2008_0522;
    const CAP_SYS_NICE: u32 = 23;
    let header = [VERSION_3, 0];
    // Effective, permitted and inheritable, of 32 capabilities each.
    let mut sets = [0u32; 6];
    // SAFETY: both live as long as the call, and are as long as version 3 has them.
    let outcome = unsafe { libc::syscall(libc::SYS_capget, header.as_ptr(), sets.as_mut_ptr()) };
    outcome == 0 && sets[0] & (1 << CAP_SYS_NICE) != 0
}
