//! What every page should hold, in memory that all processes of a round share: written by the engine's process between
//! operations, read by any.

use std::sync::atomic::{AtomicU8, Ordering};

use kiomap::page_size;

use crate::script::{PAGES, VMAPS, stamp};

/// What a touch of a page comes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Avail {
    /// SIGBUS.
    Bus,
    /// The bytes of the sheet.
    Bytes,
    /// Either: the list was taken back, and nobody knows whether a neighbour's fault had brought the page.
    Unknown,
}

/// A copy is the same memory.
#[derive(Clone, Copy)]
pub(crate) struct Sheet {
    base: *mut u8,
}

// SAFETY: the memory is never unmapped, and is written only between operations, while nobody else reads.
unsafe impl Send for Sheet {}
// SAFETY: as above.
unsafe impl Sync for Sheet {}

impl Sheet {
    pub(crate) fn new() -> Sheet {
        let bytes = (1 + 2 * VMAPS * PAGES) * page_size();
        let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping, which is never unmapped.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), bytes, prot, flags, -1, 0) };
        assert_ne!(base, libc::MAP_FAILED);
        Sheet { base: base.cast() }
    }

    fn flag(self, vmap: usize, pgoff: u64) -> &'static AtomicU8 {
        assert!(vmap < VMAPS && pgoff < PAGES as u64 && VMAPS * PAGES <= page_size());
        // SAFETY: within the first page of the mapping, which is never unmapped and used by atomics only.
        unsafe { AtomicU8::from_ptr(self.base.add(vmap * PAGES + pgoff as usize)) }
    }

    pub(crate) fn avail(self, vmap: usize, pgoff: u64) -> Avail {
        if pgoff >= PAGES as u64 {
            return Avail::Bus;
        }
        match self.flag(vmap, pgoff).load(Ordering::Acquire) {
            0 => Avail::Bus,
            1 => Avail::Bytes,
            _ => Avail::Unknown,
        }
    }

    pub(crate) fn set_avail(self, vmap: usize, pgoff: u64, avail: Avail) {
        self.flag(vmap, pgoff).store(avail as u8, Ordering::Release);
    }

    fn page(self, vmap: usize, pgoff: u64, which: usize) -> *mut u8 {
        assert!(vmap < VMAPS && pgoff < PAGES as u64);
        self.base.wrapping_add((1 + 2 * (vmap * PAGES + pgoff as usize) + which) * page_size())
    }

    /// The bytes that the page has.
    pub(crate) fn now(self, vmap: usize, pgoff: u64) -> &'static [u8] {
        // SAFETY: a page of the mapping, which is written only between operations, when no slice is held.
        unsafe { std::slice::from_raw_parts(self.page(vmap, pgoff, 0), page_size()) }
    }

    /// The bytes that the list gives it.
    pub(crate) fn list(self, vmap: usize, pgoff: u64) -> &'static [u8] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts(self.page(vmap, pgoff, 1), page_size()) }
    }

    pub(crate) fn write(self, vmap: usize, pgoff: u64, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= page_size());
        // SAFETY: within a page of the mapping; only the engine's process writes, while no other reads.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.page(vmap, pgoff, 0).add(at), bytes.len()) };
    }

    /// Sets what the list gives, and that the page has it.
    pub(crate) fn set_list(self, vmap: usize, pgoff: u64, bytes: &[u8]) {
        assert_eq!(bytes.len(), page_size());
        // SAFETY: as above.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.page(vmap, pgoff, 1), bytes.len()) };
        self.write(vmap, pgoff, 0, bytes);
    }

    /// Makes the page what the list gives again.
    pub(crate) fn restore(self, vmap: usize, pgoff: u64) {
        self.write(vmap, pgoff, 0, self.list(vmap, pgoff));
    }

    pub(crate) fn word(bytes: &[u8], word: usize) -> u64 {
        u64::from_ne_bytes(bytes[word * 8..word * 8 + 8].try_into().unwrap())
    }
}

/// The bytes of a page of data: no two words of a round are the same.
pub(crate) fn data_page(vmap: usize, pgoff: u64) -> Vec<u8> {
    let words = (page_size() / 8) as u64;
    let key = (vmap as u64 + 1) << 32 | pgoff;
    (0..words).flat_map(|word| stamp(key, word).to_ne_bytes()).collect()
}
