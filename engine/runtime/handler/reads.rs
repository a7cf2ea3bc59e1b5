//! The owner's side of slow pages: it has workers read them, and answers those who wait when they are read, or can't be.

use std::ops::Range;
use std::sync::Arc;

use super::Handler;
use crate::page::page_size;
use crate::runtime::command::{Failed, Healed, Place, Post};
use crate::runtime::fault::Fault;
use crate::runtime::reads::{Ended, How, Outcome, Waiter};
use crate::runtime::slow::Next;
use crate::stats::add;
use crate::sys::Stop;

/// Pages that are mapped by one command: faults wait for it.
const HEALED_AT_ONCE: usize = 64;

impl Handler {
    /// Has workers read what they can by now.
    pub(super) fn make_reads(&mut self) {
        if self.resolver.slow.reads.take_changed() {
            loop {
                match self.resolver.make_next(&self.spaces) {
                    Next::Made => {}
                    Next::Nothing => break,
                    Next::NoWorker => {
                        if self.resolver.call_worker() {
                            self.keeper.nudge();
                        }
                        break;
                    }
                    Next::Over(ended) => self.end_read(ended),
                }
            }
        }
        if let Some(moment) = self.resolver.slow.reads.soonest() {
            self.read_timer.wake_at(moment);
        }
    }

    /// Takes what workers have done. They ring when they do, and when they are there.
    pub(super) fn end_finished_reads(&mut self) {
        self.resolver.slow.reads.change();
        while let Ok(done) = self.done.try_recv() {
            let filled = if let Outcome::Installed { pages } = done.outcome { pages } else { 0 };
            if filled > 0
                && let Some(fault) = self.resolver.slow.reads.faults(done.id).next()
                && let Some(index) = self.index_of(fault.space)
            {
                add(&self.spaces[index].counters.pages, filled);
            }
            if let Some(ended) = self.resolver.finish_read(done) {
                self.end_read(ended);
            }
        }
    }

    /// Ends the reads whose deadline has passed, if the timer says that there may be some.
    pub(super) fn end_late_reads(&mut self) {
        if std::mem::take(&mut self.reads_due) {
            self.read_timer.hear();
            while let Some(ended) = self.resolver.expired_read() {
                self.end_read(ended);
            }
        }
    }

    /// Ends the reads of what was taken back: those who wait ask the new list.
    pub(super) fn end_outdated_reads(&mut self, vmap: u64, kept_since: u64) {
        while let Some(ended) = self.resolver.slow.reads.outdated(vmap, kept_since) {
            self.end_read(ended);
        }
    }

    /// Answers everybody who waits for a read, whose source may never come back. This thread is retired.
    pub(super) fn abandon_reads(&mut self) {
        self.resolver.slow.roll.close();
        while let Some(waiter) = self.resolver.slow.reads.any_waiter() {
            match waiter {
                Waiter::Fault(fault) => self.answer(fault),
                // Dropped unanswered, the ticket says so.
                Waiter::Asker { .. } => {}
            }
        }
    }

    /// Tells everybody who waits for a read what came of it.
    fn end_read(&mut self, Ended { id, how }: Ended) {
        if let How::Failed { vmap, pages, why, tries, .. } = &how {
            self.tell_failed(id, *vmap, pages, Failing { why: *why, tries: *tries });
        }
        while let Some(waiter) = self.resolver.slow.reads.next_waiter(id) {
            match waiter {
                Waiter::Fault(fault) => self.end_wait(fault, &how),
                Waiter::Asker { subject, reply } => {
                    // The asker keeps what it refers to as long as it waits.
                    drop(subject);
                    reply.answer(how.clone());
                }
            }
        }
    }

    fn end_wait(&mut self, fault: Fault, how: &How) {
        let Some(index) = self.index_of(fault.space) else { return };
        let retries = fault.retries.max(1);
        match *how {
            How::Installed => {
                let answer = self.resolver.bring(&self.spaces[index], &fault);
                self.follow(fault, answer);
            }
            How::Again { alone } => self.answer(Fault { retries, alone: fault.alone || alone, ..fault }),
            How::Failed { vmap, generation, .. } => {
                if let Some(area) = self.spaces[index].table.find(fault.addr) {
                    self.resolver.count_failed(area);
                }
                self.answer(Fault { retries, failed: Some((vmap, generation)), ..fault });
            }
        }
    }

    /// Has a failure be noted and reported.
    fn tell_failed(&mut self, id: u64, vmap: u64, pages: &Range<u64>, Failing { why, tries }: Failing) {
        // Any area of the vmap tells it. Where there is none nothing is refused; whoever asked is told.
        let shown = |fault: &Fault| {
            let target = &self.spaces[self.index_of(fault.space)?].table.find(fault.addr)?.target;
            (target.vmap.id == vmap).then(|| Arc::clone(&target.vmap))
        };
        let Some(vmap) = self.resolver.slow.reads.faults(id).find_map(shown) else { return };
        let failed = Failed { vmap, pages: pages.clone(), why, tries };
        // After those that found the keeper's channel full; the area holds the vmap too.
        if self.unsent.try_push(Post::Failed(failed)).is_ok() {
            self.flush_unsent();
        }
    }

    /// Maps pages that the object of a vmap holds where they were refused: a few, from a place on.
    pub(super) fn heal(&mut self, vmap: u64, pages: &Range<u64>, from: Place) -> Healed {
        let mut left = HEALED_AT_ONCE;
        let first = self.spaces.partition_point(|space| space.id < from.space);
        for space in &self.spaces[first..] {
            let Some(uffd) = &space.uffd else { continue };
            // A page that was refused there stays refused: it is no page of the vmap.
            if space.foreign.is_some() {
                continue;
            }
            let skipped = if space.id == from.space { from.addr } else { 0 };
            for area in space.table.iter().filter(|area| area.target.vmap.id == vmap && area.end > skipped) {
                let page = area.target.page;
                let end = area.pgoff + (area.len_bytes() / page_size()) as u64;
                let start = area.pgoff_of(skipped.max(area.start));
                let mut pgoff = page.first_of(pages.start).max(start);
                while pgoff < pages.end.min(end) {
                    let addr = area.start + (pgoff - area.pgoff) as usize * page_size();
                    let place = Place { space: space.id, addr };
                    if left == 0 {
                        return Healed::Before(place);
                    }
                    left -= 1;
                    // What is mapped, not there, or not mapped any more needs nothing.
                    if uffd.r#continue(addr, page.bytes()).stop == Some(Stop::Changing) {
                        return Healed::Changing(place);
                    }
                    pgoff += page.base_pages();
                }
            }
        }
        Healed::Everywhere
    }
}

/// Why a read failed, and how often it was tried.
struct Failing {
    why: crate::vmap::failure::Why,
    tries: u32,
}
