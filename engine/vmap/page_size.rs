//! The size of a vmap's pages: the system's own, or huge ones.
//!
//! Lists count the system's pages ("base pages") whatever the size; a huge page is a run of them that is installed, refused
//! and unmapped together. The backing object is then a memfd of hugetlbfs, rounded up to whole huge pages, whose pages
//! come from a pool that the administrator fills. The window maps the whole object and thereby reserves the pages: that
//! the pool is too small is said when the vmap is built or grown. Every other mapping is made with MAP_NORESERVE, which
//! uses that reservation and adds none, also where it reaches past the end of the object.

use std::ffi::CStr;
use std::fs;
use std::ops::Range;
use std::os::fd::OwnedFd;

use nix::errno::Errno;
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::kiobuf::{ExtentKind, Kiobuf};
use crate::page::page_size;
use crate::process::new_memfd;
use crate::sys::Features;
use crate::{Error, Result};

/// Names the size of the pages that a vmap consists of ([`VmapBuilder::page_size`](crate::VmapBuilder::page_size)).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[non_exhaustive]
pub enum PageSize {
    /// The system's own pages, of [`page_size`](crate::page_size()) bytes.
    #[default]
    Base,
    /// Huge pages of 2 MiB, from the pool of hugetlbfs.
    Huge2M,
    /// Huge pages of 1 GiB, from the pool of hugetlbfs. Copying one takes the fault-handling thread some tenths of a second, in
    /// which no other fault is answered.
    Huge1G,
}

impl PageSize {
    /// The sizes of huge pages.
    pub(crate) const HUGE: [PageSize; 2] = [PageSize::Huge2M, PageSize::Huge1G];

    /// Returns the size in bytes.
    pub fn bytes(self) -> usize {
        match self {
            PageSize::Base => page_size(),
            PageSize::Huge2M => 2 << 20,
            PageSize::Huge1G => 1 << 30,
        }
    }

    /// Tells whether pages come from the pool of huge pages.
    pub fn is_huge(self) -> bool {
        self != PageSize::Base
    }

    /// How many base pages make one of this size.
    pub(crate) fn base_pages(self) -> u64 {
        (self.bytes() / page_size()) as u64
    }

    /// The size of so many bytes; that of the system's pages if there is no such size.
    pub(crate) fn of_bytes(bytes: usize) -> PageSize {
        PageSize::HUGE.into_iter().find(|page| page.bytes() == bytes).unwrap_or(PageSize::Base)
    }

    /// The base page with which the page begins that a base page is a part of.
    pub(crate) fn first_of(self, pgoff: u64) -> u64 {
        pgoff - pgoff % self.base_pages()
    }

    /// Rounds base pages up to whole pages of this size; `None` when that overflows.
    pub(crate) fn whole(self, nr_pages: u64) -> Option<u64> {
        nr_pages.checked_next_multiple_of(self.base_pages())
    }

    /// The address at which the page of an address begins.
    pub(crate) fn floor(self, addr: usize) -> usize {
        addr & !(self.bytes() - 1)
    }

    /// Refuses a value that is not a multiple of this size, of which `unit` bytes are one.
    pub(crate) fn check_multiple(self, what: &'static str, value: u64, unit: usize) -> Result<()> {
        let multiple = (self.bytes() / unit) as u64;
        if value.is_multiple_of(multiple) { Ok(()) } else { Err(Error::Misaligned { what, value, multiple }) }
    }

    /// Makes the backing object.
    ///
    /// # Errors
    ///
    /// [`Error::HugePages`] with `ENODEV`, `ENOSYS` or `EINVAL` where the kernel has no pages of this size.
    pub(super) fn new_object(self, name: &CStr) -> Result<OwnedFd> {
        let size = match self {
            PageSize::Base => return new_memfd(name),
            PageSize::Huge2M => MFdFlags::MFD_HUGE_2MB,
            PageSize::Huge1G => MFdFlags::MFD_HUGE_1GB,
        };
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING | MFdFlags::MFD_HUGETLB | size;
        // As for every object: not executable where the kernel knows that (Linux 6.3).
        match memfd_create(name, flags | MFdFlags::from_bits_retain(libc::MFD_NOEXEC_SEAL)) {
            Err(Errno::EINVAL) => memfd_create(name, flags),
            other => other,
        }
        .map_err(|errno| self.not_to_be_had(0, errno))
    }

