//! Bringing a range before a system call.

use std::ops::Range;

use super::Region;
use crate::{Error, Result};

impl Region {
    /// Brings the pages that a range of bytes of the region lies on, so that a system call finds them: with
    /// [`Delivery::InThread`](crate::Delivery::InThread), and where the engine serves user mode only
    /// ([`OpenWay::serves_kernel_faults`](crate::OpenWay::serves_kernel_faults)), one that meets a missing page answers
    /// `EFAULT`. Pages that are there already stay as they are.
    ///
    /// It is [`Region::populate`] with the error that a read of the range would have. They stay until they are taken back, by
    /// [`Vmap::revoke`](crate::Vmap::revoke) or by whoever punches holes.
    ///
    /// # Errors
    ///
    /// [`Error::NoPage`] with the first page that can't be had, or was unmapped by other code: all others are there then.
    /// All else as [`Region::populate`].
    pub fn prefault(&self, range: Range<usize>) -> Result<()> {
        self.populate(range).map_err(|error| match error {
            Error::NotPopulated { pgoff, why, .. } => Error::NoPage { pgoff, why },
            error => error,
        })
    }
}
