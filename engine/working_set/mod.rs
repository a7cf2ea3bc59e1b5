//! The noun `WorkingSet`: the pages that an application really faulted on, in that order, kept for its next start.
//!
//! A start wants the same few pages first, each time. They are recorded where faults are counted ([`recorder`]), saved beside
//! the image ([`mod@file`]), and brought at the next start before they are wanted
//! ([`Region::replay`](crate::Region::replay)).

pub(crate) mod fault;
mod file;
pub(crate) mod recorder;

use std::collections::HashSet;
use std::fmt;

use crate::Result;
pub use fault::WorkingSetFault;

/// The most pages that a working set has: 64 GiB, where pages are of 4 KiB.
pub(crate) const PAGES_MAX: u64 = 1 << 24;

/// Tells the contents of a list from any others', as far as they are known.
pub(crate) type Identity = [u8; 32];

/// Holds the pages that were faulted on, in the order of their first faults, and what list they are of.
///
/// It comes from [`Vmap::working_set`](crate::Vmap::working_set) or from [a file](WorkingSet::load). It names pages and holds
/// none of their bytes, so that it can't make a page wrong: what it brings comes from the list.
#[derive(Clone, PartialEq, Eq)]
pub struct WorkingSet {
    /// Distinct, each less than `list_pages`; at most [`PAGES_MAX`].
    pages: Vec<u64>,
    list_pages: u64,
    identity: Identity,
}

impl WorkingSet {
    /// Returns the pages, in the order in which they were first faulted on.
    pub fn pages(&self) -> &[u64] {
        &self.pages
    }

    /// Tells whether there is no page in it.
    pub fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }

    /// Returns the number of pages of the list that it was recorded of.
    pub fn list_pages(&self) -> u64 {
        self.list_pages
    }

    /// Adds the pages of another working set of the same image behind its own: what was faulted on at a start that had this set
    /// replayed, say. At most 2^24 pages are kept.
    ///
    /// # Errors
    ///
    /// [`Error::WorkingSet`](crate::Error::WorkingSet) (`ESTALE`): it is of another list.
    pub fn include(&mut self, other: &WorkingSet) -> Result<()> {
        other.check(self.list_pages, &self.identity)?;
        let known: HashSet<u64> = self.pages.iter().copied().collect();
        let room = (PAGES_MAX as usize).saturating_sub(self.pages.len());
        self.pages.extend(other.pages.iter().copied().filter(|page| !known.contains(page)).take(room));
        Ok(())
    }

    pub(crate) fn new(pages: Vec<u64>, list_pages: u64, identity: Identity) -> WorkingSet {
        debug_assert!(pages.len() as u64 <= PAGES_MAX && pages.iter().all(|&page| page < list_pages));
        WorkingSet { pages, list_pages, identity }
    }

    /// Refuses to be used for another list.
    pub(crate) fn check(&self, list_pages: u64, identity: &Identity) -> Result<()> {
        if self.list_pages != list_pages {
            return Err(WorkingSetFault::OtherLength { found: self.list_pages, here: list_pages }.into());
        }
        if self.identity != *identity {
            return Err(WorkingSetFault::OtherImage.into());
        }
        Ok(())
    }
}

impl fmt::Debug for WorkingSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WorkingSet")
            .field("nr_pages", &self.pages.len())
            .field("list_pages", &self.list_pages)
            .finish_non_exhaustive()
    }
}
