//! The guard of a forked child: answers its faults by SIGBUS when the engine is gone.
//!
//! The child keeps a duplicate of its userfaultfd, so that the end of the engine does not turn its missing pages into
//! zero pages. But then nobody would answer: threads that touch them would sleep for ever. The guard sleeps until
//! the engine hangs up (an orderly shutdown closes the lifeline, a crash does too) and then answers in its place.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::page::{page_floor, page_size};
use crate::process::ledger::Private;
use crate::sys::{Message, MsgBuffer, Stop, Userfault};

/// The lowest address that the kernel lets a range of UFFDIO_WAKE begin at on any configuration (`mmap_min_addr`).
const LOWEST_ADDRESS: usize = 1 << 16;

/// What the guard watches.
pub(crate) struct Guard {
    pub(crate) lifeline: Arc<Private<OwnedFd>>,
    pub(crate) owner: OwnedFd,
    pub(crate) uffd: Arc<Private<Userfault>>,
    pub(crate) messages: MsgBuffer,
}

impl Guard {
    /// Waits for the engine's end, then answers every fault of this process by SIGBUS, as long as the process lives.
    pub(crate) fn run(mut self) {
        if !self.wait_for_hang_up() {
            // The numbers may be somebody else's descriptors by now, which are not to be closed.
            std::mem::forget(self);
            return;
        }
        // What the engine had read and not answered is nobody's now: whoever sleeps touches again.
        let _ = self.uffd.wake(LOWEST_ADDRESS, highest_address() - LOWEST_ADDRESS);
        loop {
            let uffd = &self.uffd;
            let mut ready = [PollFd::new(uffd.as_fd(), PollFlags::POLLIN)];
            if matches!(poll(&mut ready, PollTimeout::NONE), Err(errno) if errno != Errno::EINTR) {
                return;
            }
            let mut put_off = false;
            let _ = uffd.read(&mut self.messages, |message| match message {
                Message::Fault { addr, .. } => put_off |= !refuse(uffd, page_floor(addr)),
                Message::Unmap { start, end } => drop(uffd.wake(start, end - start)),
                Message::Remap { from, len, .. } => drop(uffd.wake(from, len)),
                Message::Remove { .. } | Message::Fork(_) => {}
            });
            if put_off {
                // An address space in the middle of a change: let the thread that changes it run.
                std::thread::yield_now();
            }
        }
    }

    /// Answers `false` when there is nothing to watch any more.
    fn wait_for_hang_up(&self) -> bool {
        loop {
            let mut watched = [
                PollFd::new(self.lifeline.as_fd(), PollFlags::empty()),
                PollFd::new(self.owner.as_fd(), PollFlags::POLLIN),
            ];
            match poll(&mut watched, PollTimeout::NONE) {
                Ok(_) => {}
                Err(Errno::EINTR) => continue,
                Err(_) => return false,
            }
            let happened = |fd: &PollFd<'_>| fd.revents().unwrap_or(PollFlags::empty());
            if watched.iter().any(|fd| happened(fd).contains(PollFlags::POLLNVAL)) {
                // The application closed descriptors that are not its own; their numbers may be anything now.
                return false;
            }
            if !happened(&watched[0]).is_empty() || !happened(&watched[1]).is_empty() {
                return true;
            }
        }
    }
}

/// Makes a page a SIGBUS; answers `false` when the thread was only woken to try again.
fn refuse(uffd: &Userfault, addr: usize) -> bool {
    match uffd.poison(addr, page_size()).stop {
        None => true,
        Some(stop) => {
            let _ = uffd.wake(addr, page_size());
            stop != Stop::Changing
        }
    }
}

/// The end of the part of the address space that applications can map, one page short of it: the kernel refuses a
/// range that ends beyond.
fn highest_address() -> usize {
    // 47 bits on x86-64 (also with five paging levels, unless an application asks for more); where the architecture
    // maps higher, this very program lies there.
    let here = LOWEST_ADDRESS.max(highest_address as fn() -> usize as usize);
    let bits = usize::BITS - here.leading_zeros();
    (1usize << bits.max(47)) - page_size()
}
