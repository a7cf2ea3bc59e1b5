//! Where the fault-handling thread runs: the processor on which it is woken matters more than what it does there.
//!
//! Two switches on one processor cost a few microseconds; waking an idle processor can cost ten times the whole fault, and
//! a fault left to the scheduler wakes two: the handler is put on an idle processor, and so is the thread that faulted
//! when it is woken from there. Pinning the handler beside that thread cures the first half only. The second is
//! cured by SCHED_IDLE: for the scheduler a processor on which nothing but SCHED_IDLE runs is as good as idle
//! (`sched_idle_cpu` in kernel/sched/fair.c, since Linux 5.4), so the thread that the handler wakes stays where it was and
//! takes the processor at once.
//!
//! A thread of that policy gets what others leave, so it must not stay so when others want the processor: the
//! handler follows a thread only as long as that faults without a pause, and another thread, the watch, takes the handler
//! out of it when it makes no progress. That needs CAP_SYS_NICE or RLIMIT_NICE of 20, as a thread without them can't
//! leave SCHED_IDLE.

use std::sync::Arc;
use std::time::Duration;

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

use super::watch::{Watch, set_policy};
use super::whereabouts;
use crate::sys::clock;
use crate::{Error, Result};

/// Says where the thread runs that answers faults ([`EngineBuilder::placement`](crate::EngineBuilder::placement)).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Placement {
    /// Where the scheduler likes; while one thread faults without a pause, on that thread's processor. The default.
    ///
    /// While it follows, the handler has the policy SCHED_IDLE, which needs CAP_SYS_NICE or RLIMIT_NICE of 20 (`ulimit -e
    /// 20`, systemd's `LimitNICE=0`): without them it is [`Placement::Floating`]. A thread that can't be found in `/proc`,
    /// or on a processor that is not allowed, is not followed.
    #[default]
    Follow,
    /// Where the scheduler likes, always.
    Floating,
    /// On these processors only.
    Pinned(Vec<usize>),
    /// Where the scheduler likes; after an answer it looks for the next fault for so long before it sleeps, which
    /// keeps a processor busy for that time.
    Spin(Duration),
}

impl Placement {
    pub(super) fn validate(&self) -> Result<()> {
        let invalid = |what, value, rule| Err(Error::Invalid { what, value, rule });
        match self {
            Placement::Pinned(cpus) if cpus.is_empty() => {
                invalid("the processors of Placement::Pinned", 0, "there must be one at least")
            }
            Placement::Pinned(cpus) => match cpus.iter().find(|&&cpu| cpu >= CpuSet::count()) {
                Some(&cpu) => invalid("a processor of Placement::Pinned", cpu as u64, "it must be one of this machine"),
                None => Ok(()),
            },
            Placement::Spin(time) if *time > LONGEST_SPIN => invalid(
                "the microseconds of Placement::Spin",
                u64::try_from(time.as_micros()).unwrap_or(u64::MAX),
                "at most 1000000",
            ),
            _ => Ok(()),
        }
    }
}

/// Longer is a mistake: it keeps a processor busy.
const LONGEST_SPIN: Duration = Duration::from_secs(1);
/// Faults of one thread, each soon after the other, after which it is followed.
const RUN_BEFORE_FOLLOWING: u32 = 8;
/// The same after the handler was taken away from a thread, at the most: each time it is twice the number before.
const LONGEST_RUN: u32 = 1 << 14;
/// What is not older than that is soon, in nanoseconds. A clock that ticks with the scheduler is read.
const SOON_NS: i64 = 5_000_000;
/// Faults in the same place after which the place is looked at again.
const FAULTS_BETWEEN_LOOKS: u32 = 2048;
/// Following was worth it if it lasted for so many faults.
const WORTH_IT: u32 = 64;
/// Faults of other threads among so many after which the one is not followed any more.
const STRANGERS: u32 = 16;
/// How long a handler that follows waits for a fault before it stops following, in milliseconds.
pub(crate) const LONGEST_WAIT_MS: u16 = 10;

/// Moves the fault-handling thread; used by that thread alone.
pub(crate) struct Placer {
    placement: Placement,
    /// `None` if it does not follow.
    watch: Option<Arc<Watch>>,
    /// Where it may run when it follows nobody.
    anywhere: CpuSet,
    /// The thread that faulted last, and how many faults in a row were its.
    thread: i32,
    run: u32,
    run_began_ns: i64,
    /// The run after which it follows.
    wanted_run: u32,
    following: Option<Following>,
}

/// What it follows.
struct Following {
    thread: i32,
    cpu: usize,
    /// Its faults so far, and those since it was made sure of where it runs.
    faults: u32,
    unseen: u32,
    /// Faults of others since then.
    strangers: u32,
}

impl Placer {
    pub(crate) fn new(placement: Placement, watch: Option<Arc<Watch>>) -> Placer {
        Placer {
            placement,
            watch,
            anywhere: CpuSet::new(),
            thread: 0,
            run: 0,
            run_began_ns: 0,
            wanted_run: RUN_BEFORE_FOLLOWING,
            following: None,
        }
    }

