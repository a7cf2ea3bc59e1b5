//! Memory of our own to build a page list from: what `vmalloc` is to `map_kernel_kiobuf`.

use std::fmt;
use std::ops::{Deref, DerefMut};

use memmap2::{MmapMut, MmapRaw};

use crate::error::{Error, Result};
use crate::page::page_size;

/// Owns whole, page-aligned pages of anonymous memory, to be filled and then handed to [`Kiobuf::map_kernel`].
///
/// The pages are zero until they are written, so that a page list never shows what memory held before.
///
/// [`Kiobuf::map_kernel`]: super::Kiobuf::map_kernel
pub struct Arena {
    // A raw mapping: a page list keeps pointers into it, which a `&mut [u8]` held in here would invalidate.
    pages: MmapRaw,
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
        if nr_pages == 0 {
            return Err(Error::Invalid {
                what: "the number of pages of an arena",
                value: 0,
                rule: "an arena has at least one page",
            });
        }
        let len = nr_pages
            .checked_mul(page_size())
            .filter(|&len| isize::try_from(len).is_ok())
            .ok_or(Error::Overflow { what: "an arena (its pages times their size)", base: 0, len: nr_pages as u64 })?;
        let pages = MmapMut::map_anon(len).map_err(Error::io("mmap of an arena"))?;
        Ok(Self { pages: pages.into() })
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

impl Deref for Arena {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the mapping is `len` bytes of readable anonymous memory, initialised with zeros by the kernel, never
        // remapped while it is owned; it is written through `deref_mut` only, which needs this arena exclusively.
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
        let mut arena = Arena::new(3).unwrap();
        assert_eq!(arena.nr_pages(), 3);
        assert_eq!(arena.len(), 3 * page_size());
        assert_eq!(arena.as_ptr().addr() % page_size(), 0);
        assert!(arena.iter().all(|&byte| byte == 0));
        arena.fill(0xff);
        assert!(arena.iter().all(|&byte| byte == 0xff));
    }

    #[test]
    fn an_arena_of_no_pages_or_of_too_many_is_refused() {
        assert!(matches!(Arena::new(0), Err(Error::Invalid { value: 0, .. })));
        assert!(matches!(Arena::new(usize::MAX), Err(Error::Overflow { .. })));
        assert!(matches!(Arena::new(isize::MAX as usize / page_size() + 1), Err(Error::Overflow { .. })));
    }
}
