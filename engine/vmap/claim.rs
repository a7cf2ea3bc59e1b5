//! One vmap at a time for each memfd that is shown itself, over all engines of the process: which area shows which vmap is
//! told by the memfd, where no event tells it.

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::object::FileId;
use crate::process::{depth, gate};
use crate::{Error, Result};

/// The memfds of vmaps that are being built, each with the process that builds it. Locked with forks kept away.
static CLAIMS: Mutex<Vec<(u32, FileId)>> = Mutex::new(Vec::new());

fn claims() -> MutexGuard<'static, Vec<(u32, FileId)>> {
    CLAIMS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The right to publish a vmap that shows a memfd itself; dropped when the vmap is entered.
pub(super) struct Claim {
    entry: (u32, FileId),
}

impl Claim {
    /// Claims a memfd.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] when a vmap that is alive shows it, or is being built.
    pub(super) fn new(file: FileId) -> Result<Claim> {
        let taken = |value| Error::Invalid {
            what: "the inode of the memfd",
            value,
            rule: "no other vmap of this process may show it itself: share the vmap, or copy the pages",
        };
        let entry = (depth(), file);
        {
            let _gate = gate();
            let mut claims = claims();
            if claims.contains(&entry) {
                return Err(taken(file.1));
            }
            claims.push(entry);
        }
        let claim = Claim { entry };
        // Claimed first: a vmap that was built before is entered, one that is built after this finds the claim.
        match crate::fork::engines().iter().any(|engine| engine.vmaps.owner_of(file).is_some()) {
            true => Err(taken(file.1)),
            false => Ok(claim),
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let _gate = gate();
        claims().retain(|entry| *entry != self.entry);
    }
}
