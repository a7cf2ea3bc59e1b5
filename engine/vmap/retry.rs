//! Asking again for pages that could not be read.
//!
//! A page that was refused is poisoned in each process that touched it, and no touch of it asks anybody. What takes the poison
//! away is the page itself: so it is read first, and then mapped wherever it was refused. That is right at any time, in every
//! process: an address that shows something else by then is not the page's, and is left alone.

use std::ops::Range;
use std::sync::Arc;

use super::core::Contents;
use super::fetch::Fetcher;
use super::window::{Window, is_resident};
use super::{Vmap, owner_only, refuse_nested};
use crate::runtime::command::{Command, Healed, Place};
use crate::runtime::patience::Patience;
use crate::runtime::reads::How;
use crate::runtime::threads::{self, Role};
use crate::sys::Features;
use crate::{Error, Result};

/// Pages that are read together if they can be.
const STEP_PAGES: u64 = 64;

impl Vmap {
    /// Asks again for those pages of a range of the list that could not be read, and makes those that can be had now readable
    /// in every process, forked children included. Pages that nobody has touched are not asked for.
    ///
    /// Each is tried as for a touch, as the vmap's [`FailurePolicy`](crate::FailurePolicy) says, and this waits for it; of a file or
    /// source that lets the deadline pass, nothing more is asked. It may be called where a failure is [reported](crate::VmapBuilder::on_read_failed).
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
        let mut outcome = Ok(());
        let mut fetcher = Fetcher::default();
        for failed in self.core.failures.within(pages) {
            let mut at = failed.start;
            // What is before it failed together.
            let mut alone_until = at;
            while at < failed.end {
                let Some(step) = self.step(at..failed.end, at < alone_until) else { break };
                let (start, end) = (step.pages.start, step.pages.end);
                match self.read(&step, &mut fetcher)? {
                    How::Installed => {
                        outcome = outcome.and(self.heal(&step.pages));
                        at = end;
                    }
                    // The list was taken back: the one of now is asked.
                    How::Again { alone: false } => {}
                    How::Again { alone: true } => alone_until = end,
                    How::Failed { why, .. } => {
                        // Of several failures, the first is told.
                        outcome = outcome.and(Err(Error::NoPage { pgoff: start, why: why.message().to_owned() }));
                        at = end;
                    }
                }
            }
        }
        outcome
    }

    /// What is to be asked for at the start of a range of pages; `None` past the end of the list. The list is looked at anew each
    /// time: it may have been exchanged.
    fn step(&self, Range { start, end }: Range<u64>, alone: bool) -> Option<Step> {
        let (contents, page) = (self.core.contents(), self.core.page());
        let window = contents.window.clone()?;
        let unit = contents.list.read_unit(start)?;
        let pages = if page.is_huge() {
            page.first_of(start)..page.first_of(start) + page.base_pages()
        } else if alone {
            unit.pages
        } else {
            start..end.min(start + STEP_PAGES).min(unit.run.end)
        };
        Some(Step { contents, window, pages })
    }

    /// Has a worker read the pages of a step, if one of them is missing.
    fn read(&self, step: &Step, fetcher: &mut Fetcher) -> Result<How> {
        let Step { contents, window, pages } = step;
        // What is behind the end of the list needs no reading.
        let pages = pages.start..pages.end.min(contents.list.nr_pages());
        if pages.clone().all(|page| is_resident(&self.core.object, window, page)) {
            return Ok(How::Installed);
        }
        fetcher.read(&self.shared, &self.core, contents, pages)
    }

    /// Maps pages wherever they were refused.
    fn heal(&self, pages: &Range<u64>) -> Result<()> {
        let mut patience = Patience::new();
        let mut from = Place::default();
        loop {
            let (vmap, pages) = (self.core.id, pages.clone());
            match self.shared.handler.ask(|reply| Command::Heal { vmap, pages, from, reply })? {
                Healed::Everywhere => break,
                Healed::Before(place) => from = place,
                Healed::Changing(place) => {
                    if place != from {
                        (from, patience) = (place, Patience::new());
                    }
                    patience.wait()?;
                }
            }
        }
        // Not before: whoever asks again meanwhile must not find that there is nothing to be asked for.
        self.core.failures.forget(pages.clone());
        Ok(())
    }
}

/// What is asked for at once.
struct Step {
    contents: Contents,
    window: Arc<Window>,
    pages: Range<u64>,
}
