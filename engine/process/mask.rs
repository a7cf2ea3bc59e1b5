//! SIGBUS for pages where the kernel has no UFFDIO_POISON (before Linux 6.6): a *mask*.
//!
//! remap_file_pages(2) has the kernel map other pages of the *same* object at an address that it is mapped at already.
//! Far beyond the end of the object every touch is SIGBUS by the kernel itself, whoever lives. It is done in one step, so
//! that nobody ever sees anything else; it is refused where no shared mapping of a file is (any more), so that it
//! can't take the place of foreign memory, as a mapping of something else by address (MAP_FIXED) could; and it
//! reports no unmap, for which the thread that asks would have to read its own event.
//!
//! The page is out of its userfaultfd then, and would be inherited over fork. Both are mended at once, so that a later
//! unmap of it is reported, and a child finds its addresses free.

use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::{Mutex, MutexGuard, PoisonError};

use libc::c_void;
use nix::errno::Errno;
use nix::sys::mman::{MmapAdvise, ProtFlags, madvise, mprotect, munlock};

use super::ledger::Private;
use super::mapping::{Mapping, Placement};
use super::{gate, new_memfd, try_gate};
use crate::page::page_size;
use crate::sys::{Features, Liveness, Opener, Stop, Userfault};
use crate::{Error, Result};

/// Where the masks of an object begin, in bytes: beyond any object that can be mapped, and with room for every
/// address below the largest offset (2^63 bytes).
pub(crate) const FAR_BYTES: usize = 1 << 62;

/// What became of a range that was to be masked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Masked {
    /// It is SIGBUS from now on. Who waits there is to be woken.
    Done,
    /// A fork is under way, or the address space is changing: to be tried again soon.
    Later,
    /// The kernel has no memory for it, or no mapping more (`vm.max_map_count`, RLIMIT_MEMLOCK).
    NoRoom,
    /// It is no part of an object any more; an event says so, or said so.
    Gone,
    /// It was unmapped in the moment when its unmap was not reported.
    GoneUnseen,
}

/// Held by a guard from before a mask until the engine is told if its page was unmapped unseen.
static MASKING: Mutex<()> = Mutex::new(());

/// Begins to mask a page that another process keeps the table of. The caller keeps forks away meanwhile.
pub(crate) fn begin() -> MutexGuard<'static, ()> {
    MASKING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits until the engine is told of every unmap up to now: what is asked of it after this is answered accordingly. The
/// caller keeps forks away.
pub(crate) fn settle() {
    drop(begin());
}

/// Masks `len` bytes at `start`, of which a message of `uffd` said that they are missing. For the process itself only.
/// Waits for nobody and allocates nothing.
pub(crate) fn mask(uffd: &Userfault, start: usize, len: usize) -> Masked {
    // Else a child could get the mask before it is taken out of what is inherited.
    let Some(_gate) = try_gate() else { return Masked::Later };
    if uffd.liveness() == Liveness::Changing {
        // What is unread may be that the range was unmapped.
        return Masked::Later;
    }
    match map_and_register(uffd, start, len) {
        Masked::Done => {}
        refused => return refused,
    }
    match is_mask(uffd, start) {
        Some(true) => Masked::Done,
        Some(false) => {
            // Foreign memory that took the address in between: it is not ours to serve.
            let _ = uffd.unregister(start, len);
            Masked::GoneUnseen
        }
        None => Masked::Later,
    }
}

/// As [`mask`], for a page of an address space that has been changing for so long that the change may wait for this very
/// page: mremap brings the pages of a locked mapping that it grows before it reports anything, and as long as it has
/// reported nothing, the kernel poisons nothing.
pub(crate) fn mask_while_changing(uffd: &Userfault, start: usize, len: usize) -> Masked {
    let Some(_gate) = try_gate() else { return Masked::Later };
    map_and_register(uffd, start, len)
}

fn map_and_register(uffd: &Userfault, start: usize, len: usize) -> Masked {
    let mut mapped = map_far(start, len);
    if mapped == Err(Errno::EAGAIN) {
        // Locked memory is counted twice in that moment, and RLIMIT_MEMLOCK has no room: a mask needn't be locked.
        // SAFETY: only what may be swapped out changes, and nothing is there.
        let _ = unsafe { munlock(pointer(start), len) };
        mapped = map_far(start, len);
    }
    match mapped {
        Ok(()) => {}
        Err(Errno::EINVAL) => return Masked::Gone,
        Err(_) => return Masked::NoRoom,
    }
    // Refused for an address that is unmapped by now, which the registration finds out.
    let _ = dont_fork(start, len);
    match uffd.register_missing(start, len) {
        Ok(_) => Masked::Done,
        Err(Errno::EINVAL | Errno::EBUSY) => Masked::GoneUnseen,
        Err(_) => Masked::NoRoom,
    }
}

