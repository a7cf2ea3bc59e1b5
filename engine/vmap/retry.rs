//! Asking again for pages that could not be read.
//!
//! A page that was refused is poisoned in each process that touched it, and no touch of it asks anybody. What takes the poison
//! away is the page itself: so it is read first, and then mapped wherever it was refused. That is right at any time, in every
//! process: an address that shows something else by then is not the page's, and is left alone.

use std::ops::Range;
use std::sync::Arc;

use super::core::Contents;
use super::window::{Window, is_resident};
use super::{Vmap, owner_only, refuse_nested};
use crate::kiobuf::{Kiobuf, ReadUnit};
use crate::runtime::command::{Changing, Command};
use crate::runtime::patience::Patience;
use crate::runtime::reads::Subject;
use crate::runtime::threads::{self, Role};
use crate::sys::Features;
use crate::{Error, Result};

/// Pages that are mapped in one step of the fault-handling thread, and read together if they can be.
const STEP_PAGES: u64 = 64;

impl Vmap {
    /// Asks again for those pages of a range of the list that could not be read, and makes those that can be had now readable
    /// in every process, forked children included. Pages that nobody has touched are not asked for.
    ///
    /// Each is tried as for a touch, as the vmap's [`FailurePolicy`](crate::FailurePolicy) says, and this waits for it. It may be
    /// called where a failure is [reported](crate::VmapBuilder::on_read_failed).
    ///
    /// # Errors
    ///
    /// [`Error::NoPage`] with the first page that still can't be had: it and its like stay SIGBUS, and all others are
    /// readable. [`Error::Unsupported`] without the feature POISON, where what stands for it stays. [`Error::NotOwner`] in a
    /// forked child; [`Error::WouldDeadlock`] in a page source, or where a list is dropped; [`Error::Shutdown`]; [`Error::Sys`]
    /// with `EAGAIN` when an address space went on changing for too long.
    pub fn retry(&self, pages: Range<u64>) -> Result<()> {
        owner_only(&self.shared, "retrying pages")?;
        refuse_nested("retrying pages")?;
        if let Some(role @ (Role::Worker | Role::Keeper)) = threads::current_role(self.shared.id) {
            let thread = if role == Role::Worker { "worker" } else { "keeper" };
            return Err(Error::WouldDeadlock { what: "retrying pages", thread });
        }
        if !self.shared.poisons() {
            return Err(Error::Unsupported {
                what: "retrying pages",
                missing: Features::POISON,
                why: "what stands for poison on older kernels can't be taken back",
            });
        }
        // Whoever was refused a page before this was called is known after it.
        self.shared.settle()?;
        let mut first_failure = Ok(());
        for failed in self.core.failures.take(pages) {
            let mut start = failed.start;
            while start < failed.end {
                let step = self.step(start, failed.end);
                start = step.end;
                let outcome = self.retry_step(step);
                // Of several failures, the first is told.
                if first_failure.is_ok() {
                    first_failure = outcome;
                }
            }
        }
        first_failure
    }

    /// The pages from `start` on that are read together: of huge pages, one.
    fn step(&self, start: u64, end: u64) -> Range<u64> {
        let page = self.core.page();
        let first = page.first_of(start);
        if page.is_huge() { first..first + page.base_pages() } else { start..end.min(start + STEP_PAGES) }
    }

    /// Reads and maps a few pages; notes again what can't be had.
    fn retry_step(&self, pages: Range<u64>) -> Result<()> {
        let contents = self.core.contents();
        let Contents { list, window: Some(window), .. } = &contents else { return Ok(()) };
        // What is behind the end of the list needs no reading.
        let held = pages.start..pages.end.min(list.nr_pages());
        let mut outcome = self.read_missing(&contents, window, held.clone());
        if outcome.is_err() && !self.core.page().is_huge() {
            outcome = self.read_one_by_one(&contents, list, window, &held);
        } else if outcome.is_err() {
            self.core.failures.note(held);
        }
        let healed = self.heal(&pages);
        if healed.is_err() {
            self.core.failures.note(pages);
        }
        outcome.and(healed)
    }

    /// Reads pages by themselves, or with those that can't be had without them.
    fn read_one_by_one(&self, contents: &Contents, list: &Kiobuf, window: &Window, pages: &Range<u64>) -> Result<()> {
        let mut outcome = Ok(());
        let mut at = pages.start;
        while at < pages.end {
            let Some(ReadUnit { pages: unit, .. }) = list.read_unit(at) else { break };
            at = unit.end;
            if let Err(error) = self.read_missing(contents, window, unit.clone()) {
                self.core.failures.note(unit);
                outcome = outcome.and(Err(error));
            }
        }
        outcome
    }

    /// Has a worker read pages, if one of them is missing.
    fn read_missing(&self, contents: &Contents, window: &Window, pages: Range<u64>) -> Result<()> {
        if pages.clone().all(|page| is_resident(&self.core.object, window, page)) {
            return Ok(());
        }
        let subject =
            || Subject { vmap: Arc::clone(&self.core), list: contents.list.clone(), window: contents.window.clone() };
        let (generation, pgoff) = (contents.generation, pages.start);
        let ask = |reply| Command::Read { subject: subject(), generation, pages, reply };
        let read = self.shared.handler.ask(ask)?;
        read.map_err(|why| Error::NoPage { pgoff, why: why.message().to_owned() })
    }

    fn heal(&self, pages: &Range<u64>) -> Result<()> {
        let mut patience = Patience::new();
        loop {
            let (vmap, pages) = (self.core.id, pages.clone());
            match self.shared.handler.ask(|reply| Command::Heal { vmap, pages, reply })? {
                Ok(()) => return Ok(()),
                Err(Changing) => patience.wait()?,
            }
        }
    }
}
