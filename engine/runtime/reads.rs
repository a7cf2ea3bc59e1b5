//! What workers are to read, what they are reading, and who waits for it. Pure data: it makes no system call but for the
//! growth of its storage.
//!
//! A page is read once at a time, however many wait for it: a fault on a page that is being read, or is to be, joins that
//! read. What is still to be read grows by neighbours that are asked for, and is forgotten when nobody waits for it any more.

use std::ops::Range;
use std::sync::Arc;

use super::call::Ticket;
use super::fault::Fault;
use crate::kiobuf::Kiobuf;
use crate::page::page_size;
use crate::space::mmap_vec::MmapVec;
use crate::stats::latency::Moment;
use crate::vmap::core::VmapCore;
use crate::vmap::failure::{FailurePolicy, Why};
use crate::vmap::page_size::PageSize;
use crate::vmap::window::Window;

/// Neighbours that are asked for one by one are read together up to so many bytes.
const MERGED_BYTES: usize = 1 << 20;

/// The vmap that pages are read for, and what they are read from.
pub(crate) struct Subject {
    pub(crate) vmap: Arc<VmapCore>,
    pub(crate) list: Kiobuf,
    pub(crate) window: Option<Arc<Window>>,
}

/// Who waits for a read.
pub(crate) enum Waiter {
    /// A thread that touched one of its pages.
    Fault(Fault),
    /// A thread that asked for them. It keeps what the subject refers to alive until it is answered.
    Asker { subject: Subject, reply: Ticket<How> },
}

/// How far a read has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Queued,
    /// It has failed, and is tried again.
    Paused {
        until: Moment,
    },
    /// A worker is at it.
    Made,
    /// A worker is at it, and nobody waits any more.
    Late,
}

/// What is to be read.
#[derive(Clone, Debug)]
pub(crate) struct Wanted {
    pub(crate) vmap: u64,
    pub(crate) generation: u64,
    pub(crate) pages: Range<u64>,
    /// Neighbours may be read together with them as far as this.
    pub(crate) run: Range<u64>,
    /// It is a huge page of that size, and the pages may be of several extents.
    pub(crate) huge: Option<PageSize>,
    /// What they are read from: some reads of it are made at once, and no more.
    pub(crate) medium: usize,
    /// It waits for nothing.
    pub(crate) is_quick: bool,
    /// No part of it can be read by itself, or that is not worth the trouble: it succeeds or fails as a whole.
    pub(crate) is_unit: bool,
    /// Together with neighbours it has failed.
    pub(crate) alone: bool,
    pub(crate) policy: FailurePolicy,
    /// When it was asked for.
    pub(crate) since: Moment,
}

impl Wanted {
    pub(crate) fn len_bytes(&self) -> usize {
        (self.pages.end - self.pages.start) as usize * page_size()
    }
}

/// A read.
pub(crate) struct Read {
    pub(crate) id: u64,
    pub(crate) wanted: Wanted,
    state: State,
    /// How often it was made and has failed.
    tries: u32,
    deadline: Moment,
}

/// What came of asking for a read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Asked {
    New,
    /// It is read together with a neighbour.
    Merged,
}

/// The end of a read, which is to be told to everybody who waits for it ([`Reads::next_waiter`]).
#[derive(Clone, Debug)]
pub(crate) struct Ended {
    pub(crate) id: u64,
    pub(crate) how: How,
}

#[allow(clippy::large_enum_variant, reason = "a box would be allocated")]
#[derive(Clone, Debug)]
pub(crate) enum How {
    /// The backing object holds its pages.
    Installed,
    /// It says nothing: the list was taken back, or several pages failed together. They are to be asked for anew, each alone if so.
    Again { alone: bool },
    /// Its pages can't be had.
    Failed { vmap: u64, generation: u64, pages: Range<u64>, why: Why, tries: u32 },
}

/// What a worker came to.
#[derive(Clone, Debug)]
pub(crate) enum Outcome {
    /// The backing object holds the pages; the worker has filled so many of them.
    Installed {
        pages: u64,
    },
    /// The list was taken back meanwhile, or the engine was shut down.
    TakenBack,
    Failed(Why),
}

/// How many reads may be made at once.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Of one medium.
    pub(crate) of_medium: usize,
    /// That may wait.
    pub(crate) slow: usize,
    /// That don't.
    pub(crate) quick: usize,
}