    /// Says that `needed` huge pages can't be had.
    pub(super) fn not_to_be_had(self, needed: u64, errno: Errno) -> Error {
        let (free, promised) = (self.pool("free_hugepages"), self.pool("resv_hugepages"));
        Error::HugePages { bytes: self.bytes(), needed, free: free.saturating_sub(promised), errno }
    }

    /// A number of the pool; 0 where there is none.
    fn pool(self, number: &str) -> u64 {
        let path = format!("/sys/kernel/mm/hugepages/hugepages-{}kB/{number}", self.bytes() / 1024);
        fs::read_to_string(path).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
    }

    /// Refuses what can't be paged in by pages of this size.
    ///
    /// # Errors
    ///
    /// [`Error::Unsupported`] where the kernel has no poison: a huge page can't be masked. [`Error::Misaligned`] for a hole
    /// that is a part of a huge page, which could not be SIGBUS by itself.
    pub(super) fn check_list(self, list: &Kiobuf, features: Features) -> Result<()> {
        if !self.is_huge() {
            return Ok(());
        }
        if !features.contains(Features::POISON) {
            return Err(Error::Unsupported {
                what: "a vmap of huge pages",
                missing: Features::POISON,
                why: "a huge page that can't be had could not be made a SIGBUS",
            });
        }
        let mut was_hole = true;
        for extent in list.extents() {
            let is_hole = extent.kind == ExtentKind::Hole;
            if is_hole != was_hole {
                self.check_multiple(
                    "the page of a list at which a hole begins or ends",
                    extent.first_page,
                    page_size(),
                )?;
            }
            was_hole = is_hole;
        }
        Ok(())
    }
}

/// The parts of a range of pages, each of one extent of the list.
pub(crate) fn parts(list: &Kiobuf, pages: Range<u64>) -> impl Iterator<Item = Range<u64>> + '_ {
    let mut first = pages.start;
    std::iter::from_fn(move || {
        if first >= pages.end {
            return None;
        }
        let end = list.extent_at(first).map_or(pages.end, |extent| pages.end.min(extent.first_page + extent.nr_pages));
        Some(std::mem::replace(&mut first, end)..end)
    })
}

/// The bytes of a buffer, which begins with page `first`, that are for `part`.
pub(crate) fn bytes_of(first: u64, part: &Range<u64>) -> Range<usize> {
    let at = |page| (page - first) as usize * page_size();
    at(part.start)..at(part.end)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(parts: &[(bool, u64)]) -> Kiobuf {
        let mut list = Kiobuf::new();
        for &(hole, nr_pages) in parts {
            let mut part = Kiobuf::new();
            if hole {
                part.map_hole(nr_pages).unwrap()
            } else {
                part.map_zero(nr_pages).unwrap()
            }
            list.expand(&part).unwrap();
        }
        list
    }

    #[test]
    fn holes_are_whole_huge_pages() {
        let size = PageSize::Huge2M;
        let n = size.base_pages();
        let check = |parts: &[(bool, u64)]| size.check_list(&list(parts), Features::POISON);
        for good in [
            &[][..],
            &[(false, 1)],
            &[(true, 1)],
            &[(true, n), (false, 5)],
            &[(false, n), (true, 1), (true, n - 1), (false, 1)],
            &[(false, 1), (false, n - 1), (true, 3)],
        ] {
            check(good).unwrap();
        }
        for (bad, at) in [
            (&[(false, 1), (true, 1)][..], 1),
            (&[(true, 1), (false, 1)], 1),
            (&[(true, n), (false, n + 1), (true, n)], 2 * n + 1),
        ] {
            let error = check(bad).unwrap_err();
            assert!(
                matches!(error, Error::Misaligned { value, multiple, .. } if (value, multiple) == (at, n)),
                "{error}"
            );
        }
        assert!(matches!(size.check_list(&list(&[]), Features::empty()), Err(Error::Unsupported { .. })));
        PageSize::Base.check_list(&list(&[(false, 1), (true, 1)]), Features::empty()).unwrap();
    }

    #[test]
    fn sizes_are_rounded_up_and_addresses_down() {
        let n = PageSize::Huge2M.base_pages();
        assert_eq!(PageSize::Huge2M.whole(0), Some(0));
        assert_eq!(PageSize::Huge2M.whole(n + 1), Some(2 * n));
        assert_eq!(PageSize::Huge2M.whole(u64::MAX), None);
        assert_eq!(PageSize::Base.whole(7), Some(7));
        assert_eq!((PageSize::Huge2M.first_of(n - 1), PageSize::Huge2M.first_of(n)), (0, n));
        assert_eq!(PageSize::Huge2M.floor(0x3f_ffff), 0x20_0000);
    }
}
