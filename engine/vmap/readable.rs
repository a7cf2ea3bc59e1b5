//! Where the bytes of a vmap's resident pages are read, to copy them into memory that is not the vmap's.
//!
//! A plain mapping of the object would put a zero page into each hole that is read, for everyone, and asking first whether a
//! page is there would race with whoever takes it away. So the mapping is registered for missing pages with a userfaultfd
//! that answers them by SIGBUS at once (`UFFD_FEATURE_SIGBUS`): a system call that reads a page of it gets the page's bytes or
//! `EFAULT`.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::sys::uio::{RemoteIoVec, process_vm_readv};

use super::object::Object;
use crate::page::page_size;
use crate::process::gate;
use crate::process::ledger::Private;
use crate::process::mapping::{Mapping, Placement};
use crate::sys::{Features, Opener, Userfault};
use crate::{Error, Result};

/// Where such mappings lie, from before they have access until they are gone. Locked under the gate.
static RANGES: Mutex<BTreeMap<u64, Range<usize>>> = Mutex::new(BTreeMap::new());

/// The addresses of all such mappings of this process, and perhaps of some that are gone.
pub(crate) fn ranges() -> Vec<Range<usize>> {
    let _gate = gate();
    lock_ranges().values().cloned().collect()
}

fn lock_ranges() -> MutexGuard<'static, BTreeMap<u64, Range<usize>>> {
    RANGES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A mapping of a whole vmap that only system calls read.
#[derive(Debug)]
pub(crate) struct Readable {
    /// Declared before the descriptor: unmapping comes before closing, which would unregister.
    mapping: Mapping,
    _uffd: Private<Userfault>,
    /// The last to go.
    _known: Known,
}

/// An entry in [`RANGES`], by a number: when it goes, its addresses may be another's.
#[derive(Debug)]
struct Known(u64);

impl Known {
    fn enter(mapping: &Mapping) -> Known {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let _gate = gate();
        lock_ranges().insert(number, mapping.addr()..mapping.addr() + mapping.len());
        Known(number)
    }
}

impl Drop for Known {
    fn drop(&mut self) {
        let _gate = gate();
        lock_ranges().remove(&self.0);
    }
}

impl Readable {
    /// Maps an object of `nr_pages` pages.
    pub(super) fn open(opener: &Opener, object: &Object, nr_pages: u64) -> Result<Readable> {
        let overflow = Error::Overflow { what: "the size of a vmap in pages", base: nr_pages, len: page_size() as u64 };
        let len = usize::try_from(nr_pages).ok().and_then(|n| n.checked_mul(page_size())).ok_or(overflow)?;
        let uffd = Private::open(|| opener.open(Features::SIGBUS).map(|(uffd, _)| uffd))?;
        let mapping = Mapping::hidden(object.memfd(), len, object.base(), Placement::Anywhere)?;
        uffd.register_missing(mapping.addr(), len).map_err(Error::sys("UFFDIO_REGISTER for reading a vmap"))?;
        let known = Known::enter(&mapping);
        mapping.reveal(false)?;
        Ok(Readable { mapping, _uffd: uffd, _known: known })
    }

    /// Where pages lie that only system calls may read, and how many of these there are; `None` past the end.
    pub(crate) fn part(&self, pages: Range<u64>) -> Option<(*const u8, u64)> {
        let nr_pages = (self.mapping.len() / page_size()) as u64;
        let nr = pages.end.min(nr_pages).checked_sub(pages.start).filter(|&nr| nr > 0)?;
        Some(((self.mapping.addr() + pages.start as usize * page_size()) as *const u8, nr))
    }

    /// Reads the pages from `pgoff` on into a buffer of whole pages; tells how many of them the object holds before the first
    /// that it does not.
    pub(crate) fn read(&self, pgoff: u64, buf: &mut [u8]) -> u64 {
        let Some((src, nr)) = self.part(pgoff..pgoff + (buf.len() / page_size()) as u64) else { return 0 };
        let buf = &mut buf[..nr as usize * page_size()];
        let remote = RemoteIoVec { base: src as usize, len: buf.len() };
        let read = process_vm_readv(nix::unistd::getpid(), &mut [std::io::IoSliceMut::new(buf)], &[remote]);
        // EFAULT at a hole; where a policy forbids the call, nothing is known to be there.
        read.map_or(0, |bytes| (bytes / page_size()) as u64)
    }
}