/// All reads of an engine.
pub(crate) struct Reads {
    reads: MmapVec<Read>,
    waiters: MmapVec<(u64, Waiter)>,
    next_id: u64,
    /// Something may be made that could not before.
    changed: bool,
    /// The next time at which something is to be done, at the latest.
    soonest: Option<Moment>,
}

impl Reads {
    pub(crate) const fn new() -> Reads {
        Reads { reads: MmapVec::new(), waiters: MmapVec::new(), next_id: 1, changed: false, soonest: None }
    }

    /// Finds the read that brings a page.
    pub(crate) fn covering(&self, vmap: u64, pgoff: u64) -> Option<u64> {
        self.alive(vmap).find(|read| read.wanted.pages.contains(&pgoff)).map(|read| read.id)
    }

    /// The reads that somebody may join, whichever list of the vmap they are of: what an older one has is in the newer one too,
    /// and reads of what was taken back are ended ([`Reads::outdated`]).
    fn alive(&self, vmap: u64) -> impl Iterator<Item = &Read> {
        self.reads.iter().filter(move |read| read.wanted.vmap == vmap && read.state != State::Late)
    }

    /// Cuts off what other reads bring; `pgoff` is a page that none does.
    pub(crate) fn gap(&self, vmap: u64, pages: Range<u64>, pgoff: u64) -> Range<u64> {
        self.alive(vmap).fold(pages, |gap, Read { wanted: Wanted { pages, .. }, .. }| {
            if pages.end <= pgoff { gap.start.max(pages.end)..gap.end } else { gap.start..gap.end.min(pages.start) }
        })
    }

    /// Has somebody wait for a read; for want of memory, it comes back.
    pub(crate) fn join(&mut self, id: u64, waiter: Waiter) -> Result<(), Waiter> {
        if let Waiter::Fault(fault) = &waiter {
            let same = |(read, held): &(u64, Waiter)| match held {
                Waiter::Fault(held) => *read == id && (held.space, held.addr) == (fault.space, fault.addr),
                Waiter::Asker { .. } => false,
            };
            // One answer is for all threads that wait at an address.
            if self.waiters.iter().any(same) {
                return Ok(());
            }
        }
        self.waiters.try_push((id, waiter)).map_err(|((_, waiter), _)| waiter)
    }

    /// Asks for a read, of pages that no other brings; for want of memory, the waiter comes back.
    pub(crate) fn ask(&mut self, wanted: Wanted, waiter: Waiter) -> Result<Asked, Waiter> {
        let most = (MERGED_BYTES / page_size()) as u64;
        let neighbour = self.reads.iter_mut().find(|read| {
            let (held, pages) = (&read.wanted, &wanted.pages);
            let joined = held.pages.start.min(pages.start)..held.pages.end.max(pages.end);
            read.state == State::Queued
                && read.tries == 0
                && !(held.alone || wanted.alone || held.huge.is_some() || wanted.huge.is_some())
                && (held.vmap, held.generation, held.medium) == (wanted.vmap, wanted.generation, wanted.medium)
                && (held.pages.end == pages.start || pages.end == held.pages.start)
                && wanted.run.start <= joined.start
                && joined.end <= wanted.run.end
                && joined.end - joined.start <= most
                // Who comes later waits no longer than who came first, and should not have to wait much less than by itself.
                && (held.since..held.since.after(held.policy.deadline / 2)).contains(&wanted.since)
        });
        if let Some(read) = neighbour {
            let (id, pages) = (read.id, &mut read.wanted.pages);
            let before = pages.clone();
            *pages = pages.start.min(wanted.pages.start)..pages.end.max(wanted.pages.end);
            let was_unit = std::mem::replace(&mut read.wanted.is_unit, false);
            return self.join(id, waiter).map(|()| Asked::Merged).inspect_err(|_| {
                if let Some(read) = self.reads.iter_mut().find(|read| read.id == id) {
                    (read.wanted.pages, read.wanted.is_unit) = (before, was_unit);
                }
            });
        }
        if self.reads.try_reserve(1).is_err() || self.waiters.try_reserve(1).is_err() {
            return Err(waiter);
        }
        let id = self.next_id;
        self.next_id += 1;
        let deadline = wanted.since.after(wanted.policy.deadline);
        // There is room for both.
        let _ = self.reads.try_push(Read { id, wanted, state: State::Queued, tries: 0, deadline });
        let _ = self.waiters.try_push((id, waiter));
        self.changed = true;
        self.wake_at(deadline);
        Ok(Asked::New)
    }

