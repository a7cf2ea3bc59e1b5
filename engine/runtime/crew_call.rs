//! When the crew is called, and to which processors: a few words of bookkeeping for each fault, and rarely a look.

use std::sync::atomic::Ordering;

use nix::sched::sched_getaffinity;
use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid;

use super::crew::{Crew, HANDLERS_MAX};
use super::whereabouts;
use crate::space::{OWN_SPACE, SpaceId};

/// Threads that are remembered.
const THREADS: usize = 4;
/// How often another thread than the last must fault before it is looked where they are.
const SWITCHES: u32 = 32;
/// The same, at the most: each look that finds them on one processor doubles it.
const MOST_SWITCHES: u32 = 4096;
/// Switches that took longer don't count, in milliseconds.
const SOON_MS: i64 = 100;
/// How often it is looked whether the crew is still needed, in milliseconds.
pub(crate) const REVIEW_MS: u16 = 50;
/// A crew of which only one member answers more than one fault in so many is not needed.
const SHARE: u64 = 16;
/// A crew that hands on more than one message in so many is not of use.
const MOST_HANDED_ON: u64 = 4;
/// How long it is not called after that, in milliseconds.
const REST_MS: i64 = 1000;

/// Processors, as many as there are members at the most.
pub(crate) struct Cpus {
    cpus: [i32; HANDLERS_MAX],
    len: usize,
}

impl Cpus {
    const NONE: Cpus = Cpus { cpus: [0; HANDLERS_MAX], len: 0 };

    /// Where threads are. One that can't be found is nowhere.
    fn of(threads: impl Iterator<Item = i32>) -> Cpus {
        let mut found = Cpus::NONE;
        for cpu in threads.filter(|&thread| thread != 0).filter_map(whereabouts::of) {
            found.push(cpu as i32);
        }
        found
    }

    /// The processors on which this thread may run.
    fn allowed() -> Cpus {
        let mut found = Cpus::NONE;
        if let Ok(set) = sched_getaffinity(Pid::from_raw(0)) {
            let allowed = (0..nix::sched::CpuSet::count()).filter(|&cpu| set.is_set(cpu).unwrap_or(false));
            allowed.for_each(|cpu| found.push(cpu as i32));
        }
        found
    }

    fn push(&mut self, cpu: i32) {
        if self.len < HANDLERS_MAX && !self.as_slice().contains(&cpu) {
            self.cpus[self.len] = cpu;
            self.len += 1;
        }
    }

    pub(crate) fn as_slice(&self) -> &[i32] {
        &self.cpus[..self.len]
    }
}

/// What shall become of a crew that was called.
pub(crate) enum Review {
    GoOn,
    /// Other processors.
    Direct(Cpus),
    LetGo,
}

/// Decides when the crew is called.
pub(crate) struct Caller {
    /// The crew is to be on all the time.
    always: bool,
    /// The space that is looked at, and those of its threads that faulted last, the last one first.
    space: SpaceId,
    threads: [i32; THREADS],
    switches: u32,
    switches_before_a_look: u32,
    since_ms: i64,
    /// Not before then.
    rest_until_ms: i64,
    /// What each member had answered when it was looked last.
    answered: [u64; HANDLERS_MAX],
    handed_on: u64,
}

impl Caller {
    pub(crate) fn new(always: bool) -> Caller {
        Caller {
            always,
            space: OWN_SPACE,
            threads: [0; THREADS],
            switches: 0,
            switches_before_a_look: SWITCHES,
            since_ms: 0,
            rest_until_ms: 0,
            answered: [0; HANDLERS_MAX],
            handed_on: 0,
        }
    }

    /// Tells whether the crew is never let go.
    pub(crate) fn is_always(&self) -> bool {
        self.always
    }

    /// Where to call the crew at the start, if it is to be on all the time.
    pub(crate) fn at_start(&self) -> Option<Cpus> {
        self.always.then(Cpus::allowed)
    }

    /// Notes a fault that the owner answered; answers where to call the crew, if it should.
    ///
    /// Only threads of one space count: members that wait for several spaces take each other's faults, and wake threads on
    /// other processors than their own, which costs more than is won.
    pub(crate) fn saw(&mut self, space: SpaceId, thread: i32) -> Option<Cpus> {
        if thread == self.threads[0] || thread == 0 {
            return None;
        }
        if space != self.space {
            (self.space, self.threads, self.switches) = (space, [0; THREADS], 0);
        }
        let known = self.threads.iter().position(|&known| known == thread).unwrap_or(THREADS - 1);
        self.threads[..=known].rotate_right(1);
        self.threads[0] = thread;
        self.switches += 1;
        if self.switches < self.switches_before_a_look {
            return None;
        }
        self.switches = 0;
        let now = now_ms();
        let pause = now - std::mem::replace(&mut self.since_ms, now);
        if pause > SOON_MS || now < self.rest_until_ms {
            return None;
        }
        let cpus = Cpus::of(self.threads.into_iter());
        if cpus.len < 2 {
            self.switches_before_a_look = (self.switches_before_a_look * 2).min(MOST_SWITCHES);
            return None;
        }
        self.switches_before_a_look = SWITCHES;
        Some(cpus)
    }

    /// Notes that the crew was called.
    pub(crate) fn called(&mut self, crew: &Crew) {
        self.since_ms = now_ms();
        self.handed_on = 0;
        for (before, member) in self.answered.iter_mut().zip(&crew.members) {
            *before = member.answered.load(Ordering::Relaxed);
        }
    }

    /// Notes that a member could not answer.
    pub(crate) fn took(&mut self) {
        self.handed_on += 1;
    }

    /// Looks whether the crew is still needed, if it is time to.
    pub(crate) fn review(&mut self, crew: &Crew) -> Review {
        let now = now_ms();
        if self.always || now - self.since_ms < i64::from(REVIEW_MS) {
            return Review::GoOn;
        }
        self.since_ms = now;
        let mut answers = [0; HANDLERS_MAX];
        for (index, member) in crew.members.iter().enumerate() {
            let answered = member.answered.load(Ordering::Relaxed);
            answers[index] = answered - std::mem::replace(&mut self.answered[index], answered);
        }
        let all: u64 = answers.iter().sum();
        let handed_on = std::mem::take(&mut self.handed_on);
        if handed_on * MOST_HANDED_ON > all {
            self.rest_until_ms = now + REST_MS;
            return Review::LetGo;
        }
        let busy = answers.iter().filter(|&&answers| answers * SHARE > all).count();
        let threads = crew.members.iter().map(|member| member.thread.load(Ordering::Relaxed));
        let cpus = Cpus::of(threads);
        if busy < 2 || cpus.len < 2 {
            return Review::LetGo;
        }
        let there = |cpu: &i32| crew.members.iter().any(|member| member.cpu.load(Ordering::Relaxed) == *cpu);
        if cpus.as_slice().iter().all(there) { Review::GoOn } else { Review::Direct(cpus) }
    }
}

/// A clock that ticks with the scheduler, which is cheap to read.
fn now_ms() -> i64 {
    clock_gettime(ClockId::CLOCK_MONOTONIC_COARSE).map_or(0, |now| now.tv_sec() * 1000 + now.tv_nsec() / 1_000_000)
}
