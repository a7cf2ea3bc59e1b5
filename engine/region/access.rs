//! Safe access to memory that other processes may write at any moment: bounds are checked, and every read and write
//! is volatile or atomic, so that the compiler assumes nothing about the bytes in between.

use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64};

use super::Region;
use crate::{Error, Result};

impl Region {
    /// Reads `buf.len()` bytes from byte `offset` of the region on. Not atomic as a whole.
    ///
    /// A touch of a page that can't be had is SIGBUS, as any touch is.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] when the range ends past the region; [`Error::NotInherited`] as [`Region::check`].
    pub fn read_at(&self, offset: usize, buf: &mut [u8]) -> Result<()> {
        let src = self.bytes_at(offset, buf.len(), 1)?;
        volatile_copy(src, buf.as_mut_ptr(), buf.len());
        Ok(())
    }

    /// Writes `bytes` at byte `offset` of the region. Not atomic as a whole.
    ///
    /// # Errors
    ///
    /// As [`Region::read_at`]; [`Error::Invalid`] too for a read-only region.
    pub fn write_at(&self, offset: usize, bytes: &[u8]) -> Result<()> {
        let dst = self.writable_bytes_at(offset, bytes.len(), 1)?;
        volatile_copy(bytes.as_ptr(), dst, bytes.len());
        Ok(())
    }

    /// Borrows the byte at `offset` as an atomic.
    ///
    /// # Errors
    ///
    /// As [`Region::write_at`].
    pub fn atomic_u8(&self, offset: usize) -> Result<&AtomicU8> {
        let at = self.writable_bytes_at(offset, 1, 1)?;
        // SAFETY: in bounds and mapped read-write as long as the region is borrowed; an atomic allows writes by others.
        Ok(unsafe { AtomicU8::from_ptr(at) })
    }

    /// Borrows the four bytes at `offset`, a multiple of 4, as an atomic.
    ///
    /// # Errors
    ///
    /// As [`Region::write_at`]; [`Error::Invalid`] too for an offset that is not aligned.
    pub fn atomic_u32(&self, offset: usize) -> Result<&AtomicU32> {
        let at = self.writable_bytes_at(offset, 4, 4)?;
        // SAFETY: as above, and aligned: the region begins on a page.
        Ok(unsafe { AtomicU32::from_ptr(at.cast()) })
    }

    /// Borrows the eight bytes at `offset`, a multiple of 8, as an atomic.
    ///
    /// # Errors
    ///
    /// As [`Region::atomic_u32`].
    pub fn atomic_u64(&self, offset: usize) -> Result<&AtomicU64> {
        let at = self.writable_bytes_at(offset, 8, 8)?;
        // SAFETY: as above, and aligned: the region begins on a page.
        Ok(unsafe { AtomicU64::from_ptr(at.cast()) })
    }

    /// Borrows the region as bytes.
    ///
    /// # Safety
    ///
    /// As long as the slice lives, no process may write to the region, no code may unmap or move a part of it, and
    /// the process must not be a forked child for which [`Region::check`] fails. A touch of a page that can't be had
    /// is SIGBUS.
    pub unsafe fn as_slice(&self) -> &[u8] {
        // SAFETY: the range is mapped as long as the region is borrowed; the rest is the caller's promise.
        unsafe { std::slice::from_raw_parts(self.as_ptr(), self.len) }
    }

    /// Borrows the region as bytes that can be written.
    ///
    /// # Safety
    ///
    /// As for [`Region::as_slice`]; no process may read the region either, and it must be writable.
    pub unsafe fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as for `as_slice`.
        unsafe { std::slice::from_raw_parts_mut(self.as_ptr(), self.len) }
    }

    fn bytes_at(&self, offset: usize, len: usize, align: usize) -> Result<*mut u8> {
        let invalid = |rule| Error::Invalid { what: "the offset in a region in bytes", value: offset as u64, rule };
        self.check()?;
        if offset.checked_add(len).is_none_or(|end| end > self.len) {
            return Err(invalid("offset plus length must lie within the region"));
        }
        if !offset.is_multiple_of(align) {
            return Err(invalid("it must be a multiple of the size of what is accessed"));
        }
        Ok(self.as_ptr().wrapping_add(offset))
    }

    fn writable_bytes_at(&self, offset: usize, len: usize, align: usize) -> Result<*mut u8> {
        if !self.writable {
            return Err(Error::Invalid {
                what: "the offset in a region in bytes",
                value: offset as u64,
                rule: "the region was attached read-only",
            });
        }
        self.bytes_at(offset, len, align)
    }
}

/// Copies by volatile words where both sides allow it, else by bytes.
fn volatile_copy(src: *const u8, dst: *mut u8, len: usize) {
    const WORD: usize = size_of::<usize>();
    let together = (src as usize) % WORD == (dst as usize) % WORD;
    let head = if together { ((src as usize).wrapping_neg() % WORD).min(len) } else { len };
    let words = (len - head) / WORD;
    // SAFETY: the callers have checked that `len` bytes are mapped on both sides, and one of them is a Rust slice
    // that does not overlap a region; words are aligned on both sides because the distances to a word border are equal.
    unsafe {
        for i in 0..head {
            dst.add(i).write_volatile(src.add(i).read_volatile());
        }
        let (src_words, dst_words) = (src.add(head).cast::<usize>(), dst.add(head).cast::<usize>());
        for i in 0..words {
            dst_words.add(i).write_volatile(src_words.add(i).read_volatile());
        }
        for i in head + words * WORD..len {
            dst.add(i).write_volatile(src.add(i).read_volatile());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::volatile_copy;

    #[test]
    fn a_volatile_copy_moves_every_byte_at_every_alignment() {
        let source: Vec<u8> = (0..64u8).collect();
        for from in 0..9 {
            for to in 0..9 {
                for len in 0..48 {
                    let mut target = [0xee_u8; 64];
                    volatile_copy(source[from..].as_ptr(), target[to..].as_mut_ptr(), len);
                    assert_eq!(&target[to..to + len], &source[from..from + len]);
                    assert!(target[..to].iter().chain(&target[to + len..]).all(|&byte| byte == 0xee));
                }
            }
        }
    }
}
