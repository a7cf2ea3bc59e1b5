//! Bringing a range before a system call.

use std::ops::Range;

use nix::errno::Errno;

use super::Region;
use crate::fork::link::Local;
use crate::page::page_size;
use crate::{Error, Result};

impl Region {
    /// Brings the pages that a range of bytes of the region lies on, so that a system call finds them: with
    /// [`Delivery::InThread`](crate::Delivery::InThread), and where the engine serves user mode only
    /// ([`OpenWay::serves_kernel_faults`](crate::OpenWay::serves_kernel_faults)), one that meets a missing page answers
    /// `EFAULT`. Pages that are there already stay as they are.
    ///
    /// They stay until they are taken back, by [`Vmap::revoke`](crate::Vmap::revoke) or by whoever punches holes.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] when the range ends past the region; [`Error::NoPage`] at the first page that can't be had: those
    /// before it are there; [`Error::NotInherited`] as [`Region::check`]; [`Error::NotOwner`] in a forked child where the
    /// engine serves user mode only; [`Error::WouldDeadlock`] in a page source; [`Error::Shutdown`] after a shutdown;
    /// [`Error::Sys`].
    pub fn prefault(&self, range: Range<usize>) -> Result<()> {
        self.check()?;
        let invalid =
            |rule| Error::Invalid { what: "the end of a range of a region in bytes", value: range.end as u64, rule };
        if range.end > self.len {
            return Err(invalid("the range must lie within the region"));
        }
        let Some(len) = range.end.checked_sub(range.start) else {
            return Err(invalid("it must not lie before the range's start"));
        };
        if len == 0 {
            return Ok(());
        }
        if matches!(&*self.shared.local(), Local::Child { .. }) {
            return self.prefault_in_child(range);
        }
        let nr_pages = self.core.nr_pages();
        let pages = |bytes: usize| self.pgoff + (bytes / page_size()) as u64;
        let (first, last) = (pages(range.start), pages(range.end - 1));
        // As much as there is, so that what can be had is there when the rest is refused.
        let end = (last + 1).min(nr_pages);
        if first < end {
            let page = page_size() as u64;
            drop(self.vmap().make_resident(first * page, ((end - first) * page) as usize)?);
        }
        if last < nr_pages {
            return Ok(());
        }
        Err(Error::NoPage { pgoff: first.max(nr_pages), why: "the list ends before it".into() })
    }

    /// The kernel itself touches the pages, which the engine answers as any touch.
    fn prefault_in_child(&self, range: Range<usize>) -> Result<()> {
        if !self.shared.way.serves_kernel_faults() {
            return Err(Error::NotOwner { what: "bringing pages where the engine serves user mode only" });
        }
        let page = page_size();
        let start = range.start - range.start % page;
        let populate = |start: usize, end: usize| {
            // SAFETY: brings pages of this region, or finds that it is not mapped there; changes no byte.
            Errno::result(unsafe {
                libc::madvise(self.as_ptr().add(start).cast(), end - start, libc::MADV_POPULATE_READ)
            })
        };
        match populate(start, range.end) {
            Ok(_) => return Ok(()),
            Err(Errno::EFAULT | Errno::EHWPOISON | Errno::ENOMEM) => {}
            Err(errno) => return Err(Error::sys("madvise(MADV_POPULATE_READ)")(errno)),
        }
        // Which of them it was, the kernel does not say.
        for at in (start..range.end).step_by(page) {
            if let Err(errno) = populate(at, (at + page).min(range.end)) {
                return Err(Error::NoPage { pgoff: self.pgoff + (at / page) as u64, why: errno.to_string() });
            }
        }
        Ok(())
    }
}
