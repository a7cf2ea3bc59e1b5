//! Filling and writing huge pages without a region.

use std::ptr::copy_nonoverlapping;

use memmap2::MmapMut;
use nix::errno::Errno;

use super::core::VmapCore;
use super::page_size::{bytes_of, parts};
use super::window::{Window, read};
use crate::kiobuf::{Kiobuf, Nopage};
use crate::process::gate;
use crate::process::mapping::Placement;
use crate::sys::Stop;
use crate::{Error, Result};

/// Tries at a huge page while the kernel says that the address space is changing, which of a window it never says for long.
const TRIES: usize = 1000;

impl Window {
    /// Fills the missing huge pages that the base pages `first..end` are parts of.
    ///
    /// # Errors
    ///
    /// [`Error::NoPage`] at the first that can't be had; those before it are filled.
    pub(super) fn fill_huge(&self, list: &Kiobuf, first: u64, end: u64) -> Result<()> {
        let mut buffer = None;
        let mut at = self.page.first_of(first);
        while at < end {
            if !self.holds(at) {
                self.fill_one(list, at, &mut buffer).map_err(|why| match why {
                    // The whole of it is missing, whichever part failed.
                    Error::NoPage { why, .. } => Error::NoPage { pgoff: at.max(first), why },
                    other => other,
                })?;
            }
            at = self.page_end(at);
        }
        Ok(())
    }

    fn fill_one(&self, list: &Kiobuf, at: u64, buffer: &mut Option<MmapMut>) -> Result<()> {
        let no_page = |why: String| Error::NoPage { pgoff: at, why };
        let until = self.page_end(at).min(list.nr_pages());
        let src = match list.nopage(at) {
            Nopage::Sigbus(why) => return Err(no_page(why.to_string())),
            Nopage::Direct { src, run } if run.end >= self.page_end(at) => {
                src.wrapping_add(bytes_of(run.start, &(run.start..at)).end)
            }
            _ => {
                let buffer = match buffer {
                    Some(buffer) => buffer,
                    None => buffer.insert(
                        MmapMut::map_anon(self.page.bytes()).map_err(Error::io("mmap of a buffer for a huge page"))?,
                    ),
                };
                for part in parts(list, at..until) {
                    read(list, part.start, &mut buffer[bytes_of(at, &part)])?;
                }
                buffer[bytes_of(at, &(at..until)).end..].fill(0);
                buffer.as_ptr()
            }
        };
        for _ in 0..TRIES {
            // SAFETY: a whole huge page lies at `src`: in the list, which keeps it alive, or in the buffer.
            let install = unsafe { self.copy(at, src, self.page.bytes()) };
            match install.stop {
                None => return Ok(()),
                Some(Stop::Changing) => {}
                // The kernel says the same when the pool is empty.
                Some(Stop::Present) if self.holds(at) => return Ok(()),
                Some(Stop::Present) => {
                    return Err(no_page(self.page.not_to_be_had(1, Errno::ENOMEM).to_string()));
                }
                Some(stop) => return Err(no_page(stop.to_string())),
            }
        }
        Err(no_page(Stop::Changing.to_string()))
    }
}

impl VmapCore {
    /// Writes to resident pages of an object that write(2) is not possible on, which is one of huge pages.
    pub(super) fn write_mapped(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        let page = self.page().bytes() as u64;
        let start = offset - offset % page;
        let end = (offset + bytes.len() as u64).next_multiple_of(page);
        let mapping = {
            // From mmap to MADV_DONTFORK, no fork: a child must not get the mapping.
            let _gate = gate();
            self.object.map((end - start) as usize, start, Placement::Anywhere)?
        };
        mapping.reveal(true)?;
        let to = (mapping.addr() + (offset - start) as usize) as *mut u8;
        // SAFETY: the bytes are within the mapping just made, of pages that the caller has made resident and keeps so; no
        // Rust value is a part of it, and `bytes` is borrowed memory somewhere else.
        unsafe { copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
        Ok(())
    }
}