    /// Has everybody who waits for a read be taken out, one by one.
    pub(crate) fn next_waiter(&mut self, id: u64) -> Option<Waiter> {
        let index = self.waiters.iter().position(|(read, _)| *read == id)?;
        Some(self.waiters.remove(index).1)
    }

    /// Takes anybody out who waits.
    pub(crate) fn any_waiter(&mut self) -> Option<Waiter> {
        let (id, waiter) = self.waiters.pop()?;
        self.let_go(id);
        Some(waiter)
    }

    /// Forgets faults that nobody waits for any more, and reads with them; answers how many of these were not made.
    pub(crate) fn forget(&mut self, gone: impl Fn(&Fault) -> bool) -> u64 {
        let mut cancelled = 0;
        let mut index = 0;
        while index < self.waiters.len() {
            match &self.waiters[index] {
                (_, Waiter::Fault(fault)) if gone(fault) => {
                    let (id, _) = self.waiters.remove(index);
                    cancelled += u64::from(self.let_go(id));
                }
                _ => index += 1,
            }
        }
        cancelled
    }

    /// Finds a read of a list before a generation, whose pages may have been taken back, to be told to those who wait for it.
    pub(crate) fn outdated(&mut self, vmap: u64, kept_since: u64) -> Option<Ended> {
        let index = self.reads.iter().position(|Read { wanted, state, .. }| {
            wanted.vmap == vmap && wanted.generation < kept_since && *state != State::Late
        })?;
        Some(self.end(index, How::Again { alone: false }))
    }

    /// Removes a read that nobody waits for and that was not made; answers whether it was.
    fn let_go(&mut self, id: u64) -> bool {
        let waits = self.waiters.iter().any(|(read, _)| *read == id);
        let Some(index) = self.reads.iter().position(|read| read.id == id) else { return false };
        let removed = !waits && matches!(self.reads[index].state, State::Queued | State::Paused { .. });
        if removed {
            self.reads.remove(index);
        }
        removed
    }

    /// Ends a read for those who wait for it; while a worker is at it, it stays.
    fn end(&mut self, index: usize, how: How) -> Ended {
        let read = &mut self.reads[index];
        let id = read.id;
        match read.state {
            State::Made | State::Late => read.state = State::Late,
            State::Queued | State::Paused { .. } => drop(self.reads.remove(index)),
        }
        self.changed = true;
        Ended { id, how }
    }

    /// Tells whether something may be made that could not be before, once.
    pub(crate) fn take_changed(&mut self) -> bool {
        std::mem::take(&mut self.changed)
    }

    /// Says that a worker, or a buffer, may be free.
    pub(crate) fn change(&mut self) {
        self.changed = true;
    }

    /// How many reads there are, made or not.
    pub(crate) fn nr_reads(&self) -> usize {
        self.reads.len()
    }

    /// Tells whether a worker is at a read.
    pub(crate) fn is_made(&self, id: u64) -> bool {
        self.reads.iter().any(|read| read.id == id && read.is_made())
    }

    /// How many workers are at a read.
    pub(crate) fn nr_made(&self) -> usize {
        self.reads.iter().filter(|read| read.is_made()).count()
    }

    /// Tells whether a worker is at a read that is not late.
    pub(crate) fn is_busy(&self) -> bool {
        self.reads.iter().any(|read| read.state == State::Made)
    }

    /// What workers are at though nobody waits for it any more.
    pub(crate) fn late(&self) -> impl Iterator<Item = &Wanted> {
        self.reads.iter().filter(|read| read.state == State::Late).map(|read| &read.wanted)
    }

    /// Finds the first read from `index` on that may be made.
    pub(crate) fn next_queued(&self, index: usize, limits: Limits) -> Option<usize> {
        let made = || self.reads.iter().filter(|read| read.is_made());
        let quick = made().filter(|read| read.counts_as_quick()).count();
        let room = |is_quick| if is_quick { quick < limits.quick } else { made().count() - quick < limits.slow };
        // Many may wait for one medium, of which enough are made.
        let mut crowded = None;
        (index..self.reads.len()).find(|&index| {
            let Wanted { medium, is_quick, .. } = self.reads[index].wanted;
            if self.reads[index].state != State::Queued || crowded == Some(medium) {
                return false;
            }
            if made().filter(|read| read.wanted.medium == medium).count() >= limits.of_medium {
                crowded = Some(medium);
                return false;
            }
            room(is_quick)
        })
    }