    /// Goes to the first place. Called once, by the thread itself.
    pub(crate) fn start(&mut self) {
        if let Placement::Pinned(cpus) = &self.placement {
            let mut set = CpuSet::new();
            // Validated by the builder; processors that are offline leave the thread where it may run.
            if cpus.iter().try_for_each(|&cpu| set.set(cpu)).is_ok() {
                let _ = sched_setaffinity(Pid::from_raw(0), &set);
            }
        }
        match (sched_getaffinity(Pid::from_raw(0)), &self.watch) {
            (Ok(set), Some(watch)) => {
                self.anywhere = set;
                watch.enter(set);
            }
            _ => {
                // More processors than the set has places for, perhaps: then nobody is followed.
                if let Some(watch) = self.watch.take() {
                    watch.leave();
                }
            }
        }
    }

    /// How long to go on looking before a sleep.
    pub(crate) fn spin(&self) -> Option<Duration> {
        match self.placement {
            Placement::Spin(time) => Some(time),
            _ => None,
        }
    }

    /// Tells whether threads of the engine may step back behind others, and be taken out of that again.
    pub(crate) fn may_step_back(&self) -> bool {
        self.watch.as_ref().is_some_and(|watch| watch.may_begin())
    }

    /// Tells whether the thread must not sleep for long.
    pub(crate) fn is_following(&self) -> bool {
        self.following.is_some()
    }

    /// Notes that the thread makes progress.
    pub(crate) fn turns(&mut self) {
        let (Some(watch), Some(_)) = (&self.watch, &self.following) else { return };
        if watch.turns() {
            // It made none for too long: others want the processor. The watch has put the thread back; but it may have moved
            // since, not knowing that.
            let faults = self.following.as_ref().map_or(0, |following| following.faults);
            self.stop();
            let worth_it = faults >= WORTH_IT;
            self.wanted_run = if worth_it { RUN_BEFORE_FOLLOWING } else { (self.wanted_run * 2).min(LONGEST_RUN) };
        }
    }

    /// Notes that the thread is about to sleep.
    pub(crate) fn sleeps(&mut self) {
        self.sleeps_or_wakes();
    }

    /// Notes that it slept, and whether in vain.
    pub(crate) fn wakes(&mut self, in_vain: bool) {
        self.sleeps_or_wakes();
        match &mut self.following {
            Some(_) if in_vain => self.stop(),
            // On one processor the next fault is there before this thread runs again: the other has moved, or paused. It
            // is looked for at once: answered from here, it would be woken on a processor that sleeps.
            Some(_) => self.look(),
            None => {}
        }
    }

    fn sleeps_or_wakes(&self) {
        if let (Some(watch), Some(_)) = (&self.watch, &self.following) {
            watch.sleeps_or_wakes();
        }
    }

    /// Notes a fault of a thread, before it is answered.
    pub(crate) fn saw(&mut self, thread: i32) {
        if self.watch.is_none() || thread == 0 {
            return;
        }
        match &mut self.following {
            Some(following) if following.thread == thread => {
                following.faults = following.faults.saturating_add(1);
                following.unseen += 1;
                if following.unseen >= FAULTS_BETWEEN_LOOKS {
                    following.strangers = 0;
                    self.look();
                }
            }
            Some(following) => {
                following.strangers += 1;
                if following.strangers >= STRANGERS {
                    self.stop();
                }
            }
            None => self.consider(thread),
        }
    }

    /// Counts a run of faults of one thread; follows it when it is long.
    fn consider(&mut self, thread: i32) {
        let now = clock::coarse_ns();
        let pause = now - self.run_began_ns;
        if thread != self.thread || pause > SOON_NS * i64::from(self.run / RUN_BEFORE_FOLLOWING + 1) {
            self.thread = thread;
            self.run = 0;
            self.run_began_ns = now;
        }
        self.run += 1;
        if self.run >= self.wanted_run {
            self.run = 0;
            self.follow(thread);
        }
    }

    fn follow(&mut self, thread: i32) {
        let (Some(watch), Some(cpu)) = (&self.watch, whereabouts::of(thread)) else { return };
        if move_to(cpu) && watch.begin() {
            self.following = Some(Following { thread, cpu, faults: 0, unseen: 0, strangers: 0 });
        } else {
            let _ = sched_setaffinity(Pid::from_raw(0), &self.anywhere);
            self.wanted_run = (self.wanted_run * 2).min(LONGEST_RUN);
        }
    }

    /// Goes where the followed thread is by now.
    fn look(&mut self) {
        let Some(following) = &mut self.following else { return };
        following.unseen = 0;
        match whereabouts::of(following.thread) {
            Some(cpu) if cpu == following.cpu => {}
            Some(cpu) if move_to(cpu) => following.cpu = cpu,
            _ => self.stop(),
        }
    }

    /// Follows nobody any more.
    pub(crate) fn stop(&mut self) {
        if let (Some(watch), Some(_)) = (&self.watch, self.following.take()) {
            watch.end();
            let _ = set_policy(0, libc::SCHED_OTHER);
            let _ = sched_setaffinity(Pid::from_raw(0), &self.anywhere);
        }
        self.run = 0;
    }
}

impl Drop for Placer {
    fn drop(&mut self) {
        if let Some(watch) = &self.watch {
            watch.leave();
        }
    }
}

/// Moves this thread to a processor; tells whether it is allowed there.
pub(super) fn move_to(cpu: usize) -> bool {
    move_thread_to(0, cpu)
}

/// As [`move_to`], of a thread of this process.
pub(super) fn move_thread_to(thread: i32, cpu: usize) -> bool {
    let mut set = CpuSet::new();
    set.set(cpu).and_then(|()| sched_setaffinity(Pid::from_raw(thread), &set)).is_ok()
}
