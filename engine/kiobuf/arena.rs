//! Memory of our own to build a page list from: what `vmalloc` is to `map_kernel_kiobuf`.

use std::fmt;
use std::fs::File;
use std::ops::{Deref, DerefMut};

use memmap2::{MmapMut, MmapOptions, MmapRaw};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};

use crate::error::{Error, Result};
use crate::page::page_size;
use crate::process::sized_memfd;

/// Owns whole, page-aligned pages of memory, to be filled and then handed to [`Kiobuf::map_kernel`].
///
/// The pages are zero until they are written, so that a page list never shows what memory held before. They are anonymous
/// memory, of which each vmap makes copies, or those of a memfd, which a vmap shows themselves ([`Arena::shared`]).
///
/// [`Kiobuf::map_kernel`]: super::Kiobuf::map_kernel
pub struct Arena {
    // A raw mapping: a page list keeps pointers into it, which a `&mut [u8]` held in here would invalidate.
    pages: MmapRaw,
    /// What is mapped, if it is not anonymous memory. Nobody else has it as long as it is in here.
    memfd: Option<File>,
}

impl Arena {
    /// Allocates `nr_pages` pages of zeros.
    ///
    /// # Errors
    ///
    /// * [`Error::Invalid`] (`EINVAL`): `nr_pages` is zero.
    /// * [`Error::Overflow`] (`EOVERFLOW`): that many bytes do not fit in an address space.
    /// * [`Error::Sys`] (`ENOMEM`): the kernel refuses the mapping.
    pub fn new(nr_pages: usize) -> Result<Self> {
        let pages = MmapMut::map_anon(arena_len(nr_pages)?).map_err(Error::io("mmap of an arena"))?;
        Ok(Self { pages: pages.into(), memfd: None })
    }

    /// Allocates `nr_pages` pages of zeros in a memfd of exactly that size. A vmap of a list that is one such arena shows
    /// these pages themselves ([`Kiobuf::map_memfd`](super::Kiobuf::map_memfd)): what was filled in is not copied, and what
    /// regions write is in the list too. A child that is forked while this value lives has the same pages, not a copy.
    ///
    /// # Errors
    ///
    /// * [`Error::Invalid`] (`EINVAL`): `nr_pages` is zero.
    /// * [`Error::Overflow`] (`EOVERFLOW`): that many bytes do not fit in an address space.
    /// * [`Error::Sys`]: `EMFILE`, `EFBIG` (`RLIMIT_FSIZE`), or `ENOMEM` when the kernel refuses the mapping.
    pub fn shared(nr_pages: usize) -> Result<Self> {
        let len = arena_len(nr_pages)?;
        let memfd = File::from(sized_memfd(c"kiomap-arena", len)?);
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&memfd, FcntlArg::F_ADD_SEALS(seals)).map_err(Error::sys("sealing the memfd of an arena"))?;
        let pages = MmapOptions::new().len(len).map_raw(&memfd).map_err(Error::io("mmap of an arena"))?;
        Ok(Self { pages, memfd: Some(memfd) })
    }

    /// Gives the memfd of [`Arena::shared`] up, if it is one, and unmaps it: from here on others may write to it.
    pub(super) fn into_memfd(self) -> std::result::Result<File, Self> {
        match self {
            Self { memfd: Some(memfd), .. } => Ok(memfd),
            anonymous => Err(anonymous),
        }
    }

    /// Returns the number of pages.
    pub fn nr_pages(&self) -> usize {
        self.pages.len() / page_size()
    }

    /// Returns the address of the first byte, good for every page.
    pub(super) fn as_ptr(&self) -> *const u8 {
        self.pages.as_ptr()
    }
}

/// The length in bytes of an arena of `nr_pages` pages.
fn arena_len(nr_pages: usize) -> Result<usize> {
    if nr_pages == 0 {
        return Err(Error::Invalid {
            what: "the number of pages of an arena",
            value: 0,
            rule: "an arena has at least one page",
        });
    }
    nr_pages.checked_mul(page_size()).filter(|&len| isize::try_from(len).is_ok()).ok_or(Error::Overflow {
        what: "an arena (its pages times their size)",
        base: 0,
        len: nr_pages as u64,
    })
}

impl Deref for Arena {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the mapping is `len` bytes of readable memory, initialised with zeros by the kernel, never remapped while
        // it is owned, and nobody else has its memfd, which can't shrink; it is written through `deref_mut` only, which needs this arena exclusively.
        unsafe { std::slice::from_raw_parts(self.pages.as_ptr(), self.pages.len()) }
    }
}

impl DerefMut for Arena {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and the mapping is writable. A page list reads an arena only while it owns it in an
        // `Arc`, and whoever can name it mutably (`&mut self`) has proved that no other list does.
        unsafe { std::slice::from_raw_parts_mut(self.pages.as_mut_ptr(), self.pages.len()) }
    }
}

impl fmt::Debug for Arena {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Arena").field("nr_pages", &self.nr_pages()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// T109: contents are defined before anything is attached.
    #[test]
    fn an_arena_is_zero_page_aligned_and_writable() {
        for mut arena in [Arena::new(3).unwrap(), Arena::shared(3).unwrap()] {
            assert_eq!(arena.nr_pages(), 3);
            assert_eq!(arena.len(), 3 * page_size());
            assert_eq!(arena.as_ptr().addr() % page_size(), 0);
            assert!(arena.iter().all(|&byte| byte == 0));
            arena.fill(0xff);
            assert!(arena.iter().all(|&byte| byte == 0xff));
        }
    }

    #[test]
    fn an_arena_of_no_pages_or_of_too_many_is_refused() {
        for new in [Arena::new, Arena::shared] {
            assert!(matches!(new(0), Err(Error::Invalid { value: 0, .. })));
            assert!(matches!(new(usize::MAX), Err(Error::Overflow { .. })));
            assert!(matches!(new(isize::MAX as usize / page_size() + 1), Err(Error::Overflow { .. })));
        }
    }
}
