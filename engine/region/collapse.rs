//! Transparent huge pages on request.

use std::fs;
use std::ops::Range;

use nix::errno::Errno;

use super::Region;
use crate::sys::Features;
use crate::{Error, Result};

/// Where the kernel says how large a transparent huge page is.
const SIZE: &str = "/sys/kernel/mm/transparent_hugepage/hpage_pmd_size";

impl Region {
    /// Has the kernel put pages together to transparent huge pages (MADV_COLLAPSE, Linux 6.1), for fewer misses of the
    /// processor's address cache; every process sees the same bytes as before. Answers how many huge pages it made.
    ///
    /// For every whole huge page (2 MiB on most machines) whose addresses lie in the byte range. All of its pages must be
    /// there already: none is brought. They must lie alike in memory and in the list, so a region that is to be collapsed is
    /// attached at an address ([`AttachOptions::at`](crate::AttachOptions::at)) that is a multiple of the huge page's size,
    /// as is its `pgoff` in bytes. The setting `shmem_enabled` of the system doesn't matter. What is revoked or unmapped
    /// afterwards breaks a huge page up again.
    ///
    /// A vmap whose pages are huge from the start is built by [`VmapBuilder::page_size`](crate::VmapBuilder::page_size).
    ///
    /// # Errors
    ///
    /// [`Error::NotCollapsed`] for the first huge page that could not be made; others are made all the same. `EBUSY`: pages
    /// are missing, or a memory cgroup is full; `EAGAIN`: pages are in use, try again; `ENOMEM`: no huge page is free;
    /// `EINVAL`: all pages are missing, they don't lie alike, they were given other access in parts, or the kernel makes
    /// none. [`Error::Unsupported`] before Linux 6.6, where it would fill missing pages with zeros, or could (POISON tells
    /// them apart). [`Error::Invalid`] for a range outside the region or without a whole huge page; [`Error::NotInherited`].
    pub fn collapse(&self, range: Range<usize>) -> Result<usize> {
        self.check()?;
        if !self.shared.poisons() {
            // Before Linux 6.4 the kernel doesn't ask whether somebody wants to bring what is missing.
            return Err(Error::Unsupported {
                what: "putting pages together to huge ones",
                missing: Features::POISON,
                why: "older kernels fill missing pages with zeros",
            });
        }
        let invalid =
            |value: usize, rule| Error::Invalid { what: "the range in a region in bytes", value: value as u64, rule };
        if range.start > range.end || range.end > self.len {
            return Err(invalid(range.end, "its end must not be before its start, nor past the region"));
        }
        let size = fs::read_to_string(SIZE).ok().and_then(|text| text.trim().parse::<usize>().ok());
        let Some(size) = size.filter(|size| size.is_power_of_two()) else {
            return Err(Error::NotCollapsed { offset: range.start, errno: Errno::EINVAL, made: 0 });
        };
        let first = (self.addr + range.start).next_multiple_of(size);
        let end = (self.addr + range.end) & !(size - 1);
        if first >= end {
            return Err(invalid(range.start, "it must hold the addresses of a whole huge page"));
        }
        let (mut made, mut refused) = (0, None);
        for addr in (first..end).step_by(size) {
            // SAFETY: changes no byte; the range is the region's, or what was mapped there instead, whose bytes stay too.
            let answer = unsafe { libc::madvise(addr as *mut libc::c_void, size, libc::MADV_COLLAPSE) };
            match Errno::result(answer) {
                Ok(_) => made += 1,
                Err(errno) => drop(refused.get_or_insert((addr - self.addr, errno))),
            }
        }
        match refused {
            None => Ok(made),
            Some((offset, errno)) => Err(Error::NotCollapsed { offset, errno, made }),
        }
    }
}
