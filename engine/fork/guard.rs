//! The guard of a forked child: answers its faults by SIGBUS when the engine is gone.
//!
//! The child keeps a duplicate of its userfaultfd, so that the end of the engine does not turn its missing pages into
//! zero pages. But then nobody would answer: threads that touch them would sleep for ever. The guard sleeps until
//! the engine hangs up (an orderly shutdown closes the lifeline, a crash does too) and then answers in its place.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::page::{page_floor, page_size};
use crate::process::ledger::Private;
use crate::sys::{Message, MsgBuffer, Stop, Userfault};

/// What the guard watches.
pub(crate) struct Guard {
    pub(crate) lifeline: Arc<Private<OwnedFd>>,
    pub(crate) owner: OwnedFd,
    pub(crate) uffd: Arc<Private<Userfault>>,
    pub(crate) messages: MsgBuffer,
}

impl Guard {
    /// Waits for the engine's end, then answers every fault of this process by SIGBUS, as long as the process lives.
    /// Says `ready` when it has descriptors that nobody else can close.
    pub(crate) fn run(mut self, ready: impl FnOnce()) {
        self.take_own_descriptors();
        ready();
        if self.wait_for_hang_up() {
            // What the engine had read and not answered is nobody's now: whoever sleeps touches again.
            let lowest = lowest_address();
            let _ = self.uffd.wake(lowest, highest_address() - lowest);
            while self.answer() {}
        }
        // The numbers may be somebody else's descriptors by now, which are not to be closed.
        std::mem::forget(self);
    }

    /// Gets a descriptor table of its own, with nothing in it but what it watches: the application may close what it
    /// likes, and the guard keeps nothing of the application's open. Where the system forbids that (a seccomp policy),
    /// the table stays shared.
    fn take_own_descriptors(&self) {
        // SAFETY: unshare(2) changes what numbers mean to this thread only.
        if unsafe { libc::unshare(libc::CLONE_FILES) } != 0 {
            return;
        }
        let mut kept = [self.lifeline.as_raw_fd(), self.owner.as_raw_fd(), self.uffd.as_raw_fd()].map(|fd| fd as u32);
        kept.sort_unstable();
        let mut from = 0;
        for fd in kept {
            if fd > from {
                close_range(from, fd - 1);
            }
            from = fd + 1;
        }
        close_range(from, u32::MAX);
    }

    /// Waits for messages and answers them; `false` when that is not possible any more.
    fn answer(&mut self) -> bool {
        let uffd = &self.uffd;
        let mut ready = [PollFd::new(uffd.as_fd(), PollFlags::POLLIN)];
        match poll(&mut ready, PollTimeout::NONE) {
            Err(Errno::EINTR) => return true,
            Err(_) => return false,
            Ok(_) if ready[0].revents().is_some_and(|events| events.contains(PollFlags::POLLNVAL)) => return false,
            Ok(_) => {}
        }
        let mut put_off = false;
        let read = uffd.read(&mut self.messages, |message| match message {
            Message::Fault { addr, .. } => put_off |= !refuse(uffd, page_floor(addr)),
            Message::Unmap { start, end } => drop(uffd.wake(start, end - start)),
            Message::Remap { from, len, .. } => drop(uffd.wake(from, len)),
            Message::Remove { .. } | Message::Fork(_) => {}
        });
        if put_off {
            // An address space in the middle of a change: let the thread that changes it run.
            std::thread::yield_now();
        }
        read.is_ok()
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

/// Closes the descriptors `from..=to` of this thread's table.
fn close_range(from: u32, to: u32) {
    if from <= to {
        // SAFETY: the table is this thread's own, and no value of this thread owns any of them.
        unsafe { libc::syscall(libc::SYS_close_range, from, to, 0) };
    }
}

/// The lowest address that an application can map, and a range may begin at: as the system says, else the usual.
fn lowest_address() -> usize {
    let set = std::fs::read_to_string("/proc/sys/vm/mmap_min_addr");
    let set: usize = set.ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0);
    set.max(1 << 16).next_multiple_of(page_size())
}

/// The end of the part of the address space that applications map, one page short of it: the kernel refuses a range that
/// ends beyond.
fn highest_address() -> usize {
    // The first stack lies at its end, whatever the architecture and its paging levels. The kernel left random bytes
    // on it and tells where.
    // SAFETY: getauxval(3) only looks up a value.
    let on_the_stack = unsafe { libc::getauxval(libc::AT_RANDOM) } as usize;
    let bits = if on_the_stack == 0 { 47 } else { usize::BITS - on_the_stack.leading_zeros() };
    (1usize << bits) - page_size()
}