/// Masks a whole mapping for want of room for a part of it; if not even that is possible, takes the access to it away: a
/// touch is SIGSEGV then. Either fails closed.
pub(crate) fn give_up(uffd: &Userfault, start: usize, len: usize) -> Masked {
    match mask(uffd, start, len) {
        // Refused too where its parts differ, as in what an application has protected.
        Masked::NoRoom | Masked::Gone => {}
        masked => return masked,
    }
    // SAFETY: the bytes stay as they are; whoever touches them gets a signal, as for every page that can't be had.
    match unsafe { mprotect(pointer(start), len, ProtFlags::PROT_NONE) } {
        Ok(()) => Masked::Done,
        Err(_) => Masked::NoRoom,
    }
}

/// Finds out whether this system masks pages, on memory that is thrown away.
///
/// # Errors
///
/// The errno of remap_file_pages(2), as where a seccomp policy forbids it; what making such memory answers.
pub(crate) fn check(opener: &Opener) -> Result<()> {
    let object = new_memfd(c"kiomap-probe")?;
    nix::unistd::ftruncate(&object, page_size() as i64).map_err(Error::sys("sizing a memfd"))?;
    let uffd = Private::open(|| opener.open(Features::empty()).map(|(uffd, _)| uffd))?;
    // A child would keep it. Declared before the mapping, as is the descriptor: what comes last is dropped first.
    let _gate = gate();
    let mapping = Mapping::hidden(object.as_fd(), page_size(), 0, Placement::Anywhere)?;
    uffd.register_missing(mapping.addr(), mapping.len()).map_err(Error::sys("UFFDIO_REGISTER"))?;
    let refused = Error::sys("remap_file_pages in place of UFFDIO_POISON, which needs Linux 6.6");
    map_far(mapping.addr(), mapping.len()).map_err(&refused)?;
    uffd.register_missing(mapping.addr(), mapping.len()).map_err(Error::sys("UFFDIO_REGISTER"))?;
    match is_mask(&uffd, mapping.addr()) {
        Some(true) => Ok(()),
        // It would not be recognised.
        _ => Err(refused(Errno::ENOSYS)),
    }
}

/// Tells whether the page at `start`, which was just registered, is a mask; `None` while that can't be told.
fn is_mask(uffd: &Userfault, start: usize) -> Option<bool> {
    // Of a hole of an object EFAULT is said, of a page that is there something else again.
    match uffd.r#continue(start, page_size()).stop {
        Some(Stop::Changing) => return None,
        Some(Stop::Other(Errno::EINVAL)) => {}
        _ => return Some(false),
    }
    // Of memory that is no object's the same, but it takes a zero page, which is what it would show anyway.
    match uffd.zeropage(start, page_size()).stop {
        Some(Stop::Changing) => None,
        Some(Stop::BadSource) => Some(true),
        _ => Some(false),
    }
}

fn map_far(start: usize, len: usize) -> std::result::Result<(), Errno> {
    // By the address, so that the masks of neighbours follow on and the kernel makes one mapping of them.
    let pgoff = (FAR_BYTES + start) / page_size();
    // SAFETY: only a shared mapping of a file is replaced, by one of the same file that shows no bytes: a touch of it is
    // a signal, as for every page that can't be had.
    let answer = unsafe { libc::syscall(libc::SYS_remap_file_pages, start, len, 0, pgoff, libc::MAP_NONBLOCK) };
    Errno::result(answer).map(drop)
}

fn dont_fork(start: usize, len: usize) -> std::result::Result<(), Errno> {
    // SAFETY: no bytes change; a child of a raw clone has nothing there.
    unsafe { madvise(pointer(start), len, MmapAdvise::MADV_DONTFORK) }
}

fn pointer(start: usize) -> NonNull<c_void> {
    NonNull::new(start as *mut c_void).unwrap_or(NonNull::dangling())
}