    /// The read at an index.
    pub(crate) fn at(&self, index: usize) -> &Read {
        &self.reads[index]
    }

    /// Somebody who waits for a read.
    pub(crate) fn first_waiter(&self, id: u64) -> Option<&Waiter> {
        self.waiters.iter().find(|(read, _)| *read == id).map(|(_, waiter)| waiter)
    }

    /// The faults that wait for a read.
    pub(crate) fn faults(&self, id: u64) -> impl Iterator<Item = &Fault> {
        self.waiters.iter().filter_map(move |(read, waiter)| match waiter {
            Waiter::Fault(fault) if *read == id => Some(fault),
            _ => None,
        })
    }

    /// A worker is at a read.
    pub(crate) fn made(&mut self, index: usize) {
        self.reads[index].state = State::Made;
    }

    /// It turned out, before it was made, that a read is out of date.
    pub(crate) fn stale(&mut self, index: usize) -> Ended {
        self.end(index, How::Again { alone: false })
    }

    /// A worker has come to an end with a read; `None` if it is tried again, or nobody waits for it.
    pub(crate) fn finished(&mut self, id: u64, outcome: Outcome, now: Moment) -> Option<Ended> {
        self.changed = true;
        let index = self.reads.iter().position(|read| read.id == id)?;
        if self.reads[index].state == State::Late || !self.waiters.iter().any(|(read, _)| *read == id) {
            self.reads.remove(index);
            return None;
        }
        let how = match outcome {
            Outcome::Installed { .. } => How::Installed,
            Outcome::TakenBack => How::Again { alone: false },
            Outcome::Failed(why) => match self.reads[index].failed(why, now) {
                Some(how) => how,
                None => {
                    if let State::Paused { until } = self.reads[index].state {
                        self.wake_at(until);
                    }
                    return None;
                }
            },
        };
        self.reads.remove(index);
        Some(Ended { id, how })
    }

    /// Has what was put off be tried again, and finds a read whose deadline has passed.
    pub(crate) fn expired(&mut self, now: Moment) -> Option<Ended> {
        self.soonest = None;
        let mut over = None;
        for index in 0..self.reads.len() {
            let read = &mut self.reads[index];
            match read.state {
                State::Late => continue,
                State::Paused { until } if until <= now => {
                    read.state = State::Queued;
                    self.changed = true;
                }
                _ => {}
            }
            let Read { deadline, state, .. } = *read;
            if deadline <= now {
                over = Some(index);
                continue;
            }
            self.wake_at(deadline);
            if let State::Paused { until } = state {
                self.wake_at(until);
            }
        }
        let index = over?;
        // Perhaps there are more.
        self.soonest = Some(now);
        let Read { wanted, tries, state, .. } = &self.reads[index];
        let tries = tries + u32::from(*state == State::Made);
        let Wanted { vmap, generation, ref pages, .. } = *wanted;
        let pages = pages.clone();
        Some(self.end(index, How::Failed { vmap, generation, pages, why: Why::deadline(), tries }))
    }

    /// The next time at which something is to be done; it may be too early.
    pub(crate) fn soonest(&self) -> Option<Moment> {
        self.soonest
    }

    /// Has something be done at that time at the latest.
    pub(crate) fn wake_at(&mut self, moment: Moment) {
        self.soonest = Some(self.soonest.map_or(moment, |soonest| soonest.min(moment)));
    }
}

impl Read {
    fn is_made(&self) -> bool {
        matches!(self.state, State::Made | State::Late)
    }

    /// One that is late may never end, whatever its source has said.
    fn counts_as_quick(&self) -> bool {
        self.wanted.is_quick && self.state != State::Late
    }

    /// Decides how a failure ends it; `None` if it is tried again after a pause.
    fn failed(&mut self, why: Why, now: Moment) -> Option<How> {
        if !self.wanted.is_unit {
            // A neighbour's failure is not this page's.
            return Some(How::Again { alone: true });
        }
        self.tries += 1;
        let until = now.after(self.wanted.policy.pause_after(self.tries));
        if self.tries > self.wanted.policy.retries || until >= self.deadline {
            let Wanted { vmap, generation, ref pages, .. } = self.wanted;
            return Some(How::Failed { vmap, generation, pages: pages.clone(), why, tries: self.tries });
        }
        self.state = State::Paused { until };
        None
    }
}

#[cfg(test)]
mod tests;
